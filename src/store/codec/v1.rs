//! Version 1: the mirror structs, as bincode's standard configuration writes them (little endian,
//! variable-length integers; an enum's variant by its place). Fields and variants are never
//! reordered or removed here. A variant is added, at the end, only where nothing writes it before all
//! members can read it. Texts borrow from what is written or read.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::hint::black_box;
use std::sync::Arc;

use bincode::de::BorrowDecoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};

use super::few::{Few, read_length, write_length};
use super::{MemberRecord, MembershipRecord};
use crate::core::{self as table, Invalid, LeaseId, Millis, Port, Quarantine, Revision, Token};
#[cfg(planted)]
use crate::planted::{self, Bug};

/// Why something that was read is not what it should be.
#[derive(Debug)]
pub struct Why(String);

impl From<Why> for String {
    fn from(why: Why) -> String {
        why.0
    }
}

impl From<Invalid> for Why {
    fn from(invalid: Invalid) -> Why {
        Why(invalid.to_string())
    }
}

impl From<String> for Why {
    fn from(why: String) -> Why {
        Why(why)
    }
}

type Checked<T> = Result<T, Why>;

/// Without room for more: most of them are kept for as long as what they are part of.
fn each<T, U>(
    items: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>,
    mut one: impl FnMut(T) -> Checked<U>,
) -> Checked<Vec<U>> {
    let items = items.into_iter();
    let mut all = Vec::with_capacity(items.len());
    for item in items {
        all.push(one(item)?);
    }
    Ok(all)
}

fn optional<T, U>(item: Option<T>, one: impl FnOnce(T) -> Checked<U>) -> Checked<Option<U>> {
    item.map(one).transpose()
}

fn port(number: u16) -> Checked<Port> {
    Ok(Port::new("port", u64::from(number))?)
}

// The log.

#[derive(Debug, Encode, Decode)]
pub struct Position {
    term: u64,
    node: u64,
    index: u64,
}

impl From<&super::Position> for Position {
    fn from(&super::Position { term, node, index }: &super::Position) -> Self {
        Position { term, node, index }
    }
}

impl Position {
    pub fn restore(self) -> super::Position {
        let Position { term, node, index } = self;
        super::Position { term, node, index }
    }
}

#[derive(Debug, Encode, Decode)]
pub struct Ballot {
    term: u64,
    node: u64,
    committed: bool,
}

impl From<&super::Ballot> for Ballot {
    fn from(&super::Ballot { term, node, committed }: &super::Ballot) -> Self {
        Ballot { term, node, committed }
    }
}

impl Ballot {
    pub fn restore(self) -> super::Ballot {
        let Ballot { term, node, committed } = self;
        super::Ballot { term, node, committed }
    }
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct Membership<'a> {
    configs: Vec<Vec<u64>>,
    nodes: Vec<Member<'a>>,
}

#[derive(Debug, Encode, BorrowDecode)]
struct Member<'a> {
    id: u64,
    cluster_id: &'a str,
    peer: &'a str,
    client: &'a str,
    incarnation: &'a str,
}

impl<'a> From<&'a MembershipRecord> for Membership<'a> {
    fn from(MembershipRecord { configs, nodes }: &'a MembershipRecord) -> Self {
        Membership {
            configs: configs.iter().map(|ids| ids.iter().copied().collect()).collect(),
            nodes: nodes
                .iter()
                .map(|(id, MemberRecord { cluster_id, peer, client, incarnation })| Member {
                    id: *id,
                    cluster_id,
                    peer,
                    client,
                    incarnation,
                })
                .collect(),
        }
    }
}

impl Membership<'_> {
    pub fn restore(self) -> MembershipRecord {
        let Membership { configs, nodes } = self;
        MembershipRecord {
            configs: configs.into_iter().map(BTreeSet::from_iter).collect(),
            nodes: nodes
                .into_iter()
                .map(|Member { id, cluster_id, peer, client, incarnation }| {
                    let member = MemberRecord {
                        cluster_id: cluster_id.into(),
                        peer: peer.into(),
                        client: client.into(),
                        incarnation: incarnation.into(),
                    };
                    (id, member)
                })
                .collect(),
        }
    }
}

#[derive(Debug, Encode, BorrowDecode)]
pub enum Payload<'a> {
    Blank,
    Batch {
        /// Milliseconds since the epoch.
        at: u64,
        commands: Commands<'a>,
    },
    Membership(Membership<'a>),
}

/// The bytes of a list of [`Command`], each of which is made when it is written or read: together
/// they are larger than what they are made from.
#[derive(Debug)]
pub struct Commands<'a>(pub Cow<'a, [table::Command]>);

impl Encode for Commands<'_> {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        write_length(self.0.len(), encoder)?;
        self.0.iter().try_for_each(|command| Command::from(command).encode(encoder))
    }
}

impl<'de, Context> BorrowDecode<'de, Context> for Commands<'_> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = Context>>(
        decoder: &mut D,
    ) -> Result<Self, DecodeError> {
        let length = read_length::<table::Command>(decoder)?;
        let mut commands = Vec::with_capacity(length);
        for _ in 0..length {
            decoder.unclaim_bytes_read(size_of::<table::Command>());
            let command = Command::borrow_decode(decoder)?;
            commands.push(command.restore().map_err(|Why(why)| DecodeError::OtherString(why))?);
        }
        Ok(Commands(commands.into()))
    }
}

// Commands.

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
    fn restore(self) -> Checked<table::Liveness> {
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

fn lease(id: &Option<LeaseId>) -> Option<u64> {
    id.map(|id| id.0)
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
    fn restore(self) -> Checked<table::Command> {
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

// Workers.

type Pairs<'a> = Few<(&'a str, &'a str)>;

fn pairs(labels: &table::Labels) -> Pairs<'_> {
    labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

fn labels(pairs: Pairs<'_>) -> Checked<table::Labels> {
    let one = |(key, value)| Ok((table::LabelKey::parse(key)?, table::LabelValue::parse(value)?));
    pairs.into_iter().map(one).collect()
}

fn distinct_ports(numbers: Vec<u16>) -> Checked<BTreeSet<Port>> {
    numbers.into_iter().map(port).collect()
}

#[derive(Debug, Encode, BorrowDecode)]
pub enum WorkerPhase {
    Ready,
    Cordoned,
    Draining,
    Lost,
    Unverified,
}

impl From<table::WorkerPhase> for WorkerPhase {
    fn from(phase: table::WorkerPhase) -> Self {
        match phase {
            table::WorkerPhase::Ready => WorkerPhase::Ready,
            table::WorkerPhase::Cordoned => WorkerPhase::Cordoned,
            table::WorkerPhase::Draining => WorkerPhase::Draining,
            table::WorkerPhase::Lost => WorkerPhase::Lost,
            table::WorkerPhase::Unverified => WorkerPhase::Unverified,
        }
    }
}

impl From<WorkerPhase> for table::WorkerPhase {
    fn from(phase: WorkerPhase) -> Self {
        match phase {
            WorkerPhase::Ready => table::WorkerPhase::Ready,
            WorkerPhase::Cordoned => table::WorkerPhase::Cordoned,
            WorkerPhase::Draining => table::WorkerPhase::Draining,
            WorkerPhase::Lost => table::WorkerPhase::Lost,
            WorkerPhase::Unverified => table::WorkerPhase::Unverified,
        }
    }
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct WorkerSpec<'a> {
    address: &'a str,
    labels: Pairs<'a>,
    ranges: Vec<RangeSpec<'a>>,
    reserved: Vec<u16>,
    gpus: Vec<GpuSpec<'a>>,
    identity: Option<Identity<'a>>,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct WorkerPatch<'a> {
    address: Option<&'a str>,
    labels: Option<Pairs<'a>>,
    ranges: Option<Vec<RangeSpec<'a>>>,
    reserved: Option<Vec<u16>>,
    gpus: Option<Vec<GpuSpec<'a>>>,
    identity: Option<Identity<'a>>,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct RangeSpec<'a> {
    name: &'a str,
    first: u16,
    last: u16,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct GpuSpec<'a> {
    index: u32,
    uuid: &'a str,
    model: &'a str,
    memory_bytes: u64,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct Identity<'a> {
    machine_id: &'a str,
    boot_id: &'a str,
    namespace: u64,
}

fn numbers(ports: &BTreeSet<Port>) -> Vec<u16> {
    ports.iter().map(|p| p.get()).collect()
}

impl<'a> From<&'a table::WorkerSpec> for WorkerSpec<'a> {
    fn from(spec: &'a table::WorkerSpec) -> Self {
        let table::WorkerSpec { address, labels, ranges, reserved, gpus, identity } = spec;
        WorkerSpec {
            address,
            labels: pairs(labels),
            ranges: ranges.iter().map(RangeSpec::from).collect(),
            reserved: numbers(reserved),
            gpus: gpus.iter().map(GpuSpec::from).collect(),
            identity: identity.as_ref().map(Identity::from),
        }
    }
}

impl WorkerSpec<'_> {
    fn restore(self) -> Checked<table::WorkerSpec> {
        let WorkerSpec { address, labels: pairs, ranges, reserved, gpus, identity } = self;
        Ok(table::WorkerSpec {
            address: address.into(),
            labels: labels(pairs)?,
            ranges: each(ranges, RangeSpec::restore)?,
            reserved: distinct_ports(reserved)?,
            gpus: gpus.into_iter().map(GpuSpec::restore).collect(),
            identity: identity.map(Identity::restore),
        })
    }
}

impl<'a> From<&'a table::WorkerPatch> for WorkerPatch<'a> {
    fn from(patch: &'a table::WorkerPatch) -> Self {
        let table::WorkerPatch { address, labels, ranges, reserved, gpus, identity } = patch;
        WorkerPatch {
            address: address.as_deref(),
            labels: labels.as_ref().map(pairs),
            ranges: ranges.as_ref().map(|list| list.iter().map(RangeSpec::from).collect()),
            reserved: reserved.as_ref().map(numbers),
            gpus: gpus.as_ref().map(|list| list.iter().map(GpuSpec::from).collect()),
            identity: identity.as_ref().map(Identity::from),
        }
    }
}

impl WorkerPatch<'_> {
    fn restore(self) -> Checked<table::WorkerPatch> {
        let WorkerPatch { address, labels: pairs, ranges, reserved, gpus, identity } = self;
        Ok(table::WorkerPatch {
            address: address.map(String::from),
            labels: optional(pairs, labels)?,
            ranges: optional(ranges, |list| each(list, RangeSpec::restore))?,
            reserved: optional(reserved, distinct_ports)?,
            gpus: gpus.map(|list| list.into_iter().map(GpuSpec::restore).collect()),
            identity: identity.map(Identity::restore),
        })
    }
}

impl<'a> From<&'a table::RangeSpec> for RangeSpec<'a> {
    fn from(table::RangeSpec { name, first, last }: &'a table::RangeSpec) -> Self {
        RangeSpec { name: name.as_str(), first: first.get(), last: last.get() }
    }
}

impl RangeSpec<'_> {
    fn restore(self) -> Checked<table::RangeSpec> {
        let RangeSpec { name, first, last } = self;
        Ok(table::RangeSpec {
            name: table::RangeName::parse(name)?,
            first: port(first)?,
            last: port(last)?,
        })
    }
}

impl<'a> From<&'a table::GpuSpec> for GpuSpec<'a> {
    fn from(gpu: &'a table::GpuSpec) -> Self {
        let table::GpuSpec { index, uuid, model, memory_bytes } = gpu;
        GpuSpec { index: *index, uuid, model, memory_bytes: *memory_bytes }
    }
}

impl GpuSpec<'_> {
    fn restore(self) -> table::GpuSpec {
        let GpuSpec { index, uuid, model, memory_bytes } = self;
        table::GpuSpec { index, uuid: uuid.into(), model: model.into(), memory_bytes }
    }
}

impl<'a> From<&'a table::Identity> for Identity<'a> {
    fn from(identity: &'a table::Identity) -> Self {
        let table::Identity { machine_id, boot_id, namespace } = identity;
        Identity { machine_id, boot_id, namespace: *namespace }
    }
}

impl Identity<'_> {
    fn restore(self) -> table::Identity {
        let Identity { machine_id, boot_id, namespace } = self;
        table::Identity { machine_id: machine_id.into(), boot_id: boot_id.into(), namespace }
    }
}

// Claims.

#[derive(Debug, Encode, BorrowDecode)]
pub struct Claim<'a> {
    name: &'a str,
    uid: &'a str,
    placement: Placement<'a>,
    ports: Few<PortRequest<'a>>,
    gpus: Option<GpuRequest>,
    lease: Option<u64>,
    confirm_within: Option<u64>,
    bound: bool,
    labels: Pairs<'a>,
}

#[derive(Debug, Encode, BorrowDecode)]
enum Placement<'a> {
    Worker(&'a str),
    Binpack(Vec<Term<'a>>),
    Spread(Vec<Term<'a>>),
}

#[derive(Debug, Encode, BorrowDecode)]
enum Term<'a> {
    In(&'a str, Vec<&'a str>),
    NotIn(&'a str, Vec<&'a str>),
    Exists(&'a str),
    Absent(&'a str),
}

#[derive(Debug, Encode, BorrowDecode)]
struct PortRequest<'a> {
    name: Option<&'a str>,
    range: Option<&'a str>,
    ports: Ports,
}

#[derive(Debug, Encode, Decode)]
enum Ports {
    Count(u32),
    Specific(u16),
    Contiguous(u32),
}

#[derive(Debug, Encode, Decode)]
struct GpuRequest {
    which: GpuChoice,
    share: GpuShare,
}

#[derive(Debug, Encode, Decode)]
enum GpuChoice {
    Count(u32),
    Indexes(Vec<u32>),
}

#[derive(Debug, Encode, Decode)]
enum GpuShare {
    MemoryBytes(u64),
    Exclusive,
}

impl<'a> From<&'a table::Claim> for Claim<'a> {
    fn from(claim: &'a table::Claim) -> Self {
        let table::Claim {
            name,
            uid,
            placement,
            ports,
            gpus,
            lease: id,
            confirm_within,
            bound,
            labels,
        } = claim;
        Claim {
            name: name.as_str(),
            uid: uid.as_str(),
            placement: match placement {
                table::Placement::Worker(worker) => Placement::Worker(worker.as_str()),
                table::Placement::Select { selector, policy } => {
                    let terms = selector.terms().iter().map(Term::from).collect();
                    match policy {
                        table::Policy::Binpack => Placement::Binpack(terms),
                        table::Policy::Spread => Placement::Spread(terms),
                    }
                }
            },
            ports: ports.iter().map(PortRequest::from).collect(),
            gpus: gpus.as_deref().map(GpuRequest::from),
            lease: lease(id),
            confirm_within: confirm_within.map(|span| span.0),
            bound: *bound,
            labels: pairs(labels),
        }
    }
}

impl Claim<'_> {
    fn restore(self) -> Checked<table::Claim> {
        let Claim {
            name,
            uid,
            placement,
            ports,
            gpus,
            lease,
            confirm_within,
            bound,
            labels: pairs,
        } = self;
        let select = |terms, policy| {
            let terms = each(terms, Term::restore)?;
            let selector = table::Selector::new(terms)?;
            Ok::<_, Why>(table::Placement::Select { selector, policy })
        };
        Ok(table::Claim {
            name: table::InstanceName::parse(name)?,
            uid: table::Uid::parse(uid)?,
            placement: match placement {
                Placement::Worker(name) => {
                    table::Placement::Worker(table::WorkerName::parse(name)?)
                }
                Placement::Binpack(terms) => select(terms, table::Policy::Binpack)?,
                Placement::Spread(terms) => select(terms, table::Policy::Spread)?,
            },
            ports: each(ports, PortRequest::restore)?,
            gpus: gpus.map(GpuRequest::restore).map(Box::new),
            lease: lease.map(LeaseId),
            confirm_within: confirm_within.map(Millis),
            bound,
            labels: labels(pairs)?,
        })
    }
}

impl<'a> From<&'a table::Term> for Term<'a> {
    fn from(term: &'a table::Term) -> Self {
        match term {
            table::Term::In(key, values) => {
                Term::In(key.as_str(), values.iter().map(|v| v.as_str()).collect())
            }
            table::Term::NotIn(key, values) => {
                Term::NotIn(key.as_str(), values.iter().map(|v| v.as_str()).collect())
            }
            table::Term::Exists(key) => Term::Exists(key.as_str()),
            table::Term::Absent(key) => Term::Absent(key.as_str()),
        }
    }
}

impl Term<'_> {
    fn restore(self) -> Checked<table::Term> {
        let key = table::LabelKey::parse;
        let values = |list: Vec<&str>| {
            list.into_iter().map(table::LabelValue::parse).collect::<Result<BTreeSet<_>, _>>()
        };
        Ok(match self {
            Term::In(name, list) => table::Term::In(key(name)?, values(list)?),
            Term::NotIn(name, list) => table::Term::NotIn(key(name)?, values(list)?),
            Term::Exists(name) => table::Term::Exists(key(name)?),
            Term::Absent(name) => table::Term::Absent(key(name)?),
        })
    }
}

impl<'a> From<&'a table::PortRequest> for PortRequest<'a> {
    fn from(table::PortRequest { name, range, ports }: &'a table::PortRequest) -> Self {
        PortRequest {
            name: name.as_ref().map(|n| n.as_str()),
            range: range.as_ref().map(|r| r.as_str()),
            ports: match ports {
                table::Ports::Count(n) => Ports::Count(*n),
                table::Ports::Specific(port) => Ports::Specific(port.get()),
                table::Ports::Contiguous(n) => Ports::Contiguous(*n),
            },
        }
    }
}

impl PortRequest<'_> {
    fn restore(self) -> Checked<table::PortRequest> {
        let PortRequest { name, range, ports } = self;
        Ok(table::PortRequest {
            name: optional(name, |n| Ok(table::PortName::parse(n)?))?,
            range: optional(range, |r| Ok(table::RangeName::parse(r)?))?,
            ports: match ports {
                Ports::Count(n) => table::Ports::Count(n),
                Ports::Specific(number) => table::Ports::Specific(port(number)?),
                Ports::Contiguous(n) => table::Ports::Contiguous(n),
            },
        })
    }
}

impl From<&table::GpuRequest> for GpuRequest {
    fn from(table::GpuRequest { which, share }: &table::GpuRequest) -> Self {
        GpuRequest {
            which: match which {
                table::GpuChoice::Count(n) => GpuChoice::Count(*n),
                table::GpuChoice::Indexes(set) => GpuChoice::Indexes(set.iter().copied().collect()),
            },
            share: match share {
                table::GpuShare::MemoryBytes(bytes) => GpuShare::MemoryBytes(*bytes),
                table::GpuShare::Exclusive => GpuShare::Exclusive,
            },
        }
    }
}

impl GpuRequest {
    fn restore(self) -> table::GpuRequest {
        let GpuRequest { which, share } = self;
        table::GpuRequest {
            which: match which {
                GpuChoice::Count(n) => table::GpuChoice::Count(n),
                GpuChoice::Indexes(list) => table::GpuChoice::Indexes(list.into_iter().collect()),
            },
            share: match share {
                GpuShare::MemoryBytes(bytes) => table::GpuShare::MemoryBytes(bytes),
                GpuShare::Exclusive => table::GpuShare::Exclusive,
            },
        }
    }
}

// Snapshots.

#[derive(Debug, Encode, BorrowDecode)]
pub struct SnapshotHead<'a> {
    last: Option<Position>,
    membership_at: Option<Position>,
    membership: Membership<'a>,
}

impl<'a> From<&'a super::SnapshotHead> for SnapshotHead<'a> {
    fn from(head: &'a super::SnapshotHead) -> Self {
        let super::SnapshotHead { last, membership_at, membership } = head;
        SnapshotHead {
            last: last.as_ref().map(Position::from),
            membership_at: membership_at.as_ref().map(Position::from),
            membership: membership.into(),
        }
    }
}

impl SnapshotHead<'_> {
    pub fn restore(self) -> super::SnapshotHead {
        let SnapshotHead { last, membership_at, membership } = self;
        super::SnapshotHead {
            last: last.map(Position::restore),
            membership_at: membership_at.map(Position::restore),
            membership: membership.restore(),
        }
    }
}

/// The header comes first, then the leases in order of id, the workers and the allocations, each in
/// order of name, and the departures from the oldest on. At the end the members there ever were, in
/// order of id; left out where there were none.
#[derive(Debug, Encode, BorrowDecode)]
#[allow(clippy::large_enum_variant)] // there is one at a time, and nearly all are the large one
pub enum Record<'a> {
    Header {
        feature_level: u32,
        revision: u64,
        counts: Counts,
    },
    Lease {
        id: u64,
        ttl: u64,
    },
    Worker(Worker<'a>),
    Allocation(Allocation<'a>),
    Departure(Departure<'a>),
    /// Ids, and the incarnation that each is bound to (empty: pending).
    Members(Vec<(u64, &'a str)>),
}

/// How many records of each kind follow.
#[derive(Debug, Encode, Decode)]
pub struct Counts {
    leases: u64,
    workers: u64,
    allocations: u64,
    departures: u64,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct Worker<'a> {
    name: &'a str,
    spec: WorkerSpec<'a>,
    phase: WorkerPhase,
    phase_before: WorkerPhase,
    pools: Vec<Pool<'a>>,
    created: u64,
    version: u64,
    booted: u64,
}

/// What is not in the range's spec and not in the allocations.
#[derive(Debug, Encode, BorrowDecode)]
struct Pool<'a> {
    cursor: u32,
    next_freed: u64,
    freed: Vec<(u64, u16)>,
    quarantined: Vec<Quarantined<'a>>,
}

#[derive(Debug, Encode, BorrowDecode)]
struct Quarantined<'a> {
    port: u16,
    reason: &'a str,
    source: Source,
    since: u64,
}

#[derive(Debug, Encode, Decode)]
enum Source {
    Operator,
    Conflict,
    Observed,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct Allocation<'a> {
    claim: Claim<'a>,
    worker: &'a str,
    ports: Few<HeldPort<'a>>,
    gpus: Few<HeldGpu<'a>>,
    token: u64,
    version: u64,
    phase: Phase,
    confirmed: bool,
    reason: Option<&'a str>,
    lease: Option<u64>,
    liveness: Option<Liveness<'a>>,
    confirm_within: u64,
    granted_at: u64,
    changed_at: u64,
    swaps: u32,
    last_change: Option<LastChange>,
}

#[derive(Debug, Encode, Decode)]
enum Phase {
    Reserved,
    Bound,
    Lingering,
}

#[derive(Debug, Encode, BorrowDecode)]
struct HeldPort<'a> {
    request: u16,
    name: Option<&'a str>,
    range: &'a str,
    number: u16,
}

#[derive(Debug, Encode, BorrowDecode)]
struct HeldGpu<'a> {
    index: u32,
    uuid: &'a str,
    memory_bytes: u64,
    exclusive: bool,
}

#[derive(Debug, Encode, Decode)]
struct LastChange {
    from: u64,
    kind: ChangeKind,
}

#[derive(Debug, Encode, Decode)]
enum ChangeKind {
    Confirmed,
    Attached,
    Lingered(Cause),
    Swapped(u16),
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct Departure<'a> {
    name: &'a str,
    revision: u64,
    at: u64,
    worker: &'a str,
    token: u64,
    why: ReleaseReason<'a>,
}

#[derive(Debug, Encode, BorrowDecode)]
enum ReleaseReason<'a> {
    ByHolder,
    Forced(&'a str),
    Reclaimed { cause: Cause, reason: &'a str },
}

#[derive(Debug, Encode, Decode)]
enum Cause {
    Conflict,
    Unconfirmed,
    LeaseEnded,
    Gone,
}

impl From<table::Cause> for Cause {
    fn from(cause: table::Cause) -> Self {
        match cause {
            table::Cause::Conflict => Cause::Conflict,
            table::Cause::Unconfirmed => Cause::Unconfirmed,
            table::Cause::LeaseEnded => Cause::LeaseEnded,
            table::Cause::Gone => Cause::Gone,
        }
    }
}

impl From<Cause> for table::Cause {
    fn from(cause: Cause) -> Self {
        match cause {
            Cause::Conflict => table::Cause::Conflict,
            Cause::Unconfirmed => table::Cause::Unconfirmed,
            Cause::LeaseEnded => table::Cause::LeaseEnded,
            Cause::Gone => table::Cause::Gone,
        }
    }
}

/// The records of a state are `before`, then its allocations, then `after`.
pub fn records_before(state: &table::State) -> impl Iterator<Item = Record<'_>> {
    let header = Record::Header {
        feature_level: state.feature_level,
        revision: state.revision.0,
        counts: Counts {
            leases: state.lease_count() as u64,
            workers: state.worker_count() as u64,
            allocations: state.allocation_count() as u64,
            departures: state.departures().count() as u64,
        },
    };
    let leases = state.leases_after(None).map(|l| Record::Lease { id: l.id.0, ttl: l.ttl.0 });
    let workers = state.workers_after(None).map(|w| Record::Worker(Worker::from(&**w)));
    std::iter::once(header).chain(leases).chain(workers)
}

pub fn records_of<'a>(
    allocations: &'a [&'a Arc<table::Allocation>],
) -> impl Iterator<Item = Record<'a>> {
    const AHEAD: usize = 64;
    allocations
        .chunks(AHEAD)
        .inspect(|allocations| fetch(allocations))
        .flatten()
        .map(|allocation| Record::Allocation(Allocation::from(&***allocation)))
}

/// Reads a little of every place that allocations lie in. Read one by one, each place is waited for
/// by itself; the reads here do not depend on each other, and memory brings many at a time.
fn fetch(allocations: &[&Arc<table::Allocation>]) {
    for a in allocations {
        black_box((a.token, a.version, a.swaps, a.changed_at, a.worker.as_str().len()));
        black_box((a.liveness.is_some(), a.reason.is_some(), a.lease, a.last_change.is_some()));
    }
    for a in allocations {
        let claim = &a.claim;
        black_box((claim.name.as_str().len(), claim.uid.as_str().len(), claim.bound));
        black_box((claim.lease, claim.labels.len(), claim.ports.len(), claim.gpus.is_some()));
        black_box(a.ports.first().map(|port| port.number));
    }
    for a in allocations {
        black_box(a.claim.ports.first().map(|port| port.ports));
    }
}

pub fn records_after(state: &table::State) -> impl Iterator<Item = Record<'_>> {
    let departures = state.departures().map(|d| Record::Departure(Departure::from(d)));
    let members: Vec<_> = state.members().collect();
    let members = (!members.is_empty()).then_some(Record::Members(members));
    departures.chain(members)
}

impl<'a> From<&'a table::Worker> for Worker<'a> {
    fn from(worker: &'a table::Worker) -> Self {
        // Who holds what on it is said by the allocations.
        let table::Worker {
            name,
            spec,
            phase,
            phase_before,
            pools,
            gpus: _,
            allocations: _,
            created,
            version,
            booted,
        } = worker;
        Worker {
            name: name.as_str(),
            spec: (&**spec).into(),
            phase: (*phase).into(),
            phase_before: (*phase_before).into(),
            pools: pools.iter().map(Pool::from).collect(),
            created: created.0,
            version: version.0,
            booted: booted.0,
        }
    }
}

impl<'a> From<&'a table::Pool> for Pool<'a> {
    fn from(pool: &'a table::Pool) -> Self {
        let (cursor, next_freed) = pool.cursors();
        let quarantines = pool.quarantines();
        #[cfg(planted)]
        let quarantines = quarantines.filter(|_| !planted::is(Bug::SnapshotWithoutQuarantines));
        Pool {
            cursor,
            next_freed,
            freed: pool.freed_order().collect(),
            quarantined: quarantines
                .map(|(port, Quarantine { reason, source, since })| Quarantined {
                    port,
                    reason,
                    source: match source {
                        table::Source::Operator => Source::Operator,
                        table::Source::Conflict => Source::Conflict,
                        table::Source::Observed => Source::Observed,
                    },
                    since: since.0,
                })
                .collect(),
        }
    }
}

impl Pool<'_> {
    fn restore(self, range: &table::RangeSpec, spec: &table::WorkerSpec) -> Checked<table::Pool> {
        let Pool { cursor, next_freed, freed, quarantined } = self;
        let unused = table::Pool::new(
            range.name.clone(),
            range.first,
            range.last,
            spec.reserved.iter().copied(),
        );
        let quarantined = quarantined.into_iter().map(|quarantined| {
            let Quarantined { port, reason, source, since } = quarantined;
            let source = match source {
                Source::Operator => table::Source::Operator,
                Source::Conflict => table::Source::Conflict,
                Source::Observed => table::Source::Observed,
            };
            (port, Quarantine { reason: reason.into(), source, since: Revision(since) })
        });
        table::Pool::restore(unused, (cursor, next_freed), freed, quarantined).map_err(Why)
    }
}

impl Worker<'_> {
    fn restore(self, into: &mut table::Restore) -> Checked<table::WorkerName> {
        let Worker { name, spec, phase, phase_before, pools, created, version, booted } = self;
        let name = table::WorkerName::parse(name)?;
        let spec = spec.restore()?;
        spec.validate().map_err(|e| format!("worker {name}: {e}"))?;
        if pools.len() != spec.ranges.len() {
            return Err(Why(format!("worker {name}: its pools are not those of its ranges")));
        }
        let pools = pools.into_iter().zip(&spec.ranges);
        let pools = each(pools, |(pool, range)| pool.restore(range, &spec))
            .map_err(|Why(why)| Why(format!("worker {name}: {why}")))?;
        let phases = (phase.into(), phase_before.into());
        into.worker(name.clone(), spec, phases, pools, [created, version, booted].map(Revision))?;
        Ok(name)
    }
}

impl<'a> From<&'a table::Allocation> for Allocation<'a> {
    fn from(allocation: &'a table::Allocation) -> Self {
        let table::Allocation {
            claim,
            worker,
            ports,
            gpus,
            token,
            version,
            phase,
            confirmed,
            reason,
            lease: id,
            liveness,
            confirm_within,
            granted_at,
            changed_at,
            swaps,
            last_change,
        } = allocation;
        Allocation {
            claim: (&**claim).into(),
            worker: worker.as_str(),
            ports: ports
                .iter()
                .map(|port| HeldPort {
                    request: port.request,
                    name: allocation.port_name(port).map(|name| name.as_str()),
                    range: port.range.as_str(),
                    number: port.number,
                })
                .collect(),
            gpus: gpus
                .iter()
                .map(|table::HeldGpu { index, uuid, memory_bytes, exclusive }| HeldGpu {
                    index: *index,
                    uuid,
                    memory_bytes: *memory_bytes,
                    exclusive: *exclusive,
                })
                .collect(),
            token: token.0,
            version: version.0,
            phase: match phase {
                table::Phase::Reserved => Phase::Reserved,
                table::Phase::Bound => Phase::Bound,
                table::Phase::Lingering => Phase::Lingering,
            },
            confirmed: *confirmed,
            reason: reason.as_deref(),
            lease: lease(id),
            liveness: liveness.as_deref().map(Liveness::from),
            confirm_within: confirm_within.0,
            granted_at: granted_at.0,
            changed_at: changed_at.0,
            swaps: *swaps,
            last_change: last_change.as_ref().map(|table::LastChange { from, kind }| LastChange {
                from: from.0,
                kind: match kind {
                    table::ChangeKind::Confirmed => ChangeKind::Confirmed,
                    table::ChangeKind::Attached => ChangeKind::Attached,
                    table::ChangeKind::Lingered { cause } => ChangeKind::Lingered((*cause).into()),
                    table::ChangeKind::Swapped { port } => ChangeKind::Swapped(*port),
                },
            }),
        }
    }
}

impl Allocation<'_> {
    fn restore(self, into: &mut table::Restore) -> Checked<table::InstanceName> {
        let Allocation {
            claim,
            worker,
            ports,
            gpus,
            token,
            version,
            phase,
            confirmed,
            reason,
            lease,
            liveness,
            confirm_within,
            granted_at,
            changed_at,
            swaps,
            last_change,
        } = self;
        let claim = claim.restore()?;
        claim.validate().map_err(|e| format!("allocation {}: {e}", claim.name))?;
        let name = claim.name.clone();
        if !gpus.is_sorted_by(|a, b| a.index < b.index) {
            return Err(Why(format!("allocation {name}: its GPUs are out of order")));
        }
        into.allocation(table::Allocation {
            worker: table::WorkerName::parse(worker)?,
            ports: each(ports, |port| port.restore(&claim))?.into(),
            gpus: gpus.into_iter().map(HeldGpu::restore).collect(),
            token: Token(token),
            version: Revision(version),
            phase: match phase {
                Phase::Reserved => table::Phase::Reserved,
                Phase::Bound => table::Phase::Bound,
                Phase::Lingering => table::Phase::Lingering,
            },
            confirmed,
            reason: reason.map(Arc::from),
            lease: lease.map(LeaseId),
            liveness: optional(liveness, Liveness::restore)?.map(Arc::new),
            confirm_within: Millis(confirm_within),
            granted_at: Millis(granted_at),
            changed_at: Millis(changed_at),
            swaps,
            last_change: last_change.map(|LastChange { from, kind }| table::LastChange {
                from: Revision(from),
                kind: match kind {
                    ChangeKind::Confirmed => table::ChangeKind::Confirmed,
                    ChangeKind::Attached => table::ChangeKind::Attached,
                    ChangeKind::Lingered(cause) => {
                        table::ChangeKind::Lingered { cause: cause.into() }
                    }
                    ChangeKind::Swapped(port) => table::ChangeKind::Swapped { port },
                },
            }),
            claim: Arc::new(claim),
        })?;
        Ok(name)
    }
}

impl<'a> From<(&'a table::InstanceName, &'a table::Departure)> for Departure<'a> {
    fn from((name, departure): (&'a table::InstanceName, &'a table::Departure)) -> Self {
        let table::Departure { revision, at, worker, token, why } = departure;
        Departure {
            name: name.as_str(),
            revision: revision.0,
            at: at.0,
            worker: worker.as_str(),
            token: token.0,
            why: match why {
                table::ReleaseReason::ByHolder => ReleaseReason::ByHolder,
                table::ReleaseReason::Forced { reason } => ReleaseReason::Forced(reason),
                table::ReleaseReason::Reclaimed { cause, reason } => {
                    ReleaseReason::Reclaimed { cause: (*cause).into(), reason }
                }
            },
        }
    }
}

impl Departure<'_> {
    fn restore(self, into: &mut table::Restore) -> Checked<()> {
        let Departure { name, revision, at, worker, token, why } = self;
        let departure = table::Departure {
            revision: Revision(revision),
            at: Millis(at),
            worker: table::WorkerName::parse(worker)?,
            token: Token(token),
            why: match why {
                ReleaseReason::ByHolder => table::ReleaseReason::ByHolder,
                ReleaseReason::Forced(reason) => {
                    table::ReleaseReason::Forced { reason: reason.into() }
                }
                ReleaseReason::Reclaimed { cause, reason } => {
                    table::ReleaseReason::Reclaimed { cause: cause.into(), reason: reason.into() }
                }
            },
        };
        into.departure(table::InstanceName::parse(name)?, departure)?;
        Ok(())
    }
}

impl HeldPort<'_> {
    fn restore(self, claim: &table::Claim) -> Checked<table::HeldPort> {
        let HeldPort { request, name, range, number } = self;
        let asked = claim.ports.get(usize::from(request));
        if asked.is_none_or(|asked| asked.name.as_ref().map(|name| name.as_str()) != name) {
            return Err(Why(format!("allocation {}: port {number} is not as asked", claim.name)));
        }
        Ok(table::HeldPort { request, range: table::RangeName::parse(range)?, number })
    }
}

impl HeldGpu<'_> {
    fn restore(self) -> table::HeldGpu {
        let HeldGpu { index, uuid, memory_bytes, exclusive } = self;
        table::HeldGpu { index, uuid: uuid.into(), memory_bytes, exclusive }
    }
}

/// A state that is being read, and what must still come.
#[derive(Debug)]
pub struct Progress {
    restore: table::Restore,
    left: Counts,
    last_lease: Option<LeaseId>,
    last_worker: Option<table::WorkerName>,
    last_allocation: Option<table::InstanceName>,
    /// They have come.
    members: bool,
}

impl Record<'_> {
    /// Says the header.
    pub fn feature_level(&self) -> Option<u32> {
        match self {
            Record::Header { feature_level, .. } => Some(*feature_level),
            _ => None,
        }
    }
}

/// Takes the next record; the first must be the header.
pub fn take_record(progress: &mut Option<Progress>, record: Record<'_>) -> Checked<()> {
    let out_of_place = |what: &str| Err(Why(format!("{what} is out of place")));
    let progress = match (record, progress) {
        (Record::Header { feature_level, revision, counts }, slot @ None) => {
            *slot = Some(Progress {
                restore: table::Restore::new(feature_level, Revision(revision)),
                left: counts,
                last_lease: None,
                last_worker: None,
                last_allocation: None,
                members: false,
            });
            return Ok(());
        }
        (Record::Header { .. }, Some(_)) => return out_of_place("a second header"),
        (_, None) => return out_of_place("a record before the header"),
        (record, Some(progress)) => (record, progress),
    };
    let (record, Progress { restore, left, last_lease, last_worker, last_allocation, members }) =
        progress;
    let Counts { leases, workers, allocations, departures } = left;
    // Each kind begins when those before it have all come.
    let before = [*leases, *workers, *allocations, *departures];
    let (what, due, kinds_before) = match &record {
        Record::Header { .. } => return out_of_place("a header"),
        Record::Lease { .. } => ("a lease", Some(leases), 0),
        Record::Worker(_) => ("a worker", Some(workers), 1),
        Record::Allocation(_) => ("an allocation", Some(allocations), 2),
        Record::Departure(_) => ("a departure", Some(departures), 3),
        Record::Members(_) => ("a list of members", None, 4),
    };
    if before[..kinds_before].iter().any(|due| *due > 0) {
        return out_of_place(what);
    }
    if let Some(due) = due {
        *due = match due.checked_sub(1) {
            Some(left) => left,
            None => return out_of_place(what),
        };
    }
    match record {
        Record::Header { .. } => {}
        Record::Lease { id, ttl } => {
            if last_lease.is_some_and(|last| LeaseId(id) <= last) {
                return out_of_place("a lease that does not follow in order");
            }
            restore.lease(LeaseId(id), Millis::span("ttl", ttl)?)?;
            *last_lease = Some(LeaseId(id));
        }
        Record::Worker(worker) => {
            let name = Some(worker.restore(restore)?);
            if name <= *last_worker {
                return out_of_place("a worker that does not follow in order");
            }
            *last_worker = name;
        }
        Record::Allocation(allocation) => {
            // Before it is restored: core relies on it that a name comes once.
            let name = table::InstanceName::parse(allocation.claim.name)?;
            if last_allocation.as_ref().is_some_and(|last| name <= *last) {
                return out_of_place("an allocation that does not follow in order");
            }
            *last_allocation = Some(allocation.restore(restore)?);
        }
        Record::Departure(departure) => departure.restore(restore)?,
        Record::Members(list) => {
            if *members {
                return out_of_place(what);
            }
            if list.is_empty() || !list.is_sorted_by(|(a, _), (b, _)| a < b) {
                return Err(Why("the list of members is empty or out of order".into()));
            }
            *members = true;
            for (id, incarnation) in list {
                restore.member(id, incarnation);
            }
        }
    }
    Ok(())
}

impl Progress {
    pub fn complete(self) -> Checked<table::Restore> {
        let Counts { leases, workers, allocations, departures } = self.left;
        if [leases, workers, allocations, departures].iter().any(|due| *due > 0) {
            return Err(Why(format!(
                "{leases} leases, {workers} workers, {allocations} allocations and {departures} \
                 departures are missing"
            )));
        }
        Ok(self.restore)
    }
}
