//! A snapshot brings back the same table, and a damaged one is refused.

use std::sync::Arc;

use super::*;

/// A table with something of everything that a snapshot keeps.
fn busy() -> Table {
    let mut t = Table::default();
    let labelled = |s: &mut WorkerSpec| {
        s.labels = labels(&[("zone", "a")]);
        s.reserved = [port(40004)].into();
        s.identity = Some(booted("b1"));
    };
    t.ok(register(
        "w",
        with(spec(&[("s", 40000, 40009), ("r", 41000, 41003)], &[24, 24]), labelled),
    ));
    t.ok(register("x", with(spec(&[], &[8]), |s| s.gpus[0].uuid = "GPU-x".into())));
    let elsewhere = Identity { namespace: 8, ..booted("b1") };
    t.ok(register("y", with(spec(&[], &[]), |s| s.identity = Some(elsewhere))));
    let lease = t.lease();
    let a = t.grant(
        claim("a", "w").count(2).ask(Some("r"), Ports::Contiguous(2)).gpu_gib(1, 4).on(lease),
    );
    t.grant(claim("b", "w").specific(40008).gpus_alone(1));
    let gone = t.grant(claim("c", "w").count(2));
    t.ok(release("c", gone.token));
    t.ok(report("a", a.token, 0, 40000));
    t.ok(quarantine("w", &[40009]));
    t.ok(observe("w", &[41002]));
    let d = t.grant(claim("d", "w").count(1));
    t.ok(confirm_with("d", d.token, 0, process("b1", 7), Some(lease)));
    t.lingering(claim("l", "w").count(1));
    t.grant(claim("out", "w").count(1));
    t.ok(force("out", "stuck"));
    let late = t.grant(claim("late", "x").gpu_gib(1, 1));
    t.ok(miss(&late));
    t.ok(phase("x", WorkerPhase::Draining));
    t.ok(lose("y"));
    t
}

#[test]
fn a_rebuilt_table_is_the_same_and_goes_on_the_same() {
    let mut t = busy();
    let mut copy = rebuilt(&t.state).unwrap();
    assert_eq!(copy, t.state);
    let lease = t.get("a").lease.unwrap();
    for next in [allocate(&[claim("n", "w").count(1)]), expire(lease), find("y")] {
        let applied = apply(&mut copy, &ORIGIN, &next);
        assert_eq!(applied.0.outcome, t.apply(next));
        assert_eq!(digest(&copy), digest(&t.state));
    }
}

/// Rebuilds with one thing wrong.
fn damaged(spoil: impl Fn(&mut Parts)) -> Result<State, String> {
    with(Parts::of(&busy().state), spoil).restore()
}

impl Parts {
    fn worker(&mut self, name: &str) -> &mut WorkerPart {
        self.workers.iter_mut().find(|w| w.name == worker(name)).unwrap()
    }

    fn allocation(&mut self, name: &str) -> &mut Allocation {
        self.allocations.iter_mut().find(|a| *a.name() == instance(name)).unwrap()
    }
}

fn with_claim(a: &mut Allocation, change: impl FnOnce(&mut Claim)) {
    a.claim = with(Claim::clone(&a.claim), change).into();
}

#[test]
fn a_damaged_allocation_is_refused_and_never_panics() {
    damaged(|_| {}).unwrap();
    type Spoil = fn(&mut Allocation);
    let spoilt: [(&str, Spoil); 29] = [
        ("port twice", |a| a.ports[1].number = a.ports[0].number),
        ("port of another range", |a| a.ports[0].range = range("r")),
        ("port of nowhere", |a| a.ports[0].number = 7),
        ("reserved port", |a| a.ports[0].number = 40004),
        ("quarantined port", |a| a.ports[0].number = 40009),
        ("one port too many", |a| {
            let extra = HeldPort { request: 99, number: 41003, ..a.ports[2].clone() };
            a.ports = [&a.ports, [extra].as_slice()].concat().into();
        }),
        ("one port too few", |a| a.ports = a.ports[..a.ports.len() - 1].into()),
        ("order", |a| a.ports.swap(0, 2)),
        ("torn band", |a| a.ports[3].number = 41003),
        ("GPU twice", |a| {
            a.gpus = [&a.gpus, [a.gpus[0].clone()].as_slice()].concat().into();
        }),
        ("GPU of nowhere", |a| a.gpus[0].index = 9),
        ("more memory than asked", |a| a.gpus[0].memory_bytes += 1),
        ("too much memory", |a| a.gpus[0].memory_bytes = 30 * GIB),
        ("worker of nowhere", |a| a.worker = worker("nope")),
        ("a token from the future", |a| a.token = Token(99)),
        ("a token older than its worker", |a| a.token = Token(1)),
        ("a version from the future", |a| a.version = Revision(99)),
        ("a version without a change", |a| a.last_change = None),
        ("a change from the future", |a| {
            let from = a.version;
            a.last_change = Some(LastChange { from, kind: ChangeKind::Confirmed });
        }),
        ("the name of another", |a| with_claim(a, |c| c.name = instance("b"))),
        ("an invalid claim", |a| with_claim(a, |c| c.ports[0].ports = Ports::Count(0))),
        ("no time to confirm", |a| a.confirm_within = Millis(0)),
        ("more swaps than allowed", |a| a.swaps = limits::SWAPS_MAX + 1),
        ("bound by nobody", |a| a.phase = Phase::Bound),
        ("reserved and confirmed", |a| a.confirmed = true),
        ("a reason not to be there", |a| a.reason = Some("lost".into())),
        ("a lease of nowhere", |a| a.lease = Some(LeaseId(2))),
        ("a handle of a failed start", |a| a.liveness = process("b1", 7).map(Arc::new)),
        ("lingering on a lease", |a| {
            (a.phase, a.reason) = (Phase::Lingering, Some("lost".into()));
        }),
    ];
    for (what, change) in spoilt {
        assert!(damaged(|parts| change(parts.allocation("a"))).is_err(), "{what}");
    }
}

#[test]
fn damage_beyond_one_allocation_is_refused_too() {
    type Spoil = fn(&mut Parts);
    let spoilt: [(&str, Spoil); 27] = [
        ("no feature level", |p| p.feature_level = 0),
        ("a feature level of another build", |p| p.feature_level = FEATURE_LEVEL + 1),
        ("a revision that leaves no room", |p| p.revision = Revision(u64::MAX)),
        ("a revision that lies behind", |p| p.revision = Revision(5)),
        ("a handle of nothing", |p| p.allocation("d").liveness = process("", 7).map(Arc::new)),
        ("lingering without a reason", |p| p.allocation("l").reason = None),
        ("silent and not lingering", |p| {
            let (d, cause) = (p.allocation("d"), Cause::LeaseEnded);
            let (from, kind) = (Revision(d.token.0), ChangeKind::Lingered { cause });
            d.last_change = Some(LastChange { from, kind });
        }),
        ("lingering where no agent is", |p| {
            let w = p.worker("w");
            (w.spec.identity, w.revisions[2]) = (None, Revision(0));
        }),
        ("a lease from the future", |p| p.leases.push((LeaseId(99), Millis(1_000)))),
        ("a lease of no revision", |p| p.leases.push((LeaseId(0), Millis(1_000)))),
        ("a lease without time", |p| p.leases[0].1 = Millis(0)),
        ("a lease twice", |p| p.leases.push(p.leases[0])),
        ("a departure of what is held", |p| p.departures[0].0 = instance("a")),
        ("a departure by its holder", |p| p.departures[0].1.why = ReleaseReason::ByHolder),
        ("a departure from the future", |p| p.departures[1].1.revision = Revision(99)),
        ("a departure before its grant", |p| p.departures[1].1.token = Token(98)),
        ("a departure out of order", |p| p.departures.swap(0, 1)),
        ("a departure twice", |p| p.departures.push(p.departures[1].clone())),
        ("a worker of the future", |p| p.worker("w").revisions[1] = Revision(99)),
        ("a worker registered after its change", |p| {
            p.worker("x").revisions[0] = p.revision;
        }),
        ("a boot of the future", |p| p.worker("w").revisions[2] = p.revision),
        ("a boot without an agent", |p| p.worker("x").revisions[2] = Revision(1)),
        ("an agent without a boot", |p| p.worker("w").revisions[2] = Revision(0)),
        ("a phase to go back to for nothing", |p| p.worker("w").phases.1 = WorkerPhase::Draining),
        ("lost for ever", |p| p.worker("y").phases.1 = WorkerPhase::Lost),
        ("a pool is missing", |p| drop(p.worker("w").pools.pop())),
        ("two workers of one namespace", |p| p.worker("y").spec.identity = Some(booted("b1"))),
    ];
    for (what, change) in spoilt {
        assert!(damaged(change).is_err(), "{what}");
    }
}

#[test]
fn a_damaged_pool_is_refused_and_never_panics() {
    let quarantine = |since: u64| Quarantine {
        reason: String::new(),
        source: Source::Observed,
        since: Revision(since),
    };
    for number in [7, 40004] {
        let spoil = |p: &mut PoolPart| p.quarantines.push((number, quarantine(1)));
        assert!(damaged(|p| spoil(&mut p.worker("w").pools[0])).is_err(), "{number}");
    }
    for number in [7, 40004, 40009] {
        let spoil = |p: &mut PoolPart| p.freed.push((p.next_freed - 1, number));
        assert!(damaged(|p| spoil(&mut p.worker("w").pools[0])).is_err(), "{number}");
    }
    type Spoil = fn(&mut PoolPart);
    let spoilt: [(&str, Spoil); 4] = [
        ("a cursor outside", |p| p.cursor = 1),
        ("a counter behind its queue", |p| p.next_freed = 1),
        ("a counter that leaves no room", |p| p.next_freed = u64::MAX),
        ("a quarantine from the future", |p| p.quarantines[0].1.since = Revision(99)),
    ];
    for (what, change) in spoilt {
        assert!(damaged(|p| change(&mut p.worker("w").pools[0])).is_err(), "{what}");
    }
}

#[test]
fn a_record_that_comes_twice_is_refused() {
    let twice = |p: &mut Parts| {
        let again = Parts::of(&busy().state).workers.remove(1);
        p.workers.push(again);
    };
    assert_eq!(damaged(twice).unwrap_err(), "worker x is recorded twice");
    let twice = |p: &mut Parts| p.allocations.push(p.allocations[0].clone());
    assert_eq!(damaged(twice).unwrap_err(), "allocation a: is recorded twice");
}

#[test]
fn digests_tell_states_apart() {
    let base = busy();
    let mut seen = std::collections::BTreeSet::from([digest(&base.state)]);
    let b = base.get("b").token;
    let (d, lease) = (base.get("d"), base.get("a").lease.unwrap());
    for command in [
        release("b", b),
        confirm("b", b, 0),
        confirm_with("b", b, 0, process("b1", 7), None),
        confirm_with("b", b, 0, process("b1", 8), None),
        confirm_with("b", b, 0, None, Some(lease)),
        attach("b", b, 0, Some(lease)),
        attach("d", d.token, 0, None),
        reclaim(d, gone(booted("b1"), base.state.revision)),
        force("d", "its ports are closed"),
        miss(base.get("b")),
        expire(lease),
        revoke(lease),
        grant_lease(1_000),
        grant_lease(2_000),
        quarantine("w", &[41003]),
        observe("w", &[41003]),
        lift("w", &[40009]),
        lose("w"),
        find("y"),
        phase("y", WorkerPhase::Cordoned),
        reboot("w", booted("b2")),
        evict("w", "gone"),
        allocate(&[claim("n", "w").count(1)]),
        allocate(&[claim("n", "w").count(1).on(lease)]),
        allocate(&[claim("n", "w").count(1).uid("u2")]),
        register("w2", spec(&[("s", 1, 2)], &[])),
    ] {
        let mut state = base.state.clone();
        apply(&mut state, &ORIGIN, &command).0.outcome.unwrap();
        assert!(seen.insert(digest(&state)), "{command:?}");
    }
}

/// What a command does not tell apart, a snapshot may.
#[test]
fn digests_tell_why_a_name_left() {
    let left = |why: ReleaseReason| {
        digest(&damaged(|parts| parts.departures[0].1.why = why.clone()).unwrap())
    };
    let reason = || "gone".to_string();
    let mut seen = std::collections::BTreeSet::from([
        left(ReleaseReason::Forced { reason: reason() }),
        left(ReleaseReason::Forced { reason: String::new() }),
    ]);
    for cause in Cause::ALL {
        seen.insert(left(ReleaseReason::Reclaimed { cause, reason: reason() }));
    }
    assert_eq!(seen.len(), 2 + Cause::ALL.len());
}

#[test]
fn the_ids_of_members_are_remembered_for_ever() {
    let mut t = busy();
    let (before, revision) = (digest(&t.state), t.state.revision);
    t.state.remember_member(2, "");
    t.state.remember_member(1, "one");
    let pending = digest(&t.state);
    t.state.remember_member(2, "two");
    // Who comes under a bound id, or says nothing of it, does not change it.
    t.state.remember_member(2, "anew");
    t.state.remember_member(1, "");
    assert_eq!(t.state.members().collect::<Vec<_>>(), [(1, "one"), (2, "two")]);
    assert_eq!(t.state.member_incarnation(3), None, "never used");
    assert_eq!(t.state.revision, revision, "the table is as it was");
    assert!(before != pending && pending != digest(&t.state));
    let copy = rebuilt(&t.state).unwrap();
    assert_eq!(digest(&copy), digest(&t.state));
    assert_eq!(copy, t.state);
}
