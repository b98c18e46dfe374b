//! A closed loop: so many callers, each with one call under way, and what they saw.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::lock::guard;

/// Longest call that is told apart from longer ones.
const LONGEST: Duration = Duration::from_secs(120);

/// One of the callers: makes one call after the other.
#[tonic::async_trait]
pub trait Caller: Send + 'static {
    async fn call(&mut self) -> Result<Done, String>;
}

/// What one call did.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Which of the caller's kinds of calls it was.
    pub kind: &'static str,
    /// Operations that it stands for: 1, or those of a batch. Of a gang, each claim is one.
    pub operations: u64,
    /// Ports that it was granted.
    pub ports: u64,
}

impl Done {
    pub fn one(kind: &'static str) -> Done {
        Done { kind, operations: 1, ports: 0 }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub workload: String,
    pub clients: u32,
    pub seconds: f64,
    pub operations: u64,
    pub operations_per_second: f64,
    /// Granted.
    pub ports_per_second: f64,
    pub errors: u64,
    /// One of them.
    pub example_error: Option<String>,
    /// Of whole calls, by kind, and of all (`all`).
    pub latency: BTreeMap<String, Latency>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Latency {
    pub calls: u64,
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
}

#[derive(Default)]
struct Measured {
    by_kind: BTreeMap<&'static str, Histogram<u64>>,
    operations: u64,
    ports: u64,
    errors: u64,
    example_error: Option<String>,
}

impl Measured {
    fn record(&mut self, done: Done, took: Duration) -> anyhow::Result<()> {
        self.operations += done.operations;
        self.ports += done.ports;
        let histogram = match self.by_kind.entry(done.kind) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(histogram()?),
        };
        histogram.saturating_record(took.as_micros() as u64);
        Ok(())
    }

    /// Forgets everything, but keeps the memory.
    fn begin(&mut self) {
        self.by_kind.values_mut().for_each(Histogram::reset);
        let by_kind = std::mem::take(&mut self.by_kind);
        *self = Measured { by_kind, ..Measured::default() };
    }
}

/// In microseconds.
fn histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, LONGEST.as_micros() as u64, 3)?)
}

/// Lets the callers loose, for `warm_up` and then until `over`. What ended while it was measured
/// counts.
pub async fn drive(
    workload: impl Into<String>,
    callers: Vec<Box<dyn Caller>>,
    warm_up: Duration,
    over: impl Future<Output = ()>,
) -> anyhow::Result<Report> {
    let clients = callers.len() as u32;
    // One for all: to make so large a thing for each caller takes the callers' processor for a moment.
    let measured = Arc::new(Mutex::new(Some(Measured::default())));
    let mut running = JoinSet::new();
    for caller in callers {
        running.spawn(one_after_another(caller, measured.clone()));
    }
    tokio::time::sleep(warm_up).await;
    guard(&measured).iter_mut().for_each(Measured::begin);
    let began = Instant::now();
    over.await;
    let seconds = began.elapsed().as_secs_f64();
    let all = guard(&measured).take();
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    let Measured { by_kind, operations, ports, errors, example_error } = all.unwrap_or_default();
    let mut latency: BTreeMap<String, Latency> =
        by_kind.iter().map(|(kind, histogram)| (kind.to_string(), of(histogram))).collect();
    let mut sum = histogram()?;
    for histogram in by_kind.values() {
        sum.add(histogram)?;
    }
    latency.insert("all".into(), of(&sum));
    Ok(Report {
        workload: workload.into(),
        clients,
        seconds,
        operations,
        operations_per_second: operations as f64 / seconds,
        ports_per_second: ports as f64 / seconds,
        errors,
        example_error,
        latency,
    })
}

/// Until what was measured is taken.
async fn one_after_another(
    mut caller: Box<dyn Caller>,
    measured: Arc<Mutex<Option<Measured>>>,
) -> anyhow::Result<()> {
    loop {
        let began = Instant::now();
        let result = caller.call().await;
        match (&mut *guard(&measured), result) {
            (None, _) => return Ok(()),
            (Some(measured), Ok(done)) => measured.record(done, began.elapsed())?,
            (Some(measured), Err(error)) => {
                measured.errors += 1;
                measured.example_error.get_or_insert(error);
            }
        }
    }
}

fn of(histogram: &Histogram<u64>) -> Latency {
    let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
    Latency {
        calls: histogram.len(),
        p50_ms: at(0.50),
        p90_ms: at(0.90),
        p99_ms: at(0.99),
        max_ms: histogram.max() as f64 / 1000.0,
    }
}
