//! The part of the table that concerns one worker, followed by watch.
//!
//! Listed once, then changed event by event. Where the changes between are no longer kept by any
//! node, it is listed anew. It lags, and says by how much: [`Table::revision`] is what an observation
//! is stamped with.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::client::{Client, ClientError, Heard};
use crate::proto::{reason, v1};

/// Before it is listed again after a failure.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, PartialEq, Default)]
pub struct Table {
    /// All changes up to here are in.
    pub revision: u64,
    /// `None`: it was removed.
    pub worker: Option<v1::Worker>,
    /// By name.
    pub allocations: BTreeMap<String, v1::Allocation>,
}

impl Table {
    pub fn apply(&mut self, heard: Heard) {
        for event in heard.events {
            self.apply_one(event);
        }
        self.revision = heard.revision;
    }

    fn apply_one(&mut self, event: v1::WatchEvent) {
        match (event.r#type.as_str(), event.allocation, event.worker) {
            ("released" | "reclaimed", Some(allocation), _) => {
                self.allocations.remove(&allocation.name);
            }
            (_, Some(allocation), _) => {
                self.allocations.insert(allocation.name.clone(), allocation);
            }
            ("worker_removed", _, Some(_)) => self.worker = None,
            (_, _, Some(worker)) => {
                // It may have been fetched after it was listed.
                let known = self.worker.as_ref().map_or(0, |known| known.version);
                if worker.version >= known {
                    self.worker = Some(worker);
                }
            }
            _ => {}
        }
    }
}

/// Lists, then the worker itself: so nothing of it that is older than the listing is missed.
async fn list(client: &Client, worker: &str) -> Result<Table, ClientError> {
    let request = v1::ListRequest { worker: worker.into(), ..Default::default() };
    let listing = client.list(request).await?;
    let worker = match client.worker_get(worker, None).await {
        Ok(answer) => answer.worker,
        Err(error) if error.code() == Some(tonic::Code::NotFound) => None,
        Err(error) => return Err(error),
    };
    let allocations = listing.items.into_iter().map(|a| (a.name.clone(), a)).collect();
    Ok(Table { revision: listing.revision, worker, allocations })
}

/// Follows a worker for ever; shows what is known, `None` until anything is.
pub async fn follow(
    client: Client,
    worker: String,
    shown: watch::Sender<Option<Arc<Table>>>,
) -> Infallible {
    loop {
        let table = match list(&client, &worker).await {
            Ok(table) => table,
            Err(error) => {
                debug!(%error, "the worker cannot be listed");
                sleep(PAUSE).await;
                continue;
            }
        };
        info!(revision = table.revision, held = table.allocations.len(), "the table is listed");
        let error = follow_from(&client, &worker, table, &shown).await;
        if error.reason() != Some(reason::COMPACTED) {
            warn!(%error, "the worker cannot be watched; it is listed anew");
            sleep(PAUSE).await;
        }
    }
}

/// Until the watch ends for good.
async fn follow_from(
    client: &Client,
    worker: &str,
    mut table: Table,
    shown: &watch::Sender<Option<Arc<Table>>>,
) -> ClientError {
    let from_revision = table.revision + 1;
    let request = v1::WatchRequest { from_revision, worker: worker.into(), ..Default::default() };
    let mut watch = client.watch(request);
    loop {
        shown.send_replace(Some(Arc::new(table.clone())));
        match watch.next().await {
            Ok(heard) => table.apply(heard),
            Err(error @ ClientError::Unavailable { .. }) => debug!(%error, "no news"),
            Err(error) => return error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocation(kind: &str, revision: u64, name: &str) -> v1::WatchEvent {
        let allocation =
            v1::Allocation { name: name.into(), version: revision, ..Default::default() };
        let allocation = Some(allocation);
        v1::WatchEvent { r#type: kind.into(), revision, allocation, ..Default::default() }
    }

    fn worker(kind: &str, version: u64) -> v1::WatchEvent {
        let worker = Some(v1::Worker { name: "w".into(), version, ..Default::default() });
        v1::WatchEvent { r#type: kind.into(), revision: version, worker, ..Default::default() }
    }

    #[test]
    fn what_is_let_go_is_gone_and_everything_else_is_as_it_was_last() {
        let mut table = Table::default();
        table.apply(Heard {
            revision: 5,
            events: vec![
                allocation("allocated", 2, "a"),
                allocation("allocated", 3, "b"),
                allocation("lingering", 4, "a"),
                allocation("reclaimed", 5, "b"),
            ],
        });
        assert_eq!(table.revision, 5);
        assert_eq!(table.allocations.keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(table.allocations["a"].version, 4);
    }

    #[test]
    fn a_worker_is_not_taken_back_to_what_it_was() {
        let known = v1::Worker { name: "w".into(), version: 9, ..Default::default() };
        let mut table = Table { worker: Some(known), ..Table::default() };
        table.apply(Heard { revision: 7, events: vec![worker("worker", 7)] });
        assert_eq!(table.worker.as_ref().unwrap().version, 9);
        table.apply(Heard { revision: 10, events: vec![worker("worker", 10)] });
        assert_eq!(table.worker.as_ref().unwrap().version, 10);
        table.apply(Heard { revision: 11, events: vec![worker("worker_removed", 0)] });
        assert_eq!(table.worker, None);
    }
}
