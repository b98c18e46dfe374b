//! A disk in memory that outlives the node on it, for simulations: it forgets what was not flushed
//! when its node crashes, is as slow as it is told, and fails when it is told.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use sled::IVec;

use super::codec::{self, Ballot, Position};
use super::disk::{Changes, Disk, Key, Pairs};
use super::{chunks, log};
use crate::lock::guard;

/// Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct SimulatedDisk(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    durable: Maps,
    /// With what was written since.
    written: Maps,
    /// What the next flush makes durable, in its order.
    pending: Vec<Change>,
    latency: Duration,
    fails: bool,
    flushes: u64,
}

#[derive(Debug, Clone, Default)]
struct Maps {
    entries: BTreeMap<Key, Vec<u8>>,
    values: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug, Clone)]
enum Change {
    Entries(Changes),
    Value(String, Option<Vec<u8>>),
}

impl Maps {
    fn apply(&mut self, change: Change) {
        match change {
            Change::Entries(changes) => {
                for (key, value) in changes {
                    match value {
                        Some(value) => drop(self.entries.insert(key, value)),
                        None => drop(self.entries.remove(&key)),
                    }
                }
            }
            Change::Value(key, Some(value)) => drop(self.values.insert(key, value)),
            Change::Value(key, None) => drop(self.values.remove(&key)),
        }
    }
}

impl SimulatedDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        guard(&self.0)
    }

    /// Its node has crashed. Of what was not flushed the first `kept` writes are there all the same.
    pub fn crash(&self, kept: usize) {
        let mut state = self.state();
        let pending = std::mem::take(&mut state.pending);
        for change in pending.into_iter().take(kept) {
            state.durable.apply(change);
        }
        state.written = state.durable.clone();
        state.fails = false;
    }

    /// Writes that are not flushed.
    pub fn pending(&self) -> usize {
        self.state().pending.len()
    }

    /// How long a flush takes from now on.
    pub fn set_latency(&self, latency: Duration) {
        self.state().latency = latency;
    }

    pub fn latency(&self) -> Duration {
        self.state().latency
    }

    /// Every write and flush fails from now on, until the node crashes.
    pub fn fail(&self) {
        self.state().fails = true;
    }

    /// Would this entry be there after a crash?
    pub fn has_durably(&self, at: Position) -> bool {
        let state = self.state();
        let first = state.durable.entries.get(&chunks::key(at.index, 0));
        first.and_then(|chunk| chunks::position_of(at.index, chunk)) == Some(at)
    }

    /// The vote that would be there after a crash.
    pub fn durable_vote(&self) -> Option<Ballot> {
        let state = self.state();
        state.durable.values.get(log::VOTE).and_then(|bytes| codec::decode_ballot(bytes).ok())
    }

    pub fn flushes(&self) -> u64 {
        self.state().flushes
    }

    fn change(&self, change: Change) -> sled::Result<()> {
        let mut state = self.state();
        if state.fails {
            return Err(broken());
        }
        state.written.apply(change.clone());
        state.pending.push(change);
        Ok(())
    }
}

fn broken() -> sled::Error {
    sled::Error::Io(io::Error::from_raw_os_error(libc::EIO))
}

impl Disk for SimulatedDisk {
    fn write(&self, changes: Changes) -> sled::Result<()> {
        self.change(Change::Entries(changes))
    }

    fn range(&self, bounds: (Bound<Key>, Bound<Key>)) -> Pairs<'_> {
        let pair = |(key, value): (&Key, &Vec<u8>)| Ok((key.into(), value.as_slice().into()));
        let found: Vec<_> = self.state().written.entries.range(bounds).map(pair).collect();
        Box::new(found.into_iter())
    }

    fn set(&self, key: &str, value: Option<Vec<u8>>) -> sled::Result<()> {
        self.change(Change::Value(key.into(), value))
    }

    fn get(&self, key: &str) -> sled::Result<Option<IVec>> {
        Ok(self.state().written.values.get(key).map(|value| value.as_slice().into()))
    }

    fn values(&self) -> Pairs<'_> {
        let pair =
            |(key, value): (&String, &Vec<u8>)| Ok((key.as_str().into(), value.as_slice().into()));
        let found: Vec<_> = self.state().written.values.iter().map(pair).collect();
        Box::new(found.into_iter())
    }

    fn flush(&self) -> sled::Result<()> {
        let mut state = self.state();
        if state.fails {
            return Err(broken());
        }
        for change in std::mem::take(&mut state.pending) {
            state.durable.apply(change);
        }
        state.flushes += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> Key {
        [n; 10]
    }

    fn keys(disk: &SimulatedDisk) -> Vec<u8> {
        let all = disk.range((Bound::Unbounded, Bound::Unbounded));
        all.map(|pair| pair.unwrap().0[0]).collect()
    }

    #[test]
    fn what_was_not_flushed_is_forgotten_from_the_end_on() {
        let disk = SimulatedDisk::default();
        disk.write(vec![(key(1), Some(vec![1]))]).unwrap();
        disk.flush().unwrap();
        disk.write(vec![(key(2), Some(vec![2])), (key(1), None)]).unwrap();
        disk.set("vote", Some(vec![7])).unwrap();
        assert_eq!(keys(&disk), [2], "it reads what it wrote");
        let other = disk.clone();
        disk.crash(0);
        assert_eq!((keys(&other), other.get("vote").unwrap()), (vec![1], None));

        disk.write(vec![(key(3), Some(vec![3]))]).unwrap();
        disk.set("vote", Some(vec![8])).unwrap();
        disk.crash(1);
        assert_eq!((keys(&disk), disk.get("vote").unwrap()), (vec![1, 3], None));
    }

    #[test]
    fn a_broken_disk_takes_nothing_more_until_the_crash() {
        let disk = SimulatedDisk::default();
        disk.fail();
        assert!(disk.write(vec![]).is_err() && disk.flush().is_err());
        disk.crash(0);
        disk.write(vec![(key(1), Some(vec![1]))]).unwrap();
        disk.flush().unwrap();
    }
}
