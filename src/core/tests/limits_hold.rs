//! Every limit: at it accepted, one more refused with the field's name and the limit.

use super::super::apply::check_room;
use super::limits::*;
use super::*;

/// `build(n)` is accepted at `limit` and refused, naming `field`, at `limit + 1`.
fn holds(field: &str, limit: usize, build: impl Fn(usize) -> Command) {
    build(limit).validate().unwrap_or_else(|e| panic!("{field} at {limit}: {e}"));
    let error = build(limit + 1).validate().expect_err(field);
    assert!(error.field.contains(field), "{field}: {error}");
    let mut state = State::default();
    let (applied, events) = apply(&mut state, &ORIGIN, &build(limit + 1));
    assert_eq!(applied.outcome, Err(Refusal::Invalid(error)), "apply checks it too");
    assert_eq!((events, state), (Events::new(), State::default()));
}

fn many_labels(n: usize) -> Labels {
    (0..n)
        .map(|i| (LabelKey::parse(&format!("k{i}")).unwrap(), LabelValue::parse("").unwrap()))
        .collect()
}

fn worker_with(change: impl FnOnce(&mut WorkerSpec)) -> Command {
    register("w", with(spec(&[], &[]), change))
}

fn one_claim(change: impl FnOnce(&mut Claim)) -> Command {
    allocate(&[with(claim("a", "w").count(1), change)])
}

#[test]
fn limits_of_workers() {
    holds("address", ADDRESS_MAX_BYTES, |n| worker_with(|s| s.address = "a".repeat(n)));
    holds("labels", LABELS_MAX, |n| worker_with(|s| s.labels = many_labels(n)));
    holds("ranges", RANGES_MAX, |n| {
        worker_with(|s| {
            s.ranges = (0..n as u16)
                .map(|i| RangeSpec {
                    name: range(&format!("r{i}")),
                    first: port(i + 1),
                    last: port(i + 1),
                })
                .collect();
        })
    });
    holds("reserved", RESERVED_PORTS_MAX, |n| {
        worker_with(|s| s.reserved = (1..=n as u16).map(port).collect())
    });
    holds("gpus", GPUS_PER_WORKER_MAX, |n| worker_with(|s| s.gpus = spec(&[], &vec![1; n]).gpus));
    let one_gpu = |change: &dyn Fn(&mut GpuSpec)| {
        worker_with(|s| {
            s.gpus = spec(&[], &[1]).gpus;
            change(&mut s.gpus[0]);
        })
    };
    holds("gpus[0].index", GPU_INDEX_MAX as usize, |n| one_gpu(&|g| g.index = n as u32));
    holds("gpus[0].memory_bytes", GPU_MEMORY_MAX_BYTES as usize, |n| {
        one_gpu(&|g| g.memory_bytes = n as u64)
    });
    holds("gpus[0].uuid", GPU_TEXT_MAX_BYTES, |n| one_gpu(&|g| g.uuid = "u".repeat(n)));
    holds("gpus[0].model", GPU_TEXT_MAX_BYTES, |n| one_gpu(&|g| g.model = "m".repeat(n)));
    let identity = |machine: usize, boot: usize| {
        worker_with(|s| {
            let id = |n| "i".repeat(n);
            s.identity =
                Some(Identity { machine_id: id(machine), boot_id: id(boot), namespace: 1 });
        })
    };
    holds("identity.machine_id", ADDRESS_MAX_BYTES, |n| identity(n, 1));
    holds("identity.boot_id", ADDRESS_MAX_BYTES, |n| identity(1, n));
    assert!(one_gpu(&|g| g.memory_bytes = 0).validate().is_err());
}

#[test]
fn a_patch_is_checked_before_it_is_proposed() {
    let patch = |patch| Command::UpdateWorker { name: worker("w"), patch };
    holds("labels", LABELS_MAX, |n| {
        patch(WorkerPatch { labels: Some(many_labels(n)), ..Default::default() })
    });
    holds("address", ADDRESS_MAX_BYTES, |n| {
        patch(WorkerPatch { address: Some("a".repeat(n)), ..Default::default() })
    });
    holds("gpus", GPUS_PER_WORKER_MAX, |n| {
        patch(WorkerPatch { gpus: Some(spec(&[], &vec![1; n]).gpus), ..Default::default() })
    });
    assert!(patch(WorkerPatch::default()).validate().is_ok());
}

#[test]
fn limits_of_claims() {
    holds("claims", CLAIMS_MAX, |n| {
        allocate(&(0..n).map(|i| claim(&format!("a{i}"), "w").count(1)).collect::<Vec<_>>())
    });
    holds("claims[0].ports", PORT_REQUESTS_MAX, |n| {
        one_claim(|c| c.ports = vec![c.ports[0].clone(); n])
    });
    for ports in [Ports::Count, Ports::Contiguous] {
        holds("claims[0].ports[0].count", PORTS_PER_CLAIM_MAX as usize, |n| {
            one_claim(|c| c.ports[0].ports = ports(n as u32))
        });
        assert!(one_claim(|c| c.ports[0].ports = ports(u32::MAX)).validate().is_err());
        assert!(one_claim(|c| c.ports[0].ports = ports(0)).validate().is_err());
    }
    holds("claims[0].ports", PORTS_PER_CLAIM_MAX as usize, |n| {
        one_claim(|c| {
            let half = c.clone().count(n as u32 - 128).band(127);
            *c = half;
        })
    });
    holds("claims[0].labels", LABELS_MAX, |n| one_claim(|c| c.labels = many_labels(n)));
    holds("claims[0].gpus.count", GPUS_PER_CLAIM_MAX, |n| {
        one_claim(|c| *c = c.clone().gpus_alone(n as u32))
    });
    holds("claims[0].gpus.indexes", GPU_INDEX_MAX as usize, |n| {
        one_claim(|c| {
            *c = c.clone().gpus(GpuChoice::Indexes([n as u32].into()), GpuShare::Exclusive);
        })
    });
    holds("claims[0].gpus.memory_bytes", GPU_MEMORY_MAX_BYTES as usize, |n| {
        one_claim(|c| {
            *c = c.clone().gpus(GpuChoice::Count(1), GpuShare::MemoryBytes(n as u64));
        })
    });
}

#[test]
fn claims_that_ask_for_nothing_or_contradict_themselves_are_refused() {
    let named = |c: &mut Claim| {
        c.ports[0].name = Some(PortName::parse("http").unwrap());
        c.ports.push(c.ports[0].clone());
    };
    for (command, words) in [
        (allocate(&[]), "1 to 64 claims"),
        (allocate(&[claim("a", "w")]), "asking for at least one port or GPU"),
        (allocate(&[claim("a", "w").count(1), claim("a", "w").count(1)]), "named once in a gang"),
        (one_claim(named), "unique in a claim"),
        (one_claim(|c| *c = c.clone().specific(7).specific(7)), "asked for once in a claim"),
        (one_claim(|c| *c = c.clone().gpus_alone(0)), "1 to 64"),
        (one_claim(|c| *c = c.clone().gpu_gib(1, 0)), "16 TiB"),
    ] {
        let error = command.validate().unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn limits_of_quarantines_and_reasons() {
    let span = |n: usize| (1..=n as u16).map(port).collect::<Vec<_>>();
    holds("ports", QUARANTINE_PORTS_MAX, |n| Command::Quarantine {
        worker: worker("w"),
        ports: span(n),
        reason: String::new(),
        by: Actor::Operator,
    });
    holds("ports", QUARANTINE_PORTS_MAX, |n| Command::LiftQuarantine {
        worker: worker("w"),
        ports: span(n),
        by: Actor::Operator,
        seen: Revision(0),
    });
    holds("reason", REASON_MAX_BYTES, |n| Command::Quarantine {
        worker: worker("w"),
        ports: span(1),
        reason: "r".repeat(n),
        by: Actor::Operator,
    });
    holds("reason", REASON_MAX_BYTES, |n| force("a", &"r".repeat(n)));
    holds("reason", REASON_MAX_BYTES, |n| evict("w", &"r".repeat(n)));
    holds("reason", REASON_MAX_BYTES, |n| Command::Reclaim {
        name: instance("a"),
        token: Token(1),
        version: Revision(1),
        ground: Ground::Gone { identity: booted("b1"), seen: Revision(1), reason: "r".repeat(n) },
        under: LEADER,
    });
    assert!(quarantine("w", &[]).validate().is_err());
    assert!(lift("w", &[]).validate().is_err());
    assert!(force("a", "a\nb").validate().is_err(), "no control characters");
}

#[test]
fn limits_of_spans() {
    let (low, high) = (SPAN_MIN_MS as usize, SPAN_MAX_MS as usize);
    let within = |claim: Claim, ms: u64| Command::allocate([claim], Millis(ms));
    let asked = || claim("a", "w").count(1);
    holds("ttl", high, |n| grant_lease(n as u64));
    holds("confirm_within", high, |n| within(asked(), n as u64));
    holds("claims[0].confirm_within", high, |n| {
        one_claim(|c| c.confirm_within = Some(Millis(n as u64)))
    });
    for (ms, fits) in [(low, true), (low - 1, false), (0, false)] {
        assert_eq!(grant_lease(ms as u64).validate().is_ok(), fits);
        assert_eq!(within(asked(), ms as u64).validate().is_ok(), fits);
        let own = one_claim(|c| c.confirm_within = Some(Millis(ms as u64)));
        assert_eq!(own.validate().is_ok(), fits);
    }
    let error = grant_lease(high as u64 + 1).validate().unwrap_err();
    assert_eq!(error.to_string(), "ttl: \"1day 1ms\" must be 1s to 24h");
}

#[test]
fn limits_of_liveness_handles() {
    let with_handle = |boot: &str, handle| {
        let liveness = Some(Liveness { boot_id: boot.into(), handle });
        confirm_with("a", Token(1), 0, liveness, None)
    };
    let pid = |pid| Handle::Process { pid, start_ticks: 0 };
    holds("liveness.boot_id", ADDRESS_MAX_BYTES, |n| with_handle(&"b".repeat(n), pid(1)));
    holds("liveness.cgroup", CGROUP_MAX_BYTES, |n| with_handle("b", Handle::Cgroup("c".repeat(n))));
    holds("liveness.container", CONTAINER_ID_MAX_BYTES, |n| {
        with_handle("b", Handle::Container("a".repeat(n)))
    });
    let container = |id: &str| with_handle("b", Handle::Container(id.into()));
    assert!(container(&"a".repeat(CONTAINER_ID_MIN_BYTES)).validate().is_ok());
    for nonsense in [
        container(&"a".repeat(CONTAINER_ID_MIN_BYTES - 1)),
        container("not-hexadecimal"),
        container(&"A".repeat(CONTAINER_ID_MIN_BYTES)),
        with_handle("", pid(1)),
        with_handle("b", pid(0)),
        with_handle("b", Handle::Cgroup(String::new())),
        with_handle("b", Handle::Cgroup("a/../../b".into())),
        with_handle("b", Handle::Cgroup("a\nb".into())),
    ] {
        let error = nonsense.validate().unwrap_err();
        assert!(error.field.starts_with("liveness."), "{error}");
    }
    assert!(with_handle("b", Handle::Cgroup("a..b/c".into())).validate().is_ok());
}

/// Why something is reclaimed is said with its handle.
#[test]
fn a_handle_of_any_length_is_shown_within_a_reason() {
    for path in ["c".repeat(CGROUP_MAX_BYTES), "ä".repeat(CGROUP_MAX_BYTES / 2), "c".into()] {
        let liveness = Liveness { boot_id: "b".into(), handle: Handle::Cgroup(path.clone()) };
        assert_eq!(liveness.validate(), Ok(()));
        let shown = format!("{liveness} is gone");
        assert!(shown.len() <= REASON_MAX_BYTES, "{} bytes", shown.len());
        let end = path.chars().last().unwrap();
        assert!(shown.ends_with(&format!("{end} is gone")), "{shown}");
    }
}

#[test]
fn limits_of_names_and_selectors() {
    let at = |parse: &dyn Fn(&str) -> bool, limit: usize| {
        assert!(parse(&"a".repeat(limit)) && !parse(&"a".repeat(limit + 1)));
    };
    at(&|s| InstanceName::parse(s).is_ok(), NAME_MAX_BYTES);
    at(&|s| WorkerName::parse(s).is_ok(), NAME_MAX_BYTES);
    at(&|s| RangeName::parse(s).is_ok(), SHORT_NAME_MAX_BYTES);
    at(&|s| PortName::parse(s).is_ok(), SHORT_NAME_MAX_BYTES);
    at(&|s| Uid::parse(s).is_ok(), UID_MAX_BYTES);
    at(&|s| LabelKey::parse(s).is_ok(), LABEL_KEY_MAX_BYTES);
    at(&|s| LabelValue::parse(s).is_ok(), LABEL_VALUE_MAX_BYTES);

    let terms = |n: usize| Selector::parse(&vec!["a=b"; n].join(","));
    assert!(terms(SELECTOR_TERMS_MAX).is_ok() && terms(SELECTOR_TERMS_MAX + 1).is_err());
    let values = |n: usize| Selector::parse(&format!("a in ({})", vec!["b"; n].join(",")));
    assert!(values(SELECTOR_VALUES_MAX).is_ok() && values(SELECTOR_VALUES_MAX + 1).is_err());
    let long = |n: usize| Selector::parse(&format!("a{}", " ".repeat(n - 1)));
    assert!(long(SELECTOR_MAX_BYTES).is_ok() && long(SELECTOR_MAX_BYTES + 1).is_err());
}

#[test]
fn the_cluster_holds_so_many_workers_and_no_more() {
    let t = Table::with_ports(40000);
    let one = t.state.worker(&worker("w")).unwrap().clone();
    let full: imbl::OrdMap<_, _> =
        (0..WORKERS_MAX - 1).map(|i| (worker(&format!("x{i:06}")), one.clone())).collect();
    let mut state = State { workers: full, ..State::default() };
    apply(&mut state, &ORIGIN, &register("y1", spec(&[], &[]))).0.outcome.unwrap();
    let (applied, _) = apply(&mut state, &ORIGIN, &register("y2", spec(&[], &[])));
    let full = Refusal::TableFull { what: "workers", limit: WORKERS_MAX };
    assert_eq!(applied.outcome, Err(full));
    apply(&mut state, &ORIGIN, &register("y1", spec(&[], &[1]))).0.outcome.unwrap();
}

/// Four million allocations take half a gigabyte: here only the rule is asked.
#[test]
fn the_cluster_holds_so_many_allocations_and_leases_and_no_more() {
    for (what, limit) in [("allocations", ALLOCATIONS_MAX), ("leases", LEASES_MAX)] {
        let room = |have, more| check_room(what, have, more, limit);
        assert_eq!(room(limit - 2, 2), Ok(()));
        for (have, more) in [(limit - 2, 3), (limit, 1)] {
            assert_eq!(room(have, more), Err(Refusal::TableFull { what, limit }));
        }
    }
}

/// A table that is asked for its invariants once, at the end of many commands.
fn quick(state: &mut State, command: &Command) -> Result<Outcome, Refusal> {
    apply(state, &ORIGIN, command).0.outcome
}

/// Its end is one command, which must not take long.
#[test]
fn a_lease_has_so_many_allocations_and_no_more() {
    let limit = LEASE_ALLOCATIONS_MAX;
    let mut t = Table::with_ports(60000);
    let lease = t.lease();
    let on_it = |i: usize| claim(&format!("i{i}"), "w").count(1).on(lease);
    for i in 0..limit - 1 {
        quick(&mut t.state, &allocate(&[on_it(i)])).unwrap();
    }
    let full = Refusal::LeaseFull { lease, limit };
    // A gang of which one is too many is refused whole.
    assert_eq!(t.refused(allocate(&[on_it(limit - 1), on_it(limit)])), full);
    assert_eq!(t.on(lease).len(), limit - 1);
    let last = t.grant(on_it(limit - 1));
    let more = t.grant(claim("more", "w").count(1));
    assert_eq!(t.refused(allocate(&[on_it(limit)])), full);
    assert_eq!(t.refused(attach("more", more.token, 0, Some(lease))), full);
    let moves_there = confirm_with("more", more.token, 0, None, Some(lease));
    assert_eq!(t.refused(moves_there), full);
    // Who is on it already takes no place.
    t.ok(confirm_with(last.name().as_str(), last.token, 0, None, Some(lease)));
    t.ok(expire(lease));
    assert_eq!((t.state.allocation_count(), t.events.len()), (1, limit + 1));
}

#[test]
fn so_many_departures_are_remembered_and_the_oldest_forgotten() {
    let mut t = Table::with_ports(40003);
    for i in 0..DEPARTURES_MAX {
        let name = format!("i{i}");
        quick(&mut t.state, &allocate(&[claim(&name, "w").count(1)])).unwrap();
        quick(&mut t.state, &force(&name, "")).unwrap();
    }
    check_invariants(&t.state).unwrap();
    let is_remembered = |t: &Table, name: &str| t.state.departure(&instance(name)).is_some();
    assert!(is_remembered(&t, "i0"));
    t.grant(claim("one-more", "w").count(1));
    t.ok(force("one-more", ""));
    assert_eq!(t.state.departures().count(), DEPARTURES_MAX);
    assert_eq!((is_remembered(&t, "i0"), is_remembered(&t, "i1")), (false, true));
    assert!(is_remembered(&t, "one-more"));
}

#[test]
fn a_snapshot_with_more_departures_than_are_remembered_is_refused() {
    let mut restore = Restore::new(FEATURE_LEVEL, Revision(9));
    let mut add = |i: usize| {
        let why = ReleaseReason::Forced { reason: String::new() };
        let (revision, token) = (Revision(9), Token(1));
        let departure = Departure { revision, at: Millis(0), worker: worker("w"), token, why };
        restore.departure(instance(&format!("i{i}")), departure)
    };
    (0..DEPARTURES_MAX).for_each(|i| add(i).unwrap());
    assert_eq!(add(DEPARTURES_MAX).unwrap_err(), "too many departures are recorded");
}

#[test]
fn an_explanation_shows_so_many_workers_and_no_more() {
    let shown = |count: usize| {
        let mut state = State::default();
        for i in 0..count {
            quick(&mut state, &register(&format!("w{i}"), spec(&[("s", 1, 2)], &[]))).unwrap();
        }
        let asked = claim("a", "any").count(1).select("", Policy::Spread);
        let explanation = explain(&mut state, &asked);
        (explanation.candidates, explanation.workers.len())
    };
    let limit = EXPLAINED_WORKERS_MAX;
    assert_eq!(shown(limit), (limit as u64, limit));
    assert_eq!(shown(limit + 1), (limit as u64 + 1, limit));
}
