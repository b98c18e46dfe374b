//! What a seed decides before a run begins: how large everything is, how fast, and how bad.

use std::time::Duration;

use portwarden::node::Lifecycle;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::cluster::Settings;
use crate::nemesis::{self, Planned};
use crate::world::net::Quality;

/// How long faults go on, if it is not said.
pub const SECONDS: u64 = 30;

/// Longest time, after the last fault, until every node serves again.
pub const AVAILABLE_WITHIN: Duration = Duration::from_secs(20);

#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub seconds: u64,
    pub nodes: u64,
    pub settings: Settings,
    pub network: Quality,
    pub clients: u32,
    /// Clients are this much slower than those of real runs.
    pub pace: u32,
    /// Workers with an agent.
    pub sites: u32,
    /// Instances at a time on each.
    pub instances: u32,
    pub faults: Vec<Planned>,
    /// A backup is restored at the end.
    pub restores: bool,
}

impl Plan {
    pub fn of(seed: u64, seconds: u64) -> Plan {
        let mut rng = StdRng::seed_from_u64(seed);
        let millis = Duration::from_millis;
        let nodes = *[3, 3, 3, 5].choose(&mut rng).unwrap_or(&3);
        let lifecycle = Lifecycle {
            confirm_within: millis(rng.random_range(2_000..8_000)),
            zombie_after: millis(rng.random_range(2_000..5_000)),
            worker_lost_after: millis(rng.random_range(2_000..6_000)),
            quarantine: millis(rng.random_range(1_000..5_000)),
        };
        let settings = Settings {
            snapshot_every: *[20, 60, 200, 1000, 20_000].choose(&mut rng).unwrap_or(&60),
            checkpoint_every: *[10, 50, 200].choose(&mut rng).unwrap_or(&50),
            lifecycle,
            disk_latency: Duration::from_micros(rng.random_range(100..3_000)),
        };
        let delay_max = Duration::from_micros(rng.random_range(1_000..8_000));
        let network = Quality { delay_max, ..Quality::default() };
        let over = Duration::from_secs(seconds);
        Plan {
            seed,
            seconds,
            nodes,
            settings,
            network,
            clients: rng.random_range(6..=14),
            pace: *[4, 10, 25].choose(&mut rng).unwrap_or(&10),
            sites: rng.random_range(1..=2),
            instances: rng.random_range(2..=4),
            faults: nemesis::plan(&mut rng, over),
            restores: rng.random_bool(0.3),
        }
    }
}
