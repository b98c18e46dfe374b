//! Linearizability, with the core itself as the model: in time that is linear in the history, but for
//! what nobody knows.
//!
//! Every answer carries the revision of the table that it speaks of, and each revision is one change:
//! so the order of all changes is known, and need not be searched for. The core is driven through
//! that order. At each revision
//!
//! 1. the change is found: a call that was answered with this revision; else one whose end is
//!    unknown, or something that the system did by itself (a deadline, evidence). It is tried on the
//!    model, and must come to exactly the answer that was recorded, and to exactly the events that
//!    watchers were told of;
//! 2. every read and every repeat that was answered with this revision is answered from the model,
//!    and must be equal;
//! 3. refusals carry no revision. One is in order if the model gives it in *some* state that real
//!    time allows: after all that ended before the call began, before all that began after it ended.
//!    The earliest such state is taken, which leaves the most for those that come after it.
//!
//! *Real time*: what is placed later must not have ended before something that is placed earlier
//! began. It is enough to remember the latest beginning of all that was placed.
//!
//! *What nobody knows*: a change without an answer, at a revision that no watcher was told of, may
//! have been any of several. They are tried in turn, each alternative checked against all later
//! facts. With watchers there is almost always one candidate only: the events name it. Without, what
//! was seen of an allocation at any time names the revisions of its grant and of its last change. The
//! search is bounded by [`TRIES_MAX`]; that it gave up counts as a violation, for nothing is proven.

use std::collections::{BTreeMap, BTreeSet};

use portwarden::api::meaning::{self, Request, Response};
use portwarden::core::{
    Actor, Applied, Command, Ground, InstanceName, Leader, LeaseId, Millis, Origin, Port, Revision,
    State, WorkerName, WorkerPhase, apply, check_invariants,
};
use portwarden::proto::v1;
use tonic::Status;

use super::known;
use crate::history::{End, History, Nanos, Op};

/// Changes that are tried on the model, beyond one for each revision, before it gives up.
const TRIES_MAX: u64 = 1_000_000;
/// The core's invariants are checked from scratch this often: O(table).
const INVARIANTS_EVERY: u64 = 64;

/// What is broken, and what was done.
pub fn check(history: &History) -> (Vec<String>, String) {
    if !history.header.complete {
        let note = "linear: not checked: the history does not begin with an empty table";
        return (Vec::new(), note.into());
    }
    let facts = Facts::new(history);
    Search { facts: &facts, tries: 0, deepest: (0, String::new()) }.run()
}

/// A history by revision.
struct Facts<'a> {
    history: &'a History,
    commands: Vec<Option<Result<Command, Status>>>,
    /// Writes that were answered with a revision; one of them at most made it.
    writes: BTreeMap<u64, Vec<usize>>,
    /// Reads of the table as it is, and of old copies.
    reads: BTreeMap<u64, Vec<usize>>,
    /// What was answered without a revision, by when the call began; and from which revision on it
    /// may have been answered.
    floating: Vec<(usize, u64)>,
    /// The same of those that an old copy may have given, by the least revision that was asked for.
    old: Vec<(usize, u64)>,
    /// What may have been done although nobody was told, by what it is about.
    unknown: BTreeMap<String, Vec<usize>>,
    events: BTreeMap<u64, Vec<v1::WatchEvent>>,
    /// Allocations as this revision left them, by whoever saw them later.
    seen: BTreeMap<u64, Vec<v1::Allocation>>,
    /// Names that this revision granted, of those that anybody ever saw; and all such grants.
    granted: BTreeMap<u64, BTreeSet<String>>,
    grants: BTreeMap<(String, String), BTreeSet<u64>>,
    /// Names that somebody may have given back, or had taken.
    freed: BTreeSet<String>,
    /// By when a revision was there for certain: what makes it began before.
    by: BTreeMap<u64, Nanos>,
    last: u64,
}

impl<'a> Facts<'a> {
    fn new(history: &'a History) -> Facts<'a> {
        let within = Millis(history.header.confirm_within_ms);
        let command = |op: &Op| op.request.command(within).transpose();
        let mut facts = Facts {
            history,
            commands: history.ops.iter().map(command).collect(),
            writes: BTreeMap::new(),
            reads: BTreeMap::new(),
            floating: Vec::new(),
            old: Vec::new(),
            unknown: BTreeMap::new(),
            events: known::events_by_revision(history),
            seen: BTreeMap::new(),
            granted: BTreeMap::new(),
            grants: BTreeMap::new(),
            freed: BTreeSet::new(),
            by: BTreeMap::new(),
            last: 0,
        };
        for (at, op) in history.ops.iter().enumerate() {
            facts.place(at, op);
        }
        let answered = facts.writes.keys().chain(facts.reads.keys()).chain(facts.events.keys());
        facts.last = answered.max().copied().unwrap_or(0);
        for held in known::everything_seen(history) {
            facts.see(held);
        }
        facts.bound_times();
        facts.bound_floating();
        facts.old.sort_by_key(|(_, min)| *min);
        facts
    }

    fn place(&mut self, at: usize, op: &Op) {
        let write = known::is_write(&op.request);
        let revision = match &op.end {
            End::Ok(response) => known::revision(response),
            _ => None,
        };
        match (&op.end, revision) {
            (End::Ok(_), Some(revision)) => {
                let places = if write { &mut self.writes } else { &mut self.reads };
                places.entry(revision).or_default().push(at);
            }
            (End::Ok(Response::KeepAlive(r)), None) if r.ttl_ms == 0 => {}
            (End::Ok(_) | End::Refused { .. }, _) => match known::stale(&op.request) {
                Some(min) => self.old.push((at, min)),
                None => self.floating.push((at, 0)),
            },
            (End::Fail | End::Unknown, _) => {}
        }
        let in_doubt = op.end == End::Unknown || (op.repeats && op.end != End::Fail);
        if let Request::Release(request) = &op.request
            && op.end != End::Fail
        {
            self.freed.insert(request.name.clone());
        }
        if write && in_doubt {
            for subject in subjects(&op.request) {
                self.unknown.entry(subject).or_default().push(at);
            }
        }
    }

    fn see(&mut self, held: &v1::Allocation) {
        let (name, uid) = (held.name.clone(), held.uid.clone());
        self.granted.entry(held.token).or_default().insert(name.clone());
        self.grants.entry((name, uid)).or_default().insert(held.token);
        let seen = self.seen.entry(held.version).or_default();
        let held = known::timeless(held);
        if !seen.contains(&held) {
            seen.push(held);
        }
    }

    /// May a call of unknown end have made this revision, of which nobody was told? What it would have
    /// left must have been seen, or may have gone unseen.
    fn may_be(&self, at: usize, revision: u64) -> bool {
        let op = self.op(at);
        let Request::Allocate(request) = &op.request else { return true };
        request.claims.iter().all(|claim| {
            let of_it = self.grants.get(&(claim.name.clone(), claim.uid.clone()));
            let seen = of_it.is_some_and(|tokens| tokens.contains(&revision));
            let elsewhere = of_it.is_some() && !op.repeats;
            let by_itself = claim.lease != 0 || (!claim.bound && claim.confirm_within_ms != 0);
            seen || (!elsewhere && (by_itself || self.freed.contains(&claim.name)))
        })
    }

    /// From the last revision to the first: the earliest end of anything that saw it or a later one.
    fn bound_times(&mut self) {
        let ops = &self.history.ops;
        let ended = |places: &Vec<usize>| places.iter().map(|at| ops[*at].returned).min();
        let mut by: BTreeMap<u64, Nanos> = BTreeMap::new();
        for (revision, places) in self.writes.iter().chain(&self.reads) {
            let ended = ended(places).unwrap_or(Nanos::MAX);
            by.entry(*revision).and_modify(|at| *at = ended.min(*at)).or_insert(ended);
        }
        for (at, message) in self.history.streams.iter().flat_map(|stream| &stream.messages) {
            for event in &message.events {
                by.entry(event.revision).and_modify(|by| *by = (*at).min(*by)).or_insert(*at);
            }
        }
        let mut earliest = Nanos::MAX;
        for at in by.values_mut().rev() {
            earliest = earliest.min(*at);
            *at = earliest;
        }
        self.by = by;
    }

    fn is_there_by(&self, revision: u64) -> Nanos {
        self.by.range(revision..).next().map_or(Nanos::MAX, |(_, at)| *at)
    }

    /// Not before what was answered before it began.
    fn bound_floating(&mut self) {
        let ops = &self.history.ops;
        let fixed = self.writes.iter().chain(&self.reads);
        let mut ended: Vec<(Nanos, u64)> = fixed
            .flat_map(|(revision, places)| places.iter().map(move |at| (*at, *revision)))
            .filter(|(at, _)| known::stale(&ops[*at].request).is_none())
            .map(|(at, revision)| (ops[at].returned, revision))
            .collect();
        ended.sort_unstable();
        let mut ended = ended.into_iter().peekable();
        let mut least = 0;
        for (at, from) in &mut self.floating {
            while let Some((_, revision)) = ended.next_if(|(at_, _)| *at_ < ops[*at].invoked) {
                least = least.max(revision);
            }
            *from = least;
        }
    }

    fn op(&self, at: usize) -> &Op {
        &self.history.ops[at]
    }

    /// What a call comes to in a state; the state after it, and its events, with it.
    fn outcome(&self, at: usize, state: &State) -> (Result<Response, Status>, State, Told) {
        let op = self.op(at);
        match &self.commands[at] {
            None => (op.request.read(state), state.clone(), Told::default()),
            Some(Err(status)) => (Err(status.clone()), state.clone(), Told::default()),
            Some(Ok(command)) => {
                let (applied, after, events) = tried(state, command);
                (op.request.answer(applied, &after), after, events)
            }
        }
    }

    /// Is this what was recorded?
    fn agrees(&self, at: usize, answer: &Result<Response, Status>) -> bool {
        match (&self.op(at).end, answer) {
            (End::Ok(recorded), Ok(answer)) => {
                known::timeless_response(recorded) == known::timeless_response(answer)
            }
            (End::Refused { code, message }, Err(status)) => {
                *code == status.code() as i32 && message == status.message()
            }
            _ => false,
        }
    }
}

/// The events of one change, as watchers hear of them.
type Told = Vec<v1::WatchEvent>;

fn tried(state: &State, command: &Command) -> (Applied, State, Told) {
    let mut after = state.clone();
    let (applied, events) = apply(&mut after, &Origin::default(), command);
    let shown = meaning::shown(&events, after.revision, &after);
    (applied, after, shown.iter().map(known::timeless_event).collect())
}

/// What a write is about: by this it is found from an event.
fn subjects(request: &Request) -> Vec<String> {
    let instance = |name: &str| vec![format!("instance {name}")];
    let worker = |name: &str| vec![format!("worker {name}")];
    match request {
        Request::Allocate(r) => {
            r.claims.iter().map(|claim| format!("instance {}", claim.name)).collect()
        }
        Request::Confirm(r) => instance(&r.name),
        Request::Attach(r) => instance(&r.name),
        Request::Release(r) => instance(&r.name),
        Request::ReportConflict(r) => instance(&r.name),
        Request::GrantLease(_) => vec!["a new lease".into()],
        Request::RevokeLease(r) => vec![format!("lease {}", r.id)],
        Request::Register(r) => worker(&r.name),
        Request::Update(r) => worker(&r.name),
        Request::SetPhase(r) => worker(&r.name),
        Request::Remove(r) => worker(&r.name),
        Request::Quarantine(r) => worker(&r.worker),
        Request::LiftQuarantine(r) => worker(&r.worker),
        _ => Vec::new(),
    }
}

/// What a read is about, in the same words.
fn asked_for(request: &Request) -> String {
    match request {
        Request::Get(r) => format!("instance {}", r.name),
        Request::GetWorker(r) => format!("worker {}", r.name),
        Request::GetLease(r) => format!("lease {}", r.id),
        _ => String::new(),
    }
}

fn subjects_of(events: &[v1::WatchEvent]) -> BTreeSet<String> {
    let of = |event: &v1::WatchEvent| {
        let instance = event.allocation.as_ref().map(|a| format!("instance {}", a.name));
        let worker = event.worker.as_ref().map(|w| format!("worker {}", w.name));
        let lease = event.lease.as_ref().map(|lease| match event.r#type.as_str() {
            "lease_granted" => "a new lease".to_string(),
            _ => format!("lease {}", lease.id),
        });
        [instance, worker, lease].into_iter().flatten()
    };
    events.iter().flat_map(of).collect()
}

/// How far it has come, on one way of several.
#[derive(Clone)]
struct Place {
    state: State,
    /// The latest beginning of what is placed.
    latest: Nanos,
    /// Of `floating`: the first that may not be looked for yet.
    next_floating: usize,
    /// Refusals without a state so far.
    open: Vec<usize>,
    /// The same of `old`.
    next_old: usize,
    open_old: Vec<usize>,
    /// Calls of unknown end that were placed; who repeats may be placed again.
    spent: BTreeSet<usize>,
}

/// What may have made a revision.
#[derive(Clone)]
enum Maker {
    Call(usize),
    System(Command),
}

struct Search<'a> {
    facts: &'a Facts<'a>,
    tries: u64,
    /// The furthest that any way came to, and why it did not go on.
    deepest: (u64, String),
}

impl Search<'_> {
    fn run(mut self) -> (Vec<String>, String) {
        let mut place = Place {
            state: State::default(),
            latest: 0,
            next_floating: 0,
            open: Vec::new(),
            next_old: 0,
            open_old: Vec::new(),
            spent: BTreeSet::new(),
        };
        if let Err(why) = self.settle(&mut place, None, &[]) {
            return (vec![why], self.note(false));
        }
        // Places from which there were other ways, with those that are not tried yet.
        let mut turns: Vec<(Place, Vec<Maker>)> = Vec::new();
        let mut untried = None;
        // After the last revision that anybody knew, what is unknown may still explain a refusal.
        while place.state.revision.0 < self.facts.last || !place.open.is_empty() {
            let makers = untried.take().unwrap_or_else(|| self.makers(&place.state, &place.spent));
            if let Some((next, others)) = self.step(&place, makers) {
                let before = std::mem::replace(&mut place, next);
                if !others.is_empty() {
                    turns.push((before, others));
                }
            } else if self.tries > TRIES_MAX {
                let undecided = format!("not decided: {}", self.deepest.1);
                return (vec![undecided], self.note(true));
            } else if let Some((before, others)) = turns.pop() {
                place = before;
                untried = Some(others);
            } else {
                return (vec![self.deepest.1.clone()], self.note(false));
            }
        }
        (Vec::new(), self.note(false))
    }

    /// The first maker that leads on, and what else is worth a try if that way ends.
    fn step(&mut self, place: &Place, makers: Vec<Maker>) -> Option<(Place, Vec<Maker>)> {
        let revision = place.state.revision.0 + 1;
        let told = self.facts.events.contains_key(&revision);
        let mut whys = Vec::new();
        let mut makers = makers.into_iter();
        while let Some(maker) = makers.next() {
            self.tries += 1;
            match self.make(place, &maker) {
                Ok(next) => {
                    // Nothing is gained by another maker if this one uses up nothing.
                    let settled = match maker {
                        Maker::Call(at) => self.answered(revision, at),
                        Maker::System(_) => told,
                    };
                    return Some((next, if settled { Vec::new() } else { makers.collect() }));
                }
                Err(why) => whys.push(why),
            }
        }
        if self.deepest.0 < revision {
            let why = match place.open.first() {
                Some(at) if revision > self.facts.last => unexplained_answer(self.facts.op(*at)),
                _ => self.unexplained(revision, whys),
            };
            self.deepest = (revision, why);
        }
        None
    }

    fn unexplained(&self, revision: u64, mut whys: Vec<String>) -> String {
        whys.retain(|why| !why.is_empty());
        whys.truncate(8);
        let told = match self.facts.events.get(&revision) {
            Some(events) => format!("watchers were told {events:?}"),
            None => "no watcher was told of it".into(),
        };
        format!("nothing explains revision {revision} ({told}):\n    {}", whys.join("\n    "))
    }

    fn answered(&self, revision: u64, at: usize) -> bool {
        self.facts.writes.get(&revision).is_some_and(|writes| writes.contains(&at))
    }

    /// What may have made the next revision, the likeliest first.
    fn makers(&self, state: &State, spent: &BTreeSet<usize>) -> Vec<Maker> {
        let facts = self.facts;
        let revision = state.revision.0 + 1;
        let by_invocation = |mut calls: Vec<usize>| {
            calls.sort_by_key(|at| (facts.op(*at).invoked, *at));
            calls.dedup();
            calls.into_iter().map(Maker::Call)
        };
        let answered = by_invocation(facts.writes.get(&revision).cloned().unwrap_or_default());
        let may = |at: &usize| {
            let op = facts.op(*at);
            op.invoked <= facts.is_there_by(revision) && (op.repeats || !spent.contains(at))
        };
        let about = |subjects: BTreeSet<String>| {
            let found = subjects.iter().filter_map(|subject| facts.unknown.get(subject));
            by_invocation(found.flatten().copied().filter(|at| may(at)).collect())
        };
        let seen = facts.seen.get(&revision).into_iter().flatten().map(|held| &held.name);
        let seen = seen.chain(facts.granted.get(&revision).into_iter().flatten());
        let seen: BTreeSet<_> = seen.map(|name| format!("instance {name}")).collect();
        match facts.events.get(&revision) {
            Some(events) => {
                let system = by_itself(state, events).into_iter().map(Maker::System);
                answered.chain(system).chain(about(subjects_of(events))).collect()
            }
            None => {
                let all = || facts.unknown.keys().cloned().collect();
                let mut unknown: Vec<_> = about(if seen.is_empty() { all() } else { seen })
                    .filter(|maker| match maker {
                        Maker::Call(at) => facts.may_be(*at, revision),
                        Maker::System(_) => true,
                    })
                    .collect();
                // What is long past is done or lost more often than not.
                unknown.reverse();
                let system = anything_by_itself(state).into_iter().map(Maker::System);
                answered.chain(unknown).chain(system).collect()
            }
        }
    }

    /// The place after the next revision, if this made it. The error is empty where that is no news.
    fn make(&self, place: &Place, maker: &Maker) -> Result<Place, String> {
        let facts = self.facts;
        let revision = place.state.revision.0 + 1;
        let mut next = place.clone();
        let (after, events, made) = match maker {
            Maker::System(command) => {
                let (_, after, events) = tried(&place.state, command);
                (after, events, None)
            }
            Maker::Call(at) => {
                let op = facts.op(*at);
                let (answer, after, events) = facts.outcome(*at, &place.state);
                let answered = self.answered(revision, *at) && facts.agrees(*at, &answer);
                if answered {
                    in_time(op, place.latest)?;
                } else if self.answered(revision, *at) && !op.repeats {
                    return Err(format!("{}: the core answers {answer:?}", shown(op)));
                } else if !op.repeats {
                    next.spent.insert(*at);
                }
                next.latest = next.latest.max(op.invoked);
                // One that repeats may have made it by an earlier attempt than the one answered.
                (after, events, answered.then_some(*at))
            }
        };
        if after.revision.0 != revision {
            return Err(String::new());
        }
        if facts.events.get(&revision).is_some_and(|told| *told != events) {
            return Err(match maker {
                Maker::Call(at) if self.answered(revision, *at) => {
                    format!("{} is {events:?} to the core", shown(facts.op(*at)))
                }
                _ => String::new(),
            });
        }
        next.state = after;
        self.as_seen(&next.state)?;
        self.closed(&next)?;
        self.settle(&mut next, made, &events)?;
        Ok(next)
    }

    /// Is what somebody saw of this revision in the state?
    fn as_seen(&self, state: &State) -> Result<(), String> {
        for seen in self.facts.seen.get(&state.revision.0).into_iter().flatten() {
            let request =
                Request::Get(v1::GetRequest { name: seen.name.clone(), ..Default::default() });
            let held = match request.read(state) {
                Ok(Response::Get(v1::GetResponse { allocation: Some(held), .. })) => held,
                other => return Err(format!("{seen:?} was seen, the core has {other:?}")),
            };
            if known::timeless(&held) != *seen {
                return Err(format!("{seen:?} was seen, the core has {held:?}"));
            }
        }
        Ok(())
    }

    /// No answer may be left that had to come before what is placed now.
    fn closed(&self, place: &Place) -> Result<(), String> {
        let left = place.open.iter().chain(&place.open_old).map(|at| self.facts.op(*at));
        match left.into_iter().find(|op| op.returned < place.latest) {
            Some(op) => Err(unexplained_answer(op)),
            None => Ok(()),
        }
    }

    /// Everything that was answered from the state as it is now.
    fn settle(
        &self,
        place: &mut Place,
        made: Option<usize>,
        events: &[v1::WatchEvent],
    ) -> Result<(), String> {
        let facts = self.facts;
        let revision = place.state.revision.0;
        if revision.is_multiple_of(INVARIANTS_EVERY) {
            check_invariants(&place.state)?;
        }
        while let Some((at, from)) = facts.floating.get(place.next_floating)
            && *from <= revision
        {
            place.open.push(*at);
            place.next_floating += 1;
        }
        self.explain(place);
        self.explain_old(place, events);
        let mut latest = place.latest;
        let writes = facts.writes.get(&revision).into_iter().flatten();
        let reads = facts.reads.get(&revision).into_iter().flatten();
        for at in writes.chain(reads).filter(|at| Some(**at) != made) {
            let op = facts.op(*at);
            let (answer, after, _) = facts.outcome(*at, &place.state);
            if after.revision != place.state.revision || !facts.agrees(*at, &answer) {
                return Err(format!("{}: the core answers {answer:?}", shown(op)));
            }
            in_time(op, place.latest)?;
            if known::stale(&op.request).is_none() {
                latest = latest.max(op.invoked);
            }
        }
        place.latest = latest;
        self.closed(place)
    }

    /// Takes from `open_old` what the state explains. A state is looked at only if it is the first, or
    /// if the last change was of what was asked for.
    fn explain_old(&self, place: &mut Place, events: &[v1::WatchEvent]) {
        let Place { state, open_old, next_old, .. } = place;
        let explains = |at: &usize| self.facts.agrees(*at, &self.facts.outcome(*at, state).0);
        if !open_old.is_empty() {
            let changed = subjects_of(events);
            open_old.retain(|at| {
                let asked = asked_for(&self.facts.op(*at).request);
                !changed.contains(&asked) || !explains(at)
            });
        }
        while let Some((at, min)) = self.facts.old.get(*next_old)
            && *min <= state.revision.0
        {
            if !explains(at) {
                open_old.push(*at);
            }
            *next_old += 1;
        }
    }

    /// Takes from `open` what the state explains, unless it had to come after one that it does not.
    fn explain(&self, place: &mut Place) {
        let mut waited_for = Nanos::MAX;
        let state = &place.state;
        place.open.retain(|at| {
            let op = self.facts.op(*at);
            let may = op.invoked <= waited_for;
            let explained = may && self.facts.agrees(*at, &self.facts.outcome(*at, state).0);
            if !explained {
                waited_for = waited_for.min(op.returned);
            }
            !explained
        });
    }

    fn note(&self, gave_up: bool) -> String {
        let Facts { last, writes, reads, floating, old, events, .. } = self.facts;
        let count = |all: &BTreeMap<u64, Vec<usize>>| all.values().map(Vec::len).sum::<usize>();
        let (writes, reads, refusals) = (count(writes), count(reads), floating.len() + old.len());
        let untold = last - (events.len() as u64).min(*last);
        format!(
            "linear: {last} revisions ({untold} told to no watcher), {writes} writes, {reads} reads, \
             {refusals} refusals, {} tries{}",
            self.tries,
            if gave_up { ": given up" } else { "" }
        )
    }
}

/// What is placed later must not have ended before what is placed earlier began.
fn in_time(op: &Op, latest: Nanos) -> Result<(), String> {
    if op.returned < latest {
        return Err(format!(
            "{} ended at {} ns, and something that comes before it by its revision began only at {latest} ns",
            shown(op),
            op.returned
        ));
    }
    Ok(())
}

fn unexplained_answer(op: &Op) -> String {
    format!("no state explains the answer of {}", shown(op))
}

fn shown(op: &Op) -> String {
    format!(
        "op {} of process {} ({} to {} ns) {:?}, ended {:?}",
        op.id, op.process, op.invoked, op.returned, op.request, op.end
    )
}

/// What the system may have done by itself, given what watchers were told.
fn by_itself(state: &State, events: &[v1::WatchEvent]) -> Vec<Command> {
    let mut commands = Vec::new();
    for event in events {
        if let Some(name) =
            event.allocation.as_ref().and_then(|a| InstanceName::parse(&a.name).ok())
        {
            commands.extend(unconfirmed(state, &name));
            commands.extend(gone(state, &name, &event.reason));
        }
        if let Some(lease) = event.lease.as_ref().filter(|_| event.r#type == "lease_ended") {
            commands.push(Command::ExpireLease { id: LeaseId(lease.id), under: Leader::default() });
        }
        if let Some(worker) = event.worker.as_ref().filter(|_| event.r#type == "worker") {
            commands.extend(phases(&worker.name));
            commands.extend(quarantines(state, worker));
        }
    }
    commands
}

/// The same where no watcher was told; what agents see is not thought of.
fn anything_by_itself(state: &State) -> Vec<Command> {
    let leases = state.leases_after(None).map(|lease| lease.id);
    let mut commands: Vec<_> =
        leases.map(|id| Command::ExpireLease { id, under: Leader::default() }).collect();
    commands.extend(state.reserved().filter_map(|held| unconfirmed(state, held.name())));
    for worker in state.workers_after(None) {
        if worker.has_agent() {
            commands.extend(phases(worker.name.as_str()));
        }
        let suspects = worker.pools.iter().flat_map(|pool| pool.quarantines());
        commands.extend(suspects.filter_map(|(number, _)| {
            lift(worker.name.as_str(), vec![u32::from(number)], state.revision)
        }));
    }
    commands
}

fn unconfirmed(state: &State, name: &InstanceName) -> Option<Command> {
    let held = state.allocation(name)?;
    let (token, version, ground) = (held.token, held.version, Ground::Unconfirmed);
    let (name, under) = (name.clone(), Leader::default());
    Some(Command::Reclaim { name, token, version, ground, under })
}

fn gone(state: &State, name: &InstanceName, reason: &str) -> Option<Command> {
    let reason = reason.strip_prefix("reclaimed: ")?.to_string();
    let held = state.allocation(name)?;
    let identity = state.worker(&held.worker)?.spec.identity.clone()?;
    let ground = Ground::Gone { identity, seen: state.revision, reason };
    let (token, version) = (held.token, held.version);
    Some(Command::Reclaim { name: name.clone(), token, version, ground, under: Leader::default() })
}

fn phases(worker: &str) -> Vec<Command> {
    let Ok(name) = WorkerName::parse(worker) else { return Vec::new() };
    let by = Actor::Leader(Leader::default());
    let to = |phase| Command::SetWorkerPhase { name: name.clone(), phase, by };
    vec![to(WorkerPhase::Lost), to(WorkerPhase::Ready)]
}

/// What a leader may have put under quarantine or lifted, so that the worker is as it was told.
fn quarantines(state: &State, told: &v1::Worker) -> Vec<Command> {
    let Some(worker) = WorkerName::parse(&told.name).ok().and_then(|name| state.worker(&name))
    else {
        return Vec::new();
    };
    let before: BTreeSet<u32> = worker
        .pools
        .iter()
        .flat_map(|pool| pool.quarantines())
        .map(|(number, _)| number.into())
        .collect();
    let after: BTreeMap<u32, &str> = told
        .ranges
        .iter()
        .flat_map(|range| &range.quarantined)
        .map(|port| (port.number, port.reason.as_str()))
        .collect();
    let lifted = before.iter().copied().filter(|number| !after.contains_key(number)).collect();
    let new: Vec<_> = after.iter().filter(|(number, _)| !before.contains(number)).collect();
    let quarantined = new.first().map(|(_, reason)| Command::Quarantine {
        worker: worker.name.clone(),
        ports: new.iter().filter_map(|(n, _)| Port::new("port", u64::from(**n)).ok()).collect(),
        reason: reason.to_string(),
        by: Actor::Leader(Leader::default()),
    });
    lift(&told.name, lifted, state.revision).into_iter().chain(quarantined).collect()
}

fn lift(worker: &str, ports: Vec<u32>, seen: Revision) -> Option<Command> {
    let worker = WorkerName::parse(worker).ok()?;
    let ports: Vec<_> =
        ports.iter().filter_map(|n| Port::new("port", u64::from(*n)).ok()).collect();
    let by = Actor::Leader(Leader::default());
    (!ports.is_empty()).then_some(Command::LiftQuarantine { worker, ports, by, seen })
}
