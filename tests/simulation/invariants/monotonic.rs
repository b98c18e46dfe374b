//! Nothing goes back (Raft, figure 2): neither the term nor the vote, over restarts too; and while a
//! process runs, neither what it knows to be committed, nor what it has applied, nor the revision. Nor
//! is a node that has recovered behind a revision that it had before. Who has lost its disk has lost them
//! all, and must not vote or take entries again under its id.

use std::collections::{BTreeMap, BTreeSet};

use portwarden::node::NodeId;

use super::Sight;

/// In the order in which they are compared.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Known {
    vote: (u64, NodeId, bool),
    committed: Option<u64>,
    applied: Option<u64>,
    revision: u64,
}

#[derive(Default)]
pub struct Monotonic {
    known: BTreeMap<NodeId, Known>,
    /// Newest revision that each had, its earlier processes included.
    newest: BTreeMap<NodeId, u64>,
    /// They have lost their disks, and with them what they had promised.
    wiped: BTreeSet<NodeId>,
}

impl Monotonic {
    /// It must not take part any more.
    pub fn wiped(&mut self, id: NodeId) {
        self.known.remove(&id);
        self.newest.remove(&id);
        self.wiped.insert(id);
    }

    pub fn ended(&mut self, id: NodeId) {
        if let Some(known) = self.known.get_mut(&id) {
            *known = Known { vote: known.vote, ..Known::default() };
        }
    }

    pub fn check(&mut self, sight: &Sight) -> Result<(), String> {
        let Sight { id, node, metrics, table, .. } = sight;
        let vote = &metrics.vote;
        let now = Known {
            vote: (vote.leader_id.term, vote.leader_id.node_id, vote.committed),
            committed: metrics.local_committed.as_ref().map(|id| id.index),
            applied: table.applied.as_ref().map(|id| id.index),
            revision: table.state.revision.0,
        };
        if self.wiped.contains(id) && (now.vote.0 > 0 || sight.last.is_some()) {
            let vote = now.vote;
            return Err(format!("node {id} has lost its disk, and takes part again: {vote:?}"));
        }
        let known = self.known.entry(*id).or_default();
        let back = |what: &str, now: &dyn std::fmt::Debug, before: &dyn std::fmt::Debug| {
            Err(format!("monotonic: the {what} of node {id} went from {before:?} back to {now:?}"))
        };
        if now.vote < known.vote {
            return back("vote", &now.vote, &known.vote);
        }
        if now.committed < known.committed {
            return back("commit", &now.committed, &known.committed);
        }
        if now.applied < known.applied {
            return back("applied entry", &now.applied, &known.applied);
        }
        if now.revision < known.revision {
            return back("revision", &now.revision, &known.revision);
        }
        *known = now;
        let newest = self.newest.entry(*id).or_default();
        if node.has_recovered() && now.revision < *newest {
            return back("revision after a restart", &now.revision, newest);
        }
        *newest = now.revision.max(*newest);
        Ok(())
    }
}
