//! The gRPC services that clients speak to.
//!
//! A request is parsed and checked at the edge ([`convert`]), goes through the one dispatcher
//! ([`dispatch`]) to the leader, and comes back as an answer or as a status whose details say what
//! a caller can do about it ([`errors`]). Listings go on at one revision ([`pages`]). This layer
//! holds no state of its own but the views of listings under way.
//!
//! To run it: [`Api::new`] over a node, [`Api::local_calls`] for the node's peers, [`serve`] for
//! clients. One `Api` (or its clones) must serve both.

mod address;
mod ahead;
mod allocator;
pub mod assembly;
mod cluster;
mod convert;
mod dispatch;
mod errors;
#[cfg(test)]
pub(crate) mod fake;
mod filter;
mod leases;
#[doc(hidden)]
pub mod meaning;
mod observe;
mod pages;
mod server;
mod session;
#[cfg(test)]
mod tests;
mod watch;
mod workers;

pub use address::check_host_port;
pub(crate) use convert::worker_spec;
pub use dispatch::{Api, Backend, CALLS_IN_FLIGHT_MAX};
pub use observe::{TIMEOUT_DEFAULT, TIMEOUT_MAX, code_name, describe_metrics};
pub use pages::{PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX};
pub use server::{ANSWER_MAX_BYTES, REQUEST_MAX_BYTES, Readiness, serve};
pub use session::SESSION_MESSAGES_AT_ONCE;
