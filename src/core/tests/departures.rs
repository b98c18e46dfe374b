//! What is remembered of names that are not held any more.

use super::*;

fn why(t: &Table, name: &str) -> Option<String> {
    t.state.departure(&instance(name)).map(|departure| departure.why.to_string())
}

#[test]
fn what_the_system_or_an_operator_took_is_remembered_with_when_where_and_why() {
    let mut t = Table::with_ports(40003);
    let a = t.grant(claim("a", "w").count(1));
    t.ok(miss(&a));
    assert_eq!(
        t.state.departure(&instance("a")),
        Some(&Departure {
            revision: t.state.revision,
            at: ORIGIN.at,
            worker: worker("w"),
            token: a.token,
            why: ReleaseReason::Reclaimed {
                cause: Cause::Unconfirmed,
                reason: "not confirmed within 10m".into()
            },
        })
    );
    t.grant(claim("b", "w").count(1));
    t.ok(force("b", "stuck"));
    assert_eq!(why(&t, "b").as_deref(), Some("forced out by an operator: stuck"));
    let c = t.grant(claim("c", "w").specific(40003));
    t.ok(report("c", c.token, 0, 40003));
    assert!(why(&t, "c").unwrap().starts_with("reclaimed: port 40003 is in use"));
}

#[test]
fn what_its_holder_released_is_not_remembered() {
    let mut t = Table::with_ports(40003);
    let a = t.grant(claim("a", "w").count(1));
    t.ok(release("a", a.token));
    assert_eq!(why(&t, "a"), None);
}

#[test]
fn whoever_asks_for_a_name_that_left_is_told_how() {
    let mut t = Table::with_ports(40003);
    let a = t.grant(claim("a", "w").count(1));
    t.ok(force("a", "host is gone"));
    let left = t.state.revision;
    for late in [
        confirm("a", a.token, 0),
        attach("a", a.token, 0, None),
        report("a", a.token, 0, 40000),
        miss(&a),
    ] {
        assert_eq!(
            t.refused(late).to_string(),
            format!(
                "no allocation a: forced out by an operator: host is gone, on worker w at revision {left}"
            )
        );
    }
}

#[test]
fn a_name_that_is_held_again_is_not_remembered_as_gone() {
    let mut t = Table::with_ports(40003);
    t.grant(claim("a", "w").count(1));
    t.ok(force("a", "stuck"));
    let a = t.grant(claim("a", "w").count(1));
    assert_eq!(why(&t, "a"), None);
    t.ok(release("a", a.token));
    assert_eq!(why(&t, "a"), None, "nor after it has gone well");
}

#[test]
fn a_gang_that_is_refused_leaves_the_memory_as_it_is() {
    let mut t = Table::with_ports(40003);
    t.grant(claim("a", "w").count(1));
    t.ok(force("a", "stuck"));
    t.refused(allocate(&[claim("a", "w").count(1), claim("b", "w").count(9)]));
    assert!(why(&t, "a").is_some());
}

#[test]
fn they_are_listed_from_the_oldest_on() {
    let mut t = Table::with_ports(40003);
    for name in ["b", "c", "a", "b"] {
        t.grant(claim(name, "w").count(1));
        t.ok(force(name, "stuck"));
    }
    let names: Vec<_> = t.state.departures().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["c", "a", "b"], "once each, by its last departure");
}
