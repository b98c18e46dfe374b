//! How long nothing is served: when the leader is killed, and when it is moved.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

#[derive(Debug, Default, Serialize)]
pub struct LeaderMove {
    pub moves: u32,
    pub requests: u64,
    pub failed: u64,
    /// Longest that any caller waited for one answer.
    pub longest_stall_ms: f64,
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

/// Callers that write all the time, while the lead goes from node to node.
async fn move_leader(ours: &Ours, times: u32) -> anyhow::Result<LeaderMove> {
    let stop = Arc::new(AtomicBool::new(false));
    let [requests, failed, longest_us] = [(); 3].map(|()| Arc::new(AtomicU64::new(0)));
    let mut callers = Vec::new();
    ours.client()?.worker_register(WORKER, worker()).await?;
    for caller in 0..MOVE_CALLERS {
        let client = ours.client()?;
        let (stop, requests, failed, longest_us) =
            (stop.clone(), requests.clone(), failed.clone(), longest_us.clone());
        callers.push(tokio::spawn(async move {
            let claims = vec![claim(&format!("mover-{caller}"))];
            let mut pairs = Pairs { client, claims, held: Vec::new() };
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                let done = pairs.call().await;
                requests.fetch_add(1, Ordering::Relaxed);
                failed.fetch_add(u64::from(done.is_err()), Ordering::Relaxed);
                longest_us.fetch_max(began.elapsed().as_micros() as u64, Ordering::Relaxed);
            }
        }));
    }
    let client = ours.client()?;
    let mut moves = 0;
    for time in 0..times {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let leader = ours.leader().await? as u64 + 1;
        let to = (leader + u64::from(time)) % 3 + 1;
        if to != leader {
            client.transfer_leader(to).await?;
            moves += 1;
        }
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await?;
    }
    Ok(LeaderMove {
        moves,
        requests: requests.load(Ordering::Relaxed),
        failed: failed.load(Ordering::Relaxed),
        longest_stall_ms: longest_us.load(Ordering::Relaxed) as f64 / 1000.0,
    })
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
