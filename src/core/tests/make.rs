//! Short ways to write commands, for tests. Also part of the integration test `core`.

use super::*;

pub const GIB: u64 = 1 << 30;

/// Who leads, unless a test says otherwise.
pub const LEADER: Leader = Leader { term: 1, node: 1 };
/// Who led before.
pub const DEPOSED: Leader = Leader { term: 0, node: 2 };
/// The entry that a command comes in.
pub const ORIGIN: Origin = Origin { leader: LEADER, at: Millis(1_700_000_000_000) };
/// The confirm deadline of claims that do not say one.
pub const WITHIN: Millis = Millis(600_000);

pub fn instance(name: &str) -> InstanceName {
    InstanceName::parse(name).unwrap()
}

pub fn worker(name: &str) -> WorkerName {
    WorkerName::parse(name).unwrap()
}

pub fn range(name: &str) -> RangeName {
    RangeName::parse(name).unwrap()
}

pub fn port(number: u16) -> Port {
    Port::new("port", number.into()).unwrap()
}

pub fn ports(numbers: &[u16]) -> Vec<Port> {
    numbers.iter().map(|n| port(*n)).collect()
}

pub fn labels(pairs: &[(&str, &str)]) -> Labels {
    let parse =
        |(k, v): &(&str, &str)| (LabelKey::parse(k).unwrap(), LabelValue::parse(v).unwrap());
    pairs.iter().map(parse).collect()
}

pub fn ranges(spans: &[(&str, u16, u16)]) -> Vec<RangeSpec> {
    let spec = |(name, first, last): &(&str, u16, u16)| RangeSpec {
        name: range(name),
        first: port(*first),
        last: port(*last),
    };
    spans.iter().map(spec).collect()
}

/// A worker with these ranges and GPUs of so many GiB, indexed from 0, their UUIDs unknown.
pub fn spec(spans: &[(&str, u16, u16)], gpus_gib: &[u64]) -> WorkerSpec {
    let gpu = |(index, gib): (usize, &u64)| GpuSpec {
        index: index as u32,
        uuid: String::new(),
        model: "RTX4090".into(),
        memory_bytes: gib * GIB,
    };
    WorkerSpec {
        address: "10.0.0.1".into(),
        labels: Labels::new(),
        ranges: ranges(spans),
        reserved: Default::default(),
        gpus: gpus_gib.iter().enumerate().map(gpu).collect(),
        identity: None,
    }
}

/// Namespace 7 of machine `m`, under this boot.
pub fn booted(boot: &str) -> Identity {
    Identity { machine_id: "m".into(), boot_id: boot.into(), namespace: 7 }
}

pub fn register(name: &str, spec: WorkerSpec) -> Command {
    Command::RegisterWorker { name: worker(name), spec }
}

pub fn update(name: &str, patch: WorkerPatch) -> Command {
    Command::UpdateWorker { name: worker(name), patch }
}

/// What an agent says when it begins.
pub fn reboot(name: &str, identity: Identity) -> Command {
    update(name, WorkerPatch { identity: Some(identity), ..WorkerPatch::default() })
}

/// An operator's word.
pub fn phase(name: &str, phase: WorkerPhase) -> Command {
    Command::SetWorkerPhase { name: worker(name), phase, by: Actor::Operator }
}

pub fn lose(name: &str) -> Command {
    let (phase, by) = (WorkerPhase::Lost, Actor::Leader(LEADER));
    Command::SetWorkerPhase { name: worker(name), phase, by }
}

/// It reports again.
pub fn find(name: &str) -> Command {
    let (phase, by) = (WorkerPhase::Ready, Actor::Leader(LEADER));
    Command::SetWorkerPhase { name: worker(name), phase, by }
}

pub fn verify(name: &str) -> Command {
    Command::VerifyWorker { name: worker(name), by: Actor::Operator }
}

pub fn remove(name: &str) -> Command {
    Command::RemoveWorker { name: worker(name), force: None }
}

/// Removes a worker with all that it holds.
pub fn evict(name: &str, reason: &str) -> Command {
    Command::RemoveWorker { name: worker(name), force: Some(reason.into()) }
}

/// Changes a command in place: `with(spec(…), |s| s.address = …)`.
pub fn with<T>(mut value: T, change: impl FnOnce(&mut T)) -> T {
    change(&mut value);
    value
}

/// A claim under uid `u1` that asks for nothing yet.
pub fn claim(name: &str, worker_name: &str) -> Claim {
    Claim {
        name: instance(name),
        uid: Uid::parse("u1").unwrap(),
        placement: Placement::Worker(worker(worker_name)),
        ports: Vec::new(),
        gpus: None,
        lease: None,
        confirm_within: None,
        bound: false,
        labels: Labels::new(),
    }
}

/// What may be asked of a claim, in the order in which it is written.
pub trait Ask: Sized {
    fn uid(self, uid: &str) -> Self;
    fn select(self, selector: &str, policy: Policy) -> Self;
    fn ask(self, range: Option<&str>, ports: Ports) -> Self;
    fn count(self, n: u32) -> Self {
        self.ask(None, Ports::Count(n))
    }
    fn specific(self, number: u16) -> Self {
        self.ask(None, Ports::Specific(port(number)))
    }
    fn band(self, n: u32) -> Self {
        self.ask(None, Ports::Contiguous(n))
    }
    fn gpus(self, which: GpuChoice, share: GpuShare) -> Self;
    fn on(self, lease: LeaseId) -> Self;
    fn gpu_gib(self, n: u32, gib: u64) -> Self {
        self.gpus(GpuChoice::Count(n), GpuShare::MemoryBytes(gib * GIB))
    }
    fn gpus_alone(self, n: u32) -> Self {
        self.gpus(GpuChoice::Count(n), GpuShare::Exclusive)
    }
}

impl Ask for Claim {
    fn uid(mut self, uid: &str) -> Self {
        self.uid = Uid::parse(uid).unwrap();
        self
    }

    fn select(mut self, selector: &str, policy: Policy) -> Self {
        self.placement = Placement::Select { selector: Selector::parse(selector).unwrap(), policy };
        self
    }

    fn ask(mut self, name: Option<&str>, ports: Ports) -> Self {
        self.ports.push(PortRequest { name: None, range: name.map(range), ports });
        self
    }

    fn gpus(mut self, which: GpuChoice, share: GpuShare) -> Self {
        self.gpus = Some(Box::new(GpuRequest { which, share }));
        self
    }

    fn on(mut self, lease: LeaseId) -> Self {
        self.lease = Some(lease);
        self
    }
}

pub fn allocate(claims: &[Claim]) -> Command {
    Command::allocate(claims.to_vec(), WITHIN)
}

pub fn confirm(name: &str, token: Token, version: u64) -> Command {
    confirm_with(name, token, version, None, None)
}

pub fn confirm_with(
    name: &str,
    token: Token,
    version: u64,
    liveness: Option<Liveness>,
    lease: Option<LeaseId>,
) -> Command {
    Command::Confirm { name: instance(name), token, version: Revision(version), liveness, lease }
}

/// A process of this boot.
pub fn process(boot: &str, pid: u32) -> Option<Liveness> {
    let handle = Handle::Process { pid, start_ticks: 100 };
    Some(Liveness { boot_id: boot.into(), handle })
}

pub fn attach(name: &str, token: Token, version: u64, lease: Option<LeaseId>) -> Command {
    Command::Attach { name: instance(name), token, version: Revision(version), lease }
}

/// The leader takes back what it judged.
pub fn reclaim(held: &Allocation, ground: Ground) -> Command {
    let (name, token, version) = (held.name().clone(), held.token, held.version);
    Command::Reclaim { name, token, version, ground, under: LEADER }
}

/// The confirm deadline has passed.
pub fn miss(held: &Allocation) -> Command {
    reclaim(held, Ground::Unconfirmed)
}

/// The agent of this identity saw as of this revision that it is gone.
pub fn gone(identity: Identity, seen: Revision) -> Ground {
    Ground::Gone { identity, seen, reason: "its ports are closed".into() }
}

pub fn grant_lease(ttl_ms: u64) -> Command {
    Command::GrantLease { ttl: Millis(ttl_ms) }
}

pub fn revoke(id: LeaseId) -> Command {
    Command::RevokeLease { id }
}

pub fn expire(id: LeaseId) -> Command {
    Command::ExpireLease { id, under: LEADER }
}

pub fn release(name: &str, token: Token) -> Command {
    Command::Release { name: instance(name), authority: Authority::Holder(token) }
}

pub fn force(name: &str, reason: &str) -> Command {
    let authority = Authority::Operator { reason: reason.into() };
    Command::Release { name: instance(name), authority }
}

pub fn report(name: &str, token: Token, version: u64, number: u16) -> Command {
    let (name, version) = (instance(name), Revision(version));
    Command::ReportConflict { name, token, version, port: port(number) }
}

/// An operator's.
pub fn quarantine(name: &str, numbers: &[u16]) -> Command {
    let (reason, by) = ("sshd".into(), Actor::Operator);
    Command::Quarantine { worker: worker(name), ports: ports(numbers), reason, by }
}

pub fn lift(name: &str, numbers: &[u16]) -> Command {
    let (by, seen) = (Actor::Operator, Revision(0));
    Command::LiftQuarantine { worker: worker(name), ports: ports(numbers), by, seen }
}

/// Somebody whom the table does not know was seen there.
pub fn observe(name: &str, numbers: &[u16]) -> Command {
    let (reason, by) = ("in use".into(), Actor::Leader(LEADER));
    Command::Quarantine { worker: worker(name), ports: ports(numbers), reason, by }
}

/// As of this revision nobody was seen there.
pub fn clear(name: &str, numbers: &[u16], seen: Revision) -> Command {
    let by = Actor::Leader(LEADER);
    Command::LiftQuarantine { worker: worker(name), ports: ports(numbers), by, seen }
}

/// What a snapshot keeps: everything that the public accessors show.
pub struct Parts {
    pub feature_level: u32,
    pub revision: Revision,
    pub leases: Vec<(LeaseId, Millis)>,
    pub workers: Vec<WorkerPart>,
    pub allocations: Vec<Allocation>,
    pub departures: Vec<(InstanceName, Departure)>,
    pub members: Vec<(u64, String)>,
}

pub struct WorkerPart {
    pub name: WorkerName,
    pub spec: WorkerSpec,
    pub phases: (WorkerPhase, WorkerPhase),
    pub pools: Vec<PoolPart>,
    /// Registered, last changed, booted.
    pub revisions: [Revision; 3],
}

pub struct PoolPart {
    pub cursor: u32,
    pub next_freed: u64,
    pub freed: Vec<(u64, u16)>,
    pub quarantines: Vec<(u16, Quarantine)>,
}

impl Parts {
    pub fn of(state: &State) -> Parts {
        let departure = |(name, gone): (&InstanceName, &Departure)| (name.clone(), gone.clone());
        Parts {
            feature_level: state.feature_level,
            revision: state.revision,
            leases: state.leases_after(None).map(|l| (l.id, l.ttl)).collect(),
            workers: state.workers_after(None).map(|w| WorkerPart::of(w)).collect(),
            allocations: state.allocations_after(None).map(|a| Allocation::clone(a)).collect(),
            departures: state.departures().map(departure).collect(),
            members: state.members().map(|(id, incarnation)| (id, incarnation.into())).collect(),
        }
    }

    /// Puts them together again, as a reader of snapshots does.
    pub fn restore(self) -> Result<State, String> {
        let mut restore = Restore::new(self.feature_level, self.revision);
        self.leases.into_iter().try_for_each(|(id, ttl)| restore.lease(id, ttl))?;
        for WorkerPart { name, spec, phases, pools, revisions } in self.workers {
            let pool = |(part, range): (PoolPart, &RangeSpec)| {
                let reserved = spec.reserved.iter().copied();
                let empty = Pool::new(range.name.clone(), range.first, range.last, reserved);
                let PoolPart { cursor, next_freed, freed, quarantines } = part;
                Pool::restore(empty, (cursor, next_freed), freed, quarantines)
            };
            let pools = pools.into_iter().zip(&spec.ranges).map(pool).collect::<Result<_, _>>()?;
            restore.worker(name, spec, phases, pools, revisions)?;
        }
        self.allocations.into_iter().try_for_each(|a| restore.allocation(a))?;
        self.departures.into_iter().try_for_each(|(name, gone)| restore.departure(name, gone))?;
        self.members.iter().for_each(|(id, incarnation)| restore.member(*id, incarnation));
        restore.finish()
    }
}

impl WorkerPart {
    fn of(worker: &Worker) -> WorkerPart {
        let pool = |pool: &Pool| {
            let (cursor, next_freed) = pool.cursors();
            let quarantines = pool.quarantines().map(|(n, q)| (n, q.clone())).collect();
            PoolPart { cursor, next_freed, freed: pool.freed_order().collect(), quarantines }
        };
        WorkerPart {
            name: worker.name.clone(),
            spec: WorkerSpec::clone(&worker.spec),
            phases: (worker.phase, worker.phase_before),
            pools: worker.pools.iter().map(pool).collect(),
            revisions: [worker.created, worker.version, worker.booted],
        }
    }
}

/// The state as a snapshot brings it back.
pub fn rebuilt(state: &State) -> Result<State, String> {
    Parts::of(state).restore()
}
