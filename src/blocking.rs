//! What blocks on the disk, or takes long: beside the runtime, so that nothing waits for it that need
//! not.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Handle;
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

/// What takes long to free, as an old copy of the table does: all that changed since is in it alone. Whoever
/// lets go of it does not wait for that.
pub struct FreedAside<T: Send + 'static>(Option<T>);

impl<T: Send> From<T> for FreedAside<T> {
    fn from(value: T) -> Self {
        FreedAside(Some(value))
    }
}

impl<T: Send> Deref for FreedAside<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().unwrap_or_else(|| unreachable!("it is there until it is dropped"))
    }
}

impl<T: Send> Drop for FreedAside<T> {
    fn drop(&mut self) {
        let value = self.0.take();
        if Handle::try_current().is_ok() {
            spawn_blocking(move || drop(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::thread::{ThreadId, current};

    struct Tells(Sender<ThreadId>);

    impl Drop for Tells {
        fn drop(&mut self) {
            self.0.send(current().id()).unwrap();
        }
    }

    fn tells() -> (FreedAside<Tells>, Receiver<ThreadId>) {
        let (tell, told) = channel();
        (Tells(tell).into(), told)
    }

    #[tokio::test]
    async fn who_lets_go_of_it_does_not_free_it() {
        let (value, told) = tells();
        drop(value);
        assert_ne!(told.recv().unwrap(), current().id());
    }

    #[test]
    fn without_a_runtime_it_is_freed_at_once() {
        let (value, told) = tells();
        drop(value);
        assert_eq!(told.try_recv().unwrap(), current().id());
    }
}
