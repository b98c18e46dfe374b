//! The beginning of a cluster, and the wrong starts: one right cluster or a refusal that names the
//! way out, never two.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{BINARY, Cluster, wait_for};

/// Within which a node that must not run has ended.
const LIMIT: Duration = Duration::from_secs(15);

/// Starts a node with another list than that of the cluster.
fn spawn_with_list(cluster: &mut Cluster, at: usize, list: &str) {
    let mut args = cluster.serve_args(at);
    let place = args.iter().position(|arg| arg == "--initial-cluster").expect("a list");
    args[place + 1] = list.into();
    let mut command = Command::new(BINARY);
    command.args(args);
    cluster.spawn_as(at, command);
}

fn list_of(cluster: &Cluster, nodes: &[usize]) -> String {
    let part = |at: &usize| format!("{}={}", cluster.nodes[*at].id, cluster.nodes[*at].peer());
    nodes.iter().map(part).collect::<Vec<_>>().join(",")
}

/// Waits until the node has ended by itself with an error, and returns what it said last.
fn refusal(cluster: &mut Cluster, at: usize) -> String {
    let began = Instant::now();
    let code = wait_for("a refusal", || cluster.has_ended(at));
    assert!(began.elapsed() < LIMIT, "it took {:?}", began.elapsed());
    assert_eq!(code, 1);
    let log = cluster.log(at);
    log.lines().rev().find(|line| line.starts_with("error")).expect("an error").to_string()
}

fn says(cluster: &Cluster, at: usize, text: &str) {
    wait_for(text, || cluster.log(at).contains(text).then_some(()));
}

/// What a node says of itself, leader or not.
fn cluster_id(cluster: &Cluster, at: usize) -> String {
    let identity = cluster.data_dir(at).join("identity");
    wait_for("a cluster id", || {
        let text = fs::read_to_string(&identity).ok()?;
        text.lines().find_map(|line| line.strip_prefix("cluster ").map(String::from))
    })
}

fn assert_one_cluster(cluster: &Cluster) {
    cluster.leader();
    let ids: BTreeSet<_> = (0..cluster.nodes.len()).map(|at| cluster_id(cluster, at)).collect();
    assert_eq!(ids.len(), 1, "{ids:?}");
    cluster.worker("w", 40_063);
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
}

#[test]
fn lists_that_differ_are_refused_by_the_lowest_and_told_by_the_others() {
    let mut cluster = Cluster::prepare(3);
    let (all, two) = (list_of(&cluster, &[0, 1, 2]), list_of(&cluster, &[0, 2]));
    spawn_with_list(&mut cluster, 0, &all);
    spawn_with_list(&mut cluster, 1, &all);
    says(&cluster, 0, "the cluster begins when all nodes are up");
    spawn_with_list(&mut cluster, 2, &two);
    let why = refusal(&mut cluster, 0);
    for part in ["node 3 was started with", &two, &all, "start all nodes with the same list"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    // The others stay, and say what they wait for and whose list differs.
    says(&cluster, 1, "node 3 was started with --initial-cluster");
    says(&cluster, 2, "the cluster has not begun");
    cluster.assert_running();
    assert!((0..3).all(|at| !cluster.log(at).contains("the cluster has begun")));
    // The operator puts it right.
    cluster.kill(2);
    cluster.spawn(2);
    cluster.spawn(0);
    assert_one_cluster(&cluster);
}

/// Two lists whose lowest ids differ: neither cluster begins behind the other's back.
#[test]
fn overlapping_lists_never_make_two_clusters() {
    let mut cluster = Cluster::prepare(4);
    let (first, second) = (list_of(&cluster, &[0, 2, 3]), list_of(&cluster, &[1, 2, 3]));
    spawn_with_list(&mut cluster, 0, &first);
    spawn_with_list(&mut cluster, 2, &first);
    spawn_with_list(&mut cluster, 1, &second);
    spawn_with_list(&mut cluster, 3, &second);
    for at in [0, 1] {
        let why = refusal(&mut cluster, at);
        assert!(why.contains("start all nodes with the same list"), "{why}");
    }
    assert!((0..4).all(|at| !cluster.log(at).contains("the cluster has begun")));
}

#[test]
fn any_order_and_a_late_node_make_one_cluster() {
    for order in [[2, 1, 0], [1, 0, 2], [0, 2, 1]] {
        let mut cluster = Cluster::prepare(3);
        cluster.spawn(order[0]);
        cluster.spawn(order[1]);
        // Late: the others have asked in vain, or waited, for long enough to say so. The lowest
        // says so every 5 s; the second time is at least 5 s after its start.
        let waits = |at: usize, cluster: &Cluster| {
            let text =
                if at == 0 { "the cluster begins when" } else { "the cluster has not begun" };
            cluster.log(at).matches(text).count() >= if at == 0 { 2 } else { 1 }
        };
        wait_for("the first two to wait", || {
            order[..2].iter().all(|at| waits(*at, &cluster)).then_some(())
        });
        let listed = cluster.cli(&["list", "--timeout", "1s"]);
        assert_eq!(listed.code(), 6, "nothing is served before the cluster begins");
        cluster.spawn(order[2]);
        assert_one_cluster(&cluster);
    }
}

/// One node keeps its data, the others were emptied: they are refused, and so is a new beginning.
#[test]
fn a_node_over_old_data_does_not_begin_anew() {
    for kept in [0, 2] {
        let mut cluster = Cluster::start(3);
        assert_one_cluster(&cluster);
        cluster.kill_all();
        let others: Vec<_> = (0..3).filter(|at| *at != kept).collect();
        for at in &others {
            fs::remove_dir_all(cluster.data_dir(*at)).expect("it goes");
        }
        (0..3).for_each(|at| cluster.spawn(at));
        for at in others {
            let why = refusal(&mut cluster, at);
            assert!(why.contains(&format!("node {}", cluster.nodes[at].id)), "{why}");
            assert!(why.contains("join"), "{why}");
            assert!(!cluster.log(at).ends_with("the cluster has begun\n"));
        }
        cluster.assert_running();
        let read = cluster.cli(&["get", "a", "--timeout", "2s"]);
        assert_eq!(read.code(), 6, "one of three is no majority: {}", read.stderr());
    }
}

/// A node that was emptied ends with a refusal that names its id and the way out, whether the
/// cluster is at work or has to elect: its vote would count for what it has forgotten.
#[test]
fn an_emptied_node_is_refused_and_does_not_vote() {
    for emptied in [0, 1] {
        let mut cluster = Cluster::start(3);
        assert_one_cluster(&cluster);
        // At work.
        cluster.kill(emptied);
        fs::remove_dir_all(cluster.data_dir(emptied)).expect("it goes");
        cluster.spawn(emptied);
        let check = |why: &str| {
            assert!(why.contains(&format!("node {}", emptied + 1)), "{why}");
            assert!(why.contains("join"), "{why}");
        };
        check(&refusal(&mut cluster, emptied));
        // Electing: of the three, one is up with its data, and the emptied one would make two. All
        // were restarted, so that nobody knows anything but from its disk.
        let up = 1 - emptied;
        cluster.kill_all();
        fs::remove_dir_all(cluster.data_dir(emptied)).expect("it goes");
        cluster.spawn(up);
        says(&cluster, up, "starting");
        cluster.spawn(emptied);
        check(&refusal(&mut cluster, emptied));
        let read = cluster.cli(&["list", "--timeout", "3s"]);
        assert_eq!(read.code(), 6, "an emptied node voted: {}", read.stdout());
        // With the other one of its data there is a majority again, and everything is there.
        cluster.spawn((0..3).find(|at| *at != up && *at != emptied).expect("a third"));
        cluster.cli(&["get", "a", "--timeout", "30s"]).ok();
    }
}
