//! The one place where the table changes.

use std::sync::Arc;

use super::allocation::{Allocation, ChangeKind, HeldPort, LastChange, Phase};
use super::claim::{Claim, PortRequest, Ports};
use super::command::{Applied, Authority, Command, Event, Outcome, Refusal, ReleaseReason};
use super::limits::{ALLOCATIONS_MAX, SWAPS_MAX, WORKERS_MAX};
use super::name::{InstanceName, Port, Revision, Token, WorkerName};
use super::place::{Grant, place, take_ports};
use super::ports::{Quarantine, Taken};
use super::state::{State, uuids};
use super::worker::{Worker, WorkerPatch, WorkerPhase, WorkerSpec};

/// Applies one command. Total and deterministic: it never fails, a refusal changes nothing, and a
/// command that changes nothing takes no revision.
pub fn apply(state: &mut State, command: &Command) -> (Applied, Vec<Event>) {
    let mut change = Change { revision: Revision(state.revision.0 + 1), state, events: Vec::new() };
    let outcome = command.validate().map_err(Refusal::from).and_then(|()| change.run(command));
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
    events: Vec<Event>,
}

impl Change<'_> {
    fn run(&mut self, command: &Command) -> Result<Outcome, Refusal> {
        match command {
            Command::RegisterWorker { name, spec } => self.register(name, spec),
            Command::UpdateWorker { name, patch } => self.update(name, patch),
            Command::SetWorkerPhase { name, phase } => self.set_phase(name, *phase),
            Command::RemoveWorker { name } => self.remove_worker(name),
            Command::Allocate { claims } => self.allocate(claims),
            Command::Confirm { name, token, version } => self.confirm(name, *token, *version),
            Command::Release { name, authority } => self.release(name, authority),
            Command::ReportConflict { name, token, version, port } => {
                self.report_conflict(name, *token, *version, *port)
            }
            Command::Quarantine { worker, ports, reason } => self.quarantine(worker, ports, reason),
            Command::LiftQuarantine { worker, ports } => self.lift(worker, ports),
            Command::Checkpoint(_) => Ok(Outcome::Noted),
        }
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

    fn set_phase(&mut self, name: &WorkerName, phase: WorkerPhase) -> Result<Outcome, Refusal> {
        let worker = self.worker(name)?;
        if worker.phase == phase {
            return Ok(Outcome::Worker(worker));
        }
        Ok(self.put_worker(Worker { phase, version: self.revision, ..Worker::clone(&worker) }))
    }

    fn remove_worker(&mut self, name: &WorkerName) -> Result<Outcome, Refusal> {
        let Some(worker) = self.state.worker(name) else {
            return Ok(Outcome::WorkerRemoved { removed: false });
        };
        if let Some((example, ())) = worker.allocations.get_min() {
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
    fn allocate(&mut self, claims: &[Claim]) -> Result<Outcome, Refusal> {
        if let Some(repeated) = self.granted_before(claims)? {
            return Ok(Outcome::Allocated { allocations: repeated, repeated: true });
        }
        check_room("allocations", self.state.allocation_count(), claims.len(), ALLOCATIONS_MAX)?;
        if let [claim] = claims {
            let grant = place(self.state, claim)?;
            let allocations = vec![self.grant(claim, grant)];
            return Ok(Outcome::Allocated { allocations, repeated: false });
        }
        let before = self.state.clone();
        let mut allocations = Vec::with_capacity(claims.len());
        for claim in claims {
            match place(self.state, claim) {
                Ok(grant) => allocations.push(self.grant(claim, grant)),
                Err(refusal) => {
                    *self.state = before;
                    self.events.clear();
                    return Err(refusal);
                }
            }
        }
        Ok(Outcome::Allocated { allocations, repeated: false })
    }

    /// The allocations of an earlier, equal request. A name that is held by another uid, for
    /// another request or by another grant than its fellows is a rival's.
    fn granted_before(&self, claims: &[Claim]) -> Result<Option<Vec<Arc<Allocation>>>, Refusal> {
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
            Some(first) if found.len() < claims.len() => Err(taken(first, "gang")),
            Some(_) => Ok(Some(found)),
        }
    }

    fn grant(&mut self, claim: &Claim, grant: Grant) -> Arc<Allocation> {
        let Grant { worker, ports, gpus } = grant;
        let allocation = self.state.put_allocation(Allocation {
            claim: Arc::new(claim.clone()),
            worker: worker.name.clone(),
            ports,
            gpus,
            token: Token(self.revision.0),
            version: self.revision,
            phase: if claim.bound { Phase::Bound } else { Phase::Reserved },
            swaps: 0,
            last_change: None,
        });
        self.state.put_worker(worker);
        self.events.push(Event::Allocated(allocation.clone()));
        allocation
    }

    fn confirm(
        &mut self,
        name: &InstanceName,
        token: Token,
        version: Revision,
    ) -> Result<Outcome, Refusal> {
        let held = self.held_under(name, token)?;
        if held.phase == Phase::Bound
            && (version == Revision(0)
                || version == held.version
                || repeats(&held, version, &ChangeKind::Confirmed))
        {
            return Ok(Outcome::Confirmed(held));
        }
        check_version(&held, version)?;
        let confirmed = self.put_changed(Allocation {
            phase: Phase::Bound,
            last_change: Some(LastChange { from: held.version, kind: ChangeKind::Confirmed }),
            ..Allocation::clone(&held)
        });
        Ok(Outcome::Confirmed(confirmed))
    }

    fn release(&mut self, name: &InstanceName, authority: &Authority) -> Result<Outcome, Refusal> {
        let Some(held) = self.state.allocation(name).cloned() else {
            return Ok(Outcome::Released(None));
        };
        let why = match authority {
            Authority::Holder(token) => {
                check_token(&held, *token)?;
                ReleaseReason::ByHolder
            }
            Authority::Operator { reason } => ReleaseReason::Forced { reason: reason.clone() },
        };
        let mut worker = self.worker_of(&held)?;
        self.free(&mut worker, &held, why);
        Ok(Outcome::Released(Some(held)))
    }

    /// The one way out of the table (field failure kubernetes-120536): gives back every port and
    /// GPU that the allocation still holds on `worker`, and puts the worker back.
    fn free(&mut self, worker: &mut Worker, held: &Arc<Allocation>, why: ReleaseReason) {
        for port in &held.ports {
            free_port(worker, held.name(), port.number);
        }
        for gpu in &mut worker.gpus {
            gpu.free(held.name());
        }
        worker.allocations.remove(held.name());
        self.state.put_worker(worker.clone());
        self.state.allocations.remove(held.name());
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
        check_version(&held, version)?;
        let Some(reported) = held.ports.iter().find(|p| p.number == number) else {
            return Err(Refusal::PortNotHeld { name: name.clone(), port });
        };

        let mut worker = self.worker_of(&held)?;
        let reason = format!("conflict reported by {name}");
        if let Some(pool) = worker.pool_of_mut(number) {
            pool.quarantine(number, Quarantine { reason, since: self.revision });
        }
        worker.version = self.revision;
        let outcome = match swap(&mut worker, &held, reported) {
            Ok(ports) => {
                self.state.put_worker(worker.clone());
                Outcome::Swapped(self.put_changed(Allocation {
                    ports,
                    phase: Phase::Reserved,
                    swaps: held.swaps + 1,
                    last_change: Some(LastChange { from: held.version, kind: swapped }),
                    ..Allocation::clone(&held)
                }))
            }
            Err(reason) => {
                let why = ReleaseReason::Reclaimed { reason: reason.clone() };
                self.free(&mut worker, &held, why);
                Outcome::Reclaimed { allocation: held, reason }
            }
        };
        self.events.push(Event::Worker(Arc::new(worker)));
        Ok(outcome)
    }

    // Quarantine.

    fn quarantine(
        &mut self,
        name: &WorkerName,
        ports: &[Port],
        reason: &str,
    ) -> Result<Outcome, Refusal> {
        let old = self.worker(name)?;
        let mut worker = Worker::clone(&old);
        for port in ports {
            let number = port.get();
            let quarantine = Quarantine { reason: reason.into(), since: self.revision };
            let pool = worker.pool_of_mut(number);
            match pool.as_ref().map_or(Some(Taken::Unmanaged), |pool| pool.taken(number)) {
                None => pool.into_iter().for_each(|p| p.quarantine(number, quarantine.clone())),
                Some(Taken::Quarantined(_)) => {}
                Some(taken) => {
                    return Err(Refusal::PortNotFree { worker: name.clone(), port: *port, taken });
                }
            }
        }
        Ok(self.put_if_changed(&old, worker))
    }

    fn lift(&mut self, name: &WorkerName, ports: &[Port]) -> Result<Outcome, Refusal> {
        let old = self.worker(name)?;
        let mut worker = Worker::clone(&old);
        for port in ports {
            match worker.pool_of_mut(port.get()) {
                Some(pool) => pool.lift(port.get()),
                None => {
                    return Err(Refusal::PortNotFree {
                        worker: name.clone(),
                        port: *port,
                        taken: Taken::Unmanaged,
                    });
                }
            };
        }
        Ok(self.put_if_changed(&old, worker))
    }

    // What the above have in common.

    fn worker(&self, name: &WorkerName) -> Result<Arc<Worker>, Refusal> {
        self.state.worker(name).cloned().ok_or_else(|| Refusal::NoWorker(name.clone()))
    }

    fn worker_of(&self, held: &Allocation) -> Result<Worker, Refusal> {
        self.worker(&held.worker).map(|worker| Worker::clone(&worker))
    }

    fn held_under(&self, name: &InstanceName, token: Token) -> Result<Arc<Allocation>, Refusal> {
        let held = self.state.allocation(name);
        let held = held.ok_or_else(|| Refusal::NoAllocation(name.clone()))?;
        check_token(held, token)?;
        Ok(held.clone())
    }

    fn put_worker(&mut self, worker: Worker) -> Outcome {
        let worker = self.state.put_worker(worker);
        self.events.push(Event::Worker(worker.clone()));
        Outcome::Worker(worker)
    }

    fn put_if_changed(&mut self, old: &Arc<Worker>, mut new: Worker) -> Outcome {
        let quarantined =
            |w: &Worker| -> Vec<u32> { w.pools.iter().map(|p| p.quarantined_count()).collect() };
        if quarantined(old) == quarantined(&new) {
            return Outcome::Worker(old.clone());
        }
        new.version = self.revision;
        self.put_worker(new)
    }

    fn put_changed(&mut self, allocation: Allocation) -> Arc<Allocation> {
        let allocation =
            self.state.put_allocation(Allocation { version: self.revision, ..allocation });
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
    let HeldPort { request, range, number, .. } = reported;
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

fn taken(holder: &Arc<Allocation>, difference: &'static str) -> Refusal {
    Refusal::NameTaken { name: holder.name().clone(), holder: holder.clone(), difference }
}

fn check_token(held: &Allocation, given: Token) -> Result<(), Refusal> {
    if held.token == given {
        return Ok(());
    }
    Err(Refusal::WrongToken { name: held.name().clone(), given, held: held.token })
}

/// 0 is unguarded.
fn check_version(held: &Allocation, given: Revision) -> Result<(), Refusal> {
    if given == Revision(0) || given == held.version {
        return Ok(());
    }
    Err(Refusal::WrongVersion { name: held.name().clone(), given, held: held.version })
}

/// Was the last change this one, made to this version?
fn repeats(held: &Allocation, from: Revision, kind: &ChangeKind) -> bool {
    held.last_change.as_ref().is_some_and(|last| last.from == from && last.kind == *kind)
}
