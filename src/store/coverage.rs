//! How far the snapshots cover the log: the one thing that both must agree about.
//!
//! - The log is purged only up to the *older* of two snapshots, so that a damaged newest one is
//!   survivable. While there is only one, nothing goes.
//! - A snapshot installed from a peer counts alone: what it replaces is of no use any more.
//! - The log never begins after the end of the newest good snapshot ([`StoreError::Gap`]).

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use super::StoreError;
use super::codec::Position;
use crate::lock::guard;

/// Shared by the log and the snapshots of one directory.
#[derive(Debug)]
pub(super) struct Coverage {
    path: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Outer `None`: the log is not open.
    purged: Option<Option<Position>>,
    /// Where the good snapshots end, newest first. `None`: they are not open.
    snapshots: Option<Vec<Option<Position>>>,
    /// The newest was installed from a peer.
    installed: bool,
}

/// Up to where the log may be purged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PurgeLimit {
    /// There are no snapshots to heed: a log by itself.
    None,
    /// Up to here; `None`: nothing.
    UpTo(Option<Position>),
}

impl Coverage {
    pub fn new(path: PathBuf) -> Self {
        Coverage { path, state: Mutex::default() }
    }

    pub fn log_opened(&self, purged: Option<Position>) -> Result<(), StoreError> {
        let mut state = self.lock();
        state.purged = Some(purged);
        self.check(&state)
    }

    pub fn log_purged(&self, purged: Position) {
        self.lock().purged = Some(Some(purged));
    }

    /// `ends`: of the good snapshots, newest first.
    pub fn snapshots(
        &self,
        ends: Vec<Option<Position>>,
        installed: bool,
    ) -> Result<(), StoreError> {
        let mut state = self.lock();
        state.snapshots = Some(ends);
        state.installed = installed;
        self.check(&state)
    }

    pub fn purge_limit(&self) -> PurgeLimit {
        let state = self.lock();
        match state.snapshots.as_deref() {
            None => PurgeLimit::None,
            Some([only]) if state.installed => PurgeLimit::UpTo(*only),
            Some([_, older, ..]) => PurgeLimit::UpTo(*older),
            Some(_) => PurgeLimit::UpTo(None),
        }
    }

    fn check(&self, state: &State) -> Result<(), StoreError> {
        let (Some(Some(purged)), Some(snapshots)) = (state.purged, &state.snapshots) else {
            return Ok(());
        };
        let newest = snapshots.first().copied().flatten();
        if newest.is_none_or(|newest| newest.index < purged.index) {
            return Err(StoreError::Gap { path: self.path.clone(), purged, newest });
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        guard(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(index: u64) -> Option<Position> {
        Some(Position { term: 1, node: 1, index })
    }

    #[test]
    fn the_log_is_purged_up_to_the_older_snapshot() {
        let coverage = Coverage::new("d".into());
        assert_eq!(coverage.purge_limit(), PurgeLimit::None);
        for (snapshots, installed, limit) in [
            (vec![], false, None),
            (vec![at(9)], false, None),
            (vec![at(9), at(4)], false, at(4)),
            (vec![at(20)], true, at(20)),
            (vec![at(30), at(20)], false, at(20)),
        ] {
            coverage.snapshots(snapshots, installed).unwrap();
            assert_eq!(coverage.purge_limit(), PurgeLimit::UpTo(limit));
        }
    }

    #[test]
    fn a_gap_is_named_whichever_is_opened_last() {
        for log_first in [true, false] {
            let coverage = Coverage::new("d".into());
            let steps = || {
                if log_first {
                    coverage.log_opened(at(10))?;
                    coverage.snapshots(vec![at(9)], false)
                } else {
                    coverage.snapshots(vec![at(9)], false)?;
                    coverage.log_opened(at(10))
                }
            };
            let error = steps().unwrap_err().to_string();
            assert!(error.contains("begins after entry 10"), "{error}");
            assert!(error.contains("ends at entry 9"), "{error}");
            coverage.snapshots(vec![at(10)], false).unwrap();
        }
    }
}
