//! What a node can tell of its cluster, leader or not, quorum or not.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;
use openraft::ServerState;
use tokio::time::Instant;

use super::lag::LAG_PROBLEM_ENTRIES;
use super::{Deadline, Node};
use crate::core::{FEATURE_LEVEL, Phase};
use crate::proto::peer;
use crate::raft::{Member, NodeId};

/// How long a member may take to say how it is.
pub(super) const ASK_TIMEOUT: Duration = Duration::from_millis(700);

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StatusReport {
    pub cluster_id: String,
    pub leader: Option<NodeId>,
    pub revision: u64,
    pub members: Vec<MemberReport>,
    /// What is wrong, in words.
    pub problems: Vec<String>,
    /// Those of them that are of the table, and not of the members.
    pub table_problems: Vec<String>,
    /// The node that answers.
    pub node: NodeId,
    pub term: u64,
    pub workers: u64,
    pub allocations: u64,
    pub feature_level: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemberReport {
    pub id: NodeId,
    /// `voter` or `learner`.
    pub role: &'static str,
    /// `leader`, `follower`, `candidate` or `unreachable`.
    pub state: &'static str,
    /// Where clients reach it.
    pub endpoint: String,
    pub peer_endpoint: String,
    /// Index of the last applied log entry; 0 where it could not be asked.
    pub applied: u64,
    /// Entries behind the furthest log of the cluster.
    pub lag: u64,
    /// Of the program that it runs; empty where it could not be asked.
    pub version: String,
    /// It was added and has not joined yet.
    pub pending: bool,
}

impl Node {
    /// Asks every member how it is, itself included, and says what it heard by the deadline.
    pub async fn status(&self, deadline: Deadline) -> StatusReport {
        let patience = ASK_TIMEOUT.min(deadline.saturating_duration_since(Instant::now()) / 2);
        let table = self.inner.view.table();
        let membership = self.inner.metrics().membership_config;
        let voters: Vec<NodeId> = membership.membership().voter_ids().collect();
        let asked = membership.nodes().map(|(id, member)| async move {
            (*id, member, self.ask(*id, member, patience).await)
        });
        let answers = join_all(asked).await;
        let furthest = answers.iter().flat_map(|a| &a.2).map(|a| a.last_log).max().unwrap_or(0);
        let term = answers.iter().flat_map(|a| &a.2).map(|a| a.term).max().unwrap_or(0);
        // A deposed leader may not know it yet: the one of the highest term counts.
        let leader = answers
            .iter()
            .filter_map(|(id, _, answer)| answer.as_ref().map(|a| (a, *id)))
            .filter(|(answer, _)| answer.state == "leader")
            .max_by_key(|(answer, _)| answer.term)
            .map(|(_, id)| id);
        let own = own_problems(leader, &answers);
        let members: Vec<_> = answers
            .into_iter()
            .map(|(id, member, answer)| {
                let applied = answer.as_ref().map_or(0, |a| a.applied);
                MemberReport {
                    id,
                    role: if voters.contains(&id) { "voter" } else { "learner" },
                    state: match answer.as_ref().map(|a| a.state.as_str()) {
                        None => "unreachable",
                        Some("leader") if leader == Some(id) => "leader",
                        Some("candidate") => "candidate",
                        Some(_) => "follower",
                    },
                    endpoint: member.client.clone(),
                    peer_endpoint: member.peer.clone(),
                    applied,
                    lag: furthest.saturating_sub(applied),
                    version: answer.map(|a| a.version).unwrap_or_default(),
                    pending: member.incarnation.is_empty(),
                }
            })
            .collect();
        let of_table = self.table_problems().await;
        StatusReport {
            cluster_id: self.inner.cluster.get().unwrap_or_default().to_string(),
            leader,
            revision: table.state.revision.0,
            problems: [
                problems(leader, &members, membership.membership().get_joint_config()),
                self.membership_problems(&members),
                own,
                of_table.clone(),
            ]
            .concat(),
            table_problems: of_table,
            members,
            node: self.id(),
            term,
            workers: table.state.worker_count() as u64,
            allocations: table.state.allocation_count() as u64,
            feature_level: table.state.feature_level,
        }
    }

    /// How a member is, itself included; `None` where it does not answer.
    pub(super) async fn ask(
        &self,
        id: NodeId,
        member: &Member,
        patience: Duration,
    ) -> Option<peer::ProbeResponse> {
        if id == self.id() {
            return Some(self.own_state());
        }
        let request = peer::ProbeRequest::default();
        self.inner.network.probe(id, &member.peer, request, patience).await.ok()
    }

    /// The same of all others, at once.
    pub(super) async fn ask_others(
        &self,
        patience: Duration,
    ) -> Vec<(NodeId, Option<peer::ProbeResponse>)> {
        let membership = self.inner.metrics().membership_config;
        let others = membership.nodes().filter(|(id, _)| **id != self.id());
        let asked =
            others.map(|(id, member)| async move { (*id, self.ask(*id, member, patience).await) });
        join_all(asked).await
    }

    /// What the membership says of the members, and nothing of how they are.
    pub fn membership(&self) -> StatusReport {
        let membership = self.inner.metrics().membership_config;
        let voters: Vec<NodeId> = membership.membership().voter_ids().collect();
        let members = membership.nodes().map(|(id, member)| MemberReport {
            id: *id,
            role: if voters.contains(id) { "voter" } else { "learner" },
            state: "",
            endpoint: member.client.clone(),
            peer_endpoint: member.peer.clone(),
            applied: 0,
            lag: 0,
            version: String::new(),
            pending: member.incarnation.is_empty(),
        });
        StatusReport { members: members.collect(), ..StatusReport::default() }
    }

    fn membership_problems(&self, members: &[MemberReport]) -> Vec<String> {
        let membership = self.inner.metrics().membership_config;
        let mut problems: Vec<_> = members
            .iter()
            .filter(|member| member.pending)
            .map(|member| format!("member {} was added and has not joined yet", member.id))
            .collect();
        if membership.membership().get_joint_config().len() > 1 {
            problems.push("a change of the membership is under way (joint configuration)".into());
        }
        let versions: BTreeSet<_> =
            members.iter().map(|m| m.version.as_str()).filter(|v| !v.is_empty()).collect();
        if versions.len() > 1 {
            let versions: Vec<_> = versions.into_iter().collect();
            problems.push(format!("members run different versions: {}", versions.join(", ")));
        }
        problems
    }

    /// Of this node's own copy.
    async fn table_problems(&self) -> Vec<String> {
        let mut problems = self.survey().await.problems();
        let table = self.table();
        if let Some(example) = table.state.lingering().next() {
            let (name, worker) = (example.name(), &example.worker);
            let reason = example.reason.as_deref().unwrap_or_default();
            problems.push(match table.state.phase_count(Phase::Lingering) {
                1 => format!("{name} on worker {worker} is LINGERING ({reason})"),
                all => format!(
                    "{all} allocations are LINGERING, {name} on worker {worker} among them ({reason})"
                ),
            });
        }
        problems
    }

    /// What this node answers when a peer asks how it is.
    pub(super) fn own_state(&self) -> peer::ProbeResponse {
        let room = self.inner.space.own();
        let refused = self.refuses_growth();
        let metrics = self.inner.metrics();
        peer::ProbeResponse {
            pristine: self.inner.pristine && !self.inner.begun(),
            members: super::bootstrap::listed(&self.inner.config.entry.initial_cluster()),
            cluster: self.inner.cluster.get().unwrap_or_default().to_string(),
            incarnation: self.inner.data.incarnation().to_string(),
            client_endpoint: self.inner.config.advertise.clone(),
            state: match metrics.state {
                ServerState::Leader => "leader",
                ServerState::Candidate => "candidate",
                ServerState::Learner | ServerState::Follower | ServerState::Shutdown => "follower",
            }
            .into(),
            term: metrics.current_term,
            applied: metrics.last_applied.as_ref().map_or(0, |id| id.index()),
            last_log: metrics.last_log_index.unwrap_or(0),
            session: self.inner.data.session().to_string(),
            low_space: room.is_some_and(|room| room.low),
            free_bytes: room.map_or(0, |room| room.free_bytes),
            growth_refused: match metrics.state {
                ServerState::Leader => refused.unwrap_or_default(),
                _ => String::new(),
            },
            version: env!("CARGO_PKG_VERSION").into(),
            feature_level_max: FEATURE_LEVEL,
            problems: self.inner.sweeper.problems(),
            acknowledged: 0,
            recovering: !self.has_recovered(),
            digest: self.inner.agreement.latest().map(super::agreement::wire_taken),
        }
    }
}

/// What the members say themselves.
fn own_problems(
    leader: Option<NodeId>,
    answers: &[(NodeId, &Member, Option<peer::ProbeResponse>)],
) -> Vec<String> {
    let answered = || answers.iter().filter_map(|(id, m, answer)| Some((*id, m, answer.as_ref()?)));
    let recovering = answered().filter(|(.., answer)| answer.recovering);
    let mut problems: Vec<_> = recovering
        .map(|(id, ..)| format!("member {id} is still recovering what it had before its restart"))
        .collect();
    let low = answered().filter(|(.., answer)| answer.low_space).map(|(id, member, answer)| {
        let (peer, free) = (&member.peer, answer.free_bytes);
        format!("member {id} at {peer} is low on space: {free} bytes free for its data directory")
    });
    problems.extend(low);
    if let Some((.., answer)) = answered().find(|(id, ..)| leader == Some(*id)) {
        let why = &answer.growth_refused;
        if !why.is_empty() {
            problems.push(format!(
                "low on space: only what frees, confirms or keeps is admitted ({why})"
            ));
        }
        problems.extend_from_slice(&answer.problems);
    }
    problems
}

/// `configs`: the voters; two sets of them while they change, each of which must have a majority.
fn problems(
    leader: Option<NodeId>,
    members: &[MemberReport],
    configs: &[BTreeSet<NodeId>],
) -> Vec<String> {
    let mut problems = Vec::new();
    let is_live = |id: &&NodeId| members.iter().any(|m| m.id == **id && m.state != "unreachable");
    let of_config =
        |voters: &BTreeSet<NodeId>| (voters.iter().filter(is_live).count(), voters.len());
    let lacking = configs.iter().map(of_config).find(|(live, voters)| live * 2 <= *voters);
    if members.is_empty() {
        problems
            .push("the cluster has not begun: waiting for all nodes of --initial-cluster".into());
    } else if let Some((live, voters)) = lacking {
        problems.push(format!("no quorum: {live} of {voters} voters can be reached"));
    } else if leader.is_none() {
        problems.push("no leader: an election is under way".into());
    }
    for member in members {
        let (id, endpoint) = (member.id, &member.peer_endpoint);
        if member.state == "unreachable" {
            problems.push(format!("member {id} at {endpoint} cannot be reached"));
        } else if member.lag > LAG_PROBLEM_ENTRIES {
            problems.push(format!("member {id} is {} entries behind", member.lag));
        }
    }
    problems
}
