//! Runs of real processes under faults, and the checker of what they did: docs/testing.md.

mod caller;
mod checker;
#[allow(dead_code)] // shared with `cluster`
#[path = "../cluster/forgetting.rs"]
mod forgetting;
mod history;
mod nemesis;
mod real;
mod rig;
mod run;
mod watcher;
mod workload;

use std::path::PathBuf;

use clap::Parser as _;

use history::History;
use run::{Plan, command_of};

/// Real processes under faults. Needs root.
#[derive(clap::Parser)]
#[command(name = "scripts/faults")]
struct Args {
    /// How long faults go on
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Of everything that is chosen; a random one, if it is not said
    #[arg(long)]
    seed: Option<u64>,
    /// Only these faults
    #[arg(long, value_delimiter = ',')]
    nemesis: Vec<String>,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=7))]
    nodes: u64,
    #[arg(long, default_value_t = 20)]
    clients: u32,
    /// Workers with agents, and instances that really listen: their sockets are judged
    #[arg(long)]
    real: bool,
    /// The binary that is run
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Where history, logs and timeline are kept when something is found
    #[arg(long, default_value = "target/faults")]
    keep: PathBuf,
    /// Run nothing: check a recorded history
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
}

impl Args {
    fn plan(&self) -> Result<Plan, String> {
        let seed = self.seed.unwrap_or_else(|| rand::random_range(0..1 << 32));
        let kinds: Result<Vec<_>, _> = match self.nemesis.as_slice() {
            [] => Ok(nemesis::KINDS.iter().collect()),
            names => names.iter().map(|name| nemesis::by_name(name)).collect(),
        };
        let binary = self.binary.clone();
        let binary = binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_portwarden").into());
        Ok(Plan {
            seconds: self.seconds,
            seed,
            nodes: self.nodes,
            clients: self.clients,
            real: self.real,
            kinds: kinds?,
            binary,
            dir: self.keep.join(format!("seed-{seed}-{}", std::process::id())),
        })
    }
}

/// Number of violations.
fn show(report: &checker::Report) -> usize {
    report.notes.iter().for_each(|note| println!("{note}"));
    println!("refused: {}, surely not done: {}", report.refused, report.failed);
    for violation in &report.violations {
        println!("VIOLATION {violation}");
    }
    println!("ops: {} ok, {} unknown", report.ok, report.unknown);
    println!("violations: {}", report.violations.len());
    report.violations.len()
}

fn checked(file: &std::path::Path) -> Result<usize, String> {
    Ok(show(&checker::check(&History::read(file)?)))
}

/// Number of violations.
fn ran(plan: Plan) -> Result<usize, String> {
    run::can_run()?;
    let (again, dir) = (command_of(&plan), plan.dir.clone());
    println!("{again}");
    let outcome = run::run(plan)?;
    if outcome.interrupted {
        let _ = std::fs::remove_dir_all(&dir);
        return Err("interrupted: everything that was started is removed".into());
    }
    let violations = show(&outcome.report);
    if violations == 0 {
        let _ = std::fs::remove_dir_all(&dir);
        return Ok(0);
    }
    run::write_timelines(&outcome.history)?;
    println!("kept: {}", dir.display());
    println!("check again: scripts/faults --check {}", outcome.history.display());
    println!("run again: {again}");
    Ok(violations)
}

/// `scripts/faults`: its arguments are in the environment, since this is a test to cargo.
#[test]
#[ignore = "run by scripts/faults"]
fn as_told() {
    let told = std::env::var("PORTWARDEN_FAULTS").unwrap_or_default();
    let args = Args::parse_from(std::iter::once("scripts/faults").chain(told.split_whitespace()));
    let done = match &args.check {
        Some(file) => checked(file),
        None => args.plan().and_then(ran),
    };
    match done {
        Ok(0) => {}
        Ok(_) => std::process::exit(1),
        Err(why) => {
            println!("faults: {why}");
            std::process::exit(2);
        }
    }
}

#[test]
#[ignore = "run by a run: an instance"]
fn an_instance_listens() {
    real::listen();
}

/// The whole thing, short: it works, and finds nothing.
#[test]
fn short_runs_with_fixed_seeds_hold() {
    if let Err(why) = run::can_run() {
        assert!(std::env::var_os("CI").is_none(), "CI must run this: {why}");
        println!("NOT RUN: {why}");
        return;
    }
    for args in [
        "--seconds 20 --seed 1 --clients 6",
        "--seconds 12 --seed 2 --clients 4 --nodes 5",
        "--seconds 12 --seed 3 --clients 3 --real",
    ] {
        let args = Args::parse_from(std::iter::once("faults").chain(args.split_whitespace()));
        let keep = std::env::temp_dir().join("portwarden-faults");
        assert_eq!(Args { keep, ..args }.plan().and_then(ran), Ok(0));
    }
}
