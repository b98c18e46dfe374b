//! Snapshots and purges under load: the log stays bounded, and a follower that was away for longer
//! than the log reaches back comes back by snapshot.

use std::path::Path;
use std::process::Command;

use crate::support::{BINARY, Cluster, assert_unique, wait_for};

fn purged(cluster: &Cluster, at: usize) -> f64 {
    cluster.metric(at, "portwarden_log_purged_index").unwrap_or(0.0)
}

fn applied(cluster: &Cluster, at: usize) -> f64 {
    cluster.metric(at, "portwarden_log_applied_index").unwrap_or(0.0)
}

#[test]
fn a_follower_comes_back_by_snapshot_while_others_write() {
    const EVERY: f64 = 300.0;
    let mut cluster = Cluster::start_with(3, &["--snapshot-every", "300"]);
    cluster.worker("w", 40_063);
    cluster.cli(&["allocate", "kept", "--worker", "w", "--ports", "2"]).ok();
    let leader = cluster.leader();
    let away = (leader + 1) % 3;
    let had = wait_for("the follower's log", || {
        Some(applied(&cluster, away)).filter(|index| *index > 0.0)
    });
    cluster.kill(away);

    // One call at a time for each client: every call is at most one entry.
    let mut load = Command::new(BINARY)
        .args(["--endpoints", &cluster.endpoints(), "bench", "--clients", "4", "--seconds", "60"])
        .args(["--timeout", "20s", "-o", "json"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the load runs");
    wait_for("what the follower needs to be purged", || {
        (purged(&cluster, leader) > had + EVERY).then_some(())
    });
    cluster.spawn(away);
    // While the load goes on.
    wait_for("a snapshot to be installed", || {
        cluster.metric(away, "portwarden_snapshots_installed_total").filter(|n| *n > 0.0)
    });
    let target = applied(&cluster, leader);
    wait_for("the follower to catch up", || (applied(&cluster, away) >= target).then_some(()));
    assert!(load.try_wait().expect("its status").is_none(), "the load was still running");
    // Bounded in entries: two spans, one to keep, and what comes while a snapshot is written.
    let kept = applied(&cluster, leader) - purged(&cluster, leader);
    assert!(kept < 10.0 * EVERY, "{kept} entries are kept");

    let pid = load.id().to_string();
    let sent = Command::new("kill").args(["-s", "INT", &pid]).status();
    assert!(sent.expect("kill runs").success());
    let done = load.wait_with_output().expect("the load ends");
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).expect("JSON");
    assert_eq!(report["errors"], 0, "{report}");
    let held = cluster.list();
    assert_unique(&held);
    assert!(held.iter().any(|a| a["name"] == "kept"), "{held:?}");
}

/// Few entries, each of them large: the number alone would let the log grow without bound.
#[test]
fn the_log_is_bounded_in_bytes() {
    const SPAN: u64 = 1 << 20;
    const LARGE_GANG_BYTES: u64 = 64 * 32 * 126;
    let cluster = Cluster::start_with(1, &["--snapshot-every-bytes", "1MiB", "--low-space", "0"]);
    cluster.worker("w", 59_999);
    let (mut written, mut largest) = (0, 0);
    while written < 8 * SPAN {
        cluster.large_gang("w", &format!("at-{written}")).ok();
        written += LARGE_GANG_BYTES;
        largest = largest.max(dir_bytes(&cluster.data_dir(0).join("log")));
    }
    let entries = applied(&cluster, 0);
    assert!(entries < 100.0, "{entries} entries are far fewer than --snapshot-every");
    let purged = wait_for("a purge", || Some(purged(&cluster, 0)).filter(|index| *index > 0.0));
    assert!(entries - purged < 40.0, "entries {purged} to {entries} are kept");
    eprintln!("{written} bytes of labels written, log directory at most {largest} bytes");
}

fn dir_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => dir_bytes(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0, // sled removed it meanwhile
        })
        .sum()
}
