//! How sled is made and opened, so that a process that is killed leaves nothing that it cannot read.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use super::{StoreError, dir, panic_text};

/// sled's page cache, in bytes: recent entries are in memory here already.
const SLED_CACHE_BYTES: u64 = 32 << 20;

/// A process that ended may hold sled's lock a little longer; our own lock says that nobody else
/// does.
const OPEN_TRIES: u32 = 200;
const OPEN_PAUSE: Duration = Duration::from_millis(10);

/// Makes a log where there is none. sled writes its first files in steps, and cannot read what a
/// process leaves that ends between them: so they are made aside, and get their name when they are
/// whole.
pub(super) fn make(path: &Path) -> Result<(), StoreError> {
    if path.exists() {
        return Ok(());
    }
    let aside = path.with_extension("new");
    if aside.exists() {
        fs::remove_dir_all(&aside).map_err(StoreError::io(&aside, "cannot be removed"))?;
    }
    let db = open_sled(&aside)?;
    db.flush().map_err(StoreError::sled(&aside, "cannot be written"))?;
    drop(db);
    harden(&aside)?;
    fs::rename(&aside, path).map_err(StoreError::io(path, "cannot be put in place"))?;
    match path.parent() {
        Some(parent) => dir::sync_dir(parent),
        None => Ok(()),
    }
}

pub(super) fn open_sled(path: &Path) -> Result<sled::Db, StoreError> {
    let config = sled::Config::new()
        .path(path)
        .cache_capacity(SLED_CACHE_BYTES)
        .flush_every_ms(None)
        .mode(sled::Mode::HighThroughput);
    remove_unfinished(path)?;
    let mut tries = 0;
    loop {
        tries += 1;
        match config.open() {
            Err(sled::Error::Io(error)) if is_locked(&error) && tries < OPEN_TRIES => {
                std::thread::sleep(OPEN_PAUSE);
            }
            opened => return opened.map_err(StoreError::sled(path, "cannot be opened")),
        }
    }
}

/// Makes what sled wrote without a sync durable, and that it is there at all.
pub(super) fn harden(path: &Path) -> Result<(), StoreError> {
    let list = fs::read_dir(path).map_err(StoreError::io(path, "cannot be read"))?;
    for item in list {
        let item = item.map_err(StoreError::io(path, "cannot be read"))?.path();
        let sync = || File::open(&item)?.sync_all();
        sync().map_err(StoreError::io(&item, "cannot be synced"))?;
    }
    dir::sync_dir(path)?;
    path.parent().map_or(Ok(()), dir::sync_dir)
}

/// sled panics at some damage that it finds.
pub(super) fn catching<T>(
    path: &Path,
    read: impl FnOnce() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(read));
    caught.unwrap_or_else(|panic| {
        Err(StoreError::damaged(path, format!("it cannot be read: {}", panic_text(&*panic))))
    })
}

/// At every start sled writes what it found to `snap.….generating` and renames it. One that was cut
/// off is the newest by name, and sled 0.34 would take it for its own and refuse to open; the one
/// before it is still there.
fn remove_unfinished(path: &Path) -> Result<(), StoreError> {
    if !path.exists() {
        return Ok(());
    }
    let list = fs::read_dir(path).map_err(StoreError::io(path, "cannot be read"))?;
    for item in list {
        let file = item.map_err(StoreError::io(path, "cannot be read"))?.path();
        if file.extension().is_some_and(|extension| extension == "generating") {
            fs::remove_file(&file).map_err(StoreError::io(&file, "cannot be removed"))?;
        }
    }
    Ok(())
}

fn is_locked(error: &std::io::Error) -> bool {
    error.to_string().contains("could not acquire lock")
}
