//! Revisions and tokens only grow in real time, and no (name, token) names two grants.
//!
//! An answer that came before a call began is older than the call's answer: so is its revision,
//! unless the call asked for an old copy. One sweep over the ends of all calls, O(n log n).

use std::collections::BTreeMap;

use portwarden::api::meaning::Response;
use portwarden::proto::v1;

use super::known;
use crate::history::{End, History, Nanos, Op, Record};

pub fn check(history: &History) -> Vec<String> {
    let mut broken = revisions(history);
    broken.extend(tokens(history));
    broken.extend(grants(history));
    broken
}

/// The answers that speak of the table as it is, with what they say its revision is.
fn answers(history: &History) -> impl Iterator<Item = (&Op, &Response, u64)> {
    history.ops.iter().filter_map(|op| match &op.end {
        End::Ok(response) => known::revision(response).map(|revision| (op, response, revision)),
        _ => None,
    })
}

/// For each of `later` (by when it began): the most that was known before then.
fn sweep<'a>(
    mut earlier: Vec<(Nanos, u64, &'a Op)>,
    mut later: Vec<(Nanos, u64, &'a Op)>,
    mut judge: impl FnMut(u64, &'a Op, u64, &'a Op),
) {
    earlier.sort_by_key(|(at, ..)| *at);
    later.sort_by_key(|(at, ..)| *at);
    let mut earlier = earlier.into_iter().peekable();
    let mut most: Option<(u64, &Op)> = None;
    for (began, value, op) in later {
        while let Some((_, value, op)) = earlier.next_if(|(ended, ..)| *ended < began) {
            if most.is_none_or(|(most, _)| most < value) {
                most = Some((value, op));
            }
        }
        if let Some((least, before)) = most {
            judge(least, before, value, op);
        }
    }
}

fn revisions(history: &History) -> Vec<String> {
    let mut broken = Vec::new();
    let ended = answers(history).map(|(op, _, revision)| (op.returned, revision, op)).collect();
    let fresh = answers(history).filter(|(op, ..)| known::stale(&op.request).is_none());
    let began = fresh.map(|(op, _, revision)| (op.invoked, revision, op)).collect();
    sweep(ended, began, |least, before, revision, op| {
        if revision < least {
            broken.push(format!(
                "op {} speaks of revision {revision}, but op {} had ended before it began and spoke of {least}",
                op.id, before.id
            ));
        }
    });
    for (op, _, revision) in answers(history) {
        if let Some(min) = known::stale(&op.request)
            && revision < min
        {
            broken.push(format!("op {} asked for revision {min} at least, got {revision}", op.id));
        }
    }
    broken
}

/// A grant has a token above all revisions that were known when it was asked for.
fn tokens(history: &History) -> Vec<String> {
    let mut broken = Vec::new();
    let ended = answers(history).map(|(op, _, revision)| (op.returned, revision, op)).collect();
    let fresh = history.ops.iter().filter_map(|op| match &op.end {
        End::Ok(Response::Allocate(r)) if !r.repeated_request => {
            r.allocations.first().map(|a| (op.invoked, a.token, op))
        }
        _ => None,
    });
    sweep(ended, fresh.collect(), |least, before, token, op| {
        if token <= least {
            broken.push(format!(
                "op {} was granted token {token}, but op {} had ended before and knew revision {least}",
                op.id, before.id
            ));
        }
    });
    broken
}

/// What a grant is: under one name and token it is always the same.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Grant {
    uid: String,
    worker: String,
    gpus: Vec<(u32, u64, bool)>,
}

fn grants(history: &History) -> Vec<String> {
    let mut broken = Vec::new();
    let mut known: BTreeMap<(String, u64), Grant> = BTreeMap::new();
    let mut see = |allocation: &v1::Allocation, by: String| {
        let gpus = allocation.gpus.iter().map(|g| (g.index, g.memory_bytes, g.exclusive));
        let (uid, worker) = (allocation.uid.clone(), allocation.worker.clone());
        let grant = Grant { uid, worker, gpus: gpus.collect() };
        let name = (allocation.name.clone(), allocation.token);
        match known.get(&name) {
            Some(other) if *other != grant => broken.push(format!(
                "{} under token {} is {grant:?} by {by}, and was {other:?}",
                name.0, name.1
            )),
            Some(_) => {}
            None => drop(known.insert(name, grant)),
        }
    };
    for (op, response, _) in answers(history) {
        for allocation in known::allocations(response) {
            see(allocation, format!("op {}", op.id));
        }
    }
    for record in &history.records {
        if let Record::Watched { watcher, message, .. } = record {
            for allocation in message.events.iter().filter_map(|event| event.allocation.as_ref()) {
                see(allocation, format!("watcher {watcher}"));
            }
        }
    }
    broken
}
