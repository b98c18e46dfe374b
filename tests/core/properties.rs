//! The core and the naive model agree on every outcome of random commands in a small universe,
//! where collisions are frequent; a table that goes through a snapshot goes on the same.
//!
//! `PORTWARDEN_CASES` sets how many sequences are tried, `PORTWARDEN_SEED` which ones. A failure
//! prints the shortest sequence that proptest finds, and the command that runs it again.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};

use super::make::*;
use super::model::{Held, Host, Model, Slot};
use super::*;

const WORKERS: [&str; 3] = ["w0", "w1", "w2"];
const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
const CASES: u32 = 1000;
const STEPS: usize = 80;

/// What must come of some commands, or the sequences prove little.
const KINDS: [&str; 16] = [
    "worker",
    "removed true",
    "granted",
    "repeated",
    "confirmed",
    "released true",
    "swapped",
    "reclaimed",
    "refused NameTaken",
    "refused NothingFits",
    "refused PortNotFree",
    "refused PortNotHeld",
    "refused WorkerInUse",
    "refused WorkerNotReady",
    "refused WouldLose",
    "refused WrongToken",
];

/// A command whose names and tokens are chosen when it is its turn: a `usize` stands for
/// one of the names that are held by then, or now and then for one that is not.
#[derive(Debug, Clone)]
enum Op {
    As(Command),
    /// The claim that a name holds, once more.
    Again(usize),
    /// With the right token or not, as in the next two.
    Confirm(usize, bool),
    Release(usize, bool),
    /// The n-th port that it holds, or for `None` the port that was swapped out last, or just any.
    Report(usize, bool, Option<usize>),
}

impl Op {
    fn command(&self, model: &Model) -> Option<Command> {
        let pick = |n: usize| match model.held.keys().nth(n % (model.held.len() + 1)) {
            Some(name) => name.to_string(),
            None => "nobody".into(),
        };
        let token = |name: &str, right: bool| {
            let held = model.held.get(&instance(name));
            Token(held.map_or(1, |h| h.token) + u64::from(!right))
        };
        Some(match self {
            Op::As(command) => command.clone(),
            Op::Again(name) => allocate(&[model.held.get(&instance(&pick(*name)))?.claim.clone()]),
            Op::Confirm(name, right) => {
                let name = pick(*name);
                confirm(&name, token(&name, *right), 0)
            }
            Op::Release(name, right) => {
                let name = pick(*name);
                release(&name, token(&name, *right))
            }
            Op::Report(name, right, which) => {
                let name = pick(*name);
                let held = model.held.get(&instance(&name))?;
                let number = match which {
                    Some(i) => *held.ports.concat().iter().cycle().nth(*i)?,
                    None => held.swapped.unwrap_or(41005),
                };
                report(&name, token(&name, *right), 0, number)
            }
        })
    }
}

fn any_spec() -> impl Strategy<Value = WorkerSpec> {
    let shapes = select(vec![
        ranges(&[("s", 40000, 40007), ("r", 41000, 41005)]),
        ranges(&[("r", 41000, 41005), ("s", 40000, 40007)]),
        ranges(&[("s", 40000, 40009)]),
        ranges(&[("s", 40000, 40005), ("r", 41000, 41003)]),
        ranges(&[("s", 40001, 40007), ("r", 41000, 41005)]),
    ]);
    let gpus = select(vec![vec![], vec![8], vec![8, 8], vec![4, 8, 12]]);
    (shapes, gpus, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(shape, gpus, reserve, zone, reverse)| {
            with(spec(&[], &gpus), |s| {
                s.ranges = shape;
                if reverse {
                    s.gpus.reverse();
                }
                if reserve {
                    s.reserved = [port(40002), port(41003)].into();
                }
                if zone {
                    s.labels = labels(&[("zone", "a")]);
                }
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
                (c.placement, c.ports, c.gpus, c.bound) = (placement, ports, gpus, bound);
            })
        })
}

fn any_op() -> impl Strategy<Value = Op> {
    let host = || select(&WORKERS[..]);
    let name = || 0..60usize;
    let right = || proptest::bool::weighted(0.9);
    let some_ports = || proptest::collection::vec(any_port(), 1..4);
    let patch = any_spec().prop_map(|s| WorkerPatch {
        ranges: Some(s.ranges),
        reserved: Some(s.reserved),
        gpus: Some(s.gpus),
        ..WorkerPatch::default()
    });
    let phase = select(vec![
        WorkerPhase::Ready,
        WorkerPhase::Ready,
        WorkerPhase::Ready,
        WorkerPhase::Cordoned,
        WorkerPhase::Lost,
    ]);
    prop_oneof![
        2 => (host(), any_spec()).prop_map(|(w, spec)| Op::As(register(w, spec))),
        2 => (host(), patch)
            .prop_map(|(w, patch)| Op::As(Command::UpdateWorker { name: worker(w), patch })),
        1 => (host(), phase)
            .prop_map(|(w, phase)| Op::As(Command::SetWorkerPhase { name: worker(w), phase })),
        1 => host().prop_map(|w| Op::As(Command::RemoveWorker { name: worker(w) })),
        12 => any_claim().prop_map(|c| Op::As(allocate(&[c]))),
        4 => proptest::collection::vec(any_claim(), 2..4).prop_map(|g| Op::As(allocate(&g))),
        2 => name().prop_map(Op::Again),
        3 => (name(), right()).prop_map(|(n, f)| Op::Confirm(n, f)),
        4 => (name(), right()).prop_map(|(n, f)| Op::Release(n, f)),
        1 => select(&NAMES[..]).prop_map(|n| Op::As(force(n, "stuck"))),
        6 => (name(), right(), proptest::option::weighted(0.8, 0..6usize))
            .prop_map(|(n, f, which)| Op::Report(n, f, which)),
        2 => (host(), some_ports()).prop_map(|(w, ports)| Op::As(quarantine(w, &ports))),
        3 => (host(), some_ports()).prop_map(|(w, ports)| Op::As(lift(w, &ports))),
    ]
}

/// The kind of an answer.
fn word(outcome: &Result<Outcome, Refusal>) -> String {
    let said = answer(outcome);
    let two = ["refused", "removed", "released"].iter().any(|kind| said.starts_with(kind));
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
        Command::Allocate { claims } => claims.iter().map(|c| &c.name).collect(),
        Command::Confirm { name, .. }
        | Command::Release { name, .. }
        | Command::ReportConflict { name, .. } => vec![name],
        _ => vec![],
    };
    let given: Vec<&Arc<Allocation>> = match outcome {
        Ok(Outcome::Worker(worker)) => return after.worker(&worker.name) == Some(worker),
        Ok(Outcome::Allocated { allocations, .. }) => allocations.iter().collect(),
        Ok(Outcome::Confirmed(a) | Outcome::Swapped(a)) => vec![a],
        Ok(Outcome::Released(a)) => a.iter().collect(),
        Ok(Outcome::Reclaimed { allocation, .. }) => vec![allocation],
        Ok(Outcome::WorkerRemoved { .. } | Outcome::Noted) | Err(_) => return true,
    };
    let known = |name| after.allocation(name).or_else(|| before.allocation(name));
    names.into_iter().filter_map(known).eq(given)
}

/// What the core has of what the model knows.
fn held(state: &State) -> BTreeMap<InstanceName, Held> {
    let plain = |a: &Arc<Allocation>| {
        let mut ports = vec![vec![]; a.claim.ports.len()];
        a.ports.iter().for_each(|p| ports[usize::from(p.request)].push(p.number));
        let held = Held {
            claim: Claim::clone(&a.claim),
            worker: a.worker.clone(),
            ports,
            gpus: a.gpus.iter().map(|g| g.index).collect(),
            token: a.token.0,
            bound: a.phase == Phase::Bound,
            swapped: match a.last_change {
                Some(LastChange { kind: ChangeKind::Swapped { port }, .. }) => Some(port),
                _ => None,
            },
        };
        (a.name().clone(), held)
    };
    state.allocations_after(None).map(plain).collect()
}

type Hosts = Vec<(WorkerName, WorkerSpec, WorkerPhase, BTreeSet<u16>)>;

fn hosts(state: &State) -> Hosts {
    let plain = |w: &Arc<Worker>| {
        let quarantined = w.pools.iter().flat_map(Pool::quarantines).map(|q| q.0).collect();
        (w.name.clone(), WorkerSpec::clone(&w.spec), w.phase, quarantined)
    };
    state.workers_after(None).map(plain).collect()
}

fn model_hosts(model: &Model) -> Hosts {
    let plain = |(name, host): (&WorkerName, &Host)| {
        let quarantined = host.ports.iter().filter(|p| p.1.1 == Slot::Quarantined);
        let quarantined = quarantined.map(|p| *p.0).collect();
        (name.clone(), host.spec.clone(), host.phase, quarantined)
    };
    model.workers.iter().map(plain).collect()
}

/// Runs the sequence on the core and on the model; at step `snapshot` a second core is built from
/// what a snapshot keeps, and goes on beside the first.
fn agree(
    ops: &[Op],
    snapshot: usize,
    seen: &RefCell<BTreeMap<String, u32>>,
) -> Result<(), TestCaseError> {
    let (mut model, mut state) = (Model::default(), State::default());
    let mut copy: Option<State> = None;
    for (i, op) in ops.iter().enumerate() {
        if i == snapshot {
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
        let (applied, events) = apply(&mut state, &command);
        prop_assert_eq!(word(&applied.outcome), &*expected, "step {}: {:?}", i, command);
        prop_assert!(
            is_in_table(&command, &applied.outcome, &before, &state),
            "step {i}: {command:?}"
        );
        prop_assert_eq!(&held(&state), &model.held, "step {}: {:?}", i, command);
        prop_assert_eq!(hosts(&state), model_hosts(&model), "step {}: {:?}", i, command);
        prop_assert_eq!(state.revision.0, model.revision, "step {}: {:?}", i, command);
        prop_assert_eq!(events.is_empty(), before == state, "step {}: {:?}", i, command);
        *seen.borrow_mut().entry(expected).or_default() += 1;
        check_invariants(&state).map_err(TestCaseError::fail)?;
        if let Some(copy) = &mut copy {
            prop_assert_eq!(&apply(copy, &command), &(applied, events));
            prop_assert_eq!(digest(copy), digest(&state));
            prop_assert_eq!(&*copy, &state);
        }
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
    let first = WORKERS.map(|w| any_spec().prop_map(move |s| Op::As(register(w, s))));
    let sequences = (first, proptest::collection::vec(any_op(), 1..STEPS), 0..STEPS)
        .prop_map(|(first, ops, snapshot)| ([&first[..], &ops].concat(), snapshot));
    let result = TestRunner::new_with_rng(config, rng)
        .run(&sequences, |(ops, snapshot)| agree(&ops, snapshot, &seen));
    if let Err(TestError::Fail(why, (ops, snapshot))) = result {
        let steps: String = ops.iter().map(|op| format!("  {op:?}\n")).collect();
        panic!(
            "{why}\nsnapshot at step {snapshot} of:\n{steps}\nrun it again with:\n  \
             PORTWARDEN_SEED={seed} PORTWARDEN_CASES={cases} cargo test --test core agrees_with_the_model"
        );
    }
    result.map_err(|e| e.to_string()).unwrap();
    if cases >= CASES {
        let missing = |kind: &&&str| seen.borrow().get(**kind).copied().unwrap_or(0) < 10;
        let rare: Vec<_> = KINDS.iter().filter(missing).collect();
        assert!(rare.is_empty(), "{rare:?} came too rarely to prove anything: {seen:?}");
    }
}
