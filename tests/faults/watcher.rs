//! Watchers: each follows the changes from node to node, and records what it is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use portwarden::proto::{reason, v1};
use tokio::time::{sleep, timeout};
use tonic_types::StatusExt as _;
use v1::allocator_client::AllocatorClient;

use crate::caller::Caller;
use crate::history::{Record, Recorder};

/// Progress comes every three seconds; a stream that is silent for longer is left. Soon: while all watchers
/// are on a node that is cut off, what they are not told may be kept nowhere else in the end.
const SILENCE_MAX: Duration = Duration::from_millis(3500);
/// A node that does not begin to tell for so long is left: the longer nobody is told, the more is not
/// kept any more, and must be guessed by the checker.
const OPEN_MAX: Duration = Duration::from_secs(1);

pub struct Watcher {
    pub recorder: Arc<Recorder>,
    pub number: u32,
    /// Empty: everything.
    pub worker: String,
    /// All up to here was told.
    pub told: Arc<AtomicU64>,
}

impl Watcher {
    /// Never ends: who wants no more drops it.
    pub async fn follow(self, mut caller: Caller) {
        // What it wants next is not kept by a node, which has this one first. Another may have it.
        let mut compacted: Option<(u64, u64)> = None;
        loop {
            let from = self.told.load(Ordering::Acquire) + 1;
            if let Err(Some(oldest)) = self.one_stream(&caller, from).await {
                let from = self.told.load(Ordering::Acquire) + 1;
                compacted = match compacted.filter(|(wanted, _)| *wanted == from) {
                    Some((_, other)) => {
                        self.told.fetch_max(oldest.min(other) - 1, Ordering::AcqRel);
                        None
                    }
                    None => Some((from, oldest)),
                };
            }
            caller.go_elsewhere();
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// The error has the oldest revision that could be had, where that is why.
    async fn one_stream(&self, caller: &Caller, from: u64) -> Result<(), Option<u64>> {
        let mut client = AllocatorClient::new(caller.channel()).max_decoding_message_size(16 << 20);
        let worker = self.worker.clone();
        let request = v1::WatchRequest { from_revision: from, worker, ..Default::default() };
        let opened = timeout(OPEN_MAX, client.watch(request)).await.map_err(|_| None)?;
        let mut stream = opened.map_err(|status| oldest(&status))?.into_inner();
        let (watcher, endpoint) = (self.number, caller.endpoint().to_string());
        let worker = self.worker.clone();
        self.recorder.put(|at| Record::WatchBegins { at, watcher, endpoint, from, worker });
        loop {
            let message = timeout(SILENCE_MAX, stream.message()).await.map_err(|_| None)?;
            let message = message.map_err(|status| oldest(&status))?;
            let Some(message) = message else { return Ok(()) };
            let (told, partial) = (message.revision, message.partial);
            self.recorder.put(|at| Record::Watched { at, watcher, message });
            if !partial {
                self.told.fetch_max(told, Ordering::AcqRel);
            }
        }
    }
}

fn oldest(status: &tonic::Status) -> Option<u64> {
    let info = status.get_details_error_info().filter(|info| info.reason == reason::COMPACTED)?;
    info.metadata.get("oldest_revision")?.parse().ok()
}
