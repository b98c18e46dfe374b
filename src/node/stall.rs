//! A disk that takes nothing any more, or too little: shown, said, and in the end a reason not to lead.
//!
//! While it hangs, a majority of the others commits, and this node applies what they have on their disks:
//! its callers notice nothing, and most disks that hang go on soon. But what is appended here waits in
//! memory, until there is no room for more and Raft stands still ([`LogStore::room`]). Before that a follower
//! takes no more of its leader, and a leader hands over, so that only its own callers have to turn
//! elsewhere, and nobody waits for an election.

use std::mem;
use std::time::Duration;

use metrics::gauge;
use tracing::{info, warn};

use super::{Node, ticks};
use crate::store::LogStore;

const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A disk that takes nothing for so long is said to hang.
const HANGS_AFTER: Duration = Duration::from_secs(5);

/// Looks after the disk for as long as Raft runs.
pub(super) async fn look_after(node: Node, log: LogStore) {
    let id = node.id().to_string();
    let mut every = ticks(LOOK_EVERY);
    let mut hangs = false;
    while node.runs() {
        every.tick().await;
        let waits = log.waits_for_disk();
        gauge!("portwarden_log_waits_seconds", "node" => id.clone()).set(waits.as_secs_f64());
        let hung = mem::replace(&mut hangs, waits >= HANGS_AFTER);
        match (hung, hangs) {
            (false, true) => warn!(?waits, "the disk takes nothing of the log"),
            (true, false) => info!("the disk takes the log again"),
            _ => {}
        }
        if log.is_crowded() && others_go_on(&node) {
            node.hand_over().await;
        }
    }
}

/// Has whom this node would hand over to something on its disk that is not on the disk here? Else all of
/// them hang.
fn others_go_on(node: &Node) -> bool {
    let roll = node.roll();
    roll.successors()
        .next()
        .is_some_and(|(_, next)| roll.acknowledged(next) > roll.acknowledged(node.id()))
}
