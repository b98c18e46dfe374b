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
