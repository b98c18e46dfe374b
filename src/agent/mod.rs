//! What runs on a worker: the agent, and `run`.
//!
//! An agent makes a worker its own ([`register`]), follows what the table says of it ([`table`]), and
//! tells the cluster once an interval what its host shows ([`sample`]). It decides nothing: the leader
//! weighs what it tells, and what it does not know it does not say. So
//!
//! - a sample is stamped with the revision that the agent had applied before it looked;
//! - one sample is under way at a time, and nothing is kept of an old one: an agent that lost the
//!   cluster for a day uses no more memory, and goes on where it finds it;
//! - "gone" is said only of what would have been seen ([`Host::blind_spots`]);
//! - a worker that was removed, or that another agent has made its own, is not taken back: the agent
//!   ends, and says why.

mod drift;
#[cfg(test)]
mod fake;
pub mod host;
mod processes;
mod ranges;
mod register;
pub mod run;
mod sample;
mod table;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tonic::Code;
use tracing::{info, warn};

use crate::blocking::spawn_blocking;
use crate::client::{Client, ClientError};
use crate::proto::{reason, v1};
use drift::Differences;
use host::{Host, Seen};
pub use processes::{Process, Processes};
pub use ranges::LocalPorts;
pub use register::Told;
use sample::{Plan, Stamp};
use table::Table;

/// Before the cluster is asked again to take the worker.
const JOIN_PAUSE: Duration = Duration::from_secs(1);
/// A report that takes longer is followed by a newer one.
const REPORT_MAX: Duration = Duration::from_secs(10);
/// Reports that must come in the time after which a silent worker is lost: one or two may not arrive.
const REPORTS_BEFORE_LOST: u32 = 3;
/// What comes faster is not counted.
const REPORT_PAUSE_MIN: Duration = Duration::from_millis(500);
/// Looks in a row at which a process cannot be read, before that is said.
const UNREAD_LOOKS: u32 = 3;
/// What goes wrong again and again is said again after this.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Why an agent ends.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Call(#[from] ClientError),
    #[error("this host has no identity: {0}")]
    NoIdentity(std::io::Error),
    #[error("there is no worker {worker}, and to register it --address is needed")]
    NoSuchWorker { worker: String },
    #[error("worker {worker} was removed; start its agent again to register it anew")]
    Removed { worker: String },
    #[error(
        "worker {worker} is network namespace {} of machine {}, boot {}, and not this one; if that machine \
         is gone: `worker remove {worker} --force --reason …`, or --take-over where nothing is held on it",
        .machine.namespace, .machine.machine_id, .machine.boot_id
    )]
    OfAnotherMachine { worker: String, machine: v1::Identity },
    #[error(
        "another agent has made worker {worker} its own: network namespace {} of machine {}, boot {}",
        .by.namespace, .by.machine_id, .by.boot_id
    )]
    Taken { worker: String, by: v1::Identity },
}

pub struct Agent {
    client: Client,
    host: Arc<dyn Host>,
    worker: String,
    /// From one report to the next.
    interval: Duration,
    told: Told,
    identity: v1::Identity,
    /// Tells this run of the agent from others.
    run: String,
    /// Of the last report.
    number: u64,
    differences: Differences,
    warned_of_ranges: Option<String>,
    trouble: Trouble,
    ignored: Trouble,
    gpu_trouble: Trouble,
    process_trouble: Trouble,
    /// Looks in a row at which a process could not be read.
    unread: u32,
}

/// May the same call be taken later?
fn passes(error: &ClientError) -> bool {
    matches!(error, ClientError::Unavailable { .. } | ClientError::OutcomeUnknown { .. })
        || error.reason() == Some(reason::LOW_SPACE)
}

impl Agent {
    pub fn new(
        client: Client,
        host: Arc<dyn Host>,
        worker: String,
        interval: Duration,
        told: Told,
    ) -> Result<Self, AgentError> {
        let identity = host.identity().map_err(AgentError::NoIdentity)?;
        Ok(Agent {
            run: client.fresh_uid(),
            client,
            host,
            worker,
            interval,
            told,
            identity,
            number: 0,
            differences: Differences::default(),
            warned_of_ranges: None,
            trouble: Trouble::default(),
            ignored: Trouble::default(),
            gpu_trouble: Trouble::default(),
            process_trouble: Trouble::default(),
            unread: 0,
        })
    }

    /// Until `stop` resolves, or there is nothing left to do.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), AgentError> {
        tokio::select! {
            ended = self.serve() => ended,
            () = stop => {
                info!(worker = self.worker, "stopping");
                Ok(())
            }
        }
    }

    async fn serve(&mut self) -> Result<(), AgentError> {
        let v1::Identity { machine_id, boot_id, namespace } = &self.identity;
        info!(worker = self.worker, machine_id, boot_id, namespace, "starting");
        for why in self.host.blind_spots() {
            warn!("{why}; that something there is gone is not told");
        }
        self.join().await?;
        let (shown, table) = watch::channel(None);
        let follower = table::follow(self.client.clone(), self.worker.clone(), shown);
        tokio::select! {
            never = follower => match never {},
            ended = self.tell_on(table) => ended,
        }
    }

    /// Once an interval, when there is a table.
    async fn tell_on(
        &mut self,
        mut table: watch::Receiver<Option<Arc<Table>>>,
    ) -> Result<(), AgentError> {
        let _ = table.wait_for(Option::is_some).await; // the follower never ends
        loop {
            let looked = Instant::now();
            let known = table.borrow().clone();
            if let Some(known) = known {
                self.tell(&known).await?;
            }
            sleep_until(looked + self.interval).await;
        }
    }

    /// A worker is lost, and nothing that its agent sees is counted, where it is silent for too long.
    fn keep_within(&mut self, lost_after: Duration) {
        let longest = (lost_after / REPORTS_BEFORE_LOST).max(REPORT_PAUSE_MIN);
        if !lost_after.is_zero() && self.interval > longest {
            let given = self.interval;
            warn!(
                ?given,
                ?lost_after,
                "the interval is too long for the cluster; it is {longest:?} now"
            );
            self.interval = longest;
        }
    }

    /// Tries until the cluster has taken the worker, or refused it.
    async fn join(&mut self) -> Result<(), AgentError> {
        loop {
            let host = &self.host;
            let joined =
                register::join(&self.client, host, &self.worker, &self.told, &self.identity).await;
            match joined {
                Ok(()) => return Ok(()),
                Err(AgentError::Call(error)) if passes(&error) => {
                    self.trouble.say(&error.to_string());
                }
                Err(error) => return Err(error),
            }
            sleep(JOIN_PAUSE).await;
        }
    }

    /// Looks at the host and tells the cluster.
    async fn tell(&mut self, table: &Table) -> Result<(), AgentError> {
        if table.worker.is_none() {
            return Err(AgentError::Removed { worker: self.worker.clone() });
        }
        let plan = Plan::of(table, &self.identity.boot_id);
        let (kernel, seen) = match self.look(&plan).await {
            Ok(seen) => seen,
            Err(error) => {
                self.trouble.say(&format!("the host cannot be looked at: {error}"));
                return Ok(());
            }
        };
        self.warn_of_ranges(table, &kernel);
        match &seen.gpu_trouble {
            Some(why) => self.gpu_trouble.say(why),
            None => self.gpu_trouble.end("the driver tells of all GPUs again"),
        }
        match &seen.processes.unread {
            // One that is just ending may be unreadable for a moment.
            Some(why) => {
                self.unread += 1;
                if self.unread >= UNREAD_LOOKS {
                    self.process_trouble.say(&format!("not all processes can be read: {why}"));
                }
            }
            None => {
                self.unread = 0;
                self.process_trouble.end("all processes can be read again");
            }
        }
        self.number += 1;
        let stamp = Stamp {
            worker: &self.worker,
            identity: &self.identity,
            run: &self.run,
            number: self.number,
            kernel: &kernel,
        };
        let report = sample::report(&stamp, table, &plan, &seen);
        self.differences.tell(&report.drift);
        let timeout = REPORT_MAX.min(self.interval.max(Duration::from_secs(2)));
        match self.client.with_timeout(timeout).worker_report(report).await {
            Ok(v1::ReportResponse { ignored, lost_after_ms, .. }) => {
                match ignored.as_str() {
                    "" => self.ignored.end("reports are counted again"),
                    why => self.ignored.say(&format!("the report was not counted: {why}")),
                }
                self.trouble.end("the cluster takes reports again");
                self.keep_within(Duration::from_millis(lost_after_ms));
                Ok(())
            }
            Err(error) => self.refused(error).await,
        }
    }

    async fn look(&self, plan: &Plan) -> std::io::Result<(LocalPorts, Seen)> {
        let (host, wanted) = (self.host.clone(), plan.wanted.clone());
        let look = move || Ok((host.local_ports()?, host.look(&wanted)?));
        spawn_blocking(look).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
    }

    async fn refused(&mut self, error: ClientError) -> Result<(), AgentError> {
        match error.code() {
            Some(Code::NotFound) => Err(AgentError::Removed { worker: self.worker.clone() }),
            _ if error.reason() == Some(reason::OTHER_IDENTITY) => self.rejoin(error).await,
            _ => {
                self.trouble.say(&format!("the report was not taken: {error}"));
                Ok(())
            }
        }
    }

    /// The record has another identity. Who registered it anew without one left it to whoever is
    /// there; another agent did not.
    async fn rejoin(&mut self, refused: ClientError) -> Result<(), AgentError> {
        let record = match self.client.worker_get(&self.worker, None).await {
            Ok(answer) => answer.worker.unwrap_or_default(),
            Err(error) => {
                self.trouble.say(&format!("{refused}; {error}"));
                return Ok(());
            }
        };
        match register::taken_by(record, &self.identity) {
            Some(by) => Err(AgentError::Taken { worker: self.worker.clone(), by }),
            None => self.join().await,
        }
    }

    /// Says so when managed ranges overlap with what the kernel gives away, and when they no longer
    /// do.
    fn warn_of_ranges(&mut self, table: &Table, kernel: &LocalPorts) {
        let spec = table.worker.as_ref().and_then(|worker| worker.spec.as_ref());
        let warning = spec.and_then(|spec| kernel.warning(&spec.ranges));
        if warning != self.warned_of_ranges {
            match &warning {
                Some(warning) => warn!("{warning}"),
                None => info!("outgoing connections take no managed ports any more"),
            }
            self.warned_of_ranges = warning;
        }
    }
}

/// Says what goes wrong at once, then once in a while, and when it is over.
#[derive(Default)]
struct Trouble {
    said: Option<Instant>,
}

impl Trouble {
    fn say(&mut self, what: &str) {
        if self.said.is_none_or(|said| said.elapsed() > SAY_AGAIN) {
            warn!("{what}; still trying");
            self.said = Some(Instant::now());
        }
    }

    fn end(&mut self, what: &str) {
        if self.said.take().is_some() {
            info!("{what}");
        }
    }
}
