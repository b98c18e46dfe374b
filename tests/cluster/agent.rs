//! The agent on real processes and sockets: what it sees is what becomes of the table.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use serde_json::{Value, json};

use crate::namespaces::Namespace;
use crate::run::{bound, get, run_server, worker_here};
use crate::spawned::{Spawned, free_ports, is_listened_on, is_running, send, server, stranger};
use crate::support::{Cluster, assert_unique, ports, wait_for};

/// Evidence takes three samples, closed ports four seconds.
const SERVE: [&str; 2] = ["--zombie-after", "4s"];
const EVERY_SECOND: [&str; 4] = ["--worker", "w", "--interval", "1s"];

fn agent(cluster: &Cluster, flags: &[&str]) -> Spawned {
    Spawned::cli(cluster, &[&["agent"], &EVERY_SECOND[..], flags].concat())
}

fn worker(cluster: &Cluster) -> Value {
    cluster.cli(&["worker", "get", "w", "-o", "json", "--timeout", "20s"]).ok()
}

/// A cluster, a worker of `count` ports on this host, and its agent; the first of the ports.
fn watched(count: u16) -> (Cluster, u16, Spawned) {
    let cluster = Cluster::start_with(3, &SERVE);
    let first = worker_here(&cluster, count);
    let agent = agent(&cluster, &[]);
    agent.says("the table is listed");
    (cluster, first, agent)
}

fn allocate(cluster: &Cluster, name: &str, flags: &[&str]) -> Value {
    let args = ["allocate", name, "--worker", "w", "-o", "json"];
    cluster.cli(&[&args[..], flags].concat()).ok()
}

fn number(allocation: &Value) -> u16 {
    allocation["ports"][0]["number"].as_u64().and_then(|n| u16::try_from(n).ok()).expect("a port")
}

fn confirm(cluster: &Cluster, allocation: &Value, flags: &[&str]) {
    let name = allocation["name"].as_str().expect("a name");
    let token = allocation["token"].to_string();
    cluster.cli(&[&["confirm", name, "--token", &token], flags].concat()).ok();
}

fn quarantined(cluster: &Cluster) -> Vec<u64> {
    let worker = worker(cluster);
    let ports = worker["ranges"][0]["quarantined"].as_array().expect("an array").iter();
    ports.map(|port| port["number"].as_u64().expect("a number")).collect()
}

fn wait_until_quarantined(cluster: &Cluster, ports: &[u16]) {
    let ports: Vec<u64> = ports.iter().copied().map(u64::from).collect();
    wait_for(&format!("{ports:?} to be quarantined"), || {
        (quarantined(cluster) == ports).then_some(())
    });
}

#[test]
fn an_agent_registers_a_new_worker_and_adopts_one_that_is_there() {
    let cluster = Cluster::start(3);
    let mut without = agent(&cluster, &[]);
    assert_eq!(without.ended(), 3);
    assert!(without.stderr().contains("--address"), "{}", without.stderr());

    let range = ["--range", "service=20000-20003"];
    let mut new =
        agent(&cluster, &[&["--address", "10.0.0.1", "--label", "zone=a"], &range[..]].concat());
    new.says("the worker is registered");
    let registered = worker(&cluster);
    assert_eq!(registered["labels"], json!({"zone": "a"}));
    assert!(registered["identity"]["namespace"].is_u64(), "{registered}");
    assert_eq!(new.terminate(), 0, "{}", new.stderr());

    // One that an operator has registered keeps what the agent's flags do not name.
    cluster.cli(&["worker", "remove", "w"]).ok();
    cluster.worker("w", 40_003);
    let before = worker(&cluster);
    assert!(before["identity"].is_null());
    let adopts = agent(&cluster, &["--label", "zone=b"]);
    adopts.says("the worker is adopted");
    let after = wait_for("the worker to have an identity", || {
        Some(worker(&cluster)).filter(|worker| worker["identity"].is_object())
    });
    assert_eq!(after["labels"], json!({"zone": "b"}));
    assert_eq!((&after["gpus"], &after["ranges"]), (&before["gpus"], &before["ranges"]));
}

#[test]
fn a_bound_port_on_which_nobody_listens_is_reclaimed_and_a_live_one_is_not() {
    let (cluster, first, _agent) = watched(4);
    let zombie = allocate(&cluster, "zombie", &["--ports", "1"]);
    let listening = allocate(&cluster, "listening", &["--ports", "1"]);
    let living = allocate(&cluster, "living", &["--ports", "1"]);
    let _listener = stranger(number(&listening));
    confirm(&cluster, &zombie, &[]);
    confirm(&cluster, &listening, &[]);
    // Its port is closed, but its process lives: that is a difference, and no reclaim.
    let me = std::process::id().to_string();
    confirm(&cluster, &living, &["--pid", &me]);
    wait_for("the zombie to be reclaimed", || get(&cluster, "zombie").is_none().then_some(()));
    cluster.cli(&["get", "zombie"]).refused(3, "its ports were closed for 4s");
    // By the time a second one is reclaimed, the others had their time too.
    let again = allocate(&cluster, "zombie", &["--ports", "1"]);
    assert_eq!(number(&again), first + 3);
    confirm(&cluster, &again, &[]);
    wait_for("the next zombie to be reclaimed", || get(&cluster, "zombie").is_none().then_some(()));
    for name in ["listening", "living"] {
        assert_eq!(get(&cluster, name).expect("it is held")["phase"], "BOUND", "{name}");
    }
}

/// Field failure nomad-1728: sixty instances, and a static and a dynamic port collided, because the
/// dynamic pick ignored the host's other users. Here what the agent sees is quarantined.
#[test]
fn nomad_1728() {
    let (cluster, first, _agent) = watched(64);
    let taken = [first, first + 7, first + 20, first + 63];
    let strangers = taken.map(stranger);
    wait_until_quarantined(&cluster, &taken);
    cluster.cli(&["worker", "get", "w"]).ok();
    let fixed = format!("http={}", first + 30);
    allocate(&cluster, "fixed", &["--port", &fixed]);
    for i in 0..59 {
        allocate(&cluster, &format!("i{i}"), &["--ports", "1"]);
    }
    let all = cluster.list();
    assert_unique(&all);
    let given = ports(&all);
    assert_eq!(given.len(), 60);
    assert!(taken.iter().all(|port| !given.contains(&("w".into(), u64::from(*port)))), "{given:?}");
    let full = ["allocate", "more", "--worker", "w", "--ports", "1"];
    cluster.cli(&full).refused(5, "4 quarantined");
    let other = format!("{}", first + 7);
    cluster
        .cli(&["allocate", "more", "--worker", "w", "--port", &other])
        .refused(5, "in use by process");
    // They go, and their ports can be had.
    drop(strangers);
    wait_until_quarantined(&cluster, &[]);
    cluster.cli(&full).ok();
}

/// A socket that is connected, not listening, with a local port of the test's choice.
fn connected(port: u16, to: SocketAddr) -> rustix::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let fd = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&fd, &SocketAddr::from((Ipv4Addr::LOCALHOST, port))).expect("the port is free");
    connect(&fd, &to).expect("somebody listens");
    fd
}

/// Field failures gpustack-4557 and nomad-4285: a port was given while an outgoing connection of the
/// platform itself had it as its local port; a probe by connecting sees no such socket. Here every
/// local port in use is read, and a start binds to probe.
#[test]
fn gpustack_4557_and_nomad_4285() {
    let (cluster, first, _agent) = watched(4);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let to = listener.local_addr().expect("it is bound");
    let connection = connected(first, to);
    let (server_side, _) = listener.accept().expect("it connects");
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, first)).is_err(), "what they probed with");
    wait_until_quarantined(&cluster, &[first]);
    assert_eq!(number(&allocate(&cluster, "a", &["--ports", "1"])), first + 1);
    let at = first.to_string();
    cluster.cli(&["allocate", "b", "--worker", "w", "--port", &at]).refused(5, "quarantined");

    // One that comes between two samples is found by the start itself.
    let _other = connected(first + 2, to);
    let mut run = run_server(&cluster, "c", &["--ports", "1"]);
    assert_eq!(number(&bound(&cluster, "c")), first + 3, "{}", run.stderr());
    assert_eq!(run.terminate(), 128 + 15);
    // The far end closes first, so that nothing is left here.
    drop(server_side);
    drop(connection);
    wait_for("the port to be given again", || {
        (!quarantined(&cluster).contains(&u64::from(first))).then_some(())
    });
}

/// Field failure gpustack-5181: the managed range overlapped with the one from which the kernel takes
/// local ports, and nobody said so. Here the agent does, with the line that mends it.
#[test]
fn gpustack_5181() {
    let cluster = Cluster::start(1);
    let read = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).expect("the kernel says")
    };
    let range = read("ip_local_port_range");
    let last: u16 = range.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    let service = format!("service={}-{last}", last - 9);
    let flags = ["--address", "127.0.0.1", "--range", &service];
    let warns = agent(&cluster, &flags);
    warns.says(&format!("10 of range service ({} to {last}) lie in ip_local_port_range", last - 9));
    let line = "sysctl -w net.ipv4.ip_local_reserved_ports=";
    warns.says(line);
    let said = warns.stderr();
    let ports = said.lines().find_map(|l| l.trim().strip_prefix(line)).expect("the line");
    assert!(ports.ends_with(&format!("{}-{last}", last - 9)), "{ports}");

    // Followed in a namespace of its own (the setting is the namespace's), it is silent.
    let apart = Namespace::new(&cluster);
    let mended = apart
        .command(Path::new("sysctl"))
        .args(["-qw", &format!("net.ipv4.ip_local_reserved_ports={ports}")])
        .status();
    assert!(mended.is_ok_and(|status| status.success()), "sysctl runs");
    let args = ["agent", "--worker", "v", "--interval", "1s"];
    let silent = apart.cli(&cluster, &[&args[..], &flags].concat());
    silent.says("the table is listed");
    wait_for("a report", || {
        (cluster.metric(0, "portwarden_reports_total").unwrap_or(0.0) >= 4.0).then_some(())
    });
    assert!(!silent.stderr().contains(line), "{}", silent.stderr());
}

/// The supervisor is killed, and what its program had started lives on: it keeps what is held. With
/// its end, the ports can be had again, and no sooner.
#[test]
fn what_outlives_its_supervisor_lingers_until_it_has_ended() {
    let (cluster, first, _agent) = watched(1);
    let pid = cluster.dir().join("survivor");
    // The kernel kills the shell with its supervisor, and not the shell's children.
    let script = format!("{} & echo $! > {}; wait", server().join(" "), pid.display());
    let args = [
        "run",
        "a",
        "--worker",
        "w",
        "--ports",
        "1",
        "--lease-ttl",
        "5s",
        "--",
        "sh",
        "-c",
        &script,
    ];
    let mut run = Spawned::cli(&cluster, &args);
    bound(&cluster, "a");
    let survivor: u32 =
        std::fs::read_to_string(&pid).expect("it is written").trim().parse().expect("a pid");
    run.kill();
    wait_for("it to linger", || Some(get(&cluster, "a")?).filter(|a| a["phase"] == "LINGERING"));
    assert!(is_running(survivor) && is_listened_on(first));
    let full = ["allocate", "b", "--worker", "w", "--ports", "1"];
    cluster.cli(&full).refused(5, "held by a");
    send(survivor, "KILL");
    wait_for("it to be reclaimed", || get(&cluster, "a").is_none().then_some(()));
    cluster.cli(&["get", "a"]).refused(3, "is gone");
    cluster.cli(&full).ok();
}

/// A supervisor that was paused for longer than its lease comes back: its program was left alone, and
/// what it holds is confirmed anew under the same token.
#[test]
fn a_supervisor_that_comes_back_revives_what_lingers() {
    let (cluster, first, _agent) = watched(1);
    let mut run = run_server(&cluster, "a", &["--ports", "1", "--lease-ttl", "5s"]);
    let before = bound(&cluster, "a");
    run.signal("STOP");
    wait_for("it to linger", || Some(get(&cluster, "a")?).filter(|a| a["phase"] == "LINGERING"));
    assert!(is_listened_on(first), "its program goes on");
    let said = cluster.cli(&["get", "a"]).stdout();
    assert!(said.contains("lingers: lease"), "{said}");
    run.signal("CONT");
    let after = bound(&cluster, "a");
    assert_eq!(after["token"], before["token"]);
    assert_eq!(after["ports"], before["ports"]);
    assert_ne!(after["lease"], before["lease"]);
    assert!(is_listened_on(first));
    assert_eq!(run.terminate(), 128 + 15);
    assert_eq!(cluster.list(), Vec::<Value>::new());
}

/// A worker is cut off for longer than every TTL: nothing of it is given twice, whoever asks, and
/// when it is back all is as it was.
#[test]
fn a_worker_cut_off_for_longer_than_every_ttl_gets_no_port_given_twice() {
    let cluster = Cluster::start_with(3, &[&SERVE[..], &["--worker-lost-after", "5s"]].concat());
    let apart = Namespace::new(&cluster);
    let first = free_ports(2);
    let range = format!("service={first}-{}", first + 1);
    let args = ["agent", "--address", "10.0.0.1", "--range", &range];
    let agent = apart.cli(&cluster, &[&args[..], &EVERY_SECOND].concat());
    agent.says("the table is listed");
    let program = server();
    let program = program.iter().map(String::as_str);
    let flags = ["run", "a", "--worker", "w", "--ports", "1", "--lease-ttl", "5s", "--"];
    let mut run = apart.cli(&cluster, &flags.into_iter().chain(program).collect::<Vec<_>>());
    let before = bound(&cluster, "a");

    apart.cut_off();
    wait_for("the worker to be lost", || (worker(&cluster)["phase"] == "LOST").then_some(()));
    let lingers = wait_for("it to linger", || {
        Some(get(&cluster, "a")?).filter(|a| a["phase"] == "LINGERING")
    });
    assert_eq!(lingers["ports"], before["ports"]);
    for claim in [["--ports", "1"], ["--port", &number(&before).to_string()]] {
        let refused = cluster.cli(&[&["allocate", "b", "--worker", "w"], &claim[..]].concat());
        refused.refused(4, "LOST");
    }
    run.assert_running();

    apart.join();
    let after = bound(&cluster, "a");
    assert_eq!((&after["token"], &after["ports"]), (&before["token"], &before["ports"]));
    wait_for("the worker to be back", || (worker(&cluster)["phase"] == "READY").then_some(()));
    let other = allocate(&cluster, "b", &["--ports", "1"]);
    assert_ne!(number(&other), number(&before));
    assert_unique(&cluster.list());
    assert_eq!(run.terminate(), 128 + 15, "{}", run.stderr());
    assert!(get(&cluster, "a").is_none());
}

#[test]
fn two_agents_do_not_take_turns_with_one_worker() {
    let (cluster, _, mut first) = watched(2);
    let apart = Namespace::new(&cluster);
    allocate(&cluster, "a", &["--ports", "1"]);
    let other = ["agent", "--worker", "w", "--interval", "1s"];
    let mut refused = apart.cli(&cluster, &other);
    assert_eq!(refused.ended(), 4, "{}", refused.stderr());
    assert!(refused.stderr().contains("a is held there"), "{}", refused.stderr());
    first.assert_running();
    // Nor is a program run where the worker is not.
    let run = ["run", "b", "--worker", "w", "--ports", "1", "--", "true"];
    let mut elsewhere = apart.cli(&cluster, &run);
    assert_eq!(elsewhere.ended(), 4, "{}", elsewhere.stderr());
    assert!(elsewhere.stderr().contains("does not see what runs here"), "{}", elsewhere.stderr());
    // A worker that holds nothing may move; then the one that is left says so and ends.
    cluster.cli(&["release", "a", "--force"]).ok();
    let moved = apart.cli(&cluster, &other);
    moved.says("the worker is adopted");
    assert_eq!(first.ended(), 4, "{}", first.stderr());
    assert!(first.stderr().contains("another agent has made worker w its own"));
}

#[test]
fn an_agent_whose_worker_was_removed_ends_and_one_without_a_cluster_does_not() {
    let (mut cluster, _, mut agent) = watched(2);
    cluster.kill_all();
    agent.says("the report was not taken");
    for at in 0..3 {
        cluster.spawn(at);
    }
    agent.says("the cluster takes reports again");
    cluster.cli(&["worker", "remove", "w", "--timeout", "60s"]).ok();
    assert_eq!(agent.ended(), 3, "{}", agent.stderr());
    assert!(agent.stderr().contains("worker w was removed"), "{}", agent.stderr());
    cluster.cli(&["worker", "get", "w"]).refused(3, "no worker w");
}

/// After a boot nothing of before is alive, whatever has its pid now: the agent says that it is
/// another boot first, and what was confirmed before is reclaimed at once.
#[test]
fn a_new_boot_ends_what_was_confirmed_before_it() {
    let (cluster, first, mut agent_before) = watched(2);
    let me = std::process::id().to_string();
    let alive = allocate(&cluster, "a", &["--ports", "1"]);
    confirm(&cluster, &alive, &["--pid", &me]);
    let _listener = stranger(first);
    assert_eq!(agent_before.terminate(), 0);
    // The same machine with another boot id, in a mount namespace of the agent's own.
    let boot_id = cluster.dir().join("boot_id");
    std::fs::write(&boot_id, "00000000-0000-4000-8000-000000000001\n").expect("a file");
    let script = format!(
        "mount --bind {} /proc/sys/kernel/random/boot_id && exec \"$@\"",
        boot_id.display()
    );
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh", crate::support::BINARY]);
    command.args(["--endpoints", &cluster.endpoints(), "agent"]).args(EVERY_SECOND);
    let _after = Spawned::start(&cluster, "the agent after the boot".into(), command);
    wait_for("it to be reclaimed", || get(&cluster, "a").is_none().then_some(()));
    cluster.cli(&["get", "a"]).refused(3, "its worker has booted since");
}

#[test]
fn what_the_agent_finds_different_is_said_and_counted() {
    let (cluster, first, agent) = watched(3);
    let bound_but_closed = allocate(&cluster, "a", &["--ports", "1"]);
    let held_by_another = allocate(&cluster, "b", &["--ports", "1"]);
    let mut sleep = std::process::Command::new("sleep").arg("1000").spawn().expect("it starts");
    let pid = sleep.id().to_string();
    confirm(&cluster, &bound_but_closed, &["--pid", &pid]);
    confirm(&cluster, &held_by_another, &["--pid", &pid]);
    let _mine = stranger(number(&held_by_another));
    agent.says("kind=\"BOUND_BUT_CLOSED\" name=\"a\"");
    agent.says(&format!(
        "in use by process {}, not by process {pid} kind=\"HELD_BY_ANOTHER\" name=\"b\"",
        std::process::id()
    ));
    let _unknown = stranger(first + 2);
    agent.says(&format!("kind=\"OPEN_BUT_UNKNOWN\" name=\"\" port={}", first + 2));
    wait_for("the leader to count them", || {
        let counted = |at| cluster.metric(at, "portwarden_drift").unwrap_or(0.0);
        (0..3).any(|at| counted(at) >= 2.0).then_some(())
    });
    sleep.kill().expect("a child of our own");
    sleep.wait().expect("it ends");
    wait_for("both to be reclaimed", || cluster.list().is_empty().then_some(()));
}
