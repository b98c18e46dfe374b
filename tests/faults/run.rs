//! One run: a cluster, clients, faults, healing, and the check of what happened.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use portwarden::api::meaning::{Request, Response};
use portwarden::proto::v1;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::caller::{Caller, by_tcp};
use crate::checker::{self, Report, Rule, Violation};
use crate::history::{Header, History, Record, Recorder};
use crate::nemesis::{self, End, Kind};
use crate::real::{self, Site};
use crate::rig::disk::Disk;
use crate::rig::net::Host;
use crate::rig::{Life, Options, Rig};
use crate::watcher::Watcher;
use crate::workload::{self, Actor, REAL_WORKLOADS, WORKLOADS, Workload};

/// How long it may take until all is well after the last fault: an election or two, a replay, and
/// on two busy cores some patience.
const AVAILABLE_WITHIN: Duration = Duration::from_secs(60);
/// The default of `serve`.
const CONFIRM_WITHIN_MS: u64 = 600_000;
/// Short, so that some end by themselves within a run.
const QUARANTINE: &str = "3s";
/// By when agents must have shown that everything is gone: on its own that takes the longest lease,
/// the longest `--confirm-within` and some samples, half a minute. Where the machine starves, agents
/// are silent now and then, and what they saw before counts no more.
const EVIDENCE_WITHIN: Duration = Duration::from_secs(180);
/// Of calls that ask whether all is well.
const PROBE: Duration = Duration::from_secs(2);

pub struct Plan {
    pub seconds: u64,
    pub seed: u64,
    pub nodes: u64,
    pub clients: u32,
    /// Real workers and instances, in place of clients that only speak.
    pub real: bool,
    pub kinds: Vec<&'static Kind>,
    pub binary: PathBuf,
    /// History, logs and timelines are kept here.
    pub dir: PathBuf,
}

pub struct Outcome {
    pub report: Report,
    pub history: PathBuf,
    /// Ctrl-C: it was not led to its end, and is not judged.
    pub interrupted: bool,
}

/// Somebody who works until told to stop, on a thread and a host of its own.
struct Hand(std::thread::JoinHandle<()>);

impl Hand {
    fn start<F: Future<Output = ()>>(
        host: Host,
        mut stop: watch::Receiver<bool>,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> Hand {
        Hand(std::thread::spawn(move || {
            host.enter();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let work = std::pin::pin!(work());
                let stopped = std::pin::pin!(stop.wait_for(|stop| *stop));
                futures::future::select(work, stopped).await;
            });
        }))
    }
}

/// Runs it on a thread of its own, which moves into the network of the run.
pub fn run(plan: Plan) -> Result<Outcome, String> {
    let joined = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| e.to_string())?;
        runtime.block_on(Run::whole(plan))
    });
    joined.join().map_err(|_| "the run panicked".to_string())?
}

struct Run {
    plan: Plan,
    rig: Rig,
    recorder: Arc<Recorder>,
    operator: Caller,
    clients: Vec<Host>,
}

impl Run {
    async fn whole(plan: Plan) -> Result<Outcome, String> {
        std::fs::create_dir_all(&plan.dir).map_err(|e| format!("{}: {e}", plan.dir.display()))?;
        let history = plan.dir.join("history.jsonl");
        let mut failed = None;
        let interrupted = {
            let mut run = Run::prepare(plan, &history)?;
            let interrupted = tokio::select! {
                led = run.lead() => {
                    failed = led.err();
                    false
                }
                _ = tokio::signal::ctrl_c() => true,
                () = terminated() => true,
            };
            run.recorder.flush();
            interrupted
        };
        let mut report = match interrupted {
            true => Report::default(),
            false => checker::check(&History::read(&history)?),
        };
        report.violations.extend(failed.map(|what| Violation { rule: Rule::Healing, what }));
        Ok(Outcome { report, history, interrupted })
    }

    fn prepare(plan: Plan, history: &Path) -> Result<Run, String> {
        let header = Header {
            command: command_of(&plan),
            seed: plan.seed,
            // Agents and supervisors are not recorded: what they ask for is not known.
            complete: !plan.real,
            confirm_within_ms: CONFIRM_WITHIN_MS,
            available_within_ms: AVAILABLE_WITHIN.as_millis() as u64,
        };
        let recorder = Recorder::create(history, header).map_err(|e| e.to_string())?;
        let recorder = Arc::new(recorder);
        let has = |name: &str| plan.kinds.iter().any(|kind| kind.name == name);
        let mut rng = StdRng::seed_from_u64(plan.seed ^ 0xd15c);
        let forgets = has("forget") || has("torn") || has("slow-disk");
        let small = has("full-disk");
        let kinds: Vec<u32> = (0..plan.nodes).map(|_| rng.random_range(0..3)).collect();
        let disk = |id: u64, at: &Path| match kinds[id as usize - 1] {
            _ if has("lie") => Disk::forgetting(at),
            0 | 1 if forgets => Disk::forgetting(at),
            1 | 2 if small => Disk::small(at),
            _ => Disk::plain(at),
        };
        let flags = flags(&plan, &mut rng);
        let options = Options {
            nodes: plan.nodes,
            binary: plan.binary.clone(),
            flags: flags.clone(),
            faketime: has("clock"),
            proxies: has("slow-link") && rng.random(),
        };
        let mut rig = Rig::prepare(&plan.dir, options, recorder.clone(), disk)?;
        let host = rig.net.host("operator")?;
        host.enter();
        let clients: Result<Vec<_>, _> =
            (0..plan.clients).map(|i| rig.net.host(&format!("client{i}"))).collect();
        if plan.real {
            let endpoints = rig.endpoints();
            let recorder = recorder.clone();
            let site = Site::build(&mut rig.net, &plan.dir, &plan.binary, &endpoints, recorder)?;
            rig.site = Some(site);
        }
        let operator = Caller::new(recorder.clone(), 0, by_tcp(&rig.endpoints()), 0);
        let flags = flags.join(" ");
        recorder.fault(format!("flags of serve: {flags}"));
        Ok(Run { plan, rig, recorder, operator, clients: clients? })
    }

    async fn lead(&mut self) -> Result<(), String> {
        for at in 0..self.rig.nodes.len() {
            self.rig.start(at);
        }
        self.until_available().await?;
        self.begin_work().await?;
        let (stop, stopped) = watch::channel(false);
        let (stop_watching, watched_enough) = watch::channel(false);
        let told = self.watchers(&watched_enough)?;
        let hands = self.clients(&stopped);
        self.torment().await;
        stop.send_replace(true);
        join(hands).await;
        self.heal().await?;
        if let Some(site) = &mut self.rig.site {
            site.stop_instances();
        }
        self.settle_up().await?;
        self.until_told(&told).await;
        stop_watching.send_replace(true);
        join(told.into_iter().map(|(hand, _)| hand).collect()).await;
        Ok(())
    }

    async fn begin_work(&mut self) -> Result<(), String> {
        let seed = self.plan.seed;
        if let Some(site) = &mut self.rig.site {
            (0..site.workers.len()).for_each(|at| site.start_agent(at));
        }
        let names = self.workers();
        for name in &names {
            let worker = workload::workers().into_iter().find(|worker| worker.name == *name);
            match worker {
                Some(worker) => drop(self.insist(Request::Register(worker)).await?),
                None => self.until_registered(name).await?,
            }
        }
        if let Some(site) = &mut self.rig.site {
            site.start_instances(seed);
        }
        Ok(())
    }

    /// All workers of this run.
    fn workers(&self) -> Vec<String> {
        match self.plan.real {
            true => real::names(),
            false => workload::workers().into_iter().map(|worker| worker.name).collect(),
        }
    }

    async fn until_registered(&mut self, name: &str) -> Result<(), String> {
        let began = Instant::now();
        let get = Request::GetWorker(v1::GetWorkerRequest { name: name.into(), read: None });
        while began.elapsed() < AVAILABLE_WITHIN {
            if self.operator.call(get.clone()).await.ok().is_some() {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(format!("no agent registered {name} for {AVAILABLE_WITHIN:?}"))
    }

    fn clients(&self, stopped: &watch::Receiver<bool>) -> Vec<Hand> {
        let workloads = if self.plan.real { REAL_WORKLOADS } else { WORKLOADS };
        let start = |(at, host): (usize, &Host)| {
            let workload = &workloads[at % workloads.len()];
            let (recorder, endpoints) = (self.recorder.clone(), self.rig.endpoints());
            let me = at as u32 + 1;
            let seed = self.plan.seed ^ (u64::from(me) << 32);
            self.recorder
                .fault(format!("processes {me}, 10{me:02}, … are clients: {}", workload.name));
            Hand::start(host.clone(), stopped.clone(), move || {
                one_after_another(workload, recorder, endpoints, me, seed)
            })
        };
        self.clients.iter().enumerate().map(start).collect()
    }

    /// One of everything for each node, and one of the hot worker. Each on a host of its own.
    fn watchers(
        &mut self,
        stopped: &watch::Receiver<bool>,
    ) -> Result<Vec<(Hand, Arc<AtomicU64>)>, String> {
        let mut watchers = Vec::new();
        for number in 0..=self.rig.nodes.len() {
            let host = self.rig.net.host(&format!("watcher{number}"))?;
            let of_hot = number == self.rig.nodes.len();
            let first = self.workers().into_iter().next().unwrap_or_default();
            let worker = if of_hot { first } else { String::new() };
            let (recorder, endpoints) = (self.recorder.clone(), self.rig.endpoints());
            let told = Arc::new(AtomicU64::new(0));
            let watcher = Watcher {
                recorder: recorder.clone(),
                number: number as u32,
                worker,
                told: told.clone(),
            };
            let work = move || watcher.follow(Caller::new(recorder, 0, by_tcp(&endpoints), number));
            watchers.push((Hand::start(host, stopped.clone(), work), told));
        }
        Ok(watchers)
    }

    /// Faults as planned, until the time is over.
    async fn torment(&mut self) {
        let over = Duration::from_secs(self.plan.seconds);
        let mut rng = StdRng::seed_from_u64(self.plan.seed);
        let plan = nemesis::plan(&mut rng, &self.plan.kinds, over);
        let addresses = self.clients.iter().map(|host| host.address).collect();
        let began = Instant::now();
        let mut next = plan.into_iter().peekable();
        let mut ends: Vec<(Duration, End)> = Vec::new();
        while began.elapsed() < over {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = began.elapsed();
            self.rig.look_after();
            if let Some(site) = &mut self.rig.site {
                site.look_after();
            }
            let (due, later): (Vec<_>, _) = ends.into_iter().partition(|(at, _)| *at <= now);
            ends = later;
            due.into_iter().for_each(|(_, end)| end(&mut self.rig));
            if let Some(planned) = next.next_if(|planned| planned.at <= now) {
                let kind = nemesis::by_name(planned.kind).expect("planned from the list");
                let mut rng = StdRng::seed_from_u64(planned.seed);
                let end = kind.begin(&mut self.rig, &mut rng, &addresses);
                ends.extend(end.map(|end| (began.elapsed() + planned.lasts, end)));
            }
        }
        ends.into_iter().for_each(|(_, end)| end(&mut self.rig));
    }

    /// Whatever is down is started, and then all must be available in time.
    async fn heal(&mut self) -> Result<(), String> {
        self.rig.look_after();
        for at in 0..self.rig.nodes.len() {
            self.rig.go_on(at);
            if self.rig.nodes[at].life == Life::Dead {
                self.rig.start(at);
            }
        }
        self.recorder.put(|at| Record::Healed { at });
        nemesis::complete_membership(&mut self.rig)?;
        self.until_available().await?;
        self.recorder.put(|at| Record::Available { at });
        Ok(())
    }

    /// Until a read and a write go through each node. An error only where that takes for ever: that
    /// it takes too long is for the checker to say.
    async fn until_available(&mut self) -> Result<(), String> {
        let began = Instant::now();
        for at in 0..self.rig.nodes.len() {
            let endpoint = self.rig.nodes[at].client();
            loop {
                self.rig.look_after();
                if self.serves(&endpoint).await {
                    break;
                }
                if began.elapsed() > 2 * AVAILABLE_WITHIN {
                    let id = self.rig.nodes[at].id;
                    self.recorder.fault(format!("node {id} does not serve"));
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }

    async fn serves(&self, endpoint: &str) -> bool {
        let one = [endpoint.to_string()];
        let caller = Caller::new(self.recorder.clone(), 0, by_tcp(&one), 0);
        let mut caller = caller.with_timeout(PROBE);
        let grant = Request::GrantLease(v1::GrantRequest { ttl_ms: 1000 });
        let read = Request::List(v1::ListRequest::default());
        caller.call(read).await.ok().is_some() && caller.call(grant).await.ok().is_some()
    }

    /// Calls until it is answered.
    async fn insist(&mut self, request: Request) -> Result<Response, String> {
        let began = Instant::now();
        while began.elapsed() < AVAILABLE_WITHIN {
            match self.operator.call(request.clone()).await {
                crate::caller::Ended::Ok(response) => return Ok(response),
                crate::caller::Ended::Refused(status) => {
                    return Err(format!("{request:?}: {status}"));
                }
                crate::caller::Ended::Lost => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        Err(format!("{request:?}: nobody answered for {AVAILABLE_WITHIN:?}"))
    }

    /// All that is held is given back; before and after, the copies of all nodes are compared.
    async fn settle_up(&mut self) -> Result<(), String> {
        self.compare_copies().await?;
        // What is on a lease or unconfirmed goes by itself, where there are agents on evidence; what
        // is left is released.
        let began = Instant::now();
        let patience = if self.plan.real { EVIDENCE_WITHIN } else { Duration::from_millis(3_500) };
        while began.elapsed() < patience && !self.table().await?.allocations.is_empty() {
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        if self.plan.real {
            self.recorder.put(|at| Record::Emptied { at });
        }
        for held in self.table().await?.allocations {
            let authority = Some(v1::release_request::Authority::Token(held.token));
            let release = v1::ReleaseRequest { name: held.name, authority };
            self.insist(Request::Release(release)).await?;
        }
        self.recorder.put(|at| Record::Emptied { at });
        self.table().await?;
        for name in self.workers() {
            let get = v1::GetWorkerRequest { name, read: None };
            self.insist(Request::GetWorker(get)).await?;
        }
        self.compare_copies().await
    }

    async fn table(&mut self) -> Result<v1::ListResponse, String> {
        let list = v1::ListRequest { page_size: 10_000, ..Default::default() };
        match self.insist(Request::List(list)).await? {
            Response::List(list) => Ok(list),
            other => Err(format!("a list, and not {other:?}")),
        }
    }

    /// Asks each node for its own copy, from the revision on that the table has now.
    async fn compare_copies(&mut self) -> Result<(), String> {
        let min_revision = self.table().await?.revision;
        for at in 0..self.rig.nodes.len() {
            let endpoint = [self.rig.nodes[at].client()];
            let mut caller = Caller::new(self.recorder.clone(), 0, by_tcp(&endpoint), 0);
            let read = Some(v1::ReadOptions { stale: true, min_revision });
            let list = v1::ListRequest { read, page_size: 10_000, ..Default::default() };
            let Some(Response::List(list)) = caller.call(Request::List(list)).await.ok() else {
                continue;
            };
            let bytes = serde_json::to_vec(&list.allocations).map_err(|e| e.to_string())?;
            let digest: String =
                Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
            let (node, revision) = (self.rig.nodes[at].id, list.revision);
            self.recorder.put(|at| Record::Copy { at, node, revision, digest });
        }
        Ok(())
    }

    /// Until every watcher was told all that there is; not for ever.
    async fn until_told(&mut self, watchers: &[(Hand, Arc<AtomicU64>)]) {
        let Ok(table) = self.table().await else { return };
        let began = Instant::now();
        let behind =
            || watchers.iter().any(|(_, told)| told.load(Ordering::Acquire) < table.revision);
        while behind() && began.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// A client that crashes now and then, in the middle of whatever it is at; another one takes its place.
async fn one_after_another(
    workload: &Workload,
    recorder: Arc<Recorder>,
    endpoints: Vec<String>,
    me: u32,
    seed: u64,
) {
    for life in 0.. {
        let mut rng = StdRng::seed_from_u64(seed ^ u64::from(life));
        let lives = Duration::from_millis(rng.random_range(2_000..20_000));
        let actor = Actor::new(recorder.clone(), me + 1000 * life, by_tcp(&endpoints), rng);
        let _ = tokio::time::timeout(lives, workload.run(actor, 1)).await; // a crash
    }
}

/// What every node is told beside its addresses.
fn flags(plan: &Plan, rng: &mut StdRng) -> Vec<String> {
    let snapshots = ["50", "400", "20000"][rng.random_range(0..3)];
    let mut flags =
        vec!["--quarantine", QUARANTINE, "--snapshot-every", snapshots, "--low-space", "12MiB"];
    if plan.real {
        flags.extend(["--zombie-after", "4s", "--worker-lost-after", "4s"]);
    }
    flags.into_iter().map(String::from).collect()
}

async fn join(hands: Vec<Hand>) {
    let joined =
        tokio::task::spawn_blocking(move || hands.into_iter().all(|hand| hand.0.join().is_ok()));
    assert!(joined.await.unwrap_or(false), "a client panicked");
}

async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => drop(terminate.recv().await),
        Err(_) => std::future::pending().await,
    }
}

/// The command that runs the same plan.
pub fn command_of(plan: &Plan) -> String {
    let kinds: Vec<_> = plan.kinds.iter().map(|kind| kind.name).collect();
    format!(
        "scripts/faults --seconds {} --seed {} --nodes {} --clients {} --nemesis {}{}",
        plan.seconds,
        plan.seed,
        plan.nodes,
        plan.clients,
        kinds.join(","),
        if plan.real { " --real" } else { "" }
    )
}

/// What happened to one node and to all, as text: kept beside the history.
pub fn write_timelines(history: &Path) -> Result<(), String> {
    let read = History::read(history)?;
    let faults = read.records.iter().filter_map(|record| match record {
        Record::Fault { at, what } => Some((*at, what.clone())),
        Record::Ended { at, node, code } => {
            Some((*at, format!("node {node} ended by itself ({code})")))
        }
        Record::Healed { at } => Some((*at, "nothing more is done to it".into())),
        Record::Available { at } => Some((*at, "available".into())),
        Record::Emptied { at } => Some((*at, "everything was given back".into())),
        _ => None,
    });
    let lines = faults.map(|(at, what)| format!("{:>9.3} s  {what}\n", at as f64 / 1e9));
    let timeline = history.with_file_name("timeline.txt");
    std::fs::write(timeline, lines.collect::<String>()).map_err(|e| e.to_string())
}

/// Does what is needed for namespaces and mounts exist here?
pub fn can_run() -> Result<(), String> {
    // SAFETY: a system call without arguments.
    if unsafe { libc::geteuid() } != 0 {
        return Err("network namespaces and mounts need root".into());
    }
    for (tool, package) in [("ip", "iproute2"), ("nft", "nftables")] {
        let runs = Command::new(tool)
            .arg("-V")
            .output()
            .or_else(|_| Command::new(tool).arg("-v").output());
        runs.map_err(|_| format!("{tool} is missing: install {package}"))?;
    }
    Ok(())
}
