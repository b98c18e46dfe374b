//! The two files that take turns, and how they are written.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::frames::{self, HEADER_BYTES};

/// What is written begins and ends at multiples of this, in bytes, in the file and in memory: the largest
/// sector of common disks.
pub(super) const BLOCK_BYTES: usize = 4096;
pub(super) const NAMES: [&str; 2] = ["0", "1"];

/// In bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// What a file takes before it is sealed.
    pub(super) file: u64,
    /// What a frame takes before it is written.
    pub(super) frame: usize,
}

/// The files.
#[derive(Debug)]
pub(super) struct Journal {
    files: [File; 2],
    pub(super) active: usize,
    /// Where the next frame begins in the active file.
    pub(super) offset: u64,
    pub(super) sizes: Sizes,
    pub(super) run: u64,
    /// Of the frame that is being filled.
    pub(super) number: u64,
    /// Number of the last frame that is synced.
    pub(super) synced: u64,
    /// Room for the header, and what the frame holds so far.
    pub(super) frame: Vec<u8>,
    /// The block of the active file in which the next frame begins, up to there.
    pub(super) head: Vec<u8>,
    /// Where blocks are made of both.
    memory: Vec<u8>,
}

impl Journal {
    /// Writes over what the files hold.
    pub(super) fn begin(path: &Path, sizes: Sizes, run: u64) -> io::Result<Journal> {
        Ok(Journal {
            files: open(path)?,
            active: 0,
            offset: 0,
            sizes,
            run,
            number: 1,
            synced: 0,
            frame: vec![0; HEADER_BYTES],
            head: Vec::new(),
            memory: Vec::new(),
        })
    }

    /// Are so many bytes more than the active file takes?
    pub(super) fn is_full(&self, bytes: usize) -> bool {
        let filled = self.offset + self.frame.len() as u64;
        filled > HEADER_BYTES as u64 && filled + bytes as u64 > self.sizes.file
    }

    /// Writes the frame, and begins the next one.
    pub(super) fn write(&mut self) -> io::Result<()> {
        frames::close(&mut self.frame, self.run, self.number, self.synced);
        let begin = self.offset - self.head.len() as u64;
        self.files[self.active]
            .write_all_at(blocks(&mut self.memory, &self.head, &self.frame), begin)?;
        self.offset += self.frame.len() as u64;
        let in_block = (self.offset % BLOCK_BYTES as u64) as usize;
        if in_block <= self.frame.len() {
            self.head.clear();
        }
        self.head.extend_from_slice(&self.frame[self.frame.len().saturating_sub(in_block)..]);
        self.number += 1;
        self.frame.truncate(HEADER_BYTES);
        self.frame.shrink_to(2 * self.sizes.frame);
        self.memory.clear();
        self.memory.shrink_to(2 * self.sizes.frame);
        Ok(())
    }

    /// Returns when everything is on the disk.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.frame.len() > HEADER_BYTES {
            self.write()?;
        }
        if self.synced + 1 < self.number {
            self.files[self.active].sync_data()?;
            self.synced = self.number - 1;
        }
        Ok(())
    }

    /// Makes the other file active, whose frames are below.
    pub(super) fn seal(&mut self) -> io::Result<()> {
        self.flush()?;
        self.active = 1 - self.active;
        self.offset = 0;
        self.head.clear();
        Ok(())
    }
}

/// Makes what is missing of the journal's files.
pub(super) fn create(path: &Path, bytes: u64) -> io::Result<()> {
    fs::create_dir_all(path)?;
    NAMES.iter().try_for_each(|name| {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false);
        let file = file.open(path.join(name))?;
        let size = file.metadata()?.len();
        if size < bytes {
            // Zeros and not a hole: later writes change no metadata.
            file.write_all_at(&vec![0; (bytes - size) as usize], size)?;
        }
        file.sync_all()
    })
}

/// Opens the files to write to them, past the page cache where the file system can. The first block of
/// each is gone then.
pub(super) fn open(path: &Path) -> io::Result<[File; 2]> {
    let open = |flags| {
        let open = |name| OpenOptions::new().write(true).custom_flags(flags).open(path.join(name));
        Ok::<_, io::Error>([open(NAMES[0])?, open(NAMES[1])?])
    };
    let direct = open(libc::O_DIRECT).and_then(|files| {
        files
            .iter()
            .try_for_each(|file| file.write_all_at(blocks(&mut Vec::new(), &[], &[0]), 0))?;
        Ok(files)
    });
    direct.or_else(|error| match error.kind() {
        io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported => {
            let path = path.display();
            tracing::info!(
                "{path} goes through the page cache: its file system, or the disk below, takes no \
                 blocks of {BLOCK_BYTES} bytes past it"
            );
            open(0)
        }
        _ => Err(error),
    })
}

/// Whole blocks in `memory`: what lies in the first one, a frame after it, and zeros.
fn blocks<'a>(memory: &'a mut Vec<u8>, head: &[u8], frame: &[u8]) -> &'a [u8] {
    let bytes = (head.len() + frame.len()).next_multiple_of(BLOCK_BYTES);
    memory.clear();
    memory.reserve(BLOCK_BYTES + bytes);
    let begin = memory.as_ptr().align_offset(BLOCK_BYTES);
    memory.resize(begin, 0);
    memory.extend_from_slice(head);
    memory.extend_from_slice(frame);
    memory.resize(begin + bytes, 0);
    &memory[begin..]
}
