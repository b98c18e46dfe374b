//! Hosts, their time, and the network between them, in one thread.
//!
//! Time goes in steps. In each, the network delivers what is due, and then every host runs for as
//! long as the step is: its runtime's clock is paused, so that it jumps from one timer to the next
//! while nothing else is to be done. As nothing arrives within the step in which it was sent, it
//! makes no difference which host runs first.
//!
//! - A host that is killed loses everything but what its software keeps elsewhere: its runtime is
//!   dropped with all tasks in it.
//! - A host that is paused (SIGSTOP, a suspended machine) stands still while the others go on; when it
//!   goes on, its clock jumps, and all that came meanwhile is there at once.

pub mod net;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::Instant;

use crate::entropy;
pub use net::{HostId, Net};

/// Shorter than anything takes on the network.
pub const STEP: Duration = Duration::from_millis(1);

/// What runs on a host. It ends with the reason why, or not at all.
pub type Software = Pin<Box<dyn Future<Output = String>>>;

thread_local! {
    /// The host whose turn it is.
    static CURRENT: Cell<Option<HostId>> = const { Cell::new(None) };
    /// What ended a process on its own: the host, the exit status, and why.
    static EXITS: RefCell<Vec<Exit>> = const { RefCell::new(Vec::new()) };
    static NET: RefCell<Option<Net>> = const { RefCell::new(None) };
    static PANICS: RefCell<Vec<(Option<HostId>, String)>> = const { RefCell::new(Vec::new()) };
}

/// A process that ended although nobody ended it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub host: HostId,
    pub code: Option<i32>,
    pub why: String,
}

/// The payload of the panic that unwinds what would not have returned.
struct Exiting;

pub struct World {
    pub net: Net,
    now: Duration,
    hosts: Vec<Host>,
}

struct Host {
    name: String,
    running: Option<Running>,
    /// How far its wall clock goes wrong, in seconds.
    wall_skew: i64,
    paused: bool,
}

struct Running {
    software: JoinHandle<String>,
    tasks: LocalSet,
    runtime: Runtime,
    /// Its own time when it was started, and the world's.
    began: (Instant, Duration),
    /// The world's time up to which it has run.
    at: Duration,
}

impl World {
    pub fn new(seed: u64) -> World {
        std::panic::set_hook(Box::new(|info| {
            if info.payload().is::<Exiting>() {
                return;
            }
            let why = info.to_string();
            let trace = std::backtrace::Backtrace::capture();
            eprintln!("{why}\n{trace}");
            PANICS.with_borrow_mut(|panics| panics.push((CURRENT.get(), why)));
        }));
        let net = Net::new(seed);
        NET.set(Some(net.clone()));
        World { net, now: Duration::ZERO, hosts: Vec::new() }
    }

    pub fn now(&self) -> Duration {
        self.now
    }

    pub fn add_host(&mut self, name: &str) -> HostId {
        self.hosts.push(Host { name: name.into(), running: None, wall_skew: 0, paused: false });
        self.net.add_host(name)
    }

    pub fn name(&self, host: HostId) -> &str {
        &self.hosts[host].name
    }

    pub fn hosts(&self) -> usize {
        self.hosts.len()
    }

    pub fn runs(&self, host: HostId) -> bool {
        self.hosts[host].running.is_some()
    }

    pub fn is_paused(&self, host: HostId) -> bool {
        self.hosts[host].paused
    }

    pub fn set_wall_skew(&mut self, host: HostId, seconds: i64) {
        self.hosts[host].wall_skew = seconds;
    }

    pub fn pause(&mut self, host: HostId, paused: bool) {
        self.hosts[host].paused = paused;
    }

    /// Starts its software, which must not run.
    pub fn start(&mut self, host: HostId, software: impl FnOnce() -> Software) {
        assert!(!self.runs(host), "{} runs", self.name(host));
        let skew = self.hosts[host].wall_skew;
        let now = self.now;
        self.hosts[host].paused = false;
        self.hosts[host].running = Some(as_host(host, skew, || {
            let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
            let runtime = runtime.expect("a runtime");
            let tasks = LocalSet::new();
            let (software, began) = tasks.block_on(&runtime, async {
                (tokio::task::spawn_local(software()), Instant::now())
            });
            Running { software, tasks, runtime, began: (began, now), at: now }
        }));
    }

    /// Its process is killed. What was open to others is closed.
    pub fn kill(&mut self, host: HostId) {
        self.drop_tasks(host);
        self.net.process_ended(host);
    }

    /// It loses its power, until [`World::power_on`].
    pub fn power_off(&mut self, host: HostId) {
        self.drop_tasks(host);
        self.net.power_off(host);
    }

    pub fn power_on(&mut self, host: HostId) {
        self.net.power_on(host);
    }

    fn drop_tasks(&mut self, host: HostId) {
        // Nothing that is done while they are dropped gets out.
        self.net.mute(host);
        let Host { running, wall_skew, paused, .. } = &mut self.hosts[host];
        *paused = false;
        let Some(running) = running.take() else { return };
        as_host(host, *wall_skew, || drop(running));
    }

    /// Runs something on a host beside its software.
    pub fn spawn(&self, host: HostId, work: impl Future<Output = ()> + 'static) {
        let Host { running, wall_skew, .. } = &self.hosts[host];
        let running = running.as_ref().expect("a host that runs");
        as_host(host, *wall_skew, || running.tasks.spawn_local(work));
    }

    /// Does something as a host that runs, in its runtime.
    pub fn within<T>(&self, host: HostId, work: impl FnOnce() -> T) -> T {
        let Host { running, wall_skew, .. } = &self.hosts[host];
        let running = running.as_ref().expect("a host that runs");
        let _entered = running.runtime.enter();
        as_host(host, *wall_skew, work)
    }

    /// One step of time. Processes that have ended by themselves are returned: nothing leaves them
    /// any more, and they are to be killed.
    pub fn step(&mut self) -> Vec<Exit> {
        self.now += STEP;
        entropy::set_now(self.now);
        self.net.deliver(self.now);
        for host in 0..self.hosts.len() {
            self.run(host);
        }
        // A process ends once: what still ran of it in this step would not have run.
        let mut exits = EXITS.with_borrow_mut(std::mem::take);
        let mut ended = BTreeSet::new();
        exits.retain(|exit| ended.insert(exit.host));
        exits
    }

    fn run(&mut self, host: HostId) {
        let now = self.now;
        let Host { running, wall_skew, paused, .. } = &mut self.hosts[host];
        let Some(running) = running.as_mut().filter(|_| !*paused) else { return };
        let ended = as_host(host, *wall_skew, || running.run_until(now));
        if let Some(why) = ended {
            EXITS.with_borrow_mut(|exits| exits.push(Exit { host, code: None, why }));
        }
    }

    /// What panicked so far.
    pub fn panics(&self) -> Vec<String> {
        let panics = PANICS.with_borrow_mut(std::mem::take);
        let name = |host: Option<HostId>| host.map_or("the simulation", |host| self.name(host));
        panics.iter().map(|(host, why)| format!("{}: {why}", name(*host))).collect()
    }
}

impl Running {
    /// Why its software has ended, if it has.
    fn run_until(&mut self, now: Duration) -> Option<String> {
        let Running { software, tasks, runtime, began, at } = self;
        let until = began.0 + (now - began.1);
        // A step at a time is what it does while it runs; the rest it has missed.
        let missed = (now - *at).saturating_sub(STEP);
        *at = now;
        tasks.block_on(runtime, async {
            if !missed.is_zero() {
                tokio::time::advance(missed).await;
            }
            tokio::time::sleep_until(until).await;
            match software.is_finished() {
                true => Some(software.await.unwrap_or_else(|error| error.to_string())),
                false => None,
            }
        })
    }
}

fn as_host<T>(host: HostId, wall_skew: i64, run: impl FnOnce() -> T) -> T {
    CURRENT.set(Some(host));
    entropy::set_wall_skew(wall_skew);
    let result = run();
    entropy::set_wall_skew(0);
    CURRENT.set(None);
    result
}

/// In place of the end of a process: the host whose turn it is does nothing more that anybody could
/// notice, and is killed after this step.
pub fn exit(code: i32, why: &str) -> ! {
    let host = CURRENT.get().expect("only a host's software ends its process");
    NET.with_borrow(|net| net.iter().for_each(|net| net.mute(host)));
    let why = why.to_string();
    EXITS.with_borrow_mut(|exits| exits.push(Exit { host, code: Some(code), why }));
    std::panic::resume_unwind(Box::new(Exiting))
}
