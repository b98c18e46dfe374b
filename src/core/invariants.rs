//! What must always hold (the list heads [`super`]), checked from scratch. O(table).

use std::collections::{BTreeMap, BTreeSet};

use imbl::{OrdMap, OrdSet};

use super::allocation::{
    Allocation, ChangeKind, Departure, LastChange, Lease, Phase, ReleaseReason,
};
use super::claim::{GpuChoice, GpuRequest, GpuShare, Ports};
use super::limits::{DEPARTURES_MAX, LEASE_ALLOCATIONS_MAX, SWAPS_MAX};
use super::name::{InstanceName, LeaseId, Millis, Revision, WorkerName};
use super::ports::Taken;
use super::state::{FEATURE_LEVEL, Indexes, Resource, State, scopes, uuids};
use super::worker::{Worker, WorkerPhase};

/// Half of what fits: a counter that goes on from a state that was read does not overflow.
pub(super) const COUNTER_MAX: u64 = u64::MAX / 2;

/// Checks every invariant; the error names the first that does not hold.
pub fn check_invariants(state: &State) -> Result<(), String> {
    let level = state.feature_level;
    if !(1..=FEATURE_LEVEL).contains(&level) {
        return Err(format!("feature level {level} is none of 1 to {FEATURE_LEVEL}"));
    }
    if state.revision.0 > COUNTER_MAX {
        return Err(format!("revision {} leaves no room for what is to come", state.revision));
    }
    state.workers.iter().try_for_each(|(name, worker)| check_worker(state, name, worker))?;
    state.allocations.iter().try_for_each(|(name, held)| check_allocation(state, name, held))?;
    state.leases.iter().try_for_each(|(id, lease)| check_lease(state, *id, lease))?;
    state.departures.iter().try_for_each(|(name, gone)| check_departure(state, name, gone))?;
    if state.departures.len() > DEPARTURES_MAX {
        return Err("too many departures are remembered".into());
    }
    check_indexes(state)
}

fn check_worker(state: &State, name: &WorkerName, worker: &Worker) -> Result<(), String> {
    let fail = |what: String| Err(format!("worker {name}: {what}"));
    if *name != worker.name {
        return fail(format!("is filed under another name than {}", worker.name));
    }
    if worker.version > state.revision
        || worker.created > worker.version
        || worker.booted > worker.version
    {
        return fail("its revisions run ahead".into());
    }
    let away = matches!(worker.phase, WorkerPhase::Lost | WorkerPhase::Unverified);
    if !away && worker.phase != worker.phase_before {
        return fail("it is neither lost nor unverified, and has a phase to go back to".into());
    }
    if matches!(worker.phase_before, WorkerPhase::Lost | WorkerPhase::Unverified) {
        return fail("the phase to go back to is none that an operator sets".into());
    }
    if worker.has_agent() != (worker.booted.0 > 0) {
        return fail("its agent and its boot disagree".into());
    }
    worker.spec.validate().map_err(|e| format!("worker {name}: {e}"))?;
    if worker.pools.len() != worker.spec.ranges.len() || worker.gpus.len() != worker.spec.gpus.len()
    {
        return fail("its pools or GPUs are not those of its spec".into());
    }
    let mut port_holders = BTreeSet::new();
    for (pool, range) in worker.pools.iter().zip(&worker.spec.ranges) {
        pool.check().map_err(|what| format!("worker {name}: {what}"))?;
        if pool.quarantines().any(|(_, quarantine)| quarantine.since > worker.version) {
            return fail("a quarantine is from the future".into());
        }
        let bounds = (range.first.get(), range.last.get());
        if pool.name != range.name || (pool.first(), pool.last()) != bounds {
            return fail(format!("range {} is not as its spec", range.name));
        }
        let bounds = range.first..=range.last;
        let mut reserved = worker.spec.reserved.range(bounds.clone());
        if reserved.any(|port| pool.taken(port.get()) != Some(Taken::Reserved))
            || pool.reserved_count() as usize != worker.spec.reserved.range(bounds).count()
        {
            return fail(format!("range {}: its reserved ports are not its spec's", range.name));
        }
        for (number, holder) in pool.holders() {
            port_holders.insert((number, holder.clone()));
        }
    }
    let mut gpu_holders = BTreeSet::new();
    for (gpu, spec) in worker.gpus.iter().zip(&worker.spec.gpus) {
        if gpu.index != spec.index || gpu.memory_bytes != spec.memory_bytes {
            return fail(format!("GPU {} is not as its spec", gpu.index));
        }
        let sum: u128 = gpu.holders().map(|(_, share)| u128::from(gpu.bytes_of(share))).sum();
        if sum != u128::from(gpu.held_bytes) || sum > u128::from(gpu.memory_bytes) {
            return fail(format!(
                "GPU {}: {sum} bytes are held, {} are counted, {} are usable",
                gpu.index, gpu.held_bytes, gpu.memory_bytes
            ));
        }
        let exclusive = gpu.holders().any(|(_, share)| share == GpuShare::Exclusive);
        if exclusive && gpu.holders().count() > 1 {
            return fail(format!("GPU {}: an exclusive holder is not alone", gpu.index));
        }
        gpu_holders.extend(gpu.holders().map(|(holder, share)| {
            (gpu.index, holder.clone(), gpu.bytes_of(share), share == GpuShare::Exclusive)
        }));
    }
    // What its allocations say they hold is what its ports and GPUs say is held.
    let mut ports = BTreeSet::new();
    let mut gpus = BTreeSet::new();
    for holder in worker.allocations.keys() {
        let Some(held) = state.allocations.get(holder) else {
            return fail(format!("lists {holder}, which does not exist"));
        };
        if held.worker != *name {
            return fail(format!("lists {holder}, which is on {}", held.worker));
        }
        for port in &held.ports {
            let in_range = worker.pool_of(port.number).is_some_and(|p| p.name == port.range);
            if !in_range || !ports.insert((port.number, holder.clone())) {
                return fail(format!("{holder}: port {} is misplaced", port.number));
            }
        }
        for gpu in &held.gpus {
            let spec = worker.spec.gpus.iter().find(|s| s.index == gpu.index);
            if spec.is_none_or(|s| s.uuid != gpu.uuid) {
                return fail(format!("{holder}: GPU {} is another one", gpu.index));
            }
            gpus.insert((gpu.index, holder.clone(), gpu.memory_bytes, gpu.exclusive));
        }
    }
    if ports != port_holders {
        return fail("its ports and its allocations disagree about who holds what".into());
    }
    if gpus != gpu_holders {
        return fail("its GPUs and its allocations disagree about who holds what".into());
    }
    Ok(())
}

fn check_allocation(state: &State, name: &InstanceName, held: &Allocation) -> Result<(), String> {
    let fail = |what: &str| Err(format!("allocation {name}: {what}"));
    if name != held.name() {
        return fail("is filed under another name");
    }
    let Some(worker) = state.workers.get(&held.worker) else {
        return fail("its worker does not exist");
    };
    if !worker.allocations.contains_key(name) {
        return fail("its worker does not list it");
    }
    let granted = Revision(held.token.0);
    if granted <= worker.created || granted > held.version || held.version > state.revision {
        return fail("its revisions run ahead");
    }
    let follows = match &held.last_change {
        None => held.version == granted,
        Some(LastChange { kind: ChangeKind::Lingered { .. }, .. })
            if held.phase != Phase::Lingering =>
        {
            false
        }
        Some(LastChange { from, .. }) => granted <= *from && *from < held.version,
    };
    if !follows {
        return fail("its last change is not what led to its version");
    }
    held.claim.validate().map_err(|e| format!("allocation {name}: {e}"))?;
    Millis::span("confirm_within", held.confirm_within.0)
        .map_err(|e| format!("allocation {name}: {e}"))?;
    if !answers(held) {
        return fail("does not hold what it asked for");
    }
    let phase_agrees = match held.phase {
        Phase::Reserved => !held.confirmed && held.reason.is_none(),
        Phase::Bound => held.confirmed && held.reason.is_none(),
        Phase::Lingering => held.reason.is_some() && held.lease.is_none() && worker.has_agent(),
    };
    if !phase_agrees {
        return fail("its phase, confirmation, lease and reason disagree");
    }
    if let Some(liveness) = &held.liveness {
        liveness.validate().map_err(|e| format!("allocation {name}: {e}"))?;
        if !held.confirmed {
            return fail("nobody confirmed it, and it has a liveness handle");
        }
    }
    let lease = held.lease.map(|id| state.leases.get(&id));
    if !lease.is_none_or(|lease| lease.is_some_and(|l| l.allocations.contains_key(name))) {
        return fail("its lease does not exist or does not list it");
    }
    if state.departures.contains_key(name) {
        return fail("is held, and remembered as gone");
    }
    Ok(())
}

fn check_lease(state: &State, id: LeaseId, lease: &Lease) -> Result<(), String> {
    let fail = |what: &str| Err(format!("lease {id}: {what}"));
    if lease.id != id || !(1..=state.revision.0).contains(&id.0) {
        return fail("its id is another one, or from the future");
    }
    Millis::span("ttl", lease.ttl.0).map_err(|e| format!("lease {id}: {e}"))?;
    let is_on_it = |name| state.allocations.get(name).is_some_and(|a| a.lease == Some(id));
    if !lease.allocations.keys().all(is_on_it) {
        return fail("lists what is not on it");
    }
    if lease.allocations.len() > LEASE_ALLOCATIONS_MAX {
        return fail("has too many allocations");
    }
    Ok(())
}

fn check_departure(state: &State, name: &InstanceName, gone: &Departure) -> Result<(), String> {
    let Departure { revision, at: _, worker: _, token, why } = gone;
    if *revision > state.revision || token.0 > revision.0 || token.0 == 0 {
        return Err(format!("the departure of {name}: its revisions run ahead"));
    }
    if *why == ReleaseReason::ByHolder {
        return Err(format!("the departure of {name}: its holder's word is not remembered"));
    }
    Ok(())
}

/// Does an allocation hold exactly what its claim asks for, in the claim's order?
fn answers(held: &Allocation) -> bool {
    let mut ports = &*held.ports;
    for (i, asked) in held.claim.ports.iter().enumerate() {
        let count = asked.ports.count() as usize;
        let Some((given, rest)) = ports.split_at_checked(count) else { return false };
        ports = rest;
        let in_place = given.iter().all(|p| {
            usize::from(p.request) == i
                && asked.range.as_ref().is_none_or(|range| *range == p.range)
        });
        let as_asked = match asked.ports {
            Ports::Count(_) => true,
            Ports::Specific(port) => given[0].number == port.get(),
            Ports::Contiguous(_) => {
                given.windows(2).all(|w| u32::from(w[0].number) + 1 == u32::from(w[1].number))
            }
        };
        if !in_place || !as_asked {
            return false;
        }
    }
    let gpus_as_asked = match held.claim.gpus.as_deref() {
        None => held.gpus.is_empty(),
        Some(GpuRequest { which, share }) => {
            let chosen = held.gpus.iter().map(|g| g.index);
            let which_fits = match which {
                GpuChoice::Count(count) => chosen.len() == *count as usize,
                GpuChoice::Indexes(indexes) => chosen.eq(indexes.iter().copied()),
            };
            which_fits
                && held.gpus.iter().all(|gpu| match share {
                    GpuShare::Exclusive => gpu.exclusive,
                    GpuShare::MemoryBytes(bytes) => !gpu.exclusive && gpu.memory_bytes == *bytes,
                })
        }
    };
    ports.is_empty() && gpus_as_asked && held.swaps <= SWAPS_MAX
}

/// Every index is the inverse of its map: built anew, it is the same, once it is settled.
fn check_indexes(state: &State) -> Result<(), String> {
    let mut state = state.clone();
    state.settle();
    let mut by_free: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    let mut gpu_owner = BTreeMap::new();
    let mut identity_owner = BTreeMap::new();
    let mut not_ready = 0;
    for (name, worker) in &state.workers {
        not_ready += u64::from(worker.phase != WorkerPhase::Ready);
        for resource in [Resource::Ports, Resource::GpuBytes, Resource::IdleGpus] {
            if let Some(free) = resource.free_on(worker) {
                for scope in scopes(worker) {
                    by_free.entry((scope, resource)).or_default().insert((free, name.clone()));
                }
            }
        }
        for uuid in uuids(&worker.spec) {
            if gpu_owner.insert(uuid.clone(), name.clone()).is_some() {
                return Err(format!("GPU {uuid} belongs to {name} and to another worker"));
            }
        }
        if let Some(identity) = &worker.spec.identity
            && identity_owner.insert(identity.clone(), name.clone()).is_some()
        {
            return Err(format!("the namespace of {name} belongs to another worker too"));
        }
    }
    let in_phase = |phase| {
        let held = state.allocations.iter().filter(move |(_, held)| held.phase == phase);
        held.map(|(name, _)| name.clone()).collect()
    };
    let anew = Indexes {
        reserved: in_phase(Phase::Reserved),
        lingering: in_phase(Phase::Lingering),
        departed: state.departures.iter().map(|(n, d)| (d.revision, n.clone())).collect(),
        by_free: by_free.into_iter().map(|(k, set)| (k, OrdSet::from_iter(set))).collect(),
        gpu_owner: gpu_owner.into_iter().collect(),
        identity_owner: identity_owner.into_iter().collect(),
        not_ready,
        stale: OrdMap::new(),
        stale_scopes: 0,
        moved_at_once: 0,
    };
    if anew != state.indexes {
        return Err("the indexes are not the inverse of the maps".into());
    }
    Ok(())
}
