//! The table as plainly as it can be said: linear scans, and a copy of it all for every attempt.
//! What is left half done on an error is thrown away with its copy.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Model {
    pub revision: u64,
    pub workers: BTreeMap<WorkerName, Host>,
    pub held: BTreeMap<InstanceName, Held>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    pub spec: WorkerSpec,
    pub phase: WorkerPhase,
    pub ports: BTreeMap<u16, (RangeName, Slot)>,
    clock: u64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Slot {
    /// Since when; 0 if it was never used. The lowest is given first.
    Free(u64),
    Held,
    Quarantined,
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
    pub bound: bool,
    /// The port that was swapped out, where that was the last change.
    pub swapped: Option<u16>,
}

/// What came of a command, or why it was refused. The details are in the table.
pub type Word = Result<&'static str, &'static str>;

impl Model {
    pub fn apply(&mut self, command: &Command) -> Word {
        let mut next = Model { revision: self.revision + 1, ..self.clone() };
        let word = next.run(command)?;
        if (&next.workers, &next.held) != (&self.workers, &self.held) {
            *self = next;
        }
        Ok(word)
    }

    fn run(&mut self, command: &Command) -> Word {
        match command {
            Command::RegisterWorker { name, spec } => self.respec(name, spec.clone()),
            Command::UpdateWorker { name, patch } => {
                let spec = patch.onto(&self.host(name)?.spec);
                self.respec(name, spec)
            }
            Command::SetWorkerPhase { name, phase } => {
                self.host(name)?.phase = *phase;
                Ok("worker")
            }
            Command::RemoveWorker { name } => match self.held.values().any(|h| h.worker == *name) {
                true => Err("WorkerInUse"),
                false => Ok(self.workers.remove(name).map_or("removed false", |_| "removed true")),
            },
            Command::Allocate { claims } => {
                let Some(first) = claims.iter().find_map(|c| self.held.get(&c.name)) else {
                    return claims.iter().try_fold("granted", |_, claim| self.place(claim));
                };
                let mut held = claims.iter().map(|c| Some((c, self.held.get(&c.name)?)));
                let same = |(c, h): (&Claim, &Held)| h.claim == *c && h.token == first.token;
                if held.all(|pair| pair.is_some_and(same)) {
                    Ok("repeated")
                } else {
                    Err("NameTaken")
                }
            }
            Command::Confirm { name, token, .. } => {
                let held = self.owned(name, token.0)?;
                (held.bound, held.swapped) = (true, None);
                Ok("confirmed")
            }
            Command::Release { name, .. } if !self.held.contains_key(name) => Ok("released false"),
            Command::Release { name, authority } => {
                if let Authority::Holder(token) = authority {
                    self.owned(name, token.0)?;
                }
                self.drop(name, "released true")
            }
            Command::ReportConflict { name, token, port, .. } => {
                self.report(name, token.0, port.get())
            }
            Command::Quarantine { worker, ports, .. } => {
                let host = self.host(worker)?;
                for port in ports {
                    match host.ports.get_mut(&port.get()) {
                        Some((_, slot @ (Slot::Free(_) | Slot::Quarantined))) => {
                            *slot = Slot::Quarantined;
                        }
                        _ => return Err("PortNotFree"),
                    }
                }
                Ok("worker")
            }
            Command::LiftQuarantine { worker, ports } => {
                let host = self.host(worker)?;
                for port in ports {
                    host.ports.get(&port.get()).ok_or("PortNotFree")?;
                    host.free(port.get(), Slot::Quarantined);
                }
                Ok("worker")
            }
            Command::Checkpoint(_) => Ok("noted"),
        }
    }

    /// A port keeps its past; what is held keeps its range, its GPU and its memory.
    fn respec(&mut self, name: &WorkerName, spec: WorkerSpec) -> Word {
        let (phase, ports, clock) = (WorkerPhase::Ready, BTreeMap::new(), 0);
        let new = Host { spec: spec.clone(), phase, ports, clock };
        let old = self.workers.get(name).cloned().unwrap_or(new);
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
        let no_port = |(n, p): (_, &(_, Slot))| p.1 == Slot::Held && ports.get(n) != Some(p);
        let no_gpu = |old: &GpuSpec| {
            let used = self.used(name, old);
            let fits = |new: &GpuSpec| used == self.used(name, new) && used <= new.memory_bytes;
            used > 0 && !spec.gpus.iter().any(|new| new.index == old.index && fits(new))
        };
        if old.ports.iter().any(no_port) || old.spec.gpus.iter().any(no_gpu) {
            return Err("WouldLose");
        }
        self.workers.insert(name.clone(), Host { spec, ports, ..old });
        Ok("worker")
    }

    /// Tries every worker, ordered by what it has free of what the claim needs most.
    fn place(&mut self, claim: &Claim) -> Word {
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
        if let Some(GpuRequest { which, share }) = &claim.gpus {
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
        let (worker, token) = (worker.clone(), self.revision);
        let (bound, swapped) = (claim.bound, None);
        let held = Held { claim: claim.clone(), worker, ports, gpus, token, bound, swapped };
        self.held.insert(claim.name.clone(), held);
        Some(())
    }

    /// The port is quarantined; another one, or for a band another band, takes its place.
    fn report(&mut self, name: &InstanceName, token: u64, number: u16) -> Word {
        let mut held = self.owned(name, token)?.clone();
        let request = held.ports.iter().position(|ports| ports.contains(&number));
        if request.is_none() && held.swapped == Some(number) {
            return Ok("swapped");
        }
        let request = request.ok_or("PortNotHeld")?;
        let (mut asked, mut moved) =
            (held.claim.ports[request].clone(), held.ports[request].clone());
        if let Ports::Count(n) = &mut asked.ports {
            (*n, moved) = (1, vec![number]);
        }
        let host = self.host(&held.worker)?;
        let (range, slot) = host.ports.get_mut(&number).unwrap();
        (asked.range, *slot) = (Some(range.clone()), Slot::Quarantined);
        moved.iter().for_each(|n| host.free(*n, Slot::Held));
        let Some(given) = host.take(&asked) else { return self.drop(name, "reclaimed") };
        let places = held.ports[request].iter_mut().filter(|n| moved.contains(n));
        places.zip(given).for_each(|(old, new)| *old = new);
        (held.bound, held.swapped) = (false, Some(number));
        self.held.insert(name.clone(), held);
        Ok("swapped")
    }

    fn drop(&mut self, name: &InstanceName, word: &'static str) -> Word {
        let held = self.held.remove(name).ok_or("NoAllocation")?;
        let host = self.host(&held.worker)?;
        held.ports.iter().flatten().for_each(|n| host.free(*n, Slot::Held));
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
