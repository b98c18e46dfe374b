//! What happens to one whose holder fell silent, and how it comes back.

use super::*;

fn revived(outcome: Outcome) -> std::sync::Arc<Allocation> {
    match outcome {
        Outcome::Confirmed(allocation) => allocation,
        other => panic!("not revived: {other:?}"),
    }
}

#[test]
fn a_start_that_misses_its_deadline_lingers_where_an_agent_watches() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    let a = t.grant(claim("a", "w").count(2).gpu_gib(1, 10).on(lease));
    let outcome = t.ok(miss(&a));
    let held = t.get("a").clone();
    assert_eq!(outcome, Outcome::Lingers(held.clone().into()));
    assert_eq!(t.events, [Event::Changed(held.clone().into())]);
    assert_eq!((held.phase, held.confirmed), (Phase::Lingering, false));
    assert_eq!(held.reason.as_deref(), Some("not confirmed within 10m"));
    assert_eq!((held.token, held.version), (a.token, t.state.revision));
    assert_eq!((&held.ports, &held.gpus), (&a.ports, &a.gpus), "it still holds all of it");
    assert_eq!((held.lease, t.on(lease)), (None, vec![]));
}

/// A start whose lease ended may have time left to confirm: it is not judged as one without.
#[test]
fn what_lingers_says_whether_its_deadline_or_its_lease_has_passed() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    t.grant(claim("a", "w").count(1).on(lease));
    t.lingering(claim("b", "w").count(1));
    t.ok(expire(lease));
    for (name, cause) in [("a", Cause::LeaseEnded), ("b", Cause::Unconfirmed)] {
        let kind = t.get(name).last_change.as_ref().map(|last| &last.kind);
        assert_eq!(kind, Some(&ChangeKind::Lingered { cause }), "{name}");
    }
}

#[test]
fn a_start_that_misses_its_deadline_is_freed_where_no_agent_watches() {
    let mut t = Table::with_ports(40003);
    let a = t.grant(claim("a", "w").count(2));
    assert_eq!(t.ok(miss(&a)), Outcome::Released(Some(a.clone())));
    let (cause, reason) = (Cause::Unconfirmed, "not confirmed within 10m".to_string());
    let why = ReleaseReason::Reclaimed { cause, reason };
    assert_eq!(t.events, [Event::Released { allocation: a, why }]);
    assert_eq!(t.worker("w").free_ports(), 4);
}

#[test]
fn a_claim_may_say_its_own_deadline() {
    let mut t = Table::with_agent(40003);
    let own = with(claim("a", "w").count(1), |c| c.confirm_within = Some(Millis(5_000)));
    assert_eq!(t.grant(own).confirm_within, Millis(5_000));
    assert_eq!(t.grant(claim("b", "w").count(1)).confirm_within, WITHIN);
    t.ok(miss(&t.get("a").clone()));
    assert_eq!(t.get("a").reason.as_deref(), Some("not confirmed within 5s"));
}

#[test]
fn what_lingers_is_given_to_nobody_else() {
    let mut t = Table::with_agent(40000);
    t.lingering(claim("a", "w").count(1).gpus_alone(1));
    assert!(matches!(lack(t.refused(allocate(&[claim("b", "w").count(1)]))), Lack::Ports { .. }));
    assert!(matches!(
        lack(t.refused(allocate(&[claim("b", "w").gpu_gib(1, 1)]))),
        Lack::GpuMemory { .. }
    ));
    let rival = claim("a", "w").count(1).uid("u2");
    assert!(matches!(t.refused(allocate(&[rival])), Refusal::NameTaken { .. }));
}

#[test]
fn what_lingers_is_counted_and_listed_by_its_phase() {
    let mut t = Table::with_agent(40003);
    t.lingering(claim("a", "w").count(1));
    t.grant(claim("b", "w").count(1));
    t.bound(claim("c", "w").count(1));
    let listed: Vec<_> = t.state.lingering().map(|a| a.name().as_str()).collect();
    assert_eq!(listed, ["a"]);
    let listed: Vec<_> = t.state.reserved().map(|a| a.name().as_str()).collect();
    assert_eq!(listed, ["b"]);
    for phase in [Phase::Reserved, Phase::Bound, Phase::Lingering] {
        assert_eq!(t.state.phase_count(phase), 1, "{phase:?}");
    }
}

#[test]
fn a_confirmation_revives_what_lingers() {
    let mut t = Table::with_agent(40003);
    let a = t.lingering(claim("a", "w").count(1));
    let back = revived(t.ok(confirm("a", a.token, a.version.0)));
    assert_eq!((back.phase, back.confirmed, back.reason.clone()), (Phase::Bound, true, None));
    assert_eq!((back.token, back.version), (a.token, t.state.revision));
    assert_eq!(back.ports, a.ports);
    assert!(t.state.lingering().next().is_none());
}

#[test]
fn one_who_comes_back_may_bring_a_new_lease_or_none() {
    for bring in [false, true] {
        let mut t = Table::with_agent(40003);
        let (old, new) = (t.lease(), t.lease());
        let a = t.bound(claim("a", "w").count(1).on(old));
        t.ok(expire(old));
        let lease = bring.then_some(new);
        let back = revived(t.ok(confirm_with("a", a.token, 0, None, lease)));
        assert_eq!((back.phase, back.lease), (Phase::Bound, lease));
        assert_eq!(t.on(new).len(), usize::from(bring));
    }
}

#[test]
fn one_who_comes_back_under_a_lease_that_has_ended_lingers_on() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    let a = t.bound(claim("a", "w").count(1).on(lease));
    t.ok(expire(lease));
    let back = confirm_with("a", a.token, 0, None, Some(lease));
    assert_eq!(t.refused(back), Refusal::NoLease(lease));
    assert_eq!(t.get("a").phase, Phase::Lingering);
}

#[test]
fn one_who_comes_back_may_know_only_the_version_from_before_its_silence() {
    let mut t = Table::with_agent(40003);
    let granted = t.grant(claim("a", "w").count(1));
    t.ok(confirm("a", granted.token, 0));
    let lease = t.lease();
    t.ok(attach("a", granted.token, 0, Some(lease)));
    let before = t.get("a").clone();
    t.ok(expire(lease));
    let older = confirm("a", granted.token, granted.version.0);
    assert!(matches!(t.refused(older), Refusal::WrongVersion { .. }), "more has changed since");
    t.ok(confirm("a", before.token, before.version.0));
    assert_eq!(t.get("a").phase, Phase::Bound);
}

#[test]
fn a_revival_that_is_repeated_changes_nothing() {
    for known in [Revision(0), Revision(2), Revision(3)] {
        let mut t = Table::with_agent(40003);
        let a = t.lingering(claim("a", "w").count(1));
        assert_eq!((a.token, a.version), (Token(2), Revision(3)));
        let back = confirm_with("a", a.token, known.0, process("b1", 7), None);
        let first = revived(t.ok(back.clone()));
        assert_eq!(revived(t.noop(back)), first, "known as {known}");
    }
}

#[test]
fn a_handle_outlives_a_silence() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    let a = t.grant(claim("a", "w").count(1).on(lease));
    t.ok(confirm_with("a", a.token, 0, process("b1", 7), None));
    t.ok(expire(lease));
    assert_eq!(t.get("a").liveness.as_deref().cloned(), process("b1", 7));
    t.ok(confirm("a", a.token, 0));
    assert_eq!(t.get("a").liveness.as_deref().cloned(), process("b1", 7));
}

#[test]
fn what_lingers_is_attached_to_no_lease() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    let a = t.lingering(claim("a", "w").count(1));
    for to in [Some(lease), None] {
        let shown = t.refused(attach("a", a.token, a.version.0, to)).to_string();
        assert_eq!(
            shown,
            "a is LINGERING (not confirmed within 10m): only a confirmation revives it"
        );
    }
}

#[test]
fn one_who_comes_back_with_a_conflict_is_given_another_port_and_a_fresh_deadline() {
    let mut t = Table::with_agent(40003);
    let a = t.grant(claim("a", "w").count(1));
    t.ok(miss(&a));
    // It knows the version from before its silence.
    let late = report("a", a.token, a.version.0, 40000);
    t.ok(late.clone());
    let held = t.get("a").clone();
    assert_eq!((held.phase, held.reason.clone()), (Phase::Reserved, None));
    assert_eq!(numbers(&held), [40001]);
    assert_eq!(t.noop(late), Outcome::Swapped(held.into()), "its repeat gets the same");
}

#[test]
fn the_holder_and_an_operator_end_what_lingers() {
    let mut t = Table::with_agent(40003);
    let a = t.lingering(claim("a", "w").count(1));
    assert!(matches!(t.refused(release("a", Token(99))), Refusal::WrongToken { .. }));
    t.ok(release("a", a.token));
    t.lingering(claim("b", "w").count(1));
    t.ok(force("b", "the process was killed by hand"));
    assert_eq!(t.worker("w").free_ports(), 4);
}

#[test]
fn no_timer_frees_what_lingers() {
    let mut t = Table::with_agent(40003);
    let a = t.lingering(claim("a", "w").count(1));
    assert_eq!(unproven(t.refused(miss(&a))), "it is not RESERVED any more");
}

#[test]
fn a_worker_is_not_removed_while_something_lingers_there() {
    let mut t = Table::with_agent(40003);
    t.lingering(claim("a", "w").count(1));
    assert!(matches!(t.refused(remove("w")), Refusal::WorkerInUse { count: 1, .. }));
}
