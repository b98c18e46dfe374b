//! A table with something of everything in it, made by commands.

use portwarden::core::*;

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
            identity: Some(Identity {
                machine_id: format!("machine-{name}"),
                boot_id: "boot".into(),
                namespace: 4026531840,
            }),
        },
    }
}

pub fn claim(name: &str, on: Placement, ports: Ports, gpus: Option<GpuRequest>) -> Claim {
    Claim {
        name: instance(name),
        uid: Uid::parse(&format!("uid-{name}")).unwrap(),
        placement: on,
        ports: vec![PortRequest { name: PortName::parse("http").ok(), range: None, ports }],
        gpus,
        bound: false,
        labels: [(LabelKey::parse("app").unwrap(), LabelValue::parse("llm").unwrap())].into(),
    }
}

pub fn select(selector: &str, policy: Policy) -> Placement {
    Placement::Select { selector: Selector::parse(selector).unwrap(), policy }
}

/// Every kind of command at least once, most of them with effect.
pub fn commands() -> Vec<Command> {
    let on = |name| Placement::Worker(worker(name));
    let allocate = |claim| Command::Allocate { claims: vec![claim] };
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
        Command::Confirm { name: instance("a"), token: Token(4), version: Revision(0) },
        Command::ReportConflict {
            name: instance("a"),
            token: Token(4),
            version: Revision(0),
            port: port(40001),
        },
        Command::Release { name: instance("e"), authority: Authority::Holder(Token(8)) },
        Command::Release {
            name: instance("b"),
            authority: Authority::Operator { reason: "because".into() },
        },
        allocate(claim("f", on("w3"), Ports::Count(1), None)),
        allocate(claim("g", on("w1"), Ports::Count(1), alone)),
        Command::Quarantine {
            worker: worker("w2"),
            ports: vec![port(40005), port(41001)],
            reason: "seen in use".into(),
        },
        Command::LiftQuarantine { worker: worker("w2"), ports: vec![port(40005)] },
        Command::SetWorkerPhase { name: worker("w2"), phase: WorkerPhase::Cordoned },
        Command::UpdateWorker {
            name: worker("w3"),
            patch: WorkerPatch { address: Some("moved.example".into()), ..WorkerPatch::default() },
        },
        register("gone", 0),
        Command::RemoveWorker { name: worker("gone") },
        Command::Checkpoint(Checkpoint::Take),
        Command::Checkpoint(Checkpoint::Compare {
            entry: 20,
            command: 0,
            revision: Revision(18),
            digest: Digest([7; 32]),
        }),
    ]
}

pub fn state() -> State {
    let mut state = State::default();
    for command in commands() {
        apply(&mut state, &command);
    }
    check_invariants(&state).unwrap();
    state
}
