//! Calls that a peer carries here, and those whose callers have given them up.
//!
//! A call that the way here delays may come after its caller has turned elsewhere, was served there, and
//! has given back what it got: done then, it would hold something for nobody. So a peer says at once when
//! nobody waits any more. That lies behind the call in the same connection: however long both were
//! delayed, it is known before the call begins, since that rests once.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::{Deadline, FORWARDED_MAX, Inner, LocalCalls, Node};
use crate::lock::guard;
use crate::proto::peer;
use crate::raft::PeerHooks;

/// Calls that are remembered as given up, those of the highest numbers.
const GIVEN_UP_MAX: usize = 16_384;

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

/// Number and sender's process of calls.
#[derive(Default)]
struct GivenUp(Mutex<BTreeSet<(u64, String)>>);

impl GivenUp {
    fn add(&self, session: &str, call: u64) {
        let mut calls = guard(&self.0);
        calls.insert((call, session.into()));
        if calls.len() > GIVEN_UP_MAX {
            calls.pop_first();
        }
    }

    fn take(&self, session: &str, call: u64) -> bool {
        let mut calls = guard(&self.0);
        !calls.is_empty() && calls.remove(&(call, session.to_string()))
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
    async fn forward(&self, request: peer::ForwardRequest) -> peer::ForwardResponse {
        let remaining = Duration::from_millis(request.remaining_ms).min(FORWARDED_MAX);
        let deadline = Instant::now() + remaining;
        let peer::ForwardRequest { header, method, request, request_id, call, .. } = &request;
        tokio::task::yield_now().await;
        let session = header.as_ref().map_or("", |header| &header.from_session);
        let result = match self.calls.get() {
            _ if self.given_up.take(session, *call) => {
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
        self.given_up.add(session, request.call);
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
            let soon = Instant::now() + Duration::from_secs(9);
            let asked = forwarded("/m", vec![], soon);
            hooks.forward(peer::ForwardRequest { header: header(session), call, ..asked })
        };
        let gives_up =
            async { hooks.give_up(&peer::GiveUpRequest { header: header("a"), call: 7 }) };
        let (answer, ()) = futures::join!(forward("a", 7), gives_up);
        let Some(peer::forward_response::Result::Status(status)) = answer.result else {
            panic!("{answer:?}")
        };
        assert_eq!(status.code, i32::from(tonic::Code::Cancelled));
        for (session, call) in [("a", 8), ("b", 7), ("a", 7)] {
            forward(session, call).await;
        }
        assert_eq!(calls.0.load(Ordering::Relaxed), 3, "others are, and it is forgotten then");
    }

    #[test]
    fn no_more_are_remembered_than_may_be() {
        let given_up = GivenUp::default();
        (0..=GIVEN_UP_MAX as u64).for_each(|call| given_up.add("a", call));
        assert!(!given_up.take("a", 0));
        assert!(given_up.take("a", 1));
    }
}
