//! `portwarden snapshot`: backups of the table, and new clusters from them.

use std::fs::File;
use std::io::BufWriter;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tempfile::NamedTempFile;

use super::serve::parse_initial_cluster;
use super::{CliError, Globals, output, parse, usage};
use crate::agent::host::wall_clock_ms;
use crate::client::{BackupError, Copied};
use crate::core::{Millis, State, Worker, WorkerPhase};
use crate::raft::{Backup, NodeId, RestoreError, restore};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden snapshot save backup.snap
  portwarden snapshot inspect backup.snap
  portwarden snapshot restore backup.snap --data-dir ./n1 --id 1 --initial-cluster 1=10.0.0.1:7701")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Save a copy of the whole table, while the cluster goes on
    #[command(after_help = "Examples:
  portwarden snapshot save backup.snap

Everything that was acknowledged before the command is in it. Any node serves it. The file gets its
name when it is whole and checked.")]
    Save(FileArg),
    /// Check a file, and show what it holds
    #[command(after_help = "Examples:
  portwarden snapshot inspect backup.snap
  portwarden snapshot inspect backup.snap -o json")]
    Inspect(FileArg),
    /// Make the data directory with which a new cluster begins over a saved table
    #[command(after_help = RESTORE_HELP)]
    Restore(Restore),
}

const RESTORE_HELP: &str = "\
Examples:
  # A new cluster of one node
  portwarden snapshot restore backup.snap --data-dir ./n1 --id 1 --initial-cluster 1=127.0.0.1:7701
  portwarden serve --id 1 --data-dir ./n1 --initial-cluster 1=127.0.0.1:7701

  # Of three: restore on the lowest id, start the others with the same list over empty directories
  portwarden snapshot restore backup.snap --data-dir ./n1 --id 1 \\
    --initial-cluster 1=10.0.0.1:7701,2=10.0.0.2:7701,3=10.0.0.3:7701

What was granted after the file was saved is not in it. So every worker is UNVERIFIED afterwards: it
holds what it held, and grants nothing until its agent has reported or `portwarden worker verify` was
run. Tokens of the old cluster are refused: a holder repeats its request under its uid to learn the
new one. The old cluster's nodes are refused too; do not run both.";

#[derive(Debug, clap::Args)]
struct FileArg {
    /// The file
    file: PathBuf,
}

#[derive(Debug, clap::Args)]
struct Restore {
    /// A file of `snapshot save`, or of `serve --backup-dir`
    file: PathBuf,
    /// Where the node will keep its data: a directory that is empty or not there
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// Id of the node: the lowest of the list
    #[arg(long, value_parser = parse::id())]
    id: u64,
    /// The nodes of the new cluster, by peer address: 1=HOST:PORT,2=HOST:PORT,3=HOST:PORT
    #[arg(long, value_name = "LIST")]
    initial_cluster: String,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Save(FileArg { file }) => save(&file, globals).await,
        Command::Inspect(FileArg { file }) => {
            let backup = read(&file)?;
            let summary = Summary::of(&backup);
            output::print(globals.output, &summary, || summary.text())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Restore(args) => run_restore(args, globals),
    }
}

async fn save(file: &Path, globals: Globals) -> anyhow::Result<ExitCode> {
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let cannot = |error: std::io::Error| usage(format!("{}: {error}", file.display()));
    if file.is_dir() {
        return Err(usage(format!("{}: is a directory", file.display())));
    }
    // Where it will lie, so that it can be renamed; found out before anything is asked for.
    NamedTempFile::new_in(dir).map_err(cannot)?;
    let bar = ProgressBar::no_length();
    if let Ok(style) = ProgressStyle::with_template("saving {bytes} ({bytes_per_sec})") {
        bar.set_style(style);
    }
    let fresh = || NamedTempFile::new_in(dir).map(BufWriter::new);
    let progress = |copied: Copied| bar.set_position(copied.bytes);
    let saved = globals.client()?.backup(fresh, progress).await;
    bar.finish_and_clear();
    let (out, _) = saved.map_err(|error| match error {
        BackupError::Client(error) => anyhow::Error::from(CliError::from(error)),
        BackupError::Write(error) => anyhow::anyhow!("{}: {error}", file.display()),
    })?;
    let temp = out.into_inner().map_err(|error| error.into_error())?;
    temp.as_file().sync_all()?;
    // One that was cut off is found here, and not when it is needed.
    let backup = read(temp.path())?;
    temp.persist(file)?;
    File::open(dir)?.sync_all()?;
    let summary = Summary::of(&backup);
    output::print(globals.output, &summary, || {
        format!("saved {} at revision {}\n\n{}", file.display(), summary.revision, summary.text())
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The file's contents; what is wrong with it is the caller's to mend (exit code 2).
pub(super) fn read(file: &Path) -> anyhow::Result<Backup> {
    Backup::read(file).map_err(|error| usage(error.to_string()))
}

fn run_restore(args: Restore, globals: Globals) -> anyhow::Result<ExitCode> {
    let Restore { file, data_dir, id, initial_cluster } = args;
    let backup = read(&file)?;
    begin_anew(&backup.state, &data_dir, id, &initial_cluster, globals)
}

#[derive(Serialize)]
struct Begun {
    cluster_id: String,
    data_dir: PathBuf,
    revision: u64,
    workers: u64,
    allocations: u64,
}

/// Makes the directory and says how to go on.
pub(super) fn begin_anew(
    before: &State,
    data_dir: &Path,
    id: NodeId,
    initial_cluster: &str,
    globals: Globals,
) -> anyhow::Result<ExitCode> {
    let members = parse_initial_cluster(initial_cluster)?;
    if members.keys().next() != Some(&id) {
        return Err(usage(format!(
            "--id: {id} must be the lowest of --initial-cluster {initial_cluster}: one node begins \
             the cluster, the others start over empty directories"
        )));
    }
    let state = before.anew(Millis(wall_clock_ms()));
    let revision = state.revision.0;
    let cluster_id = restore(state, data_dir, id, &members).map_err(|error| match error {
        RestoreError::NotEmpty(_) => CliError::Precondition(error.to_string()).into(),
        error => anyhow::Error::from(error),
    })?;
    let begun = Begun {
        cluster_id,
        data_dir: data_dir.to_path_buf(),
        revision,
        workers: before.worker_count() as u64,
        allocations: before.allocation_count() as u64,
    };
    output::print(globals.output, &begun, || {
        let Begun { cluster_id, data_dir, workers, allocations, .. } = &begun;
        let (dir, peer) = (data_dir.display(), &members[&id]);
        // Beyond loopback clients reach it there too.
        let host = peer.rsplit_once(':').map_or(peer.as_str(), |(host, _)| host);
        let addr = peer.parse::<SocketAddr>();
        let here = host == "localhost" || addr.is_ok_and(|addr| addr.ip().is_loopback());
        let beyond = if here { String::new() } else { format!(" --insecure --listen {host}:7601") };
        format!(
            "{dir} begins cluster {cluster_id} with {workers} workers and {allocations} \
             allocations\n\nNext:\n  portwarden serve --id {id} --data-dir {dir} --listen-peer {peer}{beyond} \
             --initial-cluster {initial_cluster}\n  portwarden worker verify --all    # or let the \
             agents report: until then nothing is granted"
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Serialize)]
struct Summary {
    cluster_id: String,
    format: u8,
    feature_level: u32,
    revision: u64,
    log_index: u64,
    workers: u64,
    unverified_workers: u64,
    allocations: u64,
    leases: u64,
    members: Vec<Member>,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Member {
    id: u64,
    peer: String,
}

impl Summary {
    fn of(backup: &Backup) -> Summary {
        let Backup { head, state, length_bytes } = backup;
        let unverified = |w: &&Arc<Worker>| w.phase == WorkerPhase::Unverified;
        Summary {
            cluster_id: backup.cluster_id().to_string(),
            format: crate::store::codec::VERSION,
            feature_level: state.feature_level,
            revision: state.revision.0,
            log_index: head.last.map_or(0, |at| at.index),
            workers: state.worker_count() as u64,
            unverified_workers: state.workers_after(None).filter(unverified).count() as u64,
            allocations: state.allocation_count() as u64,
            leases: state.lease_count() as u64,
            members: head
                .membership
                .nodes
                .iter()
                .map(|(id, member)| Member { id: *id, peer: member.peer.clone() })
                .collect(),
            bytes: *length_bytes,
        }
    }

    fn text(&self) -> String {
        let members: Vec<_> = self.members.iter().map(|m| format!("{}={}", m.id, m.peer)).collect();
        format!(
            "cluster:      {}\nmembers:      {}\nrevision:     {}\nlog index:    {}\nworkers:      {}\nallocations:  {}\nleases:       {}\nformat:       {}, feature level {}\nsize:         {}\nchecksums and invariants hold",
            self.cluster_id,
            members.join(","),
            self.revision,
            self.log_index,
            self.workers,
            self.allocations,
            self.leases,
            self.format,
            self.feature_level,
            output::bytes(self.bytes),
        )
    }
}
