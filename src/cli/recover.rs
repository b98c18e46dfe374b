//! `portwarden recover`: a new cluster from one survivor, when the majority is lost for good.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;

use super::snapshot::begin_anew;
use super::{CliError, Globals, output, parse, usage};
use crate::raft::{NodeId, Table, salvage};
use crate::store::DataDir;

/// How long another member may take to take a connection.
const CONNECT_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  portwarden recover --from ./n2 --data-dir ./anew --id 1 --initial-cluster 1=10.0.0.2:7701

For when a majority of the nodes is gone and will not come back, and there is no newer backup. The
survivor must be stopped. What was acknowledged and never reached its disk is lost: at most what the
others had agreed on while it was away. From there on it is a restore: a new cluster id, every worker
UNVERIFIED, old tokens refused (`portwarden snapshot restore --help`). The directory given with
--from is only read.

Refused (exit code 4) while so many other members may be alive that they and this one would be a
majority: then start them instead. --force says that you know they are gone.")]
pub struct Args {
    /// Data directory of the survivor, which does not run
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Where the new cluster's first node will keep its data: empty or not there
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Id of that node: the lowest of the list
    #[arg(long, value_parser = parse::id())]
    id: u64,
    /// The nodes of the new cluster, by peer address: 1=HOST:PORT,2=HOST:PORT,3=HOST:PORT
    #[arg(long, value_name = "LIST")]
    initial_cluster: String,
    /// The other members are gone for good, whatever answers at their addresses
    #[arg(long)]
    force: bool,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let Args { from, data_dir, id, initial_cluster, force } = args;
    let (survivor, table) = read(&from)?;
    let others = others_alive(survivor, &table).await;
    let voters = table.membership.voter_ids().count();
    if !others.is_empty() && (others.len() + 1) * 2 > voters && !force {
        return Err(CliError::Precondition(format!(
            "a majority of the {voters} voters may be alive: {}; start them, and node {survivor} over \
             its own directory, and nothing is lost. If they are gone for good, say --force",
            others.join(", ")
        ))
        .into());
    }
    let at = table.applied.map_or(0, |at| at.index);
    output::note(&format!(
        "recovering what node {survivor} had: revision {}, log entry {at}; what was acknowledged after \
         it and only the others had is lost",
        table.state.revision
    ));
    begin_anew(&table.state, &data_dir, id, &initial_cluster, globals)
}

fn read(from: &Path) -> anyhow::Result<(NodeId, Table)> {
    let survivor = DataDir::owner(from).map_err(|error| usage(error.to_string()))?;
    let data = DataDir::open(from, survivor)?;
    Ok((survivor, salvage(&data)?))
}

/// Other voters that cannot be said to be down: what takes no connection and says so at once is.
async fn others_alive(survivor: NodeId, table: &Table) -> Vec<String> {
    let membership = table.membership.membership();
    let mut alive = Vec::new();
    for id in membership.voter_ids().filter(|id| *id != survivor) {
        let Some(member) = membership.get_node(&id) else { continue };
        match timeout(CONNECT_MAX, TcpStream::connect(&member.peer)).await {
            Ok(Ok(_)) => alive.push(format!("node {id} answers at {}", member.peer)),
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Ok(Err(_)) | Err(_) => {
                alive.push(format!(
                    "node {id} at {} does not refuse connections, so it may be alive",
                    member.peer
                ));
            }
        }
    }
    alive
}
