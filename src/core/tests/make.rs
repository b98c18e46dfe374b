//! Short ways to write commands, for tests. Also part of the integration test `core`.

use super::*;

pub const GIB: u64 = 1 << 30;

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

pub fn register(name: &str, spec: WorkerSpec) -> Command {
    Command::RegisterWorker { name: worker(name), spec }
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
        self.gpus = Some(GpuRequest { which, share });
        self
    }
}

pub fn allocate(claims: &[Claim]) -> Command {
    Command::Allocate { claims: claims.to_vec() }
}

pub fn confirm(name: &str, token: Token, version: u64) -> Command {
    Command::Confirm { name: instance(name), token, version: Revision(version) }
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

pub fn quarantine(name: &str, numbers: &[u16]) -> Command {
    Command::Quarantine { worker: worker(name), ports: ports(numbers), reason: "sshd".into() }
}

pub fn lift(name: &str, numbers: &[u16]) -> Command {
    Command::LiftQuarantine { worker: worker(name), ports: ports(numbers) }
}

/// The state as a snapshot brings it back: everything that the public accessors show, through
/// [`Restore`].
pub fn rebuilt(state: &State) -> Result<State, String> {
    let mut restore = Restore::new(state.feature_level, state.revision);
    for w in state.workers_after(None) {
        let pool = |(old, range): (&Pool, &RangeSpec)| {
            let reserved = w.spec.reserved.iter().copied();
            let empty = Pool::new(range.name.clone(), range.first, range.last, reserved);
            let (cursor, next_freed) = old.cursors();
            let quarantines = old.quarantines().map(|(n, q)| (n, q.clone()));
            Pool::restore(empty, cursor, next_freed, old.freed_order(), quarantines)
        };
        let pools = w.pools.iter().zip(&w.spec.ranges).map(pool).collect();
        let spec = WorkerSpec::clone(&w.spec);
        restore.worker(w.name.clone(), spec, w.phase, pools, w.created, w.version)?;
    }
    for allocation in state.allocations_after(None) {
        restore.allocation(Allocation::clone(allocation))?;
    }
    for (id, incarnation) in state.members() {
        restore.member(id, incarnation);
    }
    restore.finish()
}
