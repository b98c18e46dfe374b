//! A bug that only processes of their own show, planted in one of them, and found by the cluster:
//! `scripts/planted`. Without `cfg(planted)` there is nothing here.
#![cfg(planted)]

#[allow(dead_code)] // shared with `cluster`
#[path = "cluster/support.rs"]
mod support;

use std::process::Command;

use support::{BINARY, Cluster, wait_for};

/// One replica applies a command otherwise than the others: its result depends on the process. It
/// ends, by name and with both digests, before long; the other two go on. Be it a follower or the
/// leader itself.
fn the_odd_replica_ends(choose: impl Fn(usize) -> usize) {
    let mut cluster = Cluster::start_with(3, &["--checkpoint-every", "4"]);
    cluster.worker("w", 40_063);
    let odd = choose(cluster.leader());
    let leader = cluster.leader();
    cluster.kill(odd);
    let mut buggy = Command::new(BINARY);
    buggy.args(cluster.serve_args(odd)).env(portwarden::planted::CHOSEN, "depends-on-process");
    cluster.spawn_as(odd, buggy);
    if odd == leader {
        // It leads again only if the others are stopped for a moment.
        lead(&cluster, odd);
    }
    cluster.cli(&["worker", "quarantine", "w", "--port", "40050", "--reason", "seen"]).ok();
    for i in 0..8 {
        let args = ["allocate", &format!("i{i}"), "--worker", "w", "--ports", "1"];
        let ran = cluster.cli(&[&args[..], &["--timeout", "20s"]].concat());
        assert!(matches!(ran.code(), 0 | 6), "{}", ran.stderr()); // 6: the leader just ended
    }
    assert_eq!(cluster.ended(odd), Some(portwarden::node::DISAGREES_EXIT));
    let said = cluster.log(odd);
    let (id, line) = (cluster.nodes[odd].id, "does not agree with the cluster: at log entry");
    let line = said.lines().find(|l| l.starts_with("portwarden:") && l.contains(line));
    let line = line.unwrap_or_else(|| panic!("it should say why it ends: {said}"));
    assert!(line.contains(&format!("node {id} ")) && line.contains("revision"), "{line}");
    let hex = |word: &&str| word.len() == 64 && word.chars().all(|c| c.is_ascii_hexdigit());
    let words: Vec<_> = line.split([' ', ',', ';']).collect();
    let digests: Vec<_> = words.iter().copied().filter(hex).collect();
    assert!(digests.len() == 2 && digests[0] != digests[1], "{line}");

    // The other two go on, and still agree.
    let others: Vec<_> = (0..3).filter(|at| *at != odd).collect();
    let before = cluster.cli(&["status", "-o", "json"]).ok()["revision"].as_f64();
    for i in 8..16 {
        let args = ["allocate", &format!("i{i}"), "--worker", "w", "--ports", "1"];
        cluster.cli(&[&args[..], &["--timeout", "20s"]].concat()).ok();
    }
    for at in others {
        wait_for("the others to agree", || {
            let agreed = cluster.metric(at, "portwarden_checkpoint_revision");
            (agreed > before).then_some(())
        });
    }
}

/// Makes a node the leader: the one that leads is paused until another one does.
fn lead(cluster: &Cluster, wanted: usize) {
    wait_for("the wanted leader", || {
        let leader = cluster.leader();
        if leader == wanted {
            return Some(());
        }
        cluster.signal(leader, "STOP");
        wait_for("another leader", || {
            let leads = |at| cluster.metric(at, "portwarden_is_leader") == Some(1.0);
            (0..3).find(|at| *at != leader && leads(*at))
        });
        cluster.signal(leader, "CONT");
        None
    });
}

#[test]
fn an_odd_follower_ends() {
    the_odd_replica_ends(|leader| (leader + 1) % 3);
}

#[test]
fn an_odd_leader_ends() {
    the_odd_replica_ends(|leader| leader);
}
