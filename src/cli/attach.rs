//! `portwarden attach`.

use std::process::ExitCode;

use clap::ArgGroup;

use super::{CliError, Globals, output, parse};
use crate::core::InstanceName;

#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("to").args(["lease", "detach"]).required(true)),
    after_help = "Examples:
  portwarden attach qwen-0 --token 7 --lease 12
  portwarden attach qwen-0 --token 7 --detach    it is held until it is released

A scheduler that restarts moves its instances to a new lease, so that they keep their ports."
)]
pub struct Args {
    /// Name of the instance
    #[arg(value_parser = parse::name::<InstanceName>)]
    name: String,
    /// Token of the grant
    #[arg(long, allow_negative_numbers = true)]
    token: u64,
    /// Version that you know; 0: whatever it is
    #[arg(long, default_value_t = 0)]
    version: u64,
    /// The lease to move it to
    #[arg(
        long,
        value_name = "ID",
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    lease: Option<u64>,
    /// Take it off its lease
    #[arg(long)]
    detach: bool,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let Args { name, token, version, lease, detach: _ } = args;
    let response = globals
        .client()?
        .attach(&name, token, version, lease.unwrap_or(0))
        .await
        .map_err(CliError::repeat_with(format!("--token {token}")))?;
    let allocation = output::Allocation::from(response.allocation.unwrap_or_default());
    output::print(globals.output, &allocation, || output::allocations_table([&allocation]))?;
    Ok(ExitCode::SUCCESS)
}
