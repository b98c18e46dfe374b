//! Seeds, each in a process of its own, and what is said of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::plan::{self, Plan};
use crate::{TOLD, entropy, run, world};

/// A run that takes longer, in seconds of the host's, does not come forward.
const RUN_MAX_SECONDS: u32 = 600;
/// Where there is memory to write to.
const MEMORY: &str = "/dev/shm";
const HISTORY: &str = "history.jsonl";
/// Names the bug in a build that has some.
const PLANTED: &str = "PORTWARDEN_PLANTED";

/// Whole clusters in one thread, with a network, disks and time of their own.
#[derive(Debug, Clone, clap::Parser)]
#[command(name = "scripts/simulate")]
pub struct Args {
    /// The first seed
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How many seeds, one after the other
    #[arg(long, default_value_t = 1)]
    pub seeds: u64,
    /// How long faults go on in each, in simulated seconds
    #[arg(long, default_value_t = plan::SECONDS, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Seeds at a time [default: one for each processor]
    #[arg(long)]
    pub jobs: Option<usize>,
    /// Where the history of what was found is kept
    #[arg(long, default_value = "target/simulated")]
    pub keep: PathBuf,
    /// What the nodes log, to stderr: as RUST_LOG
    #[arg(long)]
    pub log: Option<String>,
    /// Stop at the first seed that finds something
    #[arg(long)]
    pub first: bool,
    /// This process is for this seed
    #[arg(long, hide = true)]
    pub one: Option<u64>,
}

/// What a run tells of itself: the last line of its process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    pub trace: String,
    pub violations: Vec<String>,
    notes: Vec<String>,
    nodes: u64,
    faults: usize,
    ok: usize,
    refused: usize,
    unknown: usize,
    revisions: u64,
    simulated: Duration,
    took: Duration,
}

/// In a process of its own, to its end.
pub fn run_one(args: &Args, seed: u64) -> ExitCode {
    // SAFETY: a system call without preconditions.
    unsafe { libc::alarm(RUN_MAX_SECONDS) };
    if let Some(filter) = &args.log {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
    }
    let dir = data_dir();
    // Paths are the same for every process.
    std::env::set_current_dir(dir.path()).expect("a directory that was just made");
    let began = entropy::processor_time();
    entropy::close(seed);
    portwarden::blocking::keep_inline();
    portwarden::store::instead_of_exit(world::exit);
    let plan = Plan::of(seed, args.seconds);
    let (nodes, faults) = (plan.nodes, plan.faults.len());
    let outcome = run::run(plan, Path::new("."), command_of(args, seed)).expect("a history");
    let report = &outcome.report;
    let summary = Summary {
        violations: outcome.violations(),
        notes: report.notes.clone(),
        nodes,
        faults,
        ok: report.ok,
        refused: report.refused,
        unknown: report.unknown,
        revisions: outcome.revisions,
        simulated: outcome.simulated,
        took: entropy::processor_time() - began,
        trace: outcome.trace,
    };
    if !summary.violations.is_empty() {
        let kept = kept(args, seed);
        let copied = std::fs::create_dir_all(&kept)
            .and_then(|()| std::fs::copy(HISTORY, kept.join(HISTORY)));
        if let Err(why) = copied {
            eprintln!("{}: {why}", kept.display());
        }
    }
    println!("{}", serde_json::to_string(&summary).expect("it is plain"));
    drop(dir);
    // Without the rest: everything that is left would be torn down, for nothing.
    std::process::exit(0)
}

fn data_dir() -> tempfile::TempDir {
    let made = tempfile::tempdir_in(MEMORY).or_else(|_| tempfile::tempdir());
    made.expect("a directory for what nodes write")
}

fn kept(args: &Args, seed: u64) -> PathBuf {
    args.keep.join(format!("seed-{seed}"))
}

/// Runs this seed again.
fn command_of(args: &Args, seed: u64) -> String {
    let planted = std::env::var(PLANTED).map(|bug| format!("{PLANTED}={bug} "));
    let seconds = match args.seconds {
        plan::SECONDS => String::new(),
        seconds => format!(" --seconds {seconds}"),
    };
    format!("{}scripts/simulate --seed {seed} --seeds 1{seconds}", planted.unwrap_or_default())
}

/// One of each.
#[cfg(planted)]
pub fn standard() -> Args {
    clap::Parser::parse_from(["scripts/simulate"])
}

pub fn jobs(args: &Args) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    args.jobs.unwrap_or(processors).clamp(1, 256)
}

/// Runs a seed in a process of its own, with a bug if its build has any.
pub fn in_a_process(args: &Args, seed: u64, planted: Option<&str>) -> Result<Summary, String> {
    let keep = std::path::absolute(&args.keep).map_err(|error| error.to_string())?;
    let log = args.log.as_ref().map_or(String::new(), |log| format!(" --log {log}"));
    let told = format!("--one {seed} --seconds {} --keep {}{log}", args.seconds, keep.display());
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let ran = Command::new(program)
        .env(TOLD, told)
        .envs(planted.map(|bug| (PLANTED, bug)))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&ran.stdout);
    let summary = said.lines().last().and_then(|line| serde_json::from_str(line).ok());
    summary.ok_or_else(|| format!("its process ended without a word: {}", ran.status))
}

/// What all seeds came to together.
#[derive(Default)]
struct Total {
    runs: u64,
    found: u64,
    ok: usize,
    unknown: usize,
    simulated: Duration,
    took: Duration,
}

/// Runs them all, some at a time, and says of each in its turn what it came to; how many found
/// something.
pub fn run_all(args: &Args) -> Result<u64, String> {
    let jobs = jobs(args);
    let began = entropy::real_now();
    let next = AtomicU64::new(0);
    let stop = Mutex::new(false);
    let (done, results) = mpsc::channel();
    let mut total = Total::default();
    std::thread::scope(|scope| {
        for _ in 0..jobs {
            let (done, next, stop) = (done.clone(), &next, &stop);
            scope.spawn(move || {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= args.seeds || *stop.lock().unwrap_or_else(PoisonError::into_inner) {
                        return;
                    }
                    let seed = args.seed + at;
                    // Nobody hears it only where everything has ended.
                    let _ = done.send((seed, in_a_process(args, seed, None)));
                }
            });
        }
        drop(done);
        let mut waiting = BTreeMap::new();
        let mut turn = args.seed;
        for (seed, result) in results {
            waiting.insert(seed, result);
            while let Some(result) = waiting.remove(&turn) {
                total.add(args, turn, result);
                turn += 1;
            }
            if args.first && total.found > 0 {
                *stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
            }
        }
    });
    total.show(entropy::real_now() - began);
    Ok(total.found)
}

impl Total {
    fn add(&mut self, args: &Args, seed: u64, result: Result<Summary, String>) {
        self.runs += 1;
        let violations = match result {
            Ok(summary) => {
                self.ok += summary.ok;
                self.unknown += summary.unknown;
                self.simulated += summary.simulated;
                self.took += summary.took;
                summary.show(seed);
                summary.violations
            }
            Err(why) => {
                println!("seed {seed}");
                vec![why]
            }
        };
        if violations.is_empty() {
            return;
        }
        self.found += 1;
        violations.iter().for_each(|violation| println!("VIOLATION {violation}"));
        println!("history: {}", kept(args, seed).join(HISTORY).display());
        println!("run again: {}", command_of(args, seed));
    }

    fn show(&self, elapsed: Duration) {
        let Total { runs, found, ok, unknown, simulated, took } = self;
        let ratio = simulated.as_secs_f64() / took.as_secs_f64().max(1e-9);
        println!("ops: {ok} ok, {unknown} unknown");
        println!(
            "{runs} seeds in {:.1} s; simulated {:.0} s in {:.1} s of one processor each: {ratio:.1} to 1",
            elapsed.as_secs_f64(),
            simulated.as_secs_f64(),
            took.as_secs_f64(),
        );
        println!("violations: {found}");
    }
}

impl Summary {
    fn show(&self, seed: u64) {
        println!(
            "seed {seed}: {} nodes, {} faults; {} ok, {} refused, {} unknown, {} revisions; {:.1} s in {:.2} s",
            self.nodes,
            self.faults,
            self.ok,
            self.refused,
            self.unknown,
            self.revisions,
            self.simulated.as_secs_f64(),
            self.took.as_secs_f64(),
        );
        println!("trace {}", self.trace);
        self.notes.iter().filter(|note| note.contains("not ")).for_each(|note| println!("{note}"));
    }
}
