//! `portwarden allocate`.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, ValueEnum};
use serde::Deserialize;

use super::{CliError, Globals, output, parse};
use crate::core::{InstanceName, RangeName, Uid, WorkerName, limits};
use crate::proto::v1;

#[derive(Debug, clap::Args)]
#[command(
    mut_group("what", |group| group.arg("file").required(true)),
    mut_group("where", |group| group.arg("file").required(true)),
    after_help = AFTER_HELP,
)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// Put it on this lease: it is given back when the lease ends
    #[arg(
        long,
        value_name = "ID",
        conflicts_with = "file",
        allow_negative_numbers = true,
        value_parser = parse::id()
    )]
    lease: Option<u64>,
    /// Say what would be granted, and change nothing
    #[arg(long)]
    dry_run: bool,
}

/// Claims by flags or from a file, for `allocate` and `explain`.
#[derive(Debug, clap::Args)]
pub(super) struct Source {
    /// Name of the instance, unique in the cluster
    #[arg(value_parser = parse::name::<InstanceName>, required_unless_present = "file")]
    name: Option<String>,
    #[command(flatten)]
    flags: ClaimFlags,
    /// Tells a retry from a rival; default: a fresh one
    #[arg(long, value_parser = parse::name::<Uid>)]
    uid: Option<String>,
    /// Claims as YAML or JSON (`-`: stdin); several are a gang, all or nothing
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["name", "ClaimFlags"])]
    file: Option<String>,
}

/// What an instance asks for.
#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("what").args(["ports", "port", "contiguous", "gpus", "gpu"]).multiple(true)),
    group(ArgGroup::new("where").args(["worker", "selector"])),
    group(ArgGroup::new("some-ports").args(["ports", "port", "contiguous"]).multiple(true)),
    group(ArgGroup::new("some-gpus").args(["gpus", "gpu"])),
)]
pub(super) struct ClaimFlags {
    /// The worker to place it on
    #[arg(long, value_parser = parse::name::<WorkerName>)]
    worker: Option<String>,
    /// Labels of the workers to choose from: k=v, k!=v, k in (a,b), k notin (a,b), k, !k
    #[arg(long, value_parser = parse::selector)]
    selector: Option<String>,
    /// Which of the workers that fit: the fullest (binpack) or the emptiest (spread)
    /// [default: binpack]
    #[arg(long, value_enum, requires = "selector", conflicts_with = "worker")]
    policy: Option<Policy>,
    /// This many ports, whichever are free
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::PORTS_PER_CLAIM_MAX))
    )]
    ports: Option<u32>,
    /// This port, or any one under a name (http=any); may be repeated
    #[arg(
        long,
        value_name = "[NAME=]PORT",
        allow_negative_numbers = true,
        value_parser = parse::named_port
    )]
    port: Vec<parse::NamedPort>,
    /// This many consecutive ports
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(limits::PORTS_PER_CLAIM_MAX))
    )]
    contiguous: Option<u32>,
    /// Range of the ports; default: the worker's first, or the one that holds a given port
    #[arg(
        long,
        value_name = "RANGE",
        requires = "some-ports",
        value_parser = parse::name::<RangeName>
    )]
    range: Option<String>,
    /// This many GPUs, whichever fit
    #[arg(
        long,
        value_name = "N",
        conflicts_with = "gpu",
        requires = "share",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(1..=limits::GPUS_PER_CLAIM_MAX as i64)
    )]
    gpus: Option<u32>,
    /// These GPUs, by index; may be repeated
    #[arg(
        long,
        value_name = "INDEX",
        value_delimiter = ',',
        requires = "share",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(0..=i64::from(limits::GPU_INDEX_MAX))
    )]
    gpu: Vec<u32>,
    /// Memory of each GPU, such as 8GiB
    #[arg(
        long,
        value_name = "SIZE",
        group = "share",
        requires = "some-gpus",
        allow_hyphen_values = true,
        value_parser = parse::memory
    )]
    gpu_memory: Option<u64>,
    /// Each GPU whole and alone
    #[arg(long, group = "share", requires = "some-gpus")]
    gpu_exclusive: bool,
    /// Reclaim it if it is not confirmed within this (1s to 24h) [default: the server's, 10m; of `run`: --start-timeout and a minute]
    #[arg(long, value_name = "DURATION", conflicts_with = "bound", value_parser = parse::span_of_time)]
    pub confirm_within: Option<Duration>,
    /// Grant straight to BOUND, without a confirmation
    #[arg(long)]
    bound: bool,
    /// Label of the allocation; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::label)]
    label: Vec<(String, String)>,
}

const AFTER_HELP: &str = "\
Examples:
  portwarden allocate qwen-0 --worker w1 --ports 2
  portwarden allocate qwen-0 --worker w1 --port http=40001 --port metrics=any --contiguous 4
  portwarden allocate qwen-0 --selector 'zone=a,gpu' --policy spread --gpus 1 --gpu-memory 8GiB
  portwarden allocate qwen-0 --worker w1 --ports 1 --lease 7 --confirm-within 2m
  portwarden allocate qwen-0 --worker w1 --ports 1 --dry-run
  portwarden allocate -f gang.yaml -o json

A file is a list of claims, or has them under the key `claims`:
  claims:
  - name: rank-0              # uid: default --uid, else a fresh one
    worker: w1                # or selector: 'zone=a', with policy: binpack or spread
    ports:                    # each has count, specific or contiguous, and may have name and range
    - {name: http, count: 1}
    - {range: ray, contiguous: 4}
    gpus: {count: 1, memory: 24GiB}   # count or indexes: [0, 1]; memory or exclusive: true
    lease: 7                  # or none
    confirm_within: 60s       # or bound: true
    labels: {model: qwen}

If the outcome is unknown (exit code 6), repeat the command with the --uid that the error names.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Policy {
    #[default]
    Binpack,
    Spread,
}

impl Policy {
    fn proto(self) -> i32 {
        match self {
            Policy::Binpack => v1::Policy::Binpack.into(),
            Policy::Spread => v1::Policy::Spread.into(),
        }
    }
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let client = globals.client()?;
    let uid = args.source.uid.clone().unwrap_or_else(|| client.fresh_uid());
    let gang = args.source.file.is_some();
    let mut claims = args.source.claims()?;
    for claim in &mut claims {
        if claim.uid.is_empty() {
            claim.uid = uid.clone();
        }
        if !gang {
            claim.lease = args.lease.unwrap_or(0);
        }
    }
    let answer = match args.dry_run {
        true => client.allocate_dry_run(claims).await?,
        false => {
            let again = CliError::repeat_with(format!("--uid {uid}"));
            client.allocate(claims).await.map_err(again)?
        }
    };
    let allocations: Vec<_> =
        answer.allocations.into_iter().map(output::Allocation::from).collect();
    let table = || {
        let table = output::allocations_table(&allocations);
        if args.dry_run { format!("{table}\ndry run: nothing was changed") } else { table }
    };
    match allocations.as_slice() {
        [only] if !gang => output::print(globals.output, only, table)?,
        all => output::print(globals.output, &all, table)?,
    }
    Ok(ExitCode::SUCCESS)
}

impl Source {
    /// Those without a uid have none yet, unless `--uid` is given.
    pub fn claims(self) -> Result<Vec<v1::Claim>, CliError> {
        let uid = self.uid.unwrap_or_default();
        let mut claims = match &self.file {
            Some(file) => read_claims(file)?,
            None => vec![self.flags.claim(self.name.unwrap_or_default())?],
        };
        for claim in claims.iter_mut().filter(|claim| claim.uid.is_empty()) {
            claim.uid = uid.clone();
        }
        Ok(claims)
    }
}

impl ClaimFlags {
    /// Without a uid and a lease.
    pub fn claim(self, name: String) -> Result<v1::Claim, CliError> {
        use v1::port_request::Ports;
        let range = self.range.unwrap_or_default();
        let request = |name: String, ports| v1::PortRequest {
            name,
            range: range.clone(),
            ports: Some(ports),
        };
        let named = self
            .port
            .into_iter()
            .map(|p| request(p.name, p.number.map_or(Ports::Count(1), Ports::Specific)));
        let counted = self.ports.map(|n| request(String::new(), Ports::Count(n)));
        let band = self.contiguous.map(|n| request(String::new(), Ports::Contiguous(n)));
        let share = match self.gpu_memory {
            Some(bytes) => v1::gpu_request::Share::MemoryBytes(bytes),
            None => v1::gpu_request::Share::Exclusive(true),
        };
        let gpus = (self.gpus.is_some() || !self.gpu.is_empty()).then(|| v1::GpuRequest {
            count: self.gpus.unwrap_or(0),
            indexes: self.gpu,
            share: Some(share),
        });
        Ok(v1::Claim {
            name,
            uid: String::new(),
            placement: placement(self.worker, self.selector, self.policy.unwrap_or_default()),
            ports: counted.into_iter().chain(named).chain(band).collect(),
            gpus,
            lease: 0,
            bound: self.bound,
            labels: parse::labels(self.label)?,
            confirm_within_ms: self.confirm_within.map_or(0, parse::ms),
        })
    }
}

fn placement(
    worker: Option<String>,
    selector: Option<String>,
    policy: Policy,
) -> Option<v1::claim::Placement> {
    let select =
        |selector| v1::claim::Placement::Select(v1::Selection { selector, policy: policy.proto() });
    worker.map(v1::claim::Placement::Worker).or_else(|| selector.map(select))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClaimsFile {
    claims: Vec<ClaimInFile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClaimInFile {
    name: String,
    #[serde(default)]
    uid: String,
    worker: Option<String>,
    selector: Option<String>,
    policy: Option<Policy>,
    #[serde(default)]
    ports: Vec<PortsInFile>,
    gpus: Option<GpusInFile>,
    #[serde(default)]
    lease: u64,
    confirm_within: Option<String>,
    #[serde(default)]
    bound: bool,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortsInFile {
    #[serde(default)]
    name: String,
    #[serde(default)]
    range: String,
    count: Option<u32>,
    specific: Option<u32>,
    contiguous: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GpusInFile {
    #[serde(default)]
    count: u32,
    #[serde(default)]
    indexes: Vec<u32>,
    memory: Option<String>,
    memory_bytes: Option<u64>,
    #[serde(default)]
    exclusive: bool,
}

fn read_claims(file: &str) -> Result<Vec<v1::Claim>, CliError> {
    let text = read(file)?;
    parse_claims(&text).map_err(|why| CliError::Usage(format!("{file}: {why}")))
}

/// A file's text, `-` being stdin.
pub(super) fn read(file: &str) -> Result<String, CliError> {
    /// Larger than the largest request that a node takes.
    const FILE_MAX_BYTES: u64 = 8 << 20;
    let mut text = String::new();
    let read = match file {
        "-" => std::io::stdin().take(FILE_MAX_BYTES + 1).read_to_string(&mut text),
        path => std::fs::File::open(Path::new(path))
            .and_then(|file| file.take(FILE_MAX_BYTES + 1).read_to_string(&mut text)),
    };
    match read {
        Ok(bytes) if bytes as u64 > FILE_MAX_BYTES => {
            Err(CliError::Usage(format!("{file}: must be at most {FILE_MAX_BYTES} bytes")))
        }
        Ok(_) => Ok(text),
        Err(error) => Err(CliError::Usage(format!("{file}: {error}"))),
    }
}

pub(super) fn parse_claims(text: &str) -> Result<Vec<v1::Claim>, String> {
    let claims: Vec<ClaimInFile> = list_or_key::<ClaimsFile, _>(text, "claims", |f| f.claims)?;
    if claims.is_empty() || claims.len() > limits::CLAIMS_MAX {
        return Err(format!("claims: {} must be 1 to {}", claims.len(), limits::CLAIMS_MAX));
    }
    let parsed = claims
        .into_iter()
        .enumerate()
        .map(|(i, claim)| claim_from_file(claim).map_err(|why| format!("claims[{i}].{why}")));
    parsed.collect()
}

/// A YAML list, or a mapping with the list under one key. Errors name line and column.
pub(super) fn list_or_key<K, T>(
    text: &str,
    key: &str,
    unwrap: impl FnOnce(K) -> Vec<T>,
) -> Result<Vec<T>, String>
where
    K: serde::de::DeserializeOwned,
    T: serde::de::DeserializeOwned,
{
    let shape: serde_norway::Value = serde_norway::from_str(text).map_err(|e| e.to_string())?;
    match shape {
        serde_norway::Value::Sequence(_) => serde_norway::from_str(text),
        serde_norway::Value::Mapping(_) => serde_norway::from_str(text).map(unwrap),
        _ => return Err(format!("must be a list, or a mapping with the key {key:?}")),
    }
    .map_err(|e| e.to_string())
}

fn claim_from_file(claim: ClaimInFile) -> Result<v1::Claim, String> {
    if claim.worker.is_some() && claim.selector.is_some() {
        return Err("selector: must be left out where a worker is given".into());
    }
    if claim.worker.is_some() && claim.policy.is_some() {
        return Err("policy: must be left out where a worker is given".into());
    }
    if claim.bound && claim.confirm_within.is_some() {
        return Err("confirm_within: must be left out where bound is true".into());
    }
    let confirm_within = claim.confirm_within.map(|text| {
        let span = parse::span_of_time(&text).map(parse::ms);
        span.map_err(|why| format!("confirm_within: {text:?} {why}"))
    });
    let confirm_within = confirm_within.transpose()?;
    let ports = claim
        .ports
        .into_iter()
        .enumerate()
        .map(|(i, ports)| ports_from_file(ports).map_err(|why| format!("ports[{i}]: {why}")));
    Ok(v1::Claim {
        name: claim.name,
        uid: claim.uid,
        placement: placement(claim.worker, claim.selector, claim.policy.unwrap_or_default()),
        ports: ports.collect::<Result<_, _>>()?,
        gpus: claim.gpus.map(gpus_from_file).transpose()?,
        lease: claim.lease,
        bound: claim.bound,
        labels: claim.labels,
        confirm_within_ms: confirm_within.unwrap_or(0),
    })
}

fn ports_from_file(ports: PortsInFile) -> Result<v1::PortRequest, String> {
    use v1::port_request::Ports;
    let wanted = match (ports.count, ports.specific, ports.contiguous) {
        (Some(n), None, None) => Ports::Count(n),
        (None, Some(n), None) => Ports::Specific(n),
        (None, None, Some(n)) => Ports::Contiguous(n),
        _ => return Err("must have one of count, specific, contiguous".into()),
    };
    Ok(v1::PortRequest { name: ports.name, range: ports.range, ports: Some(wanted) })
}

fn gpus_from_file(gpus: GpusInFile) -> Result<v1::GpuRequest, String> {
    use v1::gpu_request::Share;
    let share = match (gpus.memory, gpus.memory_bytes, gpus.exclusive) {
        (Some(text), None, false) => {
            let bytes = parse::memory(&text).map_err(|e| format!("gpus.memory: {text:?} {e}"))?;
            Share::MemoryBytes(bytes)
        }
        (None, Some(bytes), false) => Share::MemoryBytes(bytes),
        (None, None, true) => Share::Exclusive(true),
        _ => return Err("gpus: must have one of memory, memory_bytes, exclusive: true".into()),
    };
    Ok(v1::GpuRequest { count: gpus.count, indexes: gpus.indexes, share: Some(share) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gang_is_a_list_or_stands_under_claims_in_yaml_or_json() {
        let list = "- {name: a, worker: w, ports: [{count: 2}]}\n- name: b\n  selector: zone=a\n  gpus: {count: 1, memory: 8GiB}\n";
        let keyed = r#"{"claims": [{"name": "a", "worker": "w", "ports": [{"count": 2}]},
            {"name": "b", "selector": "zone=a", "gpus": {"count": 1, "memory_bytes": 8589934592}}]}"#;
        let claims = parse_claims(list).unwrap();
        assert_eq!(claims, parse_claims(keyed).unwrap());
        assert_eq!(claims.len(), 2);
        assert_eq!(claims[0].placement, Some(v1::claim::Placement::Worker("w".into())));
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        for (text, named) in [
            ("x", "claims"),
            ("[]", "1 to 64"),
            ("- {name: a, wroker: w}", "wroker"),
            ("- {worker: w}", "name"),
            ("- {name: a, ports: [{count: -1}]}", "-1"),
            ("- {name: a, ports: [{count: 1, specific: 2}]}", "claims[0].ports[0]"),
            ("- {name: a, gpus: {count: 1, memory: 17TiB}}", "16 TiB"),
            ("- {name: a, worker: w, selector: x}", "selector"),
            ("- {name: a, worker: w, confirm_within: 0s}", "1s to 24h"),
            ("- {name: a, worker: w, policy: spread}", "policy"),
            ("- {name: a, worker: w, bound: true, confirm_within: 60s}", "confirm_within"),
        ] {
            let error = parse_claims(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
        let many = "- {name: a}\n".repeat(limits::CLAIMS_MAX + 1);
        assert!(parse_claims(&many).unwrap_err().contains("65"));
    }
}
