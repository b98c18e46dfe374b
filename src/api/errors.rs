//! Refusals and failures as gRPC statuses with `google.rpc` details.
//!
//! The code says what kind of error it is, the message what happened, the details what a program
//! can act on. What may have been done and what surely was not is told by `ErrorInfo.reason`
//! ([`crate::proto::reason`]); the client library decides by that alone whether to try again.

use std::collections::HashMap;
use std::time::Duration;

use itertools::Itertools as _;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::core::{
    Allocation, Departure, Invalid, Lack, LackKind, Refusal, ReleaseReason, Revision, Shortage,
    WorkerName,
};
use crate::node::CallError;
use crate::node::members::NotChanged;
use crate::proto::{DOMAIN, precondition, reason};

pub fn invalid(error: Invalid) -> Status {
    let Invalid { field, value, limit } = &error;
    let details =
        ErrorDetails::with_bad_request_violation(field, format!("{value:?} must be {limit}"));
    Status::with_error_details(Code::InvalidArgument, error.to_string(), details)
}

fn not_found(kind: &str, name: &str, text: &str) -> Status {
    let details = ErrorDetails::with_resource_info(kind, name, "", text);
    Status::with_error_details(Code::NotFound, text, details)
}

pub fn refusal(refusal: Refusal) -> Status {
    let text = refusal.to_string();
    let precondition = |kind: &str, subject: &str| {
        let details =
            ErrorDetails::with_precondition_failure_violation(kind, subject, text.as_str());
        Status::with_error_details(Code::FailedPrecondition, text.as_str(), details)
    };
    let not_found = |kind: &str, name: &str| not_found(kind, name, &text);
    match &refusal {
        Refusal::Invalid(error) => invalid(error.clone()),
        Refusal::NoWorker(name) => not_found("worker", name.as_str()),
        Refusal::NoAllocation { name, departed: None } => not_found("allocation", name.as_str()),
        Refusal::NoAllocation { name, departed: Some(departed) } => {
            let mut details =
                ErrorDetails::with_resource_info("allocation", name.as_str(), "", text.as_str());
            details.set_error_info(reason::DEPARTED, DOMAIN, departure_facts(departed));
            Status::with_error_details(Code::NotFound, text.as_str(), details)
        }
        Refusal::NoLease(id) => not_found("lease", &id.to_string()),
        Refusal::NameTaken { holder, difference, .. } => name_taken(&text, holder, difference),
        Refusal::IdentityTaken { what, value, owner } => {
            let mut details = ErrorDetails::with_resource_info(*what, value, owner.as_str(), &text);
            details.set_error_info(
                reason::IDENTITY_TAKEN,
                DOMAIN,
                metadata([("owner", owner.to_string())]),
            );
            Status::with_error_details(Code::AlreadyExists, text, details)
        }
        Refusal::WrongToken { name, .. } => precondition(precondition::TOKEN, name.as_str()),
        Refusal::WrongVersion { name, .. } => precondition(precondition::VERSION, name.as_str()),
        Refusal::PortNotHeld { name, .. } => {
            precondition(precondition::PORT_NOT_HELD, name.as_str())
        }
        Refusal::WorkerNotReady { worker, .. } => {
            precondition(precondition::WORKER_NOT_READY, worker.as_str())
        }
        Refusal::Lingers { name, .. } => precondition(precondition::LINGERING, name.as_str()),
        Refusal::NotProven { name, .. } => precondition(precondition::NOT_PROVEN, name.as_str()),
        Refusal::Deposed { leader, .. } => precondition(precondition::LEADER, &leader.to_string()),
        Refusal::FeatureLevelPassed { .. } | Refusal::FeatureLevelUnknown { .. } => {
            precondition(precondition::FEATURE_LEVEL, "cluster")
        }
        Refusal::WorkerInUse { worker, .. } => {
            precondition(precondition::WORKER_IN_USE, worker.as_str())
        }
        Refusal::WouldLose { worker, .. } => {
            precondition(precondition::WOULD_LOSE, worker.as_str())
        }
        Refusal::PortNotFree { worker, .. } => {
            precondition(precondition::PORT_NOT_FREE, worker.as_str())
        }
        Refusal::NothingFits { name, shortage } => {
            let mut facts = shortage_facts(shortage);
            facts.insert("claim".into(), name.to_string());
            capacity(text, facts)
        }
        Refusal::LeaseFull { lease, limit } => {
            capacity(text, metadata([("lease", lease.to_string()), ("limit", limit.to_string())]))
        }
        Refusal::TableFull { what, limit } => {
            capacity(text, metadata([("what", what.to_string()), ("limit", limit.to_string())]))
        }
    }
}

fn name_taken(text: &str, holder: &Allocation, difference: &str) -> Status {
    let mut details = ErrorDetails::with_resource_info(
        "allocation",
        holder.name().as_str(),
        holder.worker.as_str(),
        text,
    );
    let facts = metadata([
        ("worker", holder.worker.to_string()),
        ("uid", holder.claim.uid.to_string()),
        ("token", holder.token.to_string()),
        ("version", holder.version.to_string()),
        ("phase", holder.phase.name().to_string()),
        ("difference", difference.to_string()),
    ]);
    details.set_error_info(reason::NAME_TAKEN, DOMAIN, facts);
    Status::with_error_details(Code::AlreadyExists, text, details)
}

/// When and how a name left the table, for programs.
fn departure_facts(departed: &Departure) -> HashMap<String, String> {
    let cause = match &departed.why {
        ReleaseReason::ByHolder => "released",
        ReleaseReason::Forced { .. } => "forced",
        ReleaseReason::Reclaimed { cause, .. } => cause.name(),
    };
    metadata([
        ("cause", cause.to_string()),
        ("worker", departed.worker.to_string()),
        ("token", departed.token.to_string()),
        ("revision", departed.revision.to_string()),
        ("at_ms", departed.at.0.to_string()),
    ])
}

fn capacity(text: String, facts: HashMap<String, String>) -> Status {
    let details = ErrorDetails::with_error_info(reason::CAPACITY, DOMAIN, facts);
    Status::with_error_details(Code::ResourceExhausted, text, details)
}

/// What was full and by how much, for programs.
fn shortage_facts(shortage: &Shortage) -> HashMap<String, String> {
    let (worker, lack) = match shortage {
        Shortage::OnWorker { worker, lack } => (worker, lack),
        Shortage::OnSelection { looked_at, candidates, not_ready, reasons } => {
            let mut facts = metadata([
                ("looked_at", looked_at.to_string()),
                ("candidates", candidates.to_string()),
                ("not_ready", not_ready.to_string()),
            ]);
            let lacked = |(kind, count): &(LackKind, u64)| {
                (format!("lacking_{}", kind.name()), count.to_string())
            };
            facts.extend(reasons.iter().map(lacked));
            return facts;
        }
    };
    let mut facts = metadata([("worker", worker.to_string())]);
    if let holders @ [_, ..] = lack.holders() {
        facts.insert("holders".into(), holders.iter().join(","));
    }
    let mut add = |key: &str, value: String| facts.insert(key.into(), value);
    match lack {
        Lack::NoRanges => {}
        Lack::NoRange(range) => {
            add("range", range.to_string());
        }
        Lack::Port { port, .. } => {
            add("port", port.to_string());
        }
        Lack::Ports { range, wanted, free, managed, held, quarantined, reserved, .. } => {
            add("range", range.to_string());
            add("wanted", wanted.to_string());
            add("free", free.to_string());
            add("managed", managed.to_string());
            add("held", held.to_string());
            add("quarantined", quarantined.to_string());
            add("reserved", reserved.to_string());
        }
        Lack::Band { range, wanted, longest, free } => {
            add("range", range.to_string());
            add("wanted", wanted.to_string());
            add("free", free.to_string());
            add("longest", longest.to_string());
        }
        Lack::NoGpu(index) | Lack::GpuBusy { index, .. } => {
            add("gpu", index.to_string());
        }
        Lack::GpuMemory { index, wanted_bytes, free_bytes, memory_bytes, .. } => {
            add("gpu", index.to_string());
            add("wanted_bytes", wanted_bytes.to_string());
            add("free_bytes", free_bytes.to_string());
            add("memory_bytes", memory_bytes.to_string());
        }
        Lack::Gpus { wanted, fitting, total, most_free_bytes, .. } => {
            add("wanted", wanted.to_string());
            add("fitting", fitting.to_string());
            add("total", total.to_string());
            add("most_free_bytes", most_free_bytes.to_string());
        }
    }
    facts
}

/// A call that got no answer from the table.
pub fn call(error: CallError) -> Status {
    match error {
        CallError::NotReady(why) => not_ready(&why),
        CallError::Overloaded { retry_after } => overloaded(retry_after),
        CallError::LowSpace { why, retry_after } => low_space(&why, retry_after),
        CallError::Expired => {
            let text = "the deadline passed before the call was proposed; nothing was changed";
            reasoned(Code::DeadlineExceeded, text, reason::NOT_EXECUTED)
        }
        CallError::Unknown(why) => outcome_unknown(&why),
        CallError::NotLeader { leader } => {
            let who = leader.map_or("none is known".into(), |id| format!("it is node {id}"));
            let facts = leader.map(|id| ("leader".to_string(), id.to_string()));
            let facts: HashMap<_, _> = facts.into_iter().collect();
            let details = ErrorDetails::with_error_info(reason::NOT_LEADER, DOMAIN, facts);
            let text = format!("this node is not the leader; {who}");
            Status::with_error_details(Code::Unavailable, text, details)
        }
    }
}

pub fn not_ready(why: &str) -> Status {
    reasoned(Code::Unavailable, format!("{why}; nothing was changed"), reason::NOT_READY)
}

pub fn outcome_unknown(why: &str) -> Status {
    let text = format!(
        "outcome unknown: {why}; it may or may not be done: a repeat with the same uid or token tells, \
         and where a call has neither (a forced one, a new lease) see what is there before a repeat"
    );
    reasoned(Code::Unknown, text, reason::OUTCOME_UNKNOWN)
}

/// Answers that something is too much now, whatever it is: calls, commands, reads, backups or watchers.
pub const OVERLOADED_TOTAL: &str = "portwarden_overloaded_total";

pub fn overloaded(retry_after: Duration) -> Status {
    metrics::counter!(OVERLOADED_TOTAL).increment(1);
    let mut details = ErrorDetails::with_error_info(reason::OVERLOADED, DOMAIN, HashMap::new());
    details.set_retry_info(Some(retry_after));
    let text = format!(
        "too many calls at once; try again in {} ms, nothing was changed",
        retry_after.as_millis()
    );
    Status::with_error_details(Code::ResourceExhausted, text, details)
}

pub fn low_space(why: &str, retry_after: Duration) -> Status {
    let mut details = ErrorDetails::with_error_info(reason::LOW_SPACE, DOMAIN, HashMap::new());
    details.set_retry_info(Some(retry_after));
    let text = format!(
        "the cluster is low on space and admits only what frees, confirms or keeps: {why}; nothing \
         was changed"
    );
    Status::with_error_details(Code::ResourceExhausted, text, details)
}

pub fn page_expired() -> Status {
    let text = "the revision of this listing is no longer kept on this node; start over";
    reasoned(Code::Aborted, text, reason::PAGE_EXPIRED)
}

/// A rule stands in the way of a change of the membership.
pub fn membership(why: &NotChanged) -> Status {
    let text = why.to_string();
    if let NotChanged::NoMember(id) = why {
        return not_found("member", &id.to_string(), &text);
    }
    let mut details =
        ErrorDetails::with_precondition_failure_violation("MEMBERSHIP", "members", text.as_str());
    if matches!(why, NotChanged::Lagging { .. }) {
        details.set_error_info(reason::LAGGING, DOMAIN, HashMap::new());
    }
    Status::with_error_details(Code::FailedPrecondition, text, details)
}

/// An agent speaks for a worker that is another namespace, or another boot.
pub fn other_identity(worker: &WorkerName, text: &str) -> Status {
    let text = format!("{text}; after a boot an agent registers its worker anew");
    let mut details = ErrorDetails::with_precondition_failure_violation(
        "IDENTITY",
        worker.as_str(),
        text.as_str(),
    );
    details.set_error_info(reason::OTHER_IDENTITY, DOMAIN, HashMap::new());
    Status::with_error_details(Code::FailedPrecondition, text, details)
}

pub fn compacted(oldest: Revision) -> Status {
    let text = format!(
        "what came before revision {oldest} is not kept any more: list anew, and watch from there"
    );
    let facts = metadata([("oldest_revision", oldest.to_string())]);
    let details = ErrorDetails::with_error_info(reason::COMPACTED, DOMAIN, facts);
    Status::with_error_details(Code::OutOfRange, text, details)
}

pub fn ahead(from: Revision, now: Revision) -> Status {
    let text = format!(
        "from_revision: {from} must be at most {}: the table is at revision {now}; a copy that is ahead \
         of it is of another cluster, list anew",
        now.0 + 1
    );
    let facts = metadata([("revision", now.to_string())]);
    let details = ErrorDetails::with_error_info(reason::AHEAD, DOMAIN, facts);
    Status::with_error_details(Code::OutOfRange, text, details)
}

pub fn slow_watcher() -> Status {
    let text = "the watcher did not keep up and was cut off; watch on from the last revision";
    reasoned(Code::Aborted, text, reason::SLOW_WATCHER)
}

/// Did a peer refuse a forwarded call because it does not lead?
pub fn is_not_leader(status: &Status) -> bool {
    has_reason(status, reason::NOT_LEADER)
}

pub fn is_outcome_unknown(status: &Status) -> bool {
    has_reason(status, reason::OUTCOME_UNKNOWN)
}

fn has_reason(status: &Status, reason: &str) -> bool {
    status
        .get_details_error_info()
        .is_some_and(|info| info.domain == DOMAIN && info.reason == reason)
}

fn reasoned(code: Code, text: impl Into<String>, reason: &str) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, text, details)
}

fn metadata<const N: usize>(pairs: [(&str, String); N]) -> HashMap<String, String> {
    pairs.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}
