//! One cluster, everybody who uses it, and what is known of them: what a run and its faults work on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use portwarden::client::{Client, Options};
use portwarden::node::DISAGREES_EXIT;
use portwarden::store::{FATAL_EXIT, SimulatedDisk};
use rand::Rng as _;
use rand::rngs::StdRng;

use crate::caller::Endpoints;
use crate::cluster::{Cluster, Life, STOPPED, Ways};
use crate::errands::Pending;
use crate::history::{Record, Recorder};
use crate::invariants::{Sight, Witness};
use crate::plan::Plan;
use crate::site::{self, Site};
use crate::trace::Trace;
use crate::world::{Exit, HostId, World};

/// A watcher that is told of everything: the others may be cut off, and begin again where somebody
/// still knows what came between.
const THE_LOG: u32 = u32::MAX;
/// The host of whoever looks after the cluster.
const OPERATOR: &str = "operator";

pub struct Sim {
    pub plan: Plan,
    pub world: World,
    pub cluster: Cluster,
    pub recorder: Arc<Recorder>,
    pub sites: Vec<Site>,
    /// Hosts of clients and watchers.
    pub clients: Vec<HostId>,
    pub operator: HostId,
    pub witness: Witness,
    /// Does the witness look at what runs?
    pub watches_over: bool,
    /// Of the data directories.
    pub dir: PathBuf,
    pub trace: Trace,
    pub pending: Vec<Pending>,
    pub ambush: Option<Ambush>,
    /// Of nodes: never used twice.
    next_id: u64,
    /// Of who is in the history.
    next_process: u32,
    votes: BTreeMap<usize, (u64, u64)>,
}

/// Nodes that have just voted are killed and come back at once, some times.
pub struct Ambush {
    pub until: Duration,
    pub left: u32,
    pub rng: StdRng,
}

/// What ends a run at once.
pub type Broken = String;

impl Sim {
    pub fn new(plan: Plan, dir: &Path, recorder: Arc<Recorder>) -> Sim {
        let mut world = World::new(plan.seed);
        let cluster = Cluster::new(&mut world, dir, 1..plan.nodes + 1, plan.settings.clone());
        let operator = world.add_host(OPERATOR);
        world.start(operator, || Box::pin(std::future::pending()));
        world.net.set_default_quality(plan.network);
        let next_id = plan.nodes + 1;
        recorder.put(|at| Record::WatchBegins {
            at,
            watcher: THE_LOG,
            endpoint: "the log".into(),
            from: 1,
            worker: String::new(),
        });
        Sim {
            plan,
            world,
            cluster,
            recorder,
            sites: Vec::new(),
            clients: Vec::new(),
            operator,
            witness: Witness::default(),
            watches_over: true,
            dir: dir.to_path_buf(),
            trace: Trace::default(),
            pending: Vec::new(),
            ambush: None,
            next_id,
            next_process: 1,
            votes: BTreeMap::new(),
        }
    }

    pub fn now(&self) -> Duration {
        self.world.now()
    }

    pub fn fresh_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    pub fn fresh_process(&mut self) -> u32 {
        self.next_process += 1;
        self.next_process - 1
    }

    pub fn fault(&self, what: impl Into<String>) {
        self.recorder.fault(what);
    }

    /// One step of time, and a look at all that must hold.
    pub fn step(&mut self) -> Result<(), Broken> {
        for exit in self.world.step() {
            self.ended(exit)?;
        }
        if let Some(panic) = self.world.panics().into_iter().next() {
            return Err(format!("panic: {panic}"));
        }
        let now = self.now();
        self.sites.iter().try_for_each(|site| site.look_after(now))?;
        self.look_after_errands()?;
        self.look()?;
        self.spring_ambush();
        Ok(())
    }

    fn spring_ambush(&mut self) {
        let Some(mut ambush) = self.ambush.take().filter(|a| a.until > self.world.now()) else {
            return;
        };
        for at in self.cluster.running().collect::<Vec<_>>() {
            let Some(node) = self.cluster.seats[at].node() else { continue };
            let vote = node.raft_metrics().vote.leader_id;
            drop(node);
            let vote = (vote.term, vote.node_id);
            let before = self.votes.insert(at, vote);
            let voted = before.is_some_and(|before| before != vote);
            if voted && ambush.left > 0 && ambush.rng.random_bool(0.6) {
                ambush.left -= 1;
                let id = self.cluster.seats[at].id;
                self.fault(format!("ambush: node {id} has just voted {vote:?}"));
                self.kill(at, 0, false);
                self.start(at);
            }
        }
        self.ambush = Some(ambush);
    }

    pub fn run_for(&mut self, span: Duration) -> Result<(), Broken> {
        let until = self.now() + span;
        while self.now() < until {
            self.step()?;
        }
        Ok(())
    }

    /// Runs something on the operator's host to its end.
    pub fn operate<T: 'static>(
        &mut self,
        work: impl Future<Output = T> + 'static,
    ) -> Result<T, Broken> {
        let mut done = self.begin_to_operate(work);
        loop {
            if let Some(result) = done.take() {
                return Ok(result);
            }
            self.step()?;
        }
    }

    /// The same beside everything else.
    pub fn begin_to_operate<T: 'static>(
        &mut self,
        work: impl Future<Output = T> + 'static,
    ) -> Errand<T> {
        let errand = Errand::default();
        let done = errand.clone();
        self.world.spawn(self.operator, async move {
            let result = work.await;
            *done.0.borrow_mut() = Some(result);
        });
        errand
    }

    pub fn ways(&self, from: HostId) -> Ways {
        Ways { net: self.world.net.clone(), from, endpoints: self.cluster.endpoints() }
    }

    /// From the operator's host to these nodes.
    pub fn operators_ways(&self, endpoints: Vec<String>) -> Endpoints {
        let ways = Ways { endpoints, ..self.ways(self.operator) };
        self.world.within(self.operator, || ways.open())
    }

    /// The client library on the operator's host. Its calls are not in the history: it must change
    /// nothing but the membership.
    pub fn operator(&self) -> Client {
        let options = Options {
            timeout: Duration::from_secs(8),
            attempt_timeout: Duration::from_secs(2),
            ..Options::default()
        };
        let endpoints = self.operators_ways(self.cluster.endpoints());
        Client::over(endpoints, options).expect("there are endpoints")
    }

    fn ended(&mut self, exit: Exit) -> Result<(), Broken> {
        let Exit { host, code, why } = exit;
        let Some(at) = self.cluster.at(host) else {
            let site = self.sites.iter().position(|site| site.agent == Some(host));
            if let (Some(site), true) = (site, why.starts_with(site::TAKEN)) {
                self.fault(format!("the agent of {} has ended: {why}", self.sites[site].worker));
                self.begin_to_boot(site);
                return Ok(());
            }
            return Err(format!("{} ended: {why}", self.world.name(host)));
        };
        let kept = if why == STOPPED { usize::MAX } else { 0 };
        self.cluster.kill(&mut self.world, at, kept, false);
        let seat = &mut self.cluster.seats[at];
        let node = seat.id;
        self.witness.ended(node);
        let expected = match (code, seat.may_end) {
            (None, _) if why == STOPPED => true,
            (Some(FATAL_EXIT), _) if seat.disk_fails => true,
            (None, Some("it was removed" | "it lost its disk")) => {
                seat.life = Life::Gone;
                true
            }
            _ => false,
        };
        if expected {
            self.recorder.fault(format!("node {node} has ended: {why}"));
            return Ok(());
        }
        self.recorder.put(|at| match code {
            Some(DISAGREES_EXIT) => Record::Differs { at, node, why: why.clone() },
            _ => Record::Ended { at, node, code: code.unwrap_or(1) },
        });
        Err(format!("node {node} ended by itself: {why}"))
    }

    /// A node goes down, whatever for.
    pub fn kill(&mut self, at: usize, kept: usize, silent: bool) {
        self.cluster.kill(&mut self.world, at, kept, silent);
        self.witness.ended(self.cluster.seats[at].id);
    }

    pub fn start(&mut self, at: usize) {
        self.cluster.start(&mut self.world, at);
    }

    fn look(&mut self) -> Result<(), Broken> {
        if !self.watches_over {
            return Ok(());
        }
        let disks: BTreeMap<u64, SimulatedDisk> =
            self.cluster.seats.iter().map(|seat| (seat.id, seat.first_disk())).collect();
        let sights: Vec<Sight> = self
            .cluster
            .seats
            .iter()
            .filter(|seat| seat.life == Life::Runs && !self.world.is_paused(seat.host))
            .filter_map(|seat| Sight::of(seat.id, seat.starts, seat.node()?, seat.disk.clone()))
            .collect();
        let mut news = Vec::new();
        let looked = self.witness.look(&sights, &disks, &mut news);
        self.trace.note(self.world.now(), &news);
        for message in self.witness.tables.changes() {
            let events = message.events.iter();
            for held in
                events.filter(|e| e.r#type == "reclaimed").filter_map(|e| e.allocation.as_ref())
            {
                self.sites.iter().try_for_each(|site| site.kernel.is_over(held))?;
            }
            self.recorder.put(|at| Record::Watched { at, watcher: THE_LOG, message });
        }
        looked
    }
}

/// Something that is under way.
#[derive(Debug)]
pub struct Errand<T>(Rc<RefCell<Option<T>>>);

impl<T> Default for Errand<T> {
    fn default() -> Self {
        Errand(Rc::default())
    }
}

impl<T> Clone for Errand<T> {
    fn clone(&self) -> Self {
        Errand(self.0.clone())
    }
}

impl<T> Errand<T> {
    /// What came of it, once it is over.
    pub fn take(&mut self) -> Option<T> {
        self.0.borrow_mut().take()
    }
}
