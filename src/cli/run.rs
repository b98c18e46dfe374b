//! `portwarden run`: a program that holds its ports for exactly as long as it runs.

use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;

use super::allocate::ClaimFlags;
use super::{CliError, Globals, log_to_stderr, parse, usage};
use crate::agent::host::Linux;
use crate::agent::host::gpus::NoGpus;
use crate::agent::run::{self, Job, OnLeaseLost, Ready, RunError};
use crate::core::{InstanceName, limits};

/// What a confirmation may take beyond the start.
const CONFIRM_MARGIN: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
#[command(
    mut_group("what", |group| group.required(true)),
    mut_group("where", |group| group.required(true)),
    after_help = "Examples:
  portwarden run qwen-0 --worker w1 --ports 1 -- vllm serve Qwen/Qwen2.5-0.5B --port {port}
  portwarden run api --worker w1 --port http=any --port metrics=any -- ./api --listen :{port:http}
  portwarden run job --worker w1 --ports 1 --gpus 1 --gpu-memory 8GiB --start-timeout 5m -- ./serve.sh

It allocates on a fresh lease, makes sure by binding that the ports are free, starts the program, waits
until that listens, confirms, keeps the lease, passes signals on, and gives everything back when the
program has ended. Where a port turns out to be in use, it is reported and the next one is tried.

The program finds its ports in PORT (the first), PORTS (all) and PORT_<NAME>, its GPUs in
CUDA_VISIBLE_DEVICES, and the allocation in PORTWARDEN_NAME, _TOKEN, _WORKER and _ADDRESS. In its
arguments {port}, {ports} and {port:NAME} are replaced.

When the lease cannot be kept alive: on a worker with an agent the program goes on, and what it holds is
confirmed anew as soon as the cluster is back; on one without it is stopped before the lease ends, as
its ports are given to others then. So is one there that cannot be confirmed within --confirm-within.

The exit code is the program's (128 + n where signal n ended it); 126 or 127 where it cannot be started;
else as everywhere: 4 what it held is gone or the worker is elsewhere, 5 no port is left, 6 it did not
listen in time or the lease was lost."
)]
pub struct Args {
    /// Name of the instance, unique in the cluster
    #[arg(value_parser = parse::name::<InstanceName>)]
    name: String,
    #[command(flatten)]
    claim: ClaimFlags,
    /// Other ports to try where one is in use
    #[arg(
        long,
        value_name = "N",
        default_value_t = 10,
        value_parser = clap::value_parser!(u32).range(0..=i64::from(limits::SWAPS_MAX))
    )]
    retries: u32,
    /// For how long it is held without a word from here (1s to 24h)
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = parse::span_of_time)]
    lease_ttl: Duration,
    /// What to do with the program when the lease is lost [default: keep where the worker has an agent, else stop]
    #[arg(long, value_enum)]
    on_lease_lost: Option<LeaseLost>,
    /// How long the program may take until it listens (1s to 24h)
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = parse::span_of_time)]
    start_timeout: Duration,
    /// On which of its ports the program must listen before it is confirmed; none: confirm it as soon as it
    /// is started
    #[arg(long, value_enum, default_value_t = Listens::All)]
    listens: Listens,
    /// How long the program may take to end where it is stopped from here (1s to 24h)
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse::span_of_time)]
    stop_timeout: Duration,
    /// error, warn, info, debug or trace, or a filter
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: String,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LeaseLost {
    Keep,
    Stop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Listens {
    All,
    Any,
    None,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let confirm_within = args.claim.confirm_within;
    let mut claim = args.claim.claim(args.name)?;
    run::check_command(&args.command, &claim.ports).map_err(usage)?;
    if let Some(within) = confirm_within
        && within < args.start_timeout
    {
        let text = format!(
            "--confirm-within {} is less than --start-timeout {}: what is not confirmed in time is given to others",
            humantime::format_duration(within),
            humantime::format_duration(args.start_timeout),
        );
        return Err(CliError::Usage(text).into());
    }
    if claim.confirm_within_ms == 0 {
        let within = parse::ms(args.start_timeout + CONFIRM_MARGIN);
        claim.confirm_within_ms = within.min(limits::SPAN_MAX_MS);
    }
    log_to_stderr(&args.log_level)?;
    let job = Job {
        claim,
        command: args.command,
        retries: args.retries,
        lease_ttl: args.lease_ttl,
        on_lease_lost: args.on_lease_lost.map(|on| match on {
            LeaseLost::Keep => OnLeaseLost::Keep,
            LeaseLost::Stop => OnLeaseLost::Stop,
        }),
        start_timeout: args.start_timeout,
        ready: match args.listens {
            Listens::All => Ready::All,
            Listens::Any => Ready::Any,
            Listens::None => Ready::Started,
        },
        stop_grace: args.stop_timeout,
    };
    let host = Arc::new(Linux::new(Box::new(NoGpus)));
    let code = run::run(globals.client()?, host, job).await.map_err(reported)?;
    Ok(ExitCode::from(code))
}

fn reported(error: RunError) -> anyhow::Error {
    let text = error.to_string();
    match error {
        RunError::Call(error) => error.into(),
        RunError::NoPortLeft(_) => CliError::NothingFits(text).into(),
        RunError::Elsewhere(_) | RunError::Gone(_) => CliError::Conflict(text).into(),
        RunError::NotListening { .. } | RunError::LeaseEnds => CliError::TimedOut(text).into(),
        RunError::NotStarted { error, .. } => {
            // As a shell says it.
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            CliError::Program { text, code: if missing { 127 } else { 126 } }.into()
        }
        RunError::Stopped(signal) => {
            let code = u8::try_from(128 + signal.as_raw()).unwrap_or(1);
            CliError::Program { text, code }.into()
        }
        RunError::Ended(code) => CliError::Program { text, code }.into(),
        RunError::Host(_) => anyhow::anyhow!(text),
    }
}
