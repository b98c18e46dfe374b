//! What runs on a worker.

pub mod host;
mod processes;
mod ranges;
