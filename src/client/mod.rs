//! The client library: typed calls that find a node which serves, and say exactly what is known
//! when none does.
//!
//! A client has a list of endpoints and needs only one of them alive: every node carries calls to
//! the leader. It stays with the endpoint that last answered and goes through the others in turn
//! when that one fails, with a growing, jittered pause after each round, until the call's timeout.
//! One attempt gets a part of the timeout only, so that a node that accepts and never answers does
//! not eat all of it; but the only attempt at what must not be repeated gets what is left.
//!
//! What an attempt without an answer leaves behind decides what comes next:
//!
//! - *surely not done* (no connection; a status whose `ErrorInfo` says so): the next endpoint;
//! - *doubtful* (a broken stream, a timeout, OUTCOME_UNKNOWN): repeated if a uid or token makes the
//!   repeat safe, else [`ClientError::OutcomeUnknown`] at once;
//! - if the last word is a failure and any attempt was doubtful, the call is
//!   [`ClientError::OutcomeUnknown`], never "not done": an attempt may still be on its way. That
//!   also holds where a repeat of an `allocate` is refused. The refusal of a repeat settles the
//!   matter only under a token, because a token that does not hold will never hold again; and not
//!   where it is the version that does not: that may be the doubtful attempt's own doing.
//!
//! Beyond single calls: [`Session`] carries many over one stream, [`Keeper`] keeps leases alive over one,
//! [`Client::watch`] tells the changes of the table without a gap, [`Client::follow`] keeps a copy up with
//! it, and [`Client::start_on`] goes from port to port until one is free.

mod backup;
mod call;
mod conflicts;
mod endpoints;
mod error;
mod follow;
mod keeper;
mod leases;
pub mod session;
#[cfg(test)]
mod tests;
mod watch;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use tokio::time::Instant;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::lock::guard;
use crate::proto::{reason, v1};
pub use backup::{BackupError, Copied};
use call::methods;
pub use conflicts::{NoPortLeft, StartError, Try};
use endpoints::Endpoints;
pub use error::{ClientError, Refused};
pub use follow::{Filter, Follow, News};
pub use keeper::{Clock, Holding, Keeper, Standing};
pub use session::Session;
pub use watch::{Heard, Watch};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Below this it is not worth asking once more whether a member has caught up.
const CATCH_UP_TRY_MIN: Duration = Duration::from_millis(500);
/// How often a listing is begun again because its revision was no longer kept.
const LIST_RESTARTS_MAX: usize = 8;

#[derive(Debug, Clone)]
pub struct Options {
    /// For one call over all its attempts; for listings, for each page.
    pub timeout: Duration,
    /// For one attempt at what may be repeated.
    pub attempt_timeout: Duration,
    /// How often the members are asked for, at most, so that new ones are found.
    pub learn_every: Duration,
    /// Of the random numbers behind uids, request ids and jitter; `None`: from the system.
    pub seed: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            timeout: Duration::from_secs(10),
            attempt_timeout: Duration::from_secs(3),
            learn_every: Duration::from_secs(10),
            seed: None,
        }
    }
}

/// Cheap to clone; clones share their connections.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    timeout: Duration,
}

struct Shared {
    endpoints: Endpoints,
    attempt_timeout: Duration,
    rng: Mutex<StdRng>,
}

/// All pages of a listing.
#[derive(Debug, Clone, PartialEq)]
pub struct Listing<T> {
    /// In order of name; leases in order of id.
    pub items: Vec<T>,
    pub revision: u64,
}

impl Client {
    /// The endpoint that last answered.
    pub fn last_endpoint(&self) -> String {
        self.shared.endpoints.preferred()
    }

    /// All endpoints that it knows by now.
    pub fn endpoints(&self) -> Vec<String> {
        self.shared.endpoints.doors().iter().map(|door| door.name.clone()).collect()
    }

    /// Endpoints are `host:port` or `http://host:port`. Connections are made when first used. A client
    /// that lives on learns the other members of the cluster, and forgets those that were removed.
    pub fn connect(endpoints: Vec<String>, options: Options) -> Result<Self, ClientError> {
        let mut channels = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            let channel = Self::endpoint(&endpoint)?.connect_lazy();
            channels.push((endpoint, channel));
        }
        Self::new(channels, options, Some(|name| Ok(Self::endpoint(name)?.connect_lazy())))
    }

    /// As [`Client::connect`], over channels made elsewhere (in simulation, with its own sockets), and
    /// no others.
    pub fn over(endpoints: Vec<(String, Channel)>, options: Options) -> Result<Self, ClientError> {
        Self::new(endpoints, options, None)
    }

    fn new(
        endpoints: Vec<(String, Channel)>,
        options: Options,
        connect: Option<endpoints::Connect>,
    ) -> Result<Self, ClientError> {
        if endpoints.is_empty() {
            let why = "at least one endpoint is needed".into();
            return Err(ClientError::Endpoint { endpoint: String::new(), why });
        }
        let rng = options.seed.map_or_else(StdRng::from_os_rng, StdRng::seed_from_u64);
        let shared = Shared {
            endpoints: Endpoints::new(endpoints, connect, options.learn_every),
            attempt_timeout: options.attempt_timeout,
            rng: Mutex::new(rng),
        };
        Ok(Client { shared: Arc::new(shared), timeout: options.timeout })
    }

    /// How the library connects to an endpoint.
    pub fn endpoint(endpoint: &str) -> Result<Endpoint, ClientError> {
        let bad = |why: &str| ClientError::Endpoint { endpoint: endpoint.into(), why: why.into() };
        let (scheme, authority) = endpoint.split_once("://").unwrap_or(("http", endpoint));
        if scheme != "http" {
            return Err(bad("must be host:port or http://host:port"));
        }
        let port = authority.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        if port.is_none_or(|port| port == 0) {
            return Err(bad("must be host:port with a port of 1 to 65535"));
        }
        let endpoint = Endpoint::from_shared(format!("http://{authority}"))
            .map_err(|_| bad("must be host:port or http://host:port"))?;
        Ok(endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT))
    }

    /// The same client with another timeout for each call.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Client { timeout, ..self.clone() }
    }

    /// A uid for one start attempt.
    pub fn fresh_uid(&self) -> String {
        let mut bytes = [0; 16];
        guard(&self.shared.rng).fill_bytes(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid().to_string()
    }

    // Allocations.

    /// Claims without a uid get one, which is kept over the attempts of this call.
    pub async fn allocate(
        &self,
        mut claims: Vec<v1::Claim>,
    ) -> Result<v1::AllocateResponse, ClientError> {
        self.give_uids(&mut claims);
        self.call(methods::ALLOCATE, v1::AllocateRequest { claims, dry_run: false }).await
    }

    /// What an `allocate` would be answered; nothing is changed.
    pub async fn allocate_dry_run(
        &self,
        mut claims: Vec<v1::Claim>,
    ) -> Result<v1::AllocateResponse, ClientError> {
        self.give_uids(&mut claims);
        self.call(methods::DRY_RUN, v1::AllocateRequest { claims, dry_run: true }).await
    }

    /// Why each worker that is looked at for these claims fits or does not.
    pub async fn explain(
        &self,
        mut claims: Vec<v1::Claim>,
        read: Option<v1::ReadOptions>,
    ) -> Result<v1::ExplainResponse, ClientError> {
        self.give_uids(&mut claims);
        self.call(methods::EXPLAIN, v1::ExplainRequest { claims, read }).await
    }

    fn give_uids(&self, claims: &mut [v1::Claim]) {
        for claim in claims.iter_mut().filter(|claim| claim.uid.is_empty()) {
            claim.uid = self.fresh_uid();
        }
    }

    /// Says that what was granted so runs, on its lease. A start that missed its deadline meanwhile
    /// lingers, off its lease: it is revived on that lease, which must be alive.
    pub async fn confirm(&self, held: &v1::Allocation) -> Result<v1::ConfirmResponse, ClientError> {
        let v1::Allocation { name, token, lease, ports, .. } = held;
        let deadline = Instant::now() + self.timeout;
        let confirm = |version, doubt| {
            let liveness = None;
            let (name, token, lease) = (name.clone(), *token, *lease);
            let request = v1::ConfirmRequest { name, token, version, lease, liveness };
            let left = deadline.saturating_duration_since(Instant::now());
            async move { self.with_timeout(left).call_after(methods::CONFIRM, request, doubt).await }
        };
        let failed = match confirm(held.version, None).await {
            Err(error) if error.code() == Some(Code::FailedPrecondition) => error,
            Err(error @ ClientError::OutcomeUnknown { .. }) => error,
            answer => return answer,
        };
        let doubt = match &failed {
            ClientError::OutcomeUnknown { why } => Some(why.clone()),
            _ => None,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let Ok(v1::GetResponse { allocation: Some(found), revision, .. }) =
            self.with_timeout(left).get(name, None).await
        else {
            return Err(failed);
        };
        match found.phase() {
            _ if found.token != *token || found.ports != *ports => Err(failed),
            v1::Phase::Lingering => confirm(found.version, doubt).await,
            v1::Phase::Bound if doubt.is_some() && (*lease == 0 || found.lease == *lease) => {
                Ok(v1::ConfirmResponse { allocation: Some(found), revision })
            }
            _ => Err(failed),
        }
    }

    /// With a liveness handle, or onto another lease. `version` 0 is unguarded. Revives what lingers:
    /// on no lease, where none is named.
    pub async fn confirm_with(
        &self,
        request: v1::ConfirmRequest,
    ) -> Result<v1::ConfirmResponse, ClientError> {
        self.call(methods::CONFIRM, request).await
    }

    /// Releases what this token holds. `released` is false where it was gone already, also because
    /// an earlier attempt of this call did it.
    pub async fn release(
        &self,
        name: &str,
        token: u64,
    ) -> Result<v1::ReleaseResponse, ClientError> {
        let authority = Some(v1::release_request::Authority::Token(token));
        let request = v1::ReleaseRequest { name: name.into(), authority };
        self.call(methods::RELEASE, request).await
    }

    /// An operator's override, whoever holds the name. Not repeated when in doubt: the name may
    /// have a new holder by then.
    pub async fn force_release(
        &self,
        name: &str,
        reason: &str,
    ) -> Result<v1::ReleaseResponse, ClientError> {
        let force = v1::Force { reason: reason.into() };
        let authority = Some(v1::release_request::Authority::Force(force));
        let request = v1::ReleaseRequest { name: name.into(), authority };
        self.call(methods::FORCE_RELEASE, request).await
    }

    /// `version` 0 is unguarded.
    pub async fn report_conflict(
        &self,
        name: &str,
        token: u64,
        version: u64,
        port: u32,
    ) -> Result<v1::ReportConflictResponse, ClientError> {
        let request = v1::ReportConflictRequest { name: name.into(), token, version, port };
        self.call(methods::REPORT_CONFLICT, request).await
    }

    pub async fn get(
        &self,
        name: &str,
        read: Option<v1::ReadOptions>,
    ) -> Result<v1::GetResponse, ClientError> {
        self.call(methods::GET, v1::GetRequest { name: name.into(), read }).await
    }

    /// All pages, at one revision. Begins again where that revision is no longer kept.
    pub async fn list(
        &self,
        request: v1::ListRequest,
    ) -> Result<Listing<v1::Allocation>, ClientError> {
        self.all_pages(async |page_token| {
            let request = v1::ListRequest { page_token, ..request.clone() };
            let page = self.call(methods::LIST, request).await?;
            Ok((page.allocations, page.next_page_token, page.revision))
        })
        .await
    }

    // Workers.

    pub async fn worker_register(
        &self,
        name: &str,
        spec: v1::WorkerSpec,
    ) -> Result<v1::WorkerResponse, ClientError> {
        let request = v1::RegisterRequest { name: name.into(), spec: Some(spec) };
        self.call(methods::WORKER_REGISTER, request).await
    }

    /// Changes the named fields: some of address, labels, ranges, reserved, gpus, identity.
    pub async fn worker_update(
        &self,
        name: &str,
        spec: v1::WorkerSpec,
        fields: Vec<String>,
    ) -> Result<v1::WorkerResponse, ClientError> {
        let request = v1::UpdateRequest { name: name.into(), spec: Some(spec), fields };
        self.call(methods::WORKER_UPDATE, request).await
    }

    pub async fn worker_set_phase(
        &self,
        name: &str,
        phase: v1::WorkerPhase,
    ) -> Result<v1::WorkerResponse, ClientError> {
        let request = v1::SetPhaseRequest { name: name.into(), phase: phase.into() };
        self.call(methods::WORKER_SET_PHASE, request).await
    }

    /// An operator has compared a restored worker with its host.
    pub async fn worker_verify(&self, name: &str) -> Result<v1::WorkerResponse, ClientError> {
        self.call(methods::WORKER_VERIFY, v1::VerifyRequest { name: name.into() }).await
    }

    /// `removed` is false where there was none.
    pub async fn worker_remove(&self, name: &str) -> Result<v1::RemoveResponse, ClientError> {
        self.call(methods::WORKER_REMOVE, v1::RemoveRequest { name: name.into(), force: None })
            .await
    }

    /// Frees all that it holds, by an operator's word. Not repeated when in doubt.
    pub async fn worker_force_remove(
        &self,
        name: &str,
        reason: &str,
    ) -> Result<v1::RemoveResponse, ClientError> {
        let force = Some(v1::Force { reason: reason.into() });
        self.call(methods::FORCE_WORKER_REMOVE, v1::RemoveRequest { name: name.into(), force })
            .await
    }

    /// One sample of an agent. It is repeated while there is time: no sample is counted twice.
    pub async fn worker_report(
        &self,
        request: v1::ReportRequest,
    ) -> Result<v1::ReportResponse, ClientError> {
        self.call(methods::WORKER_REPORT, request).await
    }

    pub async fn worker_get(
        &self,
        name: &str,
        read: Option<v1::ReadOptions>,
    ) -> Result<v1::WorkerResponse, ClientError> {
        self.call(methods::WORKER_GET, v1::GetWorkerRequest { name: name.into(), read }).await
    }

    /// All pages, as [`Client::list`].
    pub async fn worker_list(
        &self,
        request: v1::ListWorkersRequest,
    ) -> Result<Listing<v1::Worker>, ClientError> {
        self.all_pages(async |page_token| {
            let request = v1::ListWorkersRequest { page_token, ..request.clone() };
            let page = self.call(methods::WORKER_LIST, request).await?;
            Ok((page.workers, page.next_page_token, page.revision))
        })
        .await
    }

    pub async fn worker_quarantine(
        &self,
        worker: &str,
        ports: Vec<u32>,
        reason: &str,
    ) -> Result<v1::WorkerResponse, ClientError> {
        let request = v1::QuarantineRequest { worker: worker.into(), ports, reason: reason.into() };
        self.call(methods::WORKER_QUARANTINE, request).await
    }

    pub async fn worker_lift_quarantine(
        &self,
        worker: &str,
        ports: Vec<u32>,
    ) -> Result<v1::WorkerResponse, ClientError> {
        let request = v1::LiftQuarantineRequest { worker: worker.into(), ports };
        self.call(methods::WORKER_LIFT_QUARANTINE, request).await
    }

    // The cluster.

    /// As the first node that answers sees it.
    pub async fn status(&self) -> Result<v1::StatusResponse, ClientError> {
        self.call(methods::STATUS, v1::StatusRequest {}).await
    }

    pub async fn members(&self) -> Result<Vec<v1::Member>, ClientError> {
        let response = self.call(methods::MEMBERS, v1::ListMembersRequest::default()).await?;
        Ok(response.members)
    }

    /// As a learner. Answers with all members, as the following do.
    pub async fn member_add(
        &self,
        id: u64,
        peer: &str,
        client: &str,
    ) -> Result<Vec<v1::Member>, ClientError> {
        let request = v1::AddMemberRequest { id, peer: peer.into(), client: client.into() };
        Ok(self.call(methods::MEMBER_ADD, request).await?.members)
    }

    /// Once it has caught up: waits for that within the timeout.
    pub async fn member_promote(&self, id: u64) -> Result<Vec<v1::Member>, ClientError> {
        self.while_lagging(async |client| {
            client.call(methods::MEMBER_PROMOTE, v1::MemberRequest { id }).await
        })
        .await
    }

    /// A change for which the leader waits until somebody has caught up, in each attempt; asked again
    /// within the timeout.
    async fn while_lagging(
        &self,
        change: impl AsyncFn(Client) -> Result<v1::ListMembersResponse, ClientError>,
    ) -> Result<Vec<v1::Member>, ClientError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match change(self.with_timeout(left.max(CATCH_UP_TRY_MIN))).await {
                Err(error)
                    if error.reason() == Some(reason::LAGGING)
                        && Instant::now() + CATCH_UP_TRY_MIN < deadline => {}
                answer => return Ok(answer?.members),
            }
        }
    }

    /// For good; a leader hands over first, to one that has caught up. `force`: even if too few of
    /// those that are left are live.
    pub async fn member_remove(
        &self,
        id: u64,
        force: bool,
    ) -> Result<Vec<v1::Member>, ClientError> {
        self.while_lagging(async |client| {
            client.call(methods::MEMBER_REMOVE, v1::RemoveMemberRequest { id, force }).await
        })
        .await
    }

    pub async fn transfer_leader(&self, id: u64) -> Result<Vec<v1::Member>, ClientError> {
        Ok(self.call(methods::TRANSFER_LEADER, v1::MemberRequest { id }).await?.members)
    }

    /// Only upward, once every member knows it; answers with the one that there is.
    pub async fn set_feature_level(&self, level: u32) -> Result<u32, ClientError> {
        let request = v1::SetFeatureLevelRequest { level };
        Ok(self.call(methods::SET_FEATURE_LEVEL, request).await?.feature_level)
    }

    async fn all_pages<T>(
        &self,
        page: impl AsyncFn(String) -> Result<(Vec<T>, String, u64), ClientError>,
    ) -> Result<Listing<T>, ClientError> {
        let mut restarts = 0;
        let mut items = Vec::new();
        let mut token = String::new();
        loop {
            match page(token).await {
                Ok((more, next, revision)) => {
                    items.extend(more);
                    if next.is_empty() {
                        return Ok(Listing { items, revision });
                    }
                    token = next;
                }
                Err(error)
                    if error.reason() == Some(reason::PAGE_EXPIRED)
                        && restarts < LIST_RESTARTS_MAX =>
                {
                    restarts += 1;
                    items.clear();
                    token = String::new();
                }
                Err(error) => return Err(error),
            }
        }
    }
}
