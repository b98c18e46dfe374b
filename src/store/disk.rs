//! Where the log lies: sled, or a disk that is simulated.

use std::fmt::Debug;
use std::ops::Bound;

use sled::IVec;

/// Index and chunk of a part of an entry, big-endian.
pub type Key = [u8; 10];

/// Parts of entries to be written, or removed (`None`).
pub type Changes = Vec<(Key, Option<Vec<u8>>)>;

pub type Pairs<'a> = Box<dyn Iterator<Item = sled::Result<(IVec, IVec)>> + 'a>;

/// Two maps that keep what was flushed. What was written and not flushed may be lost when the process
/// ends, but only from the end on: what is left is a prefix of what was written.
pub trait Disk: Debug + Send + Sync {
    /// In order. All of the changes or none where there is a journal, which brings them again to the disk below.
    fn write(&self, changes: Changes) -> sled::Result<()>;
    fn range(&self, bounds: (Bound<Key>, Bound<Key>)) -> Pairs<'_>;
    /// Values beside the entries.
    fn set(&self, key: &str, value: Option<Vec<u8>>) -> sled::Result<()>;
    fn get(&self, key: &str) -> sled::Result<Option<IVec>>;
    fn values(&self) -> Pairs<'_>;
    /// Returns when everything that was written is on the disk.
    fn flush(&self) -> sled::Result<()>;
    /// Nothing is written any more.
    fn close(&self) -> sled::Result<()> {
        self.flush()
    }
}

#[derive(Debug)]
pub struct Sled {
    pub db: sled::Db,
    pub entries: sled::Tree,
    pub meta: sled::Tree,
}

impl Disk for Sled {
    /// One by one: for a batch of its own sled writes and syncs what it has twice.
    fn write(&self, changes: Changes) -> sled::Result<()> {
        changes.into_iter().try_for_each(|(key, value)| match value {
            Some(value) => self.entries.insert(key, value).map(drop),
            None => self.entries.remove(key).map(drop),
        })
    }

    fn range(&self, bounds: (Bound<Key>, Bound<Key>)) -> Pairs<'_> {
        Box::new(self.entries.range(bounds))
    }

    fn set(&self, key: &str, value: Option<Vec<u8>>) -> sled::Result<()> {
        match value {
            Some(value) => self.meta.insert(key, value).map(drop),
            None => self.meta.remove(key).map(drop),
        }
    }

    fn get(&self, key: &str) -> sled::Result<Option<IVec>> {
        self.meta.get(key)
    }

    fn values(&self) -> Pairs<'_> {
        Box::new(self.meta.iter())
    }

    fn flush(&self) -> sled::Result<()> {
        self.db.flush().map(drop)
    }
}
