//! openraft's own suite for log stores and state machines.

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};
use portwarden::raft::{ApplyObserver, StateMachine, TypeConfig};
use portwarden::store::{LogStore, SnapshotStore};
use std::sync::Arc;
use tempfile::TempDir;

struct Ignore;

impl ApplyObserver for Ignore {
    fn applied(
        &self,
        _: &portwarden::core::Command,
        _: &portwarden::core::Applied,
        _: &[portwarden::core::Event],
    ) {
    }
}

/// The suite purges what no snapshot covers: log and snapshots are opened each by itself.
struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let log = LogStore::open(&dir.path().join("log")).unwrap();
        let snapshots = SnapshotStore::open(&dir.path().join("snapshots")).unwrap();
        let (machine, _) = StateMachine::open(snapshots, Arc::new(Ignore)).unwrap();
        Ok((dir, log, machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openrafts_suite_passes() {
    Suite::test_all(Builder).await.unwrap();
}
