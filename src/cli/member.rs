//! `portwarden member`.

use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::sleep;

use super::{CliError, Globals, output, parse};
use crate::client::{Client, ClientError};
use crate::proto::v1;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden member list
  portwarden member add 4 --peer 10.0.0.4:7701 --client 10.0.0.4:7601
  portwarden member promote 4 --timeout 2m
  portwarden member transfer-leader 4
  portwarden member remove 1

A node joins as a learner (`portwarden serve --id 4 --join HOST:PORT`; before or after `member add`,
which it does not need), catches up, and votes once it is promoted. A removed id never comes back.")]
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
    /// Add a node as a learner: it is pending until it joins
    #[command(after_help = "Examples:
  portwarden member add 4 --peer 10.0.0.4:7701 --client 10.0.0.4:7601")]
    Add(Add),
    /// Make a learner a voter, once it has caught up
    #[command(after_help = "Examples:
  portwarden member promote 4
  portwarden member promote 4 --timeout 10m    # waits so long for it to catch up

If it has not caught up by then, the command is refused (exit code 4) and says how far it is.")]
    Promote(Id),
    /// Remove a node for good; a leader hands over first
    #[command(after_help = "Examples:
  portwarden member remove 1
  portwarden member remove 1 --force    # even if the rest has no majority of live nodes

What was removed already is a success. --force may leave a cluster that stands still until enough of
the voters that are left are back; nothing is lost by it.")]
    Remove(Remove),
    /// Let another node lead
    #[command(after_help = "Examples:
  portwarden member transfer-leader 2")]
    TransferLeader(Id),
    /// Let the cluster use what a new version brings, once all nodes run it
    #[command(after_help = "Examples:
  portwarden member set-feature-level 1

`portwarden status` shows the one that there is. It only rises: afterwards no node of an older version
can start or join.")]
    SetFeatureLevel(Level),
}

#[derive(Debug, clap::Args)]
struct Id {
    /// Id of the node
    #[arg(value_parser = parse::id())]
    id: u64,
}

#[derive(Debug, clap::Args)]
struct Level {
    /// Feature level
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    level: u32,
}

#[derive(Debug, clap::Args)]
struct Add {
    /// Id of the node: one that was never used
    #[arg(value_parser = parse::id())]
    id: u64,
    /// Where the other nodes reach it
    #[arg(long, value_name = "HOST:PORT", value_parser = parse::host_port)]
    peer: String,
    /// Where clients reach it
    #[arg(long, value_name = "HOST:PORT", value_parser = parse::host_port)]
    client: String,
}

#[derive(Debug, clap::Args)]
struct Remove {
    /// Id of the node
    #[arg(value_parser = parse::id())]
    id: u64,
    /// Even if too few of the voters that are left are live
    #[arg(long)]
    force: bool,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let client = globals.client()?;
    let again = || CliError::repeat_with("the same arguments".into());
    let members = match args.command {
        Command::List => client.members().await?,
        Command::Add(Add { id, peer, client: endpoint }) => {
            client.member_add(id, &peer, &endpoint).await.map_err(again())?
        }
        Command::Promote(Id { id }) => promote(&client, id).await.map_err(again())?,
        Command::Remove(Remove { id, force }) => {
            client.member_remove(id, force).await.map_err(again())?
        }
        Command::SetFeatureLevel(Level { level }) => {
            let level = client.set_feature_level(level).await.map_err(again())?;
            let json = serde_json::json!({ "feature_level": level });
            output::print(globals.output, &json, || format!("feature level {level}"))?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::TransferLeader(Id { id }) => client.transfer_leader(id).await.map_err(again())?,
    };
    let members: Vec<_> = members.into_iter().map(output::Member::from).collect();
    output::print(globals.output, &members, || output::members_table(&members))?;
    Ok(ExitCode::SUCCESS)
}

/// Shows how far the learner is while the leader waits for it.
async fn promote(client: &Client, id: u64) -> Result<Vec<v1::Member>, ClientError> {
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("catching up {bar:40} {pos}/{len} entries") {
        bar.set_style(style);
    }
    let watched = async {
        loop {
            sleep(Duration::from_millis(300)).await;
            let Ok(members) = client.members().await else { continue };
            if let Some(member) = members.iter().find(|member| member.id == id) {
                bar.set_length(member.applied + member.lag);
                bar.set_position(member.applied);
            }
        }
    };
    let promoted = tokio::select! {
        promoted = client.member_promote(id) => promoted,
        () = watched => unreachable!("it does not end"),
    };
    bar.finish_and_clear();
    promoted
}
