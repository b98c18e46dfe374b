//! State machine safety (Raft §5.4.3): who has applied an index has the same table there as all
//! others.
//!
//! The table to compare with is the simulation's own: it applies every committed entry once, in
//! order, and never restarts. So a node that applies something twice after a restart, loses
//! something in a snapshot, or comes to a result that depends on its process, is found at the next
//! look. The core's own invariants are checked on it now and then, and so hold for all.

use std::collections::BTreeMap;

use portwarden::api::meaning;
use portwarden::core::{self, State, check_invariants};
use portwarden::node::NodeId;
use portwarden::proto::v1;
use portwarden::store::LogRecord;
use portwarden::store::codec::{self, Payload};

use super::Sight;
use super::commits::Commits;

/// Tables that are kept to compare with; a node that is further behind is not compared.
const KEPT: usize = 4096;
/// Entries between two checks of the core's invariants, which cost as much as the table is large.
const INVARIANTS_EVERY: u64 = 16;

/// A replica that nothing is done to.
#[derive(Default)]
pub struct Reference {
    state: State,
    next: u64,
    untold: Vec<v1::WatchResponse>,
}

impl Reference {
    pub fn state(&self) -> &State {
        &self.state
    }

    fn apply(&mut self, record: &LogRecord) -> Result<(), String> {
        let at = record.at;
        let leader = core::Leader { term: at.term, node: at.node };
        match codec::decode_payload(&record.payload).map_err(|error| error.to_string())? {
            Payload::Blank => {}
            Payload::Membership(membership) => {
                for (id, member) in &membership.nodes {
                    self.state.remember_member(*id, &member.incarnation);
                }
            }
            Payload::Batch(batch) => {
                let origin = core::Origin { leader, at: batch.at() };
                for command in batch.commands() {
                    let (applied, events) = core::apply(&mut self.state, &origin, command);
                    if !events.is_empty() {
                        let events = meaning::shown(&events, applied.revision, &self.state);
                        let revision = applied.revision.0;
                        self.untold.push(v1::WatchResponse { revision, events, partial: false });
                    }
                }
            }
        }
        self.next = at.index + 1;
        if at.index.is_multiple_of(INVARIANTS_EVERY) {
            check_invariants(&self.state).map_err(|why| format!("the core: {why}"))?;
        }
        Ok(())
    }
}

#[derive(Default)]
pub struct Tables {
    reference: Reference,
    /// By the last entry in it.
    states: BTreeMap<u64, State>,
    seen: BTreeMap<NodeId, u64>,
}

impl Tables {
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// What has changed since this was asked last: all that a watcher may be told.
    pub fn changes(&mut self) -> Vec<v1::WatchResponse> {
        std::mem::take(&mut self.reference.untold)
    }

    pub fn ended(&mut self, id: NodeId) {
        self.seen.remove(&id);
    }

    /// Applies what is newly committed.
    pub fn follow(&mut self, commits: &Commits) -> Result<(), String> {
        for record in commits.from(self.reference.next) {
            self.reference.apply(record)?;
            self.states.insert(record.at.index, self.reference.state.clone());
            if self.states.len() > KEPT {
                self.states.pop_first();
            }
        }
        Ok(())
    }

    pub fn check(&mut self, sight: &Sight) -> Result<(), String> {
        let Some(applied) = sight.table.applied.as_ref().map(|id| id.index) else { return Ok(()) };
        if self.seen.insert(sight.id, applied) == Some(applied) {
            return Ok(());
        }
        match self.states.get(&applied) {
            // Its indexes are its own.
            Some(state) if *state == sight.table.state => {
                match applied.is_multiple_of(INVARIANTS_EVERY) {
                    true => check_invariants(&sight.table.state)
                        .map_err(|why| format!("the core of node {}: {why}", sight.id)),
                    false => Ok(()),
                }
            }
            Some(state) => Err(format!(
                "state machine safety: node {} has another table at entry {applied}: {}",
                sight.id,
                difference(&sight.table.state, state)
            )),
            None if self.states.first_key_value().is_some_and(|(first, _)| applied < *first) => {
                Ok(())
            }
            None => Err(format!(
                "state machine safety: node {} has applied entry {applied}, which is not committed",
                sight.id
            )),
        }
    }
}

/// The first thing that two tables differ in.
fn difference(found: &State, wanted: &State) -> String {
    if found.revision != wanted.revision {
        return format!("revision {} instead of {}", found.revision, wanted.revision);
    }
    let workers = found.workers_after(None).zip(wanted.workers_after(None));
    for (found, wanted) in workers {
        if found != wanted {
            return format!("{found:#?} instead of {wanted:#?}");
        }
    }
    let allocations = found.allocations_after(None).zip(wanted.allocations_after(None));
    for (found, wanted) in allocations {
        if found != wanted {
            return format!("{found:#?} instead of {wanted:#?}");
        }
    }
    format!(
        "{} workers, {} allocations, {} leases instead of {}, {}, {}; or something else",
        found.worker_count(),
        found.allocation_count(),
        found.lease_count(),
        wanted.worker_count(),
        wanted.allocation_count(),
        wanted.lease_count()
    )
}
