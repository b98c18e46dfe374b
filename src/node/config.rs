//! What a node is told at its start.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::backups::BackupPlan;
use crate::raft::NodeId;

/// What a node needs to know to start.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    pub id: NodeId,
    pub data_dir: PathBuf,
    /// Where this node finds its cluster, if its data directory is empty.
    pub entry: Entry,
    /// Where the other nodes reach this one.
    pub advertise_peer: String,
    /// Where clients reach this node.
    pub advertise: String,
    /// Log entries after which a snapshot is written.
    pub snapshot_every: u64,
    pub upkeep: Upkeep,
    pub lifecycle: Lifecycle,
    pub backups: Option<BackupPlan>,
}

/// How a node that has no data comes to a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// It begins one, with these nodes, by peer address, itself among them.
    Begin(BTreeMap<NodeId, String>),
    /// It joins the one of the node at this peer address.
    Join(String),
    /// It has data, which say with whom it began.
    Begun,
}

impl Entry {
    /// The nodes that begin the cluster; none where it has begun elsewhere.
    pub(super) fn initial_cluster(&self) -> BTreeMap<NodeId, String> {
        match self {
            Entry::Begin(nodes) => nodes.clone(),
            Entry::Join(_) | Entry::Begun => BTreeMap::new(),
        }
    }
}

/// When the leader acts on what nobody said, and on what agents saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifecycle {
    /// How long an allocation may stay unconfirmed if its claim does not say.
    pub confirm_within: Duration,
    /// How long the ports of what was confirmed must be seen closed until it counts as gone.
    pub zombie_after: Duration,
    /// How long an agent may be silent until its worker is lost.
    pub worker_lost_after: Duration,
    /// How long a conflict keeps a port from being given on a worker that no agent watches.
    pub quarantine: Duration,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Lifecycle {
            confirm_within: Duration::from_secs(600),
            zombie_after: Duration::from_secs(600),
            worker_lost_after: Duration::from_secs(30),
            quarantine: Duration::from_secs(300),
        }
    }
}

/// What a node does by itself, beside serving calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upkeep {
    /// Bytes of log entries after which a snapshot is written, if there were fewer entries.
    pub snapshot_every_bytes: u64,
    /// Applied entries after which the leader lets the replicas compare their tables; 0: never.
    pub checkpoint_every: u64,
    /// The node is low on space when less is free on the file system of its data directory; 0:
    /// never.
    pub low_space_bytes: u64,
}

impl Default for Upkeep {
    fn default() -> Self {
        Upkeep {
            snapshot_every_bytes: 64 << 20,
            checkpoint_every: 10_000,
            low_space_bytes: 256 << 20,
        }
    }
}
