//! One call over as many attempts as it takes.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use itertools::Itertools as _;
use rand::Rng as _;
use tokio::time::{Instant, sleep, timeout};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::Client;
use super::endpoints::Door;
use super::error::{ClientError, Verdict, judge};
use crate::lock::guard;
use crate::proto::precondition;
use crate::proto::v1::{ListMembersRequest, ListMembersResponse};

/// The pause after the first round over all endpoints; twice as long after each further one.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// The time that another attempt has at least, and a twentieth of the timeout where that is less: one that ends
/// before it can be answered leaves unknown what was known not to be done.
const AGAIN_MIN: Duration = Duration::from_millis(50);
/// Largest answer taken: more than a node sends.
const ANSWER_MAX_BYTES: usize = 16 << 20;

/// What a method leaves behind, and so what may be done when an attempt is in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing, or nothing that a repeat would do twice.
    Read,
    /// A change under a token or an id that is never used again: a repeat is safe, and its refusal
    /// is the last word, but for one that is about the version.
    Fenced,
    /// A change that goes away by itself where nobody knows of it (a lease): repeated, and a refusal
    /// is the last word for the caller, who has nothing then.
    Expiring,
    /// A change that is safe to repeat; a refused repeat says nothing of the attempt before.
    Repeatable,
    /// A change that is not safe to repeat.
    Once,
}

/// A method of the API with the types that it takes and gives.
pub struct Method<Req, Res> {
    path: &'static str,
    effect: Effect,
    types: PhantomData<fn(Req) -> Res>,
}

impl<Req, Res> Method<Req, Res> {
    const fn new(path: &'static str, effect: Effect) -> Self {
        Method { path, effect, types: PhantomData }
    }
}

pub mod methods {
    use super::{Effect::*, Method};
    use crate::proto::v1::*;

    macro_rules! methods {
        ($($name:ident: $path:literal, $request:ty => $response:ty, $effect:expr;)*) => {
            $(pub const $name: Method<$request, $response> =
                Method::new(concat!("/portwarden.v1.", $path), $effect);)*
        };
    }

    methods! {
        ALLOCATE: "Allocator/Allocate", AllocateRequest => AllocateResponse, Repeatable;
        DRY_RUN: "Allocator/Allocate", AllocateRequest => AllocateResponse, Read;
        EXPLAIN: "Allocator/Explain", ExplainRequest => ExplainResponse, Read;
        CONFIRM: "Allocator/Confirm", ConfirmRequest => ConfirmResponse, Fenced;
        ATTACH: "Allocator/Attach", AttachRequest => AttachResponse, Fenced;
        RELEASE: "Allocator/Release", ReleaseRequest => ReleaseResponse, Fenced;
        FORCE_RELEASE: "Allocator/Release", ReleaseRequest => ReleaseResponse, Once;
        // The first may have ended the allocation.
        REPORT_CONFLICT: "Allocator/ReportConflict",
            ReportConflictRequest => ReportConflictResponse, Repeatable;
        GET: "Allocator/Get", GetRequest => GetResponse, Read;
        LIST: "Allocator/List", ListRequest => ListResponse, Read;
        WORKER_REGISTER: "Workers/Register", RegisterRequest => WorkerResponse, Repeatable;
        WORKER_UPDATE: "Workers/Update", UpdateRequest => WorkerResponse, Repeatable;
        WORKER_SET_PHASE: "Workers/SetPhase", SetPhaseRequest => WorkerResponse, Repeatable;
        WORKER_VERIFY: "Workers/Verify", VerifyRequest => WorkerResponse, Repeatable;
        WORKER_REMOVE: "Workers/Remove", RemoveRequest => RemoveResponse, Repeatable;
        // Whoever has the name later may hold things.
        FORCE_WORKER_REMOVE: "Workers/Remove", RemoveRequest => RemoveResponse, Once;
        WORKER_GET: "Workers/Get", GetWorkerRequest => WorkerResponse, Read;
        WORKER_LIST: "Workers/List", ListWorkersRequest => ListWorkersResponse, Read;
        WORKER_QUARANTINE: "Workers/Quarantine", QuarantineRequest => WorkerResponse, Repeatable;
        WORKER_LIFT_QUARANTINE: "Workers/LiftQuarantine",
            LiftQuarantineRequest => WorkerResponse, Repeatable;
        // The table keeps no sample, and the leader counts none twice.
        WORKER_REPORT: "Workers/Report", ReportRequest => ReportResponse, Read;
        LEASE_GRANT: "Leases/Grant", GrantRequest => GrantResponse, Expiring;
        LEASE_REVOKE: "Leases/Revoke", RevokeRequest => RevokeResponse, Fenced;
        LEASE_GET: "Leases/Get", GetLeaseRequest => GetLeaseResponse, Read;
        LEASE_LIST: "Leases/List", ListLeasesRequest => ListLeasesResponse, Read;
        STATUS: "Cluster/Status", StatusRequest => StatusResponse, Read;
        MEMBERS: "Cluster/ListMembers", ListMembersRequest => ListMembersResponse, Read;
        MEMBER_ADD: "Cluster/AddMember", AddMemberRequest => ListMembersResponse, Repeatable;
        MEMBER_PROMOTE: "Cluster/PromoteMember", MemberRequest => ListMembersResponse, Repeatable;
        MEMBER_REMOVE: "Cluster/RemoveMember", RemoveMemberRequest => ListMembersResponse, Repeatable;
        TRANSFER_LEADER: "Cluster/TransferLeader", MemberRequest => ListMembersResponse, Repeatable;
        SET_FEATURE_LEVEL: "Cluster/SetFeatureLevel",
            SetFeatureLevelRequest => SetFeatureLevelResponse, Repeatable;
    }
}

impl Client {
    pub(super) async fn call<Req, Res>(
        &self,
        method: Method<Req, Res>,
        request: Req,
    ) -> Result<Res, ClientError>
    where
        Req: prost::Message + Clone + 'static,
        Res: prost::Message + Default + 'static,
    {
        self.call_after(method, request, None).await
    }

    /// The same, after an attempt by other means that is in doubt, if there was one.
    pub(super) async fn call_after<Req, Res>(
        &self,
        method: Method<Req, Res>,
        request: Req,
        mut doubt: Option<String>,
    ) -> Result<Res, ClientError>
    where
        Req: prost::Message + Clone + 'static,
        Res: prost::Message + Default + 'static,
    {
        if let (Effect::Once, Some(why)) = (method.effect, &doubt) {
            return Err(ClientError::OutcomeUnknown { why: why.clone() });
        }
        let deadline = Instant::now() + self.timeout;
        let request_id = AsciiMetadataValue::try_from(self.fresh_uid()).ok();
        let mut tour = self.tour();
        // Of each endpoint what was last heard: the one that runs knows more than the one that does not.
        let mut heard = BTreeMap::new();
        let mut overloaded = true;
        for attempt in 1.. {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let mut message = Request::new(request.clone());
            if let Some(id) = &request_id {
                message.metadata_mut().insert("x-request-id", id.clone());
            }
            // Where it may be repeated, the time is for all endpoints of a round: one may be silent.
            let given = match method.effect {
                Effect::Once => left,
                _ => (left / tour.untried()).min(self.shared.attempt_timeout),
            };
            let asked_pause = match self.attempt(method.path, tour.door(), message, given).await {
                Ok(response) => {
                    tour.answered();
                    return Ok(response);
                }
                Err(Verdict::Refused(refused)) => {
                    tour.answered();
                    return Err(after_doubt(method.effect, doubt, refused));
                }
                Err(Verdict::NotDone { why, pause }) => {
                    heard.insert(tour.door().name.clone(), by(tour.door(), why));
                    overloaded &= pause.is_some();
                    pause
                }
                Err(Verdict::Doubtful { why }) => {
                    let why = by(tour.door(), why);
                    heard.insert(tour.door().name.clone(), why.clone());
                    overloaded = false;
                    match method.effect {
                        Effect::Read => {}
                        Effect::Once => return Err(ClientError::OutcomeUnknown { why }),
                        Effect::Fenced | Effect::Expiring | Effect::Repeatable => {
                            doubt = Some(why);
                        }
                    }
                    None
                }
            };
            tracing::debug!(method = method.path, attempt, ?heard, "no answer");
            let pause = tour.move_on(asked_pause);
            if doubt.is_none() && !self.has_time(pause, deadline) {
                break;
            }
            sleep(pause.min(deadline.saturating_duration_since(Instant::now()))).await;
        }
        Err(match doubt {
            Some(doubt) => ClientError::OutcomeUnknown { why: doubt },
            None if heard.is_empty() => {
                let why = "the timeout is too short for one attempt".into();
                ClientError::Unavailable { why, overloaded: false }
            }
            None => ClientError::Unavailable { why: heard.values().join("; "), overloaded },
        })
    }

    async fn attempt<Req, Res>(
        &self,
        path: &'static str,
        door: &Door,
        mut request: Request<Req>,
        given: Duration,
    ) -> Result<Res, Verdict>
    where
        Req: prost::Message + 'static,
        Res: prost::Message + Default + 'static,
    {
        request.set_timeout(given);
        let path = PathAndQuery::from_static(path);
        ask(door, given, async |grpc| grpc.unary(request, path, ProstCodec::default()).await).await
    }

    /// Begins at the endpoint that last answered.
    pub(super) fn tour(&self) -> Tour {
        Tour {
            client: self.clone(),
            doors: self.shared.endpoints.doors(),
            at: 0,
            attempts: 0,
            in_round: 0,
        }
    }

    /// Opens a stream at an endpoint: `requests` go there, what comes back are its answers.
    pub(super) async fn open<Req, Res>(
        &self,
        path: &'static str,
        door: &Door,
        requests: impl Stream<Item = Req> + Send + 'static,
    ) -> Result<Streaming<Res>, Verdict>
    where
        Req: prost::Message + 'static,
        Res: prost::Message + Default + 'static,
    {
        let given = self.shared.attempt_timeout.min(self.timeout);
        let path = PathAndQuery::from_static(path);
        let requests = Request::new(requests);
        ask(door, given, async |grpc| grpc.streaming(requests, path, ProstCodec::default()).await)
            .await
    }

    /// Is there time for another attempt after the pause?
    pub(super) fn has_time(&self, pause: Duration, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        left >= pause + AGAIN_MIN.min(self.timeout / 20)
    }

    /// Half to one and a half times the pause, so that clients do not come back all at once.
    pub(super) fn jitter(&self, pause: Duration) -> Duration {
        let mut rng = guard(&self.shared.rng);
        pause * rng.random_range(50..150) / 100
    }
}

/// One call at an endpoint, within the time that is given.
async fn ask<T>(
    door: &Door,
    given: Duration,
    call: impl AsyncFnOnce(&mut Grpc<Channel>) -> Result<Response<T>, Status>,
) -> Result<T, Verdict> {
    let mut grpc = Grpc::new(door.channel.clone()).max_decoding_message_size(ANSWER_MAX_BYTES);
    let asked = async {
        grpc.ready().await.map_err(|e| Verdict::NotDone { why: e.to_string(), pause: None })?;
        call(&mut grpc).await.map(Response::into_inner).map_err(judge)
    };
    timeout(given, asked).await.unwrap_or_else(|_| {
        Err(Verdict::Doubtful { why: format!("no answer within {} ms", given.as_millis()) })
    })
}

/// The way through the endpoints: each in turn, and a growing, jittered pause after each round.
pub(super) struct Tour {
    client: Client,
    doors: Vec<Arc<Door>>,
    /// Index of the endpoint whose turn it is.
    at: usize,
    /// Since the last answer.
    attempts: usize,
    /// Of them, in this round.
    in_round: usize,
}

impl Tour {
    /// The endpoint whose turn it is.
    pub fn door(&self) -> &Arc<Door> {
        &self.doors[self.at]
    }

    /// How many endpoints there are.
    pub fn len(&self) -> usize {
        self.doors.len()
    }

    /// Those whose turn is yet to come in this round, this one included.
    pub fn untried(&self) -> u32 {
        (self.doors.len() - self.in_round) as u32
    }

    /// The endpoint serves: stay there. Now and then it is asked for the others.
    pub fn answered(&mut self) {
        self.client.shared.endpoints.prefer(self.door());
        (self.attempts, self.in_round) = (0, 0);
        if self.client.shared.endpoints.is_due() {
            tokio::spawn(learn(self.client.clone(), self.door().clone()));
        }
    }

    /// The endpoint does not serve: to the next one, after the pause that is returned.
    pub fn move_on(&mut self, asked_pause: Option<Duration>) -> Duration {
        let endpoints = self.doors.len();
        self.attempts += 1;
        self.in_round += 1;
        // Also from one that is overloaded: many bounds are those of one node.
        self.at = (self.at + 1) % endpoints;
        let round_over = self.in_round == endpoints;
        if round_over {
            self.in_round = 0;
            // Somebody may have learnt of others meanwhile.
            (self.doors, self.at) = (self.client.shared.endpoints.doors(), 0);
        }
        if asked_pause.is_none() && !round_over {
            return Duration::ZERO;
        }
        let rounds = (self.attempts / endpoints).min(10) as u32;
        let grown = PAUSE_MIN.saturating_mul(1 << rounds.saturating_sub(1)).min(PAUSE_MAX);
        self.client.jitter(grown.max(asked_pause.unwrap_or_default()))
    }
}

/// Which endpoint it was, for messages.
pub(super) fn by(door: &Door, why: String) -> String {
    format!("{}: {why}", door.name)
}

/// Asks an endpoint for the members. Where that fails, the next time will do.
async fn learn(client: Client, door: Arc<Door>) {
    let request = Request::new(ListMembersRequest { endpoints_only: true });
    let limit = client.shared.attempt_timeout;
    let answer = client.attempt(methods::MEMBERS.path, &door, request, limit).await;
    let answer: ListMembersResponse = match answer {
        Ok(answer) => answer,
        Err(verdict) => {
            tracing::debug!(?verdict, "the members are not known anew");
            return;
        }
    };
    let members = answer.members.into_iter().map(|member| member.endpoint);
    let members: Vec<_> = members.filter(|endpoint| !endpoint.is_empty()).collect();
    client.shared.endpoints.learn(&members);
}

/// A refusal, when an earlier attempt of the same call is in doubt.
fn after_doubt(effect: Effect, doubt: Option<String>, refused: Box<super::Refused>) -> ClientError {
    // These do not depend on the table: the earlier attempt met the same.
    let settled = matches!(
        refused.status.code(),
        Code::InvalidArgument | Code::PermissionDenied | Code::Unauthenticated
    );
    let says_nothing = match effect {
        Effect::Repeatable => !settled,
        // A name or a token that does not hold will never hold again. All else may be what the earlier
        // attempt has made, or pass while that is still on its way.
        Effect::Fenced => {
            let missing = refused.details.resource_info();
            let for_good = missing.is_some_and(|missing| missing.resource_type == "allocation")
                || refused.is_for(precondition::TOKEN);
            !settled && !for_good
        }
        Effect::Read | Effect::Expiring | Effect::Once => false,
    };
    match doubt {
        Some(doubt) if says_nothing => ClientError::OutcomeUnknown {
            why: format!("{doubt}; a repeat was refused: {}", refused.status.message()),
        },
        _ => ClientError::Refused(refused),
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;
    use crate::client::Refused;

    #[test]
    fn after_a_doubt_only_what_holds_for_good_is_the_last_word() {
        let broken = |kind: &str| {
            let details = ErrorDetails::with_precondition_failure_violation(kind, "a", "");
            (Code::FailedPrecondition, details)
        };
        let missing =
            |kind: &str| (Code::NotFound, ErrorDetails::with_resource_info(kind, "a", "", ""));
        for ((code, details), known) in [
            (missing("allocation"), true),
            (broken(precondition::TOKEN), true),
            ((Code::InvalidArgument, ErrorDetails::new()), true),
            // What the earlier attempt has made, perhaps.
            (broken(precondition::VERSION), false),
            (broken(precondition::PORT_NOT_HELD), false),
            // What passes.
            (missing("lease"), false),
            (broken(precondition::LINGERING), false),
            ((Code::ResourceExhausted, ErrorDetails::new()), false),
        ] {
            let status = Status::with_error_details(code, "no", details.clone());
            let refused = Box::new(Refused { status, details });
            let shown = format!("{refused:?}");
            let error = after_doubt(Effect::Fenced, Some("it broke".into()), refused);
            assert_eq!(matches!(error, ClientError::Refused(_)), known, "{shown}");
        }
    }
}
