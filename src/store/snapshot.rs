//! Snapshots: the whole table in one file, the newest two of them.
//!
//! ```text
//! file    magic "PWSNAP", version u16, blocks
//! block   kind u8, length u32, CRC-32 of kind and data, data          (numbers big-endian)
//! kinds   1 the head: what it is of   2 records of the table   3 the end: number of blocks before
//! ```
//!
//! A file gets its name when it is whole: temporary name, fsync, rename, fsync of the directory. It
//! is named after the entry that it ends with, so that names sort as snapshots do. It is streamed
//! both ways: memory holds some tens of blocks at a time.
//!
//! - Only files whose every block has been checked are counted; a damaged one is renamed to
//!   `*.damaged`, loudly, and the older one takes its place.
//! - Two are kept, and the log from the older one on (`coverage`); one installed from a peer
//!   replaces all others.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::num::NonZero;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{Advice, fadvise};
use tempfile::{NamedTempFile, TempPath};

use super::StoreError;
use super::codec::{self, SnapshotHead, StateDecoder};
use super::coverage::Coverage;
use super::dir::{Lock, sync_dir};
use crate::core::State;
use crate::lock::guard;

const MAGIC: &[u8; 6] = b"PWSNAP";
const VERSION: u16 = 1;
const HEAD: u8 = 1;
const RECORDS: u8 = 2;
const END: u8 = 3;
/// Records are gathered up to this size before they become a block.
const BLOCK_BYTES: usize = 64 << 10;
/// No block is larger. The largest record is a worker of which all ports are quarantined, each with the
/// longest reason: 17 MiB.
const BLOCK_MAX_BYTES: u32 = 32 << 20;
const KEEP: usize = 2;
const SUFFIX: &str = "snap";

/// A whole snapshot, open for reading: it stays readable when its name is gone. Clones share it.
#[derive(Debug, Clone)]
pub struct SnapshotFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    head: SnapshotHead,
    file: File,
    length_bytes: u64,
    path: PathBuf,
    /// Of one that was received and not installed yet: removes it when it is dropped.
    temp: Mutex<Option<TempPath>>,
    /// What `verify` read, for the next `load`.
    verified: Mutex<Option<State>>,
}

impl SnapshotFile {
    pub fn head(&self) -> &SnapshotHead {
        &self.0.head
    }

    pub fn length_bytes(&self) -> u64 {
        self.0.length_bytes
    }

    /// For messages.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Reads up to a buffer's length; 0 at the end.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.file.read_at(buffer, offset)
    }

    /// Reads the table and checks every checksum and every invariant.
    pub fn load(&self) -> Result<State, StoreError> {
        if let Some(state) = guard(&self.0.verified).take() {
            return Ok(state);
        }
        let mut decoder = StateDecoder::default();
        self.blocks(|kind, data| match kind {
            RECORDS => decoder.block(data).map_err(StoreError::codec(&self.0.path)),
            _ => Ok(()),
        })?;
        decoder.finish().map_err(StoreError::codec(&self.0.path))
    }

    /// As [`SnapshotFile::load`], whose next call costs nothing then.
    pub fn verify(&self) -> Result<(), StoreError> {
        let state = self.load()?;
        *guard(&self.0.verified) = Some(state);
        Ok(())
    }

    /// Is each block what was written?
    pub fn check(&self) -> Result<(), StoreError> {
        self.blocks(|_, _| Ok(()))
    }

    fn blocks(
        &self,
        each: impl FnMut(u8, &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        read_blocks(&self.0.path, &self.0.file, each)
    }

    /// A file by itself, such as a backup. Only read.
    pub fn read(path: &Path) -> Result<SnapshotFile, StoreError> {
        SnapshotFile::open(path, None)
    }

    /// Opens a file and checks all its blocks.
    fn open(path: &Path, temp: Option<TempPath>) -> Result<SnapshotFile, StoreError> {
        let file = File::open(path).map_err(StoreError::io(path, "cannot be opened"))?;
        let length_bytes = file.metadata().map_err(StoreError::io(path, "cannot be read"))?.len();
        let mut head = None;
        read_blocks(path, &file, |kind, data| {
            if kind == HEAD {
                head = Some(codec::decode_head(data).map_err(StoreError::codec(path))?);
            }
            Ok(())
        })?;
        let head = head.ok_or_else(|| StoreError::damaged(path, "its head is missing"))?;
        let (path, temp, verified) = (path.to_path_buf(), Mutex::new(temp), Mutex::default());
        Ok(SnapshotFile(Arc::new(Inner { head, file, length_bytes, path, temp, verified })))
    }
}

/// Reads a file from its start without moving its cursor: others read it too.
struct FromStart<'a> {
    file: &'a File,
    offset: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

/// Hands out the blocks: first the head, then records; the end is checked here, and that nothing
/// follows it.
fn read_blocks(
    path: &Path,
    file: &File,
    mut each: impl FnMut(u8, &[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let fail = |what: &str| Err(StoreError::damaged(path, what));
    let mut from = BufReader::with_capacity(BLOCK_BYTES, FromStart { file, offset: 0 });
    let mut read = |buffer: &mut [u8]| match from.read_exact(buffer) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(StoreError::damaged(path, "it ends too early"))
        }
        result => result.map_err(StoreError::io(path, "cannot be read")),
    };
    let mut start = [0; 8];
    read(&mut start)?;
    if start[..6] != *MAGIC {
        return fail("it is not a snapshot");
    }
    let version = u16::from_be_bytes([start[6], start[7]]);
    if version != VERSION {
        let (path, found) = (path.to_path_buf(), version.into());
        return Err(StoreError::Version {
            path,
            what: "the snapshot",
            found,
            supported: VERSION.into(),
        });
    }
    let mut data = Vec::new();
    let mut count: u64 = 0;
    loop {
        let mut head = [0; 9];
        read(&mut head)?;
        let kind = head[0];
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        let sum = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        if length > BLOCK_MAX_BYTES {
            return fail(&format!("block {count} has a wrong length"));
        }
        data.resize(length as usize, 0);
        read(&mut data)?;
        if checksum(kind, &data) != sum {
            return fail(&format!("block {count} has a wrong checksum"));
        }
        match kind {
            HEAD if count == 0 => each(kind, &data)?,
            RECORDS if count > 0 => each(kind, &data)?,
            END if data == count.to_be_bytes() => break,
            _ => return fail(&format!("block {count} is out of place")),
        }
        count += 1;
    }
    match from.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => fail("something follows its end"),
        Err(error) => Err(StoreError::io(path, "cannot be read")(error)),
    }
}

fn checksum(kind: u8, data: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&[kind]);
    crc.update(data);
    crc.finalize()
}

fn write_block(out: &mut impl Write, kind: u8, data: &[u8]) -> io::Result<()> {
    let length = u32::try_from(data.len()).ok().filter(|length| *length <= BLOCK_MAX_BYTES);
    let length = length.ok_or_else(|| io::Error::other("a block is too large"))?;
    out.write_all(&[kind])?;
    out.write_all(&length.to_be_bytes())?;
    out.write_all(&checksum(kind, data).to_be_bytes())?;
    out.write_all(data)
}

/// A file of which the disk gets what is written while the rest is made: the sync at its end has
/// little left to do.
struct Ahead<'a> {
    file: &'a File,
    length_bytes: u64,
    begun_bytes: u64,
}

impl Write for Ahead<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        const AHEAD_BYTES: u64 = 8 << 20;
        let written = self.file.write(data)?;
        self.length_bytes += written as u64;
        let due = NonZero::new(self.length_bytes - self.begun_bytes);
        if let Some(due) = due.filter(|due| due.get() >= AHEAD_BYTES) {
            // Of what is not on the disk yet, this begins the writing and waits for nothing. Only advice:
            // where it is not taken, the sync does it all.
            let _ = fadvise(self.file, self.begun_bytes, Some(due), Advice::DontNeed);
            self.begun_bytes = self.length_bytes;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a whole snapshot.
pub fn write_snapshot(out: &mut impl Write, head: &SnapshotHead, state: &State) -> io::Result<()> {
    out.write_all(MAGIC)?;
    out.write_all(&VERSION.to_be_bytes())?;
    write_block(out, HEAD, &codec::encode_head(head))?;
    let mut count: u64 = 1;
    codec::encode_state(state, BLOCK_BYTES, |block| {
        count += 1;
        write_block(out, RECORDS, block)
    })?;
    write_block(out, END, &count.to_be_bytes())
}

/// The snapshots of one node. Clones share them.
#[derive(Debug, Clone)]
pub struct SnapshotStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    coverage: Arc<Coverage>,
    /// Newest first.
    files: Mutex<Vec<SnapshotFile>>,
    _lock: Arc<Lock>,
}

impl SnapshotStore {
    /// Opens the snapshots of a directory by themselves, without a log that they must meet.
    pub fn open(dir: &Path) -> Result<SnapshotStore, StoreError> {
        fs::create_dir_all(dir).map_err(StoreError::io(dir, "cannot be made"))?;
        let lock = File::open(dir).map_err(StoreError::io(dir, "cannot be opened"))?;
        let coverage = Arc::new(Coverage::new(dir.to_path_buf()));
        SnapshotStore::open_in(dir, coverage, Arc::new(Lock::new(lock)))
    }

    pub(super) fn open_in(
        dir: &Path,
        coverage: Arc<Coverage>,
        lock: Arc<Lock>,
    ) -> Result<SnapshotStore, StoreError> {
        fs::create_dir_all(dir).map_err(StoreError::io(dir, "cannot be made"))?;
        sync_dir(dir.parent().unwrap_or(dir))?;
        let mut paths = Vec::new();
        let list = fs::read_dir(dir).map_err(StoreError::io(dir, "cannot be read"))?;
        for item in list {
            let path = item.map_err(StoreError::io(dir, "cannot be read"))?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some(SUFFIX) => paths.push(path),
                // What a process left that ended while it wrote.
                Some("tmp") => {
                    fs::remove_file(&path).map_err(StoreError::io(&path, "cannot be removed"))?;
                }
                _ => {}
            }
        }
        paths.sort();
        let mut files = Vec::new();
        for path in paths.iter().rev() {
            match SnapshotFile::open(path, None) {
                Ok(file) => files.push(file),
                Err(error @ StoreError::Damaged { .. }) => set_aside(path, &error)?,
                Err(error) => return Err(error),
            }
        }
        let shared = Shared { dir: dir.to_path_buf(), coverage, files: files.into(), _lock: lock };
        let store = SnapshotStore { shared: Arc::new(shared) };
        store.publish(&store.files(), false)?;
        Ok(store)
    }

    /// The newest one, if there is any.
    pub fn newest(&self) -> Option<SnapshotFile> {
        self.files().first().cloned()
    }

    /// All good ones, newest first.
    pub fn all(&self) -> Vec<SnapshotFile> {
        self.files().clone()
    }

    /// Takes a snapshot out of use whose blocks are whole, but which says what cannot be. An error
    /// if the log does not reach back to the next older one.
    pub fn set_aside(&self, file: &SnapshotFile, why: &StoreError) -> Result<(), StoreError> {
        let mut files = self.files();
        files.retain(|kept| kept.0.path != file.0.path);
        set_aside(&file.0.path, why)?;
        self.publish(&files, false)
    }

    /// Writes a snapshot; the newest two stay.
    pub fn write(&self, head: &SnapshotHead, state: &State) -> Result<SnapshotFile, StoreError> {
        let dir = &self.shared.dir;
        let temp = self.temp()?;
        let fill = || {
            let out = Ahead { file: temp.as_file(), length_bytes: 0, begun_bytes: 0 };
            let mut out = BufWriter::with_capacity(4 * BLOCK_BYTES, out);
            write_snapshot(&mut out, head, state)?;
            out.into_inner().map_err(|e| e.into_error())?.file.sync_all()
        };
        fill().map_err(StoreError::io(temp.path(), "cannot be written"))?;
        let path = dir.join(name(head));
        temp.persist(&path)
            .map_err(|e| StoreError::io(&path, "cannot be put in place")(e.error))?;
        sync_dir(dir)?;
        let file = SnapshotFile::open(&path, None)?;
        let mut files = self.files();
        files.retain(|kept| kept.0.path != path);
        files.push(file.clone());
        files.sort_by(|a, b| b.0.path.cmp(&a.0.path));
        let kept = files.len().min(KEEP);
        let gone = files.split_off(kept);
        self.publish(&files, false)?;
        remove(&gone)?;
        Ok(file)
    }

    /// Begins to receive a snapshot from a peer.
    pub fn receive(&self) -> Result<Incoming, StoreError> {
        Ok(Incoming { temp: self.temp()?, crc: crc32fast::Hasher::new(), length_bytes: 0 })
    }

    /// Puts a received snapshot in the place of all others. One of another directory is copied.
    pub fn install(&self, received: &SnapshotFile) -> Result<SnapshotFile, StoreError> {
        let dir = &self.shared.dir;
        let path = dir.join(name(received.head()));
        let temp = guard(&received.0.temp).take();
        match temp {
            Some(temp) if temp.parent() == Some(dir) => {
                temp.persist(&path)
                    .map_err(|e| StoreError::io(&path, "cannot be put in place")(e.error))?;
            }
            _ => {
                let copy = self.temp()?;
                let mut from = FromStart { file: &received.0.file, offset: 0 };
                io::copy(&mut from, &mut copy.as_file())
                    .and_then(|_| copy.as_file().sync_all())
                    .map_err(StoreError::io(&path, "cannot be written"))?;
                copy.persist(&path)
                    .map_err(|e| StoreError::io(&path, "cannot be put in place")(e.error))?;
            }
        }
        sync_dir(dir)?;
        let file = SnapshotFile::open(&path, None)?;
        let mut files = self.files();
        let gone: Vec<_> = files.drain(..).filter(|kept| kept.0.path != path).collect();
        files.push(file.clone());
        self.publish(&files, true)?;
        remove(&gone)?;
        Ok(file)
    }

    fn files(&self) -> MutexGuard<'_, Vec<SnapshotFile>> {
        guard(&self.shared.files)
    }

    fn publish(&self, files: &[SnapshotFile], installed: bool) -> Result<(), StoreError> {
        let ends = files.iter().map(|file| file.head().last).collect();
        self.shared.coverage.snapshots(ends, installed)
    }

    fn temp(&self) -> Result<NamedTempFile, StoreError> {
        let dir = &self.shared.dir;
        let made = tempfile::Builder::new().prefix("part-").suffix(".tmp").tempfile_in(dir);
        made.map_err(StoreError::io(dir, "cannot make a file"))
    }
}

/// A snapshot that is being received.
#[derive(Debug)]
pub struct Incoming {
    temp: NamedTempFile,
    crc: crc32fast::Hasher,
    length_bytes: u64,
}

impl Incoming {
    pub fn write(&mut self, data: &[u8]) -> Result<(), StoreError> {
        self.crc.update(data);
        self.length_bytes += data.len() as u64;
        let path = self.temp.path().to_path_buf();
        self.temp.write_all(data).map_err(StoreError::io(&path, "cannot be written"))
    }

    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// The snapshot, once its length, its checksum and all its blocks are as they should be.
    pub fn finish(self, length_bytes: u64, crc32: u32) -> Result<SnapshotFile, StoreError> {
        let path = self.temp.path().to_path_buf();
        if self.length_bytes != length_bytes || self.crc.finalize() != crc32 {
            let what = format!(
                "{} bytes arrived of {length_bytes}, or they arrived changed",
                self.length_bytes
            );
            return Err(StoreError::Misuse { path, what });
        }
        self.temp.as_file().sync_all().map_err(StoreError::io(&path, "cannot be synced"))?;
        SnapshotFile::open(&path, Some(self.temp.into_temp_path()))
    }
}

/// Sorts as the snapshots do. The first number is that of the entry after the last one, so that a
/// snapshot of nothing has a name too.
fn name(head: &SnapshotHead) -> String {
    let (next, term, node) = head.last.map_or((0, 0, 0), |at| (at.index + 1, at.term, at.node));
    format!("{next:020}-{term:020}-{node:020}.{SUFFIX}")
}

fn set_aside(path: &Path, why: &StoreError) -> Result<(), StoreError> {
    tracing::error!(path = %path.display(), error = %why, "a snapshot is damaged and set aside");
    let aside = path.with_extension("damaged");
    fs::rename(path, &aside).map_err(StoreError::io(path, "cannot be renamed"))?;
    match path.parent() {
        Some(dir) => sync_dir(dir),
        None => Ok(()),
    }
}

fn remove(files: &[SnapshotFile]) -> Result<(), StoreError> {
    for file in files {
        let path = &file.0.path;
        match fs::remove_file(path) {
            // Somebody was before us.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.map_err(StoreError::io(path, "cannot be removed"))?,
        }
    }
    Ok(())
}
