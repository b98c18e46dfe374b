//! What an answer or an event says, whatever kind it is of.

use std::collections::BTreeMap;

use portwarden::api::meaning::{Request, Response};
use portwarden::proto::v1;

use crate::history::{End, History, Nanos, Op};

/// What an answer tells of allocations: as they were when it was given.
pub fn allocations(response: &Response) -> &[v1::Allocation] {
    match response {
        Response::Allocate(r) => &r.allocations,
        Response::Confirm(r) => r.allocation.as_slice(),
        Response::Attach(r) => r.allocation.as_slice(),
        Response::ReportConflict(r) if !r.reclaimed => r.allocation.as_slice(),
        Response::Get(r) => r.allocation.as_slice(),
        Response::List(r) => &r.allocations,
        _ => &[],
    }
}

/// The revision of the table that an answer speaks of.
pub fn revision(response: &Response) -> Option<u64> {
    Some(match response {
        Response::Allocate(r) => r.revision,
        Response::Confirm(r) => r.revision,
        Response::Attach(r) => r.revision,
        Response::Release(r) => r.revision,
        Response::ReportConflict(r) => r.revision,
        Response::GrantLease(r) => r.revision,
        Response::RevokeLease(r) => r.revision,
        Response::Register(r)
        | Response::Update(r)
        | Response::SetPhase(r)
        | Response::Quarantine(r)
        | Response::LiftQuarantine(r)
        | Response::GetWorker(r) => r.revision,
        Response::Remove(r) => r.revision,
        Response::Get(r) => r.revision,
        Response::List(r) => r.revision,
        Response::GetLease(r) => r.revision,
        Response::KeepAlive(_) => return None,
    })
}

/// Of a read: may it be answered from an old copy, and how old at most?
pub fn stale(request: &Request) -> Option<u64> {
    let read = match request {
        Request::Get(r) => r.read.as_ref(),
        Request::List(r) => r.read.as_ref(),
        Request::GetWorker(r) => r.read.as_ref(),
        Request::GetLease(r) => r.read.as_ref(),
        _ => None,
    };
    read.filter(|read| read.stale).map(|read| read.min_revision)
}

pub fn is_write(request: &Request) -> bool {
    !matches!(
        request,
        Request::Get(_)
            | Request::List(_)
            | Request::GetWorker(_)
            | Request::GetLease(_)
            | Request::KeepAlive(_)
    )
}

/// Without what no model knows: the leader's wall clock.
pub fn timeless(allocation: &v1::Allocation) -> v1::Allocation {
    v1::Allocation { granted_at_ms: 0, changed_at_ms: 0, ..allocation.clone() }
}

pub fn timeless_event(event: &v1::WatchEvent) -> v1::WatchEvent {
    v1::WatchEvent { allocation: event.allocation.as_ref().map(timeless), ..event.clone() }
}

pub fn timeless_response(response: &Response) -> Response {
    let mut response = response.clone();
    match &mut response {
        Response::Allocate(r) => r.allocations.iter_mut().for_each(forget_time),
        Response::Confirm(r) => r.allocation.iter_mut().for_each(forget_time),
        Response::Attach(r) => r.allocation.iter_mut().for_each(forget_time),
        Response::Release(r) => r.allocation.iter_mut().for_each(forget_time),
        Response::ReportConflict(r) => r.allocation.iter_mut().for_each(forget_time),
        Response::Get(r) => r.allocation.iter_mut().for_each(forget_time),
        Response::List(r) => r.allocations.iter_mut().for_each(forget_time),
        _ => {}
    }
    response
}

fn forget_time(allocation: &mut v1::Allocation) {
    (allocation.granted_at_ms, allocation.changed_at_ms) = (0, 0);
}

/// Events of each revision, over all streams that leave nothing out.
pub fn events_by_revision(history: &History) -> BTreeMap<u64, Vec<v1::WatchEvent>> {
    let mut all: BTreeMap<u64, Vec<v1::WatchEvent>> = BTreeMap::new();
    for stream in history.streams.iter().filter(|stream| stream.worker.is_empty()) {
        for (revision, events) in groups(&stream.messages) {
            all.entry(revision).or_insert(events);
        }
    }
    all
}

/// The events of one stream by revision; of the last revision only if it is complete.
pub fn groups(messages: &[(Nanos, v1::WatchResponse)]) -> BTreeMap<u64, Vec<v1::WatchEvent>> {
    let mut groups: BTreeMap<u64, Vec<v1::WatchEvent>> = BTreeMap::new();
    let mut told = 0;
    for (_, message) in messages {
        for event in &message.events {
            groups.entry(event.revision).or_default().push(timeless_event(event));
        }
        told = told.max(message.revision);
    }
    groups.retain(|revision, _| *revision <= told);
    groups
}

/// Every allocation that anybody was told of, however old, gone ones too.
pub fn everything_seen(history: &History) -> impl Iterator<Item = &v1::Allocation> {
    let answered = history.ops.iter().filter_map(|op| match &op.end {
        End::Ok(response) => Some(response),
        _ => None,
    });
    let answered = answered.flat_map(|response| match response {
        Response::Release(r) => r.allocation.as_slice(),
        Response::ReportConflict(r) => r.allocation.as_slice(),
        response => allocations(response),
    });
    let messages = history.streams.iter().flat_map(|stream| &stream.messages);
    let events = messages.flat_map(|(_, message)| &message.events);
    answered.chain(events.filter_map(|event| event.allocation.as_ref()))
}

/// One sight of an allocation by a client: it was so at some instant of the call.
pub struct Sight<'a> {
    pub op: &'a Op,
    pub allocation: &'a v1::Allocation,
}

/// Every sight in an answer that was not taken from an old copy.
pub fn sights(history: &History) -> impl Iterator<Item = Sight<'_>> {
    history.ops.iter().filter(|op| stale(&op.request).is_none()).flat_map(|op| {
        let seen = match &op.end {
            End::Ok(response) => allocations(response),
            _ => &[],
        };
        seen.iter().map(move |allocation| Sight { op, allocation })
    })
}

/// Calls that may take something from this allocation, whatever came of them but `Fail`.
pub fn may_free(op: &Op, allocation: &v1::Allocation) -> bool {
    use v1::release_request::Authority;
    if op.end == End::Fail {
        return false;
    }
    match &op.request {
        Request::Release(r) if r.name == allocation.name => match &r.authority {
            Some(Authority::Token(token)) => *token == allocation.token,
            Some(Authority::Force(_)) => true,
            None => false,
        },
        Request::ReportConflict(r) => r.name == allocation.name && r.token == allocation.token,
        Request::Remove(r) => r.name == allocation.worker && r.force.is_some(),
        _ => false,
    }
}

/// No timer and no agent can end it: nobody but a caller does.
pub fn is_firm(allocation: &v1::Allocation, with_agent: bool) -> bool {
    allocation.phase == i32::from(v1::Phase::Bound) && allocation.lease == 0 && !with_agent
}

/// Workers of which an agent was ever named: what they hold may be taken on evidence.
pub fn workers_with_agents(history: &History) -> std::collections::BTreeSet<String> {
    let registered = history.ops.iter().filter_map(|op| match &op.request {
        Request::Register(r) => Some(r),
        _ => None,
    });
    registered
        .filter(|r| r.spec.as_ref().is_some_and(|spec| spec.identity.is_some()))
        .map(|r| r.name.clone())
        .collect()
}
