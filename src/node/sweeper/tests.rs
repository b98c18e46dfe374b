//! Samples of an agent, one after the other, and what is proposed by them.

use super::evidence::{COMMANDS_MAX, InUse};
use super::*;
use crate::core::{
    Allocation, Claim, GpuChoice, GpuRequest, GpuShare, GpuSpec, Ground, Handle, Labels, LeaseId,
    Liveness, Origin, Outcome, Phase, Placement, Port, PortRequest, Ports, RangeSpec,
    ReleaseReason, State, Token, Uid, WorkerSpec, apply,
};
use crate::node::Lifecycle;

const LEADER: Leader = Leader { term: 3, node: 1 };
const ZOMBIE_AFTER: Duration = Duration::from_secs(60);

/// A worker `w` with an agent, ports 40000 to 40009 and one GPU, and what its agent says.
struct Scene {
    state: State,
    sweeps: Sweeps,
    sample: Sample,
    /// Proposed and applied since it was last looked at.
    done: Vec<&'static str>,
}

fn identity(boot: &str) -> Identity {
    Identity { machine_id: "m".into(), boot_id: boot.into(), namespace: 7 }
}

fn port(number: u16) -> Port {
    Port::new("port", u64::from(number)).unwrap()
}

fn lifecycle() -> Lifecycle {
    Lifecycle { zombie_after: ZOMBIE_AFTER, ..Lifecycle::default() }
}

fn sample() -> Sample {
    Sample {
        worker: "w".parse().unwrap(),
        identity: identity("b"),
        revision: Revision(0),
        run: "first".into(),
        number: 0,
        in_use: BTreeMap::new(),
        handles: BTreeMap::new(),
        gpus: BTreeMap::new(),
        drift: Drift::default(),
    }
}

impl Scene {
    fn new() -> Scene {
        let mut scene = Scene {
            state: State::default(),
            sweeps: Sweeps::default(),
            sample: sample(),
            done: Vec::new(),
        };
        let spec = WorkerSpec {
            address: "h".into(),
            labels: Labels::new(),
            ranges: vec![RangeSpec {
                name: "s".parse().unwrap(),
                first: port(40_000),
                last: port(40_009),
            }],
            reserved: Default::default(),
            gpus: vec![GpuSpec {
                index: 0,
                uuid: String::new(),
                model: String::new(),
                memory_bytes: 100,
            }],
            identity: Some(identity("b")),
        };
        scene.ok(Command::RegisterWorker { name: "w".parse().unwrap(), spec });
        scene
    }

    fn ok(&mut self, command: Command) -> Outcome {
        let origin = Origin { leader: LEADER, at: Millis(0) };
        apply(&mut self.state, &origin, &command).0.outcome.unwrap()
    }

    /// Holds one port, and is confirmed unless it is not.
    fn port_of(&mut self, name: &str, confirmed: bool) -> u16 {
        let ports = vec![PortRequest { name: None, range: None, ports: Ports::Count(1) }];
        let held = self.grant(name, ports, None);
        if confirmed {
            self.confirm(&held, None);
        }
        held.ports[0].number
    }

    fn grant(
        &mut self,
        name: &str,
        ports: Vec<PortRequest>,
        gpus: Option<GpuRequest>,
    ) -> Arc<Allocation> {
        let claim = Claim {
            name: name.parse().unwrap(),
            uid: Uid::parse("u").unwrap(),
            placement: Placement::Worker("w".parse().unwrap()),
            ports,
            gpus: gpus.map(Box::new),
            lease: None::<LeaseId>,
            confirm_within: None,
            bound: false,
            labels: Labels::new(),
        };
        let allocate = Command::allocate([claim], Millis(600_000));
        match self.ok(allocate) {
            Outcome::Allocated { mut allocations, .. } => allocations.remove(0),
            other => panic!("{other:?}"),
        }
    }

    fn confirm(&mut self, held: &Allocation, liveness: Option<Liveness>) {
        self.ok(Command::Confirm {
            name: held.name().clone(),
            token: held.token,
            version: Revision(0),
            liveness,
            lease: None,
        });
    }

    /// Its deadline passes.
    fn misses_deadline(&mut self, name: &str) {
        let held = self.held(name).clone();
        self.ok(Command::Reclaim {
            name: held.name().clone(),
            token: held.token,
            version: held.version,
            ground: Ground::Unconfirmed,
            under: LEADER,
        });
        assert_eq!(self.held(name).phase, Phase::Lingering);
    }

    /// Its agent names another boot.
    fn reboot(&mut self, boot: &str) {
        let patch =
            crate::core::WorkerPatch { identity: Some(identity(boot)), ..Default::default() };
        self.ok(Command::UpdateWorker { name: "w".parse().unwrap(), patch });
        self.sample.identity = identity(boot);
    }

    fn held(&self, name: &str) -> &Arc<Allocation> {
        self.state.allocation(&name.parse().unwrap()).unwrap()
    }

    fn is_held(&self, name: &str) -> bool {
        self.state.allocation(&name.parse().unwrap()).is_some()
    }

    fn weigh(&mut self) -> Result<Vec<Command>, &'static str> {
        let worker = self.state.worker(&self.sample.worker).unwrap().clone();
        self.sweeps.weigh(Look {
            state: &self.state,
            worker: &worker,
            sample: &self.sample,
            lifecycle: &lifecycle(),
            under: LEADER,
            now: Instant::now(),
        })
    }

    /// The agent looks after `ms`, knows the table as it is, and what follows is done.
    async fn looks_after(&mut self, ms: u64) {
        tokio::time::advance(Duration::from_millis(ms)).await;
        self.sample.number += 1;
        self.sample.revision = self.state.revision;
        for command in self.weigh().unwrap() {
            self.done.push(command.kind());
            self.ok(command);
        }
    }

    async fn looks(&mut self, times: usize) {
        for _ in 0..times {
            self.looks_after(1_000).await;
        }
    }

    fn open(&mut self, number: u16, listening: bool) {
        self.sample.in_use.insert(number, InUse { listening, pid: 9 });
    }

    fn why_gone(&self, name: &str) -> String {
        match &self.state.departure(&name.parse().unwrap()).unwrap().why {
            ReleaseReason::Reclaimed { reason, .. } => reason.clone(),
            other => panic!("{other}"),
        }
    }
}

fn process(boot: &str) -> Option<Liveness> {
    let handle = Handle::Process { pid: 77, start_ticks: 5 };
    Some(Liveness { boot_id: boot.into(), handle })
}

#[tokio::test(start_paused = true)]
async fn what_was_confirmed_is_gone_when_its_ports_were_closed_all_the_time() {
    let mut s = Scene::new();
    let number = s.port_of("a", true);
    s.open(number, true);
    s.looks(90).await;
    assert!(s.is_held("a"), "it lives");
    s.sample.in_use.clear();
    s.looks(40).await;
    s.open(number, false);
    s.looks(1).await;
    s.sample.in_use.clear();
    s.looks(60).await;
    assert!(s.is_held("a"), "it was open once in between");
    s.looks(1).await;
    assert!(!s.is_held("a"));
    assert!(s.why_gone("a").contains("closed for 1m"), "{}", s.why_gone("a"));
}

#[tokio::test(start_paused = true)]
async fn a_start_is_not_judged_before_its_deadline_and_soon_after() {
    let mut s = Scene::new();
    s.port_of("a", false);
    s.looks(200).await;
    assert!(s.is_held("a"), "it may still be starting");
    s.misses_deadline("a");
    s.looks(2).await;
    assert!(s.is_held("a"));
    s.looks(1).await;
    assert!(!s.is_held("a"));
}

#[tokio::test(start_paused = true)]
async fn a_handle_decides_alone() {
    let mut s = Scene::new();
    s.port_of("a", false);
    let held = s.held("a").clone();
    s.confirm(&held, process("b"));
    s.sample.handles.insert(held.name().clone(), (held.token, true));
    s.looks(200).await;
    assert!(s.is_held("a"), "alive with its port closed is drift");
    s.sample.handles.clear();
    s.looks(200).await;
    assert!(s.is_held("a"), "the agent cannot tell");
    s.sample.handles.insert(held.name().clone(), (Token(99), false));
    s.looks(200).await;
    assert!(s.is_held("a"), "another grant's");
    s.sample.handles.insert(held.name().clone(), (held.token, false));
    s.looks(2).await;
    assert!(s.is_held("a"));
    s.looks(1).await;
    assert_eq!(s.why_gone("a"), "process 77 (started at tick 5) is gone");
}

#[tokio::test(start_paused = true)]
async fn nothing_lives_through_a_boot() {
    let mut s = Scene::new();
    s.port_of("a", false);
    let held = s.held("a").clone();
    s.confirm(&held, process("b"));
    s.port_of("b", true);
    s.port_of("starting", false);
    s.reboot("b2");
    s.looks(1).await;
    assert_eq!((s.is_held("a"), s.is_held("b")), (false, true), "a handle names its boot");
    s.looks(2).await;
    assert_eq!((s.is_held("b"), s.is_held("starting")), (false, true));
}

/// A boot is known only when its agent names it.
#[tokio::test(start_paused = true)]
async fn what_was_started_and_confirmed_before_its_boot_was_known_lives() {
    let mut s = Scene::new();
    s.port_of("with-handle", false);
    let held = s.held("with-handle").clone();
    s.confirm(&held, process("b2"));
    let number = s.port_of("listens", true);
    s.reboot("b2");
    s.sample.handles.insert(held.name().clone(), (held.token, true));
    s.open(number, true);
    s.looks(100).await;
    assert!(s.is_held("with-handle") && s.is_held("listens"));
}

#[tokio::test(start_paused = true)]
async fn a_handle_of_a_boot_that_nobody_knows_says_nothing() {
    let mut s = Scene::new();
    let number = s.port_of("a", true);
    let held = s.held("a").clone();
    s.confirm(&held, process("no boot of this worker"));
    s.open(number, true);
    s.looks(100).await;
    assert!(s.is_held("a"), "it listens");
    s.sample.in_use.clear();
    s.looks(60).await;
    assert!(s.is_held("a"));
    s.looks(1).await;
    assert!(s.why_gone("a").contains("closed for 1m"), "{}", s.why_gone("a"));
}

/// Its scheduler died while it was loading its model: it may still confirm.
#[tokio::test(start_paused = true)]
async fn a_start_whose_lease_ended_is_not_judged_before_its_deadline() {
    let mut s = Scene::new();
    s.port_of("a", false);
    let held = s.held("a").clone();
    let Outcome::Lease(lease) = s.ok(Command::GrantLease { ttl: Millis(1_000) }) else {
        panic!("no lease");
    };
    let (name, lease) = (held.name().clone(), Some(lease.id));
    s.ok(Command::Attach { name, token: held.token, version: Revision(0), lease });
    s.ok(Command::ExpireLease { id: lease.unwrap(), under: LEADER });
    assert_eq!(s.held("a").phase, Phase::Lingering);
    s.looks(600).await;
    assert!(s.is_held("a"), "its deadline is 10 minutes");
    s.looks(1).await;
    assert!(!s.is_held("a"));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_comes_to_a_worker_in_use_takes_nothing_for_an_older_boots() {
    let mut s = Scene::new();
    let mut spec = WorkerSpec::clone(&s.state.worker(&"w".parse().unwrap()).unwrap().spec);
    (spec.identity, spec.gpus) = (None, Vec::new());
    s.ok(Command::RegisterWorker { name: "w2".parse().unwrap(), spec });
    s.sample.worker = "w2".parse().unwrap();
    s.sample.identity = Identity { namespace: 8, ..identity("b") };
    let ports = vec![PortRequest { name: None, range: None, ports: Ports::Count(1) }];
    let claim = Claim {
        placement: Placement::Worker("w2".parse().unwrap()),
        bound: true,
        name: "a".parse().unwrap(),
        uid: Uid::parse("u").unwrap(),
        ports,
        gpus: None,
        lease: None,
        confirm_within: None,
        labels: Labels::new(),
    };
    s.ok(Command::allocate([claim], Millis(600_000)));
    let identity = Some(s.sample.identity.clone());
    let patch = crate::core::WorkerPatch { identity, ..Default::default() };
    s.ok(Command::UpdateWorker { name: "w2".parse().unwrap(), patch });
    let number = s.held("a").ports[0].number;
    s.open(number, true);
    s.looks(100).await;
    assert!(s.is_held("a"));
}

#[tokio::test(start_paused = true)]
async fn what_holds_gpus_alone_is_gone_when_no_process_was_on_them() {
    let mut s = Scene::new();
    let gpus = GpuRequest { which: GpuChoice::Count(1), share: GpuShare::Exclusive };
    let held = s.grant("a", Vec::new(), Some(gpus));
    s.confirm(&held, None);
    s.looks(200).await;
    assert!(s.is_held("a"), "without a driver nobody knows");
    s.sample.gpus.insert(0, 1);
    s.looks(200).await;
    s.sample.gpus.insert(0, 0);
    s.looks(60).await;
    assert!(s.is_held("a"));
    s.looks(1).await;
    assert!(!s.is_held("a"));
}

const SHARED: GpuRequest =
    GpuRequest { which: GpuChoice::Count(1), share: GpuShare::MemoryBytes(10) };

#[tokio::test(start_paused = true)]
async fn what_lingered_before_a_boot_is_gone_after_it_also_on_gpus_that_nobody_sees() {
    let mut s = Scene::new();
    s.grant("a", Vec::new(), Some(SHARED));
    s.misses_deadline("a");
    s.looks(200).await;
    assert!(s.is_held("a"));
    s.reboot("b2");
    s.looks(3).await;
    assert!(!s.is_held("a"));
}

/// Another's process is on the GPU that it shares.
#[tokio::test(start_paused = true)]
async fn a_boot_makes_nothing_last_longer() {
    let mut s = Scene::new();
    let ports = vec![PortRequest { name: None, range: None, ports: Ports::Count(1) }];
    let held = s.grant("a", ports, Some(SHARED));
    s.confirm(&held, None);
    s.reboot("b2");
    s.sample.gpus.insert(0, 1);
    s.looks(60).await;
    assert!(s.is_held("a"));
    s.looks(1).await;
    assert!(!s.is_held("a"), "its ports were closed for as long as it takes without a boot");
}

/// What was granted since the backup may hold nothing but GPU memory.
#[tokio::test(start_paused = true)]
async fn a_restored_worker_is_verified_once_nobody_is_on_the_gpus_that_nobody_holds() {
    let mut s = Scene::new();
    s.state = s.state.anew(Millis(0));
    s.looks(3).await;
    assert!(s.done.is_empty(), "without a driver nobody knows: {:?}", s.done);
    s.sample.gpus.insert(0, 1);
    s.looks(3).await;
    assert!(s.done.is_empty(), "{:?}", s.done);
    s.sample.gpus.insert(0, 0);
    s.looks(1).await;
    assert_eq!(s.done, ["verify_worker"]);
}

/// What comes free by this very sample may be in use by it: the next one knows.
#[tokio::test(start_paused = true)]
async fn a_restored_worker_is_not_verified_by_a_sample_that_frees_something() {
    let mut s = Scene::new();
    let number = s.port_of("a", false);
    let held = s.held("a").clone();
    s.confirm(&held, process("b"));
    s.state = s.state.anew(Millis(0));
    s.reboot("b2");
    s.sample.gpus.insert(0, 0);
    s.open(number, true); // its successor
    s.looks(1).await;
    assert_eq!((s.done.as_slice(), s.is_held("a")), (&["reclaim"][..], false));
    s.looks(1).await;
    assert_eq!(s.done, ["reclaim", "quarantine"]);
    s.looks(1).await;
    assert_eq!(s.done, ["reclaim", "quarantine", "verify_worker"]);
}

#[tokio::test(start_paused = true)]
async fn what_changed_after_the_agent_looked_is_not_judged() {
    let mut s = Scene::new();
    s.port_of("a", false);
    s.misses_deadline("a");
    s.looks(2).await;
    // The next one was taken before the deadline had passed, and is late.
    s.sample.number += 1;
    s.sample.revision = Revision(s.held("a").version.0 - 1);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(s.weigh(), Ok(vec![]));
    s.looks(2).await;
    assert!(s.is_held("a"), "the count began anew");
    s.looks(1).await;
    assert!(!s.is_held("a"));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_counted_across_a_silence_or_a_restart_of_the_agent() {
    let mut s = Scene::new();
    s.port_of("a", true);
    s.looks(50).await;
    s.looks_after(lifecycle().worker_lost_after.as_millis() as u64 + 1).await;
    s.looks(50).await;
    assert!(s.is_held("a"), "nobody knows what was in between");
    s.sample.run = "second".into();
    s.looks(55).await;
    assert!(s.is_held("a"), "a new agent knows nothing of the old one's samples");
    s.looks(6).await;
    assert!(!s.is_held("a"));
}

/// One was started by hand beside the service: the later one is heard, and the other one told.
#[tokio::test(start_paused = true)]
async fn of_two_agents_of_a_worker_the_one_that_was_started_last_counts() {
    let mut s = Scene::new();
    s.port_of("a", false);
    s.misses_deadline("a");
    s.looks(2).await;
    let first = s.sample.clone();
    s.sample = Sample { run: "second".into(), number: 0, ..first.clone() };
    for looks in 1..=3 {
        assert!(s.is_held("a"), "{looks}");
        s.looks(1).await;
        let second = s.sample.clone();
        s.sample = Sample { number: first.number + looks, ..first.clone() };
        let told = s.weigh().unwrap_err();
        assert!(told.contains("another agent"), "{told}");
        s.sample = second;
    }
    assert!(!s.is_held("a"), "its three samples were in a row");
    s.sample.number -= 1;
    tokio::time::advance(Duration::from_secs(1)).await;
    assert!(s.weigh().unwrap_err().contains("older"));
    // The second one is stopped: the first counts again.
    s.sample = Sample { number: first.number + 10, ..first };
    assert!(s.weigh().unwrap_err().contains("another agent"));
    s.looks_after(lifecycle().worker_lost_after.as_millis() as u64 + 1).await;
    s.sample.run = String::new();
    assert!(s.weigh().unwrap_err().contains("another agent"), "an older build's");
}

#[tokio::test(start_paused = true)]
async fn samples_that_count_for_nothing_say_why() {
    let mut s = Scene::new();
    s.looks(1).await;
    let again = s.weigh().unwrap_err();
    assert!(again.contains("counted already"), "{again}");
    s.sample.number += 1;
    let flood = s.weigh().unwrap_err();
    assert!(flood.contains("too soon"), "{flood}");
    s.sample.revision = Revision(s.state.revision.0 + 1);
    let future = s.weigh().unwrap_err();
    assert!(future.contains("does not exist yet"), "{future}");
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_samples_proves_no_more_than_one() {
    let mut s = Scene::new();
    s.port_of("a", false);
    s.misses_deadline("a");
    s.looks(1).await;
    for _ in 0..100 {
        s.sample.number += 1;
        assert!(s.weigh().is_err());
    }
    s.looks(1).await;
    assert!(s.is_held("a"));
    s.looks(1).await;
    assert!(!s.is_held("a"));
}

/// Field failures gpustack-4557 and nomad-4285: a port was given that a connection of the host's
/// own had as its local port.
#[tokio::test(start_paused = true)]
async fn a_strangers_port_is_quarantined_and_given_again_once_it_was_seen_free() {
    let mut s = Scene::new();
    s.open(40_000, true);
    s.open(40_001, false);
    s.open(50_000, true);
    s.looks(1).await;
    assert_eq!(s.done, ["quarantine"], "who only has a connection may be about to go");
    s.looks(1).await;
    assert_eq!(s.done, ["quarantine"; 2]);
    assert_eq!(s.port_of("a", true), 40_002);
    s.open(40_002, true);
    s.looks(10).await;
    assert_eq!(s.done.len(), 2, "what is quarantined or held stays as it is");
    s.sample.in_use.remove(&40_000);
    s.looks(2).await;
    assert_eq!(s.done.len(), 2);
    s.looks(1).await;
    assert_eq!(s.done[2..], ["lift_quarantine"]);
    let pool = &s.state.worker(&"w".parse().unwrap()).unwrap().pools[0];
    assert_eq!((pool.is_free(40_000), pool.is_free(40_001)), (true, false));
}

#[tokio::test(start_paused = true)]
async fn a_port_that_was_released_since_the_agent_looked_is_no_strangers() {
    let mut s = Scene::new();
    let number = s.port_of("a", true);
    s.open(number, true);
    s.looks(1).await;
    let seen = s.state.revision;
    let token = s.held("a").token;
    let authority = crate::core::Authority::Holder(token);
    s.ok(Command::Release { name: "a".parse().unwrap(), authority });
    tokio::time::advance(Duration::from_secs(1)).await;
    (s.sample.number, s.sample.revision) = (s.sample.number + 1, seen);
    assert_eq!(s.weigh(), Ok(vec![]));
    // It is still in use in the next one.
    s.looks(1).await;
    assert_eq!(s.done, ["quarantine"]);
}

/// A holder found it in use between two samples.
#[tokio::test(start_paused = true)]
async fn what_was_seen_free_before_a_quarantine_says_nothing_of_it() {
    let mut s = Scene::new();
    let worker = s.sample.worker.clone();
    let quarantine = Command::Quarantine {
        worker: worker.clone(),
        ports: vec![port(40_003)],
        reason: "in use".into(),
        by: Actor::Leader(LEADER),
    };
    s.ok(quarantine.clone());
    s.looks(2).await;
    let seen = s.state.revision;
    s.ok(Command::LiftQuarantine { worker, ports: vec![port(40_003)], by: Actor::Operator, seen });
    s.ok(quarantine);
    s.looks(2).await;
    assert!(s.done.is_empty(), "{:?}", s.done);
    s.looks(1).await;
    assert_eq!(s.done, ["lift_quarantine"]);
}

#[tokio::test(start_paused = true)]
async fn an_operators_quarantine_is_the_operators_to_lift() {
    let mut s = Scene::new();
    s.ok(Command::Quarantine {
        worker: "w".parse().unwrap(),
        ports: vec![port(40_003)],
        reason: "kept".into(),
        by: Actor::Operator,
    });
    s.looks(20).await;
    assert!(s.done.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_new_leader_counts_from_the_start() {
    let mut s = Scene::new();
    s.port_of("a", false);
    s.misses_deadline("a");
    s.looks(2).await;
    s.sweeps.leader = Leader { term: 2, node: 9 };
    s.looks(2).await;
    assert!(s.is_held("a"));
    s.looks(1).await;
    assert!(!s.is_held("a"));
}

#[tokio::test(start_paused = true)]
async fn one_sample_leads_to_a_bounded_number_of_commands() {
    let mut s = Scene::new();
    let patch = crate::core::WorkerPatch {
        ranges: Some(vec![RangeSpec {
            name: "s".parse().unwrap(),
            first: port(40_000),
            last: port(40_999),
        }]),
        ..Default::default()
    };
    s.ok(Command::UpdateWorker { name: "w".parse().unwrap(), patch });
    (40_000..40_500).for_each(|number| s.open(number, true));
    s.looks(1).await;
    assert_eq!(s.done.len(), COMMANDS_MAX);
    s.looks(10).await;
    assert_eq!(s.done.len(), 500);
}

#[test]
fn drift_is_summed_over_workers_and_said_in_words() {
    let mut sweeps = Sweeps::default();
    let of = |bound_but_closed| Drift { bound_but_closed, ..Drift::default() };
    sweeps.change_drift(of(0), of(3));
    sweeps.change_drift(of(0), of(2));
    sweeps.change_drift(of(3), of(1));
    assert_eq!(sweeps.drift, of(3));
    let sweeper = Sweeper(Arc::new(Mutex::new(sweeps)));
    let problems = sweeper.problems();
    assert!(problems[0].contains("3 managed ports") && problems.len() == 1, "{problems:?}");
}
