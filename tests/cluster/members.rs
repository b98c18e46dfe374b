//! Changes of the membership, made from the command line while clients write.

use portwarden::node::members::MEMBERS_MAX;
use serde_json::Value;

use crate::load::{failed_calls, under_load};
use crate::support::{BINARY, Cluster, Ran, assert_unique, wait_for};

fn member(cluster: &Cluster, id: u64) -> Option<Value> {
    let members = cluster.cli(&["member", "list", "-o", "json"]).json()?;
    members.as_array()?.iter().find(|m| m["id"].as_u64() == Some(id)).cloned()
}

fn ids(cluster: &Cluster) -> Vec<u64> {
    let members = cluster.cli(&["member", "list", "-o", "json"]).ok();
    members.as_array().expect("an array").iter().filter_map(|m| m["id"].as_u64()).collect()
}

fn is_voter(cluster: &Cluster, id: u64) -> bool {
    member(cluster, id).is_some_and(|member| member["role"] == "voter")
}

/// Starts one more node, which joins, and waits until it is a learner.
fn joins(cluster: &mut Cluster, id: u64) -> usize {
    let at = cluster.add_joining(id);
    cluster.spawn(at);
    wait_for("the node to be taken in", || member(cluster, id));
    at
}

/// While one client writes without pause, a fourth node joins and is promoted, the leader is moved
/// to it, and the old leader is removed: not one write fails.
#[test]
fn nodes_come_and_go_and_no_write_fails() {
    let mut cluster = Cluster::start(3);
    let old = cluster.leader();
    let old_id = cluster.nodes[old].id;
    under_load(&mut cluster, 2, |cluster, load| {
        load.gets_on(5);
        let at = joins(cluster, 4);
        cluster.cli(&["member", "promote", "4", "--timeout", "60s"]).ok();
        assert!(is_voter(cluster, 4));
        load.gets_on(5);
        cluster.cli(&["member", "transfer-leader", "4"]).ok();
        assert_eq!(cluster.leader(), at);
        load.gets_on(5);
        cluster.cli(&["member", "remove", &old_id.to_string()]).ok();
        assert!(!ids(cluster).contains(&old_id));
        load.gets_on(10);
        assert_eq!(failed_calls(load), 0, "every write was answered");
        assert_eq!(cluster.ended(old), Some(0), "a removed node stops by itself");
        load.gets_on(5);
    });
    // What it was is known, and it does not come back.
    cluster.spawn(old);
    assert_eq!(cluster.ended(old), Some(1));
    assert!(cluster.log(old).contains("was removed from the cluster"), "{}", cluster.log(old));
}

/// It stands for no election, so nobody tells it but whom it asks; the leader that removed it has tried.
#[test]
fn a_learner_that_was_removed_while_it_was_away_stops_when_it_is_back() {
    let mut cluster = Cluster::start(3);
    let at = joins(&mut cluster, 4);
    cluster.kill(at);
    cluster.cli(&["member", "remove", "4"]).ok();
    restart_leader(&mut cluster);
    cluster.leader();
    cluster.spawn(at);
    assert_eq!(cluster.ended(at), Some(1));
    assert!(cluster.log(at).contains("node 4 was removed from the cluster"), "{}", cluster.log(at));
}

/// The leader itself is removed: it hands over first.
#[test]
fn a_leader_is_removed_and_no_write_fails() {
    let mut cluster = Cluster::start(3);
    let leader = cluster.leader();
    let id = cluster.nodes[leader].id;
    under_load(&mut cluster, 2, |cluster, load| {
        load.gets_on(5);
        // With one of the others still starting, no majority would be left, and it is refused.
        cluster.wait_until_well();
        cluster.cli(&["member", "remove", &id.to_string()]).ok();
        load.gets_on(10);
        assert_eq!(failed_calls(load), 0);
        assert_eq!(cluster.ended(leader), Some(0));
    });
    assert_eq!(ids(&cluster).len(), 2);
}

/// Three nodes become five and then three others, while clients write and the leader is killed at
/// every step.
#[test]
fn three_become_five_become_three_while_leaders_die() {
    let mut cluster = Cluster::start(3);
    under_load(&mut cluster, 3, |cluster, load| {
        for id in [4, 5] {
            joins(cluster, id);
            let promoting = in_background(cluster, &["member", "promote", &id.to_string()]);
            restart_leader(cluster);
            promoting.join().expect("the command");
            wait_for("the promotion", || {
                cluster.cli(&["member", "promote", &id.to_string(), "--timeout", "30s"]);
                is_voter(cluster, id).then_some(())
            });
            load.gets_on(5);
        }
        for id in [1, 2] {
            let removing = in_background(cluster, &["member", "remove", &id.to_string()]);
            restart_leader(cluster);
            removing.join().expect("the command");
            wait_for("the removal", || {
                cluster.cli(&["member", "remove", &id.to_string(), "--timeout", "30s"]);
                (!ids(cluster).contains(&id)).then_some(())
            });
            load.gets_on(5);
        }
    });
    wait_for("one right configuration", || {
        let check = cluster.cli_at(&endpoints(&cluster, 3..5), &["status", "--check"]);
        (check.code() == 0).then_some(())
    });
    assert_eq!(ids(&cluster), [3, 4, 5]);
}

fn endpoints(cluster: &Cluster, nodes: std::ops::Range<usize>) -> String {
    nodes.map(|at| cluster.nodes[at].client()).collect::<Vec<_>>().join(",")
}

/// Kills whoever leads, and starts it again.
fn restart_leader(cluster: &mut Cluster) {
    let leader = cluster.leader();
    cluster.kill(leader);
    cluster.spawn(leader);
}

fn in_background(cluster: &Cluster, args: &[&str]) -> std::thread::JoinHandle<()> {
    let endpoints = cluster.endpoints();
    let args: Vec<String> = args.iter().map(ToString::to_string).collect();
    std::thread::spawn(move || {
        let ran = std::process::Command::new(BINARY)
            .args(["--endpoints", &endpoints, "--timeout", "20s"])
            .args(args)
            .output();
        ran.expect("the CLI runs");
    })
}

/// A node that is dead is replaced by one under a new id.
#[test]
fn a_dead_node_is_replaced() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40063);
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
    let dead = (cluster.leader() + 1) % 3;
    let id = cluster.nodes[dead].id;
    cluster.kill(dead);
    cluster.cli(&["member", "remove", &id.to_string()]).ok();
    joins(&mut cluster, 4);
    cluster.cli(&["member", "promote", "4", "--timeout", "60s"]).ok();
    // The two that are left of the old ones need not both be there any more.
    let other = (0..3).find(|at| *at != dead && *at != cluster.leader()).expect("a follower");
    cluster.kill(other);
    cluster.cli(&["allocate", "b", "--worker", "w", "--ports", "1", "--timeout", "30s"]).ok();
    assert_unique(&cluster.list());
}

/// `member add` and `serve --join` come in either order, and each again; a pending member does not
/// vote and is named in `status`.
#[test]
fn adding_and_joining_come_in_either_order() {
    let mut cluster = Cluster::start(3);
    let at = cluster.add_joining(4);
    let (peer, client) = (cluster.nodes[at].peer(), cluster.nodes[at].client());
    let add = ["member", "add", "4", "--peer", &peer, "--client", &client];
    cluster.cli(&add).ok();
    cluster.cli(&add).ok();
    cluster.cli(&["member", "promote", "4"]).refused(4, "has not joined yet");
    let status = cluster.cli(&["status", "-o", "json"]).ok();
    assert!(status["problems"].to_string().contains("member 4 was added and has not joined"));
    let pending = || member(&cluster, 4).map(|member| member["pending"].clone());
    assert_eq!(pending(), Some(Value::Bool(true)));
    cluster.spawn(at);
    let joined = |found: &Value| found["state"] == "follower" && found["pending"] == false;
    wait_for("it to join", || joined(&member(&cluster, 4)?).then_some(()));
    cluster.cli(&["member", "promote", "4", "--timeout", "60s"]).ok();
    cluster.cli(&add).ok();
    // Again, over its data: it is there already.
    cluster.kill(at);
    cluster.spawn(at);
    wait_for("it to be back", || (member(&cluster, 4)?["state"] == "follower").then_some(()));
    // Another directory under the same id is another node.
    cluster.kill(at);
    std::fs::remove_dir_all(cluster.data_dir(at)).expect("its data");
    cluster.spawn(at);
    assert_eq!(cluster.ended(at), Some(1));
    assert!(cluster.log(at).contains("it must join under a new id"), "{}", cluster.log(at));
}

/// What must not be is refused with the rule and the way out, and changes nothing.
#[test]
fn every_wrong_change_is_refused() {
    let mut cluster = Cluster::start(3);
    let at = joins(&mut cluster, 4);
    let leader = cluster.nodes[cluster.leader()].id.to_string();
    let of = |ran: Ran, says: &str| ran.refused(4, says);
    for change in ["promote", "remove", "transfer-leader"] {
        cluster.cli(&["member", change, "9"]).refused(3, "there is no member 9");
    }
    of(cluster.cli(&["member", "transfer-leader", "4"]), "is a learner, and cannot lead");
    let used = cluster.nodes[0].peer();
    let add = |cluster: &Cluster, id: &str, peer: &str, client: &str| {
        cluster.cli(&["member", "add", id, "--peer", peer, "--client", client])
    };
    of(add(&cluster, "7", &used, "127.0.0.1:1"), "is the address of member 1");
    of(add(&cluster, "1", "127.0.0.1:1", "127.0.0.1:2"), "does not change in place");
    cluster.cli(&["member", "add", "x", "--peer", "a:1", "--client", "a:2"]).refused(2, "x");
    cluster.cli(&["member", "add", "7", "--peer", "a", "--client", "a:2"]).refused(2, "HOST:PORT");
    cluster.cli(&["member", "remove", "0"]).refused(2, "0");
    // A removed id never comes back.
    cluster.cli(&["member", "remove", "4"]).ok();
    cluster.cli(&["member", "remove", "4"]).ok();
    assert_eq!(cluster.ended(at), Some(0));
    of(add(&cluster, "4", "127.0.0.1:1", "127.0.0.1:2"), "is never used again");
    // With one of three down, removing another live one would leave no majority.
    let down = (0..3).find(|at| cluster.nodes[*at].id.to_string() != leader).expect("a follower");
    let down_id = cluster.nodes[down].id.to_string();
    cluster.kill(down);
    let live = cluster.nodes.iter().map(|n| n.id.to_string());
    let live = live.take(3).find(|id| *id != down_id && *id != leader).expect("another follower");
    // At once, while its last word is not old yet, and then.
    of(cluster.cli(&["member", "remove", &live]), "no majority");
    of(cluster.cli(&["member", "transfer-leader", &down_id]), "does not answer");
    assert_eq!(cluster.nodes[cluster.leader()].id.to_string(), leader, "it was not handed over");
    of(cluster.cli(&["member", "remove", &live]), "no majority");
    assert_eq!(ids(&cluster), [1, 2, 3]);
}

/// The last voter cannot be removed.
#[test]
fn the_last_voter_stays() {
    let cluster = Cluster::start(1);
    cluster.cli(&["member", "remove", "1"]).refused(4, "is the last voter");
}

#[test]
fn as_many_members_as_there_may_be_are_added_and_one_more_is_not() {
    let cluster = Cluster::start(1);
    let add = |id: u64| {
        let (id, peer, client) = (id.to_string(), format!("127.0.0.1:{id}"), format!("h:{id}"));
        cluster.cli(&["member", "add", &id, "--peer", &peer, "--client", &client])
    };
    (2..=MEMBERS_MAX as u64).for_each(|id| drop(add(id).ok()));
    add(MEMBERS_MAX as u64 + 1).refused(4, "there are 16 members");
    assert_eq!(ids(&cluster).len(), MEMBERS_MAX);
}

/// The cluster's level only rises, and only to what every member knows.
#[test]
fn the_feature_level_is_shown_and_rises_only_to_what_all_know() {
    let cluster = Cluster::start(3);
    let revision = || cluster.cli(&["status", "-o", "json"]).ok()["revision"].clone();
    let (shown, before) = (cluster.cli(&["status"]).stdout(), revision());
    assert!(shown.contains("\nlevel:        1\n"), "{shown}");
    let set = |level: &str| cluster.cli(&["member", "set-feature-level", level, "-o", "json"]);
    assert_eq!(set("1").ok()["feature_level"], 1);
    set("2").refused(4, "knows feature levels up to 1, and not 2: upgrade it first");
    set("0").refused(2, "0");
    assert_eq!(revision(), before);
}

/// A learner that must be given everything as a snapshot catches up before it may vote.
#[test]
fn a_learner_catches_up_by_snapshot_before_it_votes() {
    let mut cluster = Cluster::start_with(3, &["--snapshot-every", "20"]);
    cluster.worker("w", 41999);
    for i in 0..60 {
        cluster.cli(&["allocate", &format!("i{i}"), "--worker", "w", "--ports", "1"]).ok();
    }
    let at = joins(&mut cluster, 4);
    cluster.cli(&["member", "promote", "4", "--timeout", "60s"]).ok();
    let own = cluster.nodes[at].client();
    let stale = cluster.cli_at(&own, &["list", "--stale", "-o", "json"]).ok();
    assert_eq!(stale.as_array().expect("an array").len(), 60);
    assert!(cluster.metric(at, "portwarden_snapshots_installed_total") >= Some(1.0));
}

/// A node that is away is a problem until it is back.
#[test]
fn status_names_who_is_away() {
    let mut cluster = Cluster::start(3);
    cluster.cli(&["status", "--check"]).ok();
    let follower = (cluster.leader() + 1) % 3;
    cluster.kill(follower);
    let id = cluster.nodes[follower].id;
    let problem = format!("member {id} at");
    wait_for("status to say so", || {
        let ran = cluster.cli(&["status", "--check", "-o", "json"]);
        (ran.code() == 1 && ran.stdout().contains(&problem)).then_some(())
    });
    cluster.spawn(follower);
    wait_for("all to be well", || (cluster.cli(&["status", "--check"]).code() == 0).then_some(()));
}
