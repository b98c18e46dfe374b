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

/// What one message of a session may have: the node refuses more, and the client library sends no more.
pub mod session {
    use super::v1::port_request::Ports;
    use super::v1::session_command::Command;

    pub const SESSION_COMMANDS_MAX: usize = 256;
    pub const SESSION_CLAIMS_MAX: usize = 1024;
    /// As many as the largest gang asks for.
    pub const SESSION_PORTS_MAX: u64 = 16_384;
    /// Of the commands of a message that the library sends: less than the bytes of a request, beyond which
    /// the node ends the session.
    pub const SESSION_MAX_BYTES: usize = 1_000_000;
    /// Of the id and the lengths around a command, at most.
    const AROUND_BYTES: usize = 24;

    /// How much of it is there.
    #[derive(Debug, Clone, Copy, Default)]
    pub struct Size {
        commands: usize,
        claims: usize,
        ports: u64,
        /// 0 where they do not matter.
        bytes: usize,
    }

    impl Size {
        /// Of one command; `None` is one that is missing.
        pub fn of(command: Option<&Command>) -> Size {
            let Some(Command::Allocate(request)) = command else {
                return Size { commands: 1, ..Size::default() };
            };
            let claims = &request.claims;
            let ports = claims.iter().flat_map(|claim| &claim.ports).map(|port| match port.ports {
                Some(Ports::Count(count)) | Some(Ports::Contiguous(count)) => u64::from(count),
                _ => 1,
            });
            Size { commands: 1, claims: claims.len(), ports: ports.sum(), bytes: 0 }
        }

        /// Of one command that is to be sent, with its bytes.
        pub fn to_send(command: &Command) -> Size {
            Size { bytes: command.encoded_len() + AROUND_BYTES, ..Size::of(Some(command)) }
        }

        /// Of commands that are to be sent; 0 otherwise.
        pub fn bytes(self) -> usize {
            self.bytes
        }

        pub fn and(self, other: Size) -> Size {
            Size {
                commands: self.commands + other.commands,
                claims: self.claims + other.claims,
                ports: self.ports.saturating_add(other.ports),
                bytes: self.bytes + other.bytes,
            }
        }

        /// The first limit that it is beyond: the field, what it has, and how much there may be.
        pub fn beyond(self) -> Option<(&'static str, u64, u64)> {
            [
                ("commands", self.commands as u64, SESSION_COMMANDS_MAX as u64),
                ("claims", self.claims as u64, SESSION_CLAIMS_MAX as u64),
                ("ports", self.ports, SESSION_PORTS_MAX),
                ("bytes", self.bytes as u64, SESSION_MAX_BYTES as u64),
            ]
            .into_iter()
            .find(|(_, given, limit)| given > limit)
        }
    }
}

/// Domain of every `google.rpc.ErrorInfo` that portwarden sends.
pub const DOMAIN: &str = "portwarden";

/// Kinds of a violation in `google.rpc.PreconditionFailure`, of those that a client goes by.
pub mod precondition {
    /// The allocation has another token.
    pub const TOKEN: &str = "TOKEN";
    /// The allocation has another version.
    pub const VERSION: &str = "VERSION";
    /// What is held on the worker would have no place any more.
    pub const WOULD_LOSE: &str = "WOULD_LOSE";
    pub const PORT_NOT_HELD: &str = "PORT_NOT_HELD";
    pub const PORT_NOT_FREE: &str = "PORT_NOT_FREE";
    pub const WORKER_NOT_READY: &str = "WORKER_NOT_READY";
    pub const WORKER_IN_USE: &str = "WORKER_IN_USE";
    /// The allocation lingers: it is to be confirmed first.
    pub const LINGERING: &str = "LINGERING";
    /// What the leader's timers or sweeper proposed does not hold any more.
    pub const NOT_PROVEN: &str = "NOT_PROVEN";
    /// It was proposed under another leader.
    pub const LEADER: &str = "LEADER";
    pub const FEATURE_LEVEL: &str = "FEATURE_LEVEL";
}

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
    /// The revision from which on a watch should go does not exist (`revision` is the last one): whoever
    /// has heard of it has the table of another cluster.
    pub const AHEAD: &str = "AHEAD";
    /// A watcher did not read, and was cut off.
    pub const SLOW_WATCHER: &str = "SLOW_WATCHER";
    /// The listing's revision is no longer kept: start over.
    pub const PAGE_EXPIRED: &str = "PAGE_EXPIRED";
}
