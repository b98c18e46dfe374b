//! A table with something of everything in it, made by commands.

use portwarden::core::*;

/// The entry that the commands come in.
pub const ORIGIN: Origin =
    Origin { leader: Leader { term: 3, node: 2 }, at: Millis(1_700_000_000_000) };

pub fn instance(name: &str) -> InstanceName {
    InstanceName::parse(name).unwrap()
}

pub fn worker(name: &str) -> WorkerName {
    WorkerName::parse(name).unwrap()
}

pub fn port(number: u64) -> Port {
    Port::new("port", number).unwrap()
}

pub fn register(name: &str, gpus: u32) -> Command {
    let label = |k, v| (LabelKey::parse(k).unwrap(), LabelValue::parse(v).unwrap());
    let range = |name, first, last| RangeSpec {
        name: RangeName::parse(name).unwrap(),
        first: port(first),
        last: port(last),
    };
    let gpu = |index| GpuSpec {
        index,
        uuid: format!("GPU-{name}-{index}"),
        model: "RTX4090".into(),
        memory_bytes: 24 << 30,
    };
    Command::RegisterWorker {
        name: worker(name),
        spec: WorkerSpec {
            address: format!("{name}.example"),
            labels: [label("zone", "a"), label("empty", "")].into(),
            ranges: vec![range("service", 40000, 40063), range("ray", 41000, 41999)],
            reserved: [port(40010), port(41005)].into(),
            gpus: (0..gpus).map(gpu).collect(),
            identity: Some(identity(name)),
        },
    }
}

fn identity(name: &str) -> Identity {
    let (machine_id, boot_id) = (format!("machine-{name}"), "boot".into());
    Identity { machine_id, boot_id, namespace: 4026531840 }
}

/// A worker that no agent watches.
fn register_unwatched(name: &str) -> Command {
    match register(name, 1) {
        Command::RegisterWorker { name, spec } => {
            Command::RegisterWorker { name, spec: WorkerSpec { identity: None, ..spec } }
        }
        other => other,
    }
}

pub fn claim(name: &str, on: Placement, ports: Ports, gpus: Option<GpuRequest>) -> Claim {
    Claim {
        name: instance(name),
        uid: Uid::parse(&format!("uid-{name}")).unwrap(),
        placement: on,
        ports: vec![PortRequest { name: PortName::parse("http").ok(), range: None, ports }],
        gpus: gpus.map(Box::new),
        lease: None,
        confirm_within: None,
        bound: false,
        labels: [(LabelKey::parse("app").unwrap(), LabelValue::parse("llm").unwrap())].into(),
    }
}

pub fn select(selector: &str, policy: Policy) -> Placement {
    Placement::Select { selector: Selector::parse(selector).unwrap(), policy }
}

fn on(name: &str) -> Placement {
    Placement::Worker(worker(name))
}

fn allocate(claim: Claim) -> Command {
    Command::allocate([claim], Millis(600_000))
}

fn confirm(name: &str, token: u64, handle: Option<Handle>, lease: Option<u64>) -> Command {
    Command::Confirm {
        name: instance(name),
        token: Token(token),
        version: Revision(0),
        liveness: handle.map(|handle| Liveness { boot_id: "boot".into(), handle }),
        lease: lease.map(LeaseId),
    }
}

fn attach(name: &str, token: u64, lease: Option<u64>) -> Command {
    let (name, token, version) = (instance(name), Token(token), Revision(0));
    Command::Attach { name, token, version, lease: lease.map(LeaseId) }
}

fn report(name: &str, token: u64, number: u64) -> Command {
    let (name, token, version) = (instance(name), Token(token), Revision(0));
    Command::ReportConflict { name, token, version, port: port(number) }
}

fn reclaim(name: &str, token: u64, version: u64, ground: Ground) -> Command {
    let (name, token, version) = (instance(name), Token(token), Revision(version));
    Command::Reclaim { name, token, version, ground, under: ORIGIN.leader }
}

fn quarantine(name: &str, numbers: &[u64], by: Actor) -> Command {
    let ports = numbers.iter().map(|n| port(*n)).collect();
    Command::Quarantine { worker: worker(name), ports, reason: "seen in use".into(), by }
}

fn lift(name: &str, number: u64, by: Actor, seen: u64) -> Command {
    let (worker, ports) = (worker(name), vec![port(number)]);
    Command::LiftQuarantine { worker, ports, by, seen: Revision(seen) }
}

fn phase(name: &str, phase: WorkerPhase, by: Actor) -> Command {
    Command::SetWorkerPhase { name: worker(name), phase, by }
}

/// Every kind of command at least once, most of them with effect.
pub fn commands() -> Vec<Command> {
    [plain(), lifecycle()].concat()
}

/// Those that count under any leader, and do not mind to come twice.
pub fn plain() -> Vec<Command> {
    let shared = |count, bytes| {
        let (which, share) = (GpuChoice::Count(count), GpuShare::MemoryBytes(bytes));
        Some(GpuRequest { which, share })
    };
    let alone =
        Some(GpuRequest { which: GpuChoice::Indexes([1].into()), share: GpuShare::Exclusive });
    let terms = "zone in (a,b),empty=,zone!=c,empty notin (x,y),zone,!none";
    vec![
        register("w1", 2),
        register("w2", 0),
        register("w3", 1),
        allocate(claim("a", on("w1"), Ports::Count(3), shared(2, 4 << 30))),
        allocate(claim("b", on("w1"), Ports::Specific(port(40033)), None)),
        allocate(claim("c", select(terms, Policy::Spread), Ports::Contiguous(5), None)),
        allocate(claim("d", select("", Policy::Binpack), Ports::Count(1), shared(1, 1 << 30))),
        allocate(claim("e", on("w3"), Ports::Count(2), None)),
        confirm("a", 4, None, None),
        report("a", 4, 40001),
        Command::Release { name: instance("e"), authority: Authority::Holder(Token(8)) },
        Command::Release {
            name: instance("b"),
            authority: Authority::Operator { reason: "because".into() },
        },
        allocate(claim("f", on("w3"), Ports::Count(1), None)),
        allocate(claim("g", on("w1"), Ports::Count(1), alone)),
        quarantine("w2", &[40005, 41001], Actor::Operator),
        lift("w2", 40005, Actor::Operator, 0),
        phase("w2", WorkerPhase::Cordoned, Actor::Operator),
        Command::UpdateWorker {
            name: worker("w3"),
            patch: WorkerPatch { address: Some("moved.example".into()), ..WorkerPatch::default() },
        },
        register("gone", 0),
        Command::RemoveWorker { name: worker("gone"), force: None },
        Command::Checkpoint(Checkpoint::Take),
        Command::Checkpoint(Checkpoint::Compare {
            entry: 20,
            command: 0,
            revision: Revision(18),
            digest: Digest([7; 32]),
        }),
    ]
}

/// Leases, silences and what becomes of them, under one leader. The first is revision 20.
fn lifecycle() -> Vec<Command> {
    let leader = Actor::Leader(ORIGIN.leader);
    let under = ORIGIN.leader;
    let grant = |ttl_ms| Command::GrantLease { ttl: Millis(ttl_ms) };
    let leased = |name, worker, lease| Claim {
        lease: Some(LeaseId(lease)),
        confirm_within: Some(Millis(30_000)),
        ..claim(name, on(worker), Ports::Count(1), None)
    };
    let one = |name, worker| allocate(claim(name, on(worker), Ports::Count(1), None));
    let gone = |seen, reason: &str| Ground::Gone {
        identity: identity("w3"),
        seen: Revision(seen),
        reason: reason.into(),
    };
    vec![
        grant(10_000),
        grant(20_000),
        register_unwatched("w4"),
        allocate(leased("h", "w3", 20)),
        confirm("h", 23, Some(Handle::Process { pid: 300, start_ticks: 70_000 }), None),
        allocate(leased("i", "w1", 21)),
        confirm("i", 25, Some(Handle::Cgroup("system.slice/i.scope".into())), Some(20)),
        one("j", "w3"),
        confirm("j", 27, Some(Handle::Container("0123456789abcdef".into())), None),
        attach("i", 25, None),
        allocate(leased("k", "w1", 21)),
        Command::ExpireLease { id: LeaseId(21), under },
        allocate(leased("l", "w4", 20)),
        attach("l", 32, None),
        reclaim("l", 32, 33, Ground::Unconfirmed),
        grant(86_400_000),
        allocate(leased("m", "w4", 35)),
        Command::RevokeLease { id: LeaseId(35) },
        allocate(claim("n", on("w4"), Ports::Specific(port(40044)), None)),
        report("n", 38, 40044),
        one("o", "w3"),
        confirm("o", 40, None, None),
        reclaim("o", 40, 41, gone(41, "its ports were closed")),
        quarantine("w2", &[40006, 40007], leader),
        lift("w2", 40006, leader, 43),
        phase("w2", WorkerPhase::Lost, leader),
        Command::VerifyWorker { name: worker("w1"), by: leader },
        Command::UpdateWorker {
            name: worker("w1"),
            patch: WorkerPatch {
                identity: Some(Identity { boot_id: "boot-2".into(), ..identity("w1") }),
                ..WorkerPatch::default()
            },
        },
        register_unwatched("w5"),
        one("p", "w5"),
        Command::RemoveWorker { name: worker("w5"), force: Some("it burned".into()) },
        Command::SetFeatureLevel { level: 1 },
    ]
}

pub fn state() -> State {
    state_of(&commands())
}

pub fn state_of(commands: &[Command]) -> State {
    let mut state = State::default();
    for command in commands {
        apply(&mut state, &ORIGIN, command);
    }
    check_invariants(&state).unwrap();
    state
}
