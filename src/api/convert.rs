//! Between the messages of `portwarden.v1` and the types of `core`.
//!
//! Inward, everything is parsed once and checked against its limit; an error names the field by its
//! path in the message, the value and the limit. Outward nothing can fail.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tonic::Status;

use super::address::check_host;
use super::errors;
use crate::core::{
    Allocation, Claim, GpuChoice, GpuRequest, GpuShare, GpuSpec, Handle, HeldGpu, HeldPort,
    Identity, InstanceName, Invalid, LabelKey, LabelValue, Labels, Lease, LeaseId, Liveness,
    Millis, Phase, Placement, Policy, Pool, Port, PortName, PortRequest, Ports, RangeName,
    RangeSpec, Revision, Selector, Source, Specs, State, Token, Uid, Worker, WorkerName,
    WorkerPatch, WorkerPhase, WorkerSpec, check_text, limits,
};
use crate::node::sweeper::{Drift, InUse, Sample};
use crate::proto::v1;

/// Quarantined ports shown of one worker.
pub const QUARANTINED_SHOWN_MAX: usize = 2048;
/// Ports in use in one report of an agent: all there are.
pub const REPORTED_PORTS_MAX: usize = 65_535;
/// Liveness handles in one report.
pub const REPORTED_HANDLES_MAX: usize = 16_384;
/// Differences between host and table in one report.
pub const REPORTED_DRIFT_MAX: usize = 1024;
/// Holders shown of one GPU.
pub const HOLDERS_SHOWN_MAX: usize = 64;

// Inward.

pub fn instance(name: &str) -> Result<InstanceName, Status> {
    InstanceName::parse(name).map_err(errors::invalid)
}

/// `field` is how the message calls the worker's name.
pub fn worker_name(field: &str, name: &str) -> Result<WorkerName, Status> {
    WorkerName::parse(name).map_err(|e| errors::invalid(named(field, e)))
}

pub fn port(field: &str, number: u32) -> Result<Port, Status> {
    Port::new(field, number.into()).map_err(errors::invalid)
}

pub fn ports(field: &str, numbers: &[u32]) -> Result<Vec<Port>, Status> {
    numbers.iter().enumerate().map(|(i, n)| port(&format!("{field}[{i}]"), *n)).collect()
}

pub fn selector(text: &str) -> Result<Selector, Status> {
    Selector::parse(text).map_err(errors::invalid)
}

pub fn claims(claims: &[v1::Claim]) -> Result<Vec<Arc<Claim>>, Status> {
    if claims.len() > limits::CLAIMS_MAX {
        let limit = format!("1 to {} claims", limits::CLAIMS_MAX);
        return Err(errors::invalid(Invalid::new("claims", claims.len(), limit)));
    }
    let parsed = claims.iter().enumerate().map(|(i, claim)| {
        parse_claim(claim)
            .map(Arc::new)
            .map_err(|e| errors::invalid(e.within(format!("claims[{i}]"))))
    });
    parsed.collect()
}

fn parse_claim(claim: &v1::Claim) -> Result<Claim, Invalid> {
    Ok(Claim {
        name: InstanceName::parse(&claim.name)?,
        uid: Uid::parse(&claim.uid)?,
        placement: parse_placement(claim.placement.as_ref())?,
        ports: each("ports", &claim.ports, parse_port_request)?,
        gpus: claim
            .gpus
            .as_ref()
            .map(|gpus| parse_gpus(gpus).map(Box::new).map_err(|e| e.within("gpus")))
            .transpose()?,
        lease: lease(claim.lease),
        confirm_within: match claim.confirm_within_ms {
            0 => None,
            ms => Some(Millis::span("confirm_within_ms", ms)?),
        },
        bound: claim.bound,
        labels: parse_labels(&claim.labels)?,
    })
}

/// 0: none.
pub fn lease(id: u64) -> Option<LeaseId> {
    (id != 0).then_some(LeaseId(id))
}

pub fn parse_liveness(liveness: &v1::Liveness) -> Result<Liveness, Invalid> {
    let handle = match &liveness.handle {
        Some(v1::liveness::Handle::Process(v1::Process { pid, start_ticks })) => {
            Handle::Process { pid: *pid, start_ticks: *start_ticks }
        }
        Some(v1::liveness::Handle::Cgroup(path)) => Handle::Cgroup(path.clone()),
        Some(v1::liveness::Handle::Container(id)) => Handle::Container(id.clone()),
        None => {
            let limit = "one of process, cgroup, container";
            return Err(Invalid::new("liveness.handle", "", limit));
        }
    };
    Ok(Liveness { boot_id: liveness.boot_id.clone(), handle })
}

fn parse_placement(placement: Option<&v1::claim::Placement>) -> Result<Placement, Invalid> {
    match placement {
        Some(v1::claim::Placement::Worker(name)) => Ok(Placement::Worker(WorkerName::parse(name)?)),
        Some(v1::claim::Placement::Select(select)) => {
            let policy = match v1::Policy::try_from(select.policy) {
                Ok(v1::Policy::Binpack) => Policy::Binpack,
                Ok(v1::Policy::Spread) => Policy::Spread,
                Err(_) => {
                    let limit = "BINPACK (0) or SPREAD (1)";
                    return Err(Invalid::new("select.policy", select.policy, limit));
                }
            };
            let selector = Selector::parse(&select.selector).map_err(|e| e.within("select"))?;
            Ok(Placement::Select { selector, policy })
        }
        None => Err(Invalid::new("placement", "", "a worker or a selection of workers")),
    }
}

fn parse_port_request(request: &v1::PortRequest) -> Result<PortRequest, Invalid> {
    let ports = match request.ports {
        Some(v1::port_request::Ports::Count(n)) => Ports::Count(n),
        Some(v1::port_request::Ports::Specific(n)) => {
            Ports::Specific(Port::new("specific", n.into())?)
        }
        Some(v1::port_request::Ports::Contiguous(n)) => Ports::Contiguous(n),
        None => return Err(Invalid::new("ports", "", "one of count, specific, contiguous")),
    };
    let name = given(&request.name);
    let range = given(&request.range);
    Ok(PortRequest {
        name: name.map(PortName::parse).transpose().map_err(|e| named("name", e))?,
        range: range.map(RangeName::parse).transpose()?,
        ports,
    })
}

fn parse_gpus(gpus: &v1::GpuRequest) -> Result<GpuRequest, Invalid> {
    let which = match (gpus.count, gpus.indexes.as_slice()) {
        (count, []) => GpuChoice::Count(count),
        (0, indexes) => {
            let mut chosen = BTreeSet::new();
            for index in indexes {
                if !chosen.insert(*index) {
                    return Err(Invalid::new("indexes", index, "named once"));
                }
            }
            GpuChoice::Indexes(chosen)
        }
        (count, _) => return Err(Invalid::new("count", count, "0 where indexes are given")),
    };
    let share = match gpus.share {
        Some(v1::gpu_request::Share::MemoryBytes(bytes)) => GpuShare::MemoryBytes(bytes),
        Some(v1::gpu_request::Share::Exclusive(true)) => GpuShare::Exclusive,
        Some(v1::gpu_request::Share::Exclusive(false)) => {
            return Err(Invalid::new("exclusive", false, "true, or memory_bytes be given"));
        }
        None => return Err(Invalid::new("share", "", "memory_bytes or exclusive")),
    };
    Ok(GpuRequest { which, share })
}

fn parse_labels(labels: &BTreeMap<String, String>) -> Result<Labels, Invalid> {
    let parsed = labels.iter().map(|(key, value)| {
        let key = LabelKey::parse(key).map_err(|e| named("labels", e))?;
        let value = LabelValue::parse(value).map_err(|e| named(&format!("labels[{key}]"), e))?;
        Ok((key, value))
    });
    parsed.collect()
}

pub fn worker_spec(spec: Option<&v1::WorkerSpec>) -> Result<WorkerSpec, Status> {
    let spec = required_spec(spec)?;
    parse_spec(spec).map_err(|e| errors::invalid(e.within("spec")))
}

fn required_spec(spec: Option<&v1::WorkerSpec>) -> Result<&v1::WorkerSpec, Status> {
    spec.ok_or_else(|| errors::invalid(Invalid::new("spec", "", "given")))
}

fn identity(identity: &v1::Identity) -> Identity {
    Identity {
        machine_id: identity.machine_id.clone(),
        boot_id: identity.boot_id.clone(),
        namespace: identity.namespace,
    }
}

/// What an agent saw.
pub fn sample(request: &v1::ReportRequest) -> Result<Sample, Invalid> {
    let most = |field: &str, n: usize, max: usize| match n > max {
        true => Err(Invalid::new(field, n, format!("at most {max}"))),
        false => Ok(()),
    };
    most("ports", request.ports.len(), REPORTED_PORTS_MAX)?;
    most("handles", request.handles.len(), REPORTED_HANDLES_MAX)?;
    most("gpus", request.gpus.len(), limits::GPUS_PER_WORKER_MAX)?;
    most("drift", request.drift.len(), REPORTED_DRIFT_MAX)?;
    let missing = || Invalid::new("identity", "", "given: it tells workers apart");
    check_text("run", &request.run, limits::UID_MAX_BYTES)?;
    let in_use = each("ports", &request.ports, |port| {
        let v1::PortInUse { number, listening, pid } = *port;
        let number = Port::new("number", number.into())?.get();
        Ok((number, InUse { listening, pid }))
    })?;
    let handles = each("handles", &request.handles, |handle| {
        Ok((InstanceName::parse(&handle.name)?, (Token(handle.token), handle.alive)))
    })?;
    Ok(Sample {
        worker: WorkerName::parse(&request.worker)?,
        identity: identity(request.identity.as_ref().ok_or_else(missing)?),
        revision: Revision(request.revision),
        run: request.run.clone(),
        number: request.sample,
        in_use: in_use.into_iter().collect(),
        handles: handles.into_iter().collect(),
        gpus: request.gpus.iter().map(|gpu| (gpu.index, gpu.processes)).collect(),
        drift: drift(&request.drift)?,
    })
}

fn drift(list: &[v1::Drift]) -> Result<Drift, Invalid> {
    let mut counts = Drift::default();
    for (i, drift) in list.iter().enumerate() {
        match v1::DriftKind::try_from(drift.kind) {
            Ok(v1::DriftKind::BoundButClosed) => counts.bound_but_closed += 1,
            Ok(v1::DriftKind::OpenButUnknown) => counts.open_but_unknown += 1,
            Ok(v1::DriftKind::HeldByAnother) => counts.held_by_another += 1,
            Ok(v1::DriftKind::Unspecified) | Err(_) => {
                let limit = "BOUND_BUT_CLOSED, OPEN_BUT_UNKNOWN or HELD_BY_ANOTHER";
                return Err(Invalid::new(format!("drift[{i}].kind"), drift.kind, limit));
            }
        }
    }
    Ok(counts)
}

fn parse_spec(spec: &v1::WorkerSpec) -> Result<WorkerSpec, Invalid> {
    let parsed = WorkerSpec {
        address: spec.address.clone(),
        labels: parse_labels(&spec.labels)?,
        ranges: each("ranges", &spec.ranges, parse_range)?,
        reserved: parse_reserved(&spec.reserved)?,
        gpus: spec.gpus.iter().map(parse_gpu_spec).collect(),
        identity: spec.identity.as_ref().map(identity),
    };
    parsed.validate()?;
    check_host("address", &parsed.address)?;
    Ok(parsed)
}

fn parse_range(range: &v1::PortRange) -> Result<RangeSpec, Invalid> {
    Ok(RangeSpec {
        name: RangeName::parse(&range.name).map_err(|e| named("name", e))?,
        first: Port::new("first", range.first.into())?,
        last: Port::new("last", range.last.into())?,
    })
}

fn parse_reserved(reserved: &[u32]) -> Result<BTreeSet<Port>, Invalid> {
    let parse = |(i, n): (usize, &u32)| Port::new(&format!("reserved[{i}]"), (*n).into());
    reserved.iter().enumerate().map(parse).collect()
}

fn parse_gpu_spec(gpu: &v1::GpuSpec) -> GpuSpec {
    GpuSpec {
        index: gpu.index,
        uuid: gpu.uuid.clone(),
        model: gpu.model.clone(),
        memory_bytes: gpu.memory_bytes,
    }
}

/// The named fields of a spec.
pub fn worker_patch(
    spec: Option<&v1::WorkerSpec>,
    fields: &[String],
) -> Result<WorkerPatch, Status> {
    const FIELDS: &str = "some of address, labels, ranges, reserved, gpus, identity";
    let spec = required_spec(spec)?;
    if fields.is_empty() {
        return Err(errors::invalid(Invalid::new("fields", "", FIELDS)));
    }
    let mut patch = WorkerPatch::default();
    let within = |e: Invalid| errors::invalid(e.within("spec"));
    for (i, field) in fields.iter().enumerate() {
        match field.as_str() {
            "address" => {
                check_host("address", &spec.address).map_err(within)?;
                patch.address = Some(spec.address.clone());
            }
            "labels" => patch.labels = Some(parse_labels(&spec.labels).map_err(within)?),
            "ranges" => {
                patch.ranges = Some(each("ranges", &spec.ranges, parse_range).map_err(within)?);
            }
            "reserved" => patch.reserved = Some(parse_reserved(&spec.reserved).map_err(within)?),
            "gpus" => patch.gpus = Some(spec.gpus.iter().map(parse_gpu_spec).collect()),
            "identity" => {
                let missing = || Invalid::new("identity", "", "given: an agent stays an agent");
                let given = spec.identity.as_ref().ok_or_else(|| within(missing()))?;
                patch.identity = Some(identity(given));
            }
            other => {
                let error = Invalid::new(format!("fields[{i}]"), other, FIELDS);
                return Err(errors::invalid(error));
            }
        }
    }
    Ok(patch)
}

/// The phases that an operator may set.
pub fn settable_phase(phase: i32) -> Result<WorkerPhase, Status> {
    match v1::WorkerPhase::try_from(phase) {
        Ok(v1::WorkerPhase::Ready) => Ok(WorkerPhase::Ready),
        Ok(v1::WorkerPhase::Cordoned) => Ok(WorkerPhase::Cordoned),
        Ok(v1::WorkerPhase::Draining) => Ok(WorkerPhase::Draining),
        other => {
            let shown = other.map_or_else(|_| phase.to_string(), |p| p.as_str_name().to_string());
            Err(errors::invalid(Invalid::new("phase", shown, "READY, CORDONED or DRAINING")))
        }
    }
}

/// A filter on the phase; the unspecified one lets everything through.
pub fn phase_filter(phase: i32) -> Result<v1::Phase, Status> {
    v1::Phase::try_from(phase)
        .map_err(|_| errors::invalid(Invalid::new("phase", phase, "RESERVED, BOUND or LINGERING")))
}

/// Without room for more: most of them are kept for as long as what they are part of.
fn each<T, U>(
    field: &str,
    items: &[T],
    parse: impl Fn(&T) -> Result<U, Invalid>,
) -> Result<Vec<U>, Invalid> {
    let mut all = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        all.push(parse(item).map_err(|e| e.within(format!("{field}[{i}]")))?);
    }
    Ok(all)
}

/// The same error under the name that the message has for the field.
fn named(field: &str, error: Invalid) -> Invalid {
    Invalid { field: field.into(), ..error }
}

fn given(text: &str) -> Option<&str> {
    Some(text).filter(|text| !text.is_empty())
}

// Outward.

/// Where the instances of workers are reached.
pub trait Addresses {
    /// `None` of a worker that there is not.
    fn address(&self, worker: &WorkerName) -> Option<&str>;
}

impl Addresses for State {
    fn address(&self, worker: &WorkerName) -> Option<&str> {
        self.worker(worker).map(|found| found.spec.address.as_str())
    }
}

impl Addresses for Specs {
    fn address(&self, worker: &WorkerName) -> Option<&str> {
        self.get(worker).map(|spec| spec.address.as_str())
    }
}

pub fn allocation(allocation: &Allocation, addresses: &impl Addresses) -> v1::Allocation {
    let address = addresses.address(&allocation.worker);
    v1::Allocation {
        name: allocation.name().as_str().into(),
        uid: allocation.claim.uid.as_str().into(),
        worker: allocation.worker.as_str().into(),
        address: address.unwrap_or_default().into(),
        ports: allocation.ports.iter().map(|port| held_port(allocation, port)).collect(),
        gpus: allocation.gpus.iter().map(held_gpu).collect(),
        token: allocation.token.0,
        version: allocation.version.0,
        phase: phase(allocation.phase).into(),
        lease: allocation.lease.map_or(0, |id| id.0),
        labels: labels(&allocation.claim.labels),
        swaps: allocation.swaps,
        reason: allocation.reason.as_deref().unwrap_or_default().into(),
        liveness: allocation.liveness.as_deref().map(liveness),
        confirm_within_ms: allocation.confirm_within.0,
        granted_at_ms: allocation.granted_at.0,
        changed_at_ms: allocation.changed_at.0,
    }
}

fn liveness(liveness: &Liveness) -> v1::Liveness {
    let handle = match &liveness.handle {
        Handle::Process { pid, start_ticks } => {
            v1::liveness::Handle::Process(v1::Process { pid: *pid, start_ticks: *start_ticks })
        }
        Handle::Cgroup(path) => v1::liveness::Handle::Cgroup(path.clone()),
        Handle::Container(id) => v1::liveness::Handle::Container(id.clone()),
    };
    v1::Liveness { boot_id: liveness.boot_id.clone(), handle: Some(handle) }
}

pub fn lease_message(lease: &Lease) -> v1::Lease {
    v1::Lease { id: lease.id.0, ttl_ms: lease.ttl.0, allocations: lease.allocations.len() as u64 }
}

pub fn phase(phase: Phase) -> v1::Phase {
    match phase {
        Phase::Reserved => v1::Phase::Reserved,
        Phase::Bound => v1::Phase::Bound,
        Phase::Lingering => v1::Phase::Lingering,
    }
}

fn held_port(of: &Allocation, port: &HeldPort) -> v1::Port {
    v1::Port {
        name: of.port_name(port).map(|name| name.as_str().into()).unwrap_or_default(),
        range: port.range.as_str().into(),
        number: port.number.into(),
    }
}

fn held_gpu(gpu: &HeldGpu) -> v1::Gpu {
    v1::Gpu {
        index: gpu.index,
        uuid: gpu.uuid.clone(),
        memory_bytes: gpu.memory_bytes,
        exclusive: gpu.exclusive,
    }
}

fn labels(labels: &Labels) -> BTreeMap<String, String> {
    labels.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

pub fn worker(worker: &Worker) -> v1::Worker {
    let mut shown = QUARANTINED_SHOWN_MAX;
    v1::Worker {
        name: worker.name.to_string(),
        spec: Some(spec(&worker.spec)),
        phase: worker_phase(worker.phase).into(),
        ranges: worker.pools.iter().map(|pool| range_use(pool, &mut shown)).collect(),
        gpus: worker.gpus.iter().map(gpu_use).collect(),
        allocations: worker.allocations.len() as u64,
        created: worker.created.0,
        version: worker.version.0,
        phase_before: match worker.phase {
            WorkerPhase::Lost | WorkerPhase::Unverified => worker_phase(worker.phase_before).into(),
            _ => v1::WorkerPhase::Unspecified.into(),
        },
        booted: worker.booted.0,
    }
}

fn worker_phase(phase: WorkerPhase) -> v1::WorkerPhase {
    match phase {
        WorkerPhase::Ready => v1::WorkerPhase::Ready,
        WorkerPhase::Cordoned => v1::WorkerPhase::Cordoned,
        WorkerPhase::Draining => v1::WorkerPhase::Draining,
        WorkerPhase::Lost => v1::WorkerPhase::Lost,
        WorkerPhase::Unverified => v1::WorkerPhase::Unverified,
    }
}

fn spec(spec: &WorkerSpec) -> v1::WorkerSpec {
    let range = |range: &RangeSpec| v1::PortRange {
        name: range.name.to_string(),
        first: range.first.get().into(),
        last: range.last.get().into(),
    };
    let gpu = |gpu: &GpuSpec| v1::GpuSpec {
        index: gpu.index,
        uuid: gpu.uuid.clone(),
        model: gpu.model.clone(),
        memory_bytes: gpu.memory_bytes,
    };
    v1::WorkerSpec {
        address: spec.address.clone(),
        labels: labels(&spec.labels),
        ranges: spec.ranges.iter().map(range).collect(),
        reserved: spec.reserved.iter().map(|port| port.get().into()).collect(),
        gpus: spec.gpus.iter().map(gpu).collect(),
        identity: spec.identity.as_ref().map(|identity| v1::Identity {
            machine_id: identity.machine_id.clone(),
            boot_id: identity.boot_id.clone(),
            namespace: identity.namespace,
        }),
    }
}

/// Takes what it shows of the quarantine off `shown`.
fn range_use(pool: &Pool, shown: &mut usize) -> v1::RangeUse {
    let quarantined: Vec<_> = pool
        .quarantines()
        .take(*shown)
        .map(|(number, quarantine)| v1::QuarantinedPort {
            number: number.into(),
            reason: quarantine.reason.clone(),
            since: quarantine.since.0,
            source: match quarantine.source {
                Source::Operator => v1::QuarantineSource::Operator,
                Source::Conflict => v1::QuarantineSource::Conflict,
                Source::Observed => v1::QuarantineSource::Observed,
            }
            .into(),
        })
        .collect();
    *shown -= quarantined.len();
    v1::RangeUse {
        name: pool.name.to_string(),
        first: pool.first().into(),
        last: pool.last().into(),
        managed: pool.managed_count(),
        free: pool.free_count(),
        held: pool.held_count(),
        reserved: pool.reserved_count(),
        quarantined,
        quarantined_count: pool.quarantined_count(),
    }
}

fn gpu_use(gpu: &crate::core::Gpu) -> v1::GpuUse {
    let exclusive = gpu.holders().any(|(_, share)| share == GpuShare::Exclusive);
    v1::GpuUse {
        index: gpu.index,
        memory_bytes: gpu.memory_bytes,
        held_bytes: gpu.memory_bytes - gpu.free_bytes(),
        holders: gpu.holders().take(HOLDERS_SHOWN_MAX).map(|(name, _)| name.to_string()).collect(),
        exclusive,
        holder_count: gpu.holders().count() as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_without_a_port() {
        for good in ["10.0.0.1", "::1", "fd00::7", "h", "node-1.rack_2.example.com", "n1.local."] {
            assert_eq!(check_host("address", good), Ok(()), "{good}");
        }
        for bad in
            [" ", "a b", "http://a", "10.0.0.999", "a:1", "[::1]", "1.2.3", "a..b", ".", "a/b"]
        {
            let error = check_host("address", bad).expect_err(bad).to_string();
            assert!(error.contains("address") && error.contains("without a port"), "{error}");
        }
    }
}
