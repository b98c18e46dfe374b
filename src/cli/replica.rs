//! A program that listens, for `demo --lifecycle`: what a model server would be.

use std::process::ExitCode;

use tokio::net::TcpListener;

const EXAMPLES: &str = "\
Examples:
  portwarden replica --port 40000
  portwarden run a --worker w1 --ports 1 -- portwarden replica --port {port}
  portwarden run a --worker w1 --ports 1 -- portwarden replica --port {port} --fail";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Where to listen
    #[arg(long)]
    port: u16,
    /// End without listening, as a start that fails
    #[arg(long)]
    fail: bool,
}

pub async fn run(args: Args) -> anyhow::Result<ExitCode> {
    if args.fail {
        anyhow::bail!("out of memory, say");
    }
    let listener = TcpListener::bind(("127.0.0.1", args.port)).await?;
    loop {
        // What is asked is answered by nobody: it is enough that it listens.
        drop(listener.accept().await?);
    }
}
