//! One number that tells whether two replicas hold the same table.
//!
//! SHA-256 over every field that a snapshot keeps, in order of name, each with its length or
//! width. Structures are taken apart by name, so that a new field cannot be forgotten. O(table):
//! taken from a clone, beside `apply`.

use std::fmt;

use sha2::{Digest as _, Sha256};

use super::allocation::{
    Allocation, ChangeKind, Departure, Handle, HeldGpu, HeldPort, LastChange, Lease, Liveness,
    ReleaseReason,
};
use super::claim::{Claim, GpuChoice, GpuRequest, GpuShare, Placement, PortRequest, Ports};
use super::name::Labels;
use super::ports::{Pool, Quarantine};
use super::state::State;
use super::worker::{GpuSpec, Identity, RangeSpec, Worker, WorkerSpec};

/// Equal states have equal digests.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

pub fn digest(state: &State) -> Digest {
    let State {
        feature_level,
        revision,
        workers,
        allocations,
        leases,
        departures,
        members,
        indexes: _,
    } = state;
    let mut sink = Sink(Sha256::new());
    sink.number(u64::from(*feature_level));
    sink.number(revision.0);
    sink.each(workers.values(), |sink, w| sink.worker(w));
    sink.each(allocations.values(), |sink, a| sink.allocation(a));
    sink.each(leases.values(), |sink, lease| {
        // Which allocations are on it is said by them.
        let Lease { id, ttl, allocations: _ } = &**lease;
        sink.number(id.0);
        sink.number(ttl.0);
    });
    sink.each(departures.iter(), |sink, (name, departure)| {
        let Departure { revision, at, worker, token, why } = departure;
        sink.text(name.as_str());
        sink.number(revision.0);
        sink.number(at.0);
        sink.text(worker.as_str());
        sink.number(token.0);
        sink.why_released(why);
    });
    // Without members, as before there was one: the table alone.
    if !members.is_empty() {
        sink.each(members.iter(), |sink, (id, incarnation)| {
            sink.number(*id);
            sink.text(incarnation);
        });
    }
    Digest(sink.0.finalize().into())
}

struct Sink(Sha256);

impl Sink {
    fn number(&mut self, n: u64) {
        self.0.update(n.to_be_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text);
    }

    fn each<T>(
        &mut self,
        items: impl ExactSizeIterator<Item = T>,
        mut one: impl FnMut(&mut Self, T),
    ) {
        self.number(items.len() as u64);
        items.for_each(|item| one(self, item));
    }

    fn maybe<T>(&mut self, item: Option<T>, one: impl FnOnce(&mut Self, T)) {
        self.number(u64::from(item.is_some()));
        if let Some(item) = item {
            one(self, item);
        }
    }

    fn labels(&mut self, labels: &Labels) {
        self.each(labels.iter(), |sink, (key, value)| {
            sink.text(key.as_str());
            sink.text(value.as_str());
        });
    }

    fn worker(&mut self, worker: &Worker) {
        // Who holds what on it is said by the allocations.
        let Worker {
            name,
            spec,
            phase,
            phase_before,
            pools,
            gpus: _,
            allocations: _,
            created,
            version,
            booted,
        } = worker;
        self.text(name.as_str());
        self.spec(spec);
        self.text(phase.name());
        self.text(phase_before.name());
        self.each(pools.iter(), |sink, pool| sink.pool(pool));
        self.number(created.0);
        self.number(version.0);
        self.number(booted.0);
    }

    fn spec(&mut self, spec: &WorkerSpec) {
        let WorkerSpec { address, labels, ranges, reserved, gpus, identity } = spec;
        self.text(address);
        self.labels(labels);
        self.each(ranges.iter(), |sink, RangeSpec { name, first, last }| {
            sink.text(name.as_str());
            sink.number(u64::from(first.get()));
            sink.number(u64::from(last.get()));
        });
        self.each(reserved.iter(), |sink, port| sink.number(u64::from(port.get())));
        self.each(gpus.iter(), |sink, GpuSpec { index, uuid, model, memory_bytes }| {
            sink.number(u64::from(*index));
            sink.text(uuid);
            sink.text(model);
            sink.number(*memory_bytes);
        });
        self.maybe(identity.as_ref(), |sink, Identity { machine_id, boot_id, namespace }| {
            sink.text(machine_id);
            sink.text(boot_id);
            sink.number(*namespace);
        });
    }

    fn pool(&mut self, pool: &Pool) {
        let (cursor, next_freed) = pool.cursors();
        self.number(u64::from(cursor));
        self.number(next_freed);
        self.each(pool.freed_order(), |sink, (at, port)| {
            sink.number(at);
            sink.number(u64::from(port));
        });
        self.each(pool.quarantines(), |sink, (port, quarantine)| {
            sink.number(u64::from(port));
            let Quarantine { reason, source, since } = quarantine;
            sink.text(reason);
            sink.text(source.name());
            sink.number(since.0);
        });
    }

    fn allocation(&mut self, allocation: &Allocation) {
        let Allocation {
            claim,
            worker,
            ports,
            gpus,
            token,
            version,
            phase,
            confirmed,
            reason,
            lease,
            liveness,
            confirm_within,
            granted_at,
            changed_at,
            swaps,
            last_change,
        } = allocation;
        self.claim(claim);
        self.text(worker.as_str());
        self.each(ports.iter(), |sink, port| {
            let HeldPort { request, range, number } = port;
            sink.number(u64::from(*request));
            sink.maybe(allocation.port_name(port), |sink, name| sink.text(name.as_str()));
            sink.text(range.as_str());
            sink.number(u64::from(*number));
        });
        self.each(gpus.iter(), |sink, HeldGpu { index, uuid, memory_bytes, exclusive }| {
            sink.number(u64::from(*index));
            sink.text(uuid);
            sink.number(*memory_bytes);
            sink.number(u64::from(*exclusive));
        });
        self.number(token.0);
        self.number(version.0);
        self.text(phase.name());
        self.number(u64::from(*confirmed));
        self.maybe(reason.as_ref(), |sink, reason| sink.text(reason));
        self.maybe(lease.as_ref(), |sink, lease| sink.number(lease.0));
        self.maybe(liveness.as_deref(), |sink, Liveness { boot_id, handle }| {
            sink.text(boot_id);
            match handle {
                Handle::Process { pid, start_ticks } => {
                    sink.text("process");
                    sink.number(u64::from(*pid));
                    sink.number(*start_ticks);
                }
                Handle::Cgroup(path) => {
                    sink.text("cgroup");
                    sink.text(path);
                }
                Handle::Container(id) => {
                    sink.text("container");
                    sink.text(id);
                }
            }
        });
        self.number(confirm_within.0);
        self.number(granted_at.0);
        self.number(changed_at.0);
        self.number(u64::from(*swaps));
        self.maybe(last_change.as_ref(), |sink, LastChange { from, kind }| {
            sink.number(from.0);
            match kind {
                ChangeKind::Confirmed => sink.text("confirmed"),
                ChangeKind::Attached => sink.text("attached"),
                ChangeKind::Lingered { cause } => {
                    sink.text("lingered");
                    sink.text(cause.name());
                }
                ChangeKind::Swapped { port } => {
                    sink.text("swapped");
                    sink.number(u64::from(*port));
                }
            }
        });
    }

    fn why_released(&mut self, why: &ReleaseReason) {
        match why {
            ReleaseReason::ByHolder => self.text("holder"),
            ReleaseReason::Forced { reason } => {
                self.text("forced");
                self.text(reason);
            }
            ReleaseReason::Reclaimed { cause, reason } => {
                self.text(cause.name());
                self.text(reason);
            }
        }
    }

    fn claim(&mut self, claim: &Claim) {
        let Claim { name, uid, placement, ports, gpus, lease, confirm_within, bound, labels } =
            claim;
        self.text(name.as_str());
        self.text(uid.as_str());
        match placement {
            Placement::Worker(worker) => {
                self.text("worker");
                self.text(worker.as_str());
            }
            Placement::Select { selector, policy } => {
                self.text("select");
                self.text(&selector.to_string());
                self.number(*policy as u64);
            }
        }
        self.each(ports.iter(), |sink, PortRequest { name, range, ports }| {
            sink.maybe(name.as_ref(), |sink, name| sink.text(name.as_str()));
            sink.maybe(range.as_ref(), |sink, range| sink.text(range.as_str()));
            let (kind, number) = match ports {
                Ports::Count(n) => ("count", u64::from(*n)),
                Ports::Specific(port) => ("specific", u64::from(port.get())),
                Ports::Contiguous(n) => ("contiguous", u64::from(*n)),
            };
            sink.text(kind);
            sink.number(number);
        });
        self.maybe(gpus.as_deref(), |sink, GpuRequest { which, share }| {
            match which {
                GpuChoice::Count(n) => {
                    sink.text("count");
                    sink.number(u64::from(*n));
                }
                GpuChoice::Indexes(indexes) => {
                    sink.text("indexes");
                    sink.each(indexes.iter(), |sink, index| sink.number(u64::from(*index)));
                }
            }
            match share {
                GpuShare::Exclusive => sink.text("exclusive"),
                GpuShare::MemoryBytes(bytes) => {
                    sink.text("memory");
                    sink.number(*bytes);
                }
            }
        });
        self.maybe(lease.as_ref(), |sink, lease| sink.number(lease.0));
        self.maybe(confirm_within.as_ref(), |sink, span| sink.number(span.0));
        self.number(u64::from(*bound));
        self.labels(labels);
    }
}
