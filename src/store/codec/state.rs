//! A state as blocks of records, as snapshots and backups keep it: written by several threads, read by one.

use std::num::NonZero;
use std::sync::{Arc, Mutex, mpsc};
use std::{mem, thread};

use super::{CodecError, Kind, append, decode_part, v1};
use crate::blocking::keeps_inline;
use crate::core::{Allocation, FEATURE_LEVEL, Restore, State};
use crate::lock::guard;

/// Allocations that a thread encodes at one go.
const TURN: usize = 2048;
/// Blocks that it hands over at a time: each time wakes the writer.
const PORTION_BLOCKS: usize = 4;
/// Portions of each thread that may wait to be written.
const PORTIONS_AHEAD: usize = 2;
/// Most threads that encode one state.
const ENCODERS_MAX: usize = 4;
/// They take what processor time others leave: beside a busy thread, a tenth of a core.
const ENCODERS_NICE: i32 = 10;

/// Writes a state as blocks of records, each a value of its own of about `block_bytes`: a header,
/// the leases, the workers, the allocations, the departures, and then the members of the cluster.
/// The blocks are the same whatever the number of cores.
pub fn encode_state<E>(
    state: &State,
    block_bytes: usize,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut blocks = Blocks::new(block_bytes, &mut sink);
    blocks.add(v1::records_before(state))?;
    if state.allocation_count() <= TURN {
        blocks.add(v1::records_of(&state.allocations_after(None).collect::<Vec<_>>()))?;
    } else {
        blocks.cut()?;
        encode_allocations(state, block_bytes, !keeps_inline(), &mut blocks.sink)?;
    }
    blocks.add(v1::records_after(state))?;
    blocks.cut()
}

/// Gathers records into blocks.
struct Blocks<S> {
    block: Vec<u8>,
    block_bytes: usize,
    sink: S,
}

impl<E, S: FnMut(&[u8]) -> Result<(), E>> Blocks<S> {
    fn new(block_bytes: usize, sink: S) -> Self {
        Blocks { block: Vec::with_capacity(2 * block_bytes), block_bytes, sink }
    }

    fn add<'a>(&mut self, mut records: impl Iterator<Item = v1::Record<'a>>) -> Result<(), E> {
        records.try_for_each(|record| {
            if self.block.is_empty() {
                self.block.extend(Kind::SnapshotRecord.begin());
            }
            append(record, &mut self.block);
            if self.block.len() >= self.block_bytes { self.cut() } else { Ok(()) }
        })
    }

    /// What was gathered is a block, if there is any.
    fn cut(&mut self) -> Result<(), E> {
        if !self.block.is_empty() {
            (self.sink)(&self.block)?;
            self.block.clear();
        }
        Ok(())
    }
}

/// Threads take turns, whoever is free the next one; what they encode is written in the order of the
/// turns. Where there are no threads, this one does it all.
fn encode_allocations<E>(
    state: &State,
    block_bytes: usize,
    on_threads: bool,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = if on_threads { cores.min(ENCODERS_MAX) } else { 0 };
    let rest = Mutex::new(state.allocations_after(None));
    let next_turn = |rest: &mut dyn Iterator<Item = _>| rest.take(TURN).collect::<Vec<_>>();
    thread::scope(|scope| {
        let (took, takers) = mpsc::channel();
        let begin = |taker: usize| {
            let (done, portions) = mpsc::sync_channel(PORTIONS_AHEAD);
            let (rest, took) = (&rest, took.clone());
            let run = move || {
                // Of this thread alone. Where it is refused, others wait a little more.
                let _ = rustix::process::nice(ENCODERS_NICE);
                // A turn, and that it is taken, before anybody else takes one.
                let take = || {
                    let mut rest = guard(rest);
                    let turn = next_turn(&mut *rest);
                    (!turn.is_empty() && took.send(taker).is_ok()).then_some(turn)
                };
                // Once nobody writes them any more, that was an error.
                while let Some(turn) = take()
                    && send_turn(&turn, block_bytes, &done).is_ok()
                {}
            };
            let thread = thread::Builder::new().name("encoder".into());
            thread.spawn_scoped(scope, run).is_ok().then_some(portions)
        };
        let encoders: Vec<_> = (0..threads).map_while(begin).collect();
        drop(took);
        for taker in takers {
            for Portion { blocks, ends_turn } in &encoders[taker] {
                blocks.iter().try_for_each(|block| sink(block))?;
                if ends_turn {
                    break;
                }
            }
        }
        // What no thread took.
        loop {
            let turn = next_turn(&mut *guard(&rest));
            if turn.is_empty() {
                return Ok(());
            }
            encode_turn(&turn, block_bytes, &mut sink)?;
        }
    })
}

fn encode_turn<E>(
    turn: &[&Arc<Allocation>],
    block_bytes: usize,
    sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut blocks = Blocks::new(block_bytes, sink);
    blocks.add(v1::records_of(turn))?;
    blocks.cut()
}

/// Blocks of a turn.
#[derive(Default)]
struct Portion {
    blocks: Vec<Vec<u8>>,
    ends_turn: bool,
}

/// Fails where nobody takes them.
fn send_turn(
    turn: &[&Arc<Allocation>],
    block_bytes: usize,
    to: &mpsc::SyncSender<Portion>,
) -> Result<(), mpsc::SendError<Portion>> {
    let mut portion = Portion::default();
    encode_turn(turn, block_bytes, |block| {
        portion.blocks.push(block.to_vec());
        match portion.blocks.len() {
            PORTION_BLOCKS => to.send(mem::take(&mut portion)),
            _ => Ok(()),
        }
    })?;
    to.send(Portion { ends_turn: true, ..portion })
}

/// Reads the blocks of [`encode_state`] back, in their order.
#[derive(Debug, Default)]
pub struct StateDecoder {
    progress: Option<v1::Progress>,
}

impl StateDecoder {
    pub fn block(&mut self, bytes: &[u8]) -> Result<(), CodecError> {
        let kind = Kind::SnapshotRecord;
        let mut rest = kind.open(bytes)?;
        while !rest.is_empty() {
            let record: v1::Record<'_>;
            (record, rest) = decode_part(kind, rest)?;
            if let Some(found) = record.feature_level().filter(|level| *level > FEATURE_LEVEL) {
                return Err(CodecError::FeatureLevel { found, known: FEATURE_LEVEL });
            }
            v1::take_record(&mut self.progress, record).map_err(|why| kind.malformed(why))?;
        }
        Ok(())
    }

    /// The state, complete and with every invariant checked.
    pub fn finish(self) -> Result<State, CodecError> {
        let kind = Kind::SnapshotRecord;
        let progress = self.progress.ok_or_else(|| kind.malformed("the header is missing"))?;
        let restore: Restore = progress.complete().map_err(|why| kind.malformed(why))?;
        restore.finish().map_err(|why| kind.malformed(why))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::core::apply;
    use crate::core::tests::make::{Ask as _, ORIGIN, allocate, claim, register, spec};

    /// One worker with so many allocations.
    fn state(allocations: u32) -> State {
        let named = |i| allocate(&[claim(&format!("a{i}"), "w").count(1)]);
        let registered = register("w", spec(&[("s", 1, 9999)], &[]));
        let mut state = State::default();
        for command in std::iter::once(registered).chain((0..allocations).map(named)) {
            apply(&mut state, &ORIGIN, &command).0.outcome.unwrap();
        }
        state
    }

    #[test]
    fn with_and_without_threads_the_blocks_are_the_same() {
        let turn = TURN as u32;
        for allocations in [1, turn, turn + 1, 4 * turn + 5] {
            let state = state(allocations);
            let blocks = |on_threads| {
                let mut all = Vec::new();
                let keep = |block: &[u8]| {
                    all.push(block.to_vec());
                    Ok::<_, Infallible>(())
                };
                let Ok(()) = encode_allocations(&state, 4000, on_threads, keep);
                all
            };
            let here = blocks(false);
            assert!(here.len() as u32 >= allocations.div_ceil(turn));
            assert!(here == blocks(true), "{allocations} allocations");
        }
    }

    #[test]
    fn the_threads_end_with_the_one_who_writes() {
        let state = state(4 * TURN as u32);
        let mut left = 3;
        let result = encode_allocations(&state, 4000, true, |_: &[u8]| {
            left -= 1;
            if left > 0 { Ok(()) } else { Err("no room") }
        });
        assert_eq!((result, left), (Err("no room"), 0));
    }
}
