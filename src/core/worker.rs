//! A worker: one network namespace of one machine, with its ranges of ports and its GPUs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use imbl::OrdMap;
use smallvec::SmallVec;

use super::claim::GpuShare;
use super::limits::*;
use super::name::{
    InstanceName, Invalid, Labels, Port, RangeName, Revision, WorkerName, check_text,
};
use super::ports::Pool;

/// Whether new allocations may be placed on a worker. What it holds stays held in every phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum WorkerPhase {
    #[default]
    Ready,
    /// An operator keeps new allocations away.
    Cordoned,
    /// An operator is emptying it.
    Draining,
    /// Its agent fell silent.
    Lost,
    /// Restored from a backup and not yet compared with the host.
    Unverified,
}

impl WorkerPhase {
    pub const ALL: [WorkerPhase; 5] = [
        WorkerPhase::Ready,
        WorkerPhase::Cordoned,
        WorkerPhase::Draining,
        WorkerPhase::Lost,
        WorkerPhase::Unverified,
    ];

    pub fn name(self) -> &'static str {
        match self {
            WorkerPhase::Ready => "READY",
            WorkerPhase::Cordoned => "CORDONED",
            WorkerPhase::Draining => "DRAINING",
            WorkerPhase::Lost => "LOST",
            WorkerPhase::Unverified => "UNVERIFIED",
        }
    }
}

/// What its owner says about a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerSpec {
    /// Where its instances are reached: a host name or IP address, without a port.
    pub address: String,
    pub labels: Labels,
    /// In order; the first is the default of port requests.
    pub ranges: Vec<RangeSpec>,
    /// Ports that are never given, in whatever range they lie.
    pub reserved: BTreeSet<Port>,
    pub gpus: Vec<GpuSpec>,
    /// Which namespace of which boot of which machine this is; absent without an agent.
    pub identity: Option<Identity>,
}

/// A span of managed ports, both ends included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeSpec {
    pub name: RangeName,
    pub first: Port,
    pub last: Port,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuSpec {
    pub index: u32,
    /// Unique in the cluster; empty where it is not known.
    pub uuid: String,
    pub model: String,
    /// Usable memory.
    pub memory_bytes: u64,
}

/// What tells one network namespace from another across the cluster.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Identity {
    pub machine_id: String,
    pub boot_id: String,
    /// Inode of the network namespace.
    pub namespace: u64,
}

impl WorkerSpec {
    pub fn validate(&self) -> Result<(), Invalid> {
        if self.address.is_empty() {
            return Err(Invalid::new("address", "", "a host name or IP address"));
        }
        check_text("address", &self.address, ADDRESS_MAX_BYTES)?;
        let most = |field: &str, n: usize, max: usize| match n > max {
            true => Err(Invalid::new(field, n, format!("at most {max}"))),
            false => Ok(()),
        };
        most("labels", self.labels.len(), LABELS_MAX)?;
        most("ranges", self.ranges.len(), RANGES_MAX)?;
        most("reserved", self.reserved.len(), RESERVED_PORTS_MAX)?;
        most("gpus", self.gpus.len(), GPUS_PER_WORKER_MAX)?;
        for (i, range) in self.ranges.iter().enumerate() {
            let field = format!("ranges[{i}]");
            let shown = format!("{}={}-{}", range.name, range.first, range.last);
            if range.first > range.last {
                return Err(Invalid::new(field, shown, "rising: first ≤ last"));
            }
            for other in &self.ranges[..i] {
                if other.name == range.name {
                    return Err(Invalid::new(
                        field,
                        shown,
                        "named differently from every other range",
                    ));
                }
                if other.first <= range.last && range.first <= other.last {
                    let limit = format!(
                        "free of overlap with range {}={}-{}",
                        other.name, other.first, other.last
                    );
                    return Err(Invalid::new(field, shown, limit));
                }
            }
        }
        let mut uuids = BTreeSet::new();
        let mut indexes = BTreeSet::new();
        for (i, gpu) in self.gpus.iter().enumerate() {
            let field = |name: &str| format!("gpus[{i}].{name}");
            if gpu.index > GPU_INDEX_MAX {
                return Err(Invalid::new(
                    field("index"),
                    gpu.index,
                    format!("0 to {GPU_INDEX_MAX}"),
                ));
            }
            if !indexes.insert(gpu.index) {
                return Err(Invalid::new(field("index"), gpu.index, "unique on its worker"));
            }
            check_text(&field("uuid"), &gpu.uuid, GPU_TEXT_MAX_BYTES)?;
            check_text(&field("model"), &gpu.model, GPU_TEXT_MAX_BYTES)?;
            if !gpu.uuid.is_empty() && !uuids.insert(&gpu.uuid) {
                return Err(Invalid::new(field("uuid"), &gpu.uuid, "unique in the cluster"));
            }
            if gpu.memory_bytes == 0 || gpu.memory_bytes > GPU_MEMORY_MAX_BYTES {
                let limit = format!("1 to {GPU_MEMORY_MAX_BYTES} bytes (16 TiB)");
                return Err(Invalid::new(field("memory_bytes"), gpu.memory_bytes, limit));
            }
        }
        if let Some(Identity { machine_id, boot_id, namespace: _ }) = &self.identity {
            for (field, id) in [("identity.machine_id", machine_id), ("identity.boot_id", boot_id)]
            {
                check_text(field, id, ADDRESS_MAX_BYTES)?;
                if id.is_empty() {
                    return Err(Invalid::new(field, id, "not empty: it tells machines apart"));
                }
            }
        }
        Ok(())
    }
}

/// What some workers say of themselves.
pub type Specs = BTreeMap<WorkerName, Arc<WorkerSpec>>;

/// Changes to a worker; what is `None` stays.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkerPatch {
    pub address: Option<String>,
    pub labels: Option<Labels>,
    pub ranges: Option<Vec<RangeSpec>>,
    pub reserved: Option<BTreeSet<Port>>,
    pub gpus: Option<Vec<GpuSpec>>,
    pub identity: Option<Identity>,
}

impl WorkerPatch {
    /// Checks the fields that it sets: they must do on a worker that has nothing else.
    pub fn validate(&self) -> Result<(), Invalid> {
        let blank = WorkerSpec {
            address: "unset".into(),
            labels: Labels::new(),
            ranges: Vec::new(),
            reserved: BTreeSet::new(),
            gpus: Vec::new(),
            identity: None,
        };
        self.onto(&blank).validate()
    }

    /// The spec after the change.
    pub fn onto(&self, spec: &WorkerSpec) -> WorkerSpec {
        let p = self.clone();
        WorkerSpec {
            address: p.address.unwrap_or_else(|| spec.address.clone()),
            labels: p.labels.unwrap_or_else(|| spec.labels.clone()),
            ranges: p.ranges.unwrap_or_else(|| spec.ranges.clone()),
            reserved: p.reserved.unwrap_or_else(|| spec.reserved.clone()),
            gpus: p.gpus.unwrap_or_else(|| spec.gpus.clone()),
            identity: p.identity.or_else(|| spec.identity.clone()),
        }
    }
}

/// A GPU and who holds how much of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    pub index: u32,
    pub(super) held_bytes: u64,
    /// Usable memory.
    pub memory_bytes: u64,
    /// Held bytes and exclusivity by holder.
    pub(super) holders: OrdMap<InstanceName, GpuShare>,
}

impl Gpu {
    pub(super) fn new(spec: &GpuSpec) -> Self {
        Gpu {
            index: spec.index,
            held_bytes: 0,
            memory_bytes: spec.memory_bytes,
            holders: OrdMap::new(),
        }
    }

    pub fn free_bytes(&self) -> u64 {
        self.memory_bytes - self.held_bytes
    }

    pub fn is_idle(&self) -> bool {
        self.holders.is_empty()
    }

    pub fn holders(&self) -> impl Iterator<Item = (&InstanceName, GpuShare)> {
        self.holders.iter().map(|(name, share)| (name, *share))
    }

    pub fn fits(&self, share: GpuShare) -> bool {
        match share {
            GpuShare::Exclusive => self.is_idle(),
            GpuShare::MemoryBytes(bytes) => bytes <= self.free_bytes(),
        }
    }

    /// Bytes that a share takes here: an exclusive holder takes all of them.
    pub fn bytes_of(&self, share: GpuShare) -> u64 {
        match share {
            GpuShare::Exclusive => self.memory_bytes,
            GpuShare::MemoryBytes(bytes) => bytes,
        }
    }

    pub(super) fn take(&mut self, holder: &InstanceName, share: GpuShare) {
        debug_assert!(self.fits(share) && !self.holders.contains_key(holder));
        self.held_bytes += self.bytes_of(share);
        self.holders.insert(holder.clone(), share);
    }

    pub(super) fn free(&mut self, holder: &InstanceName) {
        if let Some(share) = self.holders.remove(holder) {
            self.held_bytes -= self.bytes_of(share);
        }
    }
}

/// A worker as the table knows it. Cloning it is cheap: what grows is persistent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Worker {
    pub name: WorkerName,
    pub spec: Arc<WorkerSpec>,
    pub phase: WorkerPhase,
    /// While it is `Lost` or `Unverified`: the phase that it has again once its agent reports, or it
    /// is verified. Else the same.
    pub phase_before: WorkerPhase,
    /// In the order of `spec.ranges`: where it is one, it lies in the worker, and is found and copied with it.
    pub pools: SmallVec<[Pool; 1]>,
    /// In the order of `spec.gpus`.
    pub gpus: SmallVec<[Gpu; 1]>,
    /// Names of the allocations placed here.
    pub allocations: OrdMap<InstanceName, ()>,
    /// Revision of the registration.
    pub created: Revision,
    /// Revision of the last change of spec, phase or quarantines.
    pub version: Revision,
    /// Revision at which its agent first named the present boot; that of the registration for the
    /// first boot that an agent named; 0 without an agent. What was confirmed before did not live
    /// through the boot.
    pub booted: Revision,
}

impl Worker {
    pub(super) fn new(name: WorkerName, spec: WorkerSpec, revision: Revision) -> Self {
        let pools = spec.ranges.iter().map(|r| new_pool(r, &spec)).collect();
        Worker::with_pools(name, spec, pools, revision)
    }

    /// The same with pools that are those of its ranges.
    pub(super) fn with_pools(
        name: WorkerName,
        spec: WorkerSpec,
        pools: SmallVec<[Pool; 1]>,
        revision: Revision,
    ) -> Self {
        let gpus = spec.gpus.iter().map(Gpu::new).collect();
        Worker {
            name,
            booted: if spec.identity.is_some() { revision } else { Revision(0) },
            spec: Arc::new(spec),
            phase: WorkerPhase::Ready,
            phase_before: WorkerPhase::Ready,
            pools,
            gpus,
            allocations: OrdMap::new(),
            created: revision,
            version: revision,
        }
    }

    /// The same worker under another spec: holders, quarantines and the order of freed ports stay.
    /// The caller has checked with [`Worker::lost_by`] that nothing held falls outside.
    pub(super) fn respec(&self, spec: WorkerSpec, revision: Revision) -> Worker {
        let pools = spec
            .ranges
            .iter()
            .map(|range| {
                let mut pool = new_pool(range, &spec);
                self.pools.iter().for_each(|old| pool.inherit(old));
                pool
            })
            .collect();
        let gpus = spec
            .gpus
            .iter()
            .map(|gpu_spec| {
                let mut gpu = Gpu::new(gpu_spec);
                if let Some(old) = self.gpus.iter().find(|g| g.index == gpu_spec.index) {
                    for (holder, share) in old.holders() {
                        gpu.take(holder, share);
                    }
                }
                gpu
            })
            .collect();
        let booted = match (&self.spec.identity, &spec.identity) {
            (_, None) => Revision(0),
            // Nothing is known of the boots before its agent came.
            (None, Some(_)) => self.created,
            (Some(old), Some(new)) if old.boot_id == new.boot_id => self.booted,
            (Some(_), Some(_)) => revision,
        };
        Worker { spec: Arc::new(spec), pools, gpus, version: revision, booted, ..self.clone() }
    }

    /// What is held and would have no place under another spec, in words; `None` if nothing.
    pub(super) fn lost_by(&self, spec: &WorkerSpec) -> Option<String> {
        let reserved: BTreeSet<u16> = spec.reserved.iter().map(|port| port.get()).collect();
        for pool in &self.pools {
            let range = spec.ranges.iter().find(|r| r.name == pool.name);
            for (number, holder) in pool.holders() {
                let kept = range.is_some_and(|r| (r.first.get()..=r.last.get()).contains(&number));
                let reserved = reserved.contains(&number);
                if !kept || reserved {
                    let how = if reserved { "would be reserved" } else { "would leave its range" };
                    return Some(format!(
                        "port {number} of range {} is held by {holder} and {how}",
                        pool.name
                    ));
                }
            }
        }
        if let (Some(old), Some(new), Some((holder, ()))) =
            (&self.spec.identity, &spec.identity, self.allocations.get_min())
            && (old.machine_id != new.machine_id
                || (old.boot_id == new.boot_id && old.namespace != new.namespace))
        {
            return Some(format!(
                "it is network namespace {} of machine {}, and {holder} is held there",
                old.namespace, old.machine_id
            ));
        }
        for (gpu, old) in self.gpus.iter().zip(&self.spec.gpus) {
            let Some((holder, _)) = gpu.holders().next() else { continue };
            let new = spec.gpus.iter().find(|g| g.index == gpu.index);
            let exclusive = gpu.holders().any(|(_, share)| share == GpuShare::Exclusive);
            let trouble = match new {
                None => Some("would be removed".to_string()),
                Some(new) if new.uuid != old.uuid => Some(format!("would become {:?}", new.uuid)),
                Some(new) if exclusive && new.memory_bytes != old.memory_bytes => {
                    Some("is held exclusively and would change its size".to_string())
                }
                Some(new) if new.memory_bytes < gpu.held_bytes => Some(format!(
                    "would have {} bytes of which {} are held",
                    new.memory_bytes, gpu.held_bytes
                )),
                Some(_) => None,
            };
            if let Some(trouble) = trouble {
                return Some(format!("GPU {} is held by {holder} and {trouble}", gpu.index));
            }
        }
        None
    }

    /// Then silence proves nothing: what it holds goes on evidence alone.
    pub fn has_agent(&self) -> bool {
        self.spec.identity.is_some()
    }

    pub fn pool(&self, name: &RangeName) -> Option<&Pool> {
        self.pools.iter().find(|p| p.name == *name)
    }

    pub(super) fn pool_of_mut(&mut self, number: u16) -> Option<&mut Pool> {
        self.pools.iter_mut().find(|p| p.contains(number))
    }

    pub fn pool_of(&self, number: u16) -> Option<&Pool> {
        self.pools.iter().find(|p| p.contains(number))
    }

    pub fn free_ports(&self) -> u64 {
        self.pools.iter().map(|p| u64::from(p.free_count())).sum()
    }

    /// Free memory of the emptiest GPU: what one more shared GPU can get at most.
    pub fn most_free_gpu_bytes(&self) -> u64 {
        self.gpus.iter().map(Gpu::free_bytes).max().unwrap_or(0)
    }

    pub fn idle_gpus(&self) -> u64 {
        self.gpus.iter().filter(|g| g.is_idle()).count() as u64
    }
}

pub(super) fn new_pool(range: &RangeSpec, spec: &WorkerSpec) -> Pool {
    Pool::new(range.name.clone(), range.first, range.last, spec.reserved.iter().copied())
}
