//! When openraft is asked for the next request of an append stream, and when it is handed an answer.
//!
//! openraft remembers when it was asked for each request. That the follower has all up to some entry, it
//! takes for the answer to every request that ends there or before; when the newest of them was asked
//! for, the follower surely still followed, and linearizable reads rest on that. A request without
//! entries, which tells what is committed, ends where the one before it does. Were it asked for while
//! that one is under way, an answer given before it was even sent would count for it: of a follower
//! that may have voted for another leader since. So:
//!
//! - While anything is under way, nothing is asked for, but that it takes long ([`ASK_AFTER`]): then
//!   entries go without waiting for the answers before, as long as the follower may be sent more: HTTP/2
//!   can neither end nor reset a request that waits for room there.
//! - Where that brings a request without entries, no answer that openraft would take for its own is
//!   handed on before its own has come.
//!
//! Where openraft has always had something to send for a while ([`BUSY_MAX`]), the stream ends, in order, and another
//! one follows it. openraft looks then at what it was told last to send, which it else does when it has nothing:
//! if that is something else by now, what it is answered does not count.
//!
//! When nobody reads the answers any more, the requests are dropped at once. HTTP/2 would go on sending them,
//! and what openraft tells the streams to a follower is heard by one of them alone: the one that is read
//! would never learn that it is to send something else, and openraft would not count what it is answered.
//!
//! And as each commit makes openraft send a request without entries, while under load the next entries
//! come right behind it and tell the same, those go alone then, in half as many messages and answers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures::stream::{self, BoxStream, Stream, StreamExt as _};
use openraft::raft::AppendEntriesRequest;
use tokio::time::{Instant, sleep};

use super::log::READ_BYTES;
use super::network::STREAM_WINDOW_BYTES;
use super::types::{Entry, EntryPayload, TypeConfig};
use crate::lock::guard;

/// How long a follower may wait to be told how far is committed, for entries to tell it with.
const COMMIT_WAIT: Duration = Duration::from_millis(1);
/// How long what was sent last may be without its answer before more is asked for.
const ASK_AFTER: Duration = Duration::from_millis(5);
/// For how long openraft may always have something to send on one stream.
const BUSY_MAX: Duration = Duration::from_secs(10);
/// With as much without an answer nothing is asked for. Another read of the log fits in the follower's window
/// beside it.
const UNDER_WAY_MAX_BYTES: usize = 3 << 20;
/// So many bytes are around each entry.
const AROUND_BYTES: usize = 32;
const _: () = assert!(UNDER_WAY_MAX_BYTES + READ_BYTES < STREAM_WINDOW_BYTES as usize);

type Request = AppendEntriesRequest<TypeConfig>;

/// What one append stream has under way, for whoever reads its answers.
pub(super) struct Flow(Arc<Mutex<UnderWay>>);

#[derive(Default)]
struct UnderWay {
    /// `None`: there are no more.
    requests: Option<BoxStream<'static, Request>>,
    /// `None`: openraft had nothing to send when it was last asked.
    busy_since: Option<Instant>,
    /// Requests that were asked for.
    asked: u64,
    /// Without an answer, the oldest first.
    sent: VecDeque<Sent>,
    /// Of their entries.
    bytes: usize,
    /// Asked for without entries while something was under way, and not answered: where each ends, and
    /// its number. Both rise.
    doubts: VecDeque<(Option<u64>, u64)>,
    /// openraft may not have taken yet what it was handed last.
    hands: bool,
    /// Whoever sends, and whether it waits for what is under way.
    sender: Option<Waker>,
    waits: bool,
}

/// A request that was sent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    /// It stands for all that were asked for up to this one.
    number: u64,
    /// Index of the entry that it ends with.
    last: Option<u64>,
    /// Of its entries.
    bytes: usize,
    pub at: Instant,
    pub has_entries: bool,
}

fn last_index(request: &Request) -> Option<u64> {
    let last = request.entries.last().map(|entry| entry.log_id);
    last.or(request.prev_log_id).map(|at| at.index)
}

fn bytes(request: &Request) -> usize {
    let of = |entry: &Entry| match &entry.payload {
        EntryPayload::Normal(batch) => batch.payload().len(),
        _ => 0,
    };
    request.entries.iter().map(|entry| of(entry) + AROUND_BYTES).sum()
}

impl UnderWay {
    /// From when on the next may be asked for; `None`: now.
    fn asks_at(&self) -> Option<Instant> {
        self.sent.back().map(|latest| latest.at + ASK_AFTER)
    }

    fn take_request(&mut self, request: &Request) {
        self.asked += 1;
        self.busy_since.get_or_insert_with(Instant::now);
        if request.entries.is_empty() && !self.sent.is_empty() {
            self.doubts.push_back((last_index(request), self.asked));
        }
    }

    /// Asks for the next request, if that may be.
    fn poll_ask(&mut self, cx: &mut Context<'_>) -> Asked {
        self.sender = Some(cx.waker().clone());
        let waits_until = self.asks_at().filter(|at| *at > Instant::now());
        let is_full = self.bytes >= UNDER_WAY_MAX_BYTES;
        let may_wait = self.hands || is_full || waits_until.is_some();
        if self.busy_since.is_some_and(|since| since.elapsed() >= BUSY_MAX) {
            self.requests = None;
        }
        let Some(requests) = &mut self.requests else { return Asked::Next(Poll::Ready(None)) };
        let ends = requests.size_hint().1 == Some(0);
        self.waits = !ends && may_wait;
        if self.waits {
            return Asked::Not(waits_until.filter(|_| !is_full));
        }
        let next = requests.poll_next_unpin(cx);
        match &next {
            Poll::Ready(Some(request)) => self.take_request(request),
            Poll::Ready(None) => self.requests = None,
            Poll::Pending => self.busy_since = None,
        }
        Asked::Next(next)
    }

    fn send(&mut self, request: &Request) {
        let (number, last, bytes) = (self.asked, last_index(request), bytes(request));
        let (at, has_entries) = (Instant::now(), !request.entries.is_empty());
        self.bytes += bytes;
        self.sent.push_back(Sent { number, last, bytes, at, has_entries });
    }
}

impl Flow {
    /// Is an answer due?
    pub fn is_due(&self) -> bool {
        !guard(&self.0).sent.is_empty()
    }

    /// Which request the answer that came is to; `None`: to nothing that was sent.
    pub fn answered(&self) -> Option<Sent> {
        let mut under_way = guard(&self.0);
        let sent = under_way.sent.pop_front()?;
        under_way.bytes -= sent.bytes;
        while under_way.doubts.front().is_some_and(|(_, number)| *number <= sent.number) {
            under_way.doubts.pop_front();
        }
        Some(sent)
    }

    /// Of the answers that came, in their order, those that openraft may have now. Nothing is asked for
    /// until it has [taken](Flow::taken) them.
    pub fn hand_on<A>(&self, came: &mut VecDeque<(Sent, A)>) -> VecDeque<A> {
        let mut under_way = guard(&self.0);
        let in_doubt = under_way.doubts.front().copied();
        let may_go = |sent: &Sent| in_doubt.is_none_or(|(last, _)| sent.last < last);
        let mut handed = VecDeque::new();
        while came.front().is_some_and(|(sent, _)| may_go(sent))
            && let Some((_, answer)) = came.pop_front()
        {
            handed.push_back(answer);
        }
        under_way.hands = !handed.is_empty();
        handed
    }

    /// openraft has taken all that it was handed.
    pub fn taken(&self) {
        let sender = {
            let mut under_way = guard(&self.0);
            under_way.hands = false;
            let waits = std::mem::take(&mut under_way.waits);
            under_way.sender.take_if(|_| waits)
        };
        if let Some(sender) = sender {
            sender.wake();
        }
    }
}

/// Nobody reads the answers any more.
impl Drop for Flow {
    fn drop(&mut self) {
        let (requests, sender) = {
            let mut under_way = guard(&self.0);
            (under_way.requests.take(), under_way.sender.take())
        };
        drop(requests);
        if let Some(sender) = sender {
            sender.wake();
        }
    }
}

enum Asked {
    /// It has to wait, until then at most; `None`: until what was handed on is taken, or an answer comes.
    Not(Option<Instant>),
    Next(Poll<Option<Request>>),
}

/// The requests as they are to be sent, as long as there is the [`Flow`].
pub(super) fn paced(
    requests: impl Stream<Item = Request> + Send + 'static,
) -> (impl Stream<Item = Request> + Unpin, Flow) {
    let under_way =
        Arc::new(Mutex::new(UnderWay { requests: Some(requests.boxed()), ..UnderWay::default() }));
    let flow = Flow(under_way.clone());
    let mut held: Option<Request> = None;
    let mut held_for = Box::pin(sleep(COMMIT_WAIT));
    let mut pause = Box::pin(sleep(ASK_AFTER));
    let sent = stream::poll_fn(move |cx| {
        let next = loop {
            // Locked while openraft is asked: no answer is handed on meanwhile.
            let asked = guard(&under_way).poll_ask(cx);
            match asked {
                Asked::Next(Poll::Ready(Some(request))) if request.entries.is_empty() => {
                    if held.replace(request).is_none() {
                        held_for.as_mut().reset(Instant::now() + COMMIT_WAIT);
                    }
                }
                Asked::Next(Poll::Ready(Some(request))) => {
                    held = None;
                    break Some(request);
                }
                Asked::Next(Poll::Ready(None)) => match held.take() {
                    Some(request) => break Some(request),
                    None => return Poll::Ready(None),
                },
                Asked::Next(Poll::Pending) | Asked::Not(None) => break None,
                Asked::Not(Some(until)) => {
                    if pause.deadline() != until {
                        pause.as_mut().reset(until);
                    }
                    if pause.as_mut().poll(cx).is_pending() {
                        break None;
                    }
                }
            }
        };
        match next.or_else(|| held.take_if(|_| held_for.as_mut().poll(cx).is_ready())) {
            Some(request) => {
                guard(&under_way).send(&request);
                Poll::Ready(Some(request))
            }
            None => Poll::Pending,
        }
    });
    (sent, flow)
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};
    use tokio::sync::mpsc;
    use tokio::time::advance;
    use tokio_stream::wrappers::UnboundedReceiverStream;

    use super::*;
    use crate::core::{Command, Millis};
    use crate::raft::types::{Batch, LeaderId, LogId, Vote};

    const SEEDS: u64 = 300;

    fn at(index: u64) -> LogId {
        LogId { leader_id: LeaderId { term: 1, node_id: 1 }, index }
    }

    /// That everything up to `committed` is, with so many entries after `prev`.
    fn request(committed: u64, prev: u64, entries: u64) -> Request {
        let entry = |index| Entry { log_id: at(index), payload: EntryPayload::Blank };
        AppendEntriesRequest {
            vote: Vote::new_committed(1, 1),
            prev_log_id: Some(at(prev)),
            entries: (prev + 1..=prev + entries).map(entry).collect(),
            leader_commit: Some(at(committed)),
        }
    }

    /// A peer that answers what it is sent when it is told to.
    struct Peer {
        flow: Flow,
        came: VecDeque<(Sent, u64)>,
    }

    impl Peer {
        fn new(flow: Flow) -> Peer {
            Peer { flow, came: VecDeque::new() }
        }

        /// Answers the oldest request; what openraft may have then.
        fn answers(&mut self) -> VecDeque<u64> {
            let sent = self.flow.answered().expect("a request");
            self.came.push_back((sent, sent.last.unwrap_or(0)));
            self.flow.hand_on(&mut self.came)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_committed_is_told_with_the_next_entries_or_alone_after_a_moment() {
        let (asks, requests) = mpsc::unbounded_channel();
        let (mut sent, flow) = paced(UnboundedReceiverStream::new(requests));
        let mut peer = Peer::new(flow);
        let began = Instant::now();
        for (committed, entries) in [(1, 1), (2, 0), (3, 0), (3, 1)] {
            asks.send(request(committed, committed, entries)).unwrap();
        }
        let mut next = async |answered: bool| {
            if answered {
                peer.answers();
                peer.flow.taken();
            }
            let request = sent.next().await?;
            let committed = request.leader_commit.map(|at| at.index);
            Some((committed?, request.entries.len(), began.elapsed() >= COMMIT_WAIT))
        };
        assert_eq!(next(false).await, Some((1, 1, false)), "entries never wait");
        assert_eq!(next(true).await, Some((3, 1, false)));
        asks.send(request(4, 4, 0)).unwrap();
        assert_eq!(next(true).await, Some((4, 0, true)));
        asks.send(request(5, 5, 0)).unwrap();
        drop(asks);
        assert_eq!(next(true).await, Some((5, 0, true)), "nothing is lost at the end");
        assert_eq!(next(true).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_asked_for_while_an_answer_is_due_unless_that_takes_long() {
        let (asks, requests) = mpsc::unbounded_channel();
        let (mut sent, flow) = paced(UnboundedReceiverStream::new(requests));
        let mut peer = Peer::new(flow);
        for index in 0..4 {
            asks.send(request(0, index, 1)).unwrap();
        }
        assert!(sent.next().now_or_never().is_some());
        assert!(sent.next().now_or_never().is_none(), "an answer is due");
        assert_eq!(peer.answers(), [1]);
        advance(2 * ASK_AFTER).await;
        assert!(sent.next().now_or_never().is_none(), "openraft may not have it yet");
        peer.flow.taken();
        assert!(sent.next().now_or_never().is_some());
        let began = Instant::now();
        assert!(sent.next().await.is_some(), "its answer takes long");
        assert_eq!(began.elapsed(), ASK_AFTER);
        assert_eq!(peer.answers(), [2]);
        peer.flow.taken();
        // The end of a stream is not waited for.
        drop(asks);
        let (mut one, _flow) = paced(stream::iter([request(0, 0, 1)]));
        assert!(one.next().now_or_never().is_some());
        assert!(matches!(one.next().now_or_never(), Some(None)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_with_always_more_to_send_ends_after_a_while() {
        let more = |index| request(0, index, 1);
        let (sent, flow) = paced(stream::iter((0..4).map(more)).chain(stream::pending()));
        let (mut sent, mut peer) = (sent, Peer::new(flow));
        sent.next().await.unwrap();
        peer.answers();
        peer.flow.taken();
        sent.next().await.unwrap();
        advance(BUSY_MAX).await;
        assert!(sent.next().await.is_none());
        assert_eq!(peer.answers(), [2], "what was sent is answered all the same");

        let (asks, requests) = mpsc::unbounded_channel();
        let (sent, flow) = paced(UnboundedReceiverStream::new(requests));
        let (mut sent, mut peer) = (sent, Peer::new(flow));
        for index in 0..3 {
            asks.send(request(0, index, 1)).unwrap();
            assert!(sent.next().await.is_some(), "there was nothing to send for a moment");
            peer.answers();
            peer.flow.taken();
            assert!(sent.next().now_or_never().is_none());
            advance(BUSY_MAX).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn with_as_much_under_way_as_the_follower_may_be_sent_nothing_is_asked_for() {
        let large = |index| {
            let spec = crate::core::WorkerSpec {
                address: "x".repeat(UNDER_WAY_MAX_BYTES / 2),
                labels: Default::default(),
                ranges: Vec::new(),
                reserved: Default::default(),
                gpus: Vec::new(),
                identity: None,
            };
            let register = Command::RegisterWorker { name: "w1".parse().unwrap(), spec };
            let batch = Batch::new(Millis(0), vec![register]);
            let payload = EntryPayload::Normal(batch);
            let entries = vec![Entry { log_id: at(index + 1), payload }];
            AppendEntriesRequest { entries, ..request(0, index, 0) }
        };
        let (sent, flow) = paced(stream::iter((0..4).map(large)).chain(stream::pending()));
        let (mut sent, mut peer) = (sent, Peer::new(flow));
        for _ in 0..2 {
            sent.next().await.unwrap();
        }
        let next = tokio::time::timeout(BUSY_MAX / 2, sent.next()).await;
        assert!(next.is_err(), "nothing is answered");
        peer.answers();
        assert!(sent.next().now_or_never().is_none(), "openraft may not have it yet");
        peer.flow.taken();
        assert!(sent.next().await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_waits_for_that_of_a_request_without_entries_that_ends_where_its_own_does() {
        let (asks, requests) = mpsc::unbounded_channel();
        let (mut sent, flow) = paced(UnboundedReceiverStream::new(requests));
        let mut peer = Peer::new(flow);
        for (committed, prev, entries) in [(0, 0, 1), (0, 1, 1), (1, 2, 0)] {
            asks.send(request(committed, prev, entries)).unwrap();
            assert!(sent.next().await.is_some());
        }
        assert_eq!(peer.answers(), [1], "nothing else ends there");
        assert!(peer.answers().is_empty());
        assert_eq!(peer.answers(), [2, 2]);
        assert!(!peer.flow.is_due() && peer.came.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_listens_to_the_answers_of_is_asked_for_no_more() {
        let (asks, requests) = mpsc::unbounded_channel();
        let (mut sent, flow) = paced(UnboundedReceiverStream::new(requests));
        asks.send(request(0, 0, 1)).unwrap();
        assert!(sent.next().await.is_some());
        asks.send(request(0, 1, 1)).unwrap();
        let next = tokio::spawn(async move { sent.next().await });
        tokio::task::yield_now().await;
        drop(flow);
        assert!(asks.is_closed(), "also where nobody sends");
        assert!(next.await.unwrap().is_none());
    }

    /// As openraft does: what it was asked for, and which of that an answer counts for.
    #[derive(Default)]
    struct Asked {
        queue: VecDeque<(u64, u64)>,
        count: u64,
    }

    impl Asked {
        fn push(&mut self, request: &Request) {
            self.count += 1;
            self.queue.push_back((self.count, last_index(request).unwrap_or(0)));
        }

        /// The number of the newest.
        fn acknowledged(&mut self, matching: u64) -> Option<u64> {
            let mut newest = None;
            while let Some((number, last)) = self.queue.front().copied()
                && last <= matching
            {
                newest = Some(number);
                self.queue.pop_front();
            }
            newest
        }
    }

    /// Whatever comes when: openraft never takes an answer for one to a request that was asked for after
    /// the newest of those that the follower has answered; and in the end it has all answers.
    #[tokio::test(start_paused = true)]
    async fn no_answer_counts_for_what_the_follower_has_not_answered() {
        let mut doubts = 0;
        for seed in 0..SEEDS {
            println!("seed {seed}");
            let mut rng = StdRng::seed_from_u64(seed);
            let (asks, requests) = mpsc::unbounded_channel::<Request>();
            let asked = Arc::new(Mutex::new(Asked::default()));
            let seen = asked.clone();
            let requests =
                UnboundedReceiverStream::new(requests).inspect(move |r| guard(&seen).push(r));
            let (mut sent, flow) = paced(requests);
            let (mut end, mut committed) = (0, 0);
            let mut came = VecDeque::new();
            let mut steps = rng.random_range(10..200);
            let (mut handed, mut matched, mut proven) = (VecDeque::new(), 0, 0);
            for step in 0.. {
                assert!(step < 100_000, "answers are kept back for ever");
                let more = steps > 0;
                steps -= i32::from(more);
                match rng.random_range(0..8) {
                    0 if more => {
                        let entries = rng.random_range(1..4);
                        asks.send(request(committed, end, entries)).unwrap();
                        end += entries;
                    }
                    1 if more && committed < end => {
                        committed = rng.random_range(committed + 1..=end);
                        asks.send(request(committed, end, 0)).unwrap();
                    }
                    2 | 3 => drop(sent.next().now_or_never()),
                    4 => advance(ASK_AFTER / 2).await,
                    5 if flow.is_due() => {
                        let answered = flow.answered().unwrap();
                        proven = answered.number;
                        came.push_back((answered, answered.last.unwrap_or(0)));
                        handed.extend(flow.hand_on(&mut came));
                    }
                    6 => match handed.pop_front() {
                        Some(matching) => {
                            let counts_for = guard(&asked).acknowledged(matching);
                            assert!(counts_for.is_none_or(|n| n <= proven), "{counts_for:?}");
                            matched = matching;
                        }
                        None => flow.taken(),
                    },
                    _ => {}
                }
                doubts += guard(&flow.0).doubts.len();
                let idle = !flow.is_due() && came.is_empty() && handed.is_empty();
                if !more && idle && matched == end && guard(&asked).queue.is_empty() {
                    break;
                }
            }
        }
        assert!(doubts > 0);
    }
}
