//! From commands to log entries.
//!
//! While an entry is in flight, commands wait in two bounded lanes; once it is answered, everything
//! that waits is packed into the next entry (bounded in count and weight). So one flush serves many
//! commands under load, and a single command is proposed at once when nothing else is. A few entries
//! are in flight at a time where as many commands wait as one takes, or the answer takes long
//! ([`NEXT_AFTER`]): each costs all nodes a message and a flush. For the same reason an entry waits a
//! little for those who were just answered and ask again (`Returning`). Commands that came together
//! stay together: they are queued, packed and answered as one group.
//!
//! - Admission never waits: a full lane is [`CallError::Overloaded`].
//! - The urgent lane (what confirms, frees or moves on) has its own room and goes first, so that a
//!   flood of allocations cannot keep ports from being given back. The last eighth of an entry is for the
//!   normal lane where anything waits in it, so that no flood of releases keeps it waiting for ever.
//! - A command whose caller's deadline has passed, or who is gone, is dropped unproposed. Whether it was
//!   proposed is settled by one atomic step between caller and packer, so that "nothing was changed" is
//!   true whenever it is said.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fail::fail_point;
use futures::future::join_all;
use itertools::Itertools as _;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::outcome::{CallError, RETRY_AFTER, of_write};
use super::wall_clock::wall_clock;
use crate::core::{Applied, Command, Specs};
use crate::lock::guard;
use crate::raft::{Batch, BatchReply, Raft};

/// Commands that may wait in each lane.
const LANE_COMMANDS_MAX: usize = 8192;
/// Most commands in one entry, but that the last group of each lane to go in goes whole.
const ENTRY_COMMANDS_MAX: usize = 512;
/// Most weight (estimated bytes) in one entry; a single heavier command goes alone.
const ENTRY_WEIGHT_MAX_BYTES: usize = 1 << 20;
/// Of which so much is for the normal lane. Its first group goes in even where the last urgent one left
/// no room.
const NORMAL_SHARE_COMMANDS: usize = ENTRY_COMMANDS_MAX / 8;
const NORMAL_SHARE_WEIGHT_BYTES: usize = ENTRY_WEIGHT_MAX_BYTES / 8;
/// Entries proposed and not yet answered.
const IN_FLIGHT_MAX: usize = 4;
/// How long an entry that is not full waits for the answer to those before it.
const NEXT_AFTER: Duration = Duration::from_millis(5);

/// A command that was applied.
#[derive(Debug, Clone)]
pub struct Written {
    pub applied: Applied,
    /// Of the workers on which its allocations are, and maybe others.
    pub specs: Arc<Specs>,
}

#[derive(Clone)]
pub(super) struct Proposer {
    urgent: Lane,
    normal: Lane,
    /// The urgent lane was full since somebody last asked.
    urgent_full: Arc<AtomicBool>,
    /// Told when as many commands wait as one entry takes.
    entry_full: Arc<Notify>,
}

#[derive(Clone)]
struct Lane {
    queue: mpsc::UnboundedSender<Group>,
    /// A permit for each command that may yet come: this is what bounds the queue.
    room: Arc<Semaphore>,
}

/// Commands that go into one entry, or none of them does.
struct Group {
    commands: Vec<Command>,
    urgent: bool,
    queued: Instant,
    deadline: Instant,
    fate: Arc<AtomicU8>,
    answer: Answer,
    _room: OwnedSemaphorePermit,
}

/// Who decided first: the packer that it goes into an entry, or the caller that it does not.
const QUEUED: u8 = 0;
const PROPOSED: u8 = 1;
const ABANDONED: u8 = 2;

fn decide(fate: &AtomicU8, verdict: u8) -> bool {
    fate.compare_exchange(QUEUED, verdict, Ordering::AcqRel, Ordering::Acquire).is_ok()
}

impl Lane {
    fn new() -> (Lane, mpsc::UnboundedReceiver<Group>) {
        let (queue, queued) = mpsc::unbounded_channel();
        (Lane { queue, room: Arc::new(Semaphore::new(LANE_COMMANDS_MAX)) }, queued)
    }
}

/// Commands that wait in the lanes.
fn waiting(rooms: [&Semaphore; 2]) -> usize {
    rooms.map(|room| LANE_COMMANDS_MAX - room.available_permits()).iter().sum()
}

impl Proposer {
    /// The returned future packs and proposes until every sender is gone.
    pub fn new(raft: Raft) -> (Proposer, impl Future<Output = ()> + Send) {
        let (proposer, lanes) = Proposer::with_lanes();
        let in_flight = InFlight::new(&proposer);
        (proposer, pack(raft, in_flight, lanes))
    }

    fn with_lanes() -> (Proposer, Lanes) {
        let (urgent, urgent_queue) = Lane::new();
        let (normal, normal_queue) = Lane::new();
        let (urgent_full, entry_full) = Default::default();
        let proposer = Proposer { urgent, normal, urgent_full, entry_full };
        (proposer, Lanes { urgent: urgent_queue, normal: normal_queue })
    }

    /// Was a confirmation, or what is as urgent, turned away since the last call?
    pub fn turned_urgent_away(&self) -> bool {
        self.urgent_full.swap(false, Ordering::Relaxed)
    }

    pub fn turn_urgent_away(&self) {
        self.urgent_full.store(true, Ordering::Relaxed);
    }

    pub async fn propose(&self, command: Command, deadline: Instant) -> Result<Written, CallError> {
        let BatchReply { mut applied, specs } = self.propose_group(vec![command], deadline).await?;
        let applied = applied.pop().expect("one answer to one command");
        Ok(Written { applied, specs })
    }

    /// Each of them, in as few entries as may be. What is urgent overtakes the rest.
    pub async fn propose_all(
        &self,
        commands: Vec<Command>,
        deadline: Instant,
    ) -> Vec<Result<Written, CallError>> {
        let count = commands.len();
        let groups = grouped(commands).into_iter().map(|(places, commands)| async move {
            (places, self.propose_group(commands, deadline).await)
        });
        let lost = || Err(CallError::Unknown("the command got no answer".into()));
        let mut answers: Vec<_> = std::iter::repeat_with(lost).take(count).collect();
        for (places, result) in join_all(groups).await {
            match result {
                Ok(BatchReply { applied, specs }) => {
                    for (at, applied) in places.into_iter().zip(applied) {
                        answers[at] = Ok(Written { applied, specs: specs.clone() });
                    }
                }
                Err(error) => places.into_iter().for_each(|at| answers[at] = Err(error.clone())),
            }
        }
        answers
    }

    /// As many answers as commands, in their order. All of them are urgent or none is.
    async fn propose_group(
        &self,
        commands: Vec<Command>,
        deadline: Instant,
    ) -> Result<BatchReply, CallError> {
        let urgent = commands.iter().all(is_urgent);
        let lane = if urgent { &self.urgent } else { &self.normal };
        fail_point!("propose-full", |_| Err(CallError::Overloaded { retry_after: RETRY_AFTER }));
        fail_point!("propose-not-leader", |_| Err(CallError::NotLeader { leader: None }));
        let Ok(room) = lane.room.clone().try_acquire_many_owned(commands.len() as u32) else {
            metrics::counter!("portwarden_proposals_refused_total", "reason" => "overloaded")
                .increment(commands.len() as u64);
            self.urgent_full.fetch_or(urgent, Ordering::Relaxed);
            return Err(CallError::Overloaded { retry_after: RETRY_AFTER });
        };
        for (count, kind) in commands.iter().map(Command::kind).dedup_with_count() {
            metrics::counter!("portwarden_proposals_total", "command" => kind)
                .increment(count as u64);
        }
        let fate = Arc::new(AtomicU8::new(QUEUED));
        let (answer, answered) = oneshot::channel();
        let queued = Instant::now();
        let group =
            Group { commands, urgent, queued, deadline, fate: fate.clone(), answer, _room: room };
        let stopping = || CallError::NotReady("the node is stopping".into());
        lane.queue.send(group).map_err(|_| stopping())?;
        if waiting([&self.urgent.room, &self.normal.room]) >= ENTRY_COMMANDS_MAX {
            self.entry_full.notify_one();
        }
        match timeout_at(deadline, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) if decide(&fate, ABANDONED) => Err(stopping()),
            Ok(Err(_)) => Err(CallError::Unknown("the node lost the proposal".into())),
            Err(_) if decide(&fate, ABANDONED) => Err(CallError::Expired),
            Err(_) => Err(CallError::Unknown(
                "the deadline passed while the command was in the log".into(),
            )),
        }
    }
}

/// What may go into one entry, each with its place in `commands`.
fn grouped(commands: Vec<Command>) -> Vec<(Vec<usize>, Vec<Command>)> {
    let mut groups: Vec<(Vec<usize>, Vec<Command>)> = Vec::new();
    // Of each lane: the group that still has room, and its weight.
    let mut open: [Option<(usize, usize)>; 2] = [None; 2];
    for (place, command) in commands.into_iter().enumerate() {
        let weight = weight_bytes(&command);
        let open = &mut open[usize::from(is_urgent(&command))];
        let (at, filled) = match *open {
            Some((at, filled))
                if filled + weight <= ENTRY_WEIGHT_MAX_BYTES
                    && groups[at].1.len() < ENTRY_COMMANDS_MAX =>
            {
                (at, filled)
            }
            _ => {
                groups.push(Default::default());
                (groups.len() - 1, 0)
            }
        };
        *open = Some((at, filled + weight));
        groups[at].0.push(place);
        groups[at].1.push(command);
    }
    groups
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

/// The entries that are under way, and when the next may be.
struct InFlight {
    slots: Arc<Semaphore>,
    rooms: [Arc<Semaphore>; 2],
    entry_full: Arc<Notify>,
    /// When the last one was proposed.
    latest: Instant,
}

impl InFlight {
    fn new(proposer: &Proposer) -> InFlight {
        let Proposer { urgent, normal, entry_full, .. } = proposer;
        InFlight {
            slots: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
            rooms: [urgent.room.clone(), normal.room.clone()],
            entry_full: entry_full.clone(),
            latest: Instant::now(),
        }
    }

    /// Returns when the next entry would be full.
    async fn full(&self) {
        while self.waiting() < ENTRY_COMMANDS_MAX {
            self.entry_full.notified().await;
        }
    }

    /// Entries that are under way.
    fn count(&self) -> usize {
        IN_FLIGHT_MAX - self.slots.available_permits()
    }

    /// Commands that wait to be packed.
    fn waiting(&self) -> usize {
        let [urgent, normal] = &self.rooms;
        waiting([urgent, normal])
    }

    /// Returns when the next entry may be proposed; it is under way until the slot is dropped. `None`:
    /// never.
    async fn slot(&mut self) -> Option<OwnedSemaphorePermit> {
        tokio::select! {
            _ = self.slots.acquire_many(IN_FLIGHT_MAX as u32) => {} // all are answered
            () = self.full() => {}
            () = sleep_until(self.latest + NEXT_AFTER) => {}
        }
        let slot = self.slots.clone().acquire_owned().await.ok();
        self.latest = Instant::now();
        slot
    }
}

/// Whoever was just answered may ask again at once. The next entry waits for them where that pays: they
/// share it with those who waited meanwhile, and do not go every other entry with half of them in each.
struct Returning {
    last: Arc<Mutex<Answered>>,
    /// Entries that are not to wait.
    skipped: u32,
    /// How many are not to wait after the next wait in vain.
    skip: u32,
}

/// The last entry that was answered.
#[derive(Debug, Clone, Copy)]
struct Answered {
    commands: usize,
    at: Instant,
    took: Duration,
}

/// Entries that do not wait after one that did in vain: so many at first and at most.
const SKIP_MIN: u32 = 4;
const SKIP_MAX: u32 = 1024;

impl Returning {
    fn new() -> Returning {
        let none = Answered { commands: 0, at: Instant::now(), took: Duration::ZERO };
        Returning { last: Arc::new(Mutex::new(none)), skipped: 0, skip: SKIP_MIN }
    }

    /// How many commands may come back, and until when they are waited for: for no longer than an entry
    /// of those who are here would take. `None`: it is too late for that, or was in vain lately.
    fn awaited(&mut self) -> Option<(usize, Instant)> {
        if self.skipped > 0 {
            self.skipped -= 1;
            return None;
        }
        let last = *guard(&self.last);
        let until = last.at + last.took.min(NEXT_AFTER);
        (Instant::now() < until).then_some((last.commands, until))
    }

    /// So many of them came in time. Where callers ask at their own pace, as many come in an entry's time
    /// as did while the last one was under way: half of those awaited, who were more by its own wait. To
    /// wait for them makes all of them late and nobody fewer, so it is tried seldom then.
    fn came(&mut self, commands: usize, awaited: usize) {
        if 4 * commands < 3 * awaited {
            self.skipped = self.skip;
            self.skip = (4 * self.skip).min(SKIP_MAX);
        } else {
            self.skip = (self.skip / 2).max(SKIP_MIN);
        }
    }
}

struct Lanes {
    urgent: mpsc::UnboundedReceiver<Group>,
    normal: mpsc::UnboundedReceiver<Group>,
}

impl Lanes {
    /// What is here already, as far as the entry takes it.
    fn try_next(&mut self, entry: &Entry) -> Option<Group> {
        if entry.owes_normal()
            && let Ok(group) = self.normal.try_recv()
        {
            return Some(group);
        }
        if !entry.has_room() {
            return None;
        }
        self.urgent.try_recv().or_else(|_| self.normal.try_recv()).ok()
    }

    /// `None`: nobody can ask any more.
    async fn next(&mut self) -> Option<Group> {
        tokio::select! {
            biased;
            Some(group) = self.urgent.recv() => Some(group),
            Some(group) = self.normal.recv() => Some(group),
            else => None,
        }
    }
}

async fn pack(raft: Raft, mut in_flight: InFlight, mut lanes: Lanes) {
    let mut returning = Returning::new();
    let mut crowded = false;
    while let Some(first) = lanes.next().await {
        let idle = in_flight.count() == 0;
        // What arrives meanwhile joins the same entry.
        let Some(slot) = in_flight.slot().await else { return };
        // Where none was under way, whoever is here may have come back already.
        let here = if idle { 0 } else { in_flight.waiting() };
        if crowded {
            // And so do those who came with the first, and have had no turn yet.
            tokio::task::yield_now().await;
        }
        let mut entry = Entry::default();
        entry.add(first);
        while let Some(group) = lanes.try_next(&entry) {
            entry.add(group);
        }
        let alone = in_flight.count() == 1;
        if alone && let Some((commands, until)) = returning.awaited() {
            let all = here + commands;
            if entry.has_room() && entry.commands.len() < all {
                let awaited = all - entry.commands.len();
                let came = entry.gather(&mut lanes, all, until).await;
                returning.came(came, awaited);
            }
        }
        if entry.commands.is_empty() {
            continue;
        }
        crowded = entry.groups.len() > 1;
        metrics::histogram!("portwarden_entry_commands").record(entry.commands.len() as f64);
        let (raft, last) = (raft.clone(), returning.last.clone());
        tokio::spawn(async move {
            let (commands, began) = (entry.commands.len(), Instant::now());
            entry.propose(raft).await;
            *guard(&last) = Answered { commands, at: Instant::now(), took: began.elapsed() };
            drop(slot);
        });
    }
}

#[derive(Default)]
struct Entry {
    commands: Vec<Command>,
    /// So many of them are not urgent.
    normal: usize,
    /// Of each group how many commands it has, and who waits for their answers.
    groups: Vec<(usize, Answer)>,
    weight_bytes: usize,
}

type Answer = oneshot::Sender<Result<BatchReply, CallError>>;

impl Entry {
    fn has_room(&self) -> bool {
        self.commands.len() < ENTRY_COMMANDS_MAX && self.weight_bytes < ENTRY_WEIGHT_MAX_BYTES
    }

    /// What is left of it is for the normal lane.
    fn owes_normal(&self) -> bool {
        let nearly_full = self.commands.len() >= ENTRY_COMMANDS_MAX - NORMAL_SHARE_COMMANDS
            || self.weight_bytes >= ENTRY_WEIGHT_MAX_BYTES - NORMAL_SHARE_WEIGHT_BYTES;
        let goes_in = self.has_room() || self.normal == 0;
        nearly_full
            && goes_in
            && self.normal < NORMAL_SHARE_COMMANDS
            && self.weight_bytes < ENTRY_WEIGHT_MAX_BYTES
    }

    /// Takes a group in, unless nobody waits for it any more.
    fn add(&mut self, group: Group) {
        let wanted = group.deadline > Instant::now() && !group.answer.is_closed();
        if !wanted || !decide(&group.fate, PROPOSED) {
            let _ = group.answer.send(Err(CallError::Expired));
            return;
        }
        let waited = group.queued.elapsed().as_secs_f64();
        metrics::histogram!("portwarden_queue_seconds").record(waited);
        self.weight_bytes += group.commands.iter().map(weight_bytes).sum::<usize>();
        self.normal += if group.urgent { 0 } else { group.commands.len() };
        self.groups.push((group.commands.len(), group.answer));
        self.commands.extend(group.commands);
    }

    /// Returns when it is full, has so many commands, or the time is over; and how many came in time.
    async fn gather(&mut self, lanes: &mut Lanes, commands: usize, until: Instant) -> usize {
        let (at_first, mut came) = (self.commands.len(), 0);
        while self.has_room() && self.commands.len() < commands {
            let Ok(Some(group)) = timeout_at(until, lanes.next()).await else { break };
            self.add(group);
            // A timer may be a millisecond late, which is as long as some entries.
            if Instant::now() > until {
                break;
            }
            came = self.commands.len() - at_first;
        }
        came
    }

    async fn propose(self, raft: Raft) {
        let started = Instant::now();
        let Entry { commands, groups, .. } = self;
        let count = commands.len();
        fail_point!("propose");
        // As where this task dies: whoever waits for an answer gets none.
        fail_point!("propose-before-append", |_| ());
        let result = raft.client_write(Batch::new(wall_clock(), commands)).await;
        fail_point!("propose-after-append", |_| ());
        metrics::histogram!("portwarden_proposal_seconds").record(started.elapsed().as_secs_f64());
        match result {
            Ok(response) if response.data.applied.len() == count => {
                let BatchReply { applied, specs } = response.data;
                let mut applied = applied.into_iter();
                for (count, answer) in groups {
                    let applied = applied.by_ref().take(count).collect();
                    let _ = answer.send(Ok(BatchReply { applied, specs: specs.clone() }));
                }
            }
            Ok(response) => {
                let got = response.data.applied.len();
                fail(groups, CallError::Unknown(format!("{count} commands got {got} answers")));
            }
            Err(error) => {
                let error = of_write(error);
                // Nothing was appended: whoever asked may propose it again.
                fail_point!(
                    "propose-refused",
                    matches!(error, CallError::NotLeader { .. }),
                    |_| ()
                );
                fail(groups, error);
            }
        }
    }
}

fn fail(groups: Vec<(usize, Answer)>, error: CallError) {
    for (_, answer) in groups {
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

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::core::{LeaseId, Millis};

    #[tokio::test]
    async fn one_command_more_than_may_wait_is_overloaded_and_the_urgent_lane_has_its_own_room() {
        let (proposer, mut lanes) = Proposer::with_lanes();
        let deadline = Instant::now() + Duration::from_secs(60);
        let propose = |command| proposer.propose(command, deadline).now_or_never();
        let grant = || Command::GrantLease { ttl: Millis(1000) };
        for _ in 0..LANE_COMMANDS_MAX {
            assert!(propose(grant()).is_none());
        }
        let refused = propose(grant());
        assert!(matches!(refused, Some(Err(CallError::Overloaded { .. }))), "{refused:?}");
        assert!(!proposer.turned_urgent_away());
        assert!(propose(Command::RevokeLease { id: LeaseId(1) }).is_none());
        // What is packed makes room.
        drop(lanes.normal.recv().await);
        assert!(propose(grant()).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_waits_for_the_answer_before_it_unless_it_is_full_or_that_takes_long() {
        let (proposer, _lanes) = Proposer::with_lanes();
        let mut in_flight = InFlight::new(&proposer);
        let first = in_flight.slot().now_or_never().flatten().expect("nothing is under way");
        assert!(in_flight.slot().now_or_never().is_none());
        drop(first);
        let began = Instant::now();
        let _second = in_flight.slot().await;
        assert_eq!(began.elapsed(), Duration::ZERO, "it was answered");
        let _third = in_flight.slot().await;
        assert_eq!(began.elapsed(), NEXT_AFTER);
        let deadline = Instant::now() + Duration::from_secs(60);
        let propose =
            |command: Command, count| proposer.propose_group(vec![command; count], deadline);
        let release = Command::RevokeLease { id: LeaseId(1) };
        let mut urgent = std::pin::pin!(propose(release, 100));
        assert!(urgent.as_mut().now_or_never().is_none());
        let mut waiting = Box::pin(in_flight.slot());
        assert!(waiting.as_mut().now_or_never().is_none(), "not full");
        let grant = Command::GrantLease { ttl: Millis(1000) };
        let mut rest = std::pin::pin!(propose(grant, ENTRY_COMMANDS_MAX - 100));
        assert!(rest.as_mut().now_or_never().is_none());
        let fourth = waiting.now_or_never().flatten().expect("full by now");
        let fifth = in_flight.slot().now_or_never().flatten();
        assert!(fifth.is_some() && in_flight.slot().now_or_never().is_none(), "the most");
        drop(fourth);
        assert!(in_flight.slot().now_or_never().flatten().is_some());
        assert_eq!(began.elapsed(), NEXT_AFTER);
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_answered_is_waited_for_within_an_entrys_time_unless_that_was_in_vain() {
        let ms = Duration::from_millis;
        let mut returning = Returning::new();
        assert_eq!(returning.awaited(), None, "nobody was answered yet");
        let answered = |returning: &Returning, took| {
            let at = Instant::now();
            *guard(&returning.last) = Answered { commands: 4, at, took };
            at
        };
        let at = answered(&returning, ms(2));
        assert_eq!(returning.awaited(), Some((4, at + ms(2))));
        tokio::time::advance(ms(2)).await;
        assert_eq!(returning.awaited(), None, "too late");
        let at = answered(&returning, ms(2_000));
        assert_eq!(returning.awaited(), Some((4, at + NEXT_AFTER)), "a disk was slow");

        // Entries until one waits again.
        let mut until_awaited = |came| {
            returning.came(came, 4);
            answered(&returning, ms(2));
            (0..).take_while(|_| returning.awaited().is_none()).count() as u32
        };
        assert_eq!(until_awaited(3), 0);
        assert_eq!([until_awaited(2), until_awaited(0)], [SKIP_MIN, 4 * SKIP_MIN]);
        assert_eq!([0; 4].map(&mut until_awaited)[3], SKIP_MAX);
        assert_eq!([4; 9].map(&mut until_awaited), [0; 9]);
        assert_eq!(until_awaited(0), SKIP_MIN, "it is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn an_entry_gathers_as_many_commands_as_are_awaited_or_fit_or_come_in_time() {
        let (proposer, mut lanes) = Proposer::with_lanes();
        let deadline = Instant::now() + Duration::from_secs(60);
        let grant = Command::GrantLease { ttl: Millis(1000) };
        let ask = |count| Box::pin(proposer.propose_group(vec![grant.clone(); count], deadline));
        let mut asked: Vec<_> = [1, 1, 2, ENTRY_COMMANDS_MAX, 1, 1].into_iter().map(ask).collect();
        assert!(asked.iter_mut().all(|asked| asked.now_or_never().is_none()));
        let until = Instant::now() + Duration::from_millis(2);
        let mut entry = Entry::default();
        assert_eq!(entry.gather(&mut lanes, 3, until).await, 4, "groups are whole");
        assert_eq!(entry.gather(&mut lanes, 10_000, until).await, ENTRY_COMMANDS_MAX);
        assert!(!entry.has_room());
        let mut last = Entry::default();
        assert_eq!(last.gather(&mut lanes, 1, until).await, 1);
        tokio::time::advance(Duration::from_millis(3)).await;
        assert_eq!(last.gather(&mut lanes, 3, until).await, 0, "one came, and too late");
        assert_eq!(last.commands.len(), 2);
        assert_eq!(last.gather(&mut lanes, 3, until).await, 0, "nobody comes");
    }

    #[tokio::test]
    async fn an_eighth_of_an_entry_is_for_what_is_not_urgent_where_any_waits() {
        /// Of the entries, how many commands of each lane.
        async fn entries(urgent: (usize, usize), normal: (usize, usize)) -> Vec<(usize, usize)> {
            let (proposer, mut lanes) = Proposer::with_lanes();
            let deadline = Instant::now() + Duration::from_secs(60);
            let release = Command::RevokeLease { id: LeaseId(1) };
            let grant = Command::GrantLease { ttl: Millis(1000) };
            let ask = |command: &Command, (groups, each): (usize, usize)| {
                let group = vec![command.clone(); each];
                let asked = std::iter::repeat_n(group, groups);
                asked.map(|group| Box::pin(proposer.propose_group(group, deadline))).collect()
            };
            let mut asked: Vec<_> = ask(&release, urgent);
            asked.extend::<Vec<_>>(ask(&grant, normal));
            assert!(asked.iter_mut().all(|asked| asked.now_or_never().is_none()));
            let mut entries = Vec::new();
            loop {
                let mut entry = Entry::default();
                while let Some(group) = lanes.try_next(&entry) {
                    entry.add(group);
                }
                if entry.commands.is_empty() {
                    return entries;
                }
                entries.push((entry.commands.len() - entry.normal, entry.normal));
            }
        }
        assert_eq!(entries((1_000, 1), (100, 1)).await, [(448, 64), (476, 36), (76, 0)]);
        assert_eq!(entries((600, 1), (0, 0)).await, [(512, 0), (88, 0)], "it costs nothing");
        assert_eq!(entries((100, 1), (600, 1)).await, [(100, 412), (0, 188)], "urgent goes first");
        let groups = [(512, 256), (512, 256), (0, 256)];
        assert_eq!(entries((4, 256), (3, 256)).await, groups, "groups are whole");
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_not_proposed() {
        let (proposer, mut lanes) = Proposer::with_lanes();
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut entry = Entry::default();
        let grant = || Command::GrantLease { ttl: Millis(1000) };
        assert!(proposer.propose(grant(), deadline).now_or_never().is_none(), "and is given up");
        entry.add(lanes.normal.recv().await.unwrap());
        assert!(entry.commands.is_empty());
        let waits = proposer.propose(grant(), deadline);
        tokio::pin!(waits);
        assert!(waits.as_mut().now_or_never().is_none());
        entry.add(lanes.normal.recv().await.unwrap());
        assert_eq!(entry.commands, [grant()]);
    }
}
