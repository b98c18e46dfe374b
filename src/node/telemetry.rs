//! What a node shows of itself: metrics. Every family is registered at start, so that an alert on a
//! counter that never moved still finds it; label sets are bounded (never a worker or an instance).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use metrics::{
    Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram,
};
use openraft::ServerState;

use super::lag::Lags;
use super::{Node, ticks};
use crate::connections::Kind;
use crate::core::limits::{ALLOCATIONS_MAX, LEASES_MAX, WORKERS_MAX};
use crate::core::{
    Applied, Cause, ChangeKind, Command, Event, Outcome, Phase, Refusal, ReleaseReason, State,
    WorkerPhase,
};
use crate::lock::guard;
use crate::raft::{ApplyObserver, Metrics, NodeId};

/// How often gauges are brought up to date.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// Names, units and meanings of every family. Called once a process, after the recorder is set.
pub fn describe() {
    for (name, text) in [
        ("portwarden_proposals_total", "Commands admitted, by command"),
        ("portwarden_proposals_refused_total", "Commands not admitted, by reason"),
        ("portwarden_commands_applied_total", "Commands applied, by command and outcome"),
        ("portwarden_conflicts_total", "Conflicts reported, by what became of the allocation"),
        ("portwarden_releases_total", "Allocations ended, by reason"),
        ("portwarden_quarantines_total", "Commands that quarantined ports"),
        ("portwarden_reclaims_total", "Allocations that the system took back, by cause"),
        ("portwarden_lingering_total", "Allocations whose holder fell silent, by cause"),
        ("portwarden_workers_lost_total", "Workers whose agent fell silent"),
        ("portwarden_keepalives_total", "Keepalives of leases, by result"),
        ("portwarden_reports_total", "Samples of agents, by what became of them"),
        ("portwarden_backups_total", "Scheduled backups, by result"),
        ("portwarden_watchers_cut_off_total", "Watchers that did not keep up"),
        (
            "portwarden_connections_refused_total",
            "Connections that were closed because as many were open as may be, by kind",
        ),
        ("portwarden_snapshots_installed_total", "Snapshots taken over from a peer"),
        (
            "portwarden_checkpoints_total",
            "Comparisons of this node's table with the cluster's, by result",
        ),
        (
            "portwarden_replicas_differ_total",
            "Replicas that this leader found to differ from the others",
        ),
    ] {
        describe_counter!(name, text);
    }
    for (name, text) in [
        ("portwarden_entry_commands", "Commands in one log entry"),
        ("portwarden_read_round_readers", "Readers served by one read round"),
    ] {
        describe_histogram!(name, Unit::Count, text);
        let _registered = histogram!(name);
    }
    for (name, text) in [
        ("portwarden_queue_seconds", "From a command's arrival until it is packed into an entry"),
        ("portwarden_proposal_seconds", "From proposal of an entry to its answer"),
        ("portwarden_read_round_seconds", "One read round"),
        ("portwarden_snapshot_seconds", "Writing one snapshot to the disk"),
        ("portwarden_apply_seconds", "Applying the entries of one round to the table"),
        (
            "portwarden_apply_processor_seconds",
            "Processor time of applying the commands themselves",
        ),
        (
            "portwarden_replicate_seconds",
            "From the sending of entries to a peer, a connection's beginning included, until it says that \
             they are on its disk",
        ),
        ("portwarden_log_flush_seconds", "One flush of the log to the disk"),
        ("portwarden_digest_seconds", "Digest of the table for a checkpoint"),
    ] {
        describe_histogram!(name, Unit::Seconds, text);
        let _registered = histogram!(name);
    }
    for (name, text) in [
        ("portwarden_is_leader", "1 on the leader"),
        ("portwarden_has_leader", "1 where a leader is known"),
        ("portwarden_term", "Raft term"),
        ("portwarden_log_last_index", "Last entry of the log"),
        ("portwarden_log_applied_index", "Last entry applied"),
        ("portwarden_revision", "Revision of the table"),
        ("portwarden_workers", "Workers in the table, by phase"),
        ("portwarden_allocations", "Allocations in the table, by phase"),
        ("portwarden_leases", "Leases in the table"),
        ("portwarden_ports", "Managed ports, by state"),
        (
            "portwarden_ranges",
            "Port ranges that are full, and that are nearly full (under a tenth free)",
        ),
        ("portwarden_gpu_bytes", "Memory of GPUs, by state"),
        (
            "portwarden_drift",
            "Differences between hosts and table that agents see, by kind; on the leader",
        ),
        ("portwarden_member_lag_entries", "Log entries that a member is behind; on the leader"),
        ("portwarden_watchers", "Watch streams that are served"),
        ("portwarden_connections", "Connections that are open, by kind"),
        ("portwarden_table_used_ratio", "How much of what the table may have it has, by kind"),
        ("portwarden_backup_every_seconds", "Time between scheduled backups; 0: none are made"),
        (
            "portwarden_replica_differed",
            "1 where this node has ended because its table differed, and has not agreed since",
        ),
        ("portwarden_backup_revision", "Revision of the newest scheduled backup; 0: none yet"),
        (
            "portwarden_log_waits_seconds",
            "How long something that was appended to the log has waited for the disk",
        ),
        ("portwarden_log_purged_index", "Last entry that the log no longer has"),
        ("portwarden_snapshot_index", "Last entry in the newest snapshot"),
        ("portwarden_checkpoint_revision", "Last revision at which the table was the cluster's"),
        ("portwarden_low_space", "1 where less space is free than --low-space"),
        ("portwarden_disk_free_bytes", "Free on the file system of the data directory"),
    ] {
        describe_gauge!(name, text);
    }
    for reason in ["overloaded", "low_space"] {
        counter!("portwarden_proposals_refused_total", "reason" => reason).absolute(0);
    }
    counter!("portwarden_replicas_differ_total").absolute(0);
    for result in ["agrees", "unknown"] {
        counter!("portwarden_checkpoints_total", "result" => result).absolute(0);
    }
    counter!("portwarden_snapshots_installed_total").absolute(0);
    counter!("portwarden_quarantines_total").absolute(0);
    for outcome in ["swapped", "reclaimed"] {
        counter!("portwarden_conflicts_total", "outcome" => outcome).absolute(0);
    }
    for kind in Command::KINDS {
        counter!("portwarden_proposals_total", "command" => kind).absolute(0);
        counter!("portwarden_commands_applied_total", "command" => kind, "outcome" => "ok")
            .absolute(0);
    }
    for result in ["counted", "ignored", "unknown_worker", "other_identity"] {
        counter!("portwarden_reports_total", "result" => result).absolute(0);
    }
    for result in ["ok", "failed"] {
        counter!("portwarden_backups_total", "result" => result).absolute(0);
    }
    for result in ["renewed", "gone"] {
        counter!("portwarden_keepalives_total", "result" => result).absolute(0);
    }
    for cause in Cause::ALL {
        counter!("portwarden_reclaims_total", "cause" => cause.name()).absolute(0);
        counter!("portwarden_lingering_total", "cause" => cause.name()).absolute(0);
    }
    counter!("portwarden_workers_lost_total").absolute(0);
    counter!("portwarden_watchers_cut_off_total").absolute(0);
    gauge!("portwarden_watchers").set(0.0);
    for kind in Kind::ALL {
        gauge!("portwarden_connections", "kind" => kind.name()).set(0.0);
        counter!("portwarden_connections_refused_total", "kind" => kind.name()).absolute(0);
    }
    for kind in ["bound_but_closed", "open_but_unknown", "held_by_another"] {
        gauge!("portwarden_drift", "kind" => kind).set(0.0);
    }
    for reason in ["holder", "forced", "reclaimed"] {
        counter!("portwarden_releases_total", "reason" => reason).absolute(0);
    }
}

/// Counts what is applied, on every replica alike. Gathered over a round: to look a counter up by its
/// labels takes as long as a quarter of a command.
///
/// What a node applies before it has what the cluster had at its start is not counted: it is old, and a
/// restart would show as a rise of everything.
#[derive(Default, Clone)]
pub(super) struct ApplyMetrics(Arc<Shared>);

#[derive(Default)]
struct Shared {
    counts: AtomicBool,
    tally: Mutex<Tally>,
}

/// How often.
#[derive(Default)]
struct Tally(BTreeMap<Counted, u64>);

/// What is counted, by what its family is labelled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Counted {
    Applied { command: &'static str, outcome: &'static str },
    Released { reason: &'static str },
    Reclaimed { cause: &'static str },
    Lingered { cause: &'static str },
    Conflict { outcome: &'static str },
    Quarantined,
    WorkerLost,
}

impl ApplyMetrics {
    /// From now on.
    pub fn begin(&self) {
        self.0.counts.store(true, Ordering::Release);
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        guard(&self.0.tally)
    }
}

impl Tally {
    fn count(&mut self, what: Counted) {
        *self.0.entry(what).or_default() += 1;
    }

    fn command(&mut self, command: &Command, applied: &Applied, events: &[Event]) {
        let outcome = match &applied.outcome {
            Ok(_) => "ok",
            Err(Refusal::Invalid(_)) => "invalid",
            Err(Refusal::NothingFits { .. } | Refusal::TableFull { .. }) => "full",
            Err(Refusal::NoWorker(_) | Refusal::NoAllocation { .. } | Refusal::NoLease(_)) => {
                "not_found"
            }
            Err(_) => "conflict",
        };
        self.count(Counted::Applied { command: command.kind(), outcome });
        match command {
            Command::Quarantine { .. } if !events.is_empty() => self.count(Counted::Quarantined),
            Command::SetWorkerPhase { phase: WorkerPhase::Lost, .. } if !events.is_empty() => {
                self.count(Counted::WorkerLost);
            }
            _ => {}
        }
        events.iter().for_each(|event| self.event(event));
        match &applied.outcome {
            Ok(Outcome::Swapped(_)) => self.count(Counted::Conflict { outcome: "swapped" }),
            Ok(Outcome::Reclaimed { .. }) => self.count(Counted::Conflict { outcome: "reclaimed" }),
            _ => {}
        }
    }

    fn event(&mut self, event: &Event) {
        match event {
            Event::Released { why, .. } => {
                let reason = match why {
                    ReleaseReason::ByHolder => "holder",
                    ReleaseReason::Forced { .. } => "forced",
                    ReleaseReason::Reclaimed { cause, .. } => {
                        self.count(Counted::Reclaimed { cause: cause.name() });
                        "reclaimed"
                    }
                };
                self.count(Counted::Released { reason });
            }
            // It lingers since this change: the next one ends it.
            Event::Changed(allocation) => {
                let change = allocation.last_change.as_ref().map(|change| &change.kind);
                if let Some(ChangeKind::Lingered { cause }) = change {
                    self.count(Counted::Lingered { cause: cause.name() });
                }
            }
            _ => {}
        }
    }

    fn publish(&mut self) {
        for (what, count) in std::mem::take(&mut self.0) {
            let counter = match what {
                Counted::Applied { command, outcome } => counter!(
                    "portwarden_commands_applied_total", "command" => command, "outcome" => outcome
                ),
                Counted::Released { reason } => {
                    counter!("portwarden_releases_total", "reason" => reason)
                }
                Counted::Reclaimed { cause } => {
                    counter!("portwarden_reclaims_total", "cause" => cause)
                }
                Counted::Lingered { cause } => {
                    counter!("portwarden_lingering_total", "cause" => cause)
                }
                Counted::Conflict { outcome } => {
                    counter!("portwarden_conflicts_total", "outcome" => outcome)
                }
                Counted::Quarantined => counter!("portwarden_quarantines_total"),
                Counted::WorkerLost => counter!("portwarden_workers_lost_total"),
            };
            counter.increment(count);
        }
    }
}

impl ApplyObserver for ApplyMetrics {
    fn applied(&self, command: &Command, applied: &Applied, events: &[Event]) {
        if self.0.counts.load(Ordering::Acquire) {
            self.tally().command(command, applied, events);
        }
    }

    fn published(&self, _: &State) {
        self.tally().publish();
    }

    fn installed(&self, _: &State) {
        counter!("portwarden_snapshots_installed_total").increment(1);
    }
}

/// Brings the gauges up to date for as long as Raft runs.
pub(super) async fn report(node: Node) {
    let id = node.id().to_string();
    for name in [
        "portwarden_checkpoint_revision",
        "portwarden_low_space",
        "portwarden_disk_free_bytes",
        "portwarden_backup_revision",
    ] {
        gauge!(name, "node" => id.clone()).set(0.0);
    }
    let backups = node.inner.config.backups.as_ref();
    let backup_seconds = backups.map_or(0.0, |plan| plan.every.as_secs_f64());
    gauge!("portwarden_backup_every_seconds", "node" => id.clone()).set(backup_seconds);
    let mut every = ticks(REPORT_EVERY);
    let mut lags = Lags::default();
    let mut shown = BTreeSet::from([node.id()]);
    loop {
        every.tick().await;
        let raft = node.inner.metrics();
        if raft.running_state.is_err() {
            return;
        }
        let table = node.table();
        let applied = raft.last_applied.map_or(0, |id| id.index());
        for (name, value) in [
            ("portwarden_is_leader", u64::from(raft.state == ServerState::Leader)),
            ("portwarden_has_leader", u64::from(node.roll().has_leader())),
            ("portwarden_term", raft.current_term),
            ("portwarden_log_last_index", raft.last_log_index.unwrap_or(0)),
            ("portwarden_log_applied_index", applied),
            ("portwarden_revision", table.state.revision.0),
            ("portwarden_leases", table.state.lease_count() as u64),
            ("portwarden_log_purged_index", raft.purged.map_or(0, |id| id.index())),
            ("portwarden_snapshot_index", raft.snapshot.map_or(0, |id| id.index())),
        ] {
            gauge!(name, "node" => id.clone()).set(value as f64);
        }
        for phase in [Phase::Reserved, Phase::Bound, Phase::Lingering] {
            let count = table.state.phase_count(phase) as f64;
            let labels = [("node", id.clone()), ("phase", phase.name().to_string())];
            gauge!("portwarden_allocations", &labels).set(count);
        }
        for (kind, count, most) in [
            ("workers", table.state.worker_count(), WORKERS_MAX),
            ("allocations", table.state.allocation_count(), ALLOCATIONS_MAX),
            ("leases", table.state.lease_count(), LEASES_MAX),
        ] {
            let labels = [("node", id.clone()), ("kind", kind.to_string())];
            gauge!("portwarden_table_used_ratio", &labels).set(count as f64 / most as f64);
        }
        show_lag(&raft, &mut lags, &mut shown);
    }
}

/// How far the members are behind; 0 where this node does not lead, and of who is none any more: what was
/// shown once is shown for ever.
fn show_lag(raft: &Metrics, lags: &mut Lags, shown: &mut BTreeSet<NodeId>) {
    let last = raft.last_log_index.unwrap_or(0);
    let show = |member: NodeId, lag: u64| {
        gauge!("portwarden_member_lag_entries", "member" => member.to_string()).set(lag as f64);
    };
    for member in std::mem::take(shown) {
        show(member, 0);
    }
    for (member, _) in raft.membership_config.nodes() {
        let matched = raft.replication.as_ref().and_then(|matched| matched.get(member));
        let lag = matched.map_or(0, |id| last - id.as_ref().map_or(0, |id| id.index()).min(last));
        shown.insert(*member);
        show(*member, lag);
        match matched {
            Some(Some(_)) => lags.tell(*member, lag),
            Some(None) => {}                 // it has not said yet how far it is
            None => *lags = Lags::default(), // another leads, or nobody
        }
    }
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;
    use crate::core::{Millis, Origin, apply};

    #[test]
    fn what_a_node_applies_again_at_its_start_is_not_counted() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let mut state = State::default();
        let counted = ApplyMetrics::default();
        let mut grant = || {
            let command = Command::GrantLease { ttl: Millis(60_000) };
            let (applied, events) = apply(&mut state, &Origin::default(), &command);
            counted.applied(&command, &applied, &events);
            counted.published(&state);
        };
        metrics::with_local_recorder(&recorder, || {
            (0..3).for_each(|_| grant());
            counted.begin();
            (0..2).for_each(|_| grant());
        });
        let shown = recorder.handle().render();
        let applied =
            shown.lines().find(|line| line.starts_with("portwarden_commands_applied_total{"));
        assert!(applied.is_some_and(|line| line.ends_with(" 2")), "{shown}");
    }
}
