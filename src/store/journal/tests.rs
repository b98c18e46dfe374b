use std::cell::RefCell;
use std::fs;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::files::{BLOCK_BYTES, NAMES};
use super::frames::{ALIGNMENT, CRC, Found, Frame, HEADER_BYTES, checksum, entry_bytes};
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
    /// One by one, as sled does.
    fn write(&self, changes: Changes) -> sled::Result<()> {
        changes.into_iter().try_for_each(|change| {
            self.step()?;
            self.0.write(vec![change])
        })
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
                    let changes: Changes = (0..rng.random_range(1..6)).map(|_| one(rng)).collect();
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
            let steps = if rng.random_ratio(1, 3) { rng.random_range(0..50) } else { 0 };
            let dying = Failing(disk.clone(), AtomicUsize::new(steps));
            drop(Journaled::begin(dir.path(), Arc::new(dying), sizes));
            disk.crash(rng.random_range(0..20));
            let below = Failing(disk.clone(), AtomicUsize::new(usize::MAX));
            let below = Arc::new(below);
            let journaled = Journaled::begin(dir.path(), below.clone(), sizes).unwrap();
            life.check(Model::of(&journaled));
            if rng.random_ratio(1, 2) {
                below.1.store(rng.random_range(0..300), Relaxed);
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
    for file in files::open(dir.path()).unwrap() {
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
