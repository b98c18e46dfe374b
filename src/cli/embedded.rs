//! A whole cluster in this process, for `dev` and `demo`: real gRPC on loopback, real logs on disk.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::serve::SNAPSHOT_EVERY;
use crate::api::assembly::{Listeners, Server};
use crate::node::{Entry, Lifecycle, NodeConfig, Upkeep};

/// Ports of one node; 0 lets the system choose.
#[derive(Clone, Copy)]
pub(super) struct NodePorts {
    pub clients: u16,
    pub peers: u16,
    pub http: Option<u16>,
}

/// Longest wait for the first leader.
const LEADER_MAX: Duration = Duration::from_secs(30);

/// Starts nodes 1, 2, … in `dir`, one for each entry of `ports`, and returns their servers.
pub(super) async fn start(dir: &Path, ports: &[NodePorts]) -> anyhow::Result<Vec<Server>> {
    start_with(dir, ports, &Lifecycle::default()).await
}

/// The same, with deadlines of the caller's.
pub(super) async fn start_with(
    dir: &Path,
    ports: &[NodePorts],
    lifecycle: &Lifecycle,
) -> anyhow::Result<Vec<Server>> {
    let loopback = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut bound = Vec::new();
    for node in ports {
        let http = node.http.map(loopback);
        let listeners = Listeners::bind(loopback(node.clients), loopback(node.peers), http).await;
        bound.push(listeners?);
    }
    let ids = 1..;
    let mut initial_cluster = BTreeMap::new();
    for (id, listeners) in ids.clone().zip(&bound) {
        let addr = listeners.peers.local_addr()?;
        initial_cluster.insert(id, addr.to_string());
    }
    let mut servers = Vec::new();
    for (id, listeners) in ids.zip(bound) {
        let advertise = listeners.clients.local_addr()?.to_string();
        let config = NodeConfig {
            id,
            data_dir: dir.join(format!("node-{id}")),
            entry: Entry::Begin(initial_cluster.clone()),
            advertise_peer: initial_cluster[&id].clone(),
            advertise,
            snapshot_every: SNAPSHOT_EVERY,
            upkeep: Upkeep::default(),
            lifecycle: lifecycle.clone(),
            backups: None,
        };
        servers.push(Server::start(config, listeners).await?);
    }
    Ok(servers)
}

/// Waits until every server knows a leader; returns its index.
pub(super) async fn leader(servers: &[Server]) -> anyhow::Result<usize> {
    let deadline = Instant::now() + LEADER_MAX;
    let mut leaders = Vec::new();
    for server in servers {
        let leader = server.node.route(deadline).await?;
        leaders.push(leader.unwrap_or(server.node.id()));
        while !server.node.is_ready() {
            if Instant::now() >= deadline {
                anyhow::bail!("the cluster found no leader in time");
            }
            sleep(Duration::from_millis(10)).await;
        }
    }
    let leader = leaders.last();
    servers
        .iter()
        .position(|s| Some(&s.node.id()) == leader)
        .ok_or_else(|| anyhow::anyhow!("no node leads"))
}
