//! What lies under a write on this machine: three programs that do nothing else.
//!
//! The callers' program asks the first one, by unary calls as portwarden's, or by messages of many
//! commands on a stream as a session's. That one writes what came meanwhile to a file and syncs it, on a
//! thread of its own, and passes it on to the other two over a stream each; those do the same, and
//! answer. Once two of the three have synced it, the callers are answered, and the next is written. The
//! same libraries (tonic, tokio, the allocator), requests of the same kinds and sizes, answers no larger, the same
//! syncs (of what went through the page cache), as many threads; no Raft, no table, no checks, nothing decoded
//! but by the first one: nothing that has less to do with such a call.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, FutureExt as _};
use futures::stream::{BoxStream, FuturesUnordered, StreamExt as _};
use portwarden::cli::bench::claim;
use portwarden::cli::bench::load::{Caller, Done};
use portwarden::client::session::{Answer as Answered, Command as Asked, release};
use portwarden::proto::v1::{self, SessionAnswer, SessionCommand, SessionRequest, SessionResponse};
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::body::Body;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::{Service, http};
use tonic::server::{NamedService, StreamingService, UnaryService};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::etcd::call;
use super::processes::{Process, free_ports};

const CALL: &str = "/bare/Call";
const SESSION: &str = "/bare/Session";
const PASS: &str = "/bare/Pass";
/// The file is written again from its start once it is as large.
const FILE_BYTES: usize = 16 << 20;
/// Writes that go together.
const TOGETHER_MAX: usize = 4096;
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// What a granted allocation is to look like.
const PORT: u32 = 40_000;
const TOKEN: u64 = 1 << 20;

/// What the other two are to write, and that they did.
#[derive(Clone, PartialEq, Message)]
struct Passed {
    #[prost(bytes = "bytes", tag = "1")]
    bytes: Bytes,
}

/// How this program is started as one of the three.
#[derive(Debug, clap::Args)]
pub struct Serve {
    #[arg(long, hide = true)]
    bare: Option<SocketAddr>,
    #[arg(long, hide = true, value_delimiter = ',')]
    bare_followers: Vec<String>,
    #[arg(long, hide = true, default_value = "bare")]
    bare_file: PathBuf,
}

impl Serve {
    pub fn is_wanted(&self) -> bool {
        self.bare.is_some()
    }

    pub async fn run(&self) -> anyhow::Result<()> {
        let Some(address) = self.bare else { return Ok(()) };
        let disk = disk(&self.bare_file)?;
        let followers = self.bare_followers.iter().map(|address| follower(address));
        let log = log(std::iter::once(disk.clone()).chain(followers).collect());
        Ok(Server::builder().add_service(Bare { disk, log }).serve(address).await?)
    }
}

/// Where bytes are written and synced, in their order.
type Place = mpsc::UnboundedSender<(Bytes, oneshot::Sender<()>)>;

/// The place says when it is done.
fn write(place: &Place, bytes: Bytes) -> oneshot::Receiver<()> {
    let (done, written) = oneshot::channel();
    let _ = place.send((bytes, done)); // its end is this program's
    written
}

fn disk(path: &Path) -> anyhow::Result<Place> {
    let file = File::create(path)?;
    file.write_all_at(&vec![0; FILE_BYTES], 0)?;
    file.sync_all()?;
    let (disk, mut asked) = mpsc::unbounded_channel::<(Bytes, oneshot::Sender<()>)>();
    std::thread::spawn(move || {
        let mut at = 0;
        while let Some((bytes, done)) = asked.blocking_recv() {
            if at + bytes.len() > FILE_BYTES {
                at = 0;
            }
            let written = file.write_all_at(&bytes, at as u64).and_then(|()| file.sync_data());
            written.expect("the disk takes what is written");
            at = (at + bytes.len()).next_multiple_of(64);
            let _ = done.send(());
        }
    });
    Ok(disk)
}

/// The disk of another one: what it has synced comes back in order.
fn follower(address: &str) -> Place {
    let (follower, mut asked) = mpsc::unbounded_channel::<(Bytes, oneshot::Sender<()>)>();
    let address = format!("http://{address}");
    tokio::spawn(async move {
        let endpoint = Endpoint::from_shared(address).expect("an address").tcp_nodelay(true);
        let channel = loop {
            match endpoint.connect().await {
                Ok(channel) => break channel,
                Err(_) => tokio::time::sleep(RETRY_AFTER).await, // it has not begun to listen
            }
        };
        let mut grpc = Grpc::new(channel);
        grpc.ready().await.expect("a channel");
        let waiting = Arc::new(Mutex::new(VecDeque::new()));
        let sent = waiting.clone();
        let requests = futures::stream::poll_fn(move |cx| {
            asked.poll_recv(cx).map(|next| {
                next.map(|(bytes, done)| {
                    sent.lock().unwrap_or_else(PoisonError::into_inner).push_back(done);
                    Passed { bytes }
                })
            })
        });
        let codec = ProstCodec::<Passed, Passed>::default();
        let path = PathAndQuery::from_static(PASS);
        let answers = grpc.streaming(Request::new(requests), path, codec).await;
        let mut answers = answers.expect("the other one serves").into_inner();
        while let Ok(Some(_)) = answers.message().await {
            let done = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let _ = done.map(|done: oneshot::Sender<()>| done.send(()));
        }
    });
    follower
}

/// One write after the other on a majority of the places; what comes meanwhile goes together.
fn log(places: Vec<Place>) -> Place {
    let (log, mut asked) = mpsc::unbounded_channel::<(Bytes, oneshot::Sender<()>)>();
    tokio::spawn(async move {
        let mut waiting = Vec::new();
        while asked.recv_many(&mut waiting, TOGETHER_MAX).await > 0 {
            let mut bytes = BytesMut::new();
            waiting.iter().for_each(|(request, _)| bytes.extend_from_slice(request));
            let bytes = bytes.freeze();
            let written = places.iter().map(|place| write(place, bytes.clone()));
            let mut synced: FuturesUnordered<_> = written.collect();
            for _ in 0..=places.len() / 2 {
                match synced.next().await {
                    Some(Ok(())) => {}
                    _ => return, // too few have it: so nobody is answered any more
                }
            }
            for (_, done) in waiting.drain(..) {
                let _ = done.send(());
            }
        }
    });
    log
}

#[derive(Clone)]
struct Bare {
    /// For what is passed on to it.
    disk: Place,
    /// For what callers ask.
    log: Place,
}

impl Bare {
    /// Returns once a majority has it.
    async fn write(&self, request: &impl Message) -> Result<(), Status> {
        let written = write(&self.log, request.encode_to_vec().into());
        written.await.map_err(|_| Status::unavailable("too few have it"))
    }
}

/// What portwarden's says, less the worker and what became of the allocation when.
fn answer(command: SessionCommand) -> SessionAnswer {
    let granted = |name: String, uid: String| v1::Allocation {
        name,
        uid,
        address: "127.0.0.1".into(),
        ports: vec![v1::Port { name: String::new(), range: "bench".into(), number: PORT }],
        token: TOKEN,
        version: TOKEN,
        ..Default::default()
    };
    let answer = command.command.map(|command| match command {
        Asked::Release(request) => Answered::Release(v1::ReleaseResponse {
            released: true,
            allocation: Some(granted(request.name.clone(), request.name)),
            revision: TOKEN,
        }),
        Asked::Allocate(request) => {
            let of = |claim: v1::Claim| granted(claim.name, claim.uid);
            let allocations = request.claims.into_iter().map(of).collect();
            let revision = TOKEN;
            Answered::Allocate(v1::AllocateResponse { allocations, revision, ..Default::default() })
        }
        _ => Answered::Error(v1::SessionError::default()),
    });
    SessionAnswer { id: command.id, answer }
}

impl NamedService for Bare {
    const NAME: &'static str = "bare";
}

impl Service<http::Request<Body>> for Bare {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let bare = self.clone();
        async move {
            Ok(match request.uri().path() {
                CALL => serve().unary(Call(bare), request).await,
                SESSION => serve().streaming(Session(bare), request).await,
                _ => serve().streaming(Pass(bare), request).await,
            })
        }
        .boxed()
    }
}

fn serve<Req, Res>() -> tonic::server::Grpc<ProstCodec<Res, Req>>
where
    Req: Message + Default + 'static,
    Res: Message + Default + 'static,
{
    tonic::server::Grpc::new(ProstCodec::default())
}

type Answers<T> = BoxStream<'static, Result<T, Status>>;

struct Call(Bare);

impl UnaryService<SessionCommand> for Call {
    type Response = SessionAnswer;
    type Future = BoxFuture<'static, Result<Response<SessionAnswer>, Status>>;

    fn call(&mut self, request: Request<SessionCommand>) -> Self::Future {
        let bare = self.0.clone();
        async move {
            let command = request.into_inner();
            bare.write(&command).await?;
            Ok(Response::new(answer(command)))
        }
        .boxed()
    }
}

struct Session(Bare);

impl StreamingService<SessionRequest> for Session {
    type Response = SessionResponse;
    type ResponseStream = Answers<SessionResponse>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<SessionRequest>>) -> Self::Future {
        let bare = self.0.clone();
        let answers = request.into_inner().then(move |request| {
            let bare = bare.clone();
            async move {
                let request = request?;
                bare.write(&request).await?;
                Ok(SessionResponse { answers: request.commands.into_iter().map(answer).collect() })
            }
        });
        async move { Ok(Response::new(answers.boxed())) }.boxed()
    }
}

struct Pass(Bare);

impl StreamingService<Passed> for Pass {
    type Response = Passed;
    type ResponseStream = Answers<Passed>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Passed>>) -> Self::Future {
        let disk = self.0.disk.clone();
        let answers = request.into_inner().then(move |passed| {
            let written = passed.map(|Passed { bytes }| write(&disk, bytes));
            async move {
                written?.await.map_err(|_| Status::unavailable("the disk is gone"))?;
                Ok(Passed::default())
            }
        });
        async move { Ok(Response::new(answers.boxed())) }.boxed()
    }
}

/// The three, as processes.
pub struct Three {
    leader: String,
    _nodes: Vec<Process>,
}

impl Three {
    pub async fn start(dir: &Path) -> anyhow::Result<Three> {
        let ports = free_ports(3)?;
        let address = |at: usize| format!("127.0.0.1:{}", ports[at]);
        let mut nodes = Vec::new();
        for at in 0..3 {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--bare", &address(at), "--bare-file"]);
            command.arg(dir.join(format!("bare-{at}")));
            if at == 0 {
                command.args(["--bare-followers", &[address(1), address(2)].join(",")]);
            }
            nodes.push(Process::start(&mut command, &dir.join(format!("bare-{at}.log")))?);
        }
        let three = Three { leader: address(0), _nodes: nodes };
        for _ in 0..100 {
            if three.callers("call", 1)?.remove(0).call().await.is_ok() {
                return Ok(three);
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
        anyhow::bail!("the bare programs do not answer: see the logs in {}", dir.display())
    }

    /// On as many connections as portwarden's. Of a session, `clients` commands are under way in all.
    pub fn callers(&self, name: &str, clients: u32) -> anyhow::Result<Vec<Box<dyn Caller>>> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.leader))?.tcp_nodelay(true);
        let session = name == "session";
        let channels: Vec<Channel> =
            (0..if session { 2 } else { 4 }).map(|_| endpoint.connect_lazy()).collect();
        let each = if session { SESSION_COMMANDS_MAX.min(clients / 2) } else { 1 };
        let caller = |i: u32| -> Box<dyn Caller> {
            let channel = channels[i as usize % channels.len()].clone();
            let commands = commands(i, each).into();
            match session {
                true => Box::new(Messages { channel, commands, stream: None }),
                false => Box::new(Calls { channel, commands }),
            }
        };
        let callers = clients / each;
        Ok((0..callers).map(caller).collect())
    }
}

/// Allocations of a caller, and then their releases, as portwarden's callers ask for them.
fn commands(caller: u32, count: u32) -> [Vec<SessionCommand>; 2] {
    let name = |i| format!("bench-01234567-{caller}-{i}");
    let numbered = |command| SessionCommand { id: 0, command: Some(command) };
    let allocate = |i| {
        let claims = vec![claim(&name(i), &format!("bench-01234567-w{i}"), 1)];
        numbered(Asked::Allocate(v1::AllocateRequest { claims, dry_run: false }))
    };
    let release = |i| numbered(release(&name(i), TOKEN));
    [(0..count).map(allocate).collect(), (0..count).map(release).collect()]
}

struct Calls {
    channel: Channel,
    /// To be asked in turns.
    commands: VecDeque<Vec<SessionCommand>>,
}

#[tonic::async_trait]
impl Caller for Calls {
    async fn call(&mut self) -> Result<Done, String> {
        self.commands.rotate_left(1);
        let command = self.commands[0][0].clone();
        let answer = call::<_, SessionAnswer>(&self.channel, CALL, command).await;
        answer.map(|_| Done::one("call")).map_err(|status| status.to_string())
    }
}

/// Of one message.
const SESSION_COMMANDS_MAX: u32 = 256;

struct Messages {
    channel: Channel,
    /// To be asked in turns.
    commands: VecDeque<Vec<SessionCommand>>,
    /// Once it is open.
    stream: Option<Line>,
}

type Line = (mpsc::UnboundedSender<SessionRequest>, Streaming<SessionResponse>);

impl Messages {
    async fn open(&self) -> anyhow::Result<Line> {
        let (messages, outgoing) = mpsc::unbounded_channel();
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await?;
        let outgoing = Request::new(UnboundedReceiverStream::new(outgoing));
        let path = PathAndQuery::from_static(SESSION);
        let answers = grpc.streaming(outgoing, path, ProstCodec::default()).await?;
        Ok((messages, answers.into_inner()))
    }
}

#[tonic::async_trait]
impl Caller for Messages {
    async fn call(&mut self) -> Result<Done, String> {
        if self.stream.is_none() {
            self.stream = Some(self.open().await.map_err(|error| error.to_string())?);
        }
        let (messages, answers) = self.stream.as_mut().ok_or("no stream")?;
        self.commands.rotate_left(1);
        let commands = self.commands[0].clone();
        messages.send(SessionRequest { commands, timeout_ms: 0 }).map_err(|e| e.to_string())?;
        match answers.message().await {
            Ok(Some(response)) => {
                let operations = response.answers.len() as u64;
                Ok(Done { kind: "message", operations, ports: 0 })
            }
            Ok(None) => Err("the stream ended".into()),
            Err(status) => Err(status.to_string()),
        }
    }
}
