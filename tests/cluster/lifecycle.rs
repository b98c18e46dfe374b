//! The life of an allocation and of a worker, through the CLI.

use std::process::Command;

use crate::support::{BINARY, Cluster, http_get, wait_for};

#[test]
fn an_allocation_is_granted_confirmed_swapped_and_released() {
    let cluster = Cluster::start(3);
    cluster.worker("gpu1", 40002);
    let a = cluster
        .cli(&[
            "allocate",
            "qwen-1",
            "--worker",
            "gpu1",
            "--port",
            "http=40001",
            "--ports",
            "1",
            "--gpus",
            "1",
            "--gpu-memory",
            "8GiB",
            "--label",
            "team=ml",
            "--uid",
            "try-1",
            "-o",
            "json",
        ])
        .ok();
    assert_eq!(a["phase"], "RESERVED");
    assert_eq!(a["uid"], "try-1");
    assert_eq!(a["address"], "127.0.0.1");
    assert_eq!(a["gpus"][0]["memory_bytes"], 8u64 << 30);
    assert_eq!(a["gpus"][0]["exclusive"], false);
    assert_eq!(a["labels"]["team"], "ml");
    assert!(a["lease"].is_null());
    let token = a["token"].to_string();

    // The same uid and request: the same answer. Another uid: a rival.
    let flags = [
        "allocate",
        "qwen-1",
        "--worker",
        "gpu1",
        "--port",
        "http=40001",
        "--ports",
        "1",
        "--gpus",
        "1",
        "--gpu-memory",
        "8GiB",
        "--label",
        "team=ml",
        "-o",
        "json",
    ];
    assert_eq!(cluster.cli(&[&flags[..], &["--uid", "try-1"]].concat()).ok(), a);
    cluster.cli(&flags).refused(4, "try-1");

    cluster.cli(&["confirm", "qwen-1", "--token", "1"]).refused(4, "token");
    let confirmed = cluster.cli(&["confirm", "qwen-1", "--token", &token, "-o", "json"]).ok();
    assert_eq!(confirmed["phase"], "BOUND");

    // The counted port meets a stranger: quarantined, and the next one of the range comes.
    let report = ["report-conflict", "qwen-1", "--token", &token, "-o", "json", "--port"];
    let swapped = cluster.cli(&[&report[..], &["40000"]].concat()).ok();
    let worker = cluster.cli(&["worker", "get", "gpu1", "-o", "json"]).ok();
    assert_eq!(worker["ranges"][0]["quarantined"][0]["number"], 40000, "{worker}");
    assert!(swapped.to_string().contains("40002"), "{swapped}");
    // The one that was asked for by number cannot be replaced: the allocation is reclaimed.
    let reclaimed = cluster.cli(&[&report[..], &["40001"]].concat());
    reclaimed.refused(5, "reclaimed");
    cluster.cli(&["get", "qwen-1"]).refused(3, "qwen-1");

    // Releasing what is gone is no error.
    cluster.cli(&["release", "qwen-1", "--token", &token]).ok();
    cluster.cli(&["worker", "lift", "gpu1", "--port", "40000"]).ok();
    cluster.cli(&["worker", "remove", "gpu1"]).ok();
    cluster.cli(&["worker", "get", "gpu1"]).refused(3, "gpu1");
}

#[test]
fn a_worker_is_cordoned_changed_and_refuses_to_lose_what_is_held() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    cluster.cli(&["worker", "cordon", "w"]).ok();
    let allocate = ["allocate", "a", "--worker", "w", "--ports", "1"];
    cluster.cli(&allocate).refused(4, "CORDONED");
    cluster.cli(&["worker", "uncordon", "w"]).ok();
    cluster.cli(&allocate).ok();
    cluster.cli(&["worker", "remove", "w"]).refused(4, "allocation");
    cluster.cli(&["worker", "apply", "w", "--range", "service=40001-40063"]).refused(4, "40000");
    cluster.cli(&["worker", "apply", "w", "--range", "service=40000-40100"]).ok();
    let worker = cluster.cli(&["worker", "get", "w", "-o", "json"]).ok();
    assert_eq!(worker["ranges"][0]["last"], 40100);
    assert_eq!(worker["ranges"][0]["held"], 1);
    cluster.cli(&["release", "a", "--force"]).ok();
    cluster.cli(&["worker", "remove", "w"]).ok();
}

#[test]
fn selectors_place_by_policy_and_say_why_nothing_fits() {
    let cluster = Cluster::start(3);
    for (name, zone) in [("w1", "a"), ("w2", "a"), ("w3", "b")] {
        let label = format!("zone={zone}");
        let range = ["--range", "service=40000-40009", "--label", &label];
        let args = ["worker", "register", name, "--address", "127.0.0.1"];
        cluster.cli(&[&args[..], &range[..]].concat()).ok();
    }
    let place = |name: &str, flags: &[&str]| {
        let args = ["allocate", name, "--ports", "2", "-o", "json"];
        cluster.cli(&[&args[..], flags].concat())
    };
    let zone_a = ["--selector", "zone=a"];
    assert_eq!(place("a", &zone_a).ok()["worker"], "w1");
    assert_eq!(place("b", &zone_a).ok()["worker"], "w1", "binpack fills up");
    let spread = [&zone_a[..], &["--policy", "spread"]].concat();
    assert_eq!(place("c", &spread).ok()["worker"], "w2", "spread takes the emptiest");
    assert_eq!(place("d", &["--selector", "zone notin (a)"]).ok()["worker"], "w3");
    place("e", &["--selector", "zone=nowhere"]).refused(5, "0 workers");
    place("f", &["--selector", "zone=a", "--contiguous", "9"]).refused(5, "on 2");
    place("g", &["--selector", "zone=="]).code();
    place("h", &["--selector", "(("]).refused(2, "selector");
    let listed = cluster.cli(&["list", "--worker", "w1", "-o", "json"]).ok();
    assert_eq!(listed.as_array().map(Vec::len), Some(2));
}

#[test]
fn status_and_metrics_tell_how_things_are() {
    let mut cluster = Cluster::start(3);
    let status = cluster.cli(&["status", "-o", "json"]).ok();
    assert_eq!(status["members"].as_array().map(Vec::len), Some(3));
    assert_eq!(status["problems"].as_array().map(Vec::len), Some(0), "{status}");
    assert!(status["members"].as_array().expect("members").iter().all(|m| m["role"] == "voter"));
    cluster.cli(&["status", "--check"]).ok();

    let metrics = http_get(&cluster.nodes[0].http(), "/metrics").expect("metrics");
    for family in
        ["portwarden_revision", "portwarden_proposals_refused_total", "portwarden_is_leader"]
    {
        assert!(metrics.contains(family), "{family} is missing: {metrics}");
    }
    assert!(http_get(&cluster.nodes[0].http(), "/readyz").expect("an answer").contains("200 OK"));

    let follower = (0..3).find(|at| *at != cluster.leader()).expect("a follower");
    cluster.kill(follower);
    let id = cluster.nodes[follower].id;
    wait_for("the loss to be seen", || {
        let ran = cluster.cli(&["status", "-o", "json"]);
        let members = ran.ok()["members"].clone();
        let mut lost = members.as_array()?.iter().filter(|m| m["state"] == "unreachable");
        (lost.next()?["id"].as_u64() == Some(id)).then_some(())
    });
    let check = cluster.cli(&["status", "--check"]);
    assert_eq!(check.code(), 1, "{}", check.stdout());
}

/// With whom it began is in its data.
#[test]
fn a_node_that_has_begun_starts_again_without_being_told_with_whom() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40_063);
    let without_list = |cluster: &Cluster, at| {
        let args = cluster.serve_args(at);
        let list = args.iter().position(|arg| arg == "--initial-cluster").expect("a list");
        let mut command = Command::new(BINARY);
        command.args(&args[..list]).args(&args[list + 2..]);
        command
    };
    cluster.kill_all();
    for at in 0..3 {
        let command = without_list(&cluster, at);
        cluster.spawn_as(at, command);
    }
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
    cluster.wait_until_well();
    // Over an empty directory it cannot know.
    cluster.kill(2);
    std::fs::remove_dir_all(cluster.data_dir(2)).expect("it goes");
    let command = without_list(&cluster, 2);
    cluster.spawn_as(2, command);
    assert_eq!(cluster.ended(2), Some(2));
    assert!(cluster.log(2).contains("--initial-cluster or --join is required"));
}
