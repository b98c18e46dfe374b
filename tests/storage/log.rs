//! The log over restarts, and what it refuses.

use std::path::Path;
use std::sync::mpsc;

use portwarden::store::codec::{Ballot, Position};
use portwarden::store::{ENTRY_MAX_BYTES, LogRecord, LogStore};

fn at(term: u64, index: u64) -> Position {
    Position { term, node: 1, index }
}

fn record(term: u64, index: u64, bytes: usize) -> LogRecord {
    let payload: Vec<u8> = (0..bytes).map(|i| (i as u64 + index) as u8).collect();
    LogRecord::new(at(term, index), payload)
}

fn append(log: &LogStore, records: Vec<LogRecord>) {
    let (done, saved) = mpsc::channel();
    log.append(records, Box::new(move || done.send(()).unwrap())).unwrap();
    saved.recv().unwrap();
}

fn truncate(log: &LogStore, last: Option<Position>) {
    futures::executor::block_on(log.truncate_after(last));
}

/// Opens what a `kill -9` would leave: all that was written, and nothing that was not.
fn after_a_kill(dir: &Path) -> (tempfile::TempDir, LogStore) {
    let copy = tempfile::tempdir().unwrap();
    let copied = std::process::Command::new("cp").arg("-r").arg(dir).arg(copy.path()).status();
    assert!(copied.unwrap().success());
    let log = LogStore::open(&copy.path().join(dir.file_name().unwrap())).unwrap();
    (copy, log)
}

fn all(log: &LogStore) -> Vec<LogRecord> {
    log.read(0..u64::MAX, usize::MAX).unwrap()
}

/// Changes what lies in sled behind the log's back.
fn tamper(path: &Path, change: impl FnOnce(&sled::Tree)) {
    // Threads of sled hold its lock a little longer than the log does.
    let db = loop {
        match sled::open(path) {
            Err(sled::Error::Io(_)) => std::thread::yield_now(),
            opened => break opened.unwrap(),
        }
    };
    change(&db.open_tree("entries").unwrap());
    db.flush().unwrap();
}

fn key(index: u64, chunk: u16) -> Vec<u8> {
    [&index.to_be_bytes()[..], &chunk.to_be_bytes()[..]].concat()
}

#[tokio::test]
async fn everything_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path()).unwrap();
    assert!(log.is_pristine());
    let sizes = [0, 1, 1000, 60 << 10, 61_413, 61_414, 200_000, 3 << 20];
    let records: Vec<_> =
        sizes.iter().enumerate().map(|(i, bytes)| record(1, i as u64, *bytes)).collect();
    append(&log, records.clone());
    let vote = Ballot { term: 7, node: 2, committed: true };
    log.save_vote(vote).await;
    log.save_committed(Some(at(1, 5)));
    assert_eq!(all(&log), records);
    drop(log);

    let log = LogStore::open(dir.path()).unwrap();
    assert!(!log.is_pristine());
    assert_eq!(all(&log), records);
    assert_eq!((log.vote(), log.committed()), (Some(vote), Some(at(1, 5))));
    assert_eq!(log.bounds(), (None, Some(at(1, 7))));
    // In parts, as many as fit and at least one.
    assert_eq!(log.read(2..8, 70_000).unwrap(), records[2..4]);
    assert_eq!(log.read(6..8, 10).unwrap(), records[6..7]);
    assert_eq!(log.read(8..9, 10).unwrap(), []);
}

#[test]
fn a_truncated_tail_stays_away() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path()).unwrap();
    append(&log, (0..10).map(|i| record(1, i, 100_000)).collect());
    truncate(&log, Some(at(1, 3)));
    assert_eq!(log.bounds(), (None, Some(at(1, 3))));
    assert_eq!(all(&log).len(), 4);
    append(&log, vec![record(2, 4, 10)]);
    truncate(&log, None);
    assert_eq!(all(&log), []);
    append(&log, (0..3).map(|i| record(3, i, 10)).collect());
    drop(log);
    let log = LogStore::open(dir.path()).unwrap();
    assert_eq!(all(&log), (0..3).map(|i| record(3, i, 10)).collect::<Vec<_>>());
}

/// openraft truncates what conflicts with a snapshot, and installs it: were the entries to come back
/// in a crash after that, the start would find two histories.
#[test]
fn a_truncated_tail_stays_away_when_the_process_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path()).unwrap();
    append(&log, (0..10).map(|i| record(1, i, 100)).collect());
    truncate(&log, Some(at(1, 3)));
    let (_copy, left) = after_a_kill(dir.path());
    assert_eq!(left.bounds(), (None, Some(at(1, 3))));
    assert_eq!(all(&left).len(), 4);
}

/// sled never syncs the files that it makes for large pages: what was acknowledged would be lost in a
/// power cut.
#[test]
fn sled_makes_no_file_of_its_own_for_large_pages() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path()).unwrap();
    // More than the journal takes, so that sled has most of it.
    let sizes = [500_000, 60_000, 100, 6_000, 20_000];
    for round in 0..40 {
        let records = (0..).zip(sizes).map(|(i, size)| record(1, round * 5 + i, size));
        append(&log, records.collect());
    }
    drop(log);
    let blobs = std::fs::read_dir(dir.path().join("blobs")).unwrap();
    assert_eq!(blobs.count(), 0);
    assert_eq!(all(&LogStore::open(dir.path()).unwrap()).len(), 200);
}

/// sled writes such a file at every start, and cannot open what a kill in the middle leaves.
#[test]
fn a_start_that_was_killed_is_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path()).unwrap();
    append(&log, vec![record(1, 0, 100)]);
    drop(log);
    std::fs::write(dir.path().join("snap.7FFFFFFFFFFFFFFF.generating"), "cut off").unwrap();
    assert_eq!(all(&LogStore::open(dir.path()).unwrap()), [record(1, 0, 100)]);
}

#[test]
fn purged_entries_stay_away() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path()).unwrap();
    append(&log, (0..5000).map(|i| record(1, i, 10)).collect());
    log.purge(at(1, 4000));
    assert_eq!(log.read(0..4002, usize::MAX).unwrap(), [record(1, 4001, 10)]);
    append(&log, vec![record(1, 5000, 10)]);
    drop(log);
    let log = LogStore::open(dir.path()).unwrap();
    assert_eq!(log.bounds(), (Some(at(1, 4000)), Some(at(1, 5000))));
    assert_eq!(all(&log).len(), 1000);
    // Past its end: a snapshot has taken the place of all of it.
    log.purge(at(2, 9000));
    assert_eq!(log.bounds(), (Some(at(2, 9000)), Some(at(2, 9000))));
    append(&log, vec![record(2, 9001, 10)]);
    drop(log);
    let log = LogStore::open(dir.path()).unwrap();
    assert_eq!(all(&log), [record(2, 9001, 10)]);
}

#[test]
fn what_does_not_follow_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path()).unwrap();
    append(&log, vec![record(1, 0, 1)]);
    let refused = |records| log.append(records, Box::new(|| ())).unwrap_err().to_string();
    assert!(refused(vec![record(1, 2, 1)]).contains("is not entry 1"));
    let largest = record(1, 1, ENTRY_MAX_BYTES);
    assert!(refused(vec![record(1, 1, ENTRY_MAX_BYTES + 1)]).contains("of at most"));
    append(&log, vec![largest.clone()]);
    drop(log);
    assert_eq!(all(&LogStore::open(dir.path()).unwrap())[1], largest);
}

#[test]
fn damage_is_refused_by_name() {
    type Change = fn(&sled::Tree);
    let cases: [(Change, &str); 6] = [
        (|t| drop(t.remove(key(2, 0)).unwrap()), "chunk 0 of entry 2 is missing"),
        (|t| drop(t.remove(key(1, 1)).unwrap()), "chunk 1 of entry 1 is missing"),
        (|t| drop(t.insert(key(3, 0), &b"\x01short"[..]).unwrap()), "entry 3"),
        (
            |t| {
                let mut value = t.get(key(1, 1)).unwrap().unwrap().to_vec();
                value[5] ^= 1;
                t.insert(key(1, 1), value).unwrap();
            },
            "entry 1: wrong checksum",
        ),
        (
            |t| {
                let mut value = t.get(key(0, 0)).unwrap().unwrap().to_vec();
                value[0] = 2;
                t.insert(key(0, 0), value).unwrap();
            },
            "the log has format version 2, this build reads 1",
        ),
        // The tail: nothing in sled says that there was more.
        (
            |t| {
                t.remove(key(3, 0)).unwrap();
                t.remove(key(4, 0)).unwrap();
            },
            "but entry 4 (term 1, node 1) had been on the disk",
        ),
    ];
    for (change, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let log = LogStore::open(dir.path()).unwrap();
        append(&log, vec![record(1, 0, 100), record(1, 1, 99_000), record(1, 2, 100)]);
        append(&log, vec![record(1, 3, 10)]);
        append(&log, vec![record(1, 4, 10)]);
        drop(log);
        tamper(dir.path(), change);
        let error = LogStore::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        assert!(error.contains(&dir.path().display().to_string()), "{error}");
    }
}

#[test]
fn reads_are_whole_while_others_write() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path()).unwrap();
    append(&log, (0..200).map(|i| record(1, i, 50)).collect());
    let reader = {
        let log = log.clone();
        std::thread::spawn(move || {
            loop {
                let records = log.read(0..u64::MAX, usize::MAX).unwrap();
                assert!(records.windows(2).all(|w| w[0].at.index + 1 == w[1].at.index));
                assert!(records.windows(2).all(|w| w[0].at.term <= w[1].at.term));
                if records.last().is_some_and(|r| r.at.term == 40) {
                    return;
                }
            }
        })
    };
    for term in 2..=40 {
        let keep = 100 + term;
        truncate(&log, Some(all(&log).iter().find(|r| r.at.index == keep).unwrap().at));
        append(&log, (keep + 1..200).map(|i| record(term, i, 50)).collect());
        log.purge(all(&log)[1].at);
    }
    reader.join().unwrap();
    assert_eq!(all(&log).len(), 200 - 78);
}

#[test]
fn answers_come_in_order_and_many_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let log = LogStore::open(dir.path()).unwrap();
    let (done, saved) = mpsc::channel();
    for index in 0..1000 {
        let done = done.clone();
        log.append(vec![record(1, index, 10)], Box::new(move || done.send(index).unwrap()))
            .unwrap();
        assert_eq!(log.read(index..index + 1, usize::MAX).unwrap().len(), 1);
    }
    drop(done);
    assert_eq!(saved.iter().collect::<Vec<_>>(), (0..1000).collect::<Vec<_>>());
}
