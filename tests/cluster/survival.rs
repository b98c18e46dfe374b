//! What is acknowledged survives: kills of the leader under load, of all nodes at once, pauses.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::load::under_load;
use crate::support::{BINARY, Cluster, assert_unique, ports, wait_for};

/// Eight clients allocate two ports each, over and over, and release every third allocation, while
/// the leader is killed twice. No acknowledged allocation is lost, none that was released comes
/// back, no port is doubled, and no call fails but with exit code 6.
#[test]
fn two_leaders_die_under_eight_clients() {
    let mut cluster = Cluster::start(3);
    under_load(&mut cluster, 8, |cluster, load| {
        for kill in 1..=2 {
            load.gets_on(20);
            let leader = cluster.leader();
            cluster.kill(leader);
            load.gets_on(20);
            cluster.spawn(leader);
            eprintln!("kill {kill}: node {} is back", cluster.nodes[leader].id);
        }
    });
}

/// Where the leader's process has ended the others find that out by asking at its address, and need not
/// wait; where it is only silent they wait for the timeout.
#[test]
fn a_leader_that_is_gone_is_told_from_one_that_is_silent() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    let told = |cluster: &Cluster, at: usize| cluster.log(at).contains("leader's process is gone");
    let silent = cluster.leader();
    let others = |but: usize| (0..3).filter(move |at| *at != but);
    cluster.signal(silent, "STOP");
    let second = wait_for("another leader", || {
        let led = |at: &usize| cluster.metric(*at, "portwarden_is_leader") == Some(1.0);
        others(silent).find(led)
    });
    assert!(others(silent).all(|at| !told(&cluster, at)), "silence proves nothing");
    cluster.signal(silent, "CONT");
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
    cluster.kill(second);
    cluster.cli(&["allocate", "b", "--worker", "w", "--ports", "1"]).ok();
    wait_for("somebody to have noticed", || {
        others(second).any(|at| told(&cluster, at)).then_some(())
    });
    assert_unique(&cluster.list());
}

/// `kill -9` of all nodes at once, then a restart: everything is as it was.
#[test]
fn all_nodes_die_at_once() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    for i in 0..5 {
        let name = format!("i{i}");
        cluster.cli(&["allocate", &name, "--worker", "w", "--ports", "1", "--label", "k=v"]).ok();
    }
    cluster.cli(&["release", "i2", "--force", "--reason", "test"]).ok();
    cluster.cli(&["worker", "quarantine", "w", "--port", "40050", "--reason", "sshd"]).ok();
    let before = cluster.list();
    let worker = cluster.cli(&["worker", "get", "w", "-o", "json"]).ok();
    for at in 0..3 {
        cluster.kill(at);
    }
    for at in 0..3 {
        cluster.spawn(at);
    }
    assert_eq!(cluster.list(), before);
    assert_eq!(cluster.cli(&["worker", "get", "w", "-o", "json"]).ok(), worker);
}

/// A majority gone: writes and reads end with exit code 6, never with a guess; when it comes back
/// they work again.
#[test]
fn without_a_majority_nothing_is_granted_or_guessed() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
    let leader = cluster.leader();
    let others: Vec<_> = (0..3).filter(|at| *at != leader).collect();
    for at in &others {
        cluster.kill(*at);
    }
    let write = cluster.cli(&["allocate", "b", "--worker", "w", "--ports", "1", "--timeout", "2s"]);
    assert_eq!(write.code(), 6, "{}", write.stderr());
    let read = cluster.cli(&["get", "a", "--timeout", "2s"]);
    assert_eq!(read.code(), 6, "{}", read.stderr());
    // Its own copy may be asked for by name, and says how old it is.
    let stale = cluster.cli_at(
        &cluster.nodes[leader].client(),
        &["list", "--stale", "-o", "json", "--timeout", "5s"],
    );
    assert_eq!(ports(stale.ok().as_array().expect("an array")), [("w".to_string(), 40000)]);
    for at in others {
        cluster.spawn(at);
    }
    cluster.leader();
    assert_unique(&cluster.list());
    cluster.cli(&["allocate", "c", "--worker", "w", "--ports", "1"]).ok();
}

/// A paused leader that wakes up answers nothing stale: what was released meanwhile is gone for it.
#[test]
fn a_leader_that_slept_does_not_answer_from_the_past() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    let held = cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1", "-o", "json"]).ok();
    let sleeper = cluster.leader();
    cluster.signal(sleeper, "STOP");
    let token = held["token"].to_string();
    let awake: Vec<_> =
        cluster.nodes.iter().filter(|n| n.id != cluster.nodes[sleeper].id).collect();
    let awake = awake.iter().map(|n| n.client()).collect::<Vec<_>>().join(",");
    cluster.cli_at(&awake, &["release", "a", "--token", &token, "--timeout", "30s"]).ok();
    cluster.signal(sleeper, "CONT");
    let read = cluster.cli_at(&cluster.nodes[sleeper].client(), &["get", "a", "--timeout", "30s"]);
    read.refused(3, "a");
}

/// A node that is told to stop hands over first, and exits with 0; a client that writes throughout
/// sees no error.
#[test]
fn a_leader_that_is_stopped_hands_over() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40999);
    let leader = cluster.leader();
    let stopped = AtomicBool::new(false);
    let endpoints = cluster.endpoints();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut after = 0;
            for i in 0.. {
                let name = format!("i{i}");
                let out = Command::new(BINARY)
                    .args(["--endpoints", &endpoints, "allocate", &name, "--worker", "w"])
                    .args(["--ports", "1"])
                    .output()
                    .expect("the CLI runs");
                assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
                after += usize::from(stopped.load(Ordering::Acquire));
                if after == 10 {
                    return;
                }
            }
        });
        let code = cluster.terminate(leader);
        stopped.store(true, Ordering::Release);
        assert_eq!(code, Some(0));
        writer.join().expect("the writer");
    });
    let log = std::fs::read_to_string(cluster.log_path(leader)).expect("its log");
    assert!(log.contains("handing over the lead"), "{log}");
    assert_unique(&cluster.list());
}
