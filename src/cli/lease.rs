//! `portwarden lease`.

use std::process::ExitCode;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt as _};
use itertools::Itertools as _;
use serde::Serialize;
use serde_json::json;
use tokio::time::sleep;

use super::{CliError, Format, Globals, output, parse, stopped};
use crate::agent::host::boot_clock;
use crate::client::{Client, Holding, Keeper, Standing};
use crate::proto::v1;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden lease grant --ttl 30s
  portwarden lease keep-alive 7
  portwarden lease get 7

When a lease ends, what is on it is given back; on a worker with an agent it lingers first, until the
agent has seen that it is gone.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make a lease
    Grant(Grant),
    /// Show a lease and the allocations on it
    #[command(after_help = "Examples:
  portwarden lease get 7
  portwarden lease get 7 -o json")]
    Get(Named),
    /// Keep leases alive until stopped, or until one has ended
    KeepAlive(KeepAlive),
    /// End a lease at once
    #[command(after_help = "Examples:
  portwarden lease revoke 7

What is gone already is a success.")]
    Revoke(Named),
    /// List leases
    #[command(after_help = "Examples:
  portwarden lease list
  portwarden lease list -o json")]
    List,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden lease grant --ttl 30s
  portwarden lease grant 5m -o json

It ends unless it is kept alive before the time is over.")]
struct Grant {
    /// How long it lives without being kept alive (1s to 24h)
    #[arg(long, value_name = "DURATION", value_parser = parse::span_of_time, conflicts_with = "time")]
    ttl: Option<Duration>,
    /// The same as --ttl
    #[arg(value_name = "TTL", value_parser = parse::span_of_time, required_unless_present = "ttl")]
    time: Option<Duration>,
}

#[derive(Debug, clap::Args)]
struct Named {
    /// Id of the lease
    #[arg(value_parser = parse::id())]
    id: u64,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden lease keep-alive 7
  portwarden lease keep-alive 7 8 9 -o json    # one line each time one is kept
  portwarden lease keep-alive 7 --once

SIGTERM or Ctrl-C ends it with exit code 0; the leases live for their TTL from then on. Exit code 3:
one of them has ended.")]
struct KeepAlive {
    /// Ids of the leases
    #[arg(required = true, value_parser = parse::id())]
    ids: Vec<u64>,
    /// Keep each alive once, and end
    #[arg(long)]
    once: bool,
}

#[derive(Serialize)]
struct Lease {
    id: u64,
    ttl_ms: u64,
    allocations: u64,
}

impl From<v1::Lease> for Lease {
    fn from(lease: v1::Lease) -> Self {
        let v1::Lease { id, ttl_ms, allocations } = lease;
        Lease { id, ttl_ms, allocations }
    }
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let client = globals.client()?;
    match args.command {
        Command::Grant(Grant { ttl, time }) => {
            let ttl = ttl.or(time).unwrap_or_default();
            let granted = client.lease_grant(ttl).await?;
            let lease = Lease::from(granted.lease.unwrap_or_default());
            output::print(globals.output, &lease, || table([&lease]))?;
        }
        Command::Get(Named { id }) => get(&client, id, globals.output).await?,
        Command::KeepAlive(args) => return keep_alive(client, args, &globals).await,
        Command::Revoke(Named { id }) => revoke(&client, id, globals.output).await?,
        Command::List => {
            let leases = client.lease_list(v1::ListLeasesRequest::default()).await?.items;
            let leases: Vec<_> = leases.into_iter().map(Lease::from).collect();
            output::print(globals.output, &leases, || table(&leases))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn table<'a>(leases: impl IntoIterator<Item = &'a Lease>) -> String {
    let rows = leases.into_iter().map(|lease| {
        vec![lease.id.to_string(), shown(lease.ttl_ms), lease.allocations.to_string()]
    });
    output::table(&["ID", "TTL", "ALLOCATIONS"], rows)
}

fn shown(ms: u64) -> String {
    humantime::format_duration(Duration::from_millis(ms)).to_string()
}

async fn get(client: &Client, id: u64, format: Format) -> anyhow::Result<()> {
    let answer = client.lease_get(id, None).await?;
    let lease = Lease::from(answer.lease.unwrap_or_default());
    let names = answer.allocations;
    let object = json!({
        "id": lease.id, "ttl_ms": lease.ttl_ms, "allocations": lease.allocations, "names": names,
    });
    output::print(format, &object, || {
        let lines = names.iter().map(|name| format!("\n  {name}"));
        table([&lease]) + &lines.collect::<String>()
    })
}

async fn revoke(client: &Client, id: u64, format: Format) -> anyhow::Result<()> {
    let again = CliError::repeat_with("the same id".into());
    let answer = client.lease_revoke(id).await.map_err(again)?;
    let object = json!({ "revoked": answer.revoked, "revision": answer.revision });
    output::print(format, &object, || match answer.revoked {
        true => format!("revoked lease {id}"),
        false => format!("lease {id} was never granted, or had ended already"),
    })
}

async fn keep_alive(
    client: Client,
    args: KeepAlive,
    globals: &Globals,
) -> anyhow::Result<ExitCode> {
    let (format, timeout) = (globals.output, globals.timeout);
    let mut leases = Vec::new();
    for id in args.ids.into_iter().unique() {
        // Also says at once which of them do not exist.
        leases.push(client.lease_get(id, None).await?.lease.unwrap_or_default());
    }
    let keeper = Keeper::start_with(client, boot_clock());
    let kept = leases.iter().map(|lease| keep_one(keeper.keep(lease), args.once, format));
    let mut kept: FuturesUnordered<_> = kept.collect();
    let stop = stopped()?;
    let mut stop = std::pin::pin!(stop);
    let within = if args.once { timeout } else { Duration::MAX };
    let mut overdue = std::pin::pin!(sleep(within));
    loop {
        tokio::select! {
            ended = kept.next() => match ended {
                Some(ended) => ended?,
                None => return Ok(ExitCode::SUCCESS),
            },
            () = &mut overdue => {
                let text = format!("no answer within {}", humantime::format_duration(timeout));
                return Err(CliError::TimedOut(text).into());
            }
            () = &mut stop => return Ok(ExitCode::SUCCESS),
        }
    }
}

/// Until it was kept alive once, where that is asked for; else until it has ended, which is an error.
async fn keep_one(mut lease: Holding, once: bool, format: Format) -> anyhow::Result<()> {
    let (id, ttl_ms) = (lease.id(), parse::ms(lease.ttl()));
    loop {
        match lease.changed().await {
            Standing::Held { .. } => {
                let line = match format {
                    Format::Json => json!({ "id": id, "ttl_ms": ttl_ms }).to_string(),
                    Format::Table => format!("lease {id} is kept, for {}", shown(ttl_ms)),
                };
                let is_read = output::emit_on(&format!("{line}\n"))?;
                if once || !is_read {
                    return Ok(());
                }
            }
            Standing::Unproven => output::note(&format!(
                "lease {id} was not kept alive in time, and may have ended; still trying"
            )),
            Standing::Gone => {
                return Err(CliError::NotFound(format!("lease {id} has ended")).into());
            }
        }
    }
}
