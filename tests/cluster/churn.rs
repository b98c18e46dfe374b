//! Everything at once: instances come and go, supervisors die and sleep, the leader is killed, the
//! agent sleeps. What lives and is let be is never touched.
//!
//! `PORTWARDEN_CHURN_SECONDS=3600 cargo test --test cluster churn::` does it for an hour; by default
//! it is short. A failing run names the seed: `PORTWARDEN_CHURN_SEED` does the same again, as far as
//! the machine lets it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;

use crate::run::{bound, run_server, worker_here};
use crate::spawned::{Spawned, is_listened_on};
use crate::support::{Cluster, assert_unique, number_from, wait_for};

const PORTS: u16 = 12;
/// They are started first, and nobody touches them.
const LET_BE: [&str; 3] = ["still-0", "still-1", "still-2"];
const SHORT_SECONDS: u64 = 25;

fn port(allocation: &Value) -> u16 {
    allocation["ports"][0]["number"].as_u64().and_then(|n| u16::try_from(n).ok()).expect("a port")
}

/// Instances that come and go, by name.
struct Moving {
    runs: BTreeMap<String, Spawned>,
    started: u32,
}

impl Moving {
    fn start(&mut self, cluster: &Cluster) {
        let name = format!("moving-{}", self.started);
        self.started += 1;
        // One that is killed before it confirmed is judged once its deadline has passed.
        let ttl = ["--lease-ttl", "3s", "--confirm-within", "5s"];
        let flags = [&ttl[..], &["--ports", "1", "--timeout", "30s"]].concat();
        let run = run_server(cluster, &name, &flags);
        self.runs.insert(name, run);
    }

    fn take(&mut self, rng: &mut StdRng) -> Option<Spawned> {
        let at = rng.random_range(0..self.runs.len().max(1));
        let name = self.runs.keys().nth(at)?.clone();
        self.runs.remove(&name)
    }
}

#[test]
fn what_lives_is_never_touched_whatever_else_happens() {
    let seconds = number_from("PORTWARDEN_CHURN_SECONDS").unwrap_or(SHORT_SECONDS);
    let seed = number_from("PORTWARDEN_CHURN_SEED").unwrap_or(u64::from(std::process::id()));
    println!("PORTWARDEN_CHURN_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);

    let flags = ["--zombie-after", "4s", "--worker-lost-after", "3s"];
    let mut cluster = Cluster::start_with(3, &flags);
    worker_here(&cluster, PORTS);
    let agent = Spawned::cli(&cluster, &["agent", "--worker", "w", "--interval", "1s"]);
    agent.says("the table is listed");
    let mut still = BTreeMap::new();
    for name in LET_BE {
        let run = run_server(&cluster, name, &["--ports", "1", "--lease-ttl", "5s"]);
        still.insert(name, (bound(&cluster, name), run));
    }

    let mut moving = Moving { runs: BTreeMap::new(), started: 0 };
    let mut asleep: Vec<Spawned> = Vec::new();
    let (mut down, mut agent_sleeps) = (None, false);
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        match rng.random_range(0..12) {
            0..4 if moving.runs.len() < 6 => moving.start(&cluster),
            4 | 5 => drop(moving.take(&mut rng).map(|mut run| run.terminate())),
            6 => drop(moving.take(&mut rng).map(|mut run| run.kill())),
            7 => asleep.extend(moving.take(&mut rng).inspect(|run| run.signal("STOP"))),
            8 => drop(asleep.pop().inspect(|run| run.signal("CONT"))),
            9 => {
                agent_sleeps = !agent_sleeps;
                agent.signal(if agent_sleeps { "STOP" } else { "CONT" });
            }
            10 if down.is_none() => {
                let leader = cluster.leader();
                cluster.kill(leader);
                down = Some(leader);
            }
            10 | 11 => down.take().into_iter().for_each(|at| cluster.spawn(at)),
            _ => {}
        }
        check(&cluster, &mut still);
    }

    if agent_sleeps {
        agent.signal("CONT");
    }
    down.into_iter().for_each(|at| cluster.spawn(at));
    asleep.iter().for_each(|run| run.signal("CONT"));
    for mut run in moving.runs.into_values().chain(asleep) {
        run.terminate();
    }
    // What was killed is given back too, and what lives is all that is left.
    wait_for("all that has ended to be given back", || {
        (cluster.list().len() == LET_BE.len()).then_some(())
    });
    check(&cluster, &mut still);
    for (name, (before, mut run)) in still {
        let after = bound(&cluster, name);
        assert_eq!(
            (&after["token"], &after["ports"]),
            (&before["token"], &before["ports"]),
            "{name}"
        );
        assert_eq!(run.terminate(), 128 + 15, "{}", run.stderr());
    }
    assert_eq!(cluster.list(), Vec::<Value>::new());
}

/// Nothing is given twice; what was let be runs, listens, and is held under its token.
fn check(cluster: &Cluster, still: &mut BTreeMap<&str, (Value, Spawned)>) {
    assert_unique(&cluster.list());
    for (name, (before, run)) in still {
        run.assert_running();
        assert!(is_listened_on(port(before)), "{name} is stopped: {}", run.stderr());
        let now = wait_for("an answer", || {
            let ran = cluster.cli(&["get", name, "-o", "json", "--timeout", "20s"]);
            (ran.code() != 6).then_some(ran)
        });
        assert_eq!(now.code(), 0, "{name} is gone: {}", now.stderr());
        assert_eq!(now.ok()["token"], before["token"], "{name} is another's");
    }
}
