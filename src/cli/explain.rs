//! `portwarden explain`.

use std::process::ExitCode;

use serde::Serialize;

use super::allocate::Source;
use super::{Globals, output};
use crate::proto::v1;

#[derive(Debug, clap::Args)]
#[command(
    mut_group("what", |group| group.arg("file").required(true)),
    mut_group("where", |group| group.arg("file").required(true)),
    after_help = "Examples:
  portwarden explain qwen-0 --selector zone=a --gpus 2 --gpu-memory 20GiB
  portwarden explain -f gang.yaml -o json

It shows what `allocate` would answer to the same flags and, for each worker considered, why it fits
or what is missing and by how much. Nothing is changed."
)]
pub struct Args {
    #[command(flatten)]
    source: Source,
    /// From any node's own copy, which may lag
    #[arg(long)]
    stale: bool,
}

#[derive(Serialize)]
struct Explanation {
    fits: bool,
    refusal: Option<String>,
    allocations: Vec<output::Allocation>,
    claims: Vec<Claim>,
    revision: u64,
}

#[derive(Serialize)]
struct Claim {
    name: String,
    candidates: u64,
    not_ready: u64,
    workers: Vec<Verdict>,
}

#[derive(Serialize)]
struct Verdict {
    worker: String,
    fits: bool,
    lack: Option<String>,
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let read = Some(v1::ReadOptions { stale: args.stale, min_revision: 0 });
    let answer = globals.client()?.explain(args.source.claims()?, read).await?;
    let explanation = Explanation::from(answer);
    output::print(globals.output, &explanation, || text(&explanation))?;
    Ok(ExitCode::SUCCESS)
}

impl From<v1::ExplainResponse> for Explanation {
    fn from(answer: v1::ExplainResponse) -> Self {
        let verdict = |v: v1::WorkerVerdict| Verdict {
            worker: v.worker,
            fits: v.fits,
            lack: Some(v.lack).filter(|lack| !lack.is_empty()),
        };
        let claim = |c: v1::ClaimExplanation| Claim {
            name: c.name,
            candidates: c.candidates,
            not_ready: c.not_ready,
            workers: c.workers.into_iter().map(verdict).collect(),
        };
        Explanation {
            fits: answer.refusal.is_empty(),
            refusal: Some(answer.refusal).filter(|refusal| !refusal.is_empty()),
            allocations: answer.allocations.into_iter().map(not_granted).collect(),
            claims: answer.claims.into_iter().map(claim).collect(),
            revision: answer.revision,
        }
    }
}

/// The token and version that it would have now, another may have by then.
fn not_granted(allocation: v1::Allocation) -> output::Allocation {
    output::Allocation::from(v1::Allocation { token: 0, version: 0, ..allocation })
}

fn text(explanation: &Explanation) -> String {
    let mut text = match &explanation.refusal {
        Some(refusal) => format!("would be refused: {refusal}"),
        None => {
            let granted = output::allocations_table(&explanation.allocations);
            format!("would be granted:\n{granted}")
        }
    };
    for claim in &explanation.claims {
        let Claim { name, candidates, not_ready, workers } = claim;
        let shown = workers.len();
        text.push_str(&format!(
            "\n\nclaim {name}: {candidates} candidates, {shown} shown; {not_ready} workers of the \
             cluster are not ready\n"
        ));
        let rows = workers.iter().map(|Verdict { worker, fits, lack }| {
            let fits = if *fits { "yes" } else { "no" };
            vec![worker.clone(), fits.to_string(), lack.clone().unwrap_or_default()]
        });
        text.push_str(&output::table(&["WORKER", "FITS", "LACK"], rows));
    }
    text
}
