//! The table of a cluster that is restored from a backup.

use super::*;

fn backed_up() -> Table {
    let mut t = Table::with_agent(40009);
    let lease = t.lease();
    t.bound(claim("a", "w").count(2).gpu_gib(1, 4));
    t.gang(&[claim("b", "w").count(1).on(lease), claim("c", "w").count(1)]);
    t.lingering(claim("d", "w").count(1));
    t.grant(claim("e", "w").count(1));
    t.ok(force("e", "stuck"));
    t.ok(observe("w", &[40009]));
    t.state.remember_member(3, "three");
    t
}

#[test]
fn it_holds_what_was_held_and_its_revision_is_far_ahead() {
    let t = backed_up();
    let anew = t.state.anew(Millis(0));
    check_invariants(&anew).unwrap();
    assert_eq!(anew.revision.0, t.state.revision.0 + RESTORE_GAP);
    for held in t.state.allocations_after(None) {
        let now = anew.allocation(held.name()).unwrap();
        assert_eq!((now.token.0, now.version), (anew.revision.0, anew.revision));
        assert_eq!((&now.ports, &now.gpus, now.phase), (&held.ports, &held.gpus, held.phase));
        assert_eq!((now.lease, &now.reason), (held.lease, &held.reason));
    }
    assert_eq!(anew.worker(&worker("w")).unwrap().pools[0].quarantined_count(), 1);
    assert_eq!(anew.departures().count(), 1);
    assert_eq!(anew.members().count(), 0, "ids of nodes start afresh");
}

/// The first of two restores of a backup ran, and changed; nobody made a newer backup.
#[test]
fn a_second_restore_of_one_backup_is_ahead_of_what_the_first_came_to() {
    let (backup, now) = (backed_up().state, Millis(1_795_000_000_000));
    let mut first = Table { state: backup.anew(now), events: vec![] };
    for _ in 0..500 {
        first.lease();
    }
    let second = backup.anew(Millis(now.0 + 1_000));
    check_invariants(&second).unwrap();
    assert!(second.revision > first.state.revision);
    assert!(first.state.anew(Millis(0)).revision.0 >= first.state.revision.0 + RESTORE_GAP);
    assert!(second.revision.0 < 1 << 53, "a float counts as far");
    // The backup is that of a cluster which was restored itself, some time ago or just now.
    for after_ms in [1_000, 24 * 3_600_000, 30 * 24 * 3_600_000] {
        let again = |ms| first.state.anew(Millis(now.0 + after_ms + ms)).revision.0;
        let (one, other) = (again(0), again(1_000));
        assert!(one > first.state.revision.0 && other >= one + 1_000 * 1_000, "{one} {other}");
    }
}

#[test]
fn it_is_restored_from_a_snapshot_as_it_is() {
    let anew = backed_up().state.anew(Millis(0));
    assert_eq!(rebuilt(&anew), Ok(anew));
}

#[test]
fn no_token_of_the_old_cluster_counts() {
    let old = backed_up();
    let mut t = Table { state: old.state.anew(Millis(0)), events: vec![] };
    let a = old.get("a");
    let judged = reclaim(a, gone(booted("b1"), t.state.revision));
    for late in [
        release("a", a.token),
        confirm("a", a.token, 0),
        attach("a", a.token, 0, None),
        report("a", a.token, 0, 40000),
        judged,
    ] {
        assert!(matches!(t.refused(late), Refusal::WrongToken { .. }));
    }
}

#[test]
fn a_holder_learns_its_new_token_by_repeating_its_request() {
    let old = backed_up();
    let mut t = Table { state: old.state.anew(Millis(0)), events: vec![] };
    let asked = Claim::clone(&old.get("a").claim);
    let Outcome::Allocated { allocations, repeated: true } = t.noop(allocate(&[asked])) else {
        panic!("not repeated");
    };
    assert_ne!(allocations[0].token, old.get("a").token);
    t.ok(release("a", allocations[0].token));
}

#[test]
fn what_an_agent_saw_of_the_old_cluster_proves_nothing() {
    let old = backed_up();
    let mut t = Table { state: old.state.anew(Millis(0)), events: vec![] };
    let seen = old.state.revision;
    let refusal = t.refused(reclaim(t.get("a"), gone(booted("b1"), seen)));
    assert_eq!(unproven(refusal), "it changed after it was looked at");
}

#[test]
fn what_lingered_goes_on_lingering_and_can_be_revived() {
    let old = backed_up();
    let mut t = Table { state: old.state.anew(Millis(0)), events: vec![] };
    let d = t.get("d").clone();
    assert_eq!(d.phase, Phase::Lingering);
    t.ok(confirm("d", d.token, d.version.0));
    t.noop(confirm("d", d.token, d.version.0));
}
