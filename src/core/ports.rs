//! One range of managed ports: which are free, and in what order they are given.
//!
//! Every port of the range is in exactly one of four states: free, held, quarantined, reserved.
//! A free port was either never used, or waits in the queue of freed ports. Given out first are
//! the never-used ports in rising order, then the port that has been free longest, so that a freed
//! port goes to a new holder as late as can be (field failure gpustack-4063).
//!
//! All parts are persistent maps: cloning a pool is O(1) in the number of ports.

use imbl::{OrdMap, Vector};

use super::invariants::COUNTER_MAX;
use super::limits::BAND_WINDOWS_MAX;
use super::name::{InstanceName, Port, RangeName, Revision};

/// Why a port is not given, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantine {
    pub reason: String,
    pub source: Source,
    /// Revision at which the port was quarantined.
    pub since: Revision,
}

/// Whose word a quarantine rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// Lifted by an operator alone.
    Operator,
    /// A holder found the port in use.
    Conflict,
    /// An agent saw the port in use by nobody that the table knows.
    Observed,
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Source::Operator => "operator",
            Source::Conflict => "conflict",
            Source::Observed => "observed",
        }
    }
}

/// What stands in the way of one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Taken {
    Held(InstanceName),
    Quarantined(String),
    Reserved,
    /// Not a port of any range that was looked at.
    Unmanaged,
}

/// A named range and the state of its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    pub name: RangeName,
    pub(super) first: u16,
    pub(super) last: u16,
    /// One bit a port, set while free; bit 0 of word 0 is `first`.
    free_bits: Vector<u64>,
    free: u32,
    /// No never-used port lies below this one. `u32`: it ends one past `last`.
    pub(super) cursor: u32,
    /// Freed ports by the order in which they became free.
    pub(super) freed: OrdMap<u64, u16>,
    freed_at: OrdMap<u16, u64>,
    pub(super) next_freed: u64,
    pub(super) held: OrdMap<u16, InstanceName>,
    pub(super) quarantined: OrdMap<u16, Quarantine>,
    pub(super) reserved: OrdMap<u16, ()>,
}

impl Pool {
    /// A range that was never used. `reserved` may name ports outside it; those are ignored.
    pub fn new(
        name: RangeName,
        first: Port,
        last: Port,
        reserved: impl IntoIterator<Item = Port>,
    ) -> Self {
        let (first, last) = (first.get(), last.get());
        assert!(first <= last, "ranges are checked before they come here");
        let managed = u32::from(last - first) + 1;
        let words = managed.div_ceil(64);
        let mut pool = Pool {
            name,
            first,
            last,
            free_bits: std::iter::repeat_n(0, words as usize).collect(),
            free: 0,
            cursor: u32::from(first),
            freed: OrdMap::new(),
            freed_at: OrdMap::new(),
            next_freed: 1,
            held: OrdMap::new(),
            quarantined: OrdMap::new(),
            reserved: reserved
                .into_iter()
                .map(Port::get)
                .filter(|p| (first..=last).contains(p))
                .map(|p| (p, ()))
                .collect(),
        };
        for number in first..=last {
            if !pool.reserved.contains_key(&number) {
                pool.set_free(number, true);
            }
        }
        pool
    }

    /// Takes over what an older pool says of the ports that are in both: holders, quarantines and
    /// the order of freed ports. The ranges of a worker may be cut anew, so a port's past follows
    /// its number, not the name of its range. A port that is reserved by now stays reserved. The
    /// caller has checked that nothing held leaves its range.
    pub(super) fn inherit(&mut self, old: &Pool) {
        for (number, holder) in &old.held {
            self.take(*number, holder);
        }
        for (number, quarantine) in &old.quarantined {
            if self.is_free(*number) {
                self.quarantine(*number, quarantine.clone());
            }
        }
        for number in old.freed.values() {
            if self.is_free(*number) {
                self.enqueue(*number);
            }
        }
    }

    /// Rebuilds a pool from what a snapshot keeps of it: its holders come from the allocations.
    /// What does not fit the range is kept all the same, so that the invariants refuse it.
    pub fn restore(
        empty: Pool,
        cursor: u32,
        next_freed: u64,
        freed: impl IntoIterator<Item = (u64, u16)>,
        quarantined: impl IntoIterator<Item = (u16, Quarantine)>,
    ) -> Pool {
        let mut pool = empty;
        for (number, quarantine) in quarantined {
            if pool.is_free(number) {
                pool.unfree(number);
            }
            pool.quarantined.insert(number, quarantine);
        }
        for (at, number) in freed {
            pool.freed.insert(at, number);
            pool.freed_at.insert(number, at);
        }
        pool.cursor = cursor;
        pool.next_freed = next_freed;
        pool
    }

    pub fn first(&self) -> u16 {
        self.first
    }

    pub fn last(&self) -> u16 {
        self.last
    }

    pub fn managed_count(&self) -> u32 {
        u32::from(self.last - self.first) + 1
    }

    pub fn free_count(&self) -> u32 {
        self.free
    }

    pub fn held_count(&self) -> u32 {
        self.held.len() as u32
    }

    pub fn quarantined_count(&self) -> u32 {
        self.quarantined.len() as u32
    }

    pub fn reserved_count(&self) -> u32 {
        self.reserved.len() as u32
    }

    pub fn contains(&self, number: u16) -> bool {
        (self.first..=self.last).contains(&number)
    }

    pub fn quarantines(&self) -> impl Iterator<Item = (u16, &Quarantine)> {
        self.quarantined.iter().map(|(port, quarantine)| (*port, quarantine))
    }

    /// Freed ports with their place in the queue, longest free first.
    pub fn freed_order(&self) -> impl Iterator<Item = (u64, u16)> + '_ {
        self.freed.iter().map(|(at, port)| (*at, *port))
    }

    pub fn reserved_ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.reserved.keys().copied()
    }

    /// Place in the range where the search for a never-used port goes on, and the next number of
    /// the freed queue: what a snapshot keeps beside [`Pool::freed_order`].
    pub fn cursors(&self) -> (u32, u64) {
        (self.cursor, self.next_freed)
    }

    /// Holders by port.
    pub fn holders(&self) -> impl Iterator<Item = (u16, &InstanceName)> {
        self.held.iter().map(|(port, name)| (*port, name))
    }

    pub fn holder(&self, number: u16) -> Option<&InstanceName> {
        self.held.get(&number)
    }

    pub fn is_free(&self, number: u16) -> bool {
        self.contains(number) && {
            let (word, bit) = self.place(number);
            self.free_bits[word] & bit != 0
        }
    }

    /// Why this port cannot be given; `None` where it can.
    pub fn taken(&self, number: u16) -> Option<Taken> {
        if self.is_free(number) {
            None
        } else if let Some(holder) = self.held.get(&number) {
            Some(Taken::Held(holder.clone()))
        } else if let Some(quarantine) = self.quarantined.get(&number) {
            Some(Taken::Quarantined(quarantine.reason.clone()))
        } else if self.reserved.contains_key(&number) {
            Some(Taken::Reserved)
        } else {
            Some(Taken::Unmanaged)
        }
    }

    /// Gives the next port: never used first, then the longest free. `None` where none is free.
    pub fn take_next(&mut self, holder: &InstanceName) -> Option<u16> {
        let number = self.next_unused().or_else(|| self.freed.get_min().map(|(_, p)| *p))?;
        self.take(number, holder);
        Some(number)
    }

    /// Gives this port. False, and nothing changes, where it is not free.
    pub fn take(&mut self, number: u16, holder: &InstanceName) -> bool {
        if !self.is_free(number) {
            return false;
        }
        self.unfree(number);
        self.held.insert(number, holder.clone());
        true
    }

    /// Gives `count` ports in a row and returns the first. The windows weighed against each other
    /// are bounded; the one whose youngest freed port has been free longest wins, then the lowest.
    pub fn take_band(&mut self, count: u32, holder: &InstanceName) -> Option<u16> {
        let first = self.find_band(count)?;
        for number in first..=first + (count - 1) as u16 {
            self.take(number, holder);
        }
        Some(first)
    }

    /// The longest run of free ports, for the answer when no band fits. O(ports of the range).
    pub fn longest_run(&self) -> u32 {
        self.free_runs().map(|(_, length)| length).max().unwrap_or(0)
    }

    /// Takes a held port back into the queue of freed ports.
    pub fn free(&mut self, number: u16) {
        let was = self.held.remove(&number);
        debug_assert!(was.is_some(), "only a held port is freed");
        self.set_free(number, true);
        self.enqueue(number);
    }

    /// Takes a port out of use, or says anew why it is. The caller deals with a holder, and has
    /// checked that it is not reserved.
    pub fn quarantine(&mut self, number: u16, quarantine: Quarantine) {
        if self.held.remove(&number).is_none() && self.is_free(number) {
            self.unfree(number);
        }
        self.quarantined.insert(number, quarantine);
    }

    /// Puts a quarantined port back in use, at the end of the queue. False where it was not.
    pub fn lift(&mut self, number: u16) -> bool {
        if self.quarantined.remove(&number).is_none() {
            return false;
        }
        self.set_free(number, true);
        self.enqueue(number);
        true
    }

    fn place(&self, number: u16) -> (usize, u64) {
        let offset = usize::from(number - self.first);
        (offset / 64, 1 << (offset % 64))
    }

    fn set_free(&mut self, number: u16, free: bool) {
        let (word, bit) = self.place(number);
        let word = &mut self.free_bits[word];
        debug_assert_eq!(*word & bit == 0, free, "port {number} changes state");
        *word ^= bit;
        self.free = if free { self.free + 1 } else { self.free - 1 };
    }

    fn unfree(&mut self, number: u16) {
        self.set_free(number, false);
        if let Some(at) = self.freed_at.remove(&number) {
            self.freed.remove(&at);
        }
    }

    fn enqueue(&mut self, number: u16) {
        self.freed.insert(self.next_freed, number);
        self.freed_at.insert(number, self.next_freed);
        self.next_freed += 1;
    }

    /// Moves the cursor to the lowest never-used port. Each step passes a port for good, so the
    /// cost over the life of a range is its size.
    fn next_unused(&mut self) -> Option<u16> {
        while self.cursor <= u32::from(self.last) {
            let number = self.cursor as u16;
            if self.is_free(number) && !self.freed_at.contains_key(&number) {
                return Some(number);
            }
            self.cursor += 1;
        }
        None
    }

    fn find_band(&self, count: u32) -> Option<u16> {
        let windows = self
            .free_runs()
            .filter(|(_, length)| *length >= count)
            .flat_map(|(first, length)| {
                (0..length / count).map(move |i| first + (i * count) as u16)
            })
            .take(BAND_WINDOWS_MAX);
        let mut best: Option<(u64, u16)> = None;
        for first in windows {
            let youngest = (first..=first + (count - 1) as u16)
                .map(|number| self.freed_at.get(&number).copied().unwrap_or(0))
                .max()
                .unwrap_or(0);
            if best.is_none_or(|(age, _)| youngest < age) {
                best = Some((youngest, first));
            }
            if youngest == 0 {
                break; // never used: nothing beats it
            }
        }
        best.map(|(_, first)| first)
    }

    /// Runs of free ports as (first, length), in rising order.
    fn free_runs(&self) -> impl Iterator<Item = (u16, u32)> + '_ {
        let mut next = u32::from(self.first);
        let end = u32::from(self.last) + 1;
        let bit = move |n: u32| -> (usize, u32) {
            let offset = n - u32::from(self.first);
            ((offset / 64) as usize, offset % 64)
        };
        // Skips whole words: a range is at most 1024 of them.
        let seek = move |mut at: u32, free: bool| -> u32 {
            while at < end {
                let (word, shift) = bit(at);
                let bits = if free { self.free_bits[word] } else { !self.free_bits[word] };
                match bits >> shift {
                    0 => at += 64 - shift,
                    rest => return (at + rest.trailing_zeros()).min(end),
                }
            }
            end
        };
        std::iter::from_fn(move || {
            let start = seek(next, true);
            if start >= end {
                return None;
            }
            next = seek(start, false);
            Some((start as u16, next - start))
        })
    }

    /// The pool's own invariants; the message names what is wrong.
    pub(super) fn check(&self) -> Result<(), String> {
        let fail = |what: String| Err(format!("range {}: {what}", self.name));
        let mut free = 0;
        for number in self.first..=self.last {
            let states = [
                self.is_free(number),
                self.held.contains_key(&number),
                self.quarantined.contains_key(&number),
                self.reserved.contains_key(&number),
            ];
            if states.iter().filter(|s| **s).count() != 1 {
                return fail(format!(
                    "port {number}: [free, held, quarantined, reserved] = {states:?}"
                ));
            }
            free += u32::from(states[0]);
            let queued = self.freed_at.get(&number);
            if queued.is_some() && !states[0] {
                return fail(format!("port {number} waits in the queue but is not free"));
            }
            if states[0] && queued.is_none() && u32::from(number) < self.cursor {
                return fail(format!("never-used port {number} lies below the cursor"));
            }
        }
        let outside = |n: &u16| !self.contains(*n);
        if self.held.keys().any(outside)
            || self.quarantined.keys().any(outside)
            || self.reserved.keys().any(outside)
            || self.freed_at.keys().any(outside)
        {
            return fail("a port outside the range".into());
        }
        if free != self.free {
            return fail(format!("{free} ports are free, {} are counted", self.free));
        }
        let inverse = self.freed.len() == self.freed_at.len()
            && self.freed.iter().all(|(at, port)| self.freed_at.get(port) == Some(at));
        if !inverse {
            return fail("the queue of freed ports and its index differ".into());
        }
        if !(u32::from(self.first)..=u32::from(self.last) + 1).contains(&self.cursor) {
            return fail(format!("the cursor {} is outside", self.cursor));
        }
        if self.freed.get_max().is_some_and(|(at, _)| *at >= self.next_freed) {
            return fail("the queue of freed ports runs ahead of its counter".into());
        }
        if self.next_freed > COUNTER_MAX {
            return fail("the counter of freed ports leaves no room".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(first: u64, last: u64, reserved: &[u64]) -> Pool {
        let port = |n| Port::new("port", n).unwrap();
        Pool::new(
            RangeName::parse("service").unwrap(),
            port(first),
            port(last),
            reserved.iter().map(|n| port(*n)),
        )
    }

    fn someone() -> InstanceName {
        InstanceName::parse("someone").unwrap()
    }

    fn quarantine(reason: &str) -> Quarantine {
        Quarantine { reason: reason.into(), source: Source::Observed, since: Revision(1) }
    }

    fn take_all(pool: &mut Pool) -> Vec<u16> {
        std::iter::from_fn(|| pool.take_next(&someone())).collect()
    }

    #[test]
    fn never_used_first_then_longest_free() {
        let mut p = pool(40000, 40003, &[]);
        assert_eq!(p.take_next(&someone()), Some(40000));
        assert_eq!(p.take_next(&someone()), Some(40001));
        p.free(40001);
        p.free(40000);
        assert_eq!(take_all(&mut p), [40002, 40003, 40001, 40000]);
        p.check().unwrap();
    }

    #[test]
    fn a_reserved_or_quarantined_port_is_passed_over() {
        let mut p = pool(1, 5, &[2, 60000]);
        p.quarantine(3, quarantine("sshd"));
        assert_eq!(p.taken(2), Some(Taken::Reserved));
        assert_eq!(p.taken(3), Some(Taken::Quarantined("sshd".into())));
        assert_eq!(p.taken(6), Some(Taken::Unmanaged));
        assert_eq!(take_all(&mut p), [1, 4, 5]);
        assert!(p.lift(3) && !p.lift(3));
        assert_eq!(take_all(&mut p), [3]);
        p.check().unwrap();
    }

    #[test]
    fn a_quarantined_port_may_be_quarantined_for_another_reason() {
        let mut p = pool(1, 3, &[]);
        p.quarantine(2, quarantine("seen"));
        p.quarantine(2, quarantine("kept"));
        p.check().unwrap();
        assert_eq!((p.free_count(), p.quarantined_count()), (2, 1));
        assert_eq!(p.taken(2), Some(Taken::Quarantined("kept".into())));
    }

    #[test]
    fn the_last_port_of_tcp_can_be_given_and_freed() {
        let mut p = pool(65535, 65535, &[]);
        assert_eq!(take_all(&mut p), [65535]);
        p.free(65535);
        assert_eq!(take_all(&mut p), [65535]);
        p.check().unwrap();
    }

    #[test]
    fn a_band_takes_the_run_that_has_been_free_longest() {
        let mut p = pool(100, 107, &[]);
        assert_eq!(p.take_band(4, &someone()), Some(100));
        assert_eq!(p.take_band(4, &someone()), Some(104));
        assert_eq!(p.take_band(1, &someone()), None);
        (104..=107).for_each(|n| p.free(n));
        (100..=103).for_each(|n| p.free(n));
        assert_eq!(p.take_band(4, &someone()), Some(104), "freed before 100 to 103");
        assert_eq!(p.longest_run(), 4);
        p.check().unwrap();
    }

    #[test]
    fn runs_cross_words_and_stop_at_the_end() {
        let mut p = pool(1, 200, &[]);
        p.take(130, &someone());
        assert_eq!(p.free_runs().collect::<Vec<_>>(), [(1, 129), (131, 70)]);
        assert_eq!(p.take_band(129, &someone()), Some(1));
        assert_eq!(p.longest_run(), 70);
        assert_eq!(pool(1, 65535, &[]).longest_run(), 65535);
    }

    #[test]
    fn a_wider_range_inherits_holders_quarantines_and_order() {
        let mut p = pool(10, 15, &[]);
        take_all(&mut p);
        p.free(12);
        p.free(11);
        p.quarantine(13, quarantine("x"));
        let mut grown = pool(9, 16, &[16]);
        grown.inherit(&p);
        grown.check().unwrap();
        assert_eq!(grown.holder(10), Some(&someone()));
        assert_eq!(take_all(&mut grown), [9, 12, 11]);
    }
}
