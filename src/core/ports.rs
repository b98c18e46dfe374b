//! One range of managed ports: which are free, and in what order they are given.
//!
//! Every port of the range is in exactly one of four states: free, held, quarantined, reserved.
//! A free port was either never used, or waits in the queue of freed ports. Given out first are
//! the never-used ports in rising order, then the port that has been free longest, so that a freed
//! port goes to a new holder as late as can be (field failure gpustack-4063).
//!
//! All parts are persistent: cloning a pool is O(1) in the number of ports.

use std::sync::Arc;

use imbl::{OrdMap, Vector};

use super::invariants::COUNTER_MAX;
use super::limits::BAND_WINDOWS_MAX;
use super::name::{InstanceName, Port, RangeName, Revision};
use super::slots::{Slot, Slots};

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
    /// It is not in this range.
    OutOf(RangeName),
}

/// A named range and the state of its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    pub name: RangeName,
    pub(super) first: u16,
    pub(super) last: u16,
    /// What every port is, but those that were never used.
    slots: Slots,
    /// How many of them are held and reserved.
    held: u32,
    reserved: u32,
    /// Of those that are quarantined, why.
    quarantined: OrdMap<u16, Arc<Quarantine>>,
    /// One bit a port, set while free; bit 0 of word 0 is `first`.
    free_bits: Vector<u64>,
    /// No never-used port lies below this one. `u32`: it ends one past `last`.
    cursor: u32,
    /// Place of the port that is freed next.
    next_freed: u64,
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
        let free = |word| match managed % 64 {
            rest @ 1.. if word + 1 == words => (1 << rest) - 1,
            _ => u64::MAX,
        };
        let mut pool = Pool {
            name,
            first,
            last,
            slots: Slots::new(first),
            held: 0,
            reserved: 0,
            quarantined: OrdMap::new(),
            free_bits: (0..words).map(free).collect(),
            cursor: u32::from(first),
            next_freed: 1,
        };
        for port in reserved {
            if pool.is_free(port.get()) {
                pool.put(port.get(), Slot::Reserved);
            }
        }
        pool
    }

    /// Takes over what an older pool says of the ports that are in both: holders, quarantines and
    /// the order of freed ports. The ranges of a worker may be cut anew, so a port's past follows
    /// its number, not the name of its range. A port that is reserved by now stays reserved. The
    /// caller has checked that nothing held leaves its range.
    pub(super) fn inherit(&mut self, old: &Pool) {
        for (number, holder) in old.holders() {
            self.take(number, holder);
        }
        for (number, quarantine) in &old.quarantined {
            if self.is_free(*number) {
                self.put_quarantine(*number, quarantine.clone());
            }
        }
        for (_, number) in old.slots.queue() {
            if self.is_unused(number) {
                self.enqueue(number);
            }
        }
    }

    /// Rebuilds a pool, from one that was never used and what a snapshot keeps of it: its holders come
    /// from the allocations. Fails where two parts claim a port, or one is none of this range; cursor and
    /// counter are left to the invariants.
    pub fn restore(
        unused: Pool,
        (cursor, next_freed): (u32, u64),
        freed: impl IntoIterator<Item = (u64, u16)>,
        quarantined: impl IntoIterator<Item = (u16, Quarantine)>,
    ) -> Result<Pool, String> {
        let mut pool = Pool { cursor, next_freed, ..unused };
        for (number, quarantine) in quarantined {
            if !pool.is_unused(number) {
                return Err(format!("range {}: port {number} cannot be quarantined", pool.name));
            }
            pool.quarantine(number, quarantine);
        }
        let mut before = 0;
        for (at, number) in freed {
            if !pool.is_unused(number) || !(before + 1..next_freed).contains(&at) {
                let what = format!("port {number} cannot wait at place {at} of the freed");
                return Err(format!("range {}: {what}", pool.name));
            }
            pool.free_at(number, at);
            before = at;
        }
        Ok(pool)
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
        self.managed_count() - self.held - self.reserved - self.quarantined_count()
    }

    pub fn held_count(&self) -> u32 {
        self.held
    }

    pub fn quarantined_count(&self) -> u32 {
        self.quarantined.len() as u32
    }

    pub fn reserved_count(&self) -> u32 {
        self.reserved
    }

    pub fn contains(&self, number: u16) -> bool {
        (self.first..=self.last).contains(&number)
    }

    pub fn quarantines(&self) -> impl ExactSizeIterator<Item = (u16, &Quarantine)> {
        self.quarantined.iter().map(|(port, quarantine)| (*port, quarantine.as_ref()))
    }

    pub fn quarantine_of(&self, number: u16) -> Option<&Quarantine> {
        self.quarantined.get(&number).map(Arc::as_ref)
    }

    /// Freed ports with their place in the queue, longest free first.
    pub fn freed_order(&self) -> impl ExactSizeIterator<Item = (u64, u16)> + '_ {
        self.slots.queue()
    }

    /// Place in the range where the search for a never-used port goes on, and the next number of
    /// the freed queue: what a snapshot keeps beside [`Pool::freed_order`].
    pub fn cursors(&self) -> (u32, u64) {
        (self.cursor, self.next_freed)
    }

    /// Holders by port.
    pub fn holders(&self) -> impl Iterator<Item = (u16, &InstanceName)> {
        let held = self.slots.iter().filter_map(|(port, slot)| match slot {
            Slot::Held(holder) => Some((port, holder)),
            _ => None,
        });
        held.take(self.held as usize)
    }

    pub fn holder(&self, number: u16) -> Option<&InstanceName> {
        match self.slots.get(number) {
            Some(Slot::Held(holder)) => Some(holder),
            _ => None,
        }
    }

    pub fn is_free(&self, number: u16) -> bool {
        self.contains(number) && {
            let (word, bit) = self.place(number);
            self.free_bits[word] & bit != 0
        }
    }

    /// Is it free, and was it always?
    pub fn is_unused(&self, number: u16) -> bool {
        self.is_free(number) && self.slots.get(number).is_none()
    }

    /// Why this port cannot be given; `None` where it can.
    pub fn taken(&self, number: u16) -> Option<Taken> {
        match self.slots.get(number) {
            Some(Slot::Held(holder)) => Some(Taken::Held(holder.clone())),
            Some(Slot::Quarantined) => {
                let why = self.quarantine_of(number).map(|quarantine| quarantine.reason.clone());
                Some(Taken::Quarantined(why.unwrap_or_default()))
            }
            Some(Slot::Reserved) => Some(Taken::Reserved),
            Some(Slot::Freed(_)) => None,
            None => (!self.contains(number)).then(|| Taken::OutOf(self.name.clone())),
        }
    }

    /// Gives the next port: never used first, then the longest free. `None` where none is free.
    pub fn take_next(&mut self, holder: &InstanceName) -> Option<u16> {
        let number = self.next_unused().or_else(|| self.slots.oldest())?;
        self.take(number, holder);
        Some(number)
    }

    /// Gives this port. False, and nothing changes, where it is not free.
    pub fn take(&mut self, number: u16, holder: &InstanceName) -> bool {
        if !self.is_free(number) {
            return false;
        }
        self.put(number, Slot::Held(holder.clone()));
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
        debug_assert!(self.holder(number).is_some(), "only a held port is freed");
        self.enqueue(number);
    }

    /// Takes a port out of use, or says anew why it is. The caller deals with a holder, and has
    /// checked that it is not reserved.
    pub fn quarantine(&mut self, number: u16, quarantine: Quarantine) {
        self.put_quarantine(number, Arc::new(quarantine));
    }

    /// Puts a quarantined port back in use, at the end of the queue. False where it was not.
    pub fn lift(&mut self, number: u16) -> bool {
        let quarantined = self.quarantine_of(number).is_some();
        if quarantined {
            self.enqueue(number);
        }
        quarantined
    }

    fn place(&self, number: u16) -> (usize, u64) {
        let offset = usize::from(number - self.first);
        (offset / 64, 1 << (offset % 64))
    }

    /// From free to not free, and back.
    fn turn(&mut self, number: u16) {
        let (word, bit) = self.place(number);
        self.free_bits[word] ^= bit;
    }

    /// What a port is from now on, but free.
    fn put(&mut self, number: u16, slot: Slot) {
        self.count(&slot, 1);
        let was = self.slots.put(number, slot);
        if self.forget(number, was) {
            self.turn(number);
        }
    }

    /// Takes a port that is not free into the queue.
    fn free_at(&mut self, number: u16, at: u64) {
        let was = self.slots.free(number, at);
        if !self.forget(number, was) {
            self.turn(number);
        }
    }

    /// Takes what a port was out of the counts. Was it free?
    fn forget(&mut self, number: u16, was: Option<Slot>) -> bool {
        match was {
            None | Some(Slot::Freed(_)) => return true,
            Some(Slot::Quarantined) => drop(self.quarantined.remove(&number)),
            Some(slot) => self.count(&slot, -1),
        }
        false
    }

    fn put_quarantine(&mut self, number: u16, quarantine: Arc<Quarantine>) {
        self.put(number, Slot::Quarantined);
        self.quarantined.insert(number, quarantine);
    }

    fn count(&mut self, slot: &Slot, change: i32) {
        let count = match slot {
            Slot::Held(_) => &mut self.held,
            Slot::Reserved => &mut self.reserved,
            Slot::Quarantined | Slot::Freed(_) => return,
        };
        *count = count.wrapping_add_signed(change);
    }

    fn enqueue(&mut self, number: u16) {
        self.free_at(number, self.next_freed);
        self.next_freed += 1;
    }

    /// Moves the cursor to the lowest never-used port. Each step passes a port for good, so the
    /// cost over the life of a range is its size.
    fn next_unused(&mut self) -> Option<u16> {
        while self.cursor <= u32::from(self.last) {
            let number = self.cursor as u16;
            if self.is_unused(number) {
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
                .map(|number| match self.slots.get(number) {
                    Some(Slot::Freed(place)) => place.at,
                    _ => 0,
                })
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
        let mut counted = Pool { held: 0, reserved: 0, ..self.clone() };
        let mut quarantined = 0;
        for (number, slot) in self.slots.iter() {
            counted.count(slot, 1);
            if !self.contains(number) {
                return fail("a port outside the range".into());
            }
            if self.is_free(number) != matches!(slot, Slot::Freed(_)) {
                return fail(format!("port {number} is {slot:?}, its bit says otherwise"));
            }
            if *slot == Slot::Quarantined {
                quarantined += 1;
                if !self.quarantined.contains_key(&number) {
                    return fail(format!("port {number} is quarantined for nothing"));
                }
            }
        }
        if quarantined != self.quarantined.len() {
            return fail("a port has a quarantine, and is something else".into());
        }
        self.slots.check().or_else(fail)?;
        let counts = |pool: &Pool| [pool.held, pool.reserved];
        if counts(&counted) != counts(self) {
            return fail(format!(
                "[held, reserved] are {:?}, {:?} are counted",
                counts(&counted),
                counts(self)
            ));
        }
        for number in (self.first..=self.last).filter(|number| self.slots.get(*number).is_none()) {
            if !self.is_free(number) {
                return fail(format!("port {number} was never used and is not free"));
            }
            if u32::from(number) < self.cursor {
                return fail(format!("never-used port {number} lies below the cursor"));
            }
        }
        if !(u32::from(self.first)..=u32::from(self.last) + 1).contains(&self.cursor) {
            return fail(format!("the cursor {} is outside", self.cursor));
        }
        if self.slots.newest().is_some_and(|at| at >= self.next_freed) {
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
        for outside in [0, 6] {
            assert_eq!(p.taken(outside), Some(Taken::OutOf(p.name.clone())));
        }
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
