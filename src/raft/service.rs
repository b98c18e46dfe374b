//! The answering side of the peer protocol.
//!
//! Runs before there is a Raft: a node that is still being set up answers probes, and UNAVAILABLE
//! to Raft's calls. Every call's header is checked first; one that is not for this node is refused
//! with FAILED_PRECONDITION, which beside it only `join` answers with.

use std::future::ready;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use fail::fail_point;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use openraft::async_runtime::WatchReceiver as _;
use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderError,
    TransferLeaderRequest, VoteRequest,
};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status, Streaming};
use tracing::{info, warn};

use super::PEER_MESSAGE_MAX_BYTES;
use super::convert::{self, Malformed, read_entry, read_log_id, read_vote, wire_log_id, wire_vote};
use super::identity::{self, Kind, Strictness};
use super::network::{
    CONNECTION_WINDOW_BYTES, FRAME_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, PeerNetwork,
    REFUSAL_KEY, STREAM_WINDOW_BYTES,
};
use super::types::{Raft, Snapshot, TypeConfig};
use crate::blocking::blocking;
use crate::proto::peer as proto;
use crate::proto::peer::append_response::Result as AppendResult;
use crate::proto::peer::peer_server::{Peer, PeerServer};
use crate::proto::peer::snapshot_request::Part;
use crate::proto::peer::transfer_response::Refusal;
use crate::store::codec::{self, SnapshotHead};
use crate::store::{LogStore, SnapshotFile, SnapshotStore, StoreError};

/// How long a peer may take to say that it is the one who calls.
const SESSION_PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// While a snapshot is received: from one word in the log to the next.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// The Raft of this node, once it runs. Clones share it.
#[derive(Clone, Default)]
pub struct RaftCell(Arc<OnceLock<Raft>>);

impl RaftCell {
    pub fn get(&self) -> Option<&Raft> {
        self.0.get()
    }

    /// False where one was set before; that one stays.
    pub fn set(&self, raft: Raft) -> bool {
        self.0.set(raft).is_ok()
    }
}

/// What the node answers on the peer listener besides Raft's own calls. Headers are checked before.
#[tonic::async_trait]
pub trait PeerHooks: Send + Sync + 'static {
    /// A client's call that another node carried here; it came at `came`.
    async fn forward(
        &self,
        request: proto::ForwardRequest,
        came: Instant,
    ) -> proto::ForwardResponse;

    /// Nobody waits any more for a call that was, or will be, carried here.
    fn give_up(&self, request: &proto::GiveUpRequest);

    /// Another node asks before there is a cluster.
    async fn probe(&self, request: proto::ProbeRequest) -> proto::ProbeResponse;

    /// A node asks to be taken in.
    async fn join(&self, request: proto::JoinRequest) -> Result<proto::JoinResponse, Status>;
}

/// Answers for one node.
pub struct PeerService {
    raft: RaftCell,
    network: PeerNetwork,
    hooks: Arc<dyn PeerHooks>,
    snapshots: SnapshotStore,
    log: LogStore,
}

/// The service of the peer listener.
pub fn peer_service(
    raft: RaftCell,
    network: PeerNetwork,
    hooks: Arc<dyn PeerHooks>,
    snapshots: SnapshotStore,
    log: LogStore,
) -> PeerServer<PeerService> {
    PeerServer::new(PeerService { raft, network, hooks, snapshots, log })
        .max_decoding_message_size(PEER_MESSAGE_MAX_BYTES)
        .max_encoding_message_size(PEER_MESSAGE_MAX_BYTES)
}

/// A server with the flow control and keepalive that the peers' own side has, for [`peer_service`].
/// The caller sets TCP_NODELAY on what it accepts.
pub fn peer_transport() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

type Answer<T> = Result<Response<T>, Status>;

fn malformed(why: Malformed) -> Status {
    Status::invalid_argument(why)
}

/// Raft has stopped; the node will end or start again.
fn stopped(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("Raft has stopped: {error}"))
}

/// Returns when Raft has stopped.
async fn has_stopped(raft: Raft) {
    let mut metrics = raft.server_metrics();
    drop(raft);
    while metrics.changed().await.is_ok() {}
}

/// What a node waits to end, once it has refused a call that told it that it must.
const ANSWER_FIRST: Duration = Duration::from_millis(200);

fn refused(network: &PeerNetwork, refusal: identity::Refusal) -> Status {
    let identity::Refusal { kind, why } = refusal;
    if kind == Kind::ReceiverIncarnation {
        // They know this id as somebody else: that is news for this node too, which ends on it. The
        // answer leaves first.
        let (network, why) = (network.clone(), why.clone());
        tokio::spawn(async move {
            tokio::time::sleep(ANSWER_FIRST).await;
            network.note_refusal(&why);
        });
    }
    tracing::warn!(%why, "refused a call of a peer");
    let mut status = Status::failed_precondition(why);
    status.metadata_mut().insert(REFUSAL_KEY, MetadataValue::from_static(kind.on_wire()));
    status
}

impl PeerService {
    fn raft(&self) -> Result<Raft, Status> {
        let raft = self.raft.get().cloned();
        raft.ok_or_else(|| Status::unavailable("this node is not part of a cluster yet"))
    }

    async fn admit_member(&self, header: Option<&proto::Header>) -> Result<(), Status> {
        admit_member(&self.network, header).await
    }
}

/// Of all calls but probes: from here on the sender is who it says. The header is missing from all
/// but a stream's first message.
async fn admit_member(network: &PeerNetwork, header: Option<&proto::Header>) -> Result<(), Status> {
    let identities = &network.identities;
    identities.check(header, Strictness::Member).map_err(|refusal| refused(network, refusal))?;
    let Some(header) = header else { return Ok(()) };
    tokio::select! {
        checked = check_session(network, header) => checked?,
        () = network.closed() => return Err(stopped("this node is stopping")),
    }
    identities.learn(header.from, &header.from_incarnation);
    Ok(())
}

/// The first call of a process: is it the one that answers at the member's address? A node whose
/// log does not have the sender as a member cannot tell, and believes it.
async fn check_session(network: &PeerNetwork, header: &proto::Header) -> Result<(), Status> {
    let identities = &network.identities;
    let proto::Header { from, from_session: calling, .. } = header;
    if identities.runs_as(*from, calling) {
        return Ok(());
    }
    let Some(member) = identities.member(*from) else { return Ok(()) };
    // Surely not executed: that is said by the metadata.
    let unverified = |why: String| {
        let why = format!("node {from} calls, and is not found at its address: {why}");
        let mut status = Status::unavailable(why);
        status.metadata_mut().insert(REFUSAL_KEY, MetadataValue::from_static("unverified"));
        status
    };
    let turn = identities.ask(*from).await;
    if turn.others_did {
        return match identities.runs_as(*from, calling) {
            true => Ok(()),
            false => Err(unverified("it was asked a moment ago".into())),
        };
    }
    let ask = || network.probe(*from, &member.peer, Default::default(), SESSION_PROBE_TIMEOUT);
    let answer = match ask().await {
        // Perhaps over a connection to the process before this one.
        Err(_) => ask().await,
        answer => answer,
    };
    let answer = answer.map_err(unverified)?;
    if answer.session != *calling {
        let found = answer.session.as_str();
        return Err(refused(network, identities.twin(*from, &member.peer, found, calling)));
    }
    identities.found_at_its_address(*from, calling);
    Ok(())
}

/// A peer's stream of entries, for as long as it is there.
struct HeldStream {
    network: PeerNetwork,
    /// The peer has sent all that it meant to: each heartbeat is a stream of its own.
    all_sent: Arc<AtomicBool>,
    /// Dropped, it ends what still reads the stream.
    _reader: oneshot::Sender<()>,
}

impl Drop for HeldStream {
    fn drop(&mut self) {
        if !self.all_sent.load(Ordering::Relaxed) {
            self.network.doubt_leader();
        }
    }
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn vote(&self, request: Request<proto::VoteRequest>) -> Answer<proto::VoteResponse> {
        let message = request.into_inner();
        self.admit_member(message.header.as_ref()).await?;
        let raft = self.raft()?;
        let vote = read_vote(message.vote).map_err(malformed)?;
        let last_log = read_log_id(message.last_log).map_err(malformed)?;
        let mut request = VoteRequest::new(vote, last_log);
        request.leadership_transfer = message.leadership_transfer;
        if message.pre_vote {
            // Perhaps it saw the leader go, and this node had no stream that ended.
            self.network.doubt_leader();
        }
        let answer = match message.pre_vote {
            true => raft.pre_vote(request).await,
            false => raft.vote(request).await,
        };
        let answer = answer.map_err(stopped)?;
        Ok(Response::new(proto::VoteResponse {
            vote: Some(wire_vote(&answer.vote)),
            granted: answer.vote_granted,
            last_log: answer.last_log_id.as_ref().map(wire_log_id),
            incarnation: self.network.identities.local.incarnation.clone(),
        }))
    }

    type AppendStream = BoxStream<'static, Result<proto::AppendResponse, Status>>;

    /// The answer begins before the first request has come: the caller may have none yet.
    async fn append(
        &self,
        request: Request<Streaming<proto::AppendRequest>>,
    ) -> Answer<Self::AppendStream> {
        let raft = self.raft()?;
        // A stream without requests would outlive Raft, and keep its connection open.
        let end = has_stopped(raft.clone());
        let (network, log) = (self.network.clone(), self.log.clone());
        let mut messages = request.into_inner();
        let answers = stream::once(async move {
            let Some(first) = messages.message().await? else { return Ok(stream::empty().boxed()) };
            admit_member(&network, first.header.as_ref()).await?;
            let leader = first.header.as_ref().map_or(0, |header| header.from); // it was checked
            let (reader, gone) = oneshot::channel();
            let all_sent = Arc::<AtomicBool>::default();
            let (led, ended) = (network.clone(), all_sent.clone());
            let stream = HeldStream { network: network.clone(), all_sent, _reader: reader };
            let end = stream::poll_fn(move |_| {
                ended.store(true, Ordering::Relaxed);
                Poll::Ready(None)
            });
            let messages = stream::once(ready(Ok(first))).chain(messages).chain(end);
            let messages = messages.inspect_ok(move |_| led.note_led(leader));
            let requests = as_there_is_room(messages, log)
                .map(|message| message.and_then(|message| read_append(message).map_err(malformed)));
            // What cannot be read ends the stream; the caller sees that answers are missing.
            let requests = requests.scan((), |(), request| {
                let request = request.inspect_err(|error| {
                    tracing::warn!(%error, "an append stream of a peer ends");
                });
                ready(request.ok())
            });
            let requests = requests.take_until(has_stopped(raft.clone())).take_until(gone);
            let mut incarnation = network.identities.local.incarnation.clone();
            let answers = raft.stream_append(requests).map(move |answer| {
                let _held = &stream;
                Ok(wire_answer(answer.map_err(stopped)?, std::mem::take(&mut incarnation)))
            });
            Ok::<_, Status>(answers.boxed())
        });
        Ok(Response::new(answers.try_flatten().take_until(end).boxed()))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<proto::SnapshotRequest>>,
    ) -> Answer<proto::SnapshotResponse> {
        let mut messages = request.into_inner();
        let first = messages.message().await?.and_then(|message| message.part);
        let Some(Part::Head(head)) = first else {
            return Err(malformed("a snapshot begins with its head".into()));
        };
        self.admit_member(head.header.as_ref()).await?;
        let raft = self.raft()?;
        let vote = read_vote(head.vote).map_err(malformed)?;
        let announced =
            codec::decode_head(&head.meta).map_err(|error| malformed(error.to_string()))?;
        let meta = convert::meta(&announced).map_err(|error| malformed(error.to_string()))?;

        let snapshot = receive(self.snapshots.clone(), messages, head.length, announced).await;
        let snapshot =
            snapshot.inspect_err(|why| warn!(%why, "a peer's snapshot was not taken"))?;
        let answer = raft.install_full_snapshot(vote, Snapshot { meta, snapshot }).await;
        let answer = answer.map_err(stopped)?;
        Ok(Response::new(proto::SnapshotResponse { vote: Some(wire_vote(&answer.vote)) }))
    }

    async fn transfer_leader(
        &self,
        request: Request<proto::TransferRequest>,
    ) -> Answer<proto::TransferResponse> {
        let message = request.into_inner();
        self.admit_member(message.header.as_ref()).await?;
        let raft = self.raft()?;
        let from = read_vote(message.from_leader).map_err(malformed)?;
        let last_log = read_log_id(message.last_log).map_err(malformed)?;
        let request = TransferLeaderRequest::new(from, message.to_node, last_log);
        let refusal = match raft.handle_transfer_leader(request).await.map_err(stopped)? {
            Ok(()) => None,
            Err(TransferLeaderError::VoteChanged { actual, .. }) => {
                Some(Refusal::VoteChanged(wire_vote(&actual)))
            }
            Err(TransferLeaderError::LogNotFlushed { actual, .. }) => {
                let last_log = actual.as_ref().map(wire_log_id);
                Some(Refusal::LogBehind(proto::LogNotFlushed { last_log }))
            }
        };
        Ok(Response::new(proto::TransferResponse { refusal }))
    }

    async fn probe(&self, request: Request<proto::ProbeRequest>) -> Answer<proto::ProbeResponse> {
        let message = request.into_inner();
        // Whoever says that this node was removed must be a member for sure.
        let strict = if message.removed { Strictness::Member } else { Strictness::Probe };
        let checked = self.network.identities.check(message.header.as_ref(), strict);
        checked.map_err(|refusal| refused(&self.network, refusal))?;
        if message.removed {
            self.network.note_removed();
        }
        let session = self.network.identities.local.session.clone();
        Ok(Response::new(proto::ProbeResponse { session, ..self.hooks.probe(message).await }))
    }

    async fn join(&self, request: Request<proto::JoinRequest>) -> Answer<proto::JoinResponse> {
        let message = request.into_inner();
        let checked = self.network.identities.check(message.header.as_ref(), Strictness::Probe);
        checked.map_err(|refusal| refused(&self.network, refusal))?;
        Ok(Response::new(self.hooks.join(message).await?))
    }

    async fn forward(
        &self,
        request: Request<proto::ForwardRequest>,
    ) -> Answer<proto::ForwardResponse> {
        let (message, came) = (request.into_inner(), Instant::now());
        self.admit_member(message.header.as_ref()).await?;
        fail_point!("forward-received", |_| Err(Status::unavailable("a failpoint")));
        let answer = self.hooks.forward(message, came).await;
        fail_point!("forward-executed", |_| Err(Status::unavailable("a failpoint")));
        Ok(Response::new(answer))
    }

    async fn give_up(
        &self,
        request: Request<proto::GiveUpRequest>,
    ) -> Answer<proto::GiveUpResponse> {
        let message = request.into_inner();
        self.admit_member(message.header.as_ref()).await?;
        self.hooks.give_up(&message);
        Ok(Response::new(proto::GiveUpResponse {}))
    }
}

/// Entries one after the other, as the log has room for them, before they are decoded: behind a disk that
/// hangs they would pile up, and each stream that takes the place of this one would bring them again.
fn as_there_is_room(
    messages: impl Stream<Item = Result<proto::AppendRequest, Status>>,
    log: LogStore,
) -> impl Stream<Item = Result<proto::AppendRequest, Status>> {
    messages.then(move |message| {
        let log = log.clone();
        async move {
            if message.as_ref().is_ok_and(|message| !message.entries.is_empty()) {
                log.room_for_others().await;
            }
            message
        }
    })
}

/// The entries must follow one another: the log takes no others, and would end the process.
fn read_append(
    message: proto::AppendRequest,
) -> Result<AppendEntriesRequest<TypeConfig>, Malformed> {
    let prev_log_id = read_log_id(message.prev)?;
    let entries: Vec<_> = message.entries.into_iter().map(read_entry).collect::<Result<_, _>>()?;
    let mut next = prev_log_id.map_or(Some(0), |at| at.index.checked_add(1));
    for entry in &entries {
        if Some(entry.log_id.index) != next {
            return Err(format!("entry {} does not follow", entry.log_id));
        }
        next = entry.log_id.index.checked_add(1);
    }
    Ok(AppendEntriesRequest {
        vote: read_vote(message.vote)?,
        prev_log_id,
        leader_commit: read_log_id(message.commit)?,
        entries,
    })
}

fn wire_answer(
    answer: StreamAppendResult<TypeConfig>,
    incarnation: String,
) -> proto::AppendResponse {
    let result = match answer {
        Ok(matched) => {
            AppendResult::Success(proto::Success { matched: matched.as_ref().map(wire_log_id) })
        }
        Err(StreamAppendError::Conflict(at)) => {
            AppendResult::Conflict(proto::Conflict { at: Some(wire_log_id(&at)) })
        }
        Err(StreamAppendError::HigherVote(vote)) => AppendResult::HigherVote(wire_vote(&vote)),
    };
    proto::AppendResponse { result: Some(result), incarnation }
}

/// Receives a snapshot and checks all of it, so that what is handed to Raft can be installed.
async fn receive(
    snapshots: SnapshotStore,
    mut messages: Streaming<proto::SnapshotRequest>,
    length: u64,
    announced: SnapshotHead,
) -> Result<SnapshotFile, Status> {
    let mut incoming = on_disk(move || snapshots.receive()).await?;
    let mut received = 0;
    info!(bytes = length, "a peer sends its snapshot");
    let mut told = Instant::now();
    let crc32 = loop {
        match messages.message().await?.and_then(|message| message.part) {
            Some(Part::Data(data)) => {
                received += data.len() as u64;
                if received > length {
                    return Err(malformed(format!("more than the announced {length} bytes")));
                }
                incoming = on_disk(move || incoming.write(&data).map(|()| incoming)).await?;
                if told.elapsed() >= TELL_EVERY {
                    told = Instant::now();
                    info!(received, of = length, "a peer sends its snapshot");
                }
            }
            Some(Part::End(proto::SnapshotEnd { crc32 })) => break crc32,
            Some(Part::Head(_)) | None => {
                return Err(malformed("the snapshot has no end".into()));
            }
        }
    };
    info!(bytes = length, "a peer's snapshot is here, and is being checked");
    let file = on_disk(move || {
        let file = incoming.finish(length, crc32)?;
        file.verify()?;
        Ok(file)
    });
    match file.await? {
        file if *file.head() == announced => Ok(file),
        _ => Err(malformed("the snapshot is not the one that was announced".into())),
    }
}

/// One step with the disk.
async fn on_disk<T: Send + 'static>(
    step: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Status> {
    let failed = |why: &dyn std::fmt::Display| Status::internal(format!("a snapshot: {why}"));
    blocking(step).await.map_err(|error| failed(&error))?.map_err(|error| {
        tracing::error!(%error, "a snapshot of a peer cannot be taken");
        failed(&error)
    })
}

#[cfg(test)]
mod tests {
    use openraft::entry::RaftEntry as _;

    use super::*;
    use crate::raft::convert::position;
    use crate::raft::types::{Entry, EntryPayload, LeaderId, LogId};
    use crate::store::{DataDir, LogRecord, SimulatedDisk};

    fn at(index: u64) -> LogId {
        LogId { leader_id: LeaderId { term: 1, node_id: 1 }, index }
    }

    #[test]
    fn entries_that_do_not_follow_are_malformed() {
        let read = |prev: Option<u64>, entries: &[u64]| {
            let entry = |index: &u64| Entry::new(at(*index), EntryPayload::Blank);
            read_append(proto::AppendRequest {
                header: None,
                vote: Some(wire_vote(&crate::raft::Vote::new(1, 1))),
                prev: prev.map(|index| wire_log_id(&at(index))),
                commit: None,
                entries: entries.iter().map(|i| convert::wire_entry(&entry(i))).collect(),
            })
        };
        assert!(read(None, &[0, 1]).is_ok());
        assert!(read(Some(7), &[8, 9]).is_ok());
        assert!(read(Some(u64::MAX), &[]).is_ok());
        for (prev, entries) in
            [(None, &[1][..]), (Some(7), &[7]), (Some(7), &[8, 10]), (Some(u64::MAX), &[0])]
        {
            assert!(read(prev, entries).unwrap_err().contains("does not follow"));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn behind_a_disk_that_hangs_no_more_entries_are_taken() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), SimulatedDisk::default());
        let log = DataDir::simulated(dir.path(), 1, disk.clone()).unwrap().log().unwrap();
        let first = || proto::AppendRequest {
            entries: vec![convert::wire_entry(&Entry::new(at(0), EntryPayload::Blank))],
            ..Default::default()
        };
        let heartbeat = proto::AppendRequest::default;
        let sent = [heartbeat(), first(), heartbeat()].map(Ok::<_, Status>);
        let mut taken = std::pin::pin!(as_there_is_room(stream::iter(sent), log.clone()));

        disk.set_latency(Duration::from_secs(3600));
        for index in 0..10 {
            let large = vec![0; 4 << 20];
            log.append(vec![LogRecord::new(position(&at(index)), large)], Box::new(|| ())).unwrap();
        }
        assert!(taken.next().await.unwrap().unwrap().entries.is_empty());
        let next = tokio::time::timeout(Duration::from_secs(60), taken.next()).await;
        next.expect_err("there is no room for its entries");
        // One flush later.
        assert_eq!(taken.next().await.unwrap().unwrap().entries.len(), 1);
        assert!(taken.next().await.is_some());
    }
}
