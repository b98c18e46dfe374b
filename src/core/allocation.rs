//! A granted claim.

use std::sync::Arc;

use super::claim::Claim;
use super::name::{InstanceName, PortName, RangeName, Revision, Token, WorkerName};

/// Where an allocation stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Granted; its holder is starting.
    Reserved,
    /// Its holder said that it listens.
    Bound,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Reserved => "RESERVED",
            Phase::Bound => "BOUND",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// The request as it was made; its name and uid are the allocation's.
    pub claim: Arc<Claim>,
    pub worker: WorkerName,
    /// In the order of the claim's port requests.
    pub ports: Vec<HeldPort>,
    /// In rising order of index.
    pub gpus: Vec<HeldGpu>,
    /// Revision of the grant; members of a gang share it.
    pub token: Token,
    /// Revision of the last change.
    pub version: Revision,
    pub phase: Phase,
    /// Swaps of ports so far.
    pub swaps: u32,
    /// What the last change was, so that its repeat gets the same answer.
    pub last_change: Option<LastChange>,
}

impl Allocation {
    pub fn name(&self) -> &InstanceName {
        &self.claim.name
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldPort {
    /// Index of the request in the claim that this port answers.
    pub request: u16,
    pub name: Option<PortName>,
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

/// The last change of an allocation and the version that it was made to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastChange {
    pub from: Revision,
    pub kind: ChangeKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeKind {
    Confirmed,
    /// The port that was reported.
    Swapped {
        port: u16,
    },
}
