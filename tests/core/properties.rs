//! The core and the naive model agree on every outcome of random commands in a small universe,
//! where collisions are frequent; a table that goes through a snapshot goes on the same, and so does
//! one that is restored into a new cluster.
//!
//! `PORTWARDEN_CASES` sets how many sequences are tried, `PORTWARDEN_SEED` which ones. A failure
//! prints the shortest sequence that proptest finds, and the command that runs it again.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::make::*;
use super::model::{Held, Host, Model, Slot};
use super::*;

const WORKERS: [&str; 3] = ["w0", "w1", "w2"];
const BOOTS: [&str; 3] = ["b1", "b2", "b3"];
const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
const CASES: u32 = 1000;
const STEPS: usize = 80;

/// What must come of some commands, or the sequences prove little.
const KINDS: [&str; 30] = [
    "worker",
    "removed true",
    "granted",
    "repeated",
    "confirmed",
    "attached",
    "lingers",
    "released true",
    "released false",
    "swapped",
    "reclaimed",
    "lease",
    "ended true",
    "ended false",
    "refused Deposed",
    "refused IdentityTaken",
    "refused Invalid",
    "refused Lingers",
    "refused NameTaken",
    "refused NoAllocation",
    "refused NoLease",
    "refused NothingFits",
    "refused NotProven",
    "refused PortNotFree",
    "refused PortNotHeld",
    "refused WorkerInUse",
    "refused WorkerNotReady",
    "refused WouldLose",
    "refused WrongToken",
    "refused WrongVersion",
];

/// The ways of an allocation through its life that must be gone as well.
const WAYS: [&str; 15] = [
    "confirm: RESERVED, BOUND",
    "confirm: LINGERING, BOUND",
    "report_conflict: BOUND, RESERVED",
    "report_conflict: LINGERING, RESERVED",
    "report_conflict: BOUND, gone",
    "reclaim: RESERVED, LINGERING",
    "reclaim: RESERVED, gone",
    "reclaim: BOUND, gone",
    "reclaim: LINGERING, gone",
    "release: LINGERING, gone",
    "expire_lease: BOUND, LINGERING",
    "expire_lease: RESERVED, LINGERING",
    "expire_lease: BOUND, gone",
    "remove_worker: LINGERING, gone",
    "remove_worker: BOUND, gone",
];

/// Which of its versions a command names.
#[derive(Debug, Clone, Copy)]
enum Version {
    Any,
    Present,
    /// That the last change was made to.
    Before,
    Wrong,
}

/// One of the names that are held when it is its turn, or now and then one that is not; under its
/// token or not.
#[derive(Debug, Clone, Copy)]
struct Who {
    name: usize,
    right: bool,
    version: Version,
}

/// A command whose names, tokens, versions and leases are chosen when it is its turn: a `usize`
/// stands for one of those that are there by then, or now and then for one that is not.
#[derive(Debug, Clone)]
enum Op {
    As(Command),
    Allocate(Vec<Claim>, Option<usize>),
    /// The claim that a name holds, once more.
    Again(usize),
    Confirm(Who, Option<Liveness>, Option<usize>),
    Attach(Who, Option<usize>),
    Release(Who),
    /// The n-th port that it holds, or for `None` the port that was swapped out last, or just any.
    Report(Who, Option<usize>),
    Revoke(usize),
    Expire(usize, Leader),
    Miss(Who, Leader),
    /// Seen so many revisions after its last change, on its worker's boot or on another.
    Gone(Who, i64, bool, Leader),
    /// Seen so many revisions ago.
    Clear(&'static str, Vec<u16>, i64, Leader),
    /// The agent of a worker begins, under this boot.
    Boot(&'static str, &'static str),
}

impl Op {
    fn command(&self, model: &Model) -> Option<Command> {
        // One that is there, if any is; or now and then one that is not.
        let on = |n: Option<usize>| match n? {
            SOME => Some(LeaseId(1)),
            n => nth(&model.leases, n).copied(),
        };
        let lease = |n| on(Some(n)).unwrap_or(LeaseId(1));
        let later = |revision: u64, by: i64| Revision(revision.saturating_add_signed(by));
        Some(match self {
            Op::As(command) => command.clone(),
            Op::Allocate(claims, lease) => {
                let on = on(*lease);
                let leased = |c: &Claim| Claim { lease: on, ..c.clone() };
                allocate(&claims.iter().map(leased).collect::<Vec<_>>())
            }
            Op::Again(name) => allocate(&[model.held.get(&pick(model, *name))?.claim.clone()]),
            Op::Confirm(who, liveness, lease) => {
                let (name, token, version) = who.choose(model);
                confirm_with(name.as_str(), token, version.0, liveness.clone(), on(*lease))
            }
            Op::Attach(who, to) => {
                let (name, token, version) = who.choose(model);
                attach(name.as_str(), token, version.0, on(*to))
            }
            Op::Release(who) => {
                let (name, token, _) = who.choose(model);
                release(name.as_str(), token)
            }
            Op::Report(who, which) => {
                let (name, token, version) = who.choose(model);
                let held = model.held.get(&name)?;
                let number = match (which, &held.last) {
                    (Some(i), _) => *held.ports.concat().iter().cycle().nth(*i)?,
                    (None, Some(LastChange { kind: ChangeKind::Swapped { port }, .. })) => *port,
                    (None, _) => 41005,
                };
                report(name.as_str(), token, version.0, number)
            }
            Op::Revoke(n) => revoke(lease(*n)),
            Op::Expire(n, under) => Command::ExpireLease { id: lease(*n), under: *under },
            Op::Miss(who, under) => {
                let (name, token, version) = who.choose(model);
                let (ground, under) = (Ground::Unconfirmed, *under);
                Command::Reclaim { name, token, version, ground, under }
            }
            Op::Gone(who, seen, here, under) => {
                let (name, token, version) = who.choose(model);
                let held = model.held.get(&name)?;
                let identity = model.workers[&held.worker].spec.identity.clone();
                let identity = identity.filter(|_| *here).unwrap_or_else(|| booted("b9"));
                let ground = gone(identity, later(held.version, *seen));
                Command::Reclaim { name, token, version, ground, under: *under }
            }
            Op::Clear(on, numbers, ago, under) => Command::LiftQuarantine {
                worker: worker(on),
                ports: ports(numbers),
                by: Actor::Leader(*under),
                seen: later(model.revision, -ago),
            },
            Op::Boot(on, boot) => {
                reboot(on, Identity { machine_id: on.to_string(), ..booted(boot) })
            }
        })
    }
}

/// How many numbers name something that is there, where there is anything; one more names nothing.
const SOME: usize = 24;

fn nth<K, V>(map: &BTreeMap<K, V>, n: usize) -> Option<&K> {
    (n < SOME).then(|| map.keys().nth(n % map.len().max(1))).flatten()
}

fn pick(model: &Model, n: usize) -> InstanceName {
    nth(&model.held, n).cloned().unwrap_or_else(|| instance("nobody"))
}

impl Who {
    fn choose(self, model: &Model) -> (InstanceName, Token, Revision) {
        let name = pick(model, self.name);
        let Some(held) = model.held.get(&name) else { return (name, Token(1), Revision(0)) };
        let version = match (self.version, &held.last) {
            (Version::Any, _) => 0,
            (Version::Present, _) => held.version,
            (Version::Before, Some(last)) => last.from.0,
            (Version::Before, None) => held.version - 1,
            (Version::Wrong, _) => held.version + 1,
        };
        (name, Token(held.token + u64::from(!self.right)), Revision(version))
    }
}

fn any_spec() -> impl Strategy<Value = WorkerSpec> {
    let shapes = select(vec![
        ranges(&[("s", 40000, 40007), ("r", 41000, 41005)]),
        ranges(&[("r", 41000, 41005), ("s", 40000, 40007)]),
        ranges(&[("s", 40000, 40009)]),
        ranges(&[("s", 40000, 40005), ("r", 41000, 41003)]),
        ranges(&[("s", 40001, 40007), ("r", 41000, 41005)]),
        // Over the end of a block of slots.
        ranges(&[("s", 39995, 40006), ("r", 41000, 41005)]),
    ]);
    let gpus = select(vec![vec![], vec![8], vec![8, 8], vec![4, 8, 12]]);
    let known = proptest::bool::weighted(0.15);
    let boot = (select(&WORKERS[..]), select(&BOOTS[..]), 7..9u64);
    let agent = proptest::option::weighted(0.2, boot);
    let some = (any::<bool>(), any::<bool>(), any::<bool>());
    (shapes, gpus, some, known, agent).prop_map(
        |(shape, gpus, (reserve, zone, reverse), known, agent)| {
            with(spec(&[], &gpus), |s| {
                s.ranges = shape;
                if let (true, Some(gpu)) = (known, s.gpus.first_mut()) {
                    gpu.uuid = "GPU-0".into();
                }
                if reverse {
                    s.gpus.reverse();
                }
                if reserve {
                    s.reserved = [port(40002), port(41003)].into();
                }
                if zone {
                    s.labels = labels(&[("zone", "a")]);
                }
                s.identity = agent.map(|(machine, boot, namespace)| Identity {
                    machine_id: machine.into(),
                    namespace,
                    ..booted(boot)
                });
            })
        },
    )
}

fn any_port() -> impl Strategy<Value = u16> {
    prop_oneof![40000..40010u16, 41000..41006u16]
}

fn any_claim() -> impl Strategy<Value = Claim> {
    let placement = prop_oneof![
        2 => select(&WORKERS[..]).prop_map(|w| Placement::Worker(worker(w))),
        3 => (select(vec!["", "zone=a", "zone!=a", "zone"]), any::<bool>()).prop_map(|(s, spread)| {
            let policy = if spread { Policy::Spread } else { Policy::Binpack };
            Placement::Select { selector: Selector::parse(s).unwrap(), policy }
        }),
    ];
    let one = prop_oneof![
        4 => (1..3u32).prop_map(Ports::Count),
        2 => (2..4u32).prop_map(Ports::Contiguous),
        2 => any_port().prop_map(|n| Ports::Specific(port(n))),
    ];
    let request = (select(vec![None, None, Some("s"), Some("r")]), one)
        .prop_map(|(r, ports)| PortRequest { name: None, range: r.map(range), ports });
    let which = prop_oneof![
        (1..3u32).prop_map(GpuChoice::Count),
        proptest::collection::btree_set(0..3u32, 1..3).prop_map(GpuChoice::Indexes),
    ];
    let share = prop_oneof![
        (1..9u64).prop_map(|gib| GpuShare::MemoryBytes(gib * GIB)),
        Just(GpuShare::Exclusive),
    ];
    let gpus = proptest::option::weighted(
        0.3,
        (which, share).prop_map(|(which, share)| GpuRequest { which, share }),
    );
    (
        (select(&NAMES[..]), select(vec!["u1", "u1", "u2"])),
        placement,
        proptest::collection::vec(request, 0..3),
        gpus,
        proptest::bool::weighted(0.2),
    )
        .prop_map(|((name, uid), placement, ports, gpus, bound)| {
            with(claim(name, "w0").uid(uid), |c| {
                (c.placement, c.ports, c.gpus, c.bound) =
                    (placement, ports, gpus.map(Box::new), bound);
            })
        })
}

fn any_who() -> impl Strategy<Value = Who> {
    let version = prop_oneof![
        6 => Just(Version::Any),
        4 => Just(Version::Present),
        3 => Just(Version::Before),
        1 => Just(Version::Wrong),
    ];
    let right = proptest::bool::weighted(0.92);
    (0..=SOME, right, version).prop_map(|(name, right, version)| Who { name, right, version })
}

/// Of somebody who judged the allocation as it is, mostly.
fn any_judged() -> impl Strategy<Value = Who> {
    let version = |of_now| if of_now { Version::Present } else { Version::Before };
    (any_who(), proptest::bool::weighted(0.9))
        .prop_map(move |(who, of_now)| Who { version: version(of_now), ..who })
}

fn any_leader() -> impl Strategy<Value = Leader> {
    prop_oneof![9 => Just(LEADER), 1 => Just(DEPOSED)]
}

fn any_handle() -> impl Strategy<Value = Option<Liveness>> {
    select(vec![None, None, process("b1", 7), process("b1", 8)])
}

/// Commands of operators and agents about workers.
fn any_worker_op() -> impl Strategy<Value = Op> {
    use WorkerPhase::*;
    let host = || select(&WORKERS[..]);
    let some_ports = || proptest::collection::vec(any_port(), 1..4);
    let patch = any_spec().prop_map(|s| WorkerPatch {
        ranges: Some(s.ranges),
        reserved: Some(s.reserved),
        gpus: Some(s.gpus),
        ..WorkerPatch::default()
    });
    let set = |(w, phase, by)| Op::As(Command::SetWorkerPhase { name: worker(w), phase, by });
    let operator = Just(Actor::Operator);
    let leader = || any_leader().prop_map(Actor::Leader);
    let seen = |(w, numbers, by): (_, Vec<u16>, _)| {
        let (worker, ports) = (worker(w), ports(&numbers));
        Op::As(Command::Quarantine { worker, ports, reason: "in use".into(), by })
    };
    let verified = |(w, by)| Op::As(Command::VerifyWorker { name: worker(w), by });
    prop_oneof![
        3 => (host(), any_spec()).prop_map(|(w, spec)| Op::As(register(w, spec))),
        3 => (host(), patch).prop_map(|(w, patch)| Op::As(update(w, patch))),
        4 => (host(), select(&BOOTS[..])).prop_map(|(w, boot)| Op::Boot(w, boot)),
        2 => (host(), select(vec![Ready, Ready, Cordoned, Draining]), operator).prop_map(set),
        5 => (host(), select(vec![Ready, Ready, Ready, Lost]), leader()).prop_map(set),
        3 => (host(), leader()).prop_map(verified),
        1 => (0..3u32).prop_map(|level| Op::As(Command::SetFeatureLevel { level })),
        1 => host().prop_map(|w| Op::As(remove(w))),
        2 => host().prop_map(|w| Op::As(evict(w, "burned"))),
        2 => (host(), some_ports()).prop_map(|(w, ports)| Op::As(quarantine(w, &ports))),
        3 => (host(), some_ports(), leader()).prop_map(seen),
        5 => (host(), some_ports()).prop_map(|(w, ports)| Op::As(lift(w, &ports))),
        4 => (host(), some_ports(), -1..6i64, any_leader())
            .prop_map(|(w, ports, ago, under)| Op::Clear(w, ports, ago, under)),
    ]
}

/// Commands of holders, and what the leader makes of their silence.
fn any_holder_op() -> impl Strategy<Value = Op> {
    let lease = || proptest::option::weighted(0.6, 0..=SOME);
    prop_oneof![
        20 => (any_claim(), lease()).prop_map(|(c, on)| Op::Allocate(vec![c], on)),
        4 => (proptest::collection::vec(any_claim(), 2..4), lease())
            .prop_map(|(gang, on)| Op::Allocate(gang, on)),
        2 => (0..=SOME).prop_map(Op::Again),
        5 => (any_who(), any_handle(), lease()).prop_map(|(who, how, on)| Op::Confirm(who, how, on)),
        3 => (any_who(), lease()).prop_map(|(who, to)| Op::Attach(who, to)),
        3 => any_who().prop_map(Op::Release),
        1 => select(&NAMES[..]).prop_map(|n| Op::As(force(n, "stuck"))),
        7 => (any_who(), proptest::option::weighted(0.8, 0..6usize))
            .prop_map(|(who, which)| Op::Report(who, which)),
        3 => Just(Op::As(grant_lease(1_000))),
        1 => (0..=SOME).prop_map(Op::Revoke),
        2 => (0..=SOME, any_leader()).prop_map(|(n, under)| Op::Expire(n, under)),
        4 => (any_judged(), any_leader()).prop_map(|(who, under)| Op::Miss(who, under)),
        6 => (any_judged(), -1..9i64, proptest::bool::weighted(0.9), any_leader())
            .prop_map(|(who, seen, here, under)| Op::Gone(who, seen, here, under)),
    ]
}

fn any_op() -> impl Strategy<Value = Op> {
    prop_oneof![5 => any_holder_op(), 2 => any_worker_op()]
}

/// The kind of an answer.
fn word(outcome: &Result<Outcome, Refusal>) -> String {
    let said = answer(outcome);
    let two = ["refused", "removed", "released", "ended"].iter().any(|kind| said.starts_with(kind));
    said.split(' ').take(if two { 2 } else { 1 }).collect::<Vec<_>>().join(" ")
}

/// Does the answer give what the table has, or had, of the names in the command?
fn is_in_table(
    command: &Command,
    outcome: &Result<Outcome, Refusal>,
    before: &State,
    after: &State,
) -> bool {
    let names: Vec<&InstanceName> = match command {
        Command::Allocate { claims, .. } => claims.iter().map(|c| &c.name).collect(),
        Command::Confirm { name, .. }
        | Command::Attach { name, .. }
        | Command::Reclaim { name, .. }
        | Command::Release { name, .. }
        | Command::ReportConflict { name, .. } => vec![name],
        _ => vec![],
    };
    let given: Vec<&Arc<Allocation>> = match outcome {
        Ok(Outcome::Worker(worker)) => return after.worker(&worker.name) == Some(worker),
        Ok(Outcome::Allocated { allocations, .. }) => allocations.iter().collect(),
        Ok(Outcome::Lease(lease)) => return after.lease(lease.id) == Some(lease),
        Ok(Outcome::LeaseEnded(Some(lease))) => return before.lease(lease.id) == Some(lease),
        Ok(
            Outcome::Confirmed(a)
            | Outcome::Attached(a)
            | Outcome::Lingers(a)
            | Outcome::Swapped(a),
        ) => vec![a],
        Ok(Outcome::Released(a)) => a.iter().collect(),
        Ok(Outcome::Reclaimed { allocation, .. }) => vec![allocation],
        Ok(Outcome::FeatureLevel(level)) => return after.feature_level == *level,
        Ok(Outcome::WorkerRemoved { .. } | Outcome::LeaseEnded(None) | Outcome::Noted) | Err(_) => {
            return true;
        }
    };
    let known = |name| after.allocation(name).or_else(|| before.allocation(name));
    names.into_iter().filter_map(known).eq(given)
}

/// How the command changed the phases of what was held, in words.
fn ways(command: &Command, before: &State, after: &State) -> Vec<String> {
    let phase = |a: Option<&Arc<Allocation>>| a.map_or("gone", |a| a.phase.name());
    let way = |a: &Arc<Allocation>| {
        let (from, to) = (phase(Some(a)), phase(after.allocation(a.name())));
        (from != to).then(|| format!("{}: {from}, {to}", command.kind()))
    };
    before.allocations_after(None).filter_map(way).collect()
}

/// What the core has of what the model knows.
fn shown(state: &State) -> Model {
    let why = |departure: &Departure| match &departure.why {
        ReleaseReason::ByHolder => "released",
        ReleaseReason::Forced { .. } => "forced",
        ReleaseReason::Reclaimed { cause, .. } => cause.name(),
    };
    let worker = |w: &Arc<Worker>| (w.name.clone(), host(w));
    let allocation = |a: &Arc<Allocation>| (a.name().clone(), held(a));
    Model {
        revision: state.revision.0,
        workers: state.workers_after(None).map(worker).collect(),
        held: state.allocations_after(None).map(allocation).collect(),
        leases: state.leases_after(None).map(|lease| (lease.id, lease.ttl)).collect(),
        gone: state.departures().map(|(name, gone)| (name.clone(), why(gone))).collect(),
    }
}

fn held(a: &Allocation) -> Held {
    let mut ports = vec![vec![]; a.claim.ports.len()];
    a.ports.iter().for_each(|p| ports[usize::from(p.request)].push(p.number));
    Held {
        claim: Claim::clone(&a.claim),
        worker: a.worker.clone(),
        ports,
        gpus: a.gpus.iter().map(|g| g.index).collect(),
        token: a.token.0,
        version: a.version.0,
        phase: a.phase,
        confirmed: a.confirmed,
        lease: a.lease,
        liveness: a.liveness.as_deref().cloned(),
        last: a.last_change.clone(),
    }
}

/// Since when a port is free is not shown: it is seen in the order in which ports are given.
fn host(w: &Worker) -> Host {
    let slot = |pool: &Pool, number: u16| match pool.taken(number) {
        None => Slot::Free(0),
        Some(Taken::Held(_)) => Slot::Held,
        Some(Taken::Reserved) => Slot::Reserved,
        Some(taken @ (Taken::Unmanaged | Taken::OutOf(_))) => panic!("{number}: {taken:?}"),
        Some(Taken::Quarantined(_)) => {
            let (_, quarantine) = pool.quarantines().find(|(n, _)| *n == number).unwrap();
            Slot::Quarantined(quarantine.source, quarantine.since.0)
        }
    };
    let ports = w.pools.iter().flat_map(|pool| {
        (pool.first()..=pool.last()).map(move |n| (n, (pool.name.clone(), slot(pool, n))))
    });
    Host {
        spec: WorkerSpec::clone(&w.spec),
        phase: w.phase,
        wanted: w.phase_before,
        created: w.created.0,
        booted: w.booted.0,
        ports: ports.collect(),
        clock: 0,
    }
}

/// The steps before which something happens to the whole table.
#[derive(Debug, Clone, Copy)]
struct Turns {
    /// A second core is built from what a snapshot keeps, and goes on beside the first.
    snapshot: usize,
    /// All become those of a new cluster.
    anew: usize,
}

/// Runs the sequence on the core and on the model.
fn agree(
    ops: &[Op],
    turns: Turns,
    seen: &RefCell<BTreeMap<String, u32>>,
) -> Result<(), TestCaseError> {
    let (mut model, mut state) = (Model::default(), State::default());
    let mut copy: Option<State> = None;
    for (i, op) in ops.iter().enumerate() {
        if i == turns.anew {
            model.anew();
            state = state.anew(Millis(0));
            copy = copy.as_ref().map(|copy| copy.anew(Millis(0)));
        }
        if i == turns.snapshot {
            copy = Some(rebuilt(&state).map_err(TestCaseError::fail)?);
        }
        let Some(command) = op.command(&model) else { continue };
        if command.validate().is_err() {
            continue;
        }
        let expected = match model.apply(&command) {
            Ok(word) => word.to_string(),
            Err(why) => format!("refused {why}"),
        };
        let before = state.clone();
        let (applied, events) = apply(&mut state, &ORIGIN, &command);
        prop_assert_eq!(word(&applied.outcome), &*expected, "step {}: {:?}", i, command);
        prop_assert!(
            is_in_table(&command, &applied.outcome, &before, &state),
            "step {i}: {command:?}"
        );
        prop_assert_eq!(shown(&state), model.shown(), "step {}: {:?}", i, command);
        prop_assert_eq!(events.is_empty(), before == state, "step {}: {:?}", i, command);
        check_invariants(&state).map_err(TestCaseError::fail)?;
        if let Some(copy) = &mut copy {
            prop_assert_eq!(&apply(copy, &ORIGIN, &command), &(applied, events));
            prop_assert_eq!(digest(copy), digest(&state));
            prop_assert_eq!(&*copy, &state);
            check_invariants(copy).map_err(TestCaseError::fail)?;
        }
        let kinds = std::iter::once(expected).chain(ways(&command, &before, &state));
        kinds.for_each(|kind| *seen.borrow_mut().entry(kind).or_default() += 1);
    }
    Ok(())
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |n| n.parse().expect("a number"))
}

#[test]
fn the_core_agrees_with_the_model_and_with_its_restored_self() {
    let seed = number("PORTWARDEN_SEED", 1);
    let cases = number("PORTWARDEN_CASES", CASES.into()) as u32;
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let seen = RefCell::default();
    let first = WORKERS.map(|w| {
        (any_spec(), any::<bool>()).prop_map(move |(spec, agent)| {
            let identity = Identity { machine_id: w.into(), ..booted("b1") };
            Op::As(register(w, with(spec, |s| s.identity = agent.then_some(identity))))
        })
    });
    let turns = (0..STEPS, 0..2 * STEPS).prop_map(|(snapshot, anew)| Turns { snapshot, anew });
    let sequences = (first, proptest::collection::vec(any_op(), 1..STEPS), turns)
        .prop_map(|(first, ops, turns)| ([&first[..], &ops].concat(), turns));
    let result = TestRunner::new_with_rng(config, rng)
        .run(&sequences, |(ops, turns)| agree(&ops, turns, &seen));
    if let Err(TestError::Fail(why, (ops, turns))) = result {
        let steps: String = ops.iter().map(|op| format!("  {op:?}\n")).collect();
        panic!(
            "{why}\n{turns:?} of:\n{steps}\nrun it again with:\n  \
             PORTWARDEN_SEED={seed} PORTWARDEN_CASES={cases} cargo test --test core agrees_with_the_model"
        );
    }
    result.map_err(|e| e.to_string()).unwrap();
    if cases >= CASES {
        let missing = |kind: &&&str| seen.borrow().get(**kind).copied().unwrap_or(0) < 10;
        let rare: Vec<_> = KINDS.iter().chain(&WAYS).filter(missing).collect();
        assert!(rare.is_empty(), "{rare:?} came too rarely to prove anything: {seen:?}");
    }
}
