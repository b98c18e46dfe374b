//! A network of hosts, and TCP over it as programs see it.
//!
//! What is sent takes a random time on its link and arrives in order. A link that is cut, or loses
//! something, loses nothing in the end: TCP sends again what is not acknowledged. So what was on the
//! way when a link was cut arrives when it is mended, which may be long after anybody wants it; a
//! connection ends by a program's decision, or when one side has forgotten it.
//!
//! - A process that is killed ends its connections at once; a machine that is gone says nothing, and
//!   what comes to it is answered with a reset when it is there again.
//! - Nothing arrives within the step of time in which it was sent, so that within one the hosts are
//!   independent of each other.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

pub type HostId = usize;

/// What may be on its way, or unread, in one direction of a connection.
const WINDOW_BYTES: usize = 256 << 10;
const SEGMENT_BYTES: usize = 64 << 10;
/// How long TCP waits at first before it sends something again; twice as long each time.
const RETRANSMIT: Duration = Duration::from_millis(200);
/// Longest wait after a link was mended until somebody tries.
const RETRANSMIT_MAX: Duration = Duration::from_secs(2);

/// How one direction of a link is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quality {
    pub delay_min: Duration,
    pub delay_max: Duration,
    /// Of one segment.
    pub loss: f64,
}

impl Default for Quality {
    fn default() -> Self {
        Quality {
            delay_min: Duration::from_micros(200),
            delay_max: Duration::from_millis(2),
            loss: 0.0,
        }
    }
}

/// Clones are the same network.
#[derive(Clone)]
pub struct Net(Arc<Mutex<State>>);

struct State {
    now: Duration,
    rng: StdRng,
    hosts: Vec<Machine>,
    links: BTreeMap<(HostId, HostId), Link>,
    quality: Quality,
    connections: BTreeMap<u64, [End; 2]>,
    on_the_way: BTreeMap<(Duration, u64), Segment>,
    next: u64,
}

struct Machine {
    name: String,
    up: bool,
    /// Nothing leaves it: its process has ended, and only the simulation does not know yet.
    mute: bool,
    listeners: BTreeMap<u16, Door>,
    /// What came while it was down.
    waiting: Vec<Segment>,
}

#[derive(Default)]
struct Door {
    arrived: VecDeque<u64>,
    waker: Option<Waker>,
}

struct Link {
    quality: Quality,
    cut: bool,
    /// What came to the cut.
    stuck: Vec<Segment>,
}

/// One side of a connection, and what comes to it.
struct End {
    host: HostId,
    state: EndState,
    unread: VecDeque<Bytes>,
    /// Sent to it and not read yet.
    window_used: usize,
    /// Nothing arrives before this.
    in_order: Duration,
    fin: bool,
    reader: Option<Waker>,
    /// The other side's, which waits for room.
    writer: Option<Waker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EndState {
    Connecting,
    Open,
    Refused,
    Reset,
    /// The program has closed it, or is gone.
    Closed,
}

#[derive(Debug, Clone)]
struct Segment {
    connection: u64,
    /// Which side it goes to.
    side: usize,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Connect(u16),
    Accepted,
    Refused,
    Data(Bytes),
    End,
    Reset,
}

impl Net {
    pub fn new(seed: u64) -> Net {
        Net(Arc::new(Mutex::new(State {
            now: Duration::ZERO,
            rng: StdRng::seed_from_u64(seed),
            hosts: Vec::new(),
            links: BTreeMap::new(),
            quality: Quality::default(),
            connections: BTreeMap::new(),
            on_the_way: BTreeMap::new(),
            next: 0,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add_host(&self, name: &str) -> HostId {
        let mut state = self.state();
        state.hosts.push(Machine {
            name: name.into(),
            up: true,
            mute: false,
            listeners: BTreeMap::new(),
            waiting: Vec::new(),
        });
        state.hosts.len() - 1
    }

    /// Brings what is due to where it goes.
    pub fn deliver(&self, now: Duration) {
        let mut state = self.state();
        state.now = now;
        while let Some(next) = state.on_the_way.first_entry()
            && next.key().0 <= now
        {
            let segment = next.remove();
            state.arrive(segment);
        }
    }

    /// Of all links that are not told otherwise.
    pub fn set_default_quality(&self, quality: Quality) {
        self.state().quality = quality;
    }

    pub fn set_quality(&self, from: HostId, to: HostId, quality: Quality) {
        self.state().link(from, to).quality = quality;
    }

    /// One direction.
    pub fn cut(&self, from: HostId, to: HostId) {
        self.state().link(from, to).cut = true;
    }

    pub fn mend(&self, from: HostId, to: HostId) {
        let mut state = self.state();
        let link = state.link(from, to);
        link.cut = false;
        let stuck = std::mem::take(&mut link.stuck);
        state.send_again(stuck);
    }

    /// All links are as at the beginning.
    pub fn mend_all(&self) {
        let mut state = self.state();
        let healthy = state.quality;
        let keys: Vec<_> = state.links.keys().copied().collect();
        for key in keys {
            let Some(link) = state.links.get_mut(&key) else { continue };
            link.cut = false;
            link.quality = healthy;
            let stuck = std::mem::take(&mut link.stuck);
            state.send_again(stuck);
        }
    }

    /// The process on it has ended: its system closes what it had open.
    pub fn process_ended(&self, host: HostId) {
        let mut state = self.state();
        state.hosts[host].mute = false;
        state.close_all(host, true);
    }

    /// It is without power: nobody hears of it.
    pub fn power_off(&self, host: HostId) {
        let mut state = self.state();
        state.hosts[host].up = false;
        state.hosts[host].mute = false;
        state.close_all(host, false);
    }

    pub fn power_on(&self, host: HostId) {
        let mut state = self.state();
        state.hosts[host].up = true;
        let waiting = std::mem::take(&mut state.hosts[host].waiting);
        state.send_again(waiting);
    }

    /// From now on nothing leaves it, until its process has ended.
    pub fn mute(&self, host: HostId) {
        self.state().hosts[host].mute = true;
    }

    /// Connections that come to this port, for ever.
    pub fn listen(&self, host: HostId, port: u16) -> Incoming {
        self.state().hosts[host].listeners.insert(port, Door::default());
        Incoming { net: self.clone(), host, port }
    }

    /// `to`: `name:port`.
    pub async fn connect(self, from: HostId, to: String) -> io::Result<Socket> {
        let socket = self.begin_to_connect(from, &to)?;
        std::future::poll_fn(|cx| socket.poll_connected(cx)).await?;
        Ok(socket)
    }

    fn begin_to_connect(&self, from: HostId, to: &str) -> io::Result<Socket> {
        let unknown = || io::Error::new(io::ErrorKind::NotFound, format!("{to}: no such host"));
        let (name, port) = to.rsplit_once(':').ok_or_else(unknown)?;
        let port = port.parse().map_err(|_| unknown())?;
        let mut state = self.state();
        let host = state.hosts.iter().position(|host| host.name == name).ok_or_else(unknown)?;
        state.next += 1;
        let connection = state.next;
        let end = |host, end_state| End {
            host,
            state: end_state,
            unread: VecDeque::new(),
            window_used: 0,
            in_order: Duration::ZERO,
            fin: false,
            reader: None,
            writer: None,
        };
        let ends = [end(from, EndState::Connecting), end(host, EndState::Connecting)];
        state.connections.insert(connection, ends);
        state.send(Segment { connection, side: 1, what: What::Connect(port) });
        Ok(Socket { net: self.clone(), connection, side: 0 })
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

impl State {
    fn link(&mut self, from: HostId, to: HostId) -> &mut Link {
        let quality = self.quality;
        let new = || Link { quality, cut: false, stuck: Vec::new() };
        self.links.entry((from, to)).or_insert_with(new)
    }

    /// Who sends it, and to whom.
    fn route(&self, segment: &Segment) -> Option<(HostId, HostId)> {
        let ends = self.connections.get(&segment.connection)?;
        Some((ends[1 - segment.side].host, ends[segment.side].host))
    }

    fn send(&mut self, segment: Segment) {
        let Some((from, to)) = self.route(&segment) else { return };
        if self.hosts[from].mute {
            return;
        }
        let Quality { delay_min, delay_max, loss } = self.link(from, to).quality;
        let mut delay = self.rng.random_range(delay_min..=delay_max);
        let mut again = RETRANSMIT;
        while loss > 0.0 && self.rng.random_bool(loss) {
            delay += again;
            again *= 2;
        }
        self.put_on_the_way(segment, delay);
    }

    /// What was sent after them waits for them.
    fn send_again(&mut self, segments: Vec<Segment>) {
        let way = |segment: &Segment| (segment.connection, segment.side);
        let late: BTreeSet<_> = segments.iter().map(way).collect();
        let behind = self.on_the_way.extract_if(.., |_, segment| late.contains(&way(segment)));
        let behind: Vec<Segment> = behind.map(|(_, segment)| segment).collect();
        for segment in segments.into_iter().chain(behind) {
            let delay = self.rng.random_range(Duration::ZERO..RETRANSMIT_MAX);
            self.put_on_the_way(segment, delay);
        }
    }

    fn put_on_the_way(&mut self, segment: Segment, delay: Duration) {
        let at = self.now + delay;
        let Some(ends) = self.connections.get_mut(&segment.connection) else { return };
        let end = &mut ends[segment.side];
        end.in_order = end.in_order.max(at);
        self.next += 1;
        self.on_the_way.insert((end.in_order, self.next), segment);
    }

    fn arrive(&mut self, segment: Segment) {
        let Some((from, to)) = self.route(&segment) else { return };
        let link = self.link(from, to);
        if link.cut {
            link.stuck.push(segment);
            return;
        }
        if !self.hosts[to].up {
            self.hosts[to].waiting.push(segment);
            return;
        }
        let Segment { connection, side, what } = segment;
        match what {
            What::Connect(port) => self.knock(connection, port),
            what => self.take(connection, side, what),
        }
    }

    fn knock(&mut self, connection: u64, port: u16) {
        let Some(ends) = self.connections.get_mut(&connection) else { return };
        let Some(door) = self.hosts[ends[1].host].listeners.get_mut(&port) else {
            ends[1].state = EndState::Closed;
            return self.send(Segment { connection, side: 0, what: What::Refused });
        };
        ends[1].state = EndState::Open;
        door.arrived.push_back(connection);
        wake(&mut door.waker);
        self.send(Segment { connection, side: 0, what: What::Accepted });
    }

    fn take(&mut self, connection: u64, side: usize, what: What) {
        let Some(ends) = self.connections.get_mut(&connection) else { return };
        let end = &mut ends[side];
        let closed = end.state == EndState::Closed;
        match what {
            // It does not know this connection any more.
            What::Data(_) | What::End | What::Accepted if closed => {
                return self.send(Segment { connection, side: 1 - side, what: What::Reset });
            }
            _ if closed => {}
            What::Accepted => end.state = EndState::Open,
            What::Refused => end.state = EndState::Refused,
            What::Data(bytes) => end.unread.push_back(bytes),
            What::End => end.fin = true,
            What::Reset => end.state = EndState::Reset,
            What::Connect(_) => {}
        }
        wake(&mut end.reader);
        if matches!(end.state, EndState::Reset | EndState::Refused) {
            wake(&mut ends[1 - side].writer);
        }
        self.forget_if_over(connection);
    }

    /// Both sides are through with it.
    fn forget_if_over(&mut self, connection: u64) {
        let over = |end: &End| end.state == EndState::Closed;
        if self.connections.get(&connection).is_some_and(|ends| ends.iter().all(over)) {
            self.connections.remove(&connection);
        }
    }

    fn close_all(&mut self, host: HostId, tell: bool) {
        self.hosts[host].listeners.clear();
        let of_host = |(id, ends): (&u64, &[End; 2])| {
            let side = ends.iter().position(|end| end.host == host)?;
            (ends[side].state != EndState::Closed).then_some((*id, side))
        };
        let open: Vec<_> = self.connections.iter().filter_map(of_host).collect();
        for (connection, side) in open {
            if let Some(ends) = self.connections.get_mut(&connection) {
                ends[side].state = EndState::Closed;
                (ends[side].reader, ends[1 - side].writer) = (None, None);
                ends[side].unread.clear();
            }
            if tell {
                self.send(Segment { connection, side: 1 - side, what: What::Reset });
            }
            self.forget_if_over(connection);
        }
    }
}

/// Connections as a server accepts them.
pub struct Incoming {
    net: Net,
    host: HostId,
    port: u16,
}

impl Stream for Incoming {
    type Item = io::Result<Socket>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.net.state();
        let Some(door) = state.hosts[self.host].listeners.get_mut(&self.port) else {
            return Poll::Ready(None);
        };
        let Some(connection) = door.arrived.pop_front() else {
            door.waker = Some(cx.waker().clone());
            return Poll::Pending;
        };
        Poll::Ready(Some(Ok(Socket { net: self.net.clone(), connection, side: 1 })))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.net.state().hosts[self.host].listeners.remove(&self.port);
    }
}

/// One side of a connection.
pub struct Socket {
    net: Net,
    connection: u64,
    side: usize,
}

impl Socket {
    fn poll_connected(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.net.state();
        let Some(ends) = state.connections.get_mut(&self.connection) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        let end = &mut ends[self.side];
        match end.state {
            EndState::Open => Poll::Ready(Ok(())),
            EndState::Connecting => {
                end.reader = Some(cx.waker().clone());
                Poll::Pending
            }
            EndState::Refused => Poll::Ready(Err(io::ErrorKind::ConnectionRefused.into())),
            EndState::Reset | EndState::Closed => {
                Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut state = self.net.state();
        let Some(ends) = state.connections.get_mut(&self.connection) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        let end = &mut ends[self.side];
        if let Some(bytes) = end.unread.front_mut() {
            let taken = bytes.split_to(bytes.len().min(buf.remaining()));
            buf.put_slice(&taken);
            end.window_used -= taken.len();
            if bytes.is_empty() {
                end.unread.pop_front();
            }
            wake(&mut end.writer);
            return Poll::Ready(Ok(()));
        }
        match end.state {
            EndState::Reset | EndState::Refused | EndState::Closed => {
                Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
            }
            EndState::Open | EndState::Connecting if end.fin => Poll::Ready(Ok(())),
            EndState::Open | EndState::Connecting => {
                end.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut state = self.net.state();
        let Some(ends) = state.connections.get_mut(&self.connection) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        if ends[self.side].state != EndState::Open {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let peer = &mut ends[1 - self.side];
        let room = WINDOW_BYTES.saturating_sub(peer.window_used);
        if room == 0 {
            peer.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let taken = buf.len().min(room).min(SEGMENT_BYTES);
        peer.window_used += taken;
        let (connection, side) = (self.connection, 1 - self.side);
        let what = What::Data(Bytes::copy_from_slice(&buf[..taken]));
        state.send(Segment { connection, side, what });
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (connection, side) = (self.connection, 1 - self.side);
        self.net.state().send(Segment { connection, side, what: What::End });
        Poll::Ready(Ok(()))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let mut state = self.net.state();
        let (connection, side) = (self.connection, self.side);
        let Some(ends) = state.connections.get_mut(&connection) else { return };
        if ends[side].state == EndState::Closed {
            return;
        }
        ends[side].state = EndState::Closed;
        ends[side].unread.clear();
        state.send(Segment { connection, side: 1 - side, what: What::End });
        state.forget_if_over(connection);
    }
}

impl Connected for Socket {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
