//! What each port of a range is, and the queue of those that were freed.
//!
//! The queue runs through the slots of its ports, so that whoever changes a port finds all that changes
//! with it in the same few places. Slots lie in blocks, of which only those exist that have one. Where
//! they are few, the worker itself says where each is: what a command touches first comes from memory that no
//! cache has.

use std::sync::Arc;

use imbl::Vector;

use super::name::InstanceName;

/// Slots in a block: what is copied before a port changes that is shared with a view.
const BLOCK: usize = 32;

/// What a port is that was used before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Slot {
    Held(InstanceName),
    /// Free again.
    Freed(Place),
    Quarantined,
    Reserved,
}

/// A place in the queue of freed ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Rises from each to the one behind it.
    pub at: u64,
    ahead: Option<u16>,
    behind: Option<u16>,
}

/// A clone is O(1) and independent of the original.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slots {
    /// The port of the first slot.
    first: u16,
    /// As many as the highest port that was used needs.
    blocks: Vector<Option<Arc<Block>>>,
    /// Ends of the queue: longest free, and freed last.
    oldest: Option<u16>,
    newest: Option<u16>,
    freed: u32,
}

type Block = [Option<Slot>; BLOCK];

/// Of the block of a port that is so many after the first, and of its slot there.
fn place(after: u16) -> (usize, usize) {
    (usize::from(after) / BLOCK, usize::from(after) % BLOCK)
}

impl Slots {
    /// Of ports that were never used, from `first` on.
    pub fn new(first: u16) -> Self {
        Slots { first, blocks: Vector::new(), oldest: None, newest: None, freed: 0 }
    }

    /// `None`: the port was never used.
    pub fn get(&self, number: u16) -> Option<&Slot> {
        let (block, at) = place(number.checked_sub(self.first)?);
        self.blocks.get(block)?.as_ref()?[at].as_ref()
    }

    /// In order of number.
    pub fn iter(&self) -> impl Iterator<Item = (u16, &Slot)> {
        let first = usize::from(self.first);
        self.blocks.iter().enumerate().flat_map(move |(block, slots)| {
            let slots = slots.iter().flat_map(|slots| slots.iter()).enumerate();
            let used = slots.filter_map(|(at, slot)| Some((at, slot.as_ref()?)));
            used.map(move |(at, slot)| ((first + block * BLOCK + at) as u16, slot))
        })
    }

    /// What the port is from now on, in the place of what it was. Who was free leaves the queue.
    pub fn put(&mut self, number: u16, slot: Slot) -> Option<Slot> {
        let was = self.at(number).replace(slot);
        if let Some(Slot::Freed(place)) = was {
            self.leave(place);
        }
        was
    }

    /// Puts a port that is not free at the end of the queue. `at` is higher than any there.
    pub fn free(&mut self, number: u16, at: u64) -> Option<Slot> {
        let ahead = self.newest.replace(number);
        *self.end_behind(ahead) = Some(number);
        self.freed += 1;
        let was = self.at(number).replace(Slot::Freed(Place { at, ahead, behind: None }));
        debug_assert!(!matches!(was, Some(Slot::Freed(_))), "it waits already");
        was
    }

    /// The port that has been free longest, of those that were freed.
    pub fn oldest(&self) -> Option<u16> {
        self.oldest
    }

    /// The place of the port that was freed last, of those that are free.
    pub fn newest(&self) -> Option<u64> {
        self.newest.map(|number| self.place_of(number).at)
    }

    /// Ports that were freed, with their place, longest free first.
    pub fn queue(&self) -> impl ExactSizeIterator<Item = (u64, u16)> + '_ {
        let mut next = self.oldest;
        (0..self.freed).map(move |_| {
            let number = next.unwrap_or_else(|| unreachable!("they were counted"));
            let place = self.place_of(number);
            next = place.behind;
            (place.at, number)
        })
    }

    fn place_of(&self, number: u16) -> &Place {
        match self.get(number) {
            Some(Slot::Freed(place)) => place,
            other => unreachable!("port {number} waits in the queue, and is {other:?}"),
        }
    }

    fn at(&mut self, number: u16) -> &mut Option<Slot> {
        let (block, at) = place(number - self.first);
        while self.blocks.len() <= block {
            self.blocks.push_back(None);
        }
        let block = self.blocks[block].get_or_insert_with(|| Arc::new([const { None }; BLOCK]));
        &mut Arc::make_mut(block)[at]
    }

    fn leave(&mut self, place: Place) {
        *self.end_behind(place.ahead) = place.behind;
        *self.end_ahead(place.behind) = place.ahead;
        self.freed -= 1;
    }

    /// Who stands behind a port; `None`: at the head of the queue.
    fn end_behind(&mut self, number: Option<u16>) -> &mut Option<u16> {
        match number {
            Some(number) => &mut self.waiting(number).behind,
            None => &mut self.oldest,
        }
    }

    fn end_ahead(&mut self, number: Option<u16>) -> &mut Option<u16> {
        match number {
            Some(number) => &mut self.waiting(number).ahead,
            None => &mut self.newest,
        }
    }

    fn waiting(&mut self, number: u16) -> &mut Place {
        match self.at(number) {
            Some(Slot::Freed(place)) => place,
            other => unreachable!("port {number} waits in the queue, and is {other:?}"),
        }
    }

    /// The queue's own invariants; the message names what is wrong.
    pub fn check(&self) -> Result<(), String> {
        let (mut ahead, mut last_at, mut next) = (None, 0, self.oldest);
        for _ in 0..self.freed {
            let place = match next.map(|number| (number, self.get(number))) {
                Some((number, Some(Slot::Freed(place)))) if place.ahead == ahead => {
                    ahead = Some(number);
                    place
                }
                other => return Err(format!("{other:?} stands behind {ahead:?} in the queue")),
            };
            if place.at <= last_at {
                return Err(format!("place {} stands behind {last_at} in the queue", place.at));
            }
            (last_at, next) = (place.at, place.behind);
        }
        if next.is_some() || self.newest != ahead {
            return Err("the queue of freed ports does not end where it should".into());
        }
        let queued = self.iter().filter(|(_, slot)| matches!(slot, Slot::Freed(_))).count();
        if queued != self.freed as usize {
            return Err(format!("{queued} ports were freed, {} are in the queue", self.freed));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_leaves_the_queue_closes_the_gap() {
        let mut slots = Slots::new(1);
        let numbers = [40_000, 7, 65_535, 40_001, 1];
        for (at, number) in (1..).zip(numbers) {
            assert_eq!(slots.free(number, at), None);
        }
        let order = |slots: &Slots| slots.queue().map(|(_, number)| number).collect::<Vec<_>>();
        assert_eq!(order(&slots), numbers);
        let view = slots.clone();
        for (number, left) in [
            (65_535, &[40_000, 7, 40_001, 1][..]),
            (40_000, &[7, 40_001, 1]),
            (1, &[7, 40_001]),
            (7, &[40_001]),
            (40_001, &[]),
        ] {
            assert!(matches!(slots.put(number, Slot::Reserved), Some(Slot::Freed(_))));
            slots.check().unwrap();
            assert_eq!(order(&slots), left);
            assert_eq!(slots.oldest(), left.first().copied());
        }
        assert_eq!(slots.free(7, 9), Some(Slot::Reserved));
        assert_eq!(slots.queue().collect::<Vec<_>>(), [(9, 7)]);
        assert_eq!(slots.iter().map(|(number, _)| number).collect::<Vec<_>>(), {
            let mut sorted = numbers;
            sorted.sort();
            sorted
        });
        assert_eq!(order(&view), numbers, "a view stays what it was");
        view.check().unwrap();
    }
}
