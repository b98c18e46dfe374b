//! Mutexes that go on where a holder panicked: what they guard is whole at every step.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
