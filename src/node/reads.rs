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

use super::outcome::{CallError, of_read};
use crate::core::State;
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::raft::{Raft, TableView};

/// Readers that may wait for the next round.
const READERS_MAX: usize = 16_384;
/// Longest round: without a quorum, readers are sent to look for another leader.
const ROUND_MAX: Duration = Duration::from_secs(2);

type Answer = oneshot::Sender<Result<State, CallError>>;

#[derive(Clone)]
pub(super) struct Reads {
    waiting: mpsc::Sender<Answer>,
}

impl Reads {
    /// The returned future runs the rounds until every sender is gone.
    pub fn new(raft: Raft, view: TableView) -> (Reads, impl Future<Output = ()> + Send) {
        let (waiting, queue) = mpsc::channel(READERS_MAX);
        (Reads { waiting }, rounds(raft, view, queue))
    }

    pub async fn read(&self, deadline: Instant) -> Result<State, CallError> {
        let (answer, answered) = oneshot::channel();
        self.waiting
            .try_send(answer)
            .map_err(|_| CallError::Overloaded { retry_after: Duration::from_millis(100) })?;
        match timeout_at(deadline, answered).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(CallError::NotReady("the node is stopping".into())),
            Err(_) => Err(CallError::Expired),
        }
    }
}

async fn rounds(raft: Raft, view: TableView, mut queue: mpsc::Receiver<Answer>) {
    let mut readers = Vec::new();
    while queue.recv_many(&mut readers, READERS_MAX).await > 0 {
        let started = Instant::now();
        let result = round(&raft, &view).await;
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
