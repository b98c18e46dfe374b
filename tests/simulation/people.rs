//! Clients and watchers, a few to a host.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::future::{LocalBoxFuture, join_all};
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use crate::caller::{Caller, Endpoints};
use crate::sim::Sim;
use crate::watcher::Watcher;
use crate::workload::{Actor, HOT, WORKLOADS};
use crate::world::HostId;

const CLIENT_HOSTS: u32 = 3;
const WATCHER_HOSTS: u32 = 2;

/// Up to where each watcher was told.
pub type Told = Vec<Arc<AtomicU64>>;

/// What somebody does with the ways to the nodes.
type Work = Box<dyn FnOnce(Endpoints) -> LocalBoxFuture<'static, ()>>;

fn start_together(sim: &mut Sim, host: HostId, work: Vec<Work>) {
    let ways = sim.ways(host);
    sim.world.start(host, || {
        Box::pin(async move {
            join_all(work.into_iter().map(|work| work(ways.open()))).await;
            "nobody is left".to_string()
        })
    });
}

/// Clients at their workloads, one of each and then again.
pub fn start_clients(sim: &mut Sim) {
    let mut work: Vec<Vec<Work>> = (0..CLIENT_HOSTS).map(|_| Vec::new()).collect();
    let hosts: Vec<_> =
        (0..CLIENT_HOSTS).map(|i| sim.world.add_host(&format!("clients{i}"))).collect();
    for number in 0..sim.plan.clients {
        let me = sim.fresh_process();
        let workload = &WORKLOADS[number as usize % WORKLOADS.len()];
        sim.fault(format!("process {me} is a client: {}", workload.name));
        let at = (number % CLIENT_HOSTS) as usize;
        let rng = StdRng::seed_from_u64(sim.plan.seed ^ (u64::from(me) << 32));
        let (recorder, pace) = (sim.recorder.clone(), sim.plan.pace);
        work[at].push(Box::new(move |ways| {
            Box::pin(workload.run(Actor::new(recorder, me, ways, rng), pace))
        }));
    }
    for (host, work) in hosts.iter().zip(work) {
        start_together(sim, *host, work);
    }
    sim.clients.extend(hosts);
}

/// One of everything for each node, and one of the hot worker.
pub fn start_watchers(sim: &mut Sim) -> Told {
    let hosts: Vec<_> =
        (0..WATCHER_HOSTS).map(|i| sim.world.add_host(&format!("watchers{i}"))).collect();
    let mut work: Vec<Vec<Work>> = (0..WATCHER_HOSTS).map(|_| Vec::new()).collect();
    let mut all = Told::new();
    for number in 0..=sim.plan.nodes as u32 {
        let worker = if u64::from(number) == sim.plan.nodes { HOT } else { "" }.to_string();
        let told = Arc::new(AtomicU64::new(0));
        let recorder = sim.recorder.clone();
        let watcher = Watcher { recorder: recorder.clone(), number, worker, told: told.clone() };
        all.push(told);
        let at = (number % WATCHER_HOSTS) as usize;
        work[at].push(Box::new(move |ways| {
            Box::pin(watcher.follow(Caller::new(recorder, 0, ways, number as usize)))
        }));
    }
    for (host, work) in hosts.iter().zip(work) {
        start_together(sim, *host, work);
    }
    sim.clients.extend(hosts);
    all
}

/// Who was not told all up to there.
pub fn behind(told: &Told, revision: u64) -> Vec<String> {
    let told = told.iter().map(|told| told.load(Ordering::Acquire)).enumerate();
    let behind = told.filter(|(_, told)| *told < revision);
    behind.map(|(watcher, told)| format!("watcher {watcher} is at {told}")).collect()
}
