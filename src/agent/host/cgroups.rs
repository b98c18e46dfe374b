//! Whether a cgroup or a container has processes, from the cgroup file systems.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::agent::processes::names_container;

/// `CGROUP_NS_INIT_INO` of the kernel's `proc_ns.h`: here paths are what everybody calls them.
const INIT_CGROUP_NAMESPACE: u64 = 0xEFFF_FFFB;
/// Cgroups that are looked through for a container.
const CGROUPS_MAX: usize = 20_000;

/// The roots of all hierarchies that are mounted whole; one or more.
pub struct Hierarchies(Vec<PathBuf>);

impl Hierarchies {
    /// Or why cgroups cannot be told from here; then "there is no such cgroup" says nothing.
    pub fn mounted() -> Result<Self, String> {
        let namespace = fs::metadata("/proc/self/ns/cgroup").map(|ns| ns.ino());
        if !matches!(namespace, Ok(INIT_CGROUP_NAMESPACE)) {
            return Err("this is not the host's cgroup namespace: paths mean others here".into());
        }
        let mounts = procfs::process::Process::myself().and_then(|p| p.mountinfo());
        let mounts = mounts.map_err(|error| format!("what is mounted is not known: {error}"))?;
        let whole =
            mounts.0.into_iter().filter(|m| m.fs_type.starts_with("cgroup") && m.root == "/");
        let roots: Vec<_> = whole.map(|mount| mount.mount_point).collect();
        match roots.is_empty() {
            true => Err("no cgroup file system is mounted".into()),
            false => Ok(Hierarchies(roots)),
        }
    }

    /// Has the cgroup at `path`, or one below it, a process? One that does not exist has none; `None`
    /// where it cannot be told.
    pub fn is_populated(&self, path: &str) -> Option<bool> {
        let path = path.trim_start_matches('/');
        any(self.0.iter().map(|root| is_populated(&root.join(path))))
    }

    /// Has a container a process? `None` where it cannot be told: cgroups that are not to be read, or too
    /// many of them.
    pub fn is_container_populated(&self, id: &str) -> Option<bool> {
        let mut left = CGROUPS_MAX;
        any(self.0.iter().map(|root| {
            walk(root, &mut left, |dir| {
                let named = dir.file_name().and_then(|name| name.to_str());
                match named.is_some_and(|name| names_container(name, id)) {
                    true => is_populated(dir),
                    false => Some(false),
                }
            })
        }))
    }
}

/// By `cgroup.events` of version 2; version 1 shows the processes themselves, cgroup by cgroup.
fn is_populated(dir: &Path) -> Option<bool> {
    match text(&dir.join("cgroup.events")) {
        Ok(Some(events)) => Some(events.lines().any(|line| line == "populated 1")),
        Ok(None) => {
            let mut left = CGROUPS_MAX;
            walk(dir, &mut left, |dir| {
                let processes = text(&dir.join("cgroup.procs")).ok()?;
                Some(processes.is_some_and(|processes| !processes.is_empty()))
            })
        }
        Err(_) => None,
    }
}

/// Does it hold for a directory or one below it? `None` where it cannot be told, and after `left` of them.
fn walk(
    root: &Path,
    left: &mut usize,
    mut holds: impl FnMut(&Path) -> Option<bool>,
) -> Option<bool> {
    let mut queue = VecDeque::from([root.to_path_buf()]);
    let mut all_seen = true;
    loop {
        let Some(dir) = queue.pop_front() else { return all_seen.then_some(false) };
        *left = left.checked_sub(1)?;
        match holds(&dir) {
            Some(true) => return Some(true),
            Some(false) => {}
            None => all_seen = false,
        }
        match children(&dir) {
            Ok(children) => queue.extend(children),
            Err(_) => all_seen = false,
        }
    }
}

/// What holds for one holds; what cannot be told of one does not fail to hold. Of none, nothing can be told.
fn any(each: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    let mut each = each.peekable();
    each.peek()?;
    let mut all_seen = true;
    for holds in each {
        match holds {
            Some(true) => return Some(true),
            Some(false) => {}
            None => all_seen = false,
        }
    }
    all_seen.then_some(false)
}

/// `None`: there is no such file.
fn text(path: &Path) -> io::Result<Option<String>> {
    present(fs::read_to_string(path))
}

/// None of a directory that is gone.
fn children(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let Some(entries) = present(fs::read_dir(dir))? else { return Ok(Vec::new()) };
    let dir = |entry: fs::DirEntry| Ok(entry.file_type()?.is_dir().then(|| entry.path()));
    entries.filter_map(|entry| entry.and_then(dir).transpose()).collect()
}

/// A cgroup that is removed while it is read says that there is no such device.
fn present<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    match read {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.raw_os_error() == Some(Errno::NODEV.raw_os_error()) => Ok(None),
        read => read.map(Some),
    }
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
        assert_eq!(hierarchies.is_populated("/a"), Some(true));
        assert_eq!(hierarchies.is_populated("b"), Some(false));
        assert_eq!(hierarchies.is_populated("nowhere"), Some(false));
    }

    #[test]
    fn a_cgroup_of_version_1_is_looked_through() {
        let (_dir, hierarchies) = hierarchy(&[
            ("a", "cgroup.procs", ""),
            ("a/b", "cgroup.procs", "42\n"),
            ("c/d", "cgroup.procs", ""),
        ]);
        assert_eq!(hierarchies.is_populated("a"), Some(true));
        assert_eq!(hierarchies.is_populated("c"), Some(false));
    }

    #[test]
    fn what_cannot_be_read_is_not_known_to_be_empty() {
        // A directory where there should be a file is an error, whoever asks.
        let (_dir, hierarchies) = hierarchy(&[
            ("a/cgroup.events", "x", ""),
            ("b/c/cgroup.procs", "x", ""),
            ("docker/0123456789ab/cgroup.events", "x", ""),
        ]);
        for path in ["a", "b"] {
            assert_eq!(hierarchies.is_populated(path), None, "{path}");
        }
        assert_eq!(hierarchies.is_container_populated("0123456789ab"), None);
        assert_eq!(hierarchies.is_container_populated("ffffffffffff"), Some(false));
    }

    #[test]
    fn where_nothing_is_mounted_nothing_is_known_to_be_empty() {
        let hierarchies = Hierarchies(vec![]);
        assert_eq!(hierarchies.is_populated("a"), None);
        assert_eq!(hierarchies.is_container_populated("0123456789ab"), None);
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
