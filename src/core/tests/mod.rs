//! The rules of the table, one test a rule; grouped by what they speak of.

use super::*;

mod allocate;
mod life;
mod limits_hold;
#[allow(dead_code)] // shared with the integration test `core`
#[path = "make.rs"]
mod make;
mod placement;
mod quarantines;
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

    fn apply(&mut self, command: Command) -> Result<Outcome, Refusal> {
        let before = self.state.clone();
        let (applied, events) = apply(&mut self.state, &command);
        check_invariants(&self.state).unwrap();
        let changed = before != self.state;
        assert_eq!(changed, digest(&before) != digest(&self.state));
        assert_eq!(changed, !events.is_empty(), "{command:?}: what changes leaves an event");
        assert_eq!(self.state.revision.0, before.revision.0 + u64::from(changed), "{command:?}");
        assert_eq!(applied.revision, self.state.revision);
        assert!(applied.outcome.is_ok() || !changed, "{command:?}: a refusal changes nothing");
        self.events = events;
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

    fn get(&self, name: &str) -> &Allocation {
        self.state.allocation(&instance(name)).unwrap()
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

/// What one worker lacked.
fn lack(refusal: Refusal) -> Lack {
    match refusal {
        Refusal::NothingFits { shortage: Shortage::OnWorker { lack, .. }, .. } => lack,
        other => panic!("not a lack on one worker: {other}"),
    }
}
