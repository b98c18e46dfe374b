//! What clients do while faults go on. A [`Workload`] is a name and a round: one small story, told
//! over and over until the run ends. To add one is to add a line to [`WORKLOADS`] and its round.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use portwarden::api::meaning::{Request, Response};
use portwarden::proto::v1;
use rand::Rng as _;
use rand::rngs::StdRng;
use tokio::time::sleep;

use crate::caller::{Caller, Ended, Endpoints, LibraryCaller};
use crate::history::Recorder;

/// The worker that everybody wants, of few ports.
pub const HOT: &str = "hot";
const HOT_PORTS: u32 = 24;
/// Workers with more ports and with GPUs, found by selector.
const MANY: usize = 6;
const GPU_BYTES: u64 = 24 << 30;
/// Names that several clients fight for.
const SHARED_NAMES: u32 = 12;
/// Workers with an agent, in runs that have them.
pub const REAL_WORKERS: [&str; 2] = ["real0", "real1"];

pub struct Workload {
    pub name: &'static str,
    round: for<'a> fn(&'a mut Actor) -> Pin<Box<dyn Future<Output = ()> + 'a>>,
    /// From one round to the next, at most.
    pause: Duration,
}

/// One client with its work.
pub struct Actor {
    caller: Caller,
    library: LibraryCaller,
    rng: StdRng,
    me: u32,
    rounds: u32,
}

/// One after the other for each client, from the first again when there are more clients.
pub const WORKLOADS: &[Workload] = &[
    Workload { name: "hot", round: |a| Box::pin(hot(a)), pause: Duration::from_millis(6) },
    Workload { name: "many", round: |a| Box::pin(many(a)), pause: Duration::from_millis(10) },
    Workload { name: "gangs", round: |a| Box::pin(gangs(a)), pause: Duration::from_millis(20) },
    Workload { name: "leases", round: |a| Box::pin(leases(a)), pause: Duration::from_millis(20) },
    Workload { name: "readers", round: |a| Box::pin(readers(a)), pause: Duration::from_millis(10) },
    Workload { name: "hot", round: |a| Box::pin(hot(a)), pause: Duration::from_millis(6) },
    Workload {
        name: "conflicts",
        round: |a| Box::pin(conflicts(a)),
        pause: Duration::from_millis(20),
    },
    Workload { name: "library", round: |a| Box::pin(library(a)), pause: Duration::from_millis(10) },
    Workload {
        name: "operators",
        round: |a| Box::pin(operators(a)),
        pause: Duration::from_millis(300),
    },
    Workload {
        name: "unconfirmed",
        round: |a| Box::pin(unconfirmed(a)),
        pause: Duration::from_millis(60),
    },
];

/// The same for runs with real workers.
pub const REAL_WORKLOADS: &[Workload] = &[
    Workload { name: "sights", round: |a| Box::pin(sights(a)), pause: Duration::from_millis(25) },
    Workload { name: "paper", round: |a| Box::pin(paper(a)), pause: Duration::from_secs(6) },
    Workload {
        name: "real-operators",
        round: |a| Box::pin(real_operators(a)),
        pause: Duration::from_millis(1_500),
    },
];

impl Workload {
    /// Never ends: who wants no more drops it, at whatever it is at. Pauses are so many times as long.
    pub async fn run(&self, mut actor: Actor, pace: u32) {
        loop {
            (self.round)(&mut actor).await;
            actor.rounds += 1;
            let pause = actor.rng.random_range(Duration::ZERO..self.pause * pace);
            sleep(pause).await;
        }
    }
}

impl Actor {
    pub fn new(recorder: Arc<Recorder>, me: u32, endpoints: Endpoints, rng: StdRng) -> Actor {
        let mut rng = rng;
        let library = LibraryCaller::new(recorder.clone(), me, endpoints.clone(), rng.random());
        let caller = Caller::new(recorder, me, endpoints, me as usize);
        Actor { caller, library, rng, me, rounds: 0 }
    }

    fn own_name(&self) -> String {
        format!("c{}-{}", self.me, self.rounds)
    }

    fn uid(&mut self) -> String {
        format!("{:016x}", self.rng.random::<u64>())
    }

    async fn call(&mut self, request: Request) -> Ended {
        let ended = self.caller.call(request).await;
        if let Ended::Lost = ended {
            sleep(Duration::from_millis(50)).await;
        }
        ended
    }

    /// What was granted, if it was.
    async fn allocate(&mut self, claims: Vec<v1::Claim>) -> Vec<v1::Allocation> {
        let request = v1::AllocateRequest { claims, dry_run: false };
        match self.call(Request::Allocate(request)).await.ok() {
            Some(Response::Allocate(r)) => r.allocations,
            _ => Vec::new(),
        }
    }

    async fn release(&mut self, held: &v1::Allocation) {
        self.call(release(held)).await;
    }

    async fn confirm(&mut self, held: &v1::Allocation, lease: u64) -> Ended {
        let version = if self.rng.random() { held.version } else { 0 };
        let (name, token) = (held.name.clone(), held.token);
        let request = v1::ConfirmRequest { name, token, version, lease, liveness: None };
        self.call(Request::Confirm(request)).await
    }
}

fn release(held: &v1::Allocation) -> Request {
    let authority = Some(v1::release_request::Authority::Token(held.token));
    Request::Release(v1::ReleaseRequest { name: held.name.clone(), authority })
}

fn counted(count: u32) -> v1::PortRequest {
    let ports = Some(v1::port_request::Ports::Count(count));
    v1::PortRequest { ports, ..Default::default() }
}

fn on_hot(name: String, uid: String) -> v1::Claim {
    v1::Claim {
        name,
        uid,
        placement: Some(v1::claim::Placement::Worker(HOT.into())),
        ports: vec![counted(1)],
        bound: true,
        ..Default::default()
    }
}

fn selected(name: String, uid: String, rng: &mut StdRng) -> v1::Claim {
    let policy = if rng.random() { v1::Policy::Binpack } else { v1::Policy::Spread };
    let selector = if rng.random() { "kind=many" } else { "" }.into();
    let select = v1::Selection { selector, policy: policy.into() };
    let ports = match rng.random_range(0..4) {
        0 => v1::port_request::Ports::Contiguous(rng.random_range(2..5)),
        n => v1::port_request::Ports::Count(n),
    };
    let ports = v1::PortRequest { ports: Some(ports), ..Default::default() };
    let share = match rng.random_range(0..4) {
        0 => v1::gpu_request::Share::Exclusive(true),
        n => v1::gpu_request::Share::MemoryBytes(n * (5 << 30)),
    };
    let gpus = v1::GpuRequest { count: 1, share: Some(share), ..Default::default() };
    v1::Claim {
        name,
        uid,
        placement: Some(v1::claim::Placement::Select(select)),
        ports: vec![ports],
        gpus: rng.random_bool(0.6).then_some(gpus),
        bound: rng.random_bool(0.7),
        labels: [("round".to_string(), "x".to_string())].into(),
        ..Default::default()
    }
}

/// The workers that the workloads need: none has an agent.
pub fn workers() -> Vec<v1::RegisterRequest> {
    let range = |last| v1::PortRange { name: "service".into(), first: 40_000, last };
    let spec = |last, gpus| v1::WorkerSpec {
        address: "198.18.0.1".into(),
        labels: [("kind".to_string(), if gpus > 0 { "many" } else { "hot" }.to_string())].into(),
        ranges: vec![range(last)],
        reserved: vec![40_003],
        gpus: (0..gpus)
            .map(|index| v1::GpuSpec { index, memory_bytes: GPU_BYTES, ..Default::default() })
            .collect(),
        identity: None,
    };
    let hot = (HOT.to_string(), spec(40_000 + HOT_PORTS, 0));
    let many = (0..MANY).map(|i| (format!("m{i}"), spec(40_060, 2)));
    std::iter::once(hot)
        .chain(many)
        .map(|(name, spec)| v1::RegisterRequest { name, spec: Some(spec) })
        .collect()
}

/// Rivals for few ports, and for few names.
async fn hot(a: &mut Actor) {
    let shared = a.rng.random_bool(0.4);
    let name = match shared {
        true => format!("shared{}", a.rng.random_range(0..SHARED_NAMES)),
        false => a.own_name(),
    };
    let claim = on_hot(name, a.uid());
    let mut granted = a.allocate(vec![claim.clone()]).await;
    if granted.is_empty() && a.rng.random() {
        granted = a.allocate(vec![claim]).await; // the same start attempt again
    }
    let Some(held) = granted.pop() else { return };
    if a.rng.random_bool(0.2) {
        let wrong = v1::Allocation { token: held.token - 1, ..held.clone() };
        a.release(&wrong).await;
    }
    sleep(a.rng.random_range(Duration::ZERO..Duration::from_millis(40))).await;
    a.release(&held).await;
    if a.rng.random_bool(0.1) {
        a.release(&held).await;
    }
}

async fn many(a: &mut Actor) {
    let (name, uid) = (a.own_name(), a.uid());
    let claim = selected(name, uid, &mut a.rng);
    let Some(held) = a.allocate(vec![claim]).await.pop() else { return };
    if held.phase == i32::from(v1::Phase::Reserved) {
        a.confirm(&held, 0).await;
    }
    sleep(a.rng.random_range(Duration::ZERO..Duration::from_millis(100))).await;
    a.release(&held).await;
}

async fn gangs(a: &mut Actor) {
    let count = a.rng.random_range(2..6);
    let claims = (0..count).map(|i| {
        let (name, uid) = (format!("{}-{i}", a.own_name()), a.uid());
        match a.rng.random_bool(0.3) {
            true => on_hot(name, uid),
            false => selected(name, uid, &mut a.rng),
        }
    });
    let claims: Vec<_> = claims.collect();
    let mut granted = a.allocate(claims.clone()).await;
    if granted.is_empty() {
        granted = a.allocate(claims).await;
    }
    for held in granted {
        a.release(&held).await;
    }
}

/// Leases of one to three seconds: kept alive for a while, given over, revoked or left to expire.
async fn leases(a: &mut Actor) {
    let Some(lease) = grant_lease(a).await else { return };
    let (name, uid) = (a.own_name(), a.uid());
    let mut claim = selected(name, uid, &mut a.rng);
    claim.lease = lease;
    let held = a.allocate(vec![claim]).await.pop();
    let keep = Request::KeepAlive(v1::KeepAliveRequest { id: lease });
    for _ in 0..a.rng.random_range(0..4) {
        sleep(a.rng.random_range(Duration::from_millis(10)..Duration::from_millis(600))).await;
        a.call(keep.clone()).await;
        a.call(Request::GetLease(v1::GetLeaseRequest { id: lease, read: None })).await;
    }
    let Some(held) = held else { return };
    match a.rng.random_range(0..5) {
        0 => {
            a.call(Request::RevokeLease(v1::RevokeRequest { id: lease })).await;
        }
        1 => {
            let Some(next) = grant_lease(a).await else { return };
            let (name, token) = (held.name.clone(), held.token);
            let request = v1::AttachRequest { name, token, version: 0, lease: next };
            a.call(Request::Attach(request)).await;
            a.call(Request::RevokeLease(v1::RevokeRequest { id: lease })).await;
        }
        2 => {
            let Some(next) = grant_lease(a).await else { return };
            a.confirm(&held, next).await;
        }
        3 => {} // it expires
        _ => a.release(&held).await,
    }
    a.call(Request::Get(v1::GetRequest { name: held.name.clone(), read: None })).await;
}

async fn grant_lease(a: &mut Actor) -> Option<u64> {
    let ttl_ms = a.rng.random_range(1_000..3_000);
    match a.call(Request::GrantLease(v1::GrantRequest { ttl_ms })).await.ok()? {
        Response::GrantLease(r) => r.lease.map(|lease| lease.id),
        _ => None,
    }
}

/// Starts that find their port taken, again and again.
async fn conflicts(a: &mut Actor) {
    let (name, uid) = (a.own_name(), a.uid());
    let claim = v1::Claim { bound: false, ..selected(name, uid, &mut a.rng) };
    let Some(mut held) = a.allocate(vec![claim]).await.pop() else { return };
    for _ in 0..a.rng.random_range(0..4) {
        let Some(port) = held.ports.first().map(|port| port.number) else { break };
        let version = if a.rng.random() { held.version } else { 0 };
        let (name, token) = (held.name.clone(), held.token);
        let request = v1::ReportConflictRequest { name, token, version, port };
        let request = Request::ReportConflict(request);
        let mut ended = a.call(request.clone()).await;
        if matches!(ended, Ended::Lost) || a.rng.random_bool(0.2) {
            ended = a.call(request).await; // the last swap is remembered
        }
        match ended.ok() {
            Some(Response::ReportConflict(r)) if !r.reclaimed => {
                held = r.allocation.unwrap_or(held);
            }
            _ => break,
        }
    }
    a.confirm(&held, 0).await;
    a.release(&held).await;
}

/// Starts that are never confirmed: a deadline ends them.
async fn unconfirmed(a: &mut Actor) {
    let (name, uid) = (a.own_name(), a.uid());
    let confirm_within_ms = a.rng.random_range(1_000..2_500);
    let claim = v1::Claim { bound: false, confirm_within_ms, ..selected(name, uid, &mut a.rng) };
    let Some(held) = a.allocate(vec![claim]).await.pop() else { return };
    if a.rng.random_bool(0.3) {
        // Races with its deadline.
        sleep(Duration::from_millis(confirm_within_ms)).await;
        a.confirm(&held, 0).await;
        a.release(&held).await;
    }
}

async fn readers(a: &mut Actor) {
    let stale = v1::ReadOptions { stale: true, min_revision: 0 };
    let read = a.rng.random_bool(0.4).then_some(stale);
    let name = format!("shared{}", a.rng.random_range(0..SHARED_NAMES));
    let request = match a.rng.random_range(0..8) {
        0 => Request::List(v1::ListRequest { read, page_size: 10_000, ..Default::default() }),
        1 => {
            let worker = HOT.into();
            Request::List(v1::ListRequest { read, worker, page_size: 10_000, ..Default::default() })
        }
        2 => Request::GetWorker(v1::GetWorkerRequest { name: HOT.into(), read }),
        _ => Request::Get(v1::GetRequest { name, read }),
    };
    a.call(request).await;
    if a.rng.random_bool(0.05) {
        a.caller.go_elsewhere();
    }
}

async fn operators(a: &mut Actor) {
    let worker = match a.rng.random_range(0..=MANY) {
        MANY => HOT.to_string(),
        i => format!("m{i}"),
    };
    match a.rng.random_range(0..4) {
        0 => {
            for phase in [v1::WorkerPhase::Cordoned, v1::WorkerPhase::Ready] {
                let (name, phase) = (worker.clone(), phase.into());
                a.call(Request::SetPhase(v1::SetPhaseRequest { name, phase })).await;
            }
        }
        1 => {
            let ports = vec![a.rng.random_range(40_000..40_020)];
            let (worker, reason) = (worker, "an operator".to_string());
            let quarantine =
                v1::QuarantineRequest { worker: worker.clone(), ports: ports.clone(), reason };
            a.call(Request::Quarantine(quarantine)).await;
            a.call(Request::LiftQuarantine(v1::LiftQuarantineRequest { worker, ports })).await;
        }
        2 => lift_all(a, worker).await,
        _ => {
            let name = format!("shared{}", a.rng.random_range(0..SHARED_NAMES));
            let force = v1::Force { reason: "an operator".into() };
            let authority = Some(v1::release_request::Authority::Force(force));
            a.call(Request::Release(v1::ReleaseRequest { name, authority })).await;
        }
    }
}

/// So that conflicts do not use up all ports.
async fn lift_all(a: &mut Actor, worker: String) {
    let get = v1::GetWorkerRequest { name: worker.clone(), read: None };
    let Some(Response::GetWorker(r)) = a.call(Request::GetWorker(get)).await.ok() else { return };
    let ranges = r.worker.into_iter().flat_map(|worker| worker.ranges);
    let ports: Vec<_> = ranges.flat_map(|range| range.quarantined).map(|p| p.number).collect();
    if !ports.is_empty() {
        a.call(Request::LiftQuarantine(v1::LiftQuarantineRequest { worker, ports })).await;
    }
}

/// The client library does its own retries.
async fn library(a: &mut Actor) {
    let shared = format!("shared{}", a.rng.random_range(0..SHARED_NAMES));
    let name = if a.rng.random_bool(0.3) { shared } else { a.own_name() };
    let claim = v1::Claim { bound: a.rng.random(), ..on_hot(name.clone(), a.uid()) };
    let request = v1::AllocateRequest { claims: vec![claim], dry_run: false };
    let granted = a.library.call(Request::Allocate(request)).await.ok();
    a.library.call(Request::Get(v1::GetRequest { name, read: None })).await;
    let Some(Response::Allocate(r)) = granted else { return };
    for held in &r.allocations {
        let (name, token, version) = (held.name.clone(), held.token, held.version);
        let confirm = v1::ConfirmRequest { name, token, version, ..Default::default() };
        a.library.call(Request::Confirm(confirm)).await;
        a.library.call(release(held)).await;
    }
}

// On real workers.

/// Looks at everything that is held: from two looks it is certain what was held between them.
async fn sights(a: &mut Actor) {
    a.call(Request::List(v1::ListRequest { page_size: 10_000, ..Default::default() })).await;
}

/// Until then, what was never confirmed is not judged by an agent: ports would soon be used up.
const PAPER_CONFIRM_WITHIN_MS: u64 = 5_000;

/// Holds a port of a real worker on a lease, and uses it for nothing: an agent must find that out.
async fn paper(a: &mut Actor) {
    let Some(lease) = grant_lease(a).await else { return };
    let worker = REAL_WORKERS[a.rng.random_range(0..REAL_WORKERS.len())].to_string();
    let claim = v1::Claim {
        placement: Some(v1::claim::Placement::Worker(worker)),
        lease,
        bound: a.rng.random(),
        confirm_within_ms: PAPER_CONFIRM_WITHIN_MS,
        ..on_hot(a.own_name(), a.uid())
    };
    let Some(held) = a.allocate(vec![claim]).await.pop() else { return };
    if a.rng.random_bool(0.3) {
        a.release(&held).await;
    }
}

async fn real_operators(a: &mut Actor) {
    let name = REAL_WORKERS[a.rng.random_range(0..REAL_WORKERS.len())].to_string();
    match a.rng.random_range(0..4) {
        0 => {
            for phase in [v1::WorkerPhase::Cordoned, v1::WorkerPhase::Ready] {
                let (name, phase) = (name.clone(), phase.into());
                a.call(Request::SetPhase(v1::SetPhaseRequest { name, phase })).await;
            }
        }
        1 => lift_all(a, name).await,
        _ => {
            a.call(Request::GetWorker(v1::GetWorkerRequest { name, read: None })).await;
        }
    }
}
