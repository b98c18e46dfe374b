//! The id under which a call is told of in logs, on every node that it comes to.

use tokio::task::futures::TaskLocalFuture;

tokio::task_local! {
    static ID: String;
}

/// Runs a call under its id.
pub fn under<F: Future>(id: String, call: F) -> TaskLocalFuture<String, F> {
    ID.scope(id, call)
}

/// That of the call which is served; empty where none is.
pub fn id() -> String {
    ID.try_with(String::clone).unwrap_or_default()
}
