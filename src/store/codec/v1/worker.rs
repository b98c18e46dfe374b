//! Workers: what they offer, and what changes of it.

use std::collections::BTreeSet;

use bincode::{BorrowDecode, Encode};

use super::{Checked, each, optional, port};
use crate::core::{self as table, Port};
use crate::store::codec::few::Few;

pub(super) type Pairs<'a> = Few<(&'a str, &'a str)>;

pub(super) fn pairs(labels: &table::Labels) -> Pairs<'_> {
    labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

pub(super) fn labels(pairs: Pairs<'_>) -> Checked<table::Labels> {
    let one = |(key, value)| Ok((table::LabelKey::parse(key)?, table::LabelValue::parse(value)?));
    pairs.into_iter().map(one).collect()
}

fn distinct_ports(numbers: Vec<u16>) -> Checked<BTreeSet<Port>> {
    numbers.into_iter().map(port).collect()
}

#[derive(Debug, Encode, BorrowDecode)]
pub enum WorkerPhase {
    Ready,
    Cordoned,
    Draining,
    Lost,
    Unverified,
}

impl From<table::WorkerPhase> for WorkerPhase {
    fn from(phase: table::WorkerPhase) -> Self {
        match phase {
            table::WorkerPhase::Ready => WorkerPhase::Ready,
            table::WorkerPhase::Cordoned => WorkerPhase::Cordoned,
            table::WorkerPhase::Draining => WorkerPhase::Draining,
            table::WorkerPhase::Lost => WorkerPhase::Lost,
            table::WorkerPhase::Unverified => WorkerPhase::Unverified,
        }
    }
}

impl From<WorkerPhase> for table::WorkerPhase {
    fn from(phase: WorkerPhase) -> Self {
        match phase {
            WorkerPhase::Ready => table::WorkerPhase::Ready,
            WorkerPhase::Cordoned => table::WorkerPhase::Cordoned,
            WorkerPhase::Draining => table::WorkerPhase::Draining,
            WorkerPhase::Lost => table::WorkerPhase::Lost,
            WorkerPhase::Unverified => table::WorkerPhase::Unverified,
        }
    }
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct WorkerSpec<'a> {
    address: &'a str,
    labels: Pairs<'a>,
    ranges: Vec<RangeSpec<'a>>,
    reserved: Vec<u16>,
    gpus: Vec<GpuSpec<'a>>,
    identity: Option<Identity<'a>>,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct WorkerPatch<'a> {
    address: Option<&'a str>,
    labels: Option<Pairs<'a>>,
    ranges: Option<Vec<RangeSpec<'a>>>,
    reserved: Option<Vec<u16>>,
    gpus: Option<Vec<GpuSpec<'a>>>,
    identity: Option<Identity<'a>>,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct RangeSpec<'a> {
    name: &'a str,
    first: u16,
    last: u16,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct GpuSpec<'a> {
    index: u32,
    uuid: &'a str,
    model: &'a str,
    memory_bytes: u64,
}

#[derive(Debug, Encode, BorrowDecode)]
pub struct Identity<'a> {
    machine_id: &'a str,
    boot_id: &'a str,
    namespace: u64,
}

fn numbers(ports: &BTreeSet<Port>) -> Vec<u16> {
    ports.iter().map(|p| p.get()).collect()
}

impl<'a> From<&'a table::WorkerSpec> for WorkerSpec<'a> {
    fn from(spec: &'a table::WorkerSpec) -> Self {
        let table::WorkerSpec { address, labels, ranges, reserved, gpus, identity } = spec;
        WorkerSpec {
            address,
            labels: pairs(labels),
            ranges: ranges.iter().map(RangeSpec::from).collect(),
            reserved: numbers(reserved),
            gpus: gpus.iter().map(GpuSpec::from).collect(),
            identity: identity.as_ref().map(Identity::from),
        }
    }
}

impl WorkerSpec<'_> {
    pub(super) fn restore(self) -> Checked<table::WorkerSpec> {
        let WorkerSpec { address, labels: pairs, ranges, reserved, gpus, identity } = self;
        Ok(table::WorkerSpec {
            address: address.into(),
            labels: labels(pairs)?,
            ranges: each(ranges, RangeSpec::restore)?,
            reserved: distinct_ports(reserved)?,
            gpus: gpus.into_iter().map(GpuSpec::restore).collect(),
            identity: identity.map(Identity::restore),
        })
    }
}

impl<'a> From<&'a table::WorkerPatch> for WorkerPatch<'a> {
    fn from(patch: &'a table::WorkerPatch) -> Self {
        let table::WorkerPatch { address, labels, ranges, reserved, gpus, identity } = patch;
        WorkerPatch {
            address: address.as_deref(),
            labels: labels.as_ref().map(pairs),
            ranges: ranges.as_ref().map(|list| list.iter().map(RangeSpec::from).collect()),
            reserved: reserved.as_ref().map(numbers),
            gpus: gpus.as_ref().map(|list| list.iter().map(GpuSpec::from).collect()),
            identity: identity.as_ref().map(Identity::from),
        }
    }
}

impl WorkerPatch<'_> {
    pub(super) fn restore(self) -> Checked<table::WorkerPatch> {
        let WorkerPatch { address, labels: pairs, ranges, reserved, gpus, identity } = self;
        Ok(table::WorkerPatch {
            address: address.map(String::from),
            labels: optional(pairs, labels)?,
            ranges: optional(ranges, |list| each(list, RangeSpec::restore))?,
            reserved: optional(reserved, distinct_ports)?,
            gpus: gpus.map(|list| list.into_iter().map(GpuSpec::restore).collect()),
            identity: identity.map(Identity::restore),
        })
    }
}

impl<'a> From<&'a table::RangeSpec> for RangeSpec<'a> {
    fn from(table::RangeSpec { name, first, last }: &'a table::RangeSpec) -> Self {
        RangeSpec { name: name.as_str(), first: first.get(), last: last.get() }
    }
}

impl RangeSpec<'_> {
    fn restore(self) -> Checked<table::RangeSpec> {
        let RangeSpec { name, first, last } = self;
        Ok(table::RangeSpec {
            name: table::RangeName::parse(name)?,
            first: port(first)?,
            last: port(last)?,
        })
    }
}

impl<'a> From<&'a table::GpuSpec> for GpuSpec<'a> {
    fn from(gpu: &'a table::GpuSpec) -> Self {
        let table::GpuSpec { index, uuid, model, memory_bytes } = gpu;
        GpuSpec { index: *index, uuid, model, memory_bytes: *memory_bytes }
    }
}

impl GpuSpec<'_> {
    fn restore(self) -> table::GpuSpec {
        let GpuSpec { index, uuid, model, memory_bytes } = self;
        table::GpuSpec { index, uuid: uuid.into(), model: model.into(), memory_bytes }
    }
}

impl<'a> From<&'a table::Identity> for Identity<'a> {
    fn from(identity: &'a table::Identity) -> Self {
        let table::Identity { machine_id, boot_id, namespace } = identity;
        Identity { machine_id, boot_id, namespace: *namespace }
    }
}

impl Identity<'_> {
    pub(super) fn restore(self) -> table::Identity {
        let Identity { machine_id, boot_id, namespace } = self;
        table::Identity { machine_id: machine_id.into(), boot_id: boot_id.into(), namespace }
    }
}
