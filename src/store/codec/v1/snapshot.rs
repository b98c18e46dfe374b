//! Snapshots: a head, and the records that a state is written as.

use std::hint::black_box;
use std::sync::Arc;

use bincode::{BorrowDecode, Decode, Encode};

use super::claim::Claim;
use super::command::Liveness;
use super::log::{Membership, Position};
use super::worker::{WorkerPhase, WorkerSpec};
use super::{Checked, Why, each, lease, optional};
use crate::core::{self as table, LeaseId, Millis, Quarantine, Revision, Token};
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::store::codec;
use crate::store::codec::few::Few;

#[derive(Debug, Encode, BorrowDecode)]
pub struct SnapshotHead<'a> {
    last: Option<Position>,
    membership_at: Option<Position>,
    membership: Membership<'a>,
}

impl<'a> From<&'a codec::SnapshotHead> for SnapshotHead<'a> {
    fn from(head: &'a codec::SnapshotHead) -> Self {
        let codec::SnapshotHead { last, membership_at, membership } = head;
        SnapshotHead {
            last: last.as_ref().map(Position::from),
            membership_at: membership_at.as_ref().map(Position::from),
            membership: membership.into(),
        }
    }
}

impl SnapshotHead<'_> {
    pub fn restore(self) -> codec::SnapshotHead {
        let SnapshotHead { last, membership_at, membership } = self;
        codec::SnapshotHead {
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
