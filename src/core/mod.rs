//! The state machine: who holds which port and which part of which GPU.
//!
//! Pure: no clock, no I/O, no randomness, no floats, no iteration in hash order. Replicas that
//! apply the same commands hold the same [`State`]. In it, always:
//!
//! - a port of a worker is held by at most one allocation, and is then neither free nor
//!   quarantined; free + held + quarantined + reserved = managed, for every range;
//! - per GPU: held memory ≤ usable memory; an exclusive holder is alone; a GPU UUID belongs to one
//!   worker; a network namespace of a machine belongs to one worker;
//! - every allocation's worker, ports and GPUs exist and name it as their holder, its lease too
//!   while it is on one; what lingers is on none; every index is the inverse of its map;
//! - a name that is remembered as gone is not held;
//! - the revision never goes back; one changing command is one revision; a token is the revision
//!   of its grant, so that no (name, token) names two grants;
//! - replicas that applied the same prefix have equal digests.
//!
//! [`check_invariants`] checks them all.

// What is disallowed, and why: clippy.toml.
#![deny(clippy::disallowed_types, clippy::disallowed_methods, clippy::float_arithmetic)]

mod allocation;
mod anew;
mod apply;
mod claim;
mod command;
mod digest;
mod invariants;
pub mod limits;
mod name;
mod place;
mod ports;
mod selector;
mod slots;
mod state;
#[cfg(test)]
pub(crate) mod tests;
mod worker;

pub use allocation::*;
pub use anew::RESTORE_GAP;
pub use apply::apply;
pub use claim::*;
pub use command::*;
pub use digest::{Digest, digest};
pub use invariants::check_invariants;
pub use name::*;
pub use place::{Explanation, explain};
pub use ports::{Pool, Quarantine, Source, Taken};
pub use selector::{Selector, Term};
pub use state::{FEATURE_LEVEL, Restore, State};
pub use worker::*;
