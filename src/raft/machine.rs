//! The table as openraft's state machine.
//!
//! Each call of `apply` applies its entries one after the other, tells the observer of every
//! command, and only then answers: so whoever got an answer finds it in the view, and in the
//! observer's books. The view shows whole entries.
//!
//! - The table is in memory. What makes it durable is the log, and a snapshot now and then, written
//!   on a thread for blocking work from a clone that costs nothing: apply never waits for one.
//! - A clone shares all its parts with the table, and what is shared must be copied before it is
//!   changed. So a table to look at is made when somebody looks, and is gone from here before the
//!   next entry.
//! - At the start the newest snapshot that can be read is the table; openraft applies what follows.

use std::io;
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use metrics::histogram;
use openraft::entry::RaftPayload as _;
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;
use tokio::time::Instant;

use super::convert;
use super::types::{
    Batch, BatchReply, Entry, LogId, Snapshot, SnapshotMeta, StoredMembership, TypeConfig,
};
use crate::blocking::{FreedAside, blocking};
use crate::core::{self, Applied, Checkpoint, Command, Event, Leader, Origin, Specs};
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::store::{SnapshotFile, SnapshotStore, StoreError, fatal};

/// Before a snapshot for which there was no room is tried again.
const SNAPSHOT_PAUSE: Duration = Duration::from_secs(1);

/// Told of everything that changes the table, on the way to the answers: must not block.
pub trait ApplyObserver: Send + Sync + 'static {
    /// One command was applied. Comes before anybody is answered, and in the order of the log. The
    /// view must not be looked at from here: it waits until the entry is applied.
    fn applied(&self, command: &Command, applied: &Applied, events: &[Event]);

    /// A checkpoint was applied, to this table. Comes after `applied`.
    fn checkpoint(&self, _at: CommandAt, _checkpoint: &Checkpoint, _state: &core::State) {}

    /// What was applied since the last call is in the view, as this table.
    fn published(&self, _state: &core::State) {}

    /// The whole table was replaced by a peer's snapshot, and the view shows it.
    fn installed(&self, _state: &core::State) {}
}

/// Where a command lies: the index of its entry in the log, and its number in the entry, from 0.
pub type CommandAt = (u64, u32);

/// The table at one moment. A clone is cheap.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// The last entry in it.
    pub applied: Option<LogId>,
    pub membership: StoredMembership,
    pub state: core::State,
}

/// The table as it is now. Clones show the same.
#[derive(Debug, Clone)]
pub struct TableView {
    current: Arc<RwLock<Current>>,
    changed: watch::Receiver<()>,
}

#[derive(Debug)]
struct Current {
    table: Table,
    /// The same, for all who looked since the last entry.
    shown: OnceLock<Arc<Table>>,
}

impl TableView {
    /// For whoever reads for long. Waits while an entry is applied.
    pub fn table(&self) -> Arc<Table> {
        self.current().shown()
    }

    /// For a short look. Waits while an entry is applied, and the next one waits for it.
    pub fn look<T>(&self, at: impl FnOnce(&Table) -> T) -> T {
        at(&self.current().table)
    }

    /// The first table that meets the condition. Waits for ever if none does: bound it in time.
    pub async fn wait_for(&self, mut condition: impl FnMut(&Table) -> bool) -> Arc<Table> {
        let mut changed = self.changed.clone();
        loop {
            changed.mark_unchanged();
            {
                let current = self.current();
                if condition(&current.table) {
                    return current.shown();
                }
            }
            if changed.changed().await.is_err() {
                // The state machine is gone: nothing will change any more.
                std::future::pending().await
            }
        }
    }

    fn current(&self) -> RwLockReadGuard<'_, Current> {
        self.current.read().unwrap_or_else(|_| half_changed())
    }

    fn change(&self) -> RwLockWriteGuard<'_, Current> {
        let mut current = self.current.write().unwrap_or_else(|_| half_changed());
        current.shown.take();
        current
    }
}

impl Current {
    fn shown(&self) -> Arc<Table> {
        self.shown.get_or_init(|| Arc::new(self.table.clone())).clone()
    }
}

fn half_changed() -> ! {
    fatal("the table is not whole", &"a command panicked while it was applied")
}

pub struct StateMachine {
    view: TableView,
    changed: watch::Sender<()>,
    snapshots: SnapshotStore,
    observer: Arc<dyn ApplyObserver>,
}

/// The first that this build does not know.
const UNKNOWN_LEVEL: u32 = core::FEATURE_LEVEL + 1;

impl StateMachine {
    /// Loads the newest good snapshot. Blocks on the disk.
    ///
    /// Errors: the disk, a snapshot of a newer version, or one that was damaged and the log does
    /// not reach back to the one before it.
    pub fn open(
        snapshots: SnapshotStore,
        observer: Arc<dyn ApplyObserver>,
    ) -> Result<(StateMachine, TableView), StoreError> {
        let mut table = Table::default();
        while let Some(file) = snapshots.newest() {
            match load(&file) {
                Ok(loaded) => {
                    let (path, revision) = (file.path().display(), loaded.state.revision);
                    tracing::info!(%path, %revision, "the newest snapshot was read");
                    table = loaded;
                    break;
                }
                Err(error @ StoreError::Damaged { .. }) => snapshots.set_aside(&file, &error)?,
                Err(error) => return Err(error),
            }
        }
        let (changed, changes) = watch::channel(());
        let current = Arc::new(RwLock::new(Current { table, shown: OnceLock::new() }));
        let view = TableView { current, changed: changes };
        let machine = StateMachine { view: view.clone(), changed, snapshots, observer };
        Ok((machine, view))
    }

    /// Outside of Raft: nobody is answered.
    pub(super) fn apply_alone(&mut self, entry: &Entry) -> Result<(), StoreError> {
        self.apply_one(entry.log_id, &entry.payload).map(drop)
    }

    #[cfg(planted)]
    pub fn apply_outside_log(&mut self, command: &Command) {
        let Command::ExpireLease { under, .. } = command else { return };
        let origin = Origin { leader: *under, ..Origin::default() };
        let mut current = self.view.change();
        let (applied, events) = core::apply(&mut current.table.state, &origin, command);
        self.observer.applied(command, &applied, &events);
        drop(current);
        self.published();
    }

    /// Nothing changes where it fails.
    fn apply_one(
        &mut self,
        at: LogId,
        payload: &EntryPayload<Batch, u64, super::Member>,
    ) -> Result<BatchReply, StoreError> {
        if let EntryPayload::Normal(batch) = payload {
            known(batch)?;
        }
        let mut current = self.view.change();
        let Table { applied, membership, state } = &mut current.table;
        *applied = Some(at);
        if let Some(new) = payload.get_membership() {
            for (id, member) in new.nodes() {
                state.remember_member(*id, &member.incarnation);
            }
            *membership = StoredMembership::new(Some(at), new);
        }
        let EntryPayload::Normal(batch) = payload else { return Ok(BatchReply::default()) };
        let leader = Leader { term: at.leader_id.term, node: at.leader_id.node_id };
        let origin = Origin { leader, at: batch.at() };
        let apply = |(command, number): (&Command, u32)| {
            #[cfg(planted)]
            let command = &planted::on_this_process(command);
            let (applied, events) = core::apply(state, &origin, command);
            self.observer.applied(command, &applied, &events);
            if let Command::Checkpoint(checkpoint) = command {
                self.observer.checkpoint((at.index, number), checkpoint, state);
            }
            applied
        };
        let applied = batch.commands().iter().zip(0..).map(apply).collect();
        Ok(BatchReply { applied, ..BatchReply::default() })
    }

    /// Of the workers on which the allocations are that were just told of. Who writes the answers need
    /// not look at the table, which would be to wait for the next entry.
    fn specs(&self, applied: &[Applied]) -> Specs {
        let workers = applied.iter().flat_map(Applied::workers).collect();
        self.view.look(|table| table.state.specs_of(&workers))
    }

    /// Tells everybody of what is in the view now.
    fn published(&self) {
        self.changed.send_replace(());
        self.observer.published(&self.view.current().table.state);
    }
}

/// Fails where the cluster goes on to what this build does not know.
fn known(batch: &Batch) -> Result<(), StoreError> {
    let level = |command: &Command| match *command {
        Command::SetFeatureLevel { level: found @ UNKNOWN_LEVEL.. } => Some(found),
        _ => None,
    };
    match batch.commands().iter().find_map(level) {
        Some(found) => Err(StoreError::FeatureLevel { found, known: core::FEATURE_LEVEL }),
        None => Ok(()),
    }
}

/// What this thread has used so far.
fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// What a snapshot file holds, checked.
fn load(file: &SnapshotFile) -> Result<Table, StoreError> {
    let damaged = |error: &dyn ToString| StoreError::Damaged {
        path: file.path().to_path_buf(),
        what: error.to_string(),
    };
    let meta = convert::meta(file.head()).map_err(|error| damaged(&error))?;
    let state = file.load()?;
    Ok(Table { applied: meta.last_log_id, membership: meta.last_membership, state })
}

/// Writes the table as it was when the builder was made.
pub struct SnapshotBuilder {
    table: FreedAside<Arc<Table>>,
    snapshots: SnapshotStore,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let meta = SnapshotMeta {
            last_log_id: self.table.applied,
            last_membership: self.table.membership.clone(),
        };
        let began = Instant::now();
        loop {
            let (head, state, snapshots) =
                (convert::head(&meta), self.table.state.clone(), self.snapshots.clone());
            let written = blocking(move || snapshots.write(&head, &state));
            match written.await.map_err(io::Error::other)? {
                Ok(snapshot) => {
                    let seconds = began.elapsed().as_secs_f64();
                    histogram!("portwarden_snapshot_seconds").record(seconds);
                    return Ok(Snapshot { meta, snapshot });
                }
                // What was begun is gone, and the log has everything: it can wait for room.
                Err(error) if error.is_full() => {
                    tracing::warn!(%error, "a snapshot waits for room");
                    tokio::time::sleep(SNAPSHOT_PAUSE).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let state = self.view.look(|table| (table.applied, table.membership.clone()));
        #[cfg(planted)]
        if planted::is(Bug::AppliedTwice)
            && let (Some(at), membership) = &state
            && at.index > 0
        {
            let before = LogId { index: at.index - 1, ..*at };
            return Ok((Some(before), membership.clone()));
        }
        Ok(state)
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let began = Instant::now();
        let mut worked = Duration::ZERO;
        let mut answers = Vec::new();
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            // Between two entries the task may change threads.
            let before = processor_time();
            let mut reply = self.apply_one(entry.log_id, &entry.payload)?;
            if let Some(responder) = responder {
                reply.specs = Arc::new(self.specs(&reply.applied));
                answers.push((responder, reply));
            }
            worked += processor_time().saturating_sub(before);
        }
        histogram!("portwarden_apply_seconds").record(began.elapsed().as_secs_f64());
        histogram!("portwarden_apply_processor_seconds").record(worked.as_secs_f64());
        self.published();
        for (responder, reply) in answers {
            responder.send(reply);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { table: self.view.table().into(), snapshots: self.snapshots.clone() }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotFile,
    ) -> Result<(), io::Error> {
        if convert::head(meta) != *snapshot.head() {
            return Err(io::Error::other("the snapshot is not the one that was announced"));
        }
        let snapshots = self.snapshots.clone();
        // Loaded before it takes the place of the others: nothing is lost to one that is damaged.
        let installed = blocking(move || {
            let table = load(&snapshot)?;
            snapshots.install(&snapshot)?;
            Ok::<_, StoreError>(table)
        });
        let table = installed.await.map_err(io::Error::other)??;
        let old = std::mem::replace(&mut self.view.change().table, table);
        drop(FreedAside::from(old));
        let index = meta.last_log_id.map_or(0, |at| at.index);
        tracing::info!(index, "the table is a peer's snapshot now");
        self.changed.send_replace(());
        self.observer.installed(&self.view.current().table.state);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let Some(snapshot) = self.snapshots.newest() else { return Ok(None) };
        let meta = convert::meta(snapshot.head()).map_err(io::Error::other)?;
        Ok(Some(Snapshot { meta, snapshot }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::Revision;
    use crate::raft::backup::Nobody;
    use crate::store::DataDir;

    /// A node of an older build comes upon it with what was committed beside it.
    #[test]
    fn an_entry_that_this_build_does_not_know_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path(), 1).unwrap();
        let snapshots = data.snapshots().unwrap();
        let (mut machine, view) = StateMachine::open(snapshots, Arc::new(Nobody)).unwrap();
        let grant = Command::GrantLease { ttl: core::Millis(60_000) };
        let entry = |index, commands| {
            let leader_id = openraft::vote::leader_id_adv::LeaderId { term: 1, node_id: 1 };
            let log_id = LogId { leader_id, index };
            let batch = Batch::new(core::Millis(0), commands);
            Entry { log_id, payload: EntryPayload::Normal(batch) }
        };
        machine.apply_alone(&entry(1, vec![grant.clone()])).unwrap();
        let before = view.table();
        let level = Command::SetFeatureLevel { level: UNKNOWN_LEVEL };
        let error = machine.apply_alone(&entry(2, vec![grant, level])).unwrap_err();
        assert!(matches!(error, StoreError::FeatureLevel { found: UNKNOWN_LEVEL, .. }), "{error}");
        let after = view.table();
        assert_eq!((after.applied, &after.state), (before.applied, &before.state));
        assert_eq!(after.state.revision, Revision(1));
    }
}
