//! Connections of clients, counted: each costs a file descriptor, and a node that has none left
//! cannot write its log.
//!
//! A connection beyond the bound is closed at once, so that its client goes to another node. When
//! accepting fails, the next attempt waits a little instead of spinning.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{self, Stream};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};
use tracing::warn;

/// Connections of clients that one node serves at a time, where it may open twice as many files.
pub const CONNECTIONS_MAX: usize = 8192;
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// After a failure to accept, which lasts while descriptors or memory are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Lets this process open as many files as it ever may (the usual 1024 are soon used up), and says
/// how many of them may be connections of clients: half, the others are for the log and the peers.
pub fn make_room() -> usize {
    let limit = getrlimit(Resource::Nofile);
    // Where this fails, what there is has to do.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let files = getrlimit(Resource::Nofile).current.map_or(usize::MAX, |files| files as usize);
    CONNECTIONS_MAX.min(files / 2)
}

/// Accepts TCP connections as [`serve`](super::serve) wants them, at most `max` at a time.
pub fn tcp_incoming(
    listener: TcpListener,
    max: usize,
) -> impl Stream<Item = io::Result<Connection>> {
    let incoming =
        TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(KEEPALIVE_IDLE));
    let free = Arc::new(Semaphore::new(max));
    stream::unfold((incoming, free), |(mut incoming, free)| async move {
        loop {
            match incoming.next().await? {
                Ok(tcp) => {
                    if let Ok(permit) = free.clone().try_acquire_owned() {
                        let connection = Connection { tcp, _permit: permit };
                        return Some((Ok(connection), (incoming, free)));
                    }
                }
                Err(error) => {
                    warn!("cannot accept a client: {error}");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    })
}

/// One of those that may be open at a time.
pub struct Connection {
    tcp: TcpStream,
    _permit: OwnedSemaphorePermit,
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
        Pin::new(&mut self.tcp).poll_read(cx, buf)
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
