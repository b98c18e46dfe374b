//! Results on stdout: JSON for programs, kubectl-like tables for people.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::time::{Duration, UNIX_EPOCH};

use bytesize::ByteSize;
use comfy_table::{Table, presets};
use serde::Serialize;

use super::Format;
use crate::proto::v1;

/// Writes to stdout. A reader that has gone away is no error: `portwarden list | head`.
pub fn emit(text: &str) -> anyhow::Result<()> {
    emit_on(text).map(drop)
}

/// The same for what goes on; false where nobody reads any more.
pub fn emit_on(text: &str) -> anyhow::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        written => Ok(written.map(|()| true)?),
    }
}

/// A remark to people on stderr, beside the results.
pub fn note(text: &str) {
    // Where nobody reads it, nothing is lost.
    let _ = writeln!(io::stderr(), "note: {text}");
}

/// The value as JSON, or what `table` makes of it.
pub fn print<T: Serialize>(
    format: Format,
    value: &T,
    table: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let mut text = match format {
        Format::Json => serde_json::to_string_pretty(value)?,
        Format::Table => table(),
    };
    text.push('\n');
    emit(&text)
}

/// Without borders, two blanks between columns.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.to_vec());
    table.add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_string()).collect::<Vec<_>>().join("\n")
}

#[derive(Debug, Serialize)]
pub struct Allocation {
    pub name: String,
    pub uid: String,
    pub worker: String,
    pub address: String,
    pub ports: Vec<Port>,
    pub gpus: Vec<Gpu>,
    pub token: u64,
    pub version: u64,
    pub phase: &'static str,
    pub lease: Option<u64>,
    pub labels: BTreeMap<String, String>,
    /// While it lingers: what happened.
    pub reason: Option<String>,
    /// How its agent can tell whether it lives, in words.
    pub liveness: Option<String>,
    /// Unix time by the leader's clock; 0 where it is not known.
    pub granted_at_ms: u64,
    pub changed_at_ms: u64,
    /// How long it may stay reserved, from its last change.
    pub confirm_within_ms: u64,
    /// Ports swapped because of conflicts, so far.
    pub swaps: u32,
}

#[derive(Debug, Serialize)]
pub struct Port {
    pub name: Option<String>,
    pub range: String,
    pub number: u32,
}

#[derive(Debug, Serialize)]
pub struct Gpu {
    pub index: u32,
    pub uuid: Option<String>,
    pub memory_bytes: u64,
    pub exclusive: bool,
}

fn given(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

impl From<v1::Allocation> for Allocation {
    fn from(a: v1::Allocation) -> Self {
        let phase = a.phase().as_str_name();
        let port = |p: v1::Port| Port { name: given(p.name), range: p.range, number: p.number };
        let gpu = |g: v1::Gpu| Gpu {
            index: g.index,
            uuid: given(g.uuid),
            memory_bytes: g.memory_bytes,
            exclusive: g.exclusive,
        };
        Allocation {
            name: a.name,
            uid: a.uid,
            worker: a.worker,
            address: a.address,
            ports: a.ports.into_iter().map(port).collect(),
            gpus: a.gpus.into_iter().map(gpu).collect(),
            token: a.token,
            version: a.version,
            phase,
            lease: Some(a.lease).filter(|lease| *lease != 0),
            labels: a.labels,
            reason: given(a.reason),
            liveness: a.liveness.as_ref().map(liveness_text),
            granted_at_ms: a.granted_at_ms,
            changed_at_ms: a.changed_at_ms,
            confirm_within_ms: a.confirm_within_ms,
            swaps: a.swaps,
        }
    }
}

const ALLOCATION_HEADER: [&str; 8] =
    ["NAME", "WORKER", "ADDRESS", "PORTS", "GPUS", "PHASE", "TOKEN", "VERSION"];

fn allocation_row(a: &Allocation) -> Vec<String> {
    vec![
        a.name.clone(),
        a.worker.clone(),
        a.address.clone(),
        none_as_dash(ports_text(&a.ports)),
        none_as_dash(gpus_text(&a.gpus)),
        a.phase.to_string(),
        number_or_dash(a.token),
        number_or_dash(a.version),
    ]
}

/// What was not granted has neither token nor version.
fn number_or_dash(number: u64) -> String {
    if number == 0 { "-".into() } else { number.to_string() }
}

pub fn allocations_table<'a>(allocations: impl IntoIterator<Item = &'a Allocation>) -> String {
    table(&ALLOCATION_HEADER, allocations.into_iter().map(allocation_row))
}

/// Many allocations, with how long ago each was changed last and why it lingers. `now_ms`: Unix time.
pub fn allocations_list(allocations: &[v1::Allocation], now_ms: u64) -> String {
    let mut header = ALLOCATION_HEADER.to_vec();
    header.push("CHANGED");
    let lingers = allocations.iter().any(|a| !a.reason.is_empty());
    if lingers {
        header.push("REASON");
    }
    let rows = allocations.iter().map(|a| {
        let mut row = allocation_row(&Allocation::from(a.clone()));
        row.push(age(now_ms.saturating_sub(a.changed_at_ms)));
        if lingers {
            row.push(none_as_dash(a.reason.clone()));
        }
        row
    });
    table(&header, rows)
}

/// In the largest unit of which there are two.
fn age(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// What is held, in one line.
pub fn allocation_line(a: &Allocation) -> String {
    let held = [ports_text(&a.ports), gpus_text(&a.gpus)];
    let held: Vec<_> = held.into_iter().filter(|text| !text.is_empty()).collect();
    format!("{} on {}: {}, token {}", a.phase, a.worker, held.join(" "), a.token)
}

/// One allocation with what its table line has no room for. `now_ms`: Unix time.
pub fn allocation_text(allocation: v1::Allocation, now_ms: u64) -> String {
    let mut lines = Vec::new();
    let age = |since_ms: u64| age(now_ms.saturating_sub(since_ms));
    let v1::Allocation { granted_at_ms, changed_at_ms, reason, lease, swaps, uid, .. } =
        &allocation;
    if *granted_at_ms > 0 {
        lines.push(format!(
            "granted {} ago, changed {} ago",
            age(*granted_at_ms),
            age(*changed_at_ms)
        ));
    }
    if allocation.phase() == v1::Phase::Reserved && allocation.confirm_within_ms > 0 {
        let within = Duration::from_millis(allocation.confirm_within_ms);
        let within = humantime::format_duration(within);
        lines.push(format!("to be confirmed within {within} of its last change"));
    }
    if !reason.is_empty() {
        lines.push(format!("lingers: {reason}; it goes once its agent has seen that it is gone"));
    }
    if *lease > 0 {
        lines.push(format!("on lease {lease}"));
    }
    if let Some(liveness) = &allocation.liveness {
        lines.push(format!("lives as {}", liveness_text(liveness)));
    }
    if *swaps > 0 {
        let ports = if *swaps == 1 { "1 port was".into() } else { format!("{swaps} ports were") };
        lines.push(format!("{ports} swapped because of conflicts"));
    }
    lines.push(format!("uid {uid}"));
    let shown = Allocation::from(allocation);
    if !shown.labels.is_empty() {
        let labels = shown.labels.iter().map(|(key, value)| format!("{key}={value}"));
        lines.push(format!("labels {}", labels.collect::<Vec<_>>().join(",")));
    }
    format!("{}\n{}", allocations_table([&shown]), lines.join("\n"))
}

/// `2026-11-25T06:20:00Z`, of Unix time in milliseconds.
pub fn point_in_time(ms: u64) -> String {
    // Later than any clock shows, it would not be a date.
    let ms = ms.min(253_402_300_799_000);
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

fn liveness_text(liveness: &v1::Liveness) -> String {
    use v1::liveness::Handle;
    let handle = match &liveness.handle {
        Some(Handle::Process(process)) => {
            format!("process {}, started at tick {}", process.pid, process.start_ticks)
        }
        Some(Handle::Cgroup(path)) => format!("cgroup {path}"),
        Some(Handle::Container(id)) => format!("container {id}"),
        None => "nothing known".into(),
    };
    format!("{handle}, of boot {}", liveness.boot_id)
}

fn none_as_dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// `http=40001,40003-40006`: runs of unnamed ports are drawn together.
fn ports_text(ports: &[Port]) -> String {
    let mut parts: Vec<(Option<&str>, u32, u32)> = Vec::new();
    for port in ports {
        let name = port.name.as_deref();
        match parts.last_mut() {
            Some((last_name, _, last)) if *last_name == name && *last + 1 == port.number => {
                *last = port.number;
            }
            _ => parts.push((name, port.number, port.number)),
        }
    }
    let part = |(name, first, last): (Option<&str>, u32, u32)| {
        let name = name.map_or(String::new(), |name| format!("{name}="));
        if first == last { format!("{name}{first}") } else { format!("{name}{first}-{last}") }
    };
    parts.into_iter().map(part).collect::<Vec<_>>().join(",")
}

fn gpus_text(gpus: &[Gpu]) -> String {
    let text = |g: &Gpu| match g.exclusive {
        true => format!("{}:exclusive", g.index),
        false => format!("{}:{}", g.index, bytes(g.memory_bytes)),
    };
    gpus.iter().map(text).collect::<Vec<_>>().join(",")
}

pub fn bytes(n: u64) -> String {
    ByteSize(n).display().iec().to_string()
}

#[derive(Debug, Serialize)]
pub struct Worker {
    pub name: String,
    pub address: String,
    pub phase: &'static str,
    /// What it is again once its agent reports or it is verified; null where that is `phase`.
    pub phase_before: Option<&'static str>,
    pub labels: BTreeMap<String, String>,
    pub ranges: Vec<Range>,
    pub reserved: Vec<u32>,
    pub gpus: Vec<WorkerGpu>,
    pub allocations: u64,
    pub created: u64,
    pub version: u64,
    /// Of its agent; null without one.
    pub identity: Option<Identity>,
}

#[derive(Debug, Serialize)]
pub struct Identity {
    pub machine_id: String,
    pub boot_id: String,
    pub namespace: u64,
}

#[derive(Debug, Serialize)]
pub struct Range {
    pub name: String,
    pub first: u32,
    pub last: u32,
    pub managed: u32,
    pub free: u32,
    pub held: u32,
    pub reserved: u32,
    pub quarantined_count: u32,
    pub quarantined: Vec<Quarantined>,
}

#[derive(Debug, Serialize)]
pub struct Quarantined {
    pub number: u32,
    pub reason: String,
    pub since: u64,
}

#[derive(Debug, Serialize)]
pub struct WorkerGpu {
    pub index: u32,
    pub uuid: Option<String>,
    pub model: Option<String>,
    pub memory_bytes: u64,
    pub held_bytes: u64,
    pub exclusive: bool,
    pub holder_count: u32,
    pub holders: Vec<String>,
}

impl From<v1::Worker> for Worker {
    fn from(w: v1::Worker) -> Self {
        let away = matches!(w.phase(), v1::WorkerPhase::Lost | v1::WorkerPhase::Unverified);
        let (phase, before) = (w.phase().as_str_name(), w.phase_before().as_str_name());
        let spec = w.spec.unwrap_or_default();
        let quarantined = |q: v1::QuarantinedPort| Quarantined {
            number: q.number,
            reason: q.reason,
            since: q.since,
        };
        let range = |r: v1::RangeUse| Range {
            name: r.name,
            first: r.first,
            last: r.last,
            managed: r.managed,
            free: r.free,
            held: r.held,
            reserved: r.reserved,
            quarantined_count: r.quarantined_count,
            quarantined: r.quarantined.into_iter().map(quarantined).collect(),
        };
        let gpu = |(used, spec): (v1::GpuUse, v1::GpuSpec)| WorkerGpu {
            index: used.index,
            uuid: given(spec.uuid),
            model: given(spec.model),
            memory_bytes: used.memory_bytes,
            held_bytes: used.held_bytes,
            exclusive: used.exclusive,
            holder_count: used.holder_count,
            holders: used.holders,
        };
        Worker {
            name: w.name,
            address: spec.address,
            phase,
            phase_before: away.then_some(before),
            labels: spec.labels,
            ranges: w.ranges.into_iter().map(range).collect(),
            reserved: spec.reserved,
            gpus: w.gpus.into_iter().zip(spec.gpus).map(gpu).collect(),
            allocations: w.allocations,
            created: w.created,
            version: w.version,
            identity: spec.identity.map(|identity| Identity {
                machine_id: identity.machine_id,
                boot_id: identity.boot_id,
                namespace: identity.namespace,
            }),
        }
    }
}

/// `LOST,CORDONED`: what it is, and what it will be where that is not `READY`.
fn phases(worker: &Worker) -> String {
    let ready = v1::WorkerPhase::Ready.as_str_name();
    match worker.phase_before.filter(|before| *before != ready) {
        Some(before) => format!("{},{before}", worker.phase),
        None => worker.phase.to_string(),
    }
}

pub fn workers_table<'a>(workers: impl IntoIterator<Item = &'a Worker>) -> String {
    let header = ["NAME", "ADDRESS", "PHASE", "PORTS FREE", "GPUS FREE", "ALLOCATIONS", "LABELS"];
    let rows = workers.into_iter().map(|w| {
        let ports = w.ranges.iter().map(|r| format!("{}:{}/{}", r.name, r.free, r.managed));
        let gpus = w.gpus.iter().map(|g| {
            let free = g.memory_bytes.saturating_sub(g.held_bytes);
            format!("{}:{}/{}", g.index, bytes(free), bytes(g.memory_bytes))
        });
        let labels = w.labels.iter().map(|(key, value)| format!("{key}={value}"));
        vec![
            w.name.clone(),
            w.address.clone(),
            phases(w),
            none_as_dash(ports.collect::<Vec<_>>().join(",")),
            none_as_dash(gpus.collect::<Vec<_>>().join(",")),
            w.allocations.to_string(),
            none_as_dash(labels.collect::<Vec<_>>().join(",")),
        ]
    });
    table(&header, rows)
}

/// One worker with what its table line has no room for.
pub fn worker_text(worker: &Worker) -> String {
    let mut text = workers_table([worker]);
    for range in &worker.ranges {
        let Range { name, first, last, free, held, reserved, quarantined_count, .. } = range;
        text.push_str(&format!(
            "\nrange {name} {first}-{last}: {free} free, {held} held, {reserved} reserved, {quarantined_count} quarantined"
        ));
        for Quarantined { number, reason, since } in &range.quarantined {
            text.push_str(&format!("\n  {number} quarantined since revision {since}: {reason}"));
        }
    }
    if let Some(before) = worker.phase_before {
        text.push_str(&format!("\n{before} again once its agent reports, or it is verified"));
    }
    match &worker.identity {
        Some(Identity { machine_id, boot_id, namespace }) => text.push_str(&format!(
            "\nagent: network namespace {namespace} of machine {machine_id}, boot {boot_id}"
        )),
        None => text.push_str("\nagent: none; what is on a lease is freed when the lease ends"),
    }
    for gpu in worker.gpus.iter().filter(|gpu| gpu.holder_count > 0) {
        text.push_str(&format!("\nGPU {}: held by {}", gpu.index, gpu.holders.join(", ")));
    }
    text
}

#[derive(Debug, Serialize)]
pub struct Status {
    pub cluster_id: String,
    pub leader: Option<u64>,
    pub revision: u64,
    pub term: u64,
    pub feature_level: u32,
    pub workers: u64,
    pub allocations: u64,
    /// The one that answers.
    pub node: u64,
    pub members: Vec<Member>,
    pub problems: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct Member {
    pub id: u64,
    pub role: String,
    pub state: String,
    pub endpoint: String,
    pub peer_endpoint: String,
    /// Both say nothing of a member that is unreachable.
    pub applied: u64,
    pub lag: u64,
    /// Empty where it could not be asked.
    pub version: String,
    /// It was added and has not joined yet.
    pub pending: bool,
}

impl From<v1::Member> for Member {
    fn from(m: v1::Member) -> Self {
        let v1::Member { id, role, state, endpoint, peer_endpoint, applied, lag, version, pending } =
            m;
        Member { id, role, state, endpoint, peer_endpoint, applied, lag, version, pending }
    }
}

impl From<v1::StatusResponse> for Status {
    fn from(s: v1::StatusResponse) -> Self {
        Status {
            cluster_id: s.cluster_id,
            leader: Some(s.leader).filter(|id| *id != 0),
            revision: s.revision,
            term: s.term,
            feature_level: s.feature_level,
            workers: s.workers,
            allocations: s.allocations,
            node: s.node,
            members: s.members.into_iter().map(Member::from).collect(),
            problems: s.problems,
        }
    }
}

pub fn members_table<'a>(members: impl IntoIterator<Item = &'a Member>) -> String {
    let header = ["ID", "ROLE", "STATE", "ENDPOINT", "PEER ENDPOINT", "APPLIED", "LAG", "VERSION"];
    let known = |m: &Member, n: u64| match m.state.as_str() {
        "unreachable" => "-".to_string(),
        _ => n.to_string(),
    };
    let rows = members.into_iter().map(|m| {
        vec![
            m.id.to_string(),
            m.role.clone(),
            // Not that it is away: it was never there.
            if m.pending { "pending".into() } else { m.state.clone() },
            none_as_dash(m.endpoint.clone()),
            m.peer_endpoint.clone(),
            known(m, m.applied),
            known(m, m.lag),
            none_as_dash(m.version.clone()),
        ]
    });
    table(&header, rows)
}
