//! One whole server: a node, its listener for clients and its listener for HTTP.
//!
//! `serve` runs one, `dev` and `demo` run three in one process, tests as many as they like.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::OnceLock;
use std::time::Duration;

use axum::http::StatusCode;
use axum::routing::get;
use futures::{Stream, StreamExt as _};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, timeout_at};
use tonic::transport::server::Connected;
use tracing::{error, info};

use super::{Api, Readiness, describe_metrics, serve};
use crate::connections::{Connection, Kind, tcp_incoming};
use crate::node::{Node, NodeConfig, StartError, telemetry};

/// How long open calls may take to end when a server stops.
const DRAIN_MAX: Duration = Duration::from_secs(5);
/// How often readiness is looked at.
const READINESS_EVERY: Duration = Duration::from_millis(200);

/// Connections of clients that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Sockets that are bound already: a port of 0 is known by then.
///
/// Clients are not listened for until they can be served. The kernel would take their connections and
/// calls meanwhile, and a call would be done seconds after its caller went elsewhere with it, even
/// after what it was granted there was released.
pub struct Listeners {
    pub clients: TcpSocket,
    pub peers: TcpListener,
    pub http: Option<TcpListener>,
}

impl Listeners {
    /// Binds all of them; the error names the address that failed.
    pub async fn bind(
        clients: SocketAddr,
        peers: SocketAddr,
        http: Option<SocketAddr>,
    ) -> io::Result<Listeners> {
        let listen = |what: &'static str, addr: SocketAddr| async move {
            TcpListener::bind(addr).await.map_err(cannot_listen(what, addr))
        };
        Ok(Listeners {
            clients: bound(clients).map_err(cannot_listen("clients", clients))?,
            peers: listen("peers", peers).await?,
            http: match http {
                Some(addr) => Some(listen("HTTP", addr).await?),
                None => None,
            },
        })
    }
}

fn cannot_listen(what: &'static str, addr: SocketAddr) -> impl FnOnce(io::Error) -> io::Error {
    move |e| io::Error::new(e.kind(), format!("cannot listen for {what} on {addr}: {e}"))
}

fn bound(addr: SocketAddr) -> io::Result<TcpSocket> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?; // as `TcpListener::bind` does
    socket.bind(addr)?;
    Ok(socket)
}

fn listen_for_clients(socket: TcpSocket) -> io::Result<TcpListener> {
    let addr = socket.local_addr()?;
    socket.listen(BACKLOG).map_err(cannot_listen("clients", addr))
}

/// The HTTP listener, with its connections counted.
struct HttpListener {
    addr: SocketAddr,
    incoming: Pin<Box<dyn Stream<Item = io::Result<Connection>> + Send>>,
}

impl HttpListener {
    fn over(listener: TcpListener) -> io::Result<Self> {
        let addr = listener.local_addr()?;
        let incoming = Box::pin(tcp_incoming(listener, Kind::Http));
        Ok(HttpListener { addr, incoming })
    }
}

impl axum::serve::Listener for HttpListener {
    type Io = Connection;
    /// Not known where the connection has ended meanwhile.
    type Addr = Option<SocketAddr>;

    async fn accept(&mut self) -> (Connection, Option<SocketAddr>) {
        match self.incoming.next().await {
            Some(Ok(connection)) => {
                let from = connection.connect_info().remote_addr();
                (connection, from)
            }
            // A listener neither ends nor fails.
            Some(Err(_)) | None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        Ok(Some(self.addr))
    }
}

/// A running server.
pub struct Server {
    pub node: Node,
    api: Api,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Server {
    /// Returns once the listeners are served; the node may still be waiting for its cluster, which
    /// [`Server::enter_cluster`] waits for.
    pub async fn start(config: NodeConfig, listeners: Listeners) -> Result<Server, StartError> {
        let metrics = recorder();
        let Listeners { clients, peers, http: http_listener } = listeners;
        let node = Node::start(config, peers).await?;
        let clients = listen_for_clients(clients).map_err(StartError::Listen)?;
        let clients = tcp_incoming(clients, Kind::Client);
        let mut server = Server::of(node, clients).await;
        if let Some(listener) = http_listener {
            let app = http(server.node.clone(), metrics);
            let stopped = stopped(server.stop.subscribe());
            let listener = HttpListener::over(listener).map_err(StartError::Listen)?;
            let served = axum::serve(listener, app).with_graceful_shutdown(stopped);
            server.tasks.push(tokio::spawn(async move {
                if let Err(e) = served.await {
                    error!("the HTTP listener failed: {e}");
                }
            }));
        }
        Ok(server)
    }

    /// The same around a node that was started otherwise, and connections of clients that come from
    /// elsewhere: in a simulation none of them is the host's.
    pub async fn of<Io, E>(
        node: Node,
        clients: impl Stream<Item = Result<Io, E>> + Send + 'static,
    ) -> Server
    where
        Io: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
    {
        let api = Api::new(node.clone());
        node.serve_calls(api.local_calls());
        let (stop, stopping) = watch::channel(false);
        let readiness = Readiness::new().await;
        let served = serve(api.clone(), readiness.clone(), clients, stopped(stopping.clone()));
        let served = tokio::spawn(async move {
            if let Err(e) = served.await {
                error!("the client listener failed: {e}");
            }
        });
        let told = tokio::spawn(tell_readiness(node.clone(), readiness, stopped(stopping)));
        let proven = tokio::spawn(api.clone().prove());
        Server { node, api, stop, tasks: vec![served, told, proven] }
    }

    /// Where clients reach it.
    pub fn endpoint(&self) -> &str {
        self.node.client_endpoint()
    }

    /// See [`Node::enter_cluster`]; an error must end the process.
    pub async fn enter_cluster(&self) -> Result<(), StartError> {
        self.node.enter_cluster().await
    }

    /// Stops in order: hand over the lead, let open calls end, close the log.
    pub async fn stop(self) {
        self.node.hand_over().await;
        let _ = self.stop.send(true);
        self.api.end_streams();
        let deadline = Instant::now() + DRAIN_MAX;
        for mut task in self.tasks {
            if timeout_at(deadline, &mut task).await.is_err() {
                task.abort();
            }
        }
        self.node.stop().await;
        info!("stopped");
    }

    /// Ends at once, as a killed process would, but for what the operating system closes: no
    /// handing over, no draining.
    pub async fn abort(self) {
        self.api.end_streams();
        self.tasks.iter().for_each(JoinHandle::abort);
        self.node.stop().await;
    }
}

async fn stopped(mut stopping: watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Keeps `grpc.health.v1` true until the server stops; then it says "not serving" first.
async fn tell_readiness(node: Node, readiness: Readiness, stopped: impl Future<Output = ()>) {
    let follow = async {
        let mut every = interval(READINESS_EVERY);
        loop {
            every.tick().await;
            readiness.set(node.is_ready()).await;
        }
    };
    tokio::select! {
        () = follow => {}
        () = stopped => readiness.set(false).await,
    }
}

fn http(node: Node, metrics: PrometheusHandle) -> axum::Router {
    let ready = move || {
        let ready = node.is_ready();
        async move {
            match ready {
                true => (StatusCode::OK, "ready\n"),
                false => (
                    StatusCode::SERVICE_UNAVAILABLE,
                    "not ready: no leader that a majority follows is known\n",
                ),
            }
        }
    };
    let shown = move || {
        metrics.run_upkeep();
        let text = metrics.render();
        async move { text }
    };
    axum::Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(shown))
}

/// The process's one recorder of metrics; nodes in one process share it.
fn recorder() -> PrometheusHandle {
    const SECONDS: &[f64] =
        &[0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
    const COUNTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let builder = PrometheusBuilder::new()
                .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), SECONDS)
                .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("_commands".into()), COUNTS))
                .and_then(|b| b.set_buckets_for_metric(Matcher::Suffix("_readers".into()), COUNTS))
                .unwrap_or_else(|_| PrometheusBuilder::new());
            let recorder = builder.build_recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                error!("another metrics recorder is installed; /metrics stays empty");
            }
            telemetry::describe();
            describe_metrics();
            handle
        })
        .clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn clients_are_not_listened_for_until_they_can_be_served() {
        let any = "127.0.0.1:0".parse().unwrap();
        let listeners = Listeners::bind(any, any, None).await.unwrap();
        let addr = listeners.clients.local_addr().unwrap();
        let refused = tokio::net::TcpStream::connect(addr).await.map(drop);
        assert_eq!(refused.map_err(|e| e.kind()), Err(io::ErrorKind::ConnectionRefused));
        let taken = Listeners::bind(any, listeners.peers.local_addr().unwrap(), None).await;
        assert!(
            taken.err().is_some_and(|e| e.to_string().starts_with("cannot listen for peers on"))
        );
        let listener = listen_for_clients(listeners.clients).unwrap();
        let connected = tokio::net::TcpStream::connect(addr).await.map(drop);
        assert!(connected.is_ok());
        let taken = Listeners::bind(listener.local_addr().unwrap(), any, None).await;
        assert!(
            taken.err().is_some_and(|e| e.to_string().starts_with("cannot listen for clients"))
        );
    }
}
