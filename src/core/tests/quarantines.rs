//! Ports that something else occupies.

use super::*;

#[test]
fn quarantine_and_lift_are_idempotent() {
    let mut t = Table::with_ports(40003);
    t.ok(quarantine("w", &[40000, 40000, 40002]));
    assert_eq!(t.worker("w").pools[0].quarantined_count(), 2);
    t.noop(quarantine("w", &[40000]));
    assert_eq!(numbers(&t.grant(claim("a", "w").count(2))), [40001, 40003]);
    t.ok(lift("w", &[40000, 40001]));
    t.noop(lift("w", &[40000, 40001]));
    assert_eq!(numbers(&t.grant(claim("b", "w").count(1))), [40000]);
}

#[test]
fn a_held_or_unmanaged_port_is_not_quarantined_and_its_holder_is_named() {
    let mut t = Table::default();
    t.ok(register("w", with(spec(&[("s", 10, 20)], &[]), |s| s.reserved = [port(20)].into())));
    t.grant(claim("a", "w").specific(11));
    for (numbers, words) in [
        (&[10, 11][..], "port 11 of worker w is held by a"),
        (&[20], "port 20 of worker w is reserved"),
        (&[21], "port 21 of worker w is in none of the worker's ranges"),
    ] {
        assert_eq!(t.refused(quarantine("w", numbers)).to_string(), words);
    }
    assert!(t.refused(lift("w", &[21])).to_string().contains("in none of"));
    assert_eq!(t.refused(quarantine("x", &[1])), Refusal::NoWorker(worker("x")));
    assert_eq!(t.refused(lift("x", &[1])), Refusal::NoWorker(worker("x")));
}

/// Field failure nomad-1728: a dynamic pick met a port that the host already used. Here what is
/// seen in use is quarantined, and neither a counted nor a specific request is given it.
#[test]
fn a_quarantined_port_is_never_given() {
    let mut t = Table::with_ports(40002);
    t.ok(quarantine("w", &[40001]));
    let shown = t.refused(allocate(&[claim("a", "w").specific(40001)])).to_string();
    assert!(shown.ends_with("port 40001 is quarantined (sshd)"), "{shown}");
    assert!(matches!(
        lack(t.refused(allocate(&[claim("a", "w").band(2)]))),
        Lack::Band { longest: 1, .. }
    ));
    assert_eq!(numbers(&t.grant(claim("a", "w").count(2))), [40000, 40002]);
    let shown = t.refused(allocate(&[claim("b", "w").count(1)])).to_string();
    assert!(shown.contains("(2 held by a, 1 quarantined, 0 reserved)"), "{shown}");
}

fn source(t: &Table, number: u16) -> Option<(Source, Revision)> {
    let mut all = t.worker("w").pools.iter().flat_map(Pool::quarantines);
    all.find(|(n, _)| *n == number).map(|(_, quarantine)| (quarantine.source, quarantine.since))
}

#[test]
fn a_quarantine_says_on_whose_word_it_rests_and_since_when() {
    let mut t = Table::with_agent(40009);
    let a = t.grant(claim("a", "w").count(1));
    for (command, number, expected) in [
        (quarantine("w", &[40007]), 40007, Source::Operator),
        (observe("w", &[40008]), 40008, Source::Observed),
        (report("a", a.token, 0, 40000), 40000, Source::Conflict),
    ] {
        t.ok(command);
        assert_eq!(source(&t, number), Some((expected, t.state.revision)));
    }
}

#[test]
fn an_operators_quarantine_outlasts_what_others_saw() {
    let mut t = Table::with_agent(40009);
    t.ok(quarantine("w", &[40001]));
    let kept = source(&t, 40001);
    t.noop(observe("w", &[40001]));
    t.noop(clear("w", &[40001], t.state.revision));
    assert_eq!(source(&t, 40001), kept);
    t.ok(lift("w", &[40001]));
    assert_eq!(source(&t, 40001), None);
}

#[test]
fn an_operator_may_keep_what_was_only_seen() {
    let mut t = Table::with_agent(40009);
    let a = t.grant(claim("a", "w").count(1));
    t.ok(report("a", a.token, 0, 40000));
    t.ok(observe("w", &[40005]));
    t.ok(quarantine("w", &[40000, 40005]));
    for number in [40000, 40005] {
        assert_eq!(source(&t, number), Some((Source::Operator, t.state.revision)));
    }
    assert_eq!(t.worker("w").pools[0].free_count(), 7);
    t.noop(clear("w", &[40000, 40005], t.state.revision));
}

#[test]
fn what_was_seen_before_stays_as_it_was_first_seen() {
    let mut t = Table::with_agent(40009);
    t.ok(observe("w", &[40005]));
    let first = source(&t, 40005);
    t.noop(observe("w", &[40005]));
    assert_eq!(source(&t, 40005), first);
}

#[test]
fn what_was_seen_free_is_given_again_unless_its_quarantine_is_newer() {
    let mut t = Table::with_agent(40009);
    let a = t.grant(claim("a", "w").count(1));
    t.ok(observe("w", &[40005]));
    t.ok(report("a", a.token, 0, 40000));
    let reported = t.state.revision;
    t.ok(clear("w", &[40000, 40005], Revision(reported.0 - 1)));
    assert_eq!((source(&t, 40005), source(&t, 40000).is_some()), (None, true));
    t.ok(clear("w", &[40000], reported));
    assert_eq!(source(&t, 40000), None);
}

#[test]
fn what_is_seen_of_the_future_lifts_nothing() {
    let mut t = Table::with_agent(40009);
    t.ok(observe("w", &[40005]));
    t.noop(clear("w", &[40005], Revision(t.state.revision.0 + 1)));
}

/// It was given to somebody after it was looked at: the holder will find out by itself.
#[test]
fn what_is_seen_on_a_held_port_says_nothing_of_the_others() {
    let mut t = Table::default();
    t.ok(register("w", with(spec(&[("s", 10, 20)], &[]), |s| s.reserved = [port(20)].into())));
    t.grant(claim("a", "w").specific(11));
    t.ok(observe("w", &[10, 11, 20]));
    assert!(source(&t, 10).is_some());
    assert_eq!((source(&t, 11), source(&t, 20)), (None, None));
    assert!(t.is_held("a"));
    let refusal = t.refused(observe("w", &[10, 21])).to_string();
    assert_eq!(refusal, "port 21 of worker w is in none of the worker's ranges");
}
