//! Three nodes of portwarden.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use portwarden::cli::bench::load::Caller;
use portwarden::cli::bench::{Args, Bench, Workload, leader_first};
use portwarden::client::{Client, Options};
use portwarden::proto::v1;

use super::processes::{Process, free_ports};

pub struct Ours {
    binary: PathBuf,
    dir: PathBuf,
    ports: Vec<u16>,
    nodes: Vec<Process>,
}

/// What a workload left in the table.
pub struct Left {
    bench: Bench,
    args: Args,
}

impl Ours {
    pub async fn start(binary: &Path, dir: &Path) -> anyhow::Result<Ours> {
        let ports = free_ports(6)?;
        let (binary, dir) = (binary.to_path_buf(), dir.to_path_buf());
        let mut ours = Ours { binary, dir, ports, nodes: Vec::new() };
        for at in 0..3 {
            let node = ours.start_node(at)?;
            ours.nodes.push(node);
        }
        ours.healthy().await?;
        Ok(ours)
    }

    fn start_node(&self, at: usize) -> anyhow::Result<Process> {
        let peer = |at: usize| format!("127.0.0.1:{}", self.ports[3 + at]);
        let all = (0..3).map(|at| format!("{}={}", at + 1, peer(at))).collect::<Vec<_>>();
        let mut command = Command::new(&self.binary);
        command
            .args(["serve", "--id", &(at + 1).to_string(), "--listen", &self.endpoints()[at]])
            .args(["--listen-peer", &peer(at), "--initial-cluster", &all.join(",")])
            .args(["--log-level", "warn", "--data-dir"])
            .arg(self.dir.join(format!("portwarden-{at}")));
        Process::start(&mut command, &self.dir.join(format!("portwarden-{at}.log")))
    }

    pub fn endpoints(&self) -> Vec<String> {
        self.ports[..3].iter().map(|port| format!("127.0.0.1:{port}")).collect()
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

    /// Index of the node that leads.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        Ok(self.healthy().await?.leader as usize - 1)
    }

    pub fn kill(&mut self, at: usize) {
        self.nodes[at].kill();
    }

    pub async fn restart(&mut self, at: usize) -> anyhow::Result<()> {
        self.nodes[at] = self.start_node(at)?;
        self.healthy().await.map(drop)
    }

    pub async fn callers(
        &self,
        name: &str,
        clients: u32,
    ) -> anyhow::Result<(Vec<Box<dyn Caller>>, Option<Left>)> {
        let workload = match name {
            "session" | "gang8" | "gang64" => Workload::Session,
            "get" => Workload::Get,
            "get-stale" => Workload::GetStale,
            _ => Workload::Allocate,
        };
        // Sessions: `clients` commands are under way in all.
        let (callers, batch) = match (name, clients) {
            ("session", 256) => (4, 64),
            ("session", _) => (8, clients / 8),
            ("gang8" | "gang64", _) => (8, clients / 8),
            _ => (clients, 1),
        };
        let args = Args {
            workload,
            clients: callers,
            seconds: 0,
            hot: name == "hot",
            spread: name != "hot",
            workers: 1000,
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
        let bench = Bench { prefix: format!("bench-{run}-"), endpoints, timeout };
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
