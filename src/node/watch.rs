//! What changed of late, and who wants to hear of it.
//!
//! Every node has its own: it hears of each applied command, and hands on what was published as one
//! [`Batch`]: at once where little happens, and else what came in [`PACE`], for a message costs more
//! than what it says. The newest are kept, so that a watcher that was cut off goes on where it was.
//!
//! - A watcher begins with what is kept from its revision on, and is registered in the same step:
//!   nothing falls between the two, and nothing comes twice.
//! - `apply` waits for no watcher: it leaves word of what changed and goes on, and only hands it on
//!   itself where too much lies there. What is kept is persistent (to begin costs O(1)), and a
//!   watcher's queue takes references. One that falls [`LAG_MAX_EVENTS`] behind is cut off
//!   ([`End::Slow`]), and what waited for it is gone: it could take its time over that too.
//! - Who watches one worker costs nothing while other workers change, and is told of those revisions
//!   alone that concern it.
//! - Once the table was replaced by a peer's snapshot, what came between is not known: everybody is
//!   cut off ([`End::Gap`]), and nothing before is kept.
//! - What is handed on is applied, so committed: no election takes it back.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use imbl::Vector;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::sleep;

use crate::core::{Applied, Command, Event, Revision, Specs, State, WorkerName};
use crate::lock::guard;
use crate::raft::ApplyObserver;

/// Events that are kept for watchers that come back.
pub const HISTORY_MAX_EVENTS: usize = 100_000;
/// Events that may wait for one watcher.
pub const LAG_MAX_EVENTS: usize = 50_000;
/// From one time that watchers are told of what changed to the next.
const PACE: Duration = Duration::from_millis(10);
/// Events that may wait for that: with more, `apply` tells of them itself.
const DUE_MAX_EVENTS: usize = 4096;
/// Watchers that one node serves at a time. Every agent is one, on a connection of its own, of which there are
/// fewer.
pub const WATCHERS_MAX: usize = 65_536;

/// All events of one revision, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub revision: Revision,
    pub events: Arc<[Event]>,
}

/// What is told together; one revision or more, rising.
pub type Batch = Arc<Vec<Group>>;

/// A batch, or what concerns one worker in it, on its way to watchers.
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

/// What a watcher hears.
#[derive(Debug, Clone)]
pub enum Word {
    Told(Told),
    /// It heard all up to here, and the table was here when this was asked last.
    Proven(Revision),
}

/// Why a watcher hears nothing more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It did not keep up.
    Slow,
    /// The table was replaced.
    Gap,
    /// Nobody can say how far the table is.
    Unproven,
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
    /// Locked before `news` where both are.
    book: Mutex<Book>,
    news: Mutex<News>,
    /// Everything up to here is in the queues.
    reached: watch::Sender<Revision>,
    /// There are news.
    due: Notify,
}

/// What is not told yet.
#[derive(Default)]
struct News {
    /// Applied and not published yet.
    pending: Vec<Group>,
    /// Published.
    due: Vec<Group>,
    due_events: usize,
    /// Everything up to here is published.
    published: Revision,
}

#[derive(Default)]
struct Book {
    /// Oldest first.
    kept: Vector<Batch>,
    kept_events: usize,
    /// Everything after this revision is kept.
    before: Revision,
    watchers: BTreeMap<u64, Watcher>,
    /// Of `watchers`: those of one worker, and all others.
    by_worker: BTreeMap<WorkerName, BTreeSet<u64>>,
    of_all: BTreeSet<u64>,
    next_id: u64,
}

struct Watcher {
    worker: Option<WorkerName>,
    queue: mpsc::UnboundedSender<Result<Word, End>>,
    waiting: Arc<Waiting>,
}

/// What a watcher and its subscription both know.
#[derive(Default)]
struct Waiting {
    events: AtomicUsize,
    /// It fell too far behind.
    too_much: AtomicBool,
}

/// One watcher's end: what was kept first, then what comes. Leaves when it is dropped.
pub struct Subscription {
    hub: Hub,
    id: u64,
    kept: Vector<Batch>,
    queue: mpsc::UnboundedReceiver<Result<Word, End>>,
    waiting: Arc<Waiting>,
}

fn events(groups: &[Group]) -> impl Iterator<Item = &Event> {
    groups.iter().flat_map(|group| group.events.iter())
}

fn events_of(groups: &[Group]) -> usize {
    groups.iter().map(|group| group.events.len()).sum()
}

impl Default for Hub {
    /// Of an empty table.
    fn default() -> Hub {
        let (book, news) = Default::default();
        let (reached, due) = (watch::Sender::new(Revision(0)), Notify::new());
        Hub(Arc::new(Shared { book, news, reached, due }))
    }
}

impl Hub {
    fn book(&self) -> MutexGuard<'_, Book> {
        guard(&self.0.book)
    }

    fn news(&self) -> MutexGuard<'_, News> {
        guard(&self.0.news)
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
        let waiting = Arc::<Waiting>::default();
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

    /// Tells all watchers that the table was at `revision`, once that is [reached](Hub::reached).
    pub fn prove(&self, revision: Revision) {
        for watcher in self.book().watchers.values() {
            let _ = watcher.queue.send(Ok(Word::Proven(revision))); // it may have left
        }
    }

    /// Cuts everybody off.
    pub fn end_all(&self, why: End) {
        self.book().end_all(why);
    }

    /// Tells watchers what is due, for as long as it is polled.
    pub async fn run(&self) {
        loop {
            self.0.due.notified().await;
            self.tell(&mut self.book());
            sleep(PACE).await;
        }
    }

    fn tell(&self, book: &mut Book) {
        let (due, published) = self.news().take();
        book.tell(due);
        self.0.reached.send_replace(published);
    }
}

impl News {
    fn take(&mut self) -> (Vec<Group>, Revision) {
        self.due_events = 0;
        (std::mem::take(&mut self.due), self.published)
    }
}

impl Book {
    fn tell(&mut self, groups: Vec<Group>) {
        if groups.is_empty() {
            return;
        }
        let mut by_worker = BTreeMap::<&WorkerName, Vec<Group>>::new();
        for group in groups.iter().filter(|_| !self.by_worker.is_empty()) {
            let workers: BTreeSet<_> = group.events.iter().filter_map(worker_of).collect();
            for worker in workers.into_iter().filter(|name| self.by_worker.contains_key(*name)) {
                by_worker.entry(worker).or_default().push(group.clone());
            }
        }
        let mut slow = Vec::new();
        for (worker, groups) in by_worker {
            slow.extend(self.hand(&self.by_worker[worker], Arc::new(groups)));
        }
        let batch = Arc::new(groups);
        slow.extend(self.hand(&self.of_all, batch.clone()));
        slow.into_iter().for_each(|id| self.end(id, End::Slow));
        self.kept_events += events_of(&batch);
        self.kept.push_back(batch);
        while self.kept_events > HISTORY_MAX_EVENTS
            && let Some(oldest) = self.kept.pop_front()
        {
            self.kept_events -= events_of(&oldest);
            self.before = oldest.last().map_or(self.before, |group| group.revision);
        }
    }

    /// Returns those who have too much waiting.
    fn hand(&self, to: &BTreeSet<u64>, batch: Batch) -> Vec<u64> {
        let events = events_of(&batch);
        let told = Told::new(batch);
        let mut slow = Vec::new();
        for id in to {
            let Some(watcher) = self.watchers.get(id) else { continue };
            if watcher.waiting.events.fetch_add(events, Relaxed) + events > LAG_MAX_EVENTS {
                watcher.waiting.too_much.store(true, Relaxed);
                slow.push(*id);
            } else {
                let _ = watcher.queue.send(Ok(Word::Told(told.clone()))); // it may have left
            }
        }
        slow
    }

    fn end_all(&mut self, why: End) {
        let everybody: Vec<_> = self.watchers.keys().copied().collect();
        everybody.into_iter().for_each(|id| self.end(id, why));
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
            let group = Group { revision: applied.revision, events: events.into() };
            self.news().pending.push(group);
        }
    }

    fn published(&self, state: &State) {
        let mut news = self.news();
        let News { pending, due, due_events, published } = &mut *news;
        *published = state.revision;
        *due_events += events_of(pending);
        due.append(pending);
        let too_much = *due_events > DUE_MAX_EVENTS;
        drop(news);
        match too_much {
            true => self.tell(&mut self.book()),
            false => self.0.due.notify_one(),
        }
    }

    fn installed(&self, state: &State) {
        let mut book = self.book();
        self.tell(&mut book);
        book.end_all(End::Gap);
        book.kept.clear();
        book.kept_events = 0;
        book.before = state.revision;
        self.news().published = state.revision;
        self.tell(&mut book);
    }
}

impl Subscription {
    /// The next word; waits for it.
    pub async fn next(&mut self) -> Result<Word, End> {
        if self.waiting.too_much.load(Relaxed) {
            self.kept.clear();
            self.queue.close();
            while self.queue.try_recv().is_ok() {}
            return Err(End::Slow);
        }
        if let Some(batch) = self.kept.pop_front() {
            return Ok(Word::Told(Told::new(batch)));
        }
        // The queue ends only after it said why.
        let next = self.queue.recv().await.unwrap_or(Err(End::Gap));
        if let Ok(Word::Told(told)) = &next {
            self.waiting.events.fetch_sub(events_of(&told.batch), Relaxed);
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
    use futures::FutureExt as _;

    use super::*;
    use crate::core::{Outcome, WorkerSpec};

    fn worker(name: &str) -> WorkerName {
        name.parse().unwrap()
    }

    /// A change of a worker at this revision.
    fn change(hub: &Hub, name: &str, revision: u64) {
        changes(hub, &[name], revision);
    }

    fn changes(hub: &Hub, names: &[&str], revision: u64) {
        let command = Command::RegisterWorker { name: worker(names[0]), spec: spec() };
        let revision = Revision(revision);
        let outcome = Ok(Outcome::WorkerRemoved { removed: true });
        let events: Vec<_> = names.iter().map(|name| Event::WorkerRemoved(worker(name))).collect();
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

    /// Publishes, and tells at once.
    fn publish(hub: &Hub, revision: u64) {
        hub.published(&at(revision));
        hub.tell(&mut hub.book());
    }

    fn at_revision(revision: u64) -> Hub {
        let hub = Hub::default();
        hub.installed(&at(revision));
        hub
    }

    fn revisions(told: &Told) -> Vec<u64> {
        told.batch.iter().map(|group| group.revision.0).collect()
    }

    /// What was told, and then the end, where there is one already.
    fn all(subscription: &mut Subscription) -> (Vec<Told>, Option<End>) {
        let mut all = Vec::new();
        loop {
            match subscription.next().now_or_never() {
                Some(Ok(Word::Told(told))) => all.push(told),
                Some(Ok(Word::Proven(revision))) => panic!("{revision} is proven"),
                Some(Err(end)) => return (all, Some(end)),
                None => return (all, None),
            }
        }
    }

    fn heard(subscription: &mut Subscription) -> Vec<Vec<u64>> {
        let (told, end) = all(subscription);
        assert_eq!(end, None);
        told.iter().map(revisions).collect()
    }

    #[test]
    fn a_watcher_hears_what_was_kept_and_what_comes_once_each_and_in_order() {
        let hub = at_revision(4);
        change(&hub, "a", 5);
        change(&hub, "b", 6);
        publish(&hub, 6);
        let mut early = hub.subscribe(Revision(5), None).unwrap();
        let mut late = hub.subscribe(Revision(7), None).unwrap();
        change(&hub, "a", 7);
        assert_eq!(heard(&mut early), [[5, 6]], "what is not published is not told");
        publish(&hub, 7);
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
        publish(&hub, 5);
        let mut late = hub.subscribe(Revision(5), None).unwrap();
        let looks = std::cell::Cell::new(0);
        let mut looked = |watcher: &mut Subscription| {
            all(watcher).0[0].specs(|_| {
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
            publish(&hub, revision);
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
            publish(&hub, revision);
        }
        assert_eq!(heard(&mut of_a), [[1], [3]]);
        // Nor of what else is told at the same time, and once of a revision that it is in twice.
        let mut of_b = hub.subscribe(Revision(4), Some(worker("b"))).unwrap();
        let mut of_all = hub.subscribe(Revision(4), None).unwrap();
        change(&hub, "b", 4);
        changes(&hub, &["a", "b", "a"], 5);
        change(&hub, "a", 6);
        publish(&hub, 6);
        assert_eq!(heard(&mut of_a), [[5, 6]]);
        assert_eq!(heard(&mut of_b), [[4, 5]]);
        assert_eq!(heard(&mut of_all), [[4, 5, 6]]);
    }

    #[test]
    fn a_slow_watcher_is_cut_off_and_the_others_are_not() {
        let hub = Hub::default();
        let mut slow = hub.subscribe(Revision(1), None).unwrap();
        let mut fast = hub.subscribe(Revision(1), None).unwrap();
        for revision in 1..=LAG_MAX_EVENTS as u64 + 1 {
            change(&hub, "a", revision);
            publish(&hub, revision);
            assert_eq!(heard(&mut fast), [[revision]]);
        }
        let (told, end) = all(&mut slow);
        assert_eq!((told.len(), end), (0, Some(End::Slow)), "nothing more to take its time over");
        assert_eq!(hub.watchers(), 1);
    }

    #[test]
    fn after_an_install_everybody_is_cut_off_and_nothing_before_is_kept() {
        let hub = Hub::default();
        let mut watcher = hub.subscribe(Revision(1), None).unwrap();
        change(&hub, "a", 1);
        publish(&hub, 1);
        hub.installed(&at(90));
        let (told, end) = all(&mut watcher);
        assert_eq!((revisions(&told[0]), end), (vec![1], Some(End::Gap)));
        let refused = hub.subscribe(Revision(2), None).err();
        assert_eq!(refused, Some(NoWatch::TooOld { oldest: Revision(91) }));
    }

    #[test]
    fn what_is_proven_comes_after_what_was_told() {
        let hub = Hub::default();
        let mut watchers =
            [None, Some(worker("b"))].map(|worker| hub.subscribe(Revision(1), worker).unwrap());
        change(&hub, "a", 1);
        publish(&hub, 1);
        hub.prove(Revision(1));
        let mut next = |i: usize| watchers[i].next().now_or_never().unwrap();
        assert!(matches!(next(0), Ok(Word::Told(_))));
        assert!(matches!(next(0), Ok(Word::Proven(Revision(1)))));
        assert!(matches!(next(1), Ok(Word::Proven(Revision(1)))));
        // What was kept comes before it too.
        let mut again = hub.subscribe(Revision(1), None).unwrap();
        hub.prove(Revision(1));
        let mut next = || again.next().now_or_never().unwrap();
        assert!(matches!(next(), Ok(Word::Told(_))));
        assert!(matches!(next(), Ok(Word::Proven(Revision(1)))));
        for watcher in &mut watchers {
            assert!(matches!(watcher.next().now_or_never(), Some(Ok(Word::Proven(_)))));
        }
        hub.end_all(End::Unproven);
        assert_eq!(watchers.each_mut().map(|w| all(w).1), [Some(End::Unproven); 2]);
        assert_eq!(hub.watchers(), 0);
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

    #[tokio::test(start_paused = true)]
    async fn what_comes_at_once_is_told_at_once_and_then_together_once_in_a_while() {
        let hub = Hub::default();
        let mut watcher = hub.subscribe(Revision(1), None).unwrap();
        let running = hub.clone();
        tokio::spawn(async move { running.run().await });
        let mut heard = async |revision: u64| {
            change(&hub, "a", revision);
            hub.published(&at(revision));
            tokio::task::yield_now().await;
            heard(&mut watcher)
        };
        assert_eq!(heard(1).await, [[1]]);
        assert!(heard(2).await.is_empty());
        assert!(heard(3).await.is_empty());
        sleep(PACE * 3 / 2).await;
        assert_eq!(heard(4).await, [[2, 3]], "4 is for the next time");
        sleep(PACE * 10).await;
        assert_eq!(heard(5).await, [[4], [5]]);
    }

    #[test]
    fn more_than_may_wait_is_told_at_once() {
        let hub = Hub::default();
        let mut watcher = hub.subscribe(Revision(1), None).unwrap();
        let more = DUE_MAX_EVENTS as u64 + 1;
        for revision in 1..=more {
            assert!(heard(&mut watcher).is_empty());
            change(&hub, "a", revision);
            hub.published(&at(revision));
        }
        assert_eq!(heard(&mut watcher), [(1..=more).collect::<Vec<_>>()]);
    }

    #[tokio::test]
    async fn what_was_reached_is_in_the_queues() {
        let hub = Hub::default();
        let mut watcher = hub.subscribe(Revision(1), None).unwrap();
        change(&hub, "a", 1);
        let waiting = hub.clone();
        let mut reached = std::pin::pin!(waiting.reached(Revision(1)));
        hub.published(&at(1));
        assert!(reached.as_mut().now_or_never().is_none(), "it is published, and not told");
        hub.tell(&mut hub.book());
        assert!(reached.now_or_never().is_some());
        assert_eq!(heard(&mut watcher), [[1]]);
    }
}
