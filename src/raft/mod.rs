//! The glue to openraft: what a group agrees about, how a log entry becomes a change of the table,
//! and how the members talk.
//!
//! ```text
//! client_write ─► log (store) ─┬─► PeerNetwork ═══ tonic ═══► PeerService ─► log of a follower
//!                              └─► StateMachine ─► TableView, ApplyObserver, answers
//! ```
//!
//! The steady state: one stream a follower carries entries, each request and each answer in order;
//! a committed entry is applied to the table, the view shows it, and then whoever asked is
//! answered: so who got an answer finds it in the view. A member that is too far behind gets a
//! snapshot, streamed from the file, checked whole before it is installed.
//!
//! - openraft's types stay in this module and in what it exports; bytes are `store::codec`'s, and
//!   messages are protobuf.
//! - Every call says in which cluster, from whom and to whom it goes, and is refused by others.
//! - Log reversion is never allowed, and a leader that restarts is elected anew ([`raft_config`]).

mod backup;
mod config;
mod convert;
mod flow;
mod identity;
mod log;
mod machine;
mod network;
mod service;
mod types;

pub use backup::{Backup, RestoreError, restore, restore_into, salvage, write_backup};
pub use config::raft_config;
#[doc(hidden)]
pub use convert::reread_entry;
pub use identity::{ClusterCell, ClusterMismatch, LocalIdentity};
pub use machine::{ApplyObserver, CommandAt, SnapshotBuilder, StateMachine, Table, TableView};
pub use network::{Dial, ForwardError, JoinError, PeerClient, PeerNetwork};
pub use service::{PeerHooks, PeerService, RaftCell, peer_service, peer_transport};
pub use types::*;

/// Largest message between peers, in bytes: the largest entry and what goes with it.
pub const PEER_MESSAGE_MAX_BYTES: usize = crate::store::ENTRY_MAX_BYTES + (8 << 20);
