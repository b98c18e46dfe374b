//! Real processes, real sockets, real disk: what a user of the binary sees.

mod agreement;
mod attacks;
mod backup;
mod bootstrap;
mod cli;
mod compaction;
mod damage;
mod durability;
mod field_failures;
mod forgetful;
mod forgetting;
mod grpc;
mod hostile;
mod identity;
mod lifecycle;
mod load;
mod members;
mod monitoring;
mod outcomes;
mod pause;
mod refusals;
mod space;
mod support;
mod survival;
mod wire;
