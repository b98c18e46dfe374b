//! `demo --lifecycle`: what becomes of instances that go wrong.
//!
//! A cluster in this process, an agent and supervised programs as processes of their own, with real
//! sockets on this host. One program is killed, one start fails, one is never confirmed, a port is
//! taken from outside, and a supervisor is crashed; each is dealt with before your eyes. At the end
//! everything is given back, and the table is empty.

use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use futures::future::try_join_all;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::embedded::{self, NodePorts};
use super::{Format, Globals, output};
use crate::api::assembly::Server;
use crate::client::{Client, ClientError, Options};
use crate::node::Lifecycle;
use crate::proto::v1;

const WORKER: &str = "sealgpuhost4090";
const RANGE: &str = "service=40000-40015";
const REPLICAS: usize = 4;
/// Longest wait for anything that is shown.
const ACT_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(50);
const LEASE_TTL: &str = "3s";

/// Short, so that a person can watch.
fn lifecycle() -> Lifecycle {
    Lifecycle {
        confirm_within: Duration::from_secs(10),
        zombie_after: Duration::from_secs(4),
        worker_lost_after: Duration::from_secs(10),
        quarantine: Duration::from_secs(300),
    }
}

/// One thing that goes wrong, and what was done about it.
#[derive(Debug, Serialize)]
struct Act {
    what: &'static str,
    outcome: String,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    acts: Vec<Act>,
    /// Allocations that are left when everything was given back.
    leaked: usize,
}

/// What runs on the stage. Whatever is left ends with it.
struct Stage {
    client: Client,
    endpoints: String,
    format: Format,
    acts: Vec<Act>,
}

pub(super) async fn run(globals: Globals) -> anyhow::Result<ExitCode> {
    let dir = tempfile::tempdir()?;
    let ports = [NodePorts { clients: 0, peers: 0, http: None }; 3];
    let servers = embedded::start_with(dir.path(), &ports, &lifecycle()).await?;
    try_join_all(servers.iter().map(Server::enter_cluster)).await?;
    embedded::leader(&servers).await?;
    let endpoints: Vec<_> = servers.iter().map(|s| s.endpoint().to_string()).collect();
    let client = Client::connect(endpoints.clone(), Options::default())?;
    let endpoints = endpoints.join(",");
    let mut stage = Stage { client, endpoints, format: globals.output, acts: Vec::new() };
    let played = stage.play().await;
    for server in servers {
        server.abort().await;
    }
    let leaked = played?;
    let report = Report { acts: stage.acts, leaked };
    output::print(globals.output, &report, || match leaked {
        0 => "everything was given back: the table is empty".to_string(),
        leaked => format!("{leaked} allocations are left"),
    })?;
    Ok(if leaked == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Stage {
    /// Answers with the number of allocations that are left at the end.
    async fn play(&mut self) -> anyhow::Result<usize> {
        let _agent = self.start(&[
            "agent",
            "--worker",
            WORKER,
            "--interval",
            "1s",
            "--address",
            "127.0.0.1",
            "--range",
            RANGE,
        ])?;
        self.until("the worker to be there", async |stage| {
            Ok(stage.client.worker_get(WORKER, None).await.is_ok().then_some(()))
        })
        .await?;
        let mut replicas = Vec::new();
        for i in 1..=REPLICAS {
            replicas.push((format!("qwen2.5-{i}"), self.replica(&format!("qwen2.5-{i}"), false)?));
        }
        let began = Instant::now();
        let mut held = Vec::new();
        for (name, _) in &replicas {
            held.push(self.bound(name).await?);
        }
        let numbers: Vec<_> = held.iter().map(|a| number(a).to_string()).collect();
        self.act("four replicas start", format!("they listen on {}", numbers.join(", ")), began)?;

        self.killed(&held[0]).await?;
        self.failed_start().await?;
        self.never_confirmed().await?;
        self.taken_from_outside().await?;
        self.crashed_supervisor(&held[1], &mut replicas[1].1).await?;

        let began = Instant::now();
        for (_, supervisor) in &replicas[2..] {
            signal(supervisor.id(), Signal::TERM)?;
        }
        let left = self.empty().await?;
        self.act("the others are told to stop", format!("{left} allocations are left"), began)?;
        Ok(left)
    }

    /// A program dies, and its supervisor gives its port back.
    async fn killed(&mut self, held: &v1::Allocation) -> anyhow::Result<()> {
        let began = Instant::now();
        signal(process_of(held), Signal::KILL)?;
        self.gone(&held.name).await?;
        let outcome = format!("its supervisor gave port {} back", number(held));
        self.act("a replica is killed (kill -9)", outcome, began)
    }

    /// A start that fails gives its port back at once.
    async fn failed_start(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut supervisor = self.replica("qwen2.5-fails", true)?;
        let ended = supervisor.wait().await?;
        self.gone("qwen2.5-fails").await?;
        let code = ended.code().unwrap_or(-1);
        let outcome =
            format!("its port was given back, and `run` ended as the program did ({code})");
        self.act("a replica fails to start", outcome, began)
    }

    /// A scheduler allocates and is never heard again.
    async fn never_confirmed(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let name = "qwen2.5-forgotten";
        let ports = Some(v1::port_request::Ports::Count(1));
        let claim = v1::Claim {
            name: name.into(),
            placement: Some(v1::claim::Placement::Worker(WORKER.into())),
            ports: vec![v1::PortRequest { ports, ..Default::default() }],
            confirm_within_ms: 1000,
            ..Default::default()
        };
        self.client.allocate(vec![claim]).await?;
        let why = self.gone(name).await?;
        self.act("a start is never confirmed", why, began)
    }

    /// Something else takes a free port; it is not given until it is free again.
    async fn taken_from_outside(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        let worker = self.client.worker_get(WORKER, None).await?.worker.unwrap_or_default();
        let range = worker.ranges.first().context("a range")?;
        let mut stranger = None;
        for port in (range.first..=range.last).rev() {
            if let Ok(listener) = TcpListener::bind(("127.0.0.1", port as u16)).await {
                stranger = Some((port, listener));
                break;
            }
        }
        let (port, listener) = stranger.context("a free port")?;
        self.until("the stranger to be seen", async |stage| stage.quarantined(port, true).await)
            .await?;
        drop(listener);
        self.until("its port to be free", async |stage| stage.quarantined(port, false).await)
            .await?;
        let outcome = format!("port {port} was quarantined, and lifted when it was free again");
        self.act("something else takes a managed port", outcome, began)
    }

    async fn quarantined(&self, port: u32, wanted: bool) -> anyhow::Result<Option<()>> {
        let worker = self.client.worker_get(WORKER, None).await?.worker.unwrap_or_default();
        let all = worker.ranges.iter().flat_map(|range| &range.quarantined);
        let is = all.into_iter().any(|quarantined| quarantined.number == port);
        Ok((is == wanted).then_some(()))
    }

    /// A supervisor dies: nobody releases, and the evidence of the agent decides.
    async fn crashed_supervisor(
        &mut self,
        held: &v1::Allocation,
        supervisor: &mut Child,
    ) -> anyhow::Result<()> {
        let began = Instant::now();
        signal(supervisor.id(), Signal::KILL)?;
        supervisor.wait().await?;
        let why = self.gone(&held.name).await?;
        self.act("a supervisor is crashed (kill -9)", why, began)
    }

    fn start(&self, args: &[&str]) -> anyhow::Result<Child> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["--endpoints", &self.endpoints]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(command.kill_on_drop(true).spawn()?)
    }

    fn replica(&self, name: &str, fails: bool) -> anyhow::Result<Child> {
        let program = std::env::current_exe()?.display().to_string();
        let run = ["run", name, "--worker", WORKER, "--ports", "1", "--lease-ttl", LEASE_TTL, "--"];
        let replica = [program.as_str(), "replica", "--port", "{port}"];
        let fail: &[&str] = if fails { &["--fail"] } else { &[] };
        self.start(&[&run[..], &replica, fail].concat())
    }

    /// Waits until it is confirmed.
    async fn bound(&self, name: &str) -> anyhow::Result<v1::Allocation> {
        self.until(&format!("{name} to listen"), async |stage| {
            let held = stage.client.get(name, None).await.ok().and_then(|got| got.allocation);
            Ok(held.filter(|held| held.phase() == v1::Phase::Bound))
        })
        .await
    }

    /// Waits until nothing is held under the name; answers with why, as far as the table says.
    async fn gone(&self, name: &str) -> anyhow::Result<String> {
        self.until(&format!("{name} to be gone"), async |stage| {
            match stage.client.get(name, None).await {
                Ok(_) => Ok(None),
                Err(ClientError::Refused(refused))
                    if refused.status.code() == tonic::Code::NotFound =>
                {
                    let text = refused.status.message();
                    let why = text.split_once(": ").map_or("released", |(_, why)| why);
                    Ok(Some(why.to_string()))
                }
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    async fn empty(&self) -> anyhow::Result<usize> {
        let deadline = Instant::now() + ACT_MAX;
        loop {
            let left = self.client.list(v1::ListRequest::default()).await?.items.len();
            if left == 0 || Instant::now() >= deadline {
                return Ok(left);
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn until<T>(
        &self,
        what: &str,
        mut look: impl AsyncFnMut(&Stage) -> anyhow::Result<Option<T>>,
    ) -> anyhow::Result<T> {
        let deadline = Instant::now() + ACT_MAX;
        loop {
            if let Some(seen) = look(self).await? {
                return Ok(seen);
            }
            if Instant::now() >= deadline {
                bail!("waited {ACT_MAX:?} for {what}");
            }
            sleep(LOOK_EVERY).await;
        }
    }

    fn act(&mut self, what: &'static str, outcome: String, began: Instant) -> anyhow::Result<()> {
        let seconds = began.elapsed().as_secs_f64();
        if self.format == Format::Table {
            output::emit(&format!("{what:<38} {outcome} ({seconds:.1} s)\n"))?;
        }
        self.acts.push(Act { what, outcome, seconds });
        Ok(())
    }
}

fn number(held: &v1::Allocation) -> u32 {
    held.ports.first().map_or(0, |port| port.number)
}

/// The process that `run` confirmed.
fn process_of(held: &v1::Allocation) -> Option<u32> {
    match held.liveness.as_ref()?.handle.as_ref()? {
        v1::liveness::Handle::Process(process) => Some(process.pid),
        _ => None,
    }
}

/// Only ever of a process that this demo started.
fn signal(pid: Option<u32>, signal: Signal) -> anyhow::Result<()> {
    let pid = pid.and_then(|pid| Pid::from_raw(pid.try_into().ok()?));
    Ok(kill_process(pid.ok_or_else(|| anyhow!("it has ended already"))?, signal)?)
}
