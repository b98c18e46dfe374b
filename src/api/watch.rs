//! `Allocator.Watch`: the changes of the table as a stream.
//!
//! A node serves its watchers from its own copy. When a watch begins, and every few seconds for all
//! of them, it asks the leader how far the table is by now, waits until its own copy is there, and
//! tells them so: a progress message is proof. A node that cannot prove it for [`UNPROVEN_MAX`] ends
//! its streams, and each watcher goes on at another node from where it is.

use std::convert::Infallible;
use std::time::Duration;

use prost::Message;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::convert::Addresses;
use super::dispatch::{Api, Freshness, Read, Reading, Responses};
use super::filter::Filter;
use super::{convert, errors};
use crate::core::{
    Allocation, ChangeKind, Event, ReleaseReason, Revision, Specs, State, WorkerName,
};
use crate::node::Deadline;
use crate::node::watch::{End, Group, NoWatch, Subscription, Told, Word};
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::proto::{peer, v1};

const PATH: &str = "/portwarden.v1.Allocator/Watch";
/// From one progress message to the next.
const PROGRESS_EVERY: Duration = Duration::from_secs(3);
/// A stream whose node cannot say for so long how far the table is ends.
const UNPROVEN_MAX: Duration = Duration::from_secs(10);
/// From one attempt that failed to the next.
const PROOF_PAUSE: Duration = Duration::from_millis(100);
/// A watcher that takes nothing for so long is cut off, and so is a stream of calls.
pub(super) const SEND_MAX: Duration = Duration::from_secs(30);
/// A message is closed once it is this large; one event is at most ~1.6 MiB, an answer 4 MiB.
const MESSAGE_SOFT_BYTES: usize = 512 << 10;
/// Messages that wait to be sent.
const MESSAGES_AHEAD: usize = 4;

/// How far the table is, asked of the leader: what nodes ask one another for their watchers.
pub(super) struct Current;

impl Read for Current {
    type Request = peer::RevisionRequest;
    type Response = peer::RevisionResponse;
    type Query = ();
    const PATH: &'static str = "/portwarden.peer.v1.Peer/Revision";

    fn query(_: &peer::RevisionRequest) -> Result<(Freshness, ()), Status> {
        Ok((Freshness::Linearizable, ()))
    }

    fn answer(_: &Api, view: &State, (): &()) -> Result<peer::RevisionResponse, Status> {
        Ok(peer::RevisionResponse { revision: view.revision.0 })
    }
}

/// Does a watcher want to hear of it?
fn wants(filter: &Filter, event: &Event) -> bool {
    let of_worker = |name: &WorkerName| match &filter.worker {
        Some(worker) => worker == name,
        None => !filter.is_of_allocations(),
    };
    match event {
        Event::Worker(worker) => of_worker(&worker.name),
        Event::WorkerRemoved(name) => of_worker(name),
        other => match other.allocation() {
            Some(allocation) => filter.matches(allocation),
            None => filter.worker.is_none() && !filter.is_of_allocations(),
        },
    }
}

pub(super) fn shown(
    event: &Event,
    revision: Revision,
    addresses: &impl Addresses,
) -> v1::WatchEvent {
    let shown = |kind: &str| v1::WatchEvent {
        r#type: kind.into(),
        revision: revision.0,
        ..Default::default()
    };
    let of = |kind: &str, allocation: &Allocation, reason: String| v1::WatchEvent {
        allocation: Some(convert::allocation(allocation, addresses)),
        reason,
        ..shown(kind)
    };
    match event {
        Event::Allocated(allocation) => of("allocated", allocation, String::new()),
        Event::Changed(allocation) => {
            let kind = match allocation.last_change.as_ref().map(|last| &last.kind) {
                Some(ChangeKind::Attached) => "attached",
                Some(ChangeKind::Lingered { .. }) => "lingering",
                Some(ChangeKind::Swapped { .. }) => "swapped",
                Some(ChangeKind::Confirmed) | None => "confirmed",
            };
            of(kind, allocation, allocation.reason.as_deref().unwrap_or_default().into())
        }
        Event::Released { allocation, why } => {
            let kind = match why {
                ReleaseReason::Reclaimed { .. } => "reclaimed",
                ReleaseReason::ByHolder | ReleaseReason::Forced { .. } => "released",
            };
            of(kind, allocation, why.to_string())
        }
        Event::Worker(worker) => {
            v1::WatchEvent { worker: Some(convert::worker(worker)), ..shown("worker") }
        }
        Event::WorkerRemoved(name) => {
            let worker = v1::Worker { name: name.to_string(), ..Default::default() };
            v1::WatchEvent { worker: Some(worker), ..shown("worker_removed") }
        }
        Event::LeaseGranted(lease) => {
            v1::WatchEvent { lease: Some(convert::lease_message(lease)), ..shown("lease_granted") }
        }
        Event::FeatureLevel(level) => {
            v1::WatchEvent { reason: format!("level {level}"), ..shown("feature_level") }
        }
        Event::LeaseEnded { lease, expired } => v1::WatchEvent {
            lease: Some(convert::lease_message(lease)),
            reason: if *expired { "expired" } else { "revoked" }.into(),
            ..shown("lease_ended")
        },
    }
}

/// One stream.
struct Watcher {
    api: Api,
    filter: Filter,
    subscription: Subscription,
    from: Revision,
    /// All up to here is in messages that were made.
    told: Revision,
    out: mpsc::Sender<Result<v1::WatchResponse, Status>>,
}

impl Watcher {
    async fn run(mut self) {
        let (api, out) = (self.api.clone(), self.out.clone());
        metrics::gauge!("portwarden_watchers").increment(1);
        let end = tokio::select! {
            end = self.follow() => end.err(),
            () = api.stopping() => Some(errors::not_ready("this node is stopping")),
            () = out.closed() => None,
        };
        if let Some(status) = end {
            let _ = timeout(SEND_MAX, out.send(Err(status))).await; // the watcher may have left
        }
        metrics::gauge!("portwarden_watchers").decrement(1);
    }

    /// Until there is a reason to end.
    async fn follow(&mut self) -> Result<Infallible, Status> {
        self.send(self.progress()).await?;
        loop {
            match self.subscription.next().await {
                Ok(Word::Told(told)) => self.tell(told).await?,
                Ok(Word::Proven(revision)) => {
                    self.told = self.told.max(revision);
                    self.send(self.progress()).await?;
                }
                Err(End::Slow) => return Err(slow()),
                Err(End::Gap) => {
                    return Err(errors::compacted(self.api.inner.node.hub().oldest()));
                }
                Err(End::Unproven) => {
                    return Err(errors::not_ready("this node cannot learn how fresh its copy is"));
                }
            }
        }
    }

    fn progress(&self) -> v1::WatchResponse {
        v1::WatchResponse { revision: self.told.0, ..Default::default() }
    }

    async fn tell(&mut self, told: Told) -> Result<(), Status> {
        let node = self.api.inner.node.clone();
        let specs = told.specs(|workers| node.specs_of(workers));
        for message in self.messages(&told.batch, specs) {
            self.send(message).await?;
        }
        Ok(())
    }

    /// One revision is split over messages only where it is too large for one.
    fn messages(&mut self, groups: &[Group], specs: &Specs) -> Vec<v1::WatchResponse> {
        let mut done = Vec::new();
        let (mut events, mut bytes, mut split) = (Vec::new(), 0, false);
        let mut close = |events: &mut Vec<_>, told: Revision, partial: bool| {
            let events = std::mem::take(events);
            done.push(v1::WatchResponse { revision: told.0, events, partial });
        };
        for group in groups.iter().filter(|group| group.revision >= self.from) {
            for event in group.events.iter().filter(|event| wants(&self.filter, event)) {
                if bytes >= MESSAGE_SOFT_BYTES {
                    close(&mut events, self.told, true);
                    (bytes, split) = (0, true);
                }
                let event = shown(event, group.revision, specs);
                bytes += event.encoded_len();
                events.push(event);
            }
            self.told = self.told.max(group.revision);
            if split || bytes >= MESSAGE_SOFT_BYTES {
                close(&mut events, self.told, false);
                (bytes, split) = (0, false);
            }
        }
        if !events.is_empty() {
            close(&mut events, self.told, false);
        }
        done
    }

    async fn send(&self, message: v1::WatchResponse) -> Result<(), Status> {
        match timeout(SEND_MAX, self.out.send(Ok(message))).await {
            Ok(_) => Ok(()), // one that has left ends this elsewhere
            Err(_) => Err(slow()),
        }
    }
}

fn slow() -> Status {
    metrics::counter!("portwarden_watchers_cut_off_total").increment(1);
    errors::slow_watcher()
}

impl Api {
    /// How far the table is, once this node's own copy is there.
    pub(super) async fn current(&self, deadline: Deadline) -> Result<Revision, Status> {
        let request = peer::RevisionRequest {};
        let answer = self.dispatch::<Reading<Current>>(request, deadline).await?;
        let revision = Revision(answer.revision);
        match timeout_at(deadline, self.inner.node.hub().reached(revision)).await {
            Ok(()) => Ok(revision),
            Err(_) => Err(errors::not_ready("this node's copy is behind the leader's")),
        }
    }

    /// Proves to watchers how fresh they are, until this node stops.
    pub(super) async fn prove(self) {
        let hub = self.inner.node.hub();
        let prove = async {
            loop {
                sleep(PROGRESS_EVERY).await;
                if hub.watchers() == 0 {
                    continue;
                }
                let deadline = Instant::now() + UNPROVEN_MAX;
                let proven = loop {
                    match self.current(deadline).await {
                        Err(_) if Instant::now() < deadline => sleep(PROOF_PAUSE).await,
                        proven => break proven,
                    }
                };
                match proven {
                    Ok(revision) => hub.prove(revision),
                    Err(error) => {
                        tracing::warn!(%error, "watchers are sent to other nodes");
                        hub.end_all(End::Unproven);
                    }
                }
            }
        };
        tokio::select! {
            () = prove => {}
            () = self.stopping() => {}
        }
    }

    async fn begin_watch(
        &self,
        request: v1::WatchRequest,
        deadline: Deadline,
    ) -> Result<mpsc::Receiver<Result<v1::WatchResponse, Status>>, Status> {
        let filter = Filter::parse(&request.worker, &request.selector, &request.name_prefix)?;
        let now = self.current(deadline).await?;
        let from = match request.from_revision {
            0 => Revision(now.0 + 1),
            #[cfg(planted)]
            from if planted::is(Bug::WatchSkips) => Revision(from + 1),
            from if from > now.0 + 1 => return Err(errors::ahead(Revision(from), now)),
            from => Revision(from),
        };
        let subscription = self.inner.node.hub().subscribe(from, filter.worker.clone());
        let subscription = subscription.map_err(|why| match why {
            NoWatch::TooOld { oldest } => errors::compacted(oldest),
            NoWatch::TooMany => Api::overloaded(),
        })?;
        let (out, messages) = mpsc::channel(MESSAGES_AHEAD);
        let told = Revision(from.0 - 1);
        let api = self.clone();
        tokio::spawn(Watcher { api, filter, subscription, from, told, out }.run());
        Ok(messages)
    }

    pub(super) async fn serve_watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Responses<v1::WatchResponse>>, Status> {
        let (metadata, _, message) = request.into_parts();
        let begun = |deadline| self.begin_watch(message, deadline);
        let messages = self.observed(PATH, &metadata, begun).await?.into_inner();
        Ok(Response::new(Box::pin(ReceiverStream::new(messages))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::fake::fake;
    use crate::node::CallError;
    use crate::raft::ApplyObserver as _;

    #[tokio::test(start_paused = true)]
    async fn watchers_are_told_how_fresh_they_are_and_end_where_nobody_knows() {
        let (fake, api) = fake();
        let table = fake.state.lock().unwrap().clone();
        fake.hub.installed(&table);
        let mut watcher = fake.hub.subscribe(Revision(table.revision.0 + 1), None).unwrap();
        let proving = tokio::spawn(api.prove());
        let fail = |times| {
            let refused = || CallError::NotReady("it is to fail".into());
            fake.failures.lock().unwrap().extend(std::iter::repeat_with(refused).take(times));
        };
        for failed in [0, 0, 2] {
            fail(failed);
            let word = watcher.next().await;
            assert!(matches!(word, Ok(Word::Proven(at)) if at == table.revision), "{word:?}");
        }
        let before = Instant::now();
        fail(100_000);
        assert_eq!(watcher.next().await.map(drop), Err(End::Unproven));
        let after = before.elapsed();
        assert!((UNPROVEN_MAX..UNPROVEN_MAX + 2 * PROGRESS_EVERY).contains(&after), "{after:?}");
        proving.abort();
    }
}
