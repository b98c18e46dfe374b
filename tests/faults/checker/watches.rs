//! Streams of changes: each revision once, in order, none left out; the same from every node; and
//! all together they are the table.

use std::collections::BTreeMap;

use portwarden::api::meaning::{Request, Response};
use portwarden::proto::v1;

use super::known;
use crate::history::{End, History, Stream};

pub fn check(history: &History) -> Vec<String> {
    let mut broken = Vec::new();
    let mut reference = BTreeMap::new();
    let (all, filtered): (Vec<_>, Vec<_>) =
        history.streams.iter().partition(|stream| stream.worker.is_empty());
    for stream in all {
        broken.extend(order(stream));
        broken.extend(gaps(stream));
        for (revision, events) in known::groups(&stream.messages) {
            match reference.get(&revision) {
                Some(other) if *other != events => broken.push(format!(
                    "{} tells of revision {revision} as {events:?}, another one as {other:?}",
                    name(stream)
                )),
                Some(_) => {}
                None => drop(reference.insert(revision, events)),
            }
        }
    }
    for stream in filtered {
        broken.extend(order(stream));
        broken.extend(left_out(stream, &reference));
    }
    if history.header.complete {
        broken.extend(table(history, &reference));
    }
    broken
}

fn name(stream: &Stream) -> String {
    format!("watcher {} (from {} at {})", stream.watcher, stream.from, stream.endpoint)
}

/// The last revision of which all was told.
fn told(stream: &Stream) -> u64 {
    stream.messages.iter().map(|(_, message)| message.revision).max().unwrap_or(0)
}

fn order(stream: &Stream) -> Vec<String> {
    let mut broken = Vec::new();
    let (mut told, mut last) = (stream.from.saturating_sub(1), 0);
    for (_, message) in &stream.messages {
        for event in &message.events {
            let revision = event.revision;
            if revision <= told || revision < last {
                broken.push(format!(
                    "{} tells of revision {revision} after all up to {} was told",
                    name(stream),
                    told.max(last)
                ));
            }
            if revision > message.revision && !message.partial {
                broken.push(format!(
                    "{} tells of revision {revision} in a message of all up to {}",
                    name(stream),
                    message.revision
                ));
            }
            last = last.max(revision);
        }
        if message.revision < told {
            broken.push(format!(
                "{} told all up to {told}, and then all up to {}",
                name(stream),
                message.revision
            ));
        }
        told = told.max(message.revision);
    }
    broken
}

/// Each revision is a change: one without an event was left out.
fn gaps(stream: &Stream) -> Vec<String> {
    let groups = known::groups(&stream.messages);
    let missing = (stream.from.max(1)..=told(stream)).filter(|r| !groups.contains_key(r));
    missing.map(|revision| format!("{} leaves out revision {revision}", name(stream))).collect()
}

/// Against what streams without a filter told.
fn left_out(stream: &Stream, reference: &BTreeMap<u64, Vec<v1::WatchEvent>>) -> Vec<String> {
    let groups = known::groups(&stream.messages);
    let mut broken = Vec::new();
    if stream.from > told(stream) {
        return broken;
    }
    for (revision, events) in reference.range(stream.from..=told(stream)) {
        let wanted: Vec<_> =
            events.iter().filter(|e| concerns(e, &stream.worker)).cloned().collect();
        let heard = groups.get(revision).cloned().unwrap_or_default();
        if heard != wanted {
            broken.push(format!(
                "{}, of worker {}, tells of revision {revision} as {heard:?}, not {wanted:?}",
                name(stream),
                stream.worker
            ));
        }
    }
    broken
}

fn concerns(event: &v1::WatchEvent, worker: &str) -> bool {
    event.allocation.as_ref().is_some_and(|a| a.worker == worker)
        || event.worker.as_ref().is_some_and(|w| w.name == worker)
}

/// Folds all events from the first on, and compares with every listing on the way.
fn table(history: &History, reference: &BTreeMap<u64, Vec<v1::WatchEvent>>) -> Vec<String> {
    let mut listings: BTreeMap<u64, Vec<(u64, &v1::ListResponse)>> = BTreeMap::new();
    for op in &history.ops {
        if let (Request::List(r), End::Ok(Response::List(list))) = (&op.request, &op.end)
            && (&r.worker, &r.selector, &r.name_prefix, r.phase)
                == (&String::new(), &String::new(), &String::new(), 0)
        {
            listings.entry(list.revision).or_default().push((op.id, list));
        }
    }
    let mut broken = Vec::new();
    let mut held: BTreeMap<&str, v1::Allocation> = BTreeMap::new();
    let mut at = 0;
    for (revision, events) in reference {
        if *revision != at + 1 {
            break; // nobody was told of what lies between
        }
        at = *revision;
        for event in events {
            let Some(allocation) = &event.allocation else { continue };
            match event.r#type.as_str() {
                "released" | "reclaimed" => drop(held.remove(allocation.name.as_str())),
                _ => drop(held.insert(&allocation.name, allocation.clone())),
            }
        }
        for (op, list) in listings.get(revision).into_iter().flatten() {
            let listed = list.allocations.iter().map(known::timeless);
            if !listed.eq(held.values().cloned()) {
                broken.push(format!(
                    "the changes up to revision {revision} are not the table that op {op} lists"
                ));
            }
        }
    }
    broken
}
