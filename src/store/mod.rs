//! Durable things: the Raft log and the vote, snapshots, and the identity of a data directory.
//!
//! ```text
//! DATA_DIR/LOCK         held while a process uses the directory
//! DATA_DIR/identity     node id, incarnation, cluster id
//! DATA_DIR/log/         sled: entries, vote, committed and purged positions   (`log`)
//! DATA_DIR/log/journal  what is on its way to sled                            (`journal`)
//! DATA_DIR/log/mark     how far the log had come at least                     (`mark`)
//! DATA_DIR/snapshots/   one file a snapshot, the newest two                   (`snapshot`)
//! DATA_DIR/reserve      empty space for a node on a full disk                 (`space`)
//! ```
//!
//! The steady state: entries and votes go through one writer thread, which flushes once for all
//! that waits and then answers. Now and then the table is written to a snapshot file beside it, and
//! the log before the *older* of the two snapshots goes. The odd case: whatever cannot be read as
//! it was written, is missing, or does not meet, stops the start with a [`StoreError`] that names
//! the file; whatever cannot be written or synced ends the process ([`fatal`]).
//!
//! - Nothing is answered before it is on the disk; no sync is tried twice.
//! - Bytes on disk are written by [`codec`], never openraft's types or core's.
//! - The snapshots and the log meet: the log never begins after the end of the newest good snapshot.
//! - This module knows nothing of openraft; `raft` adapts it.
//!
//! All calls block on the disk, except where they are `async`. Threads, file times and randomness
//! that are not the runtime's are allowed here and nowhere above.

mod chunks;
pub mod codec;
mod coverage;
mod dir;
mod disk;
mod error;
mod journal;
mod log;
mod mark;
mod opening;
mod simulated;
mod snapshot;
mod space;
mod sync;

pub use dir::DataDir;
pub use error::StoreError;
pub use log::{Done, ENTRY_MAX_BYTES, LogRecord, LogStore};
pub use simulated::SimulatedDisk;
pub use snapshot::{Incoming, SnapshotFile, SnapshotStore, write_snapshot};
pub use space::{Reserve, free_bytes};
pub use sync::{FATAL_EXIT, exit_at_once, fatal, instead_of_exit, panic_text, sync_file_range};
