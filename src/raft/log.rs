//! The store's log as openraft wants it.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};

use futures::{Stream, StreamExt as _, stream};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};

use super::convert;
use super::types::{Entry, LogId, TypeConfig, Vote};
use crate::store::LogStore;

/// Entries that are read at once for a follower or to be applied, in bytes.
pub(super) const READ_BYTES: usize = 4 << 20;

fn bounds(range: &impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(index) => *index,
        Bound::Excluded(index) => index.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(index) => index.saturating_add(1),
        Bound::Excluded(index) => *index,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

fn read(log: &LogStore, range: Range<u64>, max_bytes: usize) -> Result<Vec<Entry>, io::Error> {
    let records = log.read(range, max_bytes)?;
    records.iter().map(|record| convert::entry(record).map_err(io::Error::other)).collect()
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, io::Error> {
        read(self, bounds(&range), usize::MAX)
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        read(self, start..end, READ_BYTES)
    }

    /// In parts, so that a long way to catch up does not fill the memory. Of committed entries only,
    /// which nobody changes meanwhile.
    async fn entries_stream<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend {
        let log = self.clone();
        let part = move |rest: Range<u64>| {
            let entries = match read(&log, rest.clone(), READ_BYTES) {
                Ok(entries) => entries,
                Err(error) => return Some((vec![Err(error)], rest.end..rest.end)),
            };
            let next = entries.last()?.log_id.index + 1;
            Some((entries.into_iter().map(Ok).collect(), next..rest.end))
        };
        let parts = stream::unfold(bounds(&range), move |rest| std::future::ready(part(rest)));
        parts.flat_map(stream::iter)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.vote().as_ref().map(convert::vote))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let (purged, last) = self.bounds();
        Ok(LogState {
            last_purged_log_id: purged.as_ref().map(convert::log_id),
            last_log_id: last.as_ref().map(convert::log_id),
        })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        LogStore::save_vote(self, convert::ballot(vote)).await;
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        LogStore::save_committed(self, committed.as_ref().map(convert::position));
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        // After a crash the tail may be older than what was saved; never promise more than it has.
        let (_, last) = self.bounds();
        Ok(self.committed().min(last).as_ref().map(convert::log_id))
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let records = entries.into_iter().map(|entry| convert::record(&entry)).collect();
        let done = Box::new(move || callback.io_completed(Ok(())));
        LogStore::append(self, records, done)?;
        // While the disk hangs, most of the others may go on committing. Here Raft stands still then, a
        // leader is silent, and another one is elected.
        self.room().await;
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        LogStore::truncate_after(self, last.as_ref().map(convert::position)).await;
        Ok(())
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        LogStore::purge(self, convert::position(&upto));
        Ok(())
    }
}
