//! Which processes belong to an instance, and whether it lives: rules over what /proc shows.

use std::collections::BTreeMap;
use std::iter::successors;

use crate::proto::v1;

/// One process, as seen from the agent's PID namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    pub group: u32,
    pub session: u32,
    /// Clock ticks from the boot to its start: tells it from a later one of its pid.
    pub start_ticks: u64,
    /// Every thread of it has ended; it waits for its parent to take note.
    pub dead: bool,
    /// Its pids in PID namespaces below the agent's. Read where it matters.
    pub inner_pids: Vec<u32>,
    /// Its paths in the cgroup hierarchies. Read where it matters.
    pub cgroups: Vec<String>,
}

impl Process {
    /// Is it the one that a handle names?
    fn is(&self, handle: &v1::Process) -> bool {
        self.start_ticks == handle.start_ticks
            && (self.pid == handle.pid || self.inner_pids.contains(&handle.pid))
    }
}

/// All processes that the agent sees.
#[derive(Debug, Clone, Default)]
pub struct Processes {
    by_pid: BTreeMap<u32, Process>,
    /// Why one that is there could not be read: what is not among these may live.
    pub unread: Option<String>,
}

impl FromIterator<Process> for Processes {
    fn from_iter<I: IntoIterator<Item = Process>>(processes: I) -> Self {
        let by_pid = processes.into_iter().map(|process| (process.pid, process)).collect();
        Processes { by_pid, unread: None }
    }
}

impl Processes {
    pub fn iter(&self) -> impl Iterator<Item = &Process> {
        self.by_pid.values()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Process> {
        self.by_pid.values_mut()
    }

    /// Does the process that a handle names live, or anything of its process group or session? What
    /// it started goes on using its ports after it. The kernel gives no pid anew while a group or
    /// session is called by it.
    ///
    /// A handle from an inner PID namespace is found by its start and its pid there.
    pub fn is_alive(&self, handle: &v1::Process) -> bool {
        let pid = handle.pid;
        let named = self.by_pid.get(&pid);
        let is_it = |process: &Process| process.is(handle);
        let of_its_group = |process: &Process| {
            named.is_none_or(is_it) && (process.group == pid || process.session == pid)
        };
        self.iter().any(|process| !process.dead && (is_it(process) || of_its_group(process)))
    }

    /// Is there such a process, and has it not ended?
    pub fn lives(&self, pid: u32) -> bool {
        self.by_pid.get(&pid).is_some_and(|process| !process.dead)
    }

    /// Is the process `pid` the one that a handle names, one that descends from it, or one in its
    /// cgroup?
    pub fn belongs(&self, pid: u32, handle: &v1::liveness::Handle) -> bool {
        use v1::liveness::Handle;
        let Some(process) = self.by_pid.get(&pid) else { return false };
        let in_cgroup = |inside: &dyn Fn(&str) -> bool| process.cgroups.iter().any(|c| inside(c));
        match handle {
            Handle::Process(root) => self.descends(process, root),
            Handle::Cgroup(path) => in_cgroup(&|cgroup| is_below(cgroup, path)),
            Handle::Container(id) => in_cgroup(&|cgroup| names_container(cgroup, id)),
        }
    }

    fn descends(&self, process: &Process, root: &v1::Process) -> bool {
        self.ancestry(process).any(|process| {
            process.is(root) || process.group == root.pid || process.session == root.pid
        })
    }

    /// Does the process `pid` descend from another, by its parents alone?
    pub fn is_below(&self, pid: u32, ancestor: u32) -> bool {
        let Some(process) = self.by_pid.get(&pid) else { return false };
        self.ancestry(process).skip(1).any(|process| process.pid == ancestor)
    }

    /// A process, its parent, and so on.
    fn ancestry<'a>(&'a self, process: &'a Process) -> impl Iterator<Item = &'a Process> {
        let parent =
            |of: &&Process| self.by_pid.get(&of.parent).filter(|parent| parent.pid != of.pid);
        // No longer than all processes are; /proc is not read at one instant.
        successors(Some(process), parent).take(self.by_pid.len() + 1)
    }
}

/// Is a cgroup the one at `path` or below it?
fn is_below(cgroup: &str, path: &str) -> bool {
    let (cgroup, path) = (cgroup.trim_matches('/'), path.trim_matches('/'));
    cgroup == path || cgroup.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'))
}

/// Does a part of the path name this container, in one of the ways runtimes do (`/docker/<id>`,
/// `docker-<id>.scope`, `cri-containerd-<id>.scope`)? The id may be a short one.
pub fn names_container(cgroup: &str, id: &str) -> bool {
    cgroup.split('/').any(|part| {
        let part = part.strip_suffix(".scope").unwrap_or(part);
        part.rsplit(['-', ':']).next().is_some_and(|name| name.starts_with(id))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::liveness::Handle;

    fn process(pid: u32, parent: u32, group: u32) -> Process {
        let start_ticks = u64::from(pid) * 100;
        Process { pid, parent, group, session: 1, start_ticks, ..Process::default() }
    }

    fn handle(pid: u32) -> v1::Process {
        v1::Process { pid, start_ticks: u64::from(pid) * 100 }
    }

    #[test]
    fn a_handle_is_its_process_and_not_a_later_one_of_its_pid() {
        let processes: Processes = [process(1, 0, 1), process(50, 1, 50)].into_iter().collect();
        assert!(processes.is_alive(&handle(50)));
        assert!(!processes.is_alive(&v1::Process { pid: 50, start_ticks: 4_999 }));
        assert!(!processes.is_alive(&handle(51)));
    }

    #[test]
    fn what_its_process_left_behind_in_its_group_keeps_a_handle_alive() {
        let left: Processes = [process(1, 0, 1), process(60, 1, 50)].into_iter().collect();
        assert!(left.is_alive(&handle(50)));
        // The pid is another one's now, so the group is that one's too.
        let reused = Process { start_ticks: 9_999, ..process(50, 1, 50) };
        let reused: Processes = [reused, process(60, 50, 50)].into_iter().collect();
        assert!(!reused.is_alive(&handle(50)));
    }

    #[test]
    fn the_dead_do_not_keep_a_handle_alive() {
        let dead = Process { dead: true, ..process(50, 1, 50) };
        assert!(!Processes::from_iter([dead.clone()]).is_alive(&handle(50)));
        assert!(Processes::from_iter([dead, process(60, 50, 50)]).is_alive(&handle(50)));
    }

    #[test]
    fn a_handle_from_an_inner_pid_namespace_is_found_by_its_pid_there() {
        let inner = Process { start_ticks: 700, inner_pids: vec![7], ..process(4242, 1, 4242) };
        let processes = Processes::from_iter([inner]);
        assert!(processes.is_alive(&handle(7)));
        assert!(!processes.is_alive(&handle(8)));
    }

    #[test]
    fn descendants_belong_and_strangers_do_not() {
        let tree = [process(1, 0, 1), process(50, 1, 50), process(51, 50, 51), process(52, 51, 51)];
        let processes: Processes = tree.into_iter().chain([process(90, 1, 90)]).collect();
        let root = Handle::Process(handle(50));
        for pid in [50, 51, 52] {
            assert!(processes.belongs(pid, &root), "{pid}");
        }
        for pid in [1, 90, 91] {
            assert!(!processes.belongs(pid, &root), "{pid}");
        }
        let below: Vec<_> = [1, 50, 51, 52, 90, 91]
            .into_iter()
            .filter(|pid| processes.is_below(*pid, 50))
            .collect();
        assert_eq!(below, [51, 52]);
    }

    #[test]
    fn cgroups_and_containers_are_told_by_path() {
        let path = "/system.slice/docker-0123456789abcdef0123.scope/worker";
        let inside = Process { cgroups: vec![path.into()], ..process(50, 1, 50) };
        let processes = Processes::from_iter([inside]);
        for (handle, belongs) in [
            (Handle::Cgroup("system.slice/docker-0123456789abcdef0123.scope".into()), true),
            (Handle::Cgroup("/system.slice".into()), true),
            (Handle::Cgroup("/system".into()), false),
            (Handle::Container("0123456789ab".into()), true),
            (Handle::Container("123456789abc".into()), false),
        ] {
            assert_eq!(processes.belongs(50, &handle), belongs, "{handle:?}");
        }
        for cgroup in [
            "/docker/0123456789ab",
            "/kubepods/pod1/cri-containerd-0123456789ab.scope",
            "/k8s.io:cri-containerd:0123456789ab",
        ] {
            assert!(names_container(cgroup, "0123456789ab"), "{cgroup}");
        }
    }
}
