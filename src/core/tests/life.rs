//! What happens to an allocation: confirmed, swapped, released.

use super::*;

fn swapped(outcome: Outcome) -> std::sync::Arc<Allocation> {
    match outcome {
        Outcome::Swapped(allocation) => allocation,
        other => panic!("not swapped: {other:?}"),
    }
}

fn reclaimed(outcome: Outcome) -> String {
    match outcome {
        Outcome::Reclaimed { reason, .. } => reason,
        other => panic!("not reclaimed: {other:?}"),
    }
}

#[test]
fn confirming_binds_once() {
    let mut t = Table::with_ports(40003);
    let a = t.grant(claim("a", "w").count(1));
    assert_eq!(a.phase, Phase::Reserved);
    t.ok(confirm("a", a.token, a.version.0));
    let bound = t.get("a").clone();
    assert_eq!((bound.phase, bound.version), (Phase::Bound, t.state.revision));
    assert_eq!(bound.token, a.token, "the token is for life");
    for version in [0, a.version.0, bound.version.0] {
        assert_eq!(
            t.noop(confirm("a", a.token, version)),
            Outcome::Confirmed(bound.clone().into())
        );
    }
    assert!(matches!(t.refused(confirm("a", Token(99), 0)), Refusal::WrongToken { .. }));
    assert!(matches!(t.refused(confirm("a", a.token, 99)), Refusal::WrongVersion { .. }));
    assert_eq!(t.refused(confirm("b", a.token, 0)), no_allocation("b"));
}

#[test]
fn a_guarded_confirm_does_not_bind_what_has_changed() {
    let mut t = Table::with_ports(40003);
    let a = t.grant(claim("a", "w").count(1));
    let moved = swapped(t.ok(report("a", a.token, a.version.0, 40000)));
    let refusal = t.refused(confirm("a", a.token, a.version.0));
    assert_eq!(
        refusal,
        Refusal::WrongVersion { name: instance("a"), given: a.version, held: moved.version }
    );
    t.ok(confirm("a", a.token, moved.version.0));
}

#[test]
fn a_claim_without_a_start_step_is_bound_at_once() {
    let mut t = Table::with_ports(40003);
    let a = t.grant(with(claim("a", "w").count(1), |c| c.bound = true));
    assert_eq!(a.phase, Phase::Bound);
    t.noop(confirm("a", a.token, a.version.0));
}

#[test]
fn the_holder_releases_with_its_token_and_an_operator_by_force() {
    let mut t = Table::default();
    t.ok(register("w", spec(&[("service", 40000, 40003)], &[24])));
    let a = t.grant(claim("a", "w").count(2).gpu_gib(1, 10));
    assert!(matches!(t.refused(release("a", Token(99))), Refusal::WrongToken { .. }));
    assert_eq!(t.ok(release("a", a.token)), Outcome::Released(Some(a.clone())));
    assert_eq!(t.events, [Event::Released { allocation: a.clone(), why: ReleaseReason::ByHolder }]);
    assert_eq!(t.worker("w").free_ports(), 4);
    assert_eq!(t.worker("w").idle_gpus(), 1);
    assert_eq!(t.noop(release("a", a.token)), Outcome::Released(None), "gone already");

    let b = t.grant(claim("b", "w").count(1));
    t.ok(force("b", "stuck"));
    let why = ReleaseReason::Forced { reason: "stuck".into() };
    assert_eq!(t.events, [Event::Released { allocation: b, why }]);
    assert_eq!(t.noop(force("b", "stuck")), Outcome::Released(None));
}

/// Field failure kubernetes-64466: deleting one of two Services freed the port of the other.
#[test]
fn an_old_token_does_not_release_a_new_grant_of_the_same_name() {
    let mut t = Table::with_ports(40000);
    let old = t.grant(claim("a", "w").count(1));
    t.ok(release("a", old.token));
    let new = t.grant(claim("a", "w").count(1));
    assert!(new.token > old.token);
    for late in
        [release("a", old.token), confirm("a", old.token, 0), report("a", old.token, 0, 40000)]
    {
        let refusal = t.refused(late);
        let expected =
            Refusal::WrongToken { name: instance("a"), given: old.token, held: new.token };
        assert_eq!(refusal, expected);
    }
}

/// Field failure kubernetes-120536: a port stayed taken on one of several release paths.
#[test]
fn whatever_ends_an_allocation_gives_back_all_of_it() {
    type End = fn(&mut Table, &Allocation);
    let ends: [(&str, Option<&str>, u64, End); 8] = [
        ("its holder", None, 3, |t, a| drop(t.ok(release("a", a.token)))),
        ("an operator", None, 3, |t, _| drop(t.ok(force("a", "")))),
        ("a conflict", None, 2, |t, a| drop(t.ok(report("a", a.token, 0, 40002)))),
        ("a deadline", None, 3, |t, a| drop(t.ok(miss(a)))),
        ("a lease's end", None, 3, |t, a| drop(t.ok(expire(a.lease.unwrap())))),
        ("a lease's end by its holder", None, 3, |t, a| drop(t.ok(revoke(a.lease.unwrap())))),
        ("evidence", Some("b1"), 3, |t, a| {
            t.ok(confirm("a", a.token, 0));
            let ground = gone(booted("b1"), t.state.revision);
            t.ok(reclaim(&t.get("a").clone(), ground));
        }),
        ("evidence after a silence", Some("b1"), 3, |t, a| {
            t.ok(expire(a.lease.unwrap()));
            let ground = gone(booted("b1"), t.state.revision);
            t.ok(reclaim(&t.get("a").clone(), ground));
        }),
    ];
    for (what, boot, ports_left, end) in ends {
        let mut t = Table::default();
        let watched = |s: &mut WorkerSpec| s.identity = boot.map(booted);
        t.ok(register("w", with(spec(&[("service", 40000, 40002)], &[24]), watched)));
        let lease = t.lease();
        let a = t.grant(claim("a", "w").count(1).band(2).gpu_gib(1, 10).on(lease));
        end(&mut t, &a);
        assert_eq!(t.state.allocation_count(), 0, "{what}");
        assert_eq!(t.worker("w").free_ports(), ports_left, "{what}");
        assert_eq!(t.worker("w").idle_gpus(), 1, "{what}");
        assert!(t.state.lease(lease).is_none_or(|l| l.allocations.is_empty()), "{what}");
        assert!(matches!(t.events[0], Event::Released { .. }), "{what}");
    }
}

#[test]
fn a_conflict_quarantines_the_port_and_swaps_in_the_next_of_its_range() {
    let mut t = Table::with_ports(40009);
    let a = t.grant(claim("a", "w").count(3));
    t.ok(confirm("a", a.token, 0));
    let before = t.get("a").version;
    let moved = swapped(t.ok(report("a", a.token, before.0, 40001)));
    assert_eq!(numbers(&moved), [40000, 40003, 40002], "the others keep their places");
    assert_eq!((moved.token, moved.version), (a.token, t.state.revision));
    assert_eq!((moved.phase, moved.swaps), (Phase::Reserved, 1));
    let quarantine = t.worker("w").pools[0].quarantines().next().unwrap();
    assert_eq!(quarantine.0, 40001);
    assert_eq!(quarantine.1.reason, "conflict reported by a");
    assert_eq!(t.worker("w").version, t.state.revision);
    assert_eq!(t.events.len(), 2, "the allocation's and the worker's");
}

#[test]
fn a_repeated_conflict_gets_the_same_swap_and_an_outdated_one_is_refused() {
    let mut t = Table::with_ports(40009);
    let a = t.grant(claim("a", "w").count(1));
    let moved = swapped(t.ok(report("a", a.token, a.version.0, 40000)));
    for version in [a.version.0, 0] {
        assert_eq!(swapped(t.noop(report("a", a.token, version, 40000))), moved);
    }
    assert_eq!(
        t.refused(report("a", a.token, moved.version.0, 40000)),
        Refusal::PortNotHeld { name: instance("a"), port: port(40000) }
    );
    assert!(matches!(
        t.refused(report("a", a.token, a.version.0, 40001)),
        Refusal::WrongVersion { .. }
    ));
    assert!(matches!(t.refused(report("a", Token(9), 0, 40001)), Refusal::WrongToken { .. }));
    t.ok(confirm("a", a.token, moved.version.0));
    assert!(matches!(
        t.refused(report("a", a.token, a.version.0, 40000)),
        Refusal::WrongVersion { .. }
    ));
    assert!(matches!(t.refused(report("a", a.token, 0, 40000)), Refusal::PortNotHeld { .. }));
    assert_eq!(t.refused(report("b", a.token, 0, 40000)), no_allocation("b"));
}

#[test]
fn a_band_moves_whole() {
    let mut t = Table::with_ports(40007);
    let a = t.grant(claim("a", "w").count(1).band(3));
    assert_eq!(numbers(&a), [40003, 40000, 40001, 40002]);
    let moved = swapped(t.ok(report("a", a.token, 0, 40001)));
    assert_eq!(numbers(&moved), [40003, 40004, 40005, 40006]);
    assert_eq!(swapped(t.noop(report("a", a.token, 0, 40001))), moved);
    // The ports that it left are free again, the reported one is not.
    assert_eq!(numbers(&t.grant(claim("b", "w").count(3))), [40007, 40000, 40002]);
}

#[test]
fn a_band_may_move_by_less_than_its_length() {
    let mut t = Table::with_ports(40003);
    let a = t.grant(claim("a", "w").band(3));
    let moved = swapped(t.ok(report("a", a.token, 0, 40000)));
    assert_eq!(numbers(&moved), [40001, 40002, 40003]);
}

#[test]
fn a_swap_stays_in_its_range_after_the_default_range_has_changed() {
    let mut t = Table::default();
    t.ok(register("w", spec(&[("a", 10, 19), ("b", 20, 29)], &[])));
    let held = t.grant(claim("i", "w").count(1));
    t.ok(register("w", spec(&[("b", 20, 29), ("a", 10, 19)], &[])));
    assert_eq!(numbers(&swapped(t.ok(report("i", held.token, 0, 10)))), [11]);
}

#[test]
fn where_nothing_can_be_swapped_in_the_allocation_is_reclaimed_and_the_answer_says_why() {
    let mut t = Table::with_ports(40002);
    let a = t.grant(claim("a", "w").specific(40001));
    let reason = reclaimed(t.ok(report("a", a.token, 0, 40001)));
    assert_eq!(reason, "port 40001 is in use, and was asked for by number");
    let [Event::Released { why: ReleaseReason::Reclaimed { .. }, .. }, Event::Worker(_)] =
        t.events.as_slice()
    else {
        panic!("{:?}", t.events)
    };

    let b = t.grant(claim("b", "w").count(2));
    let reason = reclaimed(t.ok(report("b", b.token, 0, 40000)));
    assert!(reason.contains("range service has 0 of 3 ports free"), "{reason}");
    t.ok(lift("w", &[40000, 40001]));

    let c = t.grant(claim("c", "w").band(3));
    let reason = reclaimed(t.ok(report("c", c.token, 0, 40001)));
    assert!(reason.contains("range service has 2 of 3 ports free, 3 more wanted"), "{reason}");
    assert_eq!(t.worker("w").free_ports(), 2);
    assert_eq!(t.state.allocation_count(), 0);
    let shown = t.refused(report("c", c.token, 0, 40001)).to_string();
    assert!(shown.starts_with(&format!("no allocation c: reclaimed: {reason}")), "{shown}");
}

#[test]
fn swaps_are_bounded_and_ten_are_allowed() {
    let most = limits::SWAPS_MAX;
    assert!(most >= 10);
    let mut t = Table::with_ports(40099);
    let a = t.grant(claim("a", "w").count(1));
    for i in 0..most {
        let moved = swapped(t.ok(report("a", a.token, 0, 40000 + i as u16)));
        assert_eq!(moved.swaps, i + 1);
    }
    let reason = reclaimed(t.ok(report("a", a.token, 0, 40000 + most as u16)));
    assert!(reason.ends_with(&format!("after {most} swaps")), "{reason}");
    assert_eq!(t.worker("w").pools[0].quarantined_count(), most + 1);
}
