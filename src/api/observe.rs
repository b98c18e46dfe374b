//! What surrounds every call: its deadline, its span, its metrics, the bound on calls in flight.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::SemaphorePermit;
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::{Code, Response, Status};
use tracing::{Instrument as _, Span};

use super::dispatch::{Api, Inner};
use super::errors;
use crate::node::Deadline;
use crate::request;

/// Where the caller names no deadline.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
pub const TIMEOUT_MAX: Duration = Duration::from_secs(60);
/// Taken off the caller's time, so that the answer is there before it stops waiting: a tenth, at
/// most this.
const MARGIN_MAX: Duration = Duration::from_millis(100);
/// Longest request id that is taken over from a caller.
const REQUEST_ID_MAX_BYTES: usize = 128;

/// Methods whose callers lose something where they are turned away.
const URGENT: [&str; 7] = [
    "/portwarden.v1.Allocator/Confirm",
    "/portwarden.v1.Allocator/Attach",
    "/portwarden.v1.Allocator/Release",
    "/portwarden.v1.Allocator/ReportConflict",
    "/portwarden.v1.Leases/KeepAlive",
    "/portwarden.v1.Leases/Revoke",
    // An agent that is not heard in time is taken for lost, with its worker.
    "/portwarden.v1.Workers/Report",
];

const RPC_SECONDS: &str = "portwarden_rpc_seconds";

/// Registers the metrics of this layer; to be called once the recorder is installed.
pub fn describe_metrics() {
    metrics::describe_histogram!(
        RPC_SECONDS,
        metrics::Unit::Seconds,
        "Time from a call's arrival to its answer, by method and gRPC code"
    );
    metrics::describe_counter!(
        errors::OVERLOADED_TOTAL,
        "Calls, and commands on sessions, that were refused because too much was under way"
    );
    metrics::counter!(errors::OVERLOADED_TOTAL).absolute(0);
    let _registered = metrics::histogram!(
        RPC_SECONDS, "method" => "/portwarden.v1.Allocator/Allocate", "code" => code_name(Code::Ok)
    );
}

impl Api {
    /// A unary call, or what begins a stream.
    pub(super) async fn observed<T, F>(
        &self,
        method: &'static str,
        metadata: &MetadataMap,
        call: impl FnOnce(Deadline) -> F,
    ) -> Result<Response<T>, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let urgent = URGENT.contains(&method);
        self.observed_for(time_given(metadata), urgent, method, metadata, call).await
    }

    /// The same, with the time that it is given; `urgent`: its caller loses something where it is turned away.
    pub(super) async fn observed_for<T, F>(
        &self,
        time: Duration,
        urgent: bool,
        method: &'static str,
        metadata: &MetadataMap,
        call: impl FnOnce(Deadline) -> F,
    ) -> Result<Response<T>, Status>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let mut timer = Timer { method, code: "CANCELLED", started: Instant::now() };
        self.inner.node.check().map_err(errors::call)?;
        let Some(_permit) = self.enter(urgent) else {
            timer.code = code_name(Code::ResourceExhausted);
            return Err(Api::overloaded());
        };
        let request_id = self.request_id(metadata);
        let span = span(method, &request_id, false);
        let deadline = timer.started + less_margin(time);
        let call = request::under(request_id, call(deadline));
        let result = call.instrument(span.clone()).await;
        let code = result.as_ref().err().map_or(Code::Ok, Status::code);
        timer.code = code_name(code);
        if let Err(status) = &result {
            let why = status.message();
            span.in_scope(|| tracing::debug!(code = timer.code, why, "refused"));
        }
        result.map(Response::new)
    }

    /// Room for one more call; what is urgent has some of its own, for when there is no other.
    fn enter(&self, urgent: bool) -> Option<SemaphorePermit<'_>> {
        let Inner { in_flight, urgent_in_flight, node, .. } = &*self.inner;
        let room = in_flight.try_acquire().ok();
        if room.is_some() || !urgent {
            return room;
        }
        let room = urgent_in_flight.try_acquire().ok();
        if room.is_none() {
            node.turn_urgent_away();
        }
        room
    }

    /// The caller's `x-request-id`, or one that is unique to this process.
    fn request_id(&self, metadata: &MetadataMap) -> String {
        let given = metadata.get("x-request-id").and_then(|value| value.to_str().ok());
        match given.filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_MAX_BYTES) {
            Some(id) => id.to_string(),
            None => {
                let number = self.inner.next_request.fetch_add(1, Ordering::Relaxed);
                format!("{}-{number}", self.inner.node.id())
            }
        }
    }
}

/// Under which the log tells of a call. It tells of changes of the members at all levels, and of other calls
/// at debug level alone: theirs would take a twentieth of the leader's time.
pub(super) fn span(method: &str, request_id: &str, forwarded: bool) -> Span {
    let forwarded = forwarded.then_some(true);
    match method.starts_with("/portwarden.v1.Cluster/") {
        true => tracing::info_span!("rpc", method, request_id, forwarded),
        false => tracing::debug_span!("rpc", method, request_id, forwarded),
    }
}

/// Records the call when it ends, however it ends: a caller that hangs up drops the future.
struct Timer {
    method: &'static str,
    code: &'static str,
    started: Instant,
}

impl Drop for Timer {
    fn drop(&mut self) {
        let seconds = self.started.elapsed().as_secs_f64();
        metrics::histogram!(RPC_SECONDS, "method" => self.method, "code" => self.code)
            .record(seconds);
    }
}

/// How long the caller of a unary method waits.
fn time_given(metadata: &MetadataMap) -> Duration {
    let header = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok());
    header.and_then(parse_timeout).unwrap_or(TIMEOUT_DEFAULT)
}

/// How long a call may take on this node.
fn less_margin(time: Duration) -> Duration {
    let time = time.min(TIMEOUT_MAX);
    time - (time / 10).min(MARGIN_MAX)
}

/// `TimeoutValue TimeoutUnit` of
/// <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>: at most 8 digits, one unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}

/// As the gRPC specification spells it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_bounded_and_shrunk() {
        let given = |text: Option<&str>| {
            let mut metadata = MetadataMap::new();
            if let Some(text) = text {
                metadata.insert("grpc-timeout", text.parse().unwrap());
            }
            less_margin(time_given(&metadata))
        };
        assert_eq!(given(None), TIMEOUT_DEFAULT - MARGIN_MAX);
        assert_eq!(given(Some("500m")), Duration::from_millis(450));
        assert_eq!(given(Some("99999999H")), TIMEOUT_MAX - MARGIN_MAX);
        for bad in ["", "S", "1", "1x", "-1S", "123456789S", "ä"] {
            assert_eq!(parse_timeout(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn a_request_id_that_is_too_long_is_replaced() {
        let (_, api) = crate::api::fake::fake();
        let taken = |id: String| {
            let mut metadata = MetadataMap::new();
            metadata.insert("x-request-id", id.parse().unwrap());
            api.request_id(&metadata) == id
        };
        assert!(taken("a".repeat(REQUEST_ID_MAX_BYTES)));
        assert!(!taken("a".repeat(REQUEST_ID_MAX_BYTES + 1)));
    }
}
