//! Linearizable reads, many to a round.
//!
//! A round asks a quorum whether this node still leads (Raft's ReadIndex, dissertation §6.4; never
//! a clock-based lease), waits until the table has applied what was committed when the round began,
//! and answers everyone with the same O(1) clone. A reader shares a round only if it arrived before
//! the round began; whoever comes later waits for the next.

use std::time::Duration;

use openraft::ReadPolicy;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};

use super::outcome::{CallError, RETRY_AFTER, of_read};
use crate::core::State;
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::raft::{Raft, TableView};

/// Readers that may wait for the next round.
const READERS_MAX: usize = 16_384;
/// Keepalives that may wait beyond that.
const KEEPALIVES_MAX: usize = 4_096;
/// Longest round: without a quorum, readers are sent to look for another leader.
const ROUND_MAX: Duration = Duration::from_secs(2);

const OVERLOADED: CallError = CallError::Overloaded { retry_after: RETRY_AFTER };

type Answer = oneshot::Sender<Result<State, CallError>>;

#[derive(Clone)]
pub(super) struct Reads {
    waiting: mpsc::Sender<Answer>,
}

impl Reads {
    /// The returned future runs the rounds until every sender is gone.
    pub fn new(raft: Raft, view: TableView) -> (Reads, impl Future<Output = ()> + Send) {
        let (waiting, queue) = mpsc::channel(READERS_MAX + KEEPALIVES_MAX);
        let round = move || {
            let (raft, view) = (raft.clone(), view.clone());
            async move { round(&raft, &view).await }
        };
        (Reads { waiting }, rounds(round, queue))
    }

    pub async fn read(&self, deadline: Instant) -> Result<State, CallError> {
        match self.waiting.capacity() > KEEPALIVES_MAX {
            true => self.read_for_keepalive(deadline).await,
            false => Err(OVERLOADED),
        }
    }

    /// The same, with the room that is kept for keepalives.
    pub async fn read_for_keepalive(&self, deadline: Instant) -> Result<State, CallError> {
        let (answer, answered) = oneshot::channel();
        self.waiting.try_send(answer).map_err(|_| OVERLOADED)?;
        match timeout_at(deadline, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(CallError::NotReady("the node is stopping".into())),
            Err(_) => Err(CallError::Expired),
        }
    }
}

async fn rounds<R>(mut round: impl FnMut() -> R, mut queue: mpsc::Receiver<Answer>)
where
    R: Future<Output = Result<State, CallError>>,
{
    let mut readers = Vec::new();
    while queue.recv_many(&mut readers, READERS_MAX + KEEPALIVES_MAX).await > 0 {
        let started = Instant::now();
        let result = round().await;
        #[cfg(planted)]
        while planted::is(Bug::ReadJoinsRound)
            && let Ok(late) = queue.try_recv()
        {
            readers.push(late);
        }
        metrics::histogram!("portwarden_read_round_seconds")
            .record(started.elapsed().as_secs_f64());
        metrics::histogram!("portwarden_read_round_readers").record(readers.len() as f64);
        for reader in readers.drain(..) {
            let _ = reader.send(result.clone());
        }
    }
}

async fn round(raft: &Raft, view: &TableView) -> Result<State, CallError> {
    #[cfg(planted)]
    if planted::is(Bug::ReadWithoutRound) {
        return Ok(view.table().state.clone());
    }
    let confirmed = async {
        let linearizer = raft.get_read_linearizer(ReadPolicy::ReadIndex).await.map_err(of_read)?;
        let index = linearizer.read_log_id().index();
        let table = view.wait_for(|t| t.applied.as_ref().is_some_and(|a| a.index() >= index)).await;
        Ok(table.state.clone())
    };
    match timeout(ROUND_MAX, confirmed).await {
        Ok(result) => result,
        Err(_) => Err(CallError::NotLeader { leader: None }),
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;
    use crate::core::{Restore, Revision};

    fn at(revision: u64) -> State {
        Restore::new(1, Revision(revision)).finish().unwrap()
    }

    #[tokio::test]
    async fn one_reader_more_than_may_wait_is_overloaded_until_a_round_has_begun() {
        let all = READERS_MAX + KEEPALIVES_MAX;
        let (waiting, mut queue) = mpsc::channel(all);
        let reads = Reads { waiting };
        let deadline = Instant::now() + Duration::from_secs(60);
        let is_refused = |answer: Option<Result<State, CallError>>| match answer {
            None => false,
            Some(Err(CallError::Overloaded { .. })) => true,
            Some(other) => panic!("{other:?}"),
        };
        for _ in 0..READERS_MAX {
            assert!(!is_refused(reads.read(deadline).now_or_never()));
        }
        assert!(is_refused(reads.read(deadline).now_or_never()));
        for _ in 0..KEEPALIVES_MAX {
            assert!(!is_refused(reads.read_for_keepalive(deadline).now_or_never()));
        }
        assert!(is_refused(reads.read_for_keepalive(deadline).now_or_never()));
        assert_eq!(queue.recv_many(&mut Vec::new(), all).await, all);
        assert!(reads.read(deadline).now_or_never().is_none());
    }

    #[tokio::test]
    async fn who_comes_while_a_round_is_under_way_waits_for_the_next() {
        let (waiting, queue) = mpsc::channel(READERS_MAX);
        let reads = Reads { waiting };
        let (begun, mut rounds_begun) = mpsc::unbounded_channel();
        let round = move || {
            let (end, ended) = oneshot::channel();
            begun.send(end).unwrap();
            async move { Ok(ended.await.unwrap()) }
        };
        tokio::spawn(rounds(round, queue));
        let deadline = Instant::now() + Duration::from_secs(60);
        let read = || {
            let reads = reads.clone();
            tokio::spawn(async move { reads.read(deadline).await.unwrap().revision.0 })
        };
        let first = read();
        let first_round = rounds_begun.recv().await.unwrap();
        let second = reads.read(deadline);
        tokio::pin!(second);
        assert!(second.as_mut().now_or_never().is_none(), "it has come");
        first_round.send(at(7)).unwrap();
        let begins = timeout(Duration::from_secs(30), rounds_begun.recv());
        let second_round = begins.await.expect("a second round").unwrap();
        second_round.send(at(9)).unwrap();
        assert_eq!((first.await.unwrap(), second.await.unwrap().revision.0), (7, 9));
    }
}
