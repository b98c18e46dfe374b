//! What blocks on the disk, or takes long: beside the runtime, so that nothing waits for it that need
//! not.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::{JoinError, JoinHandle};

static INLINE: AtomicBool = AtomicBool::new(false);

/// From now on nothing leaves the runtime's own thread, in the whole process. For simulations: a
/// thread's pace is not repeatable.
pub fn keep_inline() {
    INLINE.store(true, Ordering::Relaxed);
}

/// Whether that was said.
pub fn keeps_inline() -> bool {
    INLINE.load(Ordering::Relaxed)
}

/// Runs it on a thread for such work. It goes on where nobody waits for it.
pub fn spawn_blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    match keeps_inline() {
        true => tokio::spawn(async move { work() }),
        false => tokio::task::spawn_blocking(work),
    }
}

/// The same, waited for. An error: it panicked, or the runtime ends.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    spawn_blocking(work).await
}
