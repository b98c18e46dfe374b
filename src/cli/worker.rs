//! `portwarden worker`.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use clap::ArgGroup;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout_at};

use super::allocate::{list_or_key, read};
use super::{CliError, Format, Globals, output, parse};
use crate::api::worker_spec;
use crate::client::{Client, ClientError, Filter};
use crate::core::WorkerName;
use crate::proto::v1;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden worker register w1 --address 10.0.0.1 --range service=40000-40063
  portwarden worker apply -f workers.yaml
  portwarden worker list")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Add a worker, or replace what is known of it; what it holds stays
    Register(Register),
    /// Register the workers of a file, or change the named things of one worker
    Apply(Apply),
    /// List workers
    List(List),
    /// Show one worker with its quarantines and GPU holders
    #[command(after_help = "Examples:
  portwarden worker get w1
  portwarden worker get w1 -o json")]
    Get(Named),
    /// Keep new allocations away; what is held stays
    #[command(after_help = "Examples:
  portwarden worker cordon w1")]
    Cordon(Named),
    /// Let new allocations in again
    #[command(after_help = "Examples:
  portwarden worker uncordon w1")]
    Uncordon(Named),
    /// Say that a restored (UNVERIFIED) worker was compared with its host: it grants again
    Verify(Verify),
    /// Empty a worker: nothing new comes, and what is left is shown
    Drain(Drain),
    /// Remove a worker that holds nothing
    Remove(Remove),
    /// Do not give these ports: something else occupies them
    Quarantine(Quarantine),
    /// Give quarantined ports again
    Lift(Lift),
}

#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("which").args(["name", "all"]).required(true)),
    after_help = "Examples:
  portwarden worker verify w1
  portwarden worker verify --all

After a restore nobody knows what was granted since the backup. Look first at what runs on the worker,
and quarantine ports that are in use and not listed; an agent does both by itself."
)]
struct Verify {
    /// Name of the worker
    #[arg(value_parser = parse::name::<WorkerName>)]
    name: Option<String>,
    /// Every worker that is UNVERIFIED
    #[arg(long)]
    all: bool,
}

#[derive(Debug, clap::Args)]
struct Named {
    /// Name of the worker
    #[arg(value_parser = parse::name::<WorkerName>)]
    name: String,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden worker drain w1
  portwarden worker drain w1 --wait --timeout 10m

What it holds stays until its holders release it. With --wait, exit code 6 where something is still held
when --timeout is over; it goes on draining. `worker uncordon` takes it back.")]
struct Drain {
    /// Name of the worker
    #[arg(value_parser = parse::name::<WorkerName>)]
    name: String,
    /// Wait until it holds nothing, within --timeout
    #[arg(long)]
    wait: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden worker remove w1
  portwarden worker remove w1 --force --reason 'host was scrapped'

What is gone already is a success. One that holds something is refused (exit code 4). --force frees all
that it holds, whatever still runs there, and is recorded.")]
struct Remove {
    /// Name of the worker
    #[arg(value_parser = parse::name::<WorkerName>)]
    name: String,
    /// Free what it holds: an operator's override
    #[arg(long)]
    force: bool,
    /// Recorded with --force
    #[arg(long, requires = "force", default_value = "")]
    reason: String,
}

#[derive(Debug, Default, clap::Args)]
pub(super) struct SpecFlags {
    /// Host name or IP address where its ports are reached
    #[arg(long)]
    pub address: Option<String>,
    /// Managed ports; may be repeated, the first range is the default
    #[arg(long, value_name = "NAME=FIRST-LAST", value_parser = parse::range)]
    pub range: Vec<v1::PortRange>,
    /// Ports never to be given; may be repeated
    #[arg(long, value_name = "PORT[-PORT]", allow_negative_numbers = true, value_parser = parse::port_span)]
    pub reserve: Vec<parse::PortSpan>,
    /// A GPU; may be repeated, its index is its place unless given
    #[arg(long, value_name = "memory=SIZE[,model=M][,uuid=U][,index=I]", value_parser = parse::gpu)]
    pub gpu: Vec<parse::GpuFlag>,
    /// Label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::label)]
    pub label: Vec<(String, String)>,
}

impl SpecFlags {
    pub fn spec(self) -> Result<v1::WorkerSpec, CliError> {
        Ok(v1::WorkerSpec {
            address: self.address.unwrap_or_default(),
            labels: parse::labels(self.label)?,
            ranges: self.range,
            reserved: parse::spread(&self.reserve),
            gpus: number_gpus(self.gpu),
            identity: None,
        })
    }

    /// Fields of the spec that were named.
    pub fn fields(&self) -> Vec<String> {
        let named = [
            ("address", self.address.is_some()),
            ("labels", !self.label.is_empty()),
            ("ranges", !self.range.is_empty()),
            ("reserved", !self.reserve.is_empty()),
            ("gpus", !self.gpu.is_empty()),
        ];
        named.into_iter().filter(|(_, given)| *given).map(|(field, _)| field.into()).collect()
    }
}

/// GPUs without an index get the lowest that no other has, in order.
fn number_gpus(gpus: Vec<parse::GpuFlag>) -> Vec<v1::GpuSpec> {
    let given: BTreeSet<u32> = gpus.iter().filter_map(|gpu| gpu.index).collect();
    let mut unused = (0..).filter(|index| !given.contains(index));
    gpus.into_iter()
        .map(|gpu| v1::GpuSpec {
            index: gpu.index.or_else(|| unused.next()).unwrap_or_default(),
            uuid: gpu.uuid,
            model: gpu.model,
            memory_bytes: gpu.memory_bytes,
        })
        .collect()
}

#[derive(Debug, clap::Args)]
#[command(
    mut_arg("address", |arg| arg.required(true)),
    after_help = "Examples:
  portwarden worker register w1 --address 10.0.0.1 --range service=40000-40063 --range ray=41000-41999
  portwarden worker register w2 --address 10.0.0.2 --range service=40000-40063 --reserve 40010-40012 \\
    --gpu memory=24GiB,model=RTX4090 --gpu memory=24GiB,model=RTX4090 --label zone=a"
)]
struct Register {
    /// Name of the worker
    #[arg(value_parser = parse::name::<WorkerName>)]
    name: String,
    #[command(flatten)]
    spec: SpecFlags,
}

#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("target").args(["name", "file"]).required(true)),
    group(ArgGroup::new("change").multiple(true).args(CHANGES)),
    after_help = "Examples:
  portwarden worker apply -f workers.yaml
  portwarden worker apply w1 --label zone=b    # replaces the labels, keeps everything else
  portwarden worker apply w1 --no-labels

A file is a list of workers, or has them under the key `workers`:
  workers:
  - name: w1
    address: 10.0.0.1
    labels: {zone: a}
    ranges: [{name: service, first: 40000, last: 40063}]
    reserved: [40010]
    gpus: [{index: 0, memory: 24GiB, model: RTX4090, uuid: GPU-1}]"
)]
struct Apply {
    /// Name of the worker to change
    #[arg(value_parser = parse::name::<WorkerName>, requires = "change")]
    name: Option<String>,
    /// Workers as YAML or JSON (`-`: stdin)
    #[arg(short, long, value_name = "FILE", conflicts_with = "change")]
    file: Option<String>,
    #[command(flatten)]
    spec: SpecFlags,
    #[command(flatten)]
    cleared: Cleared,
}

/// Flags of `worker apply NAME`, of which one is needed.
const CHANGES: [&str; 8] =
    ["address", "range", "reserve", "gpu", "label", "no_labels", "no_reserve", "no_gpus"];

/// What is left out stays, so that none of it must be said.
#[derive(Debug, Default, clap::Args)]
struct Cleared {
    /// Take all its labels away
    #[arg(long, conflicts_with = "label")]
    no_labels: bool,
    /// Reserve none of its ports any more
    #[arg(long, conflicts_with = "reserve")]
    no_reserve: bool,
    /// Take all its GPUs away; refused while one is held
    #[arg(long, conflicts_with = "gpu")]
    no_gpus: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden worker list
  portwarden worker list --selector zone=a -o json")]
struct List {
    /// Only with these labels
    #[arg(long, value_parser = parse::selector, default_value = "")]
    selector: String,
    /// From any node's own copy, which may lag
    #[arg(long)]
    stale: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden worker quarantine w1 --port 40010 --port 40020-40022 --reason 'node exporter'")]
struct Quarantine {
    /// Name of the worker
    #[arg(value_parser = parse::name::<WorkerName>)]
    name: String,
    /// Ports; may be repeated
    #[arg(long, required = true, value_name = "PORT[-PORT]", allow_negative_numbers = true, value_parser = parse::port_span)]
    port: Vec<parse::PortSpan>,
    /// Why; shown to whoever asks
    #[arg(long, default_value = "")]
    reason: String,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden worker lift w1 --port 40010")]
struct Lift {
    /// Name of the worker
    #[arg(value_parser = parse::name::<WorkerName>)]
    name: String,
    /// Ports; may be repeated
    #[arg(long, required = true, value_name = "PORT[-PORT]", allow_negative_numbers = true, value_parser = parse::port_span)]
    port: Vec<parse::PortSpan>,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let client = globals.client()?;
    let again = || CliError::repeat_with("the same arguments".into());
    let response = match args.command {
        Command::Register(Register { name, spec }) => {
            client.worker_register(&name, spec.spec()?).await.map_err(again())?
        }
        Command::Apply(Apply { name: Some(name), spec, cleared, .. }) => {
            let Cleared { no_labels, no_reserve, no_gpus } = cleared;
            let given = [("labels", no_labels), ("reserved", no_reserve), ("gpus", no_gpus)];
            let cleared = given.into_iter().filter(|(_, given)| *given);
            let fields: Vec<String> =
                spec.fields().into_iter().chain(cleared.map(|(field, _)| field.into())).collect();
            client.worker_update(&name, spec.spec()?, fields).await.map_err(again())?
        }
        Command::Apply(Apply { file, .. }) => {
            return apply_file(&client, &file.unwrap_or_default(), globals.output).await;
        }
        Command::Verify(Verify { name: None, .. }) => {
            return verify_all(&client, globals.output).await;
        }
        Command::Verify(Verify { name: Some(name), .. }) => {
            client.worker_verify(&name).await.map_err(again())?
        }
        Command::List(list) => return run_list(&client, list, globals.output).await,
        Command::Remove(args) => return remove(&client, args, globals.output).await,
        Command::Drain(args) => return drain(&client, args, &globals).await,
        Command::Get(Named { name }) => client.worker_get(&name, None).await?,
        Command::Cordon(Named { name }) => {
            client.worker_set_phase(&name, v1::WorkerPhase::Cordoned).await.map_err(again())?
        }
        Command::Uncordon(Named { name }) => {
            client.worker_set_phase(&name, v1::WorkerPhase::Ready).await.map_err(again())?
        }
        Command::Quarantine(Quarantine { name, port, reason }) => {
            client.worker_quarantine(&name, parse::spread(&port), &reason).await.map_err(again())?
        }
        Command::Lift(Lift { name, port }) => {
            client.worker_lift_quarantine(&name, parse::spread(&port)).await.map_err(again())?
        }
    };
    let worker = output::Worker::from(response.worker.unwrap_or_default());
    output::print(globals.output, &worker, || output::worker_text(&worker))?;
    Ok(ExitCode::SUCCESS)
}

async fn run_list(client: &Client, args: List, format: Format) -> anyhow::Result<ExitCode> {
    let read = Some(v1::ReadOptions { stale: args.stale, min_revision: 0 });
    let request = v1::ListWorkersRequest { selector: args.selector, read, ..Default::default() };
    let listing = client.worker_list(request).await?;
    let workers: Vec<_> = listing.items.into_iter().map(output::Worker::from).collect();
    output::print(format, &workers, || output::workers_table(&workers))?;
    Ok(ExitCode::SUCCESS)
}

async fn verify_all(client: &Client, format: Format) -> anyhow::Result<ExitCode> {
    let mut workers = Vec::new();
    for worker in client.worker_list(v1::ListWorkersRequest::default()).await?.items {
        if worker.phase() == v1::WorkerPhase::Unverified {
            let again = CliError::repeat_with("the same arguments".into());
            let response = client.worker_verify(&worker.name).await.map_err(again)?;
            workers.push(output::Worker::from(response.worker.unwrap_or_default()));
        }
    }
    output::print(format, &workers, || output::workers_table(&workers))?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Removed {
    removed: bool,
    revision: u64,
    /// With --force: names of what it held.
    held: Vec<String>,
}

async fn remove(client: &Client, args: Remove, format: Format) -> anyhow::Result<ExitCode> {
    let Remove { name, force, reason } = args;
    let mut held = Vec::new();
    let response = match force {
        true => {
            held = held_by(client, &name).await?.into_iter().map(|held| held.name).collect();
            client.worker_force_remove(&name, &reason).await?
        }
        false => {
            let again = CliError::repeat_with("the same arguments".into());
            client.worker_remove(&name).await.map_err(again)?
        }
    };
    let result = Removed { removed: response.removed, revision: response.revision, held };
    output::print(format, &result, || match (result.removed, result.held.as_slice()) {
        (true, []) => format!("removed worker {name}"),
        (true, held) => {
            format!("removed worker {name}, which held {}: {}", held.len(), first_of(held))
        }
        (false, _) => format!("there was no worker {name}"),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// JSON of `worker drain`: the worker, and what it still holds.
#[derive(Serialize)]
struct Drained {
    worker: output::Worker,
    left: Vec<output::Allocation>,
}

async fn drain(client: &Client, args: Drain, globals: &Globals) -> anyhow::Result<ExitCode> {
    let Drain { name, wait } = args;
    let deadline = Instant::now() + globals.timeout;
    let again = CliError::repeat_with("the same arguments".into());
    client.worker_set_phase(&name, v1::WorkerPhase::Draining).await.map_err(again)?;
    let left = match wait {
        true => emptied(client, &name, deadline).await?,
        false => held_by(client, &name).await?,
    };
    let worker = client.worker_get(&name, None).await?.worker.unwrap_or_default();
    let left: Vec<_> = left.into_iter().map(output::Allocation::from).collect();
    let result = Drained { worker: output::Worker::from(worker), left };
    output::print(globals.output, &result, || {
        let worker = output::workers_table([&result.worker]);
        match result.left.as_slice() {
            [] => format!("{worker}\n\nit holds nothing"),
            left => format!("{worker}\n\nstill held:\n{}", output::allocations_table(left)),
        }
    })?;
    if wait && !result.left.is_empty() {
        let left = result.left.into_iter().map(|allocation| allocation.name).collect();
        return Err(CliError::StillHeld { worker: name, left }.into());
    }
    Ok(ExitCode::SUCCESS)
}

async fn held_by(client: &Client, worker: &str) -> Result<Vec<v1::Allocation>, ClientError> {
    let on_it = v1::ListRequest { worker: worker.into(), ..Default::default() };
    Ok(client.list(on_it).await?.items)
}

/// Waits, with progress on stderr, until a worker holds nothing or time is over; what is left then.
async fn emptied(
    client: &Client,
    worker: &str,
    deadline: Instant,
) -> Result<Vec<v1::Allocation>, ClientError> {
    let mut held = client.follow(Filter { worker: worker.into(), ..Filter::default() });
    held.next().await?;
    let mut told = None;
    while !held.allocations().is_empty() {
        let left = held.allocations().len();
        if told.replace(left) != Some(left) {
            let names: Vec<_> = held.allocations().keys().cloned().collect();
            output::note(&format!("{left} left on {worker}: {}", first_of(&names)));
        }
        match timeout_at(deadline, held.next()).await {
            Ok(news) => drop(news?),
            Err(_) => break,
        }
    }
    Ok(held.allocations().values().cloned().collect())
}

/// The first names, for a line.
fn first_of(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let more = if names.len() > SHOWN { ", …" } else { "" };
    names[..names.len().min(SHOWN)].join(", ") + more
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkersFile {
    workers: Vec<WorkerInFile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkerInFile {
    name: String,
    address: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    ranges: Vec<RangeInFile>,
    #[serde(default)]
    reserved: Vec<u32>,
    #[serde(default)]
    gpus: Vec<GpuInFile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RangeInFile {
    name: String,
    first: u32,
    last: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GpuInFile {
    index: Option<u32>,
    memory: Option<String>,
    memory_bytes: Option<u64>,
    #[serde(default)]
    model: String,
    #[serde(default)]
    uuid: String,
}

async fn apply_file(client: &Client, file: &str, format: Format) -> anyhow::Result<ExitCode> {
    let text = read(file)?;
    let specs = parse_workers(&text).map_err(|why| CliError::Usage(format!("{file}: {why}")))?;
    if specs.is_empty() {
        return Err(CliError::Usage(format!("{file}: there is no worker in it")).into());
    }
    let all = specs.len();
    let mut workers = Vec::with_capacity(all);
    for (name, spec) in specs {
        let again = CliError::repeat_with("the same file".into());
        let response = client.worker_register(&name, spec).await.map_err(again);
        let response = response.inspect_err(|_| {
            let done = workers.len();
            output::note(&format!(
                "{file}: workers[{done}] ({name}) failed; {done} of {all} are done"
            ));
        })?;
        workers.push(output::Worker::from(response.worker.unwrap_or_default()));
    }
    output::print(format, &workers, || output::workers_table(&workers))?;
    Ok(ExitCode::SUCCESS)
}

pub(super) fn parse_workers(text: &str) -> Result<Vec<(String, v1::WorkerSpec)>, String> {
    let workers: Vec<WorkerInFile> = list_or_key::<WorkersFile, _>(text, "workers", |f| f.workers)?;
    let parsed = workers
        .into_iter()
        .enumerate()
        .map(|(i, worker)| worker_from_file(worker).map_err(|why| format!("workers[{i}]{why}")));
    parsed.collect()
}

fn worker_from_file(worker: WorkerInFile) -> Result<(String, v1::WorkerSpec), String> {
    let gpus = worker.gpus.into_iter().enumerate().map(|(i, gpu)| {
        let memory_bytes = match (gpu.memory, gpu.memory_bytes) {
            (Some(text), None) => {
                parse::memory(&text).map_err(|e| format!(".gpus[{i}].memory: {text:?} {e}"))?
            }
            (None, Some(bytes)) => bytes,
            _ => return Err(format!(".gpus[{i}]: must have memory or memory_bytes")),
        };
        let GpuInFile { index, model, uuid, .. } = gpu;
        Ok(parse::GpuFlag { index, uuid, model, memory_bytes })
    });
    let range = |r: RangeInFile| v1::PortRange { name: r.name, first: r.first, last: r.last };
    let spec = v1::WorkerSpec {
        address: worker.address,
        labels: worker.labels,
        ranges: worker.ranges.into_iter().map(range).collect(),
        reserved: worker.reserved,
        gpus: number_gpus(gpus.collect::<Result<_, String>>()?),
        identity: None,
    };
    // As a node will: before the first of them is registered.
    WorkerName::parse(&worker.name).map_err(|why| format!(".{why}"))?;
    worker_spec(Some(&spec)).map_err(|why| format!(" ({}): {}", worker.name, why.message()))?;
    Ok((worker.name, spec))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_numbered_around_those_that_have_a_number() {
        let gpus =
            ["memory=1GiB", "memory=1GiB,index=0", "memory=1GiB"].map(|t| parse::gpu(t).unwrap());
        let indexes: Vec<_> = number_gpus(gpus.into()).into_iter().map(|g| g.index).collect();
        assert_eq!(indexes, [1, 0, 2]);
    }

    #[test]
    fn workers_are_read_from_a_file() {
        let text = "workers:\n- name: w1\n  address: h\n  ranges: [{name: service, first: 1, last: 9}]\n  gpus: [{memory: 24GiB}]\n";
        let workers = parse_workers(text).unwrap();
        assert_eq!(workers[0].0, "w1");
        assert_eq!(workers[0].1.gpus[0].memory_bytes, 24 << 30);
        let error = parse_workers("- {name: w, address: h, gpus: [{}]}").unwrap_err();
        assert!(error.contains("workers[0].gpus[0]"), "{error}");
        let two = "- {name: a, address: h}\n- {name: b, address: h, ranges: [{name: s, first: 70000, last: 9}]}";
        let error = parse_workers(two).unwrap_err();
        assert!(error.starts_with("workers[1] (b): spec.ranges[0].first"), "{error}");
    }
}
