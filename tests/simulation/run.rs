//! One run: a cluster begins, is used and tormented, is left alone, and must be well.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use portwarden::api::meaning::{Request, Response};
use portwarden::core;
use portwarden::proto::v1;
use sha2::{Digest as _, Sha256};

use crate::caller::{Caller, Ended};
use crate::checker::{self, Report};
use crate::cluster::Life;
use crate::errands::until_answered;
use crate::history::{Header, History, Record, Recorder};
use crate::nemesis;
use crate::people::{self, Told};
use crate::plan::{AVAILABLE_WITHIN, Plan};
use crate::sim::{Broken, Sim};
use crate::site::{Kernel, Site};
use crate::workload;

/// How long what nobody holds any more may be held.
const FREED_WITHIN: Duration = Duration::from_secs(40);
/// How long watchers may be behind.
const TOLD_WITHIN: Duration = Duration::from_secs(30);
const PROBE: Duration = Duration::from_secs(2);

/// What came of a run.
pub struct Outcome {
    pub trace: String,
    pub report: Report,
    /// What ended it at once.
    pub broken: Option<Broken>,
    pub simulated: Duration,
    pub revisions: u64,
}

impl Outcome {
    pub fn violations(&self) -> Vec<String> {
        let found = self.report.violations.iter().map(ToString::to_string);
        self.broken.iter().cloned().chain(found).collect()
    }
}

/// Runs a seed in this process, which must be a fresh one. History and data are left in `dir`.
pub fn run(plan: Plan, dir: &Path, command: String) -> Result<Outcome, String> {
    let history = dir.join("history.jsonl");
    let header = Header {
        command,
        seed: plan.seed,
        complete: true,
        confirm_within_ms: plan.settings.lifecycle.confirm_within.as_millis() as u64,
        available_within_ms: AVAILABLE_WITHIN.as_millis() as u64,
    };
    let recorder = Recorder::create(&history, header).map_err(|error| error.to_string())?;
    let mut sim = Sim::new(plan, dir, Arc::new(recorder));
    let broken = sim.live().err();
    sim.recorder.flush();
    let simulated = sim.now();
    let revisions = sim.witness.tables.reference().state().revision.0;
    let trace = std::mem::take(&mut sim.trace).finish(&history).map_err(|e| e.to_string())?;
    // A history that was broken off has calls without an end, and says nothing of healing.
    let report = checker::check(&History::read(&history)?);
    Ok(Outcome { trace, report, broken, simulated, revisions })
}

impl Sim {
    fn live(&mut self) -> Result<(), Broken> {
        for at in 0..self.cluster.seats.len() {
            self.start(at);
        }
        self.until_available()?;
        self.register_workers()?;
        let told = people::start_watchers(self);
        people::start_clients(self);
        for at in 0..self.sites.len() {
            self.start_agent(at);
            self.start_instances(at);
        }
        nemesis::torment(self)?;
        let backup = self.witness.tables.reference().state().clone();
        self.heal()?;
        self.settle_up()?;
        self.until_told(&told)?;
        if self.plan.restores {
            self.restore(&backup)?;
        }
        Ok(())
    }

    fn register_workers(&mut self) -> Result<(), Broken> {
        for number in 0..=self.plan.sites {
            let worker = format!("site{number}");
            // The last one has no agent.
            let agent =
                (number < self.plan.sites).then(|| self.world.add_host(&format!("agent{number}")));
            let starter = self.world.add_host(&format!("starter{number}"));
            let kernel = Kernel::new(&worker, self.recorder.clone());
            self.sites.push(Site { worker, kernel, agent, starter, booting: false });
        }
        let sites = self.sites.iter();
        let sites = sites.map(|site| (site.worker.clone(), site.spec()));
        let sites = sites.map(|(name, spec)| v1::RegisterRequest { name, spec: Some(spec) });
        let all: Vec<_> = workload::workers().into_iter().chain(sites).collect();
        for register in all {
            self.insist(Request::Register(register))?;
        }
        Ok(())
    }

    /// Nothing is done to anybody any more; whatever is down is started, and then all must be
    /// available in time.
    fn heal(&mut self) -> Result<(), Broken> {
        self.ambush = None;
        self.world.net.mend_all();
        for at in 0..self.cluster.seats.len() {
            let host = self.cluster.seats[at].host;
            self.world.pause(host, false);
            self.world.set_wall_skew(host, 0);
            self.cluster.seats[at].disk.set_latency(self.plan.settings.disk_latency);
        }
        self.start_what_is_down();
        self.recorder.put(|at| Record::Healed { at });
        self.until_available()?;
        self.recorder.put(|at| Record::Available { at });
        self.until("the membership is whole", FREED_WITHIN, |sim| {
            Ok(sim.pending.iter().map(|pending| format!("{pending:?}")).collect())
        })
    }

    /// Until nothing is left of what `left` names.
    fn until(
        &mut self,
        what: &str,
        within: Duration,
        mut left: impl FnMut(&mut Sim) -> Result<Vec<String>, Broken>,
    ) -> Result<(), Broken> {
        let began = self.now();
        loop {
            let left = left(self)?;
            if left.is_empty() {
                return Ok(());
            }
            if self.now() - began > within {
                let left = left.join(", ");
                return Err(format!("liveness: not after {within:?}: {what}; left: {left}"));
            }
            self.run_for(Duration::from_millis(200))?;
        }
    }

    /// Until a read and a write go through each node that is a member.
    fn until_available(&mut self) -> Result<(), Broken> {
        let began = self.now();
        for at in 0..self.cluster.seats.len() {
            let seat = &self.cluster.seats[at];
            if seat.life == Life::Gone || seat.may_end.is_some() {
                continue;
            }
            let endpoint = seat.client();
            while !self.serves(&endpoint)? {
                self.start_what_is_down();
                if self.now() - began > AVAILABLE_WITHIN {
                    return Err(format!("liveness: {endpoint} does not serve: {}", self.state()));
                }
                self.run_for(Duration::from_millis(100))?;
            }
        }
        Ok(())
    }

    /// Also who was asked to stop long ago, and has ended just now.
    fn start_what_is_down(&mut self) {
        for at in 0..self.cluster.seats.len() {
            if let Life::Down { .. } = self.cluster.seats[at].life {
                self.start(at);
            }
        }
    }

    fn serves(&mut self, endpoint: &str) -> Result<bool, Broken> {
        let one = self.operators_ways(vec![endpoint.to_string()]);
        let mut caller = Caller::new(self.recorder.clone(), 0, one, 0).with_timeout(PROBE);
        self.operate(async move {
            let grant = Request::GrantLease(v1::GrantRequest { ttl_ms: 1000 });
            let read = Request::List(v1::ListRequest::default());
            caller.call(read).await.ok().is_some() && caller.call(grant).await.ok().is_some()
        })
    }

    /// Calls until it is answered.
    fn insist(&mut self, request: Request) -> Result<Response, Broken> {
        let what = format!("{request:?}");
        let caller = self.operators_caller();
        let mut answer = self.begin_to_operate(until_answered(caller, request));
        let began = self.now();
        loop {
            match answer.take() {
                Some(Ended::Ok(response)) => return Ok(response),
                Some(Ended::Refused(status)) => return Err(format!("{what}: {status}")),
                Some(Ended::Lost) | None if self.now() - began > AVAILABLE_WITHIN => {
                    return Err(format!("liveness: {what}: not answered; {}", self.state()));
                }
                Some(Ended::Lost) | None => self.step()?,
            }
        }
    }

    /// Of all nodes, for people.
    fn state(&self) -> String {
        let shown = self.cluster.seats.iter().map(|seat| {
            let Some(node) = seat.node() else {
                return format!("node {} {:?}", seat.id, seat.life);
            };
            let metrics = node.raft_metrics();
            format!(
                "node {} {:?} term {} leader {:?} log {:?} applied {:?} {:?}",
                seat.id,
                metrics.state,
                metrics.current_term,
                metrics.current_leader,
                metrics.last_log_index,
                metrics.last_applied.map(|id| id.index),
                metrics.running_state,
            )
        });
        shown.collect::<Vec<_>>().join("; ")
    }

    /// All that is held is given back; before and after, the copies of all nodes are compared.
    fn settle_up(&mut self) -> Result<(), Broken> {
        self.stop_clients();
        self.compare_copies()?;
        for at in 0..self.sites.len() {
            self.world.kill(self.sites[at].starter);
            self.sites[at].kernel.end_all();
            self.start_agent(at);
        }
        // What an agent watches goes on its evidence, what is on a lease or unconfirmed by itself.
        let sites = self.sites.iter().map(|site| (site.worker.clone(), site.agent.is_some()));
        let sites: BTreeMap<_, _> = sites.collect();
        self.until("what nobody uses is free", FREED_WITHIN, |sim| {
            let mut held = sim.table()?.allocations;
            held.retain(|held| {
                let by_itself = held.lease != 0 || held.phase == v1::Phase::Reserved as i32;
                sites.get(&held.worker).is_some_and(|has_agent| *has_agent || by_itself)
            });
            Ok(held.iter().map(|held| format!("{held:?}")).collect())
        })?;
        self.until("no port is quarantined on old suspicion", FREED_WITHIN, |sim| {
            let state = sim.witness.tables.reference().state();
            let pools = state.workers_after(None).flat_map(|worker| &worker.pools);
            let mut quarantines: Vec<_> = pools.flat_map(|pool| pool.quarantines()).collect();
            quarantines.retain(|(_, quarantine)| quarantine.source != core::Source::Operator);
            Ok(quarantines.iter().map(|quarantine| format!("{quarantine:?}")).collect())
        })?;
        self.until("no allocation is unconfirmed and no lease is left", FREED_WITHIN, |sim| {
            let state = sim.witness.tables.reference().state();
            let leases = state.leases_after(None).map(|lease| format!("lease {}", lease.id));
            Ok(state.reserved().map(|held| held.name().to_string()).chain(leases).collect())
        })?;
        for held in self.table()?.allocations {
            let authority = Some(v1::release_request::Authority::Token(held.token));
            self.insist(Request::Release(v1::ReleaseRequest { name: held.name, authority }))?;
        }
        self.recorder.put(|at| Record::Emptied { at });
        self.table()?;
        let workers = self.witness.tables.reference().state().workers_after(None);
        let names: Vec<_> = workers.map(|worker| worker.name.to_string()).collect();
        for name in names {
            self.insist(Request::GetWorker(v1::GetWorkerRequest { name, read: None }))?;
        }
        self.compare_copies()
    }

    fn stop_clients(&mut self) {
        for host in 0..self.world.hosts() {
            if self.world.name(host).starts_with("clients") {
                self.world.kill(host);
            }
        }
    }

    fn table(&mut self) -> Result<v1::ListResponse, Broken> {
        let list = v1::ListRequest { page_size: 10_000, ..Default::default() };
        match self.insist(Request::List(list))? {
            Response::List(list) => Ok(list),
            other => Err(format!("a list, and not {other:?}")),
        }
    }

    /// Asks each node for its own copy, from the revision on that the table has now.
    fn compare_copies(&mut self) -> Result<(), Broken> {
        let min_revision = self.table()?.revision;
        for at in self.cluster.running().collect::<Vec<_>>() {
            let seat = &self.cluster.seats[at];
            let (node, endpoint) = (seat.id, seat.client());
            let one = self.operators_ways(vec![endpoint]);
            let mut caller = Caller::new(self.recorder.clone(), 0, one, 0);
            let read = Some(v1::ReadOptions { stale: true, min_revision });
            let list = v1::ListRequest { read, page_size: 10_000, ..Default::default() };
            let answer =
                self.operate(async move { caller.call(Request::List(list)).await.ok() })?;
            let Some(Response::List(list)) = answer else { continue };
            let bytes = serde_json::to_vec(&list.allocations).map_err(|e| e.to_string())?;
            let digest: String =
                Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
            let revision = list.revision;
            self.recorder.put(|at| Record::Copy { at, node, revision, digest });
        }
        Ok(())
    }

    fn until_told(&mut self, told: &Told) -> Result<(), Broken> {
        let revision = self.table()?.revision;
        self.until(&format!("all watchers were told up to {revision}"), TOLD_WITHIN, |_| {
            Ok(people::behind(told, revision))
        })
    }
}
