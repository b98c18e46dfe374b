//! How long nothing is served: when the leader is killed, and when it is moved.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use portwarden::cli::bench::callers::Pairs;
use portwarden::cli::bench::load::Caller as _;
use portwarden::cli::bench::{self, spec};
use portwarden::client::{Client, ClientError, Options};
use portwarden::proto::v1;
use serde::Serialize;
use tokio::time::Instant;

use super::etcd::Etcd;
use super::ours::Ours;
use super::report::Failovers;

const WORKER: &str = "failover";
/// One attempt at one node.
const ATTEMPT: Duration = Duration::from_millis(200);
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

pub async fn of_both(
    mut ours: Ours,
    mut etcd: Etcd,
    times: u32,
    moved: &mut LeaderMove,
) -> anyhow::Result<Failovers> {
    *moved = move_leader(&ours, times).await?;
    let mut failovers = Failovers::default();
    for time in 0..times {
        failovers.portwarden.push(of_ours(&mut ours).await?);
        failovers.etcd.push(of_etcd(&mut etcd).await?);
        eprintln!(
            "failover {}/{times}: portwarden {:.0} ms, etcd {:.0} ms",
            time + 1,
            failovers.portwarden.last().unwrap_or(&0.0),
            failovers.etcd.last().unwrap_or(&0.0)
        );
    }
    Ok(failovers)
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// From the kill of the leader to the next acknowledged allocation, asked for at the nodes that live.
async fn of_ours(ours: &mut Ours) -> anyhow::Result<f64> {
    let leader = ours.leader().await?;
    let mut endpoints = ours.endpoints();
    endpoints.remove(leader);
    let options = Options { attempt_timeout: ATTEMPT, ..Options::default() };
    let client = Client::connect(endpoints, options)?;
    client.worker_register(WORKER, worker()).await?;
    pair(&client, "before").await?;
    ours.kill(leader);
    let killed = Instant::now();
    let granted = client.allocate(vec![claim("after")]).await?;
    let took = millis(killed);
    for held in granted.allocations {
        client.release(&held.name, held.token).await?;
    }
    ours.restart(leader).await?;
    Ok(took)
}

async fn of_etcd(etcd: &mut Etcd) -> anyhow::Result<f64> {
    let leader = etcd.leader().await?;
    let others: Vec<usize> = (0..3).filter(|at| *at != leader).collect();
    etcd.put(others[0], Duration::from_secs(2)).await;
    etcd.kill(leader);
    let killed = Instant::now();
    let mut at = 0;
    while !etcd.put(others[at % 2], ATTEMPT).await {
        at += 1;
    }
    let took = millis(killed);
    etcd.restart(leader).await?;
    Ok(took)
}

/// What callers that write all the time meet, while the lead goes from node to node, and for as long
/// before while it stays.
async fn move_leader(ours: &Ours, times: u32) -> anyhow::Result<LeaderMove> {
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
            let mut pairs = Pairs { client, claims, held: Vec::new() };
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
