//! Keeps leases alive: any number of them over one stream.
//!
//! In the steady state a lease is renewed each time a third of its TTL has passed; answers come back
//! in the order of the requests, so that a queue of what is under way tells whose they are. A stream
//! that breaks, or on which an answer is overdue, is given up for the next endpoint, and what was
//! under way on it is asked again there.
//!
//! What the holder of a lease may rely on is its [`Standing`]:
//!
//! - its time is counted from when the last acknowledged request was *sent*: the cluster's clock
//!   for it started after that, so it ends no sooner;
//! - once that time is over it is `Unproven`: the cluster may have ended it. A later answer may prove
//!   it again, as a new leader gives every lease its full time;
//! - `Gone` is the cluster's word, and final: an id is never used again.
//!
//! At most one request of a lease is under way, and at most [`ASKED_AT_ONCE`] on a stream: what is due beyond
//! that waits its turn, the longest due first. So a node that answers at all answers everybody, and none is
//! given up for the length of the queue.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;

use super::call::{Tour, by};
use super::endpoints::Door;
use super::error::{Verdict, judge};
use super::{Client, ClientError};
use crate::proto::v1;

const PATH: &str = "/portwarden.v1.Leases/KeepAlive";
/// A lease is renewed when this part of its TTL has passed since the last request.
const RENEWALS_PER_TTL: u32 = 3;
/// Requests on a stream that are not answered yet: as many as a node serves of one at a time.
const ASKED_AT_ONCE: usize = 256;
/// Least time for an answer; twice as long after each that was overdue, up to that of any attempt.
const ANSWER_MIN: Duration = Duration::from_millis(500);
/// Longest sleep: a clock that counts a suspension may have jumped.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Time since some start. Where a suspended machine must not trust a lease that ended meanwhile, it
/// counts the suspension too; the runtime's does not.
pub type Clock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// What its holder knows of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// To be relied on until then, by the keeper's clock.
    Held { until: Duration },
    /// Not kept alive in time, or never yet: the cluster may have ended it.
    Unproven,
    /// It has ended.
    Gone,
}

/// Clones keep over the same stream. Ends with the last clone and the last [`Holding`].
#[derive(Clone)]
pub struct Keeper {
    client: Client,
    clock: Clock,
    orders: mpsc::UnboundedSender<Order>,
}

/// A lease that is being kept, until this is dropped, and whoever else holds it through the same keeper:
/// then it expires, unless it is revoked.
pub struct Holding {
    id: u64,
    ttl: Duration,
    standing: watch::Receiver<Standing>,
    orders: mpsc::UnboundedSender<Order>,
    /// Nobody keeps it any more, and that was told.
    alone: bool,
}

enum Order {
    Keep { id: u64, ttl: Duration, standing: watch::Sender<Standing> },
    Forget { id: u64, standing: watch::Receiver<Standing> },
}

impl Keeper {
    /// Counts by the runtime's clock.
    pub fn start(client: Client) -> Self {
        let started = Instant::now();
        Self::start_with(client, Arc::new(move || started.elapsed()))
    }

    pub fn start_with(client: Client, clock: Clock) -> Self {
        let (orders, taken) = mpsc::unbounded_channel();
        let tour = client.tour();
        let line = Line::down(&client, tour.door(), Duration::ZERO);
        let book = Book::new(clock.clone());
        tokio::spawn(Work { client: client.clone(), tour, line, overdue: 0, book }.run(taken));
        Keeper { client, clock, orders }
    }

    /// Now, by the clock of every [`Standing`].
    pub fn now(&self) -> Duration {
        (self.clock)()
    }

    /// Grants a lease and keeps it.
    pub async fn grant(&self, ttl: Duration) -> Result<Holding, ClientError> {
        let sent = self.now();
        let lease = self.client.lease_grant(ttl).await?.lease.unwrap_or_default();
        let ttl = Duration::from_millis(lease.ttl_ms);
        Ok(self.hold(lease.id, ttl, Standing::Held { until: sent + ttl }))
    }

    /// Keeps a lease that was granted elsewhere.
    pub fn keep(&self, lease: &v1::Lease) -> Holding {
        self.hold(lease.id, Duration::from_millis(lease.ttl_ms), Standing::Unproven)
    }

    fn hold(&self, id: u64, ttl: Duration, known: Standing) -> Holding {
        let (tell, standing) = watch::channel(known);
        // Without a task to take it nothing proves the lease, and it says so.
        let _ = self.orders.send(Order::Keep { id, ttl, standing: tell });
        Holding { id, ttl, standing, orders: self.orders.clone(), alone: false }
    }
}

impl Holding {
    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    pub fn standing(&self) -> Standing {
        *self.standing.borrow()
    }

    /// Waits until its standing is another one than was last seen here; a renewal is one.
    pub async fn changed(&mut self) -> Standing {
        match self.standing.changed().await {
            Ok(()) => *self.standing.borrow_and_update(),
            // Gone is its last word. Else the runtime is going down, and nobody keeps it.
            Err(_) if self.alone || self.standing() == Standing::Gone => {
                std::future::pending().await
            }
            Err(_) => {
                self.alone = true;
                Standing::Unproven
            }
        }
    }

    /// Waits until it cannot be relied on any more.
    pub async fn lost(&mut self) -> Standing {
        let mut standing = self.standing();
        while let Standing::Held { .. } = standing {
            standing = self.changed().await;
        }
        standing
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let (id, standing) = (self.id, self.standing.clone());
        let _ = self.orders.send(Order::Forget { id, standing });
    }
}

/// The leases, when each must be looked at next, and which of them wait to be asked, since when.
struct Book {
    clock: Clock,
    leases: BTreeMap<u64, Kept>,
    queue: BTreeSet<(Duration, u64)>,
    waiting: BTreeSet<(Duration, u64)>,
}

struct Kept {
    ttl: Duration,
    standing: Standing,
    /// Of each that holds it.
    tell: Vec<watch::Sender<Standing>>,
    next: Next,
    /// Its place in the queue.
    look_at: Duration,
}

/// The next request for a lease.
#[derive(Clone, Copy)]
enum Next {
    At(Duration),
    UnderWay,
    /// As soon as there is a line, and room on it: since it was due.
    Waiting(Duration),
}

impl Kept {
    fn stands(&mut self, standing: Standing) {
        self.standing = standing;
        for holding in &self.tell {
            holding.send_replace(standing);
        }
    }

    /// The next moment at which something about it changes by itself.
    fn next_look(&self) -> Duration {
        let end = match self.standing {
            Standing::Held { until } => until,
            _ => Duration::MAX,
        };
        match self.next {
            Next::At(due) => end.min(due),
            Next::UnderWay | Next::Waiting(_) => end,
        }
    }
}

impl Book {
    fn new(clock: Clock) -> Self {
        let (queue, waiting) = Default::default();
        Book { clock, leases: BTreeMap::new(), queue, waiting }
    }

    fn put(&mut self, id: u64, mut kept: Kept) {
        kept.look_at = kept.next_look();
        self.queue.insert((kept.look_at, id));
        if let Next::Waiting(since) = kept.next {
            self.waiting.insert((since, id));
        }
        self.leases.insert(id, kept);
    }

    fn take(&mut self, id: u64) -> Option<Kept> {
        let kept = self.leases.remove(&id)?;
        self.queue.remove(&(kept.look_at, id));
        if let Next::Waiting(since) = kept.next {
            self.waiting.remove(&(since, id));
        }
        Some(kept)
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Keep { id, ttl, standing } => {
                if let Some(mut kept) = self.take(id) {
                    standing.send_replace(kept.standing);
                    kept.tell.push(standing);
                    return self.put(id, kept);
                }
                let known = *standing.borrow();
                let due = match known {
                    Standing::Held { until } => until.saturating_sub(ttl) + ttl / RENEWALS_PER_TTL,
                    _ => Duration::ZERO,
                };
                let (next, look_at) = (Next::At(due), Duration::ZERO);
                self.put(id, Kept { ttl, standing: known, tell: vec![standing], next, look_at });
            }
            Order::Forget { id, standing } => {
                let Some(mut kept) = self.take(id) else { return };
                kept.tell.retain(|holding| !holding.subscribe().same_channel(&standing));
                if !kept.tell.is_empty() {
                    self.put(id, kept);
                }
            }
        }
    }

    /// Leases whose time is over are no longer proven. Of those that are to be renewed as many as there is
    /// room for are under way from here on, and returned with their TTLs; the others wait.
    fn look(&mut self, room: usize) -> Vec<(u64, Duration)> {
        let now = (self.clock)();
        while let Some((at, id)) = self.queue.first().copied()
            && at <= now
            && let Some(mut kept) = self.take(id)
        {
            if matches!(kept.standing, Standing::Held { until } if until <= now) {
                kept.stands(Standing::Unproven);
            }
            if let Next::At(due) = kept.next
                && due <= now
            {
                kept.next = Next::Waiting(due);
            }
            self.put(id, kept);
        }
        let asked: Vec<u64> = self.waiting.iter().take(room).map(|(_, id)| *id).collect();
        asked.into_iter().filter_map(|id| self.asked(id)).collect()
    }

    fn asked(&mut self, id: u64) -> Option<(u64, Duration)> {
        let kept = self.take(id)?;
        let ttl = kept.ttl;
        self.put(id, Kept { next: Next::UnderWay, ..kept });
        Some((id, ttl))
    }

    /// When [`Book::look`] has something to do next.
    fn next_look(&self) -> Option<Duration> {
        self.queue.first().map(|(at, _)| *at)
    }

    fn answered(&mut self, id: u64, sent: Duration, ttl_ms: u64) {
        // It may have been forgotten meanwhile.
        let Some(mut kept) = self.take(id) else { return };
        if ttl_ms == 0 {
            return kept.stands(Standing::Gone);
        }
        let ttl = Duration::from_millis(ttl_ms);
        let until = sent + ttl;
        let proven = until > (self.clock)();
        kept.stands(if proven { Standing::Held { until } } else { Standing::Unproven });
        self.put(id, Kept { ttl, next: Next::At(sent + ttl / RENEWALS_PER_TTL), ..kept });
    }

    /// What was under way on a line that is gone waits for the next one, each since it was sent.
    fn line_went_down(&mut self, under_way: impl IntoIterator<Item = (u64, Duration)>) {
        for (id, sent) in under_way {
            let Some(kept) = self.take(id) else { continue };
            self.put(id, Kept { next: Next::Waiting(sent), ..kept });
        }
    }
}

type Opening = Pin<Box<dyn Future<Output = Result<Box<Up>, Verdict>> + Send>>;

/// The way to the cluster.
enum Line {
    Down(Opening),
    Up(Box<Up>),
}

struct Up {
    requests: mpsc::UnboundedSender<v1::KeepAliveRequest>,
    answers: Streaming<v1::KeepAliveResponse>,
    /// Oldest first.
    under_way: VecDeque<Sent>,
    /// When the last answer came.
    answered: Instant,
}

struct Sent {
    id: u64,
    /// By the book's clock.
    sent: Duration,
    at: Instant,
    /// Its answer is overdue when none has come for so long since it was sent.
    wait: Duration,
}

enum News {
    Opened(Box<Up>),
    Answer {
        id: u64,
        sent: Duration,
        ttl_ms: u64,
    },
    Broken(Verdict),
    /// An answer has not come in time.
    Overdue,
}

impl Line {
    fn down(client: &Client, door: &Arc<Door>, pause: Duration) -> Self {
        let (client, door) = (client.clone(), door.clone());
        Line::Down(Box::pin(async move {
            sleep(pause).await;
            let (requests, taken) = mpsc::unbounded_channel();
            let answers = client.open(PATH, &door, UnboundedReceiverStream::new(taken)).await?;
            let (under_way, answered) = (VecDeque::new(), Instant::now());
            Ok(Box::new(Up { requests, answers, under_way, answered }))
        }))
    }

    /// What happens next on it. May be dropped and called again.
    async fn next(&mut self) -> News {
        match self {
            Line::Down(opening) => match opening.await {
                Ok(up) => News::Opened(up),
                Err(verdict) => News::Broken(verdict),
            },
            Line::Up(up) => up.next().await,
        }
    }
}

impl Up {
    async fn next(&mut self) -> News {
        let broken = |why: &str| News::Broken(Verdict::Doubtful { why: why.into() });
        let overdue = self.under_way.front().map(|front| self.answered.max(front.at) + front.wait);
        let late = async move {
            match overdue {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            answer = self.answers.message() => match answer {
                Err(status) => News::Broken(judge(status)),
                Ok(None) => broken("the stream has ended"),
                Ok(Some(v1::KeepAliveResponse { id, ttl_ms })) => {
                    self.answered = Instant::now();
                    match self.under_way.pop_front() {
                        Some(asked) if asked.id == id => {
                            News::Answer { id, sent: asked.sent, ttl_ms }
                        }
                        _ => broken("an answer to something that was not asked"),
                    }
                }
            },
            () = late => News::Overdue,
        }
    }
}

struct Work {
    client: Client,
    tour: Tour,
    line: Line,
    /// Answers that were overdue since the last that came.
    overdue: u32,
    book: Book,
}

impl Work {
    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            // Without a lease there is no need of a line.
            if self.book.leases.is_empty() {
                match orders.recv().await {
                    Some(order) => self.book.obey(order),
                    None => return,
                }
                continue;
            }
            let now = (self.book.clock)();
            let wake = self.book.next_look().map_or(LOOK_EVERY, |at| at.saturating_sub(now));
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.book.obey(order),
                    None => return,
                },
                news = self.line.next() => self.heed(news),
                () = sleep(wake.min(LOOK_EVERY)) => {}
            }
            self.renew();
        }
    }

    fn heed(&mut self, news: News) {
        match news {
            News::Opened(up) => self.line = Line::Up(up),
            News::Answer { id, sent, ttl_ms } => {
                self.tour.answered();
                self.overdue = 0;
                self.book.answered(id, sent, ttl_ms);
            }
            News::Broken(verdict) => self.give_up(verdict),
            News::Overdue => {
                self.overdue += 1;
                self.give_up(Verdict::Doubtful { why: "an answer is overdue".into() });
            }
        }
    }

    fn give_up(&mut self, verdict: Verdict) {
        let (why, asked_pause) = match verdict {
            Verdict::NotDone { why, pause } => (why, pause),
            Verdict::Doubtful { why } => (why, None),
            Verdict::Refused(refused) => (refused.status.message().to_string(), None),
        };
        tracing::debug!(why = by(self.tour.door(), why), "no way to keep leases alive");
        let pause = self.tour.move_on(asked_pause);
        let next = Line::down(&self.client, self.tour.door(), pause);
        if let Line::Up(up) = std::mem::replace(&mut self.line, next) {
            self.book.line_went_down(up.under_way.into_iter().map(|sent| (sent.id, sent.sent)));
        }
    }

    fn renew(&mut self) {
        let Line::Up(up) = &mut self.line else {
            self.book.look(0);
            return;
        };
        let due = self.book.look(ASKED_AT_ONCE.saturating_sub(up.under_way.len()));
        let (sent, at) = ((self.book.clock)(), Instant::now());
        let (longest, overdue) = (self.client.shared.attempt_timeout, self.overdue.min(8));
        for (id, ttl) in due {
            // Another node is to be asked while there is still time for it to answer.
            let wait = (ttl / RENEWALS_PER_TTL).max(ANSWER_MIN).saturating_mul(1 << overdue);
            up.under_way.push_back(Sent { id, sent, at, wait: wait.min(longest) });
            // Where nobody takes it any more, the stream tells in a moment.
            let _ = up.requests.send(v1::KeepAliveRequest { id });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const TTL: Duration = Duration::from_secs(9);
    const ALL: usize = ASKED_AT_ONCE;

    /// A book whose clock shows the seconds that are set.
    fn book() -> (Book, Arc<AtomicU64>) {
        let seconds = Arc::new(AtomicU64::new(0));
        let shown = seconds.clone();
        let clock: Clock = Arc::new(move || Duration::from_secs(shown.load(Ordering::Relaxed)));
        (Book::new(clock), seconds)
    }

    fn keep(book: &mut Book, id: u64, known: Standing) -> watch::Receiver<Standing> {
        let (standing, seen) = watch::channel(known);
        book.obey(Order::Keep { id, ttl: TTL, standing });
        seen
    }

    fn held(until: u64) -> Standing {
        Standing::Held { until: Duration::from_secs(until) }
    }

    #[test]
    fn a_lease_is_renewed_each_third_of_its_time_once_at_a_time() {
        let (mut book, clock) = book();
        let seen = keep(&mut book, 7, held(9));
        assert!(book.look(ALL).is_empty());
        clock.store(3, Ordering::Relaxed);
        assert_eq!(book.look(ALL), [(7, TTL)]);
        assert!(book.look(ALL).is_empty(), "it is under way");
        clock.store(5, Ordering::Relaxed);
        book.answered(7, Duration::from_secs(3), 9_000);
        assert_eq!(*seen.borrow(), held(12), "counted from when it was sent");
        assert_eq!(book.next_look(), Some(Duration::from_secs(6)));
    }

    #[test]
    fn a_lease_whose_time_is_over_is_unproven_until_an_answer_that_is_young_enough() {
        let (mut book, clock) = book();
        let seen = keep(&mut book, 7, held(9));
        clock.store(3, Ordering::Relaxed);
        assert_eq!(book.look(ALL), [(7, TTL)]);
        clock.store(9, Ordering::Relaxed);
        book.look(ALL);
        assert_eq!(*seen.borrow(), Standing::Unproven);
        clock.store(12, Ordering::Relaxed);
        book.answered(7, Duration::from_secs(3), 9_000);
        assert_eq!(*seen.borrow(), Standing::Unproven, "what it proves is over already");
        assert_eq!(book.look(ALL), [(7, TTL)]);
        book.answered(7, Duration::from_secs(12), 9_000);
        assert_eq!(*seen.borrow(), held(21));
    }

    #[test]
    fn what_was_under_way_on_a_broken_line_is_asked_again_on_the_next() {
        let (mut book, clock) = book();
        for id in [7, 8] {
            keep(&mut book, id, Standing::Unproven);
        }
        assert!(book.look(0).is_empty(), "there is no line yet");
        assert_eq!(book.next_look(), Some(Duration::MAX), "and nothing to do until there is");
        assert_eq!(book.look(ALL), [(7, TTL), (8, TTL)]);
        book.answered(7, Duration::ZERO, 9_000);
        clock.store(1, Ordering::Relaxed);
        book.line_went_down([(8, Duration::ZERO)]);
        assert_eq!(book.look(ALL), [(8, TTL)], "7 was answered, and is not due");
    }

    /// Of more than a node answers in the time of one, all get their turn, whatever their ids.
    #[test]
    fn what_is_due_beyond_the_room_waits_and_the_longest_due_is_asked_first() {
        let (mut book, clock) = book();
        keep(&mut book, 9, held(9));
        clock.store(3, Ordering::Relaxed);
        for id in [5, 6, 7] {
            keep(&mut book, id, held(10));
        }
        assert_eq!(book.look(0), []);
        clock.store(4, Ordering::Relaxed);
        assert_eq!(book.look(2), [(9, TTL), (5, TTL)]);
        clock.store(5, Ordering::Relaxed);
        // The line is lost with one of them answered: the other waits behind those that have not been asked.
        book.answered(9, Duration::from_secs(4), 9_000);
        book.line_went_down([(5, Duration::from_secs(5))]);
        assert_eq!(book.look(2), [(6, TTL), (7, TTL)]);
        assert_eq!(book.look(1), [(5, TTL)]);
        assert_eq!(book.look(ALL), []);
    }

    #[test]
    fn what_is_gone_or_forgotten_is_asked_no_more() {
        let (mut book, _) = book();
        let seen = keep(&mut book, 7, Standing::Unproven);
        let other = keep(&mut book, 8, Standing::Unproven);
        assert_eq!(book.look(ALL), [(7, TTL), (8, TTL)]);
        book.answered(7, Duration::ZERO, 0);
        assert_eq!(*seen.borrow(), Standing::Gone);
        book.obey(Order::Forget { id: 8, standing: other });
        book.answered(8, Duration::ZERO, 9_000);
        assert!(book.leases.is_empty() && book.queue.is_empty() && book.waiting.is_empty());
    }

    #[test]
    fn a_lease_that_is_held_twice_is_kept_once_and_until_both_are_gone() {
        let (mut book, _) = book();
        let seen = [(); 2].map(|()| keep(&mut book, 7, Standing::Unproven));
        assert_eq!(book.look(ALL), [(7, TTL)]);
        book.answered(7, Duration::ZERO, 9_000);
        for seen in &seen {
            assert_eq!(*seen.borrow(), held(9));
        }
        let late = keep(&mut book, 7, Standing::Unproven);
        assert_eq!(*late.borrow(), held(9), "what is known is told");
        for seen in seen {
            book.obey(Order::Forget { id: 7, standing: seen });
            assert!(book.leases.contains_key(&7));
        }
        book.obey(Order::Forget { id: 7, standing: late });
        assert!(book.leases.is_empty() && book.queue.is_empty() && book.waiting.is_empty());
    }

    #[tokio::test]
    async fn that_nobody_keeps_it_any_more_is_told_once() {
        use futures::FutureExt as _;
        let (tell, standing) = watch::channel(held(9));
        let (orders, _) = mpsc::unbounded_channel();
        let mut holding = Holding { id: 7, ttl: TTL, standing, orders, alone: false };
        drop(tell);
        assert_eq!(holding.changed().await, Standing::Unproven);
        assert!(holding.changed().now_or_never().is_none());
    }
}
