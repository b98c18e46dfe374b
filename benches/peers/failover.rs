//! How long nothing is served: when the leader is killed, and when it is moved.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use portwarden::cli::bench::callers::{Pairs, Turns};
use portwarden::cli::bench::load::Caller as _;
use portwarden::cli::bench::{self, spec};
use portwarden::client::{Client, ClientError, Options};
use portwarden::proto::v1;
use rustix::process::Signal;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::etcd::Etcd;
use super::ours::Ours;
use super::report::Failovers;

const WORKER: &str = "failover";
/// One attempt at one node.
const ATTEMPT: Duration = Duration::from_millis(200);
/// Between two of them.
const AGAIN_AFTER: Duration = Duration::from_millis(2);
const SERVED_WITHIN: Duration = Duration::from_secs(60);
const MOVE_CALLERS: usize = 16;
const BETWEEN_MOVES: Duration = Duration::from_millis(500);

#[derive(Debug, Default, Serialize)]
pub struct LeaderMove {
    pub moves: u32,
    pub requests: u64,
    pub failed: u64,
    /// Longest that any caller waited for one answer.
    pub longest_stall_ms: f64,
    /// The same, for as long before, while nothing was moved.
    pub longest_without_ms: f64,
}

/// How a leader goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Its kernel closes its connections, and its peers hear of it.
    Killed,
    /// Nothing says that it is gone, as when its power or its network fails.
    Stopped,
}

pub async fn of_both(
    ours: &Ours,
    etcd: &mut Etcd,
    times: u32,
    loss: Loss,
) -> anyhow::Result<Failovers> {
    let mut failovers = Failovers::default();
    for time in 1..=times {
        let (portwarden, etcd) = (of_ours(ours, loss).await?, of_etcd(etcd, loss).await?);
        failovers.portwarden.push(portwarden);
        failovers.etcd.push(etcd);
        eprintln!(
            "leader {loss:?} {time}/{times}: portwarden {portwarden:.0} ms, etcd {etcd:.0} ms"
        );
    }
    Ok(failovers)
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// Until the next acknowledged allocation, asked for at the nodes that live.
async fn of_ours(ours: &Ours, loss: Loss) -> anyhow::Result<f64> {
    let leader = ours.leader().await?;
    let mut endpoints = ours.endpoints();
    endpoints.remove(leader);
    let options = Options { attempt_timeout: ATTEMPT, ..Options::default() };
    let client = Client::connect(endpoints, options)?;
    client.worker_register(WORKER, worker()).await?;
    pair(&client, "before").await?;
    let began = Instant::now();
    match loss {
        Loss::Killed => ours.kill(leader),
        Loss::Stopped => ours.signal(leader, Signal::STOP)?,
    }
    let granted = client.allocate(vec![claim("after")]).await?;
    let took = millis(began);
    for held in granted.allocations {
        client.release(&held.name, held.token).await?;
    }
    match loss {
        Loss::Killed => ours.restart(leader).await?,
        Loss::Stopped => ours.signal(leader, Signal::CONT)?,
    }
    ours.healthy().await?;
    Ok(took)
}

async fn of_etcd(etcd: &mut Etcd, loss: Loss) -> anyhow::Result<f64> {
    let leader = etcd.leader().await?;
    let others: Vec<usize> = (0..3).filter(|at| *at != leader).collect();
    etcd.put(others[0], Duration::from_secs(2)).await;
    let began = Instant::now();
    match loss {
        Loss::Killed => etcd.kill(leader),
        Loss::Stopped => etcd.signal(leader, Signal::STOP)?,
    }
    let mut at = 0;
    while !etcd.put(others[at % 2], ATTEMPT).await {
        anyhow::ensure!(began.elapsed() < SERVED_WITHIN, "etcd takes no put without its leader");
        at += 1;
        sleep(AGAIN_AFTER).await; // one that is refused at once is not asked in a circle
    }
    let took = millis(began);
    match loss {
        Loss::Killed => etcd.restart(leader).await?,
        Loss::Stopped => etcd.signal(leader, Signal::CONT)?,
    }
    etcd.leader().await?;
    Ok(took)
}

/// What callers that write all the time meet, while the lead goes from node to node, and for as long
/// before while it stays.
pub async fn move_leader(ours: &Ours, times: u32) -> anyhow::Result<LeaderMove> {
    ours.client()?.worker_register(WORKER, worker()).await?;
    let stays = under_load(ours, async {
        tokio::time::sleep(BETWEEN_MOVES * (times + 1)).await;
        Ok(())
    });
    let ((), before) = stays.await?;
    let client = ours.client()?;
    let moving = under_load(ours, async {
        let mut moves = 0;
        for time in 0..times {
            tokio::time::sleep(BETWEEN_MOVES).await;
            let leader = ours.leader().await? as u64 + 1;
            let to = (leader + u64::from(time)) % 3 + 1;
            if to != leader {
                client.transfer_leader(to).await?;
                moves += 1;
            }
        }
        tokio::time::sleep(BETWEEN_MOVES).await;
        Ok(moves)
    });
    let (moves, met) = moving.await?;
    Ok(LeaderMove {
        moves,
        requests: met.requests,
        failed: met.failed,
        longest_stall_ms: met.longest_us as f64 / 1000.0,
        longest_without_ms: before.longest_us as f64 / 1000.0,
    })
}

/// What callers met.
#[derive(Debug, Default)]
struct Met {
    requests: u64,
    failed: u64,
    longest_us: u64,
}

/// Does something while callers write.
async fn under_load<T>(
    ours: &Ours,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<(T, Met)> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut callers = Vec::new();
    for caller in 0..MOVE_CALLERS {
        let (client, stop) = (ours.client()?, stop.clone());
        callers.push(tokio::spawn(async move {
            let claims = vec![claim(&format!("mover-{caller}"))];
            let turns = Turns::new([].into(), 0);
            let mut pairs = Pairs { client, claims, turns, held: Vec::new() };
            let mut met = Met::default();
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                let done = pairs.call().await;
                met.requests += 1;
                met.failed += u64::from(done.is_err());
                met.longest_us = met.longest_us.max(began.elapsed().as_micros() as u64);
            }
            for held in std::mem::take(&mut pairs.held) {
                pairs.client.release(&held.name, held.token).await?;
            }
            Ok::<_, ClientError>(met)
        }));
    }
    let worked = work.await;
    stop.store(true, Ordering::Relaxed);
    let mut all = Met::default();
    for caller in callers {
        let met = caller.await??;
        all.requests += met.requests;
        all.failed += met.failed;
        all.longest_us = all.longest_us.max(met.longest_us);
    }
    Ok((worked?, all))
}

fn worker() -> v1::WorkerSpec {
    spec(40_000, 40_999)
}

fn claim(name: &str) -> v1::Claim {
    bench::claim(&format!("failover-{name}"), WORKER, 1)
}

async fn pair(client: &Client, name: &str) -> Result<(), ClientError> {
    for held in client.allocate(vec![claim(name)]).await?.allocations {
        client.release(&held.name, held.token).await?;
    }
    Ok(())
}
