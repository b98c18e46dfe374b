//! Leases: what is on them, and what their end does.

use super::*;

/// A worker `w` with an agent and a worker `x` without one.
fn two_workers() -> Table {
    let mut t = Table::with_agent(40009);
    t.ok(register("x", spec(&[("service", 40000, 40009)], &[])));
    t
}

fn ended(outcome: Outcome) -> std::sync::Arc<Lease> {
    match outcome {
        Outcome::LeaseEnded(Some(lease)) => lease,
        other => panic!("no lease ended: {other:?}"),
    }
}

#[test]
fn a_lease_is_named_by_the_revision_of_its_grant() {
    let mut t = Table::with_ports(40003);
    let first = t.lease();
    assert_eq!(first.0, t.state.revision.0);
    let granted = t.state.lease(first).unwrap().clone();
    assert_eq!(granted.ttl, Millis(10_000));
    assert_eq!(t.events, [Event::LeaseGranted(granted)]);
    assert!(t.lease() > first);
}

#[test]
fn an_allocation_is_on_the_lease_that_its_claim_names() {
    let mut t = Table::with_ports(40003);
    let lease = t.lease();
    let a = t.grant(claim("a", "w").count(1).on(lease));
    t.grant(claim("b", "w").count(1));
    assert_eq!((a.lease, t.on(lease)), (Some(lease), vec!["a"]));
}

#[test]
fn a_claim_on_a_lease_that_is_not_there_is_refused() {
    let mut t = Table::with_ports(40003);
    let never = LeaseId(99);
    let refusal = t.refused(allocate(&[claim("a", "w").count(1).on(never)]));
    assert_eq!(refusal, Refusal::NoLease(never));
    let lease = t.lease();
    t.ok(revoke(lease));
    let refusal = t.refused(allocate(&[claim("a", "w").count(1).on(lease)]));
    assert_eq!(refusal, Refusal::NoLease(lease));
}

#[test]
fn a_gang_may_be_on_one_lease_or_on_several() {
    let mut t = Table::with_ports(40003);
    let (one, two) = (t.lease(), t.lease());
    t.gang(&[
        claim("a", "w").count(1).on(one),
        claim("b", "w").count(1).on(two),
        claim("c", "w").count(1).on(one),
    ]);
    assert_eq!((t.on(one), t.on(two)), (vec!["a", "c"], vec!["b"]));
}

#[test]
fn a_gang_of_which_one_lease_is_not_there_leaves_nothing_on_the_others() {
    let mut t = Table::with_ports(40003);
    let lease = t.lease();
    let gang = [claim("a", "w").count(1).on(lease), claim("b", "w").count(1).on(LeaseId(99))];
    assert_eq!(t.refused(allocate(&gang)), Refusal::NoLease(LeaseId(99)));
    assert!(t.on(lease).is_empty());
}

#[test]
fn what_is_released_is_off_its_lease_and_what_is_swapped_stays_on_it() {
    let mut t = Table::with_ports(40003);
    let lease = t.lease();
    let a = t.grant(claim("a", "w").count(1).on(lease));
    let b = t.grant(claim("b", "w").count(1).on(lease));
    t.ok(report("b", b.token, 0, 40001));
    t.ok(release("a", a.token));
    assert_eq!(t.on(lease), ["b"]);
    // The name is on it no more, whoever has it.
    t.grant(claim("a", "w").count(1));
    assert_eq!(t.on(lease), ["b"]);
}

/// A scheduler restarts under a new lease, and its instances do not lose their ports.
#[test]
fn what_was_attached_outlives_its_first_lease() {
    let mut t = Table::with_ports(40003);
    let (old, new) = (t.lease(), t.lease());
    let a = t.bound(claim("a", "w").count(1).on(old));
    t.ok(attach("a", a.token, a.version.0, Some(new)));
    let moved = t.get("a").clone();
    assert_eq!((moved.lease, moved.token, moved.phase), (Some(new), a.token, Phase::Bound));
    assert_eq!(moved.version, t.state.revision);
    assert_eq!(t.events, [Event::Changed(moved.into())]);
    assert_eq!((t.on(old), t.on(new)), (vec![], vec!["a"]));
    t.ok(expire(old));
    assert!(t.is_held("a"));
}

#[test]
fn what_was_taken_off_its_lease_outlives_it() {
    let mut t = Table::with_ports(40003);
    let lease = t.lease();
    let a = t.bound(claim("a", "w").count(1).on(lease));
    t.ok(attach("a", a.token, 0, None));
    assert_eq!((t.get("a").lease, t.on(lease)), (None, vec![]));
    t.ok(expire(lease));
    assert!(t.is_held("a"));
}

#[test]
fn attaching_asks_for_the_token_and_for_a_lease_that_is_there() {
    let mut t = Table::with_ports(40003);
    let lease = t.lease();
    let a = t.bound(claim("a", "w").count(1));
    assert!(matches!(
        t.refused(attach("a", Token(99), 0, Some(lease))),
        Refusal::WrongToken { .. }
    ));
    assert_eq!(t.refused(attach("b", a.token, 0, Some(lease))), no_allocation("b"));
    assert_eq!(
        t.refused(attach("a", a.token, 0, Some(LeaseId(99)))),
        Refusal::NoLease(LeaseId(99))
    );
}

#[test]
fn the_end_of_a_lease_frees_what_no_agent_watches_in_one_revision() {
    let mut t = Table::with_ports(40003);
    let lease = t.lease();
    let b = t.bound(claim("b", "w").count(1).on(lease));
    let a = t.grant(claim("a", "w").count(1).on(lease));
    t.grant(claim("c", "w").count(1));
    let before = t.state.revision.0;
    let as_it_was = ended(t.ok(expire(lease)));
    assert_eq!(t.state.revision.0, before + 1);
    let (cause, reason) = (Cause::LeaseEnded, format!("lease {lease} expired"));
    let why = ReleaseReason::Reclaimed { cause, reason };
    assert_eq!(
        t.events,
        [
            Event::Released { allocation: a, why: why.clone() },
            Event::Released { allocation: b.into(), why: why.clone() },
            Event::LeaseEnded { lease: as_it_was, expired: true },
        ]
    );
    assert_eq!(t.state.departure(&instance("a")).unwrap().why, why);
    assert_eq!((t.worker("w").free_ports(), t.state.lease_count()), (3, 0));
    assert!(t.is_held("c"), "it was not on it");
}

#[test]
fn the_end_of_a_lease_leaves_what_an_agent_watches_lingering_with_all_that_it_holds() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    let a = t.bound(claim("a", "w").count(2).gpu_gib(1, 10).on(lease));
    let b = t.grant(claim("b", "w").count(1).on(lease));
    t.ok(expire(lease));
    for (name, before) in [("a", &a), ("b", &b)] {
        let held = t.get(name);
        assert_eq!((held.phase, held.lease), (Phase::Lingering, None));
        assert_eq!(held.reason, Some(format!("lease {lease} expired").into()));
        assert_eq!((&held.ports, &held.gpus), (&before.ports, &before.gpus));
        assert_eq!((held.token, held.version), (before.token, t.state.revision));
        assert_eq!(held.confirmed, before.confirmed, "it is another thing to wait for evidence of");
    }
    assert_eq!(t.worker("w").free_ports(), 1);
    assert!(t.state.lease(lease).is_none());
    assert!(matches!(
        t.events.as_slice(),
        [Event::Changed(_), Event::Changed(_), Event::LeaseEnded { expired: true, .. }]
    ));
}

#[test]
fn one_lease_may_end_over_workers_with_and_without_agents() {
    let mut t = two_workers();
    let lease = t.lease();
    t.gang(&[claim("a", "w").count(1).on(lease), claim("b", "x").count(1).on(lease)]);
    t.ok(expire(lease));
    assert_eq!(t.get("a").phase, Phase::Lingering);
    assert!(!t.is_held("b"));
}

#[test]
fn a_revoked_lease_ends_as_an_expired_one_and_says_so() {
    let mut t = two_workers();
    let lease = t.lease();
    t.gang(&[claim("a", "w").count(1).on(lease), claim("b", "x").count(1).on(lease)]);
    t.ok(revoke(lease));
    assert_eq!(t.get("a").reason, Some(format!("lease {lease} was revoked").into()));
    let gone = t.state.departure(&instance("b")).unwrap();
    assert_eq!(gone.why.to_string(), format!("reclaimed: lease {lease} was revoked"));
    assert!(matches!(t.events.last(), Some(Event::LeaseEnded { expired: false, .. })));
}

#[test]
fn a_lease_ends_once() {
    let mut t = Table::with_ports(40003);
    let lease = t.lease();
    t.ok(expire(lease));
    for again in [expire(lease), revoke(lease), revoke(LeaseId(99))] {
        assert_eq!(t.noop(again), Outcome::LeaseEnded(None));
    }
}

#[test]
fn a_repeated_request_after_the_end_of_its_lease_is_shown_what_became_of_it() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    let asked = claim("a", "w").count(1).on(lease);
    let a = t.bound(asked.clone());
    t.ok(expire(lease));
    match t.noop(allocate(&[asked])) {
        Outcome::Allocated { allocations, repeated: true } => {
            assert_eq!((allocations[0].phase, allocations[0].token), (Phase::Lingering, a.token));
        }
        other => panic!("{other:?}"),
    }
}

/// The request is what was asked for, and not what became of it.
#[test]
fn a_repeated_request_is_the_same_after_its_allocation_has_moved_to_another_lease() {
    let mut t = Table::with_ports(40003);
    let (old, new) = (t.lease(), t.lease());
    let asked = claim("a", "w").count(1).on(old);
    let a = t.grant(asked.clone());
    t.ok(attach("a", a.token, 0, Some(new)));
    assert!(matches!(
        t.noop(allocate(std::slice::from_ref(&asked))),
        Outcome::Allocated { repeated: true, .. }
    ));
    let refusal = t.refused(allocate(&[asked.on(new)]));
    assert!(matches!(refusal, Refusal::NameTaken { difference: "lease", .. }), "{refusal}");
}
