//! What agents see, weighed on the leader.
//!
//! An agent sends samples of its worker. A sample proves nothing about what is newer than what the
//! agent knew when it looked; one that does is counted, and what enough of them in a row prove is
//! proposed as a guarded command, which the table refuses after any change (field failures
//! kubernetes-54885, kubernetes-64349: a sweep with a partial view freed what was in use). Nothing
//! is counted across a silence of the agent, a change of the leader or a restart of the agent; of two
//! agents on one worker only the one that was started last is.
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
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::future::join_all;
use metrics::{counter, gauge};
use tokio::time::Instant;
use tracing::{info, warn};

use super::outcome::CallError;
use super::timers::millis;
use super::{Deadline, Lifecycle, Node};
use crate::core::{
    Actor, Allocation, Applied, Cause, ChangeKind, Command, Event, Ground, HeldGpu, Identity,
    InstanceName, Leader, Liveness, Millis, Phase, Port, Revision, Source, State, Token, Worker,
    WorkerName, WorkerPhase,
};
use crate::lock::guard;
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::raft::ApplyObserver;

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
const COMMANDS_MAX: usize = 64;
const PROPOSAL_MAX: Duration = Duration::from_secs(5);

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
    /// Of silence, until the worker is lost.
    pub lost_after: Millis,
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
    /// Of the agent that was started last, and of those before it.
    run: String,
    former: VecDeque<String>,
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
    /// Another agent was started: what came before it counts for nothing.
    fn follow(&mut self, run: &str) {
        self.begin_anew();
        self.number = 0;
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
    fn count(
        &mut self,
        (state, worker): (&State, &Worker),
        sample: &Sample,
        lifecycle: &Lifecycle,
        (under, now): (Leader, Instant),
    ) -> Vec<Command> {
        let mut commands = self.count_gone((state, worker), sample, lifecycle, (under, now));
        commands.extend(self.count_strangers((state, worker), sample, under));
        commands.extend(self.count_free(worker, sample, under));
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
    fn count_strangers(
        &mut self,
        (state, worker): (&State, &Worker),
        sample: &Sample,
        under: Leader,
    ) -> Vec<Command> {
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
        guard(&self.0)
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
        let restarted = sample.run != watched.run;
        if restarted && watched.former.contains(&sample.run) {
            return Err("another agent of this worker was started since: stop one of them");
        }
        if restarted {
            watched.follow(&sample.run);
        }
        let before = std::mem::replace(&mut watched.drift, sample.drift);
        let since = watched.at.map(|at| now.duration_since(at));
        let verdict = match since {
            Some(_) if !restarted && sample.number == watched.number => {
                Err("it was counted already")
            }
            Some(_) if !restarted && !sample.run.is_empty() && sample.number < watched.number => {
                Err("it is older than the last one")
            }
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
        let lost_after = millis(lifecycle.worker_lost_after);
        Ok(Heard { ignored, revision: state.revision, lost_after })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{
        Claim, GpuChoice, GpuRequest, GpuShare, GpuSpec, Handle, Labels, LeaseId, Millis, Origin,
        Outcome, Placement, PortRequest, Ports, RangeSpec, ReleaseReason, Uid, WorkerSpec, apply,
    };

    const LEADER: Leader = Leader { term: 3, node: 1 };
    const ZOMBIE_AFTER: Duration = Duration::from_secs(60);

    /// A worker `w` with an agent, ports 40000 to 40009 and one GPU, and what its agent says.
    struct Scene {
        state: State,
        sweeps: Sweeps,
        sample: Sample,
        /// Proposed and applied since it was last looked at.
        done: Vec<&'static str>,
    }

    fn identity(boot: &str) -> Identity {
        Identity { machine_id: "m".into(), boot_id: boot.into(), namespace: 7 }
    }

    fn port(number: u16) -> Port {
        Port::new("port", u64::from(number)).unwrap()
    }

    fn lifecycle() -> Lifecycle {
        Lifecycle { zombie_after: ZOMBIE_AFTER, ..Lifecycle::default() }
    }

    fn sample() -> Sample {
        Sample {
            worker: "w".parse().unwrap(),
            identity: identity("b"),
            revision: Revision(0),
            run: "first".into(),
            number: 0,
            in_use: BTreeMap::new(),
            handles: BTreeMap::new(),
            gpus: BTreeMap::new(),
            drift: Drift::default(),
        }
    }

    impl Scene {
        fn new() -> Scene {
            let mut scene = Scene {
                state: State::default(),
                sweeps: Sweeps::default(),
                sample: sample(),
                done: Vec::new(),
            };
            let spec = WorkerSpec {
                address: "h".into(),
                labels: Labels::new(),
                ranges: vec![RangeSpec {
                    name: "s".parse().unwrap(),
                    first: port(40_000),
                    last: port(40_009),
                }],
                reserved: Default::default(),
                gpus: vec![GpuSpec {
                    index: 0,
                    uuid: String::new(),
                    model: String::new(),
                    memory_bytes: 100,
                }],
                identity: Some(identity("b")),
            };
            scene.ok(Command::RegisterWorker { name: "w".parse().unwrap(), spec });
            scene
        }

        fn ok(&mut self, command: Command) -> Outcome {
            let origin = Origin { leader: LEADER, at: Millis(0) };
            apply(&mut self.state, &origin, &command).0.outcome.unwrap()
        }

        /// Holds one port, and is confirmed unless it is not.
        fn port_of(&mut self, name: &str, confirmed: bool) -> u16 {
            let ports = vec![PortRequest { name: None, range: None, ports: Ports::Count(1) }];
            let held = self.grant(name, ports, None);
            if confirmed {
                self.confirm(&held, None);
            }
            held.ports[0].number
        }

        fn grant(
            &mut self,
            name: &str,
            ports: Vec<PortRequest>,
            gpus: Option<GpuRequest>,
        ) -> Arc<Allocation> {
            let claim = Claim {
                name: name.parse().unwrap(),
                uid: Uid::parse("u").unwrap(),
                placement: Placement::Worker("w".parse().unwrap()),
                ports,
                gpus: gpus.map(Box::new),
                lease: None::<LeaseId>,
                confirm_within: None,
                bound: false,
                labels: Labels::new(),
            };
            let allocate = Command::allocate([claim], Millis(600_000));
            match self.ok(allocate) {
                Outcome::Allocated { mut allocations, .. } => allocations.remove(0),
                other => panic!("{other:?}"),
            }
        }

        fn confirm(&mut self, held: &Allocation, liveness: Option<Liveness>) {
            self.ok(Command::Confirm {
                name: held.name().clone(),
                token: held.token,
                version: Revision(0),
                liveness,
                lease: None,
            });
        }

        /// Its deadline passes.
        fn misses_deadline(&mut self, name: &str) {
            let held = self.held(name).clone();
            self.ok(Command::Reclaim {
                name: held.name().clone(),
                token: held.token,
                version: held.version,
                ground: Ground::Unconfirmed,
                under: LEADER,
            });
            assert_eq!(self.held(name).phase, Phase::Lingering);
        }

        /// Its agent names another boot.
        fn reboot(&mut self, boot: &str) {
            let patch =
                crate::core::WorkerPatch { identity: Some(identity(boot)), ..Default::default() };
            self.ok(Command::UpdateWorker { name: "w".parse().unwrap(), patch });
            self.sample.identity = identity(boot);
        }

        fn held(&self, name: &str) -> &Arc<Allocation> {
            self.state.allocation(&name.parse().unwrap()).unwrap()
        }

        fn is_held(&self, name: &str) -> bool {
            self.state.allocation(&name.parse().unwrap()).is_some()
        }

        fn weigh(&mut self) -> Result<Vec<Command>, &'static str> {
            let worker = self.state.worker(&self.sample.worker).unwrap().clone();
            let now = (LEADER, Instant::now());
            self.sweeps.weigh((&self.state, &worker), &self.sample, &lifecycle(), now)
        }

        /// The agent looks after `ms`, knows the table as it is, and what follows is done.
        async fn looks_after(&mut self, ms: u64) {
            tokio::time::advance(Duration::from_millis(ms)).await;
            self.sample.number += 1;
            self.sample.revision = self.state.revision;
            for command in self.weigh().unwrap() {
                self.done.push(command.kind());
                self.ok(command);
            }
        }

        async fn looks(&mut self, times: usize) {
            for _ in 0..times {
                self.looks_after(1_000).await;
            }
        }

        fn open(&mut self, number: u16, listening: bool) {
            self.sample.in_use.insert(number, InUse { listening, pid: 9 });
        }

        fn why_gone(&self, name: &str) -> String {
            match &self.state.departure(&name.parse().unwrap()).unwrap().why {
                ReleaseReason::Reclaimed { reason, .. } => reason.clone(),
                other => panic!("{other}"),
            }
        }
    }

    fn process(boot: &str) -> Option<Liveness> {
        let handle = Handle::Process { pid: 77, start_ticks: 5 };
        Some(Liveness { boot_id: boot.into(), handle })
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_confirmed_is_gone_when_its_ports_were_closed_all_the_time() {
        let mut s = Scene::new();
        let number = s.port_of("a", true);
        s.open(number, true);
        s.looks(90).await;
        assert!(s.is_held("a"), "it lives");
        s.sample.in_use.clear();
        s.looks(40).await;
        s.open(number, false);
        s.looks(1).await;
        s.sample.in_use.clear();
        s.looks(60).await;
        assert!(s.is_held("a"), "it was open once in between");
        s.looks(1).await;
        assert!(!s.is_held("a"));
        assert!(s.why_gone("a").contains("closed for 1m"), "{}", s.why_gone("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_is_not_judged_before_its_deadline_and_soon_after() {
        let mut s = Scene::new();
        s.port_of("a", false);
        s.looks(200).await;
        assert!(s.is_held("a"), "it may still be starting");
        s.misses_deadline("a");
        s.looks(2).await;
        assert!(s.is_held("a"));
        s.looks(1).await;
        assert!(!s.is_held("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_handle_decides_alone() {
        let mut s = Scene::new();
        s.port_of("a", false);
        let held = s.held("a").clone();
        s.confirm(&held, process("b"));
        s.sample.handles.insert(held.name().clone(), (held.token, true));
        s.looks(200).await;
        assert!(s.is_held("a"), "alive with its port closed is drift");
        s.sample.handles.clear();
        s.looks(200).await;
        assert!(s.is_held("a"), "the agent cannot tell");
        s.sample.handles.insert(held.name().clone(), (Token(99), false));
        s.looks(200).await;
        assert!(s.is_held("a"), "another grant's");
        s.sample.handles.insert(held.name().clone(), (held.token, false));
        s.looks(2).await;
        assert!(s.is_held("a"));
        s.looks(1).await;
        assert_eq!(s.why_gone("a"), "process 77 (started at tick 5) is gone");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_lives_through_a_boot() {
        let mut s = Scene::new();
        s.port_of("a", false);
        let held = s.held("a").clone();
        s.confirm(&held, process("b"));
        s.port_of("b", true);
        s.port_of("starting", false);
        s.reboot("b2");
        s.looks(1).await;
        assert_eq!((s.is_held("a"), s.is_held("b")), (false, true), "a handle names its boot");
        s.looks(2).await;
        assert_eq!((s.is_held("b"), s.is_held("starting")), (false, true));
    }

    /// A boot is known only when its agent names it.
    #[tokio::test(start_paused = true)]
    async fn what_was_started_and_confirmed_before_its_boot_was_known_lives() {
        let mut s = Scene::new();
        s.port_of("with-handle", false);
        let held = s.held("with-handle").clone();
        s.confirm(&held, process("b2"));
        let number = s.port_of("listens", true);
        s.reboot("b2");
        s.sample.handles.insert(held.name().clone(), (held.token, true));
        s.open(number, true);
        s.looks(100).await;
        assert!(s.is_held("with-handle") && s.is_held("listens"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_handle_of_a_boot_that_nobody_knows_says_nothing() {
        let mut s = Scene::new();
        let number = s.port_of("a", true);
        let held = s.held("a").clone();
        s.confirm(&held, process("no boot of this worker"));
        s.open(number, true);
        s.looks(100).await;
        assert!(s.is_held("a"), "it listens");
        s.sample.in_use.clear();
        s.looks(60).await;
        assert!(s.is_held("a"));
        s.looks(1).await;
        assert!(s.why_gone("a").contains("closed for 1m"), "{}", s.why_gone("a"));
    }

    /// Its scheduler died while it was loading its model: it may still confirm.
    #[tokio::test(start_paused = true)]
    async fn a_start_whose_lease_ended_is_not_judged_before_its_deadline() {
        let mut s = Scene::new();
        s.port_of("a", false);
        let held = s.held("a").clone();
        let Outcome::Lease(lease) = s.ok(Command::GrantLease { ttl: Millis(1_000) }) else {
            panic!("no lease");
        };
        let (name, lease) = (held.name().clone(), Some(lease.id));
        s.ok(Command::Attach { name, token: held.token, version: Revision(0), lease });
        s.ok(Command::ExpireLease { id: lease.unwrap(), under: LEADER });
        assert_eq!(s.held("a").phase, Phase::Lingering);
        s.looks(600).await;
        assert!(s.is_held("a"), "its deadline is 10 minutes");
        s.looks(1).await;
        assert!(!s.is_held("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_comes_to_a_worker_in_use_takes_nothing_for_an_older_boots() {
        let mut s = Scene::new();
        let mut spec = WorkerSpec::clone(&s.state.worker(&"w".parse().unwrap()).unwrap().spec);
        (spec.identity, spec.gpus) = (None, Vec::new());
        s.ok(Command::RegisterWorker { name: "w2".parse().unwrap(), spec });
        s.sample.worker = "w2".parse().unwrap();
        s.sample.identity = Identity { namespace: 8, ..identity("b") };
        let ports = vec![PortRequest { name: None, range: None, ports: Ports::Count(1) }];
        let claim = Claim {
            placement: Placement::Worker("w2".parse().unwrap()),
            bound: true,
            name: "a".parse().unwrap(),
            uid: Uid::parse("u").unwrap(),
            ports,
            gpus: None,
            lease: None,
            confirm_within: None,
            labels: Labels::new(),
        };
        s.ok(Command::allocate([claim], Millis(600_000)));
        let identity = Some(s.sample.identity.clone());
        let patch = crate::core::WorkerPatch { identity, ..Default::default() };
        s.ok(Command::UpdateWorker { name: "w2".parse().unwrap(), patch });
        let number = s.held("a").ports[0].number;
        s.open(number, true);
        s.looks(100).await;
        assert!(s.is_held("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn what_holds_gpus_alone_is_gone_when_no_process_was_on_them() {
        let mut s = Scene::new();
        let gpus = GpuRequest { which: GpuChoice::Count(1), share: GpuShare::Exclusive };
        let held = s.grant("a", Vec::new(), Some(gpus));
        s.confirm(&held, None);
        s.looks(200).await;
        assert!(s.is_held("a"), "without a driver nobody knows");
        s.sample.gpus.insert(0, 1);
        s.looks(200).await;
        s.sample.gpus.insert(0, 0);
        s.looks(60).await;
        assert!(s.is_held("a"));
        s.looks(1).await;
        assert!(!s.is_held("a"));
    }

    const SHARED: GpuRequest =
        GpuRequest { which: GpuChoice::Count(1), share: GpuShare::MemoryBytes(10) };

    #[tokio::test(start_paused = true)]
    async fn what_lingered_before_a_boot_is_gone_after_it_also_on_gpus_that_nobody_sees() {
        let mut s = Scene::new();
        s.grant("a", Vec::new(), Some(SHARED));
        s.misses_deadline("a");
        s.looks(200).await;
        assert!(s.is_held("a"));
        s.reboot("b2");
        s.looks(3).await;
        assert!(!s.is_held("a"));
    }

    /// Another's process is on the GPU that it shares.
    #[tokio::test(start_paused = true)]
    async fn a_boot_makes_nothing_last_longer() {
        let mut s = Scene::new();
        let ports = vec![PortRequest { name: None, range: None, ports: Ports::Count(1) }];
        let held = s.grant("a", ports, Some(SHARED));
        s.confirm(&held, None);
        s.reboot("b2");
        s.sample.gpus.insert(0, 1);
        s.looks(60).await;
        assert!(s.is_held("a"));
        s.looks(1).await;
        assert!(!s.is_held("a"), "its ports were closed for as long as it takes without a boot");
    }

    /// What was granted since the backup may hold nothing but GPU memory.
    #[tokio::test(start_paused = true)]
    async fn a_restored_worker_is_verified_once_nobody_is_on_the_gpus_that_nobody_holds() {
        let mut s = Scene::new();
        s.state = s.state.anew(Millis(0));
        s.looks(3).await;
        assert!(s.done.is_empty(), "without a driver nobody knows: {:?}", s.done);
        s.sample.gpus.insert(0, 1);
        s.looks(3).await;
        assert!(s.done.is_empty(), "{:?}", s.done);
        s.sample.gpus.insert(0, 0);
        s.looks(1).await;
        assert_eq!(s.done, ["verify_worker"]);
    }

    /// What comes free by this very sample may be in use by it: the next one knows.
    #[tokio::test(start_paused = true)]
    async fn a_restored_worker_is_not_verified_by_a_sample_that_frees_something() {
        let mut s = Scene::new();
        let number = s.port_of("a", false);
        let held = s.held("a").clone();
        s.confirm(&held, process("b"));
        s.state = s.state.anew(Millis(0));
        s.reboot("b2");
        s.sample.gpus.insert(0, 0);
        s.open(number, true); // its successor
        s.looks(1).await;
        assert_eq!((s.done.as_slice(), s.is_held("a")), (&["reclaim"][..], false));
        s.looks(1).await;
        assert_eq!(s.done, ["reclaim", "quarantine"]);
        s.looks(1).await;
        assert_eq!(s.done, ["reclaim", "quarantine", "verify_worker"]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_changed_after_the_agent_looked_is_not_judged() {
        let mut s = Scene::new();
        s.port_of("a", false);
        s.misses_deadline("a");
        s.looks(2).await;
        // The next one was taken before the deadline had passed, and is late.
        s.sample.number += 1;
        s.sample.revision = Revision(s.held("a").version.0 - 1);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(s.weigh(), Ok(vec![]));
        s.looks(2).await;
        assert!(s.is_held("a"), "the count began anew");
        s.looks(1).await;
        assert!(!s.is_held("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_counted_across_a_silence_or_a_restart_of_the_agent() {
        let mut s = Scene::new();
        s.port_of("a", true);
        s.looks(50).await;
        s.looks_after(lifecycle().worker_lost_after.as_millis() as u64 + 1).await;
        s.looks(50).await;
        assert!(s.is_held("a"), "nobody knows what was in between");
        s.sample.run = "second".into();
        s.looks(55).await;
        assert!(s.is_held("a"), "a new agent knows nothing of the old one's samples");
        s.looks(6).await;
        assert!(!s.is_held("a"));
    }

    /// One was started by hand beside the service: the later one is heard, and the other one told.
    #[tokio::test(start_paused = true)]
    async fn of_two_agents_of_a_worker_the_one_that_was_started_last_counts() {
        let mut s = Scene::new();
        s.port_of("a", false);
        s.misses_deadline("a");
        s.looks(2).await;
        let first = s.sample.clone();
        s.sample = Sample { run: "second".into(), number: 0, ..first.clone() };
        for looks in 1..=3 {
            assert!(s.is_held("a"), "{looks}");
            s.looks(1).await;
            let second = s.sample.clone();
            s.sample = Sample { number: first.number + looks, ..first.clone() };
            let told = s.weigh().unwrap_err();
            assert!(told.contains("another agent"), "{told}");
            s.sample = second;
        }
        assert!(!s.is_held("a"), "its three samples were in a row");
        s.sample.number -= 1;
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(s.weigh().unwrap_err().contains("older"));
    }

    #[tokio::test(start_paused = true)]
    async fn samples_that_count_for_nothing_say_why() {
        let mut s = Scene::new();
        s.looks(1).await;
        let again = s.weigh().unwrap_err();
        assert!(again.contains("counted already"), "{again}");
        s.sample.number += 1;
        let flood = s.weigh().unwrap_err();
        assert!(flood.contains("too soon"), "{flood}");
        s.sample.revision = Revision(s.state.revision.0 + 1);
        let future = s.weigh().unwrap_err();
        assert!(future.contains("does not exist yet"), "{future}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_samples_proves_no_more_than_one() {
        let mut s = Scene::new();
        s.port_of("a", false);
        s.misses_deadline("a");
        s.looks(1).await;
        for _ in 0..100 {
            s.sample.number += 1;
            assert!(s.weigh().is_err());
        }
        s.looks(1).await;
        assert!(s.is_held("a"));
        s.looks(1).await;
        assert!(!s.is_held("a"));
    }

    /// Field failures gpustack-4557 and nomad-4285: a port was given that a connection of the host's
    /// own had as its local port.
    #[tokio::test(start_paused = true)]
    async fn a_strangers_port_is_quarantined_and_given_again_once_it_was_seen_free() {
        let mut s = Scene::new();
        s.open(40_000, true);
        s.open(40_001, false);
        s.open(50_000, true);
        s.looks(1).await;
        assert_eq!(s.done, ["quarantine"], "who only has a connection may be about to go");
        s.looks(1).await;
        assert_eq!(s.done, ["quarantine"; 2]);
        assert_eq!(s.port_of("a", true), 40_002);
        s.open(40_002, true);
        s.looks(10).await;
        assert_eq!(s.done.len(), 2, "what is quarantined or held stays as it is");
        s.sample.in_use.remove(&40_000);
        s.looks(2).await;
        assert_eq!(s.done.len(), 2);
        s.looks(1).await;
        assert_eq!(s.done[2..], ["lift_quarantine"]);
        let pool = &s.state.worker(&"w".parse().unwrap()).unwrap().pools[0];
        assert_eq!((pool.is_free(40_000), pool.is_free(40_001)), (true, false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_port_that_was_released_since_the_agent_looked_is_no_strangers() {
        let mut s = Scene::new();
        let number = s.port_of("a", true);
        s.open(number, true);
        s.looks(1).await;
        let seen = s.state.revision;
        let token = s.held("a").token;
        let authority = crate::core::Authority::Holder(token);
        s.ok(Command::Release { name: "a".parse().unwrap(), authority });
        tokio::time::advance(Duration::from_secs(1)).await;
        (s.sample.number, s.sample.revision) = (s.sample.number + 1, seen);
        assert_eq!(s.weigh(), Ok(vec![]));
        // It is still in use in the next one.
        s.looks(1).await;
        assert_eq!(s.done, ["quarantine"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_operators_quarantine_is_the_operators_to_lift() {
        let mut s = Scene::new();
        s.ok(Command::Quarantine {
            worker: "w".parse().unwrap(),
            ports: vec![port(40_003)],
            reason: "kept".into(),
            by: Actor::Operator,
        });
        s.looks(20).await;
        assert!(s.done.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_leader_counts_from_the_start() {
        let mut s = Scene::new();
        s.port_of("a", false);
        s.misses_deadline("a");
        s.looks(2).await;
        s.sweeps.leader = Leader { term: 2, node: 9 };
        s.looks(2).await;
        assert!(s.is_held("a"));
        s.looks(1).await;
        assert!(!s.is_held("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn one_sample_leads_to_a_bounded_number_of_commands() {
        let mut s = Scene::new();
        let patch = crate::core::WorkerPatch {
            ranges: Some(vec![RangeSpec {
                name: "s".parse().unwrap(),
                first: port(40_000),
                last: port(40_999),
            }]),
            ..Default::default()
        };
        s.ok(Command::UpdateWorker { name: "w".parse().unwrap(), patch });
        (40_000..40_500).for_each(|number| s.open(number, true));
        s.looks(1).await;
        assert_eq!(s.done.len(), COMMANDS_MAX);
        s.looks(10).await;
        assert_eq!(s.done.len(), 500);
    }

    #[test]
    fn drift_is_summed_over_workers_and_said_in_words() {
        let mut sweeps = Sweeps::default();
        let of = |bound_but_closed| Drift { bound_but_closed, ..Drift::default() };
        sweeps.change_drift(of(0), of(3));
        sweeps.change_drift(of(0), of(2));
        sweeps.change_drift(of(3), of(1));
        assert_eq!(sweeps.drift, of(3));
        let sweeper = Sweeper(Arc::new(Mutex::new(sweeps)));
        let problems = sweeper.problems();
        assert!(problems[0].contains("3 managed ports") && problems.len() == 1, "{problems:?}");
    }
}
