//! The running server, below its API: one member of the Raft group.
//!
//! A write goes through the [`proposer`] into the log, and is answered when this
//! node has applied it. A linearizable read goes through a shared [round](self::reads). Both work
//! on the leader alone: [`Node::route`] tells where it is, and [`Node::forward`] carries a call
//! there over the one connection between two peers. What can be said when no answer comes is one
//! table: [`outcome`].
//!
//! Time, tasks and timers are tokio's; the network and the disk lie behind `raft` and `store`.

mod absence;
mod agreement;
pub mod backups;
mod bootstrap;
mod compaction;
mod config;
mod essential;
mod forward;
mod lag;
pub mod members;
mod observers;
mod outcome;
mod proposer;
mod reads;
mod setback;
mod space;
mod stall;
mod start;
mod status;
mod survey;
pub mod sweeper;
pub mod telemetry;
mod timers;
mod wall_clock;
pub mod watch;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fail::fail_point;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::{RaftMetrics, ServerState};
use tokio::sync::Semaphore;
use tokio::sync::watch::Sender;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{info, warn};

use crate::core::{Command, Millis, Revision, Specs, State, WorkerName};
use crate::proto::peer;
pub use crate::raft::NodeId;
use crate::raft::{self, ClusterCell, PeerNetwork, Raft, TableView};
use crate::store::{DataDir, LogStore, StoreError};
pub use agreement::DISAGREES_EXIT;
pub use bootstrap::BootstrapError;
pub use config::{Entry, Lifecycle, NodeConfig, Upkeep};
use forward::forwarded;
pub use outcome::{CallError, ForwardError, RETRY_AFTER};
pub use proposer::Written;
pub use start::StartError;
pub use status::{MemberReport, StatusReport};

/// By when the caller wants its answer, on tokio's clock.
pub type Deadline = Instant;

/// Runs a call that a peer forwarded, on this node and no further.
#[tonic::async_trait]
pub trait LocalCalls: Send + Sync + 'static {
    async fn call(
        &self,
        method: &str,
        request: &[u8],
        request_id: &str,
        deadline: Deadline,
    ) -> Result<Vec<u8>, tonic::Status>;
}

/// A handle on a running node.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    config: NodeConfig,
    data: DataDir,
    cluster: ClusterCell,
    raft: Raft,
    view: TableView,
    network: PeerNetwork,
    proposer: proposer::Proposer,
    reads: reads::Reads,
    stale_readers: Semaphore,
    backup_readers: Arc<Semaphore>,
    timers: timers::Timers,
    sweeper: sweeper::Sweeper,
    surveys: survey::Surveys,
    hub: watch::Hub,
    space: space::Space,
    agreement: agreement::Agreement,
    calls: Arc<OnceLock<Arc<dyn LocalCalls>>>,
    /// Was the data directory empty at the start?
    pristine: bool,
    /// Everything that was applied before a restart is applied again.
    recovered: AtomicBool,
    /// Where the log ended at the start.
    ended_at: Option<u64>,
    /// Held while this node changes the membership.
    changing: tokio::sync::Mutex<()>,
    stop_peers: Sender<bool>,
    peer_server: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Inner {
    fn begun(&self) -> bool {
        self.metrics().membership_config.nodes().next().is_some()
    }

    /// A copy. The original is behind a lock that Raft takes to write: a thread that reads it while
    /// it still holds a reference to it from before waits for a writer that waits for that thread.
    fn metrics(&self) -> RaftMetrics<raft::TypeConfig> {
        self.raft.metrics().borrow_watched().clone()
    }
}

/// Ticks at once, and then each period; one that comes late is not made up for.
fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    ticks
}

/// How long the leader waits, when it stops, for another node to take over.
const HAND_OVER_MAX: Duration = Duration::from_secs(3);
/// Reads of this node's own copy that wait for it to come as far as they ask.
const STALE_READERS_MAX: usize = 1_024;

impl Node {
    pub fn id(&self) -> NodeId {
        self.inner.config.id
    }

    /// Where clients reach this node.
    pub fn client_endpoint(&self) -> &str {
        &self.inner.config.advertise
    }

    /// Where calls that peers forward are run. Until it is set they are refused.
    pub fn serve_calls(&self, calls: Arc<dyn LocalCalls>) {
        let _ = self.inner.calls.set(calls);
    }

    /// On the leader: proposes, and answers once applied.
    pub async fn propose(
        &self,
        command: Command,
        deadline: Deadline,
    ) -> Result<Written, CallError> {
        self.admit(std::slice::from_ref(&command)).into_iter().collect::<Result<(), _>>()?;
        let written = self.inner.proposer.propose(command, deadline).await?;
        self.set_recovered();
        Ok(written)
    }

    /// On the leader: the same for many. Each has its own answer; what is urgent overtakes the rest.
    pub async fn propose_all(
        &self,
        commands: Vec<Command>,
        deadline: Deadline,
    ) -> Vec<Result<Written, CallError>> {
        let verdicts = self.admit(&commands);
        let admitted = commands.into_iter().zip(&verdicts).filter(|(_, verdict)| verdict.is_ok());
        let admitted = admitted.map(|(command, _)| command).collect();
        let mut proposed = self.inner.proposer.propose_all(admitted, deadline).await.into_iter();
        let mut next = || proposed.next().expect("as many answers as commands");
        let answers: Vec<_> =
            verdicts.into_iter().map(|verdict| verdict.and_then(|()| next())).collect();
        if answers.iter().any(Result::is_ok) {
            self.set_recovered();
        }
        answers
    }

    /// It has applied an entry of its own, so all that came before.
    fn set_recovered(&self) {
        self.inner.recovered.store(true, Ordering::Release);
    }

    /// A confirmation, or what is as urgent, was turned away for too many calls: deadlines are put off.
    pub fn turn_urgent_away(&self) {
        self.inner.proposer.turn_urgent_away();
    }

    /// How long an allocation may stay unconfirmed if its claim does not say.
    pub fn confirm_within(&self) -> Millis {
        Millis(self.inner.config.lifecycle.confirm_within.as_millis() as u64)
    }

    /// On the leader: a view with everything that was acknowledged before the call.
    pub async fn read(&self, deadline: Deadline) -> Result<State, CallError> {
        self.inner.reads.read(deadline).await
    }

    /// This node's own copy, once it has reached `min_revision`. It may lag behind the leader, but
    /// not behind what this node knew before a restart.
    pub async fn read_stale(
        &self,
        min_revision: Revision,
        deadline: Deadline,
    ) -> Result<State, CallError> {
        self.check_member()?;
        if !self.has_recovered() {
            return Err(CallError::NotReady("this node is still recovering its table".into()));
        }
        let table = self.inner.view.table();
        if table.state.revision >= min_revision {
            return Ok(table.state.clone());
        }
        let Ok(_room) = self.inner.stale_readers.try_acquire() else {
            return Err(CallError::Overloaded { retry_after: RETRY_AFTER });
        };
        let reached = self.inner.view.wait_for(|t| t.state.revision >= min_revision);
        match timeout_at(deadline, reached).await {
            Ok(table) => Ok(table.state.clone()),
            Err(_) => {
                let have = self.inner.view.table().state.revision;
                let why = format!("this node is at revision {have}, {min_revision} is asked for");
                Err(CallError::NotReady(why))
            }
        }
    }

    /// Of these workers, from this node's own copy as it is. Waits while an entry is applied.
    pub fn specs_of(&self, workers: &BTreeSet<&WorkerName>) -> Specs {
        match workers.is_empty() {
            true => Specs::new(),
            false => self.inner.view.look(|table| table.state.specs_of(workers)),
        }
    }

    /// What changes in this node's own copy, for those who watch.
    pub fn hub(&self) -> &watch::Hub {
        &self.inner.hub
    }

    /// Where a call should run: `None` here, else at that peer. Waits for a leader to be known.
    pub async fn route(&self, deadline: Deadline) -> Result<Option<NodeId>, CallError> {
        self.check_member()?;
        let mut metrics = self.inner.raft.metrics();
        loop {
            let leader = {
                let now = metrics.borrow_watched();
                if let Err(fatal) = &now.running_state {
                    return Err(CallError::NotReady(format!("the node has stopped: {fatal}")));
                }
                match now.current_leader {
                    // It has won, but is not in charge yet.
                    Some(id) if id == now.id && now.state != ServerState::Leader => None,
                    leader => leader,
                }
            };
            match leader {
                Some(id) if id == self.id() => return Ok(None),
                Some(id) => return Ok(Some(id)),
                None => match timeout_at(deadline, metrics.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Err(CallError::NotReady("the node is stopping".into())),
                    Err(_) => return Err(CallError::NotReady(self.why_no_leader())),
                },
            }
        }
    }

    /// Resolves once another one leads than this node, as far as is known here.
    pub async fn led_by_another(&self, than: NodeId) {
        if !self.raft_comes_to(|now| now.current_leader.is_some_and(|leader| leader != than)).await
        {
            std::future::pending().await // nobody will be known any more
        }
    }

    /// Resolves once Raft is as asked. False: the node is stopping.
    async fn raft_comes_to(&self, mut asked: impl FnMut(&raft::Metrics) -> bool) -> bool {
        let mut metrics = self.inner.raft.metrics();
        while !asked(&metrics.borrow_watched()) {
            if metrics.changed().await.is_err() {
                return false;
            }
        }
        true
    }

    /// Resolves with the reason once this node is no member any more.
    pub async fn removed(&self) -> String {
        let mut removed = self.inner.network.removed();
        let _ = removed.wait_for(|removed| *removed).await;
        self.why_removed()
    }

    /// Has a leader spoken to it since it was started?
    pub fn took_part(&self) -> bool {
        self.inner.network.last_led().is_some()
    }

    fn why_removed(&self) -> String {
        format!("node {} was removed from the cluster: use its other nodes", self.id())
    }

    /// Fails once this node is no member any more.
    pub fn check_member(&self) -> Result<(), CallError> {
        match *self.inner.network.removed().borrow() {
            true => Err(CallError::NotReady(self.why_removed())),
            false => Ok(()),
        }
    }

    fn why_no_leader(&self) -> String {
        match self.inner.begun() {
            true => "no leader is known: is a majority of the nodes up?".into(),
            false => "the cluster has not begun: waiting for all nodes of --initial-cluster".into(),
        }
    }

    /// Carries a call to a peer, which runs it there and no further.
    pub async fn forward(
        &self,
        to: NodeId,
        method: &str,
        request: Vec<u8>,
        deadline: Deadline,
    ) -> Result<Result<Vec<u8>, tonic::Status>, ForwardError> {
        let membership = self.inner.metrics().membership_config;
        let Some(member) = membership.membership().get_node(&to) else {
            return Err(ForwardError::NotSent(format!("node {to} is not a member")));
        };
        fail_point!("forward-before-send", |_| Err(ForwardError::NotSent("a failpoint".into())));
        let request = forwarded(method, request, deadline);
        let remaining = deadline.saturating_duration_since(Instant::now());
        let sent = self.inner.network.forward(to, &member.peer, request);
        let answer = match timeout(remaining, sent).await {
            Ok(answer) => answer?,
            Err(_) => return Err(ForwardError::Broken("the deadline passed".into())),
        };
        fail_point!("forward-answer-lost", |_| Err(ForwardError::Broken("a failpoint".into())));
        match answer.result {
            Some(peer::forward_response::Result::Response(bytes)) => Ok(Ok(bytes.into())),
            Some(peer::forward_response::Result::Status(status)) => Ok(Err(
                tonic::Status::with_details(status.code.into(), status.message, status.details),
            )),
            None => Err(ForwardError::Broken(format!("node {to} sent an empty answer"))),
        }
    }

    /// What Raft says of itself here. For tests and simulations.
    pub fn raft_metrics(&self) -> raft::Metrics {
        self.inner.metrics()
    }

    /// The log as it is here. For tests and simulations.
    pub fn log(&self) -> Result<LogStore, StoreError> {
        self.inner.data.log()
    }

    /// The table as this node has it now; for telemetry.
    pub fn table(&self) -> Arc<raft::Table> {
        self.inner.view.table()
    }

    /// Resolves with the reason when this node must not go on: Raft has ended by itself (a storage
    /// error, a panic), or the peers know its id as somebody else.
    pub async fn failed(&self) -> String {
        tokio::select! {
            why = self.raft_ended() => why,
            why = self.refused() => StartError::Refused { id: self.id(), why }.to_string(),
        }
    }

    /// Resolves when a peer knows this node's id as somebody else.
    async fn refused(&self) -> String {
        let mut refusals = self.inner.network.refusals();
        match refusals.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    async fn raft_ended(&self) -> String {
        let mut metrics = self.inner.raft.server_metrics();
        loop {
            if let Err(fatal) = &self.inner.metrics().running_state {
                return fatal.to_string();
            }
            if metrics.changed().await.is_err() {
                return "Raft ended".into();
            }
        }
    }

    fn runs(&self) -> bool {
        self.inner.metrics().running_state.is_ok()
    }

    /// Has it applied again all that it had applied before it was started?
    pub fn has_recovered(&self) -> bool {
        self.inner.recovered.load(Ordering::Acquire)
    }

    /// Is this node able to answer: a member, recovered, and with a leader known?
    pub fn is_ready(&self) -> bool {
        self.has_recovered()
            && self.runs()
            && self.roll().has_leader()
            && self.check_member().is_ok()
    }

    /// A leader first hands over to a live follower that has all of its log, so that clients do
    /// not wait for an election; called while calls are still being served.
    pub async fn hand_over(&self) {
        let Ok(successor) = self.successor(Instant::now()).await else { return };
        info!(successor, "handing over the lead");
        self.hand_over_to(successor).await;
    }

    async fn hand_over_to(&self, successor: NodeId) {
        if let Err(e) = self.inner.raft.trigger().transfer_leader(successor).await {
            warn!("handing over failed: {e}");
            return;
        }
        let handed_over = self.raft_comes_to(|now| now.state != ServerState::Leader);
        if timeout(HAND_OVER_MAX, handed_over).await.is_err() {
            warn!(successor, "did not take over in time; the others will elect");
        }
    }

    /// Stops serving peers and ends Raft. What was acknowledged is on disk.
    pub async fn stop(&self) {
        if let Err(e) = self.inner.raft.shutdown().await {
            warn!("Raft did not end cleanly: {e}");
        }
        self.inner.network.close();
        let _ = self.inner.stop_peers.send(true);
        let server = self.inner.peer_server.lock().ok().and_then(|mut server| server.take());
        if let Some(mut server) = server
            && timeout(Duration::from_secs(1), &mut server).await.is_err()
        {
            server.abort(); // peers keep their connections open
        }
    }
}
