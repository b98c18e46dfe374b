//! `portwarden get`.

use std::process::ExitCode;

use super::{Globals, output, parse};
use crate::core::InstanceName;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden get qwen-0
  portwarden get qwen-0 -o json")]
pub struct Args {
    /// Name of the instance
    #[arg(value_parser = parse::name::<InstanceName>)]
    name: String,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let response = globals.client()?.get(&args.name, None).await?;
    let allocation = output::Allocation::from(response.allocation.unwrap_or_default());
    output::print(globals.output, &allocation, || output::allocations_table([&allocation]))?;
    Ok(ExitCode::SUCCESS)
}
