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

mod facts;
mod system;

use std::collections::{BTreeMap, BTreeSet};

use portwarden::api::meaning::{Request, Response};
use portwarden::core::{Command, State, check_invariants};
use portwarden::proto::v1;

use super::known;
use crate::history::{History, Nanos, Op};
use facts::{Facts, asked_for, subjects_of, tried};
use system::{anything_by_itself, by_itself};

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
    System(Box<Command>),
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
                let system = by_itself(state, events).into_iter().map(Box::new).map(Maker::System);
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
                let system = anything_by_itself(state).into_iter().map(Box::new).map(Maker::System);
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
