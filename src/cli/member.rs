//! `portwarden member`.

use std::process::ExitCode;

use super::{Globals, output};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden member list")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the nodes of the cluster
    #[command(after_help = "Examples:
  portwarden member list
  portwarden member list -o json")]
    List,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let Command::List = args.command;
    let members = globals.client()?.members().await?;
    let members: Vec<_> = members.into_iter().map(output::Member::from).collect();
    output::print(globals.output, &members, || output::members_table(&members))?;
    Ok(ExitCode::SUCCESS)
}
