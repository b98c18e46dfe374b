//! The log: where an entry lies, for whom was voted, and what an entry carries.

use std::borrow::Cow;
use std::collections::BTreeSet;

use bincode::de::BorrowDecoder;
use bincode::enc::Encoder;
use bincode::error::{DecodeError, EncodeError};
use bincode::{BorrowDecode, Decode, Encode};

use super::Why;
use super::command::Command;
use crate::core as table;
use crate::store::codec::few::{read_length, write_length};
use crate::store::codec::{self, MemberRecord, MembershipRecord};

#[derive(Debug, Encode, Decode)]
pub struct Position {
    term: u64,
    node: u64,
    index: u64,
}

impl From<&codec::Position> for Position {
    fn from(&codec::Position { term, node, index }: &codec::Position) -> Self {
        Position { term, node, index }
    }
}

impl Position {
    pub fn restore(self) -> codec::Position {
        let Position { term, node, index } = self;
        codec::Position { term, node, index }
    }
}

#[derive(Debug, Encode, Decode)]
pub struct Ballot {
    term: u64,
    node: u64,
    committed: bool,
}

impl From<&codec::Ballot> for Ballot {
    fn from(&codec::Ballot { term, node, committed }: &codec::Ballot) -> Self {
        Ballot { term, node, committed }
    }
}

impl Ballot {
    pub fn restore(self) -> codec::Ballot {
        let Ballot { term, node, committed } = self;
        codec::Ballot { term, node, committed }
    }
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct Membership<'a> {
    configs: Vec<Vec<u64>>,
    nodes: Vec<Member<'a>>,
}

#[derive(Debug, Encode, BorrowDecode)]
struct Member<'a> {
    id: u64,
    cluster_id: &'a str,
    peer: &'a str,
    client: &'a str,
    incarnation: &'a str,
}

impl<'a> From<&'a MembershipRecord> for Membership<'a> {
    fn from(MembershipRecord { configs, nodes }: &'a MembershipRecord) -> Self {
        Membership {
            configs: configs.iter().map(|ids| ids.iter().copied().collect()).collect(),
            nodes: nodes
                .iter()
                .map(|(id, MemberRecord { cluster_id, peer, client, incarnation })| Member {
                    id: *id,
                    cluster_id,
                    peer,
                    client,
                    incarnation,
                })
                .collect(),
        }
    }
}

impl Membership<'_> {
    pub fn restore(self) -> MembershipRecord {
        let Membership { configs, nodes } = self;
        MembershipRecord {
            configs: configs.into_iter().map(BTreeSet::from_iter).collect(),
            nodes: nodes
                .into_iter()
                .map(|Member { id, cluster_id, peer, client, incarnation }| {
                    let member = MemberRecord {
                        cluster_id: cluster_id.into(),
                        peer: peer.into(),
                        client: client.into(),
                        incarnation: incarnation.into(),
                    };
                    (id, member)
                })
                .collect(),
        }
    }
}

#[derive(Debug, Encode, BorrowDecode)]
pub enum Payload<'a> {
    Blank,
    Batch {
        /// Milliseconds since the epoch.
        at: u64,
        commands: Commands<'a>,
    },
    Membership(Membership<'a>),
}

/// The bytes of a list of [`Command`], each of which is made when it is written or read: together
/// they are larger than what they are made from.
#[derive(Debug)]
pub struct Commands<'a>(pub Cow<'a, [table::Command]>);

impl Encode for Commands<'_> {
    fn encode<E: Encoder>(&self, encoder: &mut E) -> Result<(), EncodeError> {
        write_length(self.0.len(), encoder)?;
        self.0.iter().try_for_each(|command| Command::from(command).encode(encoder))
    }
}

impl<'de, Context> BorrowDecode<'de, Context> for Commands<'_> {
    fn borrow_decode<D: BorrowDecoder<'de, Context = Context>>(
        decoder: &mut D,
    ) -> Result<Self, DecodeError> {
        let length = read_length::<table::Command>(decoder)?;
        let mut commands = Vec::with_capacity(length);
        for _ in 0..length {
            decoder.unclaim_bytes_read(size_of::<table::Command>());
            let command = Command::borrow_decode(decoder)?;
            commands.push(command.restore().map_err(|Why(why)| DecodeError::OtherString(why))?);
        }
        Ok(Commands(commands.into()))
    }
}
