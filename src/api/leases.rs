//! `portwarden.v1.Leases`: a time to live, kept alive by its holder.

use futures::{FutureExt as _, StreamExt as _};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::ahead::Ahead;
use super::convert::Addresses;
use super::dispatch::{Api, Failure, Freshness, Method, Read, Reading, Responses, Write, Writing};
use super::pages::{PageToken, fill, page_size};
use super::{convert, errors};
use crate::core::{Command, Invalid, LeaseId, Millis, Outcome, Refusal, State};
use crate::node::Deadline;
use crate::proto::v1;

/// Requests of one stream that are served at a time; their answers keep their order.
const KEEP_ALIVES_AT_ONCE: usize = 256;

pub(super) struct Grant;

impl Write for Grant {
    type Request = v1::GrantRequest;
    type Response = v1::GrantResponse;
    const PATH: &'static str = "/portwarden.v1.Leases/Grant";

    fn command(request: &v1::GrantRequest) -> Result<Command, Status> {
        let ttl = Millis::span("ttl_ms", request.ttl_ms).map_err(errors::invalid)?;
        Ok(Command::GrantLease { ttl })
    }

    fn answer(revision: u64, outcome: Outcome, _: &impl Addresses) -> Option<v1::GrantResponse> {
        let Outcome::Lease(lease) = outcome else { return None };
        Some(v1::GrantResponse { lease: Some(convert::lease_message(&lease)), revision })
    }
}

pub(super) struct Revoke;

impl Write for Revoke {
    type Request = v1::RevokeRequest;
    type Response = v1::RevokeResponse;
    const PATH: &'static str = "/portwarden.v1.Leases/Revoke";

    fn command(request: &v1::RevokeRequest) -> Result<Command, Status> {
        Ok(Command::RevokeLease { id: lease_id(request.id)? })
    }

    fn answer(revision: u64, outcome: Outcome, _: &impl Addresses) -> Option<v1::RevokeResponse> {
        let Outcome::LeaseEnded(lease) = outcome else { return None };
        Some(v1::RevokeResponse { revoked: lease.is_some(), revision })
    }
}

/// One message of a keep-alive stream. It leaves nothing behind, so that it may be repeated.
pub(super) struct KeepAlive;

impl Method for KeepAlive {
    type Request = v1::KeepAliveRequest;
    type Response = v1::KeepAliveResponse;
    type Parsed = LeaseId;
    const PATH: &'static str = "/portwarden.v1.Leases/KeepAlive";
    const WRITES: bool = false;

    fn parse(request: &v1::KeepAliveRequest) -> Result<LeaseId, Status> {
        lease_id(request.id)
    }

    async fn run(
        api: &Api,
        id: &LeaseId,
        deadline: Deadline,
    ) -> Result<v1::KeepAliveResponse, Failure> {
        let renewed = api.inner.node.keep_alive(*id, deadline).await.map_err(Failure::Call)?;
        Ok(v1::KeepAliveResponse { id: id.0, ttl_ms: renewed.map_or(0, |ttl| ttl.0) })
    }
}

pub(super) struct Get;

impl Read for Get {
    type Request = v1::GetLeaseRequest;
    type Response = v1::GetLeaseResponse;
    type Query = LeaseId;
    const PATH: &'static str = "/portwarden.v1.Leases/Get";

    fn query(request: &v1::GetLeaseRequest) -> Result<(Freshness, LeaseId), Status> {
        Ok((Freshness::parse(request.read.as_ref())?, lease_id(request.id)?))
    }

    fn answer(_: &Api, view: &State, id: &LeaseId) -> Result<v1::GetLeaseResponse, Status> {
        get(view, *id)
    }
}

pub(super) fn get(view: &State, id: LeaseId) -> Result<v1::GetLeaseResponse, Status> {
    let lease = view.lease(id).ok_or_else(|| errors::refusal(Refusal::NoLease(id)))?;
    Ok(v1::GetLeaseResponse {
        lease: Some(convert::lease_message(lease)),
        allocations: lease.allocations.keys().map(ToString::to_string).collect(),
        revision: view.revision.0,
    })
}

pub(super) struct List;

pub(super) struct ListQuery {
    size: usize,
    token: Option<PageToken>,
}

impl Read for List {
    type Request = v1::ListLeasesRequest;
    type Response = v1::ListLeasesResponse;
    type Query = ListQuery;
    const PATH: &'static str = "/portwarden.v1.Leases/List";

    fn query(request: &v1::ListLeasesRequest) -> Result<(Freshness, ListQuery), Status> {
        let (size, token) = (page_size(request.page_size)?, PageToken::parse(&request.page_token)?);
        Ok((Freshness::parse(request.read.as_ref())?, ListQuery { size, token }))
    }

    fn resumes(query: &ListQuery) -> Option<&PageToken> {
        query.token.as_ref()
    }

    fn answer(
        api: &Api,
        view: &State,
        query: &ListQuery,
    ) -> Result<v1::ListLeasesResponse, Status> {
        let number = |token: &PageToken| token.place(|after| after.parse().map(LeaseId));
        let after = query.token.as_ref().map(number).transpose()?;
        let leases: Vec<_> = view.leases_after(after).take(query.size + 1).collect();
        let named: Vec<_> = leases.iter().map(|lease| (lease.id.to_string(), lease)).collect();
        let shown =
            named.iter().map(|(id, lease)| (id.as_str(), Some(convert::lease_message(lease))));
        let page = fill(shown, query.size);
        Ok(v1::ListLeasesResponse {
            leases: page.items,
            next_page_token: api.more(view, query.token.as_ref(), page.after),
            revision: view.revision.0,
        })
    }
}

fn lease_id(id: u64) -> Result<LeaseId, Status> {
    let missing = || errors::invalid(Invalid::new("id", 0, "the id of a lease: 1 or more"));
    convert::lease(id).ok_or_else(missing)
}

#[tonic::async_trait]
impl v1::leases_server::Leases for Api {
    async fn grant(
        &self,
        request: Request<v1::GrantRequest>,
    ) -> Result<Response<v1::GrantResponse>, Status> {
        self.serve_unary::<Writing<Grant>>(request).await
    }

    type KeepAliveStream = Responses<v1::KeepAliveResponse>;

    async fn keep_alive(
        &self,
        request: Request<Streaming<v1::KeepAliveRequest>>,
    ) -> Result<Response<Self::KeepAliveStream>, Status> {
        let api = self.clone();
        let ahead = Ahead::of_small(KEEP_ALIVES_AT_ONCE);
        let answers = ahead.answers(request.into_inner(), move |message| {
            let api = api.clone();
            let call = async move { api.serve::<KeepAlive>(&MetadataMap::new(), message?).await };
            call.map(|answer| (answer.map(Response::into_inner), 0))
        });
        let answers = answers.map(|(answer, _)| answer);
        Ok(Response::new(Box::pin(answers.take_until(self.stopping()))))
    }

    async fn revoke(
        &self,
        request: Request<v1::RevokeRequest>,
    ) -> Result<Response<v1::RevokeResponse>, Status> {
        self.serve_unary::<Writing<Revoke>>(request).await
    }

    async fn get(
        &self,
        request: Request<v1::GetLeaseRequest>,
    ) -> Result<Response<v1::GetLeaseResponse>, Status> {
        self.serve_unary::<Reading<Get>>(request).await
    }

    async fn list(
        &self,
        request: Request<v1::ListLeasesRequest>,
    ) -> Result<Response<v1::ListLeasesResponse>, Status> {
        self.serve_unary::<Reading<List>>(request).await
    }
}
