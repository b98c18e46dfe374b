//! The Raft log and the vote, in sled, behind a journal.
//!
//! Entries lie there in chunks ([`super::chunks`]); in a tree of its own lie vote, committed and purged
//! position.
//!
//! The steady state: [`LogStore::append`] puts entries in memory, where they can be read at once,
//! and in the queue of the one writer thread. The writer takes all that is queued, writes it as one
//! batch, flushes once, and then answers everybody. Recent entries stay in memory, so that
//! replication and apply do not read what was just written.
//!
//! - Writes reach the disk in the order of the calls; what comes back after a crash is a prefix of them.
//! - What is answered is on the disk. An error ends the process without an answer ([`fatal`]).
//! - The entries are contiguous. On open all are read; a hole, a missing chunk, a wrong checksum, or
//!   a tail or a vote that is older than it was ([`Mark`]) is refused by name. So is damage that
//!   makes sled panic.
//! - The directory and its files are synced before anything is answered: sled syncs neither the
//!   names of its files nor its configuration.
//! - A truncation is on the disk when it returns: a snapshot of what replaces the entries may be on
//!   the disk next, and with both a start would find two histories and refuse.
//! - A purge and the committed position are durable with the next flush: until then a crash may undo
//!   them, as if the call had not come.
//! - Purged entries are gone for readers at once, and go from the disk in slices, between writes.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::ops::{Bound, Range};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use metrics::histogram;
use tokio::sync::Notify;

use super::chunks::{assemble, chunks, key, parse_key, read_disk};
use super::codec::{self, Ballot, Batch, Position};
use super::coverage::{Coverage, PurgeLimit};
use super::dir::Lock;
use super::disk::{Changes, Disk, Key, Sled};
use super::journal::Journaled;
use super::mark::{Mark, Marked};
use super::opening::{catching, harden, make, open_sled};
use super::simulated::SimulatedDisk;
use super::{StoreError, fatal, sync};
use crate::lock::guard;
#[cfg(planted)]
use crate::planted::{self, Bug};

/// Largest encoded entry, in bytes.
pub const ENTRY_MAX_BYTES: usize = 16 << 20;
/// Most that one round of the writer takes, in bytes of entries and in calls.
const ROUND_BYTES: usize = 8 << 20;
const ROUND_OPS: usize = 1024;
/// Keys that a purge removes between two rounds.
const PURGE_SLICE_KEYS: usize = 1024;
/// Entries kept in memory after they are on the disk, in bytes of their payloads.
const TAIL_BYTES: usize = 16 << 20;
/// Entries that wait for the disk, in bytes of their payloads: with more, none are taken from a leader, and
/// this node should not lead.
const UNFLUSHED_TAKEN_MAX_BYTES: usize = 32 << 20;
/// With more, whoever appends waits.
const UNFLUSHED_MAX_BYTES: usize = 64 << 20;
/// Of the newest, those that are kept decoded as well, which takes ten times as much: they are applied soon.
const DECODED_BYTES: usize = 2 << 20;
/// The same, while they wait for the disk, or to be committed.
const DECODED_AHEAD_BYTES: usize = 8 << 20;

/// An entry as the log keeps it: where it lies, and its bytes as [`codec`] wrote them.
#[derive(Debug, Clone)]
pub struct LogRecord {
    pub at: Position,
    pub payload: Bytes,
    /// The same as `payload`, for whoever reads it while it is in memory.
    batch: Option<Batch>,
}

impl LogRecord {
    pub fn new(at: Position, payload: impl Into<Bytes>) -> LogRecord {
        LogRecord { at, payload: payload.into(), batch: None }
    }

    pub fn with_batch(self, batch: Batch) -> LogRecord {
        LogRecord { batch: Some(batch), ..self }
    }

    /// The commands in it, if they need not be decoded.
    pub fn batch(&self) -> Option<&Batch> {
        self.batch.as_ref()
    }
}

impl PartialEq for LogRecord {
    fn eq(&self, other: &LogRecord) -> bool {
        (self.at, &self.payload) == (other.at, &other.payload)
    }
}

impl Eq for LogRecord {}

/// Called from the writer thread once what it stands for is on the disk. Must not block.
pub type Done = Box<dyn FnOnce() + Send>;

/// The log of one node. Clones share it; when the last one goes, what is queued is written and the
/// files are closed.
#[derive(Debug, Clone)]
pub struct LogStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    disk: Arc<dyn Disk>,
    common: Arc<Common>,
    coverage: Arc<Coverage>,
    /// Without snapshots: it may begin anywhere.
    alone: bool,
    /// `None` only while it is being dropped.
    queue: Option<Queue>,
    /// `None` where it is a task.
    writer: Option<JoinHandle<()>>,
}

/// The way to the writer.
#[derive(Debug)]
enum Queue {
    Thread(mpsc::Sender<Op>),
    Task(tokio::sync::mpsc::UnboundedSender<Op>),
}

impl Queue {
    fn send(&self, op: Op) -> bool {
        match self {
            Queue::Thread(queue) => queue.send(op).is_ok(),
            Queue::Task(queue) => queue.send(op).is_ok(),
        }
    }
}

/// What the writer has too.
#[derive(Debug, Default)]
struct Common {
    index: Mutex<Index>,
    /// As saved last. The writer reads it while the index is still locked by whoever woke it.
    committed: Mutex<Option<Position>>,
    /// More is on the disk.
    flushed: Notify,
}

impl Common {
    fn index(&self) -> MutexGuard<'_, Index> {
        guard(&self.index)
    }

    fn committed(&self) -> MutexGuard<'_, Option<Position>> {
        guard(&self.committed)
    }
}

/// What is known of the log without reading it.
#[derive(Debug, Default)]
struct Index {
    /// Grows when something that could be read is taken away.
    epoch: u64,
    purged: Option<Position>,
    /// Index of the first entry, if there is any.
    begins: u64,
    /// The last entry; where there is none, `purged`.
    last: Option<Position>,
    vote: Option<Ballot>,
    /// Since when those wait for whom something is written, in their order.
    waits: VecDeque<Instant>,
    /// What was in the log at the start and what was appended since, in bytes of entries.
    appended_bytes: u64,
    tail: Tail,
}

/// The newest entries. Those above `flushed` may not be on the disk yet.
#[derive(Debug, Default)]
struct Tail {
    entries: BTreeMap<u64, TailEntry>,
    bytes: usize,
    /// Index and bytes of those that are decoded, the oldest first; some may be gone.
    decoded: VecDeque<(u64, usize)>,
    decoded_bytes: usize,
    /// Number of the last append; appends up to `flushed` are on the disk.
    appends: u64,
    flushed: u64,
    /// Of the appends after that, in bytes of entries.
    unflushed_bytes: usize,
}

#[derive(Debug)]
struct TailEntry {
    append: u64,
    record: LogRecord,
}

enum Op {
    Append {
        append: u64,
        records: Vec<LogRecord>,
        done: Done,
    },
    Vote {
        ballot: Ballot,
        done: tokio::sync::oneshot::Sender<()>,
    },
    /// `end`: index after the last entry that stays.
    Truncate {
        end: u64,
        last: Option<Position>,
        done: tokio::sync::oneshot::Sender<()>,
    },
    Purge(Position),
}

impl LogStore {
    /// Opens a log by itself, without snapshots to heed: it purges whatever it is told to, and may
    /// begin anywhere.
    pub fn open(path: &Path) -> Result<LogStore, StoreError> {
        let coverage = Arc::new(Coverage::new(path.to_path_buf()));
        fs::create_dir_all(path).map_err(StoreError::io(path, "cannot be made"))?;
        let lock = File::open(path).map_err(StoreError::io(path, "cannot be opened"))?;
        LogStore::start(path, coverage, Arc::new(Lock::new(lock)), true)
    }

    /// `lock` is held as long as anything may still write.
    pub(super) fn open_in(
        path: &Path,
        coverage: Arc<Coverage>,
        lock: Arc<Lock>,
    ) -> Result<LogStore, StoreError> {
        LogStore::start(path, coverage, lock, false)
    }

    fn start(
        path: &Path,
        coverage: Arc<Coverage>,
        lock: Arc<Lock>,
        alone: bool,
    ) -> Result<LogStore, StoreError> {
        sync::verify()?;
        let disk = catching(path, || {
            make(path)?;
            let db = open_sled(path)?;
            let tree =
                |name| db.open_tree(name).map_err(StoreError::sled(path, "cannot be opened"));
            let (entries, meta) = (tree("entries")?, tree("meta")?);
            let ends = path.to_path_buf();
            let sled = Arc::new(Sled { db, entries, meta });
            Journaled::open(path, sled, move |error| failed(&ends, &error))
        })?;
        let (mark, marked) = Mark::open(&path.join("mark"))?;
        let disk = Arc::new(disk);
        let common = LogStore::found(path, &*disk, alone, &marked)?;
        coverage.log_opened(common.index().purged)?;
        harden(path)?;
        let writer = Writer::new(path, disk.clone(), Some(mark), common.clone(), lock);
        let (queue, ops) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("log-writer".into())
            .spawn(move || writer.run(&ops))
            .map_err(StoreError::io(path, "cannot start the writer thread"))?;
        let (queue, writer) = (Some(Queue::Thread(queue)), Some(thread));
        let path = path.to_path_buf();
        let shared = Shared { path, disk, common, coverage, alone, queue, writer };
        Ok(LogStore { shared: Arc::new(shared) })
    }

    /// Over a simulated disk: its writer is a task of the runtime, and flushes take the runtime's
    /// time. `path` is for messages.
    pub(super) fn simulated(
        path: &Path,
        disk: SimulatedDisk,
        coverage: Arc<Coverage>,
        lock: Arc<Lock>,
    ) -> Result<LogStore, StoreError> {
        let common = LogStore::found(path, &disk, false, &Marked::default())?;
        coverage.log_opened(common.index().purged)?;
        let disk = Arc::new(disk);
        let writer = Writer::new(path, disk.clone(), None, common.clone(), lock);
        let (queue, ops) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(writer.run_as_task(ops, SimulatedDisk::clone(&disk)));
        let (queue, writer) = (Some(Queue::Task(queue)), None);
        let path = path.to_path_buf();
        let shared = Shared { path, disk, common, coverage, alone: false, queue, writer };
        Ok(LogStore { shared: Arc::new(shared) })
    }

    fn found(
        path: &Path,
        disk: &dyn Disk,
        alone: bool,
        marked: &Marked,
    ) -> Result<Arc<Common>, StoreError> {
        let common = catching(path, || scan(path, disk, alone, marked))?;
        marked.check_vote(path, common.index().vote)?;
        Ok(Arc::new(common))
    }

    /// Neither an entry nor a vote was ever written.
    pub fn is_pristine(&self) -> bool {
        let index = self.index();
        index.last.is_none() && index.vote.is_none()
    }

    /// Up to where the log was purged, and where it ends.
    pub fn bounds(&self) -> (Option<Position>, Option<Position>) {
        let index = self.index();
        (index.purged, index.last)
    }

    pub fn vote(&self) -> Option<Ballot> {
        self.index().vote
    }

    /// Bytes of the entries that the log had when it was opened, and of all that were appended since.
    /// Never goes back.
    pub fn appended_bytes(&self) -> u64 {
        self.index().appended_bytes
    }

    /// As last saved; after a crash it may be an older one.
    pub fn committed(&self) -> Option<Position> {
        *self.shared.common.committed()
    }

    /// Entries of `range` in their order, as they were at one moment: all that the log has, but no
    /// more than the first that fill `max_bytes` (at least one). Reads the disk for old ones.
    pub fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<LogRecord>, StoreError> {
        loop {
            let (epoch, on_disk, mut newest) = {
                let index = self.index();
                let first = index.begins.max(range.start);
                let end = index.last.map_or(0, |at| at.index + 1).min(range.end);
                if first >= end {
                    return Ok(Vec::new());
                }
                let newest: Vec<_> =
                    index.tail.entries.range(first..end).map(|(_, e)| e.record.clone()).collect();
                let tail_from = newest.first().map_or(end, |record| record.at.index);
                (index.epoch, first..tail_from, newest)
            };
            let path = &self.shared.path;
            let read = catching(path, || read_disk(path, &*self.shared.disk, on_disk, max_bytes));
            // Something was taken away meanwhile: what was read may be of two moments.
            if self.index().epoch != epoch {
                continue;
            }
            let (mut records, bytes, complete) = read?;
            let mut left = max_bytes.saturating_sub(bytes);
            if complete {
                let fits = newest.iter().take_while(|record| {
                    let fits = record.payload.len() <= left;
                    left = left.saturating_sub(record.payload.len());
                    fits
                });
                let count = fits.count().max(usize::from(records.is_empty()));
                newest.truncate(count);
                records.append(&mut newest);
            }
            return Ok(records);
        }
    }

    /// Appends entries, which can be read when this returns; `done` is called when they are on the
    /// disk. Refuses entries that do not follow the last one, and too large ones.
    pub fn append(&self, records: Vec<LogRecord>, done: Done) -> Result<(), StoreError> {
        let mut index = self.index();
        let begins = match (index.last, records.first()) {
            (None, Some(first)) if self.shared.alone => first.at.index,
            _ => index.begins,
        };
        let mut last = index.last;
        for record in &records {
            let next = last.map_or(begins, |last| last.index + 1);
            if record.at.index != next {
                return Err(self.misuse(format!("entry {} is not entry {next}", record.at)));
            }
            if record.payload.len() > ENTRY_MAX_BYTES {
                let bytes = record.payload.len();
                let what =
                    format!("entry {} has {bytes} of at most {ENTRY_MAX_BYTES} bytes", record.at);
                return Err(self.misuse(what));
            }
            last = Some(record.at);
        }
        index.begins = begins;
        index.last = last;
        index.appended_bytes += records.iter().map(|r| r.payload.len() as u64).sum::<u64>();
        let append = index.tail.push(&records);
        // To be written they need not be decoded.
        let records =
            records.into_iter().map(|record| LogRecord { batch: None, ..record }).collect();
        self.send(&mut index, Op::Append { append, records, done });
        Ok(())
    }

    /// How long somebody has waited for the disk.
    pub fn waits_for_disk(&self) -> Duration {
        self.index().waits.front().map_or(Duration::ZERO, Instant::elapsed)
    }

    /// Does so much wait for the disk that this node should not lead?
    pub fn is_crowded(&self) -> bool {
        self.index().tail.unflushed_bytes > UNFLUSHED_TAKEN_MAX_BYTES
    }

    /// Returns when there is room for what a leader sends.
    pub async fn room_for_others(&self) {
        self.drained_to(UNFLUSHED_TAKEN_MAX_BYTES).await;
    }

    /// Returns when there is room for what this node appends.
    pub async fn room(&self) {
        self.drained_to(UNFLUSHED_MAX_BYTES).await;
    }

    /// Returns when no more than so many bytes of entries wait for the disk.
    async fn drained_to(&self, bytes: usize) {
        loop {
            let flushed = self.shared.common.flushed.notified();
            if self.index().tail.unflushed_bytes <= bytes {
                return;
            }
            flushed.await;
        }
    }

    /// Returns when the vote is on the disk.
    pub async fn save_vote(&self, ballot: Ballot) {
        let (done, saved) = tokio::sync::oneshot::channel();
        {
            let mut index = self.index();
            index.vote = Some(ballot);
            #[cfg(planted)]
            if planted::is(Bug::VoteNotDurable) {
                return;
            }
            self.send(&mut index, Op::Vote { ballot, done });
        }
        self.written(saved).await;
    }

    /// Rides with the next flush; nobody is woken for it.
    pub fn save_committed(&self, committed: Option<Position>) {
        *self.shared.common.committed() = committed;
    }

    /// Drops the entries after `last`; `None`: all of them. Returns when they are gone from the disk.
    pub async fn truncate_after(&self, last: Option<Position>) {
        let (done, truncated) = tokio::sync::oneshot::channel();
        {
            let mut index = self.index();
            let last = last.or(index.purged);
            if last.map(|at| at.index) >= index.last.map(|at| at.index) {
                return;
            }
            let end = last.map_or(0, |at| at.index + 1);
            index.epoch += 1;
            index.last = last;
            index.tail.truncate(end);
            self.send(&mut index, Op::Truncate { end, last, done });
        }
        self.written(truncated).await;
    }

    /// Drops the entries up to `upto`, but only as far as the snapshots allow. Where the log ends
    /// before `upto`, a snapshot has taken its place: then all of it goes.
    pub fn purge(&self, upto: Position) {
        let mut index = self.index();
        let replaced = index.last.is_none_or(|last| last.index <= upto.index);
        let upto = match self.shared.coverage.purge_limit() {
            PurgeLimit::None => upto,
            PurgeLimit::UpTo(_) if replaced => upto,
            PurgeLimit::UpTo(None) => return,
            PurgeLimit::UpTo(Some(limit)) if limit.index < upto.index => limit,
            PurgeLimit::UpTo(Some(_)) => upto,
        };
        if index.purged.is_some_and(|purged| purged.index >= upto.index) {
            return;
        }
        index.epoch += 1;
        index.purged = Some(upto);
        index.begins = upto.index + 1;
        if index.last.is_none_or(|last| last.index <= upto.index) {
            index.last = Some(upto);
        }
        index.tail.purge(upto.index);
        self.shared.coverage.log_purged(upto);
        self.send(&mut index, Op::Purge(upto));
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.shared.common.index()
    }

    /// The index is locked, so that the queue has the order of the calls.
    fn send(&self, index: &mut Index, op: Op) {
        if !matches!(op, Op::Purge(_)) {
            index.waits.push_back(Instant::now());
        }
        if let Some(queue) = &self.shared.queue
            && !queue.send(op)
        {
            fatal("the log's writer is gone", &self.shared.path.display());
        }
    }

    async fn written(&self, done: tokio::sync::oneshot::Receiver<()>) {
        if done.await.is_err() {
            fatal("the log's writer is gone", &self.shared.path.display());
        }
    }

    fn misuse(&self, what: String) -> StoreError {
        StoreError::Misuse { path: self.shared.path.clone(), what }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(writer) = self.writer.take() {
            // A panic of the writer has ended the process already.
            let _ = writer.join();
        }
    }
}

impl Tail {
    fn push(&mut self, records: &[LogRecord]) -> u64 {
        self.appends += 1;
        for record in records {
            self.bytes += record.payload.len();
            self.unflushed_bytes += record.payload.len();
            if record.batch.is_some() {
                self.decoded_bytes += record.payload.len();
                self.decoded.push_back((record.at.index, record.payload.len()));
            }
            let entry = TailEntry { append: self.appends, record: record.clone() };
            self.entries.insert(record.at.index, entry);
        }
        self.forget_decoded(DECODED_AHEAD_BYTES, u64::MAX);
        self.appends
    }

    fn truncate(&mut self, end: u64) {
        let gone = self.entries.split_off(&end);
        self.bytes -= gone.values().map(|e| e.record.payload.len()).sum::<usize>();
    }

    fn purge(&mut self, upto: u64) {
        let stay = self.entries.split_off(&(upto + 1));
        let gone = std::mem::replace(&mut self.entries, stay);
        self.bytes -= gone.values().map(|e| e.record.payload.len()).sum::<usize>();
    }

    /// What `append` and those before it hold is on the disk, in bytes of entries that were not. What is not
    /// committed is still to be applied.
    fn has_flushed(&mut self, append: u64, bytes: usize, committed: Option<Position>) {
        self.flushed = self.flushed.max(append);
        self.unflushed_bytes -= bytes;
        self.shrink();
        self.forget_decoded(DECODED_BYTES, committed.map_or(0, |at| at.index));
    }

    /// Forgets the oldest, as far as they are on the disk, until the rest fits.
    fn shrink(&mut self) {
        while self.bytes > TAIL_BYTES
            && let Some(oldest) = self.entries.first_entry()
            && oldest.get().append <= self.flushed
        {
            self.bytes -= oldest.remove().record.payload.len();
        }
    }

    /// What was decoded first, up to an entry, is again only bytes, until the rest has no more than so many.
    fn forget_decoded(&mut self, max_bytes: usize, upto: u64) {
        while self.decoded_bytes > max_bytes
            && let Some(&(index, bytes)) = self.decoded.front()
            && index <= upto
        {
            self.decoded.pop_front();
            self.decoded_bytes -= bytes;
            // Another one may have taken its place: it is decoded again, where that is needed.
            if let Some(entry) = self.entries.get_mut(&index) {
                entry.record.batch = None;
            }
        }
    }
}

/// The thread that writes: what it calls blocks.
struct Writer {
    path: PathBuf,
    disk: Arc<dyn Disk>,
    common: Arc<Common>,
    /// `None` where the disk is simulated.
    mark: Option<Mark>,
    /// The last entry and the vote that are on the disk.
    durable: Marked,
    /// Entries up to this one are being removed from the disk.
    purging: Option<u64>,
    /// The committed position, as it was written last.
    written: Option<Position>,
    /// Where the first entry on the disk may lie.
    oldest: Bound<Key>,
    _lock: Arc<Lock>,
}

/// What one flush answers.
#[derive(Default)]
struct Round {
    batch: Changes,
    bytes: usize,
    ops: usize,
    /// What is on the disk once the round is.
    ends: Marked,
    append: u64,
    appended: Vec<Done>,
    /// Votes and truncations.
    changed: Vec<tokio::sync::oneshot::Sender<()>>,
    /// A snapshot has taken the place of the whole log: no other entry says that it must be there.
    replaced: bool,
}

impl Writer {
    fn new(
        path: &Path,
        disk: Arc<dyn Disk>,
        mark: Option<Mark>,
        common: Arc<Common>,
        lock: Arc<Lock>,
    ) -> Writer {
        let written = *common.committed();
        let (durable, purging) = {
            let index = common.index();
            let durable = Marked { last: index.last, vote: index.vote };
            (durable, index.purged.map(|at| at.index))
        };
        Writer {
            path: path.to_path_buf(),
            disk,
            mark,
            durable,
            purging,
            written,
            oldest: Bound::Unbounded,
            common,
            _lock: lock,
        }
    }

    fn run(mut self, ops: &mpsc::Receiver<Op>) {
        let _guard = EndsProcess("the log's writer");
        loop {
            match self.next(ops) {
                Ok(first) => {
                    let round = self.gather(first, || ops.try_recv().ok());
                    self.finish(round);
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if self.purging.is_some() => self.purge_slice(),
                Err(RecvTimeoutError::Timeout) => self.mark(Mark::sync),
            }
        }
        self.write_committed(self.durable.last);
        self.must(self.disk.flush());
        self.mark(Mark::sync);
        self.must(self.disk.close());
    }

    /// The same, where time is the runtime's.
    async fn run_as_task(
        mut self,
        mut ops: tokio::sync::mpsc::UnboundedReceiver<Op>,
        disk: SimulatedDisk,
    ) {
        while let Some(first) = ops.recv().await {
            let round = self.gather(first, || ops.try_recv().ok());
            tokio::time::sleep(disk.latency()).await;
            self.finish(round);
            while self.purging.is_some() {
                self.purge_slice();
            }
        }
        self.write_committed(self.durable.last);
    }

    /// All that waits, as far as one round takes it.
    fn gather(&mut self, first: Op, mut next: impl FnMut() -> Option<Op>) -> Round {
        let mut round = Round { ends: self.durable, ..Round::default() };
        self.take(&mut round, first);
        while round.bytes < ROUND_BYTES && round.ops < ROUND_OPS {
            match next() {
                Some(op) => self.take(&mut round, op),
                None => break,
            }
        }
        #[cfg(planted)]
        if planted::is(Bug::AckedBeforeSync) {
            round.appended.drain(..).for_each(|done| done());
        }
        round
    }

    /// A timeout: nothing waits, and there is a purge to do or the mark to sync.
    fn next(&self, ops: &mpsc::Receiver<Op>) -> Result<Op, RecvTimeoutError> {
        let idle = match self.purging {
            Some(_) => Some(Duration::ZERO),
            None => self.mark.as_ref().and_then(Mark::due),
        };
        match idle {
            Some(idle) => ops.recv_timeout(idle),
            None => ops.recv().map_err(|mpsc::RecvError| RecvTimeoutError::Disconnected),
        }
    }

    fn take(&mut self, round: &mut Round, op: Op) {
        round.ops += 1;
        match op {
            Op::Append { append, records, done } => {
                for record in &records {
                    round.bytes += record.payload.len();
                    let parts = chunks(record).into_iter();
                    round.batch.extend(parts.map(|(key, value)| (key, Some(value))));
                }
                round.ends.last = records.last().map(|r| r.at).or(round.ends.last);
                round.append = append;
                round.appended.push(done);
            }
            Op::Vote { ballot, done } => {
                self.set(round, VOTE, Some(codec::encode_ballot(&ballot)));
                round.ends.vote = Some(ballot);
                round.changed.push(done);
            }
            Op::Truncate { end, last, done } => {
                self.truncate(round, end, last);
                round.changed.push(done);
            }
            Op::Purge(upto) => {
                self.set(round, PURGED, Some(codec::encode_position(&upto)));
                if round.ends.last.is_none_or(|last| last.index < upto.index) {
                    round.ends.last = Some(upto);
                    round.replaced = true;
                }
                self.purging = Some(upto.index);
            }
        }
    }

    /// One flush for all of the round, then the answers.
    fn finish(&mut self, mut round: Round) {
        self.write_batch(&mut round);
        self.write_committed(round.ends.last);
        if round.appended.is_empty() && round.changed.is_empty() && !round.replaced {
            return; // nobody waits: it rides with the next flush
        }
        let began = Instant::now();
        self.must(self.disk.flush());
        histogram!("portwarden_log_flush_seconds").record(began.elapsed().as_secs_f64());
        self.durable = round.ends;
        let committed = *self.common.committed();
        {
            let mut index = self.common.index();
            index.waits.drain(..round.appended.len() + round.changed.len());
            index.tail.has_flushed(round.append, round.bytes, committed);
        }
        self.common.flushed.notify_waiters();
        for done in round.appended {
            done();
        }
        for done in round.changed {
            let _ = done.send(()); // who asked may have gone
        }
        let durable = self.durable;
        self.mark(|mark| mark.note(durable));
    }

    /// Writes a value after all that came before it.
    fn set(&self, round: &mut Round, key: &str, value: Option<Vec<u8>>) {
        self.write_batch(round);
        self.must(self.disk.set(key, value));
    }

    /// Up to `last`, where the log ends on the disk once what was written is flushed.
    fn write_committed(&mut self, last: Option<Position>) {
        let committed = (*self.common.committed()).min(last);
        if self.written != committed {
            let value = committed.map(|at| codec::encode_position(&at));
            self.must(self.disk.set(COMMITTED, value));
            self.written = committed;
        }
    }

    fn write_batch(&self, round: &mut Round) {
        let batch = std::mem::take(&mut round.batch);
        self.must(self.disk.write(batch));
    }

    fn truncate(&mut self, round: &mut Round, end: u64, last: Option<Position>) {
        self.write_batch(round);
        // The mark must never promise more than the log may come back with.
        if self.durable.last.map(|at| at.index) > last.map(|at| at.index) {
            self.durable.last = last;
        }
        let durable = self.durable;
        self.mark(|mark| mark.lower(durable));
        round.ends.last = last;
        self.remove(self.disk.range((Bound::Included(key(end, 0)), Bound::Unbounded)));
    }

    fn purge_slice(&mut self) {
        let Some(upto) = self.purging else { return };
        let oldest = self.disk.range((self.oldest, Bound::Excluded(key(upto + 1, 0))));
        match self.remove(oldest.take(PURGE_SLICE_KEYS)).as_slice() {
            [.., last] => self.oldest = Bound::Excluded(*last),
            [] => self.purging = None,
        }
    }

    /// Removes these keys, all or none, and says which they were.
    fn remove(
        &self,
        found: impl Iterator<Item = sled::Result<(sled::IVec, sled::IVec)>>,
    ) -> Vec<Key> {
        let keys = found.map(|pair| self.must(pair).0);
        let gone: Vec<Key> = keys.filter_map(|key| key.as_ref().try_into().ok()).collect();
        self.must(self.disk.write(gone.iter().map(|key| (*key, None)).collect()));
        gone
    }

    fn mark(&mut self, step: impl FnOnce(&mut Mark) -> io::Result<()>) {
        let done = self.mark.as_mut().map_or(Ok(()), step);
        self.must(done);
    }

    fn must<T, E: std::fmt::Display>(&self, result: Result<T, E>) -> T {
        result.unwrap_or_else(|error| failed(&self.path, &error))
    }
}

/// The log cannot be written.
fn failed(path: &Path, error: &dyn std::fmt::Display) -> ! {
    let error = error.to_string();
    if error.contains("corrupt") {
        fatal("the log is damaged", &StoreError::damaged(path, error));
    }
    fatal(&format!("the log in {} cannot be written", path.display()), &error)
}

/// Without its threads the node would wait for ever, or worse, take silence for success. Names the
/// thread.
pub(super) struct EndsProcess(pub &'static str);

impl Drop for EndsProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            fatal(&format!("{} panicked", self.0), &"see above");
        }
    }
}

/// Keys of what lies beside the entries.
pub(super) const VOTE: &str = "vote";
const COMMITTED: &str = "committed";
const PURGED: &str = "purged";

/// Reads and checks everything.
fn scan(path: &Path, disk: &dyn Disk, alone: bool, marked: &Marked) -> Result<Common, StoreError> {
    let get = |key| disk.get(key).map_err(StoreError::sled(path, "cannot be read"));
    let position = |key| {
        let bytes = get(key)?;
        let decoded = bytes.map(|bytes| codec::decode_position(&bytes));
        decoded.transpose().map_err(StoreError::codec(path))
    };
    let vote = get(VOTE)?.map(|bytes| codec::decode_ballot(&bytes));
    let vote = vote.transpose().map_err(StoreError::codec(path))?;
    let (committed, purged) = (position(COMMITTED)?, position(PURGED)?);

    let mut begins = purged.map_or(0, |at| at.index + 1);
    // What a later write or purge would come across is found now.
    let purged_before = (Bound::Unbounded, Bound::Excluded(key(begins, 0)));
    for pair in disk.values().chain(disk.range(purged_before)) {
        pair.map_err(StoreError::sled(path, "cannot be read"))?;
    }
    if alone && purged.is_none() {
        let first = disk.range((Bound::Unbounded, Bound::Unbounded)).next().transpose();
        let first = first.map_err(StoreError::sled(path, "cannot be read"))?;
        begins = first.and_then(|(key, _)| parse_key(&key)).map_or(0, |(index, _)| index);
    }
    let mut last = purged;
    let mut appended_bytes = 0;
    let entries = disk.range((Bound::Included(key(begins, 0)), Bound::Unbounded));
    for record in assemble(path, begins, entries) {
        let LogRecord { at, payload, .. } = record?;
        appended_bytes += payload.len() as u64;
        if let Some(before) = last
            && (at.term, at.node) < (before.term, before.node)
        {
            let what = format!("entry {at} follows entry {before}");
            return Err(StoreError::damaged(path, what));
        }
        marked.check_entry(path, at)?;
        last = Some(at);
    }
    marked.check_end(path, last)?;
    let tail = Tail::default();
    let waits = VecDeque::new();
    let index = Index { epoch: 0, purged, begins, last, vote, waits, appended_bytes, tail };
    Ok(Common { index: index.into(), committed: committed.into(), flushed: Notify::new() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Command, Millis};

    /// A start would take it for none, though all before it was committed too.
    #[test]
    fn the_committed_position_does_not_overtake_the_log() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), SimulatedDisk::default());
        let lock = Arc::new(Lock::new(File::open(dir.path()).unwrap()));
        let on = Arc::new(disk.clone());
        let mut writer = Writer::new(dir.path(), on, None, Arc::default(), lock);
        let at = |index| Some(Position { term: 1, node: 1, index });
        *writer.common.committed() = at(7);
        for (last, written) in [(5, 5), (9, 7), (9, 7)] {
            writer.write_committed(at(last));
            let found = disk.get(COMMITTED).unwrap().unwrap();
            assert_eq!(Some(codec::decode_position(&found).unwrap()), at(written));
        }
    }

    /// Raft hands on and applies what is not on the disk here, if it is on most of the others'.
    #[tokio::test(start_paused = true)]
    async fn what_waits_for_a_disk_that_hangs_is_bounded() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), SimulatedDisk::default());
        let lock = Arc::new(Lock::new(File::open(dir.path()).unwrap()));
        let coverage = Arc::new(Coverage::new(dir.path().into()));
        let log = LogStore::simulated(dir.path(), disk.clone(), coverage, lock).unwrap();
        disk.set_latency(Duration::from_secs(3600));
        let grants = vec![Command::GrantLease { ttl: Millis(60_000) }; 1 << 20];
        let batch = Batch::new(Millis(0), grants);
        let bytes = batch.payload().len();
        let mut appended = 0;
        loop {
            let at = Position { term: 1, node: 1, index: appended };
            let record = LogRecord::new(at, batch.payload().clone()).with_batch(batch.clone());
            log.append(vec![record], Box::new(|| ())).unwrap();
            appended += 1;
            if tokio::time::timeout(Duration::from_secs(1), log.room()).await.is_err() {
                break;
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(appended as usize, UNFLUSHED_MAX_BYTES / bytes + 1);
        assert!(log.is_crowded() && log.waits_for_disk() > Duration::ZERO);
        let decoded = |index: &Index| index.tail.decoded.len() * bytes;
        assert!(decoded(&log.index()) <= DECODED_AHEAD_BYTES);
        disk.set_latency(Duration::ZERO);
        log.room_for_others().await;
        assert!(!log.is_crowded());
        log.save_vote(Ballot { term: 2, node: 1, committed: false }).await;
        assert_eq!(log.waits_for_disk(), Duration::ZERO);
        disk.set_latency(Duration::from_secs(3600));
        let vote = log.save_vote(Ballot { term: 3, node: 1, committed: false });
        assert!(tokio::time::timeout(Duration::from_secs(1), vote).await.is_err());
        assert!(log.waits_for_disk() > Duration::ZERO, "a vote is waited for as well");
    }

    /// A snapshot from a peer has taken its place, and nothing may be written for long: a start must miss the
    /// snapshot, were it lost.
    #[tokio::test(start_paused = true)]
    async fn that_a_snapshot_took_the_place_of_the_log_is_on_the_disk_by_itself() {
        let (dir, disk) = (tempfile::tempdir().unwrap(), SimulatedDisk::default());
        let open = || {
            let lock = Arc::new(Lock::new(File::open(dir.path()).unwrap()));
            let coverage = Arc::new(Coverage::new(dir.path().into()));
            LogStore::simulated(dir.path(), disk.clone(), coverage, lock).unwrap()
        };
        let log = open();
        log.save_vote(Ballot { term: 1, node: 1, committed: false }).await;
        let flushes = disk.flushes();
        let upto = Position { term: 1, node: 1, index: 100 };
        log.purge(upto);
        for _ in 0..1000 {
            if disk.flushes() > flushes {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(log);
        disk.crash(0);
        assert_eq!(open().bounds(), (Some(upto), Some(upto)));
    }

    #[test]
    fn entries_are_kept_decoded_only_while_they_are_new() {
        let grant = Command::GrantLease { ttl: Millis(60_000) };
        let batch = Batch::new(Millis(0), vec![grant; 20_000]);
        let bytes = batch.payload().len();
        let record = |index| {
            let at = Position { term: 1, node: 1, index };
            LogRecord::new(at, batch.payload().clone()).with_batch(batch.clone())
        };
        let new = DECODED_BYTES / bytes;
        let all: Vec<LogRecord> = (1..=2 * new as u64).map(record).collect();
        let mut tail = Tail::default();
        tail.flushed = tail.push(&all);
        tail.truncate(2 * new as u64); // the last one, which comes again
        tail.push(&all[2 * new - 1..]);
        tail.forget_decoded(DECODED_BYTES, u64::MAX);
        let is_decoded = |at: usize| tail.entries[&(at as u64)].record.batch().is_some();
        assert!((new + 2..=2 * new).all(is_decoded) && !(1..new).any(is_decoded));
        assert!(tail.entries.values().map(|kept| &kept.record).eq(&all), "the bytes are there");
    }
}
