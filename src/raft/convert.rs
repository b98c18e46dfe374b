//! Between openraft's types, the store's records and the messages of the peer protocol.

use bytes::Bytes;
use openraft::EntryPayload as Payload;
use openraft::entry::RaftEntry as _;

use super::types::{
    Entry, LeaderId, LogId, Member, Membership, SnapshotMeta, StoredMembership, Vote,
};
use crate::proto::peer as proto;
use crate::store::LogRecord;
use crate::store::codec::{
    self, Ballot, CodecError, MemberRecord, MembershipRecord, Position, SnapshotHead,
};

// The store.

pub fn position(id: &LogId) -> Position {
    Position { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

pub fn log_id(at: &Position) -> LogId {
    LogId { leader_id: LeaderId { term: at.term, node_id: at.node }, index: at.index }
}

pub fn ballot(vote: &Vote) -> Ballot {
    let Vote { leader_id, committed } = *vote;
    Ballot { term: leader_id.term, node: leader_id.node_id, committed }
}

pub fn vote(ballot: &Ballot) -> Vote {
    let Ballot { term, node, committed } = *ballot;
    Vote { leader_id: LeaderId { term, node_id: node }, committed }
}

fn membership_record(membership: &Membership) -> MembershipRecord {
    MembershipRecord {
        configs: membership.get_joint_config().clone(),
        nodes: membership
            .nodes()
            .map(|(id, Member { cluster_id, peer, client, incarnation })| {
                let record = MemberRecord {
                    cluster_id: cluster_id.clone(),
                    peer: peer.clone(),
                    client: client.clone(),
                    incarnation: incarnation.clone(),
                };
                (*id, record)
            })
            .collect(),
    }
}

fn membership(record: MembershipRecord) -> Result<Membership, CodecError> {
    let malformed = |why| CodecError::Malformed { what: "membership", why };
    let MembershipRecord { configs, nodes } = record;
    if configs.is_empty() && nodes.is_empty() {
        return Ok(Membership::default());
    }
    let nodes = nodes.into_iter().map(|(id, record)| {
        let MemberRecord { cluster_id, peer, client, incarnation } = record;
        (id, Member { cluster_id, peer, client, incarnation })
    });
    let nodes: std::collections::BTreeMap<_, _> = nodes.collect();
    Membership::new(configs, nodes).map_err(|error| malformed(error.to_string()))
}

fn encode_entry(entry: &Entry) -> Bytes {
    match &entry.payload {
        Payload::Blank => codec::encode_payload(&codec::Payload::Blank),
        Payload::Normal(batch) => batch.payload().clone(),
        Payload::Membership(membership) => {
            codec::encode_payload(&codec::Payload::Membership(membership_record(membership)))
        }
    }
}

fn decode_entry(at: LogId, bytes: &Bytes) -> Result<Entry, CodecError> {
    let payload = match codec::decode_payload(bytes)? {
        codec::Payload::Blank => Payload::Blank,
        codec::Payload::Batch(batch) => Payload::Normal(batch),
        codec::Payload::Membership(record) => Payload::Membership(membership(record)?),
    };
    Ok(Entry::new(at, payload))
}

pub fn record(entry: &Entry) -> LogRecord {
    let record = LogRecord::new(position(&entry.log_id), encode_entry(entry));
    match &entry.payload {
        Payload::Normal(batch) => record.with_batch(batch.clone()),
        _ => record,
    }
}

pub fn entry(record: &LogRecord) -> Result<Entry, CodecError> {
    let at = log_id(&record.at);
    match record.batch() {
        Some(batch) => Ok(Entry::new(at, Payload::Normal(batch.clone()))),
        None => decode_entry(at, &record.payload),
    }
}

pub fn head(meta: &SnapshotMeta) -> SnapshotHead {
    SnapshotHead {
        last: meta.last_log_id.as_ref().map(position),
        membership_at: meta.last_membership.log_id().as_ref().map(position),
        membership: membership_record(meta.last_membership.membership()),
    }
}

pub fn meta(head: &SnapshotHead) -> Result<SnapshotMeta, CodecError> {
    let at = head.membership_at.as_ref().map(log_id);
    Ok(SnapshotMeta {
        last_log_id: head.last.as_ref().map(log_id),
        last_membership: StoredMembership::new(at, membership(head.membership.clone())?),
    })
}

// The peers.

pub fn wire_log_id(id: &LogId) -> proto::LogId {
    let leader = proto::LeaderId { term: id.leader_id.term, node: id.leader_id.node_id };
    proto::LogId { leader: Some(leader), index: id.index }
}

pub fn wire_vote(vote: &Vote) -> proto::Vote {
    let leader = proto::LeaderId { term: vote.leader_id.term, node: vote.leader_id.node_id };
    proto::Vote { leader: Some(leader), committed: vote.committed }
}

pub fn wire_entry(entry: &Entry) -> proto::Entry {
    proto::Entry { id: Some(wire_log_id(&entry.log_id)), payload: encode_entry(entry) }
}

/// What a message lacks or says wrongly.
pub type Malformed = String;

fn leader(leader: Option<proto::LeaderId>) -> Result<LeaderId, Malformed> {
    let proto::LeaderId { term, node } = leader.ok_or("the leader id is missing")?;
    Ok(LeaderId { term, node_id: node })
}

pub fn read_vote(vote: Option<proto::Vote>) -> Result<Vote, Malformed> {
    let proto::Vote { leader: id, committed } = vote.ok_or("the vote is missing")?;
    Ok(Vote { leader_id: leader(id)?, committed })
}

/// `None` is a log id too: that of nothing.
pub fn read_log_id(id: Option<proto::LogId>) -> Result<Option<LogId>, Malformed> {
    let one = |proto::LogId { leader: id, index }| Ok(LogId { leader_id: leader(id)?, index });
    id.map(one).transpose()
}

pub fn read_entry(entry: proto::Entry) -> Result<Entry, Malformed> {
    let id = read_log_id(entry.id)?.ok_or("the id of an entry is missing")?;
    decode_entry(id, &entry.payload).map_err(|error| error.to_string())
}

/// Reads an entry as a peer sent it, and writes it again: for the fuzzers.
#[doc(hidden)]
pub fn reread_entry(entry: proto::Entry) -> Result<proto::Entry, Malformed> {
    read_entry(entry).map(|entry| wire_entry(&entry))
}
