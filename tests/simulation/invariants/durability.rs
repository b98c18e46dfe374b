//! What a node says is on its disk is there (Raft §5.1 and figure 2: term, vote and log are on stable
//! storage before a call is answered).
//!
//! Of the vote, openraft's metrics show what was flushed; of entries, [`super::commits`] looks when a
//! leader counts on them.

use portwarden::store::codec::Ballot;

use super::Sight;

pub fn check(sight: &Sight) -> Result<(), String> {
    let vote = &sight.metrics.vote;
    let said = (vote.leader_id.term, vote.leader_id.node_id, vote.committed);
    let order = |Ballot { term, node, committed }: Ballot| (term, node, committed);
    match sight.disk.durable_vote().map(order) {
        Some(on_disk) if on_disk >= said => Ok(()),
        // Nothing was ever voted.
        None if said.0 == 0 => Ok(()),
        on_disk => Err(format!(
            "durability: node {} has voted {said:?}, and {on_disk:?} is on its disk",
            sight.id
        )),
    }
}
