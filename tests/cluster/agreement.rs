//! Replicas compare their tables: what is seen when they agree. A replica that does not is found in
//! `tests/planted.rs`.

use crate::support::{Cluster, wait_for};

#[test]
fn replicas_that_agree_say_so_and_rest_when_nothing_changes() {
    let mut cluster = Cluster::start_with(3, &["--checkpoint-every", "5"]);
    cluster.worker("w", 40_063);
    let agreed = |cluster: &Cluster, at, than: f64| {
        wait_for("a comparison", || {
            cluster.metric(at, "portwarden_checkpoint_revision").filter(|revision| *revision > than)
        })
    };
    let write = |cluster: &Cluster, from: usize| {
        for i in from..from + 8 {
            cluster.cli(&["allocate", &format!("i{i}"), "--worker", "w", "--ports", "1"]).ok();
        }
    };
    write(&cluster, 0);
    let first: Vec<_> = (0..3).map(|at| agreed(&cluster, at, 0.0)).collect();

    // A node that was away compares what it has replayed, and what comes then.
    let away = (cluster.leader() + 1) % 3;
    cluster.kill(away);
    write(&cluster, 8);
    cluster.spawn(away);
    write(&cluster, 16);
    for (at, before) in first.into_iter().enumerate() {
        agreed(&cluster, at, before);
        assert_eq!(cluster.metric(at, "portwarden_replicas_differ_total"), Some(0.0));
    }

    // Checkpoints change nothing: without other changes there comes no further one.
    let settled = wait_for("the last comparison", || {
        let status = cluster.cli(&["status", "-o", "json"]).ok();
        let revision = status["revision"].as_f64()?;
        let all = (0..3).all(|at| {
            cluster.metric(at, "portwarden_checkpoint_revision").is_some_and(|r| r + 5.0 > revision)
        });
        all.then_some(revision)
    });
    assert_eq!(settled, 25.0, "one for the worker, one for each allocation");
}
