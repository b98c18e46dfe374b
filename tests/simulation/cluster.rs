//! Nodes on simulated hosts: the whole server, over a simulated disk and a simulated network.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use portwarden::api::assembly::Server;
use portwarden::client::Client;
use portwarden::node::{Entry, Lifecycle, Node, NodeConfig, Upkeep};
use portwarden::raft::{self, Dial, NodeId};
use portwarden::store::{DataDir, SimulatedDisk};
use tokio::sync::Notify;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

use crate::caller::Endpoints;
use crate::world::{HostId, Net, World};

/// Why the process of a node ended that was asked to.
pub const STOPPED: &str = "it was stopped";

const PEER_PORT: u16 = 7701;
const CLIENT_PORT: u16 = 7601;

/// What all nodes of a run have in common.
#[derive(Debug, Clone)]
pub struct Settings {
    pub snapshot_every: u64,
    pub checkpoint_every: u64,
    pub lifecycle: Lifecycle,
    pub disk_latency: Duration,
}

/// What its process is doing, as far as it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    Runs,
    /// Killed, without power, or ended as it should; `silent` while its machine is off.
    Down {
        silent: bool,
    },
    /// It is not to come back: it was removed, or lost its disk.
    Gone,
}

pub struct Seat {
    pub id: NodeId,
    pub host: HostId,
    pub life: Life,
    /// How often it was started.
    pub starts: usize,
    pub disk: SimulatedDisk,
    /// The one that it had before: what it acknowledged was on it.
    lost: Option<SimulatedDisk>,
    dir: PathBuf,
    entry: Entry,
    node: Rc<RefCell<Option<Node>>>,
    stop: Rc<Notify>,
    /// Its process may end by itself, for this reason.
    pub may_end: Option<&'static str>,
    /// The same, once for each time that it was started.
    pub disk_fails: bool,
}

impl Seat {
    /// While it runs, and has begun to.
    pub fn node(&self) -> Option<Node> {
        self.node.borrow().clone()
    }

    /// On which what it acknowledged under this id must be.
    pub fn first_disk(&self) -> SimulatedDisk {
        self.lost.as_ref().unwrap_or(&self.disk).clone()
    }

    /// As SIGTERM does.
    pub fn ask_to_stop(&self) {
        self.stop.notify_one();
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn peer(&self) -> String {
        peer_address(self.id)
    }

    pub fn client(&self) -> String {
        client_address(self.id)
    }
}

pub struct Cluster {
    pub seats: Vec<Seat>,
    settings: Settings,
    /// Of the data directories.
    dir: PathBuf,
}

fn host_name(id: NodeId) -> String {
    format!("n{id}")
}

fn peer_address(id: NodeId) -> String {
    format!("{}:{PEER_PORT}", host_name(id))
}

pub fn client_address(id: NodeId) -> String {
    format!("{}:{CLIENT_PORT}", host_name(id))
}

impl Cluster {
    /// Nodes with these ids, which do not run yet.
    pub fn new(world: &mut World, dir: &Path, ids: Range<NodeId>, settings: Settings) -> Cluster {
        let mut cluster = Cluster { seats: Vec::new(), settings, dir: dir.to_path_buf() };
        let list: BTreeMap<NodeId, String> = ids.clone().map(|id| (id, peer_address(id))).collect();
        for id in ids {
            cluster.seat(world, id, Entry::Begin(list.clone()));
        }
        cluster
    }

    fn seat(&mut self, world: &mut World, id: NodeId, entry: Entry) -> usize {
        let disk = SimulatedDisk::default();
        disk.set_latency(self.settings.disk_latency);
        self.seats.push(Seat {
            id,
            host: world.add_host(&host_name(id)),
            life: Life::Down { silent: false },
            starts: 0,
            disk,
            lost: None,
            dir: self.dir.join(format!("node-{id}")),
            entry,
            node: Rc::default(),
            stop: Rc::default(),
            may_end: None,
            disk_fails: false,
        });
        self.seats.len() - 1
    }

    /// A node that is to join the others; it does not run yet.
    pub fn add(&mut self, world: &mut World, id: NodeId, through: NodeId) -> usize {
        self.seat(world, id, Entry::Join(peer_address(through)))
    }

    /// Of the nodes that may serve.
    pub fn endpoints(&self) -> Vec<String> {
        let seats = self.seats.iter().filter(|seat| seat.life != Life::Gone);
        seats.map(Seat::client).collect()
    }

    pub fn hosts(&self) -> Vec<HostId> {
        self.seats.iter().map(|seat| seat.host).collect()
    }

    pub fn at(&self, host: HostId) -> Option<usize> {
        self.seats.iter().position(|seat| seat.host == host)
    }

    pub fn running(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.seats.len()).filter(|at| self.seats[*at].life == Life::Runs)
    }

    /// The running node that leads, of several the one of the last term.
    pub fn leader(&self) -> Option<usize> {
        let leads = self.running().filter_map(|at| {
            let metrics = self.seats[at].node()?.raft_metrics();
            (metrics.state == openraft::ServerState::Leader).then_some((metrics.current_term, at))
        });
        leads.max().map(|(_, at)| at)
    }

    pub fn start(&mut self, world: &mut World, at: usize) {
        let seat = &mut self.seats[at];
        if let Life::Down { silent: true } = seat.life {
            world.power_on(seat.host);
        }
        seat.life = Life::Runs;
        seat.starts += 1;
        let config = NodeConfig {
            id: seat.id,
            data_dir: seat.dir.clone(),
            entry: seat.entry.clone(),
            advertise_peer: seat.peer(),
            advertise: seat.client(),
            snapshot_every: self.settings.snapshot_every,
            upkeep: Upkeep {
                checkpoint_every: self.settings.checkpoint_every,
                // What is free on the real disk is not repeatable.
                low_space_bytes: 0,
                ..Upkeep::default()
            },
            lifecycle: self.settings.lifecycle.clone(),
            backups: None,
        };
        let (net, host, disk) = (world.net.clone(), seat.host, seat.disk.clone());
        seat.stop = Rc::default();
        let (shown, stop) = (seat.node.clone(), seat.stop.clone());
        world.start(host, || Box::pin(serve(net, host, config, disk, shown, stop)));
    }

    /// Kills its process, or its machine. Of what it wrote and did not flush, the disk keeps the
    /// first `kept` writes.
    pub fn kill(&mut self, world: &mut World, at: usize, kept: usize, silent: bool) {
        let seat = &mut self.seats[at];
        if seat.life != Life::Runs {
            return;
        }
        seat.life = Life::Down { silent };
        seat.node.take();
        match silent {
            true => world.power_off(seat.host),
            false => world.kill(seat.host),
        }
        seat.disk.crash(kept);
    }

    /// It loses all that it had, while it does not run.
    pub fn wipe(&mut self, at: usize) {
        let seat = &mut self.seats[at];
        assert!(matches!(seat.life, Life::Down { .. }), "node {} runs", seat.id);
        let lost = std::mem::take(&mut seat.disk);
        seat.lost.get_or_insert(lost);
        seat.disk.set_latency(self.settings.disk_latency);
        std::fs::remove_dir_all(&seat.dir).expect("its directory");
    }

    /// Fills the empty directory of a node with what it begins a new cluster with.
    pub async fn restore(
        dir: PathBuf,
        id: NodeId,
        disk: SimulatedDisk,
        state: portwarden::core::State,
        members: BTreeMap<NodeId, String>,
    ) -> Result<String, String> {
        let data = DataDir::simulated(&dir, id, disk).map_err(|error| error.to_string())?;
        let restored = raft::restore_into(&data, state, &members).await;
        data.close().await;
        restored.map_err(|error| error.to_string())
    }
}

/// A node's process, from its start to its end.
async fn serve(
    net: Net,
    host: HostId,
    config: NodeConfig,
    disk: SimulatedDisk,
    shown: Rc<RefCell<Option<Node>>>,
    stop: Rc<Notify>,
) -> String {
    let data = match DataDir::simulated(&config.data_dir, config.id, disk) {
        Ok(data) => data,
        Err(error) => return error.to_string(),
    };
    let (peers, clients) = (net.listen(host, PEER_PORT), net.listen(host, CLIENT_PORT));
    let own = net.clone();
    let dial = Dial::by(move |endpoint| channel(&own, host, &endpoint));
    let node = match Node::start_over(config, data, peers, dial).await {
        Ok(node) => node,
        Err(error) => return error.to_string(),
    };
    *shown.borrow_mut() = Some(node.clone());
    let server = Server::of(node, clients).await;
    let entered = async {
        match server.enter_cluster().await {
            Ok(()) => std::future::pending().await,
            Err(error) => error.to_string(),
        }
    };
    tokio::select! {
        why = entered => return why,
        why = server.node.failed() => return why,
        why = removed(&server.node) => return why,
        () = stop.notified() => {}
    }
    server.stop().await;
    STOPPED.into()
}

/// As `portwarden serve` does: it says so for a while, and then ends.
async fn removed(node: &Node) -> String {
    let why = node.removed().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    why
}

/// A channel from this host over the simulated network.
pub fn channel(net: &Net, from: HostId, endpoint: &Endpoint) -> Channel {
    let net = net.clone();
    let connect = move |to: Uri| {
        let to = to.authority().map(ToString::to_string).unwrap_or_default();
        let connected = net.clone().connect(from, to);
        async move { connected.await.map(TokioIo::new) }
    };
    endpoint.connect_with_connector_lazy(tower::service_fn(connect))
}

/// The ways from a host to some nodes.
#[derive(Clone)]
pub struct Ways {
    pub net: Net,
    pub from: HostId,
    pub endpoints: Vec<String>,
}

impl Ways {
    /// As the client library connects. Channels belong to the runtime in which they are made: that of
    /// the host.
    pub fn open(&self) -> Endpoints {
        let made = |name: &String| {
            let endpoint = Client::endpoint(name).expect("an endpoint");
            (name.clone(), channel(&self.net, self.from, &endpoint))
        };
        self.endpoints.iter().map(made).collect()
    }
}
