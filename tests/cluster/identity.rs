//! Who may speak as a member: a node that lost its disk, a copy of a data directory, a node of
//! another cluster, and calls for somebody else are refused by name.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use portwarden::proto::peer::peer_client::PeerClient;
use portwarden::proto::peer::{self, Header};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::support::{BINARY, Cluster, assert_unique, wait_for};
use crate::wire::block_on;

/// From design.md: a refusal to start comes within 10 s; a busy machine gets a little more.
const REFUSED_WITHIN: Duration = Duration::from_secs(15);

/// Kills all nodes, empties the directory of `wiped`, and starts it with `other` alone: every node
/// has forgotten what it did not write down, and two of three are a majority if the wiped one votes.
fn a_wiped_node_neither_votes_nor_comes_back(wiped: usize, other: usize) {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
    let before = cluster.list();
    for at in 0..3 {
        cluster.kill(at);
    }
    std::fs::remove_dir_all(cluster.data_dir(wiped)).expect("its data directory");
    cluster.spawn(other);
    cluster.spawn(wiped);
    let started = Instant::now();
    let code = cluster.ended(wiped);
    let took = started.elapsed();
    assert!(code.is_some_and(|code| code != 0), "{code:?}");
    assert!(took < REFUSED_WITHIN, "{took:?}");
    let id = cluster.nodes[wiped].id;
    let log = cluster.log(wiped);
    let refused = format!("node {id} is refused by its peers");
    let last = log.lines().find(|line| line.contains(&refused)).unwrap_or_else(|| panic!("{log}"));
    for says in ["--join", "new id", "remove"] {
        assert!(last.contains(says), "it should say {says:?}: {last}");
    }
    // Without its vote the other one alone is no majority.
    let alone = cluster.nodes[other].client();
    let read = cluster.cli_at(&alone, &["get", "a", "--timeout", "2s"]);
    assert_eq!(read.code(), 6, "{} {}", read.stdout(), read.stderr());

    let third = 3 - wiped - other;
    cluster.spawn(third);
    cluster.leader();
    assert_eq!(cluster.list(), before);
}

#[test]
fn a_wiped_node_is_refused() {
    a_wiped_node_neither_votes_nor_comes_back(1, 2);
}

/// The one that begins clusters.
#[test]
fn a_wiped_lowest_node_is_refused_and_begins_nothing() {
    a_wiped_node_neither_votes_nor_comes_back(0, 1);
}

/// Its identity is there, its log is not: it does not even ask. Nor where a snapshot is left, which knows
/// nothing of the votes and entries that came after it.
#[test]
fn a_node_whose_log_was_removed_does_not_start() {
    let mut cluster = Cluster::start_with(3, &["--snapshot-every", "10"]);
    cluster.worker("w", 40063);
    let snapshots = cluster.data_dir(2).join("snapshots");
    wait_for("a snapshot", || {
        cluster.cli(&["lease", "grant", "--ttl", "60s"]).ok();
        let mut files = std::fs::read_dir(&snapshots).ok()?.filter_map(Result::ok);
        files.any(|file| file.path().extension().is_some_and(|is| is == "snap")).then_some(())
    });
    cluster.kill(2);
    for part in ["log", "snapshots"] {
        std::fs::remove_dir_all(cluster.data_dir(2).join(part)).expect("a part of its data");
        cluster.spawn(2);
        assert!(cluster.ended(2).is_some_and(|code| code != 0));
        let log = cluster.log(2);
        let last = log.lines().last().unwrap_or_default();
        for says in ["was node 3 of cluster", "its log is gone", "--join"] {
            assert!(last.contains(says), "it should say {says:?}: {last}");
        }
    }
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").args(["-a"]).args([from, to]).status().expect("cp runs");
    assert!(copied.success());
}

/// Two processes over copies of one directory, with one incarnation: the one that is not at the
/// member's address is refused and ends; the other goes on, and is needed for every majority.
#[test]
fn a_copy_of_a_data_directory_is_found_out() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    let leader = cluster.leader();
    let original = (leader + 1) % 3;
    cluster.kill(original);
    let twin_dir = cluster.dir().join("twin");
    copy(&cluster.data_dir(original), &twin_dir);
    cluster.spawn(original);
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();

    let address = cluster.nodes[original].peer();
    let mut args = cluster.serve_args(original);
    for arg in &mut args {
        if *arg == cluster.data_dir(original).display().to_string() {
            *arg = twin_dir.display().to_string();
        }
        for (port, other) in [(":7601", ":7611"), (":7701", ":7711"), (":7801", ":7811")] {
            if arg.ends_with(port) && !arg.contains('=') {
                *arg = arg.replace(port, other);
            }
        }
    }
    args.extend(["--advertise-peer".into(), address.clone()]);
    let started = Instant::now();
    let twin = Command::new(BINARY).args(&args).stdin(Stdio::null()).output().expect("it runs");
    let said = String::from_utf8_lossy(&twin.stderr);
    assert!(started.elapsed() < REFUSED_WITHIN, "{said}");
    assert!(!twin.status.success(), "{said}");
    let id = cluster.nodes[original].id;
    let runs = format!("node {id} runs at {address}");
    // Or that it is behind what the other one has acknowledged since.
    let older = format!("is older than what node {id} has told");
    assert!(said.contains(&runs) || said.contains(&older), "{said}");
    assert!(said.contains("a copy of its data directory"), "{said}");

    let third = 3 - leader - original;
    cluster.kill(third);
    cluster.cli(&["allocate", "b", "--worker", "w", "--ports", "1", "--timeout", "30s"]).ok();
    let log = cluster.log(original);
    assert!(!log.contains("is refused by its peers"), "{log}");
    assert_unique(&cluster.list());
}

/// An older copy in the place of a directory: its node has acknowledged what it no longer has. It ends
/// before it speaks to the others, and they go on.
#[test]
fn a_data_directory_that_was_set_back_is_found_out() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    let follower = (cluster.leader() + 1) % 3;
    let older = cluster.dir().join("older");
    cluster.kill(follower);
    copy(&cluster.data_dir(follower), &older);
    cluster.spawn(follower);
    let allocate = |cluster: &Cluster, name: &str| {
        let args = ["allocate", name, "--worker", "w", "--ports", "1", "--timeout", "30s"];
        cluster.cli(&args).ok();
    };
    for i in 0..5 {
        allocate(&cluster, &format!("a{i}"));
    }
    // The third is away: what comes now is on the follower's disk for sure.
    let third = 3 - cluster.leader() - follower;
    cluster.kill(third);
    allocate(&cluster, "b");
    cluster.spawn(third);
    let status = || cluster.cli(&["status", "--check", "--members"]).code() == 0;
    wait_for("all to be well", || status().then_some(()));
    let newer = cluster.dir().join("newer");
    cluster.kill(follower);
    std::fs::rename(cluster.data_dir(follower), &newer).expect("a new name");
    copy(&older, &cluster.data_dir(follower));
    cluster.spawn(follower);
    assert_ne!(cluster.ended(follower), Some(0));
    let log = cluster.log(follower);
    let id = cluster.nodes[follower].id;
    for says in [format!("is older than what node {id} has told"), format!("member remove {id}")] {
        assert!(log.contains(&says), "it should say {says:?}: {log}");
    }
    allocate(&cluster, "c");
    // The newer one is as good as it was.
    std::fs::remove_dir_all(cluster.data_dir(follower)).expect("it is there");
    std::fs::rename(&newer, cluster.data_dir(follower)).expect("its name is free");
    cluster.spawn(follower);
    wait_for("all to be well", || {
        (cluster.cli(&["status", "--check", "--members"]).code() == 0).then_some(())
    });
    assert_unique(&cluster.list());
}

/// A node of one cluster at the address of a member of another.
#[test]
fn a_node_of_another_cluster_is_refused() {
    let mut ours = Cluster::start(3);
    let mut theirs = Cluster::start(1);
    theirs.worker("theirs", 40063);
    ours.worker("ours", 40063);
    theirs.kill(0);
    ours.kill(0);
    let mut args = ours.serve_args(0);
    for arg in &mut args {
        if *arg == ours.data_dir(0).display().to_string() {
            *arg = theirs.data_dir(0).display().to_string();
        }
    }
    let mut command = Command::new(BINARY);
    command.args(args);
    ours.spawn_as(0, command);
    // One of the two that are left leads, writes, and calls the third member's address.
    let two = [1, 2].map(|at| ours.nodes[at].client()).join(",");
    let args = ["allocate", "a", "--worker", "ours", "--ports", "1", "--timeout", "30s"];
    ours.cli_at(&two, &args).ok();
    wait_for("the refusal", || {
        let log = ours.log(0);
        (log.contains("belongs to cluster") && log.contains("calls from cluster")).then_some(())
    });
    // It is a cluster of its own, and its table was left alone.
    let workers =
        ours.cli_at(&ours.nodes[0].client(), &["worker", "list", "-o", "json", "--timeout", "30s"]);
    let workers = workers.ok();
    let names: Vec<_> = workers.as_array().expect("an array").iter().map(|w| &w["name"]).collect();
    assert_eq!(names, ["theirs"]);
}

/// All calls of the peer protocol, at one node.
struct Peer(PeerClient<Channel>);

impl Peer {
    fn to(address: &str) -> Peer {
        let channel = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        Peer(PeerClient::new(channel.connect_lazy()))
    }

    async fn probe(&mut self, header: Header) -> Result<peer::ProbeResponse, Status> {
        let request = peer::ProbeRequest { header: Some(header), ..Default::default() };
        Ok(self.0.probe(request).await?.into_inner())
    }

    /// Each call under this header, with content that would do harm; what each was answered.
    async fn everything(&mut self, header: &Header) -> Vec<(&'static str, Option<Status>)> {
        let leader = peer::LeaderId { term: 1000, node: header.from };
        let vote = |committed| Some(peer::Vote { leader: Some(leader), committed });
        let (header, last_log) = (Some(header.clone()), None);
        let mut answers = Vec::new();
        for pre_vote in [true, false] {
            let request = peer::VoteRequest {
                header: header.clone(),
                vote: vote(false),
                last_log: Some(peer::LogId { leader: Some(leader), index: 1 << 40 }),
                leadership_transfer: true,
                pre_vote,
            };
            answers.push(("vote", self.0.vote(request).await.err()));
        }
        let request =
            peer::AppendRequest { header: header.clone(), vote: vote(true), ..Default::default() };
        let mut stream = self.0.append(tokio_stream::iter([request])).await.unwrap().into_inner();
        answers.push(("append", stream.message().await.err()));
        let head =
            peer::SnapshotHead { header: header.clone(), vote: vote(true), ..Default::default() };
        let part = Some(peer::snapshot_request::Part::Head(head));
        let request = tokio_stream::iter([peer::SnapshotRequest { part }]);
        answers.push(("snapshot", self.0.snapshot(request).await.err()));
        let (from_leader, to_node) = (vote(true), header.as_ref().unwrap().to);
        let request =
            peer::TransferRequest { header: header.clone(), from_leader, to_node, last_log };
        answers.push(("transfer", self.0.transfer_leader(request).await.err()));
        let request = peer::ForwardRequest {
            header,
            method: "/portwarden.v1.Workers/Remove".into(),
            request: b"\n\x01w".to_vec().into(),
            remaining_ms: 10_000,
            request_id: String::new(),
            call: 0,
        };
        answers.push(("forward", self.0.forward(request).await.err()));
        answers
    }
}

fn incarnation(cluster: &Cluster, at: usize) -> String {
    let text = std::fs::read_to_string(cluster.data_dir(at).join("identity")).expect("identity");
    let line = text.lines().find_map(|line| line.strip_prefix("incarnation "));
    line.expect("an incarnation").into()
}

/// Every call with every wrong name: refused with FAILED_PRECONDITION and the kind, and nothing of
/// it is done.
#[test]
fn every_peer_call_is_checked() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    let (from, to) = (cluster.nodes[0].id, cluster.nodes[1].id);
    block_on(async {
        let mut one = Peer::to(&cluster.nodes[0].peer());
        let mut two = Peer::to(&cluster.nodes[1].peer());
        let ask = Header { from: to, to: from, ..Header::default() };
        let known = one.probe(ask).await.unwrap();
        let right = Header {
            cluster: known.cluster.clone(),
            from,
            to,
            from_incarnation: incarnation(&cluster, 0),
            to_incarnation: incarnation(&cluster, 1),
            from_session: known.session.clone(),
        };
        assert_eq!(known.incarnation, right.from_incarnation);
        let term = two.probe(right.clone()).await.unwrap().term;

        let other = || "other".to_string();
        let wrong: [(&str, Header, bool); 9] = [
            ("cluster", Header { cluster: other(), ..right.clone() }, true),
            ("receiver", Header { to: 9, ..right.clone() }, true),
            ("receiver", Header { to: from, ..right.clone() }, true),
            ("sender-incarnation", Header { from_incarnation: other(), ..right.clone() }, true),
            ("sender-session", Header { from_session: other(), ..right.clone() }, false),
            ("incomplete", Header { cluster: String::new(), ..right.clone() }, false),
            ("incomplete", Header { from_incarnation: String::new(), ..right.clone() }, false),
            ("incomplete", Header { from_session: String::new(), ..right.clone() }, false),
            ("incomplete", Header::default(), false),
        ];
        for (kind, header, probe_too) in wrong {
            let mut answers = two.everything(&header).await;
            if probe_too {
                answers.push(("probe", two.probe(header.clone()).await.err()));
            }
            for (call, status) in answers {
                let status = status.unwrap_or_else(|| panic!("{call} was taken: {header:?}"));
                assert_eq!(status.code(), Code::FailedPrecondition, "{call} {kind}: {status:?}");
                let said = status.metadata().get("portwarden-refusal").expect("a kind");
                assert_eq!(said, kind, "{call}: {status:?}");
            }
        }
        assert_eq!(two.probe(right.clone()).await.unwrap().term, term, "no vote was taken");
        // The node that is called as another incarnation ends by itself: it must be a wiped one.
        let wiped = Header { to_incarnation: other(), ..right.clone() };
        let status = two.probe(wiped).await.unwrap_err();
        assert_eq!(status.metadata().get("portwarden-refusal").unwrap(), "receiver-incarnation");
    });
    cluster.cli(&["worker", "get", "w"]).ok();
}
