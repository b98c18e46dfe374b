//! Power cuts, at random and under load, on disks that forget what was not synced.
//!
//! `PORTWARDEN_ROUNDS` says how many cuts, `PORTWARDEN_SEED` which; `scripts/power-cuts` runs 200.
//! Needs root and /dev/fuse. Where they cannot be had, `PORTWARDEN_WITHOUT_FUSE=1` says so, and the
//! tests here say that they did not run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use portwarden::client::{Client, ClientError};
use portwarden::proto::v1;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::forgetting::{Cut, Disk};
use crate::support::{Cluster, client_of, number_from, wait_for};

const ROUNDS: u64 = 8;
const CLIENTS: u64 = 6;
/// A snapshot this often, so that there are some and the log is purged.
const SNAPSHOT_EVERY: &str = "150";

/// `None` where the tests were told to do without. Panics where it cannot be mounted.
fn mount(at: &Path) -> Option<Disk> {
    match Disk::mount(at) {
        Ok(disk) => Some(disk),
        Err(error) if std::env::var_os("PORTWARDEN_WITHOUT_FUSE").is_some() => {
            let _ =
                writeln!(std::io::stderr(), "NOT RUN, no FUSE here ({error}): {}", at.display());
            None
        }
        Err(error) => panic!(
            "this test needs root and /dev/fuse ({error}): run scripts/power-cuts as root, or set \
             PORTWARDEN_WITHOUT_FUSE=1 to do without it"
        ),
    }
}

/// What a client knows of one allocation.
#[derive(Debug, Clone, PartialEq)]
enum Heard {
    Granted {
        token: u64,
        ports: BTreeSet<(String, u32)>,
    },
    Released,
    /// A call is under way, or it ended without a word: it may or may not have happened.
    Unknown,
}

/// What all clients know, and how it goes.
#[derive(Default)]
struct Books {
    heard: Mutex<BTreeMap<String, Heard>>,
    acknowledged: AtomicU64,
    unknown: AtomicU64,
    done: AtomicBool,
}

impl Books {
    fn set(&self, name: &str, heard: Heard) {
        self.heard.lock().expect("no client panicked").insert(name.into(), heard);
    }

    fn snapshot(&self) -> BTreeMap<String, Heard> {
        self.heard.lock().expect("no client panicked").clone()
    }

    fn acknowledge(&self, name: &str, heard: Heard) {
        self.set(name, heard);
        self.acknowledged.fetch_add(1, Ordering::AcqRel);
    }
}

fn held(allocation: &v1::Allocation) -> BTreeSet<(String, u32)> {
    allocation.ports.iter().map(|port| (allocation.worker.clone(), port.number)).collect()
}

fn ports(count: u32) -> Vec<v1::PortRequest> {
    let ports = Some(v1::port_request::Ports::Count(count));
    vec![v1::PortRequest { ports, ..Default::default() }]
}

/// `Ok(None)`: nobody knows.
fn settle<T>(what: &str, result: Result<T, ClientError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(ClientError::Unavailable { .. } | ClientError::OutcomeUnknown { .. }) => None,
        Err(error) => panic!("{what}: {error}"),
    }
}

/// Allocates two ports, over and over, and releases most of what it got.
async fn write_until_done(client: Client, me: u64, seed: u64, books: &Books) {
    let mut rng = StdRng::seed_from_u64(seed ^ me);
    for round in 0.. {
        if books.done.load(Ordering::Acquire) {
            return;
        }
        let name = format!("c{me}-{round}");
        books.set(&name, Heard::Unknown);
        let claim = v1::Claim {
            name: name.clone(),
            uid: name.clone(),
            placement: Some(v1::claim::Placement::Worker(format!("w{}", me % 2))),
            ports: ports(2),
            bound: true,
            ..Default::default()
        };
        let Some(granted) = settle(&name, client.allocate(vec![claim]).await) else {
            books.unknown.fetch_add(1, Ordering::AcqRel);
            continue;
        };
        let allocation = &granted.allocations[0];
        let token = allocation.token;
        books.acknowledge(&name, Heard::Granted { token, ports: held(allocation) });
        if rng.random_ratio(2, 3) {
            books.set(&name, Heard::Unknown);
            match settle(&name, client.release(&name, token).await) {
                Some(_) => books.acknowledge(&name, Heard::Released),
                None => {
                    books.unknown.fetch_add(1, Ordering::AcqRel);
                }
            }
        }
    }
}

/// What is wrong with a table, given what was known before and after it was asked for.
fn faults(
    table: &[v1::Allocation],
    before: &BTreeMap<String, Heard>,
    after: &BTreeMap<String, Heard>,
) -> Vec<String> {
    let mut faults = Vec::new();
    let by_name: BTreeMap<_, _> = table.iter().map(|a| (a.name.as_str(), a)).collect();
    let mut owners: BTreeMap<(String, u32), &str> = BTreeMap::new();
    for allocation in table {
        for port in held(allocation) {
            if let Some(other) = owners.insert(port.clone(), &allocation.name) {
                faults.push(format!("{port:?} is held by {other} and {}", allocation.name));
            }
        }
        if !after.contains_key(&allocation.name) {
            faults.push(format!("nobody asked for {}", allocation.name));
        }
    }
    for (name, heard) in before.iter().filter(|(name, heard)| after.get(*name) == Some(heard)) {
        match (heard, by_name.get(name.as_str())) {
            (Heard::Granted { .. }, None) => faults.push(format!("{name} was lost")),
            (Heard::Granted { token, ports }, Some(found))
                if *token != found.token || *ports != held(found) =>
            {
                faults.push(format!("{name} is not what was granted: {found:?}"));
            }
            (Heard::Released, Some(_)) => faults.push(format!("{name} came back")),
            _ => {}
        }
    }
    faults
}

struct Bench {
    cluster: Cluster,
    disks: Vec<Disk>,
    client: Client,
    runtime: tokio::runtime::Runtime,
}

impl Drop for Bench {
    /// Unmounts what nobody uses any more, so that the directory can go.
    fn drop(&mut self) {
        self.disks.iter().for_each(Disk::resume);
        self.cluster.kill_all();
        self.disks.clear();
    }
}

impl Bench {
    /// Three nodes, each on a disk of its own; `None` where there is no FUSE.
    fn start() -> Option<Bench> {
        Bench::start_with(SNAPSHOT_EVERY)
    }

    fn start_with(snapshot_every: &str) -> Option<Bench> {
        let mut cluster = Cluster::prepare(3);
        let mut disks = Vec::new();
        for at in 0..3 {
            disks.push(mount(&cluster.dir().join(format!("disk-{at}")))?);
            cluster.put_data_in(at, cluster.dir().join(format!("disk-{at}/data")));
        }
        cluster.flag("--snapshot-every", snapshot_every);
        for at in 0..3 {
            cluster.spawn(at);
        }
        cluster.leader();
        let (runtime, client) = client_of(&cluster);
        for worker in ["w0", "w1"] {
            let range = v1::PortRange { name: "all".into(), first: 10_000, last: 65_000 };
            let spec = v1::WorkerSpec {
                address: "127.0.0.1".into(),
                ranges: vec![range],
                ..Default::default()
            };
            runtime.block_on(client.worker_register(worker, spec)).expect("a worker");
        }
        Some(Bench { cluster, disks, client, runtime })
    }

    /// Runs `what` while so many clients write, and has them end, whatever comes of it.
    fn while_writing<T>(
        &mut self,
        (clients, seed): (u64, u64),
        books: &Books,
        what: impl FnOnce(&mut Bench) -> T,
    ) -> T {
        let handle = self.runtime.handle().clone();
        std::thread::scope(|scope| {
            for me in 0..clients {
                let (client, handle) = (self.client.clone(), handle.clone());
                scope.spawn(move || handle.block_on(write_until_done(client, me, seed, books)));
            }
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| what(self)));
            books.done.store(true, Ordering::Release);
            outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// All at once: the processes are dead before the first disk forgets.
    fn cut(&mut self, nodes: &[usize], rng: &mut StdRng, all: bool) {
        for at in nodes {
            self.cluster.kill(*at);
        }
        for at in nodes {
            self.disks[*at].cut(match all {
                true => Cut::ForgetsAll,
                false => Cut::ForgetsSome(rng),
            });
        }
    }

    /// Has the log take so many bytes more.
    fn pile_up(&self, bytes: usize) {
        let labels = (0..32).map(|i| (format!("{i:0>63}"), format!("{i:0>63}")));
        let labels: BTreeMap<_, _> = labels.collect();
        let gang = |gang: usize| {
            let claim = |i| v1::Claim {
                name: format!("pile-{gang}-{i}"),
                uid: "pile".into(),
                // On none: it is refused, in the log.
                placement: Some(v1::claim::Placement::Worker("nowhere".into())),
                ports: ports(1),
                labels: labels.clone(),
                ..Default::default()
            };
            (0..64).map(claim).collect()
        };
        let bytes_each = 64 * 32 * 2 * 63;
        for number in 0..bytes.div_ceil(bytes_each) {
            let refused = self.runtime.block_on(self.client.allocate(gang(number)));
            let refused = refused.expect_err("a gang on a worker that is none");
            assert!(refused.to_string().contains("nowhere"), "{refused}");
        }
    }

    fn table(&self) -> Vec<v1::Allocation> {
        wait_for("the table", || {
            let listed = self.runtime.block_on(self.client.list(v1::ListRequest::default()));
            settle("the list", listed).map(|listing| listing.items)
        })
    }

    fn check(&self, books: &Books) {
        let before = books.snapshot();
        let table = self.table();
        let faults = faults(&table, &before, &books.snapshot());
        assert!(faults.is_empty(), "{faults:#?}");
    }

    fn wait_for_acknowledged(&mut self, books: &Books, more: u64) {
        let enough = books.acknowledged.load(Ordering::Acquire) + more;
        wait_for("clients to get on", || {
            self.cluster.assert_running();
            (books.acknowledged.load(Ordering::Acquire) >= enough).then_some(())
        });
    }
}

/// What is acknowledged is there after any power cut: of one node, of two, of all (field failures
/// sled-1351, sled-1452).
#[test]
fn power_cuts_lose_nothing() {
    let rounds = number_from("PORTWARDEN_ROUNDS").unwrap_or(ROUNDS);
    let seed =
        number_from("PORTWARDEN_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    let replay = format!(
        "PORTWARDEN_ROUNDS={rounds} PORTWARDEN_SEED={seed} cargo test --test cluster power_cuts -- --nocapture"
    );
    eprintln!("{replay}");
    let Some(mut bench) = Bench::start() else { return };
    let mut rng = StdRng::seed_from_u64(seed);
    let books = Books::default();
    let began = Instant::now();
    let mut cuts = [0; 4];

    bench.while_writing((CLIENTS, seed), &books, |bench| {
        for round in 1..=rounds {
            bench.wait_for_acknowledged(&books, rng.random_range(1..40));
            let count = [1, 1, 2, 3, 3][rng.random_range(0..5)];
            let mut nodes: Vec<usize> = (0..3).collect();
            while nodes.len() > count {
                nodes.remove(rng.random_range(0..nodes.len()));
            }
            let all = rng.random();
            bench.cut(&nodes, &mut rng, all);
            cuts[count] += 1;
            // One that is away misses something.
            if count == 1 && rng.random() {
                bench.wait_for_acknowledged(&books, rng.random_range(1..20));
            }
            for at in &nodes {
                bench.cluster.spawn(*at);
            }
            bench.check(&books);
            let acknowledged = books.acknowledged.load(Ordering::Acquire);
            let kind = if all { "all" } else { "some" };
            eprintln!(
                "round {round}: nodes {nodes:?} forgot {kind}; {acknowledged} calls acknowledged, {:.0?}",
                began.elapsed()
            );
        }
    });

    bench.check(&books);
    let syncs: u64 = bench.disks.iter().map(Disk::syncs).sum();
    eprintln!(
        "{rounds} cuts in {:.0?} ({} of one node, {} of two, {} of all): {} calls acknowledged, {} \
         of unknown outcome, {} allocations in the table, {syncs} syncs; nothing was lost",
        began.elapsed(),
        cuts[1],
        cuts[2],
        cuts[3],
        books.acknowledged.load(Ordering::Acquire),
        books.unknown.load(Ordering::Acquire),
        bench.table().len(),
    );
}

/// What waits for it would pile up, for the others commit without it.
#[test]
fn a_leader_whose_disk_hangs_hands_over_and_nothing_fails() {
    let Some(mut bench) = Bench::start() else { return };
    let books = Books::default();
    let leader = bench.cluster.leader();
    bench.while_writing((1, 1), &books, |bench| {
        bench.wait_for_acknowledged(&books, 10);
        bench.disks[leader].hang();
        // Nobody notices: it is on the others' disks.
        bench.wait_for_acknowledged(&books, 10);
        assert_eq!(bench.cluster.leader(), leader);
        bench.pile_up(40 << 20);
        let leads = |at: usize| bench.cluster.metric(at, "portwarden_is_leader") == Some(1.0);
        wait_for("another to lead", || (0..3).find(|at| *at != leader && leads(*at)));
        bench.wait_for_acknowledged(&books, 10);
        assert!(bench.cluster.log(leader).contains("the disk takes nothing of the log"));
        bench.disks[leader].resume();
        let waits = |at: usize| bench.cluster.metric(at, "portwarden_log_waits_seconds");
        wait_for("the disk to take all", || (waits(leader) < Some(1.0)).then_some(()));
        bench.wait_for_acknowledged(&books, 10);
    });
    bench.check(&books);
    assert_eq!(books.unknown.load(Ordering::Acquire), 0);
}

/// It answers all the time, and is further behind than the log is kept for: for it alone the log would grow
/// without bound.
#[test]
fn a_follower_that_takes_less_than_comes_is_sent_a_snapshot_and_the_log_goes() {
    let Some(mut bench) = Bench::start_with("15") else { return };
    let books = Books::default();
    let leader = bench.cluster.leader();
    let slow = (leader + 1) % 3;
    let sent = |bench: &Bench| bench.cluster.log(slow).matches("a peer sends its snapshot").count();
    bench.while_writing((CLIENTS, 1), &books, |bench| {
        for _ in 0..3 {
            bench.wait_for_acknowledged(&books, 10);
            let before = sent(bench);
            bench.disks[slow].slow(Duration::from_secs(1));
            wait_for("it to be sent a snapshot", || (sent(bench) > before).then_some(()));
            bench.disks[slow].slow(Duration::ZERO);
            let index = |at, name| bench.cluster.metric(at, name).unwrap_or_default();
            let written = index(leader, "portwarden_log_last_index");
            wait_for("the log to go", || {
                (index(leader, "portwarden_log_purged_index") > written).then_some(())
            });
            wait_for("it to catch up", || {
                (index(slow, "portwarden_log_applied_index") > written).then_some(())
            });
        }
    });
    bench.check(&books);
}

/// The test above would notice: disks that answer syncs and do nothing lose what was acknowledged.
#[test]
fn a_disk_that_lies_is_found_out() {
    let Some(mut bench) = Bench::start() else { return };
    let books = Books::default();
    let write = |bench: &Bench, count: u64| {
        bench.runtime.block_on(async {
            let writing = write_until_done(bench.client.clone(), 0, 1, &books);
            let enough = async {
                while books.acknowledged.load(Ordering::Acquire) < count {
                    tokio::task::yield_now().await;
                }
                books.done.store(true, Ordering::Release);
            };
            tokio::join!(writing, enough);
        });
        books.done.store(false, Ordering::Release);
    };
    bench.disks.iter().for_each(Disk::lie);
    write(&bench, 30);
    let before = books.snapshot();
    assert!(before.values().any(|heard| matches!(heard, Heard::Granted { .. })));
    let mut rng = StdRng::seed_from_u64(0);
    bench.cut(&[0, 1, 2], &mut rng, true);
    for at in 0..3 {
        bench.cluster.spawn(at);
    }
    let found = faults(&bench.table(), &before, &before);
    assert!(found.iter().any(|fault| fault.contains("was lost")), "{found:?}");
}

/// The file system itself: what it forgets, and what not.
#[test]
fn only_what_was_synced_is_there_after_a_cut() {
    let dir = tempfile::tempdir().expect("a directory");
    let Some(disk) = mount(&dir.path().join("disk")) else { return };
    let root = dir.path().join("disk");
    let sync = |path: &Path| fs::File::open(path).and_then(|f| f.sync_all()).expect("a sync");

    let mut file = fs::File::create(root.join("kept")).expect("a file");
    file.write_all(b"synced").expect("a write");
    file.sync_all().expect("a sync");
    fs::write(root.join("renamed"), "old").expect("a file");
    sync(&root.join("renamed"));
    fs::create_dir(root.join("dir")).expect("a directory");
    sync(&root);
    file.write_all(b" and more").expect("a write");
    fs::write(root.join("unnamed"), "synced, but its name was not").expect("a file");
    sync(&root.join("unnamed"));
    fs::write(root.join("dir/inner"), "x").expect("a file");
    fs::rename(root.join("renamed"), root.join("new")).expect("a rename");
    drop(file);
    assert_eq!(fs::read_to_string(root.join("kept")).expect("it reads"), "synced and more");
    assert_eq!(fs::read_to_string(root.join("new")).expect("it reads"), "old");

    disk.cut(Cut::ForgetsAll);
    let names = |dir: &Path| -> BTreeSet<String> {
        let list = fs::read_dir(dir).expect("a directory");
        list.map(|e| e.expect("an entry").file_name().into_string().expect("UTF-8")).collect()
    };
    assert_eq!(names(&root), ["dir", "kept", "renamed"].map(String::from).into());
    assert_eq!(names(&root.join("dir")), BTreeSet::new());
    assert_eq!(fs::read_to_string(root.join("kept")).expect("it reads"), "synced");
    assert_eq!(fs::read_to_string(root.join("renamed")).expect("it reads"), "old");
}
