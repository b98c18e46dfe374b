//! A data directory that is older than what its node has told the others.
//!
//! An old copy that was put in the place of a directory (a restored disk image, a snapshot of a virtual
//! machine) has the right incarnation, and answers at the right address. But its node has acknowledged
//! entries that it no longer has: it would be counted for them, and could elect a leader that lacks what
//! was acknowledged. So a node that starts asks, before it takes calls of its peers, what the leader has of
//! it.
//!
//! It is found only where somebody leads that has heard from it: where all nodes start at once, nobody
//! knows. Who does not answer in time is asked again, for a leader may be busy.

use tokio::time::Instant;

use super::status::ASK_TIMEOUT;
use super::{Node, NodeId, StartError};
use crate::proto::peer;

/// How often members are asked, while one neither answers nor refuses and none that does leads.
const ASKS: u32 = 4;

/// Fails where a leader has been told more than is here.
pub(super) async fn look(node: &Node) -> Result<(), StartError> {
    let log = node.inner.data.log()?;
    let heard_of = log.vote().map_or((0, 0), |ballot| (ballot.term, ballot.node));
    let applied = node.inner.view.table().applied.map_or(0, |at| at.index);
    let last = node.inner.ended_at.unwrap_or(0).max(applied);
    for _ in 0..ASKS {
        let asked = Instant::now();
        let answers = node.ask_others(ASK_TIMEOUT).await;
        for (leader, answer) in &answers {
            let more = |answer| more_than_is_here((*leader, answer), heard_of, last);
            if let Some(acknowledged) = answer.as_ref().and_then(more) {
                let (id, leader) = (node.id(), *leader);
                let path = node.inner.config.data_dir.clone();
                return Err(StartError::SetBack { id, path, leader, acknowledged, last });
            }
        }
        let one_leads = answers.iter().flat_map(|(_, answer)| answer).any(|a| a.state == "leader");
        // Sooner, whoever is not there has refused.
        let all_have_said = asked.elapsed() < ASK_TIMEOUT;
        if one_leads || all_have_said {
            break;
        }
    }
    Ok(())
}

/// What this node has acknowledged to a leader, where it does not have it any more. One that was deposed
/// may remember entries that its successor took away: this node has heard of that one's term then.
fn more_than_is_here(
    (leader, answer): (NodeId, &peer::ProbeResponse),
    heard_of: (u64, NodeId),
    last: u64,
) -> Option<u64> {
    let leads = answer.state == "leader" && (answer.term, leader) >= heard_of;
    (leads && answer.acknowledged > last).then_some(answer.acknowledged)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_leader_was_told_and_is_not_here_is_found_and_what_a_deposed_one_remembers_is_not() {
        let answer = |state: &str, term, acknowledged| peer::ProbeResponse {
            state: state.into(),
            term,
            acknowledged,
            ..Default::default()
        };
        for (answer, expected) in [
            (answer("leader", 3, 28), Some(28)),
            // It led after the copy was made.
            (answer("leader", 4, 28), Some(28)),
            (answer("leader", 3, 27), None),
            (answer("leader", 2, 28), None),
            (answer("follower", 3, 28), None),
        ] {
            assert_eq!(more_than_is_here((2, &answer), (3, 2), 27), expected, "{answer:?}");
        }
        // Two may follow each other in one term.
        assert_eq!(more_than_is_here((1, &answer("leader", 3, 28)), (3, 2), 27), None);
    }
}
