//! Where a claim with a selector goes.

use super::*;
use crate::core::state::STALE_SCOPES_MAX;

/// Workers `w0`, `w1`, … with so many ports each, labelled `n=<i>`, `parity=even|odd`.
fn fleet(ports: &[u16]) -> Table {
    let mut t = Table::default();
    for (i, count) in ports.iter().enumerate() {
        let parity = if i % 2 == 0 { "even" } else { "odd" };
        let labelled = |s: &mut WorkerSpec| {
            s.labels = labels(&[("n", &i.to_string()), ("parity", parity)]);
        };
        let span = ("service", 40000, 40000 + count - 1);
        t.ok(register(&format!("w{i}"), with(spec(&[span], &[]), labelled)));
    }
    t
}

fn place(t: &mut Table, name: &str, selector: &str, policy: Policy) -> String {
    t.grant(claim(name, "any").count(1).select(selector, policy)).worker.to_string()
}

fn selection(refusal: Refusal) -> (u64, u64, u64, Vec<(LackKind, u64)>) {
    match refusal {
        Refusal::NothingFits {
            shortage: Shortage::OnSelection { looked_at, candidates, not_ready, reasons },
            ..
        } => (looked_at, candidates, not_ready, reasons),
        other => panic!("not a selection: {other}"),
    }
}

#[test]
fn binpack_takes_the_fullest_that_fits_and_spread_the_emptiest_ties_by_name() {
    let mut t = fleet(&[3, 2, 2, 3]);
    assert_eq!(place(&mut t, "a", "", Policy::Binpack), "w1");
    assert_eq!(place(&mut t, "b", "", Policy::Binpack), "w1", "fuller by one now");
    assert_eq!(place(&mut t, "c", "", Policy::Binpack), "w2", "w1 is full");
    assert_eq!(place(&mut t, "d", "", Policy::Spread), "w0");
    assert_eq!(place(&mut t, "e", "", Policy::Spread), "w3");
    assert_eq!(place(&mut t, "f", "", Policy::Spread), "w0", "2, 0, 1, 2 are free");
}

#[test]
fn every_term_of_a_selector_counts() {
    let mut t = fleet(&[9, 9, 9, 9]);
    let mut at = |i: usize, selector| place(&mut t, &format!("i{i}"), selector, Policy::Binpack);
    for (i, (selector, expected)) in [
        ("n=2", "w2"),
        ("n!=0,n!=1,n!=2", "w3"),
        ("n in (1,3),n!=1", "w3"),
        ("n notin (0,2),parity=odd,n!=3", "w1"),
        ("parity,n=0", "w0"),
        ("!nope,n=1", "w1"),
        ("parity in (odd,even),n in (0)", "w0"),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(at(i, selector), expected, "{selector}");
    }
    let none = claim("z", "any").count(1).select("!parity", Policy::Binpack);
    let (looked_at, candidates, _, reasons) = selection(t.refused(allocate(&[none])));
    assert_eq!((looked_at, candidates, reasons), (4, 4, vec![(LackKind::Labels, 4)]));
}

#[test]
fn several_values_of_a_label_are_walked_in_one_order() {
    let mut t = fleet(&[5, 1, 3, 2, 4]);
    let asked = |name: &str| claim(name, "any").count(1).select("n in (0,2,4)", Policy::Spread);
    let order: Vec<_> =
        (0..6).map(|i| t.grant(asked(&format!("i{i}"))).worker.to_string()).collect();
    assert_eq!(order, ["w0", "w0", "w4", "w0", "w2", "w4"]);
}

#[test]
fn a_positive_term_narrows_the_search_to_its_label() {
    let mut t = fleet(&[1; 20]);
    let asked = claim("a", "any").count(2).select("n in (3,4),parity=even", Policy::Binpack);
    let (looked_at, candidates, _, reasons) = selection(t.refused(allocate(&[asked])));
    assert_eq!((looked_at, candidates), (2, 2), "the smaller of 2 and 10");
    assert_eq!(reasons, [(LackKind::Labels, 1), (LackKind::Ports, 1)]);
    let unknown = claim("a", "any").count(1).select("n=77", Policy::Binpack);
    let refusal = t.refused(allocate(&[unknown]));
    assert!(refusal.to_string().ends_with("looked at 0 of 0 workers: no worker has such labels"));
}

#[test]
fn a_refusal_counts_what_each_worker_lacks() {
    let mut t = fleet(&[1, 4, 4, 2]);
    t.ok(phase("w3", WorkerPhase::Cordoned));
    t.ok(quarantine("w1", &[40001, 40002]));
    let asked = claim("a", "any").band(3).count(1).gpu_gib(1, 1).select("", Policy::Spread);
    let refusal = t.refused(allocate(&[asked]));
    assert!(
        refusal.to_string().ends_with(
            "looked at 3 of 3 workers: too few ports free on 2, too few GPUs fit on 1, 1 not ready"
        ),
        "{refusal}"
    );
}

#[test]
fn gpu_claims_go_by_gpu_memory_and_exclusive_ones_by_idle_gpus() {
    let mut t = Table::default();
    for (name, gib) in [("a", &[24, 24][..]), ("b", &[48]), ("c", &[]), ("d", &[8, 8, 8])] {
        t.ok(register(name, spec(&[("s", 1, 9)], gib)));
    }
    let mut at = |name: &str, asked: Claim, policy| {
        t.grant(with(asked, |c| c.name = instance(name)).select("", policy)).worker.to_string()
    };
    let memory = |gib| claim("x", "any").gpu_gib(1, gib);
    assert_eq!(at("1", memory(4), Policy::Binpack), "d", "the emptiest GPU of d has least");
    assert_eq!(at("2", memory(4), Policy::Spread), "b");
    assert_eq!(at("3", memory(20), Policy::Binpack), "a");
    let alone = |n| claim("x", "any").gpus_alone(n);
    assert_eq!(at("4", alone(1), Policy::Binpack), "a", "one idle GPU there, two on d");
    assert_eq!(at("5", alone(2), Policy::Binpack), "d");
    let (looked_at, candidates, _, reasons) = selection(
        t.refused(allocate(&[claim("6", "any").gpus_alone(1).select("", Policy::Spread)])),
    );
    assert_eq!((looked_at, candidates), (4, 4), "workers without GPUs are spoken of too");
    assert_eq!(reasons, [(LackKind::Gpus, 3), (LackKind::GpuBusy, 1)]);
}

/// Not timed: of many workers that do not fit, a bounded number is examined, and the refusal
/// speaks of those that were, each with what it lacks.
#[test]
fn a_search_examines_a_bounded_number_of_workers() {
    let limit = limits::PLACEMENT_CANDIDATES_MAX as u64;
    let mut state = State::default();
    for i in 0..2000 {
        let span = ("service", 1, 2);
        let (applied, _) =
            apply(&mut state, &ORIGIN, &register(&format!("w{i}"), spec(&[span], &[8])));
        applied.outcome.unwrap();
    }
    check_invariants(&state).unwrap();
    for (asked, kind) in [
        (claim("a", "any").band(2).specific(1), LackKind::Ports),
        (claim("a", "any").specific(1).gpu_gib(2, 1), LackKind::Gpus),
        (claim("a", "any").specific(9), LackKind::PortTaken),
        (claim("a", "any").count(1).select("zone=a", Policy::Spread), LackKind::Labels),
        (claim("a", "any").count(1).select("zone", Policy::Spread), LackKind::Labels),
    ] {
        for policy in [Policy::Binpack, Policy::Spread] {
            let mut asked = asked.clone();
            asked.placement = match asked.placement {
                Placement::Select { selector, .. } => Placement::Select { selector, policy },
                _ => Placement::Select { selector: Selector::default(), policy },
            };
            let (applied, _) = apply(&mut state, &ORIGIN, &allocate(&[asked]));
            let (looked_at, _, _, reasons) = selection(applied.outcome.unwrap_err());
            let expected = if reasons.is_empty() { 0 } else { limit };
            assert_eq!(looked_at, expected, "{kind:?}");
            assert_eq!(reasons.iter().map(|(_, n)| n).sum::<u64>(), looked_at, "each lacks one");
            assert!(reasons.iter().all(|(k, _)| *k == kind), "{reasons:?}");
        }
    }
}

/// The refusal must speak of the workers that were searched, not of others on which it might fit.
#[test]
fn a_refusal_speaks_of_the_workers_that_were_searched() {
    let limit = limits::PLACEMENT_CANDIDATES_MAX;
    let mut state = State::default();
    let mut add = |name: String, first: u16, last: u16| {
        let (applied, _) =
            apply(&mut state, &ORIGIN, &register(&name, spec(&[("s", first, last)], &[])));
        applied.outcome.unwrap();
    };
    (0..limit).for_each(|i| add(format!("full{i}"), 1, 2));
    add("roomy".into(), 5, 9);
    let asked = |policy| claim("a", "any").specific(5).select("", policy);
    let (applied, _) = apply(&mut state, &ORIGIN, &allocate(&[asked(Policy::Binpack)]));
    let (looked_at, candidates, _, reasons) = selection(applied.outcome.unwrap_err());
    assert_eq!((looked_at, candidates), (limit as u64, limit as u64 + 1));
    assert_eq!(reasons, [(LackKind::PortTaken, limit as u64)]);
    let (applied, _) = apply(&mut state, &ORIGIN, &allocate(&[asked(Policy::Spread)]));
    applied.outcome.unwrap();
}

/// Its worker has two scopes.
fn three_ports_in_a_zone() -> WorkerSpec {
    with(spec(&[("service", 1, 3)], &[]), |s| s.labels = labels(&[("zone", "a")]))
}

/// What named claims take is looked up in no index; a selection after many of them finds it all the same.
#[test]
fn a_selection_sees_what_named_claims_took_on_more_workers_than_may_be_stale() {
    let workers = STALE_SCOPES_MAX as u64 / 2 + 200;
    let name = |i: u64| format!("w{i:04}");
    let mut state = State::default();
    let mut ok = |command: &Command| {
        let (applied, _) = apply(&mut state, &ORIGIN, command);
        let outcome = applied.outcome.unwrap();
        assert!(state.indexes.stale_scopes <= STALE_SCOPES_MAX);
        (outcome, state.clone())
    };
    for i in 0..workers {
        ok(&register(&name(i), three_ports_in_a_zone()));
    }
    // Two of three ports on all, the others first; then one is given back on the last.
    let mut last = None;
    for (round, i) in (0..2).flat_map(|round| (0..workers).rev().map(move |i| (round, i))) {
        let (outcome, _) = ok(&allocate(&[claim(&format!("a{round}-{i}"), &name(i)).count(1)]));
        let Outcome::Allocated { allocations, .. } = outcome else { panic!("granted") };
        last = (i == workers - 1).then(|| allocations[0].clone()).or(last);
    }
    let last = last.unwrap();
    let release = Authority::Holder(last.token);
    let (_, state) = ok(&Command::Release { name: last.name().clone(), authority: release });
    assert!(!state.indexes.stale.is_empty(), "nobody asked");
    check_invariants(&state).unwrap();
    let at = |policy| {
        let asked = claim("selected", "any").count(1).select("zone=a", policy);
        let (applied, _) = apply(&mut state.clone(), &ORIGIN, &allocate(&[asked]));
        let Ok(Outcome::Allocated { allocations, .. }) = applied.outcome else { panic!("granted") };
        allocations[0].worker.to_string()
    };
    assert_eq!(at(Policy::Binpack), name(0));
    assert_eq!(at(Policy::Spread), name(workers - 1));
}

/// Once those that changed for good are settled, a worker that is soon back where it was is not moved.
#[test]
fn workers_that_changed_for_good_do_not_hold_the_places_of_the_stale_ones() {
    // Each has two scopes: a third of them is stale.
    let workers = 3 * STALE_SCOPES_MAX as u64 / 2;
    let name = |i: u64| format!("w{i:04}");
    let mut state = State::default();
    let mut ok = |command: &Command| {
        let (applied, _) = apply(&mut state, &ORIGIN, command);
        (applied.outcome.unwrap(), state.indexes.moved_at_once)
    };
    for i in 0..workers {
        ok(&register(&name(i), three_ports_in_a_zone()));
    }
    for i in 0..workers {
        ok(&allocate(&[claim(&format!("held{i}"), &name(i)).count(1)]));
    }
    let moved: Vec<_> = (0..workers)
        .map(|i| {
            let (outcome, _) = ok(&allocate(&[claim("soon", &name(i)).count(1)]));
            let Outcome::Allocated { allocations, .. } = outcome else { panic!("granted") };
            let (name, token) = (allocations[0].name().clone(), allocations[0].token);
            ok(&Command::Release { name, authority: Authority::Holder(token) }).1
        })
        .collect();
    let (most, last) = (moved.iter().max().unwrap(), moved.iter().rposition(|moved| *moved > 0));
    assert!(*most > workers as usize, "they are moved, while there is no place");
    assert!(last.unwrap() < workers as usize * 3 / 4, "{last:?}");
    check_invariants(&state).unwrap();
}
