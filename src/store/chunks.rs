//! An entry as it lies in sled: in chunks, because sled puts large values into files of their own that it
//! never syncs.
//!
//! Keys are `(index, chunk)`, big-endian, so that they sort as the log does. The first chunk begins with
//! a header: version, number of chunks, length and CRC-32 of the whole, and the entry's term and node.

use std::ops::{Bound, Range};
use std::path::Path;

use super::StoreError;
use super::codec::Position;
use super::disk::{Disk, Key};
use super::log::LogRecord;

/// Largest value given to sled, in bytes. sled writes a page that is larger than a quarter of its
/// segments, 128 KiB, to a file of its own that it never syncs, and a page has up to 17 values, after a
/// merge 20.
const CHUNK_BYTES: usize = 6 << 10;

const VERSION: u8 = 1;
const HEADER_BYTES: usize = 1 + 2 + 4 + 4 + 8 + 8;

/// Index and chunk, big-endian.
pub(super) fn key(index: u64, chunk: u16) -> Key {
    let mut key = [0; 10];
    key[..8].copy_from_slice(&index.to_be_bytes());
    key[8..].copy_from_slice(&chunk.to_be_bytes());
    key
}

pub(super) fn parse_key(key: &[u8]) -> Option<(u64, u16)> {
    let (index, chunk) = key.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*index), u16::from_be_bytes(chunk.try_into().ok()?)))
}

fn checksum(at: Position, payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    for number in [at.index, at.term, at.node] {
        crc.update(&number.to_be_bytes());
    }
    crc.update(payload);
    crc.finalize()
}

/// Keys and values of an entry. There are at most 65 535 chunks: [`super::ENTRY_MAX_BYTES`] sees to it.
pub(super) fn chunks(record: &LogRecord) -> Vec<(Key, Vec<u8>)> {
    let LogRecord { at, payload, .. } = record;
    let (first, rest) = payload.split_at(payload.len().min(CHUNK_BYTES - HEADER_BYTES));
    let count = 1 + rest.len().div_ceil(CHUNK_BYTES);
    let mut value = Vec::with_capacity(HEADER_BYTES + first.len());
    value.push(VERSION);
    value.extend_from_slice(&(count as u16).to_be_bytes());
    value.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    value.extend_from_slice(&checksum(*at, payload).to_be_bytes());
    value.extend_from_slice(&at.term.to_be_bytes());
    value.extend_from_slice(&at.node.to_be_bytes());
    value.extend_from_slice(first);
    let mut all = vec![(key(at.index, 0), value)];
    for (i, chunk) in rest.chunks(CHUNK_BYTES).enumerate() {
        all.push((key(at.index, i as u16 + 1), chunk.to_vec()));
    }
    all
}

/// An entry that is being put together from its chunks.
struct Assembly {
    at: Position,
    chunks: u16,
    next: u16,
    length: usize,
    checksum: u32,
    payload: Vec<u8>,
}

impl Assembly {
    fn begin(path: &Path, index: u64, value: &[u8]) -> Result<Assembly, StoreError> {
        let short =
            || StoreError::damaged(path, format!("entry {index}: its first chunk is too short"));
        let version = *value.first().ok_or_else(short)?;
        if version != VERSION {
            return Err(StoreError::Version {
                path: path.to_path_buf(),
                what: "the log",
                found: version.into(),
                supported: VERSION.into(),
            });
        }
        let mut rest = &value[1..];
        let chunks = u16::from_be_bytes(take(&mut rest).ok_or_else(short)?);
        let length = u32::from_be_bytes(take(&mut rest).ok_or_else(short)?) as usize;
        let checksum = u32::from_be_bytes(take(&mut rest).ok_or_else(short)?);
        let term = u64::from_be_bytes(take(&mut rest).ok_or_else(short)?);
        let node = u64::from_be_bytes(take(&mut rest).ok_or_else(short)?);
        let at = Position { term, node, index };
        Ok(Assembly { at, chunks, next: 1, length, checksum, payload: rest.to_vec() })
    }

    /// The entry, once its last chunk is there.
    fn complete(&self, path: &Path) -> Result<Option<LogRecord>, StoreError> {
        if self.next < self.chunks {
            return Ok(None);
        }
        let index = self.at.index;
        if self.payload.len() != self.length || checksum(self.at, &self.payload) != self.checksum {
            return Err(StoreError::damaged(path, format!("entry {index}: wrong checksum")));
        }
        Ok(Some(LogRecord::new(self.at, self.payload.clone())))
    }
}

/// The first bytes; they are gone from `bytes`.
pub(super) fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*head)
}

/// Where an entry lies, by its first chunk.
pub(super) fn position_of(index: u64, first_chunk: &[u8]) -> Option<Position> {
    Assembly::begin(Path::new(""), index, first_chunk).ok().map(|assembly| assembly.at)
}

/// Entries from `first` on, whole and without a hole; ends where sled's iterator does.
pub(super) fn assemble(
    path: &Path,
    first: u64,
    mut chunks: impl Iterator<Item = sled::Result<(sled::IVec, sled::IVec)>>,
) -> impl Iterator<Item = Result<LogRecord, StoreError>> {
    let mut expected = first;
    let mut one = move || -> Result<Option<LogRecord>, StoreError> {
        let mut open: Option<Assembly> = None;
        for pair in chunks.by_ref() {
            let (key, value) = pair.map_err(StoreError::sled(path, "cannot be read"))?;
            let place = parse_key(&key);
            let (index, chunk) =
                place.ok_or_else(|| StoreError::damaged(path, format!("it has a key {key:?}")))?;
            let awaited = (expected, open.as_ref().map_or(0, |a| a.next));
            if (index, chunk) != awaited {
                let what = format!(
                    "chunk {} of entry {} is missing (found {chunk} of {index})",
                    awaited.1, awaited.0
                );
                return Err(StoreError::damaged(path, what));
            }
            match &mut open {
                None => open = Some(Assembly::begin(path, index, &value)?),
                Some(assembly) => {
                    assembly.payload.extend_from_slice(&value);
                    assembly.next += 1;
                }
            }
            if let Some(assembly) = &open
                && let Some(record) = assembly.complete(path)?
            {
                expected += 1;
                return Ok(Some(record));
            }
        }
        match open {
            None => Ok(None),
            Some(Assembly { at, next, .. }) => {
                let what = format!("chunk {next} of entry {} is missing", at.index);
                Err(StoreError::damaged(path, what))
            }
        }
    };
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed {
            return None;
        }
        let result = one().transpose();
        failed = matches!(result, Some(Err(_)));
        result
    })
}

/// Reads `range` as far as `max_bytes` allow, at least one entry. Also says how many bytes they
/// have, and whether these are all.
pub(super) fn read_disk(
    path: &Path,
    disk: &dyn Disk,
    range: Range<u64>,
    max_bytes: usize,
) -> Result<(Vec<LogRecord>, usize, bool), StoreError> {
    let (mut records, mut bytes) = (Vec::new(), 0);
    if range.is_empty() {
        return Ok((records, 0, true));
    }
    let bounds = (key(range.start, 0), key(range.end, 0));
    let found = disk.range((Bound::Included(bounds.0), Bound::Excluded(bounds.1)));
    for record in assemble(path, range.start, found) {
        let record = record?;
        if !records.is_empty() && bytes + record.payload.len() > max_bytes {
            return Ok((records, bytes, false));
        }
        bytes += record.payload.len();
        records.push(record);
    }
    let missing = range.start + records.len() as u64;
    if missing < range.end {
        return Err(StoreError::damaged(path, format!("entry {missing} is missing")));
    }
    Ok((records, bytes, true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ENTRY_MAX_BYTES;

    #[test]
    fn fixture_of_a_chunk() {
        let at = Position { term: 3, node: 2, index: 258 };
        let record = LogRecord::new(at, &b"payload"[..]);
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let all = chunks(&record);
        let [(key, value)] = all.as_slice() else { panic!("one chunk: {all:?}") };
        assert_eq!(hex(key), "00000000000001020000");
        assert_eq!(
            hex(value),
            "01000100000007a114f65500000000000000030000000000000002\
             7061796c6f6164"
        );
        let assembly = Assembly::begin(Path::new("log"), 258, value).unwrap();
        assert_eq!(assembly.complete(Path::new("log")).unwrap(), Some(record));
    }

    #[test]
    fn no_chunk_is_larger_than_sled_should_get() {
        for bytes in [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, ENTRY_MAX_BYTES] {
            let at = Position { term: 1, node: 1, index: 0 };
            let all = chunks(&LogRecord::new(at, vec![1; bytes]));
            assert!(all.iter().all(|(_, value)| value.len() <= CHUNK_BYTES));
            let sum: usize = all.iter().map(|(_, value)| value.len()).sum();
            assert_eq!(sum, bytes + HEADER_BYTES);
        }
    }
}
