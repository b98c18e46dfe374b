//! Three nodes of portwarden.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use portwarden::cli::bench::load::Caller;
use portwarden::cli::bench::{Args, Bench, Workload, leader_first};
use portwarden::client::{Client, Options};
use portwarden::proto::v1;
use rustix::process::Signal;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::processes::{Process, free_ports};

pub struct Ours {
    binary: PathBuf,
    dir: PathBuf,
    ports: Vec<u16>,
    nodes: Mutex<Vec<Process>>,
}

/// What a workload left in the table.
pub struct Left {
    bench: Bench,
    args: Args,
}

/// What a node's `/metrics` said at one moment.
pub struct Metrics(String);

impl Metrics {
    /// Over all labels.
    pub fn sum(&self, name: &str) -> f64 {
        let of = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            (series.split('{').next() == Some(name)).then(|| value.parse::<f64>().ok())?
        };
        self.0.lines().filter_map(of).sum()
    }

    /// Of a histogram: the sum of all values, and how many they are.
    pub fn sum_and_count(&self, name: &str) -> [f64; 2] {
        ["sum", "count"].map(|part| self.sum(&format!("{name}_{part}")))
    }
}

impl Left {
    /// Of the names of all that it made.
    pub fn prefix(&self) -> &str {
        &self.bench.prefix
    }
}

impl Ours {
    pub async fn start(binary: &Path, dir: &Path) -> anyhow::Result<Ours> {
        let ports = free_ports(9)?;
        let (binary, dir) = (binary.to_path_buf(), dir.to_path_buf());
        let ours = Ours { binary, dir, ports, nodes: Mutex::default() };
        for at in 0..3 {
            let node = ours.start_node(at)?;
            ours.nodes().push(node);
        }
        ours.healthy().await?;
        Ok(ours)
    }

    fn nodes(&self) -> MutexGuard<'_, Vec<Process>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_node(&self, at: usize) -> anyhow::Result<Process> {
        let peer = |at: usize| format!("127.0.0.1:{}", self.ports[3 + at]);
        let all = (0..3).map(|at| format!("{}={}", at + 1, peer(at))).collect::<Vec<_>>();
        let mut command = Command::new(&self.binary);
        command
            .args(["serve", "--id", &(at + 1).to_string(), "--listen", &self.endpoints()[at]])
            .args(["--listen-peer", &peer(at), "--initial-cluster", &all.join(",")])
            .args(["--listen-http", &self.http(at)])
            .args(["--log-level", "warn", "--data-dir"])
            .arg(self.dir.join(format!("portwarden-{at}")));
        Process::start(&mut command, &self.dir.join(format!("portwarden-{at}.log")))
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.ports[..3].iter().map(|port| format!("127.0.0.1:{port}")).collect()
    }

    fn http(&self, at: usize) -> String {
        format!("127.0.0.1:{}", self.ports[6 + at])
    }

    /// Of this node alone.
    pub fn client_at(&self, at: usize) -> anyhow::Result<Client> {
        Ok(Client::connect(vec![self.endpoints()[at].clone()], Options::default())?)
    }

    pub async fn metrics(&self, at: usize) -> anyhow::Result<Metrics> {
        Ok(Metrics(self.http_get(at, "/metrics").await?))
    }

    async fn http_get(&self, at: usize, path: &str) -> anyhow::Result<String> {
        let mut stream = tokio::net::TcpStream::connect(self.http(at)).await?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::ensure!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer:.40}");
        Ok(answer)
    }

    fn stat(&self, at: usize) -> anyhow::Result<procfs::process::Stat> {
        Ok(procfs::process::Process::new(self.nodes()[at].pid())?.stat()?)
    }

    /// Processor time that the node has used.
    pub fn cpu_seconds(&self, at: usize) -> anyhow::Result<f64> {
        let stat = self.stat(at)?;
        Ok((stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64)
    }

    pub fn resident_bytes(&self, at: usize) -> anyhow::Result<f64> {
        Ok((self.stat(at)?.rss * procfs::page_size()) as f64)
    }

    /// Of the node's data directory.
    pub fn disk_bytes(&self, at: usize) -> anyhow::Result<f64> {
        let mut dirs = vec![self.dir.join(format!("portwarden-{at}"))];
        let mut bytes = 0;
        while let Some(dir) = dirs.pop() {
            for item in std::fs::read_dir(dir)? {
                let item = item?;
                match item.metadata() {
                    Ok(found) if found.is_dir() => dirs.push(item.path()),
                    Ok(found) => bytes += found.len(),
                    Err(_) => {} // it was purged meanwhile
                }
            }
        }
        Ok(bytes as f64)
    }

    pub fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::connect(self.endpoints(), Options::default())?)
    }

    pub async fn healthy(&self) -> anyhow::Result<v1::StatusResponse> {
        let client = self.client()?.with_timeout(Duration::from_secs(2));
        for _ in 0..300 {
            match client.status().await {
                Ok(status) if status.problems.is_empty() && status.leader != 0 => {
                    return Ok(status);
                }
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
        anyhow::bail!(
            "portwarden is not healthy after 30 s: see the logs in {}",
            self.dir.display()
        )
    }

    pub async fn term(&self) -> anyhow::Result<u64> {
        Ok(self.healthy().await?.term)
    }

    /// Index of the node that leads.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        Ok(self.healthy().await?.leader as usize - 1)
    }

    pub fn kill(&self, at: usize) {
        self.nodes()[at].kill();
    }

    pub fn signal(&self, at: usize, signal: Signal) -> io::Result<()> {
        self.nodes()[at].signal(signal)
    }

    /// Returns when the node says that it is ready.
    pub async fn restart_until_ready(&self, at: usize) -> anyhow::Result<()> {
        let node = self.start_node(at)?;
        self.nodes()[at] = node;
        for _ in 0..6000 {
            if self.http_get(at, "/readyz").await.is_ok() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::bail!("node {} is not ready after two minutes", at + 1)
    }

    pub async fn restart(&self, at: usize) -> anyhow::Result<()> {
        let node = self.start_node(at)?;
        self.nodes()[at] = node;
        self.healthy().await.map(drop)
    }

    pub async fn callers(
        &self,
        name: &str,
        clients: u32,
    ) -> anyhow::Result<(Vec<Box<dyn Caller>>, Option<Left>)> {
        self.callers_on(Vec::new(), name, clients).await
    }

    /// On these workers, which there are; none: on workers of its own.
    pub async fn callers_on(
        &self,
        on: Vec<String>,
        name: &str,
        clients: u32,
    ) -> anyhow::Result<(Vec<Box<dyn Caller>>, Option<Left>)> {
        let workload = match name {
            "session" | "hot-session" | "select" | "gang8" | "gang64" => Workload::Session,
            "get" => Workload::Get,
            "get-session" => Workload::GetSession,
            "get-stale" => Workload::GetStale,
            _ => Workload::Allocate,
        };
        // Sessions: `clients` commands are under way in all.
        let (callers, batch) = match (name, clients) {
            ("hot-session", _) => (64, clients / 64),
            ("session", 1) => (1, 1),
            ("select", _) => (8, clients / 8),
            ("session", 256) => (4, 64),
            ("session", ..=4096) => (8, clients / 8),
            ("session", _) => (clients / 256, 256),
            ("gang8" | "gang64", _) => (8, clients / 8),
            _ => (clients, 1),
        };
        let args = Args {
            workload,
            clients: callers,
            seconds: 0,
            hot: name.starts_with("hot"),
            spread: !name.starts_with("hot"),
            workers: 1000,
            by_label: name == "select",
            gang: match name {
                "gang8" => 8,
                "gang64" => 64,
                _ => 1,
            },
            ports: if name.starts_with("gang") { 8 } else { 1 },
            batch,
            connections: if workload == Workload::Session { 2 } else { 4 },
        };
        let client = self.client()?;
        let run: String = client.fresh_uid().chars().take(8).collect();
        let endpoints = leader_first(&client, &self.endpoints()).await?;
        let timeout = Duration::from_secs(10);
        let bench = Bench { prefix: format!("bench-{run}-"), endpoints, timeout, on };
        bench.register(&args).await?;
        let callers = bench.callers(&args).await?;
        Ok((callers, Some(Left { bench, args })))
    }

    pub async fn clean_up(&self, left: Option<Left>) -> anyhow::Result<()> {
        match left {
            Some(Left { bench, args }) => bench.clean_up(&args).await,
            None => Ok(()),
        }
    }
}
