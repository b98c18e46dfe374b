//! Every planted bug must be found, by a seed of the simulation or else by other tests; and without
//! one nothing must be. Run by `scripts/planted`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use portwarden::planted::{ALL, Bug, CHOSEN};

use crate::entropy::real_now;
use crate::runner::{self, Args};

/// Nothing in one process can show them.
const NOT_SIMULATED: &[Bug] = &[Bug::DependsOnProcess];

#[derive(Debug, clap::Parser)]
#[command(name = "scripts/planted")]
pub struct HuntArgs {
    /// Only these bugs
    #[arg(long, value_delimiter = ',')]
    bugs: Vec<String>,
    /// How long a bug is looked for in simulations, in seconds
    #[arg(long, default_value_t = 120)]
    budget: u64,
    /// How long faults go on in each, in simulated seconds
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// Seeds at a time [default: one for each processor]
    #[arg(long)]
    jobs: Option<usize>,
    /// Seeds that must hold without a bug
    #[arg(long, default_value_t = 8)]
    control: u64,
    /// Where the history of what was found is kept
    #[arg(long, default_value = "target/planted/found")]
    keep: PathBuf,
    /// Test binaries that are asked where simulations find nothing
    #[arg(long = "ask", value_name = "BINARY")]
    asked: Vec<PathBuf>,
}

/// True if every bug was caught.
pub fn hunt(args: &HuntArgs) -> Result<bool, String> {
    let chosen = |name: &str| args.bugs.is_empty() || args.bugs.iter().any(|bug| bug == name);
    let bugs: Vec<_> = ALL.iter().filter(|(_, name, _)| chosen(name)).collect();
    if bugs.is_empty() || bugs.len() < args.bugs.len() {
        return Err(format!("there is no such bug among {:?}", args.bugs));
    }
    let simulated = Args {
        seconds: args.seconds,
        jobs: args.jobs,
        keep: args.keep.clone(),
        seeds: args.control,
        ..runner::standard()
    };
    println!("without a bug:");
    if runner::run_all(&simulated)? > 0 {
        return Err("something is found without a bug".into());
    }
    let mut caught = 0;
    for (bug, name, what) in &bugs {
        let began = real_now();
        let mut found = None;
        if !NOT_SIMULATED.contains(bug) {
            found = by_simulation(&simulated, name, Duration::from_secs(args.budget));
        }
        let found = found.or_else(|| by_tests(&args.asked, name));
        let took = (real_now() - began).as_secs_f64();
        match found {
            Some(by) => {
                caught += 1;
                println!("{name} ({what}): caught after {took:.1} s by {by}");
            }
            None => println!("{name} ({what}): NOT CAUGHT in {took:.1} s"),
        }
    }
    println!("caught {caught} of {}", bugs.len());
    Ok(caught == bugs.len())
}

/// The first seed to be through that finds something.
fn by_simulation(args: &Args, bug: &str, budget: Duration) -> Option<String> {
    let until = real_now() + budget;
    let next = AtomicU64::new(1);
    let done = AtomicBool::new(false);
    let found = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..runner::jobs(args) {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) && real_now() < until {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    let violations = match runner::in_a_process(args, seed, Some(bug)) {
                        Ok(summary) => summary.violations,
                        Err(why) => vec![why],
                    };
                    let Some(first) = violations.first().and_then(|v| v.lines().next()) else {
                        continue;
                    };
                    done.store(true, Ordering::Relaxed);
                    let shown: String = first.chars().take(160).collect();
                    let by = format!("the simulation, seed {seed}: {shown}");
                    found.lock().expect("nobody panics").get_or_insert(by);
                }
            });
        }
    });
    found.into_inner().expect("nobody panics")
}

/// The first test that fails with the bug, alone too, and passes alone without it.
fn by_tests(binaries: &[PathBuf], bug: &str) -> Option<String> {
    let run = |binary: &Path, bug: &str, args: &[&str]| {
        Command::new(binary).args(args).env(CHOSEN, bug).stdin(Stdio::null()).output().ok()
    };
    let passes = |binary: &Path, bug: &str, test: &str| {
        run(binary, bug, &[test, "--exact"]).is_some_and(|ran| ran.status.success())
    };
    binaries.iter().find_map(|binary| {
        let said = run(binary, bug, &[])?.stdout;
        let said = String::from_utf8_lossy(&said);
        let mut failed = said.lines().filter_map(|line| {
            line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... FAILED"))
        });
        let test = failed.find(|test| !passes(binary, bug, test) && passes(binary, "", test))?;
        let name = binary.file_name()?.to_string_lossy();
        let name = name.rsplit_once('-').map_or(name.as_ref(), |(name, _)| name);
        Some(format!("the tests of {name}: {test}"))
    })
}
