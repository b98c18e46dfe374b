//! Why a claim fits where, without granting it.

use super::*;

/// Workers `w0`, `w1`, … with so many ports each.
fn fleet(ports: &[u16]) -> Table {
    let mut t = Table::default();
    for (i, count) in ports.iter().enumerate() {
        let labelled = |s: &mut WorkerSpec| s.labels = labels(&[("n", &i.to_string())]);
        let span = ("service", 40000, 40000 + count - 1);
        t.ok(register(&format!("w{i}"), with(spec(&[span], &[]), labelled)));
    }
    t
}

/// Each worker that is shown, with what it lacks.
fn verdicts(t: &Table, asked: &Claim) -> Vec<(String, String)> {
    let shown = explain(&mut t.state.clone(), asked).workers.into_iter();
    shown.map(|(name, fits)| (name.to_string(), fits.err().unwrap_or_default())).collect()
}

fn names(verdicts: Vec<(String, String)>) -> Vec<String> {
    verdicts.into_iter().map(|(name, _)| name).collect()
}

#[test]
fn a_worker_that_is_named_is_the_only_one_that_is_weighed() {
    let mut t = fleet(&[2, 9]);
    let asked = |on: &str| claim("a", on).count(3);
    let full =
        "range service has 2 of 2 ports free, 3 more wanted (0 held, 0 quarantined, 0 reserved)";
    assert_eq!(verdicts(&t, &asked("w0")), [("w0".into(), full.into())]);
    assert_eq!(verdicts(&t, &asked("w1")), [("w1".into(), String::new())]);
    assert_eq!(verdicts(&t, &asked("w7")), [("w7".into(), "there is no such worker".into())]);
    t.ok(phase("w1", WorkerPhase::Draining));
    assert_eq!(verdicts(&t, &asked("w1")), [("w1".into(), "it is DRAINING".into())]);
    assert_eq!(explain(&mut t.state.clone(), &asked("w1")).not_ready, 1);
}

#[test]
fn workers_come_in_the_order_in_which_the_policy_prefers_them() {
    let t = fleet(&[3, 2, 5, 2]);
    let asked = |policy| claim("a", "any").count(1).select("", policy);
    assert_eq!(names(verdicts(&t, &asked(Policy::Binpack))), ["w1", "w3", "w0", "w2"]);
    assert_eq!(names(verdicts(&t, &asked(Policy::Spread))), ["w2", "w0", "w1", "w3"]);
}

#[test]
fn those_that_have_too_little_come_last_with_what_they_lack() {
    let mut t = fleet(&[3, 1, 5]);
    t.ok(quarantine("w0", &[40001]));
    let asked = claim("a", "any").band(2).select("", Policy::Binpack);
    let shown = verdicts(&t, &asked);
    assert_eq!(names(shown.clone()), ["w0", "w2", "w1"]);
    assert!(shown[0].1.contains("2 ports free but at most 1 in a row"), "{shown:?}");
    assert_eq!(shown[1].1, "");
    assert!(shown[2].1.contains("1 of 1 ports free, 2 more wanted"), "{shown:?}");
}

#[test]
fn only_ready_workers_that_the_selector_matches_are_weighed_and_the_others_are_counted() {
    let mut t = fleet(&[3, 3, 3, 3]);
    t.ok(phase("w3", WorkerPhase::Cordoned));
    let asked = claim("a", "any").count(1).select("n!=1", Policy::Binpack);
    let shown = explain(&mut t.state.clone(), &asked);
    assert_eq!((shown.candidates, shown.not_ready), (3, 1));
    assert_eq!(names(verdicts(&t, &asked)), ["w0", "w2"]);
    let narrow = explain(&mut t.state.clone(), &asked.select("n=2", Policy::Binpack));
    assert_eq!(narrow.candidates, 1, "a label's own index is looked at");
}

#[test]
fn a_claim_goes_to_the_first_on_which_it_is_said_to_fit() {
    let mut t = fleet(&[4, 2, 6, 3]);
    for (i, policy) in [Policy::Binpack, Policy::Spread].into_iter().cycle().take(6).enumerate() {
        let asked = claim(&format!("i{i}"), "any").band(2).select("", policy);
        let shown = verdicts(&t, &asked);
        let first = shown.iter().find(|(_, lack)| lack.is_empty()).unwrap().0.clone();
        assert_eq!(t.grant(asked).worker.to_string(), first, "{policy:?}");
    }
}
