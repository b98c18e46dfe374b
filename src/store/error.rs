//! What can be wrong with a data directory, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use super::codec::{CodecError, Position};

/// Every variant names the file it speaks of and the way out.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{}: {what}: {source}", .path.display())]
    Io { path: PathBuf, what: &'static str, source: io::Error },
    #[error("{} is in use by process {holder}; stop that process, or start this node on a data directory of its own", .path.display())]
    Locked { path: PathBuf, holder: String },
    #[error("{} is the data directory of node {held}, not of node {given}; start it with --id {held}, or give node {given} a directory of its own", .path.display())]
    WrongNode { path: PathBuf, held: u64, given: u64 },
    #[error("{} belongs to cluster {held} and not to {given}; a node never changes its cluster: start it on an empty data directory under a new id", .path.display())]
    WrongCluster { path: PathBuf, held: String, given: String },
    /// The file says something that was never written.
    #[error("{}: {what}; this node must not go on under its id: remove it from the cluster and let it join on an empty data directory under a new one", .path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("{}: {what} has format version {found}, this build reads {supported}; start the build that wrote it, or a newer one", .path.display())]
    Version { path: PathBuf, what: &'static str, found: u32, supported: u32 },
    #[error(
        "the cluster has feature level {found}, this build knows 1 to {known}; start the build that the other nodes run, or a newer one"
    )]
    FeatureLevel { found: u32, known: u32 },
    #[error("{}: the log begins after entry {purged}, but {}; the entries between are lost: remove this node from the cluster and let it join on an empty data directory under a new id",
        .path.display(), describe_newest(.newest))]
    Gap { path: PathBuf, purged: Position, newest: Option<Position> },
    /// A caller broke the contract of the log: nothing was written.
    #[error("{}: {what}", .path.display())]
    Misuse { path: PathBuf, what: String },
    #[error(
        "sync_file_range of this binary is not the one of portwarden::store::sync, so that flushes would not be durable; build it with the linker's defaults"
    )]
    NotDurable,
}

impl StoreError {
    /// There is no room: what failed may work once there is.
    pub fn is_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, StoreError::Io { source, .. }
            if matches!(source.kind(), StorageFull | QuotaExceeded))
    }

    /// For `map_err`: what was being done to which file.
    pub(super) fn io(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> StoreError {
        let path = path.to_path_buf();
        move |source| StoreError::Io { path, what, source }
    }

    pub(super) fn damaged(path: &Path, what: impl Into<String>) -> StoreError {
        StoreError::Damaged { path: path.to_path_buf(), what: what.into() }
    }

    pub(super) fn codec(path: &Path) -> impl FnOnce(CodecError) -> StoreError {
        let path = path.to_path_buf();
        move |error| match error {
            CodecError::Version { what, found, supported } => {
                StoreError::Version { path, what, found, supported }
            }
            CodecError::FeatureLevel { found, known } => StoreError::FeatureLevel { found, known },
            CodecError::Malformed { .. } => StoreError::Damaged { path, what: error.to_string() },
        }
    }

    pub(super) fn sled(path: &Path, what: &'static str) -> impl FnOnce(sled::Error) -> StoreError {
        let path = path.to_path_buf();
        move |error| match error {
            // Without a number it is no error of the system's, but of what was read.
            sled::Error::Io(source) if source.raw_os_error().is_some() => {
                StoreError::Io { path, what, source }
            }
            other => StoreError::Damaged { path, what: format!("{what}: {other}") },
        }
    }
}

impl From<StoreError> for io::Error {
    fn from(error: StoreError) -> io::Error {
        io::Error::other(error)
    }
}

fn describe_newest(newest: &Option<Position>) -> String {
    match newest {
        Some(at) => format!("the newest good snapshot ends at entry {at}"),
        None => "there is no good snapshot".into(),
    }
}
