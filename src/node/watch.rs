//! What changed of late, and who wants to hear of it.
//!
//! Every node has its own: it hears of each applied command, and hands on what was published
//! together as one [`Batch`]. The newest are kept, so that a watcher that was cut off goes on where
//! it was.
//!
//! - A watcher begins with what is kept from its revision on, and is registered in the same step:
//!   nothing falls between the two, and nothing comes twice.
//! - `apply` is never held up: what is kept is persistent (to begin costs O(1)), and a watcher's
//!   queue takes references. One that falls [`LAG_MAX_EVENTS`] behind is cut off ([`End::Slow`]).
//! - Who watches one worker costs nothing while other workers change.
//! - Once the table was replaced by a peer's snapshot, what came between is not known: everybody is
//!   cut off ([`End::Gap`]), and nothing before is kept.
//! - What is handed on is applied, so committed: no election takes it back.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use imbl::Vector;
use tokio::sync::{mpsc, watch};

use crate::core::{Applied, Command, Event, Revision, Specs, State, WorkerName};
use crate::raft::ApplyObserver;

/// Events that are kept for watchers that come back.
pub const HISTORY_MAX_EVENTS: usize = 100_000;
/// Events that may wait for one watcher.
pub const LAG_MAX_EVENTS: usize = 50_000;
/// Watchers that one node serves at a time.
pub const WATCHERS_MAX: usize = 4096;

/// All events of one revision, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub revision: Revision,
    pub events: Vec<Event>,
}

/// What was published together; one revision or more, rising.
pub type Batch = Arc<Vec<Group>>;

/// A batch on its way to a watcher.
#[derive(Debug, Clone)]
pub struct Told {
    pub batch: Batch,
    /// Of the workers on which its allocations are, once a watcher asked. Those who are told at the
    /// same time share it.
    specs: Arc<OnceLock<Specs>>,
}

impl Told {
    fn new(batch: Batch) -> Told {
        Told { batch, specs: Arc::default() }
    }

    /// What the workers of its allocations say of themselves: `look` is asked once.
    pub fn specs(&self, look: impl FnOnce(&BTreeSet<&WorkerName>) -> Specs) -> &Specs {
        self.specs.get_or_init(|| {
            let allocations = events(&self.batch).filter_map(Event::allocation);
            look(&allocations.map(|allocation| &allocation.worker).collect())
        })
    }
}

/// Why a watcher hears nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It did not keep up.
    Slow,
    /// The table was replaced.
    Gap,
}

/// Why a watch does not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoWatch {
    /// The first revision that can be had.
    TooOld { oldest: Revision },
    /// [`WATCHERS_MAX`] are there already.
    TooMany,
}

/// Clones share it.
#[derive(Clone)]
pub struct Hub(Arc<Shared>);

struct Shared {
    book: Mutex<Book>,
    /// Everything up to here is in the queues.
    reached: watch::Sender<Revision>,
}

#[derive(Default)]
struct Book {
    /// Oldest first.
    kept: Vector<Batch>,
    kept_events: usize,
    /// Everything after this revision is kept.
    before: Revision,
    /// Applied and not published yet.
    pending: Vec<Group>,
    watchers: BTreeMap<u64, Watcher>,
    /// Of `watchers`: those of one worker, and all others.
    by_worker: BTreeMap<WorkerName, BTreeSet<u64>>,
    of_all: BTreeSet<u64>,
    next_id: u64,
}

struct Watcher {
    worker: Option<WorkerName>,
    queue: mpsc::UnboundedSender<Result<Told, End>>,
    waiting: Arc<AtomicUsize>,
}

/// One watcher's end: what was kept first, then what comes. Leaves when it is dropped.
pub struct Subscription {
    hub: Hub,
    id: u64,
    kept: Vector<Batch>,
    queue: mpsc::UnboundedReceiver<Result<Told, End>>,
    waiting: Arc<AtomicUsize>,
}

fn events(batch: &Batch) -> impl Iterator<Item = &Event> {
    batch.iter().flat_map(|group| &group.events)
}

fn events_of(batch: &Batch) -> usize {
    batch.iter().map(|group| group.events.len()).sum()
}

impl Default for Hub {
    /// Of an empty table.
    fn default() -> Hub {
        let book = Mutex::default();
        Hub(Arc::new(Shared { book, reached: watch::Sender::new(Revision(0)) }))
    }
}

impl Hub {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins with revision `from`. With a worker, batches in which nothing concerns it may be left
    /// out; what else is in the others is for the caller to leave out.
    pub fn subscribe(
        &self,
        from: Revision,
        worker: Option<WorkerName>,
    ) -> Result<Subscription, NoWatch> {
        let mut book = self.book();
        if from <= book.before {
            return Err(NoWatch::TooOld { oldest: Revision(book.before.0 + 1) });
        }
        if book.watchers.len() >= WATCHERS_MAX {
            return Err(NoWatch::TooMany);
        }
        let (queue, arriving) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let id = book.next_id;
        book.next_id += 1;
        match &worker {
            Some(worker) => {
                book.by_worker.entry(worker.clone()).or_default().insert(id);
            }
            None => {
                book.of_all.insert(id);
            }
        }
        book.watchers.insert(id, Watcher { worker, queue, waiting: waiting.clone() });
        let first = book.kept.binary_search_by(|batch| match batch.last() {
            Some(last) if last.revision >= from => Ordering::Greater,
            _ => Ordering::Less,
        });
        let kept = book.kept.skip(first.unwrap_or_else(|first| first));
        Ok(Subscription { hub: self.clone(), id, kept, queue: arriving, waiting })
    }

    /// The first revision that a watch can begin with.
    pub fn oldest(&self) -> Revision {
        Revision(self.book().before.0 + 1)
    }

    /// Returns once everything up to `revision` is in the queues of those who watch.
    pub async fn reached(&self, revision: Revision) {
        let mut reached = self.0.reached.subscribe();
        let _ = reached.wait_for(|at| *at >= revision).await; // this hub has the sender
    }

    pub fn watchers(&self) -> usize {
        self.book().watchers.len()
    }
}

impl Book {
    fn publish(&mut self) {
        let groups = std::mem::take(&mut self.pending);
        if groups.is_empty() {
            return;
        }
        let batch = Arc::new(groups);
        let events = events_of(&batch);
        let concerned: BTreeSet<u64> = match self.by_worker.is_empty() {
            true => BTreeSet::new(),
            false => self::events(&batch)
                .filter_map(worker_of)
                .filter_map(|worker| self.by_worker.get(worker))
                .flatten()
                .copied()
                .collect(),
        };
        let told = Told::new(batch.clone());
        let mut slow = Vec::new();
        for id in self.of_all.iter().chain(&concerned) {
            let Some(watcher) = self.watchers.get(id) else { continue };
            if watcher.waiting.fetch_add(events, Relaxed) + events > LAG_MAX_EVENTS {
                slow.push(*id);
            } else {
                let _ = watcher.queue.send(Ok(told.clone())); // it may have left
            }
        }
        slow.into_iter().for_each(|id| self.end(id, End::Slow));
        self.kept.push_back(batch);
        self.kept_events += events;
        while self.kept_events > HISTORY_MAX_EVENTS
            && let Some(oldest) = self.kept.pop_front()
        {
            self.kept_events -= events_of(&oldest);
            self.before = oldest.last().map_or(self.before, |group| group.revision);
        }
    }

    fn end(&mut self, id: u64, why: End) {
        if let Some(watcher) = self.leave(id) {
            let _ = watcher.queue.send(Err(why)); // it may have left
        }
    }

    fn leave(&mut self, id: u64) -> Option<Watcher> {
        let watcher = self.watchers.remove(&id)?;
        self.of_all.remove(&id);
        if let Some(worker) = &watcher.worker
            && let Some(others) = self.by_worker.get_mut(worker)
        {
            others.remove(&id);
            if others.is_empty() {
                self.by_worker.remove(worker);
            }
        }
        Some(watcher)
    }
}

/// The worker that an event is about.
fn worker_of(event: &Event) -> Option<&WorkerName> {
    match event {
        Event::Worker(worker) => Some(&worker.name),
        Event::WorkerRemoved(name) => Some(name),
        other => other.allocation().map(|allocation| &allocation.worker),
    }
}

impl ApplyObserver for Hub {
    fn applied(&self, _: &Command, applied: &Applied, events: &[Event]) {
        if !events.is_empty() {
            let group = Group { revision: applied.revision, events: events.to_vec() };
            self.book().pending.push(group);
        }
    }

    fn published(&self, state: &State) {
        self.book().publish();
        self.0.reached.send_replace(state.revision);
    }

    fn installed(&self, state: &State) {
        let mut book = self.book();
        let everybody: Vec<_> = book.watchers.keys().copied().collect();
        everybody.into_iter().for_each(|id| book.end(id, End::Gap));
        book.kept.clear();
        book.kept_events = 0;
        book.before = state.revision;
        drop(book);
        self.0.reached.send_replace(state.revision);
    }
}

impl Subscription {
    /// The next batch; waits for it.
    pub async fn next(&mut self) -> Result<Told, End> {
        if let Some(batch) = self.kept.pop_front() {
            return Ok(Told::new(batch));
        }
        let next = self.queue.recv().await;
        // The queue ends only after it said why.
        self.taken(next.unwrap_or(Err(End::Gap)))
    }

    /// The next batch, if it is there.
    pub fn try_next(&mut self) -> Option<Result<Told, End>> {
        if let Some(batch) = self.kept.pop_front() {
            return Some(Ok(Told::new(batch)));
        }
        let next = self.queue.try_recv().ok()?;
        Some(self.taken(next))
    }

    fn taken(&self, next: Result<Told, End>) -> Result<Told, End> {
        if let Ok(told) = &next {
            self.waiting.fetch_sub(events_of(&told.batch), Relaxed);
        }
        next
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.hub.book().leave(self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Outcome, WorkerSpec};

    fn worker(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    /// A change of a worker at this revision.
    fn change(hub: &Hub, name: &str, revision: u64) {
        let command = Command::RegisterWorker { name: worker(name), spec: spec() };
        let revision = Revision(revision);
        let outcome = Ok(Outcome::WorkerRemoved { removed: true });
        let events = [Event::WorkerRemoved(worker(name))];
        hub.applied(&command, &Applied { revision, outcome }, &events);
    }

    fn spec() -> WorkerSpec {
        WorkerSpec {
            address: "h".into(),
            labels: Default::default(),
            ranges: Vec::new(),
            reserved: Default::default(),
            gpus: Vec::new(),
            identity: None,
        }
    }

    fn at(revision: u64) -> State {
        crate::core::Restore::new(1, Revision(revision)).finish().unwrap()
    }

    fn at_revision(revision: u64) -> Hub {
        let hub = Hub::default();
        hub.installed(&at(revision));
        hub
    }

    fn revisions(told: &Told) -> Vec<u64> {
        told.batch.iter().map(|group| group.revision.0).collect()
    }

    fn heard(subscription: &mut Subscription) -> Vec<Vec<u64>> {
        std::iter::from_fn(|| subscription.try_next()).map(|b| revisions(&b.unwrap())).collect()
    }

    #[test]
    fn a_watcher_hears_what_was_kept_and_what_comes_once_each_and_in_order() {
        let hub = at_revision(4);
        change(&hub, "a", 5);
        change(&hub, "b", 6);
        hub.published(&at(6));
        let mut early = hub.subscribe(Revision(5), None).unwrap();
        let mut late = hub.subscribe(Revision(7), None).unwrap();
        change(&hub, "a", 7);
        assert_eq!(heard(&mut early), [[5, 6]], "what is not published is not told");
        hub.published(&at(7));
        assert_eq!(heard(&mut early), [[7]]);
        assert_eq!(heard(&mut late), [[7]]);
        // What comes in one batch with what it asks for is for it to leave out.
        let mut between = hub.subscribe(Revision(6), None).unwrap();
        assert_eq!(heard(&mut between), [vec![5, 6], vec![7]]);
    }

    #[test]
    fn those_who_are_told_together_share_a_look_and_one_who_comes_later_looks_anew() {
        let hub = at_revision(4);
        let mut live = [0; 2].map(|_| hub.subscribe(Revision(5), None).unwrap());
        change(&hub, "a", 5);
        hub.published(&at(5));
        let mut late = hub.subscribe(Revision(5), None).unwrap();
        let looks = std::cell::Cell::new(0);
        let mut looked = |watcher: &mut Subscription| {
            let told = watcher.try_next().unwrap().unwrap();
            told.specs(|_| {
                looks.set(looks.get() + 1);
                Specs::new()
            });
            looks.get()
        };
        assert_eq!(live.each_mut().map(&mut looked), [1, 1]);
        assert_eq!(looked(&mut late), 2);
    }

    #[test]
    fn what_is_not_kept_is_refused_with_the_oldest_that_is() {
        let hub = at_revision(4);
        let refused = hub.subscribe(Revision(4), None).err();
        assert_eq!(refused, Some(NoWatch::TooOld { oldest: Revision(5) }));
        for revision in 5..5 + HISTORY_MAX_EVENTS as u64 + 10 {
            change(&hub, "a", revision);
            hub.published(&at(revision));
        }
        let refused = hub.subscribe(Revision(14), None).err();
        assert_eq!(refused, Some(NoWatch::TooOld { oldest: Revision(15) }));
        assert!(hub.subscribe(Revision(15), None).is_ok());
    }

    #[test]
    fn who_watches_a_worker_is_not_told_of_batches_without_it() {
        let hub = Hub::default();
        let mut of_a = hub.subscribe(Revision(1), Some(worker("a"))).unwrap();
        for (name, revision) in [("a", 1), ("b", 2), ("a", 3)] {
            change(&hub, name, revision);
            hub.published(&at(revision));
        }
        assert_eq!(heard(&mut of_a), [[1], [3]]);
    }

    #[test]
    fn a_slow_watcher_is_cut_off_and_the_others_are_not() {
        let hub = Hub::default();
        let mut slow = hub.subscribe(Revision(1), None).unwrap();
        let mut fast = hub.subscribe(Revision(1), None).unwrap();
        for revision in 1..=LAG_MAX_EVENTS as u64 + 1 {
            change(&hub, "a", revision);
            hub.published(&at(revision));
            assert_eq!(heard(&mut fast), [[revision]]);
        }
        let mut count = 0;
        let end = loop {
            match slow.try_next().unwrap() {
                Ok(told) => count += told.batch.len(),
                Err(end) => break end,
            }
        };
        assert_eq!((count, end), (LAG_MAX_EVENTS, End::Slow));
        assert_eq!(hub.watchers(), 1);
    }

    #[test]
    fn after_an_install_everybody_is_cut_off_and_nothing_before_is_kept() {
        let hub = Hub::default();
        let mut watcher = hub.subscribe(Revision(1), None).unwrap();
        change(&hub, "a", 1);
        hub.published(&at(1));
        hub.installed(&at(90));
        assert_eq!(watcher.try_next().map(|b| revisions(&b.unwrap())), Some(vec![1]));
        assert!(matches!(watcher.try_next(), Some(Err(End::Gap))));
        let refused = hub.subscribe(Revision(2), None).err();
        assert_eq!(refused, Some(NoWatch::TooOld { oldest: Revision(91) }));
    }

    #[test]
    fn one_watcher_more_than_there_may_be_is_refused_until_one_leaves() {
        let hub = Hub::default();
        let mut all: Vec<_> =
            (0..WATCHERS_MAX).map(|_| hub.subscribe(Revision(1), None).unwrap()).collect();
        assert_eq!(hub.subscribe(Revision(1), None).err(), Some(NoWatch::TooMany));
        all.pop();
        assert!(hub.subscribe(Revision(1), None).is_ok());
    }

    #[tokio::test]
    async fn what_was_reached_is_in_the_queues() {
        let hub = Hub::default();
        let mut watcher = hub.subscribe(Revision(1), None).unwrap();
        change(&hub, "a", 1);
        let waiting = hub.clone();
        let reached = tokio::spawn(async move { waiting.reached(Revision(1)).await });
        hub.published(&at(1));
        reached.await.unwrap();
        assert_eq!(heard(&mut watcher), [[1]]);
    }
}
