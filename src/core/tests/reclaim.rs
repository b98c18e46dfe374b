//! Taking back what somebody judged to be gone: only while it is what was judged.

use super::*;

fn identity(machine: &str, boot: &str, namespace: u64) -> Identity {
    Identity { machine_id: machine.into(), boot_id: boot.into(), namespace }
}

/// Seen just now, by the agent of the worker as it is.
fn seen_gone(t: &Table, name: &str) -> Command {
    reclaim(t.get(name), gone(booted("b1"), t.state.revision))
}

#[test]
fn evidence_frees_what_is_bound_and_what_lingers() {
    let mut t = Table::with_agent(40003);
    t.bound(claim("bound", "w").count(1));
    t.lingering(claim("lingering", "w").count(1));
    for name in ["bound", "lingering"] {
        let held = std::sync::Arc::new(t.get(name).clone());
        let command = seen_gone(&t, name);
        assert_eq!(t.ok(command), Outcome::Released(Some(held.clone())));
        let (cause, reason) = (Cause::Gone, "its ports are closed".to_string());
        let why = ReleaseReason::Reclaimed { cause, reason };
        assert_eq!(t.events, [Event::Released { allocation: held, why }]);
    }
    assert_eq!(t.worker("w").free_ports(), 4);
}

/// Field failures kubernetes-54885, kubernetes-64349: a repair loop freed what was in use, because
/// its view was partial or old. Here a sweep only proposes, and the table refuses unless token and
/// version are still those that were judged.
#[test]
fn what_has_changed_since_it_was_judged_stays() {
    type Change = fn(&mut Table, &Allocation);
    let changes: [(&str, Change); 4] = [
        ("confirmed with a handle", |t, a| {
            t.ok(confirm_with("a", a.token, 0, process("b1", 7), None));
        }),
        ("attached", |t, a| {
            let lease = t.lease();
            t.ok(attach("a", a.token, 0, Some(lease)));
        }),
        ("swapped", |t, a| drop(t.ok(report("a", a.token, 0, 40000)))),
        ("granted anew", |t, a| {
            t.ok(release("a", a.token));
            t.bound(claim("a", "w").count(1));
        }),
    ];
    for (what, change) in changes {
        let mut t = Table::with_agent(40003);
        let a = t.bound(claim("a", "w").count(1));
        let judged = seen_gone(&t, "a");
        change(&mut t, &a);
        let refusal = t.refused(judged);
        assert!(
            matches!(refusal, Refusal::WrongVersion { .. } | Refusal::WrongToken { .. }),
            "{what}: {refusal}"
        );
    }
}

#[test]
fn a_reclaim_is_never_unguarded() {
    let mut t = Table::with_agent(40003);
    let a = t.bound(claim("a", "w").count(1));
    let unguarded = with(a.clone(), |a| a.version = Revision(0));
    let refusal = t.refused(reclaim(&unguarded, gone(booted("b1"), t.state.revision)));
    assert!(matches!(refusal, Refusal::WrongVersion { .. }), "{refusal}");
    let of_another = with(a.clone(), |a| a.token = Token(99));
    let refusal = t.refused(reclaim(&of_another, gone(booted("b1"), t.state.revision)));
    assert!(matches!(refusal, Refusal::WrongToken { .. }), "{refusal}");
    let judged = seen_gone(&t, "a");
    t.ok(release("a", a.token));
    assert_eq!(t.refused(judged), no_allocation("a"));
}

#[test]
fn evidence_counts_for_what_the_agent_knew_before_it_looked() {
    let mut t = Table::with_agent(40003);
    let a = t.bound(claim("a", "w").count(1));
    let before = Revision(a.version.0 - 1);
    let refusal = t.refused(reclaim(&a, gone(booted("b1"), before)));
    assert_eq!(unproven(refusal), "it changed after it was looked at");
    t.ok(reclaim(&a, gone(booted("b1"), a.version)));
}

#[test]
fn nobody_has_seen_what_is_yet_to_come() {
    let mut t = Table::with_agent(40003);
    let a = t.bound(claim("a", "w").count(1));
    let future = Revision(t.state.revision.0 + 1);
    let refusal = t.refused(reclaim(&a, gone(booted("b1"), future)));
    assert!(unproven(refusal).contains("does not exist yet"));
}

#[test]
fn an_agent_frees_nothing_on_another_worker() {
    let mut t = Table::with_agent(40003);
    let other = Some(identity("m", "b1", 8));
    t.ok(register("w2", with(spec(&[("s", 1, 9)], &[]), |s| s.identity = other)));
    t.ok(register("x", spec(&[("s", 1, 9)], &[])));
    let a = t.bound(claim("a", "w").count(1));
    let unwatched = t.bound(claim("b", "x").count(1));
    for (held, given) in [
        (&a, identity("m", "b1", 8)),
        (&a, identity("m", "b0", 7)),
        (&a, identity("m2", "b1", 7)),
        (&unwatched, identity("m", "b1", 7)),
    ] {
        let refusal = t.refused(reclaim(held, gone(given, t.state.revision)));
        assert_eq!(unproven(refusal), "it was looked for elsewhere, or on another boot");
    }
}

#[test]
fn a_start_is_not_gone_before_its_deadline() {
    let mut t = Table::with_agent(40003);
    t.grant(claim("a", "w").count(1));
    let early = seen_gone(&t, "a");
    assert_eq!(unproven(t.refused(early)), "its holder may still be starting");
    t.ok(miss(&t.get("a").clone()));
    let late = seen_gone(&t, "a");
    t.ok(late);
    assert!(!t.is_held("a"));
}

#[test]
fn nothing_is_freed_on_a_lost_worker_until_it_reports() {
    let mut t = Table::with_agent(40003);
    t.bound(claim("a", "w").count(1));
    let judged = seen_gone(&t, "a");
    t.ok(lose("w"));
    assert_eq!(unproven(t.refused(judged.clone())), "its worker has fallen silent since");
    t.ok(find("w"));
    t.ok(judged);
}

#[test]
fn a_deadline_does_not_take_what_was_confirmed_in_time() {
    let mut t = Table::with_agent(40003);
    let a = t.bound(claim("a", "w").count(1));
    assert_eq!(unproven(t.refused(miss(&a))), "it is not RESERVED any more");
}

/// Both callers learn which of them came first.
#[test]
fn a_confirmation_and_its_deadline_are_decided_by_their_order_in_the_log() {
    for agent in [false, true] {
        let table = || if agent { Table::with_agent(40003) } else { Table::with_ports(40003) };
        let mut t = table();
        let a = t.grant(claim("a", "w").count(1));
        t.ok(confirm("a", a.token, a.version.0));
        assert!(matches!(t.refused(miss(&a)), Refusal::WrongVersion { .. }));
        assert_eq!(t.get("a").phase, Phase::Bound);

        let mut t = table();
        let a = t.grant(claim("a", "w").count(1));
        t.ok(miss(&a));
        if agent {
            t.ok(confirm("a", a.token, a.version.0));
            assert_eq!(t.get("a").phase, Phase::Bound, "nothing was taken from it");
        } else {
            let shown = t.refused(confirm("a", a.token, a.version.0)).to_string();
            let told = "no allocation a: reclaimed: not confirmed within 10m, on worker w";
            assert!(shown.starts_with(told), "{shown}");
        }
    }
}

#[test]
fn what_was_bound_or_lingered_before_a_boot_is_freed_by_its_first_report() {
    let mut t = Table::with_agent(40003);
    t.bound(claim("bound", "w").count(1));
    t.lingering(claim("lingering", "w").count(1));
    t.ok(reboot("w", booted("b2")));
    for name in ["bound", "lingering"] {
        let held = t.get(name).clone();
        assert!(held.version < t.worker("w").booted);
        let old = reclaim(&held, gone(booted("b1"), t.state.revision));
        assert!(matches!(t.refused(old), Refusal::NotProven { .. }), "seen before the boot");
        t.ok(reclaim(&held, gone(booted("b2"), t.state.revision)));
    }
}

/// Who was given ports may begin to start only after the boot: no boot shortens its deadline.
#[test]
fn what_is_reserved_across_a_boot_has_its_deadline_and_lingers_after_it() {
    let mut t = Table::with_agent(40003);
    t.grant(claim("a", "w").count(1));
    t.ok(reboot("w", booted("b2")));
    let seen = |t: &Table| reclaim(t.get("a"), gone(booted("b2"), t.state.revision));
    let early = seen(&t);
    assert_eq!(unproven(t.refused(early)), "its holder may still be starting");
    t.ok(miss(&t.get("a").clone()));
    let late = seen(&t);
    t.ok(late);
}
