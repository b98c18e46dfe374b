//! Leases on real clusters: kept, not kept, revoked, moved.

use serde_json::Value;

use crate::spawned::Spawned;
use crate::support::{Cluster, wait_for};

fn granted(cluster: &Cluster, ttl: &str) -> String {
    cluster.cli(&["lease", "grant", "--ttl", ttl, "-o", "json"]).ok()["id"].to_string()
}

fn allocated(cluster: &Cluster, name: &str, lease: &str) -> Value {
    let args = ["allocate", name, "--worker", "w", "--ports", "1", "--lease", lease, "-o", "json"];
    cluster.cli(&args).ok()
}

/// Waits until a lease is gone.
fn ended(cluster: &Cluster, lease: &str) {
    wait_for("the lease to end", || {
        (cluster.cli(&["lease", "get", lease]).code() == 3).then_some(())
    });
}

#[test]
fn a_lease_lives_while_it_is_kept_alive_and_takes_what_is_on_it_along() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_003);
    let lease = granted(&cluster, "6s");
    allocated(&cluster, "a", &lease);
    let mut keeper = Spawned::cli(&cluster, &["lease", "keep-alive", &lease, "-o", "json"]);
    // A third of the TTL from one to the next: five of them are longer than it.
    wait_for("five keepalives", || (keeper.json_lines().len() >= 5).then_some(()));
    let shown = cluster.cli(&["lease", "get", &lease, "-o", "json"]).ok();
    assert_eq!(shown["names"], serde_json::json!(["a"]));
    assert_eq!(cluster.cli(&["get", "a", "-o", "json"]).ok()["lease"].to_string(), lease);
    assert_eq!(keeper.terminate(), 0);
    ended(&cluster, &lease);
    let gone = cluster.cli(&["get", "a"]);
    gone.refused(3, &format!("reclaimed: lease {lease} expired, on worker w at revision"));
    gone.refused(3, "at: 20");
}

#[test]
fn a_lease_outlives_the_death_of_the_leader() {
    let mut cluster = Cluster::start(3);
    let lease = granted(&cluster, "9s");
    let mut keeper = Spawned::cli(&cluster, &["lease", "keep-alive", &lease, "-o", "json"]);
    wait_for("a keepalive", || (!keeper.json_lines().is_empty()).then_some(()));
    let leader = cluster.leader();
    cluster.kill(leader);
    let before = keeper.json_lines().len();
    wait_for("keepalives under a new leader", || {
        (keeper.json_lines().len() >= before + 4).then_some(())
    });
    keeper.assert_running();
    cluster.cli(&["lease", "get", &lease]).ok();
}

#[test]
fn what_is_revoked_is_gone_at_once_and_its_keeper_hears_of_it() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_003);
    let (first, second) = (granted(&cluster, "60s"), granted(&cluster, "60s"));
    let token = allocated(&cluster, "a", &first)["token"].to_string();
    let attach = ["attach", "a", "--token", &token, "--lease"];
    let moved = cluster.cli(&[&attach[..], &[&second, "-o", "json"]].concat()).ok();
    assert_eq!(moved["lease"].to_string(), second);
    cluster.cli(&[&attach[..], &["999999"]].concat()).refused(3, "no lease 999999");

    let mut keeper = Spawned::cli(&cluster, &["lease", "keep-alive", &first]);
    wait_for("a keepalive", || keeper.stdout().contains("is kept").then_some(()));
    assert_eq!(cluster.cli(&["lease", "revoke", &first, "-o", "json"]).ok()["revoked"], true);
    assert_eq!(cluster.cli(&["lease", "revoke", &first, "-o", "json"]).ok()["revoked"], false);
    assert_eq!(keeper.ended(), 3, "{}", keeper.stderr());
    cluster.cli(&["get", "a"]).ok();
    cluster.cli(&["lease", "revoke", &second]).ok();
    cluster.cli(&["get", "a"]).refused(3, "was revoked");
    assert_eq!(cluster.cli(&["lease", "list", "-o", "json"]).ok(), serde_json::json!([]));
}

#[test]
fn an_unconfirmed_start_is_reclaimed_also_when_the_leader_dies_in_between() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40_001);
    let allocate = |cluster: &Cluster, name: &str, more: &[&str]| {
        let args = ["allocate", name, "--worker", "w", "--ports", "1", "--timeout", "30s"];
        cluster.cli(&[&args[..], more].concat())
    };
    allocate(&cluster, "a", &["--confirm-within", "3s"]).ok();
    allocate(&cluster, "b", &["--bound"]).ok();
    allocate(&cluster, "c", &[]).refused(5, "held by a, b");
    let leader = cluster.leader();
    cluster.kill(leader);
    wait_for("the start to be reclaimed", || {
        (cluster.cli(&["get", "a"]).code() == 3).then_some(())
    });
    cluster.cli(&["get", "a"]).refused(3, "not confirmed within 3s");
    allocate(&cluster, "c", &[]).ok();
    cluster.cli(&["get", "b"]).ok();
}

#[test]
fn a_dry_run_and_an_explanation_change_nothing() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_001);
    let claim = ["a", "--selector", "", "--ports", "1", "--gpus", "1", "--gpu-memory", "8GiB"];
    let json =
        |command: &[&str]| cluster.cli(&[command, &claim[..], &["-o", "json"]].concat()).ok();
    assert_eq!(json(&["allocate", "--dry-run"])["ports"][0]["number"], 40_000);
    let explained = json(&["explain"]);
    assert_eq!(explained["fits"], true);
    assert_eq!(explained["claims"][0]["workers"][0]["worker"], "w");
    assert_eq!(cluster.list().len(), 0);
    let large = ["explain", "b", "--worker", "w", "--ports", "3", "-o", "json"];
    let explained = cluster.cli(&large).ok();
    assert_eq!(explained["fits"], false);
    let lack = explained["claims"][0]["workers"][0]["lack"].as_str().expect("what is missing");
    assert!(lack.contains("2 of 2 ports free, 3 more wanted"), "{lack}");
}

#[test]
fn a_drain_shows_what_is_left_and_waits_for_it() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_003);
    let token = |name: &str| {
        let args = ["allocate", name, "--worker", "w", "--ports", "1", "-o", "json"];
        cluster.cli(&args).ok()["token"].to_string()
    };
    let (a, b) = (token("a"), token("b"));
    let drained = cluster.cli(&["worker", "drain", "w", "-o", "json"]).ok();
    assert_eq!(drained["worker"]["phase"], "DRAINING");
    assert_eq!(drained["left"].as_array().map(Vec::len), Some(2));
    cluster.cli(&["allocate", "c", "--worker", "w", "--ports", "1"]).refused(4, "DRAINING");
    cluster.cli(&["worker", "drain", "w", "--wait", "--timeout", "5s"]).refused(6, "2: a, b");

    let wait = ["worker", "drain", "w", "--wait", "--timeout", "60s", "-o", "json"];
    let mut waiting = Spawned::cli(&cluster, &wait);
    waiting.says("2 left on w: a, b");
    cluster.cli(&["release", "a", "--token", &a]).ok();
    waiting.says("1 left on w: b");
    cluster.cli(&["release", "b", "--token", &b]).ok();
    assert_eq!(waiting.ended(), 0);
    cluster.cli(&["worker", "remove", "w"]).ok();
}
