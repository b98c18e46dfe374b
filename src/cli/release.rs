//! `portwarden release`.

use std::process::ExitCode;

use clap::ArgGroup;
use serde::Serialize;

use super::{CliError, Globals, output, parse};
use crate::core::InstanceName;

#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("authority").args(["token", "force"]).required(true)),
    after_help = "Examples:
  portwarden release qwen-0 --token 7
  portwarden release qwen-0 --force --reason 'host was scrapped'

What is gone already is a success. --force frees whoever holds the name, and is recorded."
)]
pub struct Args {
    /// Name of the instance
    #[arg(value_parser = parse::name::<InstanceName>)]
    name: String,
    /// Token of the grant: the holder vouches that it is done
    #[arg(long)]
    token: Option<u64>,
    /// An operator's override
    #[arg(long)]
    force: bool,
    /// Recorded with --force
    #[arg(long, conflicts_with = "token", default_value = "")]
    reason: String,
}

#[derive(Serialize)]
struct Released {
    released: bool,
    allocation: Option<output::Allocation>,
    revision: u64,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let client = globals.client()?;
    let response = match args.token {
        Some(token) => client
            .release(&args.name, token)
            .await
            .map_err(CliError::repeat_with(format!("--token {token}")))?,
        None => client.force_release(&args.name, &args.reason).await?,
    };
    let result = Released {
        released: response.released,
        allocation: response.allocation.map(output::Allocation::from),
        revision: response.revision,
    };
    output::print(globals.output, &result, || match result.released {
        true => format!("released {}", args.name),
        false => format!("{} is not held: it was released already, or never allocated", args.name),
    })?;
    Ok(ExitCode::SUCCESS)
}
