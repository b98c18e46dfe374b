//! What a caller asks for: the claim, as it is stored beside what it was granted.

use std::collections::BTreeSet;

use super::limits::*;
use super::name::{
    InstanceName, Invalid, Labels, LeaseId, Millis, Port, PortName, RangeName, Uid, WorkerName,
};
use super::selector::Selector;

/// What one instance asks for. Equality decides whether a repeat is the same request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub name: InstanceName,
    pub uid: Uid,
    pub placement: Placement,
    pub ports: Vec<PortRequest>,
    pub gpus: Option<Box<GpuRequest>>,
    pub lease: Option<LeaseId>,
    /// How long it may stay `Reserved`; the server's default where it is not said.
    pub confirm_within: Option<Millis>,
    /// Grant straight to `BOUND`, for users without a start step.
    pub bound: bool,
    pub labels: Labels,
}

/// Where an instance may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    Worker(WorkerName),
    Select { selector: Selector, policy: Policy },
}

impl Placement {
    /// On a named worker there is no choice but among its GPUs: the fullest that fit.
    pub fn policy(&self) -> Policy {
        match self {
            Placement::Worker(_) => Policy::Binpack,
            Placement::Select { policy, .. } => *policy,
        }
    }
}

/// Which of the workers that fit is taken; ties by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// The fullest worker on which the claim fits.
    #[default]
    Binpack,
    /// The emptiest.
    Spread,
}

/// Ports of one range of the worker (default: its first range).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRequest {
    pub name: Option<PortName>,
    pub range: Option<RangeName>,
    pub ports: Ports,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// Any so many ports.
    Count(u32),
    /// This port. With no range named, the range that holds it.
    Specific(Port),
    /// So many ports in a row.
    Contiguous(u32),
}

impl Ports {
    /// How many ports this asks for.
    pub fn count(self) -> u32 {
        match self {
            Ports::Count(n) | Ports::Contiguous(n) => n,
            Ports::Specific(_) => 1,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuRequest {
    pub which: GpuChoice,
    pub share: GpuShare,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuChoice {
    /// Any so many GPUs of one worker.
    Count(u32),
    /// These GPUs, by index.
    Indexes(BTreeSet<u32>),
}

impl GpuChoice {
    pub fn count(&self) -> usize {
        match self {
            GpuChoice::Count(n) => *n as usize,
            GpuChoice::Indexes(indexes) => indexes.len(),
        }
    }
}

/// How much of each GPU is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GpuShare {
    /// So many bytes of each.
    MemoryBytes(u64),
    /// The whole GPU, alone.
    Exclusive,
}

impl Claim {
    /// Checks every bound that the types do not hold by themselves.
    pub fn validate(&self) -> Result<(), Invalid> {
        let most = |field: &str, n: usize, max: usize| match n > max {
            true => Err(Invalid::new(field, n, format!("at most {max}"))),
            false => Ok(()),
        };
        most("labels", self.labels.len(), LABELS_MAX)?;
        most("ports", self.ports.len(), PORT_REQUESTS_MAX)?;
        let mut total: u32 = 0;
        let mut specific = BTreeSet::new();
        let mut named = BTreeSet::new();
        for (i, request) in self.ports.iter().enumerate() {
            let count = request.ports.count();
            if count == 0 || count > PORTS_PER_CLAIM_MAX {
                let limit = format!("1 to {PORTS_PER_CLAIM_MAX}");
                return Err(Invalid::new(format!("ports[{i}].count"), count, limit));
            }
            total += count;
            if let Ports::Specific(port) = request.ports
                && !specific.insert(port)
            {
                let limit = "asked for once in a claim";
                return Err(Invalid::new(format!("ports[{i}].specific"), port, limit));
            }
            if let Some(name) = &request.name
                && !named.insert(name)
            {
                let limit = "unique in a claim";
                return Err(Invalid::new(format!("ports[{i}].name"), name, limit));
            }
        }
        if total > PORTS_PER_CLAIM_MAX {
            let limit = format!("at most {PORTS_PER_CLAIM_MAX} ports in all");
            return Err(Invalid::new("ports", total, limit));
        }
        if let Some(gpus) = &self.gpus {
            let count = gpus.which.count();
            if count == 0 || count > GPUS_PER_CLAIM_MAX {
                let limit = format!("1 to {GPUS_PER_CLAIM_MAX}");
                return Err(Invalid::new("gpus.count", count, limit));
            }
            if let GpuChoice::Indexes(indexes) = &gpus.which
                && let Some(index) = indexes.iter().find(|i| **i > GPU_INDEX_MAX)
            {
                let limit = format!("0 to {GPU_INDEX_MAX}");
                return Err(Invalid::new("gpus.indexes", index, limit));
            }
            if let GpuShare::MemoryBytes(bytes) = gpus.share
                && (bytes == 0 || bytes > GPU_MEMORY_MAX_BYTES)
            {
                let limit = format!("1 to {GPU_MEMORY_MAX_BYTES} bytes (16 TiB)");
                return Err(Invalid::new("gpus.memory_bytes", bytes, limit));
            }
        }
        if let Some(span) = self.confirm_within {
            Millis::span("confirm_within", span.0)?;
        }
        if self.ports.is_empty() && self.gpus.is_none() {
            let limit = "asking for at least one port or GPU";
            return Err(Invalid::new("claim", &self.name, limit));
        }
        Ok(())
    }

    /// The first field in which another request differs, for the answer to a rival.
    pub fn first_difference(&self, other: &Claim) -> Option<&'static str> {
        [
            ("uid", self.uid != other.uid),
            ("placement", self.placement != other.placement),
            ("ports", self.ports != other.ports),
            ("gpus", self.gpus != other.gpus),
            ("lease", self.lease != other.lease),
            ("confirm_within", self.confirm_within != other.confirm_within),
            ("bound", self.bound != other.bound),
            ("labels", self.labels != other.labels),
            ("name", self.name != other.name),
        ]
        .into_iter()
        .find_map(|(field, differs)| differs.then_some(field))
    }
}
