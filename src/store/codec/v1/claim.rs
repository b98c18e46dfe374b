//! Claims: what is asked for.

use std::collections::BTreeSet;

use bincode::{BorrowDecode, Decode, Encode};

use super::worker::{Pairs, labels, pairs};
use super::{Checked, Why, each, lease, optional, port};
use crate::core::{self as table, LeaseId, Millis};
use crate::store::codec::few::Few;

#[derive(Debug, Encode, BorrowDecode)]
pub struct Claim<'a> {
    pub(super) name: &'a str,
    uid: &'a str,
    placement: Placement<'a>,
    ports: Few<PortRequest<'a>>,
    gpus: Option<GpuRequest>,
    lease: Option<u64>,
    confirm_within: Option<u64>,
    bound: bool,
    labels: Pairs<'a>,
}

#[derive(Debug, Encode, BorrowDecode)]
enum Placement<'a> {
    Worker(&'a str),
    Binpack(Vec<Term<'a>>),
    Spread(Vec<Term<'a>>),
}

#[derive(Debug, Encode, BorrowDecode)]
enum Term<'a> {
    In(&'a str, Vec<&'a str>),
    NotIn(&'a str, Vec<&'a str>),
    Exists(&'a str),
    Absent(&'a str),
}

#[derive(Debug, Encode, BorrowDecode)]
struct PortRequest<'a> {
    name: Option<&'a str>,
    range: Option<&'a str>,
    ports: Ports,
}

#[derive(Debug, Encode, Decode)]
enum Ports {
    Count(u32),
    Specific(u16),
    Contiguous(u32),
}

#[derive(Debug, Encode, Decode)]
struct GpuRequest {
    which: GpuChoice,
    share: GpuShare,
}

#[derive(Debug, Encode, Decode)]
enum GpuChoice {
    Count(u32),
    Indexes(Vec<u32>),
}

#[derive(Debug, Encode, Decode)]
enum GpuShare {
    MemoryBytes(u64),
    Exclusive,
}

impl<'a> From<&'a table::Claim> for Claim<'a> {
    fn from(claim: &'a table::Claim) -> Self {
        let table::Claim {
            name,
            uid,
            placement,
            ports,
            gpus,
            lease: id,
            confirm_within,
            bound,
            labels,
        } = claim;
        Claim {
            name: name.as_str(),
            uid: uid.as_str(),
            placement: match placement {
                table::Placement::Worker(worker) => Placement::Worker(worker.as_str()),
                table::Placement::Select { selector, policy } => {
                    let terms = selector.terms().iter().map(Term::from).collect();
                    match policy {
                        table::Policy::Binpack => Placement::Binpack(terms),
                        table::Policy::Spread => Placement::Spread(terms),
                    }
                }
            },
            ports: ports.iter().map(PortRequest::from).collect(),
            gpus: gpus.as_deref().map(GpuRequest::from),
            lease: lease(id),
            confirm_within: confirm_within.map(|span| span.0),
            bound: *bound,
            labels: pairs(labels),
        }
    }
}

impl Claim<'_> {
    pub(super) fn restore(self) -> Checked<table::Claim> {
        let Claim {
            name,
            uid,
            placement,
            ports,
            gpus,
            lease,
            confirm_within,
            bound,
            labels: pairs,
        } = self;
        let select = |terms, policy| {
            let terms = each(terms, Term::restore)?;
            let selector = table::Selector::new(terms)?;
            Ok::<_, Why>(table::Placement::Select { selector, policy })
        };
        Ok(table::Claim {
            name: table::InstanceName::parse(name)?,
            uid: table::Uid::parse(uid)?,
            placement: match placement {
                Placement::Worker(name) => {
                    table::Placement::Worker(table::WorkerName::parse(name)?)
                }
                Placement::Binpack(terms) => select(terms, table::Policy::Binpack)?,
                Placement::Spread(terms) => select(terms, table::Policy::Spread)?,
            },
            ports: each(ports, PortRequest::restore)?,
            gpus: gpus.map(GpuRequest::restore).map(Box::new),
            lease: lease.map(LeaseId),
            confirm_within: confirm_within.map(Millis),
            bound,
            labels: labels(pairs)?,
        })
    }
}

impl<'a> From<&'a table::Term> for Term<'a> {
    fn from(term: &'a table::Term) -> Self {
        match term {
            table::Term::In(key, values) => {
                Term::In(key.as_str(), values.iter().map(|v| v.as_str()).collect())
            }
            table::Term::NotIn(key, values) => {
                Term::NotIn(key.as_str(), values.iter().map(|v| v.as_str()).collect())
            }
            table::Term::Exists(key) => Term::Exists(key.as_str()),
            table::Term::Absent(key) => Term::Absent(key.as_str()),
        }
    }
}

impl Term<'_> {
    fn restore(self) -> Checked<table::Term> {
        let key = table::LabelKey::parse;
        let values = |list: Vec<&str>| {
            list.into_iter().map(table::LabelValue::parse).collect::<Result<BTreeSet<_>, _>>()
        };
        Ok(match self {
            Term::In(name, list) => table::Term::In(key(name)?, values(list)?),
            Term::NotIn(name, list) => table::Term::NotIn(key(name)?, values(list)?),
            Term::Exists(name) => table::Term::Exists(key(name)?),
            Term::Absent(name) => table::Term::Absent(key(name)?),
        })
    }
}

impl<'a> From<&'a table::PortRequest> for PortRequest<'a> {
    fn from(table::PortRequest { name, range, ports }: &'a table::PortRequest) -> Self {
        PortRequest {
            name: name.as_ref().map(|n| n.as_str()),
            range: range.as_ref().map(|r| r.as_str()),
            ports: match ports {
                table::Ports::Count(n) => Ports::Count(*n),
                table::Ports::Specific(port) => Ports::Specific(port.get()),
                table::Ports::Contiguous(n) => Ports::Contiguous(*n),
            },
        }
    }
}

impl PortRequest<'_> {
    fn restore(self) -> Checked<table::PortRequest> {
        let PortRequest { name, range, ports } = self;
        Ok(table::PortRequest {
            name: optional(name, |n| Ok(table::PortName::parse(n)?))?,
            range: optional(range, |r| Ok(table::RangeName::parse(r)?))?,
            ports: match ports {
                Ports::Count(n) => table::Ports::Count(n),
                Ports::Specific(number) => table::Ports::Specific(port(number)?),
                Ports::Contiguous(n) => table::Ports::Contiguous(n),
            },
        })
    }
}

impl From<&table::GpuRequest> for GpuRequest {
    fn from(table::GpuRequest { which, share }: &table::GpuRequest) -> Self {
        GpuRequest {
            which: match which {
                table::GpuChoice::Count(n) => GpuChoice::Count(*n),
                table::GpuChoice::Indexes(set) => GpuChoice::Indexes(set.iter().copied().collect()),
            },
            share: match share {
                table::GpuShare::MemoryBytes(bytes) => GpuShare::MemoryBytes(*bytes),
                table::GpuShare::Exclusive => GpuShare::Exclusive,
            },
        }
    }
}

impl GpuRequest {
    fn restore(self) -> table::GpuRequest {
        let GpuRequest { which, share } = self;
        table::GpuRequest {
            which: match which {
                GpuChoice::Count(n) => table::GpuChoice::Count(n),
                GpuChoice::Indexes(list) => table::GpuChoice::Indexes(list.into_iter().collect()),
            },
            share: match share {
                GpuShare::MemoryBytes(bytes) => table::GpuShare::MemoryBytes(bytes),
                GpuShare::Exclusive => table::GpuShare::Exclusive,
            },
        }
    }
}
