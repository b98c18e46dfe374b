//! The table of a cluster that is restored from a backup: what it holds is as it was then, and
//! nobody knows what has happened since.
//!
//! - The revision is far ahead of any that the old cluster can have come to, and every allocation
//!   has it as its token and version: no token, version or watch of the old cluster is taken for one
//!   of the new. A holder learns its new token by repeating its request under its uid.
//! - Every worker is `Unverified`: it holds what it held and grants nothing, until its agent has
//!   reported or an operator has verified it.
//! - Ids of nodes start afresh.

use super::allocation::Allocation;
use super::name::{Revision, Token};
use super::state::State;
use super::worker::{Worker, WorkerPhase};
#[cfg(planted)]
use crate::planted::{self, Bug};

/// What a restore adds to the revision: more changes than a cluster makes in 30 years at 1000 a
/// second, and little enough for programs that count in floats.
pub const RESTORE_GAP: u64 = 1 << 40;

impl State {
    /// This table as that of a new cluster.
    pub fn anew(&self) -> State {
        let mut state = self.clone();
        let revision = Revision(self.revision.0 + RESTORE_GAP);
        #[cfg(planted)]
        let revision = match planted::is(Bug::RestoreReusesTokens) {
            true => self.revision,
            false => revision,
        };
        state.revision = revision;
        state.members = Default::default();
        for worker in self.workers.values() {
            let worker = Worker::clone(worker);
            let phase = WorkerPhase::Unverified;
            state.put_worker(Worker { phase, version: revision, ..worker });
        }
        for held in self.allocations.values() {
            state.put_allocation(Allocation {
                token: Token(revision.0),
                version: revision,
                last_change: None,
                ..Allocation::clone(held)
            });
        }
        state
    }
}
