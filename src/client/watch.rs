//! Follows the changes of the table, over whatever nodes come and go.
//!
//! A watch goes on from the last revision that it was told of: each change comes once and in order,
//! none is left out, however often the stream breaks. All changes of one revision come together.
//!
//! - A node that no longer keeps the revisions that are wanted says so; another one may still have
//!   them, and is asked. Where none has, [`Watch::next`] ends with the refusal (reason `COMPACTED`):
//!   what came between is lost to this watch, and whoever keeps a copy lists anew, as [`Follow`](super::Follow)
//!   does.
//! - A node proves every few seconds how fresh it is. One that is silent for [`SILENCE_MAX`] is left.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use super::call::{Tour, by};
use super::error::{Verdict, judge};
use super::{Client, ClientError, Refused};
use crate::proto::{reason, v1};

const PATH: &str = "/portwarden.v1.Allocator/Watch";
/// Three progress messages have failed to come.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Least pause before the next stream, give or take half: a node that ends sends all its watchers away
/// at once.
const RETURN_PAUSE: Duration = Duration::from_millis(100);

/// What a watch is told.
#[derive(Debug, Clone, PartialEq)]
pub struct Heard {
    /// All up to here is told.
    pub revision: u64,
    /// In the order of the table; whole revisions. None: nothing that the filters let through has
    /// changed up to `revision`.
    pub events: Vec<v1::WatchEvent>,
}

pub struct Watch {
    client: Client,
    /// As it was asked for; where it goes on is `seen`.
    request: v1::WatchRequest,
    seen: Option<u64>,
    tour: Tour,
    stream: Option<Streaming<v1::WatchResponse>>,
    /// Events of a revision of which more is to come.
    partial: Vec<v1::WatchEvent>,
    /// What the first endpoint said that no longer keeps what is wanted, and all that have been asked since and
    /// do not tell it either.
    compacted: Option<(Box<Refused>, BTreeSet<String>)>,
}

impl Client {
    /// Begins with `from_revision`, 0 being what comes from now on.
    pub fn watch(&self, request: v1::WatchRequest) -> Watch {
        Watch {
            client: self.clone(),
            seen: request.from_revision.checked_sub(1),
            request,
            tour: self.tour(),
            stream: None,
            partial: Vec::new(),
            compacted: None,
        }
    }
}

impl Watch {
    /// All up to here was told; `None` before the first word of a watch from now on.
    pub fn seen(&self) -> Option<u64> {
        self.seen
    }

    /// The endpoint that tells.
    pub fn endpoint(&self) -> &str {
        &self.tour.door().name
    }

    /// The next that is heard. [`ClientError::Unavailable`] where no node took the watch for the
    /// client's timeout: called again, it goes on trying, and nothing is lost by that. Any other
    /// error is final. May be dropped and called again.
    pub async fn next(&mut self) -> Result<Heard, ClientError> {
        let mut failing_since = None;
        loop {
            let verdict = match self.hear().await {
                Ok(Some(heard)) => return Ok(heard),
                Ok(None) => {
                    failing_since = None;
                    continue;
                }
                Err(verdict) => verdict,
            };
            self.leave();
            let deadline = *failing_since.get_or_insert_with(Instant::now) + self.client.timeout;
            let (why, pause) = match verdict {
                Verdict::NotDone { why, pause } => (why, pause),
                Verdict::Doubtful { why } => (why, None),
                Verdict::Refused(refused) => (self.refused(refused)?, None),
            };
            self.look_whether_compacted(deadline)?;
            let (why, overloaded) = (by(self.tour.door(), why), pause.is_some());
            tracing::debug!(why, seen = self.seen, "the watch goes on elsewhere");
            let pause = self.tour.move_on(pause).max(self.client.jitter(RETURN_PAUSE));
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Unavailable { why, overloaded });
            }
            sleep(pause.min(left)).await;
        }
    }

    /// Leaves the stream. Half a revision is told again by the next one.
    fn leave(&mut self) {
        self.stream = None;
        self.partial.clear();
    }

    /// Why to go on elsewhere, or that this is the end.
    fn refused(&mut self, refused: Box<Refused>) -> Result<String, ClientError> {
        let why = refused.status.message().to_string();
        let error = ClientError::Refused(refused.clone());
        match error.reason() {
            Some(reason::COMPACTED) => {
                self.compacted.get_or_insert((refused, BTreeSet::new()));
                Ok(why)
            }
            Some(reason::SLOW_WATCHER) => Ok(why),
            _ => Err(error),
        }
    }

    /// After an endpoint told nothing: whether none does. One that is away may keep more than the others,
    /// but whoever lists anew loses nothing.
    fn look_whether_compacted(&mut self, deadline: Instant) -> Result<(), ClientError> {
        let Some((said, asked)) = &mut self.compacted else { return Ok(()) };
        asked.insert(self.tour.door().name.clone());
        match asked.len() == self.tour.len() || Instant::now() >= deadline {
            true => Err(ClientError::Refused(said.clone())),
            false => Ok(()),
        }
    }

    /// One message; `None` where it completes nothing.
    async fn hear(&mut self) -> Result<Option<Heard>, Verdict> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => {
                let from_revision = self.seen.map_or(0, |seen| seen + 1);
                let request = v1::WatchRequest { from_revision, ..self.request.clone() };
                let requests = tokio_stream::once(request);
                let stream = self.client.open(PATH, self.tour.door(), requests).await?;
                self.stream.insert(stream)
            }
        };
        let message = timeout(SILENCE_MAX, stream.message()).await;
        let ended = |why: &str| Verdict::Doubtful { why: why.into() };
        match message {
            Err(_) => Err(ended("it is silent")),
            Ok(Err(status)) => Err(judge(status)),
            Ok(Ok(None)) => Err(ended("the stream has ended")),
            Ok(Ok(Some(message))) => Ok(self.take(message)),
        }
    }

    fn take(&mut self, message: v1::WatchResponse) -> Option<Heard> {
        self.tour.answered();
        self.compacted = None;
        let v1::WatchResponse { revision, events, partial } = message;
        // No node tells anything twice; if one does, nobody hears it twice.
        let seen = self.seen.unwrap_or(0);
        self.partial.extend(events.into_iter().filter(|event| event.revision > seen));
        if partial {
            return None;
        }
        let revision = revision.max(seen);
        self.seen = Some(revision);
        Some(Heard { revision, events: std::mem::take(&mut self.partial) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Options;
    use crate::proto::DOMAIN;
    use tonic::{Code, Status};
    use tonic_types::{ErrorDetails, StatusExt as _};

    fn watch(from_revision: u64) -> Watch {
        let endpoints = ["127.0.0.1:1", "127.0.0.1:2"].map(String::from).to_vec();
        let client = Client::connect(endpoints, Options::default()).unwrap();
        client.watch(v1::WatchRequest { from_revision, ..Default::default() })
    }

    fn message(revision: u64, of: &[u64], partial: bool) -> v1::WatchResponse {
        let event = |revision: &u64| v1::WatchEvent { revision: *revision, ..Default::default() };
        v1::WatchResponse { revision, events: of.iter().map(event).collect(), partial }
    }

    fn heard(heard: Option<Heard>) -> Option<(u64, Vec<u64>)> {
        heard.map(|h| (h.revision, h.events.iter().map(|event| event.revision).collect()))
    }

    #[tokio::test]
    async fn a_watch_goes_on_after_what_it_was_told() {
        let mut watch = watch(5);
        assert_eq!(watch.seen(), Some(4));
        assert_eq!(heard(watch.take(message(4, &[], false))), Some((4, vec![])));
        assert_eq!(heard(watch.take(message(6, &[5, 6, 6], false))), Some((6, vec![5, 6, 6])));
        // Another node might tell more than it was asked for.
        assert_eq!(heard(watch.take(message(7, &[6, 7], false))), Some((7, vec![7])));
        assert_eq!(heard(watch.take(message(3, &[3], false))), Some((7, vec![])));
        assert_eq!(watch.seen(), Some(7));
    }

    #[tokio::test]
    async fn a_watch_from_now_on_knows_where_it_is_with_the_first_word() {
        let mut watch = watch(0);
        assert_eq!(watch.seen(), None);
        watch.take(message(41, &[], false));
        assert_eq!(watch.seen(), Some(41));
    }

    #[tokio::test]
    async fn half_a_revision_is_held_back_and_told_again_by_the_next_stream() {
        let mut watch = watch(5);
        assert_eq!(watch.take(message(5, &[5, 6], true)), None);
        watch.leave();
        assert_eq!(watch.seen(), Some(4));
        assert_eq!(watch.take(message(5, &[5, 6], true)), None);
        assert_eq!(heard(watch.take(message(6, &[6], false))), Some((6, vec![5, 6, 6])));
    }

    #[tokio::test]
    async fn what_one_node_keeps_no_more_is_asked_of_the_others() {
        let refused = || {
            let facts: [(String, String); 0] = [];
            let details = ErrorDetails::with_error_info(reason::COMPACTED, DOMAIN, facts);
            let status = Status::with_error_details(Code::OutOfRange, "gone", details.clone());
            Box::new(Refused { status, details })
        };
        let mut watch = watch(5);
        let later = Instant::now() + Duration::from_secs(9);
        assert!(watch.look_whether_compacted(later).is_ok(), "it may be away");
        for _ in 0..2 {
            assert!(watch.refused(refused()).is_ok(), "the same node again");
            assert!(watch.look_whether_compacted(later).is_ok());
        }
        // The other one has gone.
        watch.tour.move_on(None);
        let error = watch.look_whether_compacted(later).unwrap_err();
        assert_eq!(error.reason(), Some(reason::COMPACTED));
    }
}
