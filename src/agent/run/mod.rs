//! `run`: a program that holds its ports for exactly as long as it runs.
//!
//! In the steady state: a fresh lease, an allocation on it, each port probed by binding it, the
//! program started, waited for until it listens, confirmed with a handle by which the worker's agent
//! can tell whether it lives; then the lease is kept and signals are passed on until it ends, and
//! what it held is given back.
//!
//! In the odd case:
//!
//! - A port is in use, by the probe or because the program ended before it listened and the port is
//!   found in use: the conflict is reported, and the next port is tried.
//! - The program ends for another reason: so does `run`, with its status.
//! - The lease is lost: see [`hold`].
//! - `run` itself is killed: the kernel kills the program. What that has started may live on; where it is
//!   in the program's process group, the handle stands for it too.
//!
//! Nothing is given back while anything is left that the program has started, also what has left its
//! group to be a daemon: whoever releases vouches that the ports are free.

mod hold;
mod program;
mod readiness;
mod signals;

use std::ffi::OsString;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::host::child::{self, Child, exit_code};
use super::host::probe::{Probe, probe};
use super::host::{Host, Wanted, boot_clock, process_handle};
use crate::blocking::spawn_blocking;
use crate::client::{Client, ClientError, Holding, Keeper, NoPortLeft, StartError, Try};
use crate::proto::v1;
use crate::proto::v1::liveness::Handle;
pub use hold::OnLeaseLost;
use hold::{Hold, Lost};
pub use program::check as check_command;
pub use readiness::Ready;
use readiness::{Stage, stage};
use signals::{Signals, asks_for_an_end};

/// How often a program that starts is looked at: at first, and later.
const LOOK_MIN: Duration = Duration::from_millis(50);
const LOOK_MAX: Duration = Duration::from_secs(1);
/// Looks in a row at which a stranger has the program's port.
const STRANGER_LOOKS: u32 = 2;
/// Between a request to end and the end, for what a program has left behind.
const LEFTOVERS_GRACE: Duration = Duration::from_secs(5);

/// Giving back is tried for so long, whatever signals come.
const RELEASE_MIN: Duration = Duration::from_secs(5);
/// For what is killed to be gone: it may wait for a disk.
const KILLED_MAX: Duration = Duration::from_secs(10);

pub struct Job {
    /// Without a lease.
    pub claim: v1::Claim,
    /// Not empty.
    pub command: Vec<OsString>,
    /// Conflicts after which another port is tried.
    pub retries: u32,
    pub lease_ttl: Duration,
    /// `None`: as the worker has an agent or not.
    pub on_lease_lost: Option<OnLeaseLost>,
    pub start_timeout: Duration,
    pub ready: Ready,
    /// From a request to end to a kill, where `run` itself ends the program.
    pub stop_grace: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Call(#[from] ClientError),
    #[error(transparent)]
    NoPortLeft(Box<NoPortLeft>),
    /// What is held is on a worker that is not here.
    #[error("{0}")]
    Elsewhere(String),
    #[error("{program} cannot be started: {error}")]
    NotStarted { program: String, error: io::Error },
    #[error("{program} did not listen on {ports} within {within:?}, and was stopped")]
    NotListening { program: String, ports: String, within: Duration },
    #[error(
        "the lease could not be kept alive, or what is on it not be confirmed in time, and without an agent its ports are given to others then: the program does not run"
    )]
    LeaseEnds,
    #[error("what the program held is gone, and it was stopped: {0}")]
    Gone(String),
    #[error("this host: {0}")]
    Host(#[from] io::Error),
    /// A signal came before there was a program to pass it on to.
    #[error("stopped by signal {}", .0.as_raw())]
    Stopped(Signal),
    /// The program ended before it listened, and not because of a port: its exit code.
    #[error("the program ended before it listened, with exit code {0}")]
    Ended(u8),
}

impl From<Lost> for RunError {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::LeaseEnds => RunError::LeaseEnds,
            Lost::Gone(why) => RunError::Gone(why),
        }
    }
}

/// Runs a program to its end; its exit code, as a shell would tell it.
pub async fn run(client: Client, host: Arc<dyn Host>, job: Job) -> Result<u8, RunError> {
    let mut signals = Signals::listen()?;
    if let Err(why) = child::adopt_orphans() {
        warn!("what leaves the program's process group is not seen: {why}");
    }
    if let Some(v1::claim::Placement::Worker(worker)) = &job.claim.placement {
        tokio::select! {
            is_here = here(&client, &*host, worker) => drop(is_here?),
            signal = signals.stop() => return Err(RunError::Stopped(signal)),
        }
    }
    let keeper = Keeper::start_with(client.clone(), boot_clock());
    let reserved = reserve(&client, &keeper, &job);
    let (lease, asked, held) = tokio::select! {
        reserved = reserved => reserved?,
        // What may have been granted meanwhile goes with its lease.
        signal = signals.stop() => return Err(RunError::Stopped(signal)),
    };
    let id = lease.id();
    let has_agent = tokio::select! {
        is_here = here(&client, &*host, &held.worker) => is_here,
        signal = signals.stop() => Err(RunError::Stopped(signal)),
    };
    let has_agent = match has_agent {
        Ok(has_agent) => has_agent,
        Err(error) => {
            hold::release(&client, &lease, &held).await;
            return Err(error);
        }
    };
    let default = if has_agent { OnLeaseLost::Keep } else { OnLeaseLost::Stop };
    let on_lease_lost = job.on_lease_lost.unwrap_or(default);
    info!(
        name = held.name,
        worker = held.worker,
        token = held.token,
        lease = id,
        ?on_lease_lost,
        "reserved"
    );
    let mut hold = Hold::new(client, keeper, lease, on_lease_lost, asked, held);
    let mut supervisor = Supervisor { host, job: &job, signals: &mut signals, left: false };
    let ended = supervisor.supervise(&mut hold).await;
    match supervisor.left {
        true => warn!("something of the program is left: what it held is not given back"),
        false => {
            let mut released = std::pin::pin!(hold.release());
            // Whoever asks for an end may do so more than once.
            if timeout(RELEASE_MIN, &mut released).await.is_err() {
                signals.forget();
                tokio::select! {
                    () = released => {}
                    _ = signals.stop() => warn!("stopped before it was released; it is reclaimed in time"),
                }
            }
        }
    }
    ended
}

/// A lease, and the allocation on it, with when that was asked for by the keeper's clock. Where that fails,
/// the lease ends by itself.
async fn reserve(
    client: &Client,
    keeper: &Keeper,
    job: &Job,
) -> Result<(Holding, Duration, v1::Allocation), RunError> {
    let lease = keeper.grant(job.lease_ttl).await?;
    let claim = v1::Claim { lease: lease.id(), ..job.claim.clone() };
    let asked = keeper.now();
    match client.allocate(vec![claim]).await {
        Ok(granted) => {
            let held = granted.allocations.into_iter().next().unwrap_or_default();
            Ok((lease, asked, held))
        }
        Err(error) => {
            // In doubt it may have been granted: it goes with the lease.
            if let Err(error) = client.lease_revoke(lease.id()).await {
                debug!(%error, "the lease is left to expire");
            }
            Err(error.into())
        }
    }
}

/// Is the worker here, and does it have an agent? Where it has none, nobody can tell where it is.
async fn here(client: &Client, host: &dyn Host, worker: &str) -> Result<bool, RunError> {
    let record = client.worker_get(worker, None).await?.worker.unwrap_or_default();
    let Some(there) = record.spec.unwrap_or_default().identity else { return Ok(false) };
    is_here(worker, &there, &host.identity()?).map_err(RunError::Elsewhere)?;
    Ok(true)
}

fn is_here(worker: &str, there: &v1::Identity, here: &v1::Identity) -> Result<(), String> {
    let shown =
        |i: &v1::Identity| format!("network namespace {} of machine {}", i.namespace, i.machine_id);
    if there.machine_id == here.machine_id && there.boot_id != here.boot_id {
        return Err(format!(
            "the agent of worker {worker} has not registered this boot yet; what was granted before \
             that would be taken back"
        ));
    }
    if there != here {
        return Err(format!(
            "worker {worker} is {}, and this is {}: its agent does not see what runs here, and a port \
             that is free here may be in use there",
            shown(there),
            shown(here)
        ));
    }
    Ok(())
}

struct Supervisor<'a> {
    host: Arc<dyn Host>,
    job: &'a Job,
    signals: &'a mut Signals,
    /// Something of a program could not be ended, and may have its ports.
    left: bool,
}

impl Supervisor<'_> {
    /// Starts the program and sees it through to its end; nothing of it is left then, or it is said.
    async fn supervise(&mut self, hold: &mut Hold) -> Result<u8, RunError> {
        let (client, held) = (hold.client(), hold.held.clone());
        let started = client.start_on(held, self.job.retries, async |held| {
            hold.held = held.clone();
            let tried = self.try_start(held, hold).await;
            if let Ok(Try::InUse { .. }) = tried {
                hold.asks_anew();
            }
            tried
        });
        let (held, mut child) = match started.await {
            Ok(started) => started,
            Err(StartError::Start(RunError::Ended(code))) => return Ok(code),
            Err(StartError::Start(error)) => return Err(error),
            Err(StartError::Call(error)) => return Err(error.into()),
            Err(StartError::NoPortLeft(error)) => return Err(RunError::NoPortLeft(error)),
        };
        hold.held = held;
        let ended = self.see_through(&mut child, hold).await;
        self.clear_up(&mut child, hold.grace()).await;
        ended
    }

    /// One try, on the ports as they are now.
    async fn try_start(
        &mut self,
        held: &v1::Allocation,
        hold: &mut Hold,
    ) -> Result<Try<Child>, RunError> {
        let ports = numbers(held);
        let in_use = tokio::select! {
            in_use = probed(&ports) => in_use?,
            signal = self.signals.stop() => return Err(RunError::Stopped(signal)),
        };
        if let Some((port, why)) = in_use {
            info!(port, why, "the port is in use; the next one is tried");
            return Ok(Try::InUse { port, why });
        }
        // Whatever was asked of the cluster before this may have taken its time.
        if hold.is_ending() {
            return Err(RunError::LeaseEnds);
        }
        let program = program::program(&self.job.command, held);
        let shown = program::shown(&self.job.command);
        info!(?ports, program = shown, "starting");
        let mut child = child::start(program)
            .await
            .map_err(|error| RunError::NotStarted { program: shown, error })?;
        let started = self.starting(&mut child, held, hold).await;
        match started {
            Ok(None) => Ok(Try::Started(child)),
            Ok(Some((port, why))) => {
                info!(port, why, "the port is in use; the next one is tried");
                self.clear_up(&mut child, hold.grace()).await;
                Ok(Try::InUse { port, why })
            }
            Err(error) => {
                self.clear_up(&mut child, hold.grace()).await;
                Err(error)
            }
        }
    }

    /// Waits until the program listens; the port that is in use where that is why it does not.
    async fn starting(
        &mut self,
        child: &mut Child,
        held: &v1::Allocation,
        hold: &mut Hold,
    ) -> Result<Option<(u32, String)>, RunError> {
        let deadline = Instant::now() + self.job.start_timeout;
        let mut look = Looks { ports: numbers(held), pause: LOOK_MIN, strangers: 0 };
        let mut stopping = false;
        let mut gone = std::pin::pin!(hold.gone());
        loop {
            let pause = look.pause;
            tokio::select! {
                status = child.ended() => {
                    let code = exit_code(status?);
                    return match stopping {
                        true => Err(RunError::Ended(code)),
                        false => self.why_ended(code, &look.ports).await,
                    };
                }
                signal = self.signals.next() => {
                    stopping |= asks_for_an_end(signal);
                    child.signal(signal);
                }
                () = hold.ending() => return Err(RunError::LeaseEnds),
                lost = &mut gone => return Err(lost.into()),
                () = sleep(pause) => match look.at(&self.host, self.job.ready, child).await? {
                    Stage::Ready => return Ok(None),
                    Stage::Stranger { port, pid } if look.strangers >= STRANGER_LOOKS && !stopping => {
                        let why = format!("process {pid} listens on it");
                        return Ok(Some((port.into(), why)));
                    }
                    Stage::Waiting | Stage::Stranger { .. } => {}
                },
                () = tokio::time::sleep_until(deadline) => return Err(self.not_listening(&look)),
            }
        }
    }

    fn not_listening(&self, look: &Looks) -> RunError {
        let ports: Vec<_> = look.ports.iter().map(u16::to_string).collect();
        RunError::NotListening {
            program: program::shown(&self.job.command),
            ports: ports.join(", "),
            within: self.job.start_timeout,
        }
    }

    /// The program ended before it listened: because a port is in use, or for a reason of its own. One
    /// that is content may have left behind what listens there.
    async fn why_ended(&self, code: u8, ports: &[u16]) -> Result<Option<(u32, String)>, RunError> {
        if code == 0 {
            return Err(RunError::Ended(code));
        }
        match probed(ports).await? {
            Some((port, why)) => Ok(Some((port, format!("the program ended with {code}; {why}")))),
            None => Err(RunError::Ended(code)),
        }
    }

    /// Confirms a program that listens, and keeps what it holds until it has ended or must.
    async fn see_through(&mut self, child: &mut Child, hold: &mut Hold) -> Result<u8, RunError> {
        let liveness = match process_handle(child.handle()) {
            Ok(liveness) => Some(liveness),
            Err(why) => {
                warn!("{why}; whether the program lives is told by its ports alone");
                None
            }
        };
        let lost = {
            let mut gone = std::pin::pin!(hold.gone());
            let mut held = std::pin::pin!(confirmed_and_kept(hold, liveness));
            loop {
                tokio::select! {
                    status = child.ended() => return Ok(exit_code(status?)),
                    signal = self.signals.next() => child.signal(signal),
                    lost = &mut held => break lost,
                    lost = &mut gone => break lost,
                }
            }
        };
        warn!("the program is stopped");
        Err(lost.into())
    }

    /// Ends whatever is left of a program: asks it, and kills what has not ended in time.
    async fn clear_up(&mut self, child: &mut Child, at_most: Duration) {
        let grace = match child.has_ended() {
            true => LEFTOVERS_GRACE,
            false => self.job.stop_grace,
        };
        if child.has_ended() && child.has_left().await {
            warn!("the program has ended, and what it left behind is ended too");
        }
        child.signal_all(Signal::TERM).await;
        if timeout(grace.min(at_most), all_ended(child)).await.is_ok() {
            return;
        }
        warn!("what is left of the program is killed");
        child.signal_all(Signal::KILL).await;
        self.left |= timeout(KILLED_MAX, all_ended(child)).await.is_err();
    }
}

/// Until the program and all that it left in its group has ended.
async fn all_ended(child: &mut Child) {
    let _ = child.ended().await; // its status is told already, or of no interest
    let mut pause = Duration::from_millis(1);
    loop {
        let looked = Instant::now();
        if !child.has_left().await {
            return;
        }
        // On a host with many processes a look takes a while.
        sleep(pause.max(looked.elapsed())).await;
        pause = (pause * 2).min(LOOK_MIN);
    }
}

/// Says that the program runs, then keeps what it holds, until it must stop.
async fn confirmed_and_kept(hold: &mut Hold, liveness: Option<v1::Liveness>) -> Lost {
    if let Err(lost) = hold.confirm(liveness.clone()).await {
        return lost;
    }
    info!(name = hold.held.name, ports = ?numbers(&hold.held), lease = hold.lease(), "bound");
    hold.kept(liveness).await
}

fn numbers(held: &v1::Allocation) -> Vec<u16> {
    held.ports.iter().filter_map(|port| u16::try_from(port.number).ok()).collect()
}

/// Probes each port; the first that is in use.
async fn probed(ports: &[u16]) -> Result<Option<(u32, String)>, RunError> {
    for port in ports.iter().copied() {
        match spawn_blocking(move || probe(port)).await.map_err(io::Error::other)? {
            Probe::Free => {}
            Probe::Closing => info!(
                port,
                "connections of its last user are still closing: a server without SO_REUSEADDR \
                 cannot have the port for a minute"
            ),
            Probe::InUse(why) => return Ok(Some((port.into(), why))),
            Probe::Unknown(why) => warn!(port, why, "whether the port is free is not known"),
        }
    }
    Ok(None)
}

/// Looks at a program that starts, less and less often.
struct Looks {
    ports: Vec<u16>,
    pause: Duration,
    /// Looks in a row at which a stranger was there.
    strangers: u32,
}

impl Looks {
    async fn at(&mut self, host: &Arc<dyn Host>, ready: Ready, child: &Child) -> io::Result<Stage> {
        self.pause = (self.pause * 3 / 2).min(LOOK_MAX);
        let program = Handle::Process(child.handle());
        let ports: Vec<RangeInclusive<u16>> = self.ports.iter().map(|port| *port..=*port).collect();
        let host = host.clone();
        let look = move || {
            // Whose they are is of interest once there are any.
            let seen = host.look(&Wanted { ports: ports.clone(), handles: vec![] })?;
            match seen.sockets.is_empty() {
                true => Ok(seen),
                false => host.look(&Wanted { ports, handles: vec![program] }),
            }
        };
        let seen = spawn_blocking(look).await.map_err(io::Error::other)??;
        let is_the_programs = |pid| child.has_started(pid, &seen.processes);
        let stage = stage(&self.ports, ready, is_the_programs, &seen);
        let stranger = matches!(stage, Stage::Stranger { .. });
        self.strangers = if stranger { self.strangers + 1 } else { 0 };
        Ok(stage)
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::Linux;
    use super::super::host::gpus::NoGpus;
    use super::*;
    use crate::agent::fake::{granted, node};

    /// Its ports and its GPU memory may be another's by then.
    #[tokio::test]
    async fn a_program_that_is_starting_is_stopped_when_what_it_holds_is_gone() {
        let (_, client) = node().await;
        let (keeper, lease, held) = granted(&client, Duration::from_secs(3)).await;
        let asked = keeper.now();
        let mut hold =
            Hold::new(client.clone(), keeper, lease, OnLeaseLost::Keep, asked, held.clone());
        let job = Job {
            claim: v1::Claim::default(),
            command: ["sleep", "1000"].map(OsString::from).to_vec(),
            retries: 0,
            lease_ttl: Duration::from_secs(3),
            on_lease_lost: None,
            start_timeout: Duration::from_secs(60),
            ready: Ready::All,
            stop_grace: Duration::from_secs(10),
        };
        let host = Arc::new(Linux::new(Box::new(NoGpus)));
        let mut signals = Signals::none();
        let mut supervisor = Supervisor { host, job: &job, signals: &mut signals, left: false };
        client.release(&held.name, held.token).await.unwrap();
        let ended = supervisor.supervise(&mut hold).await;
        assert!(matches!(ended, Err(RunError::Gone(_))), "{ended:?}");
        assert!(!supervisor.left);
    }

    #[test]
    fn a_program_is_run_where_its_worker_is() {
        let identity = |machine: &str, boot: &str, namespace| v1::Identity {
            machine_id: machine.into(),
            boot_id: boot.into(),
            namespace,
        };
        let here = identity("m", "b", 1);
        assert_eq!(is_here("w", &here, &here), Ok(()));
        for (there, says) in [
            (identity("m", "b", 2), "network namespace 2 of machine m"),
            (identity("other", "b2", 1), "machine other"),
            (identity("m", "b1", 1), "not registered this boot"),
        ] {
            let error = is_here("w", &there, &here).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
