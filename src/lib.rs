//! A replicated allocator of network ports and GPUs: no port of a worker and no byte of GPU memory
//! is ever given twice. The house and the way of one request through it: `docs/architecture.md`.

pub mod agent;
pub mod api;
pub mod blocking;
mod causes;
pub mod cli;
pub mod client;
pub mod connections;
pub mod core;
mod lock;
pub mod node;
#[cfg(all(planted, not(debug_assertions)))]
compile_error!(
    "PORTWARDEN_PLANTABLE is set: planted bugs are for tests, and this is no test build"
);
#[cfg(planted)]
pub mod planted;
pub mod proto;
pub mod raft;
mod request;
pub mod store;
