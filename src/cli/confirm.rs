//! `portwarden confirm`.

use std::process::ExitCode;

use super::{CliError, Globals, output, parse};
use crate::core::InstanceName;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden confirm qwen-0 --token 7
  portwarden confirm qwen-0 --token 7 --version 9    only if nothing changed since version 9")]
pub struct Args {
    /// Name of the instance
    #[arg(value_parser = parse::name::<InstanceName>)]
    name: String,
    /// Token of the grant
    #[arg(long)]
    token: u64,
    /// Version that you know; 0: whatever it is
    #[arg(long, default_value_t = 0)]
    version: u64,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let Args { name, token, version } = args;
    let response = globals
        .client()?
        .confirm(&name, token, version)
        .await
        .map_err(CliError::repeat_with(format!("--token {token}")))?;
    let allocation = output::Allocation::from(response.allocation.unwrap_or_default());
    output::print(globals.output, &allocation, || output::allocations_table([&allocation]))?;
    Ok(ExitCode::SUCCESS)
}
