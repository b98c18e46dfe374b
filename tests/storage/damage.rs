//! A log whose files were damaged: it is what it was, or it is refused by name.
//!
//! `PORTWARDEN_ROUNDS` says how many times, `PORTWARDEN_SEED` how.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use portwarden::store::codec::{Ballot, Position};
use portwarden::store::{LogRecord, LogStore};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

const ROUNDS: u64 = 40;
/// For a refusal or an answer.
const BOUND: Duration = Duration::from_secs(10);

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

fn record(term: u64, index: u64, bytes: usize) -> LogRecord {
    let payload: Vec<u8> = (0..bytes).map(|i| (i as u64 * term + index) as u8).collect();
    LogRecord::new(Position { term, node: 1, index }, payload)
}

/// What a log says.
#[derive(Debug, PartialEq)]
struct Contents {
    bounds: (Option<Position>, Option<Position>),
    vote: Option<Ballot>,
    records: Vec<LogRecord>,
}

impl Contents {
    fn of(log: &LogStore) -> Contents {
        let records = log.read(0..u64::MAX, usize::MAX).unwrap();
        Contents { bounds: log.bounds(), vote: log.vote(), records }
    }
}

/// A life: appends, conflicts, votes, a purge, a restart in between.
fn live(path: &Path, rng: &mut StdRng) -> Contents {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (mut term, mut next) = (1, 0);
    for _ in 0..2 {
        let log = LogStore::open(path).unwrap();
        for _ in 0..60 {
            if rng.random_ratio(1, 12) {
                term += 1;
                runtime.block_on(log.save_vote(Ballot { term, node: 1, committed: true }));
                let records = log.read(0..u64::MAX, usize::MAX).unwrap();
                let keep = &records[records.len().saturating_sub(1 + rng.random_range(0..4))..];
                if let Some(keep) = keep.first() {
                    runtime.block_on(log.truncate_after(Some(keep.at)));
                    next = keep.at.index + 1;
                }
            }
            let (done, saved) = mpsc::channel();
            let sizes = (0..rng.random_range(1..6)).map(|_| rng.random_range(10..3000));
            let records: Vec<_> =
                sizes.zip(next..).map(|(size, index)| record(term, index, size)).collect();
            next += records.len() as u64;
            log.append(records, Box::new(move || done.send(()).unwrap())).unwrap();
            saved.recv().unwrap();
        }
        log.purge(log.read(next - 60..next - 59, usize::MAX).unwrap()[0].at);
    }
    let log = LogStore::open(path).unwrap();
    Contents::of(&log)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    files
}

/// Says what it did.
fn damage(path: &Path, rng: &mut StdRng) -> String {
    let mut bytes = fs::read(path).unwrap();
    let place = rng.random_range(0..bytes.len().max(1));
    let how = match rng.random_range(0..4) {
        _ if bytes.is_empty() => "is empty".into(),
        0 => {
            bytes[place] ^= 1 << rng.random_range(0..8);
            format!("bit of byte {place}")
        }
        1 => {
            let end = (place + 64).min(bytes.len());
            rng.fill(&mut bytes[place..end]);
            format!("bytes {place}..{end} at random")
        }
        2 => {
            let page = place / 4096 * 4096;
            let end = (page + 4096).min(bytes.len());
            bytes[page..end].fill(0);
            format!("bytes {page}..{end} zeroed")
        }
        _ => {
            bytes.truncate(place);
            format!("truncated to {place}")
        }
    };
    fs::write(path, bytes).unwrap();
    format!("{}: {how}", path.file_name().unwrap().display())
}

#[test]
fn a_damaged_log_is_what_it_was_or_refused_by_name() {
    let rounds = number_from("PORTWARDEN_ROUNDS").unwrap_or(ROUNDS);
    let seed =
        number_from("PORTWARDEN_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    println!(
        "PORTWARDEN_ROUNDS={rounds} PORTWARDEN_SEED={seed} cargo test --test storage damaged_log"
    );
    let mut rng = StdRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let sound = dir.path().join("sound");
    let contents = live(&sound, &mut rng);
    let count = files(&sound).len() as u64;
    let (mut recovered, mut refused) = (0, 0);
    for round in 0..rounds.max(count) {
        let path = dir.path().join(format!("log-{round}"));
        fs::create_dir_all(path.join("blobs")).unwrap();
        for file in files(&sound) {
            fs::copy(&file, path.join(file.file_name().unwrap())).unwrap();
        }
        // Each file once, then mostly the log itself.
        let all = files(&path);
        let db = all.iter().position(|file| file.ends_with("db")).unwrap();
        let at = match round < count {
            true => round as usize,
            false if rng.random_ratio(2, 3) => db,
            false => rng.random_range(0..all.len()),
        };
        let what = damage(&all[at], &mut rng);
        // Twice: what the first start did must not make the second believe it.
        for _ in 0..2 {
            let (answer, answered) = mpsc::channel();
            let log = path.clone();
            std::thread::spawn(move || answer.send(LogStore::open(&log).map(|l| Contents::of(&l))));
            match answered
                .recv_timeout(BOUND)
                .unwrap_or_else(|e| panic!("round {round}, {what}: {e}"))
            {
                Ok(found) => {
                    assert!(found == contents, "round {round}, {what}: a wrong log is served");
                    recovered += 1;
                }
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.contains(&path.display().to_string()), "{what}: {error}");
                    assert!(error.contains("join on an empty") || error.contains("the build that"));
                    refused += 1;
                }
            }
        }
        fs::remove_dir_all(&path).unwrap();
    }
    println!(
        "{rounds} damaged logs, opened twice: {recovered} were what they had been, {refused} were refused"
    );
}
