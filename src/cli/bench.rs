//! `portwarden bench`: throughput and latency of allocate and release against a running cluster.
//!
//! Registers workers of its own (`bench-…`), lets so many clients allocate one port and release it
//! again, each waiting for its answer, and removes everything afterwards. Latency is that of a call
//! as the client library gives it, retries included.

use std::process::ExitCode;
use std::time::Duration;

use clap::ArgGroup;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::{Globals, output};
use crate::client::{Client, ClientError};
use crate::proto::v1;

#[derive(Debug, Clone, clap::Args)]
#[command(
    group(ArgGroup::new("mode").args(["hot", "spread"])),
    after_help = "Examples:
  portwarden bench
  portwarden bench --clients 256 --seconds 30 --hot -o json

Ctrl-C ends it early; what it made is removed either way."
)]
pub struct Args {
    /// Callers at the same time, each with one call in flight
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub clients: u32,
    /// How long to measure
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// All on one worker
    #[arg(long)]
    pub hot: bool,
    /// Spread over the workers (default)
    #[arg(long)]
    pub spread: bool,
    /// Workers to spread over
    #[arg(long, default_value_t = 16, conflicts_with = "hot", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub workers: u32,
}

const RANGE_FIRST: u32 = 10_000;
const RANGE_LAST: u32 = 29_999;
/// Longest call that is told apart from longer ones.
const LONGEST: Duration = Duration::from_secs(120);

#[derive(Debug, Serialize)]
pub struct Report {
    pub mode: &'static str,
    pub clients: u32,
    pub workers: u32,
    pub seconds: f64,
    /// Pairs of allocate and release.
    pub pairs: u64,
    pub errors: u64,
    /// One of the errors, as an example.
    pub example_error: Option<String>,
    /// Calls a second, both kinds together.
    pub calls_per_second: f64,
    pub allocate: Latency,
    pub release: Latency,
}

#[derive(Debug, Serialize)]
pub struct Latency {
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

/// What one caller measured.
struct Measured {
    allocate: Histogram<u64>,
    release: Histogram<u64>,
    errors: u64,
    example_error: Option<String>,
}

impl Measured {
    fn new() -> anyhow::Result<Self> {
        let histogram = || Histogram::new_with_bounds(1, LONGEST.as_micros() as u64, 3);
        Ok(Measured {
            allocate: histogram()?,
            release: histogram()?,
            errors: 0,
            example_error: None,
        })
    }

    fn failed(&mut self, error: ClientError) {
        self.errors += 1;
        self.example_error.get_or_insert_with(|| error.to_string());
    }

    fn add(&mut self, other: Measured) -> anyhow::Result<()> {
        self.allocate.add(other.allocate)?;
        self.release.add(other.release)?;
        self.errors += other.errors;
        self.example_error = self.example_error.take().or(other.example_error);
        Ok(())
    }
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let client = globals.client()?;
    let run: String = client.fresh_uid().chars().take(8).collect();
    let prefix = format!("bench-{run}-");
    let count = if args.hot { 1 } else { args.workers };
    let workers: Vec<String> = (0..count).map(|i| format!("{prefix}w{i}")).collect();

    let report = match register(&client, &workers).await {
        Ok(()) => measure(&args, &client, &prefix, &workers).await,
        Err(error) => Err(error.into()),
    };
    let cleaned = clean_up(&client, &prefix, &workers).await;
    let report = report?;
    output::print(globals.output, &report, || text(&report))?;
    cleaned?;
    Ok(if report.pairs > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn register(client: &Client, workers: &[String]) -> Result<(), ClientError> {
    for name in workers {
        let range = v1::PortRange { name: "bench".into(), first: RANGE_FIRST, last: RANGE_LAST };
        let spec = v1::WorkerSpec {
            address: "127.0.0.1".into(),
            ranges: vec![range],
            ..Default::default()
        };
        client.worker_register(name, spec).await?;
    }
    Ok(())
}

async fn measure(
    args: &Args,
    client: &Client,
    prefix: &str,
    workers: &[String],
) -> anyhow::Result<Report> {
    let (stop, stopped) = watch::channel(false);
    let started = Instant::now();
    let mut callers = JoinSet::new();
    for i in 0..args.clients {
        let name = format!("{prefix}{i}");
        let worker = workers[i as usize % workers.len()].clone();
        let caller = call_until(client.clone(), name, worker, stopped.clone());
        callers.spawn(caller);
    }
    wait(args.seconds).await;
    stop.send_replace(true);
    let mut all = Measured::new()?;
    while let Some(measured) = callers.join_next().await {
        all.add(measured??)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let calls = all.allocate.len() + all.release.len();
    Ok(Report {
        mode: if args.hot { "hot" } else { "spread" },
        clients: args.clients,
        workers: workers.len() as u32,
        seconds,
        pairs: all.release.len(),
        errors: all.errors,
        example_error: all.example_error,
        calls_per_second: calls as f64 / seconds,
        allocate: latency(&all.allocate),
        release: latency(&all.release),
    })
}

/// Until the time is over or Ctrl-C, with a bar on stderr where that is a terminal.
async fn wait(seconds: u64) {
    let bar = ProgressBar::new(seconds);
    if let Ok(style) = ProgressStyle::with_template("measuring {bar:40} {pos}/{len} s") {
        bar.set_style(style);
    }
    for _ in 0..seconds {
        tokio::select! {
            () = sleep(Duration::from_secs(1)) => bar.inc(1),
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    bar.finish_and_clear();
}

async fn call_until(
    client: Client,
    name: String,
    worker: String,
    stopped: watch::Receiver<bool>,
) -> anyhow::Result<Measured> {
    let mut measured = Measured::new()?;
    while !*stopped.borrow() {
        let began = Instant::now();
        let granted = match client.allocate(vec![claim(&name, &worker)]).await {
            Ok(granted) => granted,
            Err(error) => {
                measured.failed(error);
                continue;
            }
        };
        measured.allocate.saturating_record(began.elapsed().as_micros() as u64);
        let token = granted.allocations.first().map_or(0, |allocation| allocation.token);
        let began = Instant::now();
        match client.release(&name, token).await {
            Ok(_) => measured.release.saturating_record(began.elapsed().as_micros() as u64),
            Err(error) => measured.failed(error),
        }
    }
    Ok(measured)
}

/// The uid never changes, so that a call after one of unknown outcome settles it.
fn claim(name: &str, worker: &str) -> v1::Claim {
    let ports =
        v1::PortRequest { ports: Some(v1::port_request::Ports::Count(1)), ..Default::default() };
    v1::Claim {
        name: name.into(),
        uid: name.into(),
        placement: Some(v1::claim::Placement::Worker(worker.into())),
        ports: vec![ports],
        bound: true,
        ..Default::default()
    }
}

/// Releases what calls of unknown outcome may have left, and removes the workers.
async fn clean_up(client: &Client, prefix: &str, workers: &[String]) -> Result<(), ClientError> {
    let request = v1::ListRequest { name_prefix: prefix.into(), ..Default::default() };
    for left in client.list(request).await?.items {
        client.release(&left.name, left.token).await?;
    }
    for worker in workers {
        client.worker_remove(worker).await?;
    }
    Ok(())
}

fn latency(histogram: &Histogram<u64>) -> Latency {
    let ms = |micros: u64| micros as f64 / 1000.0;
    Latency {
        p50_ms: ms(histogram.value_at_quantile(0.50)),
        p99_ms: ms(histogram.value_at_quantile(0.99)),
        max_ms: ms(histogram.max()),
    }
}

fn text(report: &Report) -> String {
    let row = |call: &str, latency: &Latency| {
        let ms = |value: f64| format!("{value:.2}");
        vec![call.into(), ms(latency.p50_ms), ms(latency.p99_ms), ms(latency.max_ms)]
    };
    let rows = [row("allocate", &report.allocate), row("release", &report.release)];
    let Report { mode, clients, workers, seconds, pairs, errors, calls_per_second, .. } = report;
    let mut text = format!(
        "{mode}: {clients} clients, {workers} workers, {seconds:.1} s\n{pairs} pairs, {calls_per_second:.0} calls/s, {errors} errors\n\n{}",
        output::table(&["CALL", "P50 MS", "P99 MS", "MAX MS"], rows)
    );
    if let Some(example) = &report.example_error {
        text.push_str(&format!("\n\none of the errors: {example}"));
    }
    text
}
