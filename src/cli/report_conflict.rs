//! `portwarden report-conflict`.

use std::process::ExitCode;

use serde::Serialize;

use super::{CliError, Format, Globals, output, parse};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden report-conflict qwen-0 --token 7 --port 40001

Report only a port on which binding failed with \"address in use\": it is quarantined, and the next
free port of its range takes its place. Where that cannot be (a port asked for by number, an
exhausted range), the allocation is reclaimed: exit code 5.")]
pub struct Args {
    #[command(flatten)]
    holder: parse::Holder,
    /// The port that something else uses
    #[arg(long, allow_negative_numbers = true, value_parser = parse::port)]
    port: u32,
}

#[derive(Serialize)]
struct Swapped {
    reclaimed: bool,
    reason: String,
    allocation: output::Allocation,
    revision: u64,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let Args { holder: parse::Holder { name, token, version }, port } = args;
    let response = globals
        .client()?
        .report_conflict(&name, token, version, port)
        .await
        .map_err(CliError::repeat_with(format!("--token {token}")))?;
    let result = Swapped {
        reclaimed: response.reclaimed,
        reason: response.reason,
        allocation: response.allocation.unwrap_or_default().into(),
        revision: response.revision,
    };
    if !result.reclaimed || globals.output == Format::Json {
        output::print(globals.output, &result, || output::allocations_table([&result.allocation]))?;
    }
    if result.reclaimed {
        return Err(CliError::NothingElseFits { name, reason: result.reason }.into());
    }
    Ok(ExitCode::SUCCESS)
}
