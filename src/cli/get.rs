//! `portwarden get`.

use std::process::ExitCode;

use super::{Globals, output, parse};
use crate::agent::host::wall_clock_ms;
use crate::core::InstanceName;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden get qwen-0
  portwarden get qwen-0 -o json

For a name that was reclaimed or forced out recently it says when and why (exit code 3).")]
pub struct Args {
    /// Name of the instance
    #[arg(value_parser = parse::name::<InstanceName>)]
    name: String,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let response = globals.client()?.get(&args.name, None).await?;
    let found = response.allocation.unwrap_or_default();
    let allocation = output::Allocation::from(found.clone());
    output::print(globals.output, &allocation, || output::allocation_text(found, wall_clock_ms()))?;
    Ok(ExitCode::SUCCESS)
}
