//! What the system does by itself: deadlines, silences, evidence. Made of what watchers were told, or
//! of what there is.

use std::collections::{BTreeMap, BTreeSet};

use portwarden::core::{
    Actor, Command, Ground, InstanceName, Leader, LeaseId, Port, Revision, State, WorkerName,
    WorkerPhase,
};
use portwarden::proto::v1;

/// What the system may have done by itself, given what watchers were told.
pub fn by_itself(state: &State, events: &[v1::WatchEvent]) -> Vec<Command> {
    let mut commands = Vec::new();
    for event in events {
        if let Some(name) =
            event.allocation.as_ref().and_then(|a| InstanceName::parse(&a.name).ok())
        {
            commands.extend(unconfirmed(state, &name));
            commands.extend(gone(state, &name, &event.reason));
        }
        if let Some(lease) = event.lease.as_ref().filter(|_| event.r#type == "lease_ended") {
            commands.push(Command::ExpireLease { id: LeaseId(lease.id), under: Leader::default() });
        }
        if let Some(worker) = event.worker.as_ref().filter(|_| event.r#type == "worker") {
            commands.extend(phases(&worker.name));
            commands.extend(quarantines(state, worker));
        }
    }
    commands
}

/// The same where no watcher was told; what agents see is not thought of.
pub fn anything_by_itself(state: &State) -> Vec<Command> {
    let leases = state.leases_after(None).map(|lease| lease.id);
    let mut commands: Vec<_> =
        leases.map(|id| Command::ExpireLease { id, under: Leader::default() }).collect();
    commands.extend(state.reserved().filter_map(|held| unconfirmed(state, held.name())));
    for worker in state.workers_after(None) {
        if worker.has_agent() {
            commands.extend(phases(worker.name.as_str()));
        }
        let suspects = worker.pools.iter().flat_map(|pool| pool.quarantines());
        commands.extend(suspects.filter_map(|(number, _)| {
            lift(worker.name.as_str(), vec![u32::from(number)], state.revision)
        }));
    }
    commands
}

fn unconfirmed(state: &State, name: &InstanceName) -> Option<Command> {
    let held = state.allocation(name)?;
    let (token, version, ground) = (held.token, held.version, Ground::Unconfirmed);
    let (name, under) = (name.clone(), Leader::default());
    Some(Command::Reclaim { name, token, version, ground, under })
}

fn gone(state: &State, name: &InstanceName, reason: &str) -> Option<Command> {
    let reason = reason.strip_prefix("reclaimed: ")?.to_string();
    let held = state.allocation(name)?;
    let identity = state.worker(&held.worker)?.spec.identity.clone()?;
    let ground = Ground::Gone { identity, seen: state.revision, reason };
    let (token, version) = (held.token, held.version);
    Some(Command::Reclaim { name: name.clone(), token, version, ground, under: Leader::default() })
}

fn phases(worker: &str) -> Vec<Command> {
    let Ok(name) = WorkerName::parse(worker) else { return Vec::new() };
    let by = Actor::Leader(Leader::default());
    let to = |phase| Command::SetWorkerPhase { name: name.clone(), phase, by };
    vec![to(WorkerPhase::Lost), to(WorkerPhase::Ready)]
}

/// What a leader may have put under quarantine or lifted, so that the worker is as it was told.
fn quarantines(state: &State, told: &v1::Worker) -> Vec<Command> {
    let Some(worker) = WorkerName::parse(&told.name).ok().and_then(|name| state.worker(&name))
    else {
        return Vec::new();
    };
    let before: BTreeSet<u32> = worker
        .pools
        .iter()
        .flat_map(|pool| pool.quarantines())
        .map(|(number, _)| number.into())
        .collect();
    let after: BTreeMap<u32, &str> = told
        .ranges
        .iter()
        .flat_map(|range| &range.quarantined)
        .map(|port| (port.number, port.reason.as_str()))
        .collect();
    let lifted = before.iter().copied().filter(|number| !after.contains_key(number)).collect();
    let new: Vec<_> = after.iter().filter(|(number, _)| !before.contains(number)).collect();
    let quarantined = new.first().map(|(_, reason)| Command::Quarantine {
        worker: worker.name.clone(),
        ports: new.iter().filter_map(|(n, _)| Port::new("port", u64::from(**n)).ok()).collect(),
        reason: reason.to_string(),
        by: Actor::Leader(Leader::default()),
    });
    lift(&told.name, lifted, state.revision).into_iter().chain(quarantined).collect()
}

fn lift(worker: &str, ports: Vec<u32>, seen: Revision) -> Option<Command> {
    let worker = WorkerName::parse(worker).ok()?;
    let ports: Vec<_> =
        ports.iter().filter_map(|n| Port::new("port", u64::from(*n)).ok()).collect();
    let by = Actor::Leader(Leader::default());
    (!ports.is_empty()).then_some(Command::LiftQuarantine { worker, ports, by, seen })
}
