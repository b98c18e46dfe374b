//! Tasks that a node cannot do without.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures::FutureExt as _;

use crate::store::fatal;

/// Runs a task beside the others. If it panics the process ends: a node that has lost one of them would
/// lead, vote or look ready, and do a part of its work no more.
pub fn spawn_essential(name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(async move {
        if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
            fatal(&format!("{name} panicked"), &panic_text(&*panic));
        }
    });
}

/// What a panic said.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no more is known")
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
