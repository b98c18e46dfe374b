//! What can be said of a call that got no answer: the one table.
//!
//! | what happened | what the caller hears | may the server try again? |
//! |---|---|---|
//! | this node is not ready, was removed, or knows no leader within the deadline | [`CallError::NotReady`] | it waited already |
//! | the admission queue is full | [`CallError::Overloaded`] | the client does, after the pause |
//! | too few members have room on their disks, and the command would make the table grow | [`CallError::LowSpace`] | no: somebody must make room |
//! | the deadline passed before the command was proposed | [`CallError::Expired`] | no: nobody waits |
//! | openraft refused before appending (`ForwardToLeader`: another leader, leadership transfer, no lease) | [`CallError::NotLeader`] | yes, within the deadline, one hop |
//! | the connection to the leader could not be made | `NotSent` | yes, within the deadline |
//! | appended and then discarded (`LogEntryDiscarded`) | [`CallError::Unknown`] | **never** |
//! | openraft stopped (`Fatal`) | [`CallError::Unknown`] | **never** |
//! | the stream to the leader broke after the request was sent | [`CallError::Unknown`] for writes | never for writes |
//! | the deadline passed after the command was proposed | [`CallError::Unknown`] | **never** |
//!
//! `tests/cluster/outcomes.rs` has a test for each row, with failures injected at failpoints.
//!
//! "Unknown" is said to the caller as such: the uid or token of the request makes a repeat safe and
//! tells what became of it.

use std::time::Duration;

use openraft::errors::{ClientWriteError, LinearizableReadError, RaftError};

pub use crate::raft::ForwardError;
use crate::raft::{NodeId, TypeConfig};

/// Why no answer came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Surely not done.
    #[error("not ready: {0}")]
    NotReady(String),
    /// Surely not done: a queue is full.
    #[error("overloaded: too many calls wait")]
    Overloaded { retry_after: Duration },
    /// Surely not done: the disks of the members are filling up.
    #[error("low on space: {why}")]
    LowSpace { why: String, retry_after: Duration },
    /// Surely not done: the deadline passed before the command was proposed.
    #[error("the deadline passed before the command was proposed; nothing was changed")]
    Expired,
    /// May or may not be done, now or later.
    #[error("outcome unknown: {0}")]
    Unknown(String),
    /// Surely not done: another node leads.
    #[error("this node is not the leader")]
    NotLeader { leader: Option<NodeId> },
}

/// What OVERLOADED asks the caller to wait.
pub const RETRY_AFTER: Duration = Duration::from_millis(100);

pub(super) fn of_write(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> CallError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(to)) => {
            CallError::NotLeader { leader: to.leader_id }
        }
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => {
            CallError::Unknown("the leader changed after the command was appended".into())
        }
        RaftError::APIError(
            other @ (ClientWriteError::ChangeMembershipError(_)
            | ClientWriteError::PreconditionFailed(_)),
        ) => CallError::Unknown(format!("unexpected answer to a command: {other}")),
        RaftError::Fatal(fatal) => CallError::Unknown(format!("the node is stopping: {fatal}")),
    }
}

/// A read changes nothing: it is never unknown.
pub(super) fn of_read(
    error: RaftError<TypeConfig, LinearizableReadError<TypeConfig>>,
) -> CallError {
    match error {
        RaftError::APIError(LinearizableReadError::ForwardToLeader(to)) => {
            CallError::NotLeader { leader: to.leader_id }
        }
        RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)) => {
            CallError::NotLeader { leader: None }
        }
        RaftError::Fatal(fatal) => CallError::NotReady(format!("the node is stopping: {fatal}")),
    }
}

#[cfg(test)]
mod tests {
    use openraft::errors::{Fatal, ForwardToLeader};

    use super::*;

    /// A server proposes again what it is told was not appended, and nothing else.
    #[test]
    fn what_may_be_in_a_log_is_unknown() {
        let refused = ClientWriteError::ForwardToLeader(ForwardToLeader::empty());
        let answer = of_write(RaftError::APIError(refused));
        assert_eq!(answer, CallError::NotLeader { leader: None });
        let discarded = ClientWriteError::LogEntryDiscarded(ForwardToLeader::empty());
        for in_doubt in [RaftError::APIError(discarded), RaftError::Fatal(Fatal::Stopped)] {
            assert!(matches!(of_write(in_doubt), CallError::Unknown(_)));
        }
    }
}
