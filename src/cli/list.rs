//! `portwarden list`.

use std::process::ExitCode;

use clap::ValueEnum;

use super::{Globals, output, parse};
use crate::agent::host::wall_clock_ms;
use crate::core::WorkerName;
use crate::proto::v1;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden list --worker w1 --phase BOUND
  portwarden list --phase LINGERING             # since when they linger, and why
  portwarden list --selector model=qwen -o json
  portwarden list --stale --min-revision 120    # any node's copy, once it has reached revision 120")]
pub struct Args {
    /// Only on this worker
    #[arg(long, value_parser = parse::name::<WorkerName>)]
    worker: Option<String>,
    /// Only with these labels: k=v, k!=v, k in (a,b), k notin (a,b), k, !k
    #[arg(long, value_parser = parse::selector)]
    selector: Option<String>,
    /// Only in this phase
    #[arg(long, value_enum, ignore_case = true)]
    phase: Option<Phase>,
    /// Only names that begin with this
    #[arg(long)]
    prefix: Option<String>,
    /// From any node's own copy, which may lag
    #[arg(long)]
    stale: bool,
    /// With --stale: wait until the copy has reached this revision
    #[arg(long, value_name = "REVISION", requires = "stale", default_value_t = 0)]
    min_revision: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
enum Phase {
    Reserved,
    Bound,
    Lingering,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let phase = match args.phase {
        None => v1::Phase::Unspecified,
        Some(Phase::Reserved) => v1::Phase::Reserved,
        Some(Phase::Bound) => v1::Phase::Bound,
        Some(Phase::Lingering) => v1::Phase::Lingering,
    };
    let request = v1::ListRequest {
        worker: args.worker.unwrap_or_default(),
        selector: args.selector.unwrap_or_default(),
        phase: phase.into(),
        name_prefix: args.prefix.unwrap_or_default(),
        read: Some(v1::ReadOptions { stale: args.stale, min_revision: args.min_revision }),
        ..Default::default()
    };
    let listing = globals.client()?.list(request).await?;
    let found = listing.items;
    let allocations: Vec<_> = found.iter().cloned().map(output::Allocation::from).collect();
    let table = || output::allocations_list(&found, wall_clock_ms());
    output::print(globals.output, &allocations, table)?;
    Ok(ExitCode::SUCCESS)
}
