//! A history by revision: what is known of each change, and what may have made it.

use std::collections::{BTreeMap, BTreeSet};

use portwarden::api::meaning::{self, Request, Response};
use portwarden::core::{Applied, Command, Millis, Origin, State, apply};
use portwarden::proto::v1;
use tonic::Status;

use super::super::known;
use crate::history::{End, History, Nanos, Op};

/// A history by revision.
pub struct Facts<'a> {
    pub history: &'a History,
    pub commands: Vec<Option<Result<Command, Status>>>,
    /// Writes that were answered with a revision; one of them at most made it.
    pub writes: BTreeMap<u64, Vec<usize>>,
    /// Reads of the table as it is, and of old copies.
    pub reads: BTreeMap<u64, Vec<usize>>,
    /// What was answered without a revision, by when the call began; and from which revision on it
    /// may have been answered.
    pub floating: Vec<(usize, u64)>,
    /// The same of those that an old copy may have given, by the least revision that was asked for.
    pub old: Vec<(usize, u64)>,
    /// What may have been done although nobody was told, by what it is about.
    pub unknown: BTreeMap<String, Vec<usize>>,
    pub events: BTreeMap<u64, Vec<v1::WatchEvent>>,
    /// Allocations as this revision left them, by whoever saw them later.
    pub seen: BTreeMap<u64, Vec<v1::Allocation>>,
    /// Names that this revision granted, of those that anybody ever saw; and all such grants.
    pub granted: BTreeMap<u64, BTreeSet<String>>,
    grants: BTreeMap<(String, String), BTreeSet<u64>>,
    /// Names that somebody may have given back, or had taken.
    freed: BTreeSet<String>,
    /// By when a revision was there for certain: what makes it began before.
    by: BTreeMap<u64, Nanos>,
    pub last: u64,
}

impl<'a> Facts<'a> {
    pub fn new(history: &'a History) -> Facts<'a> {
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
    pub fn may_be(&self, at: usize, revision: u64) -> bool {
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

    pub fn is_there_by(&self, revision: u64) -> Nanos {
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

    pub fn op(&self, at: usize) -> &Op {
        &self.history.ops[at]
    }

    /// What a call comes to in a state; the state after it, and its events, with it.
    pub fn outcome(&self, at: usize, state: &State) -> (Result<Response, Status>, State, Told) {
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
    pub fn agrees(&self, at: usize, answer: &Result<Response, Status>) -> bool {
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
pub type Told = Vec<v1::WatchEvent>;

pub fn tried(state: &State, command: &Command) -> (Applied, State, Told) {
    let mut after = state.clone();
    let (applied, events) = apply(&mut after, &Origin::default(), command);
    let shown = meaning::shown(&events, after.revision, &after);
    (applied, after, shown.iter().map(known::timeless_event).collect())
}

/// What a write is about: by this it is found from an event.
pub fn subjects(request: &Request) -> Vec<String> {
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
pub fn asked_for(request: &Request) -> String {
    match request {
        Request::Get(r) => format!("instance {}", r.name),
        Request::GetWorker(r) => format!("worker {}", r.name),
        Request::GetLease(r) => format!("lease {}", r.id),
        _ => String::new(),
    }
}

pub fn subjects_of(events: &[v1::WatchEvent]) -> BTreeSet<String> {
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
