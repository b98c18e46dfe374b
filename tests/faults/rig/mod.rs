//! A cluster whose every node, client and watcher is on a host of its own, and what can be done to it.

pub mod disk;
pub mod net;
pub mod proxy;

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use disk::Disk;
use net::{Host, Net};
use proxy::Proxy;

use crate::forgetting::Cut;
use crate::history::{Record, Recorder};
use crate::real::Site;

/// A leader hands over first, and calls under way are answered.
const STOP_MAX: Duration = Duration::from_secs(8);
const LIBFAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    Runs,
    Paused,
    Dead,
}

pub struct Node {
    pub id: u64,
    pub host: Host,
    pub disk: Disk,
    pub life: Life,
    /// It was asked to leave the cluster: it may end by itself.
    pub leaving: bool,
    /// It did not begin the cluster, but joined it later.
    joined: bool,
    /// Before its peer port.
    pub proxy: Option<Proxy>,
    child: Option<Child>,
}

const PEER_PORT: u16 = 7701;
/// Of the proxy before it.
const PROXY_PORT: u16 = 7711;

impl Node {
    pub fn client(&self) -> String {
        format!("{}:7601", self.host.address)
    }

    fn listens_for_peers(&self) -> String {
        format!("{}:{PEER_PORT}", self.host.address)
    }

    /// Where peers reach it.
    fn peer(&self) -> String {
        let port = if self.proxy.is_some() { PROXY_PORT } else { PEER_PORT };
        format!("{}:{port}", self.host.address)
    }

    pub fn http(&self) -> String {
        format!("{}:7801", self.host.address)
    }
}

/// What the run is made of; dropped in this order.
pub struct Rig {
    pub site: Option<Site>,
    pub nodes: Vec<Node>,
    pub net: Net,
    pub dir: PathBuf,
    pub recorder: Arc<Recorder>,
    binary: PathBuf,
    /// More flags of `serve`.
    flags: Vec<String>,
    /// Nodes see a wall clock that can be put wrong.
    faketime: bool,
}

pub struct Options {
    pub nodes: u64,
    pub binary: PathBuf,
    pub flags: Vec<String>,
    pub faketime: bool,
    /// Links between nodes can be slow.
    pub proxies: bool,
}

impl Rig {
    /// Hosts and directories; nothing is started. `disk` says on what each node keeps its data.
    pub fn prepare(
        dir: &Path,
        options: Options,
        recorder: Arc<Recorder>,
        disk: impl Fn(u64, &Path) -> Result<Disk, String>,
    ) -> Result<Rig, String> {
        let mut net = Net::create()?;
        let mut nodes = Vec::new();
        for id in 1..=options.nodes {
            let host = net.host(&format!("node{id}"))?;
            let disk = disk(id, &dir.join(format!("node-{id}")))?;
            let proxy = options.proxies.then(|| Proxy::start(&host, PROXY_PORT, PEER_PORT));
            nodes.push(Node {
                id,
                proxy,
                host,
                disk,
                life: Life::Dead,
                leaving: false,
                joined: false,
                child: None,
            });
        }
        let Options { binary, flags, faketime, .. } = options;
        let (dir, faketime) = (dir.to_path_buf(), faketime && Path::new(LIBFAKETIME).exists());
        Ok(Rig { site: None, nodes, net, dir, recorder, binary, flags, faketime })
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.nodes.iter().map(Node::client).collect()
    }

    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        self.nodes.iter().map(|node| node.host.address).collect()
    }

    pub fn has_faketime(&self) -> bool {
        self.faketime
    }

    pub fn log_path(&self, id: u64) -> PathBuf {
        self.dir.join(format!("node-{id}.log"))
    }

    /// Where libfaketime reads by how much the clock of a node is wrong.
    pub fn clock_path(&self, id: u64) -> PathBuf {
        self.dir.join(format!("node-{id}.clock"))
    }

    pub fn start(&mut self, at: usize) {
        let entry = self.entry(at);
        let node = &self.nodes[at];
        let log = File::options().create(true).append(true).open(self.log_path(node.id));
        let mut command = Command::new(&self.binary);
        command
            .args(["serve", "--insecure", "--id", &node.id.to_string(), "--data-dir"])
            .arg(node.disk.data())
            .args(["--listen", &node.client(), "--listen-peer", &node.listens_for_peers()])
            .args(["--advertise-peer", &node.peer()])
            .args(["--listen-http", &node.http()])
            .args(entry)
            .args(&self.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("a log file"));
        if self.faketime {
            let clock = self.clock_path(node.id);
            if !clock.exists() {
                std::fs::write(&clock, "+0").expect("a file for the clock");
            }
            command
                .env("LD_PRELOAD", LIBFAKETIME)
                .env("FAKETIME_TIMESTAMP_FILE", clock)
                .env("FAKETIME_NO_CACHE", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        node.host.run_in(&mut command);
        let child = command.spawn().expect("the node starts");
        let node = &mut self.nodes[at];
        (node.child, node.life) = (Some(child), Life::Runs);
    }

    /// How it enters the cluster: read at the first start only.
    fn entry(&self, at: usize) -> [String; 2] {
        let others = self.nodes.iter().filter(|node| node.id != self.nodes[at].id);
        match self.nodes[at].joined {
            true => ["--join".into(), others.map(Node::peer).next().unwrap_or_default()],
            false => {
                let all = (1..).zip(&self.nodes).map(|(id, node)| format!("{id}={}", node.peer()));
                ["--initial-cluster".into(), all.collect::<Vec<_>>().join(",")]
            }
        }
    }

    /// Another node takes the place of one that was removed: with nothing on its disk, under an id
    /// that was never used.
    pub fn replace(&mut self, at: usize) -> Result<(), String> {
        self.kill(at, None);
        let id = self.nodes.iter().map(|node| node.id).max().unwrap_or(0) + 1;
        let disk = Disk::plain(&self.dir.join(format!("node-{id}")))?;
        let node = &mut self.nodes[at];
        (node.id, node.disk, node.leaving, node.joined) = (id, disk, false, true);
        self.start(at);
        Ok(())
    }

    /// The command line, as an operator uses it. To be called on a thread that is on a host.
    pub fn cli(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(["--endpoints", &self.endpoints().join(",")]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        command
    }

    /// Roles by id, if anybody answers.
    pub fn members(&self) -> Option<BTreeMap<u64, String>> {
        let listed =
            self.cli(&["member", "list", "-o", "json", "--timeout", "5s"]).output().ok()?;
        let members: serde_json::Value = serde_json::from_slice(&listed.stdout).ok()?;
        let role = |member: &serde_json::Value| {
            Some((member["id"].as_u64()?, member["role"].as_str()?.to_string()))
        };
        members.as_array()?.iter().map(role).collect()
    }

    /// `kill -9`; with `cut`, the power of its disk goes too.
    pub fn kill(&mut self, at: usize, cut: Option<Cut>) {
        let node = &mut self.nodes[at];
        if let Some(mut child) = node.child.take() {
            let _ = child.kill(); // it may have ended by itself
            let _ = child.wait();
        }
        node.life = Life::Dead;
        if let Some(cut) = cut {
            node.disk.cut(cut);
        }
    }

    /// SIGTERM, and its end; who takes too long is killed.
    pub fn stop(&mut self, at: usize) {
        self.signal(at, libc::SIGTERM);
        let began = std::time::Instant::now();
        while began.elapsed() < STOP_MAX
            && let Some(child) = &mut self.nodes[at].child
            && let Ok(None) = child.try_wait()
        {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.kill(at, None);
    }

    pub fn pause(&mut self, at: usize) {
        self.signal(at, libc::SIGSTOP);
        self.nodes[at].life = Life::Paused;
    }

    pub fn go_on(&mut self, at: usize) {
        if self.nodes[at].life == Life::Paused {
            self.signal(at, libc::SIGCONT);
            self.nodes[at].life = Life::Runs;
        }
    }

    fn signal(&self, at: usize, signal: libc::c_int) {
        if let Some(child) = &self.nodes[at].child {
            // SAFETY: a system call; the process is a child that was not waited for.
            unsafe { libc::kill(child.id() as libc::pid_t, signal) };
        }
    }

    /// Looks for nodes that ended by themselves. Where the disk was full that is in order.
    pub fn look_after(&mut self) {
        for node in &mut self.nodes {
            let ended = node.child.as_mut().and_then(|child| child.try_wait().ok().flatten());
            let Some(status) = ended else { continue };
            (node.child, node.life) = (None, Life::Dead);
            let code = status.code().unwrap_or(-1);
            let full = node.disk.is_small() && code == portwarden::store::FATAL_EXIT;
            let id = node.id;
            match (full, node.leaving) {
                (true, _) => self.recorder.fault(format!("node {id} ended: its disk is full")),
                (_, true) => self.recorder.fault(format!("node {id} has left ({code})")),
                _ => self.recorder.put(|at| Record::Ended { at, node: id, code }),
            }
        }
    }

    /// Indexes of the nodes that run, in order.
    pub fn running(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|at| self.nodes[*at].life == Life::Runs).collect()
    }

    pub fn majority(&self) -> usize {
        self.nodes.len() / 2 + 1
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.site = None;
        for at in 0..self.nodes.len() {
            self.kill(at, None);
        }
    }
}
