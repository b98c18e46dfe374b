//! `portwarden confirm`.

use std::process::ExitCode;

use clap::ArgGroup;

use super::{CliError, Globals, output, parse, usage};
use crate::agent::host;
use crate::proto::v1;
use crate::proto::v1::liveness::Handle;

#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("handle").args(["pid", "cgroup", "container"])),
    after_help = "Examples:
  portwarden confirm qwen-0 --token 7
  portwarden confirm qwen-0 --token 7 --version 9    # only if nothing changed since version 9
  portwarden confirm qwen-0 --token 7 --pid 4242     # on the worker itself
  portwarden confirm qwen-0 --token 7 --lease 12     # revives what lingers, on a new lease

With a liveness handle the worker's agent can tell whether the instance lives, whatever becomes of
its ports; without one, closed ports are what tells."
)]
pub struct Args {
    #[command(flatten)]
    holder: parse::Holder,
    /// Move it to this lease
    #[arg(
        long,
        value_name = "ID",
        allow_negative_numbers = true,
        value_parser = parse::id()
    )]
    lease: Option<u64>,
    /// It lives as long as this process
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pid: Option<u32>,
    /// When that process was started, as /proc/PID/stat has it (field 22); default: read there
    #[arg(long, value_name = "TICKS", requires = "pid")]
    start_ticks: Option<u64>,
    /// It lives as long as this cgroup has a process: a path below the root of the file system
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
    /// It lives as long as the container of this id: 12 to 64 hexadecimal digits in lower case
    #[arg(long, value_name = "ID")]
    container: Option<String>,
    /// The boot of the worker on which the handle counts; default: this machine's
    #[arg(long, value_name = "ID", requires = "handle")]
    boot_id: Option<String>,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let liveness = args.liveness()?;
    let parse::Holder { name, token, version } = args.holder;
    let lease = args.lease.unwrap_or(0);
    let response = globals
        .client()?
        .confirm_with(v1::ConfirmRequest { name, token, version, lease, liveness })
        .await
        .map_err(CliError::repeat_with(format!("--token {token}")))?;
    let allocation = output::Allocation::from(response.allocation.unwrap_or_default());
    output::print(globals.output, &allocation, || output::allocations_table([&allocation]))?;
    Ok(ExitCode::SUCCESS)
}

impl Args {
    fn liveness(&self) -> anyhow::Result<Option<v1::Liveness>> {
        let handle = match (self.pid, &self.cgroup, &self.container) {
            (Some(pid), ..) => {
                let read = |pid| host::start_ticks(pid).map_err(|e| usage(format!("--pid: {e}")));
                let start_ticks = self.start_ticks.map_or_else(|| read(pid), Ok)?;
                Handle::Process(v1::Process { pid, start_ticks })
            }
            (_, Some(path), _) => Handle::Cgroup(path.clone()),
            (.., Some(id)) => Handle::Container(id.clone()),
            _ => return Ok(None),
        };
        let boot_id = match &self.boot_id {
            Some(id) => id.clone(),
            None => host::boot_id().map_err(|e| usage(format!("--boot-id: {e}")))?,
        };
        Ok(Some(v1::Liveness { boot_id, handle: Some(handle) }))
    }
}
