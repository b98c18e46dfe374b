//! Errors on stderr: one line what, then the details, then a hint what to do next.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use tonic::Code;

use super::output;
use crate::client::{ClientError, Refused};
use crate::proto::{precondition, reason};

/// What a subcommand ends with that is worth more than its text.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Wrong input that clap could not see.
    #[error("{0}")]
    Usage(String),
    /// A rule stands in the way; the text says the way out.
    #[error("{0}")]
    Precondition(String),
    /// A conflict was reported, and no other port could be given.
    #[error("{name} was reclaimed: {reason}")]
    NothingElseFits { name: String, reason: String },
    /// What was asked for is not there, or not any more.
    #[error("{0}")]
    NotFound(String),
    /// It is not as it would have to be.
    #[error("{0}")]
    Conflict(String),
    /// Each port that was tried is in use, and there is no other.
    #[error("{0}")]
    NothingFits(String),
    #[error("{0}")]
    TimedOut(String),
    /// A program could not be started or has ended, with this exit code.
    #[error("{text}")]
    Program { text: String, code: u8 },
    /// Time is over, and these are still held.
    #[error("{worker} still holds {}: {}", .left.len(), .left.join(", "))]
    StillHeld { worker: String, left: Vec<String> },
    /// A failed call; `repeat` are the flags under which it is safe to run the command again.
    #[error("{error}")]
    Call { error: ClientError, repeat: Option<String> },
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        CliError::Call { error, repeat: None }
    }
}

impl CliError {
    /// For `map_err` on a call that `flags` make safe to repeat.
    pub fn repeat_with(flags: String) -> impl FnOnce(ClientError) -> CliError {
        move |error| CliError::Call { error, repeat: Some(flags) }
    }
}

const FAILURE: u8 = 1;
const USAGE: u8 = 2;
const NOT_FOUND: u8 = 3;
const CONFLICT: u8 = 4;
const NOTHING_FITS: u8 = 5;
const UNAVAILABLE: u8 = 6;

pub fn client_exit_code(error: &ClientError) -> u8 {
    match error {
        ClientError::Endpoint { .. } => USAGE,
        ClientError::Unavailable { .. } | ClientError::OutcomeUnknown { .. } => UNAVAILABLE,
        ClientError::Refused(refused) => match refused.status.code() {
            // The history that was asked for is gone.
            Code::OutOfRange if error.reason() == Some(reason::COMPACTED) => CONFLICT,
            Code::InvalidArgument | Code::OutOfRange => USAGE,
            Code::NotFound => NOT_FOUND,
            Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => CONFLICT,
            Code::ResourceExhausted => NOTHING_FITS,
            _ => FAILURE,
        },
    }
}

/// Prints the error and gives its exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    let (code, text) = describe(error);
    // Where nobody reads it, the exit code still tells.
    let _ = std::io::stderr().write_all(text.as_bytes());
    ExitCode::from(code)
}

pub(super) fn describe(error: &anyhow::Error) -> (u8, String) {
    if let Some(error) = error.downcast_ref::<ClientError>() {
        return (client_exit_code(error), describe_call(error, None));
    }
    match error.downcast_ref::<CliError>() {
        Some(CliError::Usage(text)) => (USAGE, format!("error: {text}\n")),
        Some(CliError::Precondition(text)) => (CONFLICT, format!("error: {text}\n")),
        Some(error @ CliError::NothingElseFits { .. }) => (
            NOTHING_FITS,
            format!("error: {error}\nhint: the port is quarantined; allocate anew\n"),
        ),
        Some(CliError::NotFound(text)) => (NOT_FOUND, format!("error: {text}\n")),
        Some(CliError::NothingFits(text)) => (NOTHING_FITS, format!("error: {text}\n")),
        Some(CliError::TimedOut(text)) => (UNAVAILABLE, format!("error: {text}\n")),
        Some(CliError::Program { text, code }) => (*code, format!("error: {text}\n")),
        Some(CliError::Conflict(text)) => (CONFLICT, format!("error: {text}\n")),
        Some(error @ CliError::StillHeld { worker, .. }) => (
            UNAVAILABLE,
            format!(
                "error: time is over: {error}\nhint: it goes on draining; wait longer with --timeout, \
                 or see `portwarden list --worker {worker}`\n"
            ),
        ),
        Some(CliError::Call { error, repeat }) => {
            (client_exit_code(error), describe_call(error, repeat.as_deref()))
        }
        None => (FAILURE, format!("error: {error:#}\n")),
    }
}

fn describe_call(error: &ClientError, repeat: Option<&str>) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = match error {
        ClientError::Refused(refused) => describe_refused(&mut text, refused),
        other => writeln!(text, "error: {other}"),
    };
    if let Some(hint) = hint(error, repeat) {
        let _ = writeln!(text, "hint: {hint}");
    }
    text
}

fn describe_refused(text: &mut String, refused: &Refused) -> std::fmt::Result {
    let Refused { status, details } = refused;
    if let Some(bad) = details.bad_request() {
        writeln!(text, "error: the request is not valid")?;
        for violation in &bad.field_violations {
            writeln!(text, "  {}: {}", violation.field, violation.description)?;
        }
        return Ok(());
    }
    writeln!(text, "error: {}", status.message())?;
    if let Some(info) = details.error_info() {
        let mut facts: Vec<_> = info.metadata.iter().collect();
        facts.sort();
        for (key, value) in facts {
            match (key.as_str(), value.parse()) {
                ("at_ms", Ok(ms)) => writeln!(text, "  at: {}", output::point_in_time(ms))?,
                _ => writeln!(text, "  {key}: {value}")?,
            }
        }
    }
    Ok(())
}

fn hint(error: &ClientError, repeat: Option<&str>) -> Option<String> {
    let refused = match error {
        ClientError::Endpoint { .. } => {
            return Some("give --endpoints HOST:PORT[,HOST:PORT…] or PORTWARDEN_ENDPOINTS".into());
        }
        ClientError::Unavailable { overloaded: true, .. } => {
            return Some(
                "nothing was changed; the cluster has more to do than it takes on: try again later, with \
                 fewer calls at once"
                    .into(),
            );
        }
        ClientError::Unavailable { .. } => {
            return Some(
                "nothing was changed; check that the nodes at --endpoints run and have a majority: \
                 `portwarden status` shows it (and a --min-revision may not be there yet)"
                    .into(),
            );
        }
        ClientError::OutcomeUnknown { .. } => {
            return Some(match repeat {
                Some(flags) => {
                    format!(
                        "it may or may not be done; repeat the command with {flags}: that is safe and tells"
                    )
                }
                None => "it may or may not be done; look (`portwarden get NAME`, `list`, `lease list`) before you \
                         repeat it".into(),
            });
        }
        ClientError::Refused(refused) => refused,
    };
    let kind = refused.details.resource_info().map(|info| info.resource_type.as_str());
    let broken = refused.details.precondition_failure().and_then(|p| p.violations.first());
    let text = match (refused.status.code(), error.reason()) {
        (Code::InvalidArgument, _) => "correct the fields above; `--help` shows the form",
        (Code::NotFound, Some(reason::DEPARTED)) => "the name is free: allocate it anew",
        (Code::NotFound, _) if kind == Some("lease") => "`portwarden lease list` shows them all",
        (Code::NotFound, _) if kind == Some("worker") => "`portwarden worker list` shows them all",
        (Code::NotFound, _) if kind == Some("member") => "`portwarden member list` shows them all",
        (Code::NotFound, _) => "`portwarden list` shows them all",
        (_, Some(reason::NAME_TAKEN)) => {
            "release it, or take another name; a retry must carry the --uid of the first try and \
             the same request"
        }
        (_, Some(reason::IDENTITY_TAKEN)) => "remove it from the worker that has it first",
        (_, Some(reason::CAPACITY)) => {
            "ask for less, release something, add a worker or make one ready; `portwarden worker list` \
             shows what is free, and which are not ready"
        }
        (_, Some(reason::COMPACTED)) => {
            "`portwarden list` shows what is now; watch from its revision on"
        }
        (_, Some(reason::LOW_SPACE)) => {
            "make room on the file systems of the data directories, or release something; \
             `portwarden status` says whose"
        }
        (Code::FailedPrecondition, _) => match broken.map(|b| b.r#type.as_str()) {
            Some(precondition::TOKEN | precondition::VERSION | precondition::PORT_NOT_HELD) => {
                "`portwarden get NAME` shows its token, version and ports"
            }
            Some(precondition::WORKER_NOT_READY) => {
                "`portwarden worker uncordon NAME` makes a cordoned or draining one ready again, \
                 `worker verify` one that was restored, and its agent one that is lost"
            }
            Some(precondition::WORKER_IN_USE | precondition::WOULD_LOSE) => {
                "`portwarden list --worker NAME` shows what it holds"
            }
            Some(precondition::LINGERING) => {
                "its holder may confirm it anew; an operator may `portwarden release NAME --force`"
            }
            Some(precondition::PORT_NOT_FREE) => "`portwarden worker get NAME` shows its ports",
            _ => return None,
        },
        _ => return None,
    };
    Some(text.into())
}
