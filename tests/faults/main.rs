//! Runs of real processes under faults, and the checker of what they did: docs/testing.md.

mod checker;
mod history;
