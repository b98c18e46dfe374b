//! Unknown means unknown: the table in `src/node/outcome.rs`, row by row.
//!
//! Failures are injected at failpoints of nodes in this process, or made with real processes. A call
//! is one attempt at one node, without the client library, so that the server's own word is heard.
//! What is checked everywhere: who was told "not done" never finds it done later, who was told
//! "done" finds it, and no server proposes a second time what the first time may commit.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use fail::FailScenario;
use portwarden::api::assembly::{Listeners, Server};
use portwarden::node::{CallError, Entry, Lifecycle, NodeConfig, Upkeep};
use portwarden::proto::{reason as reasons, v1};
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tonic::{Code, Request, Status};

use crate::support::{Cluster, wait_for};
use crate::wire::{Door, block_on, claim, reason, spec};

/// Three nodes in this process. The failpoints are the process's: one test at a time.
struct Nodes<'a> {
    servers: Vec<Server>,
    _dir: tempfile::TempDir,
    _failures: FailScenario<'a>,
}

/// Entries that may be in a log since the cluster was ready: handed to Raft, and not refused before
/// they were appended. A busy leader whose quorum is late refuses so, and is asked again.
type Proposals = Arc<AtomicUsize>;

async fn start<'a>() -> Nodes<'a> {
    let failures = FailScenario::setup();
    let dir = tempfile::tempdir().unwrap();
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut bound = Vec::new();
    for id in 1..=3 {
        bound.push((id, Listeners::bind(any, any, None).await.unwrap()));
    }
    let peer = |(id, l): &(u64, Listeners)| (*id, l.peers.local_addr().unwrap().to_string());
    let initial_cluster: BTreeMap<_, _> = bound.iter().map(peer).collect();
    let mut servers = Vec::new();
    for (id, listeners) in bound {
        let config = NodeConfig {
            id,
            data_dir: dir.path().join(id.to_string()),
            entry: Entry::Begin(initial_cluster.clone()),
            advertise_peer: initial_cluster[&id].clone(),
            advertise: listeners.clients.local_addr().unwrap().to_string(),
            snapshot_every: 20_000,
            // What the leader proposes by itself would be counted too.
            upkeep: Upkeep { checkpoint_every: 0, ..Upkeep::default() },
            lifecycle: Lifecycle::default(),
            backups: None,
        };
        servers.push(Server::start(config, listeners).await.unwrap());
    }
    futures::future::try_join_all(servers.iter().map(Server::enter_cluster)).await.unwrap();
    let nodes = Nodes { servers, _dir: dir, _failures: failures };
    let register = v1::RegisterRequest { name: "w".into(), spec: Some(spec(40_999)) };
    nodes.leader().await.workers.register(register).await.unwrap();
    nodes
}

impl Nodes<'_> {
    async fn leads(&self) -> usize {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
        let leader = self.servers[0].node.route(deadline).await.unwrap();
        let leader = leader.unwrap_or(self.servers[0].node.id());
        self.servers.iter().position(|s| s.node.id() == leader).unwrap()
    }

    fn door(&self, at: usize) -> Door {
        Door::at(self.servers[at].endpoint())
    }

    async fn leader(&self) -> Door {
        self.door(self.leads().await)
    }

    async fn follower(&self) -> Door {
        self.door((self.leads().await + 1) % 3)
    }

    /// All names that are held, as the leader has it.
    async fn held(&self) -> Vec<String> {
        let list = v1::ListRequest { page_size: 10_000, ..Default::default() };
        let listed = self.leader().await.allocator.list(list).await.unwrap().into_inner();
        listed.allocations.into_iter().map(|a| a.name).collect()
    }

    fn count_proposals(&self) -> Proposals {
        let proposals = Proposals::default();
        let (one_more, one_less) = (proposals.clone(), proposals.clone());
        let handed = move || {
            one_more.fetch_add(1, Ordering::AcqRel);
        };
        let refused = move || {
            one_less.fetch_sub(1, Ordering::AcqRel);
        };
        fail::cfg_callback("propose", handed).unwrap();
        fail::cfg_callback("propose-refused", refused).unwrap();
        proposals
    }
}

/// One attempt, with this long to live.
async fn allocate(door: &mut Door, name: &str, within: Duration) -> Result<v1::Allocation, Status> {
    let claims = vec![claim(name, "w", 1)];
    let mut request = Request::new(v1::AllocateRequest { claims, dry_run: false });
    request.set_timeout(within);
    let response = door.allocator.allocate(request).await?.into_inner();
    Ok(response.allocations.into_iter().next().expect("one of one claim"))
}

/// The server is to speak before the caller gives up, on a busy machine too.
const LONG: Duration = Duration::from_secs(30);

/// What a caller was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Done,
    NotDone,
    Unknown,
}

fn told(answer: &Result<v1::Allocation, Status>) -> Told {
    let Err(status) = answer else { return Told::Done };
    match reason(status).as_deref() {
        Some(reasons::OUTCOME_UNKNOWN) => Told::Unknown,
        Some(reasons::NOT_READY | reasons::NOT_EXECUTED | reasons::OVERLOADED) => Told::NotDone,
        other => panic!("{other:?}: {status:?}"),
    }
}

/// The rows of one node and of one hop: failpoint, how often, at the leader's door or a follower's;
/// what is told, whether it is done, and how often it was proposed.
#[test]
fn each_row_of_the_table() {
    use Told::*;
    let rows = [
        // The proposal never reaches the log, and nobody can know.
        ("propose-before-append", "1*return", false, Unknown, false, 1),
        // It is committed and applied; the answer is lost within the leader.
        ("propose-after-append", "1*return", false, Unknown, true, 1),
        ("propose-after-append", "1*return", true, Unknown, true, 1),
        // Refused before it was appended: again, until a leader takes it.
        ("propose-not-leader", "3*return", false, Done, true, 1),
        ("propose-not-leader", "3*return", true, Done, true, 1),
        ("propose-full", "1*return", false, NotDone, false, 0),
        ("propose-full", "1*return", true, NotDone, false, 0),
        // The connection to the leader cannot be made: again, then one hop.
        ("forward-before-send", "3*return", true, Done, true, 1),
        // It breaks after the request was sent, before or after it was executed; or after all that.
        ("forward-received", "1*return", true, Unknown, false, 0),
        ("forward-executed", "1*return", true, Unknown, true, 1),
        ("forward-answer-lost", "1*return", true, Unknown, true, 1),
    ];
    block_on(async {
        let nodes = start().await;
        for (at, (point, action, over_follower, tells, done, proposed)) in
            rows.into_iter().enumerate()
        {
            let mut door = match over_follower {
                true => nodes.follower().await,
                false => nodes.leader().await,
            };
            let name = format!("row{at}");
            let proposals = nodes.count_proposals();
            fail::cfg(point, action).unwrap();
            let answer = allocate(&mut door, &name, LONG).await;
            fail::remove(point);
            assert_eq!(told(&answer), tells, "{point}: {answer:?}");
            assert_eq!(proposals.load(Ordering::Acquire), proposed, "{point}: proposals");
            assert_eq!(nodes.held().await.contains(&name), done, "{point}");
            // The repeat under the same uid tells what became of it, and grants nothing twice.
            let again = allocate(&mut door, &name, LONG).await.unwrap();
            if let Ok(first) = &answer {
                assert_eq!(first, &again, "{point}");
            }
        }
        // A read changes nothing: it is tried again whatever happens, and answered.
        let mut door = nodes.follower().await;
        for point in ["forward-received", "forward-executed", "forward-answer-lost"] {
            fail::cfg(point, "2*return").unwrap();
            let get = v1::GetRequest { name: "row0".into(), read: None };
            door.allocator.get(get).await.unwrap_or_else(|status| panic!("{point}: {status:?}"));
            fail::remove(point);
        }
    });
}

/// A hundred calls at random nodes, half of them with a failure at a random failpoint.
#[test]
fn whatever_fails_nobody_is_told_wrong() {
    const POINTS: [&str; 8] = [
        "propose-before-append",
        "propose-after-append",
        "propose-not-leader",
        "propose-full",
        "forward-before-send",
        "forward-received",
        "forward-executed",
        "forward-answer-lost",
    ];
    let seed = std::env::var("PORTWARDEN_SEED").ok().and_then(|text| text.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| rand::rng().random());
    eprintln!("PORTWARDEN_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    block_on(async {
        let nodes = start().await;
        let mut doors: Vec<_> = (0..3).map(|at| nodes.door(at)).collect();
        let proposals = nodes.count_proposals();
        let mut heard = Vec::new();
        for i in 0..100 {
            let point = POINTS[rng.random_range(0..POINTS.len())];
            if rng.random_bool(0.5) {
                fail::cfg(point, "1*return").unwrap();
            }
            let name = format!("i{i}");
            let before = proposals.load(Ordering::Acquire);
            let answer = allocate(&mut doors[rng.random_range(0..3)], &name, LONG).await;
            let proposed = proposals.load(Ordering::Acquire) - before;
            assert!(proposed <= 1, "{name} was proposed {proposed} times ({point})");
            heard.push((name, told(&answer), point));
            fail::remove(point);
        }
        let held = nodes.held().await;
        for (name, told, point) in heard {
            match told {
                Told::Done => assert!(held.contains(&name), "{name} was lost ({point})"),
                Told::NotDone => assert!(!held.contains(&name), "{name} appeared ({point})"),
                Told::Unknown => {}
            }
        }
    });
}

/// A call that a peer forwarded is not forwarded on by one that does not lead: nothing was done, and
/// who forwarded it may look for the leader anew.
#[test]
fn a_call_goes_one_hop() {
    block_on(async {
        let nodes = start().await;
        let leads = nodes.leads().await;
        let (one, two) =
            (&nodes.servers[(leads + 1) % 3].node, &nodes.servers[(leads + 2) % 3].node);
        let forwards = Arc::new(AtomicUsize::new(0));
        let counter = forwards.clone();
        let count = move || {
            counter.fetch_add(1, Ordering::AcqRel);
        };
        fail::cfg_callback("forward-before-send", count).unwrap();
        let request = v1::AllocateRequest { claims: vec![claim("a", "w", 1)], dry_run: false };
        let deadline = tokio::time::Instant::now() + LONG;
        let path = "/portwarden.v1.Allocator/Allocate";
        let answer = one.forward(two.id(), path, request.encode_to_vec(), deadline).await;
        let status = answer.expect("an answer").expect_err("a refusal");
        assert_eq!(reason(&status).as_deref(), Some(reasons::NOT_LEADER), "{status:?}");
        assert_eq!(forwards.load(Ordering::Acquire), 1, "this one, and none behind it");
        assert!(nodes.held().await.is_empty());
    });
}

/// Raft ends while a proposal waits for its quorum.
#[test]
fn what_a_stopping_node_had_in_its_log_is_unknown() {
    block_on(async {
        let mut nodes = start().await;
        let leads = nodes.leads().await;
        let leader = nodes.servers.remove(leads);
        for other in nodes.servers.drain(..) {
            other.abort().await;
        }
        let mut door = Door::at(leader.endpoint());
        let proposed = Arc::new(tokio::sync::Notify::new());
        let notify = proposed.clone();
        fail::cfg_callback("propose", move || notify.notify_one()).unwrap();
        let waiting = tokio::spawn(async move { allocate(&mut door, "a", LONG).await });
        proposed.notified().await;
        leader.node.stop().await;
        let answer = waiting.await.unwrap();
        assert_eq!(told(&answer), Told::Unknown, "{answer:?}");
    });
}

/// Pieces that just end would pass for the whole table.
#[test]
fn a_backup_whose_writer_panics_ends_with_an_error() {
    block_on(async {
        let nodes = start().await;
        fail::cfg("backup-write", "panic").unwrap();
        let (_, mut pieces) = nodes.servers[0].node.backup().unwrap();
        let mut whole = None;
        while let Some(piece) = pieces.recv().await {
            whole = Some(piece.is_ok());
        }
        assert_eq!(whole, Some(false));
    });
}

/// Each has a thread and the table as it was: readers that stall would take them all.
#[test]
fn so_many_backups_are_read_at_a_time_and_one_more_is_refused() {
    block_on(async {
        let nodes = start().await;
        let node = &nodes.servers[0].node;
        fail::cfg("backup-write", "pause").unwrap();
        let mut begun = Vec::new();
        let refused = loop {
            match node.backup() {
                Ok((_, pieces)) => begun.push(pieces),
                Err(error) => break error,
            }
        };
        assert!(matches!(refused, CallError::Overloaded { .. }), "{refused:?}");
        assert_eq!(begun.len(), 4);
        fail::remove("backup-write");
        for mut pieces in begun {
            while let Some(piece) = pieces.recv().await {
                piece.unwrap();
            }
        }
        node.backup().unwrap();
    });
}

/// Without a cluster, and so without a leader: not done, within the deadline, and not later either.
#[test]
fn without_a_leader_nothing_is_done() {
    let mut cluster = Cluster::prepare(3);
    cluster.spawn(0);
    block_on(async {
        let mut door = Door::to(&cluster, 0);
        wait_for("the node to listen", || {
            std::net::TcpStream::connect(cluster.nodes[0].client()).ok()
        });
        // On a busy machine this side may stop waiting first: the server's own word is wanted.
        for attempt in 0.. {
            let name = format!("early{attempt}");
            let answer = allocate(&mut door, &name, Duration::from_secs(1 + attempt)).await;
            if answer.as_ref().is_err_and(|status| reason(status).is_some()) {
                assert_eq!(told(&answer), Told::NotDone, "{answer:?}");
                break;
            }
            assert!(answer.is_err() && attempt < 5, "{answer:?}");
        }
    });
    cluster.spawn(1);
    cluster.spawn(2);
    cluster.leader();
    cluster.worker("w", 40063);
    assert!(cluster.list().is_empty());
}

/// A leader without followers: what it has in its log when the deadline comes is unknown; what
/// still waited to be proposed is not done, now or later. And the follower's answer keeps the
/// caller's deadline, which shrinks on the way.
#[test]
fn without_a_majority_the_deadline_decides() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40999);
    let leader = cluster.leader();
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    for at in others {
        cluster.signal(at, "STOP");
    }
    const CALLS: usize = 12;
    let within = Duration::from_millis(1500);
    let answers = block_on(async {
        let door = Door::to(&cluster, leader);
        let calls = (0..CALLS).map(|i| {
            let mut door = door.clone();
            async move {
                let began = Instant::now();
                let answer = allocate(&mut door, &format!("i{i}"), within).await;
                (format!("i{i}"), answer, began.elapsed())
            }
        });
        futures::future::join_all(calls).await
    });
    for at in others {
        cluster.signal(at, "CONT");
    }
    for (name, answer, took) in &answers {
        assert!(answer.is_err(), "{name}: done without a majority");
        assert!(*took < within + Duration::from_secs(3), "{name}: {took:?}");
    }
    cluster.leader();
    cluster.cli(&["allocate", "after", "--worker", "w", "--ports", "1", "--timeout", "30s"]).ok();
    let held: Vec<_> =
        cluster.list().iter().map(|a| a["name"].as_str().unwrap().to_string()).collect();
    for (name, answer, _) in &answers {
        // The client side may have given up first: that is a doubt as well.
        let not_done = answer.as_ref().err().and_then(reason).is_some_and(|why| {
            why == reasons::NOT_EXECUTED || why == reasons::NOT_READY || why == reasons::OVERLOADED
        });
        assert!(!(not_done && held.contains(name)), "{name} appeared: {answer:?}");
    }
}

/// Appended by a leader without followers, which come back without it, and discarded when it wakes:
/// unknown, and gone.
#[test]
fn what_was_appended_and_discarded_is_unknown() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40999);
    let leader = cluster.leader();
    let others = [(leader + 1) % 3, (leader + 2) % 3];
    for at in others {
        cluster.kill(at);
    }
    let (http_at, door) = (cluster.nodes[leader].http(), cluster.nodes[leader].client());
    let last_log = || -> f64 {
        let metrics = http(&http_at, "/metrics");
        let line = metrics.lines().find_map(|l| l.strip_prefix("portwarden_log_last_index"));
        line.and_then(|l| l.split_whitespace().last()?.parse().ok()).expect("the metric")
    };
    let before = last_log();
    let waiting = std::thread::spawn(move || {
        block_on(async { allocate(&mut Door::at(&door), "lost", Duration::from_secs(30)).await })
    });
    wait_for("the entry to be appended", || (last_log() > before).then_some(()));
    cluster.signal(leader, "STOP");
    for at in others {
        cluster.spawn(at);
    }
    let awake = others.map(|at| cluster.nodes[at].client()).join(",");
    let args = ["allocate", "won", "--worker", "w", "--ports", "1", "--timeout", "30s"];
    cluster.cli_at(&awake, &args).ok();
    cluster.signal(leader, "CONT");
    let answer = waiting.join().expect("the caller");
    assert_eq!(told(&answer), Told::Unknown, "{answer:?}");
    assert_eq!(answer.unwrap_err().code(), Code::Unknown);
    let names: Vec<_> = cluster.list().iter().map(|a| a["name"].clone()).collect();
    assert_eq!(names, ["won"]);
}

fn http(address: &str, path: &str) -> String {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).expect("it listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}
