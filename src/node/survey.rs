//! How full the table is: counted on a clone and beside everything else, for metrics and for `status`.
//! O(workers), which is why many who ask share one count, and a large table is counted once in
//! [`LARGE_EVERY`] at most.

use std::time::Duration;

use metrics::gauge;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::{Node, ticks};
use crate::blocking::blocking;
use crate::core::{Pool, Revision, State, WorkerName, WorkerPhase};

const EVERY: Duration = Duration::from_secs(5);
/// With more workers than this, a count is good for [`LARGE_EVERY`].
const SMALL_WORKERS: usize = 1000;
const LARGE_EVERY: Duration = Duration::from_secs(1);
/// A range of which less is free is nearly full: a tenth.
const NEARLY_FULL_DIVISOR: u32 = 10;

/// Counts over all workers, at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Survey {
    revision: Revision,
    /// In the order of [`WorkerPhase::ALL`].
    workers: [u64; WorkerPhase::ALL.len()],
    free: u64,
    held: u64,
    quarantined: u64,
    reserved: u64,
    full: Ranges,
    nearly_full: Ranges,
    gpu_bytes: u64,
    gpu_held_bytes: u64,
    /// Of each phase, the first by name.
    examples: [Option<WorkerName>; WorkerPhase::ALL.len()],
}

/// Some ranges, one of them by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Ranges {
    count: u64,
    example: Option<String>,
}

impl Ranges {
    fn add(&mut self, worker: &WorkerName, pool: &Pool) {
        self.count += 1;
        self.example.get_or_insert_with(|| format!("range {} of worker {worker}", pool.name));
    }

    fn problem(&self, how: &str) -> Option<String> {
        let example = self.example.as_ref()?;
        Some(match self.count {
            1 => format!("{example} is {how}"),
            count => format!("{count} ranges are {how}, {example} among them"),
        })
    }
}

impl Survey {
    fn of(state: &State) -> Survey {
        let mut survey = Survey { revision: state.revision, ..Survey::default() };
        for worker in state.workers_after(None) {
            if let Some(at) = WorkerPhase::ALL.iter().position(|phase| *phase == worker.phase) {
                survey.workers[at] += 1;
                survey.examples[at].get_or_insert_with(|| worker.name.clone());
            }
            for pool in &worker.pools {
                survey.free += u64::from(pool.free_count());
                survey.held += u64::from(pool.held_count());
                survey.quarantined += u64::from(pool.quarantined_count());
                survey.reserved += u64::from(pool.reserved_count());
                if pool.free_count() == 0 && pool.reserved_count() < pool.managed_count() {
                    survey.full.add(&worker.name, pool);
                } else if pool.free_count() < pool.managed_count() / NEARLY_FULL_DIVISOR {
                    survey.nearly_full.add(&worker.name, pool);
                }
            }
            for gpu in &worker.gpus {
                survey.gpu_bytes += gpu.memory_bytes;
                survey.gpu_held_bytes += gpu.memory_bytes - gpu.free_bytes();
            }
        }
        survey
    }

    /// What an operator should look at, in words.
    pub fn problems(&self) -> Vec<String> {
        let of_phase = |phase: WorkerPhase, what: &str| {
            let at = WorkerPhase::ALL.iter().position(|other| *other == phase)?;
            let example = self.examples[at].as_ref()?;
            Some(match self.workers[at] {
                1 => format!("worker {example} is {}: {what}", phase.name()),
                count => {
                    format!("{count} workers are {}, {example} among them: {what}", phase.name())
                }
            })
        };
        [
            of_phase(WorkerPhase::Lost, "its agent is silent, nothing new is placed there"),
            of_phase(
                WorkerPhase::Unverified,
                "it grants nothing until its agent reports or `worker verify` is run",
            ),
            self.full.problem("full"),
            self.nearly_full.problem("nearly full"),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    fn show(&self, node: &str) {
        let set = |name: &'static str, label: (&'static str, &'static str), value: u64| {
            let labels = [("node", node.to_string()), (label.0, label.1.to_string())];
            gauge!(name, &labels).set(value as f64);
        };
        for (phase, count) in WorkerPhase::ALL.iter().zip(self.workers) {
            set("portwarden_workers", ("phase", phase.name()), count);
        }
        for (state, count) in [
            ("free", self.free),
            ("held", self.held),
            ("quarantined", self.quarantined),
            ("reserved", self.reserved),
        ] {
            set("portwarden_ports", ("state", state), count);
        }
        set("portwarden_ranges", ("state", "full"), self.full.count);
        set("portwarden_ranges", ("state", "nearly_full"), self.nearly_full.count);
        set("portwarden_gpu_bytes", ("state", "held"), self.gpu_held_bytes);
        set("portwarden_gpu_bytes", ("state", "free"), self.gpu_bytes - self.gpu_held_bytes);
    }
}

/// The newest one, and when it was counted.
#[derive(Default)]
pub(super) struct Surveys(Mutex<(Survey, Option<Instant>)>);

impl Surveys {
    /// Of the table that `now` gives once it is this caller's turn. Who comes while it is counted waits
    /// for that.
    async fn of(&self, now: impl FnOnce() -> State) -> Survey {
        let mut newest = self.0.lock().await;
        let (known, at) = &*newest;
        let state = now();
        let large = state.worker_count() > SMALL_WORKERS;
        let rests = large && at.is_some_and(|at| at.elapsed() < LARGE_EVERY);
        if known.revision != state.revision
            && !rests
            && let Ok(survey) = blocking(move || Survey::of(&state)).await
        {
            *newest = (survey, Some(Instant::now()));
        }
        newest.0.clone()
    }
}

impl Node {
    /// Of this node's own copy.
    pub(super) async fn survey(&self) -> Survey {
        self.inner.surveys.of(|| self.table().state.clone()).await
    }
}

/// Shows how full the table is for as long as Raft runs.
pub(super) async fn report(node: Node) {
    let id = node.id().to_string();
    let mut every = ticks(EVERY);
    while node.runs() {
        every.tick().await;
        node.survey().await.show(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{
        Claim, Command, InstanceName, Labels, Millis, Origin, Placement, Port, PortRequest, Ports,
        RangeSpec, Uid, WorkerSpec, apply,
    };

    fn port(number: u64) -> Port {
        Port::new("port", number).unwrap()
    }

    fn done(state: &mut State, command: Command) {
        apply(state, &Origin::default(), &command).0.outcome.unwrap();
    }

    fn register(state: &mut State, name: &str, ports: u64) {
        let range = RangeSpec {
            name: "service".parse().unwrap(),
            first: port(40_000),
            last: port(40_000 + ports - 1),
        };
        let spec = WorkerSpec {
            address: "h".into(),
            labels: Labels::new(),
            ranges: vec![range],
            reserved: Default::default(),
            gpus: Vec::new(),
            identity: None,
        };
        done(state, Command::RegisterWorker { name: name.parse().unwrap(), spec });
    }

    fn take(state: &mut State, worker: &str, name: &str, ports: u32) {
        let claim = Claim {
            name: name.parse::<InstanceName>().unwrap(),
            uid: Uid::parse("u").unwrap(),
            placement: Placement::Worker(worker.parse().unwrap()),
            ports: vec![PortRequest { name: None, range: None, ports: Ports::Count(ports) }],
            gpus: None,
            lease: None,
            confirm_within: None,
            bound: true,
            labels: Labels::new(),
        };
        done(state, Command::allocate([claim], Millis(600_000)));
    }

    #[test]
    fn what_is_full_or_away_is_a_problem_with_an_example() {
        let mut state = State::default();
        register(&mut state, "a", 20);
        register(&mut state, "b", 20);
        register(&mut state, "c", 20);
        assert_eq!(Survey::of(&state).problems(), [""; 0]);
        take(&mut state, "a", "x", 20);
        take(&mut state, "b", "y", 19);
        let survey = Survey::of(&state);
        assert_eq!((survey.held, survey.free), (39, 21));
        assert_eq!(
            survey.problems(),
            ["range service of worker a is full", "range service of worker b is nearly full"]
        );
        take(&mut state, "b", "z", 1);
        let problems = Survey::of(&state).problems();
        assert_eq!(problems, ["2 ranges are full, range service of worker a among them"]);
    }
    #[tokio::test(start_paused = true)]
    async fn a_small_table_is_counted_as_it_is_and_a_large_one_now_and_then() {
        let surveys = Surveys::default();
        let mut state = State::default();
        register(&mut state, "w0", 1);
        assert_eq!(surveys.of(|| state.clone()).await.free, 1);
        register(&mut state, "w1", 1);
        assert_eq!(surveys.of(|| state.clone()).await.free, 2);
        (2..=SMALL_WORKERS).for_each(|i| register(&mut state, &format!("w{i}"), 1));
        assert_eq!(surveys.of(|| state.clone()).await.free, 2, "it was counted just now");
        tokio::time::advance(LARGE_EVERY).await;
        assert_eq!(surveys.of(|| state.clone()).await.free, 1 + SMALL_WORKERS as u64);
    }
}
