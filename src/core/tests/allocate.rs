//! Which ports and GPUs a claim on one worker is given, and how a repeat is told from a rival.

use super::*;

fn rival(refusal: Refusal) -> (String, &'static str) {
    match refusal {
        Refusal::NameTaken { holder, difference, .. } => (holder.name().to_string(), difference),
        other => panic!("not taken: {other}"),
    }
}

#[test]
fn a_repeat_is_given_the_same_allocation_again() {
    let mut t = Table::with_ports(40003);
    let first = t.grant(claim("a", "w").count(2));
    assert_eq!((first.token.0, first.version), (t.state.revision.0, t.state.revision));
    match t.noop(allocate(&[claim("a", "w").count(2)])) {
        Outcome::Allocated { allocations, repeated: true } => {
            assert_eq!(allocations, std::slice::from_ref(&first))
        }
        other => panic!("{other:?}"),
    }
    t.ok(confirm("a", first.token, 0));
    match t.noop(allocate(&[claim("a", "w").count(2)])) {
        Outcome::Allocated { allocations, .. } => assert_eq!(allocations[0].phase, Phase::Bound),
        other => panic!("{other:?}"),
    }
}

/// Field failure gpustack-1466: schedulers that placed replicas at once gave two of them one port.
#[test]
fn replicas_that_are_scheduled_at_once_never_share_a_port() {
    let mut t = Table::with_ports(40009);
    let given: std::collections::BTreeSet<u16> =
        (0..10).map(|i| numbers(&t.grant(claim(&format!("r{i}"), "w").count(1)))[0]).collect();
    assert_eq!(given.len(), 10);
    t.refused(allocate(&[claim("r10", "w").count(1)]));
}

#[test]
fn a_rival_is_told_who_holds_the_name_and_what_differs() {
    let mut t = Table::with_ports(40009);
    t.grant(claim("a", "w").count(2));
    let same = || claim("a", "w").count(2);
    for (other, difference) in [
        (same().uid("u2"), "uid"),
        (same().select("", Policy::Binpack), "placement"),
        (same().count(1), "ports"),
        (same().gpu_gib(1, 1), "gpus"),
        (with(same(), |c| c.bound = true), "bound"),
        (with(same(), |c| c.labels = labels(&[("k", "v")])), "labels"),
    ] {
        let refusal = t.refused(allocate(&[other]));
        assert!(refusal.to_string().contains("on worker w under uid u1; the request differs"));
        assert_eq!(rival(refusal), ("a".into(), difference));
    }
}

#[test]
fn a_gang_is_granted_whole_or_not_at_all() {
    let mut t = Table::with_ports(40004);
    let before = digest(&t.state);
    let too_many: Vec<_> = (0..3).map(|i| claim(&format!("m{i}"), "w").count(2)).collect();
    let refusal = t.refused(allocate(&too_many));
    assert!(refusal.to_string().starts_with("claim m2: nothing fits"), "{refusal}");
    assert_eq!(digest(&t.state), before);
    t.refused(allocate(&[claim("m0", "w").count(1), claim("m1", "x").count(1)]));
    assert_eq!(digest(&t.state), before);
    // The default range by its name is the same one.
    let named = with(claim("m1", "w").count(3), |c| c.ports[0].range = Some(range("service")));
    t.refused(allocate(&[claim("m0", "w").count(3), named]));
    assert_eq!(digest(&t.state), before);

    let revision = t.state.revision.0;
    let gang = t.gang(&too_many[..2]);
    assert_eq!(t.state.revision.0, revision + 1, "one revision");
    assert_eq!(gang[0].token, gang[1].token);
    assert_eq!(t.events.len(), 2);
}

/// Field failures nomad-9506, nomad-16410: ports of one plan that did not see each other.
#[test]
fn claims_of_a_gang_and_requests_of_a_claim_see_each_other() {
    let mut t = Table::with_ports(40005);
    let gang = t.gang(&[
        claim("a", "w").count(1).specific(40000).count(1),
        claim("b", "w").count(2).specific(40003),
    ]);
    assert_eq!(numbers(&gang[0]), [40001, 40000, 40002], "in the order of the requests");
    assert_eq!(numbers(&gang[1]), [40004, 40005, 40003]);
    t.refused(allocate(&[claim("c", "w").count(1)]));
}

#[test]
fn a_gang_is_repeated_as_a_whole() {
    let mut t = Table::with_ports(40009);
    let claims = [claim("a", "w").count(1), claim("b", "w").count(1)];
    let gang = t.gang(&claims);
    match t.noop(allocate(&claims)) {
        Outcome::Allocated { allocations, repeated: true } => assert_eq!(allocations, gang),
        other => panic!("{other:?}"),
    }
    let wider = [claims[0].clone(), claims[1].clone(), claim("c", "w").count(1)];
    assert_eq!(rival(t.refused(allocate(&wider))), ("a".into(), "gang"));
    t.ok(release("a", gang[0].token));
    assert_eq!(rival(t.refused(allocate(&claims))), ("b".into(), "gang"), "half of it is gone");
    t.grant(claims[0].clone());
    assert_eq!(rival(t.refused(allocate(&claims))), ("b".into(), "gang"), "of another grant");
    let mut with_rival = claims.clone();
    with_rival[1] = with_rival[1].clone().uid("u2");
    assert_eq!(rival(t.refused(allocate(&with_rival))), ("b".into(), "uid"));
}

/// Field failure gpustack-4312: an engine's second port was in no table. Here one claim holds all
/// of an instance's ports, by name, alone or in a row.
#[test]
fn ports_are_named_counted_specific_and_in_a_row() {
    let mut t = Table::default();
    t.ok(register("w", spec(&[("service", 40000, 40009), ("ray", 41000, 41009)], &[])));
    let named = |name: &str, range_name: Option<&str>, ports| PortRequest {
        name: Some(PortName::parse(name).unwrap()),
        range: range_name.map(range),
        ports,
    };
    let a = t.grant(with(claim("a", "w"), |c| {
        c.ports = vec![
            named("http", None, Ports::Count(1)),
            named("dist", Some("ray"), Ports::Contiguous(4)),
            named("metrics", None, Ports::Specific(port(41009))),
            named("debug", Some("service"), Ports::Specific(port(40000))),
        ];
    }));
    let shown: Vec<_> = a
        .ports
        .iter()
        .map(|p| format!("{}:{}={}", a.port_name(p).unwrap(), p.range, p.number))
        .collect();
    assert_eq!(
        shown,
        [
            "http:service=40001",
            "dist:ray=41000",
            "dist:ray=41001",
            "dist:ray=41002",
            "dist:ray=41003",
            "metrics:ray=41009",
            "debug:service=40000"
        ]
    );
}

#[test]
fn specific_ports_go_before_bands_and_bands_before_counted_ones() {
    let mut t = Table::with_ports(40005);
    let a = t.grant(claim("a", "w").count(1).band(4).specific(40000));
    assert_eq!(numbers(&a), [40005, 40001, 40002, 40003, 40004, 40000]);
}

/// Field failure gpustack-4063: a freed port was given to the next caller, and requests for the
/// old instance reached the new one.
#[test]
fn the_port_that_was_freed_last_is_given_last() {
    let mut t = Table::with_ports(40002);
    let a = t.grant(claim("a", "w").count(1));
    t.ok(release("a", a.token));
    let mut last = Vec::new();
    for round in 0..6 {
        let name = format!("r{round}");
        let held = t.grant(claim(&name, "w").count(1));
        last.extend(numbers(&held));
        t.ok(release(&name, held.token));
    }
    assert_eq!(last, [40001, 40002, 40000, 40001, 40002, 40000]);
}

#[test]
fn a_refusal_says_what_was_full_by_how_much_and_who_holds_it() {
    let mut t = Table::default();
    let reserved = |s: &mut WorkerSpec| s.reserved = [port(40003)].into();
    t.ok(register("w", with(spec(&[("service", 40000, 40007)], &[24]), reserved)));
    t.ok(register("bare", spec(&[], &[])));
    t.grant(claim("a", "w").specific(40001).specific(40005).gpu_gib(1, 20));
    t.ok(quarantine("w", &[40006]));
    let at = |w: &str| claim("b", w);
    for (asked, words) in [
        (
            at("w").count(5),
            "range service has 4 of 8 ports free, 5 more wanted (2 held by a, 1 quarantined, 1 reserved)",
        ),
        (at("w").band(2), "range service has 4 ports free but at most 1 in a row, 2 wanted"),
        (at("w").specific(40001), "port 40001 is held by a"),
        (at("w").specific(40003), "port 40003 is reserved"),
        (at("w").specific(40008), "port 40008 is in none of the worker's ranges"),
        (at("w").ask(Some("ray"), Ports::Count(1)), "it has no range ray"),
        (at("bare").count(1), "it has no port range"),
        (
            at("w").gpu_gib(1, 5),
            "GPU 0 has 4294967296 of 25769803776 bytes free, 5368709120 wanted; held by a",
        ),
        (at("w").gpus_alone(1), "GPU 0 is wanted alone and held by a"),
        (
            at("w").gpu_gib(2, 1),
            "1 of its 1 GPUs fit, 2 wanted; the emptiest has 4294967296 bytes free (GPUs held by a)",
        ),
        (at("w").gpus(GpuChoice::Indexes([3].into()), GpuShare::Exclusive), "it has no GPU 3"),
    ] {
        let refusal = t.refused(allocate(&[asked]));
        assert!(refusal.to_string().ends_with(words), "{refusal}\nnot: {words}");
    }
    assert_eq!(t.refused(allocate(&[at("x").count(1)])), Refusal::NoWorker(worker("x")));
}

#[test]
fn a_refusal_names_a_few_holders_and_says_that_there_are_more() {
    let mut t = Table::with_ports(40005);
    let holders = ["a", "b", "c", "d", "e", "f"];
    for (held, last) in holders.into_iter().zip(["a", "b", "c", "d", "e", "e and more"]) {
        t.grant(claim(held, "w").count(1));
        let refusal = t.refused(allocate(&[claim("z", "w").count(6)])).to_string();
        assert!(refusal.contains(&format!("{last}, 0 quarantined")), "{refusal}");
    }
    // Two that lie mixed are two.
    let mut t = Table::with_ports(40005);
    for at in [0, 2, 4] {
        t.grant(claim(&format!("a{at}"), "w").specific(40000 + at));
    }
    t.grant(claim("b", "w").specific(40001).specific(40003).specific(40005));
    let refusal = t.refused(allocate(&[claim("z", "w").count(1)])).to_string();
    assert!(refusal.contains("held by a0, b, a2, a4, 0 quarantined"), "{refusal}");
}

#[test]
fn a_specific_port_must_lie_in_the_range_that_is_named_with_it() {
    let mut t = Table::default();
    t.ok(register("w", spec(&[("a", 10, 19), ("b", 20, 29)], &[])));
    let wrong = claim("i", "w").ask(Some("a"), Ports::Specific(port(25)));
    let lack = lack(t.refused(allocate(&[wrong])));
    assert_eq!(lack, Lack::Port { port: port(25), taken: Taken::OutOf(range("a")) });
    assert_eq!(lack.to_string(), "port 25 is not in range a");
    assert_eq!(t.grant(claim("i", "w").specific(25)).ports[0].range, range("b"));
}

#[test]
fn gpus_are_given_by_index_or_count_shared_or_alone() {
    let mut t = Table::default();
    t.ok(register("w", spec(&[], &[24, 24, 24])));
    let by_index = |indexes: &[u32]| GpuChoice::Indexes(indexes.iter().copied().collect());
    let a = t.grant(claim("a", "w").gpus(by_index(&[2, 0]), GpuShare::MemoryBytes(10 * GIB)));
    assert_eq!(gpus(&a), [0, 2]);
    let b = t.grant(claim("b", "w").gpus_alone(1));
    assert_eq!(gpus(&b), [1], "the only idle one");
    assert_eq!((b.gpus[0].memory_bytes, b.gpus[0].exclusive), (24 * GIB, true));
    assert!(matches!(
        lack(t.refused(allocate(&[claim("c", "w").gpu_gib(3, 1)]))),
        Lack::Gpus { wanted: 3, fitting: 2, total: 3, .. }
    ));
    assert!(matches!(
        lack(t.refused(allocate(&[claim("c", "w").gpus(by_index(&[0]), GpuShare::Exclusive)]))),
        Lack::GpuBusy { index: 0, .. }
    ));
    assert_eq!(gpus(&t.grant(claim("c", "w").gpu_gib(2, 14))), [0, 2], "to the last byte");
    t.refused(allocate(&[claim("d", "w").gpus(by_index(&[0]), GpuShare::MemoryBytes(1))]));
    t.ok(release("b", b.token));
    assert_eq!(gpus(&t.grant(claim("d", "w").gpus_alone(1))), [1]);
}

#[test]
fn on_one_worker_the_fullest_gpu_that_fits_is_taken_or_with_spread_the_emptiest() {
    let mut t = Table::default();
    t.ok(register("w", spec(&[], &[24, 24, 24])));
    let on = |policy| claim("x", "w").gpu_gib(1, 4).select("", policy);
    let named = |name: &str, policy| with(on(policy), |c| c.name = instance(name));
    let first = |t: &mut Table, name, policy| gpus(&t.grant(named(name, policy)))[0];
    assert_eq!(first(&mut t, "a", Policy::Spread), 0, "a tie goes to the lowest index");
    assert_eq!(first(&mut t, "b", Policy::Spread), 1);
    assert_eq!(first(&mut t, "c", Policy::Binpack), 0);
    assert_eq!(first(&mut t, "d", Policy::Spread), 2);
    assert_eq!(gpus(&t.grant(claim("e", "w").gpu_gib(2, 14))), [0, 1], "16 of 24 GiB are free");
}
