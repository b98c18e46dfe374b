//! How far a session works ahead of whoever reads its answers.
//!
//! Messages are worked on side by side, and their answers wait in order until they are taken. A few
//! commands may have large answers, and a caller may not read: so a message is begun only while what
//! waits, and what is under way if it becomes as large as the last answer, is within a bound. One message
//! may always be under way.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use futures::Stream;

use crate::lock::guard;

/// Answers of one session that wait to be taken, in bytes; one that is larger waits alone.
pub(super) const AHEAD_MAX_BYTES: usize = 8 << 20;

#[derive(Clone)]
pub(super) struct Ahead(Arc<Mutex<Book>>);

struct Book {
    under_way: usize,
    waiting_bytes: usize,
    /// What an answer is expected to have; unknown at first, so that few are begun.
    expected_bytes: usize,
    /// Of who waits for room.
    waiter: Option<Waker>,
}

impl Ahead {
    pub fn new() -> Self {
        let expected_bytes = AHEAD_MAX_BYTES / 4;
        let (under_way, waiting_bytes, waiter) = (0, 0, None);
        Ahead(Arc::new(Mutex::new(Book { under_way, waiting_bytes, expected_bytes, waiter })))
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        guard(&self.0)
    }

    /// Messages, as many as may be begun.
    pub fn begin<S: Stream + Unpin>(&self, messages: S) -> Begun<S> {
        Begun { messages, ahead: self.clone() }
    }

    pub fn made(&self, bytes: usize) {
        let mut book = self.book();
        book.under_way -= 1;
        book.waiting_bytes += bytes;
        book.expected_bytes = bytes.max(book.expected_bytes / 2);
        book.wake();
    }

    pub fn taken(&self, bytes: usize) {
        let mut book = self.book();
        book.waiting_bytes -= bytes;
        book.wake();
    }
}

impl Book {
    fn has_room(&self) -> bool {
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

pub(super) struct Begun<S> {
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

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _, stream};

    use super::*;

    /// How many of a thousand messages are begun where each has an answer of so many bytes, and only the
    /// first few are taken.
    async fn begun(answer_bytes: usize, taken: usize) -> usize {
        let (ahead, mut begun) = (Ahead::new(), 0);
        let (made, read) = (ahead.clone(), ahead.clone());
        let mut answers = ahead
            .begin(stream::iter(0..1_000))
            .map(|_| {
                begun += 1;
                let made = made.clone();
                async move {
                    made.made(answer_bytes);
                    answer_bytes
                }
            })
            .buffered(64)
            .inspect(|bytes| read.taken(*bytes));
        for _ in 0..taken {
            answers.next().await.unwrap();
        }
        // Polled once more, as a server does that has sent what it has.
        let _ = answers.next().now_or_never();
        drop(answers);
        begun
    }

    #[tokio::test]
    async fn small_answers_are_worked_on_side_by_side_and_large_ones_wait_for_their_reader() {
        assert!(begun(100, 100).await > 150, "{}", begun(100, 100).await);
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
    async fn all_are_answered_whatever_their_size() {
        for answer_bytes in [0, 1, 3 << 20, 3 * AHEAD_MAX_BYTES] {
            let ahead = Ahead::new();
            let (made, read) = (ahead.clone(), ahead.clone());
            let answers = ahead.begin(stream::iter(0..200)).map(|_| {
                let made = made.clone();
                async move {
                    tokio::task::yield_now().await;
                    made.made(answer_bytes);
                }
            });
            let taken = answers.buffered(64).inspect(|()| read.taken(answer_bytes)).count().await;
            assert_eq!(taken, 200);
        }
    }
}
