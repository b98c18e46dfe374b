//! Nothing is held by two at once: by intervals, without a model.
//!
//! Between two sights of one grant it was held all the time: a (name, token) names one grant, and
//! its ports change by swaps alone, which are counted. So what is *certainly* held is the span from
//! the end of the first call that saw it to the beginning of the last one. Where neither a timer nor
//! an agent can take it, that goes on until somebody begins a call that may. Two such spans of two
//! grants on one port must not overlap; on a GPU they must fit. O(n log n), at any length.
//!
//! Where instances really listen, a port must not be certainly somebody's while the process of
//! another one listens on it, unless an operator forced that one out.

use std::collections::BTreeMap;

use portwarden::api::meaning::Request;
use portwarden::proto::v1;

use super::known;
use crate::history::{End, History, Nanos, Op, Record};

/// By how much later the end of a process may be noticed.
const SOCKET_SLACK: Nanos = 300_000_000;

/// A span in which a grant certainly holds something.
#[derive(Debug, Clone, PartialEq)]
struct Span {
    from: Nanos,
    until: Nanos,
    name: String,
    token: u64,
    /// Of a GPU.
    bytes: u64,
    exclusive: bool,
}

/// A port, or a GPU, of a worker.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Thing {
    Port(String, u32),
    Gpu(String, u32),
}

pub fn check(history: &History) -> Vec<String> {
    let spans = spans(history);
    let usable = usable(history);
    let mut broken = Vec::new();
    for (thing, spans) in &spans {
        match thing {
            Thing::Port(worker, port) => {
                broken.extend(overlaps(&format!("port {port} of {worker}"), spans));
            }
            Thing::Gpu(worker, index) => {
                let usable = usable.get(thing).copied();
                broken.extend(overfull(&format!("GPU {index} of {worker}"), spans, usable));
            }
        }
    }
    broken.extend(sockets(history, &spans));
    broken
}

fn spans(history: &History) -> BTreeMap<Thing, Vec<Span>> {
    let with_agents = known::workers_with_agents(history);
    let enders = enders(history);
    let mut held: BTreeMap<(Thing, String, u64, u32), Span> = BTreeMap::new();
    for known::Sight { op, allocation } in known::sights(history) {
        let firm = known::is_firm(allocation, with_agents.contains(&allocation.worker));
        let mine = enders.get(allocation.name.as_str()).map_or(&[][..], Vec::as_slice);
        let ends = mine.iter().filter(|ender| ends(ender, allocation)).map(|ender| ender.invoked);
        let until = match firm {
            true => ends.min().unwrap_or(Nanos::MAX).max(op.invoked),
            false => op.invoked,
        };
        for (thing, bytes, exclusive) in things(allocation) {
            let (name, token) = (allocation.name.clone(), allocation.token);
            let key = (thing, name.clone(), token, allocation.swaps);
            let span = Span { from: op.returned, until, name, token, bytes, exclusive };
            let known = held.entry(key).or_insert(span);
            known.from = known.from.min(op.returned);
            known.until = known.until.max(until);
        }
    }
    let mut by_thing: BTreeMap<Thing, Vec<Span>> = BTreeMap::new();
    for ((thing, ..), span) in held.into_iter().filter(|(_, span)| span.from < span.until) {
        by_thing.entry(thing).or_default().push(span);
    }
    by_thing.values_mut().for_each(|spans| spans.sort_by_key(|span| span.from));
    by_thing
}

fn things(allocation: &v1::Allocation) -> impl Iterator<Item = (Thing, u64, bool)> + '_ {
    let worker = &allocation.worker;
    let ports = allocation.ports.iter();
    let ports = ports.map(move |port| (Thing::Port(worker.clone(), port.number), 0, true));
    ports.chain(
        allocation.gpus.iter().map(move |gpu| {
            (Thing::Gpu(worker.clone(), gpu.index), gpu.memory_bytes, gpu.exclusive)
        }),
    )
}

/// By name: the calls after which it is not certain any more who holds what.
fn enders(history: &History) -> BTreeMap<&str, Vec<&Op>> {
    let mut enders: BTreeMap<&str, Vec<&Op>> = BTreeMap::new();
    let mut removals = Vec::new();
    for op in history.ops.iter().filter(|op| op.end != End::Fail) {
        match &op.request {
            Request::Release(r) => enders.entry(&r.name).or_default().push(op),
            Request::ReportConflict(r) => enders.entry(&r.name).or_default().push(op),
            Request::Confirm(r) if r.lease != 0 => enders.entry(&r.name).or_default().push(op),
            Request::Attach(r) if r.lease != 0 => enders.entry(&r.name).or_default().push(op),
            Request::Remove(r) if r.force.is_some() => removals.push(op),
            _ => {}
        }
    }
    enders.values_mut().for_each(|ops| ops.extend(&removals));
    enders
}

fn ends(op: &Op, allocation: &v1::Allocation) -> bool {
    let loosened = match &op.request {
        Request::Confirm(r) => r.token == allocation.token,
        Request::Attach(r) => r.token == allocation.token,
        _ => false,
    };
    loosened || known::may_free(op, allocation)
}

/// Spans in order of their beginnings, of which no two may overlap.
fn overlaps(what: &str, spans: &[Span]) -> Vec<String> {
    let mut broken = Vec::new();
    let mut longest: Option<&Span> = None;
    for span in spans {
        if let Some(other) = longest
            && other.until > span.from
            && (&other.name, other.token) != (&span.name, span.token)
        {
            broken.push(format!(
                "{what} is held by {} (token {}) and by {} (token {}) at {} ns",
                other.name, other.token, span.name, span.token, span.from
            ));
        }
        if longest.is_none_or(|longest| longest.until < span.until) {
            longest = Some(span);
        }
    }
    broken
}

fn overfull(what: &str, spans: &[Span], usable: Option<u64>) -> Vec<String> {
    let mut broken = Vec::new();
    let mut current: Vec<&Span> = Vec::new();
    for span in spans {
        current.retain(|other| other.until > span.from);
        current.push(span);
        let names = || current.iter().map(|span| span.name.as_str()).collect::<Vec<_>>().join(", ");
        let held: u64 = current.iter().map(|span| span.bytes).sum();
        if current.len() > 1 && current.iter().any(|span| span.exclusive) {
            broken.push(format!("{what} is held exclusively, and by {}", names()));
        } else if usable.is_some_and(|usable| held > usable) {
            broken.push(format!("{what}: {held} bytes are held by {}", names()));
        }
    }
    broken
}

/// Memory of each GPU, as far as it was told: the most that was.
fn usable(history: &History) -> BTreeMap<Thing, u64> {
    let mut usable = BTreeMap::new();
    for op in &history.ops {
        let Request::Register(r) = &op.request else { continue };
        for gpu in r.spec.iter().flat_map(|spec| &spec.gpus) {
            let known = usable.entry(Thing::Gpu(r.name.clone(), gpu.index)).or_insert(0);
            *known = gpu.memory_bytes.max(*known);
        }
    }
    usable
}

/// Who listens where really.
struct Socket<'a> {
    from: Nanos,
    until: Nanos,
    name: &'a str,
    token: u64,
    thing: Thing,
}

fn sockets(history: &History, spans: &BTreeMap<Thing, Vec<Span>>) -> Vec<String> {
    let mut broken = Vec::new();
    let enders = enders(history);
    for Socket { from, until, name, token, thing } in listening(history) {
        let forced = enders.get(name).into_iter().flatten().filter_map(|op| match &op.request {
            Request::Release(r) => {
                matches!(r.authority, Some(v1::release_request::Authority::Force(_)))
                    .then_some(op.invoked)
            }
            Request::Remove(_) => Some(op.invoked),
            _ => None,
        });
        let until = forced.min().unwrap_or(until).min(until);
        for span in spans.get(&thing).into_iter().flatten() {
            let another = (span.name.as_str(), span.token) != (name, token);
            if another && span.from + SOCKET_SLACK < until && from < span.until {
                broken.push(format!(
                    "{thing:?} was {}'s (token {}) while {name} (token {token}) listened on it",
                    span.name, span.token
                ));
            }
        }
    }
    broken
}

fn listening(history: &History) -> Vec<Socket<'_>> {
    let mut sockets: Vec<Socket> = Vec::new();
    for record in &history.records {
        match record {
            Record::Listens { at, name, token, worker, port } => sockets.push(Socket {
                from: *at,
                until: Nanos::MAX,
                name,
                token: *token,
                thing: Thing::Port(worker.clone(), *port),
            }),
            Record::Closed { at, name, token, worker, port } => {
                let thing = Thing::Port(worker.clone(), *port);
                let open = sockets.iter_mut().rev().find(|socket| {
                    (socket.name, socket.token, &socket.thing) == (name.as_str(), *token, &thing)
                });
                if let Some(socket) = open {
                    socket.until = *at;
                }
            }
            _ => {}
        }
    }
    sockets
}
