//! Room on the file system of a data directory, and a reserve of it.
//!
//! A node on a full disk could neither open its log nor write the snapshot that lets it purge. So it
//! keeps a file of blocks that are allocated and never written, and gives it up when it needs them.
//!
//! - The reserve is given up when less is free than it holds: by a running node ([`Reserve::tend`]),
//!   and at the start before anything is written (`make_room`).
//! - It is made again when the low watermark stays clear with it.
//! - It holds nothing: losing it loses no data.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

use super::StoreError;
use super::dir::sync_dir;

const FILE: &str = "reserve";

/// Free bytes of the file system that `dir` lies on, as far as this process may use them.
pub fn free_bytes(dir: &Path) -> Result<u64, StoreError> {
    let stat = statvfs(dir)
        .map_err(|error| StoreError::io(dir, "its free space is not known")(error.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The reserve of one data directory.
#[derive(Debug, Clone)]
pub struct Reserve {
    dir: PathBuf,
    bytes: u64,
}

impl Reserve {
    /// Of `bytes`; nothing is made yet.
    pub fn new(dir: &Path, bytes: u64) -> Reserve {
        Reserve { dir: dir.to_path_buf(), bytes }
    }

    /// Gives the reserve up, makes it or leaves it, and says how much is free then. Blocks on the
    /// disk.
    pub fn tend(&self, low_bytes: u64) -> Result<u64, StoreError> {
        let free = free_bytes(&self.dir)?;
        let held = held_bytes(&self.dir);
        if held > 0 && free < held {
            give_up(&self.dir)?;
            tracing::warn!(dir = %self.dir.display(), free, held, "the disk is full: the reserve is given up");
        } else if held != self.bytes && free + held >= low_bytes + self.bytes {
            self.make()?;
            tracing::info!(dir = %self.dir.display(), bytes = self.bytes, "the reserve is made");
        } else {
            return Ok(free);
        }
        free_bytes(&self.dir)
    }

    fn make(&self) -> Result<(), StoreError> {
        let path = self.dir.join(FILE);
        let fill = || -> io::Result<()> {
            let mut file = File::create(&path)?;
            if self.bytes > 0 {
                let allocated = fallocate(&file, FallocateFlags::empty(), 0, self.bytes);
                set_aside(&mut file, self.bytes, allocated)?;
            }
            file.sync_all()
        };
        if let Err(error) = fill() {
            give_up(&self.dir)?;
            return Err(StoreError::io(&path, "cannot be reserved")(error));
        }
        sync_dir(&self.dir)
    }
}

/// Some file systems (NFS, many over FUSE) know no `fallocate`: there the reserve is written.
fn set_aside(file: &mut File, bytes: u64, allocated: rustix::io::Result<()>) -> io::Result<()> {
    match allocated {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            io::copy(&mut io::repeat(0).take(bytes), file).map(drop)
        }
        other => Ok(other?),
    }
}

/// Gives the reserve up if the disk is full. Called before anything is written, by who has the lock.
pub(super) fn make_room(dir: &Path) -> Result<(), StoreError> {
    let held = held_bytes(dir);
    if held > 0 && free_bytes(dir)? < held {
        give_up(dir)?;
        tracing::warn!(dir = %dir.display(), held, "the disk is full: the reserve is given up");
    }
    Ok(())
}

fn held_bytes(dir: &Path) -> u64 {
    fs::metadata(dir.join(FILE)).map_or(0, |meta| meta.len())
}

fn give_up(dir: &Path) -> Result<(), StoreError> {
    let path = dir.join(FILE);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::io(&path, "cannot be given up")(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reserve_takes_real_blocks_and_is_made_only_above_the_watermark() {
        use std::os::unix::fs::MetadataExt as _;
        let temp = tempfile::tempdir().unwrap();
        let reserve = Reserve::new(temp.path(), 1 << 20);
        reserve.tend(u64::MAX >> 1).unwrap();
        assert_eq!(held_bytes(temp.path()), 0, "so much is never free");
        reserve.tend(1).unwrap();
        let meta = fs::metadata(temp.path().join(FILE)).unwrap();
        assert_eq!(meta.len(), 1 << 20);
        assert!(meta.blocks() * 512 >= 1 << 20, "{} blocks", meta.blocks());
        // Another size is made anew, none at all is kept as none.
        Reserve::new(temp.path(), 1 << 19).tend(1).unwrap();
        assert_eq!(held_bytes(temp.path()), 1 << 19);
        Reserve::new(temp.path(), 0).tend(0).unwrap();
        assert_eq!(held_bytes(temp.path()), 0);
    }

    #[test]
    fn a_reserve_is_written_where_it_cannot_be_allocated() {
        for unknown in [Errno::OPNOTSUPP, Errno::NOSYS] {
            let mut file = tempfile::tempfile().unwrap();
            set_aside(&mut file, 100_000, Err(unknown)).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 100_000);
        }
        let mut file = tempfile::tempfile().unwrap();
        let full = set_aside(&mut file, 100_000, Err(Errno::NOSPC)).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}
