//! Replicas that applied the same prefix are the same.

use std::collections::BTreeMap;

use crate::history::{History, Record};

pub fn check(history: &History) -> Vec<String> {
    let mut broken = Vec::new();
    let mut first: BTreeMap<u64, (u64, &str)> = BTreeMap::new();
    for record in &history.records {
        match record {
            Record::Copy { node, revision, digest, .. } => match first.get(revision) {
                Some((other, theirs)) if theirs != digest => broken.push(format!(
                    "at revision {revision} node {node} has {digest}, and node {other} {theirs}"
                )),
                Some(_) => {}
                None => drop(first.insert(*revision, (*node, digest))),
            },
            Record::Differs { node, why, .. } => {
                broken.push(format!("node {node} found that it differs: {why}"));
            }
            _ => {}
        }
    }
    broken
}
