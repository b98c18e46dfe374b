//! `portwarden watch`: a line for each change of the table.

use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use super::{Format, Globals, output, parse, stopped};
use crate::client::{ClientError, Heard, Watch};
use crate::core::WorkerName;
use crate::proto::v1;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  portwarden watch
  portwarden watch --worker w1 --prefix qwen-
  portwarden watch --from-revision 120 -o json    # one JSON object a line

Each change comes once and in order, whichever nodes come and go. Types: allocated, confirmed, swapped,
attached, lingering, released, reclaimed, worker, worker_removed, lease_granted, lease_ended,
feature_level. With a filter only allocations are told of, and with --worker that worker itself.

SIGTERM or Ctrl-C ends it with exit code 0. Exit code 4: the revisions that come next are not kept any
more by any node; `portwarden list` shows what is now.")]
pub struct Args {
    /// The first revision to hear of, at most the next one; 0: what comes from now on
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    from_revision: u64,
    /// Only on this worker
    #[arg(long, value_parser = parse::name::<WorkerName>)]
    worker: Option<String>,
    /// Only allocations with these labels: k=v, k!=v, k in (a,b), k notin (a,b), k, !k
    #[arg(long, value_parser = parse::selector)]
    selector: Option<String>,
    /// Only allocations whose names begin with this
    #[arg(long)]
    prefix: Option<String>,
}

/// A change as a line of JSON.
#[derive(Debug, Serialize)]
struct Event {
    revision: u64,
    r#type: String,
    /// Of the allocation, the worker or (its id) the lease.
    name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    allocation: Option<output::Allocation>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker: Option<output::Worker>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lease: Option<Lease>,
}

#[derive(Debug, Serialize)]
struct Lease {
    id: u64,
    ttl_ms: u64,
    allocations: u64,
}

impl From<v1::WatchEvent> for Event {
    fn from(event: v1::WatchEvent) -> Self {
        let v1::WatchEvent { r#type, revision, allocation, reason, worker, lease } = event;
        let name = match (&allocation, &worker, &lease) {
            (Some(allocation), ..) => allocation.name.clone(),
            (_, Some(worker), _) => worker.name.clone(),
            (.., Some(lease)) => lease.id.to_string(),
            _ => String::new(),
        };
        // Of one that was removed only its name is left.
        let worker = worker.filter(|worker| worker.spec.is_some());
        Event {
            revision,
            r#type,
            name,
            reason,
            allocation: allocation.map(output::Allocation::from),
            worker: worker.map(output::Worker::from),
            lease: lease.map(|v1::Lease { id, ttl_ms, allocations }| Lease {
                id,
                ttl_ms,
                allocations,
            }),
        }
    }
}

impl Event {
    fn line(&self, format: Format) -> anyhow::Result<String> {
        Ok(match format {
            Format::Json => serde_json::to_string(self)?,
            Format::Table => self.text(),
        })
    }

    fn text(&self) -> String {
        let mut detail = match (&self.allocation, &self.worker, &self.lease) {
            (Some(allocation), ..) => output::allocation_line(allocation),
            (_, Some(worker), _) => worker.phase.to_string(),
            (.., Some(lease)) => {
                let ttl = humantime::format_duration(Duration::from_millis(lease.ttl_ms));
                format!("{ttl}, {} allocations", lease.allocations)
            }
            _ => String::new(),
        };
        if !self.reason.is_empty() {
            detail = format!("{detail}  ({})", self.reason);
        }
        let line = columns(&self.revision.to_string(), &self.r#type, &self.name, &detail);
        line.trim_end().to_string()
    }
}

/// Of fixed width: a line is written before the next one is known.
fn columns(revision: &str, kind: &str, name: &str, detail: &str) -> String {
    format!("{revision:<20} {kind:<14} {name:<24} {detail}")
}

pub async fn run(args: Args, globals: Globals) -> anyhow::Result<ExitCode> {
    let mut watch = globals.client()?.watch(v1::WatchRequest {
        from_revision: args.from_revision,
        worker: args.worker.unwrap_or_default(),
        selector: args.selector.unwrap_or_default(),
        name_prefix: args.prefix.unwrap_or_default(),
    });
    let stop = stopped()?;
    let mut stop = std::pin::pin!(stop);
    let mut begun = false;
    loop {
        let heard = tokio::select! {
            heard = watch.next() => heard,
            () = &mut stop => return Ok(ExitCode::SUCCESS),
        };
        let lines = match heard {
            Ok(heard) => lines(heard, &globals.output, !std::mem::replace(&mut begun, true))?,
            // Once it has begun, it does not end because the cluster is away.
            Err(ClientError::Unavailable { why, .. }) if begun => {
                note_silence(&watch, &why);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if !output::emit_on(&lines)? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn note_silence(watch: &Watch, why: &str) {
    let seen = watch.seen().unwrap_or(0);
    output::note(&format!("no node tells what comes after revision {seen}: {why}; still trying"));
}

fn lines(heard: Heard, format: &Format, first: bool) -> anyhow::Result<String> {
    let mut lines = String::new();
    if first && *format == Format::Table {
        lines.push_str(&columns("REVISION", "TYPE", "NAME", "DETAIL"));
        lines.push('\n');
    }
    for event in heard.events {
        lines.push_str(&Event::from(event).line(*format)?);
        lines.push('\n');
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_one_line_with_revision_type_and_name() {
        let allocation = v1::Allocation { name: "a".into(), ..Default::default() };
        let event =
            |kind: &str| v1::WatchEvent { r#type: kind.into(), revision: 7, ..Default::default() };
        let removed = v1::Worker { name: "w".into(), ..Default::default() };
        let lease = v1::Lease { id: 5, ttl_ms: 1_000, allocations: 0 };
        for (event, name, more) in [
            (
                v1::WatchEvent { allocation: Some(allocation), ..event("allocated") },
                "a",
                Some("allocation"),
            ),
            (v1::WatchEvent { worker: Some(removed), ..event("worker_removed") }, "w", None),
            (
                v1::WatchEvent {
                    lease: Some(lease),
                    reason: "expired".into(),
                    ..event("lease_ended")
                },
                "5",
                Some("lease"),
            ),
        ] {
            let kind = event.r#type.clone();
            let line = Event::from(event).line(Format::Json).unwrap();
            assert!(!line.contains('\n'));
            let value: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!(value["revision"], 7);
            assert_eq!(value["type"], kind.as_str());
            assert_eq!(value["name"], name);
            let others = value.as_object().unwrap().keys();
            let others: Vec<_> = others
                .filter(|k| ["allocation", "worker", "lease"].contains(&k.as_str()))
                .collect();
            assert_eq!(others, more.into_iter().collect::<Vec<_>>());
        }
    }
}
