//! Bugs that must never be, for the tests that must find them (docs/testing.md, `scripts/planted`).
//!
//! Compiled under `cfg(planted)` alone, which build.rs sets where it is told to: never in a normal build,
//! and not in one without assertions. Which of them is in the process is said by the environment when it
//! starts; each is one line at its place in the source.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::OnceLock;

use crate::core::Command;

/// Where the name of the bug stands.
pub const CHOSEN: &str = "PORTWARDEN_PLANTED";

macro_rules! bugs {
    ($($bug:ident = $name:literal: $what:literal;)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Bug {
            $(#[doc = $what] $bug,)*
        }

        /// All of them, by name, with what each does.
        pub const ALL: &[(Bug, &str, &str)] = &[$((Bug::$bug, $name, $what)),*];
    };
}

bugs! {
    AckedBeforeSync = "acked-before-sync": "an entry of the log is acknowledged before it is synced";
    VoteNotDurable = "vote-not-durable": "a vote is answered and never written";
    ReadWithoutRound = "read-without-round": "a leader answers reads without asking a quorum";
    ReadJoinsRound = "read-joins-round": "a read shares a round that began before it came";
    ReadFromFollower = "read-from-follower": "any node answers reads from its own copy";
    ReleaseIgnoresToken = "release-ignores-token": "a release frees whatever the name holds now";
    ExpiryOutsideLog = "expiry-outside-log": "a leader ends leases in its own table alone";
    DeposedExpiry = "deposed-expiry": "what a deposed leader's timers proposed is applied";
    RenewedTooLate = "renewed-too-late": "a keepalive is acknowledged after the end was proposed";
    SweepWithoutEvidence = "sweep-without-evidence": "ports count as closed without being looked at";
    LeaseLossFrees = "lease-loss-frees": "a lost lease frees at once on a worker with an agent";
    SnapshotWithoutQuarantines = "snapshot-without-quarantines": "a snapshot leaves quarantines out";
    AppliedTwice = "applied-twice": "after a restart the last entry is applied a second time";
    HashOrder = "hash-order": "workers are placed on in the order of a hash map";
    WatchSkips = "watch-skips": "a watch that goes on leaves out the first revision";
    GangInPart = "gang-in-part": "of a gang that does not fit, what did fit is granted";
    RetryGrantsAnew = "retry-grants-anew": "a repeated request is granted a second time";
    RestoreReusesTokens = "restore-reuses-tokens": "a restored table goes on at the old revision";
    RecoveredEarly = "recovered-early": "a node has recovered once it has applied what its log had";
    WipedNodeVotes = "wiped-node-votes": "a node without its data takes part under its old id";
    DependsOnProcess = "depends-on-process": "a reason has the id of the process in it";
}

/// Is this the bug of this process? A name that is none is one at its start: see [`check`].
pub fn is(bug: Bug) -> bool {
    static PLANTED: OnceLock<Option<Bug>> = OnceLock::new();
    *PLANTED.get_or_init(|| check().unwrap_or_else(|why| panic!("{why}"))) == Some(bug)
}

/// The bug that the environment names; an error where there is none of that name.
pub fn check() -> Result<Option<Bug>, String> {
    let Some(name) = std::env::var_os(CHOSEN).filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    let found = ALL.iter().find(|(_, known, _)| name == *known);
    found.map(|(bug, ..)| Some(*bug)).ok_or_else(|| format!("{CHOSEN}={name:?}: no such bug"))
}

/// In an order that depends on the process.
pub fn in_hash_order<T: Hash + Eq>(all: impl Iterator<Item = T>) -> std::vec::IntoIter<T> {
    let all: Vec<T> = all.collect();
    if !is(Bug::HashOrder) {
        return all.into_iter();
    }
    let mixed: HashMap<T, ()> = all.into_iter().map(|item| (item, ())).collect();
    mixed.into_keys().collect::<Vec<_>>().into_iter()
}

/// As the process with this id would have it.
pub fn on_this_process(command: &Command) -> Command {
    let mut command = command.clone();
    if let Command::Quarantine { reason, .. } = &mut command
        && is(Bug::DependsOnProcess)
    {
        reason.push_str(&std::process::id().to_string());
    }
    command
}
