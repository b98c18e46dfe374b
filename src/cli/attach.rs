//! `portwarden attach`.

use std::process::ExitCode;

use clap::ArgGroup;

use super::{CliError, Globals, output, parse};

#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("to").args(["lease", "detach"]).required(true)),
    after_help = "Examples:
  portwarden attach qwen-0 --token 7 --lease 12
  portwarden attach qwen-0 --token 7 --detach    # it is held until it is released

A scheduler that restarts moves its instances to a new lease, so that they keep their ports."
)]
pub struct Args {
    #[command(flatten)]
    holder: parse::Holder,
    /// The lease to move it to
    #[arg(
        long,
        value_name = "ID",
        allow_negative_numbers = true,
        value_parser = parse::id()
    )]
    lease: Option<u64>,
    /// Take it off its lease
    #[arg(long)]
    detach: bool,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let Args { holder: parse::Holder { name, token, version }, lease, detach: _ } = args;
    let response = globals
        .client()?
        .attach(&name, token, version, lease.unwrap_or(0))
        .await
        .map_err(CliError::repeat_with(format!("--token {token}")))?;
    let allocation = output::Allocation::from(response.allocation.unwrap_or_default());
    output::print(globals.output, &allocation, || output::allocations_table([&allocation]))?;
    Ok(ExitCode::SUCCESS)
}
