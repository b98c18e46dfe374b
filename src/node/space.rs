//! Room on the disks: what a node does when it gets short of it, and what the cluster does.
//!
//! Every node looks after the file system of its own data directory: below the watermark
//! (`--low-space`) it is *low*, says so in its status and to whoever probes it, and gives up its
//! reserve when the disk is full. The leader asks the other members. While some are low and those
//! known to have room are no majority, nothing that makes the table grow is admitted: the members
//! that are left could not write it down. What frees, confirms or keeps still is.
//!
//! A minority that is low does not hold the others up: its members go on as long as their disks
//! take the log, and end when they do not; the rest is a majority.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use metrics::gauge;
use tokio::time::Instant;

use super::status::ASK_TIMEOUT;
use super::{CallError, Node, ticks};
use crate::blocking::blocking;
use crate::core::{Command, State, WorkerPatch};
use crate::lock::guard;
use crate::raft::NodeId;
use crate::store::Reserve;

/// How often a node looks after its own disk, and its leader after the others.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const ASK_EVERY: Duration = Duration::from_secs(1);
/// A new leader asks as soon as it notices that it is one.
const LEADS_EVERY: Duration = Duration::from_millis(100);
/// What a member said longer ago does not tell that it has room now.
const HEARD_MAX_AGE: Duration = Duration::from_secs(10);
/// What a refused caller is told to wait: somebody has to make room first.
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// This part of the watermark is kept in reserve.
const RESERVE_DIVISOR: u64 = 4;

/// How much room one node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    pub free_bytes: u64,
    pub low: bool,
}

#[derive(Clone)]
pub(super) struct Space(Arc<Shared>);

struct Shared {
    low_bytes: u64,
    reserve: Reserve,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    own: Option<Room>,
    /// Why `own` could not be learned the last time: said once.
    trouble: Option<String>,
    /// What others said, and when; only on the leader.
    others: BTreeMap<NodeId, (Room, Instant)>,
}

impl Space {
    /// `low_bytes` 0: never low, and no reserve.
    pub fn new(data_dir: &std::path::Path, low_bytes: u64) -> Space {
        let reserve = Reserve::new(data_dir, low_bytes / RESERVE_DIVISOR);
        Space(Arc::new(Shared { low_bytes, reserve, known: Mutex::default() }))
    }

    pub fn own(&self) -> Option<Room> {
        self.known().own
    }

    /// Blocks on the disk.
    fn look(&self) {
        match self.0.reserve.tend(self.0.low_bytes) {
            Ok(free_bytes) => {
                let room = Room { free_bytes, low: free_bytes < self.0.low_bytes };
                let mut known = self.known();
                known.trouble = None;
                let before = known.own.replace(room);
                drop(known);
                if before.is_some_and(|before| before.low) != room.low {
                    let low_bytes = self.0.low_bytes;
                    match room.low {
                        true => tracing::error!(free_bytes, low_bytes, "the disk is low on space"),
                        false => tracing::info!(free_bytes, "the disk has room again"),
                    }
                }
            }
            Err(error) => {
                let why = error.to_string();
                if self.known().trouble.replace(why.clone()).as_ref() != Some(&why) {
                    tracing::warn!(why, "the room on the disk could not be seen to");
                }
            }
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        guard(&self.0.known)
    }

    /// Is any node's disk low, a voter's or not?
    fn any_low(&self) -> bool {
        let known = self.known();
        known.own.iter().chain(known.others.values().map(|(room, _)| room)).any(|room| room.low)
    }

    /// On the leader: why the table must not grow now.
    pub fn refusal(&self, id: NodeId, voters: &[NodeId]) -> Option<String> {
        let known = self.known();
        let now = Instant::now();
        let own = known.own.map(|room| (id, room, now));
        let all: Vec<_> = own
            .into_iter()
            .chain(known.others.iter().map(|(id, (room, at))| (*id, *room, *at)))
            .collect();
        refusal(&all, voters, now, self.0.low_bytes)
    }
}

/// The rule, of what is known of each member.
fn refusal(
    known: &[(NodeId, Room, Instant)],
    voters: &[NodeId],
    now: Instant,
    low_bytes: u64,
) -> Option<String> {
    let of_voters = || known.iter().filter(|(id, ..)| voters.contains(id));
    let low: Vec<_> = of_voters()
        .filter(|(_, room, _)| room.low)
        .map(|(id, room, _)| format!("node {id} has {} bytes free", room.free_bytes))
        .collect();
    let roomy = of_voters()
        .filter(|(_, room, at)| !room.low && now.saturating_duration_since(*at) < HEARD_MAX_AGE);
    if low.is_empty() || roomy.count() > voters.len() / 2 {
        return None;
    }
    Some(format!("{} of {low_bytes} wanted", low.join(", ")))
}

/// Would it make the table grow? `Allocate` of names that are all held is an answer, not a change, and a
/// worker's new boot is what frees.
fn grows(command: &Command, state: &State) -> bool {
    match command {
        Command::Allocate { claims, .. } => {
            claims.iter().any(|claim| state.allocation(&claim.name).is_none())
        }
        Command::RegisterWorker { .. } => true,
        Command::UpdateWorker { patch, .. } => {
            *patch != WorkerPatch { identity: patch.identity.clone(), ..WorkerPatch::default() }
        }
        _ => false,
    }
}

impl Node {
    /// On the leader: which of the commands may be proposed, as far as there is room for them?
    pub(super) fn admit(&self, commands: &[Command]) -> Vec<Result<(), CallError>> {
        let Some(why) = self.refuses_growth() else { return vec![Ok(()); commands.len()] };
        let state = &self.table().state;
        let admit = |command| match grows(command, state) {
            true => {
                metrics::counter!("portwarden_proposals_refused_total", "reason" => "low_space")
                    .increment(1);
                Err(CallError::LowSpace { why: why.clone(), retry_after: RETRY_AFTER })
            }
            false => Ok(()),
        };
        commands.iter().map(admit).collect()
    }

    pub(super) fn refuses_growth(&self) -> Option<String> {
        if !self.inner.space.any_low() {
            return None;
        }
        let membership = self.inner.metrics().membership_config;
        let voters: Vec<_> = membership.membership().voter_ids().collect();
        self.inner.space.refusal(self.id(), &voters)
    }
}

/// Looks after the node's own disk for as long as Raft runs.
pub(super) async fn look_after(node: Node) {
    let id = node.id().to_string();
    let mut every = ticks(LOOK_EVERY);
    while node.runs() {
        every.tick().await;
        let space = node.inner.space.clone();
        let _ = blocking(move || space.look()).await; // it says itself what goes wrong
        if let Some(room) = node.inner.space.own() {
            gauge!("portwarden_low_space", "node" => id.clone()).set(f64::from(u8::from(room.low)));
            gauge!("portwarden_disk_free_bytes", "node" => id.clone()).set(room.free_bytes as f64);
        }
    }
}

/// On the leader: asks the other members how much room they have.
pub(super) async fn ask_others(node: Node) {
    let mut every = ticks(LEADS_EVERY);
    let mut asked_at: Option<Instant> = None;
    while node.runs() {
        every.tick().await;
        if node.leads().is_none() {
            node.inner.space.known().others.clear();
            asked_at = None;
            continue;
        }
        if asked_at.is_some_and(|at| at.elapsed() < ASK_EVERY) {
            continue;
        }
        asked_at = Some(Instant::now());
        for (id, answer) in node.ask_others(ASK_TIMEOUT).await {
            // Who does not answer keeps the word that it gave last, until that is too old.
            if let Some(answer) = answer {
                let room = Room { free_bytes: answer.free_bytes, low: answer.low_space };
                node.inner.space.known().others.insert(id, (room, Instant::now()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::Identity;

    #[test]
    fn a_boot_is_named_also_where_there_is_little_room() {
        let patches = |patch| {
            let name = "w".parse().unwrap();
            grows(&Command::UpdateWorker { name, patch }, &State::default())
        };
        let identity = Identity { machine_id: "m".into(), boot_id: "b".into(), namespace: 1 };
        let booted = WorkerPatch { identity: Some(identity), ..WorkerPatch::default() };
        assert!(!patches(booted.clone()));
        assert!(patches(WorkerPatch { address: Some("h".into()), ..booted }));
    }

    #[tokio::test]
    async fn growth_needs_a_majority_with_room_as_soon_as_one_is_low() {
        let now = Instant::now();
        let long_ago = now.checked_sub(HEARD_MAX_AGE).unwrap();
        let roomy = Room { free_bytes: 100, low: false };
        let low = Room { free_bytes: 7, low: true };
        let voters = [1, 2, 3];
        let refused = |known: &[(NodeId, Room, Instant)]| refusal(known, &voters, now, 50);
        assert_eq!(refused(&[]), None);
        assert_eq!(refused(&[(1, roomy, now)]), None, "nobody is low");
        assert_eq!(refused(&[(1, roomy, now), (2, low, now), (3, roomy, now)]), None);
        assert_eq!(refused(&[(1, low, now), (2, roomy, now), (3, roomy, now)]), None);
        let two = refused(&[(1, roomy, now), (2, low, now), (3, low, now)]);
        assert_eq!(
            two.as_deref(),
            Some("node 2 has 7 bytes free, node 3 has 7 bytes free of 50 wanted")
        );
        // The third is away: the low one is needed for a majority, and must not fill up.
        assert!(refused(&[(1, roomy, now), (2, low, now)]).is_some());
        assert!(refused(&[(1, roomy, now), (2, low, now), (3, roomy, long_ago)]).is_some());
        assert_eq!(refused(&[(1, roomy, now), (2, roomy, now), (3, low, long_ago)]), None);
        // A learner's disk is its own.
        assert_eq!(refused(&[(1, roomy, now), (2, roomy, now), (4, low, now)]), None);
    }
}
