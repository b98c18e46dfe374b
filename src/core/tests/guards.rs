//! Versions and repeats, and who may speak for the leader.

use super::*;

/// The last changes that an allocation can have come to its version by.
const CHANGES: [&str; 5] = ["granted bound", "confirmed", "attached", "swapped", "lingered"];

/// An allocation `a` after this change, and the version that the change was made to.
fn after(change: &str) -> (Table, Revision) {
    let mut t = Table::with_agent(40009);
    let lease = t.lease();
    let asked = with(claim("a", "w").count(1).on(lease), |c| c.bound = change == "granted bound");
    let granted = t.grant(asked);
    if change == "attached" {
        t.ok(confirm("a", granted.token, 0));
    }
    let from = t.get("a").version;
    match change {
        "granted bound" => {}
        "confirmed" => drop(t.ok(confirm("a", granted.token, from.0))),
        "attached" => {
            let other = t.lease();
            t.ok(attach("a", granted.token, from.0, Some(other)));
        }
        "swapped" => drop(t.ok(report("a", granted.token, from.0, 40000))),
        "lingered" => drop(t.ok(miss(&granted))),
        other => panic!("{other}"),
    }
    (t, from)
}

/// What the table does with a command that names no version, the present one, that from before the
/// last change, and one that never was.
fn answers(change: &str, command: impl Fn(&Allocation, Revision) -> Command) -> [&'static str; 4] {
    let (t, from) = after(change);
    let held = t.get("a").clone();
    [Revision(0), held.version, from, Revision(99)].map(|version| {
        let mut copy = Table { state: t.state.clone(), events: vec![] };
        match copy.apply(command(&held, version)) {
            Ok(_) if copy.state == t.state => "repeated",
            Ok(_) => "done",
            Err(Refusal::WrongVersion { .. }) => "outdated",
            Err(Refusal::Lingers { .. }) => "lingers",
            Err(other) => panic!("{change}, version {version}: {other}"),
        }
    })
}

#[test]
fn a_confirmation_is_known_by_the_version_that_it_was_made_to() {
    let expected = [
        ["repeated", "repeated", "repeated", "outdated"],
        ["repeated", "repeated", "repeated", "outdated"],
        ["repeated", "repeated", "outdated", "outdated"],
        ["done", "done", "outdated", "outdated"],
        ["done", "done", "done", "outdated"],
    ];
    for (change, expected) in CHANGES.into_iter().zip(expected) {
        let confirm = |held: &Allocation, version: Revision| confirm("a", held.token, version.0);
        assert_eq!(answers(change, confirm), expected, "{change}");
    }
}

#[test]
fn an_attachment_is_known_by_the_version_that_it_was_made_to() {
    let expected = [
        ["repeated", "repeated", "repeated", "outdated"],
        ["repeated", "repeated", "outdated", "outdated"],
        ["repeated", "repeated", "repeated", "outdated"],
        ["repeated", "repeated", "outdated", "outdated"],
        ["lingers", "lingers", "lingers", "lingers"],
    ];
    for (change, expected) in CHANGES.into_iter().zip(expected) {
        let again =
            |held: &Allocation, version: Revision| attach("a", held.token, version.0, held.lease);
        assert_eq!(answers(change, again), expected, "{change}");
    }
}

#[test]
fn a_confirmation_that_says_something_new_is_a_change_and_is_guarded() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    let a = t.grant(claim("a", "w").count(1));
    t.ok(confirm("a", a.token, a.version.0));
    let bound = t.get("a").clone();
    let with_handle = |version: u64| confirm_with("a", a.token, version, process("b1", 7), None);
    assert!(matches!(t.refused(with_handle(a.version.0)), Refusal::WrongVersion { .. }));
    t.ok(with_handle(bound.version.0));
    assert_eq!(t.get("a").liveness.as_deref().cloned(), process("b1", 7));
    t.noop(with_handle(0));
    t.ok(confirm_with("a", a.token, 0, None, Some(lease)));
    assert_eq!(t.on(lease), ["a"]);
    t.ok(confirm_with("a", a.token, 0, process("b1", 8), None));
    let now = t.get("a").clone();
    assert_eq!(
        (now.liveness.as_deref().cloned(), now.lease),
        (process("b1", 8), Some(lease)),
        "the rest stays"
    );
}

#[test]
fn a_confirmation_on_a_lease_that_is_not_there_binds_nothing() {
    let mut t = Table::with_agent(40003);
    let a = t.grant(claim("a", "w").count(1));
    let on_nothing = confirm_with("a", a.token, 0, None, Some(LeaseId(99)));
    assert_eq!(t.refused(on_nothing), Refusal::NoLease(LeaseId(99)));
    assert_eq!(t.get("a").phase, Phase::Reserved);
}

#[test]
fn after_a_swap_the_handle_of_the_failed_start_is_forgotten() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    let a = t.grant(claim("a", "w").count(1).on(lease));
    t.ok(confirm_with("a", a.token, 0, process("b1", 7), None));
    t.ok(report("a", a.token, 0, 40000));
    let moved = t.get("a");
    assert_eq!((&moved.liveness, moved.confirmed, moved.lease), (&None, false, Some(lease)));
}

/// Everything that a leader's timers and its sweeper propose, each with effect.
fn proposed_by(t: &Table, under: Leader) -> Vec<Command> {
    let by = Actor::Leader(under);
    let name = worker("w");
    let reclaim = |held: &Allocation, ground| Command::Reclaim {
        name: held.name().clone(),
        token: held.token,
        version: held.version,
        ground,
        under,
    };
    let lease = t.state.leases_after(None).next().unwrap().id;
    vec![
        reclaim(t.get("starting"), Ground::Unconfirmed),
        reclaim(t.get("bound"), gone(booted("b1"), t.state.revision)),
        Command::ExpireLease { id: lease, under },
        Command::SetWorkerPhase { name: name.clone(), phase: WorkerPhase::Lost, by },
        Command::Quarantine {
            worker: name.clone(),
            ports: ports(&[40009]),
            reason: String::new(),
            by,
        },
        Command::LiftQuarantine {
            worker: name,
            ports: ports(&[40008]),
            by,
            seen: t.state.revision,
        },
    ]
}

fn table_with_work_for_a_leader() -> Table {
    let mut t = Table::with_agent(40009);
    t.lease();
    t.grant(claim("starting", "w").count(1));
    t.bound(claim("bound", "w").count(1));
    t.ok(observe("w", &[40008]));
    t
}

/// It was deposed while its proposal was under way, and whoever leads now restarted every timer.
#[test]
fn what_a_deposed_leader_proposed_changes_nothing() {
    let mut t = table_with_work_for_a_leader();
    let deposed = Refusal::Deposed { proposed: DEPOSED, leader: LEADER };
    for command in proposed_by(&t, DEPOSED) {
        assert_eq!(t.refused(command), deposed);
    }
    t.state = t.state.anew(Millis(0));
    let verify = Command::VerifyWorker { name: worker("w"), by: Actor::Leader(DEPOSED) };
    assert_eq!(t.refused(verify), deposed);
}

#[test]
fn what_the_leader_proposed_counts_in_its_own_entries() {
    let commands = proposed_by(&table_with_work_for_a_leader(), LEADER).len();
    for i in 0..commands {
        let mut t = table_with_work_for_a_leader();
        let command = proposed_by(&t, LEADER).remove(i);
        let before = t.state.revision;
        t.ok(command.clone());
        assert!(t.state.revision > before, "{command:?}");
    }
}

#[test]
fn what_nobody_times_counts_under_any_leader() {
    let mut state = State::default();
    let elsewhere = Origin { leader: DEPOSED, ..ORIGIN };
    for command in [
        register("w", spec(&[("s", 1, 9)], &[])),
        quarantine("w", &[5]),
        lift("w", &[5]),
        phase("w", WorkerPhase::Cordoned),
        grant_lease(1_000),
        revoke(LeaseId(5)),
        remove("w"),
    ] {
        let (applied, events) = apply(&mut state, &elsewhere, &command);
        applied.outcome.unwrap();
        assert!(!events.is_empty(), "{command:?}");
    }
}

/// For people to read: nothing is decided by it.
#[test]
fn what_is_granted_and_changed_bears_the_time_of_its_entry() {
    let mut t = Table::with_agent(40003);
    let a = t.grant(claim("a", "w").count(1));
    assert_eq!((a.granted_at, a.changed_at), (ORIGIN.at, ORIGIN.at));
    let later = Origin { at: Millis(ORIGIN.at.0 - 5), ..ORIGIN };
    let (applied, _) = apply(&mut t.state, &later, &confirm("a", a.token, 0));
    applied.outcome.unwrap();
    assert_eq!((t.get("a").granted_at, t.get("a").changed_at), (ORIGIN.at, later.at));
}
