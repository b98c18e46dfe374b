//! What is committed stays (Raft §5.4: it will be in the logs of all later leaders), and was on the
//! disks of a majority when its leader said so (Raft §5.3).
//!
//! All nodes commit the same entry at an index. Whether a majority has it is asked when a leader
//! commits an entry of its own term: what came before it is committed by it too (§5.4.2), and is
//! answered for by the leader that wrote it.

use std::collections::BTreeMap;

use portwarden::node::NodeId;
use portwarden::store::codec::Position;
use portwarden::store::{LogRecord, SimulatedDisk};

use super::{Sight, quorums};

#[derive(Default)]
pub struct Commits {
    /// From the first on, without a gap.
    entries: BTreeMap<u64, LogRecord>,
    /// Of each node: up to where its commits were looked at.
    seen: BTreeMap<NodeId, u64>,
}

impl Commits {
    /// The committed entries from this index on.
    pub fn from(&self, index: u64) -> impl Iterator<Item = &LogRecord> {
        self.entries.range(index..).map(|(_, record)| record)
    }

    pub fn last(&self) -> Option<Position> {
        self.entries.last_key_value().map(|(_, record)| record.at)
    }

    pub fn learn(
        &mut self,
        sight: &Sight,
        disks: &BTreeMap<NodeId, SimulatedDisk>,
    ) -> Result<(), String> {
        let Some(committed) = &sight.metrics.local_committed else { return Ok(()) };
        let seen = self.seen.get(&sight.id).copied();
        if seen == Some(committed.index) {
            return Ok(());
        }
        let begins = sight.purged.map_or(0, |purged| purged.index + 1);
        let from = seen.map_or(0, |seen| seen + 1).max(begins);
        for record in sight.entries(from, committed.index + 1)? {
            self.add(sight, record, disks)?;
        }
        self.seen.insert(sight.id, committed.index);
        Ok(())
    }

    fn add(
        &mut self,
        sight: &Sight,
        record: LogRecord,
        disks: &BTreeMap<NodeId, SimulatedDisk>,
    ) -> Result<(), String> {
        let index = record.at.index;
        match self.entries.get(&index) {
            Some(known) if *known == record => Ok(()),
            Some(known) => Err(format!(
                "committed is for ever: node {} has committed entry {}, and {} was committed there",
                sight.id, record.at, known.at
            )),
            None => {
                let next = self.last().map_or(0, |last| last.index + 1);
                if index != next {
                    return Err(format!(
                        "the simulation lost sight: entry {next} was committed and never seen"
                    ));
                }
                self.is_on_a_majority(sight, record.at, disks)?;
                self.entries.insert(index, record);
                Ok(())
            }
        }
    }

    fn is_on_a_majority(
        &self,
        sight: &Sight,
        at: Position,
        disks: &BTreeMap<NodeId, SimulatedDisk>,
    ) -> Result<(), String> {
        let own = sight.leads() == Some((at.term, at.node));
        let membership = sight.metrics.membership_config.log_id().map_or(0, |id| id.index);
        // What was committed under another membership is not judged by this one.
        if !own || at.index < membership {
            return Ok(());
        }
        for voters in quorums(sight) {
            let has = |id: &&NodeId| disks.get(id).is_some_and(|disk| disk.has_durably(at));
            let having = voters.iter().filter(has).count();
            if having * 2 <= voters.len() {
                return Err(format!(
                    "committed on a majority: node {} has committed entry {at}, which is on the \
                     disks of {having} of the voters {voters:?}",
                    sight.id
                ));
            }
        }
        Ok(())
    }
}
