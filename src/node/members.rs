//! Changes of the membership: one at a time, on the leader.
//!
//! A node joins as a learner, catches up, and is promoted to a voter; a removed id never comes
//! back. Every change names the membership that it was decided on, so that of two operators none
//! overwrites the other: the second one's is decided anew on what the first one left.
//!
//! - A voter is added or removed through a joint configuration (Raft dissertation §4.3). A leader
//!   that finds one which another left behind finishes it.
//! - A member is pending until the node that has its id has spoken: then its incarnation is written
//!   into the membership, and binds the id to that data directory for good.
//! - The lead is handed only to a live voter that has all of the log: openraft's leader refuses
//!   writes from the moment it hands over, until somebody else leads.
//! - What may have been appended is [`CallError::Unknown`], as for every write; each change is safe
//!   to repeat, because one that is done already is a success.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures::future::join_all;
use itertools::Itertools as _;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::raft::Precondition;
use openraft::{ChangeMembers, ServerState};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::Status;
use tracing::{info, warn};

use super::outcome::{CallError, of_write};
use super::status::ASK_TIMEOUT;
use super::{Deadline, Node, ticks};
use crate::core::{Command, Refusal};
use crate::proto::peer;
use crate::raft::{LogId, Member, Metrics, NodeId, TypeConfig};

/// Entries that a learner may be behind when it is promoted: what is on its way anyhow.
pub const PROMOTE_LAG_MAX_ENTRIES: u64 = 256;
/// Most members, learners included: more only cost latency.
pub const MEMBERS_MAX: usize = 16;
/// A follower that answered the leader this recently counts as live, and so does a leader that its follower
/// has heard from.
pub(super) const LIVE_WITHIN: Duration = Duration::from_millis(1500);
/// How often the leader looks for what was left behind.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Between two looks at how far a learner is.
const CATCH_UP_PAUSE: Duration = Duration::from_millis(50);
/// How long a change waits for others to be done.
const OTHERS_MAX: Duration = Duration::from_secs(3);
/// How long a promotion waits for a member that has not joined.
const JOIN_MAX: Duration = Duration::from_secs(2);
/// Left of the caller's time for saying how far a learner is.
const ANSWER_MARGIN: Duration = Duration::from_millis(300);
const TIDY_MAX: Duration = Duration::from_secs(5);
/// What goes wrong again and again is said again after this.
const SAY_AGAIN: Duration = Duration::from_secs(30);
/// A node that joins asks again if it takes longer.
const TAKE_IN_MAX: Duration = Duration::from_secs(4);
/// Tries to tell a node that it was removed.
const FAREWELLS: u32 = 10;
const FAREWELL_PAUSE: Duration = Duration::from_millis(300);
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

/// What an operator asks for, or a node that joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberChange {
    /// As a learner. `incarnation` is empty where the node itself has not spoken yet.
    Add {
        id: NodeId,
        peer: String,
        client: String,
        incarnation: String,
    },
    Promote {
        id: NodeId,
    },
    /// `force`: also if too few of those that are left are live.
    Remove {
        id: NodeId,
        force: bool,
    },
    Transfer {
        id: NodeId,
    },
    /// Not of the members themselves, but all of them must know it.
    FeatureLevel {
        level: u32,
    },
}

/// Why the membership stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotChanged {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("there is no member {0}")]
    NoMember(NodeId),
    #[error("id {0} was a member's before, and is never used again: take another one")]
    IdUsed(NodeId),
    #[error(
        "member {id} has {what} {held}, not {given}: an address does not change in place; remove it and join under a new id"
    )]
    OtherAddress { id: NodeId, what: &'static str, held: String, given: String },
    #[error("{address} is the address of member {id}")]
    AddressUsed { id: NodeId, address: String },
    #[error("there are {MEMBERS_MAX} members, which is the most there may be: remove one first")]
    TooMany,
    #[error(
        "another change of the membership is under way, or came first: look at `portwarden member list` and try again"
    )]
    UnderWay,
    #[error(
        "member {0} has not joined yet: start it with `portwarden serve --id {0} --join HOST:PORT`"
    )]
    Pending(NodeId),
    #[error(
        "member {id} is {lag} log entries behind (at most {PROMOTE_LAG_MAX_ENTRIES} to be promoted, or to lead): try again when it has caught up; `portwarden member list` shows its lag"
    )]
    Lagging { id: NodeId, lag: u64 },
    #[error("member {0} is the last voter: promote another one first")]
    LastVoter(NodeId),
    #[error(
        "without member {id}, {live} of {voters} voters would be live, which is no majority: bring the others back or replace them first, or say --force, after which the cluster stands still until enough of them are back"
    )]
    NoQuorum { id: NodeId, live: usize, voters: usize },
    #[error("member {0} is a learner, and cannot lead: promote it first")]
    Learner(NodeId),
    #[error("member {0} cannot lead: it does not answer; `portwarden status` shows who does")]
    Dead(NodeId),
    #[error(
        "member {0} leads, and no other voter is there to lead after it: bring one back first, or stop member {0} and remove it then"
    )]
    NoSuccessor(NodeId),
    #[error(
        "member {0} does not say which feature levels it knows: every member must be up, or removed"
    )]
    LevelUntold(NodeId),
    #[error(
        "member {id} knows feature levels up to {known}, and not {asked}: upgrade it first, or remove it"
    )]
    LevelUnknown { id: NodeId, asked: u32, known: u32 },
    #[error(transparent)]
    Refused(Refusal),
}

/// The membership as the leader sees it.
pub(super) struct Roll {
    metrics: Metrics,
    /// Who spoke to this node as its leader last, and when.
    last_led: Option<(NodeId, Instant)>,
}

impl Roll {
    fn members(&self) -> BTreeMap<NodeId, &Member> {
        self.metrics.membership_config.nodes().map(|(id, member)| (*id, member)).collect()
    }

    fn member(&self, id: NodeId) -> Result<&Member, NotChanged> {
        self.metrics.membership_config.membership().get_node(&id).ok_or(NotChanged::NoMember(id))
    }

    pub fn voters(&self) -> BTreeSet<NodeId> {
        self.metrics.membership_config.membership().voter_ids().collect()
    }

    fn is_joint(&self) -> bool {
        self.metrics.membership_config.membership().get_joint_config().len() > 1
    }

    /// Where in the log it is.
    fn at(&self) -> Option<LogId> {
        *self.metrics.membership_config.log_id()
    }

    /// The change counts only for this membership.
    fn precondition(&self) -> Precondition<TypeConfig> {
        Precondition::LastMembershipLogId { last_membership_log_id: self.at() }
    }

    /// Did it answer this leader of late?
    pub fn is_live(&self, id: NodeId) -> bool {
        id == self.metrics.id
            || self.metrics.heartbeat.as_ref().is_some_and(|heard| {
                use openraft::async_runtime::Instant as _;
                heard
                    .get(&id)
                    .and_then(Option::as_ref)
                    .is_some_and(|at| at.into_inner().elapsed() < LIVE_WITHIN)
            })
    }

    /// How many of them did.
    fn live(&self, members: &BTreeSet<NodeId>) -> usize {
        members.iter().filter(|id| self.is_live(**id)).count()
    }

    /// Does somebody lead, who is there? Who leads itself has heard from a majority of late, or does so in
    /// name alone; who follows has heard from its leader, which may be dead.
    pub fn has_leader(&self) -> bool {
        let is_backed = |voters: &BTreeSet<NodeId>| self.live(voters) * 2 > voters.len();
        match self.metrics.state {
            ServerState::Leader => {
                let membership = self.metrics.membership_config.membership();
                membership.get_joint_config().iter().all(is_backed)
            }
            _ => self.last_led.is_some_and(|(leader, at)| {
                self.metrics.current_leader == Some(leader) && at.elapsed() < LIVE_WITHIN
            }),
        }
    }

    /// Fails once this node does not lead any more, and hears from nobody.
    fn leads(&self) -> Result<(), CallError> {
        match self.metrics.state {
            ServerState::Leader => Ok(()),
            _ => Err(CallError::NotLeader { leader: None }),
        }
    }

    /// The live voters, other than the leader, and what each lacks of its log; who lacks least comes first.
    pub fn successors(&self) -> impl Iterator<Item = (u64, NodeId)> {
        let others = self.voters().into_iter().filter(|id| *id != self.metrics.id);
        others.filter(|id| self.is_live(*id)).map(|id| (self.lag(id), id)).sorted()
    }

    /// The last entry that it has told the leader is on its disk; 0: none, or nobody leads here.
    pub fn acknowledged(&self, id: NodeId) -> u64 {
        self.matched(id).map_or(0, |at| at.index())
    }

    fn matched(&self, id: NodeId) -> Option<&LogId> {
        self.metrics.replication.as_ref().and_then(|all| all.get(&id)?.as_ref())
    }

    /// Entries of the leader's log that it does not have.
    pub fn lag(&self, id: NodeId) -> u64 {
        let have = self.matched(id).map_or(0, |at| at.index() + 1);
        self.metrics.last_log_index.map_or(0, |last| last + 1).saturating_sub(have)
    }
}

impl Node {
    pub(super) fn roll(&self) -> Roll {
        Roll { metrics: self.inner.metrics(), last_led: self.inner.network.last_led() }
    }

    /// On the leader: changes the membership, or says why it stays as it is. One that is as asked
    /// for already is a success. Where another change comes first, it is decided anew on what that
    /// one left, for a while.
    pub async fn change_members(
        &self,
        change: MemberChange,
        deadline: Deadline,
    ) -> Result<(), NotChanged> {
        let patience = (Instant::now() + OTHERS_MAX).min(deadline - ANSWER_MARGIN);
        loop {
            match self.decide(&change, deadline).await {
                Err(NotChanged::UnderWay) if Instant::now() < patience => sleep(LOOK_EVERY).await,
                decided => return decided,
            }
        }
    }

    async fn decide(&self, change: &MemberChange, deadline: Deadline) -> Result<(), NotChanged> {
        // Proves that this node leads, and that its membership is the newest.
        self.read(deadline).await?;
        match change.clone() {
            MemberChange::Add { id, peer, client, incarnation } => {
                let cluster_id = self.inner.cluster.get().unwrap_or_default().into();
                self.add(id, Member { cluster_id, peer, client, incarnation }, deadline).await
            }
            MemberChange::Promote { id } => self.promote(id, deadline).await,
            MemberChange::Remove { id, force } => self.remove(id, force, deadline).await,
            MemberChange::Transfer { id } => self.transfer(id, deadline).await,
            MemberChange::FeatureLevel { level } => self.raise_level(level, deadline).await,
        }
    }

    async fn add(&self, id: NodeId, member: Member, deadline: Deadline) -> Result<(), NotChanged> {
        let roll = self.roll();
        if let Ok(held) = roll.member(id) {
            for (what, held, given) in [
                ("peer address", &held.peer, &member.peer),
                ("client address", &held.client, &member.client),
            ] {
                if held != given {
                    let (held, given) = (held.clone(), given.clone());
                    return Err(NotChanged::OtherAddress { id, what, held, given });
                }
            }
            // Who calls as another incarnation of a bound id was refused before it came here.
            if !held.incarnation.is_empty() || member.incarnation.is_empty() {
                return Ok(());
            }
            return self
                .change(&roll, ChangeMembers::SetNodes([(id, member)].into()), deadline)
                .await;
        }
        if self.table().state.member_incarnation(id).is_some() {
            return Err(NotChanged::IdUsed(id));
        }
        if roll.members().len() >= MEMBERS_MAX {
            return Err(NotChanged::TooMany);
        }
        for (other, held) in roll.members() {
            if let Some(address) = [&member.peer, &member.client]
                .into_iter()
                .find(|a| [&held.peer, &held.client].contains(a))
            {
                return Err(NotChanged::AddressUsed { id: other, address: address.clone() });
            }
        }
        info!(id, peer = member.peer, "adding a member");
        self.change(&roll, ChangeMembers::AddNodes([(id, member)].into()), deadline).await
    }

    async fn promote(&self, id: NodeId, deadline: Deadline) -> Result<(), NotChanged> {
        // One that has just been started is about to be written down.
        let until_joined = (Instant::now() + JOIN_MAX).min(deadline - ANSWER_MARGIN);
        loop {
            let roll = self.roll();
            let member = roll.member(id)?;
            if roll.voters().contains(&id) && !roll.is_joint() {
                return Ok(());
            }
            roll.leads()?;
            let (lag, live) = (roll.lag(id), roll.is_live(id));
            let pending = member.incarnation.is_empty();
            if pending && Instant::now() >= until_joined {
                return Err(NotChanged::Pending(id));
            }
            if lag <= PROMOTE_LAG_MAX_ENTRIES && live && !pending {
                info!(id, lag, "promoting a member");
                return self.change(&roll, ChangeMembers::AddVoterIds([id].into()), deadline).await;
            }
            if Instant::now() + ANSWER_MARGIN >= deadline {
                return Err(NotChanged::Lagging { id, lag });
            }
            sleep(CATCH_UP_PAUSE).await;
        }
    }

    async fn remove(&self, id: NodeId, force: bool, deadline: Deadline) -> Result<(), NotChanged> {
        let roll = self.roll();
        let Ok(member) = roll.member(id) else {
            return match self.table().state.member_incarnation(id) {
                Some(_) => Ok(()),
                None => Err(NotChanged::NoMember(id)),
            };
        };
        let member = member.clone();
        let mut left = roll.voters();
        let is_voter = left.remove(&id);
        if left.is_empty() {
            return Err(NotChanged::LastVoter(id));
        }
        if is_voter && !force {
            self.keeps_majority(id, &left, deadline).await?;
        }
        if id == self.id() {
            // The next leader removes this one.
            let to = self.successor(deadline).await?;
            self.hand_over_to(to).await;
            return Err(CallError::NotLeader { leader: Some(to) }.into());
        }
        info!(id, peer = member.peer, "removing a member");
        let change = match is_voter {
            true => ChangeMembers::RemoveVoters([id].into()),
            false => ChangeMembers::RemoveNodes([id].into()),
        };
        self.change(&roll, change, deadline).await?;
        tokio::spawn(farewell(self.clone(), id, member));
        Ok(())
    }

    async fn transfer(&self, id: NodeId, deadline: Deadline) -> Result<(), NotChanged> {
        let roll = self.roll();
        roll.member(id)?;
        if id == self.id() {
            return Ok(());
        }
        if !roll.voters().contains(&id) {
            return Err(NotChanged::Learner(id));
        }
        if !roll.is_live(id) || !self.answers(id).await {
            return Err(NotChanged::Dead(id));
        }
        // It takes over only once it has every entry: what is on its way will be there.
        let lag = roll.lag(id);
        if lag > PROMOTE_LAG_MAX_ENTRIES {
            return Err(NotChanged::Lagging { id, lag });
        }
        info!(to = id, "handing over the lead, as asked");
        self.hand_over_to(id).await;
        let led = self.raft_comes_to(|now| now.current_leader == Some(id));
        match timeout_at(deadline, led).await {
            Ok(_) => Ok(()),
            Err(_) => Err(CallError::Unknown("it did not take over in time".into()).into()),
        }
    }

    /// Does it answer now? The last word of one that has just died is not old yet.
    async fn answers(&self, id: NodeId) -> bool {
        let roll = self.roll();
        let Ok(member) = roll.member(id) else { return false };
        let answer = self.ask(id, member, ASK_TIMEOUT).await;
        // One that is starting does not say who it is yet.
        answer.is_some_and(|answer| !answer.incarnation.is_empty())
    }

    /// The voter to lead after this node; waits until one has caught up.
    pub(super) async fn successor(&self, deadline: Deadline) -> Result<NodeId, NotChanged> {
        successor(|| self.roll(), |id| self.answers(id), deadline).await
    }

    async fn raise_level(&self, level: u32, deadline: Deadline) -> Result<(), NotChanged> {
        let held = self.table().state.feature_level;
        // What is so already must not come into the log: members of an older build could not read it.
        if level == held {
            return Ok(());
        }
        if level < held {
            return Err(NotChanged::Refused(Refusal::FeatureLevelPassed { asked: level, held }));
        }
        let Ok(_alone) = self.inner.changing.try_lock() else { return Err(NotChanged::UnderWay) };
        let roll = self.roll();
        let told = roll.members().into_iter().map(|(id, member)| async move {
            let answer = self.ask(id, member, ASK_TIMEOUT).await;
            (id, answer.map(|answer| answer.feature_level_max.max(1)))
        });
        all_know(level, join_all(told).await)?;
        let raised = self.propose(Command::SetFeatureLevel { level }, deadline).await?;
        raised.applied.outcome.map(drop).map_err(NotChanged::Refused)
    }

    /// Fails where most of the voters that are left do not answer now: the last word of one that has just
    /// died is not old yet, and a change that was begun without a majority cannot be taken back.
    async fn keeps_majority(
        &self,
        without: NodeId,
        left: &BTreeSet<NodeId>,
        deadline: Deadline,
    ) -> Result<(), NotChanged> {
        keeps_majority(|| self.roll(), without, left, deadline).await?;
        let answers = join_all(left.iter().map(|id| self.answers(*id))).await;
        let live = answers.into_iter().filter(|answers| *answers).count();
        match live * 2 > left.len() {
            true => Ok(()),
            false => Err(NotChanged::NoQuorum { id: without, live, voters: left.len() }),
        }
    }

    /// One change on top of the membership of `roll`, and of no other.
    async fn change(
        &self,
        roll: &Roll,
        change: ChangeMembers<NodeId, Member>,
        deadline: Deadline,
    ) -> Result<(), NotChanged> {
        let Ok(_alone) = self.inner.changing.try_lock() else { return Err(NotChanged::UnderWay) };
        if roll.is_joint() {
            return Err(NotChanged::UnderWay);
        }
        let asked = self.inner.raft.change_membership_if(change, false, [roll.precondition()]);
        let answer = match timeout_at(deadline, asked).await {
            Ok(answer) => answer,
            Err(_) => {
                let why = "the deadline passed while the change was under way";
                return Err(CallError::Unknown(why.into()).into());
            }
        };
        let error = match answer {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        // Of two steps the first may be done.
        if self.roll().at() != roll.at() {
            return Err(CallError::Unknown(format!("the change was begun: {error}")).into());
        }
        match error {
            RaftError::APIError(
                ClientWriteError::ChangeMembershipError(ChangeMembershipError::InProgress(_))
                | ClientWriteError::PreconditionFailed(_),
            ) => Err(NotChanged::UnderWay),
            error => Err(of_write(error).into()),
        }
    }

    /// Ends a joint configuration that nobody is at work on.
    async fn finish(&self, roll: &Roll, deadline: Deadline, said: &mut Option<Instant>) {
        let Ok(_alone) = self.inner.changing.try_lock() else { return };
        let says = said.is_none_or(|said| said.elapsed() > SAY_AGAIN);
        if says {
            info!("finishing a change of the membership that was left half done");
            *said = Some(Instant::now());
        }
        let nothing_more = ChangeMembers::AddVoterIds(BTreeSet::new());
        let asked =
            self.inner.raft.change_membership_if(nothing_more, false, [roll.precondition()]);
        match timeout_at(deadline, asked).await {
            Ok(Err(error)) if says => warn!(%error, "the change cannot be finished yet"),
            Err(_) if says => warn!("the change cannot be finished yet: no quorum"),
            _ => {}
        }
    }

    /// A node asks to be taken in; its header was checked.
    pub(super) async fn take_in(
        &self,
        request: peer::JoinRequest,
    ) -> Result<peer::JoinResponse, Status> {
        let peer::JoinRequest { header, peer, client, feature_level_max } = request;
        let header = header.unwrap_or_default();
        if header.from == 0 || header.from_incarnation.is_empty() || peer.is_empty() {
            return Err(Status::invalid_argument(
                "who joins names its id, incarnation and address",
            ));
        }
        let deadline = Instant::now() + TAKE_IN_MAX;
        let not_now = |why: &dyn std::fmt::Display| Status::unavailable(why.to_string());
        if let Some(leader) = self.route(deadline).await.map_err(|error| not_now(&error))? {
            let roll = self.roll();
            let leader_peer = roll.member(leader).map_err(|error| not_now(&error))?.peer.clone();
            return Ok(peer::JoinResponse { leader_peer });
        }
        let (id, incarnation) = (header.from, header.from_incarnation);
        let (level, known) = (self.table().state.feature_level, feature_level_max.max(1));
        if known < level {
            let why = format!(
                "the cluster has feature level {level}, and node {id} knows 1 to {known}: start the \
                 build that the other nodes run, or a newer one"
            );
            return Err(Status::failed_precondition(why));
        }
        let add = MemberChange::Add { id, peer, client, incarnation };
        match self.change_members(add, deadline).await {
            Ok(()) => Ok(peer::JoinResponse::default()),
            Err(why @ (NotChanged::Call(_) | NotChanged::UnderWay)) => Err(not_now(&why)),
            Err(why) => Err(Status::failed_precondition(why.to_string())),
        }
    }

    /// Asks the members of which the membership does not know all: who they are, and where clients
    /// reach them.
    async fn incomplete(&self, roll: &Roll) -> BTreeMap<NodeId, Member> {
        let mut found = BTreeMap::new();
        for (id, member) in roll.members() {
            if !member.incarnation.is_empty() && !member.client.is_empty() {
                continue;
            }
            // Else it has not come yet.
            let Some(answer) = self.ask(id, member, ASK_TIMEOUT).await else { continue };
            let known = Member {
                incarnation: answer.incarnation,
                client: answer.client_endpoint,
                ..member.clone()
            };
            if !known.incarnation.is_empty() && known != *member {
                found.insert(id, known);
            }
        }
        found
    }
}

/// Does each member know the level, by its highest one?
fn all_know(asked: u32, members: Vec<(NodeId, Option<u32>)>) -> Result<(), NotChanged> {
    for (id, known) in members {
        let known = known.ok_or(NotChanged::LevelUntold(id))?;
        if known < asked {
            return Err(NotChanged::LevelUnknown { id, asked, known });
        }
    }
    Ok(())
}

/// Fails where most of the voters that are left are not live. Whoever has just begun to lead has not heard
/// from everybody yet, and waits for that.
async fn keeps_majority(
    look: impl Fn() -> Roll,
    without: NodeId,
    left: &BTreeSet<NodeId>,
    deadline: Deadline,
) -> Result<(), NotChanged> {
    let patience = (Instant::now() + LIVE_WITHIN).min(deadline - ANSWER_MARGIN);
    loop {
        let roll = look();
        roll.leads()?;
        let live = roll.live(left);
        if live * 2 > left.len() {
            return Ok(());
        }
        if Instant::now() >= patience {
            return Err(NotChanged::NoQuorum { id: without, live, voters: left.len() });
        }
        sleep(CATCH_UP_PAUSE).await;
    }
}

/// The voter to lead after the one that looks: of those that have caught up and answer, the one with the
/// most of the log. Waits for one; a deadline that has passed is one look. (openraft alpha.37 never clears a
/// transfer: a dead target would stall the group.)
async fn successor<Answer: Future<Output = bool>>(
    look: impl Fn() -> Roll,
    answers: impl Fn(NodeId) -> Answer,
    deadline: Deadline,
) -> Result<NodeId, NotChanged> {
    loop {
        let roll = look();
        roll.leads()?;
        // It takes over once it has every entry: what is on its way will be there.
        let (caught_up, behind): (Vec<_>, Vec<_>) =
            roll.successors().partition(|(lag, _)| *lag <= PROMOTE_LAG_MAX_ENTRIES);
        for (_, id) in &caught_up {
            if answers(*id).await {
                return Ok(*id);
            }
        }
        if Instant::now() + ANSWER_MARGIN >= deadline {
            return Err(match behind.first() {
                Some((lag, id)) if caught_up.is_empty() => {
                    NotChanged::Lagging { id: *id, lag: *lag }
                }
                _ => NotChanged::NoSuccessor(roll.metrics.id),
            });
        }
        sleep(CATCH_UP_PAUSE).await;
    }
}

/// On the leader: finishes joint configurations, and binds members that have spoken.
pub(super) async fn tidy(node: Node) {
    let mut every = ticks(LOOK_EVERY);
    let mut said = None;
    while node.runs() {
        every.tick().await;
        let roll = node.roll();
        if roll.leads().is_err() {
            continue;
        }
        let deadline = Instant::now() + TIDY_MAX;
        if roll.is_joint() {
            node.finish(&roll, deadline, &mut said).await;
            continue;
        }
        said = None;
        let complete = node.incomplete(&roll).await;
        if !complete.is_empty() {
            let ids: Vec<_> = complete.keys().copied().collect();
            match node.change(&roll, ChangeMembers::SetNodes(complete), deadline).await {
                Ok(()) => info!(?ids, "members have joined"),
                Err(error) => warn!(?ids, %error, "members that joined are not written down yet"),
            }
        }
    }
}

/// Tells a node that it was removed, so that it need not find out.
async fn farewell(node: Node, id: NodeId, member: Member) {
    for _ in 0..FAREWELLS {
        let request = peer::ProbeRequest { removed: true, ..Default::default() };
        match node.inner.network.probe(id, &member.peer, request, FAREWELL_TIMEOUT).await {
            Ok(_) => return,
            Err(why) => tracing::debug!(id, why, "a removed member was not told yet"),
        }
        sleep(FAREWELL_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use openraft::{Membership, StoredMembership};

    use super::*;
    use crate::raft::LeaderId;

    /// As leader 1 of voters 1 to 3 with 1000 log entries sees it: what each follower lacks, and whether
    /// it answers.
    fn roll(followers: [(u64, bool); 2]) -> Roll {
        use openraft::async_runtime::Instant as _;
        let mut metrics = Metrics::new_initial(1);
        metrics.state = ServerState::Leader;
        metrics.last_log_index = Some(999);
        let nodes: BTreeMap<_, _> = (1..=3).map(|id| (id, Member::default())).collect();
        let membership = Membership::new(vec![[1, 2, 3].into()], nodes).unwrap();
        metrics.membership_config = StoredMembership::new(None, membership).into();
        let with_id = || followers.into_iter().zip(2..);
        let leader = LeaderId { term: 1, node_id: 1 };
        let at = |lag| LogId::new(leader, 999 - lag);
        metrics.replication = Some(with_id().map(|((lag, _), id)| (id, Some(at(lag)))).collect());
        let now = openraft::type_config::alias::InstantOf::<TypeConfig>::now();
        let heard = with_id().map(|((_, live), id)| (id, live.then(|| now.into())));
        metrics.heartbeat = Some(heard.collect());
        Roll { metrics, last_led: None }
    }

    fn soon() -> Deadline {
        Instant::now() + Duration::from_secs(2)
    }

    async fn answers(_: NodeId) -> bool {
        true
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_most_of_the_log_leads_next_and_the_silent_never() {
        assert_eq!(successor(|| roll([(7, true), (3, true)]), answers, soon()).await, Ok(3));
        assert_eq!(successor(|| roll([(7, true), (0, false)]), answers, soon()).await, Ok(2));
        let none = successor(|| roll([(0, false), (0, false)]), answers, soon()).await;
        assert_eq!(none, Err(NotChanged::NoSuccessor(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_just_died_does_not_lead_next_though_its_last_word_is_young() {
        let look = || roll([(7, true), (3, true)]);
        let but_the_third = async |id| id != 3;
        assert_eq!(successor(look, but_the_third, Instant::now()).await, Ok(2), "in one look");
        let none = successor(look, async |_| false, Instant::now()).await;
        assert_eq!(none, Err(NotChanged::NoSuccessor(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_is_removed_waits_for_one_that_catches_up() {
        let lag = Cell::new(PROMOTE_LAG_MAX_ENTRIES + 10);
        let looked = || {
            lag.set(lag.get() - 1);
            roll([(lag.get(), true), (900, true)])
        };
        let began = Instant::now();
        assert_eq!(successor(looked, answers, soon()).await, Ok(2));
        assert_eq!(began.elapsed(), CATCH_UP_PAUSE * 9);
    }

    #[tokio::test(start_paused = true)]
    async fn where_none_catches_up_the_lag_is_named_in_time() {
        let deadline = soon();
        let lag = PROMOTE_LAG_MAX_ENTRIES + 1;
        let look = || roll([(lag, true), (900, true)]);
        let refused = successor(look, answers, deadline).await.unwrap_err();
        assert_eq!(refused, NotChanged::Lagging { id: 2, lag });
        assert!(refused.to_string().contains("member 2 is 257 log entries behind"), "{refused}");
        assert!(Instant::now() < deadline, "there is time left to say so");
    }

    #[test]
    fn a_level_is_raised_only_once_every_member_knows_it() {
        assert_eq!(all_know(2, vec![(1, Some(2)), (2, Some(3))]), Ok(()));
        let unknown = Err(NotChanged::LevelUnknown { id: 2, asked: 2, known: 1 });
        assert_eq!(all_know(2, vec![(1, Some(2)), (2, Some(1))]), unknown);
        let untold = Err(NotChanged::LevelUntold(3));
        assert_eq!(all_know(2, vec![(1, Some(2)), (3, None), (2, Some(1))]), untold);
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_has_just_begun_hears_from_the_others_before_it_refuses_to_remove_one() {
        let left = BTreeSet::from([2, 3]);
        let looks = Cell::new(0);
        let hears_late = || {
            looks.set(looks.get() + 1);
            roll([(0, looks.get() > 9), (0, looks.get() > 3)])
        };
        assert_eq!(keeps_majority(hears_late, 1, &left, soon()).await, Ok(()));
        assert_eq!(looks.get(), 10, "both of two");
        let began = Instant::now();
        let refused = keeps_majority(|| roll([(0, true), (0, false)]), 1, &left, soon()).await;
        assert_eq!(refused, Err(NotChanged::NoQuorum { id: 1, live: 1, voters: 2 }));
        assert_eq!(began.elapsed(), LIVE_WITHIN);
    }

    #[tokio::test]
    async fn who_leads_and_hears_from_too_few_leads_in_name_alone() {
        assert!(roll([(0, true), (0, false)]).has_leader());
        assert!(!roll([(0, false), (0, false)]).has_leader());
    }

    #[tokio::test(start_paused = true)]
    async fn who_follows_has_a_leader_for_as_long_as_it_hears_from_it() {
        let mut follower = roll([(0, false), (0, false)]);
        follower.metrics.state = ServerState::Follower;
        assert!(!follower.has_leader());
        follower.metrics.current_leader = Some(2);
        assert!(!follower.has_leader(), "it never spoke");
        follower.last_led = Some((3, Instant::now()));
        assert!(!follower.has_leader(), "that was another one");
        follower.last_led = Some((2, Instant::now()));
        assert!(follower.has_leader());
        tokio::time::advance(LIVE_WITHIN).await;
        assert!(!follower.has_leader(), "it is silent");
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_deposed_meanwhile_sends_the_caller_on() {
        let mut deposed = roll([(0, false), (0, false)]);
        deposed.metrics.state = ServerState::Follower;
        let (metrics, not_leader) = (deposed.metrics, CallError::NotLeader { leader: None });
        let look = || Roll { metrics: metrics.clone(), last_led: None };
        let began = Instant::now();
        assert_eq!(successor(look, answers, soon()).await, Err(not_leader.clone().into()));
        let left = BTreeSet::from([2, 3]);
        assert_eq!(keeps_majority(look, 1, &left, soon()).await, Err(not_leader.into()));
        assert_eq!(began.elapsed(), Duration::ZERO, "at once");
    }
}
