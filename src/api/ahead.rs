//! Streams of calls: how far they are worked on ahead of whoever reads the answers.
//!
//! Messages are worked on side by side, and their answers wait in order until they are taken. A client may
//! not read, and what sends to it is not polled then. So the work is a task of its own, which the stream
//! takes along when it is dropped: a call that has begun comes to its answer or its deadline, and holds
//! nothing afterwards but the answer.
//!
//! - A message is begun only while fewer than so many are not taken yet. A few commands may have large
//!   answers: so what waits, and what is under way if it becomes as large as the last answer, is within
//!   a bound as well. One message may always be under way.
//! - Messages are read where the answers are sent: whoever takes none has no more of them begun.
//! - Where answers wait and none is taken for [`SEND_MAX`], all go, and the stream ends with an error.

use std::collections::VecDeque;
use std::future::ready;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use futures::stream::{self, FuturesOrdered};
use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::errors;
use super::watch::SEND_MAX;
use crate::lock::guard;

/// Answers of one stream that wait to be taken, in bytes; one that is larger waits alone.
pub(super) const AHEAD_MAX_BYTES: usize = 8 << 20;
/// Answers that are handed on before they are taken: these do not go when the others do.
const HANDED_ON_MAX: usize = 8;

/// With its size in bytes.
pub(super) type Answer<T> = (Result<T, Status>, usize);

#[derive(Clone)]
pub(super) struct Ahead(Arc<Mutex<Book>>);

struct Book {
    at_once: usize,
    under_way: usize,
    waiting: usize,
    waiting_bytes: usize,
    /// What an answer is expected to have.
    expected_bytes: usize,
    /// Of who waits for room.
    waiter: Option<Waker>,
}

impl Ahead {
    /// For answers of any size: it is unknown at first, so that few messages are begun.
    pub fn new(at_once: usize) -> Self {
        Self::expecting(at_once, AHEAD_MAX_BYTES / 4)
    }

    /// For answers that are small, and given as of no bytes.
    pub fn of_small(at_once: usize) -> Self {
        Self::expecting(at_once, 0)
    }

    fn expecting(at_once: usize, expected_bytes: usize) -> Self {
        let (under_way, waiting, waiting_bytes, waiter) = (0, 0, 0, None);
        let book = Book { at_once, under_way, waiting, waiting_bytes, expected_bytes, waiter };
        Ahead(Arc::new(Mutex::new(book)))
    }

    /// An answer to each message, in their order.
    pub fn answers<M, T, F>(
        self,
        messages: impl Stream<Item = M> + Unpin + Send + 'static,
        mut call: impl FnMut(M) -> F + Send + 'static,
    ) -> impl Stream<Item = Answer<T>> + Send + 'static
    where
        M: Send + 'static,
        T: Send + 'static,
        F: Future<Output = Answer<T>> + Send + 'static,
    {
        let (begin, begun) = mpsc::unbounded_channel();
        let (out, answers) = mpsc::channel(HANDED_ON_MAX);
        let ahead = self.clone();
        tokio::spawn(work(begun, out, move |message| {
            let (called, ahead) = (call(message), ahead.clone());
            async move {
                let answer = called.await;
                ahead.made(answer.1);
                answer
            }
        }));
        let at_once = self.book().at_once;
        let mut messages = self.begin(messages).ready_chunks(at_once);
        let reading = async move {
            while let Some(some) = messages.next().await {
                // What its caller has given up by the time at which it is read is not begun: the server
                // drops this then, at the latest here.
                yield_now().await;
                if some.into_iter().any(|message| begin.send(message).is_err()) {
                    return;
                }
            }
        };
        let reading = stream::once(reading).filter_map(|()| ready(None));
        let taken = move |(_, bytes): &Answer<T>| self.taken(*bytes);
        stream::select(reading, ReceiverStream::new(answers).inspect(taken))
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        guard(&self.0)
    }

    /// Messages, as many as may be begun.
    fn begin<S: Stream + Unpin>(&self, messages: S) -> Begun<S> {
        Begun { messages, ahead: self.clone() }
    }

    fn made(&self, bytes: usize) {
        let mut book = self.book();
        book.under_way -= 1;
        book.waiting += 1;
        book.waiting_bytes += bytes;
        book.expected_bytes = bytes.max(book.expected_bytes / 2);
        book.wake();
    }

    fn taken(&self, bytes: usize) {
        let mut book = self.book();
        book.waiting -= 1;
        book.waiting_bytes -= bytes;
        book.wake();
    }
}

impl Book {
    fn has_room(&self) -> bool {
        if self.under_way + self.waiting >= self.at_once {
            return false;
        }
        let expected = self.under_way.saturating_add(1).saturating_mul(self.expected_bytes);
        let idle = self.under_way == 0 && self.waiting_bytes == 0;
        idle || self.waiting_bytes.saturating_add(expected) <= AHEAD_MAX_BYTES
    }

    fn wake(&mut self) {
        if self.waiter.is_some() && self.has_room() {
            self.waiter.take().into_iter().for_each(Waker::wake);
        }
    }
}

struct Begun<S> {
    messages: S,
    ahead: Ahead,
}

impl<S: Stream + Unpin> Stream for Begun<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let mut book = self.ahead.book();
        if !book.has_room() {
            book.waiter = Some(context.waker().clone());
            return Poll::Pending;
        }
        drop(book);
        let next = Pin::new(&mut self.messages).poll_next(context);
        if let Poll::Ready(Some(_)) = next {
            self.ahead.book().under_way += 1;
        }
        next
    }
}

/// Until all is answered, nobody is there to take the answers, or nobody takes them.
async fn work<M, T, F: Future<Output = Answer<T>>>(
    begun: mpsc::UnboundedReceiver<M>,
    out: mpsc::Sender<Answer<T>>,
    call: impl FnMut(M) -> F,
) {
    let untaken = tokio::select! {
        biased;
        () = out.closed() => return,
        untaken = call_all(begun, &out, call) => untaken,
    };
    if untaken {
        let why = format!("nobody took the answers of this stream for {SEND_MAX:?}");
        let _ = out.send((Err(errors::outcome_unknown(&why)), 0)).await; // or it is dropped
    }
}

/// True: nobody takes the answers.
async fn call_all<M, T, F: Future<Output = Answer<T>>>(
    mut begun: mpsc::UnboundedReceiver<M>,
    out: &mpsc::Sender<Answer<T>>,
    mut call: impl FnMut(M) -> F,
) -> bool {
    let mut under_way = FuturesOrdered::new();
    let mut ready = VecDeque::new();
    let (mut open, mut last_taken) = (true, Instant::now());
    loop {
        tokio::select! {
            biased;
            room = timeout_at(last_taken + SEND_MAX, out.reserve()), if !ready.is_empty() => {
                let Ok(room) = room else { return true };
                let (Ok(room), Some(answer)) = (room, ready.pop_front()) else { return false };
                room.send(answer);
                last_taken = Instant::now();
            }
            Some(answer) = under_way.next() => {
                if ready.is_empty() {
                    last_taken = Instant::now();
                }
                ready.push_back(answer);
            }
            message = begun.recv(), if open => match message {
                Some(message) => under_way.push_back(call(message)),
                None => open = false,
            },
            else => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use futures::FutureExt as _;
    use tokio::sync::Semaphore;
    use tokio::time::{advance, sleep};

    use super::*;

    /// How many of a thousand messages are begun where each has an answer of so many bytes, and only the
    /// first few are taken.
    async fn begun(answer_bytes: usize, taken: usize) -> usize {
        let begun = Arc::new(AtomicUsize::new(0));
        let counted = begun.clone();
        let answers = Ahead::new(64).answers(stream::iter(0..1_000), move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
            async move { (Ok(()), answer_bytes) }
        });
        let mut answers = Box::pin(answers);
        for _ in 0..taken {
            answers.next().await.unwrap().0.unwrap();
        }
        // All that can be done is done; then it is polled once more, as by a server that has sent what it
        // has.
        for _ in 0..10 {
            sleep(Duration::from_millis(1)).await;
        }
        let _ = answers.next().now_or_never();
        sleep(Duration::from_millis(1)).await;
        begun.load(Ordering::Relaxed)
    }

    #[tokio::test(start_paused = true)]
    async fn small_answers_are_worked_on_side_by_side_and_large_ones_wait_for_their_reader() {
        let side_by_side = begun(100, 100).await;
        assert!((150..=100 + 64 + 1).contains(&side_by_side), "{side_by_side}");
        let most = AHEAD_MAX_BYTES / (1 << 20) + 2;
        assert!(begun(1 << 20, 3).await <= 3 + most, "{}", begun(1 << 20, 3).await);
        // Larger than the bound: one after the other.
        assert!(
            begun(2 * AHEAD_MAX_BYTES, 5).await <= 5 + 5,
            "{}",
            begun(2 * AHEAD_MAX_BYTES, 5).await
        );
    }

    #[tokio::test]
    async fn all_are_answered_in_their_order_whatever_their_size() {
        for answer_bytes in [0, 1, 3 << 20, 3 * AHEAD_MAX_BYTES] {
            let answers = Ahead::new(64).answers(stream::iter(0..200), move |number| async move {
                for _ in 0..200 - number {
                    yield_now().await;
                }
                (Ok(number), answer_bytes)
            });
            let taken: Vec<_> = answers.map(|(answer, _)| answer.unwrap()).collect().await;
            assert_eq!(taken, (0..200).collect::<Vec<_>>());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_begun_is_done_though_nobody_reads_and_the_stream_is_cut_off() {
        const AT_ONCE: usize = 64;
        let permits = Arc::new(Semaphore::new(1_000));
        let held = permits.clone();
        let answers = Ahead::of_small(AT_ONCE).answers(stream::iter(0..1_000), move |number| {
            let held = held.clone();
            async move {
                let _permit = held.acquire().await;
                sleep(Duration::from_secs(1)).await;
                (Ok(number), 0)
            }
        });
        let mut answers = Box::pin(answers);
        let busy = || 1_000 - permits.available_permits();
        // It is polled until all are begun that may be, and then no more.
        while busy() < AT_ONCE {
            assert!(answers.next().now_or_never().is_none());
            yield_now().await;
        }
        sleep(Duration::from_secs(2)).await;
        assert_eq!(busy(), 0, "all are answered, and hold nothing");
        sleep(SEND_MAX).await;
        let rest: Vec<_> = answers.map(|(answer, _)| answer).collect().await;
        let (end, read) = rest.split_last().unwrap();
        assert!(read.len() == HANDED_ON_MAX && read.iter().all(Result::is_ok), "{rest:?}");
        assert!(errors::is_outcome_unknown(end.as_ref().unwrap_err()), "{end:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_is_slow_is_not_cut_off_and_one_that_leaves_takes_its_calls_along() {
        let permits = Arc::new(Semaphore::new(1_000));
        let held = permits.clone();
        let call = move |number| {
            let held = held.clone();
            async move {
                let _permit = held.acquire().await;
                // The first one keeps the others waiting.
                sleep(if number == 0 { 2 * SEND_MAX } else { Duration::ZERO }).await;
                (Ok(number), 0)
            }
        };
        let mut answers = Box::pin(Ahead::of_small(64).answers(stream::iter(0..100), call.clone()));
        for number in 0..100 {
            assert_eq!(answers.next().await.unwrap().0.unwrap(), number);
            advance(SEND_MAX - Duration::from_secs(1)).await;
        }
        assert!(answers.next().await.is_none());

        let mut answers = Box::pin(Ahead::of_small(64).answers(stream::iter(0..100), call));
        while permits.available_permits() == 1_000 {
            assert!(answers.next().now_or_never().is_none());
            yield_now().await;
        }
        drop(answers);
        yield_now().await;
        assert_eq!(permits.available_permits(), 1_000);
    }
}
