//! Bugs that others had, set up against a real cluster. Each comment says in a line what went wrong
//! there and which rule prevents it here.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::{Cluster, assert_unique, ports};

fn allocate_each(cluster: &Cluster, names: &[String], flags: &[&str]) -> Vec<Value> {
    // One scheduler a name, all at once, each through another node first.
    std::thread::scope(|scope| {
        let started: Vec<_> = names
            .iter()
            .enumerate()
            .map(|(i, name)| {
                let mut endpoints: Vec<_> = cluster.nodes.iter().map(|n| n.client()).collect();
                let turn = i % endpoints.len();
                endpoints.rotate_left(turn);
                scope.spawn(move || {
                    let mut args = vec!["allocate", name, "-o", "json", "--timeout", "30s"];
                    args.extend(flags);
                    cluster.cli_at(&endpoints.join(","), &args).ok()
                })
            })
            .collect();
        started.into_iter().map(|s| s.join().expect("a scheduler")).collect()
    })
}

fn number(allocation: &Value) -> u64 {
    allocation["ports"][0]["number"].as_u64().expect("a port")
}

fn token(allocation: &Value) -> String {
    allocation["token"].as_u64().expect("a token").to_string()
}

/// Ten replicas, two on port 40052 of one worker: the table was not shared between concurrent
/// placements. Here every allocation goes through the log.
#[test]
fn gpustack_1466() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    let names: Vec<_> = (0..10).map(|i| format!("qwen2.5-{i}")).collect();
    let flags = ["--worker", "w", "--ports", "1", "--gpus", "1", "--gpu-memory", "1GiB"];
    let granted = allocate_each(&cluster, &names, &flags);
    assert_unique(&granted);
    assert_eq!(ports(&granted).len(), 10);
    assert_eq!(ports(&cluster.list()), ports(&granted), "the table says the same");
}

/// Requests reached a deleted instance's old port: a freed port was reused at once. Here the
/// longest-free port comes next, and never-used ones before it.
#[test]
fn gpustack_4063() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40003);
    let take = |name: &str| {
        cluster.cli(&["allocate", name, "--worker", "w", "--ports", "1", "-o", "json"]).ok()
    };
    let release = |allocation: &Value| {
        let name = allocation["name"].as_str().expect("a name");
        cluster.cli(&["release", name, "--token", &token(allocation)]).ok();
    };
    let (a, b) = (take("a"), take("b"));
    assert_eq!((number(&a), number(&b)), (40000, 40001));
    release(&b);
    release(&a);
    let order: Vec<_> = ["c", "d", "e", "f"].iter().map(|name| number(&take(name))).collect();
    assert_eq!(order, [40002, 40003, 40001, 40000]);
}

/// "Reserved port collision" inside one plan: the ports of one request were picked one by one
/// without seeing each other. Here a claim sees its own picks, and a gang too.
#[test]
fn nomad_9506_and_16410() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40007);
    let claim = cluster
        .cli(&[
            "allocate",
            "job",
            "--worker",
            "w",
            "--ports",
            "2",
            "--port",
            "http=40000",
            "--contiguous",
            "3",
            "-o",
            "json",
        ])
        .ok();
    assert_unique(std::slice::from_ref(&claim));
    let taken: BTreeSet<_> = ports(std::slice::from_ref(&claim)).into_iter().collect();
    assert_eq!(taken.len(), 6);
    assert!(taken.contains(&("w".to_string(), 40000)));

    let gang = cluster.dir().join("gang.yaml");
    let claims = "- {name: g1, worker: w, ports: [{count: 1}]}\n\
                  - {name: g2, worker: w, ports: [{count: 1}]}\n";
    std::fs::write(&gang, claims).expect("a file");
    let path = gang.display().to_string();
    let granted = cluster.cli(&["allocate", "-f", &path, "-o", "json"]).ok();
    assert_eq!(granted[0]["token"], granted[1]["token"], "a gang shares its token");
    assert_unique(&cluster.list());
    // Nothing is left for a second gang, and half of one is not taken.
    std::fs::write(&gang, claims.replace("g1", "h1").replace("g2", "h2")).expect("a file");
    cluster.cli(&["allocate", "-f", &path]).refused(5, "range service");
    assert_eq!(cluster.list().len(), 3);
}

/// One duplicate reservation in a host's configuration blocked every allocation on it. Here
/// duplicates are merged, overlapping ranges are refused at registration, and never later.
#[test]
fn nomad_13505() {
    let cluster = Cluster::start(3);
    let register = |range: &[&str]| {
        let mut args = vec!["worker", "register", "w", "--address", "127.0.0.1"];
        args.extend(range);
        cluster.cli(&args)
    };
    register(&["--range", "a=40000-40010", "--range", "b=40010-40020"]).refused(2, "overlap");
    register(&["--range", "a=40000-40001", "--reserve", "40000", "--reserve", "40000"]).ok();
    let only = cluster.cli(&["allocate", "x", "--worker", "w", "--ports", "1", "-o", "json"]).ok();
    assert_eq!(number(&only), 40001);
}

/// With three API servers, one NodePort went to two Services: the allocator answered from a local
/// copy before asking the store. Here no answer comes from any local copy.
#[test]
fn kubernetes_43233_and_85894() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    // The same specific port, asked of all three nodes at once: one wins, the others hear who.
    let answers: Vec<_> = std::thread::scope(|scope| {
        let asked: Vec<_> = cluster
            .nodes
            .iter()
            .map(|node| {
                let name = format!("svc-{}", node.id);
                let cluster = &cluster;
                scope.spawn(move || {
                    let port = ["--worker", "w", "--port", "40052"];
                    cluster
                        .cli_at(&node.client(), &[&["allocate", name.as_str()], &port[..]].concat())
                })
            })
            .collect();
        asked.into_iter().map(|a| a.join().expect("a caller")).collect()
    });
    let won = answers.iter().filter(|a| a.code() == 0).count();
    assert_eq!(won, 1);
    for lost in answers.iter().filter(|a| a.code() != 0) {
        lost.refused(5, "port 40052 is held by svc-");
    }
    assert_eq!(ports(&cluster.list()), [("w".to_string(), 40052)]);
}

/// Deleting one of two colliding Services freed the other's port: release was by number, blind.
/// Here it is by name and token.
#[test]
fn kubernetes_64466() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40000);
    let take = |name: &str| {
        cluster.cli(&["allocate", name, "--worker", "w", "--ports", "1", "-o", "json"])
    };
    let first = take("svc").ok();
    cluster.cli(&["release", "svc", "--token", &token(&first)]).ok();
    let second = take("svc").ok();
    assert_eq!(number(&first), number(&second), "the only port of the range");
    // The first holder's late release must not free the second's port.
    cluster.cli(&["release", "svc", "--token", &token(&first)]).refused(4, "token");
    take("other").refused(5, "svc");
    cluster.cli(&["release", "svc", "--token", &token(&second)]).ok();
    take("other").ok();
}
