//! Everything that is made of text which a user wrote: for the fuzzers. None of it may panic.

use clap::Parser as _;

use super::{Cli, agent, allocate, parse, serve, worker};

/// A command line, as words.
pub fn command_line(text: &str) -> bool {
    let words = text.split_whitespace().take(64);
    Cli::try_parse_from(std::iter::once("portwarden").chain(words)).is_ok()
}

/// A `--config FILE`, of a node or of an agent.
pub fn config(text: &str) -> bool {
    serve::parses(text) | agent::parses(text)
}

/// An `allocate -f FILE`, or a `worker apply -f FILE`.
pub fn gang(text: &str) -> bool {
    allocate::parse_claims(text).is_ok() | worker::parse_workers(text).is_ok()
}

/// The value of any flag.
pub fn value(text: &str) -> usize {
    [
        parse::selector(text).is_ok(),
        parse::timeout(text).is_ok(),
        parse::span_of_time(text).is_ok(),
        parse::memory(text).is_ok(),
        parse::size(text).is_ok(),
        parse::port(text).is_ok(),
        parse::named_port(text).is_ok(),
        parse::port_span(text).is_ok(),
        parse::range(text).is_ok(),
        parse::label(text).is_ok(),
        parse::host_port(text).is_ok(),
        parse::gpu(text).is_ok(),
        serve::parse_initial_cluster(text).is_ok(),
    ]
    .into_iter()
    .filter(|accepted| *accepted)
    .count()
}
