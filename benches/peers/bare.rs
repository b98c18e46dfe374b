//! What lies under a write on this machine: three programs that do nothing else.
//!
//! The callers' program asks the first one, by unary calls as portwarden's, or by messages of many
//! commands on a stream as a session's. That one writes what came meanwhile to a file and syncs it, on a
//! thread of its own, and passes it on to the other two over a stream each; those do the same, and
//! answer. Once two of the three have synced it, the callers are answered, and the next is written. The
//! same libraries (tonic, tokio, the allocator), requests of the same kinds and sizes, answers no larger, the same
//! syncs past the page cache, as many threads; no Raft, no table, no checks, nothing decoded
//! but by the first one: nothing that has less to do with such a call.
//!
//! Where callers ask for that, each of the three also has portwarden's table and applies to it what it has
//! written: what a replicated table costs without Raft, its log and its watchers.

use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as Waiting, Poll};
use std::time::Duration;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use futures::future::{BoxFuture, FutureExt as _};
use futures::stream::{BoxStream, FuturesUnordered, StreamExt as _};
use portwarden::cli::bench::claim;
use portwarden::cli::bench::load::{Caller, Done};
use portwarden::client::session::{Answer as Answered, Command as Asked, release};
use portwarden::core::{
    self, Authority, Claim, Command, Labels, Millis, Origin, Placement, PortRequest, Ports,
    RangeSpec, State, Token, Uid, WorkerSpec, apply,
};
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
const TABLE: &str = "/bare/Table";
const PASS: &str = "/bare/Pass";
/// The file is written again from its start once it is as large.
const FILE_BYTES: usize = 16 << 20;
/// What is written past the page cache: whole ones.
const BLOCK_BYTES: usize = 4096;
/// Workers of the table.
const WORKERS: u32 = 256;
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
    /// They are to apply it, too.
    #[prost(bool, tag = "2")]
    table: bool,
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
        let table = Table::new()?;
        let followers = self.bare_followers.iter().map(|address| follower(address));
        let log = log(std::iter::once(disk.clone()).chain(followers).collect());
        Ok(Server::builder().add_service(Bare { disk, log, table }).serve(address).await?)
    }
}

/// Where bytes are written and synced, in their order.
type Place = mpsc::UnboundedSender<(Passed, oneshot::Sender<()>)>;

/// The place says when it is done.
fn write(place: &Place, passed: Passed) -> oneshot::Receiver<()> {
    let (done, written) = oneshot::channel();
    let _ = place.send((passed, done)); // its end is this program's
    written
}

fn disk(path: &Path) -> anyhow::Result<Place> {
    let file = File::create(path)?;
    file.write_all_at(&vec![0; FILE_BYTES], 0)?;
    file.sync_all()?;
    // Where the file system does not, through the page cache.
    let direct = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path);
    let file = direct.unwrap_or(file);
    let (disk, mut asked) = mpsc::unbounded_channel::<(Passed, oneshot::Sender<()>)>();
    std::thread::spawn(move || {
        let mut memory = vec![0; BLOCK_BYTES];
        let mut at = 0;
        while let Some((Passed { bytes, .. }, done)) = asked.blocking_recv() {
            let length = bytes.len().next_multiple_of(BLOCK_BYTES);
            if memory.len() < length + BLOCK_BYTES {
                memory.resize(length + BLOCK_BYTES, 0);
            }
            let begin = memory.as_ptr().align_offset(BLOCK_BYTES);
            let blocks = &mut memory[begin..begin + length];
            blocks[..bytes.len()].copy_from_slice(&bytes);
            if at + length > FILE_BYTES {
                at = 0;
            }
            let written = file.write_all_at(blocks, at as u64).and_then(|()| file.sync_data());
            written.expect("the disk takes what is written");
            at += length;
            let _ = done.send(());
        }
    });
    Ok(disk)
}

/// Portwarden's, of one program.
#[derive(Clone)]
struct Table(Arc<Mutex<State>>);

impl Table {
    fn new() -> anyhow::Result<Table> {
        let mut state = State::default();
        for number in 0..WORKERS {
            let spec = WorkerSpec {
                address: "127.0.0.1".into(),
                labels: Labels::new(),
                ranges: vec![RangeSpec {
                    name: "bench".parse()?,
                    first: core::Port::new("first", 10_000)?,
                    last: core::Port::new("last", 10_999)?,
                }],
                reserved: BTreeSet::new(),
                gpus: Vec::new(),
                identity: None,
            };
            let name = worker(number).parse()?;
            apply(&mut state, &Origin::default(), &Command::RegisterWorker { name, spec });
        }
        Ok(Table(Arc::new(Mutex::new(state))))
    }

    /// # Panics
    ///
    /// Where the table refuses one: it would not be what portwarden does.
    fn apply(&self, commands: &[SessionCommand]) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for asked in commands {
            let command = command(&state, asked).expect("a command that was made here");
            let (applied, _) = apply(&mut state, &Origin::default(), &command);
            assert!(applied.outcome.is_ok(), "{:?}", applied.outcome);
        }
    }

    /// The messages that lie in these bytes, one after the other.
    fn apply_all(&self, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let request = SessionRequest::decode_length_delimited(&mut bytes);
            self.apply(&request.expect("what was encoded").commands);
        }
    }
}

fn command(state: &State, asked: &SessionCommand) -> anyhow::Result<Command> {
    Ok(match asked.command.as_ref().context("no command")? {
        Asked::Allocate(request) => {
            let claims = request.claims.iter().map(|claim| {
                let Some(v1::claim::Placement::Worker(worker)) = &claim.placement else {
                    anyhow::bail!("no worker");
                };
                Ok(Claim {
                    name: claim.name.parse()?,
                    uid: Uid::parse(&claim.uid)?,
                    placement: Placement::Worker(worker.parse()?),
                    ports: vec![PortRequest { name: None, range: None, ports: Ports::Count(1) }],
                    gpus: None,
                    lease: None,
                    confirm_within: None,
                    bound: claim.bound,
                    labels: Labels::new(),
                })
            });
            Command::allocate(claims.collect::<anyhow::Result<Vec<_>>>()?, Millis(600_000))
        }
        Asked::Release(request) => {
            let name = request.name.parse()?;
            // The callers are told another token.
            let token = state.allocation(&name).map_or(Token(TOKEN), |held| held.token);
            Command::Release { name, authority: Authority::Holder(token) }
        }
        _ => anyhow::bail!("neither an allocation nor a release"),
    })
}

/// The disk of another one: what it has synced comes back in order.
fn follower(address: &str) -> Place {
    let (follower, mut asked) = mpsc::unbounded_channel::<(Passed, oneshot::Sender<()>)>();
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
                next.map(|(passed, done)| {
                    sent.lock().unwrap_or_else(PoisonError::into_inner).push_back(done);
                    passed
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
    let (log, mut asked) = mpsc::unbounded_channel::<(Passed, oneshot::Sender<()>)>();
    tokio::spawn(async move {
        let mut waiting = Vec::new();
        while asked.recv_many(&mut waiting, TOGETHER_MAX).await > 0 {
            let mut bytes = BytesMut::new();
            waiting.iter().for_each(|(request, _)| bytes.extend_from_slice(&request.bytes));
            let table = waiting.iter().any(|(request, _)| request.table);
            let passed = Passed { bytes: bytes.freeze(), table };
            let written = places.iter().map(|place| write(place, passed.clone()));
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
    table: Table,
}

impl Bare {
    /// Returns once a majority has it.
    async fn write(&self, request: &impl Message, table: bool) -> Result<(), Status> {
        let bytes = request.encode_length_delimited_to_vec().into();
        let written = write(&self.log, Passed { bytes, table });
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

    fn poll_ready(&mut self, _: &mut Waiting<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let bare = self.clone();
        async move {
            Ok(match request.uri().path() {
                CALL => serve().unary(Call(bare), request).await,
                SESSION => serve().streaming(Session { bare, table: false }, request).await,
                TABLE => serve().streaming(Session { bare, table: true }, request).await,
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
            bare.write(&command, false).await?;
            Ok(Response::new(answer(command)))
        }
        .boxed()
    }
}

struct Session {
    bare: Bare,
    table: bool,
}

impl StreamingService<SessionRequest> for Session {
    type Response = SessionResponse;
    type ResponseStream = Answers<SessionResponse>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<SessionRequest>>) -> Self::Future {
        let (bare, table) = (self.bare.clone(), self.table);
        let answers = request.into_inner().then(move |request| {
            let bare = bare.clone();
            async move {
                let request = request?;
                bare.write(&request, table).await?;
                if table {
                    bare.table.apply(&request.commands);
                }
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
        let Bare { disk, table, .. } = self.0.clone();
        let answers = request.into_inner().then(move |passed| {
            let written = passed.map(|passed| {
                let written = write(&disk, passed.clone());
                if passed.table {
                    table.apply_all(passed.bytes);
                }
                written
            });
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
            let mut command = Program::new(std::env::current_exe()?);
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
        let path = match name {
            "session" => Some(SESSION),
            "table" => Some(TABLE),
            _ => None,
        };
        let session = path.is_some();
        let channels: Vec<Channel> =
            (0..if session { 2 } else { 4 }).map(|_| endpoint.connect_lazy()).collect();
        let each = if session { SESSION_COMMANDS_MAX.min(clients / 2) } else { 1 };
        let caller = |i: u32| -> Box<dyn Caller> {
            let channel = channels[i as usize % channels.len()].clone();
            let commands = commands(i, each).into();
            match path {
                Some(path) => Box::new(Messages { channel, path, commands, stream: None }),
                None => Box::new(Calls { channel, commands }),
            }
        };
        let callers = clients / each;
        Ok((0..callers).map(caller).collect())
    }
}

fn worker(number: u32) -> String {
    format!("bench-01234567-w{number}")
}

/// Allocations of a caller, and then their releases, as portwarden's callers ask for them.
fn commands(caller: u32, count: u32) -> [Vec<SessionCommand>; 2] {
    let name = |i| format!("bench-01234567-{caller}-{i}");
    let numbered = |command| SessionCommand { id: 0, command: Some(command) };
    let allocate = |i| {
        let claims = vec![claim(&name(i), &worker(i % WORKERS), 1)];
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
    path: &'static str,
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
        let path = PathAndQuery::from_static(self.path);
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
