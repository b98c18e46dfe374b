//! A closed loop: so many callers, each with one call under way, and what they saw.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

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
    /// Operations that it stands for: 1, or those of a batch.
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
        let micros = took.as_micros() as u64;
        if let Some(histogram) = self.by_kind.get_mut(done.kind) {
            histogram.saturating_record(micros);
            return Ok(());
        }
        let mut histogram = Histogram::new_with_bounds(1, LONGEST.as_micros() as u64, 3)?;
        histogram.saturating_record(micros);
        self.by_kind.insert(done.kind, histogram);
        Ok(())
    }

    fn add(&mut self, other: Measured) -> anyhow::Result<()> {
        for (kind, histogram) in other.by_kind {
            match self.by_kind.get_mut(kind) {
                Some(sum) => sum.add(histogram)?,
                None => drop(self.by_kind.insert(kind, histogram)),
            }
        }
        self.operations += other.operations;
        self.ports += other.ports;
        self.errors += other.errors;
        self.example_error = self.example_error.take().or(other.example_error);
        Ok(())
    }
}

/// Lets the callers loose, for `warm_up` and then until `over`. What ended while it was measured
/// counts.
pub async fn drive(
    workload: impl Into<String>,
    callers: Vec<Box<dyn Caller>>,
    warm_up: Duration,
    over: impl Future<Output = ()>,
) -> anyhow::Result<Report> {
    let (stage, staged) = watch::channel(Stage::WarmUp);
    let clients = callers.len() as u32;
    let mut running = JoinSet::new();
    for caller in callers {
        running.spawn(one_after_another(caller, staged.clone()));
    }
    tokio::time::sleep(warm_up).await;
    stage.send_replace(Stage::Measured);
    let began = Instant::now();
    over.await;
    let seconds = began.elapsed().as_secs_f64();
    stage.send_replace(Stage::Over);
    let mut all = Measured::default();
    while let Some(measured) = running.join_next().await {
        all.add(measured??)?;
    }
    let Measured { by_kind, operations, ports, errors, example_error } = all;
    let mut latency: BTreeMap<String, Latency> =
        by_kind.iter().map(|(kind, histogram)| (kind.to_string(), of(histogram))).collect();
    let mut sum = Histogram::new_with_bounds(1, LONGEST.as_micros() as u64, 3)?;
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    WarmUp,
    Measured,
    Over,
}

async fn one_after_another(
    mut caller: Box<dyn Caller>,
    stage: watch::Receiver<Stage>,
) -> anyhow::Result<Measured> {
    let mut measured = Measured::default();
    loop {
        let began = Instant::now();
        let result = caller.call().await;
        match (*stage.borrow(), result) {
            (Stage::Over, _) => return Ok(measured),
            (Stage::WarmUp, _) => {}
            (Stage::Measured, Ok(done)) => measured.record(done, began.elapsed())?,
            (Stage::Measured, Err(error)) => {
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
