//! `demo`: the bug that portwarden was made for, and what becomes of it here.
//!
//! Ten replicas of one model are placed on one worker at once, by four schedulers, each through a
//! node of its own first, on a three-node cluster in this process (real gRPC, real logs on disk).
//! Half way through, the leader is killed. Beside it, the old behaviour: the same schedulers with
//! tables of their own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::anyhow;
use futures::future::try_join_all;
use itertools::Itertools as _;
use serde_json::json;
use tokio::sync::{Barrier, watch};
use tokio::task::{JoinSet, yield_now};

use super::embedded::{self, NodePorts};
use super::output::{self, table};
use super::{Format, Globals, log_to_stderr, usage};
use crate::api::assembly::Server;
use crate::client::{Client, Options};
use crate::lock::guard;
use crate::node::NodeId;
use crate::proto::v1;

const NODES: usize = 3;
const WORKER: &str = "sealgpuhost4090";
const MODEL: &str = "Qwen2.5-0.5B-Q4_K_M";
const FIRST_PORT: u32 = 40_000;
const PORTS: u32 = 1024;
const GPU_BYTES: u64 = 24 << 30;
/// What one replica of the model takes.
const REPLICA_BYTES: u64 = 1 << 30;
const REPLICAS_MAX: u32 = (GPU_BYTES / REPLICA_BYTES) as u32;
const SCHEDULERS_MAX: u32 = 64;
/// An election lies in the middle of it.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  portwarden demo
  portwarden demo --replicas 20 --schedulers 8 -o json
  portwarden demo --lifecycle

Exits with 1 if any port collides.")]
pub struct Args {
    /// Instances to place, 1 to 24: each takes 1 GiB of a 24 GiB GPU
    #[arg(long, default_value_t = 10)]
    replicas: u32,
    /// Schedulers that place them at the same time, 1 to 64
    #[arg(long, default_value_t = 4)]
    schedulers: u32,
    /// The second act: instances that are killed, fail to start, collide and lose their supervisors
    #[arg(long, conflicts_with_all = ["replicas", "schedulers"])]
    lifecycle: bool,
}

/// One instance as its scheduler got it.
struct Placed {
    scheduler: u32,
    /// The endpoint that answered.
    endpoint: String,
    allocation: v1::Allocation,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    for (flag, value, max) in [
        ("--replicas", args.replicas, REPLICAS_MAX),
        ("--schedulers", args.schedulers, SCHEDULERS_MAX),
    ] {
        if value == 0 || value > max {
            return Err(usage(format!("{flag}: {value} must be 1 to {max}")));
        }
    }
    // Elections and broken connections are the point of the demo, not news.
    log_to_stderr("off")?;
    if args.lifecycle {
        return super::lifecycle::run(globals).await;
    }
    let naive = naive(args.replicas, args.schedulers).await;

    let dir = tempfile::tempdir()?;
    let ports = [NodePorts { clients: 0, peers: 0, http: None }; NODES];
    let servers = embedded::start(dir.path(), &ports).await?;
    try_join_all(servers.iter().map(Server::enter_cluster)).await?;
    embedded::leader(&servers).await?;
    let outcome = place(&args, servers).await?;
    report(&args, globals.output, outcome, naive)
}

struct Outcome {
    placed: Vec<Placed>,
    /// The whole table afterwards, from a linearizable read.
    table: Vec<v1::Allocation>,
    /// Ids of the leaders that were killed.
    killed: Vec<NodeId>,
    nodes: BTreeMap<String, u64>,
}

/// Registers the worker, lets the schedulers loose and kills the leader under them.
async fn place(args: &Args, mut servers: Vec<Server>) -> anyhow::Result<Outcome> {
    let endpoints: Vec<_> = servers.iter().map(|s| s.endpoint().to_string()).collect();
    let nodes = servers.iter().map(|s| (s.endpoint().to_string(), s.node.id())).collect();
    let client = |first: u32| {
        let mut endpoints = endpoints.clone();
        endpoints.rotate_left(first as usize % NODES);
        Client::connect(endpoints, Options { timeout: CALL_TIMEOUT, ..Options::default() })
    };
    client(0)?.worker_register(WORKER, worker()).await?;

    let name = |i: u32| format!("qwen2.5-{:05x}", u64::from(i + 1) * 0x9e37 % 0xf_ffff);
    let waiting: VecDeque<String> = (0..args.replicas).map(name).collect();
    let waiting = Arc::new(Mutex::new(waiting));
    // The second half is placed while the leader is being killed.
    let half = args.replicas as usize / 2;
    let (kill, killing) = watch::channel(false);
    let (count, mut acknowledged) = watch::channel(0usize);
    let count = Arc::new(count);
    let mut schedulers = JoinSet::new();
    for scheduler in 0..args.schedulers {
        let client = client(scheduler)?;
        let (waiting, count, mut killing) = (waiting.clone(), count.clone(), killing.clone());
        schedulers.spawn(async move {
            let mut placed = Vec::new();
            loop {
                let (name, left) = {
                    let mut waiting = guard(&waiting);
                    let Some(name) = waiting.pop_front() else {
                        return Ok::<_, anyhow::Error>(placed);
                    };
                    (name, waiting.len())
                };
                if left < half {
                    let _ = killing.wait_for(|kill| *kill).await;
                }
                let granted = client.allocate(vec![claim(&name)]).await?;
                let allocation = granted.allocations.into_iter().next();
                let allocation = allocation.ok_or_else(|| anyhow!("an empty answer"))?;
                count.send_modify(|count| *count += 1);
                let endpoint = client.last_endpoint().to_string();
                placed.push(Placed { scheduler, endpoint, allocation });
            }
        });
    }

    let first_half = args.replicas as usize - half;
    let mut placed = Vec::new();
    loop {
        tokio::select! {
            _ = acknowledged.wait_for(|count| *count >= first_half) => break,
            // One that has failed ends it all: the others would wait for what it was to place.
            Some(done) = schedulers.join_next() => placed.extend(done??),
        }
    }
    let leader = embedded::leader(&servers).await?;
    let victim = servers.swap_remove(leader);
    let killed = vec![victim.node.id()];
    let _ = kill.send(true);
    victim.abort().await;

    while let Some(done) = schedulers.join_next().await {
        placed.extend(done??);
    }
    placed.sort_by_key(|p| p.allocation.token);
    let table = client(0)?.list(v1::ListRequest::default()).await?.items;
    for server in servers {
        server.abort().await;
    }
    Ok(Outcome { placed, table, killed, nodes })
}

fn worker() -> v1::WorkerSpec {
    v1::WorkerSpec {
        address: "127.0.0.1".into(),
        ranges: vec![v1::PortRange {
            name: "service".into(),
            first: FIRST_PORT,
            last: FIRST_PORT + PORTS - 1,
        }],
        gpus: vec![v1::GpuSpec {
            index: 0,
            uuid: String::new(),
            model: "RTX4090".into(),
            memory_bytes: GPU_BYTES,
        }],
        ..v1::WorkerSpec::default()
    }
}

fn claim(name: &str) -> v1::Claim {
    v1::Claim {
        name: name.into(),
        uid: uuid::Uuid::new_v4().to_string(),
        placement: Some(v1::claim::Placement::Worker(WORKER.into())),
        ports: vec![v1::PortRequest {
            ports: Some(v1::port_request::Ports::Count(1)),
            ..v1::PortRequest::default()
        }],
        gpus: Some(v1::GpuRequest {
            count: 1,
            share: Some(v1::gpu_request::Share::MemoryBytes(REPLICA_BYTES)),
            ..v1::GpuRequest::default()
        }),
        labels: BTreeMap::from([("model".to_string(), MODEL.to_string())]),
        ..v1::Claim::default()
    }
}

/// The old behaviour: each scheduler reads which ports are in use, picks the next one from what it
/// read, and writes it down. Between reading and writing, others do the same. Returns who got what.
async fn naive(replicas: u32, schedulers: u32) -> Vec<(u32, u32)> {
    let in_use: Arc<Mutex<Vec<(u32, u32)>>> = Arc::default();
    let start = Arc::new(Barrier::new(schedulers as usize));
    let tasks: Vec<_> = (0..schedulers)
        .map(|scheduler| {
            let (in_use, start) = (in_use.clone(), start.clone());
            let mine = (0..replicas).filter(|i| i % schedulers == scheduler).count();
            tokio::spawn(async move {
                for round in 0..mine.max(1) {
                    let read: BTreeSet<u32> = {
                        let table = guard(&in_use);
                        table.iter().map(|(_, port)| *port).collect()
                    };
                    if round == 0 {
                        start.wait().await; // all of them are asked at once
                    }
                    yield_now().await;
                    if round < mine
                        && let Some(port) =
                            (FIRST_PORT..FIRST_PORT + PORTS).find(|p| !read.contains(p))
                    {
                        let mut table = guard(&in_use);
                        table.push((scheduler, port));
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        let _ = task.await;
    }
    guard(&in_use).clone()
}

/// How many are on a port that another one was given before.
fn doubled<T: Ord>(ports: impl Iterator<Item = T>) -> usize {
    let mut seen = BTreeSet::new();
    let mut count = 0;
    for port in ports {
        count += usize::from(!seen.insert(port));
    }
    count
}

fn report(
    args: &Args,
    format: Format,
    outcome: Outcome,
    naive: Vec<(u32, u32)>,
) -> anyhow::Result<ExitCode> {
    let held = |a: &v1::Allocation| (a.worker.clone(), a.ports.first().map_or(0, |p| p.number));
    let by_table: BTreeMap<_, _> = outcome.table.iter().map(|a| (a.name.clone(), a)).collect();
    let acked = outcome.placed.iter().map(|p| &p.allocation);
    // What the schedulers were told must be unique, and be what the table says.
    let lost = acked.clone().filter(|a| by_table.get(&a.name) != Some(a)).count();
    let conflicts =
        doubled(acked.clone().map(held)) + doubled(outcome.table.iter().map(held)) + lost;
    let unique: BTreeSet<_> = acked.clone().map(held).collect();
    let naive_conflicts = doubled(naive.iter().map(|(_, port)| *port));

    let mut text = String::new();
    match format {
        Format::Json => {
            let allocations: Vec<output::Allocation> =
                acked.cloned().map(output::Allocation::from).collect();
            let object = json!({
                "replicas": args.replicas,
                "schedulers": args.schedulers,
                "allocations": allocations,
                "unique_ports": unique.len(),
                "conflicts": conflicts,
                "leader_kills": outcome.killed.len(),
                "naive_conflicts": naive_conflicts,
            });
            writeln!(text, "{object:#}")?;
        }
        Format::Table => {
            writeln!(
                text,
                "{} replicas of {MODEL}, {} schedulers at once, {NODES} nodes; node {} led and was killed half way\n",
                args.replicas,
                args.schedulers,
                outcome.killed.iter().join(", ")
            )?;
            let rows = outcome.placed.iter().map(|p| {
                let a = &p.allocation;
                vec![
                    a.name.clone(),
                    a.worker.clone(),
                    held(a).1.to_string(),
                    "1 GiB".to_string(),
                    a.token.to_string(),
                    format!("scheduler-{}", p.scheduler + 1),
                    outcome.nodes.get(&p.endpoint).map_or_else(String::new, u64::to_string),
                ]
            });
            let head = ["INSTANCE", "WORKER", "PORT", "GPU MEMORY", "TOKEN", "SCHEDULER", "NODE"];
            writeln!(text, "{}\n", table(&head, rows))?;

            let mut by_port: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
            for (scheduler, port) in &naive {
                by_port.entry(*port).or_default().push(*scheduler);
            }
            writeln!(text, "The same with a table in every scheduler (read, pick, write):")?;
            let rows = by_port.iter().map(|(port, schedulers)| {
                let who: Vec<_> =
                    schedulers.iter().map(|s| format!("scheduler-{}", s + 1)).collect();
                let verdict = if who.len() > 1 { "COLLISION" } else { "" };
                vec![port.to_string(), who.join(", "), verdict.to_string()]
            });
            writeln!(text, "{}\n", table(&["PORT", "GIVEN BY", ""], rows))?;
            writeln!(
                text,
                "portwarden: {} unique ports for {} instances, {conflicts} conflicts, {} leader killed",
                unique.len(),
                args.replicas,
                outcome.killed.len()
            )?;
            writeln!(text, "tables of their own: {naive_conflicts} of {} collide", args.replicas)?;
        }
    }
    output::emit(&text)?;
    match conflicts == 0 && unique.len() == args.replicas as usize {
        true => Ok(ExitCode::SUCCESS),
        false => Err(anyhow!(
            "{conflicts} conflicts, {} unique ports for {} instances",
            unique.len(),
            args.replicas
        )),
    }
}
