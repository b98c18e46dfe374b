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
mod forward;
mod lag;
pub mod members;
mod observers;
mod outcome;
mod proposer;
mod reads;
mod setback;
mod space;
mod status;
mod survey;
pub mod sweeper;
pub mod telemetry;
mod timers;
mod wall_clock;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fail::fail_point;
use futures::Stream;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::{RaftMetrics, ServerState};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::sync::watch::Sender;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tonic::transport::server::{Connected, TcpIncoming};
use tracing::{error, info, warn};

use crate::core::{Command, Millis, Revision, Specs, State, WorkerName};
use crate::proto::peer;
pub use crate::raft::NodeId;
use crate::raft::{
    self, ApplyObserver as _, ClusterCell, ClusterMismatch, Dial, LocalIdentity, PeerNetwork, Raft,
    RaftCell, StateMachine, TableView, peer_service, peer_transport, raft_config,
};
use crate::store::{DataDir, LogStore, StoreError};
pub use agreement::DISAGREES_EXIT;
pub use bootstrap::BootstrapError;
use forward::{Hooks, forwarded};
pub use outcome::{CallError, ForwardError, RETRY_AFTER};
pub use proposer::Written;
pub use status::{MemberReport, StatusReport};

/// By when the caller wants its answer, on tokio's clock.
pub type Deadline = Instant;

/// What a node needs to know to start.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    pub id: NodeId,
    pub data_dir: PathBuf,
    /// Where this node finds its cluster, if its data directory is empty.
    pub entry: Entry,
    /// Where the other nodes reach this one.
    pub advertise_peer: String,
    /// Where clients reach this node.
    pub advertise: String,
    /// Log entries after which a snapshot is written.
    pub snapshot_every: u64,
    pub upkeep: Upkeep,
    pub lifecycle: Lifecycle,
    pub backups: Option<backups::BackupPlan>,
}

/// How a node that has no data comes to a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// It begins one, with these nodes, by peer address, itself among them.
    Begin(BTreeMap<NodeId, String>),
    /// It joins the one of the node at this peer address.
    Join(String),
}

impl Entry {
    /// The nodes that begin the cluster; none where it has begun elsewhere.
    fn initial_cluster(&self) -> BTreeMap<NodeId, String> {
        match self {
            Entry::Begin(nodes) => nodes.clone(),
            Entry::Join(_) => BTreeMap::new(),
        }
    }
}

/// When the leader acts on what nobody said, and on what agents saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lifecycle {
    /// How long an allocation may stay unconfirmed if its claim does not say.
    pub confirm_within: Duration,
    /// How long the ports of what was confirmed must be seen closed until it counts as gone.
    pub zombie_after: Duration,
    /// How long an agent may be silent until its worker is lost.
    pub worker_lost_after: Duration,
    /// How long a conflict keeps a port from being given on a worker that no agent watches.
    pub quarantine: Duration,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Lifecycle {
            confirm_within: Duration::from_secs(600),
            zombie_after: Duration::from_secs(600),
            worker_lost_after: Duration::from_secs(30),
            quarantine: Duration::from_secs(300),
        }
    }
}

/// What a node does by itself, beside serving calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upkeep {
    /// Bytes of log entries after which a snapshot is written, if there were fewer entries.
    pub snapshot_every_bytes: u64,
    /// Applied entries after which the leader lets the replicas compare their tables; 0: never.
    pub checkpoint_every: u64,
    /// The node is low on space when less is free on the file system of its data directory; 0:
    /// never.
    pub low_space_bytes: u64,
}

impl Default for Upkeep {
    fn default() -> Self {
        Upkeep {
            snapshot_every_bytes: 64 << 20,
            checkpoint_every: 10_000,
            low_space_bytes: 256 << 20,
        }
    }
}

/// Why a node does not start; each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Listen(std::io::Error),
    #[error("Raft does not start: {0}")]
    Raft(String),
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    #[error(transparent)]
    OtherCluster(#[from] ClusterMismatch),
    #[error(
        "{} is older than what node {id} has told the others: node {leader}, which leads, knows that entry \
         {acknowledged} of the log was on its disk, and {last} is the last one there: it is an older copy, a \
         copy of its data directory perhaps that runs elsewhere, and must not take part. Put the newer \
         directory back, or remove member {id} (portwarden member remove {id}), and \
         start over an empty data directory with --join and a new id", .path.display()
    )]
    SetBack { id: NodeId, path: PathBuf, leader: NodeId, acknowledged: u64, last: u64 },
    #[error("node {id} cannot join: {why}")]
    CannotJoin { id: NodeId, why: String },
    #[error("node {id} is refused by its peers: {why}")]
    Refused { id: NodeId, why: String },
    #[error(
        "{} was node {id} of cluster {cluster}, and its log and snapshots are gone: a node that \
         lost its data is a new node; remove member {id} from the cluster (portwarden member remove \
         {id}), and start over an empty data directory with --join and a new id", .path.display()
    )]
    LogLost { id: NodeId, cluster: String, path: PathBuf },
}

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
    /// Where the log ended at the start: nothing after it can have been applied before.
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
/// Longest that a peer's call may run, whatever it says.
const FORWARDED_MAX: Duration = Duration::from_secs(120);

impl Node {
    /// Opens the data directory, serves peers on `listener`, and begins or joins the cluster in
    /// the background. The node answers calls as soon as a leader is known.
    pub async fn start(config: NodeConfig, listener: TcpListener) -> Result<Node, StartError> {
        let data = DataDir::open(&config.data_dir, config.id)?;
        // Nagle's algorithm would hold a small answer back until the last one is acknowledged.
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        Node::start_over(config, data, incoming, Dial::default()).await
    }

    /// The same over a directory that is open, connections that come from elsewhere, and a way of
    /// its own to others: in a simulation none of them is the host's.
    pub async fn start_over<Io, E>(
        config: NodeConfig,
        data: DataDir,
        incoming: impl Stream<Item = Result<Io, E>> + Send + 'static,
        dial: Dial,
    ) -> Result<Node, StartError>
    where
        Io: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    {
        let log = data.log()?;
        let snapshots = data.snapshots()?;
        let cluster = ClusterCell::default();
        if let Some(id) = data.cluster_id() {
            cluster.set(&id)?;
        }
        let pristine = data.is_pristine()?;
        let ended_at = log.bounds().1.map(|at| at.index);
        if let (true, Some(cluster)) = (pristine, data.cluster_id()) {
            let path = config.data_dir.clone();
            return Err(StartError::LogLost { id: config.id, cluster, path });
        }

        let local = LocalIdentity {
            node_id: config.id,
            incarnation: data.incarnation().to_string(),
            session: data.session().to_string(),
            client_endpoint: config.advertise.clone(),
        };
        let network = PeerNetwork::over(local, cluster.clone(), dial);
        let agreement = agreement::Agreement::new(config.id);
        let timers = timers::Timers::new(config.lifecycle.clone());
        let hub = watch::Hub::default();
        let sweeper = sweeper::Sweeper::default();
        let observers = observers::Observers(vec![
            Arc::new(telemetry::ApplyMetrics::default()),
            Arc::new(agreement.clone()),
            Arc::new(timers.clone()),
            Arc::new(sweeper.clone()),
            Arc::new(hub.clone()),
        ]);
        let (machine, view) = StateMachine::open(snapshots.clone(), Arc::new(observers))?;
        // What the snapshot has is not told again.
        hub.installed(&view.table().state);
        let space = space::Space::new(&config.data_dir, config.upkeep.low_space_bytes);

        let calls = Arc::new(OnceLock::new());
        let cell = RaftCell::default();
        let hooks = Arc::new(Hooks::new(calls.clone()));
        let (stop_peers, mut stop) = tokio::sync::watch::channel(false);
        let service = peer_service(cell.clone(), network.clone(), hooks.clone(), snapshots);
        let peer_server = tokio::spawn(async move {
            let stopped = async move {
                let _ = stop.wait_for(|stop| *stop).await;
            };
            let served = peer_transport()
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, stopped)
                .await;
            if let Err(e) = served {
                error!("the peer listener failed: {e}");
            }
        });

        let raft_settings = raft_config(config.snapshot_every).map_err(StartError::Raft)?;
        let raft = Raft::new(config.id, raft_settings, network.clone(), log.clone(), machine)
            .await
            .map_err(|e| StartError::Raft(e.to_string()))?;
        // Once it answers, its log is read: from then on calls are checked against the members in it.
        raft.is_initialized().await.map_err(|e| StartError::Raft(e.to_string()))?;
        network.follow(raft.metrics(), view.clone());
        let (proposer, packing) = proposer::Proposer::new(raft.clone());
        let (reads, rounds) = reads::Reads::new(raft.clone(), view.clone());
        tokio::spawn(packing);
        tokio::spawn(rounds);

        let upkeep = config.upkeep.clone();
        let backup_plan = config.backups.clone();
        let node = Node {
            inner: Arc::new(Inner {
                config,
                data,
                cluster,
                raft: raft.clone(),
                view,
                network,
                proposer,
                reads,
                stale_readers: Semaphore::new(STALE_READERS_MAX),
                timers,
                sweeper,
                surveys: survey::Surveys::default(),
                hub,
                space,
                agreement,
                calls,
                pristine,
                recovered: AtomicBool::new(pristine),
                ended_at,
                changing: tokio::sync::Mutex::new(()),
                stop_peers,
                peer_server: std::sync::Mutex::new(Some(peer_server)),
            }),
        };
        let _ = hooks.node.set(Arc::downgrade(&node.inner));
        if !node.inner.pristine {
            setback::look(&node).await?;
        }
        cell.set(raft);
        let (hub, told) = (node.hub().clone(), node.inner.network.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = hub.run() => {}
                () = told.closed() => {}
            }
        });
        tokio::spawn(watch_recovery(node.clone()));
        tokio::spawn(telemetry::report(node.clone()));
        tokio::spawn(survey::report(node.clone()));
        tokio::spawn(members::tidy(node.clone()));
        tokio::spawn(absence::watch(node.clone()));
        tokio::spawn(timers::run(node.clone()));
        tokio::spawn(compaction::bound_bytes(node.clone(), log, upkeep.snapshot_every_bytes));
        if let Some(plan) = backup_plan {
            tokio::spawn(backups::run(node.clone(), plan));
        }
        if upkeep.low_space_bytes > 0 {
            tokio::spawn(space::look_after(node.clone()));
            tokio::spawn(space::ask_others(node.clone()));
        }
        if upkeep.checkpoint_every > 0 {
            tokio::spawn(agreement::lead(node.clone(), upkeep.checkpoint_every));
        }
        Ok(node)
    }

    /// Begins the cluster where that falls to this node, and learns the cluster's identity in any
    /// case. Returns once the node belongs to a cluster; an error must end the process.
    pub async fn enter_cluster(&self) -> Result<(), StartError> {
        tokio::select! {
            entered = self.begin_or_wait() => entered,
            why = self.refused() => Err(StartError::Refused { id: self.id(), why }),
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

    async fn begin_or_wait(&self) -> Result<(), StartError> {
        let Inner { config, data, cluster, raft, network, .. } = &*self.inner;
        let begun = raft.is_initialized().await.map_err(|e| StartError::Raft(e.to_string()))?;
        let listed = config.entry.initial_cluster();
        if !begun && listed.keys().next() == Some(&config.id) {
            // A crash in the middle of an earlier attempt left the id that was chosen then.
            let id = data.cluster_id().unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
            bootstrap::initialise(config, raft, network, &id, data.incarnation()).await?;
        }
        let mut watching = std::pin::pin!(async {
            match &config.entry {
                _ if begun => std::future::pending().await,
                Entry::Begin(listed) => {
                    bootstrap::watch_for_begin(config, listed, network).await;
                    Ok(())
                }
                Entry::Join(peer) => bootstrap::join(config, peer, network).await,
            }
        });
        let mut asking = true;
        let mut metrics = raft.metrics();
        loop {
            let membership = metrics.borrow_watched().membership_config.clone();
            if let Some((_, member)) = membership.nodes().next() {
                data.set_cluster_id(&member.cluster_id)?;
                cluster.set(&member.cluster_id)?;
                if begun {
                    let members = membership.nodes().map(|(id, m)| (*id, m.peer.clone()));
                    bootstrap::warn_if_list_differs(config, members);
                }
                return Ok(());
            }
            tokio::select! {
                changed = metrics.changed() => {
                    changed.map_err(|_| StartError::Raft("it stopped".into()))?;
                }
                // Who lost its disk shall hear of it, even where nobody leads and calls it.
                asked = &mut watching, if asking => {
                    asked?;
                    asking = false;
                }
            }
        }
    }

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
        if !self.inner.recovered.load(Ordering::Acquire) {
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
    async fn raft_comes_to(&self, asked: impl Fn(&raft::Metrics) -> bool) -> bool {
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
        self.inner.network.was_led()
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

    /// Is this node able to answer: a member, recovered, and with a leader known?
    pub fn is_ready(&self) -> bool {
        self.inner.recovered.load(Ordering::Acquire)
            && self.runs()
            && self.roll().has_leader()
            && self.check_member().is_ok()
    }

    /// A leader first hands over to a live follower that has all of its log, so that clients do
    /// not wait for an election; called while calls are still being served.
    pub async fn hand_over(&self) {
        let Some(successor) = self.successor() else { return };
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

    /// The live voter with the most of this leader's log; `None` where this node does not lead or
    /// has nobody to lead after it. (openraft alpha.37 never clears a transfer: a dead target would
    /// stall the group.)
    fn successor(&self) -> Option<NodeId> {
        let next = self.roll().next();
        // It takes over once it has every entry: what is on its way will be there.
        next.filter(|(lag, _)| *lag <= members::PROMOTE_LAG_MAX_ENTRIES).map(|(_, id)| id)
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

/// Marks the node recovered once it has applied all that it may have applied before its restart:
/// the table has passed the end that the log had then, or, where a new leader cut that end off, the
/// log as it is now is committed and applied. (openraft's `wait_for_recovery` knows the second
/// alone, which need not come while others write without a pause.)
async fn watch_recovery(node: Node) {
    let Inner { raft, view, ended_at, recovered, .. } = &*node.inner;
    let passed = view.wait_for(|table| table.applied.map(|at| at.index()) >= *ended_at);
    let settled = async {
        let mut metrics = raft.metrics();
        loop {
            let (committed, last, applied) = {
                let now = metrics.borrow_watched();
                if now.running_state.is_err() {
                    return false;
                }
                let index = |id: &Option<raft::LogId>| id.as_ref().map(|id| id.index());
                (index(&now.cluster_committed), now.last_log_index, index(&now.last_applied))
            };
            if committed.is_some() && committed >= last && applied >= committed {
                return true;
            }
            if metrics.changed().await.is_err() {
                return false;
            }
        }
    };
    let done = tokio::select! {
        _ = passed => true,
        done = settled => done,
    };
    if done {
        recovered.store(true, Ordering::Release);
    }
}
