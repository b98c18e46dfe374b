//! The table of a cluster that is restored from a backup: what it holds is as it was then, and
//! nobody knows what has happened since.
//!
//! - The revision is far ahead of any that the old cluster can have come to, and every allocation
//!   has it as its token and version: no token, version or watch of the old cluster is taken for one
//!   of the new. It is ahead, too, of any that came of the same backup before. A holder learns its new
//!   token by repeating its request under its uid.
//! - Every worker is `Unverified`: it holds what it held and grants nothing, until its agent has
//!   reported or an operator has verified it.
//! - Ids of nodes start afresh.

use super::allocation::Allocation;
use super::invariants::COUNTER_MAX;
use super::name::{Millis, Revision, Token};
use super::state::State;
use super::worker::{Worker, WorkerPhase};
#[cfg(planted)]
use crate::planted::{self, Bug};

/// What a restore adds to the revision: more changes than a cluster makes in 30 years at 1000 a
/// second, and little enough for programs that count in floats.
pub const RESTORE_GAP: u64 = 1 << 40;

/// What is restored at a time begins at 1024 revisions for each millisecond of it, more than any cluster
/// changes its table: whatever was restored earlier has not come to it.
const REVISIONS_PER_MS: u64 = 1 << 10;
/// Where that is not so far ahead of the backup, 70 minutes, the clocks may differ, and the gap is added.
const CLOCK_MARGIN: u64 = 1 << 32;

impl State {
    /// This table as that of a new cluster that begins at `now`, in Unix time.
    pub fn anew(&self, now: Millis) -> State {
        let mut state = self.clone();
        let after_others = now.0.saturating_mul(REVISIONS_PER_MS).min(COUNTER_MAX / 2);
        let revision = match after_others >= self.revision.0 + CLOCK_MARGIN {
            true => Revision(after_others),
            // By the time of the restore too: that of a second one is another.
            false => Revision(self.revision.0 + RESTORE_GAP + after_others % RESTORE_GAP),
        };
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
