//! Clients that allocate and release without pause while a test does its worst, and what must hold
//! afterwards.

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::Value;

use crate::support::{BINARY, Cluster, assert_unique, wait_for};

/// What the clients heard, by instance.
#[derive(Debug, Clone, PartialEq)]
enum Heard {
    Granted(Value),
    Released,
    /// A call ended with exit code 6: it may or may not have happened.
    Unknown,
}

#[derive(Default)]
pub struct Load {
    heard: Mutex<BTreeMap<String, Heard>>,
    acknowledged: AtomicUsize,
    failed: AtomicUsize,
    done: AtomicBool,
}

/// Lets so many clients allocate two ports each, over and over, and release every third allocation,
/// while `disturb` runs. Then: no acknowledged allocation is lost, none that was released came
/// back, no port is doubled, and no call failed but with exit code 6.
pub fn under_load(
    cluster: &mut Cluster,
    clients: usize,
    disturb: impl FnOnce(&mut Cluster, &Load),
) {
    cluster.worker("w", 41999);
    let load = Load::default();
    let endpoints = cluster.endpoints();
    std::thread::scope(|scope| {
        for client in 0..clients {
            let (load, endpoints) = (&load, &endpoints);
            scope.spawn(move || load.run(client, endpoints));
        }
        let disturb = std::panic::AssertUnwindSafe(|| disturb(cluster, &load));
        let outcome = std::panic::catch_unwind(disturb);
        load.done.store(true, Ordering::Release);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    load.check(&cluster.list());
}

/// Calls that ended with exit code 6 so far.
pub fn failed_calls(load: &Load) -> usize {
    load.failed.load(Ordering::Acquire)
}

impl Load {
    /// Waits until so many more allocations were acknowledged.
    pub fn gets_on(&self, by: usize) {
        let enough = self.acknowledged.load(Ordering::Acquire) + by;
        wait_for("clients to get on", || {
            (self.acknowledged.load(Ordering::Acquire) >= enough).then_some(())
        });
    }

    fn run(&self, client: usize, endpoints: &str) {
        for round in 0.. {
            if self.done.load(Ordering::Acquire) {
                return;
            }
            let name = format!("c{client}-{round}");
            let granted = call(endpoints, &["allocate", &name, "--worker", "w", "--ports", "2"]);
            let mut now = granted.map_or(Heard::Unknown, Heard::Granted);
            if let Heard::Granted(allocation) = &now {
                self.acknowledged.fetch_add(1, Ordering::AcqRel);
                if round % 3 == 2 {
                    let token = allocation["token"].to_string();
                    now = match call(endpoints, &["release", &name, "--token", &token]) {
                        Some(_) => Heard::Released,
                        None => Heard::Unknown,
                    };
                }
            }
            if now == Heard::Unknown {
                self.failed.fetch_add(1, Ordering::AcqRel);
            }
            self.heard.lock().expect("no client panicked").insert(name, now);
        }
    }

    fn check(self, listed: &[Value]) {
        assert_unique(listed);
        let name = |a: &Value| a["name"].as_str().expect("a name").to_string();
        let table: BTreeMap<_, _> = listed.iter().map(|a| (name(a), a)).collect();
        let heard = self.heard.into_inner().expect("no client panicked");
        for (name, heard) in &heard {
            match heard {
                Heard::Granted(allocation) => {
                    let held = table.get(name).unwrap_or_else(|| panic!("{name} was lost"));
                    assert_eq!(held["ports"], allocation["ports"], "{name}");
                    assert_eq!(held["token"], allocation["token"], "{name}");
                }
                Heard::Released => assert!(!table.contains_key(name), "{name} came back"),
                Heard::Unknown => {}
            }
        }
        assert!(table.keys().all(|name| heard.contains_key(name)), "nobody asked for it");
    }
}

/// `None`: exit code 6.
fn call(endpoints: &str, args: &[&str]) -> Option<Value> {
    let flags = ["--endpoints", endpoints, "--timeout", "20s", "-o", "json"];
    let output = Command::new(BINARY).args(args).args(flags).output().expect("the CLI runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    assert!(matches!(code, Some(0 | 6)), "{args:?}: {code:?} {stderr}");
    (code == Some(0)).then(|| serde_json::from_slice(&output.stdout).expect("JSON"))
}
