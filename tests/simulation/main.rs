//! Whole clusters in one thread, with a network, disks and time of their own: docs/testing.md.

#[path = "../faults/caller.rs"]
mod caller;
#[path = "../faults/checker/mod.rs"]
mod checker;
mod cluster;
mod entropy;
mod errands;
#[path = "../faults/history.rs"]
mod history;
mod invariants;
mod nemesis;
mod people;
mod plan;
mod run;
mod sim;
mod site;
mod trace;
#[path = "../faults/watcher.rs"]
mod watcher;
#[path = "../faults/workload.rs"]
mod workload;
mod world;

fn main() {
    let seed: u64 = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(1);
    let secs: u64 = std::env::args().nth(2).and_then(|s| s.parse().ok()).unwrap_or(10);
    if std::env::var_os("LOG").is_some() {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_env("LOG"))
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
    }
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let began = entropy::real_now();
    entropy::close(seed);
    portwarden::blocking::keep_inline();
    portwarden::store::instead_of_exit(world::exit);
    let plan = plan::Plan::of(seed, secs);
    println!("{plan:?}");
    let outcome = run::run(plan, dir.path(), String::new()).unwrap();
    let took = entropy::real_now() - began;
    for v in outcome.violations() {
        println!("VIOLATION {v}");
    }
    for n in &outcome.report.notes {
        println!("{n}");
    }
    println!(
        "seed {seed} trace {} {} ok {} unknown {} refused, {} revisions, {:?} in {took:?}",
        outcome.trace,
        outcome.report.ok,
        outcome.report.unknown,
        outcome.report.refused,
        outcome.revisions,
        outcome.simulated
    );
    if !outcome.violations().is_empty() {
        let kept = dir.keep();
        println!("{}", kept.display());
    }
    std::process::exit(0);
}
