//! The host's clocks.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

use crate::client::Clock;

/// Time since the boot, that of suspensions included: a lease goes on ending while the machine
/// sleeps.
pub fn boot_clock() -> Clock {
    Arc::new(|| {
        let now = clock_gettime(ClockId::Boottime);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
    })
}

/// What the clock on the wall shows, as Unix time in milliseconds. People read it; nothing is
/// decided by it.
pub fn wall_clock_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
