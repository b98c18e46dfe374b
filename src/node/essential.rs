//! Tasks that a node cannot do without.

use std::panic::AssertUnwindSafe;

use futures::FutureExt as _;

use crate::store::{fatal, panic_text};

/// Runs a task beside the others. If it panics the process ends: a node that has lost one of them would
/// lead, vote or look ready, and do a part of its work no more.
pub(super) fn spawn_essential(name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(async move {
        if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
            fatal(&format!("{name} panicked"), &panic_text(&*panic));
        }
    });
}
