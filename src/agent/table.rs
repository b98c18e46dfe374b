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
use tracing::{info, warn};

use super::Trouble;
use crate::client::{Client, ClientError, Filter, News};
use crate::proto::v1;

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

/// Follows a worker for ever; shows what is known, `None` until anything is.
pub async fn follow(
    client: Client,
    worker: String,
    shown: watch::Sender<Option<Arc<Table>>>,
) -> Infallible {
    loop {
        let error = follow_from_listing(&client, &worker, &shown).await;
        warn!(%error, "the worker cannot be followed; it is listed anew");
        sleep(PAUSE).await;
    }
}

/// Until it cannot be followed on.
async fn follow_from_listing(
    client: &Client,
    name: &str,
    shown: &watch::Sender<Option<Arc<Table>>>,
) -> ClientError {
    let mut copy = client.follow(Filter { worker: name.into(), ..Filter::default() });
    let mut worker = None;
    let mut trouble = Trouble::default();
    loop {
        let news = copy.next().await;
        if news.is_ok() {
            trouble.end("the cluster tells of the worker again");
        }
        match news {
            // The worker after them, so that nothing of it that is older is missed.
            Ok(News::Listed) => match fetch(client, name).await {
                Ok(fetched) => {
                    let held = copy.allocations().len();
                    info!(revision = copy.revision(), held, "the table is listed");
                    worker = fetched;
                }
                Err(error) => return error,
            },
            Ok(News::Heard(heard)) => heard.events.into_iter().for_each(|e| hear(&mut worker, e)),
            // What the agent sees proves nothing about what is newer than the last news.
            Err(error @ ClientError::Unavailable { .. }) => {
                trouble.say(&format!("no news of the worker: {error}"));
                continue;
            }
            Err(error) => return error,
        }
        let (revision, allocations) = (copy.revision(), copy.allocations().clone());
        let table = Table { revision, worker: worker.clone(), allocations };
        shown.send_replace(Some(Arc::new(table)));
    }
}

/// `None`: there is none.
async fn fetch(client: &Client, worker: &str) -> Result<Option<v1::Worker>, ClientError> {
    match client.worker_get(worker, None).await {
        Ok(answer) => Ok(answer.worker),
        Err(error) if error.code() == Some(tonic::Code::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What an event says of the worker itself.
fn hear(worker: &mut Option<v1::Worker>, event: v1::WatchEvent) {
    let Some(told) = event.worker else { return };
    if event.r#type == "worker_removed" {
        *worker = None;
        return;
    }
    // It may have been fetched after it was listed.
    if told.version >= worker.as_ref().map_or(0, |known| known.version) {
        *worker = Some(told);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_not_taken_back_to_what_it_was() {
        let mut known = Some(v1::Worker { name: "w".into(), version: 9, ..Default::default() });
        let mut told = |kind: &str, version| {
            let worker = Some(v1::Worker { name: "w".into(), version, ..Default::default() });
            let event = v1::WatchEvent { r#type: kind.into(), worker, ..Default::default() };
            hear(&mut known, event);
            known.as_ref().map(|worker| worker.version)
        };
        assert_eq!(told("worker", 7), Some(9));
        assert_eq!(told("worker", 10), Some(10));
        assert_eq!(told("worker_removed", 0), None);
    }
}
