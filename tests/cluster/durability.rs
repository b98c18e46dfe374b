//! What is acknowledged has been synced: seen from outside, by the system calls of the processes.

use std::path::PathBuf;
use std::process::Command;

use crate::support::{BINARY, Cluster, wait_for};

const WRITES: usize = 40;

/// The system calls of one node, as strace writes them down.
struct Trace(PathBuf);

impl Trace {
    fn text(&self) -> String {
        std::fs::read_to_string(&self.0).unwrap_or_default()
    }

    /// How often one of `calls` was begun.
    fn count(&self, calls: &[&str]) -> usize {
        let begun = |line: &str| {
            let call = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
            calls.iter().any(|name| call.strip_prefix(name).is_some_and(|c| c.starts_with('(')))
        };
        self.text().lines().filter(|line| begun(line)).count()
    }

    fn syncs(&self) -> usize {
        self.count(&["fsync", "fdatasync"])
    }
}

/// Field failures sled-1351, sled-1452: what was flushed was gone after a power cut, since sled calls
/// `sync_file_range`, which makes nothing durable. Here ours takes its place and does
/// `fdatasync` (docs/decisions/0002-sled-durability.md). This fails if that ever ceases to be so.
#[test]
fn every_acknowledged_write_was_synced_on_a_majority() {
    let strace = Command::new("strace").arg("-V").output();
    assert!(
        strace.is_ok_and(|out| out.status.success()),
        "this test needs strace (apt-get install strace): it counts what the kernel is asked to sync"
    );
    let mut cluster = Cluster::prepare(3);
    let traces: Vec<_> =
        (0..3).map(|at| Trace(cluster.dir().join(format!("strace-{at}")))).collect();
    for (at, trace) in traces.iter().enumerate() {
        let mut command = Command::new("strace");
        // -D: strace is the grandchild, so that the child's pid, signals and exit are the node's
        // own; it ends with the node.
        command.args([
            "-D",
            "-f",
            "-e",
            "trace=fsync,fdatasync,sync_file_range",
            "-e",
            "signal=none",
        ]);
        command.arg("-o").arg(&trace.0).arg(BINARY).args(cluster.serve_args(at));
        cluster.spawn_as(at, command);
    }
    cluster.leader();
    cluster.worker("w", 40_063);

    let before: Vec<_> = traces.iter().map(Trace::syncs).collect();
    for i in 0..WRITES {
        cluster.cli(&["allocate", &format!("i{i}"), "--worker", "w", "--ports", "1"]).ok();
    }
    let during: Vec<_> = traces.iter().zip(before).map(|(t, before)| t.syncs() - before).collect();
    let syncing = during.iter().filter(|count| **count >= WRITES).count();
    assert!(syncing >= 2, "{WRITES} acknowledged writes, syncs per node: {during:?}");

    for at in 0..3 {
        assert_eq!(cluster.terminate(at), Some(0));
    }
    for (at, trace) in traces.iter().enumerate() {
        wait_for("strace to end with its node", || {
            trace.text().contains("+++ exited with 0 +++").then_some(())
        });
        let void = trace.count(&["sync_file_range"]);
        assert_eq!(void, 0, "node {at} asked for syncs that make nothing durable");
    }
    eprintln!("{WRITES} writes, syncs per node: {during:?}");
}
