//! What an adversary would try: kills at bad moments, long absences, load without a pause.
//!
//! Random choices come from a seed that is printed; `PORTWARDEN_SEED` repeats a run, and
//! `PORTWARDEN_ROUNDS` makes it longer.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::load::under_load;
use crate::support::{BINARY, Cluster, assert_unique, ports, wait_for};

/// Random choices that can be repeated, and how many rounds of them.
fn seeded(rounds: u64) -> (StdRng, u64) {
    let given = |name| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let seed = given("PORTWARDEN_SEED").unwrap_or_else(rand::random);
    eprintln!("PORTWARDEN_SEED={seed}");
    (StdRng::seed_from_u64(seed), given("PORTWARDEN_ROUNDS").unwrap_or(rounds))
}

/// A follower is away while the others write several snapshots and purge the log it would need. It
/// gets a snapshot, and then says what the leader says; also when it is killed right afterwards.
#[test]
fn a_follower_that_was_away_for_two_snapshots_gets_one() {
    const EVERY: u64 = 20;
    let mut cluster = Cluster::start_with(3, &["--snapshot-every", &EVERY.to_string()]);
    cluster.worker("w", 40063);
    cluster.cli(&["allocate", "before", "--worker", "w", "--ports", "2"]).ok();
    let leader = cluster.leader();
    let away = (leader + 1) % 3;
    cluster.kill(away);
    let end = |cluster: &Cluster| cluster.metric(leader, "portwarden_log_last_index");
    let enough = end(&cluster).expect("metrics") + 6.0 * EVERY as f64;
    while end(&cluster).expect("metrics") < enough {
        cluster.cli(&["bench", "--clients", "2", "--seconds", "1"]).ok();
    }
    cluster.cli(&["allocate", "after", "--worker", "w", "--ports", "2"]).ok();
    let listed = cluster.cli(&["list", "-o", "json"]).ok();
    assert_eq!(ports(listed.as_array().expect("an array")).len(), 4);
    let agrees = |cluster: &Cluster| {
        let at = cluster.nodes[away].client();
        wait_for("the follower to say the same", || {
            let stale = cluster.cli_at(&at, &["list", "--stale", "-o", "json"]);
            (stale.json()? == listed).then_some(())
        });
    };

    cluster.spawn(away);
    agrees(&cluster);
    let installed = cluster.metric(away, "portwarden_snapshots_installed_total");
    assert!(installed >= Some(1.0), "it caught up without a snapshot");
    cluster.kill(away);
    cluster.spawn(away);
    agrees(&cluster);
}

/// Random nodes are killed at random moments under load, up to all of them at once.
#[test]
fn random_nodes_die_under_load() {
    let (mut random, rounds) = seeded(5);
    // Snapshots and purges happen throughout.
    let mut cluster = Cluster::start_with(3, &["--snapshot-every", "20"]);
    under_load(&mut cluster, 6, |cluster, load| {
        for round in 1..=rounds {
            load.gets_on(random.random_range(1..15));
            let victims: Vec<_> = (0..3).filter(|_| random.random_bool(0.5)).collect();
            for at in &victims {
                cluster.kill(*at);
            }
            if victims.len() < 2 {
                load.gets_on(random.random_range(1..10));
            }
            for at in &victims {
                cluster.spawn(*at);
            }
            eprintln!("round {round}: killed and started again {victims:?}");
        }
        load.gets_on(10);
    });
}

/// Nodes are killed within their first second, again and again; then the cluster begins as if
/// nothing had been.
#[test]
fn the_first_second_is_survived() {
    let (mut random, rounds) = seeded(4);
    let mut cluster = Cluster::prepare(3);
    for _ in 0..rounds {
        let start = Instant::now();
        let mut deaths: Vec<_> =
            (0..3).map(|at| (Duration::from_millis(random.random_range(0..1000)), at)).collect();
        deaths.sort();
        for at in 0..3 {
            cluster.spawn(at);
        }
        for (moment, at) in deaths {
            wait_for("the moment", || (start.elapsed() >= moment).then_some(()));
            cluster.kill(at);
        }
    }
    for at in 0..3 {
        cluster.spawn(at);
    }
    cluster.leader();
    cluster.worker("w", 40063);
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "2"]).ok();
    assert_unique(&cluster.list());
    cluster.wait_until_well();
}

/// A node that comes back while others write without a pause is ready before they pause.
#[test]
fn a_follower_recovers_under_load() {
    let mut cluster = Cluster::start(3);
    let leader = cluster.leader();
    let follower = (leader + 1) % 3;
    let mut bench = Command::new(BINARY)
        .args(["bench", "--clients", "64", "--seconds", "60", "--endpoints"])
        .arg(cluster.nodes[leader].client())
        .stdout(Stdio::null())
        .spawn()
        .expect("bench starts");
    let revision =
        |cluster: &Cluster| wait_for("writes", || cluster.metric(leader, "portwarden_revision"));
    let before = revision(&cluster);
    wait_for("load", || (revision(&cluster) > before + 100.0).then_some(()));
    cluster.kill(follower);
    cluster.spawn(follower);
    let at = cluster.nodes[follower].client();
    let stale = ["list", "--stale", "-o", "json", "--timeout", "2s"];
    wait_for("the follower to be ready", || {
        (cluster.cli_at(&at, &stale).code() == 0).then_some(())
    });
    let still_running = bench.try_wait().expect("its status").is_none();
    bench.kill().expect("a process of our own can be killed");
    bench.wait().expect("a killed process ends");
    assert!(still_running, "it was ready only after the load had ended");
}
