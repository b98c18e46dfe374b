//! Whole clusters in one thread, with a network, disks and time of their own: docs/testing.md.
//!
//! Each seed runs in a process of its own: what a library counts or caches for the whole process
//! begins anew with it. `scripts/simulate` puts its arguments into [`TOLD`]; without them this is a
//! test to cargo.

#[allow(dead_code)] // its way over real sockets
#[path = "../faults/caller.rs"]
mod caller;
#[allow(dead_code, unused_imports)] // its own tests run with the fault suite
#[path = "../faults/checker/mod.rs"]
mod checker;
mod cluster;
mod entropy;
mod errands;
#[path = "../faults/history.rs"]
mod history;
#[cfg(planted)]
mod hunt;
mod invariants;
mod nemesis;
mod people;
mod plan;
mod restore;
mod run;
mod runner;
mod sim;
mod site;
mod trace;
#[path = "../faults/watcher.rs"]
mod watcher;
#[allow(dead_code)] // those for real workers
#[path = "../faults/workload.rs"]
mod workload;
mod world;

use std::process::ExitCode;

use clap::Parser as _;

use runner::{Args, Summary};

/// The arguments of `scripts/simulate`.
const TOLD: &str = "PORTWARDEN_SIMULATION";
/// The arguments of `scripts/planted`.
#[cfg(planted)]
const HUNT: &str = "PORTWARDEN_HUNT";

fn main() -> ExitCode {
    // The processes of a hunt are told what to simulate, and have what the hunter was told too.
    let Ok(told) = std::env::var(TOLD) else { return otherwise() };
    let args = Args::parse_from(std::iter::once("scripts/simulate").chain(told.split_whitespace()));
    if let Some(seed) = args.one {
        return runner::run_one(&args, seed);
    }
    match runner::run_all(&args) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(why) => {
            println!("simulate: {why}");
            ExitCode::from(2)
        }
    }
}

#[cfg(not(planted))]
fn otherwise() -> ExitCode {
    as_test()
}

#[cfg(planted)]
fn otherwise() -> ExitCode {
    let Ok(told) = std::env::var(HUNT) else { return as_test() };
    let told = std::iter::once("scripts/planted").chain(told.split_whitespace());
    match hunt::hunt(&hunt::HuntArgs::parse_from(told)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            println!("planted: {why}");
            ExitCode::from(2)
        }
    }
}

type Test = (&'static str, fn());

const TESTS: &[Test] = &[
    ("one_seed_twice_in_two_processes_prints_the_same_trace", same_trace),
    ("short_runs_with_fixed_seeds_hold", short_runs),
];

/// As other test binaries take them: names, or parts of them, choose among the tests.
fn as_test() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let named: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let is_chosen = |name: &str| named.is_empty() || named.iter().any(|n| name.contains(*n));
    for (name, test) in TESTS.iter().filter(|(name, _)| is_chosen(name)) {
        if args.iter().any(|arg| arg == "--list") {
            println!("{name}: test");
            continue;
        }
        test();
        println!("test {name} ... ok");
    }
    ExitCode::SUCCESS
}

fn short() -> Args {
    Args::parse_from(["simulate", "--seconds", "2"])
}

fn same_trace() {
    let seed = |seed| runner::in_a_process(&short(), seed, None).expect("a run");
    let (once, again, other) = (seed(1), seed(1), seed(2));
    assert_eq!(once.trace, again.trace, "one seed is one run, in whatever process");
    assert_ne!(once.trace, other.trace, "another seed is another run");
    for Summary { trace, .. } in [once, again] {
        println!("seed 1: trace {trace}");
    }
}

fn short_runs() {
    let args = Args { seed: 100, seeds: 2, ..short() };
    assert_eq!(runner::run_all(&args), Ok(0));
}
