//! The table as a file of its own, and a new cluster from one.
//!
//! A backup is a snapshot file: the same blocks and checksums, with the membership that the cluster
//! had. What is made of it is a data directory that one node begins a new cluster with: a new
//! cluster id, the table [as a new cluster's](core::State::anew), a log that begins after it, and
//! the members of a new list, of which all but this node are pending until they have spoken. The
//! same is made of what a survivor of a lost cluster has ([`salvage`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::convert;
use super::machine::{ApplyObserver, StateMachine, Table};
use super::types::{NodeId, SnapshotMeta};
use crate::core::{self, Applied, Command, Event};
use crate::store::codec::{Ballot, MemberRecord, MembershipRecord, Position, SnapshotHead};
use crate::store::{self, DataDir, SnapshotFile, StoreError};

/// Writes the table with what is needed to tell whose it is.
pub fn write_backup(table: &Table, out: &mut impl Write) -> io::Result<()> {
    let last_membership = table.membership.clone();
    let meta = SnapshotMeta { last_log_id: table.applied, last_membership };
    store::write_snapshot(out, &convert::head(&meta), &table.state)
}

/// What a backup holds, every checksum and invariant checked.
#[derive(Debug)]
pub struct Backup {
    pub head: SnapshotHead,
    pub state: core::State,
    pub length_bytes: u64,
}

impl Backup {
    pub fn read(path: &Path) -> Result<Backup, RestoreError> {
        let read = || {
            let file = SnapshotFile::read(path)?;
            let (head, length_bytes) = (file.head().clone(), file.length_bytes());
            Ok(Backup { head, state: file.load()?, length_bytes })
        };
        read().map_err(|error| match error {
            StoreError::Damaged { path, what } => RestoreError::Unusable { path, what },
            other => other.into(),
        })
    }

    /// The cluster that it is of; empty where the file names no members.
    pub fn cluster_id(&self) -> &str {
        self.head.membership.nodes.values().next().map_or("", |member| &member.cluster_id)
    }
}

/// Why no data directory was made. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{} is no whole backup: {what}; take another file", .path.display())]
    Unusable { path: PathBuf, what: String },
    #[error("{} is there already: a restore needs a directory that does not exist, or an empty one", .0.display())]
    NotEmpty(PathBuf),
    #[error("{}: {what}: {source}", .path.display())]
    Io { path: PathBuf, what: &'static str, source: io::Error },
}

/// Makes the data directory with which node `id` begins a new cluster over this table, which is a
/// [new cluster's](core::State::anew); answers with the cluster's id.
pub fn restore(
    state: core::State,
    dir: &Path,
    id: NodeId,
    members: &BTreeMap<NodeId, String>,
) -> Result<String, RestoreError> {
    let io = |path: &Path, what| {
        let path = path.to_path_buf();
        move |source| RestoreError::Io { path, what, source }
    };
    match fs::read_dir(dir) {
        Ok(mut found) => match found.next() {
            Some(_) => return Err(RestoreError::NotEmpty(dir.to_path_buf())),
            None => fs::remove_dir(dir).map_err(io(dir, "cannot be replaced"))?,
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io(dir, "cannot be read")(error)),
    }
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io(parent, "cannot be made"))?;
    // Made aside: it gets its name when it is whole.
    let aside = tempfile::Builder::new().prefix(".restore-").tempdir_in(parent);
    let aside = aside.map_err(io(parent, "cannot make a directory"))?;
    let cluster = fill(state, aside.path(), id, members)?;
    fs::rename(aside.path(), dir).map_err(io(dir, "cannot be put in place"))?;
    let _ = aside.keep(); // it has another name by now
    fs::File::open(parent)
        .and_then(|parent| parent.sync_all())
        .map_err(io(parent, "cannot be synced"))?;
    Ok(cluster)
}

fn fill(
    state: core::State,
    dir: &Path,
    id: NodeId,
    members: &BTreeMap<NodeId, String>,
) -> Result<String, StoreError> {
    let data = DataDir::open(dir, id)?;
    let cluster = futures::executor::block_on(restore_into(&data, state, members))?;
    futures::executor::block_on(data.close());
    Ok(cluster)
}

/// Fills a data directory that was just made: see [`restore`].
pub async fn restore_into(
    data: &DataDir,
    mut state: core::State,
    members: &BTreeMap<NodeId, String>,
) -> Result<String, StoreError> {
    let id = data.node_id();
    let cluster = uuid::Uuid::new_v4().to_string();
    data.set_cluster_id(&cluster)?;
    let record = |(member, peer): (&NodeId, &String)| {
        let incarnation = if *member == id { data.incarnation() } else { "" };
        let record = MemberRecord {
            cluster_id: cluster.clone(),
            peer: peer.clone(),
            client: String::new(),
            incarnation: incarnation.into(),
        };
        (*member, record)
    };
    let at = Position { term: 1, node: id, index: 1 };
    let head = SnapshotHead {
        last: Some(at),
        membership_at: Some(at),
        membership: MembershipRecord {
            configs: vec![BTreeSet::from_iter(members.keys().copied())],
            nodes: members.iter().map(record).collect(),
        },
    };
    for (member, record) in &head.membership.nodes {
        state.remember_member(*member, &record.incarnation);
    }
    data.snapshots()?.write(&head, &state)?;
    let log = data.log()?;
    log.purge(at);
    // The first leader's term is a later one. Returns when all of it is on the disk.
    let ballot = Ballot { term: at.term, node: id, committed: true };
    log.save_vote(ballot).await;
    Ok(cluster)
}

/// Nobody listens.
pub(super) struct Nobody;

impl ApplyObserver for Nobody {
    fn applied(&self, _: &Command, _: &Applied, _: &[Event]) {}
}

/// The table of a data directory whose node does not run: its newest snapshot, and every entry of
/// its log, committed or not: what was acknowledged and is here is in it. What only others had is
/// not.
pub fn salvage(data: &DataDir) -> Result<Table, StoreError> {
    let log = data.log()?;
    let (mut machine, view) = StateMachine::open(data.snapshots()?, Arc::new(Nobody))?;
    let mut next = view.table().applied.map_or(0, |at| at.index + 1);
    loop {
        let records = log.read(next..u64::MAX, SALVAGE_BYTES)?;
        let Some(last) = records.last() else { break };
        next = last.at.index + 1;
        for record in &records {
            let entry = convert::entry(record).map_err(|error| StoreError::Damaged {
                path: data.path().to_path_buf(),
                what: error.to_string(),
            })?;
            machine.apply_alone(&entry)?;
        }
    }
    Ok(Table::clone(&view.table()))
}

/// Entries that are read at once, in bytes.
const SALVAGE_BYTES: usize = 16 << 20;
