//! Log matching (Raft §5.3): two entries of one index and one leader are the same, and so are all
//! before them.

use std::collections::BTreeMap;

use portwarden::node::NodeId;
use portwarden::store::LogRecord;
use portwarden::store::codec::Position;

use super::{News, Sight};

type Order = (u64, u64, u64);

fn order(at: Position) -> Order {
    (at.index, at.term, at.node)
}

/// What an entry is: its bytes, and what comes before it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    checksum: u32,
    before: Option<Position>,
}

#[derive(Default)]
pub struct Logs {
    entries: BTreeMap<Order, Known>,
    /// Of each node: the entries of its log that were looked at.
    seen: BTreeMap<NodeId, BTreeMap<u64, Position>>,
}

impl Logs {
    pub fn ended(&mut self, id: NodeId) {
        self.seen.remove(&id);
    }

    /// Looks at what is new in a node's log.
    pub fn check(&mut self, sight: &Sight, news: &mut News) -> Result<(), String> {
        let Some(last) = sight.last else { return Ok(()) };
        let seen = self.seen.entry(sight.id).or_default();
        if seen.last_key_value().is_some_and(|(_, at)| *at == last) {
            return Ok(());
        }
        let begins = sight.purged.map_or(0, |purged| purged.index + 1);
        // What has been truncated since is no longer as it was seen.
        let mut known = last.index.min(seen.last_key_value().map_or(0, |(index, _)| *index));
        while known >= begins && known > 0 {
            let entry = sight.entry(known)?.map(|record| record.at);
            if entry.is_some() && entry.as_ref() == seen.get(&known) {
                break;
            }
            known -= 1;
        }
        seen.split_off(&(known + 1));
        let from = begins.max(if seen.contains_key(&known) { known + 1 } else { 0 });
        let mut before = match from.checked_sub(1) {
            None => None,
            Some(index) => seen.get(&index).copied().or(sight.purged),
        };
        for record in sight.entries(from, last.index + 1)? {
            seen.insert(record.at.index, record.at);
            self.entries.entry(order(record.at)).or_insert_with(|| known_as(&record, before));
            let known = &self.entries[&order(record.at)];
            if *known != known_as(&record, before) {
                return Err(format!(
                    "log matching: entry {} of node {} is {:?}, and elsewhere {known:?}",
                    record.at,
                    sight.id,
                    known_as(&record, before)
                ));
            }
            before = Some(record.at);
        }
        news.push(format!("log {} {last}", sight.id));
        Ok(())
    }
}

fn known_as(record: &LogRecord, before: Option<Position>) -> Known {
    Known { checksum: crc32fast::hash(&record.payload), before }
}
