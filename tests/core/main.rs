//! Tests of the core from outside: against a naive model, and against what it did before.

use portwarden::core::*;

mod golden;
#[allow(dead_code)] // shared with the unit tests of the core
#[path = "../../src/core/tests/make.rs"]
mod make;
mod model;
mod properties;

/// What came of a command, in words: what the model and the core must agree on.
fn answer(outcome: &Result<Outcome, Refusal>) -> String {
    let granted = |a: &Allocation| {
        let ports: Vec<_> = a.ports.iter().map(|p| p.number).collect();
        let gpus: Vec<_> = a.gpus.iter().map(|g| g.index).collect();
        let lease = a.lease.map_or(String::new(), |id| format!(" lease {id}"));
        format!(
            "{} on {} ports {ports:?} gpus {gpus:?} token {} version {} {}{lease}",
            a.name(),
            a.worker,
            a.token,
            a.version,
            a.phase.name()
        )
    };
    match outcome {
        Ok(Outcome::Worker(w)) => format!("worker {} {}", w.name, w.phase.name()),
        Ok(Outcome::WorkerRemoved { removed }) => format!("removed {removed}"),
        Ok(Outcome::Allocated { allocations, repeated }) => {
            let all: Vec<_> = allocations.iter().map(|a| granted(a)).collect();
            format!("{} {}", if *repeated { "repeated" } else { "granted" }, all.join("; "))
        }
        Ok(Outcome::Confirmed(a)) => format!("confirmed {}", granted(a)),
        Ok(Outcome::Attached(a)) => format!("attached {}", granted(a)),
        Ok(Outcome::Lingers(a)) => format!("lingers {}", granted(a)),
        Ok(Outcome::Lease(lease)) => format!("lease {}", lease.id),
        Ok(Outcome::LeaseEnded(lease)) => format!("ended {}", lease.is_some()),
        Ok(Outcome::Released(a)) => format!("released {}", a.is_some()),
        Ok(Outcome::Swapped(a)) => format!("swapped {}", granted(a)),
        Ok(Outcome::Reclaimed { allocation, .. }) => format!("reclaimed {}", allocation.name()),
        Ok(Outcome::Noted) => "noted".into(),
        Ok(Outcome::FeatureLevel(level)) => format!("level {level}"),
        Err(refusal) => {
            let debug = format!("{refusal:?}");
            let variant = debug.split(|c: char| !c.is_alphanumeric()).next();
            format!("refused {}", variant.unwrap_or_default())
        }
    }
}
