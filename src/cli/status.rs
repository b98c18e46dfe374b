//! `portwarden status`.

use std::process::ExitCode;

use super::{Globals, output};
use crate::proto::v1;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden status
  portwarden status --check              # for a health check: exit code 1 if anything is wrong
  portwarden status --check --members    # between restarts: workers and ports do not count

The answer is that of the first node in --endpoints that gives one.")]
pub struct Args {
    /// Exit with 1 if there are problems
    #[arg(long)]
    check: bool,
    /// With --check: only of the nodes, and not of workers, ports and allocations
    #[arg(long, requires = "check")]
    members: bool,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let response = globals.client()?.status().await?;
    let head = head(&response);
    let of_table = response.table_problems.clone();
    let status = output::Status::from(response);
    output::print(globals.output, &status, || {
        let mut text = format!("{head}\n\n{}", output::members_table(&status.members));
        if !status.problems.is_empty() {
            text.push_str("\n\nproblems:");
        }
        for problem in &status.problems {
            text.push_str(&format!("\n- {problem}"));
        }
        text
    })?;
    let counts = |problem: &String| !args.members || !of_table.contains(problem);
    let failed = args.check && status.problems.iter().any(counts);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn head(status: &v1::StatusResponse) -> String {
    let leader = match status.leader {
        0 => "none known".to_string(),
        id => format!("node {id} in term {}", status.term),
    };
    format!(
        "cluster:      {}\nleader:       {leader}\nrevision:     {}\nlevel:        {}\nworkers:      {}\nallocations:  {}\nanswered by:  node {}, version {}",
        status.cluster_id,
        status.revision,
        status.feature_level,
        status.workers,
        status.allocations,
        status.node,
        status.version,
    )
}
