//! `portwarden run` on real processes and sockets.

use std::net::Ipv4Addr;
use std::process::Command;

use serde_json::{Value, json};

use crate::spawned::{Spawned, free_ports, is_free, is_listened_on, is_running, server, stranger};
use crate::support::{BINARY, Cluster, wait_for};

/// A worker on this host with so many ports on which nothing is; the first of them.
pub fn worker_here(cluster: &Cluster, count: u16) -> u16 {
    let first = free_ports(count);
    let range = format!("service={first}-{}", first + count - 1);
    cluster.cli(&["worker", "register", "w", "--address", "127.0.0.1", "--range", &range]).ok();
    first
}

/// `run NAME --worker w … -- PROGRAM`.
fn run_program(cluster: &Cluster, name: &str, flags: &[&str], program: &[&str]) -> Spawned {
    let args = [&["run", name, "--worker", "w"], flags, &["--"], program].concat();
    Spawned::cli(cluster, &args)
}

/// The same with a program that listens on its ports.
pub fn run_server(cluster: &Cluster, name: &str, flags: &[&str]) -> Spawned {
    let server = server();
    let program: Vec<_> = server.iter().map(String::as_str).collect();
    run_program(cluster, name, flags, &program)
}

pub fn get(cluster: &Cluster, name: &str) -> Option<Value> {
    let ran = cluster.cli(&["get", name, "-o", "json", "--timeout", "20s"]);
    (ran.code() == 0).then(|| ran.ok())
}

/// Waits until it is bound; the allocation.
pub fn bound(cluster: &Cluster, name: &str) -> Value {
    wait_for(&format!("{name} to be bound"), || {
        get(cluster, name).filter(|allocation| allocation["phase"] == "BOUND")
    })
}

fn port(allocation: &Value) -> u16 {
    allocation["ports"][0]["number"].as_u64().and_then(|n| u16::try_from(n).ok()).expect("a port")
}

/// The one child of a process.
fn child_of(pid: u32) -> u32 {
    wait_for("a child", || {
        let children = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
        let children = children
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
            .collect::<String>();
        children.split_whitespace().next()?.parse().ok()
    })
}

/// Nothing is held, on no lease.
fn assert_nothing_left(cluster: &Cluster) {
    assert_eq!(cluster.list(), Vec::<Value>::new());
    assert_eq!(cluster.cli(&["lease", "list", "-o", "json"]).ok(), json!([]));
}

/// Nomad gave a port that something else on the host had. Here a start binds its ports before
/// anybody is told of them, and goes on to the next one.
#[test]
fn three_of_four_ports_are_strangers_and_the_fourth_is_bound() {
    let cluster = Cluster::start(3);
    let first = worker_here(&cluster, 4);
    let _strangers = [first, first + 1, first + 2].map(stranger);
    let mut run = run_server(&cluster, "a", &["--ports", "1"]);
    let allocation = bound(&cluster, "a");
    assert_eq!(port(&allocation), first + 3);
    assert!(is_listened_on(first + 3), "what is said to be bound is");
    let worker = cluster.cli(&["worker", "get", "w", "-o", "json"]).ok();
    assert_eq!(worker["ranges"][0]["quarantined_count"], 3);
    let program = child_of(run.pid());
    assert_eq!(run.terminate(), 128 + 15, "{}", run.stderr());
    assert!(!is_running(program));
    assert!(is_free(first + 3));
    assert_nothing_left(&cluster);
}

#[test]
fn at_the_end_of_a_range_each_port_that_was_tried_is_listed_with_the_reason() {
    let cluster = Cluster::start(3);
    let first = worker_here(&cluster, 3);
    let ports = [first, first + 1, first + 2];
    let _strangers = ports.map(stranger);
    let mut run = run_server(&cluster, "a", &["--ports", "1"]);
    assert_eq!(run.ended(), 5);
    let said = run.stderr();
    let error = said.lines().find(|line| line.starts_with("error: ")).expect("an error");
    let me = std::process::id();
    for port in ports {
        assert!(
            error.contains(&format!(" {port} (TCP 0.0.0.0: Address already in use")),
            "{error}"
        );
    }
    assert!(error.contains(&format!("by process {me} ")), "{error}");
    assert_nothing_left(&cluster);
    // Given up earlier, it says so, and gives back what it has.
    cluster.cli(&["worker", "lift", "w", "--port", &format!("{first}-{}", first + 2)]).ok();
    let mut run = run_server(&cluster, "a", &["--ports", "1", "--retries", "1"]);
    assert_eq!(run.ended(), 5);
    assert!(run.stderr().contains("no port was free in 1 retries"), "{}", run.stderr());
    assert_nothing_left(&cluster);
}

#[test]
fn it_ends_as_its_program_ends_and_leaves_nothing() {
    let cluster = Cluster::start(3);
    worker_here(&cluster, 4);
    for (program, code) in [
        (&["sh", "-c", "exit 7"][..], 7),
        (&["sh", "-c", "kill -KILL $$"][..], 128 + 9),
        (&["true"][..], 0),
        (&["/no/such/program"][..], 127),
        (&["/"][..], 126),
    ] {
        let mut run = run_program(&cluster, "a", &["--ports", "1"], program);
        assert_eq!(run.ended(), code, "{program:?}: {}", run.stderr());
        assert_nothing_left(&cluster);
    }
    let sleep = ["sh", "-c", "exec sleep 1000"];
    let flags = ["--ports", "1", "--start-timeout", "1s"];
    let mut run = run_program(&cluster, "a", &flags, &sleep);
    assert_eq!(run.ended(), 6, "{}", run.stderr());
    assert!(run.stderr().contains("did not listen on"), "{}", run.stderr());
    assert_nothing_left(&cluster);
    run_program(&cluster, "a", &["--ports", "1"], &["x", "{port:http}"]).ended();
}

/// An engine picked a second port that nobody had allocated, and another instance held it. Here one
/// claim has several named ports and bands, and the program is told them all.
#[test]
fn gpustack_4312() {
    let cluster = Cluster::start(3);
    let first = worker_here(&cluster, 16);
    // Somebody has the second port, and one in the middle of where the band would be.
    let _strangers = [first + 1, first + 4].map(stranger);
    let told = cluster.dir().join("told");
    let script = format!(
        "echo $PORT $PORT_HTTP $PORT_VLLM $PORTS \"$@\" > {0}.new && mv {0}.new {0}; exec sleep 1000",
        told.display()
    );
    let program = ["sh", "-c", &script, "sh", "--api={port:http}", "--vllm={port:vllm}", "{ports}"];
    let flags =
        ["--port", "http=any", "--port", "vllm=any", "--contiguous", "4", "--listens", "none"];
    let mut run = run_program(&cluster, "a", &flags, &program);
    let allocation = bound(&cluster, "a");
    let ports: Vec<u64> = allocation["ports"]
        .as_array()
        .expect("ports")
        .iter()
        .map(|port| port["number"].as_u64().expect("a number"))
        .collect();
    assert_eq!(ports.len(), 6);
    let taken = [first + 1, first + 4].map(u64::from);
    assert!(ports.iter().all(|port| !taken.contains(port)), "{ports:?}");
    assert!(ports[2..].windows(2).all(|pair| pair[1] == pair[0] + 1), "a band: {ports:?}");
    let all = ports.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    let expected = format!("{0} {0} {1} {all} --api={0} --vllm={1} {all}\n", ports[0], ports[1]);
    let said =
        wait_for("the program to say what it was told", || std::fs::read_to_string(&told).ok());
    assert_eq!(said, expected);
    assert_eq!(run.terminate(), 128 + 15);
    assert_nothing_left(&cluster);
}

#[test]
fn a_program_that_loses_the_race_for_its_port_goes_on_to_the_next() {
    let cluster = Cluster::start(3);
    let first = worker_here(&cluster, 4);
    // The first time it is started, somebody else takes the port, and it ends.
    let started = cluster.dir().join("started");
    let server = server().join(" ");
    let script = format!(
        "if [ ! -e {0} ]; then touch {0}; \
         while ! grep -q $(printf :%04X $PORT) /proc/net/tcp; do sleep 0.02; done; exit 1; fi; \
         exec {server}",
        started.display()
    );
    let mut run = run_program(&cluster, "a", &["--ports", "1"], &["sh", "-c", &script]);
    wait_for("the program to be started", || started.exists().then_some(()));
    let _thief = stranger(first);
    let allocation = bound(&cluster, "a");
    assert_eq!(port(&allocation), first + 1, "{}", run.stderr());
    run.says("Address already in use");
    assert_eq!(run.terminate(), 128 + 15);
    assert_nothing_left(&cluster);
}

/// It makes a daemon of itself: what holds the port has left its process group and its session, and
/// has no parent any more.
#[test]
fn a_program_that_becomes_a_daemon_is_ended_before_its_port_is_given_back() {
    let cluster = Cluster::start(3);
    worker_here(&cluster, 4);
    let (daemon, go) = (cluster.dir().join("daemon"), cluster.dir().join("go"));
    let script = format!(
        "(setsid {} & echo $! > {}); while [ ! -e {} ]; do sleep 0.02; done; exit 9",
        server().join(" "),
        daemon.display(),
        go.display()
    );
    let flags = ["--ports", "1", "--listens", "none"];
    let mut run = run_program(&cluster, "a", &flags, &["sh", "-c", &script]);
    let at = port(&bound(&cluster, "a"));
    wait_for("the daemon to listen", || is_listened_on(at).then_some(()));
    let daemon = std::fs::read_to_string(&daemon).expect("it was started");
    let daemon: u32 = daemon.trim().parse().expect("a pid");
    std::fs::write(&go, "").expect("the directory is there");
    assert_eq!(run.ended(), 9, "{}", run.stderr());
    run.says("what it left behind is ended too");
    assert!(!is_running(daemon));
    assert!(is_free(at), "it was vouched for");
    assert_nothing_left(&cluster);
}

#[test]
fn a_program_that_is_stopped_from_a_terminal_keeps_its_lease() {
    let cluster = Cluster::start(3);
    worker_here(&cluster, 4);
    let mut run = run_server(&cluster, "a", &["--ports", "1", "--lease-ttl", "3s"]);
    let allocation = bound(&cluster, "a");
    let program = child_of(run.pid());
    let state = || {
        let stat = std::fs::read_to_string(format!("/proc/{program}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next())
    };
    run.signal("TSTP");
    wait_for("the program to be stopped", || (state() == Some('T')).then_some(()));
    // A lease that nobody keeps is gone by then.
    let since = std::time::Instant::now();
    wait_for("a lease's time", || (since.elapsed().as_secs() >= 5).then_some(()));
    assert_eq!(get(&cluster, "a").expect("it is held")["lease"], allocation["lease"]);
    run.signal("CONT");
    wait_for("the program to go on", || (state() != Some('T')).then_some(()));
    // Also while it is stopped it is asked to end, and heeds it.
    run.signal("TSTP");
    wait_for("the program to be stopped", || (state() == Some('T')).then_some(()));
    assert_eq!(run.terminate(), 128 + 15);
    assert_nothing_left(&cluster);
}

/// As systemd stops a service: each of its processes is asked, `run` beside its program.
#[test]
fn whoever_asks_for_an_end_twice_is_given_everything_back_all_the_same() {
    let cluster = Cluster::start(3);
    worker_here(&cluster, 4);
    for _ in 0..4 {
        let mut run = run_server(&cluster, "a", &["--ports", "1"]);
        bound(&cluster, "a");
        let program = child_of(run.pid()).to_string();
        let run_too = run.pid().to_string();
        let sent = Command::new("kill").args(["-s", "TERM", &program, &run_too]).status();
        assert!(sent.expect("kill runs").success());
        assert_eq!(run.ended(), 128 + 15, "{}", run.stderr());
        assert_nothing_left(&cluster);
    }
}

/// A second TERM means "at once" to many.
#[test]
fn what_is_ended_is_asked_once() {
    let cluster = Cluster::start(3);
    worker_here(&cluster, 4);
    let asked = cluster.dir().join("asked");
    let script = format!(
        "trap 'echo x >> {}; asked=1' TERM; while [ -z \"$asked\" ]; do sleep 0.02; done; sleep 1; exit 3",
        asked.display()
    );
    let flags = ["--ports", "1", "--start-timeout", "1s"];
    let mut run = run_program(&cluster, "a", &flags, &["sh", "-c", &script]);
    assert_eq!(run.ended(), 6, "{}", run.stderr());
    assert_eq!(std::fs::read_to_string(&asked).expect("it was asked"), "x\n");
}

#[test]
fn a_stranger_on_its_port_is_not_taken_for_the_program() {
    let cluster = Cluster::start(3);
    let first = worker_here(&cluster, 2);
    // It is started on a free port and does not listen; then somebody else does.
    let started = cluster.dir().join("started");
    let server = server().join(" ");
    let script = format!(
        "[ $PORT = {first} ] || exec {server}; touch {}; exec sleep 1000",
        started.display()
    );
    let mut run = run_program(&cluster, "a", &["--ports", "1"], &["sh", "-c", &script]);
    wait_for("the program to be started", || started.exists().then_some(()));
    let _stranger = stranger(first);
    assert_eq!(port(&bound(&cluster, "a")), first + 1);
    run.says(&format!("process {} listens on it", std::process::id()));
    assert_eq!(run.terminate(), 128 + 15);
}

#[test]
fn signals_are_passed_on_and_what_the_program_left_behind_is_ended() {
    let cluster = Cluster::start(3);
    let first = worker_here(&cluster, 4);
    let traps = "trap 'exit 42' USR1; while :; do sleep 0.02; done";
    let flags = ["--ports", "1", "--listens", "none"];
    let mut run = run_program(&cluster, "a", &flags, &["sh", "-c", traps]);
    bound(&cluster, "a");
    run.signal("USR1");
    assert_eq!(run.ended(), 42, "{}", run.stderr());

    // The shell ends at once; what it started would go on.
    let script = format!("{} & wait", server().join(" "));
    let mut run = run_program(&cluster, "b", &["--ports", "1"], &["sh", "-c", &script]);
    let at = port(&bound(&cluster, "b"));
    assert!(is_listened_on(at));
    assert_eq!(run.terminate(), 128 + 15);
    assert!(is_free(at), "it was vouched for");
    assert_ne!(at, first, "a freed port comes last");
    assert_nothing_left(&cluster);
}

/// The supervisor is killed: its program dies with it, and what it held goes with the lease.
#[test]
fn a_program_does_not_outlive_its_supervisor() {
    let cluster = Cluster::start(3);
    worker_here(&cluster, 4);
    let mut run = run_server(&cluster, "a", &["--ports", "1", "--lease-ttl", "5s"]);
    let at = port(&bound(&cluster, "a"));
    let program = child_of(run.pid());
    run.kill();
    wait_for("the program to die", || (!is_running(program)).then_some(()));
    assert!(is_free(at));
    wait_for("its port to be given back", || get(&cluster, "a").is_none().then_some(()));
    cluster.cli(&["get", "a"]).refused(3, "expired");
}

/// Without an agent the cluster gives the ports to others when the lease ends: the program is
/// stopped before that, also when nobody can be asked.
#[test]
fn without_an_agent_a_program_is_stopped_before_its_lease_ends() {
    let mut cluster = Cluster::start(3);
    worker_here(&cluster, 4);
    let mut run = run_server(&cluster, "a", &["--ports", "1", "--lease-ttl", "12s"]);
    let at = port(&bound(&cluster, "a"));
    cluster.kill_all();
    let cut = std::time::Instant::now();
    wait_for("the program to be stopped", || (!is_listened_on(at)).then_some(()));
    // The last keepalive was sent before; the lease may end twelve seconds after that.
    assert!(cut.elapsed().as_secs() < 12, "{:?}", cut.elapsed());
    assert_eq!(run.ended(), 6, "{}", run.stderr());
    assert!(run.stderr().contains("the lease could not be kept alive"), "{}", run.stderr());
}

/// The same where the supervisor itself slept too long: it wakes to find its lease over.
#[test]
fn a_supervisor_that_slept_over_its_lease_stops_its_program_at_once() {
    let cluster = Cluster::start(3);
    worker_here(&cluster, 1);
    let mut run = run_server(&cluster, "a", &["--ports", "1", "--lease-ttl", "5s"]);
    let at = port(&bound(&cluster, "a"));
    run.signal("STOP");
    wait_for("the lease to end", || get(&cluster, "a").is_none().then_some(()));
    run.signal("CONT");
    assert_eq!(run.ended(), 6, "{}", run.stderr());
    assert!(is_free(at));
}

#[test]
fn a_run_whose_allocation_was_forced_out_stops_its_program() {
    let cluster = Cluster::start(3);
    worker_here(&cluster, 1);
    let flags = ["--ports", "1", "--lease-ttl", "10s", "--on-lease-lost", "keep"];
    let mut run = run_server(&cluster, "a", &flags);
    let at = port(&bound(&cluster, "a"));
    cluster.cli(&["release", "a", "--force", "--reason", "test"]).ok();
    assert_eq!(run.ended(), 4, "{}", run.stderr());
    assert!(run.stderr().contains("forced out by an operator: test"), "{}", run.stderr());
    assert!(is_free(at));
    assert_nothing_left(&cluster);
}

#[test]
fn bad_flags_are_refused_before_anything_is_asked_for() {
    for (args, says) in [
        (&["--worker", "w", "--ports", "1", "--", "x", "{port:http}"][..], "not asked for"),
        (&["--worker", "w", "--ports", "1"][..], "<CMD>"),
        (&["--worker", "w", "--", "x"][..], "--ports"),
        (&["--ports", "1", "--", "x"][..], "--worker"),
        (&["--worker", "w", "--ports", "1", "--retries", "33", "--", "x"][..], "0..=32"),
        (&["--worker", "w", "--ports", "1", "--lease-ttl", "1ms", "--", "x"][..], "1s to 24h"),
    ] {
        let output = Command::new(BINARY).args(["run", "a"]).args(args).output().expect("it runs");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?}: {stderr}");
    }
}

/// A port that only UDP uses, and one that is bound and not listened on.
#[test]
fn whatever_has_a_port_makes_it_a_conflict() {
    let cluster = Cluster::start(3);
    let first = worker_here(&cluster, 3);
    let _udp = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, first)).expect("the port is free");
    let tcp = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    )
    .expect("a socket");
    let address = std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, first + 1));
    rustix::net::bind(&tcp, &address).expect("the port is free");
    let mut run = run_server(&cluster, "a", &["--ports", "1"]);
    assert_eq!(port(&bound(&cluster, "a")), first + 2);
    assert_eq!(run.terminate(), 128 + 15);
}
