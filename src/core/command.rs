//! What can be asked of the table, and what it answers.
//!
//! Commands are total: the same state and the same command give the same outcome on every replica,
//! and a refusal is an outcome like any other. A command that changes nothing takes no revision.

use std::sync::Arc;

use smallvec::SmallVec;

use super::allocation::{Allocation, Departure, Lease, Liveness, ReleaseReason};
use super::claim::Claim;
use super::digest::Digest;
use super::limits::*;
use super::name::{
    InstanceName, Invalid, Leader, LeaseId, Millis, Port, RangeName, Revision, Token, WorkerName,
    check_text,
};
use super::ports::Taken;
use super::worker::{Identity, Worker, WorkerPatch, WorkerPhase, WorkerSpec};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Adds a worker, or replaces the spec of one: what it holds and its quarantines stay.
    RegisterWorker {
        name: WorkerName,
        spec: WorkerSpec,
    },
    /// Changes a worker that exists.
    UpdateWorker {
        name: WorkerName,
        patch: WorkerPatch,
    },
    /// An operator sets `Ready`, `Cordoned` or `Draining`; on a lost or unverified worker that is the
    /// phase which it will have again. The leader sets `Lost`, and `Ready` for "it reports again".
    SetWorkerPhase {
        name: WorkerName,
        phase: WorkerPhase,
        by: Actor,
    },
    /// A restored worker was compared with its host: it grants again.
    VerifyWorker {
        name: WorkerName,
        by: Actor,
    },
    /// Refused while anything is held. `force`: an operator's reason to free all of it.
    RemoveWorker {
        name: WorkerName,
        force: Option<String>,
    },
    /// All claims or none; several are a gang.
    Allocate {
        claims: Vec<Arc<Claim>>,
        /// For claims that do not say themselves.
        confirm_within: Millis,
    },
    /// `RESERVED` → `BOUND`, and revives what is `LINGERING`. `version` 0 is unguarded. What is
    /// `None` stays as it is.
    Confirm {
        name: InstanceName,
        token: Token,
        version: Revision,
        liveness: Option<Liveness>,
        lease: Option<LeaseId>,
    },
    /// Moves an allocation to another lease, or takes it off its own. `version` 0 is unguarded.
    Attach {
        name: InstanceName,
        token: Token,
        version: Revision,
        lease: Option<LeaseId>,
    },
    Release {
        name: InstanceName,
        authority: Authority,
    },
    /// The holder found `port` in use by a stranger. `version` 0 is unguarded.
    ReportConflict {
        name: InstanceName,
        token: Token,
        version: Revision,
        port: Port,
    },
    /// The system takes an allocation back: refused unless it is still what was judged.
    Reclaim {
        name: InstanceName,
        token: Token,
        version: Revision,
        ground: Ground,
        under: Leader,
    },
    Quarantine {
        worker: WorkerName,
        ports: Vec<Port>,
        reason: String,
        by: Actor,
    },
    /// The leader lifts only what no operator set, and nothing newer than what was seen.
    LiftQuarantine {
        worker: WorkerName,
        ports: Vec<Port>,
        by: Actor,
        seen: Revision,
    },
    GrantLease {
        ttl: Millis,
    },
    /// Ends a lease by its holder's word.
    RevokeLease {
        id: LeaseId,
    },
    /// Ends a lease that was not kept alive.
    ExpireLease {
        id: LeaseId,
        under: Leader,
    },
    /// Replicas prove that they agree. Changes nothing.
    Checkpoint(Checkpoint),
    /// From here on `apply` does what this level does. Only upward; to be proposed once every member
    /// knows it, for one that does not must stop here.
    SetFeatureLevel {
        level: u32,
    },
}

/// On whose word something is done. What a leader's timers and sweeper propose counts only while it
/// leads: it is refused if the log took it under another leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Actor {
    Operator,
    Leader(Leader),
}

/// Why the system may take an allocation back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ground {
    /// It was not confirmed in time. Proves nothing: on a worker with an agent it lingers.
    Unconfirmed,
    /// An agent saw that it is gone, on the worker of this identity and as of revision `seen`.
    Gone { identity: Identity, seen: Revision, reason: String },
}

/// What is known of a command besides itself, from the log entry that it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Origin {
    /// Who wrote the entry.
    pub leader: Leader,
    /// When, by its wall clock. For people: nothing is decided by it.
    pub at: Millis,
}

/// One of the two steps in which replicas compare their tables. A digest takes time in the size of
/// the table, and `apply` must not: so a replica takes its digest beside `apply`, of a clone, and
/// the comparison is a command of its own, later in the log. Whether a replica agrees is no outcome:
/// outcomes are the same on all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpoint {
    /// Every replica takes the digest of the table as it is here in the log.
    Take,
    /// What most replicas had at the `Take` that is command number `command` (from 0) of log entry
    /// `entry`. A replica that took another digest there must stop.
    Compare { entry: u64, command: u32, revision: Revision, digest: Digest },
}

/// By what right something is released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Authority {
    /// The holder vouches that it is done.
    Holder(Token),
    /// An operator's override; recorded with its reason.
    Operator { reason: String },
}

impl Command {
    pub fn allocate(
        claims: impl IntoIterator<Item = impl Into<Arc<Claim>>>,
        confirm_within: Millis,
    ) -> Command {
        Command::Allocate { claims: claims.into_iter().map(Into::into).collect(), confirm_within }
    }

    /// Checks every bound that the types do not hold by themselves. Run before a command is
    /// proposed; `apply` runs it again, so that no log can break the table.
    pub fn validate(&self) -> Result<(), Invalid> {
        let some_ports = |ports: &[Port]| match ports.len() {
            1..=QUARANTINE_PORTS_MAX => Ok(()),
            n => Err(Invalid::new("ports", n, format!("1 to {QUARANTINE_PORTS_MAX} ports"))),
        };
        match self {
            Command::RegisterWorker { spec, .. } => spec.validate(),
            Command::Allocate { claims, confirm_within } => {
                Millis::span("confirm_within", confirm_within.0)?;
                if claims.is_empty() || claims.len() > CLAIMS_MAX {
                    let limit = format!("1 to {CLAIMS_MAX} claims");
                    return Err(Invalid::new("claims", claims.len(), limit));
                }
                let mut names = std::collections::BTreeSet::new();
                for (i, claim) in claims.iter().enumerate() {
                    claim.validate().map_err(|e| e.within(format!("claims[{i}]")))?;
                    if !names.insert(&claim.name) {
                        let limit = "named once in a gang";
                        return Err(Invalid::new(format!("claims[{i}].name"), &claim.name, limit));
                    }
                }
                Ok(())
            }
            Command::Quarantine { ports, reason, .. } => {
                some_ports(ports)?;
                check_text("reason", reason, REASON_MAX_BYTES)
            }
            Command::LiftQuarantine { ports, .. } => some_ports(ports),
            Command::Confirm { liveness: Some(liveness), .. } => liveness.validate(),
            Command::GrantLease { ttl } => Millis::span("ttl", ttl.0).map(drop),
            Command::RemoveWorker { force: Some(reason), .. }
            | Command::Reclaim { ground: Ground::Gone { reason, .. }, .. } => {
                check_text("reason", reason, REASON_MAX_BYTES)
            }
            Command::Release { authority: Authority::Operator { reason }, .. } => {
                check_text("reason", reason, REASON_MAX_BYTES)
            }
            Command::UpdateWorker { patch, .. } => patch.validate(),
            Command::SetWorkerPhase { phase, by, .. } => may_set(*by, *phase),
            Command::VerifyWorker { .. }
            | Command::RemoveWorker { .. }
            | Command::Confirm { .. }
            | Command::Attach { .. }
            | Command::Release { .. }
            | Command::ReportConflict { .. }
            | Command::Reclaim { .. }
            | Command::RevokeLease { .. }
            | Command::ExpireLease { .. }
            | Command::Checkpoint(_)
            | Command::SetFeatureLevel { .. } => Ok(()),
        }
    }

    /// The leader under which alone it counts.
    pub(super) fn under(&self) -> Option<Leader> {
        match self {
            Command::Reclaim { under, .. } | Command::ExpireLease { under, .. } => Some(*under),
            Command::SetWorkerPhase { by: Actor::Leader(under), .. }
            | Command::VerifyWorker { by: Actor::Leader(under), .. }
            | Command::Quarantine { by: Actor::Leader(under), .. }
            | Command::LiftQuarantine { by: Actor::Leader(under), .. } => Some(*under),
            _ => None,
        }
    }

    /// All that [`Command::kind`] may say.
    pub const KINDS: [&str; 18] = [
        "register_worker",
        "update_worker",
        "set_worker_phase",
        "verify_worker",
        "remove_worker",
        "allocate",
        "confirm",
        "attach",
        "reclaim",
        "grant_lease",
        "revoke_lease",
        "expire_lease",
        "release",
        "report_conflict",
        "quarantine",
        "lift_quarantine",
        "checkpoint",
        "set_feature_level",
    ];

    /// For metrics and traces.
    pub fn kind(&self) -> &'static str {
        match self {
            Command::RegisterWorker { .. } => "register_worker",
            Command::UpdateWorker { .. } => "update_worker",
            Command::SetWorkerPhase { .. } => "set_worker_phase",
            Command::VerifyWorker { .. } => "verify_worker",
            Command::RemoveWorker { .. } => "remove_worker",
            Command::Allocate { .. } => "allocate",
            Command::Confirm { .. } => "confirm",
            Command::Attach { .. } => "attach",
            Command::Reclaim { .. } => "reclaim",
            Command::GrantLease { .. } => "grant_lease",
            Command::RevokeLease { .. } => "revoke_lease",
            Command::ExpireLease { .. } => "expire_lease",
            Command::Release { .. } => "release",
            Command::ReportConflict { .. } => "report_conflict",
            Command::Quarantine { .. } => "quarantine",
            Command::LiftQuarantine { .. } => "lift_quarantine",
            Command::Checkpoint(_) => "checkpoint",
            Command::SetFeatureLevel { .. } => "set_feature_level",
        }
    }
}

/// `Lost` is the leader's to say, and what a worker is to be else the operator's; `Unverified` comes
/// with a restore alone.
fn may_set(by: Actor, phase: WorkerPhase) -> Result<(), Invalid> {
    use WorkerPhase::{Cordoned, Draining, Lost, Ready};
    match (by, phase) {
        (Actor::Operator, Ready | Cordoned | Draining) | (Actor::Leader(_), Ready | Lost) => Ok(()),
        (Actor::Operator, _) => {
            Err(Invalid::new("phase", phase.name(), "READY, CORDONED or DRAINING"))
        }
        (Actor::Leader(_), _) => Err(Invalid::new("phase", phase.name(), "READY or LOST")),
    }
}

/// An outcome and the revision of the table that it speaks of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    pub revision: Revision,
    pub outcome: Result<Outcome, Refusal>,
}

impl Applied {
    /// On which the allocations are that it tells of.
    pub fn workers(&self) -> impl Iterator<Item = &WorkerName> {
        self.outcome.iter().flat_map(Outcome::allocations).map(|held| &held.worker)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The worker as it is now (register, update, phase, quarantine, lift).
    Worker(Arc<Worker>),
    /// `removed` is false where there was none.
    WorkerRemoved {
        removed: bool,
    },
    /// In the order of the claims. `repeated`: an earlier request had been granted already.
    Allocated {
        allocations: Vec<Arc<Allocation>>,
        repeated: bool,
    },
    Confirmed(Arc<Allocation>),
    Attached(Arc<Allocation>),
    /// Its holder fell silent.
    Lingers(Arc<Allocation>),
    /// What was released; `None` where it was gone already.
    Released(Option<Arc<Allocation>>),
    /// The port was quarantined, and another one given for it.
    Swapped(Arc<Allocation>),
    /// The port was quarantined, and the allocation reclaimed because no other could be given.
    Reclaimed {
        allocation: Arc<Allocation>,
        reason: String,
    },
    Lease(Arc<Lease>),
    /// The lease as it was; `None` where it was gone already.
    LeaseEnded(Option<Arc<Lease>>),
    /// Of a checkpoint: it is in the log.
    Noted,
    /// The one that there is now.
    FeatureLevel(u32),
}

impl Outcome {
    /// Those that it tells of.
    pub fn allocations(&self) -> &[Arc<Allocation>] {
        match self {
            Outcome::Allocated { allocations, .. } => allocations,
            Outcome::Confirmed(allocation)
            | Outcome::Attached(allocation)
            | Outcome::Lingers(allocation)
            | Outcome::Released(Some(allocation))
            | Outcome::Swapped(allocation)
            | Outcome::Reclaimed { allocation, .. } => std::slice::from_ref(allocation),
            Outcome::Worker(_)
            | Outcome::WorkerRemoved { .. }
            | Outcome::Released(None)
            | Outcome::Lease(_)
            | Outcome::LeaseEnded(_)
            | Outcome::Noted
            | Outcome::FeatureLevel(_) => &[],
        }
    }
}

/// Why a command changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(transparent)]
    Invalid(#[from] Invalid),
    #[error("no worker {0}")]
    NoWorker(WorkerName),
    #[error("no allocation {name}{}", describe_departure(.departed))]
    NoAllocation { name: InstanceName, departed: Option<Departure> },
    #[error("no lease {0}: it was never granted, or it has ended")]
    NoLease(LeaseId),
    #[error("lease {lease} has {limit} allocations already, which is the limit")]
    LeaseFull { lease: LeaseId, limit: usize },
    #[error("{name} is LINGERING ({reason}): only a confirmation revives it")]
    Lingers { name: InstanceName, reason: String },
    #[error("{name}: {what}")]
    NotProven { name: InstanceName, what: String },
    #[error("proposed under {proposed}, but {leader} leads")]
    Deposed { proposed: Leader, leader: Leader },
    #[error("{name} is held since revision {} on worker {} under uid {}; the request differs in its {difference}",
        .holder.token, .holder.worker, .holder.claim.uid)]
    NameTaken { name: InstanceName, holder: Arc<Allocation>, difference: &'static str },
    #[error("{name}: token {given} is not its token {held}")]
    WrongToken { name: InstanceName, given: Token, held: Token },
    #[error("{name}: version {given} is not its version {held}; it changed since")]
    WrongVersion { name: InstanceName, given: Revision, held: Revision },
    #[error("{name} does not hold port {port}")]
    PortNotHeld { name: InstanceName, port: Port },
    #[error("worker {worker} is {}: nothing new is placed there", .phase.name())]
    WorkerNotReady { worker: WorkerName, phase: WorkerPhase },
    #[error("worker {worker} still has {count} allocations, {example} among them")]
    WorkerInUse { worker: WorkerName, count: u64, example: InstanceName },
    #[error("worker {worker}: {what}")]
    WouldLose { worker: WorkerName, what: String },
    #[error("{what} {value} belongs to worker {owner}")]
    IdentityTaken { what: &'static str, value: String, owner: WorkerName },
    #[error("port {port} of worker {worker} is {}", describe_taken(.taken))]
    PortNotFree { worker: WorkerName, port: Port, taken: Taken },
    #[error("claim {name}: nothing fits: {shortage}")]
    NothingFits { name: InstanceName, shortage: Shortage },
    #[error("the cluster has feature level {held}, and does not go back to {asked}")]
    FeatureLevelPassed { asked: u32, held: u32 },
    #[error("feature level {asked} is not known: this build knows 1 to {known}")]
    FeatureLevelUnknown { asked: u32, known: u32 },
    #[error("the cluster is full: {what} {limit}")]
    TableFull { what: &'static str, limit: usize },
}

/// What was full, and by how much.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Shortage {
    #[error("worker {worker}: {lack}")]
    OnWorker { worker: WorkerName, lack: Lack },
    /// `looked_at` of `candidates` workers were weighed (the search is bounded).
    #[error("{}", describe_selection(*.looked_at, *.candidates, *.not_ready, .reasons))]
    OnSelection {
        looked_at: u64,
        candidates: u64,
        /// Workers of the whole cluster that are not `Ready`, and so were no candidates.
        not_ready: u64,
        /// How many workers lacked what; most frequent first, then in the order of [`LackKind`].
        reasons: Vec<(LackKind, u64)>,
    },
}

/// What one worker lacks for one claim.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    #[error("it has no port range")]
    NoRanges,
    #[error("it has no range {0}")]
    NoRange(RangeName),
    #[error("port {port} is {}", describe_taken(.taken))]
    Port { port: Port, taken: Taken },
    #[error(
        "range {range} has {free} of {managed} ports free, {wanted} more wanted ({held} held{}, {quarantined} quarantined, {reserved} reserved)", by(.holders)
    )]
    Ports {
        range: RangeName,
        wanted: u32,
        free: u32,
        managed: u32,
        held: u32,
        quarantined: u32,
        reserved: u32,
        /// Some of them.
        holders: Vec<InstanceName>,
    },
    #[error("range {range} has {free} ports free but at most {longest} in a row, {wanted} wanted")]
    Band { range: RangeName, wanted: u32, longest: u32, free: u32 },
    #[error("it has no GPU {0}")]
    NoGpu(u32),
    #[error("GPU {index} has {free_bytes} of {memory_bytes} bytes free, {wanted_bytes} wanted; held by {}", list(.holders))]
    GpuMemory {
        index: u32,
        wanted_bytes: u64,
        free_bytes: u64,
        memory_bytes: u64,
        holders: Vec<InstanceName>,
    },
    #[error("GPU {index} is wanted alone and held by {}", list(.holders))]
    GpuBusy { index: u32, holders: Vec<InstanceName> },
    #[error(
        "{fitting} of its {total} GPUs fit, {wanted} wanted; the emptiest has {most_free_bytes} bytes free (GPUs held{})", by(.holders)
    )]
    Gpus {
        wanted: u32,
        fitting: u32,
        total: u32,
        most_free_bytes: u64,
        /// Some of them.
        holders: Vec<InstanceName>,
    },
}

/// The kinds of [`Lack`], to be counted over many workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LackKind {
    Labels,
    NoRange,
    PortTaken,
    Ports,
    Band,
    NoGpu,
    GpuMemory,
    GpuBusy,
    Gpus,
}

impl LackKind {
    /// For programs.
    pub fn name(self) -> &'static str {
        match self {
            LackKind::Labels => "labels",
            LackKind::NoRange => "range",
            LackKind::PortTaken => "port",
            LackKind::Ports => "ports",
            LackKind::Band => "band",
            LackKind::NoGpu => "gpu",
            LackKind::GpuMemory => "gpu_memory",
            LackKind::GpuBusy => "idle_gpu",
            LackKind::Gpus => "gpus",
        }
    }

    pub fn text(self) -> &'static str {
        match self {
            LackKind::Labels => "labels do not match",
            LackKind::NoRange => "no such port range",
            LackKind::PortTaken => "the port is not free there",
            LackKind::Ports => "too few ports free",
            LackKind::Band => "too few ports in a row",
            LackKind::NoGpu => "no such GPU",
            LackKind::GpuMemory => "too little GPU memory free",
            LackKind::GpuBusy => "the GPU is in use",
            LackKind::Gpus => "too few GPUs fit",
        }
    }
}

impl Lack {
    /// Who has what is lacking: some of them.
    pub fn holders(&self) -> &[InstanceName] {
        match self {
            Lack::Port { taken: Taken::Held(holder), .. } => std::slice::from_ref(holder),
            Lack::Ports { holders, .. }
            | Lack::GpuMemory { holders, .. }
            | Lack::GpuBusy { holders, .. }
            | Lack::Gpus { holders, .. } => holders,
            Lack::NoRanges
            | Lack::NoRange(_)
            | Lack::Port { .. }
            | Lack::Band { .. }
            | Lack::NoGpu(_) => &[],
        }
    }

    pub fn kind(&self) -> LackKind {
        match self {
            Lack::NoRanges | Lack::NoRange(_) => LackKind::NoRange,
            Lack::Port { .. } => LackKind::PortTaken,
            Lack::Ports { .. } => LackKind::Ports,
            Lack::Band { .. } => LackKind::Band,
            Lack::NoGpu(_) => LackKind::NoGpu,
            Lack::GpuMemory { .. } => LackKind::GpuMemory,
            Lack::GpuBusy { .. } => LackKind::GpuBusy,
            Lack::Gpus { .. } => LackKind::Gpus,
        }
    }
}

fn describe_departure(departed: &Option<Departure>) -> String {
    departed.as_ref().map_or_else(String::new, |Departure { revision, worker, why, .. }| {
        format!(": {why}, on worker {worker} at revision {revision}")
    })
}

fn describe_taken(taken: &Taken) -> String {
    match taken {
        Taken::Held(holder) => format!("held by {holder}"),
        Taken::Quarantined(reason) if reason.is_empty() => "quarantined".into(),
        Taken::Quarantined(reason) => format!("quarantined ({reason})"),
        Taken::Reserved => "reserved".into(),
        Taken::Unmanaged => "in none of the worker's ranges".into(),
        Taken::OutOf(range) => format!("not in range {range}"),
    }
}

fn describe_selection(
    looked_at: u64,
    candidates: u64,
    not_ready: u64,
    reasons: &[(LackKind, u64)],
) -> String {
    let mut parts: Vec<_> =
        reasons.iter().map(|(kind, count)| format!("{} on {count}", kind.text())).collect();
    if not_ready > 0 {
        parts.push(format!("{not_ready} not ready"));
    }
    let why = if parts.is_empty() { "no worker has such labels".into() } else { parts.join(", ") };
    format!("looked at {looked_at} of {candidates} workers: {why}")
}

/// Holders named in a refusal, at most. Where there are more, one more is in its list.
pub(super) const HOLDERS_SHOWN: usize = 5;

/// Whoever asks wants to know whom to turn to.
fn list(names: &[InstanceName]) -> String {
    let shown: Vec<_> = names.iter().take(HOLDERS_SHOWN).map(InstanceName::as_str).collect();
    let more = if names.len() > HOLDERS_SHOWN { " and more" } else { "" };
    shown.join(", ") + more
}

/// The end of "held": empty where nobody is named.
fn by(names: &[InstanceName]) -> String {
    if names.is_empty() { String::new() } else { format!(" by {}", list(names)) }
}

/// What one command changed, in order: mostly one thing, which lies here then.
pub type Events = SmallVec<[Event; 1]>;

/// One change of the table, for watchers. Events of one revision form a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Registered, or its spec, phase or quarantines changed.
    Worker(Arc<Worker>),
    WorkerRemoved(WorkerName),
    Allocated(Arc<Allocation>),
    /// Its last change says how.
    Changed(Arc<Allocation>),
    Released {
        allocation: Arc<Allocation>,
        why: ReleaseReason,
    },
    LeaseGranted(Arc<Lease>),
    /// `expired`: not kept alive, else by its holder's word.
    LeaseEnded {
        lease: Arc<Lease>,
        expired: bool,
    },
    FeatureLevel(u32),
}

impl Event {
    /// The one that changed, if it is an allocation.
    pub fn allocation(&self) -> Option<&Allocation> {
        match self {
            Event::Allocated(allocation)
            | Event::Changed(allocation)
            | Event::Released { allocation, .. } => Some(allocation),
            Event::Worker(_)
            | Event::WorkerRemoved(_)
            | Event::LeaseGranted(_)
            | Event::LeaseEnded { .. }
            | Event::FeatureLevel(_) => None,
        }
    }
}
