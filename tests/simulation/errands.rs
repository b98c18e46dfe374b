//! Changes that take their time and go on beside everything else: nodes that are replaced, machines
//! that boot.

use std::time::Duration;

use portwarden::api::meaning::Request;
use portwarden::client::Client;
use portwarden::node::NodeId;
use portwarden::proto::v1;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use tokio::time::sleep;

use crate::caller::{Caller, Ended};
use crate::cluster::Life;
use crate::sim::{Broken, Errand, Sim};
use crate::site::{self, Starter};

const PAUSE: Duration = Duration::from_millis(300);

/// What is under way, and what is to be done when it is over.
#[derive(Debug)]
pub enum Pending {
    /// The new member is a voter, and the old one is none any more.
    Replace { old: usize, done: Errand<()> },
    /// The table knows the new boot of a machine.
    Boot { site: usize, done: Errand<()> },
}

impl Sim {
    pub fn look_after_errands(&mut self) -> Result<(), Broken> {
        for mut pending in std::mem::take(&mut self.pending) {
            let over = match &mut pending {
                Pending::Replace { done, .. } | Pending::Boot { done, .. } => done.take(),
            };
            match (over, pending) {
                (None, pending) => self.pending.push(pending),
                (Some(()), Pending::Replace { old, .. }) => {
                    self.kill(old, 0, false);
                    self.cluster.seats[old].life = Life::Gone;
                    let id = self.cluster.seats[old].id;
                    self.fault(format!("node {id} is replaced"));
                }
                (Some(()), Pending::Boot { site, .. }) => {
                    self.sites[site].booting = false;
                    self.start_agent(site);
                    self.start_instances(site);
                }
            }
        }
        Ok(())
    }

    /// A running node that may be replaced now. One at a time, and never the last of the first ones:
    /// clients know no others.
    pub fn replaceable(&self, rng: &mut StdRng) -> Option<usize> {
        let replacing =
            self.pending.iter().any(|pending| matches!(pending, Pending::Replace { .. }));
        let gone = self.cluster.seats.iter().filter(|seat| seat.life == Life::Gone).count();
        if replacing || gone + 2 > self.plan.nodes as usize {
            return None;
        }
        let is_free = |at: &usize| self.cluster.seats[*at].may_end.is_none();
        self.cluster.running().filter(is_free).choose(rng)
    }

    /// A new node that asks to be taken in; its place.
    pub fn take_in(&mut self) -> Option<usize> {
        let through = self.cluster.running().find_map(|at| {
            let seat = &self.cluster.seats[at];
            (seat.may_end.is_none() && !seat.disk_fails && seat.node().is_some()).then_some(seat.id)
        })?;
        let id = self.fresh_id();
        let new = self.cluster.add(&mut self.world, id, through);
        self.start(new);
        Some(new)
    }

    pub fn begin_to_replace(&mut self, old: usize, new: usize) {
        let (gone, here) = (self.cluster.seats[old].id, self.cluster.seats[new].id);
        self.cluster.seats[old].may_end.get_or_insert("it was removed");
        let client = self.operator();
        let done = self.begin_to_operate(replaced(client, gone, here));
        self.pending.push(Pending::Replace { old, done });
    }

    pub fn start_agent(&mut self, at: usize) {
        let site = &self.sites[at];
        if site.booting {
            return;
        }
        let Some(host) = site.agent.filter(|host| !self.world.runs(*host)) else { return };
        let (kernel, worker) = (site.kernel.clone(), site.worker.clone());
        let ways = self.ways(host);
        let seed = self.plan.seed ^ self.fresh_id();
        let agent = async move { site::agent(kernel, worker, ways.open(), seed).await };
        self.world.start(host, || Box::pin(agent));
    }

    pub fn start_instances(&mut self, at: usize) {
        let host = self.sites[at].starter;
        if self.sites[at].booting || self.world.runs(host) {
            return;
        }
        let numbers: Vec<u32> = (0..self.plan.instances).map(|_| self.fresh_process()).collect();
        let ways = self.ways(host);
        let (site, recorder) = (self.sites[at].clone(), self.recorder.clone());
        let seed = self.plan.seed;
        self.world.start(host, || {
            Box::pin(async move {
                let starter = |me: &u32| {
                    let seed = seed ^ (u64::from(*me) << 24);
                    Starter::new(&site, recorder.clone(), ways.open(), *me, seed).work()
                };
                let all = futures::future::join_all(numbers.iter().map(starter));
                futures::join!(all, site::strangers(site.kernel.clone(), seed ^ host as u64));
                "nobody is left".into()
            })
        });
    }

    /// Tells the table of the new boot, as the agent would; then agent and instances are started.
    pub fn begin_to_boot(&mut self, site: usize) {
        let worker = self.sites[site].worker.clone();
        let fields = vec!["identity".to_string()];
        let spec = Some(self.sites[site].spec());
        let update = Request::Update(v1::UpdateRequest { name: worker, spec, fields });
        let caller = self.operators_caller();
        let done = self.begin_to_operate(async move { drop(until_answered(caller, update).await) });
        self.pending.push(Pending::Boot { site, done });
    }

    /// Of calls that are in the history.
    pub fn operators_caller(&self) -> Caller {
        let ways = self.operators_ways(self.cluster.endpoints());
        Caller::new(self.recorder.clone(), 0, ways, 0).with_timeout(Duration::from_secs(2))
    }
}

pub async fn until_answered(mut caller: Caller, request: Request) -> Ended {
    loop {
        match caller.call(request.clone()).await {
            Ended::Lost => sleep(PAUSE).await,
            ended => return ended,
        }
    }
}

/// Promotes one node, and then removes the other, however long that takes.
async fn replaced(client: Client, old: NodeId, new: NodeId) {
    while client.member_promote(new).await.is_err() {
        sleep(PAUSE).await;
    }
    while client.member_remove(old, false).await.is_err() {
        sleep(PAUSE).await;
    }
}
