//! A cluster of real processes: start, kill, pause, restart, and wait for a condition.
//!
//! Every cluster has loopback addresses of its own (127.x.y.z), so that clusters run side by side
//! with fixed ports. Whatever is still running ends with the [`Cluster`], by its process id.

use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use portwarden::client::{Client, Options};
use serde_json::Value;

/// Generous: what takes longer is stuck. No test asserts that anything is fast.
pub const BOUND: Duration = Duration::from_secs(60);

pub const BINARY: &str = env!("CARGO_BIN_EXE_portwarden");

pub struct Cluster {
    pub nodes: Vec<Node>,
    /// More flags of `serve`, for every node.
    pub flags: Vec<String>,
    dir: tempfile::TempDir,
}

pub struct Node {
    pub id: u64,
    address: Ipv4Addr,
    /// Where it keeps its data, if not in the cluster's directory.
    data: Option<PathBuf>,
    /// It joins, and does not begin the cluster.
    joins: bool,
    child: Option<Child>,
}

impl Node {
    pub fn client(&self) -> String {
        format!("{}:7601", self.address)
    }

    pub fn peer(&self) -> String {
        format!("{}:7701", self.address)
    }

    pub fn http(&self) -> String {
        format!("{}:7801", self.address)
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().map(Child::id).expect("the node runs")
    }
}

impl Cluster {
    /// Starts `count` nodes and waits until they have a leader.
    pub fn start(count: u64) -> Cluster {
        Cluster::start_with(count, &[])
    }

    /// As [`Cluster::start`], with more flags for `serve`.
    pub fn start_with(count: u64, flags: &[&str]) -> Cluster {
        let mut cluster = Cluster::prepare(count);
        cluster.flags = flags.iter().map(|flag| flag.to_string()).collect();
        for at in 0..cluster.nodes.len() {
            cluster.spawn(at);
        }
        cluster.leader();
        cluster
    }

    /// Addresses and directories, nothing started.
    pub fn prepare(count: u64) -> Cluster {
        static CLUSTERS: AtomicU32 = AtomicU32::new(0);
        let number = CLUSTERS.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        // 127.64–127 by process, then by cluster: apart from 127.0.0.1 and from each other.
        let subnet =
            [64 + (process >> 6) as u8 % 64, ((process & 63) << 2) as u8 + (number >> 6) as u8];
        let nodes = (1..=count)
            .map(|id| Node {
                id,
                address: Ipv4Addr::new(
                    127,
                    subnet[0],
                    subnet[1],
                    ((number & 63) << 2) as u8 + id as u8 % 4,
                ),
                data: None,
                joins: false,
                child: None,
            })
            .collect();
        let dir = tempfile::tempdir().expect("a temporary directory");
        Cluster { nodes, flags: Vec::new(), dir }
    }

    /// One more node, not started, which joins the others.
    pub fn add_joining(&mut self, id: u64) -> usize {
        let [a, b, c, _] = self.nodes[0].address.octets();
        // The fourth octets up to 254 are shared by the clusters of a process.
        let spare = Ipv4Addr::new(a, b.wrapping_add(64), c, self.nodes[0].address.octets()[3] & !3);
        let octets = spare.octets();
        let address = Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3] + (id % 4) as u8);
        self.nodes.push(Node { id, address, data: None, joins: true, child: None });
        self.nodes.len() - 1
    }

    pub fn data_dir(&self, at: usize) -> PathBuf {
        let node = &self.nodes[at];
        node.data.clone().unwrap_or_else(|| self.dir.path().join(format!("node-{}", node.id)))
    }

    pub fn put_data_in(&mut self, at: usize, dir: PathBuf) {
        self.nodes[at].data = Some(dir);
    }

    /// From now on nodes are started with this too.
    pub fn flag(&mut self, name: &str, value: &str) {
        self.flags.extend([name.to_string(), value.to_string()]);
    }

    /// A node that was started and not stopped runs.
    pub fn assert_running(&mut self) {
        for node in &mut self.nodes {
            let ended = node.child.as_mut().and_then(|child| child.try_wait().expect("its status"));
            assert!(ended.is_none(), "node {} has ended by itself: {ended:?}", node.id);
        }
    }

    /// Has it ended by itself? Then its exit code.
    pub fn has_ended(&mut self, at: usize) -> Option<i32> {
        let ended = self.nodes[at].child.as_mut()?.try_wait().expect("its status")?;
        self.nodes[at].child = None;
        Some(ended.code().unwrap_or(-1))
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn initial_cluster(&self) -> String {
        let begin = self.nodes.iter().filter(|node| !node.joins);
        let all = begin.map(|n| format!("{}={}", n.id, n.peer()));
        all.collect::<Vec<_>>().join(",")
    }

    pub fn serve_args(&self, at: usize) -> Vec<String> {
        let node = &self.nodes[at];
        let data = self.data_dir(at).display().to_string();
        [
            ["serve", "--id"].map(String::from).to_vec(),
            vec![node.id.to_string(), "--data-dir".into(), data],
            vec!["--listen".into(), node.client(), "--listen-peer".into(), node.peer()],
            vec!["--listen-http".into(), node.http()],
            match node.joins {
                true => vec!["--join".into(), self.nodes[0].peer()],
                false => vec!["--initial-cluster".into(), self.initial_cluster()],
            },
            self.flags.clone(),
        ]
        .concat()
    }

    /// Starts a node; its log goes to a file that a failing test prints.
    pub fn spawn(&mut self, at: usize) {
        let mut command = Command::new(BINARY);
        command.args(self.serve_args(at));
        self.spawn_as(at, command);
    }

    /// Starts a node by a command of the test's own (under strace, say).
    pub fn spawn_as(&mut self, at: usize, mut command: Command) {
        assert!(self.nodes[at].child.is_none(), "node {} runs already", self.nodes[at].id);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path(at))
            .expect("a log file");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.nodes[at].child = Some(child.expect("the node starts"));
    }

    pub fn log_path(&self, at: usize) -> PathBuf {
        self.dir.path().join(format!("node-{}.log", self.nodes[at].id))
    }

    /// `kill -9`.
    pub fn kill(&mut self, at: usize) {
        let mut child = self.nodes[at].child.take().expect("the node runs");
        child.kill().expect("a process of our own can be killed");
        child.wait().expect("a killed process ends");
    }

    /// Whatever runs; for what comes after a failure too.
    pub fn kill_all(&mut self) {
        for node in &mut self.nodes {
            if let Some(mut child) = node.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }

    /// Asks a node to stop, and returns its exit code.
    pub fn terminate(&mut self, at: usize) -> Option<i32> {
        self.signal(at, "TERM");
        self.ended(at)
    }

    /// Waits until a node has ended by itself, and returns its exit code.
    pub fn ended(&mut self, at: usize) -> Option<i32> {
        // It stays among the nodes until then: one that does not end is killed with them.
        let child = self.nodes[at].child.as_mut().expect("the node runs");
        let ended = wait_for("the node to stop", || child.try_wait().expect("its status"));
        self.nodes[at].child = None;
        ended.code()
    }

    /// What a node has logged, over all its lives.
    pub fn log(&self, at: usize) -> String {
        std::fs::read_to_string(self.log_path(at)).unwrap_or_default()
    }

    /// Sends STOP or CONT, say.
    pub fn signal(&self, at: usize, signal: &str) {
        let pid = self.nodes[at].pid().to_string();
        let sent = Command::new("kill").args(["-s", signal, &pid]).status().expect("kill runs");
        assert!(sent.success(), "kill -s {signal} {pid}");
        if signal == "STOP" {
            wait_for("the node to stand still", || stopped(&pid).then_some(()));
        }
    }

    pub fn endpoints(&self) -> String {
        self.nodes.iter().map(Node::client).collect::<Vec<_>>().join(",")
    }

    /// The most that a node ever had in memory, in MiB.
    pub fn peak_resident_mib(&self, at: usize) -> u64 {
        let status = format!("/proc/{}/status", self.nodes[at].pid());
        let status = std::fs::read_to_string(status).expect("the node is alive");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("its peak");
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().expect("a number");
        kib / 1024
    }

    /// The sum of a metric over its labels, as the node shows it now; `None` while it does not run.
    pub fn metric(&self, at: usize, name: &str) -> Option<f64> {
        let text = http_get(&self.nodes[at].http(), "/metrics").ok()?;
        let value = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            let full = series.split('{').next()?;
            (full == name || series == name).then(|| value.parse::<f64>().ok())?
        };
        let values: Vec<_> = text.lines().filter_map(value).collect();
        (!values.is_empty()).then(|| values.iter().sum())
    }

    /// Waits until `status --check` finds no problem.
    pub fn wait_until_well(&self) {
        wait_for("all nodes to be well", || {
            (self.cli(&["status", "--check"]).code() == 0).then_some(())
        });
    }

    /// Index of the node that leads, once one does and says so itself.
    pub fn leader(&self) -> usize {
        wait_for("a leader", || {
            let out = self.cli(&["status", "-o", "json", "--timeout", "5s"]);
            let leader = out.json()?.get("leader")?.as_u64()?;
            self.nodes.iter().position(|n| n.id == leader && n.child.is_some())
        })
    }

    /// Runs the CLI against all nodes.
    pub fn cli(&self, args: &[&str]) -> Ran {
        self.cli_at(&self.endpoints(), args)
    }

    pub fn cli_at(&self, endpoints: &str, args: &[&str]) -> Ran {
        let output = Command::new(BINARY)
            .args(["--endpoints", endpoints])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("the CLI runs");
        Ran { args: args.iter().map(|a| a.to_string()).collect(), output }
    }

    /// Registers a worker with ports 40000 to `last` and one GPU of 24 GiB.
    pub fn worker(&self, name: &str, last: u16) {
        let range = format!("service=40000-{last}");
        self.cli(&[
            "worker",
            "register",
            name,
            "--address",
            "127.0.0.1",
            "--range",
            &range,
            "--gpu",
            "memory=24GiB,model=RTX4090",
        ])
        .ok();
    }

    /// Allocates 64 claims as one command of a quarter of a MiB, almost all of it labels.
    pub fn large_gang(&self, worker: &str, prefix: &str) -> Ran {
        let labels: serde_json::Map<_, _> =
            (0..32).map(|i| (format!("k{i:062}"), "v".repeat(63).into())).collect();
        let claims: Vec<_> = (0..64)
            .map(|i| {
                let (name, ports) = (format!("{prefix}-{i}"), serde_json::json!([{ "count": 1 }]));
                serde_json::json!({"name": name, "worker": worker, "ports": ports, "labels": labels})
            })
            .collect();
        let file = self.dir().join("gang.json");
        std::fs::write(&file, serde_json::json!({ "claims": claims }).to_string()).expect("a file");
        self.cli(&["allocate", "-f", &file.display().to_string(), "--timeout", "20s"])
    }

    /// The whole table, linearizably.
    pub fn list(&self) -> Vec<Value> {
        let ran = wait_for("a list", || {
            let ran = self.cli(&["list", "-o", "json", "--timeout", "20s"]);
            (ran.code() == 0).then_some(ran)
        });
        ran.ok().as_array().expect("an array").clone()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking() {
            for at in 0..self.nodes.len() {
                let log = std::fs::read_to_string(self.log_path(at)).unwrap_or_default();
                let lines: Vec<_> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(60)..].join("\n");
                eprintln!("--- node {} said last:\n{tail}", self.nodes[at].id);
            }
        }
    }
}

/// A CLI call that has ended.
pub struct Ran {
    pub args: Vec<String>,
    pub output: Output,
}

impl Ran {
    pub fn code(&self) -> i32 {
        self.output.status.code().unwrap_or(-1)
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    pub fn json(&self) -> Option<Value> {
        serde_json::from_slice(&self.output.stdout).ok()
    }

    /// Its JSON (null where it printed none); the call must have succeeded.
    pub fn ok(&self) -> Value {
        assert_eq!(self.code(), 0, "{:?}: {}", self.args, self.stderr());
        self.json().unwrap_or(Value::Null)
    }

    /// The call must have failed with this code and said this.
    pub fn refused(&self, code: i32, says: &str) {
        let stderr = self.stderr();
        assert_eq!(self.code(), code, "{:?}: {stderr}", self.args);
        assert!(stderr.contains(says), "{:?} should say {says:?}: {stderr}", self.args);
    }
}

/// Does no thread of the process run any more?
fn stopped(pid: &str) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a process of our own");
    tasks.flatten().all(|task| {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
    })
}

/// Polls until there is a value; panics after [`BOUND`].
pub fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(start.elapsed() < BOUND, "waited {BOUND:?} for {what}");
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// A client of all nodes, and the runtime that it lives in.
pub fn client_of(cluster: &Cluster) -> (tokio::runtime::Runtime, Client) {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(1).enable_all().build().expect("a runtime");
    let endpoints = cluster.nodes.iter().map(Node::client).collect();
    let options = Options { timeout: Duration::from_secs(20), ..Options::default() };
    let client = runtime.block_on(async { Client::connect(endpoints, options) });
    (runtime, client.expect("a client"))
}

/// A number from the environment.
pub fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

pub fn http_get(addr: &str, path: &str) -> std::io::Result<String> {
    let mut stream = std::net::TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?; // it may be paused
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// (worker, port) of every allocation in a list.
pub fn ports(allocations: &[Value]) -> Vec<(String, u64)> {
    let mut ports: Vec<_> = allocations
        .iter()
        .flat_map(|a| {
            let worker = a["worker"].as_str().expect("a worker").to_string();
            let numbers = a["ports"].as_array().expect("ports").iter();
            numbers.map(move |p| (worker.clone(), p["number"].as_u64().expect("a number")))
        })
        .collect();
    ports.sort();
    ports
}

/// Every port is held once.
pub fn assert_unique(allocations: &[Value]) {
    let all = ports(allocations);
    let mut unique = all.clone();
    unique.dedup();
    assert_eq!(all, unique, "a port is held twice");
}
