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
mod state;
mod v1;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use bincode::error::{DecodeError, EncodeError};
use bytes::Bytes;

pub use self::state::{StateDecoder, encode_state};
use crate::core::{Command, Millis};

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
