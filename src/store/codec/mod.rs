//! Bytes of what outlives the process, and of log entries and snapshots between peers.
//!
//! Every value is a letter for its kind, a byte for its version, and then bincode of structs of
//! our own ([`v1`]): never openraft's types or core's, whose shape is free to change. What is read
//! goes through the checked constructors of core, so that damaged or hostile bytes are refused and
//! never served. An unknown version is an error that names what was found and what is supported.
//!
//! A version is never changed once released: a new shape is a new module and a new version byte,
//! and the old one stays readable. Fixture bytes of every version: `tests/storage/fixtures`.

mod few;
mod v1;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::num::NonZero;
use std::sync::{Arc, Mutex, mpsc};
use std::{mem, thread};

use bincode::error::{DecodeError, EncodeError};
use bytes::Bytes;

use crate::blocking::keeps_inline;
use crate::core::{Allocation, Command, FEATURE_LEVEL, Millis, Restore, State};
use crate::lock::guard;

/// The version that this build writes, and the highest that it reads.
pub const VERSION: u8 = 1;

/// Most memory that one decoded value may claim: a length that lies ends here.
const DECODED_MAX_BYTES: usize = 256 << 20;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("{what} has format version {found}, this build reads {supported}")]
    Version { what: &'static str, found: u32, supported: u32 },
    #[error("it has feature level {found}, this build knows 1 to {known}")]
    FeatureLevel { found: u32, known: u32 },
    #[error("{what} cannot be read: {why}")]
    Malformed { what: &'static str, why: String },
}

/// Where an entry lies in the log, and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub term: u64,
    pub node: u64,
    pub index: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (term {}, node {})", self.index, self.term, self.node)
    }
}

/// For whom a node voted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ballot {
    pub term: u64,
    pub node: u64,
    /// A quorum granted it.
    pub committed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberRecord {
    pub cluster_id: String,
    pub peer: String,
    pub client: String,
    /// Empty while the member is pending.
    pub incarnation: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MembershipRecord {
    /// Voters; two sets while a change is under way.
    pub configs: Vec<BTreeSet<u64>>,
    /// All members, learners too.
    pub nodes: BTreeMap<u64, MemberRecord>,
}

/// What a log entry carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    Blank,
    Batch(Batch),
    Membership(MembershipRecord),
}

/// The commands of one log entry, applied in order, and the bytes of the entry's payload. Clones
/// share both: a node encodes or decodes an entry once.
#[derive(Clone)]
pub struct Batch(Arc<BatchParts>);

struct BatchParts {
    at: Millis,
    commands: Vec<Command>,
    payload: Bytes,
}

impl Batch {
    /// `at`: when the leader proposed it, by its wall clock. For people: nothing is decided by it.
    pub fn new(at: Millis, commands: Vec<Command>) -> Batch {
        let mirror = v1::Payload::Batch { at: at.0, commands: v1::Commands((&commands).into()) };
        let payload = encode(Kind::Entry, mirror).into();
        Batch(Arc::new(BatchParts { at, commands, payload }))
    }

    pub fn at(&self) -> Millis {
        self.0.at
    }

    pub fn commands(&self) -> &[Command] {
        &self.0.commands
    }

    /// As [`encode_payload`] writes it.
    pub fn payload(&self) -> &Bytes {
        &self.0.payload
    }
}

impl PartialEq for Batch {
    fn eq(&self, other: &Batch) -> bool {
        (self.at(), self.commands()) == (other.at(), other.commands())
    }
}

impl Eq for Batch {}

impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, commands) = (self.at(), self.commands());
        f.debug_struct("Batch").field("at", &at).field("commands", &commands).finish()
    }
}

impl fmt::Display for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commands", self.commands().len())
    }
}

/// What a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SnapshotHead {
    /// The last entry in it.
    pub last: Option<Position>,
    /// The entry of its membership.
    pub membership_at: Option<Position>,
    pub membership: MembershipRecord,
}

/// The kinds of values, by the letter that they begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Entry = b'E' as isize,
    Vote = b'V' as isize,
    Position = b'P' as isize,
    SnapshotHead = b'H' as isize,
    SnapshotRecord = b'R' as isize,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Entry => "log entry",
            Kind::Vote => "vote",
            Kind::Position => "log position",
            Kind::SnapshotHead => "snapshot head",
            Kind::SnapshotRecord => "snapshot record",
        }
    }

    fn begin(self) -> [u8; 2] {
        [self as u8, VERSION]
    }

    fn malformed(self, why: impl Into<String>) -> CodecError {
        CodecError::Malformed { what: self.name(), why: why.into() }
    }

    /// The bytes after the letter and the version.
    fn open(self, bytes: &[u8]) -> Result<&[u8], CodecError> {
        match bytes {
            [letter, VERSION, rest @ ..] if *letter == self as u8 => Ok(rest),
            [letter, found, ..] if *letter == self as u8 => Err(CodecError::Version {
                what: self.name(),
                found: u32::from(*found),
                supported: u32::from(VERSION),
            }),
            _ => Err(self.malformed("it begins like something else")),
        }
    }
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<DECODED_MAX_BYTES>()
}

fn encode<T: bincode::Encode>(kind: Kind, value: T) -> Vec<u8> {
    let mut bytes = kind.begin().to_vec();
    append(value, &mut bytes);
    bytes
}

fn append<T: bincode::Encode>(value: T, bytes: &mut Vec<u8>) {
    // Writing to a Vec cannot fail, and the mirror structs have no lengths or locks that could.
    bincode::encode_into_writer(value, Appender(bytes), config()).expect("encoding to memory");
}

/// What `std`'s way does, without the cost of an error of its kind for each field.
struct Appender<'a>(&'a mut Vec<u8>);

impl bincode::enc::write::Writer for Appender<'_> {
    #[inline(always)]
    fn write(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
}

/// Reads one value and returns what is left behind it.
fn decode_part<'a, T: bincode::BorrowDecode<'a, ()>>(
    kind: Kind,
    bytes: &'a [u8],
) -> Result<(T, &'a [u8]), CodecError> {
    let (value, read) =
        bincode::borrow_decode_from_slice(bytes, config()).map_err(|error| match error {
            DecodeError::OtherString(why) => kind.malformed(why),
            error => kind.malformed(error.to_string()),
        })?;
    Ok((value, &bytes[read..]))
}

fn decode<'a, T: bincode::BorrowDecode<'a, ()>>(
    kind: Kind,
    bytes: &'a [u8],
) -> Result<T, CodecError> {
    let (value, rest) = decode_part(kind, kind.open(bytes)?)?;
    match rest.len() {
        0 => Ok(value),
        n => Err(kind.malformed(format!("{n} bytes too many"))),
    }
}

pub fn encode_payload(payload: &Payload) -> Bytes {
    match payload {
        Payload::Blank => encode(Kind::Entry, v1::Payload::Blank).into(),
        Payload::Batch(batch) => batch.payload().clone(),
        Payload::Membership(membership) => {
            encode(Kind::Entry, v1::Payload::Membership(membership.into())).into()
        }
    }
}

pub fn decode_payload(bytes: &Bytes) -> Result<Payload, CodecError> {
    Ok(match decode(Kind::Entry, bytes)? {
        v1::Payload::Blank => Payload::Blank,
        v1::Payload::Batch { at, commands: v1::Commands(commands) } => {
            let (at, commands) = (Millis(at), commands.into_owned());
            Payload::Batch(Batch(Arc::new(BatchParts { at, commands, payload: bytes.clone() })))
        }
        v1::Payload::Membership(membership) => Payload::Membership(membership.restore()),
    })
}

pub fn encode_ballot(ballot: &Ballot) -> Vec<u8> {
    encode(Kind::Vote, v1::Ballot::from(ballot))
}

pub fn decode_ballot(bytes: &[u8]) -> Result<Ballot, CodecError> {
    Ok(decode::<v1::Ballot>(Kind::Vote, bytes)?.restore())
}

pub fn encode_position(position: &Position) -> Vec<u8> {
    encode(Kind::Position, v1::Position::from(position))
}

pub fn decode_position(bytes: &[u8]) -> Result<Position, CodecError> {
    Ok(decode::<v1::Position>(Kind::Position, bytes)?.restore())
}

pub fn encode_head(head: &SnapshotHead) -> Vec<u8> {
    encode(Kind::SnapshotHead, v1::SnapshotHead::from(head))
}

pub fn decode_head(bytes: &[u8]) -> Result<SnapshotHead, CodecError> {
    Ok(decode::<v1::SnapshotHead<'_>>(Kind::SnapshotHead, bytes)?.restore())
}

/// Allocations that a thread encodes at one go.
const TURN: usize = 2048;
/// Blocks that it hands over at a time: each time wakes the writer.
const PORTION_BLOCKS: usize = 4;
/// Portions of each thread that may wait to be written.
const PORTIONS_AHEAD: usize = 2;
/// Most threads that encode one state.
const ENCODERS_MAX: usize = 4;
/// They take what processor time others leave: beside a busy thread, a tenth of a core.
const ENCODERS_NICE: i32 = 10;

/// Writes a state as blocks of records, each a value of its own of about `block_bytes`: a header,
/// the leases, the workers, the allocations, the departures, and then the members of the cluster.
/// The blocks are the same whatever the number of cores.
pub fn encode_state<E>(
    state: &State,
    block_bytes: usize,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut blocks = Blocks::new(block_bytes, &mut sink);
    blocks.add(v1::records_before(state))?;
    if state.allocation_count() <= TURN {
        blocks.add(v1::records_of(&state.allocations_after(None).collect::<Vec<_>>()))?;
    } else {
        blocks.cut()?;
        encode_allocations(state, block_bytes, !keeps_inline(), &mut blocks.sink)?;
    }
    blocks.add(v1::records_after(state))?;
    blocks.cut()
}

/// Gathers records into blocks.
struct Blocks<S> {
    block: Vec<u8>,
    block_bytes: usize,
    sink: S,
}

impl<E, S: FnMut(&[u8]) -> Result<(), E>> Blocks<S> {
    fn new(block_bytes: usize, sink: S) -> Self {
        Blocks { block: Vec::with_capacity(2 * block_bytes), block_bytes, sink }
    }

    fn add<'a>(&mut self, mut records: impl Iterator<Item = v1::Record<'a>>) -> Result<(), E> {
        records.try_for_each(|record| {
            if self.block.is_empty() {
                self.block.extend(Kind::SnapshotRecord.begin());
            }
            append(record, &mut self.block);
            if self.block.len() >= self.block_bytes { self.cut() } else { Ok(()) }
        })
    }

    /// What was gathered is a block, if there is any.
    fn cut(&mut self) -> Result<(), E> {
        if !self.block.is_empty() {
            (self.sink)(&self.block)?;
            self.block.clear();
        }
        Ok(())
    }
}

/// Threads take turns, whoever is free the next one; what they encode is written in the order of the
/// turns. Where there are no threads, this one does it all.
fn encode_allocations<E>(
    state: &State,
    block_bytes: usize,
    on_threads: bool,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = if on_threads { cores.min(ENCODERS_MAX) } else { 0 };
    let rest = Mutex::new(state.allocations_after(None));
    let next_turn = |rest: &mut dyn Iterator<Item = _>| rest.take(TURN).collect::<Vec<_>>();
    thread::scope(|scope| {
        let (took, takers) = mpsc::channel();
        let begin = |taker: usize| {
            let (done, portions) = mpsc::sync_channel(PORTIONS_AHEAD);
            let (rest, took) = (&rest, took.clone());
            let run = move || {
                // Of this thread alone. Where it is refused, others wait a little more.
                let _ = rustix::process::nice(ENCODERS_NICE);
                // A turn, and that it is taken, before anybody else takes one.
                let take = || {
                    let mut rest = guard(rest);
                    let turn = next_turn(&mut *rest);
                    (!turn.is_empty() && took.send(taker).is_ok()).then_some(turn)
                };
                // Once nobody writes them any more, that was an error.
                while let Some(turn) = take()
                    && send_turn(&turn, block_bytes, &done).is_ok()
                {}
            };
            let thread = thread::Builder::new().name("encoder".into());
            thread.spawn_scoped(scope, run).is_ok().then_some(portions)
        };
        let encoders: Vec<_> = (0..threads).map_while(begin).collect();
        drop(took);
        for taker in takers {
            for Portion { blocks, ends_turn } in &encoders[taker] {
                blocks.iter().try_for_each(|block| sink(block))?;
                if ends_turn {
                    break;
                }
            }
        }
        // What no thread took.
        loop {
            let turn = next_turn(&mut *guard(&rest));
            if turn.is_empty() {
                return Ok(());
            }
            encode_turn(&turn, block_bytes, &mut sink)?;
        }
    })
}

fn encode_turn<E>(
    turn: &[&Arc<Allocation>],
    block_bytes: usize,
    sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut blocks = Blocks::new(block_bytes, sink);
    blocks.add(v1::records_of(turn))?;
    blocks.cut()
}

/// Blocks of a turn.
#[derive(Default)]
struct Portion {
    blocks: Vec<Vec<u8>>,
    ends_turn: bool,
}

/// Fails where nobody takes them.
fn send_turn(
    turn: &[&Arc<Allocation>],
    block_bytes: usize,
    to: &mpsc::SyncSender<Portion>,
) -> Result<(), mpsc::SendError<Portion>> {
    let mut portion = Portion::default();
    encode_turn(turn, block_bytes, |block| {
        portion.blocks.push(block.to_vec());
        match portion.blocks.len() {
            PORTION_BLOCKS => to.send(mem::take(&mut portion)),
            _ => Ok(()),
        }
    })?;
    to.send(Portion { ends_turn: true, ..portion })
}

/// Reads the blocks of [`encode_state`] back, in their order.
#[derive(Debug, Default)]
pub struct StateDecoder {
    progress: Option<v1::Progress>,
}

impl StateDecoder {
    pub fn block(&mut self, bytes: &[u8]) -> Result<(), CodecError> {
        let kind = Kind::SnapshotRecord;
        let mut rest = kind.open(bytes)?;
        while !rest.is_empty() {
            let record: v1::Record<'_>;
            (record, rest) = decode_part(kind, rest)?;
            if let Some(found) = record.feature_level().filter(|level| *level > FEATURE_LEVEL) {
                return Err(CodecError::FeatureLevel { found, known: FEATURE_LEVEL });
            }
            v1::take_record(&mut self.progress, record).map_err(|why| kind.malformed(why))?;
        }
        Ok(())
    }

    /// The state, complete and with every invariant checked.
    pub fn finish(self) -> Result<State, CodecError> {
        let kind = Kind::SnapshotRecord;
        let progress = self.progress.ok_or_else(|| kind.malformed("the header is missing"))?;
        let restore: Restore = progress.complete().map_err(|why| kind.malformed(why))?;
        restore.finish().map_err(|why| kind.malformed(why))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::core::apply;
    use crate::core::tests::make::{Ask as _, ORIGIN, allocate, claim, register, spec};

    /// One worker with so many allocations.
    fn state(allocations: u32) -> State {
        let named = |i| allocate(&[claim(&format!("a{i}"), "w").count(1)]);
        let registered = register("w", spec(&[("s", 1, 9999)], &[]));
        let mut state = State::default();
        for command in std::iter::once(registered).chain((0..allocations).map(named)) {
            apply(&mut state, &ORIGIN, &command).0.outcome.unwrap();
        }
        state
    }

    #[test]
    fn with_and_without_threads_the_blocks_are_the_same() {
        let turn = TURN as u32;
        for allocations in [1, turn, turn + 1, 4 * turn + 5] {
            let state = state(allocations);
            let blocks = |on_threads| {
                let mut all = Vec::new();
                let keep = |block: &[u8]| {
                    all.push(block.to_vec());
                    Ok::<_, Infallible>(())
                };
                let Ok(()) = encode_allocations(&state, 4000, on_threads, keep);
                all
            };
            let here = blocks(false);
            assert!(here.len() as u32 >= allocations.div_ceil(turn));
            assert!(here == blocks(true), "{allocations} allocations");
        }
    }

    #[test]
    fn the_threads_end_with_the_one_who_writes() {
        let state = state(4 * TURN as u32);
        let mut left = 3;
        let result = encode_allocations(&state, 4000, true, |_: &[u8]| {
            left -= 1;
            if left > 0 { Ok(()) } else { Err("no room") }
        });
        assert_eq!((result, left), (Err("no room"), 0));
    }
}
