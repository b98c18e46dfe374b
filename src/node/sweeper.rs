//! Takes samples of agents on the leader, and proposes what they prove ([`evidence`]).
//!
//! Nothing is counted across a change of the leader, and nothing of what is proposed counts after one: the
//! commands are guarded, and the table refuses them after any change of what they are about. The cost of
//! a sample is that of its worker.

mod evidence;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::future::join_all;
use metrics::{counter, gauge};
use tokio::time::Instant;
use tracing::{info, warn};

use super::outcome::CallError;
use super::timers::millis;
use super::{Deadline, Node};
use crate::core::{
    Actor, Applied, Command, Event, Identity, Leader, Millis, Revision, WorkerName, WorkerPhase,
};
use crate::lock::guard;
use crate::raft::ApplyObserver;
pub use evidence::{Drift, InUse, Sample};
use evidence::{Look, Watched};

const PROPOSAL_MAX: Duration = Duration::from_secs(5);

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
    workers: BTreeMap<WorkerName, Known>,
    drift: Drift,
}

/// Of one worker.
#[derive(Default)]
struct Known {
    watched: Watched,
    /// As its agent last saw it.
    drift: Drift,
    /// What the last sample led to is under way.
    acting: bool,
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
    fn weigh(&mut self, look: Look<'_>) -> Result<Vec<Command>, &'static str> {
        if self.leader != look.under {
            *self = Sweeps { leader: look.under, ..Sweeps::default() };
        }
        let name = look.worker.name.clone();
        let Known { watched, drift, acting } = self.workers.entry(name).or_default();
        let taken = watched.take(look);
        let (before, acting) = (std::mem::replace(drift, look.sample.drift), *acting);
        self.change_drift(before, look.sample.drift);
        taken.map(|commands| if acting { Vec::new() } else { commands })
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

    fn set_acting(&mut self, worker: &WorkerName, acting: bool) {
        if let Some(known) = self.workers.get_mut(worker) {
            known.acting = acting;
        }
    }

    fn forget(&mut self, worker: &WorkerName) {
        if let Some(known) = self.workers.remove(worker) {
            self.change_drift(known.drift, Drift::default());
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
        let lifecycle = &self.inner.config.lifecycle;
        let now = Instant::now();
        let look = Look { state: &state, worker, sample: &sample, lifecycle, under, now };
        let weighed = self.inner.sweeper.sweeps().weigh(look);
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
        self.inner.sweeper.sweeps().set_acting(&worker, true);
        let node = self.clone();
        tokio::spawn(async move {
            join_all(commands.into_iter().map(|command| act(&node, command))).await;
            node.inner.sweeper.sweeps().set_acting(&worker, false);
        });
    }
}

async fn act(node: &Node, command: Command) {
    let kind = command.kind();
    let written = node.inner.proposer.propose(command, Instant::now() + PROPOSAL_MAX).await;
    match written.map(|written| written.applied) {
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
