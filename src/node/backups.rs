//! Backups: the whole table as a stream, or now and then as a file.
//!
//! Both are of this node's own copy at one moment, a clone that costs nothing; they are written
//! beside everything else. A scheduled one gets its name when it is whole, and the oldest go only
//! after the newest is on the disk. One is skipped where nothing has changed since the last.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fail::fail_point;
use metrics::{counter, gauge};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tracing::{error, info};

use super::{CallError, Node, RETRY_AFTER, ticks};
use crate::core::Revision;
use crate::raft::{self, Table};

/// One piece of a backup, in bytes.
const CHUNK_BYTES: usize = 256 << 10;
const CHUNKS_AHEAD: usize = 4;
/// Backups that are read from a node at the same time: each has a thread, and the table as it was.
pub(super) const READ_AT_ONCE_MAX: usize = 4;
/// A backup that nobody reads on for so long is given up.
const UNREAD_MAX: Duration = Duration::from_secs(30);

/// Where scheduled backups go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupPlan {
    pub dir: PathBuf,
    pub every: Duration,
    /// So many of this cluster's are kept.
    pub keep: usize,
}

/// A backup as it comes; an error ends it.
pub type Pieces = mpsc::Receiver<io::Result<Vec<u8>>>;

/// Hands on what is written, in pieces, from a thread that may block. A reader that has gone, or does not
/// read, is an error.
struct Cutter {
    piece: Vec<u8>,
    out: mpsc::Sender<io::Result<Vec<u8>>>,
}

impl Cutter {
    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::take(&mut self.piece);
        let sent = Handle::current().block_on(timeout(UNREAD_MAX, self.out.send(Ok(piece))));
        let unread = || format!("nobody has read it for {UNREAD_MAX:?}");
        sent.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, unread()))?
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Cutter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.piece.extend_from_slice(bytes);
        if self.piece.len() >= CHUNK_BYTES {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() { Ok(()) } else { self.send() }
    }
}

impl Node {
    /// The table as it is now on this node. Refused where too many are read.
    pub fn backup(&self) -> Result<(Arc<Table>, Pieces), CallError> {
        let Ok(room) = self.inner.backup_readers.clone().try_acquire_owned() else {
            return Err(CallError::Overloaded { retry_after: RETRY_AFTER });
        };
        let table = self.table();
        let written = table.clone();
        let (out, pieces) = mpsc::channel(CHUNKS_AHEAD);
        let broken = out.clone();
        let writing = spawn_blocking(move || {
            let _room = room;
            fail_point!("backup-write");
            let mut writer = Cutter { piece: Vec::new(), out };
            raft::write_backup(&written, &mut writer).and_then(|()| writer.flush())
        });
        // Pieces that just end would pass for the whole table.
        tokio::spawn(async move {
            let written = writing.await.unwrap_or_else(|panicked| Err(io::Error::other(panicked)));
            if let Err(error) = written {
                let _ = broken.send(Err(error)).await; // the reader may have gone
            }
        });
        Ok((table, pieces))
    }
}

const PREFIX: &str = "portwarden-";
const SUFFIX: &str = ".backup";

/// Writes one; it gets its name when it is whole.
fn write_one(dir: &Path, table: &Table, cluster: &str) -> io::Result<PathBuf> {
    std::fs::create_dir_all(dir)?;
    let mut temp = tempfile::Builder::new().prefix(".part-").tempfile_in(dir)?;
    {
        let mut out = io::BufWriter::with_capacity(CHUNK_BYTES, temp.as_file_mut());
        raft::write_backup(table, &mut out)?;
        out.flush()?;
    }
    temp.as_file().sync_all()?;
    // Sorts as the revisions do.
    let name = format!("{PREFIX}{cluster}-{:020}{SUFFIX}", table.state.revision.0);
    let path = dir.join(name);
    temp.persist(&path).map_err(|error| error.error)?;
    std::fs::File::open(dir)?.sync_all()?;
    Ok(path)
}

/// Removes the oldest of this cluster's backups; others' files are not looked at.
fn retain(dir: &Path, cluster: &str, keep: usize) -> io::Result<()> {
    let prefix = format!("{PREFIX}{cluster}-");
    let mut names: Vec<_> = std::fs::read_dir(dir)?
        .filter_map(|item| item.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(&prefix) && name.ends_with(SUFFIX))
        .collect();
    names.sort();
    for name in names.iter().take(names.len().saturating_sub(keep)) {
        std::fs::remove_file(dir.join(name))?;
    }
    Ok(())
}

/// Writes backups for as long as Raft runs.
pub(super) async fn run(node: Node, plan: BackupPlan) {
    let id = node.id().to_string();
    let mut every = ticks(plan.every);
    let mut last: Option<Revision> = None;
    while node.runs() {
        every.tick().await;
        let table: Arc<Table> = node.table();
        let Some(cluster) = node.inner.cluster.get().map(String::from) else { continue };
        let revision = table.state.revision;
        if last == Some(revision) {
            continue;
        }
        let BackupPlan { dir, keep, .. } = plan.clone();
        let written = spawn_blocking(move || {
            let path = write_one(&dir, &table, &cluster)?;
            retain(&dir, &cluster, keep)?;
            Ok::<_, io::Error>(path)
        });
        let result = match written.await.map_err(io::Error::other).and_then(|written| written) {
            Ok(path) => {
                info!(path = %path.display(), %revision, "a backup was written");
                gauge!("portwarden_backup_revision", "node" => id.clone()).set(revision.0 as f64);
                last = Some(revision);
                "ok"
            }
            Err(error) => {
                error!(dir = %plan.dir.display(), %error, "a backup could not be written");
                "failed"
            }
        };
        counter!("portwarden_backups_total", "result" => result).increment(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_backup_that_nobody_reads_on_is_given_up() {
        let (out, mut pieces) = mpsc::channel(1);
        let writing = spawn_blocking(move || {
            let mut cutter = Cutter { piece: Vec::new(), out };
            loop {
                if let Err(error) = cutter.write_all(&[0; CHUNK_BYTES]) {
                    return error.kind();
                }
            }
        });
        // One that is read slowly is not.
        for _ in 0..10 {
            assert_eq!(pieces.recv().await.unwrap().unwrap().len(), CHUNK_BYTES);
            tokio::time::advance(UNREAD_MAX / 2).await;
        }
        assert!(!writing.is_finished());
        while !writing.is_finished() {
            tokio::time::advance(UNREAD_MAX).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(writing.await.unwrap(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn the_newest_of_this_clusters_backups_are_kept_and_nothing_else_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let mut table = Table::default();
        std::fs::write(dir.path().join("portwarden-other-00000000000000000001.backup"), "")
            .unwrap();
        std::fs::write(dir.path().join("notes"), "").unwrap();
        for revision in 1..=4 {
            let restore = crate::core::Restore::new(1, Revision(revision));
            table.state = restore.finish().unwrap();
            let path = write_one(dir.path(), &table, "c").unwrap();
            let read = crate::raft::Backup::read(&path).unwrap();
            assert_eq!(read.state, table.state);
            retain(dir.path(), "c", 2).unwrap();
        }
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|item| item.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                "notes",
                "portwarden-c-00000000000000000003.backup",
                "portwarden-c-00000000000000000004.backup",
                "portwarden-other-00000000000000000001.backup",
            ]
        );
    }
}
