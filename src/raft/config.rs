//! How openraft is set up, and why.

use std::ops::RangeInclusive;
use std::sync::Arc;

use openraft::{Config, SnapshotPolicy};

// Of the runtime's clock.
const HEARTBEAT_MS: u64 = 150;
const ELECTION_MS: RangeInclusive<u64> = 600..=1200;
/// Entries in one append request. What bounds them in bytes is the log reader.
const APPEND_ENTRIES_MAX: u64 = 1024;
/// openraft gives up on a snapshot without progress after this; the network watches the progress.
const SNAPSHOT_TIMEOUT_MS: u64 = 60_000;

/// `snapshot_every_entries`: log entries from one snapshot to the next. The error says what is out of
/// order.
pub fn raft_config(snapshot_every_entries: u64) -> Result<Arc<Config>, String> {
    if snapshot_every_entries == 0 {
        return Err("snapshot_every_entries must be at least 1".into());
    }
    let config = Config {
        cluster_name: "portwarden".into(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: *ELECTION_MS.start(),
        election_timeout_max: *ELECTION_MS.end(),
        // A member that was away must not disturb the others when it comes back.
        enable_pre_vote: Some(true),
        max_payload_entries: APPEND_ENTRIES_MAX,
        install_snapshot_timeout: SNAPSHOT_TIMEOUT_MS,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshot_every_entries),
        // About what the store keeps: it purges up to the older of two snapshots, whatever it is
        // told, and a member that is behind by less is sent entries.
        max_in_snapshot_log_to_keep: snapshot_every_entries,
        purge_batch_size: (snapshot_every_entries / 8).clamp(1, 1024),
        backoff: "50ms 100ms 200ms ..1s".into(),
        // A member that lost its log must not be believed; default is off, said for safety.
        allow_log_reversion: Some(false),
        // Default is on: a leader that restarts would lead on without a vote.
        enable_leader_restore: Some(false),
        ..Config::default()
    };
    config.validate().map(Arc::new).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_is_in_order_and_nothing_dangerous_is_on() {
        let config = raft_config(50_000).unwrap();
        assert_eq!(config.enable_pre_vote, Some(true));
        assert_eq!(config.allow_log_reversion, Some(false));
        assert_eq!(config.enable_leader_restore, Some(false));
        assert_eq!(config.snapshot_policy, SnapshotPolicy::LogsSinceLast(50_000));
    }

    #[test]
    fn what_is_out_of_order_is_named() {
        assert!(raft_config(0).unwrap_err().contains("snapshot_every_entries"));
    }
}
