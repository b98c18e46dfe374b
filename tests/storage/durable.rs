//! What really reaches the disk, counted by strace: sled alone would not (`store::sync`).
//!
//! Each test starts this test binary again, with one of the `child_` tests below. Needs strace
//! (`apt-get install strace`; CI does it) and leave to trace one's own children.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;

use portwarden::store::codec::{Ballot, Position};
use portwarden::store::{DataDir, FATAL_EXIT, LogRecord, LogStore};

const DIR: &str = "PORTWARDEN_TEST_DURABLE_DIR";
const APPENDS: u64 = 200;
const VOTES: u64 = 20;

fn record(index: u64) -> LogRecord {
    let at = Position { term: 1, node: 1, index };
    LogRecord::new(at, vec![7; 300])
}

fn strace(dir: &Path, child: &str, options: &[&str]) -> (Output, String) {
    let trace = dir.join("trace");
    let output = Command::new("strace")
        .args(["-f", "-y", "-e", "trace=openat,fdatasync,sync_file_range", "-o"])
        .arg(&trace)
        .args(options)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", child, "--nocapture", "--test-threads=1"])
        .env(DIR, dir.join("log"))
        .output()
        .unwrap_or_else(|error| {
            panic!("this test needs strace (apt-get install strace), which cannot be run: {error}")
        });
    let trace = std::fs::read_to_string(&trace).unwrap_or_else(|_| {
        panic!("strace wrote nothing: {}", String::from_utf8_lossy(&output.stderr))
    });
    (output, trace)
}

/// Does nothing unless it is started by `every_answer_comes_after_a_sync`, or by the other one.
#[test]
fn child_appends_and_votes() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let log = LogStore::open(Path::new(&dir)).unwrap();
    for index in 0..APPENDS {
        let (done, saved) = mpsc::channel();
        log.append(vec![record(index)], Box::new(move || done.send(()).unwrap())).unwrap();
        saved.recv().unwrap();
        println!("answered {index}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for term in 0..VOTES {
        runtime.block_on(log.save_vote(Ballot { term, node: 1, committed: false }));
    }
}

#[test]
fn every_answer_comes_after_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    let (output, trace) = strace(dir.path(), "durable::child_appends_and_votes", &[]);
    assert!(output.status.success(), "{output:?}");
    let syncs = |what: &str| trace.lines().filter(|line| line.contains(what)).count() as u64;
    let of_the_log = trace
        .lines()
        .filter(|line| line.contains("fdatasync(") && line.contains("/log/journal/"))
        .count() as u64;
    assert!(of_the_log >= APPENDS + VOTES, "{of_the_log} for {APPENDS} appends, {VOTES} votes");
    assert_eq!(syncs("sync_file_range("), 0);
    let past_the_cache = |line: &str| {
        line.contains("/log/journal/") && line.contains("O_DIRECT") && !line.contains("= -1")
    };
    assert!(trace.lines().any(past_the_cache), "does the file system of {dir:?} take O_DIRECT?");
    println!("{of_the_log} fdatasync of the log, {} in all", syncs("fdatasync("));
}

#[test]
fn a_failed_sync_ends_the_process_without_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    // strace counts each thread's calls by themselves.
    let inject = ["-e", "inject=fdatasync:error=EIO:when=60+"];
    let (output, _) = strace(dir.path(), "durable::child_appends_and_votes", &inject);
    assert_eq!(output.status.code(), Some(FATAL_EXIT), "{output:?}");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("cannot be written"), "{errors}");
    // Whatever was answered is there; nothing was answered after the failure.
    let answered = String::from_utf8_lossy(&output.stdout).matches("answered").count() as u64;
    assert!((1..APPENDS).contains(&answered), "{answered}");
    let log = LogStore::open(&dir.path().join("log")).unwrap();
    let kept = log.read(0..APPENDS, usize::MAX).unwrap();
    assert!(kept.len() as u64 >= answered, "{} of {answered}", kept.len());
}

/// Appends, truncates and purges until it is killed, and says what it is about to do and has done.
#[test]
fn child_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let log = LogStore::open(Path::new(&dir)).unwrap();
    let mut term = log.bounds().1.map_or(1, |last| last.term + 1);
    for round in 0_u64.. {
        let (purged, last) = log.bounds();
        if let Some(last) = last.filter(|last| round % 5 == 4 && last.index > 20) {
            let keep = log.read(last.index - 3..last.index, usize::MAX).unwrap()[0].at;
            println!("cut {}", keep.index);
            futures::executor::block_on(log.truncate_after(Some(keep)));
            term += 1;
        }
        if round % 7 == 6 {
            let first = purged.map_or(0, |at| at.index + 1);
            log.purge(log.read(first + 1..first + 2, usize::MAX).unwrap()[0].at);
        }
        let first = log.bounds().1.map_or(0, |last| last.index + 1);
        let record = |index| {
            let mut record = record(index);
            record.at.term = term;
            record.at.node = 1;
            record
        };
        let records: Vec<_> = (first..first + 4).map(record).collect();
        let (done, saved) = mpsc::channel();
        log.append(records, Box::new(move || done.send(()).unwrap())).unwrap();
        saved.recv().unwrap();
        println!("answered {}", first + 3);
    }
}

#[test]
fn a_killed_process_has_what_it_answered() {
    let dir = tempfile::tempdir().unwrap();
    for lines in [1, 7, 20, 33, 64, 5, 90] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "durable::child_writes_until_it_is_killed", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        let number = |line: &str, what| line.strip_prefix(what).and_then(|n| n.parse::<u64>().ok());
        let (mut count, mut reached) = (0, None);
        for line in said {
            let line = line.unwrap();
            let answered = number(&line, "answered ");
            reached = answered.or(number(&line, "cut ")).or(reached);
            count += u64::from(answered.is_some());
            if count == lines {
                child.kill().unwrap(); // what it said meanwhile is still read
            }
        }
        child.wait().unwrap();
        let log = LogStore::open(dir.path()).unwrap();
        let (purged, last) = log.bounds();
        assert!(last.map(|at| at.index) >= reached, "{last:?} of {reached:?}");
        let kept = log.read(0..u64::MAX, usize::MAX).unwrap();
        let first = purged.map_or(0, |at| at.index + 1);
        assert_eq!(kept.len() as u64, last.unwrap().index + 1 - first);
    }
}

/// Does nothing unless it is started by `the_first_start_may_end_anywhere`.
#[test]
fn child_starts_for_the_first_time() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let dir = DataDir::open(Path::new(&dir), 1).unwrap();
    let (log, snapshots) = (dir.log().unwrap(), dir.snapshots().unwrap());
    assert!(snapshots.newest().is_none());
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(log.save_vote(Ballot { term: 1, node: 1, committed: false }));
    println!("voted");
    dir.set_cluster_id("c").unwrap();
}

/// The process is killed at each of its calls that change the disk, one after the other; every time
/// the directory that it leaves can be opened, and a vote that was answered is there.
#[test]
fn the_first_start_may_end_anywhere() {
    const CHANGES: &str = "openat,write,pwrite64,ftruncate,fallocate,mkdir,rename,renameat,unlink,\
                           unlinkat,rmdir,fsync,fdatasync,sync_file_range";
    let mut ends = 0;
    for call in CHANGES.split(',') {
        for at in 1.. {
            let dir = tempfile::tempdir().unwrap();
            let inject = format!("inject={call}:signal=KILL:when={at}");
            let options = ["-e", &format!("trace={call}")];
            let (output, _) = strace(
                dir.path(),
                "durable::child_starts_for_the_first_time",
                &[&options[..], &["-e", &inject]].concat(),
            );
            if output.status.success() {
                break;
            }
            ends += 1;
            let data = DataDir::open(&dir.path().join("log"), 1)
                .unwrap_or_else(|error| panic!("killed at {call} {at}: {error}"));
            let log = data.log().unwrap_or_else(|error| panic!("killed at {call} {at}: {error}"));
            data.snapshots().unwrap_or_else(|error| panic!("killed at {call} {at}: {error}"));
            let voted = String::from_utf8_lossy(&output.stdout).contains("voted");
            assert!(!voted || log.vote().is_some(), "killed at {call} {at}: the vote is lost");
        }
    }
    println!("killed {ends} times");
}
