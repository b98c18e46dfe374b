//! What durable means here: `fdatasync`, and the end of the process when it fails.
//!
//! sled 0.34 makes its writes durable with `sync_file_range`, which commits no metadata and does
//! not empty the disk's cache (sled issues 1351 and 1452). The symbol is defined here anew, so that
//! sled and everything else in the binary calls `fdatasync` in its place. `tests/storage.rs` counts
//! the system calls of a running process, and [`verify`] checks the linkage at every start.
//!
//! After a failed sync nobody knows which pages are on the disk, and the kernel forgets the error
//! once it was told (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020). So
//! no sync is ever tried again: see [`fatal`].

use std::any::Any;
use std::io::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_int, c_uint};

use super::StoreError;

static CALLS: AtomicU64 = AtomicU64::new(0);

/// In place of the C library's: syncs the data of the whole file and what is needed to find it.
#[unsafe(no_mangle)]
pub extern "C" fn sync_file_range(fd: c_int, _offset: i64, _nbytes: i64, _flags: c_uint) -> c_int {
    CALLS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: takes a number and touches no memory; a bad descriptor is answered with EBADF.
    unsafe { libc::fdatasync(fd) }
}

/// Calls `sync_file_range` by the name that sled calls it by, and looks where the call arrived.
pub(super) fn verify() -> Result<(), StoreError> {
    let before = CALLS.load(Ordering::Relaxed);
    // SAFETY: as above; -1 is no descriptor.
    unsafe { libc::sync_file_range(-1, 0, 0, 0) };
    if CALLS.load(Ordering::Relaxed) == before {
        return Err(StoreError::NotDurable);
    }
    Ok(())
}

/// Exit status of a node whose disk failed, or that lost a thread it cannot do without (`EX_IOERR` of
/// sysexits.h).
pub const FATAL_EXIT: c_int = 74;

/// Ends the process at once, without another answer to anybody: what was asked is of unknown
/// outcome. No destructor runs, nothing more is written.
pub fn fatal(what: &str, error: &dyn std::fmt::Display) -> ! {
    tracing::error!(%error, "{what}; the process ends without another answer");
    exit_at_once(FATAL_EXIT, &format!("{what}: {error}; the process ends"))
}

static INSTEAD: OnceLock<fn(c_int, &str) -> !> = OnceLock::new();

/// From now on this is done where the process would end: a simulation has many nodes in one process,
/// of which one must end. Once a process.
pub fn instead_of_exit(end: fn(c_int, &str) -> !) {
    let _ = INSTEAD.set(end);
}

/// Says why, and ends the process without running anything more of it.
pub fn exit_at_once(code: c_int, why: &str) -> ! {
    if let Some(end) = INSTEAD.get() {
        end(code, why);
    }
    // The subscriber may be buffered.
    let _ = writeln!(std::io::stderr(), "portwarden: {why}");
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no more is known")
}

#[cfg(test)]
mod tests {
    use super::panic_text;

    #[test]
    fn a_panic_says_what_it_was_made_with() {
        let said = |panic: fn()| {
            let caught = std::panic::catch_unwind(panic).expect_err("it panics");
            panic_text(&*caught).to_string()
        };
        assert_eq!(said(|| panic!("plain")), "plain");
        assert_eq!(said(|| panic!("with {}", 7)), "with 7");
        assert_eq!(said(|| std::panic::panic_any(7)), "no more is known");
    }

    #[test]
    fn the_symbol_is_ours() {
        super::verify().unwrap();
    }
}
