//! Election safety (Raft §5.2): at most one leader in a term.
//!
//! openraft elects a (term, node): two nodes may be elected in one term, one after the other. What
//! must not be is that one of them is elected twice, with a restart between: it would take up the
//! entries of its first time as its own. (It was configured to be elected anew after a restart.)

use std::collections::BTreeMap;

use super::{Leader, News, Sight};

/// By leader: the session of the process that led as it.
#[derive(Default)]
pub struct Elections(BTreeMap<Leader, usize>);

impl Elections {
    /// True where it leads since this step.
    pub fn check(&mut self, sight: &Sight, news: &mut News) -> Result<bool, String> {
        let Some(leader) = sight.leads() else { return Ok(false) };
        let process = sight.process;
        match self.0.get(&leader) {
            Some(known) if *known == process => Ok(false),
            Some(_) => {
                let (term, node) = leader;
                Err(format!("election safety: node {node} leads in term {term} for a second time"))
            }
            None => {
                self.0.insert(leader, process);
                news.push(format!("leader {} {}", leader.0, leader.1));
                Ok(true)
            }
        }
    }
}
