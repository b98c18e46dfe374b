//! A copy of the allocations that a filter lets through, kept up with the table.
//!
//! Listed once, then changed event by event. Where no node keeps the changes between any more, or the
//! cluster is another one, begun from a backup, it is listed anew.

use std::collections::BTreeMap;

use super::{Client, ClientError, Heard, Watch};
use crate::proto::{reason, v1};

/// All that is given must hold; what is empty lets everything through.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Filter {
    pub worker: String,
    /// On the labels of the allocation.
    pub selector: String,
    pub name_prefix: String,
}

/// What has become of the copy.
#[derive(Debug, PartialEq)]
pub enum News {
    /// It was listed: nothing of the one before it counts.
    Listed,
    /// These changes are in it.
    Heard(Heard),
}

pub struct Follow {
    client: Client,
    filter: Filter,
    /// From where the copy ends; `None`: it is to be listed.
    watch: Option<Watch>,
    revision: u64,
    allocations: BTreeMap<String, v1::Allocation>,
}

impl Client {
    /// Follows what a filter lets through. There is no copy before the first [`Follow::next`].
    pub fn follow(&self, filter: Filter) -> Follow {
        let client = self.clone();
        Follow { client, filter, watch: None, revision: 0, allocations: BTreeMap::new() }
    }
}

impl Follow {
    /// All changes up to here are in the copy.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// By name.
    pub fn allocations(&self) -> &BTreeMap<String, v1::Allocation> {
        &self.allocations
    }

    /// The next change of the copy; one that has no events only shows how fresh it is. After an error it
    /// may be called again: it goes on where it was, or lists anew. May be dropped and called again.
    pub async fn next(&mut self) -> Result<News, ClientError> {
        loop {
            let Some(watch) = &mut self.watch else { return self.list().await };
            match watch.next().await {
                Ok(heard) => return Ok(self.hear(heard)),
                Err(error @ ClientError::Unavailable { .. }) => return Err(error),
                Err(error) => {
                    self.watch = None;
                    if !matches!(error.reason(), Some(reason::COMPACTED | reason::AHEAD)) {
                        return Err(error);
                    }
                }
            }
        }
    }

    async fn list(&mut self) -> Result<News, ClientError> {
        let Filter { worker, selector, name_prefix } = self.filter.clone();
        let request =
            v1::ListRequest { worker, selector, name_prefix, ..v1::ListRequest::default() };
        let listing = self.client.list(request).await?;
        self.revision = listing.revision;
        self.allocations = listing.items.into_iter().map(|a| (a.name.clone(), a)).collect();
        let Filter { worker, selector, name_prefix } = self.filter.clone();
        let from_revision = listing.revision + 1;
        let request = v1::WatchRequest { from_revision, worker, selector, name_prefix };
        self.watch = Some(self.client.watch(request));
        Ok(News::Listed)
    }

    fn hear(&mut self, heard: Heard) -> News {
        for event in &heard.events {
            let Some(allocation) = &event.allocation else { continue };
            match event.r#type.as_str() {
                "released" | "reclaimed" => drop(self.allocations.remove(&allocation.name)),
                _ => drop(self.allocations.insert(allocation.name.clone(), allocation.clone())),
            }
        }
        self.revision = heard.revision;
        News::Heard(heard)
    }
}
