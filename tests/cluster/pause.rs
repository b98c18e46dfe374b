//! Nodes that sleep longer than an election takes, and nodes that get no CPU: nobody hears anything
//! stale, and afterwards all is as it was.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{BINARY, Cluster, assert_unique, wait_for};

/// Longer than the longest election timeout.
const ASLEEP: Duration = Duration::from_millis(1500);
const PATIENT: [&str; 4] = ["--timeout", "30s", "-o", "json"];

/// Leader and followers sleep in turn. While one does, the others change the table, and calls wait
/// at its door; when it wakes it reads as the others do, and what it acknowledges is so.
#[test]
fn a_node_that_slept_says_nothing_stale() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40999);
    let mut held = cluster
        .cli(&[&["allocate", "r", "--worker", "w", "--ports", "1"][..], &PATIENT].concat())
        .ok();
    for round in 0..4 {
        let leader = cluster.leader();
        let sleeper = (leader + [0, 1, 0, 2][round]) % 3;
        let door = cluster.nodes[sleeper].client();
        let awake: Vec<_> = cluster.nodes.iter().filter(|n| n.client() != door).collect();
        let awake = awake.iter().map(|n| n.client()).collect::<Vec<_>>().join(",");
        let others = |args: &[&str]| cluster.cli_at(&awake, &[args, &PATIENT].concat()).ok();
        eprintln!("round {round}: node {} sleeps, leader was {leader}", cluster.nodes[sleeper].id);
        cluster.signal(sleeper, "STOP");
        let asleep = Instant::now();
        let name = format!("p{round}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let args = ["allocate", &name, "--worker", "w", "--ports", "1"];
                cluster.cli_at(&door, &[&args[..], &PATIENT].concat())
            });
            // The same name again and again, each time under a new token.
            let mut writes = 0;
            while writes < 3 || asleep.elapsed() < ASLEEP {
                let token = held["token"].to_string();
                others(&["release", "r", "--token", &token]);
                let again = others(&["allocate", "r", "--worker", "w", "--ports", "1"]);
                assert!(again["token"].as_u64() > held["token"].as_u64());
                held = again;
                writes += 1;
            }
            cluster.signal(sleeper, "CONT");
            for _ in 0..3 {
                let read = cluster.cli_at(&door, &[&["get", "r"][..], &PATIENT].concat()).ok();
                assert_eq!(read["token"], held["token"], "a stale read");
                assert_eq!(read["ports"], held["ports"], "a stale read");
            }
            let waited = waiting.join().expect("the caller");
            let listed = cluster.list();
            let found = listed.iter().find(|a| a["name"] == name.as_str());
            match waited.code() {
                0 => assert_eq!(found.map(|a| &a["ports"]), Some(&waited.ok()["ports"])),
                code => assert_eq!(code, 6, "{}", waited.stderr()),
            }
            assert_unique(&listed);
        });
    }
}

/// Processes that do nothing but use the CPU; they end with this, or by themselves.
struct Burners(Vec<Child>);

impl Burners {
    fn start(at_most: Duration) -> Burners {
        let count = 2 * std::thread::available_parallelism().map_or(2, usize::from);
        let seconds = at_most.as_secs().to_string();
        let burner = |_| {
            let mut command = Command::new("timeout");
            command.args([seconds.as_str(), "sh", "-c", "while :; do :; done"]);
            command.stdin(Stdio::null()).spawn().expect("a busy process")
        };
        Burners((0..count).map(burner).collect())
    }
}

impl Drop for Burners {
    fn drop(&mut self) {
        for burner in &mut self.0 {
            // `timeout` passes this on; SIGKILL it could not.
            let pid = burner.id().to_string();
            let _ = Command::new("kill").args(["-s", "TERM", &pid]).status();
            let _ = burner.wait();
        }
    }
}

/// For `PORTWARDEN_STARVE_SECONDS` (default 10) every core is busy with something else. Calls may end
/// in doubt meanwhile; none is answered wrongly, and afterwards all goes on.
#[test]
fn nodes_without_cpu_answer_nothing_wrong() {
    let seconds = std::env::var("PORTWARDEN_STARVE_SECONDS").ok();
    let seconds = seconds.map_or(10, |text| text.parse().expect("a number of seconds"));
    let starved = Duration::from_secs(seconds);
    let cluster = Cluster::start(3);
    cluster.worker("w", 40999);
    let endpoints = cluster.endpoints();
    let over = AtomicBool::new(false);
    let run = |args: &[&str]| -> Option<Value> {
        let flags = ["--endpoints", &endpoints, "--timeout", "5s", "-o", "json"];
        let output = Command::new(BINARY).args(args).args(flags).output().expect("the CLI runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.code() {
            Some(0) => Some(serde_json::from_slice(&output.stdout).expect("JSON")),
            Some(6) => None,
            code => panic!("{args:?}: {code:?} {said}"),
        }
    };
    // By name: granted, or `None` where nobody knows.
    let client = |client: usize| {
        let mut heard = BTreeMap::new();
        for i in 0.. {
            if over.load(Ordering::Acquire) {
                break;
            }
            let name = format!("c{client}-{i}");
            let granted = run(&["allocate", &name, "--worker", "w", "--ports", "2"]);
            if let Some(granted) = &granted
                && let Some(read) = run(&["get", &name])
            {
                assert_eq!(read["ports"], granted["ports"], "{name}: a wrong read");
            }
            heard.insert(name, granted);
        }
        heard
    };
    let heard: BTreeMap<_, _> = std::thread::scope(|scope| {
        let burners = Burners::start(starved + Duration::from_secs(30));
        let client = &client;
        let clients: Vec<_> = (0..3).map(|at| scope.spawn(move || client(at))).collect();
        let began = Instant::now();
        while began.elapsed() < starved {
            std::thread::park_timeout(starved - began.elapsed());
        }
        drop(burners);
        over.store(true, Ordering::Release);
        clients.into_iter().flat_map(|client| client.join().expect("a client")).collect()
    });
    let known = heard.values().flatten().count();
    eprintln!("{known} of {} calls were answered in {seconds} s", heard.len());

    wait_for("all members to be well", || {
        let status = cluster.cli(&["status", "--check", "-o", "json", "--timeout", "5s"]);
        (status.code() == 0).then_some(())
    });
    let listed = cluster.list();
    assert_unique(&listed);
    let table: BTreeMap<_, _> =
        listed.iter().map(|a| (a["name"].as_str().expect("a name"), a)).collect();
    for (name, granted) in &heard {
        if let Some(granted) = granted {
            let found = table.get(name.as_str()).unwrap_or_else(|| panic!("{name} was lost"));
            assert_eq!(found["ports"], granted["ports"], "{name}");
        }
    }
    cluster.cli(&["allocate", "afterwards", "--worker", "w", "--ports", "1"]).ok();
}
