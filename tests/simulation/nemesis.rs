//! What is done to the cluster while everybody works: chosen and timed by the seed.
//!
//! A [`Kind`] is a name and a function that begins the fault and returns what it did, and how it
//! ends. To add one is to add a line to [`KINDS`] and that function. Several may be under way at
//! once.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, IteratorRandom as _};
use rand::{Rng as _, SeedableRng as _};

use crate::cluster::Life;
use crate::sim::{Ambush, Broken, Sim};
use crate::world::HostId;
use crate::world::net::Quality;

type End = Box<dyn FnOnce(&mut Sim)>;
/// `None` where it cannot be now.
type Begin = fn(&mut Sim, &mut StdRng) -> Option<(String, End)>;

pub struct Kind {
    pub name: &'static str,
    begin: Begin,
    /// How often it is chosen, beside the others.
    weight: u32,
}

pub const KINDS: &[Kind] = &[
    Kind { name: "kill", begin: kill_one, weight: 3 },
    Kind { name: "kill-leader", begin: kill_leader, weight: 3 },
    Kind { name: "kill-majority", begin: kill_majority, weight: 2 },
    Kind { name: "kill-all", begin: kill_all, weight: 1 },
    Kind { name: "power", begin: power, weight: 2 },
    Kind { name: "flap", begin: flap, weight: 2 },
    Kind { name: "ambush", begin: ambush, weight: 2 },
    Kind { name: "restart", begin: restart, weight: 1 },
    Kind { name: "pause", begin: pause, weight: 2 },
    Kind { name: "pause-leader", begin: pause_leader, weight: 3 },
    Kind { name: "isolate-leader", begin: isolate_leader, weight: 3 },
    Kind { name: "halves", begin: halves, weight: 2 },
    Kind { name: "one-way", begin: one_way, weight: 2 },
    Kind { name: "bridge", begin: bridge, weight: 1 },
    Kind { name: "slow-links", begin: slow_links, weight: 2 },
    Kind { name: "lossy", begin: lossy, weight: 2 },
    Kind { name: "slow-disk", begin: slow_disk, weight: 2 },
    Kind { name: "broken-disk", begin: broken_disk, weight: 2 },
    Kind { name: "clock", begin: clock, weight: 1 },
    Kind { name: "move-leader", begin: move_leader, weight: 2 },
    Kind { name: "replace", begin: replace, weight: 1 },
    Kind { name: "lost-disk", begin: lost_disk, weight: 1 },
    Kind { name: "kill-agent", begin: kill_agent, weight: 1 },
    Kind { name: "pause-agent", begin: pause_agent, weight: 1 },
    Kind { name: "cut-site", begin: cut_site, weight: 2 },
    Kind { name: "orphans", begin: orphans, weight: 1 },
    Kind { name: "reboot", begin: reboot, weight: 1 },
];

/// When which fault begins, and how long it lasts.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    pub at: Duration,
    pub lasts: Duration,
    pub kind: usize,
    /// Of what else it chooses.
    pub seed: u64,
}

/// Faults over so long a time, of some kinds each time; the last ones end before it is over.
pub fn plan(rng: &mut StdRng, over: Duration) -> Vec<Planned> {
    let count = rng.random_range(3..=12);
    let kinds: Vec<usize> = (0..KINDS.len()).choose_multiple(rng, count);
    // Some runs are beaten without a pause, some are left alone for a while.
    let pause_max = *[600, 2_000, 5_000].choose(rng).unwrap_or(&2_000);
    let lasts_max = *[1_000, 4_000, 12_000].choose(rng).unwrap_or(&4_000);
    let mut plan = Vec::new();
    let mut at = Duration::from_millis(rng.random_range(500..3_000));
    while at < over {
        let chosen = kinds.choose_weighted(rng, |kind| KINDS[*kind].weight);
        let Ok(kind) = chosen.copied() else { break };
        let lasts = Duration::from_millis(rng.random_range(200..lasts_max)).min(over - at);
        plan.push(Planned { at, lasts, kind, seed: rng.random() });
        at += Duration::from_millis(rng.random_range(100..pause_max));
    }
    plan
}

/// Faults as planned, until the time is over.
pub fn torment(sim: &mut Sim) -> Result<(), Broken> {
    let began = sim.now();
    let over = Duration::from_secs(sim.plan.seconds);
    let mut next = sim.plan.faults.clone().into_iter().peekable();
    let mut ends: Vec<(Duration, End)> = Vec::new();
    while sim.now() - began < over {
        sim.step()?;
        let now = sim.now() - began;
        let (due, later): (Vec<_>, _) = ends.into_iter().partition(|(at, _)| *at <= now);
        ends = later;
        due.into_iter().for_each(|(_, end)| end(sim));
        if let Some(planned) = next.next_if(|planned| planned.at <= now) {
            let kind = &KINDS[planned.kind];
            let mut rng = StdRng::seed_from_u64(planned.seed);
            if let Some((what, end)) = (kind.begin)(sim, &mut rng) {
                sim.fault(format!("{}: {what}", kind.name));
                let name = kind.name;
                let end = move |sim: &mut Sim| {
                    end(sim);
                    sim.fault(format!("{name}: over ({what})"));
                };
                ends.push((now + planned.lasts, Box::new(end)));
            }
        }
    }
    ends.into_iter().for_each(|(_, end)| end(sim));
    Ok(())
}

// Processes.

fn ids(sim: &Sim, nodes: &[usize]) -> String {
    let ids: Vec<_> = nodes.iter().map(|at| sim.cluster.seats[*at].id.to_string()).collect();
    format!("nodes {}", ids.join(", "))
}

fn start_again(nodes: Vec<usize>) -> End {
    Box::new(move |sim| {
        for at in nodes {
            if let Life::Down { .. } = sim.cluster.seats[at].life {
                sim.start(at);
            }
        }
    })
}

/// Of what a disk had not flushed: nothing, some or all of it.
fn kept(sim: &Sim, rng: &mut StdRng, at: usize) -> usize {
    let pending = sim.cluster.seats[at].disk.pending();
    match rng.random_range(0..3) {
        0 => 0,
        1 => pending,
        _ => rng.random_range(0..=pending),
    }
}

fn kill(sim: &mut Sim, rng: &mut StdRng, nodes: Vec<usize>) -> Option<(String, End)> {
    for at in &nodes {
        let kept = kept(sim, rng, *at);
        sim.kill(*at, kept, false);
    }
    (!nodes.is_empty()).then(|| (ids(sim, &nodes), start_again(nodes)))
}

fn some(sim: &Sim, rng: &mut StdRng, count: usize) -> Vec<usize> {
    let mut nodes = sim.cluster.running().choose_multiple(rng, count);
    nodes.sort_unstable();
    nodes
}

fn majority(sim: &Sim) -> usize {
    sim.plan.nodes as usize / 2 + 1
}

fn kill_one(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let nodes = some(sim, rng, 1);
    kill(sim, rng, nodes)
}

fn kill_leader(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let leader = sim.cluster.leader()?;
    kill(sim, rng, vec![leader])
}

fn kill_majority(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let nodes = some(sim, rng, majority(sim));
    kill(sim, rng, nodes)
}

fn kill_all(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let nodes: Vec<_> = sim.cluster.running().collect();
    kill(sim, rng, nodes)
}

/// Machines lose power: nobody is told.
fn power(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let count = rng.random_range(1..=majority(sim));
    let nodes = some(sim, rng, count);
    for at in &nodes {
        let kept = kept(sim, rng, *at);
        sim.kill(*at, kept, true);
    }
    (!nodes.is_empty()).then(|| (ids(sim, &nodes), start_again(nodes)))
}

/// Killed and started at once, some at a time: what they had promised a moment ago must hold.
fn flap(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let count = rng.random_range(1..=sim.plan.nodes as usize);
    let nodes = some(sim, rng, count);
    for at in &nodes {
        let kept = kept(sim, rng, *at);
        sim.kill(*at, kept, false);
        sim.start(*at);
    }
    (!nodes.is_empty()).then(|| (ids(sim, &nodes), Box::new(|_: &mut Sim| ()) as End))
}

/// An election, in the middle of which voters are killed and come back.
fn ambush(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let leader = sim.cluster.leader()?;
    sim.kill(leader, 0, false);
    let until = sim.now() + Duration::from_secs(3);
    sim.ambush = Some(Ambush { until, left: rng.random_range(1..=4), rng: rng.clone() });
    Some((ids(sim, &[leader]), start_again(vec![leader])))
}

/// In order, as for an upgrade: the lead is handed over.
fn restart(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let at = *some(sim, rng, 1).first()?;
    sim.cluster.seats[at].ask_to_stop();
    Some((ids(sim, &[at]), start_again(vec![at])))
}

fn go_on(nodes: Vec<HostId>) -> End {
    Box::new(move |sim| nodes.into_iter().for_each(|host| sim.world.pause(host, false)))
}

fn pause_all(sim: &mut Sim, nodes: &[usize]) -> (String, End) {
    let hosts: Vec<_> = nodes.iter().map(|at| sim.cluster.seats[*at].host).collect();
    hosts.iter().for_each(|host| sim.world.pause(*host, true));
    (ids(sim, nodes), go_on(hosts))
}

fn pause(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let count = rng.random_range(1..=majority(sim));
    let nodes = some(sim, rng, count);
    (!nodes.is_empty()).then(|| pause_all(sim, &nodes))
}

fn pause_leader(sim: &mut Sim, _: &mut StdRng) -> Option<(String, End)> {
    let leader = sim.cluster.leader()?;
    Some(pause_all(sim, &[leader]))
}

// Links.

fn cut_between(sim: &mut Sim, pairs: Vec<(HostId, HostId)>) -> End {
    pairs.iter().for_each(|(from, to)| sim.world.net.cut(*from, *to));
    Box::new(move |sim| pairs.iter().for_each(|(from, to)| sim.world.net.mend(*from, *to)))
}

fn both_ways(left: &[HostId], right: &[HostId]) -> Vec<(HostId, HostId)> {
    let pairs = left.iter().flat_map(|a| right.iter().map(move |b| (*a, *b)));
    pairs.flat_map(|(a, b)| [(a, b), (b, a)]).collect()
}

fn isolate_leader(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let leader = sim.cluster.leader()?;
    let host = sim.cluster.seats[leader].host;
    let others: Vec<_> = sim.cluster.hosts().into_iter().filter(|other| *other != host).collect();
    // With some of the clients on its side.
    let mut pairs = both_ways(&[host], &others);
    if rng.random() {
        pairs.extend(both_ways(&[host], &clients_of_others(sim, rng)));
    }
    Some((ids(sim, &[leader]), cut_between(sim, pairs)))
}

fn clients_of_others(sim: &Sim, rng: &mut StdRng) -> Vec<HostId> {
    let count = sim.clients.len() / 2;
    sim.clients.iter().copied().choose_multiple(rng, count)
}

fn halves(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let hosts = sim.cluster.hosts();
    let count = rng.random_range(1..hosts.len());
    let left = hosts.iter().copied().choose_multiple(rng, count);
    let right: Vec<_> = hosts.into_iter().filter(|host| !left.contains(host)).collect();
    let mut pairs = both_ways(&left, &right);
    pairs.extend(both_ways(&left, &clients_of_others(sim, rng)));
    let what = format!("hosts {left:?} and {right:?}");
    Some((what, cut_between(sim, pairs)))
}

/// From some node to some other, or to all others.
fn one_way(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let at = sim.cluster.running().choose(rng)?;
    let host = sim.cluster.seats[at].host;
    let mut others: Vec<_> =
        sim.cluster.hosts().into_iter().filter(|other| *other != host).collect();
    if rng.random() {
        others = others.into_iter().choose_multiple(rng, 1);
    }
    let outward = rng.random();
    let pair = |other: HostId| if outward { (host, other) } else { (other, host) };
    let pairs = others.into_iter().map(pair).collect();
    let what = format!("{}, {}", ids(sim, &[at]), if outward { "out" } else { "in" });
    Some((what, cut_between(sim, pairs)))
}

/// Two halves that only one node can reach.
fn bridge(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let mut hosts = sim.cluster.hosts();
    hosts.remove(rng.random_range(0..hosts.len()));
    let (left, right) = hosts.split_at(hosts.len() / 2);
    let what = format!("hosts {left:?} and {right:?}");
    let pairs = both_ways(left, right);
    Some((what, cut_between(sim, pairs)))
}

fn degrade(sim: &mut Sim, rng: &mut StdRng, quality: Quality) -> Option<(String, End)> {
    let hosts = sim.cluster.hosts();
    let count = rng.random_range(1..=2);
    let bad = hosts.iter().copied().choose_multiple(rng, count);
    let mut others = hosts;
    others.extend(&sim.clients);
    let mut pairs = both_ways(&bad, &others);
    pairs.retain(|(from, to)| from != to);
    pairs.iter().for_each(|(from, to)| sim.world.net.set_quality(*from, *to, quality));
    let healthy = sim.plan.network;
    let end = move |sim: &mut Sim| {
        pairs.iter().for_each(|(from, to)| sim.world.net.set_quality(*from, *to, healthy));
    };
    Some((format!("hosts {bad:?}: {quality:?}"), Box::new(end)))
}

fn slow_links(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let least = Duration::from_millis(rng.random_range(5..300));
    let quality = Quality { delay_min: least, delay_max: least * 3, loss: 0.0 };
    degrade(sim, rng, quality)
}

fn lossy(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let quality = Quality { loss: rng.random_range(0.02..0.4), ..sim.plan.network };
    degrade(sim, rng, quality)
}

// Disks and clocks.

fn slow_disk(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let count = rng.random_range(1..=majority(sim));
    let nodes = some(sim, rng, count);
    let hangs = rng.random_bool(0.2);
    let latency = if hangs { 2_000..60_000 } else { 10..900 };
    let latency = Duration::from_millis(rng.random_range(latency));
    let disk = |sim: &Sim, at: usize| sim.cluster.seats[at].disk.clone();
    nodes.iter().for_each(|at| disk(sim, *at).set_latency(latency));
    let what = format!("{}: {latency:?}", ids(sim, &nodes));
    let end = move |sim: &mut Sim| {
        let healthy = sim.plan.settings.disk_latency;
        nodes.iter().for_each(|at| disk(sim, *at).set_latency(healthy));
    };
    Some((what, Box::new(end)))
}

/// The next write fails, and the process ends.
fn broken_disk(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let at = *some(sim, rng, 1).first()?;
    sim.cluster.seats[at].disk_fails = true;
    sim.cluster.seats[at].disk.fail();
    let end = move |sim: &mut Sim| {
        sim.kill(at, 0, false);
        sim.cluster.seats[at].disk_fails = false;
        start_again(vec![at])(sim);
    };
    Some((ids(sim, &[at]), Box::new(end)))
}

/// The clock on the wall of a node goes wrong, by a moment or by years. Only people read it.
fn clock(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let at = *some(sim, rng, 1).first()?;
    let most = *[10, 100_000, 300_000_000].choose(rng)?;
    let skew = rng.random_range(-most..most);
    let host = sim.cluster.seats[at].host;
    sim.world.set_wall_skew(host, skew);
    let end = move |sim: &mut Sim| sim.world.set_wall_skew(host, 0);
    Some((format!("{} by {skew} s", ids(sim, &[at])), Box::new(end)))
}

// The membership.

fn move_leader(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let to = sim.cluster.seats[*some(sim, rng, 1).first()?].id;
    let client = sim.operator();
    sim.begin_to_operate(async move { client.transfer_leader(to).await.map(drop) });
    Some((format!("to node {to}"), Box::new(|_| ())))
}

/// A new node joins, and an old one is removed.
fn replace(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let old = sim.replaceable(rng)?;
    let new = sim.take_in()?;
    let what = format!("{} by {}", ids(sim, &[old]), ids(sim, &[new]));
    sim.begin_to_replace(old, new);
    Some((what, Box::new(|_| ())))
}

/// A node loses its disk and is started anew under its id: it must be refused, and is replaced.
fn lost_disk(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let old = sim.replaceable(rng)?;
    sim.cluster.seats[old].may_end = Some("it lost its disk");
    let Some(new) = sim.take_in() else {
        sim.cluster.seats[old].may_end = None;
        return None;
    };
    sim.kill(old, 0, false);
    sim.cluster.wipe(old);
    sim.witness.monotonic.wiped(sim.cluster.seats[old].id);
    sim.start(old);
    let what = format!("{} by {}", ids(sim, &[old]), ids(sim, &[new]));
    sim.begin_to_replace(old, new);
    Some((what, Box::new(|_| ())))
}

// Workers.

fn site(sim: &Sim, rng: &mut StdRng) -> Option<usize> {
    (0..sim.sites.len()).filter(|at| sim.sites[*at].agent.is_some()).choose(rng)
}

fn kill_agent(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let at = site(sim, rng)?;
    let host = sim.sites[at].agent?;
    sim.world.kill(host);
    let what = format!("of {}", sim.sites[at].worker);
    Some((what, Box::new(move |sim| sim.start_agent(at))))
}

fn pause_agent(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let at = site(sim, rng)?;
    let host = sim.sites[at].agent?;
    sim.world.pause(host, true);
    Some((format!("of {}", sim.sites[at].worker), go_on(vec![host])))
}

/// A machine with live instances cannot reach the nodes.
fn cut_site(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let at = (0..sim.sites.len()).choose(rng)?;
    let hosts: Vec<_> = sim.sites[at].agent.into_iter().chain([sim.sites[at].starter]).collect();
    let pairs = both_ways(&hosts, &sim.cluster.hosts());
    Some((sim.sites[at].worker.clone(), cut_between(sim, pairs)))
}

/// Whoever started instances is killed; they live on.
fn orphans(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let at = site(sim, rng)?;
    sim.world.kill(sim.sites[at].starter);
    let lives = Duration::from_millis(rng.random_range(1_000..10_000));
    sim.sites[at].kernel.all_end_in(lives);
    let what = sim.sites[at].worker.clone();
    Some((what, Box::new(move |sim| sim.start_instances(at))))
}

fn reboot(sim: &mut Sim, rng: &mut StdRng) -> Option<(String, End)> {
    let at = site(sim, rng)?;
    let agent = sim.sites[at].agent?;
    if std::mem::replace(&mut sim.sites[at].booting, true) {
        return None;
    }
    sim.world.kill(agent);
    sim.world.kill(sim.sites[at].starter);
    sim.sites[at].kernel.reboot();
    let what = sim.sites[at].worker.clone();
    Some((what, Box::new(move |sim| sim.begin_to_boot(at))))
}
