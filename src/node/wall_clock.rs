//! What the host's clock on the wall shows. People read it; nothing is decided by it.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::core::Millis;

pub(super) fn wall_clock() -> Millis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Millis(since.as_millis() as u64)
}
