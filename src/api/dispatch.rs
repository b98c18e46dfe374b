//! The one way of a unary call through a node.
//!
//! A call is parsed and checked where it arrives, then runs where the leader is: here, or over one
//! hop at a peer, which runs it through [`LocalCalls`] and never forwards it again. The caller's
//! deadline, less a little so that the answer is back in time, bounds everything.
//!
//! What becomes of an attempt that brought no answer:
//!
//! | attempt | write | read |
//! |---|---|---|
//! | not the leader (here or at the peer), not sent | again, within the deadline | again |
//! | connection broke, outcome unknown at the leader | answered OUTCOME_UNKNOWN, never repeated here | again |
//! | not ready, overloaded, expired | answered as such: nothing was changed | the same |
//! | any answer of the table, refusals included | passed on | passed on |
//!
//! A method is a [`Write`], which proposes one command, or a [`Read`], which answers from a view;
//! those of both kinds are listed once, in `Api::run_local`.

use std::collections::BTreeSet;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use futures::Stream;
use prost::Message;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};
use tracing::Instrument as _;

use super::convert::Addresses;
use super::pages::{PageToken, VIEWS_EXPIRE_EVERY, Views};
use super::{allocator, cluster, errors, leases, observe, session, watch as changes, workers};
use crate::core::{Command, Invalid, LeaseId, Millis, Outcome, Revision, Specs, State, WorkerName};
use crate::lock::guard;
use crate::node::backups::Pieces;
use crate::node::members::{MemberChange, NotChanged};
use crate::node::sweeper::{Heard, Sample, Unheard};
use crate::node::watch::Hub;
use crate::node::{
    CallError, Deadline, ForwardError, LocalCalls, Node, NodeId, RETRY_AFTER, StatusReport, Written,
};
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::proto::v1;

/// Calls that one node serves at a time; the next one is answered OVERLOADED.
pub const CALLS_IN_FLIGHT_MAX: usize = 16_384;
/// Those that are served beyond that where they confirm, move on or free, or begin to keep leases alive.
pub const URGENT_CALLS_MAX: usize = 4_096;
/// Waiting between attempts while the leader changes, or until another one is known: this at first,
/// twice as long each time.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// The first message of a backup, and the pieces that follow it.
pub type Backup = (v1::SnapshotChunk, Pieces);

/// What a call needs of a node. A trait, so that the rules above can be tested against failures
/// that a real node shows seldom.
#[tonic::async_trait]
pub trait Backend: Send + Sync + 'static {
    fn id(&self) -> NodeId;
    /// Fails where this node is no member any more: then it answers nothing.
    fn check(&self) -> Result<(), CallError>;
    /// A confirmation, or what is as urgent, was turned away: where this node leads, deadlines are put off.
    fn turn_urgent_away(&self);
    /// As many answers as commands, in their order.
    async fn propose_all(
        &self,
        commands: Vec<Command>,
        deadline: Deadline,
    ) -> Vec<Result<Written, CallError>>;
    async fn propose(&self, command: Command, deadline: Deadline) -> Result<Written, CallError>;
    async fn read(&self, deadline: Deadline) -> Result<State, CallError>;
    async fn read_stale(&self, min: Revision, deadline: Deadline) -> Result<State, CallError>;
    /// Of these workers, from the node's own copy as it is.
    fn specs_of(&self, workers: &BTreeSet<&WorkerName>) -> Specs;
    async fn route(&self, deadline: Deadline) -> Result<Option<NodeId>, CallError>;
    /// Returns once another node than this one leads.
    async fn led_by_another(&self, than: NodeId);
    async fn forward(
        &self,
        to: NodeId,
        method: &str,
        request: Vec<u8>,
        deadline: Deadline,
    ) -> Result<Result<Vec<u8>, Status>, ForwardError>;
    async fn status(&self, deadline: Deadline) -> StatusReport;
    /// The same, without asking anybody.
    fn membership(&self) -> StatusReport;
    /// What changes in the node's own copy.
    fn hub(&self) -> &Hub;
    /// The confirm deadline of claims that do not say their own.
    fn confirm_within(&self) -> Millis;
    /// On the leader: the time to live that the lease has again; `None` where it is gone.
    async fn keep_alive(
        &self,
        id: LeaseId,
        deadline: Deadline,
    ) -> Result<Option<Millis>, CallError>;
    /// The table as this node has it.
    fn backup(&self) -> Result<Backup, CallError>;
    /// On the leader: changes the membership.
    async fn change_members(
        &self,
        change: MemberChange,
        deadline: Deadline,
    ) -> Result<(), NotChanged>;
    /// On the leader: takes what an agent saw.
    async fn report(&self, sample: Sample, deadline: Deadline) -> Result<Heard, Unheard>;
}

/// What a method answers with a stream.
pub(super) type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Backend for Node {
    fn id(&self) -> NodeId {
        Node::id(self)
    }
    fn check(&self) -> Result<(), CallError> {
        self.check_member()
    }
    fn turn_urgent_away(&self) {
        Node::turn_urgent_away(self);
    }
    async fn propose_all(
        &self,
        commands: Vec<Command>,
        deadline: Deadline,
    ) -> Vec<Result<Written, CallError>> {
        Node::propose_all(self, commands, deadline).await
    }
    async fn propose(&self, command: Command, deadline: Deadline) -> Result<Written, CallError> {
        Node::propose(self, command, deadline).await
    }
    async fn read(&self, deadline: Deadline) -> Result<State, CallError> {
        Node::read(self, deadline).await
    }
    async fn read_stale(&self, min: Revision, deadline: Deadline) -> Result<State, CallError> {
        Node::read_stale(self, min, deadline).await
    }
    fn specs_of(&self, workers: &BTreeSet<&WorkerName>) -> Specs {
        Node::specs_of(self, workers)
    }
    async fn route(&self, deadline: Deadline) -> Result<Option<NodeId>, CallError> {
        Node::route(self, deadline).await
    }
    async fn led_by_another(&self, than: NodeId) {
        Node::led_by_another(self, than).await;
    }
    async fn forward(
        &self,
        to: NodeId,
        method: &str,
        request: Vec<u8>,
        deadline: Deadline,
    ) -> Result<Result<Vec<u8>, Status>, ForwardError> {
        Node::forward(self, to, method, request, deadline).await
    }
    async fn status(&self, deadline: Deadline) -> StatusReport {
        Node::status(self, deadline).await
    }
    fn membership(&self) -> StatusReport {
        Node::membership(self)
    }
    fn hub(&self) -> &Hub {
        Node::hub(self)
    }
    fn confirm_within(&self) -> Millis {
        Node::confirm_within(self)
    }
    async fn keep_alive(
        &self,
        id: LeaseId,
        deadline: Deadline,
    ) -> Result<Option<Millis>, CallError> {
        Node::keep_alive(self, id, deadline).await
    }
    fn backup(&self) -> Result<Backup, CallError> {
        let (table, pieces) = Node::backup(self)?;
        let head = v1::SnapshotChunk {
            data: Vec::new(),
            revision: table.state.revision.0,
            allocations: table.state.allocation_count() as u64,
            workers: table.state.worker_count() as u64,
        };
        Ok((head, pieces))
    }
    async fn change_members(
        &self,
        change: MemberChange,
        deadline: Deadline,
    ) -> Result<(), NotChanged> {
        Node::change_members(self, change, deadline).await
    }
    async fn report(&self, sample: Sample, deadline: Deadline) -> Result<Heard, Unheard> {
        Node::report(self, sample, deadline).await
    }
}

/// The API of one node. Clones share their state, and must: a listing that began over a peer goes
/// on here.
#[derive(Clone)]
pub struct Api {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub node: Arc<dyn Backend>,
    pub in_flight: Semaphore,
    pub urgent_in_flight: Semaphore,
    pub explaining: Arc<Semaphore>,
    pub next_request: AtomicU64,
    stop: watch::Sender<bool>,
    views: Mutex<Views>,
}

/// A unary method, whatever it does.
pub(super) trait Method: Send + Sync + 'static {
    type Request: Message + Default + 'static;
    type Response: Message + Default + 'static;
    /// The request, parsed.
    type Parsed: Send + Sync;
    /// As gRPC names it: `/package.Service/Method`.
    const PATH: &'static str;
    /// Whether an attempt may leave something behind.
    const WRITES: bool;

    fn parse(request: &Self::Request) -> Result<Self::Parsed, Status>;

    /// Whether any node may answer.
    fn runs_anywhere(_: &Self::Parsed) -> bool {
        false
    }

    /// Runs on this node.
    fn run(
        api: &Api,
        parsed: &Self::Parsed,
        deadline: Deadline,
    ) -> impl Future<Output = Result<Self::Response, Failure>> + Send;
}

pub(super) enum Failure {
    /// An answer that is an error.
    Answer(Status),
    /// No answer.
    Call(CallError),
}

/// A method that proposes one command.
pub(super) trait Write: Send + Sync + 'static {
    type Request: Message + Default + 'static;
    type Response: Message + Default + 'static;
    const PATH: &'static str;

    fn command(request: &Self::Request) -> Result<Command, Status>;

    /// The addresses are those at the revision of the outcome or later. `None`: not an outcome of
    /// this command.
    fn answer(
        revision: u64,
        outcome: Outcome,
        addresses: &impl Addresses,
    ) -> Option<Self::Response>;
}

pub(super) struct Writing<W>(PhantomData<fn() -> W>);

impl<W: Write> Method for Writing<W> {
    type Request = W::Request;
    type Response = W::Response;
    type Parsed = Command;
    const PATH: &'static str = W::PATH;
    const WRITES: bool = true;

    fn parse(request: &W::Request) -> Result<Command, Status> {
        let command = W::command(request)?;
        command.validate().map_err(errors::invalid)?;
        Ok(command)
    }

    async fn run(api: &Api, command: &Command, deadline: Deadline) -> Result<W::Response, Failure> {
        propose(api, command.clone(), deadline, W::PATH, W::answer).await
    }
}

/// Proposes a command on this node, and makes the answer of its outcome.
pub(super) async fn propose<R>(
    api: &Api,
    command: Command,
    deadline: Deadline,
    path: &str,
    answer: impl FnOnce(u64, Outcome, &Specs) -> Option<R>,
) -> Result<R, Failure> {
    let node = &api.inner.node;
    let Written { applied, specs } =
        node.propose(command, deadline).await.map_err(Failure::Call)?;
    let revision = applied.revision.0;
    tracing::debug!(revision, refused = applied.outcome.is_err(), "applied");
    let outcome = applied.outcome.map_err(|r| Failure::Answer(errors::refusal(r)))?;
    // It is done: what goes wrong here must not read as if it were not.
    answer(revision, outcome, &specs).ok_or_else(|| {
        let what = format!("{path} was answered with another's outcome");
        Failure::Call(CallError::Unknown(what))
    })
}

/// How fresh an answer must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Freshness {
    /// As of now, by the leader.
    Linearizable,
    /// By any node that has reached this revision.
    Stale { min: Revision },
}

impl Freshness {
    pub fn parse(options: Option<&v1::ReadOptions>) -> Result<Self, Status> {
        #[cfg(planted)]
        if planted::is(Bug::ReadFromFollower) {
            return Ok(Freshness::Stale { min: Revision(0) });
        }
        match options {
            Some(v1::ReadOptions { stale: true, min_revision }) => {
                Ok(Freshness::Stale { min: Revision(*min_revision) })
            }
            Some(v1::ReadOptions { stale: false, min_revision: min @ 1.. }) => {
                let limit = "0 unless read.stale is set";
                Err(errors::invalid(Invalid::new("read.min_revision", min, limit)))
            }
            _ => Ok(Freshness::Linearizable),
        }
    }

    pub async fn view(self, node: &dyn Backend, deadline: Deadline) -> Result<State, Failure> {
        let view = match self {
            Freshness::Linearizable => node.read(deadline).await,
            Freshness::Stale { min } => node.read_stale(min, deadline).await,
        };
        view.map_err(Failure::Call)
    }
}

/// A method that answers from a view of the table.
pub(super) trait Read: Send + Sync + 'static {
    type Request: Message + Default + 'static;
    type Response: Message + Default + 'static;
    type Query: Send + Sync;
    const PATH: &'static str;

    fn query(request: &Self::Request) -> Result<(Freshness, Self::Query), Status>;

    /// The listing that this goes on with.
    fn resumes(_: &Self::Query) -> Option<&PageToken> {
        None
    }

    fn answer(api: &Api, view: &State, query: &Self::Query) -> Result<Self::Response, Status>;
}

pub(super) struct Reading<R>(PhantomData<fn() -> R>);

impl<R: Read> Method for Reading<R> {
    type Request = R::Request;
    type Response = R::Response;
    type Parsed = (Freshness, R::Query);
    const PATH: &'static str = R::PATH;
    const WRITES: bool = false;

    fn parse(request: &R::Request) -> Result<Self::Parsed, Status> {
        R::query(request)
    }

    fn runs_anywhere((freshness, _): &Self::Parsed) -> bool {
        *freshness != Freshness::Linearizable
    }

    async fn run(
        api: &Api,
        (freshness, query): &Self::Parsed,
        deadline: Deadline,
    ) -> Result<R::Response, Failure> {
        let view = match R::resumes(query) {
            Some(token) => api.resume(token).map_err(Failure::Answer)?,
            None => freshness.view(&*api.inner.node, deadline).await?,
        };
        R::answer(api, &view, query).map_err(Failure::Answer)
    }
}

impl Api {
    pub fn new(node: Node) -> Self {
        Self::over(Arc::new(node))
    }

    pub fn over(node: Arc<dyn Backend>) -> Self {
        Api {
            inner: Arc::new(Inner {
                node,
                in_flight: Semaphore::new(CALLS_IN_FLIGHT_MAX),
                urgent_in_flight: Semaphore::new(URGENT_CALLS_MAX),
                explaining: Arc::new(Semaphore::new(allocator::EXPLAINING_MAX)),
                next_request: AtomicU64::new(1),
                stop: watch::Sender::new(false),
                views: Mutex::new(Views::default()),
            }),
        }
    }

    /// Ends streams that would else go on for as long as their callers like.
    pub fn end_streams(&self) {
        self.inner.stop.send_replace(true);
    }

    /// Resolves when streams must end.
    pub(super) fn stopping(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stop = self.inner.stop.subscribe();
        async move { drop(stop.wait_for(|stop| *stop).await) }
    }

    /// What a node runs for its peers.
    pub fn local_calls(&self) -> Arc<dyn LocalCalls> {
        Arc::new(self.clone())
    }

    /// A client's call, from its arrival to its answer.
    pub(super) async fn serve_unary<M: Method>(
        &self,
        request: Request<M::Request>,
    ) -> Result<Response<M::Response>, Status> {
        let (metadata, _, message) = request.into_parts();
        self.serve::<M>(&metadata, message).await
    }

    /// The same for one message of a stream.
    pub(super) async fn serve<M: Method>(
        &self,
        metadata: &MetadataMap,
        message: M::Request,
    ) -> Result<Response<M::Response>, Status> {
        self.observed(M::PATH, metadata, |deadline| self.dispatch::<M>(message, deadline)).await
    }

    pub(super) async fn dispatch<M: Method>(
        &self,
        request: M::Request,
        deadline: Deadline,
    ) -> Result<M::Response, Status> {
        let parsed = M::parse(&request)?;
        // What a caller has given up by the time at which it is read here (this process was stopped,
        // or had no processor) must not be done any more: the caller may be through with it, by way
        // of another node. The server drops this future then, at the latest here.
        if M::WRITES {
            tokio::task::yield_now().await;
        }
        if M::runs_anywhere(&parsed) {
            return M::run(self, &parsed, deadline).await.map_err(Failure::into_status);
        }
        let mut pause = PAUSE_MIN;
        loop {
            let (asked, why) = match self.attempt::<M>(&request, &parsed, deadline).await {
                Attempt::Answered(answer) => return answer,
                Attempt::Again { asked, why } => (asked, why),
            };
            if Instant::now() + pause >= deadline {
                return Err(errors::not_ready(&format!(
                    "no leader took the call before its deadline ({why})"
                )));
            }
            tracing::debug!(method = M::PATH, asked, why, "waiting for a leader");
            tokio::select! {
                () = sleep(pause) => pause = (pause * 2).min(PAUSE_MAX),
                () = self.inner.node.led_by_another(asked) => pause = PAUSE_MIN,
            }
        }
    }

    /// One attempt, where the leader is thought to be: the table at the head of this module.
    async fn attempt<M: Method>(
        &self,
        request: &M::Request,
        parsed: &M::Parsed,
        deadline: Deadline,
    ) -> Attempt<M::Response> {
        let node = &self.inner.node;
        let peer = match node.route(deadline).await {
            Ok(None) => {
                return match M::run(self, parsed, deadline).await {
                    Ok(response) => Attempt::Answered(Ok(response)),
                    Err(Failure::Answer(status)) => Attempt::Answered(Err(status)),
                    Err(Failure::Call(CallError::NotLeader { .. })) => {
                        let why = "this node is no longer the leader".into();
                        Attempt::Again { asked: node.id(), why }
                    }
                    Err(Failure::Call(CallError::Unknown(why))) if !M::WRITES => {
                        Attempt::Again { asked: node.id(), why }
                    }
                    Err(Failure::Call(error)) => Attempt::Answered(Err(errors::call(error))),
                };
            }
            Ok(Some(peer)) => peer,
            Err(error) => return Attempt::Answered(Err(errors::call(error))),
        };
        let again = |why| Attempt::Again { asked: peer, why };
        match node.forward(peer, M::PATH, request.encode_to_vec(), deadline).await {
            Ok(Ok(bytes)) => match M::Response::decode(bytes.as_slice()) {
                Ok(response) => Attempt::Answered(Ok(response)),
                Err(error) => Attempt::Answered(Err(errors::outcome_unknown(&format!(
                    "the answer of node {peer} cannot be read: {error}"
                )))),
            },
            Ok(Err(status)) if errors::is_not_leader(&status) => {
                again(format!("node {peer} is not the leader"))
            }
            Ok(Err(status)) if !M::WRITES && errors::is_outcome_unknown(&status) => {
                again(status.message().to_string())
            }
            Ok(Err(status)) => Attempt::Answered(Err(status)),
            Err(ForwardError::NotSent(why)) => again(format!("node {peer} was not reached: {why}")),
            Err(ForwardError::Broken(why)) => {
                let why = format!("the connection to node {peer} broke: {why}");
                match M::WRITES {
                    true => Attempt::Answered(Err(errors::outcome_unknown(&why))),
                    false => again(why),
                }
            }
        }
    }

    /// A forwarded call: everything but the routing.
    async fn run_forwarded<M: Method>(
        &self,
        request: &[u8],
        deadline: Deadline,
    ) -> Result<Vec<u8>, Status> {
        let request = M::Request::decode(request)
            .map_err(|e| Status::invalid_argument(format!("{} cannot be read: {e}", M::PATH)))?;
        let parsed = M::parse(&request)?;
        let response = M::run(self, &parsed, deadline).await.map_err(Failure::into_status)?;
        Ok(response.encode_to_vec())
    }

    /// The table of methods that travel between nodes.
    async fn run_local(
        &self,
        path: &str,
        request: &[u8],
        deadline: Deadline,
    ) -> Result<Vec<u8>, Status> {
        macro_rules! methods {
            ($($method:ty),* $(,)?) => {
                $(if path == <$method as Method>::PATH {
                    return self.run_forwarded::<$method>(request, deadline).await;
                })*
            };
        }
        methods![
            allocator::Allocate,
            session::Session,
            Writing<allocator::Confirm>,
            Writing<allocator::Attach>,
            Writing<allocator::Release>,
            Writing<allocator::ReportConflict>,
            Reading<allocator::Get>,
            Reading<allocator::List>,
            allocator::Explain,
            Writing<leases::Grant>,
            Writing<leases::Revoke>,
            leases::KeepAlive,
            Reading<leases::Get>,
            Reading<leases::List>,
            Writing<workers::Register>,
            Writing<workers::Update>,
            Writing<workers::SetPhase>,
            Writing<workers::Verify>,
            Writing<workers::Remove>,
            Writing<workers::Quarantine>,
            Writing<workers::LiftQuarantine>,
            workers::Report,
            Reading<workers::Get>,
            Reading<workers::List>,
            Reading<changes::Current>,
            cluster::AddMember,
            cluster::PromoteMember,
            cluster::RemoveMember,
            cluster::TransferLeader,
            cluster::SetFeatureLevel,
        ];
        Err(Status::unimplemented(format!("{path} is not forwarded between nodes")))
    }

    /// Keeps a view while a listing goes on, and says where. `from`: where this page began.
    pub(super) fn more(
        &self,
        view: &State,
        from: Option<&PageToken>,
        after: Option<String>,
    ) -> String {
        let Some(after) = after else {
            from.into_iter().for_each(|token| self.views().end(token.revision));
            return String::new();
        };
        if self.views().keep(view) {
            tokio::spawn(expire_views(Arc::downgrade(&self.inner)));
        }
        PageToken { revision: view.revision, after }.text()
    }

    fn resume(&self, token: &PageToken) -> Result<State, Status> {
        self.views().find(token.revision).ok_or_else(errors::page_expired)
    }

    pub(super) fn views(&self) -> MutexGuard<'_, Views> {
        guard(&self.inner.views)
    }

    pub(super) fn overloaded() -> Status {
        errors::overloaded(RETRY_AFTER)
    }
}

/// Until no view is left.
async fn expire_views(api: Weak<Inner>) {
    while api.upgrade().is_some_and(|api| guard(&api.views).expire()) {
        sleep(VIEWS_EXPIRE_EVERY).await;
    }
}

enum Attempt<T> {
    Answered(Result<T, Status>),
    /// Surely not executed, or nothing but a read.
    Again {
        asked: NodeId,
        why: String,
    },
}

impl Failure {
    fn into_status(self) -> Status {
        match self {
            Failure::Answer(status) => status,
            Failure::Call(error) => errors::call(error),
        }
    }
}

#[tonic::async_trait]
impl LocalCalls for Api {
    async fn call(
        &self,
        method: &str,
        request: &[u8],
        request_id: &str,
        deadline: Deadline,
    ) -> Result<Vec<u8>, Status> {
        let span = observe::span(method, request_id, true);
        self.run_local(method, request, deadline).instrument(span).await
    }
}
