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

mod files;
mod frames;
#[cfg(test)]
mod tests;

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use itertools::{EitherOrBoth, Itertools as _};
use sled::IVec;

use self::files::{Journal, Sizes};
use super::chunks::take;
use super::disk::{Changes, Disk, Key, Pairs};
use super::log::EndsProcess;
use super::{StoreError, dir};
use crate::lock::guard;

/// Size of each file, in bytes. A frame that is larger makes it larger.
const FILE_BYTES: u64 = 2 << 20;
/// From this size on, in bytes, a frame is written without waiting for the flush.
const FRAME_BYTES: usize = 512 << 10;
/// Keys that go to sled without a pause.
const BATCH_KEYS: usize = 32;
/// Longest pause between two batches.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Under which sled has a [`Kept`].
const KEPT: &str = "journal";

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
        files::create(&path, sizes.file).map_err(StoreError::io(&path, "cannot be opened"))?;
        dir::sync_dir(&path)?;
        dir::sync_dir(dir)?;
        let kept = Kept::read(&*below).map_err(StoreError::sled(dir, "cannot be read"))?;
        let found = frames::replay(&path, kept)?;
        let next = Kept { run: rand::random(), last: 0 };
        found
            .write_to(&*below, next, |_| ())
            .map_err(StoreError::sled(dir, "cannot be written"))?;
        // From here on, what lies in the files is below.
        let journal = Journal::begin(&path, sizes, next.run)
            .map_err(StoreError::io(&path, "cannot be opened"))?;
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
            bytes += frames::entries_bytes(&changes);
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
        let bytes = frames::entries_bytes(&changes);
        self.add(bytes, |frame, layer| {
            for (key, value) in changes {
                frames::put_entry(frame, &key, value.as_deref());
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
        self.add(frames::value_bytes(key, value.as_deref()), |frame, layer| {
            frames::put_value(frame, key, value.as_deref());
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
