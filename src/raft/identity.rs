//! Who this node is, who the others are, and whether a call is meant for this one.
//!
//! A call names its cluster, its sender and its receiver, and of both the incarnation: the random
//! name of a data directory. It is refused, with both sides named, where
//!
//! - it is for another node, of another cluster, or for another incarnation of this node;
//! - its sender is not the incarnation that its id is bound to. The binding rides in the
//!   membership, so that it is in the log, holds from the moment it is appended, and survives
//!   restarts and changes of the leader; the table remembers it beyond the membership. A node that
//!   lost its disk comes back under its id as another incarnation, and can neither vote nor be
//!   written to: it must join under a new id;
//! - its sender is not the process that answers at the member's address ([`Sessions`]): somebody
//!   runs a copy of its data directory.
//!
//! Raft's own calls and forwarded ones must name everything that can be known; a probe, which comes
//! before there is a cluster, may leave out what is not known yet.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::type_config::alias::WatchReceiverOf;

use super::machine::TableView;
use super::types::{Member, Metrics, NodeId, TypeConfig};
use crate::lock::guard;
#[cfg(planted)]
use crate::planted::{self, Bug};
use crate::proto::peer::Header;

/// Who this node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalIdentity {
    pub node_id: NodeId,
    /// Of its data directory.
    pub incarnation: String,
    /// Of this process: random, drawn when it opened the data directory.
    pub session: String,
    /// Where clients reach it, `host:port`.
    pub client_endpoint: String,
}

/// The cluster's id, once it is known. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct ClusterCell(Arc<OnceLock<String>>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this node belongs to cluster {held} and not to {given}")]
pub struct ClusterMismatch {
    pub held: String,
    pub given: String,
}

impl ClusterCell {
    pub fn get(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// The same id again is fine.
    pub fn set(&self, id: &str) -> Result<(), ClusterMismatch> {
        let held = self.0.get_or_init(|| id.to_string());
        if held != id {
            return Err(ClusterMismatch { held: held.clone(), given: id.into() });
        }
        Ok(())
    }
}

/// Why a call is refused. What it is called on the wire tells the sender whether it is about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The header is missing, or lacks what it must name.
    Incomplete,
    /// For another node.
    Receiver,
    /// Of another cluster.
    Cluster,
    /// For another incarnation of this node.
    ReceiverIncarnation,
    /// The sender's id is bound to another incarnation.
    SenderIncarnation,
    /// The sender runs elsewhere, as the process that answers at its address.
    SenderSession,
    /// The sender was a member, and was removed.
    SenderRemoved,
}

impl Kind {
    pub fn on_wire(self) -> &'static str {
        match self {
            Kind::Incomplete => "incomplete",
            Kind::Receiver => "receiver",
            Kind::Cluster => "cluster",
            Kind::ReceiverIncarnation => "receiver-incarnation",
            Kind::SenderIncarnation => "sender-incarnation",
            Kind::SenderSession => "sender-session",
            Kind::SenderRemoved => "sender-removed",
        }
    }

    /// Does a refusal of this name mean that its receiver must not go on?
    pub fn ends_sender(name: &str) -> bool {
        // One that was removed still says so for a while: `PeerNetwork::removed`.
        [Kind::SenderIncarnation, Kind::SenderSession].iter().any(|kind| kind.on_wire() == name)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub kind: Kind,
    pub why: String,
}

fn refuse<T>(kind: Kind, why: String) -> Result<T, Refusal> {
    Err(Refusal { kind, why })
}

/// How a node with another disk than its id is bound to gets back.
fn way_out(id: NodeId) -> String {
    format!(
        "a node that lost its data is a new node: remove member {id} from the cluster \
         (portwarden member remove {id}), and start this one over an empty data directory with \
         --join and a new id; it must join under a new id"
    )
}

/// How much a header must name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Strictness {
    /// Everything that a member of a cluster knows.
    Member,
    /// What is known.
    Probe,
}

/// What the log and the table say of the members, once Raft runs.
#[derive(Clone)]
struct Roster {
    metrics: WatchReceiverOf<TypeConfig, Metrics>,
    view: TableView,
}

impl fmt::Debug for Roster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roster").finish_non_exhaustive()
    }
}

impl Roster {
    /// As of the last membership in the log, committed or not.
    fn member(&self, id: NodeId) -> Option<Member> {
        self.metrics.borrow_watched().membership_config.membership().get_node(&id).cloned()
    }

    /// The incarnation that an id is bound to, also after its removal.
    fn incarnation(&self, id: NodeId) -> Option<String> {
        let bound = self.member(id).map(|member| member.incarnation).filter(|i| !i.is_empty());
        bound.or_else(|| {
            self.view.look(|table| {
                table.state.member_incarnation(id).filter(|i| !i.is_empty()).map(String::from)
            })
        })
    }

    /// Was it a member, and is it none any more, neither in the log nor in what is applied?
    fn was_removed(&self, id: NodeId) -> bool {
        let gone = self.view.look(|table| {
            table.state.member_incarnation(id).is_some()
                && table.membership.membership().get_node(&id).is_none()
        });
        gone && self.member(id).is_none()
    }

    fn cluster(&self) -> Option<String> {
        let metrics = self.metrics.borrow_watched();
        let mut members = metrics.membership_config.nodes();
        members.next().map(|(_, member)| member.cluster_id.clone())
    }
}

/// Checks headers and writes them. Clones share what was learnt.
#[derive(Debug, Clone)]
pub(super) struct Identities {
    pub local: LocalIdentity,
    pub cluster: ClusterCell,
    roster: Arc<OnceLock<Roster>>,
    /// Incarnations heard of in Raft's own calls; counts where nothing is bound.
    heard: Arc<Mutex<BTreeMap<NodeId, String>>>,
    sessions: Sessions,
}

/// The process that runs each peer: the one that answered at the member's address. A copy of a data
/// directory has the same incarnation, so that only this tells the two apart.
///
/// One question at a time to each: of many calls of a new process at once, the first asks for all.
#[derive(Debug, Clone, Default)]
struct Sessions {
    found: Arc<Mutex<BTreeMap<NodeId, String>>>,
    turns: Arc<Mutex<BTreeMap<NodeId, Arc<Turns>>>>,
}

/// Of the questions to one node.
#[derive(Debug, Default)]
struct Turns {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Questions that were answered, or not in time.
    asked: AtomicU64,
}

impl Identities {
    /// Has this node applied its own removal?
    pub fn was_removed(&self) -> bool {
        self.roster.get().is_some_and(|roster| roster.was_removed(self.local.node_id))
    }

    pub fn new(local: LocalIdentity, cluster: ClusterCell) -> Self {
        let (roster, heard, sessions) = Default::default();
        Identities { local, cluster, roster, heard, sessions }
    }

    /// From now on what the log and the table say is known. Raft must have read its log.
    pub fn follow(&self, metrics: WatchReceiverOf<TypeConfig, Metrics>, view: TableView) {
        let _ = self.roster.set(Roster { metrics, view });
    }

    /// The record of a member, as far as this node's log goes.
    pub fn member(&self, id: NodeId) -> Option<Member> {
        self.roster.get()?.member(id)
    }

    pub fn cluster(&self) -> Option<String> {
        let known = self.cluster.get().map(String::from);
        known.or_else(|| self.roster.get()?.cluster())
    }

    /// The incarnation that an id stands for, as far as this node knows.
    pub fn incarnation(&self, id: NodeId) -> Option<String> {
        let bound = self.roster.get().and_then(|roster| roster.incarnation(id));
        bound.or_else(|| guard(&self.heard).get(&id).cloned())
    }

    pub fn header(&self, to: NodeId) -> Header {
        Header {
            cluster: self.cluster().unwrap_or_default(),
            from: self.local.node_id,
            to,
            from_incarnation: self.local.incarnation.clone(),
            to_incarnation: self.incarnation(to).unwrap_or_default(),
            from_session: self.local.session.clone(),
        }
    }

    /// Remembers a peer's incarnation, if none was known.
    pub fn learn(&self, node: NodeId, incarnation: &str) {
        if !incarnation.is_empty() && node != self.local.node_id {
            guard(&self.heard).entry(node).or_insert_with(|| incarnation.into());
        }
    }

    /// Is this the process that was found at the peer's address last?
    pub fn runs_as(&self, node: NodeId, session: &str) -> bool {
        guard(&self.sessions.found).get(&node).is_some_and(|held| held == session)
    }

    /// Was another process found at the peer's address last? No where none was looked for yet.
    pub fn ran_as_another(&self, node: NodeId, session: &str) -> bool {
        guard(&self.sessions.found).get(&node).is_some_and(|held| held != session)
    }

    pub fn found_at_its_address(&self, node: NodeId, session: &str) {
        guard(&self.sessions.found).insert(node, session.into());
    }

    /// Waits for the turn to ask who runs as this node. The guard says whether somebody else has
    /// asked meanwhile; when it is dropped, it was asked once more.
    pub async fn ask(&self, node: NodeId) -> Asking {
        let turns = guard(&self.sessions.turns).entry(node).or_default().clone();
        let before = turns.asked.load(Ordering::Acquire);
        let turn = turns.turn.clone().lock_owned().await;
        let others_did = turns.asked.load(Ordering::Acquire) != before;
        Asking { others_did, turns, _turn: turn }
    }

    /// Of a call by another process than the one that answers at the sender's address.
    pub fn twin(&self, from: NodeId, address: &str, found: &str, calling: &str) -> Refusal {
        Refusal {
            kind: Kind::SenderSession,
            why: format!(
                "node {from} runs at {address} (session {found}), and another process (session \
                 {calling}) calls as node {from} over a copy of its data directory: stop that one \
                 and delete the copy; one more node needs an id and a directory of its own"
            ),
        }
    }

    /// Why a call is not for this node, in words that name both sides.
    pub fn check(&self, header: Option<&Header>, strict: Strictness) -> Result<(), Refusal> {
        let Some(header) = header else {
            return refuse(Kind::Incomplete, "the header is missing".into());
        };
        let Header { cluster, from, to, from_incarnation, to_incarnation, from_session } = header;
        let me = self.local.node_id;
        if strict == Strictness::Member {
            let named = [
                ("cluster", cluster),
                ("from_incarnation", from_incarnation),
                ("from_session", from_session),
            ];
            if let Some((what, _)) = named.iter().find(|(_, value)| value.is_empty()) {
                let why = format!("the header of the call from node {from} has no {what}");
                return refuse(Kind::Incomplete, why);
            }
        }
        if *to != me && !(*to == 0 && strict == Strictness::Probe) {
            let why = format!("this is node {me}, and the call from node {from} is for node {to}");
            return refuse(Kind::Receiver, why);
        }
        if let Some(held) = self.cluster()
            && !cluster.is_empty()
            && held != *cluster
        {
            let why = format!(
                "node {me} belongs to cluster {held}, and node {from} calls from cluster {cluster}"
            );
            return refuse(Kind::Cluster, why);
        }
        #[cfg(planted)]
        if planted::is(Bug::WipedNodeVotes) {
            return Ok(());
        }
        let mine = &self.local.incarnation;
        if !to_incarnation.is_empty() && to_incarnation != mine {
            let way_out = way_out(me);
            let why = format!(
                "node {me} is incarnation {to_incarnation} to node {from}, and this data \
                 directory is incarnation {mine}: {way_out}"
            );
            return refuse(Kind::ReceiverIncarnation, why);
        }
        if self.roster.get().is_some_and(|roster| roster.was_removed(*from)) {
            let why = format!(
                "node {from} was removed from this cluster{}, and its id is never used again: a node \
                 that is to join needs an empty data directory and a new id",
                self.cluster().map(|id| format!(" ({id})")).unwrap_or_default()
            );
            return refuse(Kind::SenderRemoved, why);
        }
        if let Some(held) = self.incarnation(*from)
            && !from_incarnation.is_empty()
            && held != *from_incarnation
        {
            let way_out = way_out(*from);
            let why = format!(
                "node {from} is incarnation {held} in this cluster, and calls as \
                 {from_incarnation}: {way_out}"
            );
            return refuse(Kind::SenderIncarnation, why);
        }
        Ok(())
    }
}

/// The turn to ask who runs at an address.
pub(super) struct Asking {
    pub others_did: bool,
    turns: Arc<Turns>,
    _turn: tokio::sync::OwnedMutexGuard<()>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.turns.asked.fetch_add(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(node_id: NodeId, incarnation: &str, cluster: &str) -> Identities {
        let cell = ClusterCell::default();
        if !cluster.is_empty() {
            cell.set(cluster).unwrap();
        }
        let local = LocalIdentity {
            node_id,
            incarnation: incarnation.into(),
            session: format!("session of {incarnation}"),
            client_endpoint: String::new(),
        };
        Identities::new(local, cell)
    }

    fn refused(by: &Identities, header: Header, kind: Kind) -> String {
        let refusal = by.check(Some(&header), Strictness::Member).unwrap_err();
        assert_eq!(refusal.kind, kind, "{}", refusal.why);
        refusal.why
    }

    #[test]
    fn a_call_for_somebody_else_is_refused_by_name() {
        let one = node(1, "one", "c");
        let two = node(2, "two", "c");
        assert_eq!(two.check(Some(&one.header(2)), Strictness::Member), Ok(()));

        assert!(refused(&two, one.header(3), Kind::Receiver).contains("this is node 2"));
        let other = node(1, "one", "d");
        let why = refused(&two, other.header(2), Kind::Cluster);
        assert!(why.contains("cluster c") && why.contains("cluster d"), "{why}");
        let missing = two.check(None, Strictness::Probe).unwrap_err();
        assert_eq!(missing.kind, Kind::Incomplete);
    }

    #[test]
    fn a_node_that_lost_its_disk_is_refused() {
        let one = node(1, "one", "c");
        let two = node(2, "two", "c");
        one.learn(2, "two");
        two.learn(1, "one");
        assert_eq!(two.check(Some(&one.header(2)), Strictness::Member), Ok(()));

        let empty = node(2, "anew", "");
        let why = refused(&empty, one.header(2), Kind::ReceiverIncarnation);
        assert!(why.contains("incarnation anew") && why.contains("incarnation two"), "{why}");
        assert!(why.contains("member remove 2") && why.contains("--join"), "{why}");
        let probe = one.check(Some(&empty.header(1)), Strictness::Probe).unwrap_err();
        assert_eq!(probe.kind, Kind::SenderIncarnation);
        assert!(probe.why.contains("node 2 is incarnation two"), "{}", probe.why);
    }

    #[test]
    fn what_is_not_known_yet_is_a_mismatch_only_where_it_must_be_known() {
        let one = node(1, "one", "c");
        let new = node(2, "two", "");
        assert_eq!(new.check(Some(&one.header(2)), Strictness::Member), Ok(()));
        assert_eq!(one.check(Some(&new.header(1)), Strictness::Probe), Ok(()));
        assert!(refused(&one, new.header(1), Kind::Incomplete).contains("no cluster"));
        assert_eq!(new.cluster.set("c"), Ok(()));
        assert_eq!(new.cluster.set("c"), Ok(()));
        let mismatch = ClusterMismatch { held: "c".into(), given: "d".into() };
        assert_eq!(new.cluster.set("d"), Err(mismatch));
    }
}
