//! What a request asks of the table, and how what the table says is shown: the API without a node.
//!
//! For who compares a server with the core: the checker of recorded histories, and the fuzzers. All
//! of it is what the services themselves use.

use serde::{Deserialize, Serialize};
use tonic::Status;

use super::dispatch::{Read as _, Write as _};
use super::{allocator, convert, errors, leases, watch, workers};
use crate::core::{Applied, Command, Event, LeaseId, Millis, Revision, State};
use crate::proto::v1;

macro_rules! calls {
    ($($name:ident: $request:ident => $response:ident,)*) => {
        /// A request of one of the unary methods.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        pub enum Request {
            $($name(v1::$request),)*
        }

        /// What a request was answered. A listing is all its pages.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        pub enum Response {
            $($name(v1::$response),)*
        }
    };
}

calls! {
    Allocate: AllocateRequest => AllocateResponse,
    Confirm: ConfirmRequest => ConfirmResponse,
    Attach: AttachRequest => AttachResponse,
    Release: ReleaseRequest => ReleaseResponse,
    ReportConflict: ReportConflictRequest => ReportConflictResponse,
    GrantLease: GrantRequest => GrantResponse,
    RevokeLease: RevokeRequest => RevokeResponse,
    Register: RegisterRequest => WorkerResponse,
    Update: UpdateRequest => WorkerResponse,
    SetPhase: SetPhaseRequest => WorkerResponse,
    Remove: RemoveRequest => RemoveResponse,
    Quarantine: QuarantineRequest => WorkerResponse,
    LiftQuarantine: LiftQuarantineRequest => WorkerResponse,
    Get: GetRequest => GetResponse,
    List: ListRequest => ListResponse,
    GetWorker: GetWorkerRequest => WorkerResponse,
    GetLease: GetLeaseRequest => GetLeaseResponse,
    KeepAlive: KeepAliveRequest => KeepAliveResponse,
}

impl Request {
    /// The command that a write proposes; `None` for a read. `confirm_within` is the server's
    /// default.
    pub fn command(&self, confirm_within: Millis) -> Result<Option<Command>, Status> {
        let command = match self {
            Request::Allocate(r) => {
                Command::Allocate { claims: convert::claims(&r.claims)?, confirm_within }
            }
            Request::Confirm(r) => allocator::Confirm::command(r)?,
            Request::Attach(r) => allocator::Attach::command(r)?,
            Request::Release(r) => allocator::Release::command(r)?,
            Request::ReportConflict(r) => allocator::ReportConflict::command(r)?,
            Request::GrantLease(r) => leases::Grant::command(r)?,
            Request::RevokeLease(r) => leases::Revoke::command(r)?,
            Request::Register(r) => workers::Register::command(r)?,
            Request::Update(r) => workers::Update::command(r)?,
            Request::SetPhase(r) => workers::SetPhase::command(r)?,
            Request::Remove(r) => workers::Remove::command(r)?,
            Request::Quarantine(r) => workers::Quarantine::command(r)?,
            Request::LiftQuarantine(r) => workers::LiftQuarantine::command(r)?,
            Request::Get(_)
            | Request::List(_)
            | Request::GetWorker(_)
            | Request::GetLease(_)
            | Request::KeepAlive(_) => return Ok(None),
        };
        command.validate().map_err(errors::invalid)?;
        Ok(Some(command))
    }

    /// The answer to a write whose command came to this, `view` being the table after it.
    pub fn answer(&self, applied: Applied, view: &State) -> Result<Response, Status> {
        let at = applied.revision.0;
        let outcome = applied.outcome.map_err(errors::refusal)?;
        let answer = match self {
            Request::Allocate(_) => {
                allocator::Allocate::answer(at, outcome, view).map(Response::Allocate)
            }
            Request::Confirm(_) => {
                allocator::Confirm::answer(at, outcome, view).map(Response::Confirm)
            }
            Request::Attach(_) => {
                allocator::Attach::answer(at, outcome, view).map(Response::Attach)
            }
            Request::Release(_) => {
                allocator::Release::answer(at, outcome, view).map(Response::Release)
            }
            Request::ReportConflict(_) => {
                allocator::ReportConflict::answer(at, outcome, view).map(Response::ReportConflict)
            }
            Request::GrantLease(_) => {
                leases::Grant::answer(at, outcome, view).map(Response::GrantLease)
            }
            Request::RevokeLease(_) => {
                leases::Revoke::answer(at, outcome, view).map(Response::RevokeLease)
            }
            Request::Register(_) => {
                workers::Register::answer(at, outcome, view).map(Response::Register)
            }
            Request::Update(_) => workers::Update::answer(at, outcome, view).map(Response::Update),
            Request::SetPhase(_) => {
                workers::SetPhase::answer(at, outcome, view).map(Response::SetPhase)
            }
            Request::Remove(_) => workers::Remove::answer(at, outcome, view).map(Response::Remove),
            Request::Quarantine(_) => {
                workers::Quarantine::answer(at, outcome, view).map(Response::Quarantine)
            }
            Request::LiftQuarantine(_) => {
                workers::LiftQuarantine::answer(at, outcome, view).map(Response::LiftQuarantine)
            }
            Request::Get(_)
            | Request::List(_)
            | Request::GetWorker(_)
            | Request::GetLease(_)
            | Request::KeepAlive(_) => None,
        };
        answer.ok_or_else(|| Status::internal("the outcome of another command"))
    }

    /// The answer to a read from this view; to a write, an error.
    pub fn read(&self, view: &State) -> Result<Response, Status> {
        match self {
            Request::Get(r) => {
                allocator::get(view, &allocator::Get::query(r)?.1).map(Response::Get)
            }
            Request::List(r) => {
                let allocations = allocator::List::query(r)?.1.all(view);
                let (next_page_token, revision) = (String::new(), view.revision.0);
                let response = v1::ListResponse { allocations, next_page_token, revision };
                Ok(Response::List(response))
            }
            Request::GetWorker(r) => {
                workers::get(view, &workers::Get::query(r)?.1).map(Response::GetWorker)
            }
            Request::GetLease(r) => {
                leases::get(view, leases::Get::query(r)?.1).map(Response::GetLease)
            }
            Request::KeepAlive(r) => {
                let ttl_ms = view.lease(LeaseId(r.id)).map_or(0, |lease| lease.ttl.0);
                Ok(Response::KeepAlive(v1::KeepAliveResponse { id: r.id, ttl_ms }))
            }
            _ => Err(Status::internal("a write is not answered from a view")),
        }
    }
}

/// The events of one revision as watchers hear of them.
pub fn shown(events: &[Event], revision: Revision, view: &State) -> Vec<v1::WatchEvent> {
    events.iter().map(|event| watch::shown(event, revision, view)).collect()
}
