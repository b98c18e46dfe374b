//! What an agent tells of one look at its host, as rules over the table and what was seen.
//!
//! A report says what is, not what follows from it: the leader weighs it. It is stamped with the
//! revision that the table had before the host was looked at, so that it counts for nothing that is
//! newer.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use prost::Message as _;

use super::host::sockets::State;
use super::host::{Seen, Wanted};
use super::ranges::LocalPorts;
use super::table::Table;
use crate::proto::v1;
use crate::proto::v1::liveness::Handle;

/// Most differences in one report; so many are one cause.
const DRIFT_MAX: usize = 1024;
/// Most liveness handles in one report, and most bytes of it: within what a node takes
/// (docs/limits.md).
const HANDLES_MAX: usize = 16_384;
const REPORT_MAX_BYTES: usize = 1_000_000;

/// What is to be looked at, and whose handles are looked for, in the same order.
pub struct Plan {
    pub wanted: Wanted,
    names: Vec<String>,
}

impl Plan {
    /// `boot_id`: handles of other boots are nothing that can be seen.
    pub fn of(table: &Table, boot_id: &str) -> Self {
        let handle = |a: &v1::Allocation| {
            let liveness = a.liveness.as_ref().filter(|liveness| liveness.boot_id == boot_id)?;
            Some((a.name.clone(), liveness.handle.clone()?))
        };
        let (names, handles) =
            table.allocations.values().filter_map(handle).take(HANDLES_MAX).unzip();
        Plan { wanted: Wanted { ports: managed(table), handles }, names }
    }
}

fn managed(table: &Table) -> Vec<RangeInclusive<u16>> {
    let ranges = table.worker.iter().flat_map(|worker| &worker.ranges);
    let span = |r: &v1::RangeUse| Some(u16::try_from(r.first).ok()?..=u16::try_from(r.last).ok()?);
    ranges.filter_map(span).collect()
}

/// A port in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Use {
    listening: bool,
    pids: BTreeSet<u32>,
}

/// The ports in use. A UDP socket on a port that the kernel gives to whoever sends is not said to
/// listen: most are there for one question and its answer.
fn in_use(seen: &Seen, kernel: &LocalPorts) -> BTreeMap<u16, Use> {
    let mut ports: BTreeMap<u16, Use> = BTreeMap::new();
    for (socket, pids) in &seen.sockets {
        let port = ports.entry(socket.port).or_default();
        let passing = socket.udp && kernel.gives(socket.port);
        port.listening |= socket.state == State::Listening && !passing;
        port.pids.extend(pids);
    }
    ports
}

/// What a report is made of beside the sample.
pub struct Stamp<'a> {
    pub worker: &'a str,
    pub identity: &'a v1::Identity,
    /// Drawn when the agent started.
    pub run: &'a str,
    /// Rises with each report.
    pub number: u64,
    pub kernel: &'a LocalPorts,
}

pub fn report(stamp: &Stamp<'_>, table: &Table, plan: &Plan, seen: &Seen) -> v1::ReportRequest {
    let ports = in_use(seen, stamp.kernel);
    let handles = plan.names.iter().zip(&seen.alive).filter_map(|(name, alive)| {
        let token = table.allocations.get(name)?.token;
        Some(v1::HandleState { name: name.clone(), token, alive: (*alive)? })
    });
    let port = |(number, port): (&u16, &Use)| v1::PortInUse {
        number: (*number).into(),
        listening: port.listening,
        pid: port.pids.first().copied().unwrap_or(0),
    };
    let mut report = v1::ReportRequest {
        worker: stamp.worker.into(),
        identity: Some(stamp.identity.clone()),
        revision: table.revision,
        sample: stamp.number,
        run: stamp.run.into(),
        ports: ports.iter().map(port).collect(),
        handles: handles.collect(),
        gpus: gpus(table, seen),
        drift: drift(table, &ports, seen),
    };
    trim(&mut report);
    report
}

/// What does not fit is left out, the least first: silence proves nothing, so that nothing is freed
/// for it.
fn trim(report: &mut v1::ReportRequest) {
    if report.encoded_len() > REPORT_MAX_BYTES {
        report.drift.clear();
        report.ports.iter_mut().for_each(|port| port.pid = 0);
    }
    while report.encoded_len() > REPORT_MAX_BYTES && !report.handles.is_empty() {
        report.handles.truncate(report.handles.len() / 2);
    }
}

/// The worker's GPUs that the driver shows, by UUID where the record has one.
fn gpus(table: &Table, seen: &Seen) -> Vec<v1::GpuInUse> {
    let specs = table.worker.iter().filter_map(|w| w.spec.as_ref()).flat_map(|spec| &spec.gpus);
    let shown = |spec: &v1::GpuSpec| {
        let mut all = seen.gpus.iter();
        let found = match spec.uuid.as_str() {
            "" => all.find(|gpu| gpu.index == spec.index),
            uuid => all.find(|gpu| gpu.uuid == uuid),
        };
        Some(v1::GpuInUse { index: spec.index, processes: found?.processes })
    };
    specs.filter_map(shown).collect()
}

/// Where host and table differ.
fn drift(table: &Table, ports: &BTreeMap<u16, Use>, seen: &Seen) -> Vec<v1::Drift> {
    let mut drift = Vec::new();
    let mut held = BTreeSet::new();
    for allocation in table.allocations.values() {
        for number in allocation.ports.iter().filter_map(|p| u16::try_from(p.number).ok()) {
            held.insert(number);
            drift.extend(of_held(allocation, number, ports.get(&number), seen));
        }
    }
    let known = known_strangers(table);
    for (number, port) in ports {
        if !held.contains(number) && !known.contains(number) {
            drift.push(found(v1::DriftKind::OpenButUnknown, "", *number, by(port)));
        }
    }
    drift.truncate(DRIFT_MAX);
    drift
}

/// Of a port that an allocation holds.
fn of_held(
    allocation: &v1::Allocation,
    number: u16,
    port: Option<&Use>,
    seen: &Seen,
) -> Option<v1::Drift> {
    let Some(port) = port else {
        let bound = allocation.phase() == v1::Phase::Bound;
        let detail = "it is bound, and nobody has the port".to_string();
        return bound
            .then(|| found(v1::DriftKind::BoundButClosed, &allocation.name, number, detail));
    };
    let handle = allocation.liveness.as_ref()?.handle.as_ref()?;
    // One that has ended may have left it to a child.
    let mut living = port.pids.iter().filter(|pid| seen.processes.lives(**pid)).peekable();
    let foreign = |pid: &u32| !seen.processes.belongs(*pid, handle);
    let other = living.peek().is_some() && living.all(foreign);
    other.then(|| {
        let detail = format!("{}, not by {}", by(port), shown(handle));
        found(v1::DriftKind::HeldByAnother, &allocation.name, number, detail)
    })
}

/// Ports that the table does not give anyway: whoever uses them is known of.
fn known_strangers(table: &Table) -> BTreeSet<u16> {
    let Some(worker) = &table.worker else { return BTreeSet::new() };
    let quarantined = worker.ranges.iter().flat_map(|r| &r.quarantined).map(|q| q.number);
    let reserved = worker.spec.iter().flat_map(|spec| spec.reserved.iter().copied());
    quarantined.chain(reserved).filter_map(|number| u16::try_from(number).ok()).collect()
}

fn found(kind: v1::DriftKind, name: &str, port: u16, detail: String) -> v1::Drift {
    v1::Drift { kind: kind.into(), name: name.into(), port: port.into(), detail }
}

fn by(port: &Use) -> String {
    match port.pids.first() {
        Some(pid) => format!("in use by process {pid}"),
        None => "in use by an unknown process".into(),
    }
}

fn shown(handle: &Handle) -> String {
    match handle {
        Handle::Process(process) => format!("process {}", process.pid),
        Handle::Cgroup(path) => format!("cgroup {path}"),
        Handle::Container(id) => format!("container {id}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::host::gpus::GpuSeen;
    use crate::agent::host::sockets::Socket;
    use crate::agent::processes::Process;

    const KERNEL: LocalPorts = LocalPorts { first: 32768, last: 60999, reserved: vec![] };

    fn range(first: u32, last: u32) -> v1::RangeUse {
        v1::RangeUse { first, last, ..Default::default() }
    }

    fn held(name: &str, phase: v1::Phase, ports: &[u32], pid: u32) -> (String, v1::Allocation) {
        let handle = Handle::Process(v1::Process { pid, start_ticks: u64::from(pid) });
        let liveness = v1::Liveness { boot_id: "boot".into(), handle: Some(handle) };
        let port = |number: &u32| v1::Port { number: *number, ..Default::default() };
        let allocation = v1::Allocation {
            name: name.into(),
            token: 7,
            phase: phase.into(),
            ports: ports.iter().map(port).collect(),
            liveness: (pid != 0).then_some(liveness),
            ..Default::default()
        };
        (name.to_string(), allocation)
    }

    fn table(allocations: impl IntoIterator<Item = (String, v1::Allocation)>) -> Table {
        let worker = v1::Worker { ranges: vec![range(20000, 20009)], ..Default::default() };
        let worker = Some(worker);
        Table { revision: 41, worker, allocations: allocations.into_iter().collect() }
    }

    fn tcp(port: u16, state: State, pids: &[u32]) -> (Socket, BTreeSet<u32>) {
        (Socket { port, state, udp: false, inode: 1 }, pids.iter().copied().collect())
    }

    fn process(pid: u32, parent: u32) -> Process {
        Process { pid, parent, group: pid, start_ticks: pid.into(), ..Process::default() }
    }

    fn told(table: &Table, seen: &Seen) -> v1::ReportRequest {
        let identity = v1::Identity { boot_id: "boot".into(), ..Default::default() };
        let stamp =
            Stamp { worker: "w", identity: &identity, run: "r", number: 3, kernel: &KERNEL };
        report(&stamp, table, &Plan::of(table, "boot"), seen)
    }

    fn kinds(report: &v1::ReportRequest) -> Vec<(v1::DriftKind, &str, u32)> {
        report.drift.iter().map(|d| (d.kind(), d.name.as_str(), d.port)).collect()
    }

    #[test]
    fn a_report_is_stamped_and_tells_each_port_once() {
        let sockets = vec![
            tcp(20001, State::Otherwise, &[50]),
            tcp(20001, State::Listening, &[50]),
            tcp(20002, State::Otherwise, &[]),
        ];
        let told = told(&table([]), &Seen { sockets, ..Seen::default() });
        assert_eq!((told.revision, told.sample, told.worker.as_str()), (41, 3, "w"));
        let port = |number, listening, pid| v1::PortInUse { number, listening, pid };
        assert_eq!(told.ports, [port(20001, true, 50), port(20002, false, 0)]);
    }

    #[test]
    fn a_udp_socket_on_a_port_that_the_kernel_gives_to_anyone_does_not_listen() {
        let udp =
            |port| (Socket { port, state: State::Listening, udp: true, inode: 1 }, BTreeSet::new());
        let seen = Seen { sockets: vec![udp(20001), udp(40000)], ..Seen::default() };
        let listening: Vec<_> = told(&table([]), &seen).ports.iter().map(|p| p.listening).collect();
        assert_eq!(listening, [true, false]);
    }

    #[test]
    fn handles_are_told_where_they_can_be() {
        let table = table([
            held("a", v1::Phase::Bound, &[], 50),
            held("b", v1::Phase::Bound, &[], 51),
            held("c", v1::Phase::Lingering, &[], 52),
            held("d", v1::Phase::Bound, &[], 0),
        ]);
        let seen = Seen { alive: vec![Some(true), None, Some(false)], ..Seen::default() };
        let told = told(&table, &seen);
        let state = |name: &str, alive| v1::HandleState { name: name.into(), token: 7, alive };
        assert_eq!(told.handles, [state("a", true), state("c", false)]);
        assert!(Plan::of(&table, "an earlier boot").wanted.handles.is_empty());
    }

    #[test]
    fn host_and_table_are_compared() {
        let table = table([
            held("a", v1::Phase::Bound, &[20001, 20002], 50),
            held("b", v1::Phase::Reserved, &[20003], 0),
            held("c", v1::Phase::Bound, &[20004], 60),
            held("d", v1::Phase::Bound, &[20005], 60),
        ]);
        let seen = Seen {
            // a's port is its grandchild's; c's is a stranger's.
            sockets: vec![
                tcp(20001, State::Listening, &[52]),
                tcp(20004, State::Listening, &[90]),
                // Whoever had d's has ended.
                tcp(20005, State::Listening, &[92]),
                tcp(20007, State::Otherwise, &[91]),
            ],
            processes: [
                process(50, 1),
                process(51, 50),
                process(52, 51),
                process(60, 1),
                process(90, 1),
            ]
            .into_iter()
            .collect(),
            ..Seen::default()
        };
        use v1::DriftKind::*;
        assert_eq!(
            kinds(&told(&table, &seen)),
            [
                (BoundButClosed, "a", 20002),
                (HeldByAnother, "c", 20004),
                (OpenButUnknown, "", 20007)
            ]
        );
    }

    #[test]
    fn a_port_that_the_table_does_not_give_is_no_drift() {
        let mut table = table([]);
        let worker = table.worker.as_mut().unwrap();
        worker.spec = Some(v1::WorkerSpec { reserved: vec![20001], ..Default::default() });
        let quarantined = v1::QuarantinedPort { number: 20002, ..Default::default() };
        worker.ranges[0].quarantined.push(quarantined);
        let sockets = [20001, 20002, 20003].map(|port| tcp(port, State::Listening, &[])).to_vec();
        let told = told(&table, &Seen { sockets, ..Seen::default() });
        assert_eq!(kinds(&told), [(v1::DriftKind::OpenButUnknown, "", 20003)]);
    }

    #[test]
    fn gpus_are_told_by_uuid_and_only_the_workers() {
        let mut table = table([]);
        let gpu =
            |index, uuid: &str| v1::GpuSpec { index, uuid: uuid.into(), ..Default::default() };
        let gpus = vec![gpu(0, "B"), gpu(1, ""), gpu(2, "gone")];
        let spec = v1::WorkerSpec { gpus, ..Default::default() };
        table.worker.as_mut().unwrap().spec = Some(spec);
        let seen = |index, uuid: &str, processes| GpuSeen { index, uuid: uuid.into(), processes };
        let gpus = vec![seen(0, "A", 5), seen(1, "B", 6), seen(3, "C", 7)];
        let told = told(&table, &Seen { gpus, ..Seen::default() });
        let shown: Vec<_> = told.gpus.iter().map(|gpu| (gpu.index, gpu.processes)).collect();
        assert_eq!(shown, [(0, 6), (1, 6)]);
    }

    #[test]
    fn the_largest_report_fits() {
        let ports: Vec<_> =
            (1..=u16::MAX).map(|p| tcp(p, State::Listening, &[4_000_000])).collect();
        let names =
            (0..HANDLES_MAX + 9).map(|i| held(&format!("{i:0>253}"), v1::Phase::Bound, &[], 9));
        let table = table(names);
        let alive = vec![Some(true); HANDLES_MAX];
        let told = told(&table, &Seen { sockets: ports, alive, ..Seen::default() });
        assert!(told.encoded_len() <= REPORT_MAX_BYTES, "{}", told.encoded_len());
        assert_eq!(told.ports.len(), usize::from(u16::MAX), "a port that is left out seems closed");
    }
}
