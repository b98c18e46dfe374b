//! Snapshots as files: what comes back, what is refused, which are kept.

use std::fs;
use std::path::{Path, PathBuf};

use portwarden::core::limits::{QUARANTINE_PORTS_MAX, REASON_MAX_BYTES};
use portwarden::core::{
    self, Actor, Cause, Command, Departure, Phase, RangeSpec, ReleaseReason, State, WorkerPhase,
    WorkerSpec, digest,
};
use portwarden::store::codec::{MemberRecord, MembershipRecord, Position, SnapshotHead};
use portwarden::store::{DataDir, LogRecord, SnapshotStore};

use crate::samples;

fn at(index: u64) -> Position {
    Position { term: 2, node: 1, index }
}

fn head(index: u64) -> SnapshotHead {
    let member = |id: u64| MemberRecord {
        cluster_id: "c".into(),
        peer: format!("p{id}:1"),
        client: format!("p{id}:2"),
        incarnation: format!("incarnation-{id}"),
    };
    SnapshotHead {
        last: Some(at(index)),
        membership_at: Some(at(0)),
        membership: MembershipRecord {
            configs: vec![[1, 2, 3].into()],
            nodes: (1..=4).map(|id| (id, member(id))).collect(),
        },
    }
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|p| p.extension().is_some_and(|e| e == extension));
    paths.sort();
    paths
}

/// A worker of which every port is quarantined with the longest reason is the largest record there is.
#[test]
fn the_largest_record_has_room_in_a_block() {
    let Command::RegisterWorker { name, spec } = samples::register("large", 0) else { panic!() };
    let [first, last] = [1, 65_535].map(samples::port);
    let range = RangeSpec { first, last, ..spec.ranges[0].clone() };
    let spec = WorkerSpec { ranges: vec![range], reserved: Default::default(), ..spec };
    let quarantine = |ports: &[u64]| Command::Quarantine {
        worker: name.clone(),
        ports: ports.iter().copied().map(samples::port).collect(),
        reason: "r".repeat(REASON_MAX_BYTES),
        by: Actor::Operator,
    };
    let all: Vec<u64> = (1..=65_535).collect();
    let mut commands = vec![Command::RegisterWorker { name: name.clone(), spec }];
    commands.extend(all.chunks(QUARANTINE_PORTS_MAX).map(quarantine));
    let state = samples::state_of(&commands);
    assert_eq!(state.worker(&name).unwrap().pools[0].quarantined_count(), 65_535);

    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path()).unwrap();
    let file = store.write(&head(1), &state).unwrap();
    assert!(file.length_bytes() > 16 << 20);
    assert!(file.load().unwrap() == state);
}

#[test]
fn a_table_comes_back_with_the_same_digest() {
    let state = samples::state();
    // What the sample is for: all of it is there.
    for phase in [Phase::Reserved, Phase::Bound, Phase::Lingering] {
        assert!(state.phase_count(phase) > 0, "{phase:?}");
    }
    assert!(state.leases_after(None).any(|lease| !lease.allocations.is_empty()));
    assert!(state.allocations_after(None).filter(|a| a.liveness.is_some()).count() >= 3);
    assert!(state.workers_after(None).any(|w| w.phase == WorkerPhase::Lost));
    assert!(state.workers_after(None).any(|w| w.booted > w.created));
    for cause in Cause::ALL {
        let left = |d: &Departure| matches!(d.why, ReleaseReason::Reclaimed { cause: c, .. } if c == cause);
        assert!(state.departures().any(|(_, departure)| left(departure)), "{cause:?}");
    }
    assert!(state.allocations_after(None).any(|a| a.swaps > 0 && a.last_change.is_some()));
    assert!(state.workers_after(None).any(|w| w.pools.iter().any(|p| p.quarantined_count() > 0)));
    assert!(state.workers_after(None).any(|w| w.pools.iter().any(|p| p.freed_order().count() > 1)));

    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path()).unwrap();
    store.write(&head(9), &state).unwrap();
    drop(store);
    let store = SnapshotStore::open(dir.path()).unwrap();
    let file = store.newest().unwrap();
    assert_eq!(*file.head(), head(9));
    let back = file.load().unwrap();
    assert_eq!(digest(&back), digest(&state));
    assert_eq!(back, state);
}

#[test]
fn many_blocks_come_back() {
    let mut state = State::default();
    for i in 0..2000 {
        core::apply(&mut state, &samples::ORIGIN, &samples::register(&format!("w{i}"), 1));
    }
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path()).unwrap();
    let file = store.write(&head(5), &state).unwrap();
    assert!(file.length_bytes() > 256 << 10, "{} bytes", file.length_bytes());
    assert_eq!(digest(&file.load().unwrap()), digest(&state));
}

#[test]
fn two_are_kept_and_a_damaged_one_is_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path()).unwrap();
    for index in [3, 5, 8] {
        store.write(&head(index), &samples::state()).unwrap();
    }
    let ends = |store: &SnapshotStore| {
        store.all().iter().map(|f| f.head().last.unwrap().index).collect::<Vec<_>>()
    };
    assert_eq!(ends(&store), [8, 5]);
    drop(store);

    let newest = files(dir.path(), "snap").pop().unwrap();
    let sound = fs::read(&newest).unwrap();
    for place in [0, 7, 12, sound.len() / 2, sound.len() - 1] {
        let mut damaged = sound.clone();
        damaged[place] ^= 0x10;
        fs::write(&newest, &damaged).unwrap();
        if place == 7 {
            // Not damage for all that we know, but a format of the future.
            let error = SnapshotStore::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains("format version 17, this build reads 1"), "{error}");
            continue;
        }
        let store = SnapshotStore::open(dir.path()).unwrap();
        assert_eq!(ends(&store), [5], "damaged at {place}");
        assert_eq!(files(dir.path(), "damaged").len(), 1);
    }
    for length in [0, 8, sound.len() / 2, sound.len() - 1] {
        fs::write(&newest, &sound[..length]).unwrap();
        assert_eq!(ends(&SnapshotStore::open(dir.path()).unwrap()), [5], "cut at {length}");
    }
    let mut longer = sound.clone();
    longer.push(0);
    fs::write(&newest, &longer).unwrap();
    assert_eq!(ends(&SnapshotStore::open(dir.path()).unwrap()), [5]);
    fs::write(&newest, &sound).unwrap();
    assert_eq!(ends(&SnapshotStore::open(dir.path()).unwrap()), [8, 5]);
}

#[test]
fn an_installed_one_replaces_all_others() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let from = SnapshotStore::open(there.path()).unwrap();
    let sent = from.write(&head(20), &samples::state()).unwrap();
    let mut bytes = vec![0; sent.length_bytes() as usize];
    assert_eq!(sent.read_at(&mut bytes, 0).unwrap(), bytes.len());

    let store = SnapshotStore::open(here.path()).unwrap();
    store.write(&head(3), &State::default()).unwrap();
    store.write(&head(5), &State::default()).unwrap();
    let receive = |length, crc| {
        let mut incoming = store.receive().unwrap();
        bytes.chunks(1000).for_each(|chunk| incoming.write(chunk).unwrap());
        incoming.finish(length, crc)
    };
    let (length, crc) = (bytes.len() as u64, crc32fast::hash(&bytes));
    assert!(receive(length + 1, crc).is_err());
    assert!(receive(length, crc ^ 1).is_err());
    let received = receive(length, crc).unwrap();
    received.verify().unwrap();
    store.install(&received).unwrap();
    drop(received);
    assert_eq!(store.all().len(), 1);
    assert_eq!(files(here.path(), "snap").len(), 1);
    assert!(files(here.path(), "tmp").is_empty());
    let newest = SnapshotStore::open(here.path()).unwrap().newest().unwrap();
    assert_eq!(digest(&newest.load().unwrap()), digest(&samples::state()));
}

/// Appends entries and waits until they are on the disk.
fn append(dir: &DataDir, range: std::ops::Range<u64>) {
    let (done, saved) = std::sync::mpsc::channel();
    let record = |index| LogRecord::new(at(index), &b"x"[..]);
    let done = Box::new(move || done.send(()).unwrap());
    dir.log().unwrap().append(range.map(record).collect(), done).unwrap();
    saved.recv().unwrap();
}

#[test]
fn the_log_goes_up_to_the_older_snapshot_only() {
    let temp = tempfile::tempdir().unwrap();
    let open = || DataDir::open(temp.path(), 1).unwrap();
    let dir = open();
    append(&dir, 0..30);
    let purged = |dir: &DataDir| dir.log().unwrap().bounds().0.map(|at| at.index);
    let (log, snapshots) = (dir.log().unwrap(), dir.snapshots().unwrap());
    log.purge(at(9));
    assert_eq!(purged(&dir), None, "no snapshot");
    snapshots.write(&head(10), &State::default()).unwrap();
    log.purge(at(10));
    assert_eq!(purged(&dir), None, "one snapshot");
    snapshots.write(&head(20), &State::default()).unwrap();
    log.purge(at(20));
    assert_eq!(purged(&dir), Some(10));
    append(&dir, 30..31);
    drop((log, snapshots, dir));

    // The newest is damaged: the older one and the log still meet.
    let newest = files(&temp.path().join("snapshots"), "snap").pop().unwrap();
    let mut bytes = fs::read(&newest).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&newest, bytes).unwrap();
    let dir = open();
    assert_eq!(dir.snapshots().unwrap().all().len(), 1);
    assert_eq!(dir.log().unwrap().read(11..99, usize::MAX).unwrap().len(), 20);
    drop(dir);

    // Both are: the entries between are lost, and the start is refused by name.
    let older = files(&temp.path().join("snapshots"), "snap").pop().unwrap();
    fs::remove_file(older).unwrap();
    let dir = open();
    dir.log().unwrap();
    let error = dir.snapshots().unwrap_err().to_string();
    assert!(error.contains("the log begins after entry 10") && error.contains("no good snapshot"));
}
