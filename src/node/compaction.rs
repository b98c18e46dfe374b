//! Bounds the log in bytes. openraft bounds it in entries alone, and an entry may be large.
//!
//! When so many bytes were appended since the last snapshot, the next one is written; and when it
//! is there, the log before the one before it goes, however few entries that is. So the log holds
//! at most two such spans and what comes while a snapshot is being written. A member that takes entries
//! more slowly than they come would keep all that it has not taken: one that lacks what the last two
//! snapshots have is sent a snapshot.

use std::time::Duration;

use super::{Node, ticks};
use crate::store::LogStore;

const LOOK_EVERY: Duration = Duration::from_millis(250);

pub(super) async fn bound_bytes(node: Node, log: LogStore, every_bytes: u64) {
    let mut every = ticks(LOOK_EVERY);
    let snapshot_index = || node.inner.metrics().snapshot.map(|at| at.index);
    let (mut newest, mut before) = (snapshot_index(), None);
    let mut since = 0;
    let mut asked = false;
    while node.runs() {
        every.tick().await;
        let now = snapshot_index();
        if now != newest {
            if let Some(goes) = if asked { newest } else { before } {
                let _ = node.inner.raft.trigger().purge_log(goes).await; // fails when Raft ends
            }
            // Who is left behind would be sent the same entries for ever, if they were not to go.
            if let Some(left) = before {
                node.inner.network.leave_behind(left);
            }
            before = newest;
            // What was appended while it was written counts towards the next one.
            if !asked {
                since = log.appended_bytes();
            }
            (newest, asked) = (now, false);
        }
        let appended = log.appended_bytes();
        if appended - since >= every_bytes {
            (since, asked) = (appended, true);
            let _ = node.inner.raft.trigger().snapshot().await; // as above
        }
    }
}
