//! Time and randomness of the whole process, made repeatable.
//!
//! Everything above the C library gets both from two of its functions: `std::time::Instant` and
//! `SystemTime` from `clock_gettime`; the keys of `HashMap`, uuids, `rand::rng` and the seeds of
//! tokio's runtimes from `getrandom`. Both are defined here anew, so that the linker resolves every
//! call of the binary to them, whichever crate it is in. Once [`close`] was called, time is what the
//! simulation says, and random bytes come from a generator with the run's seed.
//!
//! - There is one thread, and a process for each run.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use libc::{c_int, c_uint, c_void, clockid_t, size_t, ssize_t, timespec};

static CLOSED: AtomicBool = AtomicBool::new(false);
static NOW: AtomicU64 = AtomicU64::new(0);
static RANDOM: AtomicU64 = AtomicU64::new(0);

/// What the clock on the wall shows when a run begins, in seconds since 1970.
const WALL_BEGINS: i64 = 1_700_000_000;
/// What the monotonic clock shows then: far from zero, as on a machine that has been up.
const MONOTONIC_BEGINS: i64 = 100_000;
const NANOS: u64 = 1_000_000_000;

thread_local! {
    /// How far the wall clock of the host whose turn it is goes wrong, in seconds.
    static WALL_SKEW: Cell<i64> = const { Cell::new(0) };
}

/// From now on nothing that is random or of the host's clock reaches this process.
pub fn close(seed: u64) {
    RANDOM.store(seed, Ordering::Relaxed);
    CLOSED.store(true, Ordering::Relaxed);
}

/// Simulated time since the beginning.
pub fn set_now(now: Duration) {
    NOW.store(now.as_nanos() as u64, Ordering::Relaxed);
}

pub fn set_wall_skew(seconds: i64) {
    WALL_SKEW.set(seconds);
}

/// SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", 2014).
fn next_random() -> u64 {
    let state = RANDOM.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// In place of the C library's.
///
/// # Safety
///
/// `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut c_void, length: size_t, flags: c_uint) -> ssize_t {
    if !CLOSED.load(Ordering::Relaxed) {
        // SAFETY: as the caller promised; the kernel writes `length` bytes at most.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as ssize_t };
    }
    // SAFETY: as the caller promised.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&next_random().to_le_bytes()[..chunk.len()]);
    }
    length as ssize_t
}

/// In place of the C library's. Every call is a little later than the one before it.
///
/// # Safety
///
/// `time` has room for one `timespec`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    if !CLOSED.load(Ordering::Relaxed) {
        // SAFETY: as the caller promised.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as c_int };
    }
    let now = NOW.fetch_add(1, Ordering::Relaxed);
    let begins = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => WALL_BEGINS + WALL_SKEW.get(),
        _ => MONOTONIC_BEGINS,
    };
    let value = timespec { tv_sec: begins + (now / NANOS) as i64, tv_nsec: (now % NANOS) as i64 };
    // SAFETY: as the caller promised.
    unsafe { time.write(value) };
    0
}

/// The host's own clock, whatever the process is told.
pub fn real_now() -> Duration {
    real(libc::CLOCK_MONOTONIC)
}

/// What this process has had of a processor: how long a run took, whatever else the host does.
pub fn processor_time() -> Duration {
    real(libc::CLOCK_PROCESS_CPUTIME_ID)
}

fn real(clock: clockid_t) -> Duration {
    let mut time = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: there is room for one.
    unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
