//! The rules of the table, one test a rule; grouped by what they speak of.

use super::*;

mod allocate;
mod anew;
mod departures;
mod explained;
mod guards;
mod leases;
mod levels;
mod life;
mod limits_hold;
mod lingering;
#[allow(dead_code)] // shared with the integration test `core`
#[path = "make.rs"]
pub(crate) mod make;
mod phases;
mod placement;
mod quarantines;
mod reclaim;
mod restored;
mod workers;

use make::*;

/// A table under test. After every command it checks the invariants, that a refusal changes
/// nothing, and that a revision is taken exactly by what changes something.
#[derive(Default)]
struct Table {
    state: State,
    /// Of the last command.
    events: Vec<Event>,
}

impl Table {
    /// One worker `w` with ports 40000 to `last` as range `service`.
    fn with_ports(last: u16) -> Self {
        let mut table = Table::default();
        table.ok(register("w", spec(&[("service", 40000, last)], &[])));
        table
    }

    /// The same with an agent, which has known the worker under boot `b1` from the start.
    fn with_agent(last: u16) -> Self {
        let mut table = Table::default();
        let span = ("service", 40000, last);
        let watched = with(spec(&[span], &[24]), |s| s.identity = Some(booted("b1")));
        table.ok(register("w", watched));
        table
    }

    fn apply(&mut self, command: Command) -> Result<Outcome, Refusal> {
        let before = self.state.clone();
        let (applied, events) = apply(&mut self.state, &ORIGIN, &command);
        check_invariants(&self.state).unwrap();
        let changed = before != self.state;
        assert_eq!(changed, digest(&before) != digest(&self.state));
        assert_eq!(changed, !events.is_empty(), "{command:?}: what changes leaves an event");
        assert_eq!(self.state.revision.0, before.revision.0 + u64::from(changed), "{command:?}");
        assert_eq!(applied.revision, self.state.revision);
        assert!(applied.outcome.is_ok() || !changed, "{command:?}: a refusal changes nothing");
        self.events = events.into_vec();
        applied.outcome
    }

    fn ok(&mut self, command: Command) -> Outcome {
        let shown = format!("{command:?}");
        self.apply(command).unwrap_or_else(|refusal| panic!("{shown}: {refusal}"))
    }

    fn refused(&mut self, command: Command) -> Refusal {
        self.apply(command).expect_err("refused")
    }

    /// Succeeds and changes nothing.
    fn noop(&mut self, command: Command) -> Outcome {
        let before = self.state.revision;
        let outcome = self.ok(command);
        assert_eq!(self.state.revision, before, "a no-op takes no revision");
        outcome
    }

    fn grant(&mut self, claim: Claim) -> std::sync::Arc<Allocation> {
        self.gang(&[claim]).remove(0)
    }

    fn gang(&mut self, claims: &[Claim]) -> Vec<std::sync::Arc<Allocation>> {
        match self.ok(allocate(claims)) {
            Outcome::Allocated { allocations, repeated: false } => allocations,
            other => panic!("not a fresh grant: {other:?}"),
        }
    }

    /// Granted, and its holder said that it listens.
    fn bound(&mut self, claim: Claim) -> Allocation {
        let held = self.grant(claim);
        self.ok(confirm(held.name().as_str(), held.token, 0));
        self.get(held.name().as_str()).clone()
    }

    /// Granted, and not confirmed in time.
    fn lingering(&mut self, claim: Claim) -> Allocation {
        let held = self.grant(claim);
        self.ok(miss(&held));
        self.get(held.name().as_str()).clone()
    }

    fn lease(&mut self) -> LeaseId {
        match self.ok(grant_lease(10_000)) {
            Outcome::Lease(lease) => lease.id,
            other => panic!("no lease: {other:?}"),
        }
    }

    fn get(&self, name: &str) -> &Allocation {
        self.state.allocation(&instance(name)).unwrap()
    }

    fn is_held(&self, name: &str) -> bool {
        self.state.allocation(&instance(name)).is_some()
    }

    /// Names on a lease.
    fn on(&self, id: LeaseId) -> Vec<&str> {
        self.state.lease(id).unwrap().allocations.keys().map(InstanceName::as_str).collect()
    }

    fn worker(&self, name: &str) -> &Worker {
        self.state.worker(&worker(name)).unwrap()
    }
}

fn numbers(allocation: &Allocation) -> Vec<u16> {
    allocation.ports.iter().map(|p| p.number).collect()
}

fn gpus(allocation: &Allocation) -> Vec<u32> {
    allocation.gpus.iter().map(|g| g.index).collect()
}

/// Nothing is known of how it left.
fn no_allocation(name: &str) -> Refusal {
    Refusal::NoAllocation { name: instance(name), departed: None }
}

/// What was not proven.
fn unproven(refusal: Refusal) -> String {
    match refusal {
        Refusal::NotProven { what, .. } => what,
        other => panic!("refused for another reason: {other}"),
    }
}

/// What one worker lacked.
fn lack(refusal: Refusal) -> Lack {
    match refusal {
        Refusal::NothingFits { shortage: Shortage::OnWorker { lack, .. }, .. } => lack,
        other => panic!("not a lack on one worker: {other}"),
    }
}
