//! portwarden, etcd and PostgreSQL side by side: `scripts/bench`.
//!
//! Three nodes of each replicated system and one of PostgreSQL run as processes of this machine, on one
//! disk, with their syncs on. Rounds are interleaved: each workload runs for a few seconds on one
//! system after the other, and what is compared are medians over the rounds of one run. The callers
//! are the same closed loop for all, in this process.

mod bare;
mod etcd;
mod failover;
mod growth;
mod ours;
mod postgres;
mod processes;
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::ensure;
use clap::Parser;
use portwarden::cli::bench::load::{self, Caller, Report};
use tokio::signal::unix::{SignalKind, signal};

use bare::Three;
use etcd::Etcd;
use failover::Loss;
use ours::Ours;
use postgres::Postgres;
use report::{Summary, Whole};

/// portwarden beside etcd and PostgreSQL, in interleaved rounds of one run
#[derive(Debug, Parser)]
struct Args {
    /// Rounds of 3 s; without it 5 rounds of 10 s
    #[arg(long)]
    quick: bool,
    /// Of stdout
    #[arg(short, long, default_value = "table", value_parser = ["table", "json"])]
    output: String,
    /// The binary that is measured
    #[arg(long, default_value = "target/shipped/portwarden")]
    binary: PathBuf,
    /// Data and logs go to a new directory in it, and are kept; without it to one in /var/tmp, and are
    /// removed unless the run fails
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Where the plots go
    #[arg(long)]
    plots: Option<PathBuf>,
    /// Runs only the workloads, or the parts of --growth, with this in their names
    #[arg(long)]
    only: Option<String>,
    /// In place of the comparison: portwarden alone, with more and more leases, watchers, callers and
    /// allocations
    #[arg(long)]
    growth: bool,
    #[command(flatten)]
    serve_bare: bare::Serve,
    /// As cargo passes it
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    fn wants(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|only| name.contains(only))
    }

    fn workloads(&self) -> Vec<&'static Workload> {
        let name = |w: &Workload| format!("{}/{}@{}", w.system, w.name, w.clients);
        WORKLOADS.iter().filter(|w| self.wants(&name(w))).collect()
    }

    fn wants_anything(&self) -> bool {
        match self.growth {
            true => PARTS.iter().any(|part| self.wants(part)),
            false => !self.workloads().is_empty(),
        }
    }
}

/// After each workload: what it left is written.
const REST: Duration = Duration::from_millis(500);

/// One line of the comparison.
struct Workload {
    system: &'static str,
    name: &'static str,
    clients: u32,
    /// What its numbers are of.
    what: &'static str,
}

const WORKLOADS: &[Workload] = &[
    of("portwarden", "allocate", 1, "unary allocate, then release, 1000 workers"),
    of("portwarden", "session", 1, "the same on a session, one command at a time"),
    of("etcd", "put", 1, "put of 64 bytes, a key for each client"),
    of(
        "bare",
        "call",
        1,
        "a call to one program, two others that write and sync it as well, no more",
    ),
    of("portwarden", "allocate", 16, ""),
    of("etcd", "put", 16, ""),
    of("portwarden", "allocate", 64, ""),
    of("etcd", "put", 64, ""),
    of("bare", "call", 64, ""),
    of("portwarden", "allocate", 256, ""),
    of("etcd", "put", 256, ""),
    of("etcd", "put", 2048, ""),
    of("bare", "call", 256, ""),
    of("portwarden", "hot", 64, "unary allocate, then release, one worker"),
    of(
        "portwarden",
        "hot-session",
        64,
        "the same worker, on two sessions that 64 clients share, 1 command each",
    ),
    of("portwarden", "hot-session", 2048, "the same with 32 each, pipelined"),
    of("bare", "session", 64, "64 commands to the three programs, in two messages at a time"),
    of("etcd", "hot", 64, "next free port of one worker: read, then compare and swap"),
    of(
        "etcd",
        "any",
        64,
        "any free port of one worker: lists the keys of those that are held, then makes one that is missing",
    ),
    of(
        "postgres",
        "hot",
        64,
        "next free port of one worker: FOR UPDATE SKIP LOCKED; one server, no replica",
    ),
    of("postgres", "spread", 64, "the same over 20 workers"),
    of("portwarden", "session", 256, "commands on sessions, 256 under way: 4 clients with 64 each"),
    of("portwarden", "session", 2048, "8 clients with 256 each"),
    of(
        "portwarden",
        "select",
        2048,
        "the same, each placed by the cluster among a hundred of the workers, by label",
    ),
    of("bare", "session", 2048, "the same to the three programs, in messages of 256"),
    of(
        "bare",
        "table",
        2048,
        "the same, and each of the three applies them to a table of portwarden's",
    ),
    of(
        "portwarden",
        "gang8",
        64,
        "gangs of 8 claims of 8 ports each, on sessions: 8 clients with 8 each",
    ),
    of(
        "portwarden",
        "gang64",
        64,
        "gangs of 64 claims of 8 ports each, on sessions: 8 clients with 8 each",
    ),
    of("portwarden", "get", 256, "linearizable read of an allocation"),
    of("portwarden", "get-session", 256, "the same on four sessions that 256 clients share"),
    of("etcd", "get", 256, "linearizable range of one key"),
    of("portwarden", "get-stale", 256, "read of a node's own copy"),
    of("etcd", "get-stale", 256, "serializable range of one key"),
];

const fn of(
    system: &'static str,
    name: &'static str,
    clients: u32,
    what: &'static str,
) -> Workload {
    Workload { system, name, clients, what }
}

/// As the binary's: `bare` is to run on what a node does.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = match args.serve_bare.is_wanted() {
        true => portwarden::cli::runtime(),
        false => tokio::runtime::Builder::new_multi_thread().enable_all().build(),
    };
    match runtime.map_err(anyhow::Error::from).and_then(|r| r.block_on(run(args))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> anyhow::Result<()> {
    if args.serve_bare.is_wanted() {
        return args.serve_bare.run().await;
    }
    ensure!(
        args.wants_anything(),
        "no workload (etcd/put@64), or part, has the word of --only in it"
    );
    let within = std::path::absolute(args.dir.as_deref().unwrap_or("/var/tmp".as_ref()))?;
    let dir = tempfile::Builder::new().prefix("portwarden-bench-").tempdir_in(within)?;
    let (result, failed) = tokio::select! {
        biased;
        signal = asked_to_end() => (signal.and_then(|by| anyhow::bail!("ended by {by}")), false),
        result = measure(&args, dir.path()) => {
            let failed = result.is_err();
            (result, failed)
        }
    };
    // The servers have ended: they went with the future.
    if failed || args.dir.is_some() {
        eprintln!("data and logs are kept in {}", dir.keep().display());
    } else {
        dir.close()?;
    }
    result
}

/// Returns the name of the signal.
async fn asked_to_end() -> anyhow::Result<&'static str> {
    let ignored = procfs::process::Process::myself()?.status()?.sigign;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    // Unless it runs under nohup.
    let mut hangup = match ignored & 1 {
        0 => Some(signal(SignalKind::hangup())?),
        _ => None,
    };
    Ok(tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        Some(_) = async { hangup.as_mut()?.recv().await } => "SIGHUP",
    })
}

async fn measure(args: &Args, dir: &Path) -> anyhow::Result<()> {
    let (rounds, seconds) = if args.quick { (3, 3) } else { (5, 10) };
    if args.growth {
        return grow(args, dir).await;
    }
    let workloads = args.workloads();
    let mut whole = Whole::begin(rounds, seconds);
    for version in versions()? {
        whole.machine += &format!(", {version}");
    }
    let ours = Ours::start(&args.binary, dir).await?;
    let etcd = Etcd::start(dir).await?;
    let postgres = Postgres::start(dir).await?;
    let bare = Three::start(dir).await?;

    let mut measured: Vec<Vec<Report>> = workloads.iter().map(|_| Vec::new()).collect();
    for round in 0..rounds {
        whole.probe(dir)?;
        let mut turns: Vec<_> = workloads.iter().zip(&mut measured).collect();
        if round % 2 == 1 {
            turns.reverse(); // nobody always comes after the same
        }
        for (workload, reports) in turns {
            let Workload { system, name, clients, .. } = workload;
            let (callers, label): (Vec<Box<dyn Caller>>, _) = match *system {
                "portwarden" => ours.callers(name, *clients).await?,
                "etcd" => etcd.callers(name, *clients).await?,
                "bare" => (bare.callers(name, *clients)?, None),
                _ => postgres.callers(name, *clients).await?,
            };
            let over = tokio::time::sleep(Duration::from_secs(seconds));
            let report = load::drive(*name, callers, Duration::from_secs(1), over).await?;
            ours.clean_up(label).await?;
            tokio::time::sleep(REST).await;
            eprintln!(
                "round {}/{rounds} {system:>10} {name:<9} {clients:>4} clients {:>9.0}/s p50 {:.2} ms p99 {:.2} ms{}",
                round + 1,
                report.operations_per_second,
                report.latency["all"].p50_ms,
                report.latency["all"].p99_ms,
                report.example_error.as_ref().map(|e| format!(", error: {e}")).unwrap_or_default(),
            );
            reports.push(report);
        }
    }
    for (workload, reports) in workloads.iter().zip(measured) {
        let Workload { system, name, clients, what } = workload;
        whole.rows.push(Summary::of(system, name, *clients, what, &reports));
    }
    if args.only.is_none() {
        let times = if args.quick { 5 } else { 15 };
        let mut etcd = etcd;
        whole.leader_move = failover::move_leader(&ours, times).await?;
        whole.failover_ms = failover::of_both(&ours, &mut etcd, times, Loss::Killed).await?;
        whole.stopped_ms = failover::of_both(&ours, &mut etcd, 3, Loss::Stopped).await?;
    }
    whole.finish();
    if let Some(plots) = &args.plots {
        whole.plot(plots)?;
    }
    match args.output.as_str() {
        "json" => println!("{}", serde_json::to_string_pretty(&whole)?),
        _ => println!("{}", whole.text()),
    }
    valid(&whole)
}

/// Of what is compared with portwarden; the kernel's is part of `machine`.
fn versions() -> anyhow::Result<[String; 2]> {
    let etcd = processes::output(Command::new("etcd").arg("--version"))?;
    // "etcd Version: 3.4.23", and lines about the build.
    let etcd = etcd.lines().next().unwrap_or_default().replace(" Version:", "");
    Ok([etcd, postgres::version()?])
}

/// Is it a result, every call and every round of it?
fn valid(whole: &Whole) -> anyhow::Result<()> {
    let idle = whole.rows.iter().filter(|row| row.min_per_second == 0.0);
    let idle = idle.map(|row| format!("{}/{}@{}", row.system, row.workload, row.clients));
    let idle = idle.collect::<Vec<_>>().join(", ");
    ensure!(idle.is_empty(), "without any operation in some round: {idle}");
    let failed = whole.rows.iter().map(|row| row.errors).sum::<u64>() + whole.leader_move.failed;
    ensure!(failed == 0, "{failed} calls failed");
    Ok(())
}

/// Each table has ten times the workers and allocations of the one before.
const SIZES: [(u32, u64); 3] = [(1_000, 10_000), (10_000, 100_000), (100_000, 1_000_000)];
const LEASES: usize = 10_000;
const PARTS: [&str; 5] = ["stages", "leases", "watchers", "overload", "table"];

async fn grow(args: &Args, dir: &Path) -> anyhow::Result<()> {
    let ours = Ours::start(&args.binary, dir).await?;
    let sizes = if args.quick { &SIZES[..2] } else { &SIZES[..] };
    let growth = growth::of(&ours, LEASES, sizes, |part| args.wants(part)).await?;
    println!("{}", serde_json::to_string_pretty(&growth)?);
    Ok(())
}
