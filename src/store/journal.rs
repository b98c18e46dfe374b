//! What is written to the log, until it is in sled.
//!
//! sled hands each write to a pool of threads, and writes a page of a few entries anew as a whole again
//! and again. So a flush here writes one frame to a journal and syncs it, on the caller's thread; and
//! what is in the journal goes to sled on another one, in portions, and in turns with what is written.
//!
//! The journal is two files that take turns. Each is written over from its start on, within its
//! size, so that a sync has no metadata to commit, and past the page cache where the file system can:
//! a sync finds nothing there that it has to write. When the active one is full, it is sealed: what
//! it holds is written to sled and flushed, while the other one is active. It is active again only
//! when that is done.
//!
//! What goes to the disk is whole blocks. The frames that lie in the first of them already are
//! written again with a new one, as they are.
//!
//! - A frame holds what was written between two flushes, with a checksum. Frames are numbered without
//!   a gap over both files, and each says which one was the last that was synced when it was written:
//!   so what a power cut left of the last ones is told from damage.
//! - Each opening of the journal is a run with a number of its own, drawn at random, and begins with
//!   frame 1 where the first file does. A frame of another run is a remnant. As nobody can know the
//!   number, nobody can have something written that reads as a frame.
//! - Beside its entries sled has the number of the run and of its last frame that is in them. What the
//!   journal has beyond goes to sled at the start, before the next run begins: only the last word on each
//!   key counts.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::{Bound, Range};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use itertools::{EitherOrBoth, Itertools as _};
use sled::IVec;

use super::chunks::take;
use super::disk::{Changes, Disk, Key, Pairs};
use super::log::EndsProcess;
use super::{StoreError, dir};
use crate::lock::guard;

/// Size of each file, in bytes. A frame that is larger makes it larger.
const FILE_BYTES: u64 = 2 << 20;
/// From this size on, in bytes, a frame is written without waiting for the flush.
const FRAME_BYTES: usize = 512 << 10;
/// Keys that go to sled in one batch.
const BATCH_KEYS: usize = 32;
/// Longest pause between two batches.
const PAUSE_MAX: Duration = Duration::from_millis(100);

const VERSION: u8 = 1;
/// Under which sled has a [`Kept`].
const KEPT: &str = "journal";
/// Version; CRC-32 of all else; length of the body; run; number; last synced number.
const HEADER_BYTES: usize = 1 + 4 + 4 + 3 * 8;
/// Frames begin at multiples of this, in bytes.
const ALIGNMENT: usize = 64;
/// What is written begins and ends at multiples of this, in bytes, in the file and in memory: the largest
/// sector of common disks.
const BLOCK_BYTES: usize = 4096;
const CRC: Range<usize> = 1..5;

/// A disk whose writes lie in a journal first.
#[derive(Debug)]
pub(super) struct Journaled {
    below: Arc<dyn Disk>,
    recent: Arc<Recent>,
    journal: Mutex<Journal>,
    /// `None`: what is sealed is kept at once.
    keeper: Mutex<Option<Keeper>>,
}

/// What the disk below may not have.
#[derive(Debug, Default)]
struct Recent {
    layers: Mutex<Layers>,
    /// Nothing is sealed any more.
    kept: Condvar,
    /// More of what is sealed is to go to the disk below.
    go_on: Condvar,
}

#[derive(Debug, Default)]
struct Layers {
    /// Of the active file, and of the frame that is being filled.
    active: Layer,
    /// Of the other file, while it is written to the disk below.
    sealed: Option<(Arc<Layer>, Kept)>,
    /// Somebody waits until nothing is sealed.
    awaited: bool,
    /// What the active layer takes by the time that more of the sealed one goes to the disk below.
    go_on_at: usize,
}

/// How far the disk below is.
#[derive(Debug, Clone, Copy, Default)]
struct Kept {
    run: u64,
    /// Number of the last frame of this run that is in it.
    last: u64,
}

/// The last word on each key; `None`: it is gone.
#[derive(Debug, Default)]
struct Layer {
    entries: BTreeMap<Key, Option<IVec>>,
    values: BTreeMap<String, Option<IVec>>,
    /// What all that was said takes.
    bytes: usize,
}

/// The thread that writes what is sealed to the disk below.
#[derive(Debug)]
struct Keeper {
    sealed: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

/// In bytes.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// What a file takes before it is sealed.
    file: u64,
    /// What a frame takes before it is written.
    frame: usize,
}

/// The files.
#[derive(Debug)]
struct Journal {
    files: [File; 2],
    active: usize,
    /// Where the next frame begins in the active file.
    offset: u64,
    sizes: Sizes,
    run: u64,
    /// Of the frame that is being filled.
    number: u64,
    /// Number of the last frame that is synced.
    synced: u64,
    /// Room for the header, and what the frame holds so far.
    frame: Vec<u8>,
    /// The block of the active file in which the next frame begins, up to there.
    head: Vec<u8>,
    /// Where blocks are made of both.
    memory: Vec<u8>,
}

impl Journaled {
    /// Brings what a process left in the journal to the disk below, and begins a new one. `failed` is
    /// told when the disk below fails later.
    ///
    /// Errors: the disk, damage, a journal of a newer version.
    pub fn open(
        dir: &Path,
        below: Arc<dyn Disk>,
        failed: impl Fn(sled::Error) + Send + 'static,
    ) -> Result<Journaled, StoreError> {
        let opened = Journaled::begin(dir, below, Sizes { file: FILE_BYTES, frame: FRAME_BYTES })?;
        let (below, recent) = (opened.below.clone(), opened.recent.clone());
        let (sealed, to_keep) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("log-keeper".into())
            .spawn(move || {
                let _guard = EndsProcess("the writer of what is in the log's journal");
                let pause = |kept| recent.pause(kept);
                let keep = |()| recent.keep(&*below, pause).unwrap_or_else(&failed);
                to_keep.into_iter().for_each(keep);
            })
            .map_err(StoreError::io(dir, "cannot start the thread that writes to sled"))?;
        Ok(Journaled { keeper: Mutex::new(Some(Keeper { sealed, thread })), ..opened })
    }

    fn begin(dir: &Path, below: Arc<dyn Disk>, sizes: Sizes) -> Result<Journaled, StoreError> {
        let path = dir.join("journal");
        create(&path, sizes.file).map_err(StoreError::io(&path, "cannot be opened"))?;
        dir::sync_dir(&path)?;
        dir::sync_dir(dir)?;
        let kept = Kept::read(&*below).map_err(StoreError::sled(dir, "cannot be read"))?;
        let found = replay(&path, kept)?;
        let next = Kept { run: rand::random(), last: 0 };
        found
            .write_to(&*below, next, |_| ())
            .map_err(StoreError::sled(dir, "cannot be written"))?;
        // From here on, what lies in the files is below.
        let files = open(&path).map_err(StoreError::io(&path, "cannot be opened"))?;
        let journal = Journal {
            files,
            active: 0,
            offset: 0,
            sizes,
            run: next.run,
            number: 1,
            synced: 0,
            frame: vec![0; HEADER_BYTES],
            head: Vec::new(),
            memory: Vec::new(),
        };
        let (recent, journal) = (Arc::default(), Mutex::new(journal));
        Ok(Journaled { below, recent, journal, keeper: Mutex::default() })
    }

    /// What the active file holds goes to the disk below, and the other one is active from now on.
    fn seal(&self, journal: &mut Journal) -> sled::Result<()> {
        self.recent.wait();
        journal.seal()?;
        let kept = Kept { run: journal.run, last: journal.synced };
        let mut layers = self.recent.layers();
        layers.sealed = Some((Arc::new(std::mem::take(&mut layers.active)), kept));
        drop(layers);
        match &*guard(&self.keeper) {
            Some(keeper) => drop(keeper.sealed.send(())), // one that is gone has ended the process
            None => self.recent.keep(&*self.below, |_| ())?,
        }
        Ok(())
    }

    /// Takes up changes of this size, in bytes.
    fn add(&self, bytes: usize, add: impl FnOnce(&mut Vec<u8>, &mut Layer)) -> sled::Result<()> {
        let mut journal = guard(&self.journal);
        if journal.is_full(bytes) {
            self.seal(&mut journal)?;
        }
        let mut layers = self.recent.layers();
        add(&mut journal.frame, &mut layers.active);
        layers.active.bytes += bytes;
        if layers.active.bytes >= layers.go_on_at {
            layers.go_on_at = usize::MAX;
            self.recent.go_on.notify_one();
        }
        drop(layers);
        if journal.frame.len() >= journal.sizes.frame {
            journal.write()?;
        }
        Ok(())
    }
}

impl Recent {
    fn layers(&self) -> MutexGuard<'_, Layers> {
        guard(&self.layers)
    }

    /// Returns when nothing is sealed.
    fn wait(&self) {
        let mut layers = self.layers();
        layers.awaited = true;
        self.go_on.notify_one();
        let sealed = |layers: &mut Layers| layers.sealed.is_some();
        let waited = self.kept.wait_while(layers, sealed);
        waited.unwrap_or_else(PoisonError::into_inner).awaited = false;
    }

    /// Returns when more is to go to the disk below than these bytes: they take turns with what is written
    /// to the active file, so that all is there when that is half full, and nobody waits for a burst of it.
    fn pause(&self, kept: usize) {
        let mut layers = self.layers();
        layers.go_on_at = kept / 2;
        let paused = self.go_on.wait_timeout_while(layers, PAUSE_MAX, |now| now.is_early(kept));
        paused.unwrap_or_else(PoisonError::into_inner).0.go_on_at = usize::MAX;
    }

    /// Writes what is sealed to the disk below, and flushes it. `pause` is called with the bytes that are
    /// written, before there are more.
    fn keep(&self, below: &dyn Disk, pause: impl Fn(usize)) -> sled::Result<()> {
        let sealed = self.layers().sealed.clone();
        if let Some((layer, kept)) = sealed {
            layer.write_to(below, kept, pause)?;
        }
        self.layers().sealed = None;
        self.kept.notify_all();
        Ok(())
    }
}

impl Layers {
    /// Is it too early to keep more than so many bytes of what is sealed?
    fn is_early(&self, kept: usize) -> bool {
        !self.awaited && self.active.bytes < kept / 2
    }

    /// Newest last.
    fn all(&self) -> impl Iterator<Item = &Layer> {
        self.sealed.iter().map(|(layer, _)| &**layer).chain([&self.active])
    }
}

impl Layer {
    fn write_to(&self, below: &dyn Disk, kept: Kept, pause: impl Fn(usize)) -> sled::Result<()> {
        let mut bytes = 0;
        let change =
            |(key, value): (&Key, &Option<IVec>)| (*key, value.as_ref().map(|v| v.to_vec()));
        for batch in &self.entries.iter().map(change).chunks(BATCH_KEYS) {
            pause(bytes);
            let changes: Changes = batch.collect();
            bytes += entries_bytes(&changes);
            below.write(changes)?;
        }
        for (key, value) in &self.values {
            below.set(key, value.as_ref().map(|value| value.to_vec()))?;
        }
        below.set(KEPT, Some([kept.run, kept.last].map(u64::to_be_bytes).concat()))?;
        below.flush()
    }
}

impl Disk for Journaled {
    fn write(&self, changes: Changes) -> sled::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let bytes = entries_bytes(&changes);
        self.add(bytes, |frame, layer| {
            for (key, value) in changes {
                put_entry(frame, &key, value.as_deref());
                layer.entries.insert(key, value.map(IVec::from));
            }
        })
    }

    // What is recent is read first: a layer that is kept meanwhile is found below then.
    fn range(&self, bounds: (Bound<Key>, Bound<Key>)) -> Pairs<'_> {
        let mut recent = BTreeMap::new();
        for layer in self.recent.layers().all() {
            recent.extend(layer.entries.range(bounds).map(|(key, value)| (*key, value.clone())));
        }
        merged(recent, self.below.range(bounds))
    }

    fn set(&self, key: &str, value: Option<Vec<u8>>) -> sled::Result<()> {
        self.add(value_bytes(key, value.as_deref()), |frame, layer| {
            put_value(frame, key, value.as_deref());
            layer.values.insert(key.into(), value.map(IVec::from));
        })
    }

    fn get(&self, key: &str) -> sled::Result<Option<IVec>> {
        let recent =
            self.recent.layers().all().filter_map(|layer| layer.values.get(key).cloned()).last();
        match recent {
            Some(value) => Ok(value),
            None => self.below.get(key),
        }
    }

    fn values(&self) -> Pairs<'_> {
        let mut recent = BTreeMap::new();
        for layer in self.recent.layers().all() {
            recent.extend(layer.values.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        merged(recent, self.below.values())
    }

    fn flush(&self) -> sled::Result<()> {
        Ok(guard(&self.journal).flush()?)
    }

    fn close(&self) -> sled::Result<()> {
        self.seal(&mut guard(&self.journal))?;
        self.recent.wait();
        if let Some(Keeper { sealed, thread }) = guard(&self.keeper).take() {
            drop(sealed);
            let _ = thread.join(); // a panic of it has ended the process
        }
        Ok(())
    }
}

impl Kept {
    fn read(below: &dyn Disk) -> sled::Result<Kept> {
        let found = below.get(KEPT)?.unwrap_or_default();
        let mut rest = &*found;
        let numbers = (take(&mut rest), take(&mut rest));
        Ok(match numbers {
            (Some(run), Some(last)) => {
                Kept { run: u64::from_be_bytes(run), last: u64::from_be_bytes(last) }
            }
            _ => Kept::default(),
        })
    }
}

/// What is recent stands before what lies below.
fn merged<'a, K>(recent: BTreeMap<K, Option<IVec>>, below: Pairs<'a>) -> Pairs<'a>
where
    K: AsRef<[u8]> + 'a,
{
    let order = |(key, _): &(K, Option<IVec>), below: &sled::Result<(IVec, IVec)>| match below {
        Ok((below, _)) => key.as_ref().cmp(below),
        Err(_) => Ordering::Greater,
    };
    type Pair = sled::Result<(IVec, IVec)>;
    let one = |pair: EitherOrBoth<(K, Option<IVec>), Pair>| match pair {
        EitherOrBoth::Right(pair) => Some(pair),
        EitherOrBoth::Left((key, value)) | EitherOrBoth::Both((key, value), _) => {
            value.map(|value| Ok((IVec::from(key.as_ref()), value)))
        }
    };
    Box::new(recent.into_iter().merge_join_by(below, order).filter_map(one))
}

impl Journal {
    /// Are so many bytes more than the active file takes?
    fn is_full(&self, bytes: usize) -> bool {
        let filled = self.offset + self.frame.len() as u64;
        filled > HEADER_BYTES as u64 && filled + bytes as u64 > self.sizes.file
    }

    /// Writes the frame, and begins the next one.
    fn write(&mut self) -> io::Result<()> {
        let body = (self.frame.len() - HEADER_BYTES) as u32; // a round of the writer is far smaller
        self.frame[0] = VERSION;
        self.frame[CRC.end..CRC.end + 4].copy_from_slice(&body.to_be_bytes());
        let numbers = [self.run, self.number, self.synced];
        for (at, number) in (CRC.end + 4..).step_by(8).zip(numbers) {
            self.frame[at..at + 8].copy_from_slice(&number.to_be_bytes());
        }
        let crc = checksum(&self.frame);
        self.frame[CRC].copy_from_slice(&crc.to_be_bytes());
        self.frame.resize(self.frame.len().next_multiple_of(ALIGNMENT), 0);
        let begin = self.offset - self.head.len() as u64;
        self.files[self.active]
            .write_all_at(blocks(&mut self.memory, &self.head, &self.frame), begin)?;
        self.offset += self.frame.len() as u64;
        let in_block = (self.offset % BLOCK_BYTES as u64) as usize;
        if in_block <= self.frame.len() {
            self.head.clear();
        }
        self.head.extend_from_slice(&self.frame[self.frame.len().saturating_sub(in_block)..]);
        self.number += 1;
        self.frame.truncate(HEADER_BYTES);
        self.frame.shrink_to(2 * self.sizes.frame);
        self.memory.shrink_to(2 * self.sizes.frame);
        Ok(())
    }

    /// Returns when everything is on the disk.
    fn flush(&mut self) -> io::Result<()> {
        if self.frame.len() > HEADER_BYTES {
            self.write()?;
        }
        if self.synced + 1 < self.number {
            self.files[self.active].sync_data()?;
            self.synced = self.number - 1;
        }
        Ok(())
    }

    /// Makes the other file active, whose frames are below.
    fn seal(&mut self) -> io::Result<()> {
        self.flush()?;
        self.active = 1 - self.active;
        self.offset = 0;
        self.head.clear();
        Ok(())
    }
}

/// Makes what is missing of the journal's files.
fn create(path: &Path, bytes: u64) -> io::Result<()> {
    fs::create_dir_all(path)?;
    NAMES.iter().try_for_each(|name| {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false);
        let file = file.open(path.join(name))?;
        let size = file.metadata()?.len();
        if size < bytes {
            // Zeros and not a hole: later writes change no metadata.
            file.write_all_at(&vec![0; (bytes - size) as usize], size)?;
        }
        file.sync_all()
    })
}

/// Opens the files to write to them, past the page cache where the file system can. The first block of
/// each is gone then.
fn open(path: &Path) -> io::Result<[File; 2]> {
    let open = |flags| {
        let open = |name| OpenOptions::new().write(true).custom_flags(flags).open(path.join(name));
        Ok::<_, io::Error>([open(NAMES[0])?, open(NAMES[1])?])
    };
    let direct = open(libc::O_DIRECT).and_then(|files| {
        files
            .iter()
            .try_for_each(|file| file.write_all_at(blocks(&mut Vec::new(), &[], &[0]), 0))?;
        Ok(files)
    });
    direct.or_else(|error| match error.kind() {
        io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported => {
            let path = path.display();
            tracing::info!(
                "{path} goes through the page cache: its file system, or the disk below, takes no \
                 blocks of {BLOCK_BYTES} bytes past it"
            );
            open(0)
        }
        _ => Err(error),
    })
}

/// Whole blocks in `memory`: what lies in the first one, a frame after it, and zeros.
fn blocks<'a>(memory: &'a mut Vec<u8>, head: &[u8], frame: &[u8]) -> &'a [u8] {
    let bytes = (head.len() + frame.len()).next_multiple_of(BLOCK_BYTES);
    memory.clear();
    memory.reserve(BLOCK_BYTES + bytes);
    let begin = memory.as_ptr().align_offset(BLOCK_BYTES);
    memory.resize(begin, 0);
    memory.extend_from_slice(head);
    memory.extend_from_slice(frame);
    memory.resize(begin + bytes, 0);
    &memory[begin..]
}

const NAMES: [&str; 2] = ["0", "1"];

// What lies in a frame: a kind, a key, and for what is put, its length and itself.

const PUT_ENTRY: u8 = 1;
const REMOVE_ENTRY: u8 = 2;
const PUT_VALUE: u8 = 3;
const REMOVE_VALUE: u8 = 4;

fn entry_bytes(value: Option<&[u8]>) -> usize {
    1 + size_of::<Key>() + value.map_or(0, |value| 4 + value.len())
}

fn entries_bytes(changes: &Changes) -> usize {
    changes.iter().map(|(_, value)| entry_bytes(value.as_deref())).sum()
}

fn value_bytes(key: &str, value: Option<&[u8]>) -> usize {
    1 + 1 + key.len() + value.map_or(0, |value| 4 + value.len())
}

fn put_entry(frame: &mut Vec<u8>, key: &Key, value: Option<&[u8]>) {
    frame.push(if value.is_some() { PUT_ENTRY } else { REMOVE_ENTRY });
    frame.extend(key);
    put_bytes(frame, value);
}

/// `key` is one of the log's own, and short.
fn put_value(frame: &mut Vec<u8>, key: &str, value: Option<&[u8]>) {
    frame.push(if value.is_some() { PUT_VALUE } else { REMOVE_VALUE });
    frame.push(key.len() as u8);
    frame.extend(key.as_bytes());
    put_bytes(frame, value);
}

fn put_bytes(frame: &mut Vec<u8>, value: Option<&[u8]>) {
    if let Some(value) = value {
        frame.extend((value.len() as u32).to_be_bytes());
        frame.extend(value);
    }
}

fn checksum(frame: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame[..CRC.start]);
    crc.update(&frame[CRC.end..]);
    crc.finalize()
}

struct Header {
    version: u8,
    crc: u32,
    body_bytes: usize,
    run: u64,
    number: u64,
    synced: u64,
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Header> {
        let mut rest = bytes;
        Some(Header {
            version: u8::from_be_bytes(take(&mut rest)?),
            crc: u32::from_be_bytes(take(&mut rest)?),
            body_bytes: u32::from_be_bytes(take(&mut rest)?) as usize,
            run: u64::from_be_bytes(take(&mut rest)?),
            number: u64::from_be_bytes(take(&mut rest)?),
            synced: u64::from_be_bytes(take(&mut rest)?),
        })
    }
}

/// A frame whose checksum is right.
struct Frame<'a> {
    header: Header,
    body: &'a [u8],
}

impl Frame<'_> {
    fn read(bytes: &[u8]) -> Option<Frame<'_>> {
        let header = Header::read(bytes)?;
        let frame = bytes.get(..HEADER_BYTES.checked_add(header.body_bytes)?)?;
        let sound = header.version > 0 && checksum(frame) == header.crc;
        sound.then(|| Frame { header, body: &frame[HEADER_BYTES..] })
    }
}

/// The frames of one run that a file of the journal holds, and where they end.
struct Found<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    frames: Vec<Frame<'a>>,
    end: usize,
}

impl Found<'_> {
    fn read<'a>(path: &'a Path, bytes: &'a [u8], run: u64) -> Result<Found<'a>, StoreError> {
        let mut found = Found { path, bytes, frames: Vec::new(), end: 0 };
        while let Some(frame) = bytes.get(found.end..).and_then(Frame::read)
            && frame.header.run == run
            && found.last().is_none_or(|last| last + 1 == frame.header.number)
        {
            if frame.header.version != VERSION {
                return Err(StoreError::Version {
                    path: path.into(),
                    what: "the log's journal",
                    found: frame.header.version.into(),
                    supported: VERSION.into(),
                });
            }
            found.end += (HEADER_BYTES + frame.body.len()).next_multiple_of(ALIGNMENT);
            found.frames.push(frame);
        }
        Ok(found)
    }

    fn last(&self) -> Option<u64> {
        self.frames.last().map(|frame| frame.header.number)
    }

    /// Does a frame beyond the end say that one after `last` had been on the disk?
    fn proves_lost(&self, last: u64, run: u64) -> bool {
        let mut beyond =
            (self.end..self.bytes.len()).step_by(ALIGNMENT).map(|at| &self.bytes[at..]);
        // A checksum takes long.
        let later = |header: Header| header.run == run && header.synced > last;
        beyond.any(|bytes| Header::read(bytes).is_some_and(later) && Frame::read(bytes).is_some())
    }
}

/// What the journal in `path` holds of the run, beyond what is kept.
fn replay(path: &Path, kept: Kept) -> Result<Layer, StoreError> {
    let read = |name| {
        let path = path.join(name);
        let bytes = fs::read(&path).map_err(StoreError::io(&path, "cannot be read"))?;
        Ok::<_, StoreError>((path, bytes))
    };
    let files = [read(NAMES[0])?, read(NAMES[1])?];
    let found = files.each_ref().map(|(path, bytes)| Found::read(path, bytes, kept.run));
    let [first, second] = found;
    let mut found = [first?, second?];
    found.sort_by_key(Found::last);
    let damaged = |what| StoreError::damaged(path, what);

    let mut layer = Layer::default();
    let mut last = kept.last;
    for Frame { header: Header { number, .. }, body } in found.iter().flat_map(|f| &f.frames) {
        if *number <= kept.last {
            continue;
        }
        if *number != last + 1 {
            return Err(damaged(format!("frame {} is missing before frame {number}", last + 1)));
        }
        layer.take(body).ok_or_else(|| damaged(format!("frame {number} cannot be read")))?;
        last = *number;
    }
    if found[1].last().unwrap_or(0) < kept.last {
        return Err(damaged(format!("frame {} had been in it, and is gone", kept.last)));
    }
    match found.iter().find(|found| found.proves_lost(last, kept.run)) {
        Some(file) => Err(StoreError::damaged(file.path, format!("frame {} is damaged", last + 1))),
        None => Ok(layer),
    }
}

impl Layer {
    /// Reads the body of a frame. `None` where it makes no sense.
    fn take(&mut self, mut body: &[u8]) -> Option<()> {
        let rest = &mut body;
        while !rest.is_empty() {
            let [kind] = take(rest)?;
            match kind {
                PUT_ENTRY => {
                    let key = take(rest)?;
                    self.entries.insert(key, Some(take_bytes(rest)?.into()));
                }
                REMOVE_ENTRY => drop(self.entries.insert(take(rest)?, None)),
                PUT_VALUE => {
                    let key = take_name(rest)?;
                    self.values.insert(key, Some(take_bytes(rest)?.into()));
                }
                REMOVE_VALUE => drop(self.values.insert(take_name(rest)?, None)),
                _ => return None,
            }
        }
        Some(())
    }
}

fn take_bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_be_bytes(take(rest)?) as usize;
    let (bytes, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(bytes)
}

fn take_name(rest: &mut &[u8]) -> Option<String> {
    let [length] = take(rest)?;
    let (name, tail) = rest.split_at_checked(length.into())?;
    *rest = tail;
    String::from_utf8(name.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use rand::rngs::StdRng;
    use rand::{Rng as _, SeedableRng as _};

    use super::*;
    use crate::store::SimulatedDisk;

    const SIZES: Sizes = Sizes { file: 4096, frame: 1024 };
    /// So that frames go over the ends of blocks, and of files.
    const LARGER: Sizes = Sizes { file: 3 * 4096, frame: 2048 };
    const ROUNDS: u64 = 100;

    /// What a disk holds.
    #[derive(Debug, Clone, Default, PartialEq)]
    struct Model {
        entries: BTreeMap<Vec<u8>, Vec<u8>>,
        values: BTreeMap<Vec<u8>, Vec<u8>>,
    }

    /// Puts a value, or takes it away.
    fn change(map: &mut BTreeMap<Vec<u8>, Vec<u8>>, key: &[u8], value: &Option<Vec<u8>>) {
        match value {
            Some(value) => drop(map.insert(key.into(), value.clone())),
            None => drop(map.remove(key)),
        }
    }

    impl Model {
        fn of(disk: &dyn Disk) -> Model {
            let all = |pairs: Pairs<'_>| {
                pairs.map(Result::unwrap).map(|(k, v)| (k.to_vec(), v.to_vec())).collect()
            };
            let entries = all(disk.range((Bound::Unbounded, Bound::Unbounded)));
            let mut values: BTreeMap<_, _> = all(disk.values());
            values.remove(KEPT.as_bytes());
            Model { entries, values }
        }
    }

    /// A disk that fails from some write or flush on.
    #[derive(Debug)]
    struct Failing(SimulatedDisk, AtomicUsize);

    impl Failing {
        fn step(&self) -> sled::Result<()> {
            match self.1.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)) {
                Ok(_) => Ok(()),
                Err(_) => Err(sled::Error::Io(io::Error::from_raw_os_error(libc::EIO))),
            }
        }
    }

    impl Disk for Failing {
        fn write(&self, changes: Changes) -> sled::Result<()> {
            self.step().and_then(|()| self.0.write(changes))
        }
        fn range(&self, bounds: (Bound<Key>, Bound<Key>)) -> Pairs<'_> {
            self.0.range(bounds)
        }
        fn set(&self, key: &str, value: Option<Vec<u8>>) -> sled::Result<()> {
            self.step().and_then(|()| self.0.set(key, value))
        }
        fn get(&self, key: &str) -> sled::Result<Option<IVec>> {
            self.0.get(key)
        }
        fn values(&self) -> Pairs<'_> {
            self.0.values()
        }
        fn flush(&self) -> sled::Result<()> {
            self.step().and_then(|()| self.0.flush())
        }
    }

    /// What was written to a journaled disk: how it was after each write, and how many of these had
    /// been flushed.
    struct Life {
        states: Vec<Model>,
        flushed: usize,
        /// Of a value at most.
        bytes: usize,
    }

    /// With each seed one or the other: sizes, and how large values are.
    fn of(seed: u64) -> (Sizes, usize) {
        if seed.is_multiple_of(2) { (SIZES, 300) } else { (LARGER, 3_000) }
    }

    impl Life {
        /// Writes until the disk below fails, or for so many steps.
        fn live(&mut self, disk: &Journaled, steps: usize, rng: &mut StdRng) -> sled::Result<()> {
            for _ in 0..steps {
                let (mut model, bytes) = (self.states.last().unwrap().clone(), self.bytes);
                let value = |rng: &mut StdRng| {
                    rng.random_ratio(2, 3).then(|| vec![rng.random(); rng.random_range(0..bytes)])
                };
                let done = match rng.random_range(0..8) {
                    0..4 => {
                        let one = |rng: &mut StdRng| ([rng.random_range(0..40); 10], value(rng));
                        let changes: Changes =
                            (0..rng.random_range(1..6)).map(|_| one(rng)).collect();
                        for (key, value) in &changes {
                            change(&mut model.entries, key, value);
                        }
                        disk.write(changes)
                    }
                    4 => {
                        let (key, value) = (["vote", "purged"][rng.random_range(0..2)], value(rng));
                        change(&mut model.values, key.as_bytes(), &value);
                        let done = disk.set(key, value.clone());
                        if done.is_ok() {
                            assert_eq!(disk.get(key).unwrap().map(|v| v.to_vec()), value);
                        }
                        done
                    }
                    _ => {
                        let done = disk.flush();
                        if done.is_ok() {
                            self.flushed = self.states.len() - 1;
                        }
                        assert_eq!(Model::of(disk), model, "it reads what it wrote");
                        done?;
                        continue;
                    }
                };
                self.states.push(model);
                done?;
                let journal = guard(&disk.journal);
                assert_eq!(journal.head.len() as u64, journal.offset % BLOCK_BYTES as u64);
            }
            Ok(())
        }

        /// What is there is all that was flushed, and some of what followed, from its start on.
        fn check(&mut self, found: Model) {
            let was = self.states[self.flushed..].contains(&found);
            assert!(was, "{found:?} after {:?}", &self.states[self.flushed..]);
            *self = Life { states: vec![found], flushed: 0, bytes: self.bytes };
        }
    }

    #[test]
    fn what_was_flushed_outlives_cuts_anywhere() {
        for seed in 0..ROUNDS {
            println!("seed {seed}");
            let mut rng = StdRng::seed_from_u64(seed);
            let dir = tempfile::tempdir().unwrap();
            let disk = SimulatedDisk::default();
            let (sizes, bytes) = of(seed);
            let mut life = Life { states: vec![Model::default()], flushed: 0, bytes };
            for _ in 0..6 {
                // A start may end anywhere, too.
                let steps = if rng.random_ratio(1, 3) { rng.random_range(0..8) } else { 0 };
                let dying = Failing(disk.clone(), AtomicUsize::new(steps));
                drop(Journaled::begin(dir.path(), Arc::new(dying), sizes));
                disk.crash(rng.random_range(0..20));
                let below = Failing(disk.clone(), AtomicUsize::new(usize::MAX));
                let below = Arc::new(below);
                let journaled = Journaled::begin(dir.path(), below.clone(), sizes).unwrap();
                life.check(Model::of(&journaled));
                if rng.random_ratio(1, 2) {
                    below.1.store(rng.random_range(0..40), Relaxed);
                }
                let lived = life.live(&journaled, rng.random_range(1..120), &mut rng);
                if lived.is_ok() && rng.random_ratio(1, 4) && journaled.close().is_ok() {
                    life.flushed = life.states.len() - 1;
                }
                let (run, active, end, unsynced) = {
                    let journal = guard(&journaled.journal);
                    let unsynced = journal.synced + 1 < journal.number;
                    (journal.run, journal.active, journal.offset as usize, unsynced)
                };
                drop(journaled);
                // The cut: of the last frame, if it was not synced, a part may be missing.
                if unsynced && rng.random_ratio(1, 2) {
                    let path = dir.path().join("journal").join(NAMES[active]);
                    let mut bytes = fs::read(&path).unwrap();
                    let found = Found::read(&path, &bytes, run).unwrap();
                    let last = HEADER_BYTES + found.frames.last().unwrap().body.len();
                    let begins = end - last.next_multiple_of(ALIGNMENT);
                    bytes[rng.random_range(begins..begins + last)..end].fill(0);
                    fs::write(&path, bytes).unwrap();
                }
                disk.crash(rng.random_range(0..20));
            }
        }
    }

    #[test]
    fn damage_is_told_from_a_cut() {
        let mut refused = 0;
        for seed in 0..ROUNDS {
            println!("seed {seed}");
            let mut rng = StdRng::seed_from_u64(seed);
            let dir = tempfile::tempdir().unwrap();
            let disk = SimulatedDisk::default();
            let (sizes, bytes) = of(seed);
            let mut life = Life { states: vec![Model::default()], flushed: 0, bytes };
            let journaled = Journaled::begin(dir.path(), Arc::new(disk.clone()), sizes).unwrap();
            let mut before = 0;
            for _ in 0..rng.random_range(2..12) {
                let (flushed, number) = (life.flushed, guard(&journaled.journal).number);
                life.live(&journaled, rng.random_range(1..20), &mut rng).unwrap();
                journaled.flush().unwrap();
                life.flushed = life.states.len() - 1;
                if guard(&journaled.journal).number > number {
                    before = flushed; // else nothing was there to write
                }
            }
            drop(journaled);
            disk.crash(0);
            let path = dir.path().join("journal").join(NAMES[rng.random_range(0..2)]);
            let mut bytes = fs::read(&path).unwrap();
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= 1 << rng.random_range(0..8);
            fs::write(&path, bytes).unwrap();
            match Journaled::begin(dir.path(), Arc::new(disk), sizes) {
                Ok(found) => {
                    // The very last flush may be missing: that is for the mark to notice.
                    let found = Model::of(&found);
                    assert!(life.states[before..].contains(&found), "seed {seed}: {found:?}");
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains(&dir.path().display().to_string()), "{error}");
                    refused += 1;
                }
            }
        }
        println!("{refused} of {ROUNDS} refused");
        assert!(refused > ROUNDS / 10);
    }

    fn open(dir: &Path, below: &SimulatedDisk) -> Result<Journaled, StoreError> {
        Journaled::begin(dir, Arc::new(below.clone()), SIZES)
    }

    fn put(disk: &Journaled, key: u8) -> sled::Result<()> {
        disk.write(vec![([key; 10], Some(vec![key; 600]))])
    }

    fn keys(disk: &Journaled) -> Vec<u8> {
        let all = disk.range((Bound::Unbounded, Bound::Unbounded));
        all.map(|pair| pair.unwrap().0[0]).collect()
    }

    fn overwrite(path: &Path, range: Range<usize>) {
        let mut bytes = fs::read(path).unwrap();
        bytes[range].fill(0);
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn what_is_sealed_goes_below_as_the_active_file_fills() {
        let mut layers = Layers::default();
        layers.active.bytes = 500;
        assert_eq!([0, 1000, 1002].map(|kept| layers.is_early(kept)), [false, false, true]);
        layers.awaited = true;
        assert!(!layers.is_early(1002));

        let disk = SimulatedDisk::default();
        let keys = 3 * BATCH_KEYS as u8 - 1;
        let entry = |key: u8| ([key; 10], Some(IVec::from(b"value")));
        let layer = Layer { entries: (0..keys).map(entry).collect(), ..Layer::default() };
        let pauses = RefCell::new(Vec::new());
        let pause = |bytes| {
            let written = Model::of(&disk).entries.len();
            pauses.borrow_mut().push((bytes / entry_bytes(Some(b"value")), written));
        };
        layer.write_to(&disk, Kept::default(), pause).unwrap();
        let batches = [0, BATCH_KEYS, 2 * BATCH_KEYS].map(|kept| (kept, kept));
        assert_eq!(pauses.into_inner(), batches);
        assert_eq!(Model::of(&disk).entries.len(), usize::from(keys));
    }

    #[test]
    fn a_remnant_of_an_earlier_run_is_no_frame() {
        let (dir, below) = (tempfile::tempdir().unwrap(), SimulatedDisk::default());
        let journaled = open(dir.path(), &below).unwrap();
        // Two frames that are not synced; of the first a part is missing after the cut.
        (1..5).for_each(|key| put(&journaled, key).unwrap());
        drop(journaled);
        overwrite(&dir.path().join("journal/0"), 100..101);
        let journaled = open(dir.path(), &below).unwrap();
        assert!(keys(&journaled).is_empty());
        // As long as the one that was there.
        (5..7).for_each(|key| put(&journaled, key).unwrap());
        drop(journaled);
        assert_eq!(keys(&open(dir.path(), &below).unwrap()), [5, 6]);
    }

    #[test]
    fn a_file_that_is_gone_is_missed() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), SimulatedDisk::default());
        let path = dir.path().join("journal");
        let below = Arc::new(Failing(disk.clone(), AtomicUsize::new(usize::MAX)));
        let journaled = Journaled::begin(dir.path(), below.clone(), SIZES).unwrap();
        below.1.store(0, Relaxed);
        // What is in the first file is not kept.
        while put(&journaled, 1).is_ok() {}
        put(&journaled, 2).unwrap();
        journaled.flush().unwrap();
        drop(journaled);
        let first = fs::read(path.join("0")).unwrap();
        overwrite(&path.join("0"), 0..4096);
        let error = open(dir.path(), &disk).unwrap_err().to_string();
        assert!(error.contains("frame 1 is missing before frame"), "{error}");

        fs::write(path.join("0"), first).unwrap();
        let journaled = open(dir.path(), &disk).unwrap();
        assert_eq!(keys(&journaled), [1, 2]);
        put(&journaled, 3).unwrap();
        journaled.close().unwrap();
        drop(journaled);
        disk.crash(0);
        overwrite(&path.join("0"), 0..4096);
        let error = open(dir.path(), &disk).unwrap_err().to_string();
        assert!(error.contains("had been in it, and is gone"), "{error}");
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let below = Arc::new(SimulatedDisk::default());
        let journaled = Journaled::begin(dir.path(), below.clone(), SIZES).unwrap();
        journaled.write(vec![([1; 10], Some(vec![1]))]).unwrap();
        journaled.flush().unwrap();
        drop(journaled);
        let path = dir.path().join("journal/0");
        let mut bytes = fs::read(&path).unwrap();
        let end = HEADER_BYTES + entry_bytes(Some(&[1]));
        bytes[0] = 2;
        let crc = checksum(&bytes[..end]);
        bytes[CRC].copy_from_slice(&crc.to_be_bytes());
        fs::write(&path, bytes).unwrap();
        let error = Journaled::begin(dir.path(), below, SIZES).unwrap_err().to_string();
        assert!(
            error.contains("the log's journal has format version 2, this build reads 1"),
            "{error}"
        );
        assert!(error.contains(&path.display().to_string()), "{error}");
    }

    #[test]
    fn a_file_system_without_direct_writes_will_do() {
        let dir = tempfile::tempdir().unwrap();
        // As none there has them.
        for name in NAMES {
            std::os::unix::fs::symlink("/proc/self/comm", dir.path().join(name)).unwrap();
        }
        for file in super::open(dir.path()).unwrap() {
            assert!(!rustix::fs::fcntl_getfl(file).unwrap().contains(rustix::fs::OFlags::DIRECT));
        }
    }

    #[test]
    fn fixture() {
        let dir = tempfile::tempdir().unwrap();
        let journaled =
            Journaled::begin(dir.path(), Arc::new(SimulatedDisk::default()), SIZES).unwrap();
        journaled.write(vec![([7; 10], Some(b"chunk".to_vec())), ([8; 10], None)]).unwrap();
        journaled.set("vote", Some(b"ballot".to_vec())).unwrap();
        journaled.set("purged", None).unwrap();
        guard(&journaled.journal).run = 0x0102;
        journaled.flush().unwrap();
        let bytes = fs::read(dir.path().join("journal/0")).unwrap();
        let frame = Frame::read(&bytes).unwrap();
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&bytes[..HEADER_BYTES + frame.body.len()]), FIXTURE);
    }

    const FIXTURE: &str = "016d83fb7500000037000000000000010200000000000000010000000000000000010707\
                           0707070707070707000000056368756e6b02080808080808080808080304766f74650000\
                           000662616c6c6f740406707572676564";
}
