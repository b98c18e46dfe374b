//! A data directory: whose it is, and that it is used by one process.
//!
//! The identity file is text, so that an operator can read it:
//!
//! ```text
//! portwarden data directory, format 2
//! node 1
//! incarnation 0b9bd6a5-6f3c-4f0e-9a56-5b6b7a1f8d0e
//! cluster 5be0a9a1-1f0e-4b43-8f27-8c5d5dbe2f6b
//! crc32 2b6f24a5
//! ```
//!
//! The incarnation is random and made with the directory: it tells a node from one that lost its
//! disk and was started anew under the same id. The cluster is missing until it is known. A session
//! is random and new with each opening, and not on the disk: it tells two processes apart that run
//! over copies of one directory.
//!
//! The checksum is over the lines before it; format 1 had none, and is written anew when it is
//! opened.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::coverage::Coverage;
use super::{LogStore, SimulatedDisk, SnapshotStore, StoreError};
use crate::lock::guard;

const IDENTITY: &str = "identity";
const FORMAT: u32 = 2;
/// Without a checksum.
const FORMAT_1: u32 = 1;
const CHECKSUM: &str = "crc32 ";
const FIRST_LINE: &str = "portwarden data directory, format ";

/// An open data directory. What it hands out keeps it locked too.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    identity: Mutex<Identity>,
    incarnation: String,
    session: String,
    node_id: u64,
    coverage: Arc<Coverage>,
    lock: Arc<Lock>,
    /// Its log is on this, and not in a file.
    disk: Option<SimulatedDisk>,
    opened: Mutex<Opened>,
}

/// Held by everything that may still use the directory. Unlocks, and then says so.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
    released: watch::Sender<()>,
}

impl Lock {
    pub fn new(file: File) -> Lock {
        Lock { _file: file, released: watch::channel(()).0 }
    }
}

/// Each is opened once; the others get clones.
#[derive(Debug, Default)]
struct Opened {
    log: Option<LogStore>,
    snapshots: Option<SnapshotStore>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    node_id: u64,
    incarnation: String,
    cluster_id: Option<String>,
}

impl DataDir {
    /// Has a node begun here? What is wrong with a directory is said when it is opened.
    pub fn knows_its_cluster(path: &Path) -> bool {
        let file = path.join(IDENTITY);
        let text = fs::read_to_string(&file);
        let identity = text.ok().and_then(|text| Identity::parse(&file, &text).ok());
        identity.is_some_and(|identity| identity.cluster_id.is_some())
    }

    /// Opens a directory and locks it; makes it where there is none.
    ///
    /// Errors: another process uses it, it is another node's, its identity file cannot be read, or
    /// it has a log or snapshots but no identity.
    pub fn open(path: &Path, node_id: u64) -> Result<DataDir, StoreError> {
        DataDir::open_under(path, node_id, take_lock)
    }

    fn open_under(
        path: &Path,
        node_id: u64,
        lock: fn(&Path) -> Result<File, StoreError>,
    ) -> Result<DataDir, StoreError> {
        fs::create_dir_all(path).map_err(StoreError::io(path, "cannot make the directory"))?;
        let whole = path.canonicalize().map_err(StoreError::io(path, "cannot be found"))?;
        sync_dir(whole.parent().unwrap_or(&whole))?;
        let lock = Arc::new(Lock::new(lock(&path.join("LOCK"))?));
        let file = path.join(IDENTITY);
        let identity = match fs::read_to_string(&file) {
            Ok(text) => {
                let identity = Identity::parse(&file, &text)?;
                if identity.text(FORMAT) != text {
                    identity.write(path)?;
                }
                identity
            }
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                return Err(StoreError::damaged(&file, "it is not an identity file"));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                make_identity(path, node_id)?
            }
            Err(error) => return Err(StoreError::io(&file, "cannot be read")(error)),
        };
        if identity.node_id != node_id {
            let (path, held) = (path.to_path_buf(), identity.node_id);
            return Err(StoreError::WrongNode { path, held, given: node_id });
        }
        Ok(DataDir {
            path: path.to_path_buf(),
            incarnation: identity.incarnation.clone(),
            session: uuid::Uuid::new_v4().to_string(),
            identity: Mutex::new(identity),
            node_id,
            coverage: Arc::new(Coverage::new(path.to_path_buf())),
            lock,
            disk: None,
            opened: Mutex::default(),
        })
    }

    /// As [`DataDir::open`], for a simulation: the log is on a disk of its own, and nothing is locked,
    /// since what is left of a simulated process that was killed would keep the lock.
    pub fn simulated(
        path: &Path,
        node_id: u64,
        disk: SimulatedDisk,
    ) -> Result<DataDir, StoreError> {
        let unlocked =
            |path: &Path| File::create(path).map_err(StoreError::io(path, "cannot be made"));
        Ok(DataDir { disk: Some(disk), ..DataDir::open_under(path, node_id, unlocked)? })
    }

    /// The node that a directory is of.
    pub fn owner(path: &Path) -> Result<u64, StoreError> {
        let file = path.join(IDENTITY);
        let text = fs::read_to_string(&file).map_err(StoreError::io(&file, "cannot be read"))?;
        Ok(Identity::parse(&file, &text)?.node_id)
    }

    /// Gives up the directory and returns once nothing in this process uses it any more: the log,
    /// the snapshots and all that was made of them are gone. Raft's tasks end some time after its
    /// `shutdown`; who wants to open the directory again in the same process waits here, for a
    /// bounded time.
    pub async fn close(self) {
        let mut released = self.lock.released.subscribe();
        drop(self);
        while released.changed().await.is_ok() {}
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn node_id(&self) -> u64 {
        self.node_id
    }

    /// Random, chosen when the directory was made.
    pub fn incarnation(&self) -> &str {
        &self.incarnation
    }

    /// Random, chosen when the directory was opened this time.
    pub fn session(&self) -> &str {
        &self.session
    }

    pub fn cluster_id(&self) -> Option<String> {
        guard(&self.identity).cluster_id.clone()
    }

    /// Durable when it returns. The same id again is fine, another one is refused.
    pub fn set_cluster_id(&self, id: &str) -> Result<(), StoreError> {
        let mut identity = guard(&self.identity);
        match &identity.cluster_id {
            Some(held) if held == id => Ok(()),
            Some(held) => Err(StoreError::WrongCluster {
                path: self.path.clone(),
                held: held.clone(),
                given: id.into(),
            }),
            None if id.is_empty() || id.contains(char::is_whitespace) => {
                let what = format!("{id:?} is not the id of a cluster");
                Err(StoreError::Misuse { path: self.path.clone(), what })
            }
            None => {
                let new = Identity { cluster_id: Some(id.into()), ..identity.clone() };
                new.write(&self.path)?;
                *identity = new;
                Ok(())
            }
        }
    }

    /// No log, no vote, no snapshot: nothing was promised to anybody.
    pub fn is_pristine(&self) -> Result<bool, StoreError> {
        Ok(self.log()?.is_pristine() && self.snapshots()?.newest().is_none())
    }

    /// The log; checked from end to end on the first call.
    pub fn log(&self) -> Result<LogStore, StoreError> {
        let mut opened = guard(&self.opened);
        if let Some(log) = &opened.log {
            return Ok(log.clone());
        }
        let (path, coverage) = (self.path.join("log"), self.coverage.clone());
        let log = match &self.disk {
            None => LogStore::open_in(&path, coverage, self.lock.clone()),
            Some(disk) => LogStore::simulated(&path, disk.clone(), coverage, self.lock.clone()),
        }?;
        opened.log = Some(log.clone());
        Ok(log)
    }

    /// The snapshots; checked on the first call, and damaged ones set aside.
    pub fn snapshots(&self) -> Result<SnapshotStore, StoreError> {
        let mut opened = guard(&self.opened);
        if let Some(snapshots) = &opened.snapshots {
            return Ok(snapshots.clone());
        }
        let path = self.path.join("snapshots");
        let snapshots = SnapshotStore::open_in(&path, self.coverage.clone(), self.lock.clone())?;
        opened.snapshots = Some(snapshots.clone());
        Ok(snapshots)
    }
}

/// The lock is the kernel's and goes with the process; the pid in it is for people.
fn take_lock(path: &Path) -> Result<File, StoreError> {
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)
        .map_err(StoreError::io(path, "cannot be opened"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            let read = file.read_to_string(&mut holder);
            let holder = match (read, holder.trim()) {
                (Ok(_), pid) if !pid.is_empty() => pid.to_string(),
                _ => "(unknown)".into(),
            };
            return Err(StoreError::Locked { path: path.to_path_buf(), holder });
        }
        Err(TryLockError::Error(error)) => {
            return Err(StoreError::io(path, "cannot be locked")(error));
        }
    }
    // Before anything is written, and not over another's head.
    if let Some(dir) = path.parent() {
        super::space::make_room(dir)?;
    }
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())
    };
    write(&mut file).map_err(StoreError::io(path, "cannot be written"))?;
    Ok(file)
}

fn make_identity(path: &Path, node_id: u64) -> Result<Identity, StoreError> {
    for part in ["log", "snapshots"] {
        if path.join(part).exists() {
            let what = format!("there is {part}/ but no identity file");
            return Err(StoreError::damaged(path, what));
        }
    }
    let incarnation = uuid::Uuid::new_v4().to_string();
    let identity = Identity { node_id, incarnation, cluster_id: None };
    identity.write(path)?;
    Ok(identity)
}

impl Identity {
    fn text(&self, format: u32) -> String {
        let Identity { node_id, incarnation, cluster_id } = self;
        let mut text = format!("{FIRST_LINE}{format}\nnode {node_id}\nincarnation {incarnation}\n");
        if let Some(cluster) = cluster_id {
            text.push_str(&format!("cluster {cluster}\n"));
        }
        if format != FORMAT_1 {
            text.push_str(&format!("{CHECKSUM}{:08x}\n", crc32fast::hash(text.as_bytes())));
        }
        text
    }

    fn parse(file: &Path, text: &str) -> Result<Identity, StoreError> {
        let damaged = || StoreError::damaged(file, "it is not an identity file");
        let mut lines = text.lines();
        let format = lines.next().and_then(|line| line.strip_prefix(FIRST_LINE));
        let found: u32 = format.and_then(|f| f.parse().ok()).ok_or_else(damaged)?;
        if found != FORMAT && found != FORMAT_1 {
            let (path, what) = (file.to_path_buf(), "the data directory");
            return Err(StoreError::Version { path, what, found, supported: FORMAT });
        }
        let mut field = |name: &str| {
            let value = lines.next().and_then(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.filter(|v| !v.is_empty()).map(String::from)
        };
        let identity = Identity {
            node_id: field("node").and_then(|id| id.parse().ok()).ok_or_else(damaged)?,
            incarnation: field("incarnation").ok_or_else(damaged)?,
            cluster_id: field("cluster"),
        };
        // Strict: what would not be written again was not written by us.
        if identity.text(found) != text {
            return Err(damaged());
        }
        Ok(identity)
    }

    fn write(&self, dir: &Path) -> Result<(), StoreError> {
        let (temp, file) = (dir.join("identity.tmp"), dir.join(IDENTITY));
        let fill = || {
            let mut out = File::create(&temp)?;
            out.write_all(self.text(FORMAT).as_bytes())?;
            out.sync_all()
        };
        fill().map_err(StoreError::io(&temp, "cannot be written"))?;
        fs::rename(&temp, &file).map_err(StoreError::io(&file, "cannot be put in place"))?;
        sync_dir(dir)
    }
}

/// Makes what was created, renamed or removed in a directory durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    let sync = || File::open(dir)?.sync_all();
    sync().map_err(StoreError::io(dir, "cannot be synced"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temp() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_directory_remembers_whose_it_is() {
        let temp = temp();
        let dir = DataDir::open(temp.path(), 3).unwrap();
        assert_eq!(dir.cluster_id(), None);
        assert!(dir.is_pristine().unwrap());
        dir.set_cluster_id("c1").unwrap();
        let incarnation = dir.incarnation().to_string();
        drop(dir);

        let dir = DataDir::open(temp.path(), 3).unwrap();
        assert_eq!(dir.incarnation(), incarnation);
        assert_eq!(dir.cluster_id().as_deref(), Some("c1"));
        dir.set_cluster_id("c1").unwrap();
        let error = dir.set_cluster_id("c2").unwrap_err().to_string();
        assert!(error.contains("belongs to cluster c1 and not to c2"), "{error}");
        drop(dir);

        let error = DataDir::open(temp.path(), 4).unwrap_err().to_string();
        assert!(error.contains("is the data directory of node 3, not of node 4"), "{error}");
    }

    #[test]
    fn one_process_at_a_time() {
        let temp = temp();
        let _dir = DataDir::open(temp.path(), 1).unwrap();
        let error = DataDir::open(temp.path(), 1).unwrap_err().to_string();
        let pid = std::process::id().to_string();
        assert!(error.contains("LOCK") && error.contains(&pid), "{error}");
    }

    #[tokio::test]
    async fn a_closed_directory_can_be_opened_again() {
        let temp = temp();
        for _ in 0..20 {
            let dir = DataDir::open(temp.path(), 1).unwrap();
            let log = dir.log().unwrap();
            let (closed, _) = tokio::join!(dir.close(), async move { drop(log) });
            closed
        }
    }

    #[test]
    fn a_lost_identity_is_not_replaced() {
        let temp = temp();
        DataDir::open(temp.path(), 1).unwrap().log().unwrap();
        fs::remove_file(temp.path().join(IDENTITY)).unwrap();
        let error = DataDir::open(temp.path(), 1).unwrap_err().to_string();
        assert!(error.contains("there is log/ but no identity file"), "{error}");
    }

    #[test]
    fn the_identity_file_is_read_strictly() {
        let format_1 =
            "portwarden data directory, format 1\nnode 7\nincarnation a-b\ncluster c-d\n";
        let fixture = "portwarden data directory, format 2\nnode 7\nincarnation a-b\ncluster c-d\n\
                       crc32 72f57b6d\n";
        let path = Path::new("identity");
        let identity = Identity::parse(path, fixture).unwrap();
        assert_eq!(identity.text(FORMAT), fixture);
        assert_eq!(Identity::parse(path, format_1).unwrap(), identity);
        assert_eq!((identity.node_id, identity.cluster_id.as_deref()), (7, Some("c-d")));
        for wrong in [
            "",
            "something else\n",
            "portwarden data directory, format 1\nnode x\nincarnation a\n",
            "portwarden data directory, format 1\nnode 7\nincarnation a\nmore\n",
            &fixture.replace("node 7", "node 6"),
            &fixture.replace("c-d", "c-e"),
            &fixture.replace("format 2", "format 1"),
        ] {
            let error = Identity::parse(path, wrong).unwrap_err().to_string();
            assert!(error.contains("not an identity file"), "{error}");
        }
        let newer = fixture.replace("format 2", "format 3");
        let error = Identity::parse(path, &newer).unwrap_err().to_string();
        assert!(error.contains("format version 3, this build reads 2"), "{error}");
    }
}
