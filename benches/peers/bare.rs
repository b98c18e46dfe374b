//! What lies under one caller's write on this machine: three programs that do nothing else.
//!
//! The caller's program asks the first one, by the same unary call as portwarden's. That one writes the
//! request to a file and syncs it, on a thread of its own, and passes it on to the other two over a
//! stream each; those do the same, and answer. Once two of the three have synced it, the caller is
//! answered. The same libraries (tonic, tokio, the allocator), messages of the same size, the same
//! syncs (of what went through the page cache), as many threads; no Raft, no table, no checks: nothing
//! that has less to do with such a call.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, mpsc as threads};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt as _};
use futures::stream::{BoxStream, FuturesUnordered, StreamExt as _};
use portwarden::cli::bench::claim;
use portwarden::cli::bench::load::{Caller, Done};
use portwarden::proto::v1;
use prost::Message as _;
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
const PASS: &str = "/bare/Pass";
const FILE_BYTES: u64 = 2 << 20;
const RETRY_AFTER: Duration = Duration::from_millis(100);

type Asked = v1::AllocateRequest;
type Answer = v1::AllocateResponse;

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
        let followers = self.bare_followers.iter().map(|address| follower(address)).collect();
        Ok(Server::builder().add_service(Bare { disk, followers }).serve(address).await?)
    }
}

/// Writes and syncs, one after the other.
type Disk = threads::Sender<(Vec<u8>, oneshot::Sender<()>)>;

fn disk(path: &Path) -> anyhow::Result<Disk> {
    let file = File::create(path)?;
    file.write_all_at(&vec![0; FILE_BYTES as usize], 0)?;
    file.sync_all()?;
    let (disk, asked) = threads::channel::<(Vec<u8>, oneshot::Sender<()>)>();
    std::thread::spawn(move || {
        let mut at = 0;
        for (bytes, done) in asked {
            let written = file.write_all_at(&bytes, at).and_then(|()| file.sync_data());
            written.expect("the disk takes what is written");
            at = (at + bytes.len() as u64).next_multiple_of(64) % (FILE_BYTES - 4096);
            let _ = done.send(());
        }
    });
    Ok(disk)
}

/// The way to another one: what it has synced comes back in order.
type Follower = mpsc::UnboundedSender<(Asked, oneshot::Sender<()>)>;

fn follower(address: &str) -> Follower {
    let (follower, mut asked) = mpsc::unbounded_channel::<(Asked, oneshot::Sender<()>)>();
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
                next.map(|(request, done)| {
                    sent.lock().unwrap_or_else(PoisonError::into_inner).push_back(done);
                    request
                })
            })
        });
        let codec = ProstCodec::<Asked, Answer>::default();
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

#[derive(Clone)]
struct Bare {
    disk: Disk,
    followers: Vec<Follower>,
}

impl Bare {
    fn write(&self, request: &Asked) -> oneshot::Receiver<()> {
        let (done, written) = oneshot::channel();
        let _ = self.disk.send((request.encode_to_vec(), done)); // its end is this program's
        written
    }

    async fn answer(self, request: Asked) -> Result<Response<Answer>, Status> {
        let mut synced: FuturesUnordered<_> = [self.write(&request)].into_iter().collect();
        for follower in &self.followers {
            let (done, answered) = oneshot::channel();
            let _ = follower.send((request.clone(), done));
            synced.push(answered);
        }
        for _ in 0..=self.followers.len() / 2 {
            if !matches!(synced.next().await, Some(Ok(()))) {
                return Err(Status::unavailable("too few have it"));
            }
        }
        let port = v1::Port { name: String::new(), range: "service".into(), number: 40_000 };
        let claim = request.claims.into_iter().next().unwrap_or_default();
        let granted = v1::Allocation {
            name: claim.name,
            uid: claim.uid,
            address: "127.0.0.1".into(),
            ports: vec![port],
            token: 1 << 20,
            version: 1 << 20,
            ..Default::default()
        };
        Ok(Response::new(Answer { allocations: vec![granted], ..Default::default() }))
    }
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
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<Answer, Asked>::default());
            Ok(match request.uri().path() {
                PASS => grpc.streaming(Pass(bare), request).await,
                _ => grpc.unary(Call(bare), request).await,
            })
        }
        .boxed()
    }
}

struct Call(Bare);

impl UnaryService<Asked> for Call {
    type Response = Answer;
    type Future = BoxFuture<'static, Result<Response<Answer>, Status>>;

    fn call(&mut self, request: Request<Asked>) -> Self::Future {
        self.0.clone().answer(request.into_inner()).boxed()
    }
}

struct Pass(Bare);

impl StreamingService<Asked> for Pass {
    type Response = Answer;
    type ResponseStream = BoxStream<'static, Result<Answer, Status>>;
    type Future = BoxFuture<'static, Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<Asked>>) -> Self::Future {
        let bare = self.0.clone();
        let (answers, outgoing) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut requests = request.into_inner();
            while let Ok(Some(request)) = requests.message().await {
                if bare.write(&request).await.is_err()
                    || answers.send(Ok(Answer::default())).is_err()
                {
                    return;
                }
            }
        });
        let answers = UnboundedReceiverStream::new(outgoing).boxed();
        async move { Ok(Response::new(answers)) }.boxed()
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
            if three.caller()?.call().await.is_ok() {
                return Ok(three);
            }
            tokio::time::sleep(RETRY_AFTER).await;
        }
        anyhow::bail!("the bare programs do not answer: see the logs in {}", dir.display())
    }

    fn caller(&self) -> anyhow::Result<Calls> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.leader))?;
        let claims = vec![claim("bench-0123456789-0", "bench-0123456789-w0", 1)];
        Ok(Calls {
            channel: endpoint.tcp_nodelay(true).connect_lazy(),
            request: Asked { claims, dry_run: false },
        })
    }

    pub fn callers(&self, clients: u32) -> anyhow::Result<Vec<Box<dyn Caller>>> {
        (0..clients).map(|_| Ok(Box::new(self.caller()?) as Box<dyn Caller>)).collect()
    }
}

struct Calls {
    channel: Channel,
    request: Asked,
}

#[tonic::async_trait]
impl Caller for Calls {
    async fn call(&mut self) -> Result<Done, String> {
        let answer = call::<_, Answer>(&self.channel, CALL, self.request.clone()).await;
        answer.map(|_| Done::one("call")).map_err(|status| status.to_string())
    }
}
