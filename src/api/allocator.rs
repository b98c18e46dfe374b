//! `portwarden.v1.Allocator`: ports and GPUs of instances.

use std::sync::Arc;

use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};

use super::convert::Addresses;
use super::dispatch::{
    Api, Failure, Freshness, Method, Read, Reading, Responses, Write, Writing, propose,
};
use super::filter::Filter;
use super::pages::{PageToken, fill, page_size};
use super::{convert, errors};
use crate::blocking::blocking;
use crate::core::{
    self, Authority, Claim, Command, InstanceName, Invalid, Millis, Origin, Outcome, Refusal,
    Revision, State, Token, WorkerName, limits,
};
use crate::node::{CallError, Deadline};
use crate::proto::v1;

/// Explanations that one node works on at a time; each may weigh every worker for every claim.
pub const EXPLAINING_MAX: usize = 8;
/// An explanation shows no further workers from here on; what comes beside them is far smaller than the
/// rest of an answer.
const EXPLAINED_MAX_BYTES: usize = 3 << 20;
/// What a message takes beside its content.
const FIELD_BYTES: usize = 8;

pub(super) struct Allocate;

pub(super) struct Claims {
    claims: Vec<Arc<Claim>>,
    dry_run: bool,
}

impl Method for Allocate {
    type Request = v1::AllocateRequest;
    type Response = v1::AllocateResponse;
    type Parsed = Claims;
    const PATH: &'static str = "/portwarden.v1.Allocator/Allocate";
    const WRITES: bool = true;

    fn parse(request: &v1::AllocateRequest) -> Result<Claims, Status> {
        let claims = convert::claims(&request.claims)?;
        allocate_command(&claims).validate().map_err(errors::invalid)?;
        Ok(Claims { claims, dry_run: request.dry_run })
    }

    async fn run(
        api: &Api,
        Claims { claims, dry_run }: &Claims,
        deadline: Deadline,
    ) -> Result<v1::AllocateResponse, Failure> {
        let node = &api.inner.node;
        if *dry_run {
            let mut view = node.read(deadline).await.map_err(Failure::Call)?;
            let revision = view.revision.0;
            let (allocations, repeated_request) =
                tried(&mut view, claims, node.confirm_within())
                    .map_err(|refusal| Failure::Answer(errors::refusal(refusal)))?;
            return Ok(v1::AllocateResponse { allocations, repeated_request, revision });
        }
        let confirm_within = node.confirm_within();
        let command = Command::Allocate { claims: claims.clone(), confirm_within };
        propose(api, command, deadline, Self::PATH, Self::answer).await
    }
}

impl Allocate {
    pub(super) fn answer(
        revision: u64,
        outcome: Outcome,
        addresses: &impl Addresses,
    ) -> Option<v1::AllocateResponse> {
        let Outcome::Allocated { allocations, repeated } = outcome else { return None };
        Some(v1::AllocateResponse {
            allocations: allocations.iter().map(|a| convert::allocation(a, addresses)).collect(),
            repeated_request: repeated,
            revision,
        })
    }
}

pub(super) struct Confirm;

impl Write for Confirm {
    type Request = v1::ConfirmRequest;
    type Response = v1::ConfirmResponse;
    const PATH: &'static str = "/portwarden.v1.Allocator/Confirm";

    fn command(request: &v1::ConfirmRequest) -> Result<Command, Status> {
        Ok(Command::Confirm {
            name: convert::instance(&request.name)?,
            token: Token(request.token),
            version: Revision(request.version),
            liveness: request
                .liveness
                .as_ref()
                .map(convert::parse_liveness)
                .transpose()
                .map_err(errors::invalid)?,
            lease: convert::lease(request.lease),
        })
    }

    fn answer(
        revision: u64,
        outcome: Outcome,
        addresses: &impl Addresses,
    ) -> Option<v1::ConfirmResponse> {
        let Outcome::Confirmed(allocation) = outcome else { return None };
        let allocation = Some(convert::allocation(&allocation, addresses));
        Some(v1::ConfirmResponse { allocation, revision })
    }
}

pub(super) struct Attach;

impl Write for Attach {
    type Request = v1::AttachRequest;
    type Response = v1::AttachResponse;
    const PATH: &'static str = "/portwarden.v1.Allocator/Attach";

    fn command(request: &v1::AttachRequest) -> Result<Command, Status> {
        Ok(Command::Attach {
            name: convert::instance(&request.name)?,
            token: Token(request.token),
            version: Revision(request.version),
            lease: convert::lease(request.lease),
        })
    }

    fn answer(
        revision: u64,
        outcome: Outcome,
        addresses: &impl Addresses,
    ) -> Option<v1::AttachResponse> {
        let Outcome::Attached(allocation) = outcome else { return None };
        let allocation = Some(convert::allocation(&allocation, addresses));
        Some(v1::AttachResponse { allocation, revision })
    }
}

pub(super) struct Release;

impl Write for Release {
    type Request = v1::ReleaseRequest;
    type Response = v1::ReleaseResponse;
    const PATH: &'static str = "/portwarden.v1.Allocator/Release";

    fn command(request: &v1::ReleaseRequest) -> Result<Command, Status> {
        let authority = match &request.authority {
            Some(v1::release_request::Authority::Token(token)) => Authority::Holder(Token(*token)),
            Some(v1::release_request::Authority::Force(force)) => {
                Authority::Operator { reason: force.reason.clone() }
            }
            None => return Err(errors::invalid(Invalid::new("authority", "", "token or force"))),
        };
        Ok(Command::Release { name: convert::instance(&request.name)?, authority })
    }

    fn answer(
        revision: u64,
        outcome: Outcome,
        addresses: &impl Addresses,
    ) -> Option<v1::ReleaseResponse> {
        let Outcome::Released(allocation) = outcome else { return None };
        Some(v1::ReleaseResponse {
            released: allocation.is_some(),
            allocation: allocation.map(|a| convert::allocation(&a, addresses)),
            revision,
        })
    }
}

pub(super) struct ReportConflict;

impl Write for ReportConflict {
    type Request = v1::ReportConflictRequest;
    type Response = v1::ReportConflictResponse;
    const PATH: &'static str = "/portwarden.v1.Allocator/ReportConflict";

    fn command(request: &v1::ReportConflictRequest) -> Result<Command, Status> {
        Ok(Command::ReportConflict {
            name: convert::instance(&request.name)?,
            token: Token(request.token),
            version: Revision(request.version),
            port: convert::port("port", request.port)?,
        })
    }

    fn answer(
        revision: u64,
        outcome: Outcome,
        addresses: &impl Addresses,
    ) -> Option<v1::ReportConflictResponse> {
        let (allocation, reclaimed, reason) = match outcome {
            Outcome::Swapped(allocation) => (allocation, false, String::new()),
            Outcome::Reclaimed { allocation, reason } => (allocation, true, reason),
            _ => return None,
        };
        let allocation = Some(convert::allocation(&allocation, addresses));
        Some(v1::ReportConflictResponse { allocation, reclaimed, reason, revision })
    }
}

pub(super) struct Get;

impl Read for Get {
    type Request = v1::GetRequest;
    type Response = v1::GetResponse;
    type Query = InstanceName;
    const PATH: &'static str = "/portwarden.v1.Allocator/Get";

    fn query(request: &v1::GetRequest) -> Result<(Freshness, InstanceName), Status> {
        Ok((Freshness::parse(request.read.as_ref())?, convert::instance(&request.name)?))
    }

    fn answer(_: &Api, view: &State, name: &InstanceName) -> Result<v1::GetResponse, Status> {
        get(view, name)
    }
}

pub(super) fn get(view: &State, name: &InstanceName) -> Result<v1::GetResponse, Status> {
    let Some(found) = view.allocation(name) else {
        let departed = view.departure(name).cloned();
        return Err(errors::refusal(Refusal::NoAllocation { name: name.clone(), departed }));
    };
    let allocation = Some(convert::allocation(found, view));
    Ok(v1::GetResponse { allocation, revision: view.revision.0 })
}

pub(super) struct Explain;

impl Method for Explain {
    type Request = v1::ExplainRequest;
    type Response = v1::ExplainResponse;
    type Parsed = (Freshness, Vec<Arc<Claim>>);
    const PATH: &'static str = "/portwarden.v1.Allocator/Explain";
    const WRITES: bool = false;

    fn parse(request: &v1::ExplainRequest) -> Result<Self::Parsed, Status> {
        let claims = convert::claims(&request.claims)?;
        allocate_command(&claims).validate().map_err(errors::invalid)?;
        Ok((Freshness::parse(request.read.as_ref())?, claims))
    }

    fn runs_anywhere((freshness, _): &Self::Parsed) -> bool {
        *freshness != Freshness::Linearizable
    }

    async fn run(
        api: &Api,
        (freshness, claims): &Self::Parsed,
        deadline: Deadline,
    ) -> Result<v1::ExplainResponse, Failure> {
        let node = &api.inner.node;
        let view = freshness.view(&**node, deadline).await?;
        let Ok(room) = api.inner.explaining.clone().try_acquire_owned() else {
            return Err(Failure::Answer(Api::overloaded()));
        };
        let (claims, within) = (claims.clone(), node.confirm_within());
        let explained = blocking(move || {
            let _room = room;
            explained(view, &claims, within)
        });
        let failed = |error| CallError::NotReady(format!("the explanation broke off: {error}"));
        explained.await.map_err(|error| Failure::Call(failed(error)))
    }
}

fn explained(view: State, claims: &[Arc<Claim>], within: Millis) -> v1::ExplainResponse {
    let (allocations, refusal) = match tried(&mut view.clone(), claims, within) {
        Ok((granted, _)) => (granted, String::new()),
        Err(refusal) => (Vec::new(), refusal.to_string()),
    };
    let revision = view.revision.0;
    let mut answer = v1::ExplainResponse { allocations, refusal, claims: Vec::new(), revision };
    let mut room_bytes = EXPLAINED_MAX_BYTES.saturating_sub(answer.encoded_len());
    // Each claim is weighed on a copy on which those before it took their places.
    let mut copy = view;
    for claim in claims {
        let explanation = core::explain(&mut copy, claim);
        answer.claims.push(explanation_within(&mut room_bytes, claim, explanation));
        let _ = tried(&mut copy, std::slice::from_ref(claim), within);
    }
    answer
}

/// Without the workers for which there is no room.
fn explanation_within(
    room_bytes: &mut usize,
    claim: &Claim,
    explanation: core::Explanation,
) -> v1::ClaimExplanation {
    let core::Explanation { candidates, not_ready, workers } = explanation;
    let verdict = |(worker, fits): (WorkerName, Result<(), String>)| v1::WorkerVerdict {
        worker: worker.to_string(),
        fits: fits.is_ok(),
        lack: fits.err().unwrap_or_default(),
    };
    let fits_in = |verdict: &v1::WorkerVerdict| {
        let left = room_bytes.checked_sub(verdict.encoded_len() + FIELD_BYTES);
        *room_bytes = left.unwrap_or(0);
        left.is_some()
    };
    let workers = workers.into_iter().map(verdict).take_while(fits_in).collect();
    v1::ClaimExplanation { name: claim.name.to_string(), candidates, not_ready, workers }
}

/// What an allocate would be answered, and whether it was granted before: done on a copy, which is cheap.
/// Nobody holds the tokens and versions that it would have now, so they are left out.
fn tried(
    copy: &mut State,
    claims: &[Arc<Claim>],
    confirm_within: Millis,
) -> Result<(Vec<v1::Allocation>, bool), Refusal> {
    let command = Command::Allocate { claims: claims.to_vec(), confirm_within };
    let (applied, _) = core::apply(copy, &Origin::default(), &command);
    let Outcome::Allocated { allocations, repeated } = applied.outcome? else {
        return Ok((Vec::new(), false));
    };
    let shown = allocations.iter().map(|a| convert::allocation(a, copy)).map(|a| match repeated {
        true => a,
        false => v1::Allocation { token: 0, version: 0, ..a },
    });
    Ok((shown.collect(), repeated))
}

/// The deadline is the leader's to fill in.
pub(super) fn allocate_command(claims: &[Arc<Claim>]) -> Command {
    Command::Allocate { claims: claims.to_vec(), confirm_within: Millis(limits::SPAN_MAX_MS) }
}

pub(super) struct List;

pub(super) struct ListQuery {
    filter: Filter,
    phase: v1::Phase,
    size: usize,
    token: Option<PageToken>,
}

impl ListQuery {
    /// All pages at once, in order of name.
    pub(super) fn all(&self, view: &State) -> Vec<v1::Allocation> {
        let held = view.allocations_named(&self.filter.prefix, None);
        let wanted = held.filter(|held| self.matches(held));
        wanted.map(|held| convert::allocation(held, view)).collect()
    }

    fn matches(&self, allocation: &core::Allocation) -> bool {
        let phase_fits =
            self.phase == v1::Phase::Unspecified || self.phase == convert::phase(allocation.phase);
        phase_fits && self.filter.matches(allocation)
    }
}

impl Read for List {
    type Request = v1::ListRequest;
    type Response = v1::ListResponse;
    type Query = ListQuery;
    const PATH: &'static str = "/portwarden.v1.Allocator/List";

    fn query(request: &v1::ListRequest) -> Result<(Freshness, ListQuery), Status> {
        let query = ListQuery {
            filter: Filter::parse(&request.worker, &request.selector, &request.name_prefix)?,
            phase: convert::phase_filter(request.phase)?,
            size: page_size(request.page_size)?,
            token: PageToken::parse(&request.page_token)?,
        };
        Ok((Freshness::parse(request.read.as_ref())?, query))
    }

    fn resumes(query: &ListQuery) -> Option<&PageToken> {
        query.token.as_ref()
    }

    fn answer(api: &Api, view: &State, query: &ListQuery) -> Result<v1::ListResponse, Status> {
        let after = query.token.as_ref().map(|token| token.place(InstanceName::parse));
        let after = after.transpose()?;
        let shown = |allocation: &core::Allocation| {
            query.matches(allocation).then(|| convert::allocation(allocation, view))
        };
        let page = match &query.filter.worker {
            Some(name) => {
                let worker = view.worker(name);
                let on = worker.into_iter().flat_map(|w| view.allocations_on(w, after.as_ref()));
                fill(on.map(|a| (a.name().as_str(), shown(a))), query.size)
            }
            None => {
                let named = view.allocations_named(&query.filter.prefix, after.as_ref());
                fill(named.map(|a| (a.name().as_str(), shown(a))), query.size)
            }
        };
        Ok(v1::ListResponse {
            allocations: page.items,
            next_page_token: api.more(view, query.token.as_ref(), page.after),
            revision: view.revision.0,
        })
    }
}

#[tonic::async_trait]
impl v1::allocator_server::Allocator for Api {
    async fn allocate(
        &self,
        request: Request<v1::AllocateRequest>,
    ) -> Result<Response<v1::AllocateResponse>, Status> {
        self.serve_unary::<Allocate>(request).await
    }

    async fn confirm(
        &self,
        request: Request<v1::ConfirmRequest>,
    ) -> Result<Response<v1::ConfirmResponse>, Status> {
        self.serve_unary::<Writing<Confirm>>(request).await
    }

    async fn attach(
        &self,
        request: Request<v1::AttachRequest>,
    ) -> Result<Response<v1::AttachResponse>, Status> {
        self.serve_unary::<Writing<Attach>>(request).await
    }

    async fn explain(
        &self,
        request: Request<v1::ExplainRequest>,
    ) -> Result<Response<v1::ExplainResponse>, Status> {
        self.serve_unary::<Explain>(request).await
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        self.serve_unary::<Writing<Release>>(request).await
    }

    async fn report_conflict(
        &self,
        request: Request<v1::ReportConflictRequest>,
    ) -> Result<Response<v1::ReportConflictResponse>, Status> {
        self.serve_unary::<Writing<ReportConflict>>(request).await
    }

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        self.serve_unary::<Reading<Get>>(request).await
    }

    async fn list(
        &self,
        request: Request<v1::ListRequest>,
    ) -> Result<Response<v1::ListResponse>, Status> {
        self.serve_unary::<Reading<List>>(request).await
    }

    type WatchStream = Responses<v1::WatchResponse>;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.serve_watch(request).await
    }

    type SessionStream = Responses<v1::SessionResponse>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        self.serve_session(request)
    }
}
