//! Backups, restores, and a cluster that lost its majority.

use std::path::Path;

use serde_json::Value;

use crate::load::under_load;
use crate::support::{Cluster, ports, wait_for};

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A new cluster over the directory that a restore makes, or refuses to.
fn restored(from: &Cluster, file: &Path, nodes: u64) -> Cluster {
    let mut new = Cluster::prepare(nodes);
    let dir = text(&new.data_dir(0));
    let list = new.initial_cluster();
    let args =
        ["snapshot", "restore", &text(file), "--data-dir", &dir, "--id", "1", "--initial-cluster"];
    from.cli(&[&args[..], &[list.as_str()]].concat()).ok();
    for at in 0..new.nodes.len() {
        new.spawn(at);
    }
    new.leader();
    new
}

/// What the two tables must have in common: all but tokens and versions.
fn same_holdings(a: &[Value], b: &[Value]) {
    let plain = |list: &[Value]| {
        let bare = |a: &Value| {
            let mut a = a.clone();
            let fields = a.as_object_mut().expect("an object");
            fields.remove("token");
            fields.remove("version");
            a
        };
        list.iter().map(bare).collect::<Vec<_>>()
    };
    assert_eq!(plain(a), plain(b));
}

/// A backup, taken while clients write, is restored into a new cluster: the same table, and nothing
/// is granted on a worker before it was verified; old tokens are refused.
#[test]
fn a_backup_becomes_a_new_cluster_that_grants_nothing_unverified() {
    let mut cluster = Cluster::start(3);
    cluster.worker("v", 40063);
    let file = cluster.dir().join("saved.snap");
    under_load(&mut cluster, 2, |cluster, load| {
        load.gets_on(10);
        for at in 0..3 {
            let endpoint = cluster.nodes[at].client();
            cluster.cli_at(&endpoint, &["snapshot", "save", &text(&file)]).ok();
        }
        load.gets_on(5);
    });
    let held = cluster.cli(&["allocate", "a", "--worker", "v", "--ports", "2", "-o", "json"]).ok();
    cluster.cli(&["snapshot", "save", &text(&file)]).ok();
    let before = cluster.list();
    let inspected = cluster.cli(&["snapshot", "inspect", &text(&file), "-o", "json"]).ok();
    assert_eq!(inspected["allocations"], before.len());
    // Granted after the backup.
    let late = cluster.cli(&["allocate", "late", "--worker", "v", "--ports", "1", "-o", "json"]);
    let late = ports(&[late.ok()])[0].1;

    let new = restored(&cluster, &file, 1);
    same_holdings(&new.list(), &before);
    let status = new.cli(&["status", "-o", "json"]).ok();
    assert_ne!(status["cluster_id"], inspected["cluster_id"]);
    assert!(status["revision"].as_u64() > Some(1 << 40));
    assert!(status["problems"].to_string().contains("UNVERIFIED"), "{status}");

    let allocate = ["allocate", "b", "--worker", "v", "--ports", "1"];
    new.cli(&allocate).refused(4, "UNVERIFIED");
    new.cli(&["allocate", "b", "--selector", "", "--ports", "1"]).refused(5, "not ready");
    let token = held["token"].to_string();
    for args in [
        ["release", "a", "--token", &token].as_slice(),
        &["confirm", "a", "--token", &token],
        &["report-conflict", "a", "--token", &token, "--port", "40000"],
    ] {
        new.cli(args).refused(4, &format!("token {token} is not its token"));
    }
    // A holder learns its new token by asking again for what it has.
    let uid = held["uid"].as_str().expect("a uid");
    let again = ["allocate", "a", "--worker", "v", "--ports", "2", "--uid", uid, "-o", "json"];
    let again = new.cli(&again).ok();
    assert_eq!(ports(std::slice::from_ref(&again)), ports(std::slice::from_ref(&held)));
    assert!(again["token"].as_u64() > held["token"].as_u64());

    // The operator has looked: something is on the late one's port.
    let number = late.to_string();
    new.cli(&["worker", "quarantine", "v", "--port", &number, "--reason", "in use"]).ok();
    new.cli(&["worker", "verify", "v"]).ok();
    let granted = new.cli(&["allocate", "b", "--worker", "v", "--ports", "1", "-o", "json"]).ok();
    assert_ne!(ports(&[granted])[0].1, late);
    new.cli(&["worker", "verify", "--all"]).ok();
    new.cli(&["status", "--check"]).ok();
}

/// Three nodes begin over one restored directory and two empty ones; a node of the old cluster is
/// refused by the new one.
#[test]
fn a_restored_cluster_of_three_begins_over_one_directory() {
    let cluster = Cluster::start(1);
    cluster.worker("w", 40063);
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1", "--bound"]).ok();
    let file = cluster.dir().join("saved.snap");
    cluster.cli(&["snapshot", "save", &text(&file)]).ok();
    let mut new = restored(&cluster, &file, 3);
    wait_for("three voters", || {
        (new.cli(&["member", "list"]).stdout().matches("voter").count() == 3).then_some(())
    });
    same_holdings(&new.list(), &cluster.list());
    // Any of them may go.
    let leader = new.leader();
    new.kill(leader);
    new.cli(&["worker", "verify", "--all", "--timeout", "30s"]).ok();
    new.cli(&["allocate", "b", "--worker", "w", "--ports", "1", "--timeout", "30s"]).ok();
}

/// What is no backup, or was cut off, changed or is of a newer format, is refused by name, and
/// nothing half-made stays behind; so is a directory that has something in it.
#[test]
fn a_damaged_file_is_refused_and_nothing_stays_behind() {
    let cluster = Cluster::start(1);
    cluster.worker("w", 40063);
    for i in 0..5 {
        cluster.cli(&["allocate", &format!("i{i}"), "--worker", "w", "--ports", "1"]).ok();
    }
    let file = cluster.dir().join("saved.snap");
    cluster.cli(&["snapshot", "save", &text(&file)]).ok();
    let good = std::fs::read(&file).expect("the file");
    let bad = cluster.dir().join("bad.snap");
    let target = cluster.dir().join("target");
    let restore = |id: &str| {
        let (bad, target) = (text(&bad), text(&target));
        let list = format!("{id}=127.0.0.1:1");
        let args = ["snapshot", "restore", &bad, "--data-dir", &target, "--id", id];
        cluster.cli(&[&args[..], &["--initial-cluster", &list]].concat())
    };
    let mut newer = good.clone();
    newer[7] = 9;
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    for (bytes, says) in [
        (&b""[..], "no whole backup"),
        (b"not a backup at all", "it is not a snapshot"),
        (&good[..good.len() - 1], "it ends too early"),
        (&good[..good.len() / 2], "it ends too early"),
        (&flipped, "wrong checksum"),
        (&[&good[..], b"x"].concat(), "something follows its end"),
        (&newer, "format version 9"),
    ] {
        std::fs::write(&bad, bytes).expect("a file");
        for ran in [restore("1"), cluster.cli(&["snapshot", "inspect", &text(&bad)])] {
            ran.refused(2, says);
            assert!(ran.stderr().contains("bad.snap"), "{}", ran.stderr());
        }
        assert!(!target.exists());
    }
    std::fs::write(&bad, &good).expect("a file");
    std::fs::create_dir(&target).expect("a directory");
    std::fs::write(target.join("something"), "").expect("a file");
    restore("1").refused(4, "is there already");
    std::fs::remove_file(target.join("something")).expect("the file");
    restore("1").ok();
    restore("1").refused(4, "is there already");
    let left: Vec<_> = std::fs::read_dir(cluster.dir())
        .expect("the directory")
        .map(|item| item.expect("an item").file_name().into_string().expect("a name"))
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let missing = text(&cluster.dir().join("missing"));
    cluster.cli(&["snapshot", "inspect", &missing]).refused(2, "missing");
    cluster.cli(&["snapshot", "save", "/nowhere/at/all"]).refused(2, "/nowhere/at/all");
}

/// Scheduled backups are whole, and the oldest go.
#[test]
fn backups_are_written_on_schedule() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = text(dir.path());
    let flags = ["--backup-dir", &path, "--backup-every", "1s", "--backup-keep", "2"];
    let cluster = Cluster::start_with(1, &flags);
    let names = || {
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .expect("the directory")
            .map(|item| item.expect("an item").path())
            .filter(|path| path.extension().is_some_and(|e| e == "backup"))
            .collect();
        names.sort();
        names
    };
    for i in 0..4 {
        cluster.worker(&format!("w{i}"), 40063);
        let revision = i + 1;
        wait_for("a backup of this revision", || {
            let newest = names().pop()?;
            let shown = cluster.cli(&["snapshot", "inspect", &text(&newest), "-o", "json"]);
            (shown.json()?["revision"].as_u64()? == revision).then_some(())
        });
    }
    wait_for("the oldest to go", || (names().len() == 2).then_some(()));
    assert_eq!(cluster.metric(0, "portwarden_backups_total{result=\"failed\"}"), Some(0.0));
}

/// Two of three nodes are gone for good: a new cluster begins over what the third has. While the
/// others may be alive, that is refused.
#[test]
fn a_survivor_begins_anew_when_the_majority_is_lost() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    for i in 0..5 {
        let name = format!("i{i}");
        cluster.cli(&["allocate", &name, "--worker", "w", "--ports", "1", "--bound"]).ok();
    }
    let before = cluster.list();
    let survivor = (cluster.leader() + 1) % 3;
    // It has everything that was acknowledged by now.
    let own = cluster.nodes[survivor].client();
    let revision = cluster.cli(&["status", "-o", "json"]).ok()["revision"].to_string();
    cluster.cli_at(&own, &["list", "--stale", "--min-revision", &revision]).ok();
    let mut new = Cluster::prepare(1);
    let (from, dir) = (text(&cluster.data_dir(survivor)), text(&new.data_dir(0)));
    let list = new.initial_cluster();
    let args =
        ["recover", "--from", &from, "--data-dir", &dir, "--id", "1", "--initial-cluster", &list];
    cluster.cli(&args).refused(1, "is in use by process");
    cluster.kill(survivor);
    cluster.cli(&args).refused(4, "a majority of the 3 voters may be alive");
    cluster.kill_all();
    let ran = cluster.cli(&args);
    ran.ok();
    assert!(ran.stderr().contains("is lost"), "{}", ran.stderr());
    new.spawn(0);
    new.leader();
    same_holdings(&new.list(), &before);
    new.cli(&["allocate", "x", "--worker", "w", "--ports", "1"]).refused(4, "UNVERIFIED");
    // The survivor's own directory is as it was.
    cluster.cli(&args).refused(4, "is there already");
}
