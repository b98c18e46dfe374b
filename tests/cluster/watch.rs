//! `portwarden watch` on real clusters: every change once, in order.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::spawned::Spawned;
use crate::support::{BINARY, Cluster, wait_for};

fn revision(cluster: &Cluster) -> u64 {
    cluster.cli(&["status", "-o", "json"]).ok()["revision"].as_u64().expect("a revision")
}

/// Three changes: allocated, confirmed, released.
fn live_and_die(cluster: &Cluster, name: &str, flags: &[&str]) {
    let patient = ["--timeout", "60s", "-o", "json"];
    let allocate = ["allocate", name, "--ports", "1", "--uid", "u"];
    let token =
        cluster.cli(&[&allocate[..], flags, &patient[..]].concat()).ok()["token"].to_string();
    for command in ["confirm", "release"] {
        cluster.cli(&[&[command, name, "--token", &token][..], &patient[..]].concat()).ok();
    }
}

fn told(watch: &Spawned) -> Vec<(String, String)> {
    let field = |event: &Value, key: &str| event[key].as_str().expect("a string").to_string();
    watch.json_lines().iter().map(|e| (field(e, "type"), field(e, "name"))).collect()
}

#[test]
fn sixty_of_sixty_changes_come_in_order_across_the_death_of_the_leader() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40_063);
    let from = (revision(&cluster) + 1).to_string();
    let mut watch = Spawned::cli(&cluster, &["watch", "--from-revision", &from, "-o", "json"]);
    for i in 0..20 {
        if i == 10 {
            let leader = cluster.leader();
            cluster.kill(leader);
        }
        live_and_die(&cluster, &format!("i{i}"), &["--worker", "w"]);
    }
    wait_for("sixty changes", || (watch.json_lines().len() >= 60).then_some(()));
    let expected: Vec<_> = (0..20)
        .flat_map(|i| {
            ["allocated", "confirmed", "released"].map(|t| (t.to_string(), format!("i{i}")))
        })
        .collect();
    assert_eq!(told(&watch), expected);
    let first: u64 = from.parse().expect("a number");
    let revisions: Vec<_> = watch.json_lines().iter().map(|e| e["revision"].as_u64()).collect();
    assert_eq!(
        revisions,
        (first..first + 60).map(Some).collect::<Vec<_>>(),
        "no gap, no duplicate"
    );
    // One that begins later is told the same.
    let again = Spawned::cli(&cluster, &["watch", "--from-revision", &from, "-o", "json"]);
    wait_for("sixty changes again", || (again.json_lines().len() >= 60).then_some(()));
    assert_eq!(again.stdout(), watch.stdout());
    assert_eq!(watch.terminate(), 0);
}

#[test]
fn filters_let_through_what_they_name() {
    let cluster = Cluster::start(3);
    for worker in ["w1", "w2"] {
        cluster.worker(worker, 40_003);
    }
    let from = (revision(&cluster) + 1).to_string();
    let watch = |flags: &[&str]| {
        let args = ["watch", "--from-revision", &from, "-o", "json"];
        Spawned::cli(&cluster, &[&args[..], flags].concat())
    };
    let by_worker = watch(&["--worker", "w2"]);
    let by_label = watch(&["--selector", "team=ml"]);
    let by_prefix = watch(&["--prefix", "web-"]);
    let all = watch(&[]);
    live_and_die(&cluster, "web-1", &["--worker", "w1"]);
    live_and_die(&cluster, "qwen-1", &["--worker", "w2", "--label", "team=ml"]);
    cluster.cli(&["worker", "cordon", "w1"]).ok();
    cluster.cli(&["worker", "cordon", "w2"]).ok();
    let lease = cluster.cli(&["lease", "grant", "60s", "-o", "json"]).ok()["id"].to_string();
    let life = |name: &str| ["allocated", "confirmed", "released"].map(|t| (t.into(), name.into()));
    let cordoned = |name: &str| ("worker".to_string(), name.to_string());
    let (web, qwen): (Vec<_>, Vec<_>) = (life("web-1").into(), life("qwen-1").into());
    let lease = vec![("lease_granted".to_string(), lease)];
    let workers = vec![cordoned("w1"), cordoned("w2")];
    for (watch, expected) in [
        (all, [web.clone(), qwen.clone(), workers, lease].concat()),
        (by_worker, [qwen.clone(), vec![cordoned("w2")]].concat()),
        (by_label, qwen),
        (by_prefix, web),
    ] {
        wait_for("all that concerns it", || (told(&watch).len() >= expected.len()).then_some(()));
        assert_eq!(told(&watch), expected);
    }
}

#[test]
fn a_past_that_no_node_keeps_is_refused_with_what_can_be_had() {
    // A node keeps changes in memory, and has them from its log when it starts: as far as that
    // reaches back.
    let mut cluster = Cluster::start_with(1, &["--snapshot-every", "10"]);
    cluster.worker("w", 40_063);
    for i in 0..20 {
        live_and_die(&cluster, &format!("a{i}"), &["--worker", "w"]);
    }
    assert_eq!(cluster.terminate(0), Some(0));
    cluster.spawn(0);
    cluster.leader();
    let mut watch = Spawned::cli(&cluster, &["watch", "--from-revision", "1"]);
    assert_eq!(watch.ended(), 4);
    assert!(watch.stderr().contains("list anew"), "{}", watch.stderr());
    let next = (revision(&cluster) + 1).to_string();
    let watch = Spawned::cli(&cluster, &["watch", "--from-revision", &next, "-o", "json"]);
    live_and_die(&cluster, "b", &["--worker", "w"]);
    wait_for("three changes", || (watch.json_lines().len() >= 3).then_some(()));
}

#[test]
fn a_watch_ends_with_its_reader_and_does_not_begin_without_a_node() {
    let cluster = Cluster::start(1);
    cluster.worker("w", 40_063);
    let mut watch = Command::new(BINARY)
        .args(["--endpoints", &cluster.endpoints(), "watch", "--from-revision", "1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut lines = BufReader::new(watch.stdout.take().expect("piped")).lines();
    assert!(lines.next().expect("a line").expect("text").starts_with("REVISION"));
    assert!(lines.next().expect("a line").expect("text").contains("worker"));
    drop(lines);
    live_and_die(&cluster, "a", &["--worker", "w"]);
    let status = wait_for("the watch to end", || watch.try_wait().expect("its status"));
    assert_eq!(status.code(), Some(0));
    cluster.cli_at("127.0.0.1:1", &["watch", "--timeout", "300ms"]).refused(6, "127.0.0.1:1");
}
