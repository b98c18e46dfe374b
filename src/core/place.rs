//! Finding a place for a claim.
//!
//! A claim that names its worker gets that one or a refusal. A claim with a selector walks an index
//! of the ready workers, ordered by what the claim needs most (GPU memory, idle GPUs, else ports):
//! from the fullest that may fit upward (binpack), or from the emptiest downward (spread), ties by
//! name. The walk is bounded by [`PLACEMENT_CANDIDATES_MAX`]; integer arithmetic only.

use std::collections::{BTreeMap, BTreeSet};

use imbl::OrdSet;
use itertools::Itertools as _;

use super::allocation::{HeldGpu, HeldPort};
use super::claim::{Claim, GpuChoice, GpuRequest, GpuShare, Placement, Policy, PortRequest, Ports};
use super::command::{HOLDERS_SHOWN, Lack, LackKind, Refusal, Shortage};
use super::limits::{EXPLAINED_WORKERS_MAX, PLACEMENT_CANDIDATES_MAX};
use super::name::{InstanceName, WorkerName};
use super::ports::{Pool, Taken};
use super::selector::{Selector, Term};
use super::state::{Resource, Scope, State};
use super::worker::{Gpu, Worker, WorkerPhase};

/// What of its worker a claim holds.
pub(super) struct Grant {
    pub ports: Vec<HeldPort>,
    pub gpus: Vec<HeldGpu>,
}

/// The worker on which the claim fits: there, [`take`] gives it what it asks for.
pub(super) fn place(state: &mut State, claim: &Claim) -> Result<WorkerName, Refusal> {
    let nothing_fits = |shortage| Refusal::NothingFits { name: claim.name.clone(), shortage };
    match &claim.placement {
        Placement::Worker(name) => {
            let worker = state.worker(name).ok_or_else(|| Refusal::NoWorker(name.clone()))?;
            if worker.phase != WorkerPhase::Ready {
                return Err(Refusal::WorkerNotReady { worker: name.clone(), phase: worker.phase });
            }
            fits(worker, claim)
                .map(|()| name.clone())
                .map_err(|lack| nothing_fits(Shortage::OnWorker { worker: name.clone(), lack }))
        }
        Placement::Select { selector, policy } => {
            state.settle();
            let state = &*state;
            let (resource, least) = need(claim);
            let found = sources(state, selector, resource)
                .candidates(least, *policy)
                .take(PLACEMENT_CANDIDATES_MAX);
            #[cfg(planted)]
            let found = crate::planted::in_hash_order(found);
            let mut weighed = Weighed::new(claim, selector);
            found
                .filter_map(|name| state.worker(name))
                .find(|worker| weighed.fits(worker))
                .map(|worker| worker.name.clone())
                .ok_or_else(|| nothing_fits(weighed.shortage(state)))
        }
    }
}

/// Why a claim fits where: the workers in the order in which its policy prefers them, at most
/// [`EXPLAINED_WORKERS_MAX`], each with what it lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// Ready workers that the selector may match; 1 where the claim names its worker.
    pub candidates: u64,
    /// Workers of the whole cluster that are not `Ready`.
    pub not_ready: u64,
    /// `Err` has what is missing, in words.
    pub workers: Vec<(WorkerName, Result<(), String>)>,
}

/// Of a copy: it may have to bring its indexes up to date.
pub fn explain(state: &mut State, claim: &Claim) -> Explanation {
    let not_ready = state.indexes.not_ready;
    let weigh = |worker: &Worker| {
        let lack = fits(worker, claim).err().map(|lack| lack.to_string());
        (worker.name.clone(), lack.map_or(Ok(()), Err))
    };
    match &claim.placement {
        Placement::Worker(name) => {
            let verdict = match state.worker(name) {
                None => (name.clone(), Err("there is no such worker".into())),
                Some(worker) if worker.phase != WorkerPhase::Ready => {
                    (name.clone(), Err(format!("it is {}", worker.phase.name())))
                }
                Some(worker) => weigh(worker),
            };
            Explanation { candidates: 1, not_ready, workers: vec![verdict] }
        }
        Placement::Select { selector, policy } => {
            state.settle();
            let state = &*state;
            let all = sources(state, selector, Resource::Ports);
            let candidates = all.len() as u64;
            let (resource, least) = need(claim);
            let mut seen = BTreeSet::new();
            // First those that have enough of what it needs most, then the others.
            let workers = sources(state, selector, resource)
                .candidates(least, *policy)
                .chain(all.candidates(0, Policy::Spread))
                .take(PLACEMENT_CANDIDATES_MAX)
                .filter(|name| seen.insert(*name))
                .filter_map(|name| state.worker(name))
                .filter(|worker| selector.matches(&worker.spec.labels))
                .take(EXPLAINED_WORKERS_MAX)
                .map(|worker| weigh(worker))
                .collect();
            Explanation { candidates, not_ready, workers }
        }
    }
}

/// What a claim orders the workers by, and the least that one must have free of it.
fn need(claim: &Claim) -> (Resource, u64) {
    match claim.gpus.as_deref() {
        Some(GpuRequest { share: GpuShare::MemoryBytes(bytes), .. }) => {
            (Resource::GpuBytes, *bytes)
        }
        Some(GpuRequest { share: GpuShare::Exclusive, which }) => {
            (Resource::IdleGpus, which.count() as u64)
        }
        None => (Resource::Ports, claim.ports.iter().map(|r| u64::from(r.ports.count())).sum()),
    }
}

/// The smallest set of indexes that holds every ready worker which the selector may match, of a state
/// that is settled.
fn sources<'a>(state: &'a State, selector: &Selector, resource: Resource) -> Sources<'a> {
    let of_scopes = |scopes: Vec<Scope>| {
        let by_free = &state.indexes.by_free;
        Sources(scopes.into_iter().filter_map(|scope| by_free.get(&(scope, resource))).collect())
    };
    let by_label = selector.terms.iter().filter_map(|term| match term {
        Term::In(key, values) => {
            Some(values.iter().map(|v| Scope::Label(key.clone(), v.clone())).collect())
        }
        _ => None,
    });
    std::iter::once(vec![Scope::All])
        .chain(by_label)
        .map(of_scopes)
        .min_by_key(Sources::len)
        .unwrap_or(Sources(Vec::new()))
}

/// Ordered indexes without a worker in common, walked as one.
struct Sources<'a>(Vec<&'a OrdSet<(u64, WorkerName)>>);

impl<'a> Sources<'a> {
    fn len(&self) -> usize {
        self.0.iter().map(|set| set.len()).sum()
    }

    /// Workers with at least `least` free, level of free capacity by level, by name within one.
    fn candidates(self, least: u64, policy: Policy) -> impl Iterator<Item = &'a WorkerName> {
        let sets = self.0;
        let start = |level: u64| (level, WorkerName::lowest());
        let next_level = {
            let sets = sets.clone();
            move |last: Option<u64>| -> Option<u64> {
                let levels = sets.iter();
                match (policy, last) {
                    (Policy::Binpack, None) => {
                        levels.filter_map(|s| s.get_next(&start(least))).map(|e| e.0).min()
                    }
                    (Policy::Binpack, Some(u64::MAX)) => None,
                    (Policy::Binpack, Some(last)) => {
                        levels.filter_map(|s| s.get_next(&start(last + 1))).map(|e| e.0).min()
                    }
                    (Policy::Spread, None) => levels.filter_map(|s| s.get_max()).map(|e| e.0).max(),
                    (Policy::Spread, Some(last)) => {
                        levels.filter_map(|s| s.get_prev(&start(last))).map(|e| e.0).max()
                    }
                }
                .filter(|level| *level >= least)
            }
        };
        std::iter::successors(next_level(None), move |last| next_level(Some(*last))).flat_map(
            move |level| {
                let at_level = sets.iter().map(|set| {
                    set.range((level, WorkerName::lowest())..)
                        .take_while(move |entry| entry.0 == level)
                        .map(|entry| &entry.1)
                });
                itertools::kmerge(at_level.collect::<Vec<_>>())
            },
        )
    }
}

/// What each worker of a bounded sample lacks: first those that the search finds, then those that it
/// passed over for having too little of what the claim needs most.
struct Weighed<'a> {
    claim: &'a Claim,
    selector: &'a Selector,
    seen: BTreeSet<&'a WorkerName>,
    lacks: BTreeMap<LackKind, u64>,
}

impl<'a> Weighed<'a> {
    fn new(claim: &'a Claim, selector: &'a Selector) -> Self {
        Weighed { claim, selector, seen: BTreeSet::new(), lacks: BTreeMap::new() }
    }

    fn fits(&mut self, worker: &'a Worker) -> bool {
        let lack = match self.selector.matches(&worker.spec.labels) {
            false => Err(LackKind::Labels),
            true => fits(worker, self.claim).map_err(|lack| lack.kind()),
        };
        if let Err(kind) = lack
            && self.seen.insert(&worker.name)
        {
            *self.lacks.entry(kind).or_default() += 1;
        }
        lack.is_ok()
    }

    /// None of those that were weighed fits.
    fn shortage(mut self, state: &'a State) -> Shortage {
        let all = sources(state, self.selector, Resource::Ports);
        let candidates = all.len() as u64;
        for name in all.candidates(0, Policy::Spread) {
            if self.seen.len() == PLACEMENT_CANDIDATES_MAX {
                break;
            }
            if !self.seen.contains(name)
                && let Some(worker) = state.worker(name)
            {
                self.fits(worker);
            }
        }
        let looked_at = self.seen.len() as u64;
        let mut reasons: Vec<_> = self.lacks.into_iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        Shortage::OnSelection { looked_at, candidates, not_ready: state.indexes.not_ready, reasons }
    }
}

/// What the claim lacks on the worker, if anything. Where counting its ports does not tell, it is tried
/// on a copy.
fn fits(worker: &Worker, claim: &Claim) -> Result<(), Lack> {
    match (counted(worker, claim), &claim.gpus) {
        (Some((pool, count)), None) if pool.free_count() >= count => Ok(()),
        (Some((pool, count)), Some(gpus)) if pool.free_count() >= count => {
            choose_gpus(worker, gpus, claim.placement.policy()).map(drop)
        }
        _ => take(&mut worker.clone(), claim).map(drop),
    }
}

/// Of a claim of counted ports in one range: whence it takes them, and how many.
pub(super) fn counted<'a>(worker: &'a Worker, claim: &Claim) -> Option<(&'a Pool, u32)> {
    let [PortRequest { range, ports: Ports::Count(count), .. }] = claim.ports.as_slice() else {
        return None;
    };
    let pool = match range {
        Some(range) => worker.pool(range),
        None => worker.pools.first(),
    };
    pool.map(|pool| (pool, *count))
}

/// Takes what the claim asks for, so that its requests see each other (field failures nomad-9506,
/// nomad-16410). Specific ports go first, then bands, then counted ports, so that an earlier request
/// never takes what a later one must have. Where it lacks something, only a copy may be left half done.
pub(super) fn take(worker: &mut Worker, claim: &Claim) -> Result<Grant, Lack> {
    let mut ports = Vec::with_capacity(claim.ports.len());
    let order = |request: &PortRequest| match request.ports {
        Ports::Specific(_) => 0,
        Ports::Contiguous(_) => 1,
        Ports::Count(_) => 2,
    };
    let mut requests: Vec<_> = claim.ports.iter().enumerate().collect();
    requests.sort_by_key(|(_, request)| order(request));
    for (i, request) in requests {
        take_ports(worker, &claim.name, i as u16, request, &mut ports)?;
    }
    ports.sort_by_key(|port| port.request);
    let gpus = match &claim.gpus {
        Some(request) => {
            let chosen = choose_gpus(worker, request, claim.placement.policy())?;
            take_gpus(worker, &claim.name, request.share, chosen)
        }
        None => Vec::new(),
    };
    worker.allocations.insert(claim.name.clone(), ());
    Ok(Grant { ports, gpus })
}

/// Takes the ports of one request and appends them to `out`, in rising order of numbers for a band.
pub(super) fn take_ports(
    worker: &mut Worker,
    holder: &InstanceName,
    index: u16,
    request: &PortRequest,
    out: &mut Vec<HeldPort>,
) -> Result<(), Lack> {
    let pool = pool_for(worker, request)?;
    let range = pool.name.clone();
    let mut hold = |number| {
        out.push(HeldPort { request: index, range: range.clone(), number });
    };
    match request.ports {
        Ports::Specific(port) => {
            let number = port.get();
            if let Some(taken) = pool.taken(number) {
                return Err(Lack::Port { port, taken });
            }
            pool.take(number, holder);
            hold(number);
        }
        Ports::Count(count) => {
            if pool.free_count() < count {
                return Err(ports_lack(pool, count));
            }
            for _ in 0..count {
                let Some(number) = pool.take_next(holder) else {
                    return Err(ports_lack(pool, 1));
                };
                hold(number);
            }
        }
        Ports::Contiguous(count) => {
            if pool.free_count() < count {
                return Err(ports_lack(pool, count));
            }
            let Some(first) = pool.take_band(count, holder) else {
                return Err(Lack::Band {
                    range,
                    wanted: count,
                    longest: pool.longest_run(),
                    free: pool.free_count(),
                });
            };
            (first..=first + (count - 1) as u16).for_each(hold);
        }
    }
    Ok(())
}

fn pool_for<'a>(worker: &'a mut Worker, request: &PortRequest) -> Result<&'a mut Pool, Lack> {
    match (&request.range, request.ports) {
        (Some(range), _) => worker
            .pools
            .iter_mut()
            .find(|p| p.name == *range)
            .ok_or_else(|| Lack::NoRange(range.clone())),
        (None, Ports::Specific(port)) => {
            worker.pool_of_mut(port.get()).ok_or(Lack::Port { port, taken: Taken::Unmanaged })
        }
        (None, _) => worker.pools.first_mut().ok_or(Lack::NoRanges),
    }
}

fn ports_lack(pool: &Pool, wanted: u32) -> Lack {
    Lack::Ports {
        range: pool.name.clone(),
        wanted,
        free: pool.free_count(),
        managed: pool.managed_count(),
        held: pool.held_count(),
        quarantined: pool.quarantined_count(),
        reserved: pool.reserved_count(),
        holders: some_of(pool.holders().map(|(_, name)| name)),
    }
}

/// Takes the GPUs that were [chosen](choose_gpus).
fn take_gpus(
    worker: &mut Worker,
    holder: &InstanceName,
    share: GpuShare,
    chosen: Vec<usize>,
) -> Vec<HeldGpu> {
    let mut held: Vec<_> = chosen
        .into_iter()
        .map(|at| {
            let gpu = &mut worker.gpus[at];
            gpu.take(holder, share);
            HeldGpu {
                index: gpu.index,
                uuid: worker.spec.gpus[at].uuid.clone(),
                memory_bytes: gpu.bytes_of(share),
                exclusive: share == GpuShare::Exclusive,
            }
        })
        .collect();
    held.sort_by_key(|gpu| gpu.index);
    held
}

/// Which GPUs a request gets, by their places on the worker.
fn choose_gpus(worker: &Worker, request: &GpuRequest, policy: Policy) -> Result<Vec<usize>, Lack> {
    match &request.which {
        GpuChoice::Indexes(indexes) => indexes
            .iter()
            .map(|index| {
                let at = worker.gpus.iter().position(|g| g.index == *index);
                let at = at.ok_or(Lack::NoGpu(*index))?;
                match worker.gpus[at].fits(request.share) {
                    true => Ok(at),
                    false => Err(gpu_lack(&worker.gpus[at], request.share)),
                }
            })
            .collect(),
        GpuChoice::Count(count) => {
            let mut fitting: Vec<usize> =
                (0..worker.gpus.len()).filter(|at| worker.gpus[*at].fits(request.share)).collect();
            let wanted = *count as usize;
            if fitting.len() < wanted {
                // One GPU on the worker, one wanted: say what is wrong with that one.
                if let ([only], 1) = (worker.gpus.as_slice(), wanted) {
                    return Err(gpu_lack(only, request.share));
                }
                return Err(Lack::Gpus {
                    wanted: *count,
                    fitting: fitting.len() as u32,
                    total: worker.gpus.len() as u32,
                    most_free_bytes: worker.most_free_gpu_bytes(),
                    holders: some_of(worker.gpus.iter().flat_map(Gpu::holders).map(|(n, _)| n)),
                });
            }
            fitting.sort_by_key(|at| {
                let gpu = &worker.gpus[*at];
                let free = match policy {
                    Policy::Binpack => gpu.free_bytes(),
                    Policy::Spread => u64::MAX - gpu.free_bytes(),
                };
                (free, gpu.index)
            });
            fitting.truncate(wanted);
            Ok(fitting)
        }
    }
}

/// A few different names, in the order in which they come, as a refusal lists them.
fn some_of<'a>(names: impl Iterator<Item = &'a InstanceName>) -> Vec<InstanceName> {
    let mut some = Vec::new();
    for name in names.dedup() {
        if !some.contains(name) {
            some.push(name.clone());
        }
        if some.len() > HOLDERS_SHOWN {
            break;
        }
    }
    some
}

fn gpu_lack(gpu: &Gpu, share: GpuShare) -> Lack {
    let holders = some_of(gpu.holders().map(|(name, _)| name));
    match share {
        GpuShare::Exclusive => Lack::GpuBusy { index: gpu.index, holders },
        GpuShare::MemoryBytes(wanted_bytes) => Lack::GpuMemory {
            index: gpu.index,
            wanted_bytes,
            free_bytes: gpu.free_bytes(),
            memory_bytes: gpu.memory_bytes,
            holders,
        },
    }
}
