//! Registering, changing and removing workers.

use super::*;

fn identity(boot: &str, namespace: u64) -> Option<Identity> {
    Some(Identity { machine_id: "m".into(), boot_id: boot.into(), namespace })
}

#[test]
fn registering_the_same_again_changes_nothing() {
    let mut t = Table::with_ports(40003);
    t.noop(register("w", spec(&[("service", 40000, 40003)], &[])));
}

#[test]
fn registering_anew_keeps_holders_quarantines_and_the_order_of_freed_ports() {
    let mut t = Table::with_ports(40004);
    let held = t.grant(claim("a", "w").count(2));
    let gone = t.grant(claim("b", "w").count(1));
    t.ok(quarantine("w", &[40004]));
    t.ok(release("b", gone.token));
    t.ok(register("w", spec(&[("service", 40000, 40005)], &[])));
    let w = t.worker("w");
    assert_eq!(w.pools[0].holder(40001), Some(held.name()));
    assert_eq!(w.pools[0].quarantines().map(|(n, _)| n).collect::<Vec<_>>(), [40004]);
    assert_eq!(w.created, Revision(1), "it is the same worker");
    assert_eq!(numbers(&t.grant(claim("c", "w").count(3))), [40003, 40005, 40002]);
}

#[test]
fn a_quarantine_follows_its_port_into_another_range() {
    let mut t = Table::with_ports(40007);
    let held = t.grant(claim("a", "w").count(8));
    t.ok(release("a", held.token));
    t.ok(quarantine("w", &[40005]));
    t.ok(register("w", spec(&[("service", 40000, 40003), ("ray", 40004, 40007)], &[])));
    assert_eq!(t.worker("w").pools[1].quarantined_count(), 1);
    let ray = t.grant(claim("b", "w").ask(Some("ray"), Ports::Count(3)));
    assert_eq!(numbers(&ray), [40004, 40006, 40007]);
}

#[test]
fn an_update_may_not_shrink_below_what_is_held() {
    let mut t = Table::default();
    let uuid = |s: &mut WorkerSpec| s.gpus[0].uuid = "GPU-0".into();
    t.ok(register("w", with(spec(&[("service", 40000, 40003)], &[24, 24]), uuid)));
    t.grant(claim("a", "w").count(2).gpu_gib(1, 10));
    t.grant(claim("b", "w").gpus(GpuChoice::Indexes([1].into()), GpuShare::Exclusive));

    let shrunk =
        |s: &[(&str, u16, u16)]| WorkerPatch { ranges: Some(ranges(s)), ..Default::default() };
    let resized = |change: &dyn Fn(&mut Vec<GpuSpec>)| {
        let mut gpus = spec(&[], &[24, 24]).gpus;
        gpus[0].uuid = "GPU-0".into();
        change(&mut gpus);
        WorkerPatch { gpus: Some(gpus), ..Default::default() }
    };
    for (patch, words) in [
        (
            shrunk(&[("service", 40000, 40000)]),
            "port 40001 of range service is held by a and would leave its range",
        ),
        (shrunk(&[("other", 40000, 40003)]), "port 40000 of range service is held by a"),
        (
            WorkerPatch { reserved: Some([port(40001)].into()), ..Default::default() },
            "port 40001 of range service is held by a and would be reserved",
        ),
        (resized(&|g| g[0].memory_bytes = 9 * GIB), "of which 10737418240 are held"),
        (resized(&|g| g[0].uuid = "GPU-9".into()), "GPU 0 is held by a and would become \"GPU-9\""),
        (resized(&|g| g[1].memory_bytes = 48 * GIB), "GPU 1 is held by b and is held exclusively"),
        (resized(&|g| g.truncate(1)), "GPU 1 is held by b and would be removed"),
    ] {
        let refusal = t.refused(update("w", patch));
        assert!(matches!(refusal, Refusal::WouldLose { .. }), "{refusal}");
        assert!(refusal.to_string().contains(words), "{refusal}");
    }

    t.ok(update("w", shrunk(&[("service", 40000, 40001)])));
    t.ok(update("w", resized(&|g| g[0].memory_bytes = 10 * GIB)));
    assert_eq!(t.worker("w").gpus[0].free_bytes(), 0);
    t.ok(update("w", resized(&|g| g.reverse())));
    assert_eq!(t.worker("w").gpus[1].free_bytes(), 14 * GIB, "holders follow the index");
    t.noop(update("w", WorkerPatch::default()));
    assert_eq!(t.refused(update("x", WorkerPatch::default())), Refusal::NoWorker(worker("x")));
}

/// Field failure nomad-13505: one bad reservation in a host's config blocked every later
/// allocation on it. Here a worker with overlapping ranges is refused when it registers, by name.
#[test]
fn overlapping_and_ambiguous_specs_are_refused_at_registration() {
    let mut t = Table::default();
    let overlap = spec(&[("service", 40000, 40063), ("ray", 40063, 40100)], &[]);
    let shown = t.refused(register("w", overlap)).to_string();
    assert!(shown.contains("range service=40000-40063") && shown.contains("ranges[1]"), "{shown}");
    for (bad, words) in [
        (spec(&[("a", 1, 2), ("a", 3, 4)], &[]), "named differently"),
        (spec(&[("a", 2, 1)], &[]), "first ≤ last"),
        (with(spec(&[], &[1, 1]), |s| s.gpus[1].index = 0), "unique on its worker"),
        (
            with(spec(&[], &[1, 1]), |s| s.gpus.iter_mut().for_each(|g| g.uuid = "U".into())),
            "unique in the cluster",
        ),
        (with(spec(&[], &[]), |s| s.address.clear()), "a host name"),
        (with(spec(&[], &[]), |s| s.identity = identity("", 1)), "identity.boot_id"),
    ] {
        let refusal = t.refused(register("w", bad));
        assert!(matches!(refusal, Refusal::Invalid(_)), "{refusal}");
        assert!(refusal.to_string().contains(words), "{refusal}");
    }
    // Reservations that repeat, or lie outside every range, are merged and do no harm.
    t.ok(register(
        "w",
        with(spec(&[("a", 10, 12)], &[]), |s| s.reserved = [port(10), port(9)].into()),
    ));
    assert_eq!(numbers(&t.grant(claim("i", "w").count(1))), [11]);
}

#[test]
fn a_gpu_and_a_namespace_belong_to_one_worker() {
    let mut t = Table::default();
    let owned = |uuid: &str, id| {
        with(spec(&[], &[24]), |s| {
            s.gpus[0].uuid = uuid.into();
            s.identity = id;
        })
    };
    t.ok(register("w1", owned("GPU-0", identity("b1", 7))));
    let refusal = t.refused(register("w2", owned("GPU-0", identity("b1", 8))));
    assert_eq!(refusal.to_string(), "GPU GPU-0 belongs to worker w1");
    let refusal = t.refused(register("w2", owned("GPU-1", identity("b1", 7))));
    assert_eq!(refusal.to_string(), "network namespace m:7 belongs to worker w1");
    t.ok(register("w2", owned("GPU-1", identity("b1", 8))));
    let patch = WorkerPatch { gpus: Some(owned("GPU-0", None).gpus), ..Default::default() };
    assert!(
        matches!(t.refused(update("w2", patch)), Refusal::IdentityTaken { owner, .. } if owner == worker("w1"))
    );

    // A newer boot of the same worker replaces the old one, and gives up its old namespace.
    t.ok(register("w1", owned("GPU-0", identity("b2", 9))));
    t.ok(register("w3", owned("", identity("b1", 7))));
    // After a reboot the numbers of namespaces begin anew.
    t.ok(register("w5", owned("", identity("b3", 9))));
    // Who says nothing of the identity does not erase it.
    t.ok(register("w3", owned("GPU-3", None)));
    assert_eq!(t.worker("w3").spec.identity, identity("b1", 7));
    // What a removed worker owned is free again.
    t.ok(remove("w1"));
    t.ok(register("w4", owned("GPU-0", identity("b2", 9))));
}

#[test]
fn only_a_ready_worker_is_given_new_allocations_and_what_is_held_stays() {
    let mut t = Table::with_ports(40003);
    let held = t.grant(claim("a", "w").count(1));
    for p in [WorkerPhase::Cordoned, WorkerPhase::Draining] {
        t.ok(phase("w", p));
        t.noop(phase("w", p));
        let refusal = t.refused(allocate(&[claim("b", "w").count(1)]));
        assert_eq!(refusal, Refusal::WorkerNotReady { worker: worker("w"), phase: p });
        assert!(refusal.to_string().contains(p.name()));
        t.refused(allocate(&[claim("b", "w").count(1).select("", Policy::Spread)]));
        t.noop(allocate(&[claim("a", "w").count(1)]));
    }
    t.ok(confirm("a", held.token, 0));
    t.ok(release("a", held.token));
    t.ok(phase("w", WorkerPhase::Ready));
    t.grant(claim("b", "w").count(1).select("", Policy::Spread));
    assert_eq!(t.refused(phase("x", WorkerPhase::Ready)), Refusal::NoWorker(worker("x")));
}

#[test]
fn a_worker_is_removed_only_when_nothing_is_held() {
    let mut t = Table::with_ports(40003);
    let a = t.grant(claim("a", "w").count(1));
    t.grant(claim("b", "w").count(1));
    let refusal = t.refused(remove("w"));
    assert_eq!(refusal.to_string(), "worker w still has 2 allocations, a among them");
    t.ok(release("a", a.token));
    t.ok(force("b", "host is gone"));
    assert_eq!(t.ok(remove("w")), Outcome::WorkerRemoved { removed: true });
    assert_eq!(t.events, [Event::WorkerRemoved(worker("w"))]);
    assert_eq!(t.noop(remove("w")), Outcome::WorkerRemoved { removed: false });
}

#[test]
fn a_worker_remembers_since_when_its_boot_is_known() {
    let mut t = Table::with_agent(40003);
    let registered = t.worker("w").created;
    assert_eq!(t.worker("w").booted, registered, "it had no earlier one");
    t.ok(update("w", WorkerPatch { address: Some("moved".into()), ..WorkerPatch::default() }));
    assert_eq!(t.worker("w").booted, registered);
    t.ok(reboot("w", booted("b2")));
    assert_eq!(t.worker("w").booted, t.state.revision);
    let again = WorkerSpec::clone(&t.worker("w").spec);
    t.ok(register("w", with(again, |s| s.identity = Some(booted("b3")))));
    assert_eq!(t.worker("w").booted, t.state.revision);
}

/// What runs there when an agent first speaks of it does not belong to an earlier boot.
#[test]
fn an_agent_that_comes_to_a_worker_in_use_announces_no_boot() {
    let mut t = Table::with_ports(40003);
    assert_eq!((t.worker("w").booted, t.worker("w").has_agent()), (Revision(0), false));
    let a = t.bound(claim("a", "w").count(1));
    t.ok(reboot("w", booted("b1")));
    assert!(t.worker("w").has_agent());
    assert!(t.worker("w").booted <= a.version);
    assert_eq!(t.get("a"), &a, "the record is adopted as it is");
}

#[test]
fn what_is_held_stays_in_its_namespace_for_as_long_as_it_can() {
    let elsewhere = |boot: &str| Identity { machine_id: "m2".into(), ..booted(boot) };
    let other_namespace = |boot: &str| Identity { namespace: 8, ..booted(boot) };
    let words = "it is network namespace 7 of machine m, and a is held there";
    for (identity, refused) in [
        (elsewhere("b1"), true),
        (elsewhere("b2"), true),
        (other_namespace("b1"), true),
        // After a boot the numbers of namespaces begin anew.
        (other_namespace("b2"), false),
        (booted("b2"), false),
    ] {
        let mut t = Table::with_agent(40003);
        t.grant(claim("a", "w").count(1));
        match t.apply(reboot("w", identity.clone())) {
            Ok(_) => assert!(!refused, "{identity:?}"),
            Err(Refusal::WouldLose { what, .. }) => assert!(refused && what == words, "{what}"),
            Err(other) => panic!("{identity:?}: {other}"),
        }
        t.ok(force("a", "moved"));
        t.ok(reboot("w", elsewhere("b9")));
    }
}

#[test]
fn a_boot_that_is_over_leaves_its_namespace_to_others() {
    let mut t = Table::with_agent(40003);
    t.grant(claim("a", "w").count(1));
    t.ok(reboot("w", booted("b2")));
    let same = |boot: &str| with(spec(&[], &[]), |s| s.identity = Some(booted(boot)));
    assert!(matches!(t.refused(register("x", same("b2"))), Refusal::IdentityTaken { .. }));
    t.ok(register("x", same("b1")));
}

#[test]
fn an_operator_may_remove_a_worker_with_all_that_it_holds() {
    let mut t = Table::with_agent(40003);
    t.ok(register("x", spec(&[("s", 1, 9)], &[])));
    let lease = t.lease();
    let b = t.bound(claim("b", "w").count(1).gpus_alone(1).on(lease));
    let a = t.lingering(claim("a", "w").count(1));
    t.grant(claim("c", "x").count(1));
    let before = t.state.revision.0;
    assert_eq!(t.ok(evict("w", "its disk burned")), Outcome::WorkerRemoved { removed: true });
    assert_eq!(t.state.revision.0, before + 1, "one revision");
    let why = ReleaseReason::Forced { reason: "its disk burned".into() };
    assert_eq!(
        t.events,
        [
            Event::Released { allocation: a.into(), why: why.clone() },
            Event::Released { allocation: b.into(), why: why.clone() },
            Event::WorkerRemoved(worker("w")),
        ]
    );
    for name in ["a", "b"] {
        assert!(!t.is_held(name));
        assert_eq!(t.state.departure(&instance(name)).unwrap().why, why, "it is recorded");
    }
    assert!(t.on(lease).is_empty());
    assert!(t.is_held("c"), "what is elsewhere stays");
    assert_eq!(t.noop(evict("w", "again")), Outcome::WorkerRemoved { removed: false });
    t.ok(register("y", with(spec(&[], &[]), |s| s.identity = Some(booted("b1")))));
}

#[test]
fn an_empty_worker_is_removed_with_or_without_force() {
    let mut t = Table::with_ports(40003);
    assert_eq!(t.ok(evict("w", "")), Outcome::WorkerRemoved { removed: true });
    assert_eq!(t.events, [Event::WorkerRemoved(worker("w"))]);
}
