//! What grows: leases that are kept alive, watchers, callers beyond what can be served, and the table
//! itself. `scripts/bench --growth`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use itertools::Itertools as _;
use portwarden::cli::bench;
use portwarden::cli::bench::load::{self, Caller, Done, Report};
use portwarden::client::session::{Answer, Command};
use portwarden::client::{Client, Holding, Keeper, Standing};
use portwarden::proto::v1;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::ours::Ours;

/// Empty where a part was not asked for.
#[derive(Debug, Default, Serialize)]
pub struct Growth {
    pub stages: Vec<Stages>,
    pub leases: Option<Leases>,
    pub watchers: Option<Watchers>,
    pub overload: Vec<Overload>,
    pub table: Vec<Size>,
}

/// Where the time of a unary allocate or release goes: means, in milliseconds. All but the first are by
/// the leader's own metrics.
#[derive(Debug, Serialize)]
pub struct Stages {
    pub clients: u32,
    /// As the caller sees it.
    pub client: f64,
    /// From the call's arrival at the leader to its answer.
    pub rpc: f64,
    /// Until it is packed into an entry.
    pub queue: f64,
    /// From there until the entry is applied: it is written here, sent, written on a majority.
    pub proposal: f64,
    /// Within that: from sending entries to a follower until they are on its disk. The two followers
    /// do it at the same time, and the first counts.
    pub replicate: f64,
    /// At the same time, the flush of the leader's own log.
    pub flush: f64,
    /// Within `proposal`, after both.
    pub apply: f64,
    pub commands_an_entry: f64,
}

/// Leases with a time to live of 30 s, on one stream, each kept alive when a third of it has passed.
#[derive(Debug, Serialize)]
pub struct Leases {
    pub leases: usize,
    /// Hundredths of a core that the leader used, and the three nodes together.
    pub leader_percent: f64,
    pub nodes_percent: f64,
    /// The same without any lease.
    pub idle_nodes_percent: f64,
    pub lost: usize,
}

/// Writers with so many watchers, each of one worker, and without.
#[derive(Debug, Serialize)]
pub struct Watchers {
    pub watchers: usize,
    pub without_per_second: Vec<f64>,
    pub with_per_second: Vec<f64>,
    pub events_heard: u64,
}

/// Commands under way on sessions, far more than can be served at once.
#[derive(Debug, Serialize)]
pub struct Overload {
    pub under_way: u32,
    pub per_second: f64,
    pub refused: u64,
    pub example_error: Option<String>,
    pub p99_ms: f64,
    pub leader_resident_mib: f64,
    /// There was an election.
    pub leader_moved: bool,
    /// Leases that were kept meanwhile, starts on them that were confirmed meanwhile, how many of both
    /// were lost, and how long the slowest confirmation took.
    pub leases: usize,
    pub starts: usize,
    pub lost: usize,
    pub slowest_confirmation_ms: f64,
}

/// A table of one size.
#[derive(Debug, Serialize)]
pub struct Size {
    pub workers: u32,
    pub allocations: u64,
    /// Allocations a second while it was filled.
    pub filled_per_second: f64,
    /// Of the leader, for each command of pairs of allocate and release on sessions.
    pub apply_us: f64,
    /// In it, the processor time of applying the commands themselves.
    pub apply_processor_us: f64,
    pub pairs_per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    /// The same pairs until each node has written a snapshot, which none did before: how many the leader
    /// wrote, how long one took on average, and the p99.
    pub snapshots: f64,
    pub snapshot_seconds: f64,
    /// Of the calls that were under way while a node wrote one.
    pub calls_with_snapshots: usize,
    pub p99_with_snapshots_ms: f64,
    /// All memory of the leader, after all that it did.
    pub leader_resident_mib: f64,
    pub disk_mib: f64,
    /// The same pairs while backups are read from the leader, one after the other.
    pub p99_in_backup_ms: f64,
    pub backup_mib: f64,
    pub backup_seconds: f64,
    /// A follower that was killed: from its start until it says that it is ready.
    pub restart_seconds: f64,
    /// All memory that it has then.
    pub restarted_resident_mib: f64,
    /// A follower that was away for longer than the log reaches back, under the same load: from its start
    /// until it has all that the leader had when it was ready, and the snapshots that it was sent.
    pub catch_up_seconds: f64,
    pub catch_up_snapshots: f64,
    /// All allocations, page by page.
    pub list_seconds: f64,
}

const MIB: f64 = 1_048_576.0;
const TTL: Duration = Duration::from_secs(30);
/// Histograms of a node, without `portwarden_`.
const STAGES: [&str; 7] = [
    "rpc_seconds",
    "queue_seconds",
    "proposal_seconds",
    "replicate_seconds",
    "log_flush_seconds",
    "apply_seconds",
    "entry_commands",
];
const AT_ONCE: usize = 256;
/// The hundred ports of a worker that is part of a large table.
const WORKER_FIRST: u32 = 20_000;
const WORKER_LAST: u32 = 20_099;
/// Commands under way while a table is filled: on each of so many sessions.
const SESSIONS: usize = 8;
const BATCH: usize = 256;
const MEASURED: Duration = Duration::from_secs(5);
/// Many and short: the machine changes meanwhile.
const WATCH_ROUNDS: usize = 16;
const WATCHED: Duration = Duration::from_secs(2);
/// Leases and starts beside a load, and how long they have.
const STARTS: usize = 200;
const START_TTL: Duration = Duration::from_secs(5);
const START_WITHIN_MS: u64 = 8_000;
const START_EVERY: Duration = Duration::from_millis(20);
/// For how long a follower is away, while more is written than two snapshots of the log are apart.
const AWAY: Duration = Duration::from_secs(25);
/// How often nodes are asked whether they have written one.
const SNAPSHOT_LOOK: Duration = Duration::from_millis(25);
/// For how long at least, where each node is to write a snapshot meanwhile.
const LONGER: Duration = Duration::from_secs(15);

/// `wanted` is asked with the name of each part, as [`Growth`] has it.
pub async fn of(
    ours: &Ours,
    leases: usize,
    steps: &[(u32, u64)],
    wanted: impl Fn(&str) -> bool,
) -> anyhow::Result<Growth> {
    let mut all = Growth::default();
    for clients in [1, 16, 64, 256].into_iter().filter(|_| wanted("stages")) {
        all.stages.push(stages(ours, clients).await?);
        eprintln!("{:?}", all.stages.last());
    }
    if wanted("leases") {
        all.leases = Some(kept_leases(ours, leases).await?);
        eprintln!("{:?}", all.leases);
    }
    if wanted("watchers") {
        all.watchers = Some(watched(ours, 1000).await?);
        eprintln!("{:?}", all.watchers);
    }
    for under_way in [2048, 20_480].into_iter().filter(|_| wanted("overload")) {
        all.overload.push(overloaded(ours, under_way).await?);
        eprintln!("{:?}", all.overload.last());
    }
    let mut has = (0, 0);
    for to in steps.iter().filter(|_| wanted("table")) {
        all.table.push(grown(ours, has, *to).await?);
        eprintln!("{:?}", all.table.last());
        has = *to;
    }
    Ok(all)
}

async fn stages(ours: &Ours, clients: u32) -> anyhow::Result<Stages> {
    let lead = ours.leader().await?;
    let look = async || -> anyhow::Result<Vec<[f64; 2]>> {
        let metrics = ours.metrics(lead).await?;
        let of = |name| metrics.sum_and_count(&format!("portwarden_{name}"));
        Ok(STAGES.map(of).to_vec())
    };
    let (callers, left) = ours.callers("allocate", clients).await?;
    let before = look().await?;
    let report = load::drive("allocate", callers, Duration::from_secs(1), sleep(MEASURED)).await?;
    let after = look().await?;
    ours.clean_up(left).await?;
    let mean =
        after.into_iter().zip(before).map(|(now, was)| (now[0] - was[0]) / (now[1] - was[1]));
    let mean: Vec<f64> = mean.collect();
    Ok(Stages {
        clients,
        client: f64::from(clients) / report.operations_per_second * 1e3,
        rpc: mean[0] * 1e3,
        queue: mean[1] * 1e3,
        proposal: mean[2] * 1e3,
        replicate: mean[3] * 1e3,
        flush: mean[4] * 1e3,
        apply: mean[5] * 1e3,
        commands_an_entry: mean[6],
    })
}

async fn kept_leases(ours: &Ours, count: usize) -> anyhow::Result<Leases> {
    let lead = ours.leader().await?;
    let used = || -> anyhow::Result<Vec<f64>> { (0..3).map(|at| ours.cpu_seconds(at)).collect() };
    let over = async |time: Duration| -> anyhow::Result<Vec<f64>> {
        let (before, began) = (used()?, Instant::now());
        sleep(time).await;
        let seconds = began.elapsed().as_secs_f64();
        Ok(used()?.iter().zip(before).map(|(now, was)| (now - was) / seconds * 100.0).collect())
    };
    let idle = over(Duration::from_secs(5)).await?;
    let client = ours.client()?;
    let keeper = Keeper::start(client.clone());
    let holdings: Vec<_> = stream::iter(0..count)
        .map(|_| keeper.grant(TTL))
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await?;
    // Each was renewed once.
    sleep(TTL / 3).await;
    let busy = over(Duration::from_secs(20)).await?;
    let lost = lost(&holdings);
    stream::iter(&holdings)
        .map(|holding| client.lease_revoke(holding.id()))
        .buffer_unordered(AT_ONCE)
        .try_for_each(|_| async { Ok(()) })
        .await?;
    Ok(Leases {
        leases: count,
        leader_percent: busy[lead],
        nodes_percent: busy.iter().sum(),
        idle_nodes_percent: idle.iter().sum(),
        lost,
    })
}

/// How many of them are no longer held.
fn lost(holdings: &[Holding]) -> usize {
    let held = |holding: &&Holding| matches!(holding.standing(), Standing::Held { .. });
    holdings.len() - holdings.iter().filter(held).count()
}

/// Sessions with so many commands under way, until it is over: on workers that there are, or on a
/// thousand of their own.
async fn driven(
    ours: &Ours,
    workers: Vec<String>,
    under_way: u32,
    over: impl Future<Output = ()>,
) -> anyhow::Result<(Report, Calls)> {
    let (callers, left) = ours.callers_on(workers, "session", under_way).await?;
    let calls = Calls::default();
    let noted = |caller| -> Box<dyn Caller> { Box::new(Noted { caller, calls: calls.clone() }) };
    let callers = callers.into_iter().map(noted).collect();
    let report = load::drive("session", callers, Duration::from_secs(1), over).await;
    ours.clean_up(left).await?;
    Ok((report?, calls))
}

/// When calls began and ended.
#[derive(Clone, Default)]
struct Calls(Arc<Mutex<Vec<[Instant; 2]>>>);

struct Noted {
    caller: Box<dyn Caller>,
    calls: Calls,
}

#[tonic::async_trait]
impl Caller for Noted {
    async fn call(&mut self) -> Result<Done, String> {
        let began = Instant::now();
        let done = self.caller.call().await;
        self.calls.all().push([began, Instant::now()]);
        done
    }
}

impl Calls {
    fn all(&self) -> MutexGuard<'_, Vec<[Instant; 2]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of those that were under way within one of these times: how many they are, and the 99th of a
    /// hundred, in milliseconds; the longest, where they are fewer.
    fn during(&self, times: &[[Instant; 2]]) -> (usize, f64) {
        let calls = self.all();
        let within = |call: &&[Instant; 2]| {
            times.iter().any(|[from, until]| call[0] <= *until && call[1] >= *from)
        };
        let took = calls.iter().filter(within).map(|[began, ended]| *ended - *began);
        let took: Vec<Duration> = took.sorted().collect();
        let p99 = took.get(took.len() * 99 / 100).map_or(0.0, Duration::as_secs_f64);
        (took.len(), p99 * 1e3)
    }
}

/// For how long each node has written snapshots in all, and how many.
async fn snapshots(ours: &Ours) -> anyhow::Result<[[f64; 2]; 3]> {
    let mut written = [[0.0; 2]; 3];
    for (at, written) in written.iter_mut().enumerate() {
        *written = ours.metrics(at).await?.sum_and_count("portwarden_snapshot_seconds");
    }
    Ok(written)
}

/// When snapshots were written, until each node has written one more, but not before [`LONGER`], nor later
/// than a minute after that.
async fn one_more(ours: &Ours, before: &[[f64; 2]; 3]) -> Vec<[Instant; 2]> {
    let (began, mut known, mut times) = (Instant::now(), *before, Vec::new());
    while began.elapsed() < LONGER + Duration::from_secs(60) {
        sleep(SNAPSHOT_LOOK).await;
        let Ok(now) = snapshots(ours).await else { continue };
        for (now, known) in now.iter().zip(&known).filter(|(now, known)| now[1] > known[1]) {
            let ended = Instant::now();
            let took = Duration::from_secs_f64(now[0] - known[0]);
            times.extend((ended - SNAPSHOT_LOOK).checked_sub(took).map(|from| [from, ended]));
        }
        known = now;
        let all_did = now.iter().zip(before).all(|(now, before)| now[1] > before[1]);
        if began.elapsed() >= LONGER && all_did {
            break;
        }
    }
    times
}

async fn watched(ours: &Ours, count: usize) -> anyhow::Result<Watchers> {
    let mut per_second: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    let mut events_heard = 0;
    for round in 0..WATCH_ROUNDS {
        // The machine changes within a round too.
        let order = if round % 2 == 0 { [0, count] } else { [count, 0] };
        for watchers in order {
            let (rate, heard) = written_under(ours, watchers).await?;
            per_second.entry(watchers).or_default().push(rate);
            events_heard += heard;
        }
    }
    anyhow::ensure!(events_heard > 0, "no watcher heard anything");
    let mut of = |watchers| per_second.remove(&watchers).unwrap_or_default();
    let (without_per_second, with_per_second) = (of(0), of(count));
    Ok(Watchers { watchers: count, without_per_second, with_per_second, events_heard })
}

/// What 64 writers do a second under so many watchers, and what those hear.
async fn written_under(ours: &Ours, watchers: usize) -> anyhow::Result<(f64, u64)> {
    let heard = Arc::new(AtomicU64::new(0));
    let (callers, left) = ours.callers("allocate", 64).await?;
    let clients: Vec<Client> =
        (0..3).map(|at| ours.client_at(at)).collect::<anyhow::Result<_>>()?;
    let prefix = left.as_ref().context("a bench")?.prefix().to_string();
    let watches: Vec<_> = (0..watchers)
        .map(|i| {
            let worker = format!("{prefix}w{i}");
            let request = v1::WatchRequest { worker, ..Default::default() };
            let (mut watch, heard) = (clients[i % 3].watch(request), heard.clone());
            tokio::spawn(async move {
                while let Ok(told) = watch.next().await {
                    heard.fetch_add(told.events.len() as u64, Ordering::Relaxed);
                }
            })
        })
        .collect();
    sleep(Duration::from_secs(1)).await;
    let report = load::drive("allocate", callers, Duration::from_secs(1), sleep(WATCHED)).await?;
    watches.iter().for_each(|watch| watch.abort());
    ours.clean_up(left).await?;
    Ok((report.operations_per_second, heard.load(Ordering::Relaxed)))
}

/// Leases, and on each a start that is not confirmed yet: what load must not cost anybody.
struct Starts {
    client: Client,
    holdings: Vec<Holding>,
    reserved: Vec<v1::Allocation>,
}

impl Starts {
    async fn begin(ours: &Ours) -> anyhow::Result<Starts> {
        let client = ours.client()?;
        let keeper = Keeper::start(client.clone());
        let on = "starts".to_string();
        bench::register(&client, [on.clone()].into_iter(), &bench::spec(30_000, 30_999)).await?;
        let (mut holdings, mut reserved) = (Vec::new(), Vec::new());
        for i in 0..STARTS {
            let holding = keeper.grant(START_TTL).await?;
            let claim = v1::Claim {
                lease: holding.id(),
                confirm_within_ms: START_WITHIN_MS,
                bound: false,
                ..bench::claim(&format!("start-{i}"), &on, 1)
            };
            reserved.extend(client.allocate(vec![claim]).await?.allocations);
            holdings.push(holding);
        }
        Ok(Starts { client, holdings, reserved })
    }

    /// Each at its time, over four seconds; the slowest.
    async fn confirm(&self) -> Duration {
        let confirmed = self.reserved.iter().zip(0..).map(|(reserved, i)| async move {
            sleep(START_EVERY * i).await;
            let began = Instant::now();
            // One that fails is found by `end`.
            let _ = self.client.confirm(reserved).await;
            began.elapsed()
        });
        futures::future::join_all(confirmed).await.into_iter().max().unwrap_or_default()
    }

    /// How many leases and starts are no longer what they should be.
    async fn end(self) -> anyhow::Result<usize> {
        let mut lost = lost(&self.holdings);
        for v1::Allocation { name, token, .. } in &self.reserved {
            let found = self.client.get(name, None).await.ok().and_then(|got| got.allocation);
            let stands = found
                .is_some_and(|found| found.token == *token && found.phase() == v1::Phase::Bound);
            lost += usize::from(!stands);
            self.client.release(name, *token).await?;
        }
        for lease in &self.holdings {
            self.client.lease_revoke(lease.id()).await?;
        }
        Ok(lost)
    }
}

async fn overloaded(ours: &Ours, under_way: u32) -> anyhow::Result<Overload> {
    let (lead, term) = (ours.leader().await?, ours.term().await?);
    let starts = Starts::begin(ours).await?;
    let (report, slowest) = futures::future::join(
        driven(ours, Vec::new(), under_way, sleep(MEASURED)),
        starts.confirm(),
    )
    .await;
    let ((report, _), lost) = (report?, starts.end().await?);
    Ok(Overload {
        leases: STARTS,
        starts: STARTS,
        lost,
        slowest_confirmation_ms: slowest.as_secs_f64() * 1e3,
        under_way,
        per_second: report.operations_per_second,
        refused: report.errors,
        example_error: report.example_error,
        p99_ms: report.latency["all"].p99_ms,
        leader_resident_mib: ours.resident_bytes(lead)? / MIB,
        leader_moved: ours.term().await? != term,
    })
}

fn worker(i: u32) -> String {
    format!("scale-{i:06}")
}

/// Allocations `from` to `to`, one port each, over all the workers.
async fn fill(client: &Client, workers: u32, from: u64, to: u64) -> anyhow::Result<()> {
    let next = Arc::new(AtomicU64::new(from));
    let filling = (0..SESSIONS).map(|_| {
        let (session, next) = (client.session(), next.clone());
        async move {
            loop {
                let first = next.fetch_add(BATCH as u64, Ordering::Relaxed);
                if first >= to {
                    return anyhow::Ok(());
                }
                let command = |i: u64| {
                    let on = worker((i % u64::from(workers)) as u32);
                    let claim = bench::claim(&format!("scale-{i}"), &on, 1);
                    Command::Allocate(v1::AllocateRequest { claims: vec![claim], dry_run: false })
                };
                let batch = (first..to.min(first + BATCH as u64)).map(command).collect();
                for answer in session.all(batch).await {
                    anyhow::ensure!(matches!(answer?, Answer::Allocate(_)), "another's answer");
                }
            }
        }
    });
    futures::future::try_join_all(filling).await.map(drop)
}

/// Starts a follower again: after how many seconds it has all that the leader had when it was ready, and the
/// snapshots that it was sent.
async fn catch_up(ours: &Ours, lead: usize, follower: usize) -> anyhow::Result<(f64, f64)> {
    let began = Instant::now();
    ours.restart_until_ready(follower).await?;
    let applied = "portwarden_log_applied_index";
    let to = ours.metrics(lead).await?.sum(applied);
    loop {
        let now = ours.metrics(follower).await?;
        if now.sum(applied) >= to {
            let snapshots = now.sum("portwarden_snapshots_installed_total");
            return Ok((began.elapsed().as_secs_f64(), snapshots));
        }
        anyhow::ensure!(began.elapsed() < Duration::from_secs(120), "the follower is still behind");
        sleep(Duration::from_millis(20)).await;
    }
}

async fn grown(ours: &Ours, from: (u32, u64), to: (u32, u64)) -> anyhow::Result<Size> {
    let (workers, allocations) = to;
    let client = ours.client()?.with_timeout(Duration::from_secs(60));
    let spec = bench::spec(WORKER_FIRST, WORKER_LAST);
    bench::register(&client, (from.0..workers).map(worker), &spec).await?;
    let began = Instant::now();
    fill(&client, workers, from.1, allocations).await?;
    let filled_per_second = (allocations - from.1) as f64 / began.elapsed().as_secs_f64();

    let lead = ours.leader().await?;
    let applied = async || -> anyhow::Result<[f64; 3]> {
        let metrics = ours.metrics(lead).await?;
        let names = [
            "portwarden_apply_seconds_sum",
            "portwarden_apply_processor_seconds_sum",
            "portwarden_commands_applied_total",
        ];
        Ok(names.map(|name| metrics.sum(name)))
    };
    let all = || (0..workers).map(worker).collect::<Vec<_>>();
    let mut tries = 0..10;
    let (report, [apply, processor, commands]) = loop {
        anyhow::ensure!(tries.next().is_some(), "snapshots are written all the time");
        let (written, before) = (snapshots(ours).await?, applied().await?);
        let (report, _) = driven(ours, all(), 2048, sleep(MEASURED)).await?;
        let now = applied().await?;
        if snapshots(ours).await? == written {
            break (report, std::array::from_fn(|i| now[i] - before[i]));
        }
    };
    let (before, mut times) = (snapshots(ours).await?, Vec::new());
    let over = async { times = one_more(ours, &before).await };
    let (_, calls) = driven(ours, all(), 2048, over).await?;
    let (calls_with_snapshots, p99_with_snapshots_ms) = calls.during(&times);
    let now = snapshots(ours).await?[lead];
    let [writing, count]: [f64; 2] = std::array::from_fn(|i| now[i] - before[lead][i]);

    let leader_resident = ours.resident_bytes(lead)?;
    let leader = ours.client_at(lead)?.with_timeout(Duration::from_secs(60));
    let mut backups = Vec::new();
    let over = async {
        let until = Instant::now() + MEASURED;
        while Instant::now() < until {
            let began = Instant::now();
            let copied = leader.backup(|| Ok(std::io::sink()), |_| {}).await;
            let bytes = copied.map(|(_, copied)| copied.bytes);
            backups.push(bytes.map(|bytes| (bytes, began.elapsed().as_secs_f64())));
        }
    };
    let (during, _) = driven(ours, all(), 2048, over).await?;
    let backups: Vec<_> = backups.into_iter().collect::<Result<_, _>>()?;
    let backup_seconds = backups.iter().map(|(_, took)| took).sum::<f64>() / backups.len() as f64;
    let (backup_bytes, _) = backups.last().context("no backup was read")?;

    let began = Instant::now();
    let listed = client.list(v1::ListRequest::default()).await?.items.len() as u64;
    anyhow::ensure!(listed == allocations, "{listed} of {allocations} are listed");
    let list_seconds = began.elapsed().as_secs_f64();

    let follower = (lead + 1) % 3;
    ours.kill(follower);
    let began = Instant::now();
    ours.restart_until_ready(follower).await?;
    let restart_seconds = began.elapsed().as_secs_f64();
    ours.healthy().await?;
    let restarted_resident = ours.resident_bytes(follower)?;

    ours.kill(follower);
    let mut caught_up = None;
    let over = async {
        sleep(AWAY).await;
        caught_up = Some(catch_up(ours, lead, follower).await);
    };
    driven(ours, all(), 2048, over).await?;
    let (catch_up_seconds, catch_up_snapshots) = caught_up.context("it did not begin")??;
    ours.healthy().await?;

    Ok(Size {
        workers,
        allocations,
        filled_per_second,
        apply_us: apply / commands * 1e6,
        apply_processor_us: processor / commands * 1e6,
        pairs_per_second: report.operations_per_second,
        p50_ms: report.latency["all"].p50_ms,
        p99_ms: report.latency["all"].p99_ms,
        snapshots: count,
        snapshot_seconds: writing / count.max(1.0),
        calls_with_snapshots,
        p99_with_snapshots_ms,
        leader_resident_mib: leader_resident / MIB,
        disk_mib: ours.disk_bytes(lead)? / MIB,
        p99_in_backup_ms: during.latency["all"].p99_ms,
        backup_mib: *backup_bytes as f64 / MIB,
        backup_seconds,
        restart_seconds,
        restarted_resident_mib: restarted_resident / MIB,
        catch_up_seconds,
        catch_up_snapshots,
        list_seconds,
    })
}
