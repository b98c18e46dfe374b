//! From a data directory to a node that serves: opening it, recovering, and coming to a cluster.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use futures::Stream;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tonic::transport::server::Connected;
use tracing::error;

use super::config::{Entry, NodeConfig};
use super::essential::spawn_essential;
use super::forward::Hooks;
use super::{
    BootstrapError, Inner, Node, STALE_READERS_MAX, absence, agreement, backups, bootstrap,
    compaction, members, observers, proposer, reads, setback, space, stall, survey, sweeper,
    telemetry, timers, watch,
};
use crate::connections::{Kind, tcp_incoming};
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::raft::{
    ApplyObserver as _, ClusterCell, ClusterMismatch, Dial, LocalIdentity, NodeId, PeerNetwork,
    Raft, RaftCell, StateMachine, peer_service, peer_transport, raft_config,
};
use crate::store::{DataDir, StoreError};

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
        "{} was node {id} of cluster {cluster}, and its log is gone: a node that \
         lost its data is a new node; remove member {id} from the cluster (portwarden member remove \
         {id}), and start over an empty data directory with --join and a new id", .path.display()
    )]
    LogLost { id: NodeId, cluster: String, path: PathBuf },
}

impl Node {
    /// Opens the data directory, serves peers on `listener`, and begins or joins the cluster in
    /// the background. The node answers calls as soon as a leader is known.
    pub async fn start(config: NodeConfig, listener: TcpListener) -> Result<Node, StartError> {
        let data = DataDir::open(&config.data_dir, config.id)?;
        let incoming = tcp_incoming(listener, Kind::Peer);
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
        // A snapshot alone says nothing of the votes and entries that were acknowledged after it.
        let was_used = data.cluster_id().is_some() || snapshots.newest().is_some();
        if log.is_pristine() && was_used {
            let cluster = data.cluster_id().unwrap_or_else(|| "(unknown)".into());
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
        let agreement = agreement::Agreement::new(config.id, &config.data_dir);
        let applied = telemetry::ApplyMetrics::default();
        let timers = timers::Timers::new(config.lifecycle.clone());
        let hub = watch::Hub::default();
        let sweeper = sweeper::Sweeper::default();
        let observers = observers::Observers(vec![
            Arc::new(applied.clone()),
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
        let service =
            peer_service(cell.clone(), network.clone(), hooks.clone(), snapshots, log.clone());
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
        spawn_essential("the proposer", packing);
        spawn_essential("the rounds of reads", rounds);

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
                backup_readers: Arc::new(Semaphore::new(backups::READ_AT_ONCE_MAX)),
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
        spawn_essential("the hub of watchers", async move {
            tokio::select! {
                () = hub.run() => {}
                () = told.closed() => {}
            }
        });
        spawn_essential("the watch over recovery", watch_recovery(node.clone(), applied));
        spawn_essential("telemetry", telemetry::report(node.clone()));
        spawn_essential("the watch over the disk", stall::look_after(node.clone(), log.clone()));
        spawn_essential("the survey", survey::report(node.clone()));
        spawn_essential("the care of members", members::tidy(node.clone()));
        spawn_essential("the watch over the leader", absence::watch(node.clone()));
        spawn_essential("the timers", timers::run(node.clone()));
        spawn_essential(
            "compaction",
            compaction::bound_bytes(node.clone(), log, upkeep.snapshot_every_bytes),
        );
        if let Some(plan) = backup_plan {
            spawn_essential("the backups", backups::run(node.clone(), plan));
        }
        if upkeep.low_space_bytes > 0 {
            spawn_essential("the watch over space", space::look_after(node.clone()));
            spawn_essential("the watch over others' space", space::ask_others(node.clone()));
        }
        if upkeep.checkpoint_every > 0 {
            spawn_essential(
                "the comparison of replicas",
                agreement::lead(node.clone(), upkeep.checkpoint_every),
            );
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
                Entry::Begun => std::future::pending().await,
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
}

/// Marks the node recovered once it has applied all that it may have applied, and shown, before its restart.
/// That may be more than its log has: what most of the others have on disk is applied while a slow disk here
/// still writes it. So it is what a leader says, since the start, to be committed in its own term, which
/// covers all that ever was. The first such word will do: others may write without a pause. From then on what
/// is applied is new, and counted.
async fn watch_recovery(node: Node, applied: telemetry::ApplyMetrics) {
    let mut goal = None;
    let reached = node.raft_comes_to(|now| {
        #[cfg(planted)]
        if planted::is(Bug::RecoveredEarly)
            && now.last_applied.as_ref().map(|at| at.index) >= node.inner.ended_at
        {
            return true;
        }
        // Nothing, until a leader has told it, or this node is one.
        let committed = now.cluster_committed;
        goal = goal.or(committed.filter(|at| at.leader_id.term == now.vote.leader_id.term));
        goal.is_some() && now.last_applied >= goal
    });
    let recovered = tokio::select! {
        reached = reached => reached,
        _ = node.raft_ended() => false,
    };
    if recovered {
        node.set_recovered();
        applied.begin();
    }
}
