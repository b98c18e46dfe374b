//! Nodes made of the store and the Raft glue alone, on loopback: replication, restarts, snapshots,
//! leadership transfer, and who is refused.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{RPCError, RaftError};
use openraft::network::{RPCOption, RaftNetworkFactory as _, v2::RaftNetworkV2 as _};
use openraft::raft::AppendEntriesRequest;
use portwarden::core::{self, Applied, Command, Event, digest};
use portwarden::proto::peer as proto;
use portwarden::raft::*;
use portwarden::store::DataDir;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::samples;

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Seen(Mutex<Vec<String>>);

impl ApplyObserver for Seen {
    fn applied(&self, command: &Command, applied: &Applied, _: &[Event]) {
        self.0.lock().unwrap().push(format!("{} {}", command.kind(), applied.revision));
    }

    fn installed(&self, _: &core::State) {
        self.0.lock().unwrap().push("installed".into());
    }
}

struct Hooks;

#[tonic::async_trait]
impl PeerHooks for Hooks {
    async fn forward(
        &self,
        request: proto::ForwardRequest,
        _: tokio::time::Instant,
    ) -> proto::ForwardResponse {
        let echo = proto::forward_response::Result::Response(request.request);
        proto::ForwardResponse { result: Some(echo) }
    }

    fn give_up(&self, _: &proto::GiveUpRequest) {}

    async fn probe(&self, _: proto::ProbeRequest) -> proto::ProbeResponse {
        proto::ProbeResponse { pristine: true, ..Default::default() }
    }

    async fn join(&self, _: proto::JoinRequest) -> Result<proto::JoinResponse, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}

struct Node {
    id: NodeId,
    incarnation: String,
    address: SocketAddr,
    dir: DataDir,
    raft: Raft,
    view: TableView,
    seen: Arc<Seen>,
    network: PeerNetwork,
    stop: tokio::sync::oneshot::Sender<()>,
    server: JoinHandle<()>,
}

impl Node {
    /// `listener`: taken before, so that the others know the address.
    async fn start(dir: &Path, id: NodeId, listener: TcpListener, snapshot_every: u64) -> Node {
        let address = listener.local_addr().unwrap();
        let dir = DataDir::open(dir, id).unwrap();
        let cluster = ClusterCell::default();
        if let Some(known) = dir.cluster_id() {
            cluster.set(&known).unwrap();
        }
        let local = LocalIdentity {
            node_id: id,
            incarnation: dir.incarnation().into(),
            session: dir.session().into(),
            client_endpoint: String::new(),
        };
        let network = PeerNetwork::new(local, cluster);
        let cell = RaftCell::default();
        let (log, snapshots) = (dir.log().unwrap(), dir.snapshots().unwrap());
        let service = peer_service(
            cell.clone(),
            network.clone(),
            Arc::new(Hooks),
            snapshots.clone(),
            log.clone(),
        );
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let serve = peer_transport().add_service(service);
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let server = tokio::spawn(async move {
            let stopped = async { stopped.await.unwrap_or_default() };
            serve.serve_with_incoming_shutdown(incoming, stopped).await.unwrap();
        });
        let seen = Arc::new(Seen::default());
        let (machine, view) = StateMachine::open(snapshots, seen.clone()).unwrap();
        let config = raft_config(snapshot_every).unwrap();
        let raft = Raft::new(id, config, network.clone(), log, machine).await.unwrap();
        raft.is_initialized().await.unwrap();
        network.follow(raft.metrics(), view.clone());
        assert!(cell.set(raft.clone()));
        let incarnation = dir.incarnation().to_string();
        Node { id, incarnation, address, dir, raft, view, seen, network, stop, server }
    }

    /// Ends it, as far as a process can within another: nothing of it runs when this returns.
    async fn stop(self) -> SocketAddr {
        self.raft.shutdown().await.unwrap();
        self.network.close();
        drop(self.raft);
        self.stop.send(()).unwrap();
        self.server.await.unwrap();
        drop((self.view, self.network));
        tokio::time::timeout(PATIENCE, self.dir.close()).await.expect("nothing is left of it");
        self.address
    }

    async fn caught_up(&self, with: &Node) {
        let applied = with.view.table().applied;
        let caught_up = self.view.wait_for(|table| table.applied >= applied);
        tokio::time::timeout(PATIENCE, caught_up).await.expect("the node catches up");
    }

    fn digest(&self) -> core::Digest {
        digest(&self.view.table().state)
    }
}

async fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

fn member(node: &Node) -> Member {
    let (peer, client) = (node.address.to_string(), format!("client of {}", node.address));
    Member { cluster_id: "cluster".into(), peer, client, incarnation: node.incarnation.clone() }
}

/// Waits for a leader among the nodes and returns its place.
async fn leader(nodes: &[Node]) -> usize {
    let wait = nodes[0].raft.wait(Some(PATIENCE));
    let known = |m: &Metrics| m.current_leader.is_some_and(|id| nodes.iter().any(|n| n.id == id));
    let id = wait.metrics(known, "a leader").await.unwrap().current_leader.unwrap();
    nodes.iter().position(|node| node.id == id).unwrap()
}

/// Writes at the leader, whoever that is by now, and returns its place. A leader takes writes only
/// once a quorum has confirmed it. What may have been written is written again: the commands here
/// say the same twice.
async fn write(nodes: &[Node], commands: &[Command]) -> usize {
    loop {
        let place = leader(nodes).await;
        let node = &nodes[place];
        let mut metrics = node.raft.metrics();
        let batch = Batch::new(samples::ORIGIN.at, commands.to_vec());
        match node.raft.client_write(batch).await {
            Ok(written) => {
                // Who got an answer sees it.
                assert!(node.view.table().applied >= Some(written.log_id));
                assert_eq!(written.data.applied.len(), commands.len());
                return place;
            }
            Err(RaftError::APIError(_)) => {
                tokio::time::timeout(PATIENCE, metrics.changed()).await.unwrap().unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

struct Cluster {
    dirs: Vec<tempfile::TempDir>,
    nodes: Vec<Node>,
}

async fn cluster(count: u64, snapshot_every: u64) -> Cluster {
    let (mut dirs, mut nodes) = (Vec::new(), Vec::new());
    for id in 1..=count {
        let dir = tempfile::tempdir().unwrap();
        nodes.push(Node::start(dir.path(), id, listen().await, snapshot_every).await);
        dirs.push(dir);
    }
    let members: BTreeMap<_, _> = nodes.iter().map(|n| (n.id, member(n))).collect();
    nodes[0].raft.initialize(members).await.unwrap();
    Cluster { dirs, nodes }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_agree_and_one_comes_back() {
    let Cluster { dirs, mut nodes } = cluster(3, 50_000).await;
    let mut first = 0;
    for command in samples::plain() {
        first = write(&nodes, &[command]).await;
    }
    let mut expected = samples::state_of(&samples::plain());
    for node in &nodes {
        expected.remember_member(node.id, &node.incarnation);
    }
    assert_eq!(nodes[first].digest(), digest(&expected));

    // A follower misses a batch.
    let away = (first + 1) % 3;
    let node = nodes.remove(away);
    let (id, address) = (node.id, node.stop().await);
    let first = write(&nodes, &[samples::register("w8", 0), samples::register("w9", 0)]).await;
    let listener = TcpListener::bind(address).await.unwrap();
    nodes.push(Node::start(dirs[away].path(), id, listener, 50_000).await);
    for node in &nodes {
        node.caught_up(&nodes[first]).await;
        assert_eq!(node.digest(), nodes[first].digest());
        let table = node.view.table();
        let (_, record) = table.membership.membership().nodes().next().unwrap();
        assert_eq!(record.cluster_id, "cluster");
    }
    // Every node was told of every command, in order, once in each life.
    let told = nodes[first].seen.0.lock().unwrap().clone();
    assert!(told.len() >= samples::plain().len() + 2);
    assert_eq!(*nodes[2].seen.0.lock().unwrap(), told);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_stop_and_everything_is_still_there() {
    let Cluster { dirs, mut nodes } = cluster(3, 5).await;
    let mut first = 0;
    for command in samples::plain() {
        first = write(&nodes, &[command]).await;
    }
    let before = nodes[first].view.table();
    let mut addresses = Vec::new();
    for node in nodes.drain(..) {
        addresses.push((node.id, node.stop().await));
    }
    for ((id, address), dir) in addresses.into_iter().zip(&dirs) {
        let listener = TcpListener::bind(address).await.unwrap();
        nodes.push(Node::start(dir.path(), id, listener, 5).await);
    }
    for node in &nodes {
        node.raft.wait_for_recovery(Some(PATIENCE)).await.unwrap();
        assert!(node.view.table().applied >= before.applied);
        assert_eq!(node.digest(), digest(&before.state));
    }
    let first = write(&nodes, &[samples::register("w9", 0)]).await;
    for node in &nodes {
        node.caught_up(&nodes[first]).await;
        assert_eq!(node.digest(), nodes[first].digest());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_member_gets_a_snapshot() {
    let Cluster { nodes, dirs: _dirs } = cluster(1, 10).await;
    for i in 0..30 {
        let many = (i * 50..i * 50 + 50).map(|i| samples::register(&format!("w{i}"), 2));
        write(&nodes, &many.collect::<Vec<_>>()).await;
    }
    let one = &nodes[0];
    // The log does not go back to the beginning any more.
    let purged = |m: &Metrics| m.purged.is_some_and(|at| at.index > 10);
    one.raft.wait(Some(PATIENCE)).metrics(purged, "the log is purged").await.unwrap();

    let dir = tempfile::tempdir().unwrap();
    let two = Node::start(dir.path(), 2, listen().await, 10).await;
    one.raft.add_learner(2, member(&two), true).await.unwrap();
    two.caught_up(one).await;
    assert_eq!(two.digest(), one.digest());
    assert_eq!(two.seen.0.lock().unwrap()[0], "installed");
    assert_eq!(two.view.table().membership.membership().nodes().count(), 2);

    // And keeps it over a restart.
    let expected = two.digest();
    let address = two.stop().await;
    let two = Node::start(dir.path(), 2, TcpListener::bind(address).await.unwrap(), 10).await;
    two.caught_up(one).await;
    assert_eq!(two.digest(), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_when_asked() {
    let Cluster { nodes, dirs: _dirs } = cluster(3, 50_000).await;
    let from = write(&nodes, &[samples::register("w1", 0)]).await;
    let to = (from + 1) % 3;
    nodes[to].caught_up(&nodes[from]).await;
    nodes[from].raft.trigger().transfer_leader(nodes[to].id).await.unwrap();
    let moved = |m: &Metrics| m.current_leader == Some(nodes[to].id);
    for node in &nodes {
        node.raft.wait(Some(PATIENCE)).metrics(moved, "leadership moved").await.unwrap();
    }
    write(&nodes, &[samples::register("w2", 0)]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forwarded_calls_say_whether_they_arrived() {
    let Cluster { nodes, dirs: _dirs } = cluster(2, 50_000).await;
    leader(&nodes).await;
    let (one, two) = (&nodes[0].network, nodes[1].address.to_string());
    let call = |remaining_ms| proto::ForwardRequest {
        request: vec![1, 2, 3].into(),
        remaining_ms,
        ..Default::default()
    };
    let answer = one.forward(2, &two, call(10_000)).await.unwrap();
    let echo = proto::forward_response::Result::Response(vec![1, 2, 3].into());
    assert_eq!(answer.result, Some(echo));
    assert!(one.probe(2, &two, Default::default(), PATIENCE).await.unwrap().pristine);

    let not_sent = |result| match result {
        Err(ForwardError::NotSent(why)) => why,
        other => panic!("expected not sent: {other:?}"),
    };
    let why = not_sent(one.forward(3, &two, call(10_000)).await);
    assert!(why.contains("this is node 2") && why.contains("for node 3"), "{why}");
    not_sent(one.forward(2, &two, call(0)).await);
    // Nobody listens there: the port was free a moment ago.
    let gone = listen().await.local_addr().unwrap().to_string();
    let why = not_sent(one.forward(2, &gone, call(10_000)).await);
    assert!(why.contains("refused"), "{why}");
    // Somebody does, and never answers.
    let silent = listen().await;
    let address = silent.local_addr().unwrap().to_string();
    let broken = one.forward(2, &address, call(50)).await;
    assert!(matches!(broken, Err(ForwardError::Broken(_))), "{broken:?}");
}

/// What the others do from here on this build does not know: it must not go on as if it did.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_stops_where_its_cluster_rises_to_a_level_it_does_not_know() {
    let Cluster { nodes, dirs } = cluster(1, 50_000).await;
    write(&nodes, &[samples::register("w1", 0)]).await;
    let raft = &nodes[0].raft;
    let raise = |level| Batch::new(samples::ORIGIN.at, vec![Command::SetFeatureLevel { level }]);
    raft.client_write(raise(1)).await.unwrap();
    assert!(raft.client_write(raise(2)).await.is_err());
    let stopped = raft.metrics().borrow_watched().running_state.clone().unwrap_err().to_string();
    assert!(
        stopped.contains("the cluster has feature level 2, this build knows 1 to 1"),
        "{stopped}"
    );
    let table = nodes[0].view.table();
    assert_eq!((table.state.feature_level, table.state.revision), (1, core::Revision(1)));
    drop(dirs);
}

/// A peer is held up, and most of those who call it give up. (Each of them once reset its stream; h2
/// closes a connection with more than 20 of those, and nobody knew what became of the other calls.)
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_are_given_up_in_masses_break_no_other() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let one = Node::start(one.path(), 1, listen().await, 50_000).await;
    // Connections are made, and nothing on them is read yet.
    let held_up = listen().await;
    let address = held_up.local_addr().unwrap().to_string();
    let call = |remaining_ms| {
        let request = proto::ForwardRequest { remaining_ms, ..Default::default() };
        let (network, address) = (one.network.clone(), address.clone());
        async move { network.forward(2, &address, request).await }
    };
    let patient = tokio::spawn(call(30_000));
    let given_up = futures::future::join_all((0..60).map(|_| call(200))).await;
    let dropped = tokio::spawn(futures::future::join_all((0..30).map(|_| call(30_000))));
    let probes = (0..60)
        .map(|_| one.network.probe(2, &address, Default::default(), Duration::from_millis(200)));
    assert!(futures::future::join_all(probes).await.iter().all(Result::is_err));
    dropped.abort();
    assert!(given_up.iter().all(|answer| matches!(answer, Err(ForwardError::Broken(_)))));
    let _two = Node::start(two.path(), 2, held_up, 50_000).await;
    // There is no cluster, of which it is told: it was heard.
    let Err(ForwardError::NotSent(why)) = patient.await.unwrap() else { panic!("an answer") };
    assert!(why.contains("has no cluster"), "{why}");
    assert!(one.network.probe(2, &address, Default::default(), PATIENCE).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_its_disk_learns_that_it_is_refused() {
    let Cluster { mut nodes, dirs: _dirs } = cluster(3, 50_000).await;
    let first = write(&nodes, &[samples::register("w1", 0)]).await;
    for node in &nodes {
        node.caught_up(&nodes[first]).await;
    }
    let away = (first + 1) % 3;
    let node = nodes.remove(away);
    let (id, address) = (node.id, node.stop().await);
    let empty = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind(address).await.unwrap();
    let wiped = Node::start(empty.path(), id, listener, 50_000).await;
    let mut refusals = wiped.network.refusals();
    let refused = refusals.wait_for(Option::is_some);
    let refused = tokio::time::timeout(PATIENCE, refused).await.expect("it is told").unwrap();
    assert!(refused.as_ref().unwrap().contains("must join under a new id"), "{refused:?}");
    drop(refused);
    assert_eq!(wiped.view.table().applied, None);
    assert_eq!(wiped.raft.metrics().borrow_watched().last_log_index, None);
}

/// Raft pauses before it makes a request again that failed: one that is down must not be called
/// before the request is made, or it is called without a pause, on a whole core.
#[tokio::test]
async fn a_peer_that_is_down_is_called_once_a_request() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path(), 1, listen().await, 50_000).await;
    let gone = listen().await.local_addr().unwrap().to_string();
    let member = Member { peer: gone, ..Member::default() };
    let mut client = node.network.clone().new_client(2, &member).await;
    let (pause, mut paused) = tokio::sync::mpsc::channel(1);
    let requests = futures::stream::once(Box::pin(async move {
        pause.send(()).await.unwrap();
        AppendEntriesRequest {
            vote: openraft::Vote::new(1, 1),
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: None,
        }
    }));
    let failed = client.stream_append(requests, RPCOption::new(PATIENCE)).await;
    assert!(failed.is_err(), "nobody listens there");
    assert_eq!(paused.recv().await, Some(()), "the request was never asked for");
}

/// Of entries, from a leader to a follower that has answered the first request of it, a heartbeat.
struct Stream {
    _cluster: Cluster,
    client: PeerClient,
    /// Asked for by the client.
    requests: Option<mpsc::Receiver<AppendEntriesRequest<TypeConfig>>>,
    asks: mpsc::Sender<AppendEntriesRequest<TypeConfig>>,
    /// Passes on what is sent, until it is aborted.
    way: JoinHandle<()>,
}

impl Stream {
    async fn prepare() -> Stream {
        let cluster = cluster(3, 50_000).await;
        let nodes = &cluster.nodes;
        let leader = write(nodes, &[samples::register("w1", 0)]).await;
        let (leader, follower) = (&nodes[leader], &nodes[(leader + 1) % 3]);
        follower.caught_up(leader).await;
        let (listener, to) = (listen().await, follower.address);
        let member =
            Member { peer: listener.local_addr().unwrap().to_string(), ..Member::default() };
        let way = tokio::spawn(async move {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(to).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
        });
        let client = leader.network.clone().new_client(follower.id, &member).await;
        let (asks, requests) = mpsc::channel(1);
        let vote = leader.raft.metrics().borrow_watched().vote;
        let (prev_log_id, entries, leader_commit) = (None, Vec::new(), None);
        asks.send(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
            .await
            .unwrap();
        Stream { _cluster: cluster, client, requests: Some(requests), asks, way }
    }

    async fn answers(&mut self) -> BoxStream<'_, Result<Appended, RPCError<TypeConfig>>> {
        let requests = ReceiverStream::new(self.requests.take().unwrap());
        let option = RPCOption::new(PATIENCE);
        let mut answers = self.client.stream_append(requests, option).await.unwrap();
        assert!(matches!(answers.next().await, Some(Ok(Ok(None)))));
        answers
    }
}

type Appended = openraft::raft::StreamAppendResult<TypeConfig>;

/// It would take from openraft what is meant for the stream after it: a member that was sent a snapshot counted
/// as behind for ever then, and the log grew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_nobody_listens_to_asks_for_no_more() {
    let mut stream = Stream::prepare().await;
    drop(stream.answers().await);
    let closed = tokio::time::timeout(PATIENCE, stream.asks.closed()).await;
    closed.expect("the requests are dropped");
}

/// openraft would take an error to what it has told the stream to send since, which it has not sent, and would
/// not count any more what it is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_breaks_with_nothing_due_ends_without_an_error() {
    let mut stream = Stream::prepare().await;
    let way = stream.way.abort_handle();
    let mut answers = stream.answers().await;
    way.abort();
    let end = tokio::time::timeout(PATIENCE, answers.next()).await.expect("it ends");
    assert!(end.is_none(), "{end:?}");
}
