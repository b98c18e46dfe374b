//! A client that is recorded: one attempt a call, at one node, and its outcome by the API's own
//! words.
//!
//! It does not use the client library, so that what the library makes of an error is not taken for
//! granted: [`Caller`] reads `ErrorInfo` itself. [`LibraryCaller`] is the library, recorded: its
//! calls may be sent more than once.

use std::sync::Arc;
use std::time::Duration;

use portwarden::api::meaning::{Request, Response};
use portwarden::client::{self, Client, ClientError};
use portwarden::proto::{DOMAIN, reason, v1};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use v1::allocator_client::AllocatorClient;
use v1::leases_client::LeasesClient;
use v1::workers_client::WorkersClient;

use crate::history::{Record, Recorder};

/// How a call ended for who made it.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "almost all are Ok")]
pub enum Ended {
    Ok(Response),
    Refused(Status),
    /// Surely not done, or nobody knows.
    Lost,
}

impl Ended {
    pub fn ok(self) -> Option<Response> {
        match self {
            Ended::Ok(response) => Some(response),
            Ended::Refused(_) | Ended::Lost => None,
        }
    }
}

/// The nodes by name, each with the way there.
pub type Endpoints = Vec<(String, Channel)>;

/// The way by TCP.
pub fn by_tcp(endpoints: &[String]) -> Endpoints {
    let channel = |endpoint: &String| {
        let made = Client::endpoint(endpoint).expect("an endpoint");
        (endpoint.clone(), made.connect_lazy())
    };
    endpoints.iter().map(channel).collect()
}

pub struct Caller {
    recorder: Arc<Recorder>,
    process: u32,
    endpoints: Endpoints,
    at: usize,
    timeout: Duration,
}

impl Caller {
    /// Begins with the endpoint of this index. Channels belong to the runtime, and the network, of
    /// who makes it.
    pub fn new(recorder: Arc<Recorder>, process: u32, endpoints: Endpoints, at: usize) -> Caller {
        let at = at % endpoints.len();
        Caller { recorder, process, endpoints, at, timeout: Duration::from_secs(4) }
    }

    pub fn with_timeout(self, timeout: Duration) -> Caller {
        Caller { timeout, ..self }
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoints[self.at].0
    }

    pub fn channel(&self) -> Channel {
        self.endpoints[self.at].1.clone()
    }

    pub fn go_elsewhere(&mut self) {
        self.at = (self.at + 1) % self.endpoints.len();
    }

    pub async fn call(&mut self, request: Request) -> Ended {
        let op = self.recorder.invoke(self.process, false, request.clone());
        let sent = send(self.channel(), request, self.timeout);
        // The node gives up a little earlier; who hears nothing hears nothing more.
        let answer = tokio::time::timeout(self.timeout + Duration::from_millis(500), sent).await;
        let (ended, record) = judged(op, answer.unwrap_or_else(|_| Err(Status::cancelled("late"))));
        self.recorder.put(record);
        if let Ended::Lost = ended {
            self.go_elsewhere();
        }
        ended
    }
}

fn judged(
    op: u64,
    answer: Result<Response, Status>,
) -> (Ended, Box<dyn FnOnce(u64) -> Record + Send>) {
    let status = match answer {
        Ok(response) => {
            let recorded = response.clone();
            let record = move |at| Record::Ok { at, op, response: recorded };
            return (Ended::Ok(response), Box::new(record));
        }
        Err(status) => status,
    };
    let why = format!("{:?}: {}", status.code(), status.message());
    match verdict(&status) {
        Verdict::Refused => {
            let (code, message) = (status.code() as i32, status.message().to_string());
            let record = move |at| Record::Refused { at, op, code, message };
            (Ended::Refused(status), Box::new(record))
        }
        Verdict::NotDone => (Ended::Lost, Box::new(move |at| Record::Fail { at, op, why })),
        Verdict::Unknown => (Ended::Lost, Box::new(move |at| Record::Unknown { at, op, why })),
    }
}

enum Verdict {
    Refused,
    NotDone,
    Unknown,
}

/// As docs and protos promise it (`allocator.proto`).
fn verdict(status: &Status) -> Verdict {
    let connect = std::iter::successors(std::error::Error::source(status), |e| e.source())
        .any(|e| e.is::<tonic::ConnectError>());
    if connect {
        return Verdict::NotDone;
    }
    let info = status.get_details_error_info().filter(|info| info.domain == DOMAIN);
    let not_done = [
        reason::NOT_READY,
        reason::NOT_EXECUTED,
        reason::NOT_LEADER,
        reason::OVERLOADED,
        reason::LOW_SPACE,
    ];
    match info.map(|info| info.reason) {
        Some(reason) if not_done.contains(&reason.as_str()) => return Verdict::NotDone,
        Some(reason) if reason == reason::OUTCOME_UNKNOWN => return Verdict::Unknown,
        _ => {}
    }
    match status.code() {
        Code::Unknown
        | Code::Internal
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Unavailable
        | Code::DataLoss => Verdict::Unknown,
        _ => Verdict::Refused,
    }
}

async fn send(channel: Channel, request: Request, within: Duration) -> Result<Response, Status> {
    /// Sends a message over a method of a client.
    macro_rules! over {
        ($client:ident, $method:ident, $message:expr, $kind:ident) => {{
            let mut request = tonic::Request::new($message);
            request.set_timeout(within);
            let mut client = $client::new(channel).max_decoding_message_size(16 << 20);
            Ok(Response::$kind(client.$method(request).await?.into_inner()))
        }};
    }
    match request {
        Request::Allocate(m) => over!(AllocatorClient, allocate, m, Allocate),
        Request::Confirm(m) => over!(AllocatorClient, confirm, m, Confirm),
        Request::Attach(m) => over!(AllocatorClient, attach, m, Attach),
        Request::Release(m) => over!(AllocatorClient, release, m, Release),
        Request::ReportConflict(m) => over!(AllocatorClient, report_conflict, m, ReportConflict),
        Request::GrantLease(m) => over!(LeasesClient, grant, m, GrantLease),
        Request::RevokeLease(m) => over!(LeasesClient, revoke, m, RevokeLease),
        Request::Register(m) => over!(WorkersClient, register, m, Register),
        Request::Update(m) => over!(WorkersClient, update, m, Update),
        Request::SetPhase(m) => over!(WorkersClient, set_phase, m, SetPhase),
        Request::Remove(m) => over!(WorkersClient, remove, m, Remove),
        Request::Quarantine(m) => over!(WorkersClient, quarantine, m, Quarantine),
        Request::LiftQuarantine(m) => over!(WorkersClient, lift_quarantine, m, LiftQuarantine),
        Request::Get(m) => over!(AllocatorClient, get, m, Get),
        Request::List(m) => over!(AllocatorClient, list, m, List),
        Request::GetWorker(m) => over!(WorkersClient, get, m, GetWorker),
        Request::GetLease(m) => over!(LeasesClient, get, m, GetLease),
        Request::KeepAlive(m) => {
            let mut client = LeasesClient::new(channel);
            let one = tokio_stream::once(m);
            let mut answers = client.keep_alive(one).await?.into_inner();
            let answer = answers.message().await?;
            let answer = answer.ok_or_else(|| Status::cancelled("the stream ended"))?;
            Ok(Response::KeepAlive(answer))
        }
    }
}

/// The client library, recorded.
pub struct LibraryCaller {
    recorder: Arc<Recorder>,
    process: u32,
    client: Client,
}

impl LibraryCaller {
    pub fn new(
        recorder: Arc<Recorder>,
        process: u32,
        endpoints: Endpoints,
        seed: u64,
    ) -> LibraryCaller {
        let options = client::Options {
            timeout: Duration::from_secs(8),
            attempt_timeout: Duration::from_millis(1500),
            seed: Some(seed),
            ..Default::default()
        };
        let client = Client::over(endpoints, options).expect("endpoints");
        LibraryCaller { recorder, process, client }
    }

    pub async fn call(&self, request: Request) -> Ended {
        let op = self.recorder.invoke(self.process, true, request.clone());
        let (ended, record): (_, Box<dyn FnOnce(u64) -> Record + Send>) =
            match self.send(request).await {
                Ok(response) => judged(op, Ok(response)),
                // The table's own word, or one that says that nothing was done.
                Err(ClientError::Refused(refused)) => judged(op, Err(refused.status)),
                Err(error @ ClientError::OutcomeUnknown { .. }) => {
                    let why = error.to_string();
                    (Ended::Lost, Box::new(move |at| Record::Unknown { at, op, why }))
                }
                Err(error) => {
                    let why = error.to_string();
                    (Ended::Lost, Box::new(move |at| Record::Fail { at, op, why }))
                }
            };
        self.recorder.put(record);
        ended
    }

    async fn send(&self, request: Request) -> Result<Response, ClientError> {
        let client = &self.client;
        Ok(match request {
            Request::Allocate(m) => Response::Allocate(client.allocate(m.claims).await?),
            Request::Confirm(m) => Response::Confirm(client.confirm_with(m.clone()).await?),
            Request::Release(m) => match m.authority {
                Some(v1::release_request::Authority::Token(token)) => {
                    Response::Release(client.release(&m.name, token).await?)
                }
                _ => unreachable!("the workload of the library releases what it holds"),
            },
            Request::ReportConflict(m) => {
                let v1::ReportConflictRequest { name, token, version, port } = m;
                Response::ReportConflict(client.report_conflict(&name, token, version, port).await?)
            }
            Request::Get(m) => Response::Get(client.get(&m.name, m.read).await?),
            Request::List(m) => {
                let client::Listing { items, revision } = client.list(m).await?;
                let (allocations, next_page_token) = (items, String::new());
                Response::List(v1::ListResponse { allocations, next_page_token, revision })
            }
            other => unreachable!("the workload of the library does not send {other:?}"),
        })
    }
}
