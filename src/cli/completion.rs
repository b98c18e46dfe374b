//! `portwarden completion`.

use std::process::ExitCode;

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, output};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden completion bash > /etc/bash_completion.d/portwarden
  source <(portwarden completion zsh)")]
pub struct Args {
    #[arg(value_enum)]
    shell: Shell,
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "portwarden", &mut script);
    output::emit(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
