//! Three nodes of etcd, spoken to over its gRPC API (v3; the messages here have the fields that are
//! used, by their numbers in etcd's `rpc.proto`).

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use portwarden::cli::bench::load::{Caller, Done};
use prost::Message;
use rustix::process::Signal;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use super::ours::Left;
use super::processes::{Process, free_ports};

#[derive(Clone, PartialEq, Message)]
struct Header {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}
#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}
#[derive(Clone, PartialEq, Message)]
struct PutResponse {}
#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    /// Where there is one: all keys from `key` on, and before this one.
    #[prost(bytes = "vec", tag = "2")]
    range_end: Vec<u8>,
    #[prost(bool, tag = "7")]
    serializable: bool,
    #[prost(bool, tag = "8")]
    keys_only: bool,
}
#[derive(Clone, PartialEq, Message)]
struct DeleteRangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
}
#[derive(Clone, PartialEq, Message)]
struct DeleteRangeResponse {}
#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(bytes = "vec", tag = "1")]
    key: Vec<u8>,
    #[prost(int64, tag = "3")]
    mod_revision: i64,
    #[prost(bytes = "vec", tag = "5")]
    value: Vec<u8>,
}
#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<KeyValue>,
}
/// `result` EQUAL is 0; `target` CREATE is 1, MOD 2.
#[derive(Clone, PartialEq, Message)]
struct Compare {
    #[prost(int32, tag = "1")]
    result: i32,
    #[prost(int32, tag = "2")]
    target: i32,
    #[prost(bytes = "vec", tag = "3")]
    key: Vec<u8>,
    #[prost(int64, optional, tag = "5")]
    create_revision: Option<i64>,
    #[prost(int64, optional, tag = "6")]
    mod_revision: Option<i64>,
}
#[derive(Clone, PartialEq, Message)]
struct RequestOp {
    #[prost(message, tag = "2")]
    put: Option<PutRequest>,
}
#[derive(Clone, PartialEq, Message)]
struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    success: Vec<RequestOp>,
}
#[derive(Clone, PartialEq, Message)]
struct TxnResponse {
    #[prost(bool, tag = "2")]
    succeeded: bool,
}
#[derive(Clone, PartialEq, Message)]
struct StatusRequest {}
#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, tag = "1")]
    header: Option<Header>,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

pub async fn call<Req, Res>(
    channel: &Channel,
    path: &'static str,
    request: Req,
) -> Result<Res, Status>
where
    Req: Message + 'static,
    Res: Message + Default + 'static,
{
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
    let path = PathAndQuery::from_static(path);
    let response = grpc.unary(Request::new(request), path, ProstCodec::default()).await?;
    Ok(response.into_inner())
}

pub struct Etcd {
    dir: PathBuf,
    ports: Vec<u16>,
    nodes: Vec<Process>,
}

impl Etcd {
    pub async fn start(dir: &Path) -> anyhow::Result<Etcd> {
        let mut etcd = Etcd { dir: dir.to_path_buf(), ports: free_ports(6)?, nodes: Vec::new() };
        for at in 0..3 {
            let node = etcd.start_node(at)?;
            etcd.nodes.push(node);
        }
        etcd.leader().await?;
        Ok(etcd)
    }

    fn start_node(&self, at: usize) -> anyhow::Result<Process> {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let (client, peer) = (url(self.ports[at]), url(self.ports[3 + at]));
        let all: Vec<_> = (0..3).map(|at| format!("n{at}={}", url(self.ports[3 + at]))).collect();
        let mut command = Command::new("etcd");
        command
            .args(["--name", &format!("n{at}"), "--initial-cluster", &all.join(",")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster-state", "new", "--log-level", "error"])
            .args(["--quota-backend-bytes", "8000000000", "--data-dir"])
            .arg(self.dir.join(format!("etcd-{at}")));
        Process::start(&mut command, &self.dir.join(format!("etcd-{at}.log")))
    }

    fn channel(&self, at: usize) -> anyhow::Result<Channel> {
        let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{}", self.ports[at]))?;
        Ok(endpoint.tcp_nodelay(true).connect_timeout(Duration::from_secs(1)).connect_lazy())
    }

    /// Index of the node that leads, once all answer.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        for _ in 0..300 {
            let mut leader = None;
            let mut answered = 0;
            for at in 0..3 {
                let channel = self.channel(at)?;
                let status = call::<_, StatusResponse>(
                    &channel,
                    "/etcdserverpb.Maintenance/Status",
                    StatusRequest {},
                );
                let limit = Duration::from_secs(1);
                let Ok(Ok(status)) = tokio::time::timeout(limit, status).await else { continue };
                answered += 1;
                if status.header.is_some_and(|h| h.member_id == status.leader) {
                    leader = Some(at);
                }
            }
            if let (Some(leader), 3) = (leader, answered) {
                return Ok(leader);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        anyhow::bail!("etcd has no leader after 30 s: see the logs in {}", self.dir.display())
    }

    pub fn kill(&mut self, at: usize) {
        self.nodes[at].kill();
    }

    pub fn signal(&self, at: usize, signal: Signal) -> io::Result<()> {
        self.nodes[at].signal(signal)
    }

    pub async fn restart(&mut self, at: usize) -> anyhow::Result<()> {
        self.nodes[at] = self.start_node(at)?;
        self.leader().await.map(drop)
    }

    /// One put that some node takes within the time.
    pub async fn put(&self, at: usize, limit: Duration) -> bool {
        let request = PutRequest { key: b"failover".to_vec(), value: vec![b'x'; 64] };
        let Ok(channel) = self.channel(at) else { return false };
        let put = call::<_, PutResponse>(&channel, "/etcdserverpb.KV/Put", request);
        matches!(tokio::time::timeout(limit, put).await, Ok(Ok(_)))
    }

    pub async fn callers(
        &self,
        name: &str,
        clients: u32,
    ) -> anyhow::Result<(Vec<Box<dyn Caller>>, Option<Left>)> {
        let leader = self.leader().await?;
        let channels: Vec<_> =
            (0..4).map(|_| self.channel(leader)).collect::<Result<Vec<_>, _>>()?;
        let key = |i: u32| format!("bench/{i}").into_bytes();
        let hot = b"bench/hot".to_vec();
        let first = |i: u32| (i * ANY_PORTS / clients) as usize;
        let put = |key: Vec<u8>, value: Vec<u8>| PutRequest { key, value };
        for (key, value) in [(hot.clone(), vec![0; 128]), (key(0), vec![b'x'; 64])] {
            call::<_, PutResponse>(&channels[0], "/etcdserverpb.KV/Put", put(key, value)).await?;
        }
        let caller = |i: u32| -> Box<dyn Caller> {
            let channel = channels[i as usize % channels.len()].clone();
            match name {
                "put" => Box::new(Puts { channel, key: key(i) }),
                "hot" => Box::new(Ports { channel, key: hot.clone(), held: None }),
                "any" => Box::new(AnyPort { channel, first: first(i), held: None }),
                _ => Box::new(Gets { channel, key: key(0), serializable: name == "get-stale" }),
            }
        };
        Ok(((0..clients).map(caller).collect(), None))
    }
}

struct Puts {
    channel: Channel,
    key: Vec<u8>,
}

#[tonic::async_trait]
impl Caller for Puts {
    async fn call(&mut self) -> Result<Done, String> {
        let request = PutRequest { key: self.key.clone(), value: vec![b'x'; 64] };
        let put = call::<_, PutResponse>(&self.channel, "/etcdserverpb.KV/Put", request).await;
        put.map(|_| Done::one("put")).map_err(|e| e.to_string())
    }
}

struct Gets {
    channel: Channel,
    key: Vec<u8>,
    serializable: bool,
}

#[tonic::async_trait]
impl Caller for Gets {
    async fn call(&mut self) -> Result<Done, String> {
        range(&self.channel, &self.key, self.serializable).await.map(|_| Done::one("get"))
    }
}

async fn range(channel: &Channel, key: &[u8], serializable: bool) -> Result<KeyValue, String> {
    let request = RangeRequest { key: key.to_vec(), serializable, ..RangeRequest::default() };
    let response: RangeResponse =
        call(channel, "/etcdserverpb.KV/Range", request).await.map_err(|e| e.to_string())?;
    response.kvs.into_iter().next().ok_or_else(|| "the key is missing".into())
}

/// The next free port of one worker, as a table in one key: a byte for each port.
struct Ports {
    channel: Channel,
    key: Vec<u8>,
    held: Option<usize>,
}

#[tonic::async_trait]
impl Caller for Ports {
    async fn call(&mut self) -> Result<Done, String> {
        loop {
            let KeyValue { mod_revision, mut value, .. } =
                range(&self.channel, &self.key, false).await?;
            let (port, kind) = match self.held {
                Some(port) => (port, "release"),
                None => {
                    let free = value.iter().position(|held| *held == 0);
                    (free.ok_or("no port is free")?, "allocate")
                }
            };
            value[port] = u8::from(self.held.is_none());
            let compare = Compare {
                target: 2,
                key: self.key.clone(),
                mod_revision: Some(mod_revision),
                ..Compare::default()
            };
            let put = PutRequest { key: self.key.clone(), value };
            if put_if(&self.channel, compare, put).await? {
                self.held = self.held.is_none().then_some(port);
                return Ok(Done { kind, operations: 1, ports: u64::from(kind == "allocate") });
            }
        }
    }
}

/// Where the comparison holds; false: it did not.
async fn put_if(channel: &Channel, compare: Compare, put: PutRequest) -> Result<bool, String> {
    let success = vec![RequestOp { put: Some(put) }];
    let txn = TxnRequest { compare: vec![compare], success };
    let done = call::<_, TxnResponse>(channel, "/etcdserverpb.KV/Txn", txn).await;
    done.map(|done| done.succeeded).map_err(|e| e.to_string())
}

/// Ports of the worker of [`AnyPort`].
const ANY_PORTS: u32 = 1000;

/// Any free port of one worker, as a key for each that is held: lists them, and makes the first that is
/// missing, each caller from its own place on. Nothing says how long it was free.
struct AnyPort {
    channel: Channel,
    first: usize,
    held: Option<Vec<u8>>,
}

#[tonic::async_trait]
impl Caller for AnyPort {
    async fn call(&mut self) -> Result<Done, String> {
        if let Some(key) = self.held.clone() {
            let request = DeleteRangeRequest { key };
            call::<_, DeleteRangeResponse>(&self.channel, "/etcdserverpb.KV/DeleteRange", request)
                .await
                .map_err(|e| e.to_string())?;
            self.held = None;
            return Ok(Done::one("release"));
        }
        let key = |port: usize| format!("bench/any/{port:05}").into_bytes();
        loop {
            let request = RangeRequest {
                key: b"bench/any/".to_vec(),
                range_end: b"bench/any0".to_vec(),
                serializable: true,
                keys_only: true,
            };
            let response: RangeResponse = call(&self.channel, "/etcdserverpb.KV/Range", request)
                .await
                .map_err(|e| e.to_string())?;
            let held: HashSet<Vec<u8>> = response.kvs.into_iter().map(|kv| kv.key).collect();
            let ports = ANY_PORTS as usize;
            let mut keys = (0..ports).map(|i| key((self.first + i) % ports));
            let free = keys.find(|key| !held.contains(key)).ok_or("no port is free")?;
            let compare = Compare {
                target: 1,
                key: free.clone(),
                create_revision: Some(0),
                ..Compare::default()
            };
            let put = PutRequest { key: free.clone(), value: vec![b'x'; 64] };
            if put_if(&self.channel, compare, put).await? {
                self.held = Some(free);
                return Ok(Done { kind: "allocate", operations: 1, ports: 1 });
            }
        }
    }
}
