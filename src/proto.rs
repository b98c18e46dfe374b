//! The generated code of `proto/`: the API for clients and the protocol between nodes.

#![allow(missing_docs, clippy::all)]

pub mod v1 {
    tonic::include_proto!("portwarden.v1");
}

pub mod peer {
    tonic::include_proto!("portwarden.peer.v1");
}

/// All descriptors, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Domain of every `google.rpc.ErrorInfo` that portwarden sends.
pub const DOMAIN: &str = "portwarden";

/// Reasons in `google.rpc.ErrorInfo`: what a caller can do about an error, where its code alone
/// does not say.
pub mod reason {
    /// Nothing fits, or the table is full. Nothing was changed.
    pub const CAPACITY: &str = "CAPACITY";
    /// Too many calls at once: try again after RetryInfo. Nothing was changed.
    pub const OVERLOADED: &str = "OVERLOADED";
    /// The disks of the cluster are filling up: what makes the table grow is refused until there is
    /// room. Nothing was changed.
    pub const LOW_SPACE: &str = "LOW_SPACE";
    /// It may or may not have been done; a repeat with the same uid or token is safe and tells.
    pub const OUTCOME_UNKNOWN: &str = "OUTCOME_UNKNOWN";
    /// The deadline passed before the call was proposed. Nothing was changed.
    pub const NOT_EXECUTED: &str = "NOT_EXECUTED";
    /// This node cannot serve now. Nothing was changed; another node may serve.
    pub const NOT_READY: &str = "NOT_READY";
    /// Between nodes: the receiver of a forwarded call does not lead. Nothing was changed.
    pub const NOT_LEADER: &str = "NOT_LEADER";
    /// The name is held by another uid or for another request.
    pub const NAME_TAKEN: &str = "NAME_TAKEN";
    /// The name was taken back, or forced out: when and why (`cause`, `at_ms`, and more).
    pub const DEPARTED: &str = "DEPARTED";
    /// The worker is another network namespace, or another boot, than the agent that reports.
    pub const OTHER_IDENTITY: &str = "OTHER_IDENTITY";
    /// A learner has not caught up yet: ask again.
    pub const LAGGING: &str = "LAGGING";
    /// A GPU or network namespace is another worker's.
    pub const IDENTITY_TAKEN: &str = "IDENTITY_TAKEN";
    /// The revisions from which on a watch should go are no longer kept (`oldest_revision` says which
    /// are): list anew, and watch from there.
    pub const COMPACTED: &str = "COMPACTED";
    /// A watcher did not read, and was cut off.
    pub const SLOW_WATCHER: &str = "SLOW_WATCHER";
    /// The listing's revision is no longer kept: start over.
    pub const PAGE_EXPIRED: &str = "PAGE_EXPIRED";
}
