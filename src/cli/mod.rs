//! The command line: one file a subcommand.
//!
//! Results go to stdout, as a table or as JSON; logs and errors to stderr. Every command ends with
//! an exit code that says what a script can do about it:
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | another failure |
//! | 2 | usage: a flag or a value is wrong |
//! | 3 | not found |
//! | 4 | conflict or failed precondition |
//! | 5 | nothing fits |
//! | 6 | unavailable or timed out; says "outcome unknown" where it is |

mod agent;
mod allocate;
mod attach;
pub mod bench;
mod completion;
mod confirm;
pub mod demo;
pub mod dev;
#[doc(hidden)]
pub mod edge;
mod embedded;
mod error;
mod explain;
mod get;
mod lease;
mod lifecycle;
mod list;
mod member;
mod output;
mod parse;
mod recover;
mod release;
mod replica;
mod report_conflict;
mod run;
pub mod serve;
mod snapshot;
mod status;
#[cfg(test)]
mod tests;
mod watch;
mod worker;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::client::{Client, ClientError, Options};
pub use error::{CliError, client_exit_code, report};

/// A replicated allocator of ports and GPUs: no port of a worker and no byte of GPU memory is ever
/// given twice.
#[derive(Debug, Parser)]
#[command(name = "portwarden", version, max_term_width = 100, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(flatten)]
    pub globals: Globals,
    #[command(subcommand)]
    pub command: Command,
}

const AFTER_HELP: &str = "\
Exit codes: 0 done, 1 other failure, 2 usage, 3 not found, 4 conflict or failed precondition,
5 nothing fits, 6 unavailable or timed out (says \"outcome unknown\" where it is).

Examples:
  portwarden worker register w1 --address 10.0.0.1 --range service=40000-40063
  portwarden allocate qwen-0 --worker w1 --ports 2
  portwarden confirm qwen-0 --token 7
  portwarden release qwen-0 --token 7";

/// Accepted before and after the subcommand.
#[derive(Debug, Clone, Args)]
pub struct Globals {
    /// Nodes to speak to; any one of them will do
    #[arg(
        long,
        global = true,
        env = "PORTWARDEN_ENDPOINTS",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        default_value = "127.0.0.1:7601",
        help_heading = "Global options"
    )]
    pub endpoints: Vec<String>,
    /// Form of the results on stdout
    #[arg(
        short,
        long,
        global = true,
        value_enum,
        default_value_t = Format::Table,
        help_heading = "Global options"
    )]
    pub output: Format,
    /// Time for one call, over all endpoints and attempts (1ms to 24h)
    #[arg(
        long,
        global = true,
        value_name = "DURATION",
        value_parser = parse::timeout,
        default_value = "10s",
        help_heading = "Global options"
    )]
    pub timeout: Duration,
}

impl Globals {
    pub fn client(&self) -> Result<Client, ClientError> {
        let options = Options { timeout: self.timeout, ..Options::default() };
        let named = self.endpoints.iter().map(|endpoint| endpoint.trim());
        let named = named.filter(|endpoint| !endpoint.is_empty()).map(String::from).collect();
        Client::connect(named, options)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Reserve ports and GPUs for an instance, or for a gang of them
    Allocate(allocate::Args),
    /// Say that an instance listens: RESERVED becomes BOUND
    Confirm(confirm::Args),
    /// Move an allocation to another lease
    Attach(attach::Args),
    /// Give back what an instance holds
    Release(release::Args),
    /// Say that something else uses a port: it is quarantined and swapped
    ReportConflict(report_conflict::Args),
    /// Show one allocation
    Get(get::Args),
    /// List allocations
    List(list::Args),
    /// Show each change of the table as it comes
    Watch(watch::Args),
    /// Say where a claim fits and why, or what is missing
    Explain(explain::Args),
    /// Manage leases: times to live that their holders keep alive
    Lease(lease::Args),
    /// Run a program that holds its ports for as long as it runs
    Run(Box<run::Args>),
    /// Watch a worker's host: what runs on each worker
    Agent(agent::Args),
    /// Manage workers: the machines that instances run on
    Worker(worker::Args),
    /// Show and change the nodes of the cluster
    Member(member::Args),
    /// Show how the cluster is
    Status(status::Args),
    /// Save, inspect and restore the whole table
    Snapshot(snapshot::Args),
    /// Begin a new cluster from one survivor, when the majority is lost for good
    Recover(recover::Args),
    /// Run one node
    Serve(Box<serve::Args>),
    /// Run an embedded cluster that stays up
    Dev(dev::Args),
    /// Show many schedulers allocating at once on an embedded cluster
    Demo(demo::Args),
    /// Measure the throughput and latency of a cluster
    Bench(bench::Args),
    /// Listen, for `demo --lifecycle`
    #[command(hide = true)]
    Replica(replica::Args),
    /// Print the completion script of a shell
    Completion(completion::Args),
}

/// Reads the arguments of the process; ends it with code 2 where they are wrong.
pub fn parse() -> Cli {
    Cli::parse()
}

/// Logs to stderr from this level or filter on. Commands that only call a cluster log nothing.
fn log_to_stderr(filter: &str) -> anyhow::Result<()> {
    const LEVELS: [&str; 12] =
        ["off", "error", "warn", "info", "debug", "trace", "0", "1", "2", "3", "4", "5"];
    let bad = |why: &str| {
        usage(format!(
            "--log-level: {filter:?} must be error, warn, info, debug or trace, or a filter such as \
             info,portwarden::raft=debug: {why}"
        ))
    };
    // A word that is no level would be taken for a target, and silence all others.
    let is_level = |word: &&str| LEVELS.contains(&word.to_ascii_lowercase().as_str());
    let is_filter = |word: &&str| word.contains('=') || word.contains("::");
    let words: Vec<_> = filter.split(',').map(str::trim).filter(|word| !word.is_empty()).collect();
    // Of spans' fields, which have commas of their own, nothing is known here.
    let mut unknown = words.iter().filter(|word| !is_level(word) && !is_filter(word));
    if let (Some(word), false) = (unknown.next(), filter.contains('[')) {
        return Err(bad(&format!("{word:?} is no level")));
    }
    if words.is_empty() {
        return Err(bad("it is empty"));
    }
    let filter: EnvFilter = words.join(",").parse().map_err(|e| bad(&format!("{e}")))?;
    // Fails only where a subscriber is set already, and that one is as good.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would report a log that cannot be written on the same stderr, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .try_init();
    Ok(())
}

/// Resolves at SIGTERM or SIGINT; from this call on neither ends the process by itself.
fn stopped() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Wrong input that clap could not see; exit code 2.
fn usage(text: impl Into<String>) -> anyhow::Error {
    CliError::Usage(text.into()).into()
}

/// One core is left to the thread that writes the log, which each answer waits for, and to the kernel's
/// part of the network: docs/performance.md. tokio's own variable says otherwise.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if std::env::var_os("TOKIO_WORKER_THREADS").is_none() {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        runtime.worker_threads((cores - 1).max(1));
    }
    runtime.enable_all().build()
}

/// Runs a subcommand to its exit code, errors reported on stderr.
pub async fn run(cli: Cli) -> ExitCode {
    let Cli { globals, command } = cli;
    let result = match command {
        Command::Allocate(args) => allocate::run(args, globals).await,
        Command::Confirm(args) => confirm::run(args, globals).await,
        Command::Attach(args) => attach::run(args, globals).await,
        Command::Watch(args) => watch::run(args, globals).await,
        Command::Explain(args) => explain::run(args, globals).await,
        Command::Run(args) => run::run(*args, globals).await,
        Command::Agent(args) => agent::run(args, globals).await,
        Command::Lease(args) => lease::run(args, globals).await,
        Command::Release(args) => release::run(args, globals).await,
        Command::ReportConflict(args) => report_conflict::run(args, globals).await,
        Command::Get(args) => get::run(args, globals).await,
        Command::List(args) => list::run(args, globals).await,
        Command::Worker(args) => worker::run(args, globals).await,
        Command::Member(args) => member::run(args, globals).await,
        Command::Status(args) => status::run(args, globals).await,
        Command::Snapshot(args) => snapshot::run(args, globals).await,
        Command::Recover(args) => recover::run(args, globals).await,
        Command::Serve(args) => serve::run(*args, globals).await,
        Command::Dev(args) => dev::run(args, globals).await,
        Command::Demo(args) => demo::run(args, globals).await,
        Command::Bench(args) => bench::run(args, globals).await,
        Command::Replica(args) => replica::run(args).await,
        Command::Completion(args) => completion::run(args),
    };
    result.unwrap_or_else(|error| report(&error))
}
