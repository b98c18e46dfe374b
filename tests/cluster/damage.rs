//! One node's files are damaged while it is stopped: it comes back by itself, or it says what is
//! wrong and ends; it never serves a wrong table, and the cluster's answers stay right.
//!
//! `PORTWARDEN_ROUNDS` says how many times, `PORTWARDEN_SEED` how. Each kind of file comes first.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use portwarden::client::{Client, Options};
use portwarden::proto::v1;
use portwarden::store::FATAL_EXIT;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::support::{Cluster, client_of, number_from, wait_for};

const ROUNDS: u64 = 12;
/// Within which a node answers, or ends with a reason.
const LIMIT: Duration = Duration::from_secs(10);

/// The allocations at every revision that there ever was.
type History = BTreeMap<u64, Vec<v1::Allocation>>;

struct Bench {
    cluster: Cluster,
    runtime: tokio::runtime::Runtime,
    client: Client,
    history: History,
    next: u64,
    rng: StdRng,
}

impl Bench {
    fn start(seed: u64) -> Bench {
        let mut cluster = Cluster::prepare(3);
        cluster.flag("--snapshot-every", "40");
        (0..3).for_each(|at| cluster.spawn(at));
        cluster.leader();
        cluster.worker("w", 49_999);
        let (runtime, client) = client_of(&cluster);
        let mut bench = Bench {
            cluster,
            runtime,
            client,
            history: History::new(),
            next: 0,
            rng: StdRng::seed_from_u64(seed),
        };
        bench.write(150);
        bench
    }

    /// Allocates, and now and then releases; the only one who changes anything.
    fn write(&mut self, times: u64) {
        for _ in 0..times {
            let mut table = self.history.last_entry().map(|e| e.get().clone()).unwrap_or_default();
            let release = self.rng.random_ratio(1, 3) && !table.is_empty();
            let revision = if release {
                let gone = table.remove(self.rng.random_range(0..table.len()));
                let released = self.client.release(&gone.name, gone.token);
                self.runtime.block_on(released).expect("a release").revision
            } else {
                let ports = v1::PortRequest {
                    ports: Some(v1::port_request::Ports::Count(1)),
                    ..Default::default()
                };
                let claim = v1::Claim {
                    name: format!("i{:06}", self.next),
                    placement: Some(v1::claim::Placement::Worker("w".into())),
                    ports: vec![ports],
                    bound: true,
                    ..Default::default()
                };
                self.next += 1;
                let granted = self.runtime.block_on(self.client.allocate(vec![claim]));
                let granted = granted.expect("an allocation");
                table.extend(granted.allocations);
                granted.revision
            };
            table.sort_by(|a, b| a.name.cmp(&b.name));
            self.history.insert(revision, table);
        }
    }

    fn newest(&self) -> (u64, &Vec<v1::Allocation>) {
        let (revision, table) = self.history.last_key_value().expect("something was written");
        (*revision, table)
    }

    /// The cluster answers what it should.
    fn check_cluster(&self) {
        let listed = self.runtime.block_on(self.client.list(v1::ListRequest::default()));
        let listed = listed.expect("a list");
        assert_eq!(&listed.items, self.newest().1, "at revision {}", listed.revision);
    }

    /// Asks that very node for its own copy; whatever it answers must be the table of its revision.
    fn check_copy(&self, at: usize) -> Option<u64> {
        let endpoint = vec![self.cluster.nodes[at].client()];
        let listed = self.runtime.block_on(async {
            let options = Options { timeout: Duration::from_millis(300), ..Options::default() };
            let client = Client::connect(endpoint, options).expect("a client");
            let read = Some(v1::ReadOptions { stale: true, min_revision: 0 });
            client.list(v1::ListRequest { read, ..Default::default() }).await
        });
        let listed = listed.ok()?;
        let then = self.history.get(&listed.revision);
        // The table as it was before the first allocation is not in the books.
        let then = then.unwrap_or_else(|| panic!("no table ever had revision {}", listed.revision));
        assert_eq!(&listed.items, then, "node {at} at revision {}", listed.revision);
        Some(listed.revision)
    }

    /// Starts the node and says what came of it: `None` if it recovered, else why it refused.
    fn start_damaged(&mut self, at: usize, said_before: usize) -> Option<String> {
        self.cluster.spawn(at);
        let began = Instant::now();
        wait_for("a damaged node to serve or to end", || {
            let late = began.elapsed() > LIMIT;
            if let Some(code) = self.cluster.has_ended(at) {
                assert_ne!(code, 0, "a refusal to start is an error");
                assert!(!late, "it took {:?} to refuse", began.elapsed());
                return Some(Some(self.cluster.log(at)[said_before..].to_string()));
            }
            if self.check_copy(at).is_some_and(|revision| revision >= self.newest().0) {
                return Some(None);
            }
            assert!(!late, "neither served nor ended within {LIMIT:?}");
            None
        })
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for item in fs::read_dir(from).expect("a directory") {
        let item = item.expect("an entry").path();
        let target = to.join(item.file_name().expect("a name"));
        match item.is_dir() {
            true => copy(&item, &target),
            false => fs::copy(&item, &target).map(drop).expect("a copy"),
        }
    }
}

/// All files below, by kind: names of snapshots vary.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for item in fs::read_dir(dir).expect("a directory") {
        let item = item.expect("an entry").path();
        match item.is_dir() {
            true => files.extend(self::files(&item)),
            false => files.push(item),
        }
    }
    files.retain(|file| file.extension().is_none_or(|e| e != "damaged"));
    files.sort();
    files
}

/// Flips, overwrites, zeroes or truncates; says what it did.
fn damage(path: &Path, rng: &mut StdRng) -> String {
    let mut bytes = fs::read(path).expect("it reads");
    let place = rng.random_range(0..bytes.len().max(1));
    let what = match rng.random_range(0..4) {
        _ if bytes.is_empty() => "is empty".into(),
        0 => {
            bytes[place] ^= 1 << rng.random_range(0..8);
            format!("a bit of byte {place} flipped")
        }
        1 => {
            let end = (place + 64).min(bytes.len());
            rng.fill(&mut bytes[place..end]);
            format!("bytes {place} to {end} at random")
        }
        2 => {
            let end = (place + 4096).min(bytes.len());
            bytes[place..end].fill(0);
            format!("bytes {place} to {end} zeroed")
        }
        _ => {
            bytes.truncate(place);
            format!("truncated to {place} bytes")
        }
    };
    fs::write(path, bytes).expect("it is written");
    what
}

/// A path that the message names and that the damaged file is, or lies in; and a way out.
fn is_named(said: &str, file: &Path) -> bool {
    let named = file.ancestors().take(3).any(|path| said.contains(&path.display().to_string()));
    let way_out = ["join on an empty data directory", "start the build that wrote it"];
    named && way_out.iter().any(|text| said.contains(text))
}

#[test]
fn a_damaged_node_recovers_or_refuses() {
    let rounds = number_from("PORTWARDEN_ROUNDS").unwrap_or(ROUNDS);
    let seed =
        number_from("PORTWARDEN_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    eprintln!(
        "PORTWARDEN_ROUNDS={rounds} PORTWARDEN_SEED={seed} cargo test --test cluster a_damaged_node -- --nocapture"
    );
    let mut bench = Bench::start(seed);
    let (mut recovered, mut refused) = (0, 0);
    let backup = bench.cluster.dir().join("backup");
    for round in 0..rounds {
        let at = bench.rng.random_range(0..3);
        let said_before = bench.cluster.log(at).len();
        assert_eq!(bench.cluster.terminate(at), Some(0));
        // The others go on; what is compared with is later than what the node had.
        bench.write(5);
        let dir = bench.cluster.data_dir(at);
        copy(&dir, &backup);
        let files = files(&dir);
        let file = match files.get(round as usize) {
            Some(file) => file.clone(),
            None => files[bench.rng.random_range(0..files.len())].clone(),
        };
        let what = damage(&file, &mut bench.rng);
        let name = file.strip_prefix(&dir).expect("it is in there").display();
        match bench.start_damaged(at, said_before) {
            None => {
                recovered += 1;
                eprintln!("round {round}: node {at}, {name} {what}: recovered");
            }
            Some(said) => {
                refused += 1;
                let error = said.lines().rev().find(|line| line.starts_with("error"));
                let error = error.unwrap_or("");
                eprintln!("round {round}: node {at}, {name} {what}: {error}");
                assert!(is_named(error, &file), "{what}: {said}");
                // It has answered nobody: its disk as it was is still true.
                fs::remove_dir_all(&dir).expect("it goes");
                copy(&backup, &dir);
                bench.cluster.spawn(at);
            }
        }
        fs::remove_dir_all(&backup).expect("it goes");
        bench.check_cluster();
        wait_for("the node to be as the others", || {
            bench.check_copy(at).filter(|revision| *revision >= bench.newest().0)
        });
    }
    eprintln!(
        "{rounds} damaged nodes: {recovered} recovered by themselves, {refused} refused to start"
    );
}

/// It would send the same bytes for ever, and they would be refused for ever.
#[test]
fn a_leader_whose_snapshot_has_rotted_ends_when_a_member_needs_it() {
    let mut bench = Bench::start(1);
    let leader = bench.cluster.leader();
    let dir = bench.cluster.data_dir(leader).join("snapshots");
    let newest = files(&dir).into_iter().max().expect("a snapshot");
    let file = fs::OpenOptions::new().read(true).write(true).open(&newest).expect("it opens");
    let (middle, mut byte) = (file.metadata().expect("its size").len() / 2, [0]);
    file.read_exact_at(&mut byte, middle).expect("it reads");
    file.write_all_at(&[!byte[0]], middle).expect("it writes");

    let joins = bench.cluster.add_joining(4);
    bench.cluster.spawn(joins);
    assert_eq!(bench.cluster.ended(leader), Some(FATAL_EXIT));
    let said = bench.cluster.log(leader);
    assert!(said.contains("a snapshot that a member needs is damaged"), "{said}");
    bench.cluster.spawn(leader);
    for at in [leader, joins] {
        wait_for("the node to be as the others", || {
            bench.check_copy(at).filter(|revision| *revision >= bench.newest().0)
        });
    }
    assert!(newest.with_extension("damaged").exists());
    bench.check_cluster();
}

/// A version of tomorrow in any kind of file: the node says so and ends before it answers anything.
#[test]
fn an_unknown_version_is_refused_in_every_file() {
    let mut bench = Bench::start(1);
    let at = 2;
    assert_eq!(bench.cluster.terminate(at), Some(0));
    let dir = bench.cluster.data_dir(at);
    let snapshots = files(&dir.join("snapshots"));
    assert_eq!(snapshots.len(), 2);
    let patch = |path: &Path, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = fs::read(path).expect("it reads");
        change(&mut bytes);
        fs::write(path, bytes).expect("it is written");
    };
    let digit = |bytes: &mut Vec<u8>| {
        let place = bytes.iter().position(|b| *b == b'\n').expect("a line") - 1;
        bytes[place] = b'9';
    };
    let slots = |bytes: &mut Vec<u8>| {
        for slot in [0, 4096] {
            bytes[slot + 4] = 9;
        }
    };
    type Change<'a> = &'a dyn Fn(&mut Vec<u8>);
    let cases: [(PathBuf, Change, &str); 4] = [
        (dir.join("identity"), &digit, "the data directory has format version 9"),
        (dir.join("log/mark"), &slots, "the log's mark has format version 9"),
        (snapshots[0].clone(), &|bytes| bytes[7] = 9, "the snapshot has format version 9"),
        (snapshots[1].clone(), &|bytes| bytes[7] = 9, "the snapshot has format version 9"),
    ];
    for (file, change, says) in cases {
        let sound = fs::read(&file).expect("it reads");
        patch(&file, change);
        let said_before = bench.cluster.log(at).len();
        let said = bench.start_damaged(at, said_before).expect("it must not start");
        assert!(said.contains(says), "{says}: {said}");
        assert!(said.contains(&file.display().to_string()), "{said}");
        assert!(said.contains("start the build that wrote it"), "{said}");
        fs::write(&file, sound).expect("it is written");
    }
    // The log's entries and positions are sled's values: changed behind its back.
    let values: [(&str, &[u8], usize, &str); 4] = [
        ("entries", b"", 0, "the log has format version 9"),
        ("meta", b"vote", 1, "vote has format version 9"),
        ("meta", b"purged", 1, "log position has format version 9"),
        ("meta", b"committed", 1, "log position has format version 9"),
    ];
    for (tree, key, byte, says) in values {
        let change = |put: Option<Vec<u8>>| {
            let db = wait_for("sled's lock", || sled::open(dir.join("log")).ok());
            let tree = db.open_tree(tree).expect("a tree");
            let first = tree.first().expect("it reads");
            let key =
                if key.is_empty() { first.expect("an entry").0.to_vec() } else { key.to_vec() };
            let old = tree.get(&key).expect("it reads").expect("a value").to_vec();
            let mut new = old.clone();
            new[byte] = 9;
            tree.insert(key, put.unwrap_or(new)).expect("it is written");
            db.flush().expect("a flush");
            old
        };
        let old = change(None);
        let said_before = bench.cluster.log(at).len();
        let said = bench.start_damaged(at, said_before).expect("it must not start");
        assert!(said.contains(says), "{says}: {said}");
        change(Some(old));
    }
    bench.cluster.spawn(at);
    wait_for("the node to be as the others", || {
        bench.check_copy(at).filter(|revision| *revision >= bench.newest().0)
    });
}
