//! The first start of a cluster, and the only one.
//!
//! Of the nodes listed as the initial cluster, the one with the lowest id initialises, and only
//! after each other one has answered that it is pristine and was given the same list. The cluster
//! id, chosen at random then, rides in the first log entry with the membership, and so does the
//! incarnation that each answered with: its id stands for that data directory from then on. The
//! others wait to be spoken to, and ask meanwhile whether they are refused. On every later start the
//! list is ignored, with a warning if it differs.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{info, warn};

use super::{NodeConfig, StartError};
use crate::core::FEATURE_LEVEL;
use crate::proto::peer;
use crate::raft::{JoinError, Member, NodeId, PeerNetwork, Raft};

/// Between rounds of asking.
const PROBE_PAUSE: Duration = Duration::from_millis(200);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Leaders that a node which joins is sent on to in one round: two may name each other.
const HOPS_A_ROUND: u32 = 4;
/// Between the questions of a node that waits to be spoken to.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// After so many rounds the log says again who is missing.
const ROUNDS_PER_REPORT: u32 = 25;
const ASKS_PER_REPORT: u32 = 5;
/// An answer comes when the change is in the log of a majority.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a cluster cannot begin; the process ends with it.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    #[error(
        "node {peer} was started with --initial-cluster {theirs}, this node with {ours}; \
         start all nodes with the same list"
    )]
    ListsDiffer { peer: NodeId, theirs: String, ours: String },
    #[error(
        "node {peer} belongs to cluster {cluster} already, but this node's data directory is empty: \
         a node that lost its data is a new node; remove node {id} from the cluster and join under \
         a new id"
    )]
    AlreadyBegun { id: NodeId, peer: NodeId, cluster: String },
    #[error("cannot begin the cluster: {0}")]
    Raft(String),
}

pub(super) async fn initialise(
    config: &NodeConfig,
    raft: &Raft,
    network: &PeerNetwork,
    cluster_id: &str,
    local_incarnation: &str,
) -> Result<(), BootstrapError> {
    let ours = &config.entry.initial_cluster();
    let mut members = BTreeMap::new();
    let mut round: u32 = 0;
    loop {
        let mut missing = Vec::new();
        for (id, addr) in ours {
            if *id == config.id {
                let incarnation = local_incarnation;
                members.insert(*id, member(cluster_id, addr, &config.advertise, incarnation));
                continue;
            }
            let request = peer::ProbeRequest { members: listed(ours), ..Default::default() };
            match network.probe(*id, addr, request, PROBE_TIMEOUT).await {
                Ok(answer) if answer.incarnation.is_empty() => {
                    missing.push(format!("{id} at {addr}: it is starting"));
                }
                Ok(answer) => {
                    check(config.id, *id, ours, &answer)?;
                    let client = &answer.client_endpoint;
                    members.insert(*id, member(cluster_id, addr, client, &answer.incarnation));
                }
                Err(why) => missing.push(format!("{id} at {addr}: {why}")),
            }
        }
        if missing.is_empty() {
            break;
        }
        if round.is_multiple_of(ROUNDS_PER_REPORT) {
            info!(waiting_for = missing.join("; "), "the cluster begins when all nodes are up");
        }
        round += 1;
        sleep(PROBE_PAUSE).await;
    }
    raft.initialize(members).await.map_err(|e| BootstrapError::Raft(e.to_string()))?;
    info!(cluster_id, "the cluster has begun");
    Ok(())
}

/// Asks the others how they are, again and again, for the sake of being refused: the network takes
/// note of that. Says in the log for whom this node waits, and whose list differs. Does not end.
pub(super) async fn watch_for_begin(
    config: &NodeConfig,
    ours: &BTreeMap<NodeId, String>,
    network: &PeerNetwork,
) {
    let mut round: u32 = 0;
    loop {
        sleep(ASK_AGAIN).await;
        let others = ours.iter().filter(|(id, _)| **id != config.id);
        let asked = others.map(|(id, addr)| async move {
            let request = peer::ProbeRequest { members: listed(ours), ..Default::default() };
            match network.probe(*id, addr, request, PROBE_TIMEOUT).await {
                Ok(answer) if answer.incarnation.is_empty() => {
                    Some(format!("{id} at {addr}: it is starting"))
                }
                Ok(answer) => match check(config.id, *id, ours, &answer) {
                    Ok(()) => None,
                    Err(BootstrapError::AlreadyBegun { cluster, .. }) => Some(format!(
                        "{id} at {addr}: it belongs to cluster {cluster} and has not spoken to this \
                         node yet; if this lasts, that cluster does not know node {}",
                        config.id
                    )),
                    Err(why) => Some(why.to_string()),
                },
                Err(why) => Some(why),
            }
        });
        let waiting: Vec<_> =
            futures::future::join_all(asked).await.into_iter().flatten().collect();
        if round.is_multiple_of(ASKS_PER_REPORT) {
            let waiting_for = match waiting.is_empty() {
                true => "its first word".to_string(),
                false => waiting.join("; "),
            };
            let begins = ours.keys().next();
            warn!(
                begins,
                waiting_for, "the cluster has not begun; the lowest id of the list begins it"
            );
        }
        round += 1;
    }
}

fn check(
    id: NodeId,
    peer: NodeId,
    ours: &BTreeMap<NodeId, String>,
    answer: &peer::ProbeResponse,
) -> Result<(), BootstrapError> {
    if !answer.pristine {
        return Err(BootstrapError::AlreadyBegun { id, peer, cluster: answer.cluster.clone() });
    }
    if answer.members != listed(ours) {
        return Err(BootstrapError::ListsDiffer {
            peer,
            theirs: shown(answer.members.iter().map(|m| (m.id, m.peer.as_str()))),
            ours: shown(ours.iter().map(|(id, addr)| (*id, addr.as_str()))),
        });
    }
    Ok(())
}

/// A node that has data was given a list that is not its cluster's: it is ignored, and said so.
pub(super) fn warn_if_list_differs(
    config: &NodeConfig,
    members: impl Iterator<Item = (NodeId, String)>,
) {
    let theirs: BTreeMap<_, _> = members.collect();
    let ours = config.entry.initial_cluster();
    if !theirs.is_empty() && !ours.is_empty() && theirs != ours {
        warn!(
            given = shown(ours.iter().map(|(id, a)| (*id, a.as_str()))),
            members = shown(theirs.iter().map(|(id, a)| (*id, a.as_str()))),
            "--initial-cluster is not the cluster's membership and is ignored: the cluster has begun"
        );
    }
}

/// Asks a member, and then the leader that it names, to take this node in; returns once that is in
/// the log. The leader speaks to this node from then on.
pub(super) async fn join(
    config: &NodeConfig,
    peer: &str,
    network: &PeerNetwork,
) -> Result<(), StartError> {
    let mut asked = peer.to_string();
    let mut round: u32 = 0;
    let mut hops = 0;
    loop {
        let request = peer::JoinRequest {
            header: None,
            peer: config.advertise_peer.clone(),
            client: config.advertise.clone(),
            feature_level_max: FEATURE_LEVEL,
        };
        let why = match network.join(&asked, request, JOIN_TIMEOUT).await {
            Ok(answer) if answer.leader_peer.is_empty() => {
                info!(at = asked, "this node was taken in as a learner");
                return Ok(());
            }
            Ok(answer) if answer.leader_peer != asked && hops < HOPS_A_ROUND => {
                asked = answer.leader_peer;
                hops += 1;
                continue;
            }
            Ok(answer) => {
                format!("it names {} the leader, which does not lead", answer.leader_peer)
            }
            Err(JoinError::Refused(why)) => {
                return Err(StartError::CannotJoin { id: config.id, why });
            }
            Err(JoinError::NotNow(why)) => why,
        };
        if round.is_multiple_of(ASKS_PER_REPORT) {
            warn!(at = asked, why, "not taken in yet; asking again");
        }
        round += 1;
        // The leader may be another one by now.
        (asked, hops) = (peer.to_string(), 0);
        sleep(ASK_AGAIN).await;
    }
}

pub(super) fn listed(members: &BTreeMap<NodeId, String>) -> Vec<peer::InitialMember> {
    members.iter().map(|(id, addr)| peer::InitialMember { id: *id, peer: addr.clone() }).collect()
}

fn member(cluster_id: &str, peer: &str, client: &str, incarnation: &str) -> Member {
    Member {
        cluster_id: cluster_id.into(),
        peer: peer.into(),
        client: client.into(),
        incarnation: incarnation.into(),
    }
}

fn shown<'a>(members: impl Iterator<Item = (NodeId, &'a str)>) -> String {
    members.map(|(id, addr)| format!("{id}={addr}")).collect::<Vec<_>>().join(",")
}
