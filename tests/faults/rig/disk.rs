//! What a node keeps its data on.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::forgetting::{Cut, Disk as Forgetting};

pub enum Disk {
    Plain(PathBuf),
    /// Forgets on a power cut what was not synced; may be slow.
    Forgetting(PathBuf, Forgetting),
    /// Has little room.
    Small(PathBuf),
}

/// Enough for the log, two snapshots and the reserve, not for much more.
const SMALL: &str = "96m";

impl Disk {
    pub fn plain(at: &Path) -> Result<Disk, String> {
        std::fs::create_dir_all(at).map_err(|e| format!("{}: {e}", at.display()))?;
        Ok(Disk::Plain(at.into()))
    }

    pub fn forgetting(at: &Path) -> Result<Disk, String> {
        let mounted = Forgetting::mount(at);
        let mounted = mounted.map_err(|e| format!("no FUSE at {}: {e}", at.display()))?;
        Ok(Disk::Forgetting(at.into(), mounted))
    }

    pub fn small(at: &Path) -> Result<Disk, String> {
        std::fs::create_dir_all(at).map_err(|e| format!("{}: {e}", at.display()))?;
        let options = format!("size={SMALL},mode=700");
        let mut mount = Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status();
        match mounted.is_ok_and(|status| status.success()) {
            true => Ok(Disk::Small(at.into())),
            false => Err(format!("no tmpfs at {}", at.display())),
        }
    }

    fn path(&self) -> &Path {
        match self {
            Disk::Plain(path) | Disk::Forgetting(path, _) | Disk::Small(path) => path,
        }
    }

    pub fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    /// Cuts the power, once its node is dead. Does nothing where nothing can be forgotten.
    pub fn cut(&self, cut: Cut) {
        if let Disk::Forgetting(_, disk) = self {
            disk.cut(cut);
        }
    }

    /// From now on each sync takes so long.
    pub fn slow(&self, by: Duration) {
        if let Disk::Forgetting(_, disk) = self {
            disk.slow(by);
        }
    }

    /// From now on syncs are answered and not done.
    pub fn lie(&self) {
        if let Disk::Forgetting(_, disk) = self {
            disk.lie();
        }
    }

    pub fn forgets(&self) -> bool {
        matches!(self, Disk::Forgetting(..))
    }

    pub fn is_small(&self) -> bool {
        matches!(self, Disk::Small(_))
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }

    /// Takes room until so much is left.
    pub fn fill(&self, leave_bytes: u64) {
        let free = portwarden::store::free_bytes(self.path()).unwrap_or(0);
        let take = free.saturating_sub(leave_bytes);
        let file = std::fs::File::options().append(true).create(true).open(self.ballast());
        if let (Ok(file), 1..) = (file, take) {
            let length = file.metadata().map_or(0, |data| data.len());
            let flags = rustix::fs::FallocateFlags::empty();
            // What the node takes meanwhile may be missing at the end.
            let _ = rustix::fs::fallocate(&file, flags, length, take);
        }
    }

    pub fn make_room(&self) {
        let _ = std::fs::remove_file(self.ballast()); // it may not be there
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.is_small() {
            let _ = Command::new("umount").arg("--lazy").arg(self.path()).status();
        }
    }
}
