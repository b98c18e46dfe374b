//! Calls that a peer carries here, and those whose callers have given them up.
//!
//! A call that the way here delays may come after its caller has turned elsewhere, was served there, and
//! has given back what it got: done then, it would hold something for nobody. So a peer says at once when
//! nobody waits any more. That lies behind the call in the same connection: when both were delayed, it is
//! there with the call, which rests once before it begins. Nothing orders the two beyond that.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::{Deadline, Inner, LocalCalls, Node};
use crate::lock::guard;
use crate::proto::peer;
use crate::raft::PeerHooks;

/// Calls that are remembered as given up, the last ones.
const GIVEN_UP_MAX: usize = 16_384;
/// Longest that a peer's call may run, whatever it says.
const FORWARDED_MAX: Duration = Duration::from_secs(120);

/// A call for a peer. What travels is the time that is left: the clocks of two nodes differ.
pub(super) fn forwarded(
    method: &str,
    request: Vec<u8>,
    deadline: Deadline,
) -> peer::ForwardRequest {
    let remaining = deadline.saturating_duration_since(Instant::now());
    peer::ForwardRequest {
        header: None,
        method: method.into(),
        request: request.into(),
        remaining_ms: remaining.as_millis() as u64,
        request_id: crate::request::id(),
        call: 0,
    }
}

/// A call, by its sender's process and its number there.
type Call = (String, u64);

#[derive(Default)]
struct GivenUp(Mutex<Book>);

#[derive(Default)]
struct Book {
    running: BTreeSet<Call>,
    given_up: BTreeSet<Call>,
    /// In the order in which they came.
    queue: VecDeque<Call>,
}

impl GivenUp {
    /// Of one that runs it is too late to say so.
    fn add(&self, call: Call) {
        let mut book = guard(&self.0);
        if book.running.contains(&call) || !book.given_up.insert(call.clone()) {
            return;
        }
        book.queue.push_back(call);
        if book.queue.len() > GIVEN_UP_MAX
            && let Some(oldest) = book.queue.pop_front()
        {
            book.given_up.remove(&oldest);
        }
    }

    /// `None`: it was given up. Else it runs until the guard goes.
    fn begin(&self, call: Call) -> Option<Running<'_>> {
        let mut book = guard(&self.0);
        if book.given_up.contains(&call) {
            return None;
        }
        book.running.insert(call.clone());
        Some(Running { calls: self, call })
    }
}

struct Running<'a> {
    calls: &'a GivenUp,
    call: Call,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        guard(&self.calls.0).running.remove(&self.call);
    }
}

/// What peers ask of this node beside Raft.
pub(super) struct Hooks {
    calls: Arc<OnceLock<Arc<dyn LocalCalls>>>,
    given_up: GivenUp,
    pub node: OnceLock<Weak<Inner>>,
}

impl Hooks {
    pub fn new(calls: Arc<OnceLock<Arc<dyn LocalCalls>>>) -> Self {
        Hooks { calls, given_up: GivenUp::default(), node: OnceLock::new() }
    }

    fn node(&self) -> Option<Node> {
        Some(Node { inner: self.node.get().and_then(Weak::upgrade)? })
    }
}

#[tonic::async_trait]
impl PeerHooks for Hooks {
    async fn forward(&self, request: peer::ForwardRequest, came: Instant) -> peer::ForwardResponse {
        // What it took to find out who calls is of the caller's time too.
        let deadline = came + Duration::from_millis(request.remaining_ms).min(FORWARDED_MAX);
        let peer::ForwardRequest { header, method, request, request_id, call, .. } = &request;
        tokio::task::yield_now().await;
        let session = header.as_ref().map_or("", |header| &header.from_session);
        let running = self.given_up.begin((session.into(), *call));
        let result = match self.calls.get() {
            _ if running.is_none() => {
                Err(tonic::Status::cancelled("its caller has given it up; nothing was changed"))
            }
            Some(calls) => calls.call(method, request, request_id, deadline).await,
            None => Err(tonic::Status::unavailable("this node is starting")),
        };
        use peer::forward_response::Result as Answer;
        let result = match result {
            Ok(response) => Answer::Response(response.into()),
            Err(status) => Answer::Status(peer::Status {
                code: status.code().into(),
                message: status.message().into(),
                details: status.details().to_vec().into(),
            }),
        };
        peer::ForwardResponse { result: Some(result) }
    }

    fn give_up(&self, request: &peer::GiveUpRequest) {
        let session = request.header.as_ref().map_or("", |header| &header.from_session);
        self.given_up.add((session.into(), request.call));
    }

    async fn probe(&self, request: peer::ProbeRequest) -> peer::ProbeResponse {
        let from = request.header.map_or(0, |header| header.from);
        match self.node() {
            Some(node) => {
                let acknowledged = node.roll().acknowledged(from);
                peer::ProbeResponse { acknowledged, ..node.own_state() }
            }
            // Without an incarnation: who asks shall ask again.
            None => peer::ProbeResponse::default(),
        }
    }

    async fn join(&self, request: peer::JoinRequest) -> Result<peer::JoinResponse, tonic::Status> {
        let starting = || tonic::Status::unavailable("this node is starting");
        self.node().ok_or_else(starting)?.take_in(request).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_deadline_travels_as_the_time_that_is_left() {
        let deadline = Instant::now() + Duration::from_secs(5);
        let left = || forwarded("/m", vec![1], deadline).remaining_ms;
        assert_eq!(left(), 5_000);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(left(), 3_000);
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(left(), 0, "nothing is left of a deadline that is past");
    }

    /// When the call that came last must be done.
    #[derive(Default)]
    struct Due(std::sync::Mutex<Option<Deadline>>);

    #[tonic::async_trait]
    impl LocalCalls for Due {
        async fn call(
            &self,
            _: &str,
            _: &[u8],
            _: &str,
            deadline: Deadline,
        ) -> Result<Vec<u8>, tonic::Status> {
            *self.0.lock().unwrap() = Some(deadline);
            Ok(Vec::new())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_counts_from_when_the_call_came_and_not_from_when_its_caller_was_known() {
        let due = Arc::new(Due::default());
        let hooks = Hooks::new(Arc::new(OnceLock::from(due.clone() as Arc<dyn LocalCalls>)));
        let came = Instant::now();
        let asked = forwarded("/m", vec![], came + Duration::from_secs(5));
        tokio::time::advance(Duration::from_secs(3)).await;
        hooks.forward(asked, came).await;
        assert_eq!(*due.0.lock().unwrap(), Some(came + Duration::from_secs(5)));
    }

    #[derive(Default)]
    struct Counting(AtomicUsize);

    #[tonic::async_trait]
    impl LocalCalls for Counting {
        async fn call(
            &self,
            _: &str,
            _: &[u8],
            _: &str,
            _: Deadline,
        ) -> Result<Vec<u8>, tonic::Status> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Vec::new())
        }
    }

    /// Both were delayed: the call, and behind it the word that nobody waits.
    #[tokio::test]
    async fn what_its_caller_has_given_up_is_not_begun() {
        let calls = Arc::new(Counting::default());
        let hooks = Hooks::new(Arc::new(OnceLock::from(calls.clone() as Arc<dyn LocalCalls>)));
        let header = |session: &str| {
            Some(peer::Header { from_session: session.into(), ..Default::default() })
        };
        let forward = |session: &str, call| {
            let now = Instant::now();
            let asked = forwarded("/m", vec![], now + Duration::from_secs(9));
            hooks.forward(peer::ForwardRequest { header: header(session), call, ..asked }, now)
        };
        let gives_up =
            async { hooks.give_up(&peer::GiveUpRequest { header: header("a"), call: 7 }) };
        let (answer, ()) = futures::join!(forward("a", 7), gives_up);
        let Some(peer::forward_response::Result::Status(status)) = answer.result else {
            panic!("{answer:?}")
        };
        assert_eq!(status.code, i32::from(tonic::Code::Cancelled));
        for (session, call) in [("a", 8), ("b", 7)] {
            forward(session, call).await;
        }
        assert_eq!(calls.0.load(Ordering::Relaxed), 2, "others are");
    }

    #[test]
    fn the_last_ones_are_remembered_and_none_that_ran_already() {
        let given_up = GivenUp::default();
        let call = |number: u64| ("a".to_string(), number);
        let running = given_up.begin(call(99_999));
        given_up.add(call(99_999));
        drop(running);
        assert!(given_up.begin(call(99_999)).is_some());
        // Whatever their numbers are.
        (0..=GIVEN_UP_MAX as u64).rev().for_each(|number| given_up.add(call(number)));
        assert!(given_up.begin(call(GIVEN_UP_MAX as u64)).is_some(), "the first one that came");
        assert!(given_up.begin(call(0)).is_none());
    }
}
