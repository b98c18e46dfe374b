//! A machine with instances on it, and what its kernel knows: who really listens where.
//!
//! An instance is a process in the [`Kernel`]; whoever starts it ([`Starter`]) does what `portwarden
//! run` does: allocate, probe, start, confirm, keep the lease, stop, release. Some die unseen, some
//! live on when nobody looks after them any more. Where the machine has an agent, that is the real
//! one, which looks at this kernel as it would at Linux; where it has none, an instance is stopped
//! when its lease cannot be relied on any more.
//!
//! From the moment at which its confirmation was acknowledged until it has ended, an instance's ports
//! are its own: whoever is given one of them meanwhile finds it in use, and the run is over.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use portwarden::agent::host::sockets::{Socket, State};
use portwarden::agent::host::{Host, Seen, Wanted};
use portwarden::agent::{Agent, LocalPorts, Process, Told};
use portwarden::api::meaning::{Request, Response};
use portwarden::client::{Client, Clock, Holding, Keeper, Options, Standing};
use portwarden::proto::v1;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::{Instant, sleep, timeout};

use crate::caller::{Caller, Ended, Endpoints};
use crate::history::{Record, Recorder};
use crate::world::HostId;

const FIRST_PORT: u32 = 41_000;
const PORTS: u32 = 24;
/// How an agent ends that finds its worker named by another boot: a call may come late, and its
/// service is started again.
pub const TAKEN: &str = "another agent has made worker";
const AGENT_INTERVAL: Duration = Duration::from_millis(700);

/// The hosts of one machine: its agent and its instances fail apart.
#[derive(Clone)]
pub struct Site {
    pub worker: String,
    pub kernel: Kernel,
    pub agent: Option<HostId>,
    pub starter: HostId,
    /// It was rebooted, and the table does not know yet: nothing is started on it before.
    pub booting: bool,
}

impl Site {
    pub fn spec(&self) -> v1::WorkerSpec {
        let last = FIRST_PORT + PORTS - 1;
        v1::WorkerSpec {
            address: "192.0.2.1".into(),
            ranges: vec![v1::PortRange { name: "service".into(), first: FIRST_PORT, last }],
            identity: self.agent.map(|_| self.kernel.own_identity()),
            ..Default::default()
        }
    }

    /// Processes whose time is over end. What must not be has been seen by then.
    pub fn look_after(&self, now: Duration) -> Result<(), String> {
        self.kernel.look_after(now)
    }
}

/// What runs on a machine. Clones are the same one.
#[derive(Clone)]
pub struct Kernel(Arc<Mutex<Machine>>);

struct Machine {
    worker: String,
    boot: u32,
    next_pid: u32,
    now: Duration,
    processes: BTreeMap<u32, Running>,
    recorder: Arc<Recorder>,
    broken: Option<String>,
}

/// A process with its sockets.
struct Running {
    start_ticks: u64,
    ports: Vec<u16>,
    /// `None`: it has nothing to do with portwarden.
    of: Option<(String, u64)>,
    /// Its confirmation was acknowledged.
    confirmed: bool,
    ends: Option<Duration>,
}

impl Kernel {
    pub fn new(worker: &str, recorder: Arc<Recorder>) -> Kernel {
        Kernel(Arc::new(Mutex::new(Machine {
            worker: worker.into(),
            boot: 1,
            next_pid: 100,
            now: Duration::ZERO,
            processes: BTreeMap::new(),
            recorder,
            broken: None,
        })))
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn own_identity(&self) -> v1::Identity {
        let machine = self.machine();
        v1::Identity {
            machine_id: format!("machine-{}", machine.worker),
            boot_id: format!("boot-{}", machine.boot),
            namespace: 4_026_531_840,
        }
    }

    fn look_after(&self, now: Duration) -> Result<(), String> {
        let mut machine = self.machine();
        machine.now = now;
        let due = |(pid, process): (&u32, &Running)| {
            process.ends.is_some_and(|ends| ends <= now).then_some(*pid)
        };
        let due: Vec<u32> = machine.processes.iter().filter_map(due).collect();
        due.into_iter().for_each(|pid| machine.end(pid));
        machine.broken.take().map_or(Ok(()), Err)
    }

    /// All processes are gone, and another boot begins.
    pub fn reboot(&self) {
        self.end_all();
        self.machine().boot += 1;
    }

    pub fn end_all(&self) {
        let mut machine = self.machine();
        let all: Vec<u32> = machine.processes.keys().copied().collect();
        all.into_iter().for_each(|pid| machine.end(pid));
    }

    /// The first of these ports that is in use. By an instance that is confirmed it must not be: no
    /// port is given twice.
    fn in_use(&self, held: &v1::Allocation) -> Option<u32> {
        let mut machine = self.machine();
        let own = (held.name.as_str(), held.token);
        for port in &held.ports {
            let Some(user) = machine.user(port.number as u16) else { continue };
            if user.of.as_ref().is_some_and(|(name, token)| (name.as_str(), *token) == own) {
                continue;
            }
            if let (true, Some((name, token))) = (user.confirmed, user.of.clone()) {
                let worker = machine.worker.clone();
                machine.broken = Some(format!(
                    "given twice: {} (token {}) was given port {} of {worker}, on which {name} \
                     (token {token}) listens, which is confirmed",
                    held.name, held.token, port.number
                ));
            }
            return Some(port.number);
        }
        None
    }

    /// What the system took must have ended: an agent saw it go, or its holder gave up its lease.
    pub fn is_over(&self, reclaimed: &v1::Allocation) -> Result<(), String> {
        let machine = self.machine();
        let own = (reclaimed.name.clone(), reclaimed.token);
        let runs = |p: &Running| p.confirmed && p.of.as_ref() == Some(&own);
        match machine.worker == reclaimed.worker && machine.processes.values().any(runs) {
            true => Err(format!(
                "reclaimed while it runs: {} (token {}) of {} on ports {:?}",
                own.0, own.1, machine.worker, reclaimed.ports
            )),
            false => Ok(()),
        }
    }

    fn start(&self, ports: Vec<u16>, of: Option<(String, u64)>, lives: Option<Duration>) -> u32 {
        let mut machine = self.machine();
        machine.next_pid += 1;
        let pid = machine.next_pid;
        let start_ticks = machine.now.as_millis() as u64 / 10;
        let ends = lives.map(|lives| machine.now + lives);
        machine.processes.insert(pid, Running { start_ticks, ports, of, confirmed: false, ends });
        pid
    }

    fn liveness(&self, pid: u32) -> Option<v1::Liveness> {
        let boot_id = self.own_identity().boot_id;
        let start_ticks = self.machine().processes.get(&pid)?.start_ticks;
        let handle = v1::liveness::Handle::Process(v1::Process { pid, start_ticks });
        Some(v1::Liveness { boot_id, handle: Some(handle) })
    }

    /// It is known to the cluster from here on.
    fn confirmed(&self, pid: u32) {
        let mut machine = self.machine();
        let Machine { processes, recorder, worker, .. } = &mut *machine;
        let Some(process) = processes.get_mut(&pid) else { return };
        process.confirmed = true;
        let Some((name, token)) = process.of.clone() else { return };
        for port in &process.ports {
            let (name, worker, port) = (name.clone(), worker.clone(), u32::from(*port));
            recorder.put(|at| Record::Listens { at, name, token, worker, port });
        }
    }

    fn end(&self, pid: u32) {
        self.machine().end(pid);
    }

    /// It will end by itself.
    fn ends_in(&self, pid: u32, lives: Duration) {
        let mut machine = self.machine();
        let ends = machine.now + lives;
        if let Some(process) = machine.processes.get_mut(&pid) {
            process.ends = Some(ends);
        }
    }

    /// Nobody looks after what runs there any more.
    pub fn all_end_in(&self, lives: Duration) {
        let mut machine = self.machine();
        let ends = machine.now + lives;
        machine.processes.values_mut().for_each(|process| process.ends = Some(ends));
    }

    fn runs(&self, pid: u32) -> bool {
        self.machine().processes.contains_key(&pid)
    }
}

impl Machine {
    fn user(&self, port: u16) -> Option<&Running> {
        self.processes.values().find(|process| process.ports.contains(&port))
    }

    fn end(&mut self, pid: u32) {
        let Some(process) = self.processes.remove(&pid) else { return };
        let Some((name, token)) = process.of.filter(|_| process.confirmed) else { return };
        for port in process.ports {
            let (name, worker, port) = (name.clone(), self.worker.clone(), u32::from(port));
            self.recorder.put(|at| Record::Closed { at, name, token, worker, port });
        }
    }
}

impl Host for Kernel {
    fn identity(&self) -> io::Result<v1::Identity> {
        Ok(self.own_identity())
    }

    fn local_ports(&self) -> io::Result<LocalPorts> {
        Ok(LocalPorts { first: 32_768, last: 39_999, reserved: Vec::new() })
    }

    fn gpus(&self) -> Result<Vec<v1::GpuSpec>, String> {
        Ok(Vec::new())
    }

    fn blind_spots(&self) -> Vec<String> {
        Vec::new()
    }

    fn look(&self, wanted: &Wanted) -> io::Result<Seen> {
        let machine = self.machine();
        let is_wanted = |port: &u16| wanted.ports.iter().any(|ports| ports.contains(port));
        let sockets = machine.processes.iter().flat_map(|(pid, process)| {
            let ports = process.ports.iter().filter(|port| is_wanted(port));
            ports.map(|port| {
                let (state, inode) = (State::Listening, u64::from(*pid) << 16 | u64::from(*port));
                (Socket { port: *port, state, udp: false, inode }, BTreeSet::from([*pid]))
            })
        });
        let alive = |handle: &v1::liveness::Handle| match handle {
            v1::liveness::Handle::Process(v1::Process { pid, start_ticks }) => {
                let process = machine.processes.get(pid);
                Some(process.is_some_and(|process| process.start_ticks == *start_ticks))
            }
            _ => None,
        };
        let shown = |(pid, process): (&u32, &Running)| Process {
            pid: *pid,
            group: *pid,
            session: *pid,
            start_ticks: process.start_ticks,
            ..Process::default()
        };
        Ok(Seen {
            sockets: sockets.collect(),
            alive: wanted.handles.iter().map(alive).collect(),
            processes: machine.processes.iter().map(shown).collect(),
            gpus: Vec::new(),
            gpu_trouble: None,
        })
    }
}

/// The agent of a machine, until it has nothing more to do.
pub async fn agent(kernel: Kernel, worker: String, endpoints: Endpoints, seed: u64) -> String {
    let options = Options { seed: Some(seed), ..Options::default() };
    let client = Client::over(endpoints, options).expect("there are endpoints");
    let agent = Agent::new(client, Arc::new(kernel), worker, AGENT_INTERVAL, Told::default());
    match agent.expect("the kernel knows its identity").run(std::future::pending()).await {
        Ok(()) => "it has stopped".into(),
        Err(error) => error.to_string(),
    }
}

/// Who starts instances on a machine, one after the other.
pub struct Starter {
    pub kernel: Kernel,
    pub worker: String,
    pub has_agent: bool,
    pub caller: Caller,
    pub keeper: Keeper,
    pub rng: StdRng,
    pub me: u32,
    pub rounds: u32,
}

impl Starter {
    pub fn new(
        site: &Site,
        recorder: Arc<Recorder>,
        endpoints: Endpoints,
        me: u32,
        seed: u64,
    ) -> Starter {
        let began = Instant::now();
        let clock: Clock = Arc::new(move || began.elapsed());
        let options = Options { seed: Some(seed), ..Options::default() };
        let client = Client::over(endpoints.clone(), options).expect("there are endpoints");
        let caller = Caller::new(recorder, me, endpoints, me as usize);
        Starter {
            kernel: site.kernel.clone(),
            worker: site.worker.clone(),
            has_agent: site.agent.is_some(),
            caller: caller.with_timeout(Duration::from_secs(2)),
            keeper: Keeper::start_with(client, clock),
            rng: StdRng::seed_from_u64(seed),
            me,
            rounds: 0,
        }
    }

    /// Never ends.
    pub async fn work(mut self) {
        loop {
            self.rounds += 1;
            self.instance().await;
            self.pause(50, 600).await;
        }
    }

    async fn pause(&mut self, least_ms: u64, most_ms: u64) {
        let span = Duration::from_millis(self.rng.random_range(least_ms..most_ms));
        sleep(span).await;
    }

    /// Calls again while nobody answers.
    async fn insist(&mut self, request: Request, tries: u32) -> Option<Result<Response, ()>> {
        for _ in 0..tries {
            match self.caller.call(request.clone()).await {
                Ended::Ok(response) => return Some(Ok(response)),
                Ended::Refused(_) => return Some(Err(())),
                Ended::Lost => sleep(Duration::from_millis(150)).await,
            }
        }
        None
    }

    async fn lease(&mut self) -> Option<Holding> {
        let ttl_ms = self.rng.random_range(2_000..5_000);
        let granted = self.caller.call(Request::GrantLease(v1::GrantRequest { ttl_ms })).await;
        let Some(Response::GrantLease(v1::GrantResponse { lease: Some(lease), .. })) = granted.ok()
        else {
            return None;
        };
        let mut holding = self.keeper.keep(&lease);
        let _ = timeout(Duration::from_secs(2), holding.changed()).await;
        Some(holding)
    }

    fn claim(&mut self, lease: u64) -> v1::Claim {
        let ports = match self.rng.random_range(0..5) {
            0 => v1::port_request::Ports::Contiguous(2),
            1 => v1::port_request::Ports::Count(2),
            _ => v1::port_request::Ports::Count(1),
        };
        v1::Claim {
            name: format!("s{}-{}", self.me, self.rounds),
            uid: format!("{:016x}", self.rng.random::<u64>()),
            placement: Some(v1::claim::Placement::Worker(self.worker.clone())),
            ports: vec![v1::PortRequest { ports: Some(ports), ..Default::default() }],
            lease,
            confirm_within_ms: self.rng.random_range(1_500..4_000),
            ..Default::default()
        }
    }

    async fn instance(&mut self) {
        let leased = !self.has_agent || self.rng.random_bool(0.6);
        let mut holding = None;
        if leased {
            holding = self.lease().await;
            if holding.is_none() {
                return;
            }
        }
        let claim = self.claim(holding.as_ref().map_or(0, Holding::id));
        let request = v1::AllocateRequest { claims: vec![claim], dry_run: false };
        let Some(Ok(Response::Allocate(granted))) =
            self.insist(Request::Allocate(request), 4).await
        else {
            return;
        };
        let Some(held) = granted.allocations.into_iter().next() else { return };
        let Some((held, pid)) = self.start(held).await else { return };
        if self.confirm(&held, pid, 0, 8).await && self.is_safe(holding.as_ref()) {
            self.kernel.confirmed(pid);
            self.live(&held, pid, holding).await;
        } else {
            self.kernel.end(pid);
            self.release(&held).await;
        }
    }

    /// Without an agent nothing but the lease keeps the ports from others.
    fn is_safe(&self, holding: Option<&Holding>) -> bool {
        let now = self.keeper.now();
        let held = holding
            .is_some_and(|h| matches!(h.standing(), Standing::Held { until } if until > now));
        self.has_agent || held
    }

    /// Probes and starts; reports what is in use.
    async fn start(&mut self, mut held: v1::Allocation) -> Option<(v1::Allocation, u32)> {
        for _ in 0..4 {
            if self.kernel.in_use(&held).is_none() {
                self.pause(10, 500).await;
            }
            let Some(port) = self.kernel.in_use(&held) else {
                let ports = held.ports.iter().map(|port| port.number as u16).collect();
                let of = Some((held.name.clone(), held.token));
                return Some((held, self.kernel.start(ports, of, None)));
            };
            let (name, token, version) = (held.name.clone(), held.token, held.version);
            let report = v1::ReportConflictRequest { name, token, version, port };
            match self.insist(Request::ReportConflict(report), 4).await {
                Some(Ok(Response::ReportConflict(r))) if !r.reclaimed => held = r.allocation?,
                _ => break,
            }
        }
        self.release(&held).await;
        None
    }

    async fn confirm(&mut self, held: &v1::Allocation, pid: u32, lease: u64, tries: u32) -> bool {
        let liveness = match self.has_agent && self.rng.random_bool(0.7) {
            true => self.kernel.liveness(pid),
            false => None,
        };
        let (name, token) = (held.name.clone(), held.token);
        let confirm = v1::ConfirmRequest { name, token, version: 0, lease, liveness };
        matches!(self.insist(Request::Confirm(confirm), tries).await, Some(Ok(_)))
    }

    async fn live(&mut self, held: &v1::Allocation, pid: u32, mut holding: Option<Holding>) {
        let lives = Duration::from_millis(self.rng.random_range(300..6_000));
        match &mut holding {
            None => sleep(lives).await,
            Some(lease) => {
                let lost = timeout(lives, lease.lost()).await.is_ok();
                if lost && !self.has_agent {
                    self.kernel.end(pid);
                    return self.release(held).await;
                }
                if lost {
                    holding = self.revive(held, pid).await;
                    self.pause(100, 2_000).await;
                }
            }
        }
        if !self.kernel.runs(pid) {
            return; // the machine has booted
        }
        match self.rng.random_range(0..10) {
            // It dies, and nobody takes note.
            0 => self.kernel.end(pid),
            // Who started it dies, and it lives on.
            1 if self.has_agent => {
                let lives = Duration::from_millis(self.rng.random_range(1_000..9_000));
                self.kernel.ends_in(pid, lives);
            }
            _ => {
                self.kernel.end(pid);
                self.release(held).await;
            }
        }
        drop(holding);
    }

    /// Its lease is lost, and its worker has an agent: it goes on under another one.
    async fn revive(&mut self, held: &v1::Allocation, pid: u32) -> Option<Holding> {
        self.pause(10, 1_500).await;
        let lease = self.lease().await?;
        let _ = self.confirm(held, pid, lease.id(), 3).await;
        Some(lease)
    }

    async fn release(&mut self, held: &v1::Allocation) {
        let authority = Some(v1::release_request::Authority::Token(held.token));
        let request = v1::ReleaseRequest { name: held.name.clone(), authority };
        self.insist(Request::Release(request), 3).await;
    }
}

/// Something else takes ports of the range now and then.
pub async fn strangers(kernel: Kernel, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    loop {
        sleep(Duration::from_millis(rng.random_range(1_000..6_000))).await;
        let port = (FIRST_PORT + rng.random_range(0..PORTS)) as u16;
        if kernel.machine().user(port).is_none() {
            let lives = Duration::from_millis(rng.random_range(500..5_000));
            kernel.start(vec![port], None, Some(lives));
        }
    }
}
