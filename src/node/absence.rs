//! When the leader's process is gone, the others need not wait until its silence is long enough.
//!
//! The kernel closes the connections of a process that ends. A follower asks at the leader's address
//! when its stream of entries has broken off, when a peer wants a pre-vote, and every [`ASK_EVERY`], for it
//! may have had no stream. Where the host says that nobody listens, or another process answers, the
//! leader that it followed is gone, and it no longer refuses a vote for that leader's sake. Then the
//! voters stand for election in turn, one [`TURN`] apart in the order of their ids, with a pre-vote
//! first.
//!
//! It is openraft's election with its rules, only earlier: whoever still hears from the leader refuses,
//! so a follower that is alone in its belief changes nothing. A leader that is cut off, stopped or on a
//! host that died says nothing, and is found out by the timeout as ever.

use std::time::Duration;

use openraft::async_runtime::WatchReceiver as _;
use openraft::raft::TransferLeaderRequest;
use tokio::time::sleep;
use tracing::{info, warn};

use super::Node;
use crate::raft::Vote;

/// What a leader that is gone costs at most, where nothing else told of it.
const ASK_EVERY: Duration = Duration::from_millis(300);
/// From one voter's turn to the next one's, and from one attempt to the next.
const TURN: Duration = Duration::from_millis(50);
/// Then the timeout has its turn.
const ATTEMPTS: u32 = 8;

pub(super) async fn watch(node: Node) {
    let network = &node.inner.network;
    let mut told = None;
    loop {
        tokio::select! {
            () = network.closed() => return,
            () = network.doubted() => {}
            () = sleep(ASK_EVERY) => {}
        }
        network.look_whether_removed();
        succeed(&node, &mut told).await;
    }
}

/// Nothing where this node follows nobody, or whom it follows lives. Says of each leader once that it is
/// gone: without a majority it stays the last one.
async fn succeed(node: &Node, told: &mut Option<Vote>) {
    let raft = &node.inner.raft;
    let seen = raft.metrics().borrow_watched().clone();
    let Some(leader) = seen.current_leader.filter(|leader| *leader != node.id()) else { return };
    let membership = seen.membership_config.membership();
    let Some(member) = membership.get_node(&leader) else { return };
    if !node.inner.network.is_gone(leader, &member.peer).await {
        return;
    }
    if told.replace(seen.vote) != Some(seen.vote) {
        info!(leader, "the leader's process is gone");
    }
    // As if the leader had said so: to nobody's favour, so that all this does is end its lease.
    let request = TransferLeaderRequest::new(seen.vote, leader, None);
    match raft.handle_transfer_leader(request).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return, // somebody else stands or leads already
        Err(error) => return warn!(%error, "the leader is gone, and Raft has stopped"),
    }
    let voters = || membership.voter_ids().filter(|id| *id != leader);
    if !voters().any(|id| id == node.id()) {
        return;
    }
    let before = voters().filter(|id| *id < node.id()).count() as u32;
    sleep(TURN * before).await;
    for _ in 0..ATTEMPTS {
        if raft.metrics().borrow_watched().vote != seen.vote {
            return;
        }
        if let Err(error) = raft.trigger().elect(true).await {
            return warn!(%error, "cannot stand for election");
        }
        sleep(TURN).await;
    }
}
