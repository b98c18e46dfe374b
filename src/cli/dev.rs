//! `dev`: a cluster on this machine that stays up, to try things with.

use std::path::PathBuf;
use std::process::ExitCode;

use super::embedded::{self, NodePorts};
use super::serve::until_stopped;
use super::{Globals, log_to_stderr, output};

const CLIENT_PORT: u16 = 7601;
const PEER_PORT: u16 = 7701;
const HTTP_PORT: u16 = 7801;

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  # Three nodes at 127.0.0.1:7601 to 7603, data kept in ./portwarden-dev
  portwarden dev

  # Their data elsewhere; starting again over the same directory finds everything as it was
  portwarden dev --data-dir /tmp/try")]
pub struct Args {
    /// How many nodes: 1, 3 or 5
    #[arg(long, default_value = "3", value_parser = ["1", "3", "5"])]
    nodes: String,
    /// Where the nodes keep their data
    #[arg(long, value_name = "DIR", default_value = "portwarden-dev")]
    data_dir: PathBuf,
}

pub async fn run(args: Args, _: Globals) -> anyhow::Result<ExitCode> {
    log_to_stderr("warn")?;
    let nodes: u16 = args.nodes.parse()?;
    let ports: Vec<_> = (0..nodes)
        .map(|n| NodePorts {
            clients: CLIENT_PORT + n,
            peers: PEER_PORT + n,
            http: Some(HTTP_PORT + n),
        })
        .collect();
    let servers = embedded::start(&args.data_dir, &ports).await?;
    let entered = servers.iter().map(|s| s.enter_cluster());
    futures::future::try_join_all(entered).await?;
    let leader = embedded::leader(&servers).await?;
    let text = format!(
        "{nodes} nodes are up, node {leader} leads; clients: 127.0.0.1:{first} to {last}; data: {dir}

Try, in another terminal:
  portwarden worker register gpu1 --address 127.0.0.1 --range service=40000-40063 --gpu memory=24GiB,model=RTX4090
  portwarden allocate web-1 --worker gpu1 --ports 1
  portwarden allocate qwen-1 --selector '' --ports 1 --gpus 1 --gpu-memory 1GiB
  portwarden list
  portwarden status
  curl -s 127.0.0.1:{http}/metrics

Ctrl-C stops it; the data stays.\n",
        leader = servers[leader].node.id(),
        first = CLIENT_PORT,
        last = CLIENT_PORT + nodes - 1,
        dir = args.data_dir.display(),
        http = HTTP_PORT,
    );
    output::emit(&text)?;
    until_stopped(servers).await
}
