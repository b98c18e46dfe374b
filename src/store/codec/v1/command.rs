//! Commands, as log entries carry them.

use std::sync::Arc;

use bincode::{BorrowDecode, Decode, Encode};

use super::claim::Claim;
use super::worker::{Identity, WorkerPatch, WorkerPhase, WorkerSpec};
use super::{Checked, each, lease, optional, port};
use crate::core::{self as table, LeaseId, Millis, Port, Revision, Token};

#[derive(Debug, Encode, BorrowDecode)]
pub enum Command<'a> {
    RegisterWorker { name: &'a str, spec: WorkerSpec<'a> },
    UpdateWorker { name: &'a str, patch: WorkerPatch<'a> },
    SetWorkerPhase { name: &'a str, phase: WorkerPhase, by: Actor },
    VerifyWorker { name: &'a str, by: Actor },
    RemoveWorker { name: &'a str, force: Option<&'a str> },
    Allocate { claims: Vec<Claim<'a>>, confirm_within: u64 },
    Confirm { name: &'a str, guard: Guard, liveness: Option<Liveness<'a>>, lease: Option<u64> },
    Attach { name: &'a str, guard: Guard, lease: Option<u64> },
    Release { name: &'a str, authority: Authority<'a> },
    ReportConflict { name: &'a str, guard: Guard, port: u16 },
    Reclaim { name: &'a str, guard: Guard, ground: Ground<'a>, under: Leader },
    Quarantine { worker: &'a str, ports: Vec<u16>, reason: &'a str, by: Actor },
    LiftQuarantine { worker: &'a str, ports: Vec<u16>, by: Actor, seen: u64 },
    GrantLease { ttl: u64 },
    RevokeLease { id: u64 },
    ExpireLease { id: u64, under: Leader },
    TakeDigest,
    CompareDigest { entry: u64, command: u32, revision: u64, digest: [u8; 32] },
    SetFeatureLevel { level: u32 },
}

/// The allocation that a command means.
#[derive(Debug, Encode, Decode)]
pub struct Guard {
    token: u64,
    version: u64,
}

impl Guard {
    fn of(token: Token, version: Revision) -> Guard {
        Guard { token: token.0, version: version.0 }
    }
}

#[derive(Debug, Encode, Decode)]
pub struct Leader {
    term: u64,
    node: u64,
}

impl From<table::Leader> for Leader {
    fn from(table::Leader { term, node }: table::Leader) -> Self {
        Leader { term, node }
    }
}

impl From<Leader> for table::Leader {
    fn from(Leader { term, node }: Leader) -> Self {
        table::Leader { term, node }
    }
}

#[derive(Debug, Encode, Decode)]
pub enum Actor {
    Operator,
    Leader(Leader),
}

impl From<table::Actor> for Actor {
    fn from(actor: table::Actor) -> Self {
        match actor {
            table::Actor::Operator => Actor::Operator,
            table::Actor::Leader(leader) => Actor::Leader(leader.into()),
        }
    }
}

impl From<Actor> for table::Actor {
    fn from(actor: Actor) -> Self {
        match actor {
            Actor::Operator => table::Actor::Operator,
            Actor::Leader(leader) => table::Actor::Leader(leader.into()),
        }
    }
}

#[derive(Debug, Encode, BorrowDecode)]
pub enum Ground<'a> {
    Unconfirmed,
    Gone { identity: Identity<'a>, seen: u64, reason: &'a str },
}

impl<'a> From<&'a table::Ground> for Ground<'a> {
    fn from(ground: &'a table::Ground) -> Self {
        match ground {
            table::Ground::Unconfirmed => Ground::Unconfirmed,
            table::Ground::Gone { identity, seen, reason } => {
                Ground::Gone { identity: identity.into(), seen: seen.0, reason }
            }
        }
    }
}

impl Ground<'_> {
    fn restore(self) -> table::Ground {
        match self {
            Ground::Unconfirmed => table::Ground::Unconfirmed,
            Ground::Gone { identity, seen, reason } => table::Ground::Gone {
                identity: identity.restore(),
                seen: Revision(seen),
                reason: reason.into(),
            },
        }
    }
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct Liveness<'a> {
    boot_id: &'a str,
    handle: Handle<'a>,
}

#[derive(Debug, Encode, BorrowDecode)]
enum Handle<'a> {
    Process { pid: u32, start_ticks: u64 },
    Cgroup(&'a str),
    Container(&'a str),
}

impl<'a> From<&'a table::Liveness> for Liveness<'a> {
    fn from(table::Liveness { boot_id, handle }: &'a table::Liveness) -> Self {
        let handle = match handle {
            table::Handle::Process { pid, start_ticks } => {
                Handle::Process { pid: *pid, start_ticks: *start_ticks }
            }
            table::Handle::Cgroup(path) => Handle::Cgroup(path),
            table::Handle::Container(id) => Handle::Container(id),
        };
        Liveness { boot_id, handle }
    }
}

impl Liveness<'_> {
    pub(super) fn restore(self) -> Checked<table::Liveness> {
        let Liveness { boot_id, handle } = self;
        let handle = match handle {
            Handle::Process { pid, start_ticks } => table::Handle::Process { pid, start_ticks },
            Handle::Cgroup(path) => table::Handle::Cgroup(path.into()),
            Handle::Container(id) => table::Handle::Container(id.into()),
        };
        let liveness = table::Liveness { boot_id: boot_id.into(), handle };
        liveness.validate()?;
        Ok(liveness)
    }
}

#[derive(Debug, Encode, BorrowDecode)]
pub enum Authority<'a> {
    Holder(u64),
    Operator(&'a str),
}

impl<'a> From<&'a table::Command> for Command<'a> {
    fn from(command: &'a table::Command) -> Self {
        let numbers = |ports: &[Port]| ports.iter().map(|p| p.get()).collect();
        match command {
            table::Command::RegisterWorker { name, spec } => {
                Command::RegisterWorker { name: name.as_str(), spec: spec.into() }
            }
            table::Command::UpdateWorker { name, patch } => {
                Command::UpdateWorker { name: name.as_str(), patch: patch.into() }
            }
            table::Command::SetWorkerPhase { name, phase, by } => Command::SetWorkerPhase {
                name: name.as_str(),
                phase: (*phase).into(),
                by: (*by).into(),
            },
            table::Command::VerifyWorker { name, by } => {
                Command::VerifyWorker { name: name.as_str(), by: (*by).into() }
            }
            table::Command::RemoveWorker { name, force } => {
                Command::RemoveWorker { name: name.as_str(), force: force.as_deref() }
            }
            table::Command::Allocate { claims, confirm_within } => Command::Allocate {
                claims: claims.iter().map(|claim| Claim::from(&**claim)).collect(),
                confirm_within: confirm_within.0,
            },
            table::Command::Confirm { name, token, version, liveness, lease: id } => {
                Command::Confirm {
                    name: name.as_str(),
                    guard: Guard::of(*token, *version),
                    liveness: liveness.as_ref().map(Liveness::from),
                    lease: lease(id),
                }
            }
            table::Command::Attach { name, token, version, lease: id } => Command::Attach {
                name: name.as_str(),
                guard: Guard::of(*token, *version),
                lease: lease(id),
            },
            table::Command::Release { name, authority } => Command::Release {
                name: name.as_str(),
                authority: match authority {
                    table::Authority::Holder(token) => Authority::Holder(token.0),
                    table::Authority::Operator { reason } => Authority::Operator(reason),
                },
            },
            table::Command::ReportConflict { name, token, version, port } => {
                Command::ReportConflict {
                    name: name.as_str(),
                    guard: Guard::of(*token, *version),
                    port: port.get(),
                }
            }
            table::Command::Reclaim { name, token, version, ground, under } => Command::Reclaim {
                name: name.as_str(),
                guard: Guard::of(*token, *version),
                ground: ground.into(),
                under: (*under).into(),
            },
            table::Command::Quarantine { worker, ports, reason, by } => Command::Quarantine {
                worker: worker.as_str(),
                ports: numbers(ports),
                reason,
                by: (*by).into(),
            },
            table::Command::LiftQuarantine { worker, ports, by, seen } => Command::LiftQuarantine {
                worker: worker.as_str(),
                ports: numbers(ports),
                by: (*by).into(),
                seen: seen.0,
            },
            table::Command::GrantLease { ttl } => Command::GrantLease { ttl: ttl.0 },
            table::Command::RevokeLease { id } => Command::RevokeLease { id: id.0 },
            table::Command::ExpireLease { id, under } => {
                Command::ExpireLease { id: id.0, under: (*under).into() }
            }
            table::Command::Checkpoint(table::Checkpoint::Take) => Command::TakeDigest,
            table::Command::Checkpoint(table::Checkpoint::Compare {
                entry,
                command,
                revision,
                digest,
            }) => Command::CompareDigest {
                entry: *entry,
                command: *command,
                revision: revision.0,
                digest: digest.0,
            },
            table::Command::SetFeatureLevel { level } => Command::SetFeatureLevel { level: *level },
        }
    }
}

impl Command<'_> {
    pub(super) fn restore(self) -> Checked<table::Command> {
        let instance = table::InstanceName::parse;
        let worker_name = table::WorkerName::parse;
        Ok(match self {
            Command::RegisterWorker { name, spec } => {
                table::Command::RegisterWorker { name: worker_name(name)?, spec: spec.restore()? }
            }
            Command::UpdateWorker { name, patch } => {
                table::Command::UpdateWorker { name: worker_name(name)?, patch: patch.restore()? }
            }
            Command::SetWorkerPhase { name, phase, by } => table::Command::SetWorkerPhase {
                name: worker_name(name)?,
                phase: phase.into(),
                by: by.into(),
            },
            Command::VerifyWorker { name, by } => {
                table::Command::VerifyWorker { name: worker_name(name)?, by: by.into() }
            }
            Command::RemoveWorker { name, force } => table::Command::RemoveWorker {
                name: worker_name(name)?,
                force: force.map(String::from),
            },
            Command::Allocate { claims, confirm_within } => table::Command::Allocate {
                claims: each(claims, |claim| claim.restore().map(Arc::new))?,
                confirm_within: Millis(confirm_within),
            },
            Command::Confirm { name, guard: Guard { token, version }, liveness, lease } => {
                table::Command::Confirm {
                    name: instance(name)?,
                    token: Token(token),
                    version: Revision(version),
                    liveness: optional(liveness, Liveness::restore)?,
                    lease: lease.map(LeaseId),
                }
            }
            Command::Attach { name, guard: Guard { token, version }, lease } => {
                table::Command::Attach {
                    name: instance(name)?,
                    token: Token(token),
                    version: Revision(version),
                    lease: lease.map(LeaseId),
                }
            }
            Command::Release { name, authority } => table::Command::Release {
                name: instance(name)?,
                authority: match authority {
                    Authority::Holder(token) => table::Authority::Holder(Token(token)),
                    Authority::Operator(reason) => {
                        table::Authority::Operator { reason: reason.into() }
                    }
                },
            },
            Command::ReportConflict { name, guard: Guard { token, version }, port: number } => {
                table::Command::ReportConflict {
                    name: instance(name)?,
                    token: Token(token),
                    version: Revision(version),
                    port: port(number)?,
                }
            }
            Command::Reclaim { name, guard: Guard { token, version }, ground, under } => {
                table::Command::Reclaim {
                    name: instance(name)?,
                    token: Token(token),
                    version: Revision(version),
                    ground: ground.restore(),
                    under: under.into(),
                }
            }
            Command::Quarantine { worker, ports, reason, by } => table::Command::Quarantine {
                worker: worker_name(worker)?,
                ports: each(ports, port)?,
                reason: reason.into(),
                by: by.into(),
            },
            Command::LiftQuarantine { worker, ports, by, seen } => table::Command::LiftQuarantine {
                worker: worker_name(worker)?,
                ports: each(ports, port)?,
                by: by.into(),
                seen: Revision(seen),
            },
            Command::GrantLease { ttl } => table::Command::GrantLease { ttl: Millis(ttl) },
            Command::RevokeLease { id } => table::Command::RevokeLease { id: LeaseId(id) },
            Command::ExpireLease { id, under } => {
                table::Command::ExpireLease { id: LeaseId(id), under: under.into() }
            }
            Command::TakeDigest => table::Command::Checkpoint(table::Checkpoint::Take),
            Command::CompareDigest { entry, command, revision, digest } => {
                table::Command::Checkpoint(table::Checkpoint::Compare {
                    entry,
                    command,
                    revision: Revision(revision),
                    digest: table::Digest(digest),
                })
            }
            Command::SetFeatureLevel { level } => table::Command::SetFeatureLevel { level },
        })
    }
}
