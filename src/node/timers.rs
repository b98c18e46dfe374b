//! Deadlines on the leader: of leases, of confirmations, of agents that are silent, and of
//! quarantines that no agent watches.
//!
//! They run on a clock of the leader's own, which stands still while the leader could not have heard
//! a holder: it was paused or starved (a gap between two ticks), it had no quorum (the round that
//! precedes every expiry took long), or it turned confirmations away. A new leader starts every
//! deadline anew, in full. So a holder that does its part is never cut short; nobody is promised
//! that a silent one is found out at once.
//!
//! A deadline that has passed proves nothing by itself: what is proposed is a guarded command, which
//! the table refuses under another leader or after any change.
//!
//! A keepalive is acknowledged after a read round that began when it had come, so by a leader that
//! was one then and has applied all that came before; and only while the end of the lease is not
//! proposed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures::future::join_all;
use metrics::counter;
use openraft::ServerState;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::outcome::CallError;
use super::{Lifecycle, Node, ticks};
use crate::core::{
    Actor, Allocation, Applied, Command, Event, Ground, InstanceName, Leader, Lease, LeaseId,
    Millis, Phase, Port, Revision, Source, State, Worker, WorkerName, WorkerPhase,
};
use crate::lock::guard;
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::raft::ApplyObserver;

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);
/// A tick that comes so late was held up: what holders sent meanwhile may still be queued.
const GAP: Duration = Duration::from_millis(500);
/// Deadlines that are acted on in one tick.
const DUE_MAX: usize = 1024;
/// How long a proposal may take; without an answer it is made again, which its guard makes safe.
const PROPOSAL_MAX: Duration = Duration::from_secs(5);
/// How long a keepalive waits to hear whether the end of its lease comes: others wait for their answers behind
/// it. And from one look to the next.
const ENDING_MAX: Duration = Duration::from_millis(250);
const ENDING_PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Lease(LeaseId),
    Confirm(InstanceName),
    /// An agent that does not report.
    Silent(WorkerName),
    /// A port that was in conflict, on a worker that no agent watches.
    Quarantine(WorkerName, u16),
}

#[derive(Debug, Clone)]
struct Deadline {
    /// On the leader's own clock.
    at: Duration,
    /// The command that it proposes.
    command: Command,
    /// It is proposed: too late for a keepalive.
    ending: bool,
}

#[derive(Clone)]
pub(super) struct Timers(Arc<Mutex<Book>>);

#[derive(Default)]
struct Book {
    lifecycle: Lifecycle,
    /// What this node leads as; nothing is timed while it does not.
    reign: Option<Reign>,
    deadlines: BTreeMap<Key, Deadline>,
    /// The same by time.
    queue: BTreeSet<(Duration, Key)>,
    /// Workers that events told of since the reign began; until the book is caught up with the table.
    told: Option<BTreeSet<WorkerName>>,
}

struct Reign {
    leader: Leader,
    since: Instant,
    /// For how long its clock stood still.
    lost: Duration,
}

impl Reign {
    fn now(&self) -> Duration {
        self.at(Instant::now())
    }

    fn at(&self, now: Instant) -> Duration {
        now.duration_since(self.since).saturating_sub(self.lost)
    }
}

/// What became of a keepalive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Renewal {
    Renewed,
    /// The end of the lease is under way. It may yet not come.
    Ending,
    /// This node does not lead or has not begun to; or the lease has just ended. Ask again.
    NotLeading,
}

impl Timers {
    fn book(&self) -> MutexGuard<'_, Book> {
        guard(&self.0)
    }

    pub fn new(lifecycle: Lifecycle) -> Timers {
        Timers(Arc::new(Mutex::new(Book { lifecycle, ..Book::default() })))
    }

    pub fn renew(&self, lease: &Lease) -> Renewal {
        self.book().renew(lease)
    }

    /// The agent of this worker has just been heard.
    pub fn heard(&self, worker: &Worker) {
        self.book().heard(worker);
    }

    /// What this node leads as, once it times what there is.
    pub fn leader(&self) -> Option<Leader> {
        self.book().reign.as_ref().map(|reign| reign.leader)
    }
}

impl Book {
    fn renew(&mut self, lease: &Lease) -> Renewal {
        match self.deadlines.get(&Key::Lease(lease.id)) {
            _ if self.reign.is_none() => Renewal::NotLeading,
            // Not in the books yet, or ended since the table was read.
            None => Renewal::NotLeading,
            #[cfg(planted)]
            Some(_) if planted::is(Bug::RenewedTooLate) => {
                self.start_lease(lease);
                Renewal::Renewed
            }
            Some(deadline) if deadline.ending => Renewal::Ending,
            Some(_) => {
                self.start_lease(lease);
                Renewal::Renewed
            }
        }
    }

    fn start(&mut self, key: Key, within: Millis, command: impl FnOnce(Leader) -> Command) {
        let Some(reign) = &self.reign else { return };
        let at = reign.now() + Duration::from_millis(within.0);
        let command = command(reign.leader);
        self.stop(&key);
        self.queue.insert((at, key.clone()));
        self.deadlines.insert(key, Deadline { at, command, ending: false });
    }

    fn stop(&mut self, key: &Key) {
        if let Some(old) = self.deadlines.remove(key) {
            self.queue.remove(&(old.at, key.clone()));
        }
    }

    fn start_lease(&mut self, lease: &Lease) {
        let id = lease.id;
        self.start(Key::Lease(id), lease.ttl, |under| Command::ExpireLease { id, under });
    }

    /// Of an allocation as it is now; every version has a deadline of its own.
    fn follow(&mut self, allocation: &Allocation) {
        let key = Key::Confirm(allocation.name().clone());
        if allocation.phase != Phase::Reserved {
            return self.stop(&key);
        }
        self.start(key, allocation.confirm_within, |under| Command::Reclaim {
            name: allocation.name().clone(),
            token: allocation.token,
            version: allocation.version,
            ground: Ground::Unconfirmed,
            under,
        });
    }

    /// Of a worker as it is now.
    fn follow_worker(&mut self, worker: &Worker) {
        let key = Key::Silent(worker.name.clone());
        match watched(worker) {
            true if self.deadlines.contains_key(&key) => {}
            true => self.start_silence(worker),
            false => self.stop(&key),
        }
        let name = &worker.name;
        let suspects: BTreeMap<u16, Revision> = match worker.has_agent() {
            true => BTreeMap::new(),
            false => {
                let all = worker.pools.iter().flat_map(|pool| pool.quarantines());
                let suspects = all.filter(|(_, q)| q.source != Source::Operator);
                suspects.map(|(number, q)| (number, q.since)).collect()
            }
        };
        for key in self.quarantines_on(name) {
            if matches!(&key, Key::Quarantine(_, number) if !suspects.contains_key(number)) {
                self.stop(&key);
            }
        }
        let within = self.lifecycle.quarantine;
        for (number, seen) in suspects {
            let key = Key::Quarantine(name.clone(), number);
            let Ok(port) = Port::new("port", u64::from(number)) else { continue };
            let lift = |leader| {
                let (worker, ports) = (name.clone(), vec![port]);
                Command::LiftQuarantine { worker, ports, by: Actor::Leader(leader), seen }
            };
            let timed = self.deadlines.get(&key).is_some_and(|deadline| {
                matches!(deadline.command, Command::LiftQuarantine { seen: timed, .. } if timed == seen)
            });
            if !timed {
                self.start(key, millis(within), lift);
            }
        }
    }

    fn quarantines_on(&self, worker: &WorkerName) -> Vec<Key> {
        let of = |number| Key::Quarantine(worker.clone(), number);
        self.deadlines.range(of(0)..=of(u16::MAX)).map(|(key, _)| key.clone()).collect()
    }

    fn start_silence(&mut self, worker: &Worker) {
        let name = worker.name.clone();
        self.start(Key::Silent(name.clone()), millis(self.lifecycle.worker_lost_after), |leader| {
            let (phase, by) = (WorkerPhase::Lost, Actor::Leader(leader));
            Command::SetWorkerPhase { name, phase, by }
        });
    }

    fn heard(&mut self, worker: &Worker) {
        let timed = self.deadlines.get(&Key::Silent(worker.name.clone()));
        if timed.map_or(watched(worker), |deadline| !deadline.ending) {
            self.start_silence(worker);
        }
    }

    fn is_told_of(&mut self, worker: &WorkerName) {
        if let Some(told) = &mut self.told {
            told.insert(worker.clone());
        }
    }

    fn heed(&mut self, event: &Event) {
        match event {
            Event::Allocated(allocation) | Event::Changed(allocation) => self.follow(allocation),
            Event::Released { allocation, .. } => {
                self.stop(&Key::Confirm(allocation.name().clone()));
            }
            Event::LeaseGranted(lease) => self.start_lease(lease),
            Event::LeaseEnded { lease, .. } => self.stop(&Key::Lease(lease.id)),
            Event::FeatureLevel(_) => {}
            Event::Worker(worker) => {
                self.is_told_of(&worker.name);
                self.follow_worker(worker);
            }
            Event::WorkerRemoved(name) => {
                self.is_told_of(name);
                self.stop(&Key::Silent(name.clone()));
                self.quarantines_on(name).iter().for_each(|key| self.stop(key));
            }
        }
    }

    fn begin(&mut self, leader: Leader) {
        let reign = Some(Reign { leader, since: Instant::now(), lost: Duration::ZERO });
        let (lifecycle, told) = (self.lifecycle.clone(), Some(BTreeSet::new()));
        *self = Book { reign, lifecycle, told, ..Book::default() };
    }

    /// Everything that the table has and no event told of since the reign began.
    fn catch_up(&mut self, state: &State) {
        for lease in state.leases_after(None) {
            if !self.deadlines.contains_key(&Key::Lease(lease.id)) {
                self.start_lease(lease);
            }
        }
        // An event may be newer than the table, and told of all that there is of its worker.
        let told = self.told.take().unwrap_or_default();
        let others = state.workers_after(None).filter(|worker| !told.contains(&worker.name));
        others.for_each(|worker| self.follow_worker(worker));
        for allocation in state.reserved() {
            if !self.deadlines.contains_key(&Key::Confirm(allocation.name().clone())) {
                self.follow(allocation);
            }
        }
    }

    fn stand_still(&mut self, span: Duration) {
        if let Some(reign) = &mut self.reign {
            reign.lost += span;
        }
    }

    fn is_due(&self) -> bool {
        let Some(reign) = &self.reign else { return false };
        self.queue.first().is_some_and(|(at, _)| *at <= reign.now())
    }

    /// Takes what is due off the queue; until [`Book::settle`] no keepalive is taken for it. `last`: up to
    /// when it is known whether the clock stood still; it did since then if that is long ago.
    fn take_due(&mut self, last: &mut Instant) -> Vec<(Key, Command)> {
        let now = Instant::now();
        let since = now.duration_since(*last);
        if since > GAP {
            self.stand_still(since);
            *last = now;
        }
        let Some(now) = self.reign.as_ref().map(|reign| reign.at(now)) else { return Vec::new() };
        let mut due = Vec::new();
        while due.len() < DUE_MAX
            && let Some((at, key)) = self.queue.first().cloned()
            && at <= now
        {
            self.queue.pop_first();
            if let Some(deadline) = self.deadlines.get_mut(&key) {
                deadline.ending = true;
                due.push((key, deadline.command.clone()));
            }
        }
        due
    }

    /// After a proposal: what was decided is gone from the books already, or is not ours to decide.
    fn settle(&mut self, key: &Key, command: &Command, answer: &Result<Applied, CallError>) {
        let Some(deadline) = self.deadlines.get_mut(key) else { return };
        if deadline.command != *command || !deadline.ending {
            return;
        }
        match answer {
            // The table has taken it, or refused it for a change that its event told of.
            Ok(_) => self.stop(key),
            // It is proposed again. Unless it may still come, a holder may come back meanwhile.
            Err(error) => {
                deadline.ending = matches!(error, CallError::Unknown(_));
                self.queue.insert((deadline.at, key.clone()));
            }
        }
    }
}

/// Does an agent have to report there? Nobody waits for one that is lost already, or that did not
/// come yet after a restore.
fn watched(worker: &Worker) -> bool {
    worker.has_agent() && !matches!(worker.phase, WorkerPhase::Lost | WorkerPhase::Unverified)
}

pub(super) fn millis(span: Duration) -> Millis {
    Millis(span.as_millis() as u64)
}

impl ApplyObserver for Timers {
    fn applied(&self, _: &Command, _: &Applied, events: &[Event]) {
        if events.is_empty() {
            return;
        }
        let mut book = self.book();
        if book.reign.is_some() {
            events.iter().for_each(|event| book.heed(event));
        }
    }
}

impl Node {
    /// On the leader: keeps a lease alive, and says what its time to live is.
    pub async fn keep_alive(
        &self,
        id: LeaseId,
        deadline: super::Deadline,
    ) -> Result<Option<Millis>, CallError> {
        let read = self.inner.reads.read_for_keepalive(deadline).await;
        if matches!(read, Err(CallError::Overloaded { .. })) {
            self.turn_urgent_away();
        }
        let state = read?;
        let counted = |result| {
            counter!("portwarden_keepalives_total", "result" => result).increment(1);
        };
        let Some(lease) = state.lease(id) else {
            counted("gone");
            return Ok(None);
        };
        let until = Instant::now() + ENDING_MAX;
        loop {
            match self.inner.timers.renew(lease) {
                Renewal::Renewed => {
                    counted("renewed");
                    return Ok(Some(lease.ttl));
                }
                Renewal::NotLeading => return Err(CallError::NotLeader { leader: None }),
                Renewal::Ending if Instant::now() >= until => {
                    counted("gone");
                    return Ok(None);
                }
                Renewal::Ending => sleep(ENDING_PAUSE).await,
            }
        }
    }

    #[cfg(planted)]
    async fn apply_outside_log(&self, command: Command) {
        let applied = self.inner.raft.with_state_machine(move |machine| {
            machine.apply_outside_log(&command);
            Box::pin(std::future::ready(()))
        });
        let _ = applied.await;
    }

    /// What this node leads as, if it does.
    pub(super) fn leads(&self) -> Option<Leader> {
        let metrics = self.inner.metrics();
        let leads = metrics.state == ServerState::Leader;
        leads.then_some(Leader { term: metrics.current_term, node: self.id() })
    }
}

/// Runs the deadlines whenever this node leads.
pub(super) async fn run(node: Node) {
    let mut every = ticks(TICK);
    let timers = node.inner.timers.clone();
    let mut last = Instant::now();
    while node.runs() {
        every.tick().await;
        let since = std::mem::replace(&mut last, Instant::now()).elapsed();
        let reigning = timers.book().reign.as_ref().map(|reign| reign.leader);
        let leads = node.leads();
        if leads != reigning {
            timers.book().reign = None;
            node.inner.sweeper.end();
            if let Some(leader) = leads {
                begin(&node, &timers, leader).await;
            }
            continue;
        }
        if leads.is_none() {
            continue;
        }
        let turned_away = node.inner.proposer.turned_urgent_away();
        if since > GAP || turned_away {
            debug!(?since, turned_away, "deadlines are put off");
            timers.book().stand_still(since);
            continue;
        }
        if timers.book().is_due() {
            act(&node, &timers, &mut last).await;
        }
    }
}

/// Everything is timed anew, once this leader has applied all that came before it.
async fn begin(node: &Node, timers: &Timers, leader: Leader) {
    if node.read(Instant::now() + PROPOSAL_MAX).await.is_err() || node.leads() != Some(leader) {
        return;
    }
    timers.book().begin(leader);
    // Taken after the events began to come: what is in neither was never there.
    let table = node.table();
    timers.book().catch_up(&table.state);
    info!(
        leases = table.state.lease_count(),
        unconfirmed = table.state.phase_count(Phase::Reserved),
        "leading as {leader}: all deadlines start anew"
    );
}

/// Proposes what is due, if a quorum still stands behind this leader. `last`: up to when it is known
/// whether the clock stood still.
async fn act(node: &Node, timers: &Timers, last: &mut Instant) {
    if node.read(Instant::now() + PROPOSAL_MAX).await.is_err() {
        // No holder could be answered meanwhile either, nor before it was asked, and those who keep
        // something alive come back after a pause.
        let since = std::mem::replace(last, Instant::now()).elapsed();
        timers.book().stand_still(since + GAP);
        return;
    }
    // Nor could one where that took long, or this node was paused before or after.
    let due = timers.book().take_due(last);
    join_all(due.into_iter().map(|(key, command)| async move {
        #[cfg(planted)]
        if planted::is(Bug::ExpiryOutsideLog) && matches!(key, Key::Lease(_)) {
            return node.apply_outside_log(command).await;
        }
        let by = Instant::now() + PROPOSAL_MAX;
        let written = node.inner.proposer.propose(command.clone(), by).await;
        let answer = written.map(|written| written.applied);
        match &answer {
            Ok(Applied { outcome: Ok(_), revision }) => {
                info!(?key, %revision, "a deadline has passed");
            }
            Ok(Applied { outcome: Err(why), .. }) => debug!(?key, %why, "a deadline came too late"),
            Err(why) => warn!(?key, %why, "a deadline has passed and could not be acted on"),
        }
        timers.book().settle(&key, &command, &answer);
    }))
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Identity, Origin, RangeSpec, WorkerPatch, WorkerSpec, apply};

    const LEADER: Leader = Leader { term: 3, node: 1 };

    fn lease(id: u64, ttl_ms: u64) -> Lease {
        Lease { id: LeaseId(id), ttl: Millis(ttl_ms), allocations: Default::default() }
    }

    fn leading() -> Book {
        let mut book = Book::default();
        book.begin(LEADER);
        book
    }

    async fn pass(ms: u64) {
        tokio::time::advance(Duration::from_millis(ms)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_due_after_its_time_and_no_sooner() {
        let mut book = leading();
        book.start_lease(&lease(7, 2_000));
        pass(1_999).await;
        assert!(!book.is_due());
        pass(1).await;
        assert!(book.is_due());
        let due = book.take_due(&mut Instant::now());
        let expire = Command::ExpireLease { id: LeaseId(7), under: LEADER };
        assert_eq!(due, [(Key::Lease(LeaseId(7)), expire)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_keepalive_starts_the_time_anew_until_the_end_is_under_way() {
        let mut book = leading();
        book.start_lease(&lease(7, 2_000));
        pass(1_500).await;
        assert_eq!(book.renew(&lease(7, 2_000)), Renewal::Renewed);
        pass(1_500).await;
        assert!(!book.is_due());
        pass(500).await;
        let due = book.take_due(&mut Instant::now());
        assert_eq!(book.renew(&lease(7, 2_000)), Renewal::Ending);
        // Whether it was proposed is not known: it stays under way, and is proposed again.
        let (key, command) = &due[0];
        book.settle(key, command, &Err(CallError::Unknown(String::new())));
        assert_eq!(book.renew(&lease(7, 2_000)), Renewal::Ending);
        assert_eq!(book.take_due(&mut Instant::now()), due);
        // It surely was not: the holder may come back.
        book.settle(key, command, &Err(CallError::Expired));
        assert_eq!(book.renew(&lease(7, 2_000)), Renewal::Renewed);
        assert!(!book.is_due());
    }

    #[tokio::test(start_paused = true)]
    async fn time_in_which_nobody_could_be_heard_does_not_count() {
        let mut book = leading();
        book.start_lease(&lease(7, 2_000));
        pass(60_000).await;
        book.stand_still(Duration::from_secs(59));
        assert!(!book.is_due());
        pass(999).await;
        assert!(!book.is_due());
        pass(1).await;
        assert!(book.is_due());
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_leader_times_everything_in_full_and_keeps_nothing_of_an_old_one() {
        let mut state = State::default();
        let grant = Command::GrantLease { ttl: Millis(2_000) };
        apply(&mut state, &Origin::default(), &grant).0.outcome.unwrap();
        let mut book = leading();
        book.start_lease(&lease(7, 1_000));
        pass(60_000).await;
        book.begin(Leader { term: 4, node: 1 });
        book.catch_up(&state);
        pass(1_999).await;
        assert!(!book.is_due());
        pass(1).await;
        let under = Leader { term: 4, node: 1 };
        let expire = Command::ExpireLease { id: LeaseId(1), under };
        assert_eq!(book.take_due(&mut Instant::now()), [(Key::Lease(LeaseId(1)), expire)]);
    }

    /// Wherever it was paused: before it asked the quorum, or after.
    #[tokio::test(start_paused = true)]
    async fn a_pause_up_to_when_deadlines_are_acted_on_does_not_count() {
        let mut book = leading();
        book.start_lease(&lease(7, 2_000));
        pass(1_500).await;
        let mut last = Instant::now();
        pass(60_000).await;
        assert!(book.is_due());
        assert_eq!(book.take_due(&mut last), []);
        assert_eq!(last, Instant::now(), "it is made up for once");
        pass(499).await;
        assert_eq!(book.take_due(&mut last), []);
        pass(1).await;
        assert_eq!(book.take_due(&mut last).len(), 1);
    }

    fn change(state: &mut State, command: Command) -> Vec<Event> {
        let origin = Origin { leader: LEADER, at: Millis(0) };
        let (applied, events) = apply(state, &origin, &command);
        applied.outcome.unwrap();
        events.to_vec()
    }

    /// The table of a worker without an agent.
    fn unwatched() -> (State, WorkerName) {
        let (mut state, name) = (State::default(), WorkerName::parse("w").unwrap());
        let spec = WorkerSpec {
            address: "h".into(),
            labels: Default::default(),
            ranges: vec![RangeSpec {
                name: "s".parse().unwrap(),
                first: Port::new("port", 40_000).unwrap(),
                last: Port::new("port", 40_009).unwrap(),
            }],
            reserved: Default::default(),
            gpus: Vec::new(),
            identity: None,
        };
        change(&mut state, Command::RegisterWorker { name: name.clone(), spec });
        (state, name)
    }

    fn adopted(name: &WorkerName) -> Command {
        let identity = Identity { machine_id: "m".into(), boot_id: "b".into(), namespace: 7 };
        let patch = WorkerPatch { identity: Some(identity), ..Default::default() };
        Command::UpdateWorker { name: name.clone(), patch }
    }

    fn keys(book: &Book) -> Vec<Key> {
        book.deadlines.keys().cloned().collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_an_event_told_of_a_worker_outlives_a_table_that_is_older() {
        let (before, name) = unwatched();
        let quarantine = Command::Quarantine {
            worker: name.clone(),
            ports: vec![Port::new("port", 40_003).unwrap()],
            reason: "in use".into(),
            by: Actor::Leader(LEADER),
        };
        let silent = [Key::Silent(name.clone())];
        let quarantined = [Key::Quarantine(name.clone(), 40_003)];
        for (command, timed) in [(adopted(&name), silent), (quarantine, quarantined)] {
            let (mut book, mut table) = (leading(), before.clone());
            let events = change(&mut table, command);
            events.iter().for_each(|event| book.heed(event));
            book.catch_up(&before);
            assert_eq!(keys(&book), timed);
            // Without an event the table is what counts.
            let mut book = leading();
            book.catch_up(&table);
            assert_eq!(keys(&book), timed);
        }
        // One that is removed is not timed again.
        let mut table = before.clone();
        change(&mut table, adopted(&name));
        let stale = table.clone();
        let remove = Command::RemoveWorker { name, force: None };
        let mut book = leading();
        change(&mut table, remove).iter().for_each(|event| book.heed(event));
        book.catch_up(&stale);
        assert_eq!(keys(&book), []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_is_heard_is_timed_where_it_was_not() {
        let (mut state, name) = unwatched();
        let mut book = leading();
        book.heard(state.worker(&name).unwrap());
        assert_eq!(keys(&book), [], "it has no agent");
        change(&mut state, adopted(&name));
        book.heard(state.worker(&name).unwrap());
        assert_eq!(keys(&book), [Key::Silent(name)]);
    }

    #[test]
    fn who_does_not_lead_renews_nothing() {
        assert_eq!(Book::default().renew(&lease(7, 1_000)), Renewal::NotLeading);
    }
}
