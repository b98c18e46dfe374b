//! What openraft is configured with.

use std::sync::Arc;

use crate::core::{Applied, Specs};
pub use crate::store::codec::Batch;

/// A member's id; never used again after its removal.
pub type NodeId = u64;

/// What the membership says of a member. The cluster's id rides in every record, so that it is in
/// the first log entry and in every snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Member {
    pub cluster_id: String,
    /// Where peers reach it, `host:port`.
    pub peer: String,
    /// Where clients reach it, `host:port`.
    pub client: String,
    /// Of the data directory that this id stands for; empty while the member is pending, until its
    /// first contact. Never changes once it is there.
    pub incarnation: String,
}

/// Empty for entries that are no batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BatchReply {
    /// One answer for each command of the batch, in its order.
    pub applied: Vec<Applied>,
    /// Of the workers on which the allocations in the answers are. Only where somebody waits for them.
    pub specs: Arc<Specs>,
}

openraft::declare_raft_types!(
    /// The types of portwarden's Raft group.
    pub TypeConfig:
        D = Batch,
        R = BatchReply,
        NodeId = NodeId,
        Node = Member,
);

pub type Raft = openraft::Raft<TypeConfig, super::StateMachine>;
pub type LeaderId = openraft::type_config::alias::LeaderIdOf<TypeConfig>;
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub type EntryPayload = openraft::type_config::alias::PayloadOf<TypeConfig>;
pub type Membership = openraft::Membership<NodeId, Member>;
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
pub type Snapshot =
    openraft::type_config::alias::SnapshotOf<TypeConfig, crate::store::SnapshotFile>;
pub type Metrics = openraft::RaftMetrics<TypeConfig>;
