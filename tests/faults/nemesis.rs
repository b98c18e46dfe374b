//! What is done to the cluster while clients work: faults, chosen and timed by the seed.
//!
//! A [`Kind`] is a name and a function that begins the fault and returns how it ends. To add one is
//! to add a line to [`KINDS`] and that function. Several may be under way at once.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use itertools::Itertools as _;
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, IteratorRandom as _, SliceRandom as _};

use crate::forgetting::Cut;
use crate::rig::net::{cut, lose};
use crate::rig::{Life, Rig};

/// How a fault ends.
pub type End = Box<dyn FnOnce(&mut Rig) + Send>;
/// `None` where it cannot be now.
type Begin = fn(&mut Rig, &mut StdRng, &Clients) -> Option<(String, End)>;

pub struct Kind {
    pub name: &'static str,
    begin: Begin,
}

/// Addresses of those who are not nodes: they are on one side of a partition too.
pub type Clients = Vec<Ipv4Addr>;

pub const KINDS: &[Kind] = &[
    Kind { name: "kill", begin: kill_one },
    Kind { name: "kill-majority", begin: kill_majority },
    Kind { name: "kill-all", begin: kill_all },
    Kind { name: "pause", begin: pause },
    Kind { name: "isolate", begin: isolate },
    Kind { name: "halves", begin: halves },
    Kind { name: "ring", begin: ring },
    Kind { name: "one-way", begin: one_way },
    Kind { name: "bridge", begin: bridge },
    Kind { name: "lossy", begin: lossy },
    Kind { name: "slow-link", begin: slow_link },
    Kind { name: "slow-disk", begin: slow_disk },
    Kind { name: "full-disk", begin: full_disk },
    Kind { name: "forget", begin: forget },
    Kind { name: "torn", begin: torn },
    Kind { name: "clock", begin: clock },
    Kind { name: "restart", begin: rolling_restart },
    Kind { name: "move-leader", begin: move_leader },
    Kind { name: "replace", begin: replace },
    Kind { name: "cut-worker", begin: cut_worker },
    Kind { name: "kill-agent", begin: kill_agent },
];

/// What no system can stand: only by name, to see that the checker finds what it breaks.
pub const UNFAIR: &[Kind] = &[Kind { name: "lie", begin: lie }];

pub fn by_name(name: &str) -> Result<&'static Kind, String> {
    let all = || KINDS.iter().chain(UNFAIR);
    let known = all().map(|kind| kind.name).join(", ");
    let found = all().find(|kind| kind.name == name);
    found.ok_or_else(|| format!("no nemesis {name:?}; there are {known}"))
}

/// When which fault begins, and how long it lasts.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    pub at: Duration,
    pub lasts: Duration,
    pub kind: &'static str,
    /// Of what else it chooses.
    pub seed: u64,
}

/// Faults over so long a time; the last ones end before it is over.
pub fn plan(rng: &mut StdRng, kinds: &[&'static Kind], over: Duration) -> Vec<Planned> {
    let mut plan = Vec::new();
    let mut at = Duration::from_millis(rng.random_range(1_000..3_000));
    while let Some(kind) = kinds.choose(rng) {
        let lasts = Duration::from_millis(rng.random_range(300..5_000));
        if at + lasts > over {
            break;
        }
        plan.push(Planned { at, lasts, kind: kind.name, seed: rng.random() });
        at += Duration::from_millis(rng.random_range(500..4_500));
    }
    plan
}

impl Kind {
    pub fn begin(&self, rig: &mut Rig, rng: &mut StdRng, clients: &Clients) -> Option<End> {
        let (what, end) = (self.begin)(rig, rng, clients)?;
        rig.recorder.fault(format!("{}: {what}", self.name));
        let name = self.name;
        Some(Box::new(move |rig| {
            end(rig);
            rig.recorder.fault(format!("{name}: over ({what})"));
        }))
    }
}

// Processes.

fn kill(rig: &mut Rig, nodes: Vec<usize>, mut cut: impl FnMut(&mut Rig, usize)) -> (String, End) {
    nodes.iter().for_each(|at| cut(rig, *at));
    let what = ids(rig, &nodes);
    let end = move |rig: &mut Rig| {
        for at in nodes {
            if rig.nodes[at].life == Life::Dead {
                rig.start(at);
            }
        }
    };
    (what, Box::new(end))
}

fn ids(rig: &Rig, nodes: &[usize]) -> String {
    format!("nodes {}", nodes.iter().map(|at| rig.nodes[*at].id).join(", "))
}

fn kill_some(rig: &mut Rig, rng: &mut StdRng, count: usize) -> Option<(String, End)> {
    let nodes = rig.running().into_iter().choose_multiple(rng, count);
    (!nodes.is_empty()).then(|| kill(rig, nodes, |rig, at| rig.kill(at, None)))
}

fn kill_one(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    kill_some(rig, rng, 1)
}

fn kill_majority(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    kill_some(rig, rng, rig.majority())
}

fn kill_all(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    kill_some(rig, rng, rig.nodes.len())
}

fn pause(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let count = rng.random_range(1..=rig.majority());
    let nodes = rig.running().into_iter().choose_multiple(rng, count);
    nodes.iter().for_each(|at| rig.pause(*at));
    let what = ids(rig, &nodes);
    let end = move |rig: &mut Rig| nodes.iter().for_each(|at| rig.go_on(*at));
    (!what.is_empty()).then(|| (what, Box::new(end) as End))
}

/// One after the other, in order.
fn rolling_restart(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let mut nodes = rig.running();
    nodes.shuffle(rng);
    for at in &nodes {
        rig.stop(*at);
        rig.start(*at);
    }
    Some((ids(rig, &nodes), Box::new(|_| ())))
}

/// Power cuts: nodes whose disks forget what was not synced.
fn power_cut(rig: &mut Rig, rng: &mut StdRng, all: bool) -> Option<(String, End)> {
    let forgetful = |at: &usize| rig.nodes[*at].disk.forgets();
    let nodes: Vec<_> = rig.running().into_iter().filter(forgetful).collect();
    let count = rng.random_range(1..=nodes.len().max(1));
    let nodes = nodes.into_iter().choose_multiple(rng, count);
    // All are dead before the first disk forgets.
    nodes.iter().for_each(|at| rig.kill(*at, None));
    let cut = |rig: &mut Rig, at: usize| match all {
        true => rig.nodes[at].disk.cut(Cut::ForgetsAll),
        false => rig.nodes[at].disk.cut(Cut::ForgetsSome(rng)),
    };
    (!nodes.is_empty()).then(|| kill(rig, nodes, cut))
}

fn forget(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    power_cut(rig, rng, true)
}

fn torn(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    power_cut(rig, rng, false)
}

/// Disks answer syncs and do nothing, and then all power is cut at once.
fn lie(rig: &mut Rig, _: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    rig.nodes.iter().for_each(|node| node.disk.lie());
    let end = |rig: &mut Rig| {
        let count = rig.nodes.len();
        (0..count).for_each(|at| rig.kill(at, None));
        (0..count).for_each(|at| rig.nodes[at].disk.cut(Cut::ForgetsAll));
        (0..count).for_each(|at| rig.start(at));
    };
    Some(("every disk".into(), Box::new(end)))
}

// The network.

fn impede(rig: &mut Rig, rules: Vec<String>) -> End {
    static FAULTS: AtomicU64 = AtomicU64::new(0);
    let fault = FAULTS.fetch_add(1, Ordering::Relaxed);
    rig.net.impede(fault, rules);
    Box::new(move |rig| rig.net.relieve(fault))
}

/// Rules of which none lets anything through between two sides.
fn apart(one: &[Ipv4Addr], other: &[Ipv4Addr]) -> Vec<String> {
    let pairs = one.iter().cartesian_product(other);
    pairs.flat_map(|(a, b)| [cut(*a, *b), cut(*b, *a)]).collect()
}

/// One node (often it leads) sees no other one; clients still see it, or only some do.
fn isolate(rig: &mut Rig, rng: &mut StdRng, clients: &Clients) -> Option<(String, End)> {
    let alone = rng.random_range(0..rig.nodes.len());
    let address = rig.nodes[alone].host.address;
    let mut others = rig.addresses();
    others.remove(alone);
    let cut_off = match rng.random_range(0..3) {
        0 => Vec::new(),
        1 => clients.clone(),
        _ => clients.iter().copied().filter(|_| rng.random()).collect(),
    };
    let what =
        format!("node {} from all others and {} clients", rig.nodes[alone].id, cut_off.len());
    others.extend(cut_off);
    Some((what, impede(rig, apart(&[address], &others))))
}

/// Everybody is on one of two sides.
fn halves(rig: &mut Rig, rng: &mut StdRng, clients: &Clients) -> Option<(String, End)> {
    let mut nodes = rig.addresses();
    nodes.shuffle(rng);
    let minority = nodes.split_off(rig.majority());
    let (more, fewer): (Vec<_>, Vec<_>) = clients.iter().copied().partition(|_| rng.random());
    let what = format!("{minority:?} and {} clients from the others", fewer.len());
    let sides = ([nodes, more].concat(), [minority, fewer].concat());
    Some((what, impede(rig, apart(&sides.0, &sides.1))))
}

/// Each node sees a majority, and no two see the same one.
fn ring(rig: &mut Rig, _: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let nodes = rig.addresses();
    let (count, seen) = (nodes.len(), rig.majority() / 2);
    let far = (0..count).array_combinations().filter(|[a, b]: &[usize; 2]| {
        let steps = b - a;
        steps.min(count - steps) > seen
    });
    let rules: Vec<_> = far.flat_map(|[a, b]| apart(&nodes[a..=a], &nodes[b..=b])).collect();
    // Of three nodes each sees both others: a ring without one of its sides is a bridge.
    (!rules.is_empty()).then(|| ("each sees a majority".into(), impede(rig, rules)))
}

/// A node hears others, or is heard by them, and not both.
fn one_way(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let mut nodes = rig.addresses();
    nodes.shuffle(rng);
    let one = nodes.pop()?;
    let deaf: bool = rng.random();
    let others = nodes.iter().take(rng.random_range(1..=nodes.len()));
    let rules = others.map(|other| if deaf { cut(*other, one) } else { cut(one, *other) });
    let rules = rules.collect();
    let what = format!("{one} {}", if deaf { "hears nothing" } else { "is not heard" });
    Some((what, impede(rig, rules)))
}

/// Two sides that see only one node in common.
fn bridge(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let mut nodes = rig.addresses();
    nodes.shuffle(rng);
    let middle = nodes.pop()?;
    let right = nodes.split_off(nodes.len() / 2);
    Some((format!("only {middle} sees both sides"), impede(rig, apart(&nodes, &right))))
}

/// Everything between nodes, and to them, loses packets.
fn lossy(rig: &mut Rig, rng: &mut StdRng, clients: &Clients) -> Option<(String, End)> {
    let percent = rng.random_range(2..25);
    let nodes = rig.addresses();
    let all: Vec<_> = nodes.iter().chain(clients).copied().collect();
    let pairs = nodes.iter().cartesian_product(&all).filter(|(a, b)| a != b);
    let rules = pairs.flat_map(|(a, b)| [lose(*a, *b, percent), lose(*b, *a, percent)]).collect();
    Some((format!("{percent} % of all packets"), impede(rig, rules)))
}

/// What peers say to a node, and it to them over their connections, takes long.
fn slow_link(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let count = rng.random_range(1..=rig.nodes.len());
    let slow = (0..rig.nodes.len()).filter(|at| rig.nodes[*at].proxy.is_some());
    let slow = slow.choose_multiple(rng, count);
    let by = Duration::from_millis(rng.random_range(5..700));
    let set = |rig: &Rig, slow: &[usize], by| {
        let proxies = slow.iter().filter_map(|at| rig.nodes[*at].proxy.as_ref());
        proxies.for_each(|proxy| proxy.slow(by));
    };
    set(rig, &slow, by);
    let what = format!("{by:?} to {}", ids(rig, &slow));
    let none = slow.is_empty();
    let end = move |rig: &mut Rig| set(rig, &slow, Duration::ZERO);
    (!none).then(|| (what, Box::new(end) as End))
}

// The host.

fn slow_disk(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let slow = (0..rig.nodes.len()).filter(|at| rig.nodes[*at].disk.forgets()).choose(rng)?;
    let by = Duration::from_millis(rng.random_range(20..400));
    rig.nodes[slow].disk.slow(by);
    let what = format!("each sync of node {} takes {by:?}", rig.nodes[slow].id);
    Some((what, Box::new(move |rig| rig.nodes[slow].disk.slow(Duration::ZERO))))
}

fn full_disk(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let full = (0..rig.nodes.len()).filter(|at| rig.nodes[*at].disk.is_small()).choose(rng)?;
    let leave = [0, 1 << 20, 8 << 20].choose(rng).copied()?;
    rig.nodes[full].disk.fill(leave);
    let what = format!("{leave} bytes are left to node {}", rig.nodes[full].id);
    let end = move |rig: &mut Rig| {
        rig.nodes[full].disk.make_room();
        rig.look_after();
        if rig.nodes[full].life == Life::Dead {
            rig.start(full);
        }
    };
    Some((what, Box::new(end)))
}

/// The wall clock jumps; the monotonic one does not.
fn clock(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    if !rig.has_faketime() {
        return None;
    }
    let wrong = rng.random_range(0..rig.nodes.len());
    let by: i64 = [-86_400, -3_600, -5, 5, 3_600, 31_536_000].choose(rng).copied()?;
    let id = rig.nodes[wrong].id;
    let path = rig.clock_path(id);
    std::fs::write(&path, format!("{by:+}")).ok()?;
    let end = move |_: &mut Rig| drop(std::fs::write(path, "+0"));
    Some((format!("the clock of node {id} is wrong by {by} s"), Box::new(end)))
}

// Membership, as an operator changes it.

/// Longest that an operator waits here: meanwhile no other fault begins or ends.
const OPERATOR_MAX: &str = "4s";

fn move_leader(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let to = rig.nodes.choose(rng)?.id.to_string();
    let mut moving = rig
        .cli(&["member", "transfer-leader", &to, "--timeout", OPERATOR_MAX])
        .spawn()
        .expect("the command line starts");
    let end = move |rig: &mut Rig| {
        let ended = moving.wait().ok().and_then(|status| status.code());
        rig.recorder.fault(format!("move-leader: ended with {ended:?}"));
    };
    Some((format!("to node {to}"), Box::new(end)))
}

/// A node is removed for good, and another one joins in its place.
fn replace(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let at = rig.running().into_iter().choose(rng)?;
    let id = rig.nodes[at].id;
    // From here on it may end by itself, whatever the operator hears.
    rig.nodes[at].leaving = true;
    let removed = rig
        .cli(&["member", "remove", &id.to_string(), "--timeout", OPERATOR_MAX])
        .status()
        .ok()
        .and_then(|status| status.code());
    match removed {
        Some(0) => rig.replace(at).ok()?,
        Some(6) => {} // nobody knows
        _ => rig.nodes[at].leaving = false,
    }
    let new = rig.nodes[at].id;
    let end = move |rig: &mut Rig| {
        if new != id {
            let mut promote =
                rig.cli(&["member", "promote", &new.to_string(), "--timeout", OPERATOR_MAX]);
            let ended = promote.status().ok().and_then(|status| status.code());
            rig.recorder.fault(format!("replace: promotion of node {new} ended with {ended:?}"));
        }
    };
    Some((format!("node {id} by node {new} ({removed:?})"), Box::new(end)))
}

// Real workers.

/// A worker sees no node, while its instances live.
fn cut_worker(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let worker = rig.site.as_ref()?.workers.choose(rng)?;
    let (name, address) = (worker.name.clone(), worker.host.address);
    let nodes = rig.addresses();
    Some((name, impede(rig, apart(&[address], &nodes))))
}

fn kill_agent(rig: &mut Rig, rng: &mut StdRng, _: &Clients) -> Option<(String, End)> {
    let site = rig.site.as_mut()?;
    let at = rng.random_range(0..site.workers.len());
    site.kill_agent(at);
    let end = move |rig: &mut Rig| {
        if let Some(site) = &mut rig.site {
            site.kill_agent(at); // another fault may have started it
            site.start_agent(at);
        }
    };
    Some((site.workers[at].name.clone(), Box::new(end)))
}

/// At the end of a run: who was removed is replaced, and who joined votes. An error where that
/// cannot be for a minute.
pub fn complete_membership(rig: &mut Rig) -> Result<(), String> {
    let began = std::time::Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        let Some(members) = rig.members() else { continue };
        let mut complete = true;
        for at in 0..rig.nodes.len() {
            let id = rig.nodes[at].id;
            match members.get(&id).map(String::as_str) {
                Some("voter") => rig.nodes[at].leaving = false,
                Some(_) => {
                    complete = false;
                    let id = id.to_string();
                    let _ = rig.cli(&["member", "promote", &id, "--timeout", "10s"]).status();
                }
                None if rig.nodes[at].leaving => {
                    complete = false;
                    rig.replace(at)?;
                }
                // It joins, or waits to.
                None => complete = false,
            }
        }
        if complete {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Err(format!("the membership is not complete: {:?}", rig.members()))
}
