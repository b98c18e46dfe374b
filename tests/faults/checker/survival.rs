//! What was acknowledged is there afterwards, what was released stays released, and a lease lives for
//! its time from when a renewal that was acknowledged began.
//!
//! Judged of what is firm only: bound, on no lease, on a worker without an agent, so that neither a
//! timer nor evidence may take it.

use std::collections::{BTreeMap, BTreeSet};

use portwarden::api::meaning::{Request, Response};
use portwarden::proto::v1;
use tonic::Code;

use super::known;
use crate::history::{End, History, Nanos, Op, Record};

/// What the clock of a timer and ours may differ by over one lease.
const SLACK: Nanos = 50_000_000;

pub fn check(history: &History) -> Vec<String> {
    let mut broken = lost(history);
    broken.extend(returned(history));
    broken.extend(leases(history));
    broken
}

/// A grant that is there from `from` until `until`.
struct Firm<'a> {
    name: &'a str,
    token: u64,
    from: Nanos,
    until: Nanos,
    allocation: &'a v1::Allocation,
}

fn lost(history: &History) -> Vec<String> {
    let firm = firm(history);
    let by_name: BTreeMap<&str, Vec<&Firm>> = firm.iter().fold(BTreeMap::new(), |mut all, firm| {
        all.entry(firm.name).or_insert_with(Vec::new).push(firm);
        all
    });
    let mut broken = Vec::new();
    for op in history.ops.iter().filter(|op| known::stale(&op.request).is_none()) {
        let during = |firm: &&&Firm| firm.from < op.invoked && op.returned < firm.until;
        let missed = |firm: &Firm| {
            let Firm { name, token, .. } = firm;
            format!(
                "{name} (token {token}) was acknowledged, and is not in the answer of op {}",
                op.id
            )
        };
        match (&op.request, &op.end) {
            (Request::List(r), End::Ok(Response::List(list))) => {
                let listed: BTreeSet<_> =
                    list.allocations.iter().map(|a| (a.name.as_str(), a.token)).collect();
                let wanted = firm.iter().filter(|firm| lists(r, firm.allocation));
                let gone = wanted.filter(|firm| !listed.contains(&(firm.name, firm.token)));
                broken.extend(gone.filter(|firm| during(&firm)).map(missed));
            }
            (request, end) => {
                let Some(name) = named(request) else { continue };
                let gone = by_name.get(name).into_iter().flatten();
                let gone = gone.filter(|firm| is_gone(end, firm.token)).filter(|f| during(f));
                broken.extend(gone.map(|firm| missed(firm)));
            }
        }
    }
    broken
}

fn firm(history: &History) -> Vec<Firm<'_>> {
    let with_agents = known::workers_with_agents(history);
    let mut firm: BTreeMap<(&str, u64), Firm> = BTreeMap::new();
    for known::Sight { op, allocation } in known::sights(history) {
        if !known::is_firm(allocation, with_agents.contains(&allocation.worker)) {
            continue;
        }
        let (name, token) = (allocation.name.as_str(), allocation.token);
        let new = || Firm { name, token, from: op.returned, until: Nanos::MAX, allocation };
        let known = firm.entry((name, token)).or_insert_with(new);
        known.from = known.from.min(op.returned);
    }
    for op in &history.ops {
        let ends = |firm: &Firm| known::may_free(op, firm.allocation) || loosens(op, firm);
        let end = |firm: &mut Firm| {
            if ends(firm) {
                firm.until = firm.until.min(op.invoked);
            }
        };
        match named(&op.request) {
            Some(name) => {
                firm.range_mut((name, 0)..=(name, u64::MAX)).for_each(|(_, firm)| end(firm));
            }
            None if matches!(op.request, Request::Remove(_)) => firm.values_mut().for_each(end),
            None => {}
        }
    }
    firm.into_values().collect()
}

fn loosens(op: &Op, firm: &Firm) -> bool {
    match &op.request {
        Request::Confirm(r) => r.token == firm.token && r.lease != 0,
        Request::Attach(r) => r.token == firm.token && r.lease != 0,
        _ => false,
    }
}

/// The allocation that a call is about.
fn named(request: &Request) -> Option<&str> {
    Some(match request {
        Request::Get(r) => &r.name,
        Request::Confirm(r) => &r.name,
        Request::Attach(r) => &r.name,
        Request::Release(r) => &r.name,
        Request::ReportConflict(r) => &r.name,
        _ => return None,
    })
}

/// Does the answer say that nobody holds the name, or somebody else?
fn is_gone(end: &End, token: u64) -> bool {
    match end {
        End::Refused { code, .. } => *code == Code::NotFound as i32,
        End::Ok(Response::Release(r)) => !r.released,
        End::Ok(response) => known::allocations(response).iter().any(|a| a.token != token),
        End::Fail | End::Unknown => false,
    }
}

/// Do the filters of a listing let it through? Labels are not asked for here.
fn lists(request: &v1::ListRequest, allocation: &v1::Allocation) -> bool {
    request.selector.is_empty()
        && request.phase == 0
        && (request.worker.is_empty() || request.worker == allocation.worker)
        && allocation.name.starts_with(&request.name_prefix)
}

/// After a release was answered, what is held under the name is a later grant.
fn returned(history: &History) -> Vec<String> {
    let mut gone: BTreeMap<&str, Vec<(Nanos, u64, u64)>> = BTreeMap::new();
    for op in &history.ops {
        if let (Request::Release(request), End::Ok(Response::Release(r))) = (&op.request, &op.end) {
            gone.entry(&request.name).or_default().push((op.returned, r.revision, op.id));
        }
    }
    let mut broken = Vec::new();
    for known::Sight { op, allocation } in known::sights(history) {
        let before = gone.get(allocation.name.as_str()).into_iter().flatten();
        let back = before
            .filter(|(ended, revision, _)| *ended < op.invoked && allocation.token <= *revision);
        broken.extend(back.map(|(_, _, release)| {
            let (name, token) = (&allocation.name, allocation.token);
            format!("{name} (token {token}) was released by op {release}, and op {} sees it", op.id)
        }));
    }
    broken
}

fn leases(history: &History) -> Vec<String> {
    let mut lives: BTreeMap<u64, (Nanos, u64)> = BTreeMap::new();
    let mut revoked = BTreeSet::new();
    for op in &history.ops {
        let (id, ttl_ms) = match (&op.request, &op.end) {
            (Request::RevokeLease(r), end) if *end != End::Fail => {
                revoked.insert(r.id);
                continue;
            }
            (_, End::Ok(Response::KeepAlive(r))) if r.ttl_ms > 0 => (r.id, r.ttl_ms),
            (_, End::Ok(Response::GrantLease(v1::GrantResponse { lease: Some(lease), .. }))) => {
                (lease.id, lease.ttl_ms)
            }
            _ => continue,
        };
        let until = op.invoked + ttl_ms * 1_000_000;
        let life = lives.entry(id).or_insert((until, op.id));
        if life.0 < until {
            *life = (until, op.id);
        }
    }
    let mut broken = Vec::new();
    for (at, id, by) in ends_of_leases(history).filter(|(_, id, _)| !revoked.contains(id)) {
        if let Some((until, op)) = lives.get(&id).filter(|(until, _)| at + SLACK < *until) {
            let early = (until - at) / 1_000_000;
            broken.push(format!(
                "lease {id} was acknowledged by op {op}, and had ended {early} ms too early by {by}"
            ));
        }
    }
    broken
}

/// When a lease had ended for certain, and who says so.
fn ends_of_leases(history: &History) -> impl Iterator<Item = (Nanos, u64, String)> {
    let answered = history.ops.iter().filter_map(|op| match (&op.request, &op.end) {
        (Request::GetLease(r), End::Refused { code, .. })
            if *code == Code::NotFound as i32 && known::stale(&op.request).is_none() =>
        {
            Some((op.returned, r.id, format!("op {}", op.id)))
        }
        (_, End::Ok(Response::KeepAlive(r))) if r.ttl_ms == 0 => {
            Some((op.returned, r.id, format!("op {}", op.id)))
        }
        _ => None,
    });
    let watched = history.records.iter().flat_map(|record| match record {
        Record::Watched { at, watcher, message } => message
            .events
            .iter()
            .filter(|event| event.r#type == "lease_ended")
            .filter_map(|event| event.lease.as_ref())
            .map(|lease| (*at, lease.id, format!("watcher {watcher}")))
            .collect(),
        _ => Vec::new(),
    });
    answered.chain(watched)
}
