//! What one command costs: in the table, in the codec, in the log. `cargo bench`; none of it is a gate.

use std::collections::{HashMap, VecDeque};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use portwarden::core::{
    Allocation, Applied, Authority, Claim, Command, GpuSpec, LabelValue, Labels, Millis, Origin,
    Outcome, Placement, Policy, Port, PortRequest, Ports, RangeSpec, Selector, State, Uid,
    WorkerSpec, apply, digest,
};
use portwarden::store::codec::{Batch, MembershipRecord, SnapshotHead, decode_payload};
use portwarden::store::{LogRecord, LogStore, SnapshotFile, write_snapshot};

const SPAN: Millis = Millis(600_000);
const UNDER_WAY: u64 = 2048;

fn port(number: u64) -> Port {
    Port::new("port", number).expect("a port")
}

fn done(state: &mut State, command: &Command) -> Applied {
    let (applied, _) = apply(state, &Origin::default(), command);
    assert!(applied.outcome.is_ok(), "{applied:?}");
    applied
}

/// So many workers with 100 ports and a label each.
fn table(workers: u32) -> State {
    table_of(workers, 1)
}

/// The same with so many labels each.
fn table_of(workers: u32, labels: usize) -> State {
    let mut state = State::default();
    for i in 0..workers {
        let value: LabelValue = format!("z{}", i % 10).parse().expect("a value");
        let keys = ["zone", "rack", "model", "pool"].map(|key| key.parse().expect("a key"));
        let spec = WorkerSpec {
            address: "10.0.0.1".into(),
            labels: keys.into_iter().map(|key| (key, value.clone())).take(labels).collect(),
            ranges: vec![RangeSpec {
                name: "service".parse().expect("a name"),
                first: port(40_000),
                last: port(40_099),
            }],
            reserved: Default::default(),
            gpus: vec![GpuSpec {
                index: 0,
                uuid: String::new(),
                model: "RTX4090".into(),
                memory_bytes: 24 << 30,
            }],
            identity: None,
        };
        done(&mut state, &Command::RegisterWorker { name: worker(i), spec });
    }
    state
}

fn worker(i: u32) -> portwarden::core::WorkerName {
    format!("worker-{i:06}").parse().expect("a name")
}

fn claim(name: &str, placement: Placement) -> Claim {
    Claim {
        name: name.parse().expect("a name"),
        uid: Uid::parse("uid-1").expect("a uid"),
        placement,
        ports: vec![PortRequest { name: None, range: None, ports: Ports::Count(1) }],
        gpus: None,
        lease: None,
        confirm_within: None,
        bound: true,
        labels: Labels::new(),
    }
}

fn allocate(claims: Vec<Claim>) -> Command {
    Command::allocate(claims, SPAN)
}

fn granted(state: &mut State, claims: Vec<Claim>) -> Vec<Arc<Allocation>> {
    let applied = done(state, &allocate(claims));
    let Ok(Outcome::Allocated { allocations, .. }) = applied.outcome else { panic!("granted") };
    allocations
}

fn release(state: &mut State, held: Vec<Arc<Allocation>>) {
    for held in held {
        let (name, authority) = (held.name().clone(), Authority::Holder(held.token));
        done(state, &Command::Release { name, authority });
    }
}

/// Grants and gives back, so that the table stays as large as it is.
fn pair(state: &mut State, name: &str, placement: Placement) {
    let held = granted(state, vec![claim(name, placement)]);
    release(state, held);
}

/// So many ports of every worker are held.
fn filled(workers: u32, held: u32) -> State {
    fill(table(workers), workers, held)
}

fn fill(mut state: State, workers: u32, held: u32) -> State {
    for j in 0..held {
        for i in 0..workers {
            let at = Placement::Worker(worker(scattered(i.into(), workers)));
            done(&mut state, &allocate(vec![claim(&format!("held-{i:06}-{j:02}"), at)]));
        }
    }
    state
}

/// Each worker once in so many turns, but no two neighbours: what schedulers ask for has no order, and what
/// is touched in the order in which it lies in memory costs a third.
fn scattered(turn: u64, workers: u32) -> u32 {
    const STRIDE: u64 = 48_271;
    (turn * STRIDE % u64::from(workers)) as u32
}

/// One on each of the workers that are next.
fn allocated_in_turns(state: &mut State, workers: u32, next: &mut u64) -> Vec<Arc<Allocation>> {
    let mut held = Vec::new();
    for _ in 0..UNDER_WAY {
        *next += 1;
        let at = Placement::Worker(worker(scattered(*next, workers)));
        held.extend(granted(state, vec![claim(&format!("i{next}"), at)]));
    }
    held
}

fn held_in_turns(state: &mut State, workers: u32, next: &mut u64) {
    let held = allocated_in_turns(state, workers, next);
    release(state, held);
}

/// The least that gives a port once and knows who has it: maps without order, nothing shared with a view,
/// no quarantine, label, lease or revision. What lies under any table, for comparison.
struct Least {
    workers: HashMap<String, LeastWorker>,
    held: HashMap<String, Box<LeastHeld>>,
    granted: u64,
}

struct LeastWorker {
    free: VecDeque<u16>,
    holders: Box<[u64; 100]>,
}

struct LeastHeld {
    worker: String,
    uid: String,
    at: u16,
    token: u64,
}

impl Least {
    fn new(workers: u32) -> Least {
        let fresh = || LeastWorker { free: (0..100).collect(), holders: Box::new([0; 100]) };
        let workers = (0..workers).map(|i| (worker(i).to_string(), fresh())).collect();
        Least { workers, held: HashMap::new(), granted: 0 }
    }

    fn allocate(&mut self, name: &str, on: u32) -> u64 {
        assert!(!self.held.contains_key(name), "the name is free");
        let worker = worker(on).to_string();
        let table = self.workers.get_mut(&worker).expect("it was made");
        let at = table.free.pop_front().expect("a free port");
        self.granted += 1;
        let token = self.granted;
        table.holders[usize::from(at)] = token;
        let held = LeastHeld { worker, uid: "uid-1".into(), at, token };
        self.held.insert(name.into(), Box::new(held));
        token
    }

    fn release(&mut self, name: &str, token: u64) {
        let held = self.held.remove(name).expect("it is held");
        assert_eq!((held.token, held.uid.as_str()), (token, "uid-1"));
        let table = self.workers.get_mut(&held.worker).expect("it was made");
        assert_eq!(std::mem::take(&mut table.holders[usize::from(held.at)]), token);
        table.free.push_back(held.at);
    }

    fn held_in_turns(&mut self, workers: u32, next: &mut u64) {
        let mut held = Vec::new();
        for _ in 0..UNDER_WAY {
            *next += 1;
            let name = format!("i{next}");
            held.push((self.allocate(&name, scattered(*next, workers)), name));
        }
        held.iter().for_each(|(token, name)| self.release(name, *token));
    }
}

fn of_apply(c: &mut Criterion) {
    let mut group = c.benchmark_group("apply");
    group.throughput(Throughput::Elements(2)).measurement_time(Duration::from_secs(3));
    for workers in [10, 1_000, 10_000] {
        let mut state = filled(workers, 50);
        let mut next = 0;
        group.bench_function(format!("allocate+release, one worker of {workers}"), |b| {
            b.iter(|| {
                next += 1;
                pair(&mut state, &format!("i{next}"), Placement::Worker(worker(0)));
            });
        });
        group.bench_function(format!("allocate+release, spread over {workers}"), |b| {
            b.iter(|| {
                next += 1;
                let at = scattered(next, workers);
                pair(&mut state, &format!("i{next}"), Placement::Worker(worker(at)));
            });
        });
        let selector = Selector::parse("zone=z3").expect("a selector");
        let select = Placement::Select { selector, policy: Policy::Binpack };
        group.bench_function(format!("allocate+release, by label of {workers}"), |b| {
            b.iter(|| {
                next += 1;
                pair(&mut state, &format!("i{next}"), select.clone());
            });
        });
        // Somebody looks at the table: what is shared is copied before it is changed.
        group.bench_function(format!("the same while it is looked at, {workers}"), |b| {
            b.iter(|| {
                next += 1;
                let view = state.clone();
                pair(&mut state, &format!("i{next}"), Placement::Worker(worker(0)));
                black_box(view);
            });
        });
    }
    group.finish();
    // As many under way as eight full sessions have, each on the next worker.
    let mut group = c.benchmark_group("in turns");
    group.throughput(Throughput::Elements(2 * UNDER_WAY)).measurement_time(Duration::from_secs(5));
    for workers in [1_000, 100_000] {
        let mut state = filled(workers, 2);
        let mut next = 0;
        group.bench_function(format!("2048 allocated, then released, on {workers}"), |b| {
            b.iter(|| held_in_turns(&mut state, workers, &mut next));
        });
        // Who selects waits for the index of what is free to follow.
        let selector = Selector::parse("zone=z3").expect("a selector");
        let select = Placement::Select { selector, policy: Policy::Binpack };
        group.bench_function(format!("one by label after 2048 that name theirs, {workers}"), |b| {
            b.iter_custom(|rounds| {
                let mut took = Duration::ZERO;
                for _ in 0..rounds {
                    let held = allocated_in_turns(&mut state, workers, &mut next);
                    let began = Instant::now();
                    pair(&mut state, "selected", select.clone());
                    took += began.elapsed();
                    release(&mut state, held);
                }
                took
            });
        });
    }
    // As many indexes follow a worker as it has labels, and one more.
    for (labels, workers) in [(0, 1_000), (0, 100_000), (4, 1_000), (4, 100_000)] {
        let mut state = fill(table_of(workers, labels), workers, 2);
        let mut next = 0;
        group.bench_function(format!("the same with {labels} labels each, {workers}"), |b| {
            b.iter(|| held_in_turns(&mut state, workers, &mut next));
        });
    }
    for workers in [1_000, 100_000] {
        let mut least = Least::new(workers);
        for i in 0..2 * workers {
            least.allocate(&format!("held-{i}"), scattered(i.into(), workers));
        }
        let mut next = 0;
        group.bench_function(format!("the same in the least table, {workers}"), |b| {
            b.iter(|| least.held_in_turns(workers, &mut next));
        });
    }
    group.finish();
    let mut group = c.benchmark_group("gang");
    for ports in [1, 8] {
        group.throughput(Throughput::Elements(64 * u64::from(ports)));
        let mut state = filled(1_000, 50);
        let mut round = 0;
        group.bench_function(format!("64 claims of {ports} ports, allocated and released"), |b| {
            b.iter(|| {
                round += 1;
                let claims = (0..64).map(|i| {
                    let mut claim =
                        claim(&format!("g{round}-{i}"), Placement::Worker(worker(i % 32)));
                    claim.ports[0].ports = Ports::Count(ports);
                    claim
                });
                let held = granted(&mut state, claims.collect());
                release(&mut state, held);
            });
        });
    }
    group.finish();
}

fn of_digest(c: &mut Criterion) {
    let state = filled(1_000, 50);
    c.bench_function("digest of 50 000 allocations", |b| b.iter(|| digest(black_box(&state))));
}

/// Written to memory, and read back as a node's start does, with every invariant checked.
fn of_snapshots(c: &mut Criterion) {
    let state = filled(1_000, 50);
    let mut bytes = Vec::new();
    let head = SnapshotHead {
        last: None,
        membership_at: None,
        membership: MembershipRecord { configs: Vec::new(), nodes: Default::default() },
    };
    write_snapshot(&mut bytes, &head, &state).expect("written");
    let mut group = c.benchmark_group("snapshot of 50 000 allocations");
    group.throughput(Throughput::Bytes(bytes.len() as u64)).sample_size(20);
    group.bench_function("write", |b| {
        b.iter(|| {
            bytes.clear();
            write_snapshot(&mut bytes, &head, black_box(&state)).expect("written");
        });
    });
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("one.snap");
    std::fs::write(&path, &bytes).expect("written");
    group.bench_function("read", |b| {
        b.iter(|| SnapshotFile::read(&path).and_then(|file| file.load()).expect("read"));
    });
    group.finish();
}

fn of_codec(c: &mut Criterion) {
    let commands: Vec<_> = (0..256)
        .map(|i| allocate(vec![claim(&format!("instance-{i}"), Placement::Worker(worker(i)))]))
        .collect();
    let mut group = c.benchmark_group("codec");
    group.throughput(Throughput::Elements(256));
    let encode = || Batch::new(Millis(1), commands.clone());
    group.bench_function("encode 256 commands", |b| b.iter(|| black_box(encode())));
    let bytes = encode().payload().clone();
    group.bench_function("decode 256 commands", |b| {
        b.iter(|| black_box(decode_payload(&bytes)).expect("it was encoded"));
    });
    group.finish();
}

fn of_log(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a directory");
    let log = LogStore::open(&dir.path().join("log")).expect("a log");
    let mut index = 0;
    let mut group = c.benchmark_group("log");
    group.measurement_time(Duration::from_secs(3));
    for (name, entries, bytes) in
        [("one small entry", 1, 200), ("one entry of 32 KiB", 1, 32 << 10)]
    {
        group.bench_function(format!("append and flush {name}"), |b| {
            b.iter_batched(
                || {
                    let records = (0..entries).map(|_| {
                        index += 1;
                        let at = portwarden::store::codec::Position { term: 1, node: 1, index };
                        LogRecord::new(at, vec![7; bytes])
                    });
                    records.collect::<Vec<_>>()
                },
                |records| {
                    let (done, waited) = std::sync::mpsc::channel();
                    let told = Box::new(move || done.send(()).expect("it waits"));
                    log.append(records, told).expect("appended");
                    waited.recv().expect("flushed");
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, of_apply, of_digest, of_snapshots, of_codec, of_log);
criterion_main!(benches);
