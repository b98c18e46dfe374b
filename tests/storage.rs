//! The storage layer from outside: what openraft demands, what survives, what reaches the disk, and
//! what peers carry.

#[path = "storage/cluster.rs"]
mod cluster;
#[path = "storage/codec.rs"]
mod codec;
#[path = "storage/damage.rs"]
mod damage;
#[path = "storage/durable.rs"]
mod durable;
#[path = "storage/log.rs"]
mod log;
#[path = "storage/members.rs"]
mod members;
#[path = "storage/samples.rs"]
mod samples;
#[path = "storage/snapshots.rs"]
mod snapshots;
#[path = "storage/suite.rs"]
mod suite;
