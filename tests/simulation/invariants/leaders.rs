//! Leader completeness (Raft §5.4): what is committed is in the log of every later leader.
//!
//! Looked at when a leader begins. What it has purged is in its snapshot; that this is the same is
//! for [`super::tables`] to find.

use super::Sight;
use super::commits::Commits;

pub fn check(sight: &Sight, commits: &Commits) -> Result<(), String> {
    let begins = sight.purged.map_or(0, |purged| purged.index + 1);
    let end = commits.last().map_or(0, |last| last.index + 1);
    let mut own = sight.entries(begins, end)?.into_iter();
    for committed in commits.from(begins) {
        let found = own.next().map(|record| record.at);
        if found != Some(committed.at) {
            return Err(format!(
                "leader completeness: node {} leads as {:?} without the committed entry {} (it has \
                 {found:?})",
                sight.id,
                sight.leads(),
                committed.at
            ));
        }
    }
    Ok(())
}
