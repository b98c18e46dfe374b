//! Calls that no honest client makes: refused in clear words, and the node is none the worse.

use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use futures::future::Either;
use futures::{StreamExt as _, stream};
use portwarden::proto::v1::leases_client::LeasesClient;
use portwarden::proto::{reason as reasons, v1};
use prost::Message as _;
use prost::bytes::{Buf, BufMut as _, Bytes};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};

use crate::support::{BINARY, Cluster, wait_for};
use crate::wire::{Door, block_on, claim, ports, reason, refused, violation};

/// No node may ever have had more in memory: far more than honest use takes, far less than what the
/// calls below would cost if they were not bounded.
const RESIDENT_MAX_MIB: u64 = 1024;

const ALLOCATE: &str = "/portwarden.v1.Allocator/Allocate";

/// Bytes as they are, under any method's name.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

async fn send(door: &Door, path: &'static str, message: Bytes) -> Result<Bytes, Status> {
    let mut grpc = tonic::client::Grpc::new(door.channel.clone());
    grpc.ready().await.expect("a connection");
    let answer = grpc.unary(Request::new(message), PathAndQuery::from_static(path), Raw).await?;
    Ok(answer.into_inner())
}

/// A field of wire type 2.
fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, &mut bytes);
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}

/// The same processes as before serve, and none of them has grown beyond all bounds.
fn assert_unharmed(cluster: &Cluster, pids: &[u32]) {
    let now: Vec<_> = cluster.nodes.iter().map(|n| n.pid()).collect();
    assert_eq!(now, pids);
    for at in 0..cluster.nodes.len() {
        let name = format!("after-{at}");
        let args = ["allocate", &name, "--worker", "w", "--ports", "1"];
        cluster.cli_at(&cluster.nodes[at].client(), &args).ok();
        let peak = cluster.peak_resident_mib(at);
        assert!(peak < RESIDENT_MAX_MIB, "node {} took {peak} MiB", cluster.nodes[at].id);
        eprintln!("node {}: at most {peak} MiB", cluster.nodes[at].id);
    }
}

fn pids(cluster: &Cluster) -> Vec<u32> {
    cluster.nodes.iter().map(|n| n.pid()).collect()
}

#[test]
fn oversized_messages_are_refused_by_their_size() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_999);
    let pids = pids(&cluster);
    block_on(async {
        for door in Door::all(&cluster) {
            let huge = Bytes::from(vec![0u8; 100 << 20]);
            let status = refused(Code::OutOfRange, send(&door, ALLOCATE, huge).await);
            for said in ["104857600", "1048576"] {
                assert!(status.message().contains(said), "size and limit: {status:?}");
            }
            // Two bytes each on the wire, a hundred times that when they are read.
            let million = Bytes::from([0x0a, 0x00].repeat(1_000_000));
            let status = refused(Code::OutOfRange, send(&door, ALLOCATE, million).await);
            assert!(status.message().contains("2000000"), "{status:?}");
            // As many as get through, many times at once.
            let most = Bytes::from([0x0a, 0x00].repeat(500_000));
            let calls = (0..8).map(|_| send(&door, ALLOCATE, most.clone()));
            for answer in futures::future::join_all(calls).await {
                let (field, text) = violation(answer);
                assert_eq!(
                    (field.as_str(), text.as_str()),
                    ("claims", "\"500000\" must be 1 to 64 claims")
                );
            }
            let gpus = [field(1, b"h"), field(5, b"").repeat(400_000)].concat();
            let gpus = Bytes::from([field(1, b"x"), field(2, &gpus)].concat());
            let (field, text) =
                violation(send(&door, "/portwarden.v1.Workers/Register", gpus).await);
            assert_eq!(field, "spec.gpus");
            assert!(text.contains("400000") && text.contains("64"), "{text}");
        }
    });
    assert_unharmed(&cluster, &pids);
}

#[test]
fn rubbish_in_every_field_is_refused_by_name_value_and_limit() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_999);
    let pids = pids(&cluster);
    block_on(async {
        for mut door in Door::all(&cluster) {
            let gang = (0..65).map(|i| claim(&format!("g{i}"), "w", 1)).collect();
            let gang = v1::AllocateRequest { claims: gang, dry_run: false };
            let (named, text) = violation(door.allocator.allocate(gang).await);
            assert_eq!(
                (named.as_str(), text.as_str()),
                ("claims", "\"65\" must be 1 to 64 claims")
            );

            let one = ports(v1::port_request::Ports::Count(1));
            let many = v1::Claim { ports: vec![one; 33], ..claim("a", "w", 1) };
            let (named, text) = violation(door.allocate(many).await);
            assert_eq!(named, "claims[0].ports");
            assert!(text.contains("33") && text.contains("32"), "{text}");

            let long = "n".repeat(10_000);
            let select = |selector: String| {
                let policy = v1::Policy::Binpack.into();
                Some(v1::claim::Placement::Select(v1::Selection { selector, policy }))
            };
            let labels = |key: &str, value: &str| [(key.to_string(), value.to_string())].into();
            let good = || claim("a", "w", 1);
            for (wrong, named, limit) in [
                (v1::Claim { name: long.clone(), ..good() }, "name", "253"),
                (v1::Claim { uid: long.clone(), ..good() }, "uid", "128"),
                (claim("a", &long, 1), "worker", "253"),
                (v1::Claim { labels: labels(&long, ""), ..good() }, "labels", "63"),
                (v1::Claim { labels: labels("k", &long), ..good() }, "labels[k]", "63"),
                (
                    v1::Claim { placement: select("k=v,".repeat(512)), ..good() },
                    "select.selector",
                    "1024",
                ),
            ] {
                let (field, text) = violation(door.allocate(wrong).await);
                assert_eq!(field, format!("claims[0].{named}"));
                assert!(text.contains(limit), "{field}: {text}");
                assert!(text.len() < 300, "an error is not an echo: {text}");
            }
            let prefix = v1::ListRequest { name_prefix: long.clone(), ..Default::default() };
            assert_eq!(violation(door.allocator.list(prefix).await).0, "name_prefix");
            let selector = "(".repeat(2048);
            let list = v1::ListRequest { selector: selector.clone(), ..Default::default() };
            assert_eq!(violation(door.allocator.list(list).await).0, "selector");
            let list = v1::ListWorkersRequest { selector, ..Default::default() };
            assert_eq!(violation(door.workers.list(list).await).0, "selector");
            let get = v1::GetRequest { name: long.clone(), read: None };
            assert_eq!(violation(door.allocator.get(get).await).0, "name");

            // What no honest encoder makes; gRPC's own code for a message that cannot be read.
            let name = field(1, &field(1, b"\xff\xfe not UTF-8"));
            let status = refused(Code::Internal, send(&door, ALLOCATE, name.into()).await);
            assert!(
                status.message().contains("name") && status.message().contains("UTF-8"),
                "{status:?}"
            );
            let nested = (0..5_000).fold(Vec::new(), |inner, _| field(3, &inner));
            let groups = [0x0b].repeat(100_000); // a group begins, and never ends
            for rubbish in
                [nested, groups, vec![0xff; 10_000], vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f]]
            {
                for path in
                    [ALLOCATE, "/portwarden.v1.Workers/Register", "/portwarden.v1.Allocator/List"]
                {
                    let answer = send(&door, path, rubbish.clone().into()).await;
                    let known = [Code::Internal, Code::InvalidArgument];
                    if let Err(status) = answer {
                        assert!(known.contains(&status.code()), "{path}: {status:?}");
                    } else {
                        assert_eq!(
                            path, "/portwarden.v1.Allocator/List",
                            "unknown fields are skipped"
                        );
                    }
                }
            }
            refused(
                Code::Unimplemented,
                send(&door, "/portwarden.v1.Allocator/Nonsense", Bytes::new()).await,
            );
            // Peers have a listener of their own.
            let forward = v1::GetRequest::default().encode_to_vec();
            refused(
                Code::Unimplemented,
                send(&door, "/portwarden.peer.v1.Peer/Forward", forward.into()).await,
            );
        }
    });
    assert_unharmed(&cluster, &pids);
}

#[test]
fn two_thousand_calls_at_once_are_all_answered() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 42_999);
    let before = pids(&cluster);
    let refusals = block_on(async {
        let mut calls = tokio::task::JoinSet::new();
        // Eight connections to each node, and some eighty calls at once on each of them.
        let doors: Vec<_> = (0..8).flat_map(|_| Door::all(&cluster)).collect();
        for i in 0..2_000 {
            let mut door = doors[i % doors.len()].clone();
            calls.spawn(async move {
                match i % 4 {
                    0 => door.allocate(claim(&format!("i{i}"), "w", 1)).await.map(|_| ()),
                    1 => {
                        let list = v1::ListRequest { page_size: 10, ..Default::default() };
                        door.allocator.list(list).await.map(|_| ())
                    }
                    2 => door.workers.list(v1::ListWorkersRequest::default()).await.map(|_| ()),
                    _ => door.cluster.status(v1::StatusRequest {}).await.map(|_| ()),
                }
            });
        }
        let mut refusals = 0;
        for answer in calls.join_all().await {
            if let Err(status) = answer {
                // Whoever is turned away is told that nothing was done.
                let told = reason(&status);
                let known = [reasons::OVERLOADED, reasons::NOT_READY, reasons::NOT_EXECUTED];
                assert!(told.as_ref().is_some_and(|r| known.contains(&r.as_str())), "{status:?}");
                refusals += 1;
            }
        }
        refusals
    });
    eprintln!("{refusals} of 2000 calls were turned away");
    assert_unharmed(&cluster, &before);
    crate::support::assert_unique(&cluster.list());
}

/// What is asked for on a stream that nobody reads must not take the room of other calls for longer than it
/// takes to answer.
#[test]
fn streams_that_nobody_reads_keep_nobody_out() {
    /// More requests than there may be calls at a time: of each stream, 256 are served side by side.
    const STREAMS: usize = 90;
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_999);
    let pids = pids(&cluster);
    let leader = cluster.leader();
    block_on(async {
        let endpoint = format!("http://{}", cluster.nodes[leader].client());
        let endpoint = Endpoint::from_shared(endpoint).expect("an address");
        // Room for a few answers, which nobody makes again.
        let channel = endpoint.initial_stream_window_size(64).connect_lazy();
        let mut unread = Vec::new();
        for _ in 0..STREAMS {
            let requests = stream::iter((1..=1_000).map(|id| v1::KeepAliveRequest { id }));
            let mut leases = LeasesClient::new(channel.clone());
            let answers = leases.keep_alive(requests.chain(stream::pending())).await;
            unread.push(answers.expect("a stream"));
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        let mut door = Door::to(&cluster, leader);
        for at in 0..20 {
            let name = format!("c{at}");
            let held = door.allocate(claim(&name, "w", 1)).await.expect("room for a call");
            door.release(&name, held.token).await.expect("room for a call");
        }
        drop(unread);
    });
    assert_unharmed(&cluster, &pids);
}

#[test]
fn five_hundred_idle_connections_keep_nobody_out() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_999);
    let pids = pids(&cluster);
    let idle: Vec<_> = (0..500)
        .map(|i| {
            let node = &cluster.nodes[i % 3];
            let addr = match i % 9 {
                0..3 => node.peer(),
                3..6 => node.http(),
                _ => node.client(),
            };
            TcpStream::connect(addr).expect("it listens")
        })
        .collect();
    assert_unharmed(&cluster, &pids);
    drop(idle);
    cluster.cli(&["status", "--check"]).ok();
}

/// Idle connections must not use up the file descriptors that the log and the peers need.
#[test]
fn more_connections_than_files_leave_the_node_in_its_cluster() {
    let mut cluster = Cluster::prepare(3);
    for at in 0..3 {
        let mut command = Command::new("bash");
        command.args(["-c", "ulimit -n 256; exec \"$@\"", "bash", BINARY]);
        command.args(cluster.serve_args(at));
        cluster.spawn_as(at, command);
    }
    let leader = cluster.leader();
    cluster.worker("w", 40_999);
    let pids = pids(&cluster);
    let addr = cluster.nodes[leader].client();
    let connect = |_| {
        let addr = addr.parse().expect("an address");
        TcpStream::connect_timeout(&addr, Duration::from_secs(2)).ok()
    };
    let idle: Vec<_> = (0..600).map_while(connect).collect();
    assert_eq!(idle.len(), 600, "it stopped accepting");
    // It still leads, and syncs what comes through the others.
    for i in 0..20 {
        cluster.cli(&["allocate", &format!("i{i}"), "--worker", "w", "--ports", "1"]).ok();
    }
    assert_eq!(cluster.leader(), leader);
    // A caller is not left hanging: it is told soon that this node does not take it.
    let told = cluster.cli_at(&addr, &["list", "--timeout", "2s"]);
    assert_eq!(told.code(), 6, "{}", told.stderr());
    assert!(!told.stderr().contains("unknown"), "nothing was sent: {}", told.stderr());
    drop(idle);
    wait_for("the node to take callers again", || {
        (cluster.cli_at(&addr, &["list", "--timeout", "1s"]).code() == 0).then_some(())
    });
    assert_unharmed(&cluster, &pids);
}

/// `serve … 2>&1 | head`: nobody reads the log any more.
#[test]
fn a_node_whose_log_goes_nowhere_serves_on() {
    let mut cluster = Cluster::prepare(1);
    let mut command = Command::new("bash");
    command.args(["-c", "exec 2> >(true); wait $!; exec \"$@\"", "bash", BINARY]);
    command.args(cluster.serve_args(0)).args(["--log-level", "trace"]);
    cluster.spawn_as(0, command);
    cluster.leader();
    cluster.worker("w", 40_999);
    assert_unharmed(&cluster, &pids(&cluster));
    assert_eq!(cluster.terminate(0), Some(0));
}

/// A node that has just begun is asked how it is while its Raft writes: the one must not wait for
/// the other. (Both once held the same lock twice; the node answered nothing any more.)
#[test]
fn fresh_nodes_answer_probes_while_they_write() {
    /// Most probes of each node, and how long it goes on: a busy machine gets through fewer. Each one
    /// must be answered within the time that a call has.
    const PROBES: usize = 800;
    const PROBING: Duration = Duration::from_secs(20);
    /// So many a busy machine gets through too.
    const PROBES_MIN: usize = 50;
    let cluster = Cluster::start(3);
    cluster.worker("w", 49_999);
    block_on(async {
        let began = std::time::Instant::now();
        let probes = Door::all(&cluster).into_iter().map(|mut door| async move {
            for n in 0..PROBES {
                if n >= PROBES_MIN && began.elapsed() > PROBING {
                    return n;
                }
                // Each asks the two others.
                door.cluster.status(v1::StatusRequest {}).await.expect("a status");
            }
            PROBES
        });
        let writes = (0..8).map(|client| {
            let mut door = Door::to(&cluster, client % 3);
            async move {
                for round in 0.. {
                    let name = format!("c{client}-{round}");
                    let held = door.allocate(claim(&name, "w", 1)).await.expect("a port");
                    door.release(&name, held.token).await.expect("a release");
                }
            }
        });
        let probes = futures::future::join_all(probes);
        let writes = futures::future::join_all(writes);
        match futures::future::select(Box::pin(probes), Box::pin(writes)).await {
            Either::Left((answered, _)) => eprintln!("probes answered: {answered:?}"),
            Either::Right(_) => unreachable!("the writers do not end"),
        }
    });
}
