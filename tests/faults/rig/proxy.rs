//! Slow links, where the kernel has no netem: what peers send to a node goes through a proxy on its
//! host, which hands everything on a while later, in order.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::net::Host;

/// Bytes read at once, and pieces that may be under way in one direction.
const PIECE_BYTES: usize = 64 << 10;
const PIECES_AHEAD: usize = 256;

/// Ends with this.
pub struct Proxy {
    delay_ms: Arc<AtomicU64>,
    stop: watch::Sender<bool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// Takes connections on one port of the host, and makes them to another.
    pub fn start(host: &Host, from: u16, to: u16) -> Proxy {
        let delay_ms = Arc::new(AtomicU64::new(0));
        let (stop, mut stopped) = watch::channel(false);
        let (host, delay) = (host.clone(), delay_ms.clone());
        let thread = std::thread::spawn(move || {
            host.enter();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let serving = std::pin::pin!(serve(host.address, from, to, delay));
                let stopped = std::pin::pin!(stopped.wait_for(|stop| *stop));
                futures::future::select(serving, stopped).await;
            });
        });
        Proxy { delay_ms, stop, thread: Some(thread) }
    }

    /// What comes from now on arrives so much later. What waits goes out when it was to.
    pub fn slow(&self, by: Duration) {
        self.delay_ms.store(by.as_millis() as u64, Ordering::Release);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // one that panicked has said so
        }
    }
}

async fn serve(address: Ipv4Addr, from: u16, to: u16, delay: Arc<AtomicU64>) {
    let listener = TcpListener::bind((address, from)).await.expect("a port of our own host");
    loop {
        let Ok((near, _)) = listener.accept().await else { continue };
        let delay = delay.clone();
        tokio::spawn(async move {
            // Where nobody listens behind it, the connection just ends.
            if let Ok(far) = TcpStream::connect(SocketAddr::from((address, to))).await {
                join(near, far, delay).await;
            }
        });
    }
}

/// Both directions, until either end has had enough.
async fn join(near: TcpStream, far: TcpStream, delay: Arc<AtomicU64>) {
    let _ = (near.set_nodelay(true), far.set_nodelay(true)); // it works without, only later
    let (near_in, near_out) = near.into_split();
    let (far_in, far_out) = far.into_split();
    tokio::select! {
        () = carry(near_in, far_out, &delay) => {}
        () = carry(far_in, near_out, &delay) => {}
    }
}

async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, delay: &AtomicU64) {
    let (pieces, mut waiting) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES_AHEAD);
    let take = async move {
        loop {
            let mut piece = vec![0; PIECE_BYTES];
            match from.read(&mut piece).await {
                Ok(0) | Err(_) => return,
                Ok(read) => piece.truncate(read),
            }
            let due = Instant::now() + Duration::from_millis(delay.load(Ordering::Acquire));
            if pieces.send((due, piece)).await.is_err() {
                return;
            }
        }
    };
    let give = async move {
        while let Some((due, piece)) = waiting.recv().await {
            sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(take, give);
}
