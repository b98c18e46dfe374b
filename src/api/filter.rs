//! Which allocations a listing or a watch is about.

use tonic::Status;

use super::{convert, errors};
use crate::core::{Allocation, Selector, WorkerName, check_text, limits};

/// All that is given must hold; what is empty lets everything through.
pub(super) struct Filter {
    pub worker: Option<WorkerName>,
    /// On the labels of the allocation.
    selector: Selector,
    pub prefix: String,
}

impl Filter {
    pub fn parse(worker: &str, selector: &str, prefix: &str) -> Result<Filter, Status> {
        check_text("name_prefix", prefix, limits::NAME_MAX_BYTES).map_err(errors::invalid)?;
        let worker = Some(worker).filter(|name| !name.is_empty());
        Ok(Filter {
            worker: worker.map(|name| convert::worker_name("worker", name)).transpose()?,
            selector: convert::selector(selector)?,
            prefix: prefix.into(),
        })
    }

    pub fn matches(&self, allocation: &Allocation) -> bool {
        let Filter { worker, selector, prefix } = self;
        worker.as_ref().is_none_or(|worker| *worker == allocation.worker)
            && allocation.name().as_str().starts_with(prefix.as_str())
            && selector.matches(&allocation.claim.labels)
    }

    /// Is it about allocations by their names or labels, and so about nothing else?
    pub fn is_of_allocations(&self) -> bool {
        !self.selector.terms().is_empty() || !self.prefix.is_empty()
    }
}
