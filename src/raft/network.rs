//! The calling side of the peer protocol: Raft's messages, probes and forwarded calls.
//!
//! Three HTTP/2 connections lead to each peer address, one a [`Lane`]; each is made at its first call
//! and again after it broke. Entries go over one stream a follower: requests are sent as openraft hands
//! them out, answers come in their order. A snapshot is read from its file in chunks as they go out.
//!
//! - What breaks one lane leaves the others whole, and no lane waits behind another's burst: calls of
//!   clients and probes come in masses, and are given up in masses.
//! - Who stops waiting for an answer does not reset the stream: [`OUTLIVES`] says why.
//! - Who cannot be reached, or refuses by name, is unreachable: openraft backs off. What broke on
//!   the way is a network error and tried again soon.
//! - Silence is bounded: connecting, each answer, each step of a snapshot.
//! - [`ForwardError::NotSent`] only where the peer surely did not begin; any doubt is `Broken`.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt as _};
use metrics::histogram;
use openraft::errors::{
    NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
    StreamAppendResult, TransferLeaderError, TransferLeaderRequest, TransferLeaderResponse,
    VoteRequest, VoteResponse,
};
use openraft::type_config::alias::WatchReceiverOf;
use openraft::{OptionalSend, RPCTypes};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status, Streaming};

use super::PEER_MESSAGE_MAX_BYTES;
use super::convert::{self, Malformed, read_log_id, read_vote, wire_entry, wire_log_id, wire_vote};
use super::flow::{Flow, Sent, paced};
use super::identity::{ClusterCell, Identities, Kind, LocalIdentity};
use super::machine::TableView;
use super::types::{Member, Metrics, NodeId, Snapshot, TypeConfig, Vote};
use crate::blocking::blocking;
use crate::causes::{causes, never_connected, nobody_listens};
use crate::lock::guard;
use crate::proto::peer as proto;
use crate::proto::peer::append_response::Result as AppendResult;
use crate::proto::peer::peer_client::PeerClient as Rpc;
use crate::proto::peer::snapshot_request::Part;
use crate::proto::peer::transfer_response::Refusal;
use crate::store::{SnapshotFile, codec, fatal};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
pub(super) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a follower may take to write what it was sent. openraft's own limit is a heartbeat,
/// which a slow disk exceeds; a dead peer is found out by the keepalive.
const APPEND_TIMEOUT: Duration = Duration::from_secs(5);
/// Reasons why a peer takes no entries that are told until it does.
const REASONS_MAX: usize = 8;
/// How long a peer has to show that it is alive, once its stream has ended.
const GONE_TIMEOUT: Duration = Duration::from_millis(500);
const SNAPSHOT_CHUNK_BYTES: usize = 256 << 10;
/// Chunks that were read and not sent yet.
const SNAPSHOT_CHUNKS_AHEAD: usize = 4;
/// Flow control of a stream: some append requests may be under way.
pub(super) const STREAM_WINDOW_BYTES: u32 = 8 << 20;
pub(super) const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// A chunk of a snapshot goes in one frame, and not in sixteen.
pub(super) const FRAME_BYTES: u32 = 1 << 20;

/// Of which kind a refusal is: metadata beside FAILED_PRECONDITION.
pub(super) const REFUSAL_KEY: &str = "portwarden-refusal";

/// How long a call goes on after its caller has stopped waiting. A peer that is slow answers then, and
/// the stream ends as it should: h2 closes a connection on which more than a few streams were reset
/// before they were looked at, and the outcome of every write on it would be unknown.
const OUTLIVES: Duration = Duration::from_secs(5);

/// What shares a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lane {
    Raft,
    /// Of clients, carried to the leader; and of nodes that join.
    Calls,
    Probes,
}

type Rejected = RPCError<TypeConfig>;
/// What a follower says to entries.
type Heard = Result<StreamAppendResult<TypeConfig>, Rejected>;

/// What became of a forwarded call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForwardError {
    /// Surely not executed: it never reached the peer's handler.
    #[error("not sent: {0}")]
    NotSent(String),
    /// May have been executed.
    #[error("outcome unknown: {0}")]
    Broken(String),
}

/// Why a node is not taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// Not as it is: under this id, over this data directory or at this address.
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    NotNow(String),
}

/// The way to the peers. Clones share connections and what was learnt.
#[derive(Debug, Clone)]
pub struct PeerNetwork {
    pub(super) identities: Identities,
    channels: Arc<Mutex<BTreeMap<(Lane, String), Channel>>>,
    dial: Dial,
    refusal: Arc<watch::Sender<Option<String>>>,
    removed: Arc<watch::Sender<bool>>,
    /// Who sent entries or a heartbeat here last, and when.
    led: Arc<Mutex<Option<(NodeId, Instant)>>>,
    doubted: Arc<Notify>,
    closed: Arc<watch::Sender<bool>>,
    /// Of the last call that was carried to a peer.
    call: Arc<AtomicU64>,
    /// Members that lack an entry before this one are sent a snapshot.
    left_behind: Arc<AtomicU64>,
    /// Peers that take no entries now, and what was said of why.
    failing: Arc<Mutex<BTreeMap<NodeId, BTreeSet<String>>>>,
}

impl PeerNetwork {
    pub fn new(local: LocalIdentity, cluster: ClusterCell) -> PeerNetwork {
        PeerNetwork::over(local, cluster, Dial::default())
    }

    pub fn over(local: LocalIdentity, cluster: ClusterCell, dial: Dial) -> PeerNetwork {
        PeerNetwork {
            dial,
            identities: Identities::new(local, cluster),
            channels: Arc::default(),
            refusal: Arc::new(watch::channel(None).0),
            removed: Arc::new(watch::channel(false).0),
            led: Arc::default(),
            doubted: Arc::default(),
            closed: Arc::new(watch::channel(false).0),
            call: Arc::default(),
            left_behind: Arc::default(),
            failing: Arc::default(),
        }
    }

    /// Says so in the log, each reason once. Raft tries on several times a second, and its own words on
    /// that are kept out of it.
    fn fails(&self, member: NodeId, why: &Rejected) {
        let why = why.to_string();
        let mut failing = guard(&self.failing);
        let told = failing.entry(member).or_default();
        if told.len() < REASONS_MAX && told.insert(why.clone()) {
            tracing::warn!(member, why, "a member takes no entries");
        }
    }

    fn takes(&self, member: NodeId) {
        if guard(&self.failing).remove(&member).is_some() {
            tracing::info!(member, "a member takes entries again");
        }
    }

    /// From now on calls are checked against the members of the log. To be called once Raft has
    /// read its log, and before it is called by peers.
    pub fn follow(&self, metrics: WatchReceiverOf<TypeConfig, Metrics>, view: TableView) {
        self.identities.follow(metrics, view);
    }

    /// The last time that a peer and this node disagreed about who this node is: in words that name
    /// both sides. A node that lost its disk learns of it here, and one that is a copy of another.
    /// Its process must end.
    pub fn refusals(&self) -> watch::Receiver<Option<String>> {
        self.refusal.subscribe()
    }

    /// Whether a peer has said that this node was removed from the cluster.
    pub fn removed(&self) -> watch::Receiver<bool> {
        self.removed.subscribe()
    }

    /// Who sent entries or a heartbeat here last, as a leader does, and when.
    pub fn last_led(&self) -> Option<(NodeId, Instant)> {
        *guard(&self.led)
    }

    pub(super) fn note_led(&self, by: NodeId) {
        *guard(&self.led) = Some((by, Instant::now()));
    }

    /// From now on a member that lacks an entry before this one is sent a snapshot in place of the log, once it
    /// has said so. openraft keeps the log for whoever is being sent entries, however slowly they are taken.
    pub fn leave_behind(&self, index: u64) {
        self.left_behind.fetch_max(index, Ordering::Relaxed);
    }

    fn is_left_behind(&self, heard: &Heard) -> bool {
        let matched = match heard {
            Ok(Ok(Some(at))) => at.index,
            _ => 0,
        };
        matched < self.left_behind.load(Ordering::Relaxed)
    }

    /// Returns when there is reason to ask whether the leader lives: a stream of entries has broken off, its
    /// process perhaps with it, or a peer wants to be elected. One may wait.
    pub async fn doubted(&self) {
        self.doubted.notified().await;
    }

    pub(super) fn doubt_leader(&self) {
        self.doubted.notify_one();
    }

    pub(super) fn note_removed(&self) {
        if !self.removed.send_replace(true) {
            tracing::warn!("this node was removed from the cluster");
        }
    }

    /// Does what this node has applied say so?
    pub fn look_whether_removed(&self) {
        if self.identities.was_removed() {
            self.note_removed();
        }
    }

    pub(super) fn note_refusal(&self, why: &str) {
        self.refusal.send_replace(Some(why.into()));
    }

    /// What a peer answered, for a person; a refusal that is about this node is taken note of.
    fn heard(&self, to: NodeId, peer_addr: &str, status: &Status) -> String {
        let why = format!("node {to} at {peer_addr}: {}", describe(status));
        let kind = status.metadata().get(REFUSAL_KEY).and_then(|kind| kind.to_str().ok());
        let refused = status.code() == Code::FailedPrecondition;
        if refused && kind.is_some_and(Kind::ends_sender) {
            self.note_refusal(&why);
        }
        if refused && kind == Some(Kind::SenderRemoved.on_wire()) {
            self.note_removed();
        }
        why
    }

    /// Carries a call to another node, within the request's `remaining_ms`. The header is filled in
    /// here.
    pub async fn forward(
        &self,
        to: NodeId,
        peer_addr: &str,
        mut request: proto::ForwardRequest,
    ) -> Result<proto::ForwardResponse, ForwardError> {
        let left = Duration::from_millis(request.remaining_ms);
        if left.is_zero() {
            return Err(ForwardError::NotSent("the deadline is past".into()));
        }
        if request.request.len() >= PEER_MESSAGE_MAX_BYTES {
            let bytes = request.request.len();
            return Err(ForwardError::NotSent(format!("a request of {bytes} bytes is too large")));
        }
        request.header = Some(self.identities.header(to));
        request.call = self.call.fetch_add(1, Ordering::Relaxed) + 1;
        let mut rpc = self.rpc(Lane::Calls, peer_addr).map_err(ForwardError::NotSent)?;
        let mut waited_for = WaitedFor {
            network: self.clone(),
            rpc: rpc.clone(),
            message: Some(proto::GiveUpRequest {
                header: request.header.clone(),
                call: request.call,
            }),
        };
        let answer = self.answered(left, async move { rpc.forward(request).await }).await;
        if answer.is_some() {
            waited_for.message = None;
        }
        match answer {
            Some(Ok(response)) => Ok(response),
            Some(Err(status)) => {
                let why = self.heard(to, peer_addr, &status);
                // The service itself answers so only before it hands the call on.
                let refused = status.metadata().contains_key(REFUSAL_KEY)
                    || matches!(status.code(), Code::FailedPrecondition | Code::Unimplemented);
                match refused || never_connected(&status) {
                    true => Err(ForwardError::NotSent(why)),
                    false => Err(ForwardError::Broken(why)),
                }
            }
            None => Err(ForwardError::Broken(format!(
                "node {to} at {peer_addr} did not answer within {} ms",
                left.as_millis()
            ))),
        }
    }

    /// Asks a node for its state before there is a cluster. The header is filled in here.
    pub async fn probe(
        &self,
        to: NodeId,
        peer_addr: &str,
        request: proto::ProbeRequest,
        timeout: Duration,
    ) -> Result<proto::ProbeResponse, String> {
        match self.probed(to, peer_addr, request, timeout).await? {
            Some(Ok(response)) => Ok(response),
            Some(Err(status)) => Err(self.heard(to, peer_addr, &status)),
            None => Err(format!(
                "node {to} at {peer_addr} did not answer within {} ms",
                timeout.as_millis()
            )),
        }
    }

    /// The answer as it came; `None`: none in time.
    async fn probed(
        &self,
        to: NodeId,
        peer_addr: &str,
        mut request: proto::ProbeRequest,
        timeout: Duration,
    ) -> Result<Option<Result<proto::ProbeResponse, Status>>, String> {
        request.header = Some(self.identities.header(to));
        let mut rpc = self.rpc(Lane::Probes, peer_addr)?;
        Ok(self.answered(timeout, async move { rpc.probe(request).await }).await)
    }

    /// Is the process that was this member surely gone? Its host says that nobody listens at its
    /// address, or another process answers there. Silence proves nothing.
    pub async fn is_gone(&self, peer: NodeId, peer_addr: &str) -> bool {
        // The first attempt may find out no more than that the old connection is broken.
        for _ in 0..2 {
            match self.probed(peer, peer_addr, Default::default(), GONE_TIMEOUT).await {
                Ok(Some(Ok(answer))) => {
                    return self.identities.ran_as_another(peer, &answer.session);
                }
                Ok(Some(Err(status))) if nobody_listens(&status) => return true,
                // Who was removed asks nobody else, and hears of it here.
                Ok(Some(Err(status))) => drop(self.heard(peer, peer_addr, &status)),
                Ok(None) | Err(_) => return false,
            }
        }
        false
    }

    /// Asks the node at this address to take this one in. The header is filled in here.
    pub async fn join(
        &self,
        peer_addr: &str,
        mut request: proto::JoinRequest,
        timeout: Duration,
    ) -> Result<proto::JoinResponse, JoinError> {
        request.header = Some(self.identities.header(0));
        let mut rpc = self.rpc(Lane::Calls, peer_addr).map_err(JoinError::NotNow)?;
        match self.answered(timeout, async move { rpc.join(request).await }).await {
            Some(Ok(response)) => Ok(response),
            Some(Err(status)) => {
                let why = format!("the node at {peer_addr}: {}", describe(&status));
                Err(match status.code() {
                    Code::FailedPrecondition | Code::InvalidArgument => JoinError::Refused(why),
                    Code::Unimplemented => JoinError::Refused(format!(
                        "{peer_addr} does not take nodes in: the address of a member for that is its \
                         `serve --listen-peer`"
                    )),
                    _ => JoinError::NotNow(why),
                })
            }
            None => {
                let ms = timeout.as_millis();
                let why = format!("the node at {peer_addr} did not answer within {ms} ms");
                Err(JoinError::NotNow(why))
            }
        }
    }

    /// Waits for an answer at most so long. The call goes on without its caller, for [`OUTLIVES`].
    async fn answered<T: Send + 'static>(
        &self,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>> + Send + 'static,
    ) -> Option<Result<T, Status>> {
        let network = self.clone();
        let call = tokio::spawn(async move {
            tokio::select! {
                answer = tokio::time::timeout(limit + OUTLIVES, call) => answer.ok(),
                () = network.closed() => Some(Err(Status::unavailable("this node is stopping"))),
            }
        });
        let answer = tokio::time::timeout(limit, call).await.ok()?.ok()??;
        Some(answer.map(Response::into_inner))
    }

    /// Ends every connection: two nodes in one process would keep each other's open for ever.
    pub fn close(&self) {
        self.closed.send_replace(true);
        guard(&self.channels).clear();
    }

    /// Resolves when this node stops.
    pub async fn closed(&self) {
        let _ = self.closed.subscribe().wait_for(|closed| *closed).await;
    }

    fn rpc(&self, lane: Lane, peer_addr: &str) -> Result<Rpc<Channel>, String> {
        if *self.closed.borrow() {
            return Err("this node is stopping".into());
        }
        let mut channels = guard(&self.channels);
        let channel = match channels.entry((lane, peer_addr.into())) {
            Entry::Occupied(held) => held.get().clone(),
            Entry::Vacant(place) => place.insert(connect(peer_addr, &self.dial)?).clone(),
        };
        Ok(Rpc::new(channel)
            .max_decoding_message_size(PEER_MESSAGE_MAX_BYTES)
            .max_encoding_message_size(PEER_MESSAGE_MAX_BYTES))
    }
}

/// A call that was carried to a peer, while somebody waits for its answer. Where that ends before there is
/// one, the peer is told.
struct WaitedFor {
    network: PeerNetwork,
    rpc: Rpc<Channel>,
    /// `None`: it was answered.
    message: Option<proto::GiveUpRequest>,
}

impl Drop for WaitedFor {
    fn drop(&mut self) {
        let (Some(message), Ok(_)) = (self.message.take(), tokio::runtime::Handle::try_current())
        else {
            return;
        };
        let (network, mut rpc) = (self.network.clone(), self.rpc.clone());
        tokio::spawn(async move {
            network.answered(OUTLIVES, async move { rpc.give_up(message).await }).await
        });
    }
}

/// How connections are made.
#[derive(Clone)]
pub struct Dial(Arc<dyn Fn(Endpoint) -> Channel + Send + Sync>);

impl Dial {
    /// `dial` must not connect before the first call.
    pub fn by(dial: impl Fn(Endpoint) -> Channel + Send + Sync + 'static) -> Dial {
        Dial(Arc::new(dial))
    }
}

impl Default for Dial {
    /// By TCP.
    fn default() -> Dial {
        Dial::by(|endpoint| endpoint.connect_lazy())
    }
}

impl std::fmt::Debug for Dial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dial").finish_non_exhaustive()
    }
}

/// Connects at the first call, not here.
fn connect(peer_addr: &str, dial: &Dial) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{peer_addr}"))
        .map_err(|error| format!("{peer_addr:?} is not an address: {error}"))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    Ok((dial.0)(endpoint))
}

/// The message and its innermost cause, which says what happened.
fn describe(status: &Status) -> String {
    match causes(status).last() {
        Some(cause) => format!("{} ({cause})", status.message()),
        None => status.message().into(),
    }
}

impl RaftNetworkFactory<TypeConfig> for PeerNetwork {
    type Network = PeerClient;

    async fn new_client(&mut self, target: NodeId, node: &Member) -> PeerClient {
        let (network, member) = (self.clone(), node.clone());
        PeerClient { network, target, address: node.peer.clone(), member }
    }
}

/// Raft's way to one peer.
#[derive(Debug, Clone)]
pub struct PeerClient {
    network: PeerNetwork,
    target: NodeId,
    address: String,
    /// As the membership had it when Raft turned to this peer.
    member: Member,
}

impl PeerClient {
    fn rpc(&self) -> Result<Rpc<Channel>, Rejected> {
        self.network
            .rpc(Lane::Raft, &self.address)
            .map_err(|why| Unreachable::from_string(why).into())
    }

    /// Raft may know the membership a moment before everybody else does.
    fn header(&self) -> Option<proto::Header> {
        let mut header = self.network.identities.header(self.target);
        if header.cluster.is_empty() {
            header.cluster = self.member.cluster_id.clone();
        }
        if !self.member.incarnation.is_empty() {
            header.to_incarnation = self.member.incarnation.clone();
        }
        Some(header)
    }

    fn rejected(&self, status: &Status) -> Rejected {
        let why = self.network.heard(self.target, &self.address, status);
        let answered = causes(status).next().is_none();
        match answered || never_connected(status) {
            true => Unreachable::from_string(why).into(),
            false => NetworkError::from_string(why).into(),
        }
    }

    fn malformed(&self, why: Malformed) -> Rejected {
        let (target, address) = (self.target, &self.address);
        NetworkError::from_string(format!("node {target} at {address} answered nonsense: {why}"))
            .into()
    }

    fn silent(&self, action: RPCTypes, timeout: Duration) -> Timeout<TypeConfig> {
        let id = self.network.identities.local.node_id;
        Timeout { action, id, target: self.target, timeout }
    }

    async fn within<T>(
        &self,
        action: RPCTypes,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Rejected> {
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.rejected(&status)),
            Err(_) => Err(self.silent(action, limit).into()),
        }
    }

    async fn ask_for_vote(
        &self,
        rpc: VoteRequest<TypeConfig>,
        pre_vote: bool,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Rejected> {
        let request = proto::VoteRequest {
            header: self.header(),
            vote: Some(wire_vote(&rpc.vote)),
            last_log: rpc.last_log_id.as_ref().map(wire_log_id),
            leadership_transfer: rpc.leadership_transfer,
            pre_vote,
        };
        let mut peer = self.rpc()?;
        let answer = self.within(RPCTypes::Vote, option.soft_ttl(), peer.vote(request)).await?;
        let bound = &self.member.incarnation;
        if !bound.is_empty() && *bound != answer.incarnation {
            let (target, found) = (self.target, &answer.incarnation);
            let why = format!("node {target} is bound to {bound}, and {found} voted for it");
            return Err(Unreachable::from_string(why).into());
        }
        self.network.identities.learn(self.target, &answer.incarnation);
        let read = || {
            let vote = read_vote(answer.vote)?;
            Ok(VoteResponse::new(vote, read_log_id(answer.last_log)?, answer.granted))
        };
        read().map_err(|why| self.malformed(why))
    }

    fn read_append(&self, answer: proto::AppendResponse) -> Heard {
        self.network.identities.learn(self.target, &answer.incarnation);
        let read = || match answer.result.ok_or("the result is missing")? {
            AppendResult::Success(success) => Ok(Ok(read_log_id(success.matched)?)),
            AppendResult::Conflict(conflict) => {
                let at = read_log_id(conflict.at)?.ok_or("the conflict is nowhere")?;
                Ok(Err(StreamAppendError::Conflict(at)))
            }
            AppendResult::HigherVote(vote) => {
                Ok(Err(StreamAppendError::HigherVote(read_vote(Some(vote))?)))
            }
        };
        read().map_err(|why| self.malformed(why))
    }
}

fn wire_append(
    header: Option<proto::Header>,
    request: &AppendEntriesRequest<TypeConfig>,
) -> proto::AppendRequest {
    proto::AppendRequest {
        header,
        vote: Some(wire_vote(&request.vote)),
        prev: request.prev_log_id.as_ref().map(wire_log_id),
        commit: request.leader_commit.as_ref().map(wire_log_id),
        entries: request.entries.iter().map(wire_entry).collect(),
    }
}

/// The answers of one append stream, with a limit on silence while one is due.
struct Answers<'a> {
    client: &'a PeerClient,
    answers: Streaming<proto::AppendResponse>,
    flow: Flow,
    /// Those that came and are not to be handed on yet; and those that are.
    came: VecDeque<(Sent, Heard)>,
    handed: VecDeque<Heard>,
}

impl Answers<'_> {
    /// `None` once the peer has answered everything and there will be no more requests.
    async fn next(&mut self) -> Option<Heard> {
        let client = self.client;
        let broke = |how: &str| {
            let (target, address) = (client.target, &client.address);
            let why = format!("node {target} at {address} {how}");
            Some(Err(NetworkError::from_string(why).into()))
        };
        loop {
            if let Some(answer) = self.handed.pop_front() {
                return Some(answer);
            }
            self.flow.taken();
            let due = self.flow.is_due();
            match tokio::time::timeout(APPEND_TIMEOUT, self.answers.message()).await {
                Ok(Ok(Some(answer))) => {
                    let Some(sent) = self.flow.answered() else {
                        return broke("answered what it was not asked");
                    };
                    let read = client.read_append(answer);
                    // After a refusal nothing more comes.
                    if !matches!(read, Ok(Ok(_))) {
                        return Some(read);
                    }
                    if sent.has_entries {
                        let seconds = sent.at.elapsed().as_secs_f64();
                        histogram!("portwarden_replicate_seconds").record(seconds);
                    }
                    // A heartbeat keeps nothing in the log, and whoever answers it is there.
                    if sent.has_entries && client.network.is_left_behind(&read) {
                        return broke("is behind by more than the log should keep");
                    }
                    client.network.takes(client.target);
                    self.came.push_back((sent, read));
                    self.handed = self.flow.hand_on(&mut self.came);
                }
                Ok(Ok(None)) if self.flow.is_due() => return broke("left requests unanswered"),
                Ok(Ok(None)) => return None,
                // openraft may have something else to send since the last answer, and would take an error
                // for that to what it has not sent yet. Whoever is not there is found out by the next request.
                Ok(Err(_)) if !self.flow.is_due() => return None,
                Ok(Err(status)) => return Some(Err(client.rejected(&status))),
                // One that was due all the time.
                Err(_) if due => {
                    let silent = client.silent(RPCTypes::AppendEntries, APPEND_TIMEOUT);
                    return Some(Err(silent.into()));
                }
                Err(_) => {}
            }
        }
    }
}

impl RaftNetworkV2<TypeConfig> for PeerClient {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, Rejected> {
        let mut answers = self.stream_append(stream::iter([rpc]), option).await?;
        match answers.next().await {
            Some(answer) => answer.map(AppendEntriesResponse::from),
            None => Err(NetworkError::from_string("the peer closed the stream").into()),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Heard>, Rejected>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        let client: &'s PeerClient = self;
        let mut header = client.header();
        let (requests, flow) = paced(input);
        let mut requests = requests.map(move |request| wire_append(header.take(), &request));
        Box::pin(async move {
            // Raft's pause after a failure lies in its requests. Where they are only asked for once
            // the peer is reached, one that is down is called without a pause.
            let first = requests.next().await;
            let requests = stream::iter(first).chain(requests);
            let limit = option.soft_ttl().max(CONNECT_TIMEOUT);
            let fails = |why: &Rejected| client.network.fails(client.target, why);
            let opened = async {
                let mut peer = client.rpc()?;
                client.within(RPCTypes::AppendEntries, limit, peer.append(requests)).await
            };
            let answers = opened.await.inspect_err(fails)?;
            let (came, handed) = Default::default();
            let answers = Answers { client, answers, flow, came, handed };
            let answers = stream::unfold(Some(answers), move |state| async move {
                let mut answers = state?;
                let answer = answers.next().await?.inspect_err(fails);
                // After a refusal the peer answers nothing more.
                let goes_on = matches!(answer, Ok(Ok(_)));
                Some((answer, goes_on.then_some(answers)))
            });
            Ok(answers.boxed())
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Rejected> {
        self.ask_for_vote(rpc, false, option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Rejected> {
        self.ask_for_vote(rpc, true, option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let head = proto::SnapshotHead {
            header: self.header(),
            vote: Some(wire_vote(&vote)),
            meta: codec::encode_head(&convert::head(&snapshot.meta)).into(),
            length: snapshot.snapshot.length_bytes(),
        };
        let mut peer = self.rpc()?;
        let (parts, outgoing) = mpsc::channel(SNAPSHOT_CHUNKS_AHEAD);
        let progress = Arc::new(AtomicU64::new(0));
        let counter = progress.clone();
        let file = snapshot.snapshot;
        // Ends by itself when the call does: it cannot send then.
        tokio::spawn(send_file(file.clone(), head, parts, counter));
        let call = peer.snapshot(ReceiverStream::new(outgoing));
        let limit = option.soft_ttl();
        tokio::select! {
            closed = cancel => Err(closed.into()),
            () = stalled(&progress, limit) => {
                Err(self.silent(RPCTypes::InstallSnapshot, limit).into())
            }
            answer = call => {
                let answer = match answer {
                    Ok(answer) => answer.into_inner(),
                    Err(status) => {
                        if matches!(status.code(), Code::Internal | Code::InvalidArgument) {
                            check(file).await;
                        }
                        return Err(self.rejected(&status).into());
                    }
                };
                let vote = read_vote(answer.vote).map_err(|why| self.malformed(why))?;
                Ok(SnapshotResponse::new(vote))
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, Rejected> {
        let message = proto::TransferRequest {
            header: self.header(),
            from_leader: Some(wire_vote(request.from_leader())),
            to_node: *request.to_node_id(),
            last_log: request.last_log_id().map(wire_log_id),
        };
        let mut peer = self.rpc()?;
        let call = peer.transfer_leader(message);
        let answer = self.within(RPCTypes::TransferLeader, option.soft_ttl(), call).await?;
        let read = || {
            Ok(match answer.refusal {
                None => Ok(()),
                Some(Refusal::VoteChanged(actual)) => Err(TransferLeaderError::VoteChanged {
                    expected: *request.from_leader(),
                    actual: read_vote(Some(actual))?,
                }),
                Some(Refusal::LogBehind(behind)) => Err(TransferLeaderError::LogNotFlushed {
                    expected: request.last_log_id().copied(),
                    actual: read_log_id(behind.last_log)?,
                }),
            })
        };
        read().map_err(|why| self.malformed(why))
    }
}

/// Ends the process where the file is no more what it was when it was written: the peer would be sent it
/// again for ever. The next start sets it aside and takes the older one.
async fn check(file: SnapshotFile) {
    if let Ok(Err(error)) = blocking(move || file.check()).await {
        fatal("a snapshot that a member needs is damaged", &error);
    }
}

/// Sends a snapshot: its head, the file in chunks, its end. A receiver that has gone ends it, and so
/// does an error of the disk: the peer misses the end then, and refuses what it has.
async fn send_file(
    file: SnapshotFile,
    head: proto::SnapshotHead,
    parts: mpsc::Sender<proto::SnapshotRequest>,
    progress: Arc<AtomicU64>,
) {
    let send = async |part| {
        progress.fetch_add(1, Ordering::Relaxed);
        parts.send(proto::SnapshotRequest { part: Some(part) }).await.is_ok()
    };
    if !send(Part::Head(head)).await {
        return;
    }
    let mut crc = crc32fast::Hasher::new();
    let mut offset = 0;
    loop {
        let chunk = match read_chunk(&file, offset).await {
            Ok(chunk) => chunk,
            Err(error) => {
                let path = file.path().display();
                tracing::error!(%path, %error, "a snapshot cannot be read and is not sent");
                return;
            }
        };
        if chunk.is_empty() {
            break;
        }
        crc.update(&chunk);
        offset += chunk.len() as u64;
        if !send(Part::Data(chunk.into())).await {
            return;
        }
    }
    send(Part::End(proto::SnapshotEnd { crc32: crc.finalize() })).await;
}

/// Empty at the end.
async fn read_chunk(file: &SnapshotFile, offset: u64) -> std::io::Result<Vec<u8>> {
    let file = file.clone();
    let read = blocking(move || {
        let mut chunk = vec![0; SNAPSHOT_CHUNK_BYTES];
        loop {
            match file.read_at(&mut chunk, offset) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
                Ok(read) => {
                    chunk.truncate(read);
                    return Ok(chunk);
                }
            }
        }
    });
    read.await.map_err(std::io::Error::other)?
}

/// Returns when nothing was sent for so long; the last wait is for the peer to install it.
async fn stalled(progress: &AtomicU64, limit: Duration) {
    let mut seen = None;
    loop {
        let now = progress.load(Ordering::Relaxed);
        if seen == Some(now) {
            return;
        }
        seen = Some(now);
        sleep(limit).await;
    }
}
