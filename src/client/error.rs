//! What a call can end with, by what the caller can do about it.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::causes::{causes, never_connected};
use crate::proto::{DOMAIN, reason};

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("endpoint {endpoint:?} {why}")]
    Endpoint { endpoint: String, why: String },
    /// The cluster's answer. Nothing was changed.
    #[error("{}", .0.status.message())]
    Refused(Box<Refused>),
    /// No node served the call in time. Nothing was changed. `overloaded`: each that answered had too
    /// much to do.
    #[error("no node served the call in time: {why}")]
    Unavailable { why: String, overloaded: bool },
    /// The call may or may not be done. Repeat it with the same uid or token to learn which.
    #[error("outcome unknown: {why}")]
    OutcomeUnknown { why: String },
}

#[derive(Debug, Clone)]
pub struct Refused {
    pub status: Status,
    pub details: ErrorDetails,
}

impl Refused {
    /// Is it for a precondition of this kind?
    pub fn is_for(&self, kind: &str) -> bool {
        let broken = self.details.precondition_failure();
        broken.is_some_and(|broken| broken.violations.iter().any(|one| one.r#type == kind))
    }
}

impl ClientError {
    /// Of the cluster's answer: one of [`crate::proto::reason`], if it has one.
    pub fn reason(&self) -> Option<&str> {
        match self {
            ClientError::Refused(refused) => own_reason(&refused.details),
            _ => None,
        }
    }

    /// Of the cluster's answer.
    pub fn code(&self) -> Option<Code> {
        match self {
            ClientError::Refused(refused) => Some(refused.status.code()),
            _ => None,
        }
    }
}

fn own_reason(details: &ErrorDetails) -> Option<&str> {
    let info = details.error_info()?;
    (info.domain == DOMAIN).then_some(info.reason.as_str())
}

/// What a failed attempt leaves behind.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The cluster's answer.
    Refused(Box<Refused>),
    /// Surely not done; after a pause, if one is asked for.
    NotDone { why: String, pause: Option<Duration> },
    /// May or may not be done.
    Doubtful { why: String },
}

/// A status that came from a node, or that this side made of a failed connection. Only words of
/// our own make an attempt "surely not done": what a proxy says is a doubt.
pub(super) fn judge(status: Status) -> Verdict {
    let why = status.message().to_string();
    if let Some(cause) = causes(&status).last() {
        let why = cause.to_string();
        return match never_connected(&status) {
            true => Verdict::NotDone { why, pause: None },
            false => Verdict::Doubtful { why },
        };
    }
    let details = status.get_error_details();
    match own_reason(&details) {
        Some(reason::NOT_READY | reason::NOT_EXECUTED | reason::NOT_LEADER) => {
            return Verdict::NotDone { why, pause: None };
        }
        Some(reason::OVERLOADED) => {
            let pause = details.retry_info().and_then(|info| info.retry_delay);
            return Verdict::NotDone { why, pause };
        }
        Some(reason::OUTCOME_UNKNOWN) => {
            // The error says so itself.
            let why = why.strip_prefix("outcome unknown: ").map_or(why.clone(), String::from);
            return Verdict::Doubtful { why };
        }
        _ => {}
    }
    match status.code() {
        Code::Unknown
        | Code::Internal
        | Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Unavailable
        | Code::DataLoss => Verdict::Doubtful { why: format!("{:?}: {why}", status.code()) },
        // Also what answers on another listener of a node, or is none.
        Code::Unimplemented => Verdict::NotDone { why: NOT_SERVED.into(), pause: None },
        _ => Verdict::Refused(Box::new(Refused { status, details })),
    }
}

const NOT_SERVED: &str = "it does not serve this call: the address of a node is that of `serve --listen`, \
                          and its build must not be older";

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn sent(code: Code, reason: &str, domain: &str) -> Status {
        let details = ErrorDetails::with_error_info(reason, domain, HashMap::new());
        Status::with_error_details(code, "text", details)
    }

    #[test]
    fn only_our_own_words_make_an_attempt_surely_not_done() {
        let not_done = |status| matches!(judge(status), Verdict::NotDone { .. });
        let doubtful = |status| matches!(judge(status), Verdict::Doubtful { .. });
        let refused = |status| matches!(judge(status), Verdict::Refused(_));
        assert!(not_done(sent(Code::Unavailable, reason::NOT_READY, DOMAIN)));
        assert!(not_done(sent(Code::DeadlineExceeded, reason::NOT_EXECUTED, DOMAIN)));
        assert!(not_done(sent(Code::ResourceExhausted, reason::OVERLOADED, DOMAIN)));
        assert!(not_done(Status::unimplemented("")), "another listener");
        assert!(doubtful(sent(Code::Unavailable, reason::NOT_READY, "a proxy")));
        assert!(doubtful(Status::unavailable("a proxy's")));
        assert!(doubtful(Status::deadline_exceeded("")));
        assert!(doubtful(Status::cancelled("Timeout expired")));
        assert!(doubtful(Status::internal("Missing response message.")));
        assert!(doubtful(sent(Code::Unknown, reason::OUTCOME_UNKNOWN, DOMAIN)));
        assert!(refused(sent(Code::ResourceExhausted, reason::CAPACITY, DOMAIN)));
        assert!(refused(Status::not_found("")));
    }

    #[test]
    fn a_doubt_is_named_once() {
        let details =
            ErrorDetails::with_error_info(reason::OUTCOME_UNKNOWN, DOMAIN, HashMap::new());
        let text = "outcome unknown: it broke";
        let Verdict::Doubtful { why } =
            judge(Status::with_error_details(Code::Unknown, text, details))
        else {
            panic!("a doubt")
        };
        assert_eq!(ClientError::OutcomeUnknown { why }.to_string(), text);
    }
}
