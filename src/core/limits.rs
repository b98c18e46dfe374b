//! Every bound that the table puts on what it accepts, in one place.
//!
//! A value at its limit is accepted, limit + 1 is refused with an [`Invalid`](super::Invalid) that
//! names the field, the value and the limit. Limits that change what `apply` does are part of the
//! feature level (see [`State::feature_level`](super::State)).

/// Longest instance or worker name, in bytes (names are ASCII).
pub const NAME_MAX_BYTES: usize = 253;
/// Longest name of a range or of a port, in bytes.
pub const SHORT_NAME_MAX_BYTES: usize = 63;
/// Longest uid, in bytes.
pub const UID_MAX_BYTES: usize = 128;
/// Longest label key, in bytes.
pub const LABEL_KEY_MAX_BYTES: usize = 63;
/// Longest label value, in bytes; the empty value is allowed.
pub const LABEL_VALUE_MAX_BYTES: usize = 63;
/// Most labels on one worker or one claim.
pub const LABELS_MAX: usize = 32;
/// Longest selector text, in bytes.
pub const SELECTOR_MAX_BYTES: usize = 1024;
/// Most terms in one selector.
pub const SELECTOR_TERMS_MAX: usize = 16;
/// Most values in one `in (…)` or `notin (…)` term.
pub const SELECTOR_VALUES_MAX: usize = 32;
/// Longest worker address, in bytes.
pub const ADDRESS_MAX_BYTES: usize = 253;
/// Longest free text (reasons), in bytes.
pub const REASON_MAX_BYTES: usize = 256;
/// Most claims in one `Allocate`.
pub const CLAIMS_MAX: usize = 64;
/// Most port requests in one claim.
pub const PORT_REQUESTS_MAX: usize = 32;
/// Most ports that one claim may ask for, over all its requests.
pub const PORTS_PER_CLAIM_MAX: u32 = 256;
/// Most GPUs in one claim.
pub const GPUS_PER_CLAIM_MAX: usize = 64;
/// Most ranges on one worker.
pub const RANGES_MAX: usize = 16;
/// Most reserved ports on one worker.
pub const RESERVED_PORTS_MAX: usize = 1024;
/// Most GPUs on one worker.
pub const GPUS_PER_WORKER_MAX: usize = 64;
/// Highest GPU index on a worker.
pub const GPU_INDEX_MAX: u32 = 255;
/// Most memory of one GPU: 16 TiB.
pub const GPU_MEMORY_MAX_BYTES: u64 = 16 << 40;
/// Longest GPU UUID or model name, in bytes.
pub const GPU_TEXT_MAX_BYTES: usize = 128;
/// Most ports in one `Quarantine` or `LiftQuarantine`.
pub const QUARANTINE_PORTS_MAX: usize = 1024;
/// Most workers in the cluster.
pub const WORKERS_MAX: usize = 200_000;
/// Most live allocations in the cluster.
pub const ALLOCATIONS_MAX: usize = 4_000_000;
/// Most leases in the cluster.
pub const LEASES_MAX: usize = 1_000_000;
/// Most allocations on one lease: its end is one command.
pub const LEASE_ALLOCATIONS_MAX: usize = 4096;
/// Shortest time to live of a lease, and shortest confirm deadline, in milliseconds.
pub const SPAN_MIN_MS: u64 = 1_000;
/// Longest of both: 24 h.
pub const SPAN_MAX_MS: u64 = 86_400_000;
/// Longest cgroup path of a liveness handle, in bytes.
pub const CGROUP_MAX_BYTES: usize = 1024;
/// Shortest id of a container in a liveness handle, in hexadecimal digits.
pub const CONTAINER_ID_MIN_BYTES: usize = 12;
/// Longest, in the same.
pub const CONTAINER_ID_MAX_BYTES: usize = 64;
/// Reclaimed and forced-out names of which the table remembers when and why.
pub const DEPARTURES_MAX: usize = 10_000;
/// Workers that an explanation shows.
pub const EXPLAINED_WORKERS_MAX: usize = 100;
/// Port swaps that one allocation may go through before it is reclaimed.
pub const SWAPS_MAX: u32 = 32;

/// Workers that a selector claim looks at before it answers "nothing fits".
pub const PLACEMENT_CANDIDATES_MAX: usize = 1024;
/// Windows that the search for a band weighs against each other.
pub const BAND_WINDOWS_MAX: usize = 64;
