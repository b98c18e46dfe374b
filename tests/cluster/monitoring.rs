//! What is watched is there: the alert rules and the dashboard name no metric, and the rules no label,
//! that a node does not export, on every node, from the start.

use std::collections::BTreeSet;

use crate::support::{Cluster, http_get, wait_for};

const RULES: &str = include_str!("../../deploy/prometheus/portwarden.rules.yml");
const RULE_TESTS: &str = include_str!("../../deploy/prometheus/portwarden.rules.test.yml");
const DASHBOARD: &str = include_str!("../../deploy/grafana/portwarden.json");
const OPERATIONS: &str = include_str!("../../docs/operations.md");

/// The families that a text names: `_bucket`, `_count` and `_sum` are of a histogram.
fn families(text: &str) -> BTreeSet<String> {
    let word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    text.match_indices("portwarden_")
        .map(|(at, _)| text[at..].chars().take_while(|c| word(*c)).collect::<String>())
        .map(|name| {
            let suffix = ["_bucket", "_count", "_sum"].iter().find(|s| name.ends_with(**s));
            suffix.map_or(name.clone(), |suffix| name.trim_end_matches(suffix).to_string())
        })
        .collect()
}

/// The words `family{label="value"` of the rules, for each label of a selector that must be equal.
fn selectors(text: &str) -> BTreeSet<(String, String)> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices("portwarden_") {
        let (family, rest) = match text[at..].split_once('{') {
            Some((family, rest)) if families(family).contains(family) => (family, rest),
            _ => continue, // it has no selector
        };
        let labels = rest.split_once('}').expect("a selector ends").0;
        for label in labels.split(',').map(str::trim) {
            let (name, value) = label.split_once('=').expect("a label");
            assert!(value.starts_with('"'), "{family}{{{label}}}: only equality is looked for");
            found.insert((family.to_string(), format!("{name}={value}")));
        }
    }
    found
}

#[test]
fn every_metric_that_is_watched_is_exported_by_every_node_from_the_start() {
    let cluster = Cluster::start(3);
    let watched: BTreeSet<_> =
        [RULES, DASHBOARD, OPERATIONS].into_iter().flat_map(families).collect();
    assert!(watched.len() >= 15, "{watched:?}");
    let selected = selectors(RULES);
    assert!(selected.len() >= 10, "{selected:?}");
    for node in &cluster.nodes {
        wait_for("every family to be there", || {
            let shown = http_get(&node.http(), "/metrics").ok()?;
            let typed = shown.lines().filter_map(|line| line.strip_prefix("# TYPE "));
            let exported: BTreeSet<_> =
                typed.filter_map(|line| Some(line.split(' ').next()?.to_string())).collect();
            let missing: Vec<_> = watched.difference(&exported).collect();
            if !missing.is_empty() {
                eprintln!("node {} does not show {missing:?}", node.id);
            }
            let series = |family: &str, label: &str| {
                let with = |line: &str| {
                    let labels = line.strip_prefix(family)?.strip_prefix('{')?.split_once('}')?.0;
                    labels.split(',').any(|shown| shown == label).then_some(())
                };
                shown.lines().any(|line| with(line).is_some())
            };
            let unlabelled: Vec<_> =
                selected.iter().filter(|(family, label)| !series(family, label)).collect();
            if !unlabelled.is_empty() {
                eprintln!("node {} does not show {unlabelled:?}", node.id);
            }
            (missing.is_empty() && unlabelled.is_empty()).then_some(())
        });
    }
}

/// A label for each worker or instance would grow without bound.
#[test]
fn label_sets_do_not_grow_with_the_table() {
    let cluster = Cluster::start(1);
    let series = || {
        let shown = http_get(&cluster.nodes[0].http(), "/metrics").expect("metrics");
        shown.lines().filter(|line| line.starts_with("portwarden_")).count()
    };
    let fill = |from: u32| {
        for i in from..from + 10 {
            cluster.worker(&format!("w{i}"), 40063);
            let (name, worker) = (format!("a{i}"), format!("w{i}"));
            cluster.cli(&["allocate", &name, "--worker", &worker, "--ports", "1"]).ok();
        }
        let workers = "portwarden_workers{node=\"1\",phase=\"READY\"}";
        wait_for("the gauges", || {
            (cluster.metric(0, workers) == Some(f64::from(from + 10))).then_some(())
        });
    };
    fill(0);
    let before = series();
    fill(10);
    assert_eq!(series(), before);
}

/// A follower knows whom it followed; that one may be dead. Killed first, the leader cannot say that it hears
/// from nobody.
#[test]
fn who_is_left_of_three_says_that_nobody_leads() {
    let mut cluster = Cluster::start(3);
    let (leader, alone) = (cluster.leader(), (cluster.leader() + 1) % 3);
    let says = |cluster: &Cluster, leaders, status| {
        let ready = http_get(&cluster.nodes[alone].http(), "/readyz").expect("an answer");
        let led = cluster.metric(alone, "portwarden_has_leader");
        (led == Some(leaders) && ready.contains(status)).then_some(())
    };
    wait_for("a leader to be shown", || says(&cluster, 1.0, "200 OK"));
    cluster.kill(leader);
    cluster.kill((0..3).find(|at| ![leader, alone].contains(at)).expect("the third"));
    wait_for("none to be shown", || says(&cluster, 0.0, "503 Service Unavailable"));
}

/// Every alert says in the runbook what it means and what to do, and fires in a test of the rules.
#[test]
fn every_alert_is_in_the_runbook_and_tried() {
    let names = || RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let missing: Vec<_> = names().filter(|name| !OPERATIONS.contains(*name)).collect();
    assert!(missing.is_empty(), "docs/operations.md does not say what to do on {missing:?}");
    let fires = |name: &&str| {
        let tried = RULE_TESTS.split("alertname: ").skip(1);
        // Up to the next one: what it is expected to say, or nothing.
        tried
            .filter(|tried| tried.split(['\n', '}', ',']).next() == Some(name))
            .any(|tried| tried.contains("exp_alerts"))
    };
    let untried: Vec<_> = names().filter(|name| !fires(name)).collect();
    assert!(untried.is_empty(), "the tests of the rules see no {untried:?}");
}
