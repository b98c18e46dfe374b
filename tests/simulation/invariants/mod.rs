//! What must hold of all nodes together, after every step.
//!
//! [`Witness`] looks at every running node and remembers what it saw: so an invariant costs what has
//! changed, and not what there is. Each is a file of its own, with its source:
//!
//! | invariant | module | source |
//! |---|---|---|
//! | election safety | [`elections`] | Raft §5.2 |
//! | what is said to be on the disk is there | [`durability`] | Raft §5.1, figure 2 |
//! | log matching | [`logs`] | Raft §5.3 |
//! | leader completeness | [`leaders`] | Raft §5.4 |
//! | what is committed stays, and is on a majority's disks | [`commits`] | Raft §5.3, §5.4 |
//! | nothing goes back: term, vote, commit, applied, revision | [`monotonic`] | Raft figure 2 |
//! | state machine safety, and the core's own invariants | [`tables`] | Raft §5.4.3; `core` |
//!
//! "Raft" is Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm", USENIX ATC
//! 2014. openraft's leader id is (term, node), so that two leaders of one term are told apart by
//! their node: where the paper says term, this is what is compared.

mod commits;
mod durability;
mod elections;
mod leaders;
mod logs;
mod monotonic;
mod tables;

use std::collections::BTreeMap;
use std::sync::Arc;

use portwarden::node::{Node, NodeId};
use portwarden::raft::{Metrics, Table};
use portwarden::store::codec::Position;
use portwarden::store::{LogRecord, SimulatedDisk};

/// A leader by the term that it was elected in.
pub type Leader = (u64, NodeId);

/// One running node, at the end of a step.
pub struct Sight {
    pub id: NodeId,
    /// Which of its processes this is.
    pub process: usize,
    pub node: Node,
    pub disk: SimulatedDisk,
    pub metrics: Metrics,
    pub table: Arc<Table>,
    /// The last entry of its log and up to where it was purged.
    pub last: Option<Position>,
    pub purged: Option<Position>,
}

impl Sight {
    /// `None` where it has just begun.
    pub fn of(id: NodeId, process: usize, node: Node, disk: SimulatedDisk) -> Option<Sight> {
        let (metrics, table) = (node.raft_metrics(), node.table());
        // Raft has not said anything yet.
        if metrics.vote.leader_id.term == 0 && disk.durable_vote().is_some() {
            return None;
        }
        let (purged, last) = node.log().ok()?.bounds();
        Some(Sight { id, process, node, disk, metrics, table, last, purged })
    }

    pub fn entries(&self, from: u64, to: u64) -> Result<Vec<LogRecord>, String> {
        let log = self.node.log().map_err(|error| error.to_string())?;
        log.read(from..to, usize::MAX).map_err(|error| error.to_string())
    }

    pub fn entry(&self, index: u64) -> Result<Option<LogRecord>, String> {
        Ok(self.entries(index, index + 1)?.pop())
    }

    pub fn leads(&self) -> Option<Leader> {
        let leads = self.metrics.state == openraft::ServerState::Leader;
        leads.then_some((self.metrics.vote.leader_id.term, self.id))
    }
}

/// Every voter configuration of which a majority is needed.
pub fn quorums(sight: &Sight) -> Vec<Vec<NodeId>> {
    let membership = sight.metrics.membership_config.membership();
    membership.get_joint_config().iter().map(|voters| voters.iter().copied().collect()).collect()
}

/// What was seen so far, of all nodes.
#[derive(Default)]
pub struct Witness {
    pub elections: elections::Elections,
    pub logs: logs::Logs,
    pub commits: commits::Commits,
    pub monotonic: monotonic::Monotonic,
    pub tables: tables::Tables,
}

/// What is worth a line in the trace.
pub type News = Vec<String>;

impl Witness {
    /// Looks at all that run. `disks` are those of all nodes, also of those that do not.
    pub fn look(
        &mut self,
        sights: &[Sight],
        disks: &BTreeMap<NodeId, SimulatedDisk>,
        news: &mut News,
    ) -> Result<(), String> {
        for sight in sights {
            self.monotonic.check(sight)?;
            durability::check(sight)?;
            self.logs.check(sight, news)?;
        }
        for sight in sights {
            self.commits.learn(sight, disks)?;
        }
        for sight in sights {
            if self.elections.check(sight, news)? {
                leaders::check(sight, &self.commits)?;
            }
        }
        self.tables.follow(&self.commits)?;
        for sight in sights {
            self.tables.check(sight)?;
        }
        Ok(())
    }

    /// A node's process has ended: what it remembers may be older when it comes back, but not what it
    /// had promised.
    pub fn ended(&mut self, id: NodeId) {
        self.logs.ended(id);
        self.monotonic.ended(id);
        self.tables.ended(id);
    }
}
