//! What samples of an agent prove.
//!
//! An agent sends samples of its worker. A sample proves nothing about what is newer than what the
//! agent knew when it looked; one that does is counted, and what enough of them in a row prove is
//! proposed as a guarded command, which the table refuses after any change (field failures
//! kubernetes-54885, kubernetes-64349: a sweep with a partial view freed what was in use). Nothing
//! is counted across a silence of the agent, a change of the leader or a restart of the agent; of two
//! agents on one worker only one is, the one that came last, until it falls silent.
//!
//! | what is seen | of what | proves it after |
//! |---|---|---|
//! | the worker has booted since | what was confirmed before with a handle of another boot | one sample |
//! | the same, its ports are closed, and no process is seen on its GPUs | what was confirmed before without a handle, or lingered | [`GONE_SAMPLES`] |
//! | the liveness handle is gone | what has one | [`GONE_SAMPLES`] |
//! | its ports are closed | a start that was never confirmed, once its deadline is past | [`GONE_SAMPLES`] |
//! | its ports are closed | a start whose lease ended before its deadline | all of its deadline |
//! | its ports are closed | what was confirmed without a handle of this boot | all of `zombie_after` |
//! | no process on its GPUs | the same, without ports | all of `zombie_after` |
//! | a free port is listened on, and was never given or known to be free | a stranger: it is quarantined | one sample |
//! | a free port is in use otherwise | the same | [`STRANGER_SAMPLES`] |
//! | no port and no GPU is in use that nobody holds | a restored worker: it is verified | one sample |
//! | a quarantined port is free | the quarantine is over, unless an operator set it | [`FREE_SAMPLES`] |
//!
//! A boot is known when its agent names it: what was confirmed shortly before may have been started
//! after it. A handle that is alive while its port is closed is drift, and never a reclaim. The cost of a
//! sample is that of its worker; what is proposed for one is bounded by [`COMMANDS_MAX`].

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::super::Lifecycle;
use crate::core::{
    Actor, Allocation, Cause, ChangeKind, Command, Ground, HeldGpu, Identity, InstanceName, Leader,
    Liveness, Phase, Port, Revision, Source, State, Token, Worker, WorkerName, WorkerPhase,
};
#[cfg(planted)]
use crate::planted::{self, Bug};

/// Samples in a row that prove a handle gone, or the ports of a failed start closed.
const GONE_SAMPLES: u32 = 3;
/// Samples in a row after which a port that is in use is a stranger's for sure: in one it may be the local
/// end of a connection that is closing, or that of a holder who has released it since.
const STRANGER_SAMPLES: u32 = 2;
/// Samples in a row that prove a quarantined port free.
const FREE_SAMPLES: u32 = 3;
/// Samples that come faster count as one: what holds in all of them must have held for a while.
const SAMPLE_MIN: Duration = Duration::from_millis(500);
/// Runs of agents that are remembered, to tell one that goes on beside its successor.
const FORMER_RUNS: usize = 4;
/// Commands that one sample may lead to; the others follow with the next one.
pub(super) const COMMANDS_MAX: usize = 64;

/// One sample of what an agent saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub worker: WorkerName,
    pub identity: Identity,
    /// What the agent had applied before it looked.
    pub revision: Revision,
    /// Drawn by the agent when it started; empty where it does not tell.
    pub run: String,
    /// Rises from one sample to the next, for as long as the agent runs.
    pub number: u64,
    /// Ports that some socket has as its local port.
    pub in_use: BTreeMap<u16, InUse>,
    /// Which handles are alive, of those that the agent can tell.
    pub handles: BTreeMap<InstanceName, (Token, bool)>,
    /// Processes on each GPU; empty without a driver.
    pub gpus: BTreeMap<u32, u32>,
    pub drift: Drift,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InUse {
    pub listening: bool,
    /// 0: not known.
    pub pid: u32,
}

/// How often host and table differ, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Drift {
    pub bound_but_closed: u64,
    pub open_but_unknown: u64,
    pub held_by_another: u64,
}

impl Drift {
    pub(super) fn kinds(self) -> [(&'static str, u64); 3] {
        [
            ("bound_but_closed", self.bound_but_closed),
            ("open_but_unknown", self.open_but_unknown),
            ("held_by_another", self.held_by_another),
        ]
    }
}

/// A sample, and what it is weighed against.
#[derive(Clone, Copy)]
pub(super) struct Look<'a> {
    pub state: &'a State,
    pub worker: &'a Worker,
    pub sample: &'a Sample,
    pub lifecycle: &'a Lifecycle,
    /// Who leads.
    pub under: Leader,
    pub now: Instant,
}

/// What the samples of one worker have in common.
#[derive(Default)]
pub(super) struct Watched {
    /// Of the agent that came last, and of those before it.
    run: String,
    former: VecDeque<String>,
    number: u64,
    at: Option<Instant>,
    gone: BTreeMap<InstanceName, Streak>,
    strangers: BTreeMap<u16, u32>,
    /// Samples in a row in which a quarantined port was free, with when that quarantine began.
    free: BTreeMap<u16, (Revision, u32)>,
}

/// Samples in a row in which an allocation seemed gone.
#[derive(Debug, Clone, Copy)]
struct Streak {
    version: Revision,
    samples: u32,
    since: Instant,
}

/// What it takes until it is proven.
enum Proof {
    Samples(u32),
    For(Duration),
}

/// Does a sample speak for it that this is gone, and when is that enough?
fn verdict(
    held: &Allocation,
    worker: &Worker,
    sample: &Sample,
    zombie_after: Duration,
) -> Option<(Proof, String)> {
    if held.phase == Phase::Reserved || held.version > sample.revision {
        return None;
    }
    let of_this_boot = |liveness: &&Liveness| liveness.boot_id == sample.identity.boot_id;
    if let Some(liveness) = held.liveness.as_deref().filter(of_this_boot) {
        let (token, alive) = sample.handles.get(held.name())?;
        let gone = *token == held.token && !alive;
        return gone.then(|| (Proof::Samples(GONE_SAMPLES), format!("{liveness} is gone")));
    }
    let closed = !held.ports.iter().any(|port| sample.in_use.contains_key(&port.number));
    #[cfg(planted)]
    let closed = closed || planted::is(Bug::SweepWithoutEvidence);
    let processes = |gpu: &HeldGpu| sample.gpus.get(&gpu.index).copied();
    let idle = held.gpus.iter().all(|gpu| processes(gpu) == Some(0));
    let busy = held.gpus.iter().any(|gpu| processes(gpu) > Some(0));
    // Of what lingered before the boot, also a start that was never confirmed.
    let started = held.confirmed || held.phase == Phase::Lingering;
    let gone = held.liveness.is_some() || (closed && !busy);
    if started && gone && held.version < worker.booted {
        let samples = if held.liveness.is_some() { 1 } else { GONE_SAMPLES };
        return Some((Proof::Samples(samples), "its worker has booted since".into()));
    }
    match (held.ports.is_empty(), held.confirmed) {
        (false, false) if closed => {
            let reason = "its start was not confirmed, and its ports are closed";
            Some((failed_start(held), reason.into()))
        }
        (false, true) if closed => {
            let reason =
                format!("its ports were closed for {}", humantime::format_duration(zombie_after));
            Some((Proof::For(zombie_after), reason))
        }
        (true, _) if idle => {
            let after = humantime::format_duration(zombie_after);
            Some((Proof::For(zombie_after), format!("no process was on its GPUs for {after}")))
        }
        _ => None,
    }
}

/// When a start is gone whose ports are closed: not before its deadline.
fn failed_start(held: &Allocation) -> Proof {
    match held.last_change.as_ref().map(|last| &last.kind) {
        Some(ChangeKind::Lingered { cause: Cause::Unconfirmed }) => Proof::Samples(GONE_SAMPLES),
        _ => Proof::For(Duration::from_millis(held.confirm_within.0)),
    }
}

impl Watched {
    /// Takes a sample: what is proposed by it, or why it does not count.
    pub fn take(&mut self, look: Look<'_>) -> Result<Vec<Command>, &'static str> {
        let Look { state, sample, lifecycle, now, .. } = look;
        if sample.revision > state.revision {
            return Err("it is of a revision that does not exist yet");
        }
        let since = self.at.map(|at| now.duration_since(at));
        let silent = since.is_none_or(|since| since > lifecycle.worker_lost_after);
        let restarted = sample.run != self.run;
        // One that does not tell its run, as of an older build, gives way too.
        let is_former = sample.run.is_empty() || self.former.contains(&sample.run);
        if restarted && is_former && !silent && !self.run.is_empty() {
            return Err("another agent of this worker reports: stop one of them");
        }
        if restarted {
            self.follow(&sample.run);
        }
        let falls = sample.number < self.number;
        match since {
            Some(_) if !restarted && sample.number == self.number => {
                return Err("it was counted already");
            }
            // An agent that does not tell its run may be another one.
            Some(_) if falls && !sample.run.is_empty() => {
                return Err("it is older than the last one");
            }
            Some(since) if since < SAMPLE_MIN => {
                return Err("it came too soon after the one before");
            }
            _ => {}
        }
        if silent || falls {
            self.begin_anew();
        }
        (self.number, self.at) = (sample.number, Some(now));
        Ok(self.count(look))
    }

    /// Another agent was started: what came before it counts for nothing.
    fn follow(&mut self, run: &str) {
        self.begin_anew();
        self.number = 0;
        self.former.retain(|former| former != run);
        let before = std::mem::replace(&mut self.run, run.into());
        if !before.is_empty() {
            self.former.push_back(before);
        }
        if self.former.len() > FORMER_RUNS {
            self.former.pop_front();
        }
    }

    /// Forgets what does not follow on from the sample before.
    fn begin_anew(&mut self) {
        self.gone.clear();
        self.strangers.clear();
        self.free.clear();
    }

    /// Counts a sample; the commands that it completes the proof for.
    fn count(&mut self, look: Look<'_>) -> Vec<Command> {
        let Look { worker, sample, under, .. } = look;
        let mut commands = self.count_gone(look);
        commands.extend(self.count_strangers(look));
        commands.extend(self.count_free(look));
        // Only a sample that knows the restored table, and finds nothing in use that nobody holds,
        // verifies a worker: what was granted since the backup must not be given again. Of a GPU whose
        // processes nobody counts that cannot be known.
        let unverified = worker.phase == WorkerPhase::Unverified;
        let clear = |gpu: &crate::core::Gpu| match sample.gpus.get(&gpu.index) {
            Some(processes) => *processes == 0 || !gpu.is_idle(),
            None => false,
        };
        let nothing_else =
            commands.is_empty() && self.strangers.is_empty() && worker.gpus.iter().all(clear);
        if unverified && sample.revision >= worker.version && nothing_else {
            let (name, by) = (worker.name.clone(), Actor::Leader(under));
            commands.push(Command::VerifyWorker { name, by });
        }
        commands.truncate(COMMANDS_MAX);
        commands
    }

    fn count_gone(&mut self, look: Look<'_>) -> Vec<Command> {
        let Look { state, worker, sample, lifecycle, under, now } = look;
        let before = std::mem::take(&mut self.gone);
        let mut commands = Vec::new();
        for held in state.allocations_on(worker, None) {
            let Some((proof, reason)) = verdict(held, worker, sample, lifecycle.zombie_after)
            else {
                continue;
            };
            let streak = match before.get(held.name()) {
                Some(streak) if streak.version == held.version => {
                    Streak { samples: streak.samples + 1, ..*streak }
                }
                _ => Streak { version: held.version, samples: 1, since: now },
            };
            self.gone.insert(held.name().clone(), streak);
            let proven = match proof {
                Proof::Samples(samples) => streak.samples >= samples,
                Proof::For(span) => now.duration_since(streak.since) >= span,
            };
            if proven {
                let (identity, seen) = (sample.identity.clone(), sample.revision);
                commands.push(Command::Reclaim {
                    name: held.name().clone(),
                    token: held.token,
                    version: held.version,
                    ground: Ground::Gone { identity, seen, reason },
                    under,
                });
            }
        }
        commands
    }

    /// Ports in use that nobody holds.
    fn count_strangers(&mut self, look: Look<'_>) -> Vec<Command> {
        let Look { state, worker, sample, under, .. } = look;
        let before = std::mem::take(&mut self.strangers);
        let mut commands = Vec::new();
        for (number, InUse { listening, pid }) in &sample.in_use {
            let free = worker.pool_of(*number).filter(|pool| pool.is_free(*number));
            let (Some(pool), Ok(port)) = (free, Port::new("port", u64::from(*number))) else {
                continue;
            };
            // Else its holder may have released it since the agent looked.
            let sure = sample.revision == state.revision || pool.is_unused(*number);
            let samples = before.get(number).copied().unwrap_or(0) + 1;
            self.strangers.insert(*number, samples);
            let known = worker.phase != WorkerPhase::Unverified;
            if (*listening && sure) || samples >= STRANGER_SAMPLES || !known {
                let by = match pid {
                    0 => "something on the host".to_string(),
                    pid => format!("process {pid}"),
                };
                commands.push(Command::Quarantine {
                    worker: worker.name.clone(),
                    ports: vec![port],
                    reason: format!("in use by {by}"),
                    by: Actor::Leader(under),
                });
            }
        }
        commands
    }

    /// Quarantined ports that nobody uses.
    fn count_free(&mut self, look: Look<'_>) -> Option<Command> {
        let Look { worker, sample, under, .. } = look;
        let before = std::mem::take(&mut self.free);
        let suspects = worker.pools.iter().flat_map(|pool| pool.quarantines());
        for (number, quarantine) in suspects {
            let known = quarantine.source != Source::Operator
                && quarantine.since <= sample.revision
                && !sample.in_use.contains_key(&number);
            if known {
                let samples = match before.get(&number) {
                    Some((since, samples)) if *since == quarantine.since => samples + 1,
                    _ => 1,
                };
                self.free.insert(number, (quarantine.since, samples));
            }
        }
        let proven = self.free.iter().filter(|(_, (_, samples))| *samples >= FREE_SAMPLES);
        let ports: Vec<Port> = proven
            .filter_map(|(number, _)| Port::new("port", u64::from(*number)).ok())
            .take(crate::core::limits::QUARANTINE_PORTS_MAX)
            .collect();
        (!ports.is_empty()).then(|| Command::LiftQuarantine {
            worker: worker.name.clone(),
            ports,
            by: Actor::Leader(under),
            seen: sample.revision,
        })
    }
}
