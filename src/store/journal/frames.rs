//! What lies in the journal's files: frames, and what they hold.

use std::fs;
use std::ops::Range;
use std::path::Path;

use super::files::NAMES;
use super::{Kept, Layer};
use crate::store::StoreError;
use crate::store::chunks::take;
use crate::store::disk::{Changes, Key};

const VERSION: u8 = 1;
/// Version; CRC-32 of all else; length of the body; run; number; last synced number.
pub(super) const HEADER_BYTES: usize = 1 + 4 + 4 + 3 * 8;
/// Frames begin at multiples of this, in bytes.
pub(super) const ALIGNMENT: usize = 64;
pub(super) const CRC: Range<usize> = 1..5;

/// Fills in the header, and brings the frame to its length in the file.
pub(super) fn close(frame: &mut Vec<u8>, run: u64, number: u64, synced: u64) {
    let body = (frame.len() - HEADER_BYTES) as u32; // a round of the writer is far smaller
    frame[0] = VERSION;
    frame[CRC.end..CRC.end + 4].copy_from_slice(&body.to_be_bytes());
    for (at, number) in (CRC.end + 4..).step_by(8).zip([run, number, synced]) {
        frame[at..at + 8].copy_from_slice(&number.to_be_bytes());
    }
    let crc = checksum(frame);
    frame[CRC].copy_from_slice(&crc.to_be_bytes());
    frame.resize(frame.len().next_multiple_of(ALIGNMENT), 0);
}

// What lies in a frame: a kind, a key, and for what is put, its length and itself.

const PUT_ENTRY: u8 = 1;
const REMOVE_ENTRY: u8 = 2;
const PUT_VALUE: u8 = 3;
const REMOVE_VALUE: u8 = 4;

pub(super) fn entry_bytes(value: Option<&[u8]>) -> usize {
    1 + size_of::<Key>() + value.map_or(0, |value| 4 + value.len())
}

pub(super) fn entries_bytes(changes: &Changes) -> usize {
    changes.iter().map(|(_, value)| entry_bytes(value.as_deref())).sum()
}

pub(super) fn value_bytes(key: &str, value: Option<&[u8]>) -> usize {
    1 + 1 + key.len() + value.map_or(0, |value| 4 + value.len())
}

pub(super) fn put_entry(frame: &mut Vec<u8>, key: &Key, value: Option<&[u8]>) {
    frame.push(if value.is_some() { PUT_ENTRY } else { REMOVE_ENTRY });
    frame.extend(key);
    put_bytes(frame, value);
}

/// `key` is one of the log's own, and short.
pub(super) fn put_value(frame: &mut Vec<u8>, key: &str, value: Option<&[u8]>) {
    frame.push(if value.is_some() { PUT_VALUE } else { REMOVE_VALUE });
    frame.push(key.len() as u8);
    frame.extend(key.as_bytes());
    put_bytes(frame, value);
}

fn put_bytes(frame: &mut Vec<u8>, value: Option<&[u8]>) {
    if let Some(value) = value {
        frame.extend((value.len() as u32).to_be_bytes());
        frame.extend(value);
    }
}

pub(super) fn checksum(frame: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame[..CRC.start]);
    crc.update(&frame[CRC.end..]);
    crc.finalize()
}

struct Header {
    version: u8,
    crc: u32,
    body_bytes: usize,
    run: u64,
    number: u64,
    synced: u64,
}

impl Header {
    fn read(bytes: &[u8]) -> Option<Header> {
        let mut rest = bytes;
        Some(Header {
            version: u8::from_be_bytes(take(&mut rest)?),
            crc: u32::from_be_bytes(take(&mut rest)?),
            body_bytes: u32::from_be_bytes(take(&mut rest)?) as usize,
            run: u64::from_be_bytes(take(&mut rest)?),
            number: u64::from_be_bytes(take(&mut rest)?),
            synced: u64::from_be_bytes(take(&mut rest)?),
        })
    }
}

/// A frame whose checksum is right.
pub(super) struct Frame<'a> {
    header: Header,
    pub(super) body: &'a [u8],
}

impl Frame<'_> {
    pub(super) fn read(bytes: &[u8]) -> Option<Frame<'_>> {
        let header = Header::read(bytes)?;
        let frame = bytes.get(..HEADER_BYTES.checked_add(header.body_bytes)?)?;
        let sound = header.version > 0 && checksum(frame) == header.crc;
        sound.then(|| Frame { header, body: &frame[HEADER_BYTES..] })
    }
}

/// The frames of one run that a file of the journal holds, and where they end.
pub(super) struct Found<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    pub(super) frames: Vec<Frame<'a>>,
    pub(super) end: usize,
}

impl Found<'_> {
    pub(super) fn read<'a>(
        path: &'a Path,
        bytes: &'a [u8],
        run: u64,
    ) -> Result<Found<'a>, StoreError> {
        let mut found = Found { path, bytes, frames: Vec::new(), end: 0 };
        while let Some(frame) = bytes.get(found.end..).and_then(Frame::read)
            && frame.header.run == run
            && found.last().is_none_or(|last| last + 1 == frame.header.number)
        {
            if frame.header.version != VERSION {
                return Err(StoreError::Version {
                    path: path.into(),
                    what: "the log's journal",
                    found: frame.header.version.into(),
                    supported: VERSION.into(),
                });
            }
            found.end += (HEADER_BYTES + frame.body.len()).next_multiple_of(ALIGNMENT);
            found.frames.push(frame);
        }
        Ok(found)
    }

    fn last(&self) -> Option<u64> {
        self.frames.last().map(|frame| frame.header.number)
    }

    /// Does a frame beyond the end say that one after `last` had been on the disk?
    fn proves_lost(&self, last: u64, run: u64) -> bool {
        let mut beyond =
            (self.end..self.bytes.len()).step_by(ALIGNMENT).map(|at| &self.bytes[at..]);
        // A checksum takes long.
        let later = |header: Header| header.run == run && header.synced > last;
        beyond.any(|bytes| Header::read(bytes).is_some_and(later) && Frame::read(bytes).is_some())
    }
}

/// What the journal in `path` holds of the run, beyond what is kept.
pub(super) fn replay(path: &Path, kept: Kept) -> Result<Layer, StoreError> {
    let read = |name| {
        let path = path.join(name);
        let bytes = fs::read(&path).map_err(StoreError::io(&path, "cannot be read"))?;
        Ok::<_, StoreError>((path, bytes))
    };
    let files = [read(NAMES[0])?, read(NAMES[1])?];
    let found = files.each_ref().map(|(path, bytes)| Found::read(path, bytes, kept.run));
    let [first, second] = found;
    let mut found = [first?, second?];
    found.sort_by_key(Found::last);
    let damaged = |what| StoreError::damaged(path, what);

    let mut layer = Layer::default();
    let mut last = kept.last;
    for Frame { header: Header { number, .. }, body } in found.iter().flat_map(|f| &f.frames) {
        if *number <= kept.last {
            continue;
        }
        if *number != last + 1 {
            return Err(damaged(format!("frame {} is missing before frame {number}", last + 1)));
        }
        layer.take(body).ok_or_else(|| damaged(format!("frame {number} cannot be read")))?;
        last = *number;
    }
    if found[1].last().unwrap_or(0) < kept.last {
        return Err(damaged(format!("frame {} had been in it, and is gone", kept.last)));
    }
    match found.iter().find(|found| found.proves_lost(last, kept.run)) {
        Some(file) => Err(StoreError::damaged(file.path, format!("frame {} is damaged", last + 1))),
        None => Ok(layer),
    }
}

impl Layer {
    /// Reads the body of a frame. `None` where it makes no sense.
    fn take(&mut self, mut body: &[u8]) -> Option<()> {
        let rest = &mut body;
        while !rest.is_empty() {
            let [kind] = take(rest)?;
            match kind {
                PUT_ENTRY => {
                    let key = take(rest)?;
                    self.entries.insert(key, Some(take_bytes(rest)?.into()));
                }
                REMOVE_ENTRY => drop(self.entries.insert(take(rest)?, None)),
                PUT_VALUE => {
                    let key = take_name(rest)?;
                    self.values.insert(key, Some(take_bytes(rest)?.into()));
                }
                REMOVE_VALUE => drop(self.values.insert(take_name(rest)?, None)),
                _ => return None,
            }
        }
        Some(())
    }
}

fn take_bytes<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_be_bytes(take(rest)?) as usize;
    let (bytes, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    Some(bytes)
}

fn take_name(rest: &mut &[u8]) -> Option<String> {
    let [length] = take(rest)?;
    let (name, tail) = rest.split_at_checked(length.into())?;
    *rest = tail;
    String::from_utf8(name.to_vec()).ok()
}
