//! The table as plainly as it can be said: linear scans, and a copy of it all for every attempt.
//! What is left half done on an error is thrown away with its copy.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::make::LEADER;
use super::*;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Model {
    pub revision: u64,
    pub workers: BTreeMap<WorkerName, Host>,
    pub held: BTreeMap<InstanceName, Held>,
    pub leases: BTreeMap<LeaseId, Millis>,
    /// What left other than by its holder's word, and why.
    pub gone: BTreeMap<InstanceName, &'static str>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    pub spec: WorkerSpec,
    pub phase: WorkerPhase,
    /// What an operator wants it to be.
    pub wanted: WorkerPhase,
    pub created: u64,
    pub booted: u64,
    pub ports: BTreeMap<u16, (RangeName, Slot)>,
    pub clock: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Slot {
    /// Since when; 0 if it was never used. The lowest is given first.
    Free(u64),
    Held,
    /// On whose word, and since when.
    Quarantined(Source, u64),
    Reserved,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    pub claim: Claim,
    pub worker: WorkerName,
    /// For each request of the claim.
    pub ports: Vec<Vec<u16>>,
    pub gpus: BTreeSet<u32>,
    pub token: u64,
    pub version: u64,
    pub phase: Phase,
    pub confirmed: bool,
    pub lease: Option<LeaseId>,
    pub liveness: Option<Liveness>,
    pub last: Option<LastChange>,
}

/// What came of a command, or why it was refused. The details are in the table.
pub type Word = Result<&'static str, &'static str>;

impl Model {
    pub fn apply(&mut self, command: &Command) -> Word {
        let before = self.revision;
        let mut next = Model { revision: before + 1, ..self.clone() };
        let word = next.run(command)?;
        next.revision = before;
        if next != *self {
            *self = Model { revision: before + 1, ..next };
        }
        Ok(word)
    }

    /// Without since when ports are free.
    pub fn shown(&self) -> Model {
        let mut shown = self.clone();
        for host in shown.workers.values_mut() {
            host.clock = 0;
            let free = host.ports.values_mut().filter(|(_, slot)| matches!(slot, Slot::Free(_)));
            free.for_each(|(_, slot)| *slot = Slot::Free(0));
        }
        shown
    }

    /// As the table of a new cluster.
    pub fn anew(&mut self) {
        self.revision += RESTORE_GAP;
        self.workers.values_mut().for_each(|host| host.phase = WorkerPhase::Unverified);
        for held in self.held.values_mut() {
            (held.token, held.version, held.last) = (self.revision, self.revision, None);
        }
    }

    fn run(&mut self, command: &Command) -> Word {
        match command {
            Command::Reclaim { under, .. }
            | Command::ExpireLease { under, .. }
            | Command::SetWorkerPhase { by: Actor::Leader(under), .. }
            | Command::VerifyWorker { by: Actor::Leader(under), .. }
            | Command::Quarantine { by: Actor::Leader(under), .. }
            | Command::LiftQuarantine { by: Actor::Leader(under), .. }
                if *under != LEADER =>
            {
                Err("Deposed")
            }
            Command::RegisterWorker { name, spec } => {
                let known = self.workers.get(name).and_then(|host| host.spec.identity.clone());
                let identity = spec.identity.clone().or(known);
                self.respec(name, WorkerSpec { identity, ..spec.clone() })
            }
            Command::UpdateWorker { name, patch } => {
                let spec = patch.onto(&self.host(name)?.spec);
                self.respec(name, spec)
            }
            Command::SetWorkerPhase { name, phase, by } => self.set_phase(name, *phase, *by),
            Command::VerifyWorker { name, .. } => {
                let host = self.host(name)?;
                if host.phase == WorkerPhase::Unverified {
                    host.phase = host.wanted;
                }
                Ok("worker")
            }
            Command::RemoveWorker { name, force } => {
                let on = self.names(|held| held.worker == *name);
                if force.is_none() && !on.is_empty() {
                    return Err("WorkerInUse");
                }
                on.iter().try_for_each(|held| self.drop(held, "forced", "").map(drop))?;
                Ok(self.workers.remove(name).map_or("removed false", |_| "removed true"))
            }
            Command::Allocate { claims, .. } => {
                let Some(first) = claims.iter().find_map(|c| self.held.get(&c.name)) else {
                    return claims.iter().try_fold("granted", |_, claim| self.place(claim));
                };
                let mut held = claims.iter().map(|c| Some((c, self.held.get(&c.name)?)));
                let same = |(c, h): (&Arc<Claim>, &Held)| h.claim == **c && h.token == first.token;
                if held.all(|pair| pair.is_some_and(same)) {
                    Ok("repeated")
                } else {
                    Err("NameTaken")
                }
            }
            Command::Confirm { name, token, version, liveness, lease } => {
                let held = self.owned(name, token.0)?.clone();
                let next = Held {
                    phase: Phase::Bound,
                    confirmed: true,
                    lease: lease.or(held.lease),
                    liveness: liveness.clone().or(held.liveness.clone()),
                    ..held.clone()
                };
                self.change(held, next, version.0, ChangeKind::Confirmed, "confirmed")
            }
            Command::Attach { name, token, version, lease } => {
                let held = self.owned(name, token.0)?.clone();
                if held.phase == Phase::Lingering {
                    return Err("Lingers");
                }
                let next = Held { lease: *lease, ..held.clone() };
                self.change(held, next, version.0, ChangeKind::Attached, "attached")
            }
            Command::Release { name, .. } if !self.held.contains_key(name) => Ok("released false"),
            Command::Release { name, authority } => match authority {
                Authority::Operator { .. } => self.drop(name, "forced", "released true"),
                Authority::Holder(token) => {
                    self.owned(name, token.0)?;
                    self.drop(name, "released", "released true")
                }
            },
            Command::ReportConflict { name, token, version, port } => {
                self.report(name, token.0, version.0, port.get())
            }
            Command::Reclaim { name, token, version, ground, .. } => {
                let held = self.owned(name, token.0)?.clone();
                if held.version != version.0 {
                    return Err("WrongVersion");
                }
                match ground {
                    Ground::Unconfirmed if held.phase == Phase::Reserved => {
                        self.let_go(name, "unconfirmed")
                    }
                    Ground::Gone { identity, seen, .. } if self.proves(&held, identity, seen.0) => {
                        self.drop(name, "gone", "released true")
                    }
                    _ => Err("NotProven"),
                }
            }
            Command::Quarantine { worker, ports, by, .. } => self.quarantine(worker, ports, *by),
            Command::LiftQuarantine { worker, ports, by, seen } => {
                let now = self.revision;
                let host = self.host(worker)?;
                for port in ports {
                    let (_, slot) = host.ports.get(&port.get()).ok_or("PortNotFree")?.clone();
                    if let Slot::Quarantined(source, since) = slot
                        && (*by == Actor::Operator
                            || source != Source::Operator && (since..now).contains(&seen.0))
                    {
                        host.free(port.get(), slot);
                    }
                }
                Ok("worker")
            }
            Command::GrantLease { ttl } => {
                self.leases.insert(LeaseId(self.revision), *ttl);
                Ok("lease")
            }
            Command::RevokeLease { id } | Command::ExpireLease { id, .. } => {
                let was = self.leases.remove(id).is_some();
                let on = self.names(|held| held.lease == Some(*id));
                on.iter().try_for_each(|name| self.let_go(name, "lease_ended").map(drop))?;
                Ok(if was { "ended true" } else { "ended false" })
            }
            Command::Checkpoint(_) => Ok("noted"),
            // There is one, and it is the first.
            Command::SetFeatureLevel { level: 0 } => Err("FeatureLevelPassed"),
            Command::SetFeatureLevel { level: 1 } => Ok("level"),
            Command::SetFeatureLevel { .. } => Err("FeatureLevelUnknown"),
        }
    }

    fn names(&self, which: impl Fn(&Held) -> bool) -> Vec<InstanceName> {
        self.held.iter().filter(|(_, held)| which(held)).map(|(name, _)| name.clone()).collect()
    }

    /// A change that its caller knows by a version: 0 is any, and one who comes back knows that from
    /// before its silence.
    fn change(
        &mut self,
        held: Held,
        next: Held,
        version: u64,
        kind: ChangeKind,
        word: &'static str,
    ) -> Word {
        let repeated = held.last.as_ref().is_some_and(|l| l.from.0 == version && l.kind == kind);
        if next == held && (repeated || version == 0 || version == held.version) {
            return Ok(word);
        }
        let from = held.known_as(version)?;
        if next.lease != held.lease {
            self.check_lease(next.lease)?;
        }
        let last = Some(LastChange { from, kind });
        let name = held.claim.name.clone();
        self.held.insert(name, Held { version: self.revision, last, ..next });
        Ok(word)
    }

    /// Its holder fell silent: where an agent watches, that frees nothing.
    fn let_go(&mut self, name: &InstanceName, cause: &'static str) -> Word {
        let held = self.held[name].clone();
        if self.host(&held.worker)?.spec.identity.is_none() {
            return self.drop(name, cause, "released true");
        }
        let cause = if cause == "lease_ended" { Cause::LeaseEnded } else { Cause::Unconfirmed };
        let from = Revision(held.version);
        let last = Some(LastChange { from, kind: ChangeKind::Lingered { cause } });
        let (version, phase, lease) = (self.revision, Phase::Lingering, None);
        self.held.insert(name.clone(), Held { version, phase, lease, last, ..held });
        Ok("lingers")
    }

    fn proves(&self, held: &Held, identity: &Identity, seen: u64) -> bool {
        let host = &self.workers[&held.worker];
        held.phase != Phase::Reserved
            && host.phase != WorkerPhase::Lost
            && host.spec.identity.as_ref() == Some(identity)
            && (held.version..self.revision).contains(&seen)
    }

    fn check_lease(&self, id: Option<LeaseId>) -> Result<(), &'static str> {
        match id.is_none_or(|id| self.leases.contains_key(&id)) {
            true => Ok(()),
            false => Err("NoLease"),
        }
    }

    fn set_phase(&mut self, name: &WorkerName, phase: WorkerPhase, by: Actor) -> Word {
        let host = self.host(name)?;
        if phase == WorkerPhase::Lost && host.spec.identity.is_none() {
            return Err("Invalid");
        }
        let ready = !matches!(host.phase, WorkerPhase::Lost | WorkerPhase::Unverified);
        if by == Actor::Operator {
            host.wanted = phase;
        }
        if host.phase != WorkerPhase::Unverified && (ready || by != Actor::Operator) {
            host.phase = if phase == WorkerPhase::Lost { phase } else { host.wanted };
        }
        Ok("worker")
    }

    /// What an operator says holds until an operator says otherwise.
    fn quarantine(&mut self, worker: &WorkerName, ports: &[Port], by: Actor) -> Word {
        let now = self.revision;
        let host = self.host(worker)?;
        for port in ports {
            let (_, slot) = host.ports.get_mut(&port.get()).ok_or("PortNotFree")?;
            match (by, &*slot) {
                (Actor::Operator, Slot::Quarantined(Source::Operator, _)) => {}
                (Actor::Operator, Slot::Free(_) | Slot::Quarantined(..)) => {
                    *slot = Slot::Quarantined(Source::Operator, now);
                }
                (Actor::Operator, _) => return Err("PortNotFree"),
                (_, Slot::Free(_)) => *slot = Slot::Quarantined(Source::Observed, now),
                _ => {}
            }
        }
        Ok("worker")
    }

    /// A port keeps its past; what is held keeps its range, its GPU, its memory and its namespace.
    fn respec(&mut self, name: &WorkerName, spec: WorkerSpec) -> Word {
        let boot = |spec: &WorkerSpec| spec.identity.as_ref().map(|id| id.boot_id.clone());
        let old = self.workers.get(name).cloned().unwrap_or_else(|| Host {
            spec: spec.clone(),
            phase: WorkerPhase::Ready,
            wanted: WorkerPhase::Ready,
            created: self.revision,
            booted: if spec.identity.is_some() { self.revision } else { 0 },
            ports: BTreeMap::new(),
            clock: 0,
        });
        let booted = match boot(&old.spec) {
            before if before == boot(&spec) => old.booted,
            None => old.created,
            Some(_) => self.revision,
        };
        let mut ports = BTreeMap::new();
        for range in &spec.ranges {
            for n in range.first.get()..=range.last.get() {
                let slot = match old.ports.get(&n) {
                    _ if spec.reserved.iter().any(|p| p.get() == n) => Slot::Reserved,
                    None | Some((_, Slot::Reserved)) => Slot::Free(0),
                    Some((_, slot)) => slot.clone(),
                };
                ports.insert(n, (range.name.clone(), slot));
            }
        }
        let uuids = |spec: &WorkerSpec| -> BTreeSet<String> {
            spec.gpus.iter().map(|g| g.uuid.clone()).filter(|uuid| !uuid.is_empty()).collect()
        };
        let others = self.workers.iter().filter(|other| other.0 != name).map(|other| &other.1.spec);
        for other in others {
            let same_id = spec.identity.is_some() && spec.identity == other.identity;
            if same_id || !uuids(&spec).is_disjoint(&uuids(other)) {
                return Err("IdentityTaken");
            }
        }
        let no_port = |(n, p): (_, &(_, Slot))| p.1 == Slot::Held && ports.get(n) != Some(p);
        let no_gpu = |old: &GpuSpec| {
            let used = self.used(name, old);
            let fits = |new: &GpuSpec| {
                new.uuid == old.uuid && used == self.used(name, new) && used <= new.memory_bytes
            };
            used > 0 && !spec.gpus.iter().any(|new| new.index == old.index && fits(new))
        };
        let no_home = match (&old.spec.identity, &spec.identity) {
            (Some(old), Some(new)) => {
                old.machine_id != new.machine_id
                    || old.boot_id == new.boot_id && old.namespace != new.namespace
            }
            _ => false,
        };
        if old.ports.iter().any(no_port)
            || old.spec.gpus.iter().any(no_gpu)
            || no_home && self.held.values().any(|held| held.worker == *name)
        {
            return Err("WouldLose");
        }
        self.workers.insert(name.clone(), Host { spec, ports, booted, ..old });
        Ok("worker")
    }

    /// Tries every worker, ordered by what it has free of what the claim needs most.
    fn place(&mut self, claim: &Claim) -> Word {
        self.check_lease(claim.lease)?;
        let room = |name: &WorkerName, host: &Host| -> u64 {
            let gpus = host.spec.gpus.iter().map(|g| (g, g.memory_bytes - self.used(name, g)));
            match claim.gpus.as_ref().map(|g| g.share) {
                None => host.ports.values().filter(|p| matches!(p.1, Slot::Free(_))).count() as u64,
                Some(GpuShare::MemoryBytes(_)) => gpus.map(|g| g.1).max().unwrap_or(0),
                Some(GpuShare::Exclusive) => {
                    gpus.filter(|g| g.1 == g.0.memory_bytes).count() as u64
                }
            }
        };
        let (workers, policy) = match &claim.placement {
            Placement::Worker(name) => match self.workers.get(name).ok_or("NoWorker")?.phase {
                WorkerPhase::Ready => (vec![name.clone()], Policy::Binpack),
                _ => return Err("WorkerNotReady"),
            },
            Placement::Select { selector, policy } => {
                let mut fit: Vec<_> = self.workers.iter().collect();
                fit.retain(|w| {
                    w.1.phase == WorkerPhase::Ready && selector.matches(&w.1.spec.labels)
                });
                fit.sort_by_key(|w| (turn(*policy, room(w.0, w.1)), w.0));
                (fit.into_iter().map(|w| w.0.clone()).collect(), *policy)
            }
        };
        let give = |worker| {
            let mut next = self.clone();
            next.give(claim, worker, policy).map(|()| next)
        };
        *self = workers.iter().find_map(give).ok_or("NothingFits")?;
        Ok("granted")
    }

    /// Specific ports first, then bands, then the others.
    fn give(&mut self, claim: &Claim, worker: &WorkerName, policy: Policy) -> Option<()> {
        let mut gpus = BTreeSet::new();
        if let Some(GpuRequest { which, share }) = claim.gpus.as_deref() {
            let free = |gpu: &GpuSpec| gpu.memory_bytes - self.used(worker, gpu);
            let mut fit: Vec<_> = self.workers[worker].spec.gpus.iter().collect();
            fit.retain(|gpu| match share {
                GpuShare::MemoryBytes(bytes) => *bytes <= free(gpu),
                GpuShare::Exclusive => free(gpu) == gpu.memory_bytes,
            });
            if let GpuChoice::Indexes(indexes) = which {
                fit.retain(|gpu| indexes.contains(&gpu.index));
            }
            fit.sort_by_key(|gpu| (turn(policy, free(gpu)), gpu.index));
            gpus.extend(fit.get(..which.count())?.iter().map(|gpu| gpu.index));
        }
        let host = self.workers.get_mut(worker)?;
        let mut ports = vec![vec![]; claim.ports.len()];
        let mut requests: Vec<_> = claim.ports.iter().zip(&mut ports).collect();
        requests.sort_by_key(|(asked, _)| match asked.ports {
            Ports::Specific(_) => 0,
            Ports::Contiguous(_) => 1,
            Ports::Count(_) => 2,
        });
        for (asked, ports) in requests {
            *ports = host.take(asked)?;
        }
        let held = Held {
            claim: claim.clone(),
            worker: worker.clone(),
            ports,
            gpus,
            token: self.revision,
            version: self.revision,
            phase: if claim.bound { Phase::Bound } else { Phase::Reserved },
            confirmed: claim.bound,
            lease: claim.lease,
            liveness: None,
            last: None,
        };
        self.held.insert(claim.name.clone(), held);
        self.gone.remove(&claim.name);
        Some(())
    }

    /// The port is quarantined; another one, or for a band another band, takes its place.
    fn report(&mut self, name: &InstanceName, token: u64, version: u64, number: u16) -> Word {
        let mut held = self.owned(name, token)?.clone();
        let kind = ChangeKind::Swapped { port: number };
        let request = held.ports.iter().position(|ports| ports.contains(&number));
        let repeated = held
            .last
            .as_ref()
            .is_some_and(|last| last.kind == kind && (version == 0 || version == last.from.0));
        if request.is_none() && repeated {
            return Ok("swapped");
        }
        let from = held.known_as(version)?;
        let request = request.ok_or("PortNotHeld")?;
        let (mut asked, mut moved) =
            (held.claim.ports[request].clone(), held.ports[request].clone());
        if let Ports::Count(n) = &mut asked.ports {
            (*n, moved) = (1, vec![number]);
        }
        let now = self.revision;
        let host = self.host(&held.worker)?;
        if matches!(host.phase, WorkerPhase::Lost | WorkerPhase::Unverified) {
            return Err("WorkerNotReady");
        }
        let (range, slot) = host.ports.get_mut(&number).unwrap();
        asked.range = Some(range.clone());
        *slot = Slot::Quarantined(Source::Conflict, now);
        moved.iter().for_each(|n| host.free(*n, Slot::Held));
        let Some(given) = host.take(&asked) else {
            return self.drop(name, "conflict", "reclaimed");
        };
        let places = held.ports[request].iter_mut().filter(|n| moved.contains(n));
        places.zip(given).for_each(|(old, new)| *old = new);
        (held.phase, held.confirmed, held.liveness) = (Phase::Reserved, false, None);
        (held.version, held.last) = (now, Some(LastChange { from, kind }));
        self.held.insert(name.clone(), held);
        Ok("swapped")
    }

    fn drop(&mut self, name: &InstanceName, cause: &'static str, word: &'static str) -> Word {
        let held = self.held.remove(name).ok_or("NoAllocation")?;
        let host = self.host(&held.worker)?;
        held.ports.iter().flatten().for_each(|n| host.free(*n, Slot::Held));
        if cause != "released" {
            self.gone.insert(name.clone(), cause);
        }
        Ok(word)
    }

    fn host(&mut self, name: &WorkerName) -> Result<&mut Host, &'static str> {
        self.workers.get_mut(name).ok_or("NoWorker")
    }

    fn owned(&mut self, name: &InstanceName, token: u64) -> Result<&mut Held, &'static str> {
        let held = self.held.get_mut(name).ok_or("NoAllocation")?;
        if held.token == token { Ok(held) } else { Err("WrongToken") }
    }

    fn used(&self, worker: &WorkerName, gpu: &GpuSpec) -> u64 {
        let on = self.held.values().filter(|h| h.worker == *worker && h.gpus.contains(&gpu.index));
        on.map(|h| match h.claim.gpus.as_ref().unwrap().share {
            GpuShare::MemoryBytes(bytes) => bytes,
            GpuShare::Exclusive => gpu.memory_bytes,
        })
        .sum()
    }
}

impl Held {
    fn known_as(&self, version: u64) -> Result<Revision, &'static str> {
        let silent = |last: &LastChange| {
            matches!(last.kind, ChangeKind::Lingered { .. }) && last.from.0 == version
        };
        match version {
            0 => Ok(Revision(self.version)),
            _ if version == self.version => Ok(Revision(version)),
            _ if self.last.as_ref().is_some_and(silent) => Ok(Revision(version)),
            _ => Err("WrongVersion"),
        }
    }
}

impl Host {
    /// Frees a port that is in this state; leaves any other alone.
    fn free(&mut self, number: u16, was: Slot) {
        if let Some((_, slot)) = self.ports.get_mut(&number).filter(|p| p.1 == was) {
            self.clock += 1;
            *slot = Slot::Free(self.clock);
        }
    }

    fn take(&mut self, asked: &PortRequest) -> Option<Vec<u16>> {
        let range = match (&asked.range, asked.ports) {
            (Some(range), _) => range.clone(),
            (None, Ports::Specific(port)) => self.ports.get(&port.get())?.0.clone(),
            (None, _) => self.spec.ranges.first()?.name.clone(),
        };
        let mut free: Vec<(u64, u16)> = vec![];
        for (number, (of, slot)) in &self.ports {
            if let Slot::Free(since) = slot
                && *of == range
            {
                free.push((*since, *number));
            }
        }
        let given = match asked.ports {
            Ports::Specific(port) => vec![*free.iter().find(|f| f.1 == port.get())?],
            Ports::Count(n) => {
                free.sort();
                free.get(..n as usize)?.to_vec()
            }
            // Runs are cut into windows; the one whose youngest port is oldest wins.
            Ports::Contiguous(n) => {
                let runs = free.chunk_by(|a, b| a.1 + 1 == b.1);
                let windows = runs.flat_map(|run| run.chunks_exact(n as usize));
                windows.min_by_key(|window| window.iter().map(|f| f.0).max())?.to_vec()
            }
        };
        given.iter().for_each(|f| self.ports.get_mut(&f.1).unwrap().1 = Slot::Held);
        Some(given.into_iter().map(|f| f.1).collect())
    }
}

fn turn(policy: Policy, free: u64) -> u64 {
    if policy == Policy::Spread { u64::MAX - free } else { free }
}
