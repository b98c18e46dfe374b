//! Whether a cgroup or a container has processes, from the cgroup file systems.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::agent::processes::names_container;

/// `CGROUP_NS_INIT_INO` of the kernel's `proc_ns.h`: here paths are what everybody calls them.
const INIT_CGROUP_NAMESPACE: u64 = 0xEFFF_FFFB;
/// Cgroups that are looked through for a container.
const CGROUPS_MAX: usize = 20_000;

/// The roots of all hierarchies that are mounted whole.
pub struct Hierarchies(Vec<PathBuf>);

/// Why cgroups cannot be told from here; then "there is no such cgroup" says nothing.
pub fn blind_spot() -> Option<String> {
    let namespace = fs::metadata("/proc/self/ns/cgroup").map(|ns| ns.ino());
    if !matches!(namespace, Ok(INIT_CGROUP_NAMESPACE)) {
        return Some("this is not the host's cgroup namespace: paths mean others here".into());
    }
    let none = Hierarchies::mounted().0.is_empty();
    none.then(|| "no cgroup file system is mounted".into())
}

impl Hierarchies {
    pub fn mounted() -> Self {
        let mounts = procfs::process::Process::myself().and_then(|p| p.mountinfo());
        let mounts = mounts.map(|mounts| mounts.0).unwrap_or_default().into_iter();
        let whole = mounts.filter(|m| m.fs_type.starts_with("cgroup") && m.root == "/");
        Hierarchies(whole.map(|mount| mount.mount_point).collect())
    }

    /// Has the cgroup at `path`, or one below it, a process? One that does not exist has none.
    pub fn is_populated(&self, path: &str) -> bool {
        let path = path.trim_start_matches('/');
        self.0.iter().any(|root| is_populated(&root.join(path)))
    }

    /// Has a container a process? `None` where there are too many cgroups to look through.
    pub fn is_container_populated(&self, id: &str) -> Option<bool> {
        let mut left = CGROUPS_MAX;
        for root in &self.0 {
            let mut queue = VecDeque::from([root.clone()]);
            while let Some(dir) = queue.pop_front() {
                left = left.checked_sub(1)?;
                let named = dir.file_name().and_then(|name| name.to_str());
                if named.is_some_and(|name| names_container(name, id)) && is_populated(&dir) {
                    return Some(true);
                }
                queue.extend(children(&dir));
            }
        }
        Some(false)
    }
}

/// By `cgroup.events` of version 2; version 1 shows the processes themselves, cgroup by cgroup.
fn is_populated(dir: &Path) -> bool {
    if let Ok(events) = fs::read_to_string(dir.join("cgroup.events")) {
        return events.lines().any(|line| line == "populated 1");
    }
    let mut queue = VecDeque::from([dir.to_path_buf()]);
    for _ in 0..CGROUPS_MAX {
        let Some(dir) = queue.pop_front() else { return false };
        if fs::read_to_string(dir.join("cgroup.procs")).is_ok_and(|procs| !procs.is_empty()) {
            return true;
        }
        queue.extend(children(&dir));
    }
    true // nobody can tell: it is not known to be empty
}

fn children(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a hierarchy.
    fn hierarchy(files: &[(&str, &str, &str)]) -> (tempfile::TempDir, Hierarchies) {
        let dir = tempfile::tempdir().unwrap();
        for (cgroup, file, text) in files {
            let at = dir.path().join(cgroup);
            fs::create_dir_all(&at).unwrap();
            fs::write(at.join(file), text).unwrap();
        }
        let roots = Hierarchies(vec![dir.path().to_path_buf()]);
        (dir, roots)
    }

    #[test]
    fn a_cgroup_of_version_2_says_whether_it_is_populated() {
        let (_dir, hierarchies) = hierarchy(&[
            ("a", "cgroup.events", "populated 1\nfrozen 0\n"),
            ("b", "cgroup.events", "populated 0\nfrozen 0\n"),
        ]);
        assert!(hierarchies.is_populated("/a"));
        assert!(!hierarchies.is_populated("b"));
        assert!(!hierarchies.is_populated("nowhere"));
    }

    #[test]
    fn a_cgroup_of_version_1_is_looked_through() {
        let (_dir, hierarchies) = hierarchy(&[
            ("a", "cgroup.procs", ""),
            ("a/b", "cgroup.procs", "42\n"),
            ("c/d", "cgroup.procs", ""),
        ]);
        assert!(hierarchies.is_populated("a"));
        assert!(!hierarchies.is_populated("c"));
    }

    #[test]
    fn a_container_is_found_by_its_id_wherever_its_runtime_puts_it() {
        let populated = ("cgroup.events", "populated 1\n");
        let (_dir, hierarchies) = hierarchy(&[
            ("system.slice/docker-0123456789abcdef.scope", populated.0, populated.1),
            ("docker/fedcba9876543210", "cgroup.events", "populated 0\n"),
        ]);
        assert_eq!(hierarchies.is_container_populated("0123456789ab"), Some(true));
        assert_eq!(hierarchies.is_container_populated("fedcba987654"), Some(false));
        assert_eq!(hierarchies.is_container_populated("aaaaaaaaaaaa"), Some(false));
    }
}
