//! Processes that go on beside a test: agents, watchers, `run`, and what runs under it. Each ends
//! with its [`Spawned`], by its process id.

use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use serde_json::Value;

use crate::support::{BINARY, Cluster, wait_for};

pub struct Spawned {
    what: String,
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Spawned {
    /// A subcommand against all nodes of a cluster.
    pub fn cli(cluster: &Cluster, args: &[&str]) -> Spawned {
        let mut command = Command::new(BINARY);
        command.args(["--endpoints", &cluster.endpoints()]).args(args);
        Spawned::start(cluster, args.join(" "), command)
    }

    /// `what`: how failures call it. What it says goes to files in the cluster's directory.
    pub fn start(cluster: &Cluster, what: String, mut command: Command) -> Spawned {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let file = |kind: &str| cluster.dir().join(format!("spawned-{number}.{kind}"));
        let (out, err) = (file("out"), file("err"));
        let create = |path: &PathBuf| std::fs::File::create(path).expect("a file");
        command.stdin(Stdio::null()).stdout(create(&out)).stderr(create(&err));
        let child = command.spawn().unwrap_or_else(|error| panic!("{what} starts: {error}"));
        Spawned { what, child, out, err }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn stdout(&self) -> String {
        std::fs::read_to_string(&self.out).unwrap_or_default()
    }

    pub fn stderr(&self) -> String {
        std::fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// Its lines of JSON; one that is being written is none yet.
    pub fn json_lines(&self) -> Vec<Value> {
        let text = self.stdout();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }

    /// Waits until it has said this on stderr.
    pub fn says(&self, text: &str) {
        wait_for(&format!("{} to say {text:?}", self.what), || {
            self.stderr().contains(text).then_some(())
        });
    }

    /// STOP, CONT, TERM, …
    pub fn signal(&self, signal: &str) {
        send(self.pid(), signal);
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().expect("a process of our own");
        self.child.wait().expect("it ends");
    }

    pub fn terminate(&mut self) -> i32 {
        self.signal("TERM");
        self.ended()
    }

    /// Waits for its end; its exit code.
    pub fn ended(&mut self) -> i32 {
        let what = format!("{} to end", self.what);
        let status = wait_for(&what, || self.child.try_wait().expect("its status"));
        status.code().unwrap_or(-1)
    }

    pub fn assert_running(&mut self) {
        let ended = self.child.try_wait().expect("its status");
        assert!(ended.is_none(), "{} has ended: {ended:?}: {}", self.what, self.stderr());
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        // It may be stopped.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}{}", self.what, self.stdout(), self.stderr());
        }
    }
}

pub fn send(pid: u32, signal: &str) {
    let pid = pid.to_string();
    let sent = Command::new("kill").args(["-s", signal, &pid]).status().expect("kill runs");
    assert!(sent.success(), "kill -s {signal} {pid}");
}

pub fn is_running(pid: u32) -> bool {
    // Its files are open until the last thread has ended.
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let stats =
        threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok());
    let mut states = stats.filter_map(|stat| stat.rsplit_once(") ")?.1.chars().next());
    states.any(|state| state != 'Z')
}

/// The first of `count` ports in a row on which nothing is, and which no other test of this process
/// is given. Below the kernel's own, so that no connection takes them.
pub fn free_ports(count: u16) -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = 20_000 + (std::process::id() % 80) as u16 * 100;
    loop {
        let first = start + NEXT.fetch_add(count, Ordering::Relaxed);
        if (first..first + count).all(is_free) {
            return first;
        }
    }
}

pub fn is_free(port: u16) -> bool {
    let address = (Ipv4Addr::UNSPECIFIED, port);
    TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok()
}

/// Somebody who is not in the table and listens on a port.
pub fn stranger(port: u16) -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("the port is free")
}

pub fn is_listened_on(port: u16) -> bool {
    TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok()
}

/// The program that listens on the ports in its arguments: this test's own binary (see [`server`]).
pub fn server() -> Vec<String> {
    let binary = std::env::current_exe().expect("the path of this test");
    let test = ["--exact", "spawned::listens_on_the_ports_in_PORTS", "--ignored", "--nocapture"];
    std::iter::once(binary.display().to_string()).chain(test.map(String::from)).collect()
}

/// Not a test: what `run` runs in the tests of it.
#[test]
#[ignore = "the program under `run`"]
#[allow(non_snake_case)]
fn listens_on_the_ports_in_PORTS() {
    let ports = std::env::var("PORTS").expect("run says which");
    let bind = |port: &str| {
        let port: u16 = port.parse().expect("a number");
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("the port is free")
    };
    // Whoever knocks is let in, and out again.
    for listener in ports.split(',').map(bind).collect::<Vec<_>>() {
        std::thread::spawn(move || listener.incoming().for_each(drop));
    }
    loop {
        std::thread::park();
    }
}
