//! A granted claim.

use std::fmt;
use std::sync::Arc;

use imbl::OrdMap;

use super::claim::Claim;
use super::limits::{
    ADDRESS_MAX_BYTES, CGROUP_MAX_BYTES, CONTAINER_ID_MAX_BYTES, CONTAINER_ID_MIN_BYTES,
};
use super::name::{
    InstanceName, Invalid, LeaseId, Millis, PortName, RangeName, Revision, Token, WorkerName,
    check_text,
};

/// Where an allocation stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Granted; its holder is starting.
    Reserved,
    /// Its holder said that it listens.
    Bound,
    /// Its holder fell silent, which proves nothing: held until there is evidence that it is gone.
    Lingering,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Reserved => "RESERVED",
            Phase::Bound => "BOUND",
            Phase::Lingering => "LINGERING",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// The request as it was made; its name and uid are the allocation's.
    pub claim: Arc<Claim>,
    pub worker: WorkerName,
    /// In the order of the claim's port requests.
    pub ports: Box<[HeldPort]>,
    /// In rising order of index.
    pub gpus: Box<[HeldGpu]>,
    /// Revision of the grant; members of a gang share it.
    pub token: Token,
    /// Revision of the last change.
    pub version: Revision,
    pub phase: Phase,
    /// Was it confirmed since its last grant or swap?
    pub confirmed: bool,
    /// While it lingers: what happened.
    pub reason: Option<Arc<str>>,
    /// Never while it lingers: the end of the lease is what made it linger, or it was taken off it.
    pub lease: Option<LeaseId>,
    /// How the worker's agent can tell whether it lives.
    pub liveness: Option<Arc<Liveness>>,
    /// How long it may stay `Reserved`, counted from its version.
    pub confirm_within: Millis,
    /// When the leader proposed the grant and the last change, by its wall clock. For people.
    pub granted_at: Millis,
    pub changed_at: Millis,
    /// Swaps of ports so far.
    pub swaps: u32,
    /// What the last change was, so that its repeat gets the same answer.
    pub last_change: Option<LastChange>,
}

impl Allocation {
    pub fn name(&self) -> &InstanceName {
        &self.claim.name
    }

    /// What the claim calls one of its ports.
    pub fn port_name(&self, port: &HeldPort) -> Option<&PortName> {
        self.claim.ports.get(usize::from(port.request))?.name.as_ref()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldPort {
    /// Index of the request in the claim that this port answers.
    pub request: u16,
    pub range: RangeName,
    pub number: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldGpu {
    pub index: u32,
    pub uuid: String,
    /// Bytes held here; all of them where exclusive.
    pub memory_bytes: u64,
    pub exclusive: bool,
}

/// What lives exactly as long as the instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Liveness {
    /// The boot of the worker on which it lives.
    pub boot_id: String,
    pub handle: Handle,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handle {
    /// `start_ticks`: clock ticks from the boot to its start; tells it from a later one of its pid.
    Process { pid: u32, start_ticks: u64 },
    /// Path below the root of the cgroup file system.
    Cgroup(String),
    /// Its id: 12 to 64 hexadecimal digits, in lower case as in the paths that it is looked for in.
    Container(String),
}

/// How much of a long cgroup path people are shown.
const CGROUP_SHOWN_CHARS: usize = 50;

impl fmt::Display for Liveness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.handle {
            Handle::Process { pid, start_ticks } => {
                write!(f, "process {pid} (started at tick {start_ticks})")
            }
            // The end of a path tells more than its beginning. A reason must not grow too long.
            Handle::Cgroup(path) => match path.char_indices().nth_back(CGROUP_SHOWN_CHARS - 1) {
                Some((at, _)) if at > 0 => write!(f, "cgroup …{}", &path[at..]),
                _ => write!(f, "cgroup {path}"),
            },
            Handle::Container(id) => write!(f, "container {id}"),
        }
    }
}

impl Liveness {
    pub fn validate(&self) -> Result<(), Invalid> {
        check_text("liveness.boot_id", &self.boot_id, ADDRESS_MAX_BYTES)?;
        if self.boot_id.is_empty() {
            let limit = "not empty: a handle counts for one boot";
            return Err(Invalid::new("liveness.boot_id", "", limit));
        }
        self.handle.validate()
    }
}

impl Handle {
    fn validate(&self) -> Result<(), Invalid> {
        match self {
            Handle::Process { pid: 0, .. } => {
                Err(Invalid::new("liveness.process.pid", 0, "1 or more"))
            }
            Handle::Process { .. } => Ok(()),
            Handle::Cgroup(path) => {
                check_text("liveness.cgroup", path, CGROUP_MAX_BYTES)?;
                match path.is_empty() || path.split('/').any(|part| part == "..") {
                    true => Err(Invalid::new("liveness.cgroup", path, "a path without \"..\"")),
                    false => Ok(()),
                }
            }
            Handle::Container(id) => {
                let span = CONTAINER_ID_MIN_BYTES..=CONTAINER_ID_MAX_BYTES;
                let is_digit = |c: char| matches!(c, '0'..='9' | 'a'..='f');
                match span.contains(&id.len()) && id.chars().all(is_digit) {
                    true => Ok(()),
                    false => {
                        let (low, high) = span.into_inner();
                        let limit = format!("{low} to {high} hexadecimal digits in lower case");
                        Err(Invalid::new("liveness.container", id, limit))
                    }
                }
            }
        }
    }
}

/// A time to live, kept alive by its holder. Its deadline is the leader's to watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The revision of its grant.
    pub id: LeaseId,
    pub ttl: Millis,
    /// Names of the allocations on it.
    pub allocations: OrdMap<InstanceName, ()>,
}

/// How a name left the table, other than by its holder's word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Departure {
    pub revision: Revision,
    /// By the leader's wall clock. For people.
    pub at: Millis,
    pub worker: WorkerName,
    pub token: Token,
    pub why: ReleaseReason,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReleaseReason {
    #[error("released by its holder")]
    ByHolder,
    #[error("forced out by an operator{}", after_colon(.reason))]
    Forced { reason: String },
    #[error("reclaimed: {reason}")]
    Reclaimed { cause: Cause, reason: String },
}

fn after_colon(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

/// Why the system took something back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// A port was in use, and no other could be given.
    Conflict,
    /// It was not confirmed in time.
    Unconfirmed,
    /// Its lease expired or was revoked.
    LeaseEnded,
    /// An agent saw that it is gone.
    Gone,
}

impl Cause {
    pub const ALL: [Cause; 4] =
        [Cause::Conflict, Cause::Unconfirmed, Cause::LeaseEnded, Cause::Gone];

    /// For metrics.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Conflict => "conflict",
            Cause::Unconfirmed => "unconfirmed",
            Cause::LeaseEnded => "lease_ended",
            Cause::Gone => "gone",
        }
    }
}

/// The last change of an allocation and the version that it was made to, in the words of its caller:
/// one who comes back from a silence may know only the version from before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastChange {
    pub from: Revision,
    pub kind: ChangeKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeKind {
    Confirmed,
    Attached,
    /// Its deadline passed, or its lease ended: then its deadline may be yet to come.
    Lingered {
        cause: Cause,
    },
    /// The port that was reported.
    Swapped {
        port: u16,
    },
}
