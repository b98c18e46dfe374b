//! A snapshot brings back the same table, and a damaged one is refused.

use super::*;

fn busy() -> Table {
    let mut t = Table::default();
    let labelled = |s: &mut WorkerSpec| {
        s.labels = labels(&[("zone", "a")]);
        s.reserved = [port(40004)].into();
        s.identity = Some(Identity { machine_id: "m".into(), boot_id: "b".into(), namespace: 7 });
    };
    t.ok(register(
        "w",
        with(spec(&[("s", 40000, 40009), ("r", 41000, 41003)], &[24, 24]), labelled),
    ));
    t.ok(register("x", with(spec(&[], &[8]), |s| s.gpus[0].uuid = "GPU-x".into())));
    let a = t.grant(claim("a", "w").count(2).ask(Some("r"), Ports::Contiguous(2)).gpu_gib(1, 4));
    t.grant(claim("b", "w").specific(40008).gpus_alone(1));
    let gone = t.grant(claim("c", "w").count(2));
    t.ok(release("c", gone.token));
    t.ok(report("a", a.token, 0, 40000));
    t.ok(quarantine("w", &[40009]));
    t.ok(Command::SetWorkerPhase { name: worker("x"), phase: WorkerPhase::Draining });
    t
}

#[test]
fn a_rebuilt_table_is_the_same_and_goes_on_the_same() {
    let mut t = busy();
    let mut copy = rebuilt(&t.state).unwrap();
    assert_eq!(copy, t.state);
    let next = allocate(&[claim("n", "w").count(3)]);
    let applied = apply(&mut copy, &next);
    assert_eq!(applied.0.outcome, t.apply(next));
    assert_eq!(digest(&copy), digest(&t.state));
}

/// Rebuilds with one thing wrong.
fn damaged(
    spoil_worker: impl Fn(&mut Vec<Pool>, &WorkerSpec),
    spoil: impl Fn(&mut Allocation),
) -> Result<State, String> {
    let state = busy().state;
    let mut restore = Restore::new(state.feature_level, state.revision);
    for w in state.workers_after(None) {
        let mut pools: Vec<_> = w
            .pools
            .iter()
            .zip(&w.spec.ranges)
            .map(|(old, range)| empty(range, &w.spec, old, None))
            .collect();
        spoil_worker(&mut pools, &w.spec);
        let spec = WorkerSpec::clone(&w.spec);
        restore.worker(w.name.clone(), spec, w.phase, pools, w.created, w.version)?;
    }
    for a in state.allocations_after(None) {
        restore.allocation(with(Allocation::clone(a), &spoil))?;
    }
    restore.finish()
}

/// A pool like `old`, with one port more in quarantine or in the queue.
fn empty(range: &RangeSpec, spec: &WorkerSpec, old: &Pool, more: Option<(bool, u16)>) -> Pool {
    let new = Pool::new(range.name.clone(), range.first, range.last, spec.reserved.iter().copied());
    let (cursor, next) = old.cursors();
    let mut freed: Vec<_> = old.freed_order().collect();
    let mut quarantines: Vec<_> = old.quarantines().map(|(n, q)| (n, q.clone())).collect();
    match more {
        Some((true, n)) => {
            quarantines.push((n, Quarantine { reason: String::new(), since: Revision(1) }));
        }
        Some((false, n)) => freed.push((next, n)),
        None => {}
    }
    Pool::restore(new, cursor, next + 1, freed, quarantines)
}

#[test]
fn a_damaged_snapshot_is_refused_and_never_panics() {
    let fine = |_: &mut Vec<Pool>, _: &WorkerSpec| {};
    let on_a = |change: fn(&mut Allocation)| {
        move |a: &mut Allocation| {
            if a.name().as_str() == "a" {
                change(a);
            }
        }
    };
    damaged(fine, |_| {}).unwrap();
    type Spoil = fn(&mut Allocation);
    let spoilt: [(&str, Spoil); 17] = [
        ("port twice", |a| a.ports[1].number = a.ports[0].number),
        ("port of another range", |a| a.ports[0].range = range("r")),
        ("port of nowhere", |a| a.ports[0].number = 7),
        ("reserved port", |a| a.ports[0].number = 40004),
        ("one port too many", |a| {
            let extra = HeldPort { request: 99, number: 41003, ..a.ports[2].clone() };
            a.ports.push(extra);
        }),
        ("one port too few", |a| drop(a.ports.pop())),
        ("order", |a| a.ports.swap(0, 2)),
        ("torn band", |a| a.ports[3].number = 41003),
        ("GPU twice", |a| a.gpus.push(a.gpus[0].clone())),
        ("GPU of nowhere", |a| a.gpus[0].index = 9),
        ("more memory than asked", |a| a.gpus[0].memory_bytes += 1),
        ("too much memory", |a| a.gpus[0].memory_bytes = 30 * GIB),
        ("worker of nowhere", |a| a.worker = worker("nope")),
        ("a token from the future", |a| a.token = Token(99)),
        ("a version from the future", |a| a.version = Revision(99)),
        ("the name of another", |a| {
            a.claim = with(Claim::clone(&a.claim), |c| c.name = instance("b")).into();
        }),
        ("an invalid claim", |a| {
            a.claim = with(Claim::clone(&a.claim), |c| c.ports[0].ports = Ports::Count(0)).into();
        }),
    ];
    for (what, change) in spoilt {
        assert!(damaged(fine, on_a(change)).is_err(), "{what}");
    }
    for more in
        [(true, 7), (true, 40004), (true, 40000), (false, 7), (false, 40009), (false, 40001)]
    {
        let result = damaged(
            |pools, spec| {
                if let Some(range) = spec.ranges.first() {
                    pools[0] = empty(range, spec, &pools[0], Some(more));
                }
            },
            |_| {},
        );
        // A held port that the queue lists too is taken from the queue by its holder.
        assert_eq!(result.is_err(), more != (false, 40001) && more != (true, 40000), "{more:?}");
    }
    assert!(damaged(|pools, _| drop(pools.pop()), |_| {}).is_err(), "a pool is missing");
}

#[test]
fn a_record_that_comes_twice_is_refused() {
    let state = busy().state;
    let w = state.worker(&worker("x")).unwrap();
    let mut restore = Restore::new(state.feature_level, state.revision);
    let mut add = || {
        restore.worker(
            w.name.clone(),
            WorkerSpec::clone(&w.spec),
            w.phase,
            vec![],
            w.created,
            w.version,
        )
    };
    add().unwrap();
    assert_eq!(add().unwrap_err(), "worker x is recorded twice");
}

#[test]
fn digests_tell_states_apart() {
    let base = busy();
    let mut seen = std::collections::BTreeSet::from([digest(&base.state)]);
    let b = base.get("b").token;
    for command in [
        release("b", b),
        confirm("b", b, 0),
        quarantine("w", &[40007]),
        lift("w", &[40009]),
        Command::SetWorkerPhase { name: worker("w"), phase: WorkerPhase::Lost },
        allocate(&[claim("n", "w").count(1)]),
        allocate(&[claim("n", "w").count(1).uid("u2")]),
        register("w2", spec(&[("s", 1, 2)], &[])),
    ] {
        let mut state = base.state.clone();
        apply(&mut state, &command).0.outcome.unwrap();
        assert!(seen.insert(digest(&state)), "{command:?}");
    }
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
