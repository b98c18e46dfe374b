//! Connections that come in, counted: each costs a file descriptor, and a node that has none left
//! cannot write its log.
//!
//! A connection beyond the bound is closed at once, so that a client goes to another node; one that stays
//! silent is closed too, or whoever opens many and says nothing would keep all others out. When accepting
//! fails, the next attempt waits a little instead of spinning. Metrics show, by kind, how many are open and how
//! many were refused; the log says the latter once a minute at most.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{self, Stream};
use metrics::{counter, gauge};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};
use tracing::warn;

/// Connections of clients that one node serves at a time, where it may open twice as many files.
pub const CONNECTIONS_MAX: usize = 8192;
/// Connections of peers: every member has a few.
pub const PEER_CONNECTIONS_MAX: usize = 1024;
/// Connections to the HTTP listener.
pub const HTTP_CONNECTIONS_MAX: usize = 256;
/// With these HTTP/2 has begun, and has its own way to find out who is gone. HTTP/1 never has.
const PREFACE_BYTES: usize = 24;
/// How long a connection may say nothing: at its beginning, and over HTTP/1 afterwards.
const SILENT_FIRST: Duration = Duration::from_secs(20);
const SILENT_BETWEEN: Duration = Duration::from_secs(120);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// After a failure to accept, which lasts while descriptors or memory are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// From one word on refused connections to the next.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// Whose a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Client,
    Peer,
    Http,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Client, Kind::Peer, Kind::Http];

    /// For metrics.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Client => "client",
            Kind::Peer => "peer",
            Kind::Http => "http",
        }
    }

    /// Most that may be open at a time. Five in sixteen of the files that there may be are left for the log.
    fn most(self) -> usize {
        let files = make_room();
        match self {
            Kind::Client => CONNECTIONS_MAX.min(files / 2),
            Kind::Peer => PEER_CONNECTIONS_MAX.min(files / 8),
            Kind::Http => HTTP_CONNECTIONS_MAX.min(files / 16),
        }
    }
}

/// Lets this process open as many files as it ever may (the usual 1024 are soon used up), and says how many.
fn make_room() -> usize {
    let limit = getrlimit(Resource::Nofile);
    // Where this fails, what there is has to do.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    getrlimit(Resource::Nofile).current.map_or(usize::MAX, |files| files as usize)
}

/// Accepts TCP connections, as many at a time as there may be of their kind.
pub fn tcp_incoming(
    listener: TcpListener,
    kind: Kind,
) -> impl Stream<Item = io::Result<Connection>> {
    at_most(kind.most(), listener, kind)
}

fn at_most(
    max: usize,
    listener: TcpListener,
    kind: Kind,
) -> impl Stream<Item = io::Result<Connection>> {
    // Nagle's algorithm would hold a small answer back until the last one is acknowledged.
    let incoming =
        TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(KEEPALIVE_IDLE));
    let free = Arc::new(Semaphore::new(max));
    let refused = Refused { kind, max, untold: 0, told: None };
    stream::unfold((incoming, free, refused), move |(mut incoming, free, mut refused)| async move {
        loop {
            match incoming.next().await? {
                Ok(tcp) => match free.clone().try_acquire_owned() {
                    Ok(permit) => {
                        let silent = Some(Box::pin(sleep(SILENT_FIRST)));
                        let place = Place::new(kind, permit);
                        let connection =
                            Connection { tcp, kind, silent, said_bytes: 0, _place: place };
                        return Some((Ok(connection), (incoming, free, refused)));
                    }
                    Err(_) => refused.one(),
                },
                Err(error) => {
                    warn!(?kind, "cannot accept a connection: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

/// What the log has still to say of connections beyond the bound.
struct Refused {
    kind: Kind,
    max: usize,
    untold: u64,
    told: Option<Instant>,
}

impl Refused {
    fn one(&mut self) {
        counter!("portwarden_connections_refused_total", "kind" => self.kind.name()).increment(1);
        if let Some(refused) = self.word(Instant::now()) {
            let (kind, max) = (self.kind.name(), self.max);
            warn!(kind, max, refused, "connections are refused: as many are open as may be");
        }
    }

    /// One more: how many to tell of now.
    fn word(&mut self, now: Instant) -> Option<u64> {
        self.untold += 1;
        if self.told.is_some_and(|told| now - told < TELL_EVERY) {
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.untold))
    }
}

/// Held by a connection for as long as it is open.
struct Place {
    kind: Kind,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    fn new(kind: Kind, permit: OwnedSemaphorePermit) -> Place {
        gauge!("portwarden_connections", "kind" => kind.name()).increment(1);
        Place { kind, _permit: permit }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        gauge!("portwarden_connections", "kind" => self.kind.name()).decrement(1);
    }
}

/// One of those that may be open at a time.
pub struct Connection {
    tcp: TcpStream,
    kind: Kind,
    /// Until then it must have said something more.
    silent: Option<Pin<Box<Sleep>>>,
    said_bytes: usize,
    _place: Place,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.tcp.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (this, filled) = (&mut *self, buf.filled().len());
        let read = Pin::new(&mut this.tcp).poll_read(cx, buf);
        let Some(silent) = &mut this.silent else { return read };
        if read.is_ready() {
            this.said_bytes += buf.filled().len() - filled;
            match this.kind {
                Kind::Http => silent.as_mut().reset(Instant::now() + SILENT_BETWEEN),
                _ if this.said_bytes >= PREFACE_BYTES => this.silent = None,
                _ => {}
            }
            return read;
        }
        match silent.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn listener() -> (TcpListener, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    #[tokio::test]
    async fn one_more_than_there_may_be_is_closed_and_makes_room_for_none() {
        let (listener, addr) = listener().await;
        let mut incoming = Box::pin(at_most(1, listener, Kind::Http));
        let _first = TcpStream::connect(addr).await.unwrap();
        let held = incoming.next().await.unwrap().unwrap();
        let mut more = TcpStream::connect(addr).await.unwrap();
        let closed = async { more.read(&mut [0]).await.unwrap_or(0) };
        tokio::select! {
            _ = incoming.next() => panic!("it was taken"),
            read = closed => assert_eq!(read, 0),
        }
        drop(held);
        let _next = TcpStream::connect(addr).await.unwrap();
        assert!(incoming.next().await.unwrap().is_ok());
    }

    #[tokio::test]
    async fn what_is_open_and_what_was_refused_is_shown() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        // A test of one thread: all of it is under this recorder.
        let _shown = metrics::set_default_local_recorder(&recorder);
        let shows = |line: &str| {
            let shown = recorder.handle().render();
            assert!(shown.lines().any(|shown| shown == line), "{line} is not in {shown}");
        };
        let (listener, addr) = listener().await;
        let mut incoming = Box::pin(at_most(1, listener, Kind::Http));
        let _first = TcpStream::connect(addr).await.unwrap();
        let held = incoming.next().await.unwrap().unwrap();
        shows("portwarden_connections{kind=\"http\"} 1");
        let _more = TcpStream::connect(addr).await.unwrap();
        let taken = tokio::time::timeout(Duration::from_millis(500), incoming.next()).await;
        assert!(taken.is_err());
        shows("portwarden_connections_refused_total{kind=\"http\"} 1");
        drop(held);
        shows("portwarden_connections{kind=\"http\"} 0");
    }

    #[test]
    fn refused_connections_are_told_of_once_a_minute() {
        let mut refused = Refused { kind: Kind::Client, max: 1, untold: 0, told: None };
        let began = Instant::now();
        let mut at = |seconds| refused.word(began + Duration::from_secs(seconds));
        assert_eq!([at(0), at(1), at(59), at(60), at(61)], [Some(1), None, None, Some(3), None]);
    }

    /// What a connection that said `said` ends with once it is silent.
    async fn silent(kind: Kind, said: &[u8]) -> io::Result<usize> {
        let (listener, addr) = listener().await;
        let mut incoming = Box::pin(at_most(1, listener, kind));
        let mut caller = TcpStream::connect(addr).await.unwrap();
        let mut connection = incoming.next().await.unwrap().unwrap();
        caller.write_all(said).await.unwrap();
        connection.read_exact(&mut vec![0; said.len()]).await.unwrap();
        tokio::time::pause();
        let limit = SILENT_FIRST + SILENT_BETWEEN * 2;
        tokio::time::timeout(limit, connection.read(&mut [0])).await.unwrap_or(Ok(usize::MAX))
    }

    #[tokio::test]
    async fn who_says_nothing_is_cut_off_and_over_http_2_only_at_the_beginning() {
        for (kind, said, cut_off) in [
            (Kind::Client, "", true),
            (Kind::Peer, "", true),
            (Kind::Http, "", true),
            (Kind::Http, "GET", true),
            (Kind::Client, "PRI", true),
            (Kind::Client, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", false),
            (Kind::Peer, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", false),
        ] {
            let end = silent(kind, said.as_bytes()).await;
            tokio::time::resume();
            match end {
                Err(error) if cut_off => assert_eq!(error.kind(), io::ErrorKind::TimedOut),
                Ok(usize::MAX) if !cut_off => {}
                end => panic!("{kind:?} after {said:?}: {end:?}"),
            }
        }
    }
}
