//! Processes, and which sockets they have open, from /proc.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use procfs::process::{FDTarget, Process as Proc, all_processes};
use procfs::{ProcError, ProcResult};

use rustix::io::Errno;

use crate::agent::processes::{Process, Processes};
use crate::proto::v1;

/// `PROC_PID_INIT_INO` of the kernel's `proc_ns.h`: the PID namespace that all others are in.
const INIT_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// All processes; those that `handles` may mean from inner PID namespaces with their pids there.
pub fn processes(handles: &[&v1::Process]) -> ProcResult<Processes> {
    let mut unread = None;
    let all =
        all_processes()?.map(|process| read(&process?, handles)).filter_map(|read| match read {
            Ok(process) => Some(process),
            Err(error) => {
                if !has_ended(&error) {
                    unread = Some(error.to_string());
                }
                None
            }
        });
    let mut all: Processes = all.collect();
    all.unread = unread;
    Ok(all)
}

/// Of a process that was being read.
fn has_ended(error: &ProcError) -> bool {
    match error {
        ProcError::NotFound(_) => true,
        ProcError::Io(error, _) => {
            error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
        }
        _ => false,
    }
}

fn read(process: &Proc, handles: &[&v1::Process]) -> ProcResult<Process> {
    let stat = process.stat()?;
    let number = |n: i32| u32::try_from(n).unwrap_or(0);
    let meant =
        handles.iter().any(|h| h.start_ticks == stat.starttime && h.pid != number(stat.pid));
    let inner_pids = if meant { inner_pids(process.pid())? } else { Vec::new() };
    Ok(Process {
        pid: number(stat.pid),
        parent: number(stat.ppid),
        group: number(stat.pgrp),
        session: number(stat.session),
        start_ticks: stat.starttime,
        dead: is_over(process, stat.state),
        inner_pids,
        cgroups: Vec::new(),
    })
}

/// Nothing of it runs any more.
fn is_over(process: &Proc, state: char) -> bool {
    is_dead(state) && !has_live_thread(process)
}

fn is_dead(state: char) -> bool {
    matches!(state, 'Z' | 'X' | 'x')
}

/// A process whose first thread has ended lives on in the others.
fn has_live_thread(process: &Proc) -> bool {
    let Ok(tasks) = process.tasks() else { return false };
    tasks.flatten().any(|task| task.stat().is_ok_and(|stat| !is_dead(stat.state)))
}

/// Its pids in the PID namespaces below this one.
fn inner_pids(pid: i32) -> ProcResult<Vec<u32>> {
    let status = fs::read(format!("/proc/{pid}/status"));
    Ok(inner_pids_of(&status.map_err(|error| ProcError::Io(error, None))?))
}

/// In bytes: the kernel cuts the name of a program where it is too long, in the middle of a character too.
fn inner_pids_of(status: &[u8]) -> Vec<u32> {
    let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"NSpid:"));
    let text = line.and_then(|line| std::str::from_utf8(line).ok()).unwrap_or_default();
    text.split_whitespace().skip(1).filter_map(|pid| pid.parse().ok()).collect()
}

/// The cgroups of some processes, one path in each hierarchy.
pub fn read_cgroups(processes: &mut Processes, of: &BTreeSet<u32>) {
    for process in processes.iter_mut().filter(|process| of.contains(&process.pid)) {
        let text = fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
        process.cgroups = text.lines().filter_map(cgroup_of_line).map(String::from).collect();
    }
}

/// `hierarchy:controllers:path`
fn cgroup_of_line(line: &str) -> Option<&str> {
    line.splitn(3, ':').nth(2)
}

/// Which processes have these sockets open: all file descriptors of the host are looked through.
pub fn owners(inodes: &BTreeSet<u64>) -> BTreeMap<u64, BTreeSet<u32>> {
    let mut owners: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
    let processes = all_processes().into_iter().flatten().flatten();
    for process in processes {
        let (Ok(pid), Ok(fds)) = (u32::try_from(process.pid()), process.fd()) else { continue };
        for fd in fds.flatten() {
            if let FDTarget::Socket(inode) = fd.target
                && inodes.contains(&inode)
            {
                owners.entry(inode).or_default().insert(pid);
            }
        }
    }
    owners
}

/// Is it there, and has it not ended?
pub fn lives(pid: u32) -> bool {
    let process = i32::try_from(pid).ok().and_then(|pid| Proc::new(pid).ok());
    process.is_some_and(|process| process.stat().is_ok_and(|stat| !is_over(&process, stat.state)))
}

/// When a process was started, in clock ticks from the boot.
pub fn start_ticks(pid: u32) -> ProcResult<u64> {
    let pid = i32::try_from(pid).unwrap_or(i32::MAX);
    Ok(Proc::new(pid)?.stat()?.starttime)
}

/// The name of a process, for people.
pub fn name(pid: u32) -> Option<String> {
    let pid = i32::try_from(pid).ok()?;
    Some(Proc::new(pid).ok()?.stat().ok()?.comm)
}

/// Why not every process of the host is seen from here; then "there is no such process" says
/// nothing.
pub fn blind_spot() -> Option<String> {
    let namespace = fs::metadata("/proc/self/ns/pid").map(|ns| ns.ino());
    if !matches!(namespace, Ok(INIT_PID_NAMESPACE)) {
        return Some(
            "this is not the host's PID namespace: processes outside it are not seen".into(),
        );
    }
    if in_time_namespace() {
        return Some(
            "this is a time namespace: starts of processes are counted from elsewhere".into(),
        );
    }
    // hidepid: others' processes are not there at all.
    match fs::read_to_string("/proc/1/stat") {
        Ok(_) => None,
        Err(error) => Some(format!("/proc hides the processes of others: /proc/1/stat: {error}")),
    }
}

/// Are times of starts counted from elsewhere here than on the host?
pub fn in_time_namespace() -> bool {
    let offsets = fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
    offsets.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some("boottime") && words.any(|offset| offset != "0")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::process::{Command, Stdio};

    #[test]
    fn a_name_that_is_cut_in_a_character_hides_no_pid() {
        let status = b"Name:\ta\xe6\xa8\nUmask:\t0022\nNSpid:\t22693\t5\nNSpgid:\t22693\t5\n";
        assert_eq!(inner_pids_of(status), [5]);
        assert_eq!(inner_pids_of(b"Name:\tsh\nNSpid:\t22693\n"), [0u32; 0]);
    }

    #[test]
    fn this_process_is_seen_with_its_start_and_its_sockets() {
        let pid = std::process::id();
        let start_ticks = start_ticks(pid).unwrap();
        let seen = processes(&[]).unwrap();
        assert!(seen.is_alive(&v1::Process { pid, start_ticks }));
        assert!(!seen.is_alive(&v1::Process { pid, start_ticks: start_ticks - 1 }));

        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let sockets = super::super::sockets::sockets().unwrap();
        let inode = sockets.iter().find(|s| s.port == port && !s.udp).unwrap().inode;
        assert!(owners(&[inode].into()).get(&inode).is_some_and(|pids| pids.contains(&pid)));
    }

    #[test]
    fn a_child_that_has_ended_and_was_not_waited_for_is_dead() {
        let mut child = Command::new("true").stdin(Stdio::null()).spawn().unwrap();
        let handle = v1::Process { pid: child.id(), start_ticks: start_ticks(child.id()).unwrap() };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while processes(&[&handle]).unwrap().is_alive(&handle) {
            assert!(std::time::Instant::now() < deadline, "it ends");
            std::thread::park_timeout(std::time::Duration::from_millis(5));
        }
        assert!(!lives(handle.pid));
        child.wait().unwrap();
        assert!(!lives(handle.pid) && lives(std::process::id()));
    }

    #[test]
    fn the_path_of_a_cgroup_may_hold_colons() {
        assert_eq!(cgroup_of_line("0::/k8s.io:cri:1"), Some("/k8s.io:cri:1"));
        assert_eq!(cgroup_of_line("4:memory:/a"), Some("/a"));
    }
}
