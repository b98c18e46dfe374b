//! From commands to log entries.
//!
//! While earlier proposals are in flight, commands wait in two bounded lanes; as soon as one of
//! the few in flight is answered, everything that waits is packed into the next entry (bounded in
//! count and weight). So one flush serves many commands under load, and a single command is
//! proposed at once when nothing else is.
//!
//! - Admission never waits: a full lane is [`CallError::Overloaded`].
//! - The urgent lane (what confirms, frees or moves on) has its own room and goes first, so that a
//!   flood of allocations cannot keep ports from being given back.
//! - A command whose caller's deadline has passed is dropped unproposed. Whether it was proposed is
//!   settled by one atomic step between caller and packer, so that "nothing was changed" is true
//!   whenever it is said.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use fail::fail_point;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::outcome::{CallError, of_write};
use super::wall_clock::wall_clock;
use crate::core::{Applied, Command};
use crate::raft::{Batch, Raft};

/// Commands that may wait in each lane.
const LANE_COMMANDS_MAX: usize = 8192;
/// Most commands in one entry.
const ENTRY_COMMANDS_MAX: usize = 512;
/// Most weight (estimated bytes) in one entry; a single heavier command goes alone.
const ENTRY_WEIGHT_MAX_BYTES: usize = 1 << 20;
/// Entries proposed and not yet answered.
const IN_FLIGHT_MAX: usize = 4;
/// What an overloaded caller is told to wait.
const RETRY_AFTER: Duration = Duration::from_millis(100);

#[derive(Clone)]
pub(super) struct Proposer {
    urgent: mpsc::Sender<Waiting>,
    normal: mpsc::Sender<Waiting>,
    /// The urgent lane was full since somebody last asked.
    urgent_full: Arc<AtomicBool>,
}

struct Waiting {
    command: Command,
    deadline: Instant,
    fate: Arc<AtomicU8>,
    answer: oneshot::Sender<Result<Applied, CallError>>,
}

/// Who decided first: the packer that it goes into an entry, or the caller that it does not.
const QUEUED: u8 = 0;
const PROPOSED: u8 = 1;
const ABANDONED: u8 = 2;

fn decide(fate: &AtomicU8, verdict: u8) -> bool {
    fate.compare_exchange(QUEUED, verdict, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

impl Proposer {
    /// The returned future packs and proposes until every sender is gone.
    pub fn new(raft: Raft) -> (Proposer, impl Future<Output = ()> + Send) {
        let (urgent, urgent_queue) = mpsc::channel(LANE_COMMANDS_MAX);
        let (normal, normal_queue) = mpsc::channel(LANE_COMMANDS_MAX);
        let proposer = Proposer { urgent, normal, urgent_full: Arc::default() };
        (proposer, pack(raft, urgent_queue, normal_queue))
    }

    /// Was a confirmation, or what is as urgent, turned away since the last call?
    pub fn turned_urgent_away(&self) -> bool {
        self.urgent_full.swap(false, Ordering::Relaxed)
    }

    pub async fn propose(&self, command: Command, deadline: Instant) -> Result<Applied, CallError> {
        let urgent = is_urgent(&command);
        let lane = if urgent { &self.urgent } else { &self.normal };
        let kind = command.kind();
        fail_point!("propose-full", |_| Err(CallError::Overloaded { retry_after: RETRY_AFTER }));
        fail_point!("propose-not-leader", |_| Err(CallError::NotLeader { leader: None }));
        let fate = Arc::new(AtomicU8::new(QUEUED));
        let (answer, answered) = oneshot::channel();
        lane.try_send(Waiting { command, deadline, fate: fate.clone(), answer }).map_err(|e| {
            metrics::counter!("portwarden_proposals_refused_total", "reason" => "overloaded")
                .increment(1);
            match e {
                mpsc::error::TrySendError::Full(_) => {
                    self.urgent_full.fetch_or(urgent, Ordering::Relaxed);
                    CallError::Overloaded { retry_after: RETRY_AFTER }
                }
                mpsc::error::TrySendError::Closed(_) => {
                    CallError::NotReady("the node is stopping".into())
                }
            }
        })?;
        metrics::counter!("portwarden_proposals_total", "command" => kind).increment(1);
        match timeout_at(deadline, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) if decide(&fate, ABANDONED) => {
                Err(CallError::NotReady("the node is stopping".into()))
            }
            Ok(Err(_)) => Err(CallError::Unknown("the node lost the proposal".into())),
            Err(_) if decide(&fate, ABANDONED) => Err(CallError::Expired),
            Err(_) => Err(CallError::Unknown(
                "the deadline passed while the command was in the log".into(),
            )),
        }
    }
}

fn is_urgent(command: &Command) -> bool {
    matches!(
        command,
        Command::Confirm { .. }
            | Command::Attach { .. }
            | Command::Release { .. }
            | Command::ReportConflict { .. }
            | Command::Reclaim { .. }
            | Command::Quarantine { .. }
            | Command::LiftQuarantine { .. }
            | Command::VerifyWorker { .. }
            | Command::RevokeLease { .. }
            | Command::ExpireLease { .. }
    )
}

async fn pack(
    raft: Raft,
    mut urgent: mpsc::Receiver<Waiting>,
    mut normal: mpsc::Receiver<Waiting>,
) {
    let in_flight = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    loop {
        let first = tokio::select! {
            biased;
            Some(waiting) = urgent.recv() => waiting,
            Some(waiting) = normal.recv() => waiting,
            else => return,
        };
        // What arrives while all slots are taken joins the same entry.
        let Ok(slot) = in_flight.clone().acquire_owned().await else { return };
        let mut entry = Entry::default();
        entry.add(first);
        while entry.has_room() {
            match urgent.try_recv().or_else(|_| normal.try_recv()) {
                Ok(waiting) => entry.add(waiting),
                Err(_) => break,
            }
        }
        if entry.commands.is_empty() {
            continue;
        }
        metrics::histogram!("portwarden_entry_commands").record(entry.commands.len() as f64);
        let raft = raft.clone();
        tokio::spawn(async move {
            entry.propose(raft).await;
            drop(slot);
        });
    }
}

#[derive(Default)]
struct Entry {
    commands: Vec<Command>,
    answers: Vec<oneshot::Sender<Result<Applied, CallError>>>,
    weight_bytes: usize,
}

impl Entry {
    fn has_room(&self) -> bool {
        self.commands.len() < ENTRY_COMMANDS_MAX && self.weight_bytes < ENTRY_WEIGHT_MAX_BYTES
    }

    /// Takes a command in, unless nobody waits for it any more.
    fn add(&mut self, waiting: Waiting) {
        if waiting.deadline <= Instant::now() || !decide(&waiting.fate, PROPOSED) {
            let _ = waiting.answer.send(Err(CallError::Expired));
            return;
        }
        self.weight_bytes += weight_bytes(&waiting.command);
        self.commands.push(waiting.command);
        self.answers.push(waiting.answer);
    }

    async fn propose(self, raft: Raft) {
        let started = Instant::now();
        let Entry { commands, answers, .. } = self;
        let count = answers.len();
        fail_point!("propose");
        // As where this task dies: whoever waits for an answer gets none.
        fail_point!("propose-before-append", |_| ());
        let result = raft.client_write(Batch::new(wall_clock(), commands)).await;
        fail_point!("propose-after-append", |_| ());
        metrics::histogram!("portwarden_proposal_seconds").record(started.elapsed().as_secs_f64());
        match result {
            Ok(response) if response.data.0.len() == count => {
                for (answer, applied) in answers.into_iter().zip(response.data.0) {
                    let _ = answer.send(Ok(applied));
                }
            }
            Ok(response) => {
                let got = response.data.0.len();
                fail(answers, CallError::Unknown(format!("{count} commands got {got} answers")));
            }
            Err(error) => {
                let error = of_write(error);
                // Nothing was appended: whoever asked may propose it again.
                fail_point!(
                    "propose-refused",
                    matches!(error, CallError::NotLeader { .. }),
                    |_| ()
                );
                fail(answers, error)
            }
        }
    }
}

fn fail(answers: Vec<oneshot::Sender<Result<Applied, CallError>>>, error: CallError) {
    for answer in answers {
        let _ = answer.send(Err(error.clone()));
    }
}

/// A rough upper estimate of a command's size in the log: it only has to keep entries bounded.
fn weight_bytes(command: &Command) -> usize {
    const BASE: usize = 512;
    const ITEM: usize = 160;
    let items = match command {
        Command::RegisterWorker { spec, .. } => {
            spec.ranges.len() + 2 * spec.gpus.len() + spec.labels.len() + spec.reserved.len() / 16
        }
        Command::UpdateWorker { patch, .. } => {
            patch.ranges.as_ref().map_or(0, Vec::len)
                + 2 * patch.gpus.as_ref().map_or(0, Vec::len)
                + patch.labels.as_ref().map_or(0, |labels| labels.len())
                + patch.reserved.as_ref().map_or(0, |reserved| reserved.len() / 16)
        }
        Command::Allocate { claims, .. } => {
            claims.iter().map(|c| 8 + c.ports.len() + c.labels.len()).sum()
        }
        Command::Quarantine { ports, .. } | Command::LiftQuarantine { ports, .. } => {
            ports.len() / 16
        }
        _ => 0,
    };
    BASE + items * ITEM
}
