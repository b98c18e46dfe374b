//! What agents see, weighed on the leader.
//!
//! An agent sends samples of its worker. A sample proves nothing about what is newer than what the
//! agent knew when it looked; one that does is counted, and what enough of them in a row prove is
//! proposed as a guarded command, which the table refuses after any change (field failures
//! kubernetes-54885, kubernetes-64349: a sweep with a partial view freed what was in use). Nothing
//! is counted across a silence of the agent, a change of the leader or a restart of the agent.
//!
//! | what is seen | of what | proves it after |
//! |---|---|---|
//! | the worker has booted since | what was confirmed before | one sample |
//! | the liveness handle is gone | what has one | [`GONE_SAMPLES`] |
//! | its ports are closed | a start that was never confirmed, once its deadline is past | [`GONE_SAMPLES`] |
//! | its ports are closed | what was confirmed without a handle | all of `zombie_after` |
//! | no process on its GPUs | the same, without ports | all of `zombie_after` |
//! | a free port is listened on | a stranger: it is quarantined | one sample |
//! | a free port is in use otherwise | the same | [`STRANGER_SAMPLES`] |
//! | a quarantined port is free | the quarantine is over, unless an operator set it | [`FREE_SAMPLES`] |
//!
//! A handle that is alive while its port is closed is drift, and never a reclaim. The cost of a
//! sample is that of its worker; what is proposed for one is bounded by [`COMMANDS_MAX`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use metrics::{counter, gauge};
use tokio::time::Instant;
use tracing::{info, warn};

use super::outcome::CallError;
use super::{Deadline, Lifecycle, Node};
use crate::core::{
    Actor, Allocation, Applied, Command, Event, Ground, Identity, InstanceName, Leader, Phase,
    Port, Revision, Source, State, Token, Worker, WorkerName, WorkerPhase,
};
use crate::raft::ApplyObserver;

/// Samples in a row that prove a handle gone, or the ports of a failed start closed.
const GONE_SAMPLES: u32 = 3;
/// Samples in a row after which a port that is in use, but not listened on, is a stranger's: it may
/// be the local end of a connection that is closing.
const STRANGER_SAMPLES: u32 = 2;
/// Samples in a row that prove a quarantined port free.
const FREE_SAMPLES: u32 = 3;
/// Samples that come faster count as one: what holds in all of them must have held for a while.
const SAMPLE_MIN: Duration = Duration::from_millis(500);
/// Commands that one sample may lead to; the others follow with the next one.
const COMMANDS_MAX: usize = 64;
const PROPOSAL_MAX: Duration = Duration::from_secs(5);

/// One sample of what an agent saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub worker: WorkerName,
    pub identity: Identity,
    /// What the agent had applied before it looked.
    pub revision: Revision,
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
    fn kinds(self) -> [(&'static str, u64); 3] {
        [
            ("bound_but_closed", self.bound_but_closed),
            ("open_but_unknown", self.open_but_unknown),
            ("held_by_another", self.held_by_another),
        ]
    }
}

/// What became of a sample that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    /// Why it was not counted.
    pub ignored: Option<&'static str>,
    pub revision: Revision,
}

/// Why a sample was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unheard {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("no worker {0}")]
    NoWorker(WorkerName),
    #[error("worker {worker} is {}, and not {}", describe(.held.as_ref()), describe(Some(.given)))]
    OtherIdentity { worker: WorkerName, held: Option<Identity>, given: Identity },
}

fn describe(identity: Option<&Identity>) -> String {
    match identity {
        None => "registered without an agent".into(),
        Some(Identity { machine_id, boot_id, namespace }) => {
            format!("network namespace {namespace} of boot {boot_id} of machine {machine_id}")
        }
    }
}

#[derive(Clone, Default)]
pub(super) struct Sweeper(Arc<Mutex<Sweeps>>);

#[derive(Default)]
struct Sweeps {
    /// Under whom it was counted.
    leader: Leader,
    workers: BTreeMap<WorkerName, Watched>,
    drift: Drift,
}

/// What the samples of one worker have in common.
#[derive(Default)]
struct Watched {
    number: u64,
    at: Option<Instant>,
    gone: BTreeMap<InstanceName, Run>,
    strangers: BTreeMap<u16, u32>,
    free: BTreeMap<u16, u32>,
    drift: Drift,
    /// What the last one led to is under way.
    acting: bool,
}

/// Samples in a row in which an allocation seemed gone.
#[derive(Debug, Clone, Copy)]
struct Run {
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
    if let Some(liveness) = &held.liveness {
        if liveness.boot_id != sample.identity.boot_id {
            return Some((Proof::Samples(1), "its worker has booted since".into()));
        }
        let (token, alive) = sample.handles.get(held.name())?;
        let gone = *token == held.token && !alive;
        return gone.then(|| (Proof::Samples(GONE_SAMPLES), format!("{liveness} is gone")));
    }
    if held.confirmed && held.version < worker.booted {
        return Some((Proof::Samples(1), "its worker has booted since".into()));
    }
    let closed = !held.ports.iter().any(|port| sample.in_use.contains_key(&port.number));
    let idle = held.gpus.iter().all(|gpu| sample.gpus.get(&gpu.index) == Some(&0));
    match (held.ports.is_empty(), held.confirmed) {
        (false, false) if closed => {
            let reason = "its start was not confirmed, and its ports are closed";
            Some((Proof::Samples(GONE_SAMPLES), reason.into()))
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

impl Watched {
    /// Forgets what does not follow on from the sample before.
    fn begin_anew(&mut self) {
        self.gone.clear();
        self.strangers.clear();
        self.free.clear();
    }

    /// Counts a sample; the commands that it completes the proof for.
    fn count(
        &mut self,
        (state, worker): (&State, &Worker),
        sample: &Sample,
        lifecycle: &Lifecycle,
        (under, now): (Leader, Instant),
    ) -> Vec<Command> {
        let mut commands = self.count_gone((state, worker), sample, lifecycle, (under, now));
        commands.extend(self.count_strangers(worker, sample, under));
        commands.extend(self.count_free(worker, sample, under));
        commands.truncate(COMMANDS_MAX);
        commands
    }

    fn count_gone(
        &mut self,
        (state, worker): (&State, &Worker),
        sample: &Sample,
        lifecycle: &Lifecycle,
        (under, now): (Leader, Instant),
    ) -> Vec<Command> {
        let before = std::mem::take(&mut self.gone);
        let mut commands = Vec::new();
        for held in state.allocations_on(worker, None) {
            let Some((proof, reason)) = verdict(held, worker, sample, lifecycle.zombie_after)
            else {
                continue;
            };
            let run = match before.get(held.name()) {
                Some(run) if run.version == held.version => {
                    Run { samples: run.samples + 1, ..*run }
                }
                _ => Run { version: held.version, samples: 1, since: now },
            };
            self.gone.insert(held.name().clone(), run);
            let proven = match proof {
                Proof::Samples(samples) => run.samples >= samples,
                Proof::For(span) => now.duration_since(run.since) >= span,
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
    fn count_strangers(&mut self, worker: &Worker, sample: &Sample, under: Leader) -> Vec<Command> {
        let before = std::mem::take(&mut self.strangers);
        let mut commands = Vec::new();
        for (number, InUse { listening, pid }) in &sample.in_use {
            let free = worker.pool_of(*number).is_some_and(|pool| pool.is_free(*number));
            let (true, Ok(port)) = (free, Port::new("port", u64::from(*number))) else { continue };
            let samples = before.get(number).copied().unwrap_or(0) + 1;
            self.strangers.insert(*number, samples);
            if *listening || samples >= STRANGER_SAMPLES {
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
    fn count_free(&mut self, worker: &Worker, sample: &Sample, under: Leader) -> Option<Command> {
        let before = std::mem::take(&mut self.free);
        let suspects = worker.pools.iter().flat_map(|pool| pool.quarantines());
        for (number, quarantine) in suspects {
            let known = quarantine.source != Source::Operator
                && quarantine.since <= sample.revision
                && !sample.in_use.contains_key(&number);
            if known {
                self.free.insert(number, before.get(&number).copied().unwrap_or(0) + 1);
            }
        }
        let proven = self.free.iter().filter(|(_, samples)| **samples >= FREE_SAMPLES);
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

impl Sweeper {
    fn sweeps(&self) -> MutexGuard<'_, Sweeps> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets everything, once this node does not lead any more.
    pub fn end(&self) {
        let mut sweeps = self.sweeps();
        *sweeps = Sweeps::default();
        sweeps.show_drift();
    }

    /// How hosts and table differ, in words.
    pub fn problems(&self) -> Vec<String> {
        let Drift { bound_but_closed, open_but_unknown, held_by_another } = self.sweeps().drift;
        [
            (bound_but_closed, "held and BOUND, and nobody listens there"),
            (open_but_unknown, "in use and held by nobody"),
            (held_by_another, "held, and in use by another process than the holder's"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("drift: agents see {count} managed ports that are {what}"))
        .collect()
    }
}

impl Sweeps {
    /// Takes a sample; says why it was not counted, or what is to be proposed.
    fn weigh(
        &mut self,
        (state, worker): (&State, &Worker),
        sample: &Sample,
        lifecycle: &Lifecycle,
        (under, now): (Leader, Instant),
    ) -> Result<Vec<Command>, &'static str> {
        if self.leader != under {
            *self = Sweeps { leader: under, ..Sweeps::default() };
        }
        if sample.revision > state.revision {
            return Err("it is of a revision that does not exist yet");
        }
        let watched = self.workers.entry(worker.name.clone()).or_default();
        let before = std::mem::replace(&mut watched.drift, sample.drift);
        let since = watched.at.map(|at| now.duration_since(at));
        let verdict = match since {
            Some(_) if sample.number == watched.number => Err("it was counted already"),
            Some(since) if since < SAMPLE_MIN => Err("it came too soon after the one before"),
            since => {
                let silent = since.is_none_or(|since| since > lifecycle.worker_lost_after);
                if silent || sample.number < watched.number {
                    watched.begin_anew();
                }
                (watched.number, watched.at) = (sample.number, Some(now));
                Ok(watched.count((state, worker), sample, lifecycle, (under, now)))
            }
        };
        let acting = watched.acting;
        self.change_drift(before, sample.drift);
        verdict.map(|commands| if acting { Vec::new() } else { commands })
    }

    fn change_drift(&mut self, before: Drift, after: Drift) {
        let Drift { bound_but_closed, open_but_unknown, held_by_another } = &mut self.drift;
        for (total, before, after) in [
            (bound_but_closed, before.bound_but_closed, after.bound_but_closed),
            (open_but_unknown, before.open_but_unknown, after.open_but_unknown),
            (held_by_another, before.held_by_another, after.held_by_another),
        ] {
            *total = total.saturating_sub(before).saturating_add(after);
        }
        self.show_drift();
    }

    fn show_drift(&self) {
        for (kind, count) in self.drift.kinds() {
            gauge!("portwarden_drift", "kind" => kind).set(count as f64);
        }
    }

    fn acts(&mut self, worker: &WorkerName, acting: bool) {
        if let Some(watched) = self.workers.get_mut(worker) {
            watched.acting = acting;
        }
    }

    fn forget(&mut self, worker: &WorkerName) {
        if let Some(watched) = self.workers.remove(worker) {
            self.change_drift(watched.drift, Drift::default());
        }
    }
}

impl Node {
    /// On the leader: takes a sample of an agent. What it proves is proposed beside the answer.
    pub async fn report(&self, sample: Sample, deadline: Deadline) -> Result<Heard, Unheard> {
        let counted = |result: &'static str| {
            counter!("portwarden_reports_total", "result" => result).increment(1);
        };
        // Proves that this node leads: an agent must not go on with one that was deposed.
        let state = self.read(deadline).await?;
        let Some(worker) = state.worker(&sample.worker) else {
            counted("unknown_worker");
            return Err(Unheard::NoWorker(sample.worker));
        };
        if worker.spec.identity.as_ref() != Some(&sample.identity) {
            counted("other_identity");
            let (held, given) = (worker.spec.identity.clone(), sample.identity);
            return Err(Unheard::OtherIdentity { worker: sample.worker, held, given });
        }
        let under = self.inner.timers.leader().ok_or(CallError::NotLeader { leader: None })?;
        self.inner.timers.heard(worker);
        let now = (under, Instant::now());
        let lifecycle = &self.inner.config.lifecycle;
        let weighed = self.inner.sweeper.sweeps().weigh((&state, worker), &sample, lifecycle, now);
        counted(if weighed.is_ok() { "counted" } else { "ignored" });
        let mut commands = Vec::new();
        if worker.phase == WorkerPhase::Lost {
            let (name, phase) = (worker.name.clone(), WorkerPhase::Ready);
            commands.push(Command::SetWorkerPhase { name, phase, by: Actor::Leader(under) });
        }
        let ignored = match weighed {
            Ok(proven) => {
                commands.extend(proven);
                None
            }
            Err(why) => Some(why),
        };
        self.sweep(sample.worker, commands);
        Ok(Heard { ignored, revision: state.revision })
    }

    /// Proposes what was proven, beside everything else.
    fn sweep(&self, worker: WorkerName, commands: Vec<Command>) {
        if commands.is_empty() {
            return;
        }
        self.inner.sweeper.sweeps().acts(&worker, true);
        let node = self.clone();
        tokio::spawn(async move {
            join_all(commands.into_iter().map(|command| act(&node, command))).await;
            node.inner.sweeper.sweeps().acts(&worker, false);
        });
    }
}

async fn act(node: &Node, command: Command) {
    let kind = command.kind();
    match node.inner.proposer.propose(command, Instant::now() + PROPOSAL_MAX).await {
        Ok(Applied { outcome: Ok(_), revision }) => info!(kind, %revision, "as an agent saw"),
        Ok(Applied { outcome: Err(why), .. }) => {
            info!(kind, %why, "what an agent saw is no longer so");
        }
        Err(why) => warn!(kind, %why, "what an agent saw could not be acted on"),
    }
}

impl ApplyObserver for Sweeper {
    fn applied(&self, _: &Command, _: &Applied, events: &[Event]) {
        for event in events {
            if let Event::WorkerRemoved(worker) = event {
                self.sweeps().forget(worker);
            }
        }
    }
}
