//! Once nothing is done to it any more, everything works again in time, and what everybody gave back
//! is free. No node ends that nobody ended.

use portwarden::api::meaning::Response;

use super::known;
use crate::history::{End, History, Nanos, Record};

pub fn check(history: &History) -> Vec<String> {
    let mut broken = Vec::new();
    let mut healed: Option<Nanos> = None;
    for record in &history.records {
        match record {
            Record::Healed { at } => healed = Some(*at),
            Record::Available { at } => {
                let within = history.header.available_within_ms * 1_000_000;
                if let Some(since) = healed.take().filter(|since| at - since > within) {
                    let took = (at - since) / 1_000_000;
                    broken.push(format!(
                        "it was available {took} ms after the last fault, not {} ms",
                        history.header.available_within_ms
                    ));
                }
            }
            Record::Ended { node, code, .. } => {
                broken.push(format!("node {node} ended by itself, with exit status {code}"));
            }
            _ => {}
        }
    }
    if healed.is_some() {
        broken.push("it was never available after the last fault".into());
    }
    let emptied = history.records.iter().find_map(|record| match record {
        Record::Emptied { at } => Some(*at),
        _ => None,
    });
    if let Some(emptied) = emptied {
        broken.extend(leaks(history, emptied));
    }
    broken
}

fn leaks(history: &History, emptied: Nanos) -> Vec<String> {
    let mut broken = Vec::new();
    for op in history.ops.iter().filter(|op| op.invoked > emptied) {
        let End::Ok(response) = &op.end else { continue };
        if known::stale(&op.request).is_some() {
            continue;
        }
        for held in known::allocations(response) {
            broken.push(format!("{} is still held (op {})", held.name, op.id));
        }
        let Response::GetWorker(r) = response else { continue };
        let Some(worker) = &r.worker else { continue };
        for range in &worker.ranges {
            let sum = range.free + range.reserved + range.quarantined_count;
            if range.held != 0 || sum != range.managed {
                broken.push(format!(
                    "range {} of {} has {} ports held and {sum} of {} otherwise (op {})",
                    range.name, worker.name, range.held, range.managed, op.id
                ));
            }
        }
        for gpu in worker.gpus.iter().filter(|gpu| gpu.held_bytes != 0) {
            let (index, held) = (gpu.index, gpu.held_bytes);
            broken.push(format!(
                "{held} bytes of GPU {index} of {} are held (op {})",
                worker.name, op.id
            ));
        }
    }
    broken
}
