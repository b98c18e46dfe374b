//! What tells two runs apart: one number over all that happened, and when.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use sha2::{Digest as _, Sha256};

/// Entries written and committed, and leaders elected, step by step.
#[derive(Default)]
pub struct Trace(Sha256);

impl Trace {
    pub fn note(&mut self, now: Duration, news: &[String]) {
        for line in news {
            self.0.update(format!("{} {line}\n", now.as_micros()));
        }
    }

    /// With every answer that a client got, all that watchers were told, and all that was done to the
    /// cluster: the whole history.
    pub fn finish(mut self, history: &Path) -> std::io::Result<String> {
        self.0.update(std::fs::read(history)?);
        let mut hex = String::new();
        for byte in &self.0.finalize()[..16] {
            write!(hex, "{byte:02x}").expect("a string takes everything");
        }
        Ok(hex)
    }
}
