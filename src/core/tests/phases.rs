//! Whether new allocations go to a worker: what an operator wants, and what is known of it.

use super::*;

/// The table of a cluster that was restored from a backup.
fn restored() -> Table {
    let t = Table::with_agent(40003);
    Table { state: t.state.anew(Millis(0)), events: vec![] }
}

fn phases(t: &Table) -> (WorkerPhase, WorkerPhase) {
    (t.worker("w").phase, t.worker("w").phase_before)
}

#[test]
fn a_lost_worker_is_given_nothing_new_and_keeps_what_it_has() {
    let mut t = Table::with_agent(40003);
    let lease = t.lease();
    let a = t.grant(claim("a", "w").count(1).on(lease));
    t.ok(lose("w"));
    let not_ready = Refusal::WorkerNotReady { worker: worker("w"), phase: WorkerPhase::Lost };
    assert_eq!(t.refused(allocate(&[claim("b", "w").count(1)])), not_ready);
    t.refused(allocate(&[claim("b", "w").count(1).select("", Policy::Spread)]));
    assert_eq!(t.refused(report("a", a.token, 0, 40000)), not_ready, "another port is a new one");
    t.ok(expire(lease));
    assert!(t.is_held("a"), "nobody can tell what runs there");
    t.ok(confirm("a", a.token, 0));
    t.ok(release("a", a.token));
}

#[test]
fn a_worker_that_reports_again_is_what_it_was() {
    for (wanted, fits) in [(WorkerPhase::Ready, true), (WorkerPhase::Cordoned, false)] {
        let mut t = Table::with_agent(40003);
        t.ok(phase("w", wanted));
        t.ok(lose("w"));
        assert_eq!(phases(&t), (WorkerPhase::Lost, wanted));
        t.ok(find("w"));
        assert_eq!(phases(&t), (wanted, wanted));
        assert_eq!(t.apply(allocate(&[claim("a", "w").count(1)])).is_ok(), fits);
    }
}

#[test]
fn an_operators_word_on_a_lost_worker_holds_once_it_reports() {
    let mut t = Table::with_agent(40003);
    t.ok(lose("w"));
    t.ok(phase("w", WorkerPhase::Draining));
    assert_eq!(phases(&t), (WorkerPhase::Lost, WorkerPhase::Draining));
    t.noop(phase("w", WorkerPhase::Draining));
    t.ok(find("w"));
    assert_eq!(phases(&t), (WorkerPhase::Draining, WorkerPhase::Draining));
}

#[test]
fn losing_and_finding_a_worker_are_idempotent() {
    let mut t = Table::with_agent(40003);
    t.noop(find("w"));
    t.ok(lose("w"));
    t.noop(lose("w"));
    t.ok(find("w"));
    t.noop(find("w"));
    assert_eq!(t.refused(lose("x")), Refusal::NoWorker(worker("x")));
}

#[test]
fn an_agent_that_registers_a_lost_worker_has_not_yet_reported() {
    let mut t = Table::with_agent(40003);
    t.ok(lose("w"));
    t.ok(reboot("w", booted("b2")));
    assert_eq!(t.worker("w").phase, WorkerPhase::Lost);
}

/// Nobody would ever bring it back.
#[test]
fn a_worker_without_an_agent_cannot_fall_silent() {
    let mut t = Table::with_ports(40003);
    let refusal = t.refused(lose("w")).to_string();
    assert_eq!(refusal, "phase: \"LOST\" must be of a worker with an agent");
}

#[test]
fn an_operator_does_not_lose_workers_and_a_leader_does_not_cordon_them() {
    use WorkerPhase::*;
    let mut t = Table::with_agent(40003);
    for asked in WorkerPhase::ALL {
        let by = |by| Command::SetWorkerPhase { name: worker("w"), phase: asked, by };
        let operator = t.apply(by(Actor::Operator));
        assert_eq!(operator.is_ok(), matches!(asked, Ready | Cordoned | Draining), "{asked:?}");
        let leader = t.apply(by(Actor::Leader(LEADER)));
        assert_eq!(leader.is_ok(), matches!(asked, Ready | Lost), "{asked:?}");
        for refused in [operator, leader].into_iter().filter_map(Result::err) {
            assert!(matches!(refused, Refusal::Invalid(_)), "{refused}");
        }
    }
}

#[test]
fn a_restored_worker_grants_nothing_until_it_is_verified() {
    let mut t = restored();
    let not_ready = Refusal::WorkerNotReady { worker: worker("w"), phase: WorkerPhase::Unverified };
    assert_eq!(t.refused(allocate(&[claim("a", "w").count(1)])), not_ready);
    t.ok(verify("w"));
    assert_eq!(phases(&t), (WorkerPhase::Ready, WorkerPhase::Ready));
    t.grant(claim("a", "w").count(1));
}

/// To cordon and uncordon a worker must not verify it.
#[test]
fn an_operators_word_on_an_unverified_worker_holds_once_it_is_verified() {
    let mut t = restored();
    t.ok(phase("w", WorkerPhase::Cordoned));
    t.ok(phase("w", WorkerPhase::Ready));
    assert_eq!(t.worker("w").phase, WorkerPhase::Unverified);
    t.ok(phase("w", WorkerPhase::Draining));
    t.ok(verify("w"));
    assert_eq!(phases(&t), (WorkerPhase::Draining, WorkerPhase::Draining));
}

#[test]
fn a_silence_and_its_end_do_not_verify_a_worker() {
    let mut t = restored();
    t.noop(lose("w"));
    t.noop(find("w"));
    assert_eq!(t.worker("w").phase, WorkerPhase::Unverified);
}

#[test]
fn verifying_what_is_not_unverified_changes_nothing() {
    let mut t = Table::with_agent(40003);
    t.noop(verify("w"));
    t.ok(lose("w"));
    t.noop(verify("w"));
    assert_eq!(t.worker("w").phase, WorkerPhase::Lost);
    assert_eq!(t.refused(verify("x")), Refusal::NoWorker(worker("x")));
}
