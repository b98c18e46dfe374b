//! `portwarden bench`: throughput and latency of a running cluster.
//!
//! Registers workers of its own (`bench-…`), lets so many clients call, each waiting for its answer, and
//! removes everything afterwards. Latency is that of a call as the client library gives it, retries
//! included.

pub mod callers;
pub mod load;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::sleep;

use super::{Globals, output};
use crate::client::{Client, ClientError, Options};
use crate::proto::v1;
use callers::{Batches, Pairs, Reads, SessionReads, Turns};
use load::{Caller, Report};

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  portwarden bench
  portwarden bench --clients 256 --seconds 30 --hot -o json
  portwarden bench --workload session --clients 8 --batch 256
  portwarden bench --by-label --workers 1000
  portwarden bench --workload get --clients 256

Ctrl-C ends it early; what it made is removed either way.")]
pub struct Args {
    /// What the clients do
    #[arg(long, value_enum, default_value_t = Workload::Allocate)]
    pub workload: Workload,
    /// Callers at the same time, each with one call, or one batch, under way
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub clients: u32,
    /// How long to measure
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// All on one worker
    #[arg(long, conflicts_with = "spread")]
    pub hot: bool,
    /// Spread over the workers (default)
    #[arg(long)]
    pub spread: bool,
    /// Workers to spread over
    #[arg(long, default_value_t = 16, conflicts_with = "hot", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub workers: u32,
    /// Let the cluster choose the workers, each claim among a tenth of them, by a label
    #[arg(long, conflicts_with = "hot")]
    pub by_label: bool,
    /// Claims in each request; more than one is a gang
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub gang: u32,
    /// Ports in each claim
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub ports: u32,
    /// With --workload session: commands that each client has under way
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch: u32,
    /// Connections that the clients share
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub connections: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Allocate and release, one unary call each
    Allocate,
    /// Allocate and release in batches on sessions
    Session,
    /// Linearizable reads
    Get,
    /// Linearizable reads, on sessions
    GetSession,
    /// Reads of a node's own copy
    GetStale,
}

impl Workload {
    pub fn name(self) -> &'static str {
        match self {
            Workload::Allocate => "allocate",
            Workload::Session => "session",
            Workload::Get => "get",
            Workload::GetSession => "get-session",
            Workload::GetStale => "get-stale",
        }
    }
}

const RANGE_FIRST: u32 = 10_000;
/// Of the one worker that is hot, and of each of many.
const RANGE_LAST_HOT: u32 = 29_999;
const RANGE_LAST: u32 = 10_999;
const WARM_UP: Duration = Duration::from_secs(1);
/// Of workers that are chosen by label, and how many values it has.
const LABEL: &str = "bench";
const LABELS: usize = 10;
/// Workers that are registered, or removed, at a time.
const AT_ONCE: usize = 64;
/// Instances that the reads are spread over.
const READ_INSTANCES: u32 = 64;

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let client = globals.client()?;
    let run: String = client.fresh_uid().chars().take(8).collect();
    let bench = Bench {
        prefix: format!("bench-{run}-"),
        endpoints: leader_first(&client, &globals.endpoints).await?,
        timeout: globals.timeout,
        on: Vec::new(),
    };
    let stopped = super::stopped()?.shared();
    let make = async {
        bench.register(&args).await?;
        bench.callers(&args).await
    };
    let report = async {
        let callers = tokio::select! {
            callers = make => callers?,
            () = stopped.clone() => anyhow::bail!("stopped before anything was measured"),
        };
        let over = wait(args.seconds, stopped.clone());
        load::drive(args.workload.name(), callers, WARM_UP, over).await
    };
    let report = report.await;
    let again = super::stopped()?;
    let cleaned = tokio::select! {
        cleaned = bench.clean_up(&args) => cleaned,
        () = again => Err(anyhow::anyhow!("stopped; workers named {}… are left", bench.prefix)),
    };
    let report = report?;
    output::print(globals.output, &report, || text(&report))?;
    cleaned?;
    Ok(if report.operations > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The leader's endpoint before the others, if it is known: a call needs no hop there.
pub async fn leader_first(
    client: &Client,
    endpoints: &[String],
) -> Result<Vec<String>, ClientError> {
    let status = client.status().await?;
    let leader = status.members.into_iter().find(|member| member.id == status.leader);
    let mut all: Vec<String> = leader.map(|member| member.endpoint).into_iter().collect();
    all.extend(
        endpoints
            .iter()
            .filter(|endpoint| all.first() != Some(endpoint))
            .cloned()
            .collect::<Vec<_>>(),
    );
    Ok(all)
}

/// One run against a cluster: what it makes there is named after it.
pub struct Bench {
    pub prefix: String,
    /// The leader first.
    pub endpoints: Vec<String>,
    pub timeout: Duration,
    /// Workers that there are already; empty: it makes its own.
    pub on: Vec<String>,
}

impl Bench {
    fn client(&self) -> Result<Client, ClientError> {
        let options = Options { timeout: self.timeout, ..Options::default() };
        Client::connect(self.endpoints.clone(), options)
    }

    /// Those that it makes.
    fn workers(&self, args: &Args) -> impl Iterator<Item = String> {
        let count = match self.on.is_empty() {
            true if args.hot => 1,
            true => args.workers,
            false => 0,
        };
        (0..count).map(|i| format!("{}w{i}", self.prefix))
    }

    pub async fn register(&self, args: &Args) -> anyhow::Result<()> {
        let client = self.client()?;
        let last = if args.hot { RANGE_LAST_HOT } else { RANGE_LAST };
        let spec = spec(RANGE_FIRST, last);
        if !args.by_label {
            return register(&client, self.workers(args), &spec).await;
        }
        for label in 0..LABELS {
            let labels = [(LABEL.into(), format!("{}{label}", self.prefix))].into();
            let labelled = v1::WorkerSpec { labels, ..spec.clone() };
            let workers = self.workers(args).skip(label).step_by(LABELS);
            register(&client, workers, &labelled).await?;
        }
        Ok(())
    }

    /// Of the worker with this number, or of those with its label.
    fn placement(&self, args: &Args, worker: &str, number: u32) -> v1::claim::Placement {
        if !args.by_label {
            return v1::claim::Placement::Worker(worker.into());
        }
        let selector = format!("{LABEL}={}{}", self.prefix, number as usize % LABELS);
        v1::claim::Placement::Select(v1::Selection { selector, ..Default::default() })
    }

    pub async fn callers(&self, args: &Args) -> anyhow::Result<Vec<Box<dyn Caller>>> {
        let workers: Vec<String> = match self.on.is_empty() {
            true => self.workers(args).collect(),
            false => self.on.clone(),
        };
        let in_turns: Arc<[String]> =
            if args.by_label { [].into() } else { workers.clone().into() };
        let clients: Vec<Client> =
            (0..args.connections).map(|_| self.client()).collect::<Result<_, _>>()?;
        let sessions: Vec<_> = clients.iter().map(Client::session).collect();
        let at = |i: u32| i as usize % clients.len();
        let worker = |i: u32| workers[i as usize % workers.len()].as_str();
        let gang = |name: &str, i: u32| -> Vec<v1::Claim> {
            let claim = |j| v1::Claim {
                placement: Some(self.placement(args, worker(i + j), i + j)),
                ..claim(&format!("{name}-{j}"), "", args.ports)
            };
            (0..args.gang).map(claim).collect()
        };
        let read = |i: u32| format!("{}r{}", self.prefix, i % READ_INSTANCES);
        if !matches!(args.workload, Workload::Allocate | Workload::Session) {
            for i in 0..READ_INSTANCES {
                clients[0].allocate(vec![claim(&read(i), worker(i), args.ports)]).await?;
            }
        }
        let caller = |i: u32| -> Box<dyn Caller> {
            let name = format!("{}{i}", self.prefix);
            match args.workload {
                Workload::Allocate => Box::new(Pairs {
                    client: clients[at(i)].clone(),
                    claims: gang(&name, i * args.gang),
                    turns: Turns::new(in_turns.clone(), (i * args.gang) as usize),
                    held: Vec::new(),
                }),
                Workload::Session => Box::new(Batches {
                    session: sessions[at(i)].clone(),
                    gangs: (0..args.batch)
                        .map(|j| gang(&format!("{name}-{j}"), (i * args.batch + j) * args.gang))
                        .collect(),
                    turns: Turns::new(in_turns.clone(), (i * args.batch * args.gang) as usize),
                    held: Vec::new(),
                }),
                Workload::Get | Workload::GetStale => Box::new(Reads {
                    client: clients[at(i)].clone(),
                    name: read(i),
                    stale: args.workload == Workload::GetStale,
                }),
                Workload::GetSession => {
                    Box::new(SessionReads { session: sessions[at(i)].clone(), name: read(i) })
                }
            }
        };
        Ok((0..args.clients).map(caller).collect())
    }

    /// Releases what is left, and removes the workers.
    pub async fn clean_up(&self, args: &Args) -> anyhow::Result<()> {
        let client = self.client()?;
        let request = v1::ListRequest { name_prefix: self.prefix.clone(), ..Default::default() };
        let left = client.list(request).await?.items;
        let release =
            |held: &v1::Allocation| crate::client::session::release(&held.name, held.token);
        for released in client.session().all(left.iter().map(release).collect()).await {
            released?;
        }
        let remove = |name: String| {
            let client = client.clone();
            async move { client.worker_remove(&name).await.map(drop) }
        };
        let all = stream::iter(self.workers(args)).map(remove);
        Ok(all.buffer_unordered(AT_ONCE).try_collect().await?)
    }
}

/// Until the time is over or it is stopped, with a bar on stderr where that is a terminal.
async fn wait(seconds: u64, stopped: impl Future<Output = ()>) {
    let mut stopped = std::pin::pin!(stopped);
    let bar = ProgressBar::new(seconds);
    if let Ok(style) = ProgressStyle::with_template("measuring {bar:40} {pos}/{len} s") {
        bar.set_style(style);
    }
    for _ in 0..seconds {
        tokio::select! {
            () = sleep(Duration::from_secs(1)) => bar.inc(1),
            () = &mut stopped => break,
        }
    }
    bar.finish_and_clear();
}

/// A worker with one range.
pub fn spec(first: u32, last: u32) -> v1::WorkerSpec {
    let range = v1::PortRange { name: "bench".into(), first, last };
    v1::WorkerSpec { address: "127.0.0.1".into(), ranges: vec![range], ..Default::default() }
}

/// Registers workers, some of them at a time.
pub async fn register(
    client: &Client,
    names: impl Iterator<Item = String>,
    spec: &v1::WorkerSpec,
) -> anyhow::Result<()> {
    let register = async |name: String| client.worker_register(&name, spec.clone()).await.map(drop);
    Ok(stream::iter(names).map(register).buffer_unordered(AT_ONCE).try_collect().await?)
}

/// The uid never changes, so that a call after one of unknown outcome settles it.
pub fn claim(name: &str, worker: &str, count: u32) -> v1::Claim {
    let ports = v1::port_request::Ports::Count(count);
    v1::Claim {
        name: name.into(),
        uid: name.into(),
        placement: Some(v1::claim::Placement::Worker(worker.into())),
        ports: vec![v1::PortRequest { ports: Some(ports), ..Default::default() }],
        bound: true,
        ..Default::default()
    }
}

fn text(report: &Report) -> String {
    let ms = |value: f64| format!("{value:.2}");
    let rows = report.latency.iter().map(|(kind, of)| {
        let [p50, p90, p99, max] = [of.p50_ms, of.p90_ms, of.p99_ms, of.max_ms].map(ms);
        vec![kind.clone(), of.calls.to_string(), p50, p90, p99, max]
    });
    let Report {
        workload,
        clients,
        seconds,
        operations,
        operations_per_second,
        ports_per_second,
        errors,
        ..
    } = report;
    let mut text = format!(
        "{workload}: {clients} clients, {seconds:.1} s\n{operations} operations, {operations_per_second:.0}/s, {ports_per_second:.0} ports/s granted, {errors} errors\n\n{}",
        output::table(&["CALL", "CALLS", "P50 MS", "P90 MS", "P99 MS", "MAX MS"], rows)
    );
    if let Some(example) = &report.example_error {
        text.push_str(&format!("\n\none of the errors: {example}"));
    }
    text
}
