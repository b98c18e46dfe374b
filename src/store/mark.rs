//! How far the log had come: its last entry and its vote beside sled, so that a tail that sled drops
//! without a word (it skips what it finds damaged) is noticed at the next start.
//!
//! Two slots of a page each, with a sequence number and a checksum each. Every round of the log's
//! writer is written into one of them once it is on the disk, which costs no sync: a process that is
//! killed leaves it. The slot is synced every [`SYNC_EVERY`], with a vote at once, and the next write
//! goes to the other one. So there is always a synced slot that nobody writes to, and a torn write
//! leaves it; the mark never promises more than the log holds; and after a power cut it misses at most
//! what was answered within [`SYNC_EVERY`] before. Before entries are truncated it is lowered, durably.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use super::StoreError;
use super::codec::{Ballot, Position};

/// For how long what is written may be without a sync.
const SYNC_EVERY: Duration = Duration::from_millis(50);
const SLOT_BYTES: u64 = 4096;
const MAGIC: &[u8; 4] = b"PWMK";
const VERSION: u8 = 2;
/// Magic, version, sequence, position (index + 1, 0 for none), vote (0 for none), CRC-32.
const RECORD_BYTES: usize = 4 + 1 + 8 + 3 * 8 + (1 + 2 * 8) + 4;

type Record = [u8; RECORD_BYTES];

/// What had been on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Marked {
    pub last: Option<Position>,
    pub vote: Option<Ballot>,
}

impl Marked {
    /// Of each entry that the log has: the marked one is what it was.
    pub fn check_entry(&self, log: &Path, at: Position) -> Result<(), StoreError> {
        match self.last {
            Some(marked) if marked.index == at.index && marked != at => {
                let what = format!("there is entry {at} where entry {marked} had been on the disk");
                Err(StoreError::damaged(log, what))
            }
            _ => Ok(()),
        }
    }

    /// Where the log ends: not before the marked entry.
    pub fn check_end(&self, log: &Path, last: Option<Position>) -> Result<(), StoreError> {
        match self.last {
            Some(marked) if last.is_none_or(|last| last.index < marked.index) => {
                let end = last.map_or("is empty".into(), |at| format!("ends at entry {at}"));
                let what = format!("the log {end}, but entry {marked} had been on the disk");
                Err(StoreError::damaged(log, what))
            }
            _ => Ok(()),
        }
    }

    /// A vote is never taken back: votes only grow.
    pub fn check_vote(&self, log: &Path, vote: Option<Ballot>) -> Result<(), StoreError> {
        let order = |ballot: &Ballot| (ballot.term, ballot.node, ballot.committed);
        match &self.vote {
            Some(marked) if vote.as_ref().is_none_or(|vote| order(vote) < order(marked)) => {
                let Ballot { term, node, .. } = marked;
                let what = format!("the vote of term {term} for node {node} is lost");
                Err(StoreError::damaged(log, what))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Debug)]
pub(super) struct Mark {
    file: File,
    /// What was last written.
    written: Marked,
    /// Of the slot that is written to. Grows with each sync: the slots take turns.
    sequence: u64,
    /// Since when what was written is not synced.
    unsynced: Option<Instant>,
}

impl Mark {
    /// Also returns what the log must have.
    pub fn open(path: &Path) -> Result<(Mark, Marked), StoreError> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)
            .map_err(StoreError::io(path, "cannot be opened"))?;
        // Written whole once, so that later writes change no metadata.
        let size = file.metadata().map_err(StoreError::io(path, "cannot be read"))?.len();
        // One that was cut off while it was made has nothing in it yet.
        let is_new = size < 2 * SLOT_BYTES && {
            let mut made = vec![0; size as usize];
            let read = file.read_exact_at(&mut made, 0);
            read.map_err(StoreError::io(path, "cannot be read"))?;
            made.iter().all(|byte| *byte == 0)
        };
        if is_new {
            let fill = || {
                file.write_all_at(&[0; 2 * SLOT_BYTES as usize], 0)?;
                file.sync_all()
            };
            fill().map_err(StoreError::io(path, "cannot be written"))?;
            if let Some(dir) = path.parent() {
                super::dir::sync_dir(dir)?;
            }
        } else if size != 2 * SLOT_BYTES {
            let what = format!("it has {size} bytes and not {}", 2 * SLOT_BYTES);
            return Err(StoreError::damaged(path, what));
        }
        let mut newest: Option<(u64, Marked)> = None;
        let mut unread = 0;
        for slot in 0..2 {
            let mut bytes = [0; RECORD_BYTES];
            file.read_exact_at(&mut bytes, slot * SLOT_BYTES)
                .map_err(StoreError::io(path, "cannot be read"))?;
            match decode(&bytes) {
                Some(found) if newest.is_none_or(|newest| newest.0 < found.0) => {
                    newest = Some(found);
                }
                Some(_) => {}
                None if bytes == [0; RECORD_BYTES] => {}
                None if bytes[..4] == *MAGIC && bytes[4] != VERSION => {
                    return Err(StoreError::Version {
                        path: path.to_path_buf(),
                        what: "the log's mark",
                        found: bytes[4].into(),
                        supported: VERSION.into(),
                    });
                }
                None => unread += 1,
            }
        }
        if unread == 2 || (unread == 1 && newest.is_none()) {
            return Err(StoreError::damaged(path, "no slot of it can be read"));
        }
        let (sequence, marked) = newest.unwrap_or_default();
        // What a killed process left may be in no sync yet, and the other slot is written to next.
        file.sync_data().map_err(StoreError::io(path, "cannot be synced"))?;
        let mark = Mark { file, written: marked, sequence: sequence + 1, unsynced: None };
        Ok((mark, marked))
    }

    /// What is on the disk now; it is so at once for whoever kills this process.
    pub fn note(&mut self, marked: Marked) -> io::Result<()> {
        if marked != self.written {
            let votes = marked.vote != self.written.vote;
            self.write(marked)?;
            if votes {
                self.sync()?;
            }
        }
        match self.due() {
            Some(due) if due.is_zero() => self.sync(),
            _ => Ok(()),
        }
    }

    /// When the mark is to be synced; `None`: it is.
    pub fn due(&self) -> Option<Duration> {
        self.unsynced.map(|since| SYNC_EVERY.saturating_sub(since.elapsed()))
    }

    /// Brings the mark down to `marked`, durably, where it says more.
    pub fn lower(&mut self, marked: Marked) -> io::Result<()> {
        let index = |marked: &Marked| marked.last.map(|at| at.index);
        if index(&self.written) > index(&marked) {
            // The synced slot says more too: the lower one must be the newer, and durable.
            self.write(marked)?;
        }
        self.sync()
    }

    fn write(&mut self, marked: Marked) -> io::Result<()> {
        let offset = self.sequence % 2 * SLOT_BYTES;
        self.file.write_all_at(&encode(self.sequence, &marked), offset)?;
        self.written = marked;
        self.unsynced.get_or_insert_with(Instant::now);
        Ok(())
    }

    pub fn sync(&mut self) -> io::Result<()> {
        if self.unsynced.take().is_some() {
            self.file.sync_data()?;
            self.sequence += 1;
        }
        Ok(())
    }
}

fn encode(sequence: u64, marked: &Marked) -> Record {
    let (next, term, node) = marked.last.map_or((0, 0, 0), |at| (at.index + 1, at.term, at.node));
    let (vote, of, by) = match marked.vote {
        None => (0, 0, 0),
        Some(Ballot { term, node, committed }) => (1 + u8::from(committed), term, node),
    };
    let mut bytes = Vec::with_capacity(RECORD_BYTES);
    bytes.extend(MAGIC);
    bytes.push(VERSION);
    for number in [sequence, next, term, node] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.push(vote);
    for number in [of, by] {
        bytes.extend(number.to_be_bytes());
    }
    bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
    let mut record = [0; RECORD_BYTES];
    record.copy_from_slice(&bytes);
    record
}

fn decode(bytes: &Record) -> Option<(u64, Marked)> {
    let (body, checksum) = bytes.split_last_chunk::<4>()?;
    let sound = crc32fast::hash(body) == u32::from_be_bytes(*checksum);
    let mut rest = body.strip_prefix(MAGIC)?.strip_prefix(&[VERSION])?;
    let number = |rest: &mut &[u8]| {
        let (head, tail) = rest.split_first_chunk::<8>()?;
        *rest = tail;
        Some(u64::from_be_bytes(*head))
    };
    let (sequence, next) = (number(&mut rest)?, number(&mut rest)?);
    let (term, node) = (number(&mut rest)?, number(&mut rest)?);
    let last = next.checked_sub(1).map(|index| Position { term, node, index });
    let (vote, tail) = rest.split_first()?;
    rest = tail;
    let (term, node) = (number(&mut rest)?, number(&mut rest)?);
    let vote = match vote {
        0 => None,
        committed => Some(Ballot { term, node, committed: *committed == 2 }),
    };
    sound.then_some((sequence, Marked { last, vote }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(index: u64) -> Marked {
        Marked { last: Some(Position { term: 3, node: 2, index }), vote: None }
    }

    #[test]
    fn the_mark_is_what_was_written_last() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mark");
        let write = |marked| {
            let (mut mark, _) = Mark::open(&path).unwrap();
            mark.note(marked).unwrap();
            mark.sync().unwrap();
        };
        let read = || Mark::open(&path).map(|(_, marked)| marked);
        assert_eq!(read().unwrap(), Marked::default());
        let voted = Marked { vote: Some(Ballot { term: 4, node: 1, committed: true }), ..at(8) };
        for marked in [at(0), at(7), voted, Marked::default(), at(3)] {
            write(marked);
            assert_eq!(read().unwrap(), marked);
        }
        // The older slot is what a torn write leaves.
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        write(at(4));
        let tear = |slot| file.write_all_at(b"torn", SLOT_BYTES * slot + 6).unwrap();
        tear(0);
        assert_eq!(read().unwrap(), at(3));
        tear(1);
        let error = read().unwrap_err().to_string();
        assert!(error.contains("no slot of it can be read"), "{error}");
        file.set_len(100).unwrap();
        assert!(read().unwrap_err().to_string().contains("it has 100 bytes"));
    }

    #[test]
    fn one_that_was_cut_off_while_it_was_made_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mark");
        for made in [0, 100, SLOT_BYTES as usize] {
            std::fs::write(&path, vec![0; made]).unwrap();
            assert_eq!(Mark::open(&path).unwrap().1, Marked::default());
            assert_eq!(std::fs::metadata(&path).unwrap().len(), 2 * SLOT_BYTES);
        }
    }

    #[test]
    fn what_is_less_than_it_was_is_refused_by_name() {
        let log = Path::new("log");
        let position = |term, index| Position { term, node: 2, index };
        at(5).check_entry(log, position(2, 4)).unwrap();
        at(5).check_entry(log, position(3, 5)).unwrap();
        assert!(at(5).check_entry(log, position(2, 5)).is_err());
        at(5).check_end(log, Some(position(3, 5))).unwrap();
        at(5).check_end(log, Some(position(4, 6))).unwrap();
        assert!(at(5).check_end(log, Some(position(3, 4))).is_err());
        assert!(at(5).check_end(log, None).is_err());
        let vote = |term, committed| Some(Ballot { term, node: 1, committed });
        let voted = Marked { last: None, vote: vote(4, false) };
        voted.check_vote(log, vote(4, true)).unwrap();
        voted.check_vote(log, vote(5, false)).unwrap();
        for lost in [None, vote(3, true)] {
            let error = voted.check_vote(log, lost).unwrap_err().to_string();
            assert!(error.contains("vote of term 4 for node 1 is lost"), "{error}");
        }
    }

    #[test]
    fn fixture() {
        let vote = Some(Ballot { term: 9, node: 1, committed: false });
        let marked = Marked { vote, ..at(41) };
        let bytes = encode(5, &marked);
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "50574d4b020000000000000005000000000000002a0000000000000003000000000000000201\
             00000000000000090000000000000001b59c9c07"
        );
        assert_eq!(decode(&bytes), Some((5, marked)));
    }
}
