//! The one place where the table changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::OrdMap;

use super::allocation::{
    Allocation, Cause, ChangeKind, Departure, HeldPort, LastChange, Lease, Liveness, Phase,
    ReleaseReason,
};
use super::claim::{Claim, Placement, PortRequest, Ports};
use super::command::{
    Actor, Applied, Authority, Command, Event, Events, Ground, Origin, Outcome, Refusal,
};
use super::limits::{ALLOCATIONS_MAX, LEASE_ALLOCATIONS_MAX, LEASES_MAX, SWAPS_MAX, WORKERS_MAX};
use super::name::{InstanceName, Invalid, LeaseId, Millis, Port, Revision, Token, WorkerName};
use super::place::{Grant, counted, place, take, take_ports};
use super::ports::{Quarantine, Source, Taken};
use super::state::{FEATURE_LEVEL, State, uuids};
use super::worker::{Worker, WorkerPatch, WorkerPhase, WorkerSpec};
#[cfg(planted)]
use crate::planted::{self, Bug};

/// Applies one command. Total and deterministic: it never fails, a refusal changes nothing, and a
/// command that changes nothing takes no revision.
///
/// What a leader's timers and sweeper proposed counts only in an entry that the same leader wrote:
/// another one restarted them all.
pub fn apply(state: &mut State, origin: &Origin, command: &Command) -> (Applied, Events) {
    // Not in the middle of a gang: it would be undone with one that is refused.
    state.settle_now_and_then();
    let revision = Revision(state.revision.0 + 1);
    let mut change = Change { revision, at: origin.at, state, events: Events::new() };
    let under = command.under();
    #[cfg(planted)]
    let under = under.filter(|_| !planted::is(Bug::DeposedExpiry));
    let outcome = match under {
        Some(proposed) if proposed != origin.leader => {
            Err(Refusal::Deposed { proposed, leader: origin.leader })
        }
        _ => command.validate().map_err(Refusal::from).and_then(|()| change.run(command)),
    };
    let events = change.events;
    debug_assert!(outcome.is_ok() || events.is_empty(), "a refusal changes nothing");
    if !events.is_empty() {
        state.revision.0 += 1;
    }
    (Applied { revision: state.revision, outcome }, events)
}

/// A command being applied. Whatever changes the table leaves an event.
struct Change<'a> {
    state: &'a mut State,
    /// The revision of the change, if there is one.
    revision: Revision,
    at: Millis,
    events: Events,
}

impl Change<'_> {
    fn run(&mut self, command: &Command) -> Result<Outcome, Refusal> {
        match command {
            Command::RegisterWorker { name, spec } => self.register(name, spec),
            Command::UpdateWorker { name, patch } => self.update(name, patch),
            Command::SetWorkerPhase { name, phase, by } => self.set_phase(name, *phase, *by),
            Command::VerifyWorker { name, by: _ } => self.verify(name),
            Command::RemoveWorker { name, force } => self.remove_worker(name, force.as_deref()),
            Command::Allocate { claims, confirm_within } => self.allocate(claims, *confirm_within),
            Command::Confirm { name, token, version, liveness, lease } => {
                self.confirm(name, *token, *version, liveness.as_ref(), *lease)
            }
            Command::Attach { name, token, version, lease } => {
                self.attach(name, *token, *version, *lease)
            }
            Command::Release { name, authority } => self.release(name, authority),
            Command::ReportConflict { name, token, version, port } => {
                self.report_conflict(name, *token, *version, *port)
            }
            Command::Reclaim { name, token, version, ground, under: _ } => {
                self.reclaim(name, *token, *version, ground)
            }
            Command::Quarantine { worker, ports, reason, by } => {
                self.quarantine(worker, ports, reason, *by)
            }
            Command::LiftQuarantine { worker, ports, by, seen } => {
                self.lift(worker, ports, *by, *seen)
            }
            Command::GrantLease { ttl } => self.grant_lease(*ttl),
            Command::RevokeLease { id } => self.end_lease(*id, false),
            Command::ExpireLease { id, under: _ } => self.end_lease(*id, true),
            Command::Checkpoint(_) => Ok(Outcome::Noted),
            Command::SetFeatureLevel { level } => self.set_feature_level(*level),
        }
    }

    fn set_feature_level(&mut self, asked: u32) -> Result<Outcome, Refusal> {
        if rises(self.state.feature_level, asked, FEATURE_LEVEL)? {
            self.state.feature_level = asked;
            self.events.push(Event::FeatureLevel(asked));
        }
        Ok(Outcome::FeatureLevel(asked))
    }

    // Workers.

    fn register(&mut self, name: &WorkerName, spec: &WorkerSpec) -> Result<Outcome, Refusal> {
        if let Some(worker) = self.state.worker(name) {
            // What an agent said of itself is not unsaid by one who says nothing of it.
            let identity = spec.identity.clone().or_else(|| worker.spec.identity.clone());
            return self.respec(name, WorkerSpec { identity, ..spec.clone() });
        }
        self.check_owners(name, spec)?;
        check_room("workers", self.state.worker_count(), 1, WORKERS_MAX)?;
        Ok(self.put_worker(Worker::new(name.clone(), spec.clone(), self.revision)))
    }

    fn update(&mut self, name: &WorkerName, patch: &WorkerPatch) -> Result<Outcome, Refusal> {
        let spec = patch.onto(&self.worker(name)?.spec);
        spec.validate()?;
        self.respec(name, spec)
    }

    fn respec(&mut self, name: &WorkerName, spec: WorkerSpec) -> Result<Outcome, Refusal> {
        let worker = self.worker(name)?;
        if *worker.spec == spec {
            return Ok(Outcome::Worker(worker));
        }
        self.check_owners(name, &spec)?;
        if let Some(what) = worker.lost_by(&spec) {
            return Err(Refusal::WouldLose { worker: name.clone(), what });
        }
        Ok(self.put_worker(worker.respec(spec, self.revision)))
    }

    /// A GPU and a network namespace belong to one worker.
    fn check_owners(&self, name: &WorkerName, spec: &WorkerSpec) -> Result<(), Refusal> {
        let indexes = &self.state.indexes;
        let taken = |what, value: &str, owner: Option<&WorkerName>| match owner {
            Some(owner) if owner != name => {
                Err(Refusal::IdentityTaken { what, value: value.to_string(), owner: owner.clone() })
            }
            _ => Ok(()),
        };
        for uuid in uuids(spec) {
            taken("GPU", uuid, indexes.gpu_owner.get(uuid))?;
        }
        if let Some(identity) = &spec.identity {
            let shown = format!("{}:{}", identity.machine_id, identity.namespace);
            taken("network namespace", &shown, indexes.identity_owner.get(identity))?;
        }
        Ok(())
    }

    fn set_phase(
        &mut self,
        name: &WorkerName,
        asked: WorkerPhase,
        by: Actor,
    ) -> Result<Outcome, Refusal> {
        let worker = self.worker(name)?;
        if asked == WorkerPhase::Lost && !worker.has_agent() {
            // Nobody would ever bring it back.
            return Err(Invalid::new("phase", asked.name(), "of a worker with an agent").into());
        }
        let away = matches!(worker.phase, WorkerPhase::Lost | WorkerPhase::Unverified);
        let phases = match by {
            Actor::Operator if away => (worker.phase, asked),
            Actor::Operator => (asked, asked),
            // Until it is verified, it makes no difference.
            Actor::Leader(_) if worker.phase == WorkerPhase::Unverified => {
                (worker.phase, worker.phase_before)
            }
            Actor::Leader(_) if asked == WorkerPhase::Lost => (asked, worker.phase_before),
            Actor::Leader(_) => (worker.phase_before, worker.phase_before),
        };
        Ok(self.put_phases(&worker, phases))
    }

    /// What was restored was compared with the host.
    fn verify(&mut self, name: &WorkerName) -> Result<Outcome, Refusal> {
        let worker = self.worker(name)?;
        let phases = match worker.phase {
            WorkerPhase::Unverified => (worker.phase_before, worker.phase_before),
            phase => (phase, worker.phase_before),
        };
        Ok(self.put_phases(&worker, phases))
    }

    fn put_phases(
        &mut self,
        worker: &Arc<Worker>,
        (phase, phase_before): (WorkerPhase, WorkerPhase),
    ) -> Outcome {
        if (worker.phase, worker.phase_before) == (phase, phase_before) {
            return Outcome::Worker(worker.clone());
        }
        let version = self.revision;
        self.put_worker(Worker { phase, phase_before, version, ..Worker::clone(worker) })
    }

    fn remove_worker(
        &mut self,
        name: &WorkerName,
        force: Option<&str>,
    ) -> Result<Outcome, Refusal> {
        let Some(worker) = self.state.worker(name).cloned() else {
            return Ok(Outcome::WorkerRemoved { removed: false });
        };
        if let Some(reason) = force {
            for holder in worker.allocations.keys() {
                if let Some(held) = self.state.allocation(holder).cloned() {
                    let why = ReleaseReason::Forced { reason: reason.into() };
                    self.free(&held, why);
                }
            }
        } else if let Some((example, ())) = worker.allocations.get_min() {
            return Err(Refusal::WorkerInUse {
                worker: name.clone(),
                count: worker.allocations.len() as u64,
                example: example.clone(),
            });
        }
        self.state.drop_worker(name);
        self.events.push(Event::WorkerRemoved(name.clone()));
        Ok(Outcome::WorkerRemoved { removed: true })
    }

    // Allocations.

    /// All claims or none, in request order: each sees what the ones before it took.
    fn allocate(&mut self, claims: &[Arc<Claim>], within: Millis) -> Result<Outcome, Refusal> {
        if let Some(repeated) = self.granted_before(claims)? {
            return Ok(Outcome::Allocated { allocations: repeated, repeated: true });
        }
        check_room("allocations", self.state.allocation_count(), claims.len(), ALLOCATIONS_MAX)?;
        // What is shared with a copy is copied before it changes: there is one only where it may be needed.
        let all_will_be_granted = claims.len() == 1 || self.all_fit_by_count(claims);
        let before = (!all_will_be_granted).then(|| {
            // Or each gang that is refused would do it anew.
            if claims.iter().any(|claim| matches!(claim.placement, Placement::Select { .. })) {
                self.state.settle();
            }
            self.state.clone()
        });
        let mut allocations = Vec::with_capacity(claims.len());
        for claim in claims {
            match self.grant(claim, within) {
                Ok(granted) => allocations.push(granted),
                #[cfg(planted)]
                Err(_) if planted::is(Bug::GangInPart) && !allocations.is_empty() => break,
                Err(refusal) => {
                    match before {
                        Some(before) => *self.state = before,
                        None => assert!(allocations.is_empty(), "all were counted: {refusal}"),
                    }
                    self.events.clear();
                    return Err(refusal);
                }
            }
        }
        Ok(Outcome::Allocated { allocations, repeated: false })
    }

    /// Whether counting alone tells that none of the claims can be refused: each names its worker, and
    /// together they ask for no more than is free there.
    fn all_fit_by_count(&self, claims: &[Arc<Claim>]) -> bool {
        let mut wanted = BTreeMap::<_, u32>::new();
        claims.iter().all(|claim| {
            let Placement::Worker(name) = &claim.placement else { return false };
            let Some(worker) = self.state.worker(name) else { return false };
            let Some((pool, count)) = counted(worker, claim) else { return false };
            let wanted = wanted.entry((name, &pool.name)).or_default();
            *wanted = wanted.saturating_add(count);
            claim.lease.is_none()
                && claim.gpus.is_none()
                && worker.phase == WorkerPhase::Ready
                && *wanted <= pool.free_count()
        })
    }

    /// The allocations of an earlier, equal request. A name that is held by another uid, for
    /// another request or by another grant than its fellows is a rival's.
    fn granted_before(
        &self,
        claims: &[Arc<Claim>],
    ) -> Result<Option<Vec<Arc<Allocation>>>, Refusal> {
        let mut found: Vec<Arc<Allocation>> = Vec::new();
        for claim in claims {
            let Some(held) = self.state.allocation(&claim.name) else { continue };
            let other_grant = found.first().is_some_and(|first| first.token != held.token);
            let difference = match claim.first_difference(&held.claim) {
                None if other_grant => Some("gang"),
                difference => difference,
            };
            if let Some(difference) = difference {
                return Err(taken(held, difference));
            }
            found.push(held.clone());
        }
        match found.first() {
            None => Ok(None),
            #[cfg(planted)]
            Some(_) if planted::is(Bug::RetryGrantsAnew) => Ok(None),
            Some(first) if found.len() < claims.len() => Err(taken(first, "gang")),
            Some(_) => Ok(Some(found)),
        }
    }

    fn grant(&mut self, claim: &Arc<Claim>, within: Millis) -> Result<Arc<Allocation>, Refusal> {
        self.check_lease(claim.lease)?;
        let worker = place(self.state, claim)?;
        let taken = self.state.change_worker(&worker, |worker| take(worker, claim));
        let Some(Ok(Grant { ports, gpus })) = taken else { unreachable!("it was placed there") };
        let allocation = self.state.put_allocation(Allocation {
            claim: claim.clone(),
            worker,
            ports: ports.into(),
            gpus: gpus.into(),
            token: Token(self.revision.0),
            version: self.revision,
            phase: if claim.bound { Phase::Bound } else { Phase::Reserved },
            confirmed: claim.bound,
            reason: None,
            lease: claim.lease,
            liveness: None,
            confirm_within: claim.confirm_within.unwrap_or(within),
            granted_at: self.at,
            changed_at: self.at,
            swaps: 0,
            last_change: None,
        });
        self.state.forget_departure(&claim.name);
        self.events.push(Event::Allocated(allocation.clone()));
        Ok(allocation)
    }

    fn confirm(
        &mut self,
        name: &InstanceName,
        token: Token,
        version: Revision,
        liveness: Option<&Liveness>,
        lease: Option<LeaseId>,
    ) -> Result<Outcome, Refusal> {
        let held = self.held_under(name, token)?;
        let says_nothing_new = held.phase == Phase::Bound
            && (liveness.is_none() || liveness == held.liveness.as_deref())
            && (lease.is_none() || lease == held.lease);
        if says_nothing_new
            && (version == Revision(0)
                || version == held.version
                || repeats(&held, version, &ChangeKind::Confirmed))
        {
            return Ok(Outcome::Confirmed(held));
        }
        let from = check_version(&held, version)?;
        if lease != held.lease {
            self.check_lease(lease)?;
        }
        let confirmed = self.put_changed(Allocation {
            phase: Phase::Bound,
            confirmed: true,
            reason: None,
            lease: lease.or(held.lease),
            liveness: liveness.cloned().map(Arc::new).or_else(|| held.liveness.clone()),
            last_change: Some(LastChange { from, kind: ChangeKind::Confirmed }),
            ..Allocation::clone(&held)
        });
        Ok(Outcome::Confirmed(confirmed))
    }

    fn attach(
        &mut self,
        name: &InstanceName,
        token: Token,
        version: Revision,
        lease: Option<LeaseId>,
    ) -> Result<Outcome, Refusal> {
        let held = self.held_under(name, token)?;
        if held.phase == Phase::Lingering {
            let reason = held.reason.as_deref().unwrap_or_default().into();
            return Err(Refusal::Lingers { name: name.clone(), reason });
        }
        if held.lease == lease
            && (version == Revision(0)
                || version == held.version
                || repeats(&held, version, &ChangeKind::Attached))
        {
            return Ok(Outcome::Attached(held));
        }
        let from = check_version(&held, version)?;
        self.check_lease(lease)?;
        Ok(Outcome::Attached(self.put_changed(Allocation {
            lease,
            last_change: Some(LastChange { from, kind: ChangeKind::Attached }),
            ..Allocation::clone(&held)
        })))
    }

    /// The system judged an allocation. It counts if nothing has changed since, and, where the
    /// judgement rests on what an agent saw, if that agent knew the allocation as it is (field
    /// failures kubernetes-54885, kubernetes-64349).
    fn reclaim(
        &mut self,
        name: &InstanceName,
        token: Token,
        version: Revision,
        ground: &Ground,
    ) -> Result<Outcome, Refusal> {
        let held = self.held_under(name, token)?;
        if held.version != version {
            let name = name.clone();
            return Err(Refusal::WrongVersion { name, given: version, held: held.version });
        }
        let worker = self.worker_of(&held)?;
        if let Some(what) = self.doubt(&held, &worker, ground) {
            return Err(Refusal::NotProven { name: name.clone(), what: what.into() });
        }
        match ground {
            Ground::Unconfirmed => {
                let reason = format!("not confirmed within {}", held.confirm_within);
                self.let_go(&held, Cause::Unconfirmed, reason)
            }
            Ground::Gone { reason, .. } => {
                let why = ReleaseReason::Reclaimed { cause: Cause::Gone, reason: reason.clone() };
                self.free(&held, why);
                Ok(Outcome::Released(Some(held)))
            }
        }
    }

    /// Why a ground does not prove what it is given for; `None` if it does. What is `Reserved` waits
    /// for its confirm deadline even across a boot: its start may not have begun.
    fn doubt(&self, held: &Allocation, worker: &Worker, ground: &Ground) -> Option<&'static str> {
        let reserved = held.phase == Phase::Reserved;
        match ground {
            Ground::Unconfirmed => (!reserved).then_some("it is not RESERVED any more"),
            Ground::Gone { .. } if reserved => Some("its holder may still be starting"),
            Ground::Gone { identity, .. } if worker.spec.identity.as_ref() != Some(identity) => {
                Some("it was looked for elsewhere, or on another boot")
            }
            Ground::Gone { .. } if worker.phase == WorkerPhase::Lost => {
                Some("its worker has fallen silent since")
            }
            Ground::Gone { seen, .. } if *seen < held.version => {
                Some("it changed after it was looked at")
            }
            Ground::Gone { seen, .. } if *seen > self.state.revision => {
                Some("it was looked at with knowledge of a revision that does not exist yet")
            }
            Ground::Gone { .. } => None,
        }
    }

    /// Its holder fell silent. Where an agent watches the worker, that proves nothing, and it lingers;
    /// where none does, it is freed, as with leases elsewhere.
    fn let_go(
        &mut self,
        held: &Arc<Allocation>,
        cause: Cause,
        reason: String,
    ) -> Result<Outcome, Refusal> {
        let watched = self.worker(&held.worker)?.has_agent();
        #[cfg(planted)]
        let watched = watched && !planted::is(Bug::LeaseLossFrees);
        if !watched {
            self.free(held, ReleaseReason::Reclaimed { cause, reason });
            return Ok(Outcome::Released(Some(held.clone())));
        }
        Ok(Outcome::Lingers(self.put_changed(Allocation {
            phase: Phase::Lingering,
            reason: Some(reason.into()),
            lease: None,
            last_change: Some(LastChange {
                from: held.version,
                kind: ChangeKind::Lingered { cause },
            }),
            ..Allocation::clone(held)
        })))
    }

    fn release(&mut self, name: &InstanceName, authority: &Authority) -> Result<Outcome, Refusal> {
        let Some(held) = self.state.allocation(name).cloned() else {
            return Ok(Outcome::Released(None));
        };
        let why = match authority {
            Authority::Holder(token) => {
                #[cfg(planted)]
                let token = if planted::is(Bug::ReleaseIgnoresToken) { &held.token } else { token };
                check_token(&held, *token)?;
                ReleaseReason::ByHolder
            }
            Authority::Operator { reason } => ReleaseReason::Forced { reason: reason.clone() },
        };
        self.free(&held, why);
        Ok(Outcome::Released(Some(held)))
    }

    /// The one way out of the table (field failure kubernetes-120536): gives back every port and
    /// GPU that the allocation still holds.
    fn free(&mut self, held: &Arc<Allocation>, why: ReleaseReason) {
        let name = held.name();
        self.state.change_worker(&held.worker, |worker| {
            for port in &held.ports {
                free_port(worker, name, port.number);
            }
            for gpu in &mut worker.gpus {
                gpu.free(name);
            }
            worker.allocations.remove(name);
        });
        self.state.drop_allocation(held.name());
        if why != ReleaseReason::ByHolder {
            let departure = Departure {
                revision: self.revision,
                at: self.at,
                worker: held.worker.clone(),
                token: held.token,
                why: why.clone(),
            };
            self.state.remember_departure(held.name().clone(), departure);
        }
        self.events.push(Event::Released { allocation: held.clone(), why });
    }

    /// Quarantines the port and puts the next free one of its range in its place. Where there is
    /// none, the allocation is reclaimed. One revision either way.
    fn report_conflict(
        &mut self,
        name: &InstanceName,
        token: Token,
        version: Revision,
        port: Port,
    ) -> Result<Outcome, Refusal> {
        let held = self.held_under(name, token)?;
        let number = port.get();
        let swapped = ChangeKind::Swapped { port: number };
        let last_from = held.last_change.as_ref().map_or(Revision(0), |last| last.from);
        if repeats(&held, if version.0 == 0 { last_from } else { version }, &swapped)
            && !held.ports.iter().any(|p| p.number == number)
        {
            return Ok(Outcome::Swapped(held));
        }
        let from = check_version(&held, version)?;
        let Some(reported) = held.ports.iter().find(|p| p.number == number) else {
            return Err(Refusal::PortNotHeld { name: name.clone(), port });
        };

        let mut worker = self.worker_of(&held)?;
        // Nothing is given there until its agent reports, or an operator has verified it.
        if matches!(worker.phase, WorkerPhase::Lost | WorkerPhase::Unverified) {
            let (worker, phase) = (worker.name, worker.phase);
            return Err(Refusal::WorkerNotReady { worker, phase });
        }
        let reason = format!("conflict reported by {name}");
        if let Some(pool) = worker.pool_of_mut(number) {
            let source = Source::Conflict;
            pool.quarantine(number, Quarantine { reason, source, since: self.revision });
        }
        worker.version = self.revision;
        let moved = swap(&mut worker, &held, reported);
        self.state.put_worker(worker);
        let outcome = match moved {
            Ok(ports) => Outcome::Swapped(self.put_changed(Allocation {
                ports: ports.into(),
                phase: Phase::Reserved,
                confirmed: false,
                reason: None,
                liveness: None,
                swaps: held.swaps + 1,
                last_change: Some(LastChange { from, kind: swapped }),
                ..Allocation::clone(&held)
            })),
            Err(reason) => {
                let cause = Cause::Conflict;
                let why = ReleaseReason::Reclaimed { cause, reason: reason.clone() };
                self.free(&held, why);
                Outcome::Reclaimed { allocation: held.clone(), reason }
            }
        };
        self.events.push(Event::Worker(self.worker(&held.worker)?));
        Ok(outcome)
    }

    // Quarantine.

    fn quarantine(
        &mut self,
        name: &WorkerName,
        ports: &[Port],
        reason: &str,
        by: Actor,
    ) -> Result<Outcome, Refusal> {
        let mut worker = self.worker_to_change(name)?;
        let source = match by {
            Actor::Operator => Source::Operator,
            Actor::Leader(_) => Source::Observed,
        };
        let mut changed = false;
        for port in ports {
            let number = port.get();
            let pool = worker.pool_of_mut(number);
            let pool = pool.ok_or_else(|| not_free(name, *port, Taken::Unmanaged))?;
            // An operator's word outlasts what others saw.
            let known = pool.quarantine_of(number).map(|quarantine| quarantine.source);
            if known.is_some_and(|known| known == source || source != Source::Operator) {
                continue;
            }
            match pool.taken(number) {
                None | Some(Taken::Quarantined(_)) => {
                    let since = self.revision;
                    let quarantine = Quarantine { reason: reason.into(), source, since };
                    pool.quarantine(number, quarantine);
                    changed = true;
                }
                // It was given to somebody since it was looked at.
                Some(_) if source == Source::Observed => {}
                Some(taken) => return Err(not_free(name, *port, taken)),
            }
        }
        self.put_if(changed, worker)
    }

    fn lift(
        &mut self,
        name: &WorkerName,
        ports: &[Port],
        by: Actor,
        seen: Revision,
    ) -> Result<Outcome, Refusal> {
        let mut worker = self.worker_to_change(name)?;
        let known = self.state.revision;
        let mut changed = false;
        for port in ports {
            let number = port.get();
            let pool = worker.pool_of_mut(number);
            let pool = pool.ok_or_else(|| not_free(name, *port, Taken::Unmanaged))?;
            let was_seen = |q: &Quarantine| (q.since..=known).contains(&seen);
            let may = |q: &Quarantine| {
                by == Actor::Operator || (q.source != Source::Operator && was_seen(q))
            };
            if pool.quarantine_of(number).is_some_and(may) {
                changed |= pool.lift(number);
            }
        }
        self.put_if(changed, worker)
    }

    // Leases.

    fn grant_lease(&mut self, ttl: Millis) -> Result<Outcome, Refusal> {
        check_room("leases", self.state.lease_count(), 1, LEASES_MAX)?;
        let id = LeaseId(self.revision.0);
        let lease = Arc::new(Lease { id, ttl, allocations: OrdMap::new() });
        self.state.leases.insert(id, lease.clone());
        self.events.push(Event::LeaseGranted(lease.clone()));
        Ok(Outcome::Lease(lease))
    }

    /// Lets all its allocations go, in order of name.
    fn end_lease(&mut self, id: LeaseId, expired: bool) -> Result<Outcome, Refusal> {
        let Some(lease) = self.state.lease(id).cloned() else {
            return Ok(Outcome::LeaseEnded(None));
        };
        let how = if expired { "expired" } else { "was revoked" };
        for name in lease.allocations.keys() {
            if let Some(held) = self.state.allocation(name).cloned() {
                self.let_go(&held, Cause::LeaseEnded, format!("lease {id} {how}"))?;
            }
        }
        self.state.leases.remove(&id);
        self.events.push(Event::LeaseEnded { lease: lease.clone(), expired });
        Ok(Outcome::LeaseEnded(Some(lease)))
    }

    /// Is it there, with room for one more?
    fn check_lease(&self, id: Option<LeaseId>) -> Result<(), Refusal> {
        let Some(id) = id else { return Ok(()) };
        let lease = self.state.lease(id).ok_or(Refusal::NoLease(id))?;
        if lease.allocations.len() >= LEASE_ALLOCATIONS_MAX {
            return Err(Refusal::LeaseFull { lease: id, limit: LEASE_ALLOCATIONS_MAX });
        }
        Ok(())
    }

    // What the above have in common.

    fn worker(&self, name: &WorkerName) -> Result<Arc<Worker>, Refusal> {
        self.state.worker(name).cloned().ok_or_else(|| Refusal::NoWorker(name.clone()))
    }

    fn worker_of(&self, held: &Allocation) -> Result<Worker, Refusal> {
        self.worker(&held.worker).map(|worker| Worker::clone(&worker))
    }

    fn held_under(&self, name: &InstanceName, token: Token) -> Result<Arc<Allocation>, Refusal> {
        let Some(held) = self.state.allocation(name) else {
            let departed = self.state.departure(name).cloned();
            return Err(Refusal::NoAllocation { name: name.clone(), departed });
        };
        check_token(held, token)?;
        Ok(held.clone())
    }

    fn put_worker(&mut self, worker: Worker) -> Outcome {
        let worker = self.state.put_worker(worker);
        self.events.push(Event::Worker(worker.clone()));
        Outcome::Worker(worker)
    }

    fn worker_to_change(&self, name: &WorkerName) -> Result<Worker, Refusal> {
        self.worker(name).map(|worker| Worker { version: self.revision, ..Worker::clone(&worker) })
    }

    fn put_if(&mut self, changed: bool, worker: Worker) -> Result<Outcome, Refusal> {
        if !changed {
            return self.worker(&worker.name).map(Outcome::Worker);
        }
        Ok(self.put_worker(worker))
    }

    fn put_changed(&mut self, allocation: Allocation) -> Arc<Allocation> {
        let allocation = self.state.put_allocation(Allocation {
            version: self.revision,
            changed_at: self.at,
            ..allocation
        });
        self.events.push(Event::Changed(allocation.clone()));
        allocation
    }
}

/// The allocation's ports with others in the place of the reported one, from the same range; an
/// error says why there are none. A counted port is replaced alone, a band moves whole.
fn swap(
    worker: &mut Worker,
    held: &Allocation,
    reported: &HeldPort,
) -> Result<Vec<HeldPort>, String> {
    let HeldPort { request, range, number } = reported;
    let asked = &held.claim.ports[usize::from(*request)];
    let (moved, wanted): (Vec<&HeldPort>, Ports) = match asked.ports {
        _ if held.swaps >= SWAPS_MAX => {
            return Err(format!("port {number} is in use, after {SWAPS_MAX} swaps"));
        }
        Ports::Specific(_) => {
            return Err(format!("port {number} is in use, and was asked for by number"));
        }
        Ports::Count(_) => (vec![reported], Ports::Count(1)),
        band @ Ports::Contiguous(_) => {
            (held.ports.iter().filter(|p| p.request == *request).collect(), band)
        }
    };
    for port in &moved {
        free_port(worker, held.name(), port.number);
    }
    // The default range may be another one by now.
    let wanted = PortRequest { range: Some(range.clone()), ports: wanted, ..asked.clone() };
    let mut given = Vec::with_capacity(moved.len());
    take_ports(worker, held.name(), *request, &wanted, &mut given)
        .map_err(|lack| format!("port {number} is in use, and {lack}"))?;
    let replacement = |port: &HeldPort| {
        let at = moved.iter().position(|m| m.number == port.number);
        at.map_or_else(|| port.clone(), |at| given[at].clone())
    };
    Ok(held.ports.iter().map(replacement).collect())
}

/// Whether `asked` is above the level that is `held`; `known` is the highest of this build.
pub(super) fn rises(held: u32, asked: u32, known: u32) -> Result<bool, Refusal> {
    match asked {
        _ if asked < held => Err(Refusal::FeatureLevelPassed { asked, held }),
        _ if asked > known => Err(Refusal::FeatureLevelUnknown { asked, known }),
        _ => Ok(asked > held),
    }
}

pub(super) fn check_room(
    what: &'static str,
    have: usize,
    more: usize,
    limit: usize,
) -> Result<(), Refusal> {
    if have + more > limit {
        return Err(Refusal::TableFull { what, limit });
    }
    Ok(())
}

/// Frees a port if this holder still has it: one that was quarantined under it is no longer its.
fn free_port(worker: &mut Worker, holder: &InstanceName, number: u16) {
    if let Some(pool) = worker.pool_of_mut(number)
        && pool.holder(number) == Some(holder)
    {
        pool.free(number);
    }
}

fn not_free(worker: &WorkerName, port: Port, taken: Taken) -> Refusal {
    Refusal::PortNotFree { worker: worker.clone(), port, taken }
}

fn taken(holder: &Arc<Allocation>, difference: &'static str) -> Refusal {
    Refusal::NameTaken { name: holder.name().clone(), holder: holder.clone(), difference }
}

fn check_token(held: &Allocation, given: Token) -> Result<(), Refusal> {
    if held.token == given {
        return Ok(());
    }
    Err(Refusal::WrongToken { name: held.name().clone(), given, held: held.token })
}

/// The version that a change is made to, for its repeats to be known by. 0 is unguarded, and one who
/// comes back knows the version from before its silence.
fn check_version(held: &Allocation, given: Revision) -> Result<Revision, Refusal> {
    if given == Revision(0) {
        return Ok(held.version);
    }
    let before_silence = match &held.last_change {
        Some(LastChange { from, kind: ChangeKind::Lingered { .. } }) => Some(*from),
        _ => None,
    };
    if given == held.version || Some(given) == before_silence {
        return Ok(given);
    }
    Err(Refusal::WrongVersion { name: held.name().clone(), given, held: held.version })
}

/// Was the last change this one, made to this version?
fn repeats(held: &Allocation, from: Revision, kind: &ChangeKind) -> bool {
    held.last_change.as_ref().is_some_and(|last| last.from == from && last.kind == *kind)
}
