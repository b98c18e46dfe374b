//! The table itself: who holds what, and the indexes that keep every request cheap.

use std::collections::BTreeSet;
use std::sync::Arc;

use imbl::{OrdMap, OrdSet};

use super::allocation::{Allocation, Departure, Lease, Phase};
use super::claim::GpuShare;
use super::limits::DEPARTURES_MAX;
use super::name::{InstanceName, LabelKey, LabelValue, LeaseId, Millis, Revision, WorkerName};
use super::ports::Pool;
use super::worker::{Identity, Specs, Worker, WorkerPhase, WorkerSpec};

/// The feature level that this build writes and the highest that it understands.
pub const FEATURE_LEVEL: u32 = 1;

/// Everything the cluster agrees on. A clone is O(1) and independent of the original.
#[derive(Debug, Clone)]
pub struct State {
    /// Selects the rules of `apply`; raised by command, so that all replicas change them together.
    pub feature_level: u32,
    /// Revision of the last change.
    pub revision: Revision,
    pub(super) workers: OrdMap<WorkerName, Arc<Worker>>,
    pub(super) allocations: OrdMap<InstanceName, Arc<Allocation>>,
    pub(super) leases: OrdMap<LeaseId, Arc<Lease>>,
    /// How names left, other than by their holders' word: the newest [`DEPARTURES_MAX`] of those
    /// that are not held again.
    pub(super) departures: OrdMap<InstanceName, Departure>,
    /// Every node that was ever a member, with the incarnation that its id is bound to: an id is
    /// never used again. Empty while it is pending.
    pub(super) members: OrdMap<u64, String>,
    pub(super) indexes: Indexes,
}

/// All derived from the maps: a snapshot does not keep them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Indexes {
    /// Workers that are `Ready`, by scope and by what they have free; once it is [settled](State::settle).
    pub by_free: OrdMap<(Scope, Resource), OrdSet<(u64, WorkerName)>>,
    /// Workers that have more or less free by now than `by_free` says, and what it says. Who names its
    /// worker does not ask it, and a worker may change often before somebody does.
    pub stale: OrdMap<WorkerName, Free>,
    /// Scopes of those workers, each of which `by_free` is behind on.
    pub stale_scopes: usize,
    /// Changes since it was settled of workers that would have been too many.
    pub moved_at_once: usize,
    /// GPU UUIDs, where known.
    pub gpu_owner: OrdMap<String, WorkerName>,
    /// Network namespaces of workers with an agent. The boot is part of the key: after a reboot the
    /// numbers of namespaces begin anew.
    pub identity_owner: OrdMap<Identity, WorkerName>,
    /// Workers that are not `Ready`.
    pub not_ready: u64,
    /// Allocations that wait for a confirmation, and those that wait for evidence.
    pub reserved: OrdSet<InstanceName>,
    pub lingering: OrdSet<InstanceName>,
    /// Departures, oldest first.
    pub departed: OrdSet<(Revision, InstanceName)>,
}

/// Most scopes of workers that `by_free` may be behind on: the next who asks waits for that, or who comes when
/// it is [time](State::settle_now_and_then), one to three microseconds each.
pub(super) const STALE_SCOPES_MAX: usize = 8192;
/// Workers that are moved at once for each that is stale, until all are settled: where that was in vain, it
/// cost a quarter more.
const MOVED_AT_ONCE: usize = 4;

/// What a worker has free of each [`Resource`].
pub(super) type Free = [Option<u64>; 3];

/// Which workers an index speaks of.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scope {
    All,
    Label(LabelKey, LabelValue),
}

/// What a placement orders the workers by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Resource {
    /// Free ports over all ranges.
    Ports,
    /// Free bytes of the emptiest GPU. Only workers with GPUs.
    GpuBytes,
    /// GPUs that nobody holds. Only workers with GPUs.
    IdleGpus,
}

impl Default for State {
    fn default() -> Self {
        State {
            // Not the highest one: the nodes that begin a cluster need not all know that.
            feature_level: 1,
            revision: Revision(0),
            workers: OrdMap::new(),
            allocations: OrdMap::new(),
            leases: OrdMap::new(),
            departures: OrdMap::new(),
            members: OrdMap::new(),
            indexes: Indexes::default(),
        }
    }
}

/// Of what is agreed on: the indexes follow from it.
impl PartialEq for State {
    fn eq(&self, other: &State) -> bool {
        let State {
            feature_level,
            revision,
            workers,
            allocations,
            leases,
            departures,
            members,
            indexes: _,
        } = self;
        *feature_level == other.feature_level
            && *revision == other.revision
            && *workers == other.workers
            && *allocations == other.allocations
            && *leases == other.leases
            && *departures == other.departures
            && *members == other.members
    }
}

impl Eq for State {}

impl State {
    pub fn worker(&self, name: &WorkerName) -> Option<&Arc<Worker>> {
        self.workers.get(name)
    }

    /// As far as there are such workers.
    pub fn specs_of(&self, workers: &BTreeSet<&WorkerName>) -> Specs {
        let found = |name: &&WorkerName| {
            self.workers.get_key_value(*name).map(|(name, w)| (name.clone(), w.spec.clone()))
        };
        workers.iter().filter_map(found).collect()
    }

    pub fn allocation(&self, name: &InstanceName) -> Option<&Arc<Allocation>> {
        self.allocations.get(name)
    }

    /// Remembers a member of the cluster for ever. The incarnation that its id was bound to first
    /// stays. Comes with the memberships of the log, so that all replicas agree; it is no change of
    /// the table, and takes no revision.
    pub fn remember_member(&mut self, id: u64, incarnation: &str) {
        if self.members.get(&id).is_none_or(String::is_empty) {
            self.members.insert(id, incarnation.into());
        }
    }

    /// The incarnation that an id is or was bound to; empty while it is pending, `None` where it
    /// was never used.
    pub fn member_incarnation(&self, id: u64) -> Option<&str> {
        self.members.get(&id).map(String::as_str)
    }

    /// All ids that were ever used, in order, each with its incarnation.
    pub fn members(&self) -> impl Iterator<Item = (u64, &str)> {
        self.members.iter().map(|(id, incarnation)| (*id, incarnation.as_str()))
    }

    pub fn lease(&self, id: LeaseId) -> Option<&Arc<Lease>> {
        self.leases.get(&id)
    }

    pub fn lease_count(&self) -> usize {
        self.leases.len()
    }

    /// Leases in order of id, from after `after`.
    pub fn leases_after(&self, after: Option<LeaseId>) -> impl Iterator<Item = &Arc<Lease>> {
        self.leases.range(after_bounds(after.as_ref())).map(|(_, lease)| lease)
    }

    /// How a name that is not held left the table, if that is remembered.
    pub fn departure(&self, name: &InstanceName) -> Option<&Departure> {
        self.departures.get(name)
    }

    /// All that are remembered, oldest first.
    pub fn departures(&self) -> impl Iterator<Item = (&InstanceName, &Departure)> {
        let names = self.indexes.departed.iter().map(|(_, name)| name);
        names.filter_map(|name| self.departures.get_key_value(name))
    }

    /// Allocations that are `Reserved`, in order of name.
    pub fn reserved(&self) -> impl Iterator<Item = &Arc<Allocation>> {
        self.indexes.reserved.iter().filter_map(|name| self.allocations.get(name))
    }

    /// Allocations that are `Lingering`, in order of name.
    pub fn lingering(&self) -> impl Iterator<Item = &Arc<Allocation>> {
        self.indexes.lingering.iter().filter_map(|name| self.allocations.get(name))
    }

    pub fn phase_count(&self, phase: Phase) -> usize {
        let Indexes { reserved, lingering, .. } = &self.indexes;
        match phase {
            Phase::Reserved => reserved.len(),
            Phase::Lingering => lingering.len(),
            Phase::Bound => self.allocations.len() - reserved.len() - lingering.len(),
        }
    }

    pub fn worker_count(&self) -> usize {
        self.workers.len()
    }

    pub fn allocation_count(&self) -> usize {
        self.allocations.len()
    }

    /// Workers in order of name, from after `after`: a page starts in O(log n).
    pub fn workers_after(&self, after: Option<&WorkerName>) -> impl Iterator<Item = &Arc<Worker>> {
        self.workers.range(after_bounds(after)).map(|(_, worker)| worker)
    }

    /// Allocations in order of name, from after `after`.
    pub fn allocations_after(
        &self,
        after: Option<&InstanceName>,
    ) -> impl Iterator<Item = &Arc<Allocation>> {
        self.allocations.range(after_bounds(after)).map(|(_, allocation)| allocation)
    }

    /// Allocations whose names begin with `prefix`, in order of name, from after `after`.
    pub fn allocations_named(
        &self,
        prefix: &str,
        after: Option<&InstanceName>,
    ) -> impl Iterator<Item = &Arc<Allocation>> {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let start = match after {
            Some(after) if after.as_str() >= prefix => Excluded(after.as_str()),
            _ => Included(prefix),
        };
        self.allocations
            .range::<_, str>((start, Unbounded))
            .take_while(move |(name, _)| name.as_str().starts_with(prefix))
            .map(|(_, allocation)| allocation)
    }

    /// Allocations of one worker in order of name, from after `after`.
    pub fn allocations_on<'a>(
        &'a self,
        worker: &'a Worker,
        after: Option<&InstanceName>,
    ) -> impl Iterator<Item = &'a Arc<Allocation>> {
        let names = worker.allocations.range(after_bounds(after)).map(|(name, ())| name);
        names.filter_map(|name| self.allocations.get(name))
    }

    /// Puts a worker in the place of the one it had under this name, and keeps the indexes true.
    pub(super) fn put_worker(&mut self, worker: Worker) -> Arc<Worker> {
        let worker = Arc::new(worker);
        let old = self.workers.insert(worker.name.clone(), worker.clone());
        self.indexes.replace(old.as_deref(), Some(&worker));
        worker
    }

    /// Changes what a worker holds, where it lies: what is not shared with a view is not copied. `None`
    /// where there is none. Its spec and phase stay.
    pub(super) fn change_worker<T>(
        &mut self,
        name: &WorkerName,
        change: impl FnOnce(&mut Worker) -> T,
    ) -> Option<T> {
        let worker = Arc::make_mut(self.workers.get_mut(name)?);
        let before = free_on(worker);
        let result = change(worker);
        let after = free_on(worker);
        if after != before {
            self.indexes.changed(worker, before, after);
        }
        Some(result)
    }

    /// Settles where that is worth the while: what holds the places of those that are stale may never again
    /// be what `by_free` says.
    pub(super) fn settle_now_and_then(&mut self) {
        let Indexes { stale, moved_at_once, .. } = &self.indexes;
        if *moved_at_once > MOVED_AT_ONCE * stale.len() {
            self.settle();
        }
    }

    /// Brings `by_free` up to date.
    pub(super) fn settle(&mut self) {
        self.indexes.moved_at_once = 0;
        while let Some((name, _)) = self.indexes.stale.get_min() {
            let worker = self.workers.get(name);
            let Some(worker) = worker else { unreachable!("who leaves is forgotten") };
            self.indexes.replace_free(Some(worker), Some(worker));
        }
    }

    pub(super) fn drop_worker(&mut self, name: &WorkerName) {
        let old = self.workers.remove(name);
        self.indexes.replace(old.as_deref(), None);
    }

    /// Puts an allocation in the place of the one it had under this name, on its lease too.
    pub(super) fn put_allocation(&mut self, allocation: Allocation) -> Arc<Allocation> {
        let allocation = Arc::new(allocation);
        let old = self.allocations.insert(allocation.name().clone(), allocation.clone());
        self.follow(old.as_deref(), Some(&allocation));
        allocation
    }

    pub(super) fn drop_allocation(&mut self, name: &InstanceName) {
        let old = self.allocations.remove(name);
        self.follow(old.as_deref(), None);
    }

    /// Keeps the indexes of the allocations and the names on the leases true.
    fn follow(&mut self, old: Option<&Allocation>, new: Option<&Allocation>) {
        let Some(name) = new.or(old).map(Allocation::name) else { return };
        let is = |a: Option<&Allocation>, phase| a.is_some_and(|a| a.phase == phase);
        for (phase, set) in [
            (Phase::Reserved, &mut self.indexes.reserved),
            (Phase::Lingering, &mut self.indexes.lingering),
        ] {
            match (is(old, phase), is(new, phase)) {
                (false, true) => drop(set.insert(name.clone())),
                (true, false) => drop(set.remove(name)),
                _ => {}
            }
        }
        let (before, after) = (old.and_then(|a| a.lease), new.and_then(|a| a.lease));
        if before == after {
            return;
        }
        let mut names_on = |id: Option<LeaseId>, change: &dyn Fn(&mut OrdMap<InstanceName, ()>)| {
            if let Some(lease) = id.and_then(|id| self.leases.get_mut(&id)) {
                change(&mut Arc::make_mut(lease).allocations);
            }
        };
        names_on(before, &|names| {
            names.remove(name);
        });
        names_on(after, &|names| {
            names.insert(name.clone(), ());
        });
    }

    /// Remembers how a name left, and forgets the oldest of too many.
    pub(super) fn remember_departure(&mut self, name: InstanceName, departure: Departure) {
        self.forget_departure(&name);
        self.indexes.departed.insert((departure.revision, name.clone()));
        self.departures.insert(name, departure);
        if self.departures.len() > DEPARTURES_MAX
            && let Some((_, oldest)) = self.indexes.departed.get_min().cloned()
        {
            self.forget_departure(&oldest);
        }
    }

    /// The name is held again.
    pub(super) fn forget_departure(&mut self, name: &InstanceName) {
        if let Some(departure) = self.departures.remove(name) {
            self.indexes.departed.remove(&(departure.revision, name.clone()));
        }
    }
}

/// A state that is being read back: workers and leases first, then allocations, which take their
/// places again. Workers are indexed once they have. What the records say is checked, so that a
/// damaged snapshot is refused and not served.
#[derive(Debug, Default)]
pub struct Restore {
    state: State,
}

impl Restore {
    pub fn new(feature_level: u32, revision: Revision) -> Self {
        Restore { state: State { feature_level, revision, ..State::default() } }
    }

    /// `pools` have their cursors, queues and quarantines, and no holders yet. That spec and pools are as
    /// they should is for [`Restore::finish`] to see.
    pub fn worker(
        &mut self,
        name: WorkerName,
        spec: WorkerSpec,
        (phase, phase_before): (WorkerPhase, WorkerPhase),
        pools: Vec<Pool>,
        [created, version, booted]: [Revision; 3],
    ) -> Result<(), String> {
        if self.state.worker(&name).is_some() {
            return Err(format!("worker {name} is recorded twice"));
        }
        let new = Worker::with_pools(name, spec, pools.into(), created);
        let worker = Worker { phase, phase_before, version, booted, ..new };
        self.state.workers.insert(worker.name.clone(), Arc::new(worker));
        Ok(())
    }

    pub fn allocation(&mut self, allocation: Allocation) -> Result<(), String> {
        let name = allocation.name().clone();
        let fail = |what: &str| Err(format!("allocation {name}: {what}"));
        if self.state.allocation(&name).is_some() {
            return fail("is recorded twice");
        }
        if allocation.lease.is_some_and(|lease| self.state.lease(lease).is_none()) {
            return fail("its lease does not exist");
        }
        let Some(worker) = self.state.workers.get_mut(&allocation.worker) else {
            return fail("its worker does not exist");
        };
        if let Err(what) = take_again(Arc::make_mut(worker), &allocation) {
            return fail(&what);
        }
        self.state.put_allocation(allocation);
        Ok(())
    }

    /// Without the allocations on it, which name it themselves.
    pub fn lease(&mut self, id: LeaseId, ttl: Millis) -> Result<(), String> {
        let lease = Lease { id, ttl, allocations: OrdMap::new() };
        match self.state.leases.insert(id, Arc::new(lease)) {
            None => Ok(()),
            Some(_) => Err(format!("lease {id} is recorded twice")),
        }
    }

    /// From the oldest on.
    pub fn departure(&mut self, name: InstanceName, departure: Departure) -> Result<(), String> {
        let newest = self.state.indexes.departed.get_max().map(|(revision, _)| *revision);
        if newest.is_some_and(|newest| departure.revision < newest)
            || self.state.departures.contains_key(&name)
        {
            return Err(format!("the departure of {name} is out of order"));
        }
        if self.state.departures.len() == DEPARTURES_MAX {
            return Err("too many departures are recorded".into());
        }
        self.state.remember_departure(name, departure);
        Ok(())
    }

    pub fn member(&mut self, id: u64, incarnation: &str) {
        self.state.remember_member(id, incarnation);
    }

    /// The state, if every invariant holds.
    pub fn finish(mut self) -> Result<State, String> {
        let State { workers, indexes, .. } = &mut self.state;
        workers.values().for_each(|worker| indexes.replace(None, Some(worker)));
        super::check_invariants(&self.state)?;
        Ok(self.state)
    }
}

/// An allocation that is read back takes its places.
fn take_again(worker: &mut Worker, allocation: &Allocation) -> Result<(), String> {
    let name = allocation.name();
    for port in &allocation.ports {
        let pool = worker.pools.iter_mut().find(|p| p.name == port.range);
        if !pool.is_some_and(|p| p.take(port.number, name)) {
            return Err(format!("port {} cannot be held", port.number));
        }
    }
    for held in &allocation.gpus {
        let share = match held.exclusive {
            true => GpuShare::Exclusive,
            false => GpuShare::MemoryBytes(held.memory_bytes),
        };
        match worker.gpus.iter_mut().find(|g| g.index == held.index) {
            Some(gpu) if gpu.fits(share) && !gpu.holders.contains_key(name) => {
                gpu.take(name, share);
            }
            _ => return Err(format!("GPU {} cannot be held", held.index)),
        }
    }
    worker.allocations.insert(name.clone(), ());
    Ok(())
}

fn after_bounds<K: Clone>(after: Option<&K>) -> (std::ops::Bound<K>, std::ops::Bound<K>) {
    use std::ops::Bound::{Excluded, Unbounded};
    (after.map_or(Unbounded, |name| Excluded(name.clone())), Unbounded)
}

impl Indexes {
    /// Takes out what `old` put in, and puts in `new`; touches only what differs.
    fn replace(&mut self, old: Option<&Worker>, new: Option<&Worker>) {
        let unready =
            |w: Option<&Worker>| u64::from(w.is_some_and(|w| w.phase != WorkerPhase::Ready));
        self.not_ready = self.not_ready + unready(new) - unready(old);

        self.replace_free(old, new);
        if same_spec(old, new) {
            return;
        }
        if let Some(old) = old {
            for uuid in uuids(&old.spec) {
                self.gpu_owner.remove(uuid);
            }
            if let Some(identity) = &old.spec.identity {
                self.identity_owner.remove(identity);
            }
        }
        if let Some(new) = new {
            for uuid in uuids(&new.spec) {
                self.gpu_owner.insert(uuid.clone(), new.name.clone());
            }
            if let Some(identity) = &new.spec.identity {
                self.identity_owner.insert(identity.clone(), new.name.clone());
            }
        }
    }

    /// A worker has more or less free than before.
    fn changed(&mut self, worker: &Worker, before: Free, after: Free) {
        if let Some(indexed) = self.stale.get(&worker.name) {
            if *indexed == after {
                self.stale.remove(&worker.name);
                self.stale_scopes -= scope_count(worker);
            }
            return;
        }
        let scopes = self.stale_scopes + scope_count(worker);
        if scopes > STALE_SCOPES_MAX {
            self.moved_at_once += 1;
            return self.move_free(Some((worker, before)), Some((worker, after)));
        }
        self.stale.insert(worker.name.clone(), before);
        self.stale_scopes = scopes;
    }

    /// The same for what they have free. What `old` put in may be less than it has, or more.
    fn replace_free(&mut self, old: Option<&Worker>, new: Option<&Worker>) {
        let mut put_in = |worker: &Worker| match self.stale.remove(&worker.name) {
            Some(free) => {
                self.stale_scopes -= scope_count(worker);
                free
            }
            None => free_on(worker),
        };
        let old = old.map(|worker| (worker, put_in(worker)));
        self.move_free(old, new.map(|worker| (worker, free_on(worker))));
    }

    fn move_free(&mut self, old: Option<(&Worker, Free)>, new: Option<(&Worker, Free)>) {
        let same_scopes = same_spec(old.map(|side| side.0), new.map(|side| side.0));
        for (i, resource) in Resource::ALL.into_iter().enumerate() {
            let in_place = |side: Option<(&Worker, Free)>| side.and_then(|(_, free)| free[i]);
            if same_scopes && in_place(old) == in_place(new) {
                continue;
            }
            if let (Some((worker, _)), Some(free)) = (old, in_place(old)) {
                for scope in scopes(worker) {
                    self.remove_free((scope, resource), &(free, worker.name.clone()));
                }
            }
            if let (Some((worker, _)), Some(free)) = (new, in_place(new)) {
                for scope in scopes(worker) {
                    let set = self.by_free.entry((scope, resource)).or_default();
                    set.insert((free, worker.name.clone()));
                }
            }
        }
    }

    fn remove_free(&mut self, key: (Scope, Resource), entry: &(u64, WorkerName)) {
        let emptied = self.by_free.get_mut(&key).is_some_and(|set| {
            set.remove(entry);
            set.is_empty()
        });
        if emptied {
            self.by_free.remove(&key);
        }
    }
}

impl Resource {
    pub const ALL: [Resource; 3] = [Resource::Ports, Resource::GpuBytes, Resource::IdleGpus];

    /// How much of this a worker has to offer; `None` where it offers nothing of the kind.
    pub fn free_on(self, worker: &Worker) -> Option<u64> {
        if worker.phase != WorkerPhase::Ready {
            return None;
        }
        match self {
            Resource::Ports => Some(worker.free_ports()),
            Resource::GpuBytes if worker.gpus.is_empty() => None,
            Resource::GpuBytes => Some(worker.most_free_gpu_bytes()),
            Resource::IdleGpus if worker.gpus.is_empty() => None,
            Resource::IdleGpus => Some(worker.idle_gpus()),
        }
    }
}

fn free_on(worker: &Worker) -> Free {
    Resource::ALL.map(|resource| resource.free_on(worker))
}

pub(super) fn scopes(worker: &Worker) -> impl Iterator<Item = Scope> + '_ {
    let labels = worker.spec.labels.iter();
    std::iter::once(Scope::All).chain(labels.map(|(k, v)| Scope::Label(k.clone(), v.clone())))
}

fn same_spec(old: Option<&Worker>, new: Option<&Worker>) -> bool {
    old.zip(new).is_some_and(|(old, new)| Arc::ptr_eq(&old.spec, &new.spec))
}

fn scope_count(worker: &Worker) -> usize {
    1 + worker.spec.labels.len()
}

pub(super) fn uuids(spec: &WorkerSpec) -> impl Iterator<Item = &String> {
    spec.gpus.iter().map(|gpu| &gpu.uuid).filter(|uuid| !uuid.is_empty())
}
