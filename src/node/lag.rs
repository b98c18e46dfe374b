//! Members that are far behind, in the log of the node that leads: that they are, how they catch up,
//! and when they have.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use crate::raft::NodeId;

/// Entries behind the leader from which on a member counts as lagging.
pub(super) const LAG_PROBLEM_ENTRIES: u64 = 1000;
/// From one word on a member to the next.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// Of each member that lags: when it was last told, and how far behind it was then.
#[derive(Default)]
pub(super) struct Lags(BTreeMap<NodeId, (Instant, u64)>);

#[derive(Debug, PartialEq, Eq)]
enum Word {
    Behind,
    /// It was so far behind when it was last told.
    Still {
        before: u64,
    },
    CaughtUp,
}

impl Lags {
    /// To be called now and then for each member; `lag` in entries.
    pub fn tell(&mut self, member: NodeId, lag: u64) {
        match self.word(member, lag, Instant::now()) {
            Some(Word::Behind) => warn!(member, lag, "a member is behind"),
            Some(Word::Still { before }) => info!(member, lag, before, "a member is behind"),
            Some(Word::CaughtUp) => info!(member, "a member has caught up"),
            None => {}
        }
    }

    fn word(&mut self, member: NodeId, lag: u64, now: Instant) -> Option<Word> {
        if lag <= LAG_PROBLEM_ENTRIES {
            return self.0.remove(&member).map(|_| Word::CaughtUp);
        }
        let word = match self.0.get(&member) {
            None => Word::Behind,
            Some((told, before)) if now - *told >= TELL_EVERY => Word::Still { before: *before },
            Some(_) => return None,
        };
        self.0.insert(member, (now, lag));
        Some(word)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_told_of_when_it_falls_behind_now_and_then_and_when_it_is_back() {
        let mut lags = Lags::default();
        let began = Instant::now();
        let mut at = |seconds, lag| lags.word(2, lag, began + Duration::from_secs(seconds));
        assert_eq!(at(0, LAG_PROBLEM_ENTRIES), None);
        assert_eq!(at(1, LAG_PROBLEM_ENTRIES + 1), Some(Word::Behind));
        assert_eq!(at(5, 9000), None);
        assert_eq!(at(6, 8000), Some(Word::Still { before: LAG_PROBLEM_ENTRIES + 1 }));
        assert_eq!(at(11, 5000), Some(Word::Still { before: 8000 }));
        assert_eq!(at(12, LAG_PROBLEM_ENTRIES), Some(Word::CaughtUp));
        assert_eq!(at(13, 0), None);
    }
}
