//! `Session`: many commands on one stream.
//!
//! A message of commands is one call through the dispatcher: it goes to the leader whole, its
//! commands are proposed as one group, and they are answered together. Messages are worked on
//! side by side, and answered in their order ([`super::ahead`]).

use std::time::Duration;

use futures::{StreamExt as _, future, stream};
use itertools::Either;
use prost::Message as _;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::ahead::Ahead;
use super::allocator::{Allocate, Attach, Confirm, Release, ReportConflict, allocate_command, get};
use super::dispatch::{Api, Failure, Method, Responses, Write};
use super::observe::{TIMEOUT_DEFAULT, TIMEOUT_MAX};
use super::{convert, errors};
use crate::core::{Command, InstanceName, Invalid, Millis, Outcome, State};
use crate::node::{CallError, Deadline, Written};
use crate::proto::session::Size;
use crate::proto::v1;
use v1::session_answer::Answer;
use v1::session_command::Command as Asked;

/// Messages of one stream that are worked on at a time.
pub const SESSION_MESSAGES_AT_ONCE: usize = 64;
/// Answers go in messages of about this size; a larger one goes alone.
const RESPONSE_BYTES: usize = 1 << 20;

pub(super) struct Session;

/// A command of a message, parsed.
pub(super) enum Step {
    Write(Command),
    Read(InstanceName),
    /// Not one that can be asked for.
    Wrong(Status),
}

impl Method for Session {
    type Request = v1::SessionRequest;
    type Response = v1::SessionResponse;
    /// With the ids.
    type Parsed = Vec<(u64, Step)>;
    const PATH: &'static str = "/portwarden.v1.Allocator/Session";
    const WRITES: bool = true;

    fn parse(request: &v1::SessionRequest) -> Result<Self::Parsed, Status> {
        check_bounds(request)?;
        let steps = request.commands.iter();
        Ok(steps.map(|asked| (asked.id, step(asked).unwrap_or_else(Step::Wrong))).collect())
    }

    async fn run(
        api: &Api,
        steps: &Self::Parsed,
        deadline: Deadline,
    ) -> Result<v1::SessionResponse, Failure> {
        let node = &api.inner.node;
        let within = node.confirm_within();
        let commands = steps.iter().filter_map(|(_, step)| step.command(within)).collect();
        let reads = steps.iter().any(|(_, step)| matches!(step, Step::Read(_)));
        let (applied, read) = future::join(node.propose_all(commands, deadline), async {
            match reads {
                true => Some(node.read(deadline).await),
                false => None,
            }
        })
        .await;
        if let Some(error) = all_elsewhere(&applied, read.as_ref()) {
            return Err(Failure::Call(error));
        }
        let mut applied = applied.into_iter();
        let answer = |(id, step): &(u64, Step)| {
            let answer = match (step, &read) {
                (Step::Wrong(status), _) => Err(status.clone()),
                (Step::Write(_), _) => match applied.next() {
                    Some(applied) => written(applied),
                    None => Err(errors::outcome_unknown("the command got no answer")),
                },
                (Step::Read(name), Some(Ok(view))) => get(view, name).map(Answer::Get),
                (Step::Read(_), Some(Err(error))) => Err(errors::call(error.clone())),
                (Step::Read(_), None) => Err(errors::not_ready("nothing was read")),
            };
            answered(*id, answer)
        };
        Ok(v1::SessionResponse { answers: steps.iter().map(answer).collect() })
    }
}

impl Step {
    /// What is proposed for it. `within` is the leader's to fill in.
    fn command(&self, within: Millis) -> Option<Command> {
        match self {
            Step::Write(Command::Allocate { claims, .. }) => {
                Some(Command::Allocate { claims: claims.clone(), confirm_within: within })
            }
            Step::Write(command) => Some(command.clone()),
            Step::Read(_) | Step::Wrong(_) => None,
        }
    }
}

fn check_bounds(request: &v1::SessionRequest) -> Result<(), Status> {
    let sizes = request.commands.iter().map(|asked| Size::of(asked.command.as_ref()));
    let (timeout_ms, longest) = (u64::from(request.timeout_ms), TIMEOUT_MAX.as_millis() as u64);
    let late = (timeout_ms > longest).then_some(("timeout_ms", timeout_ms, longest));
    match sizes.fold(Size::default(), Size::and).beyond().or(late) {
        Some((field, given, limit)) => {
            let limit = format!("at most {limit} in one message");
            Err(errors::invalid(Invalid::new(field, given, limit)))
        }
        None => Ok(()),
    }
}

fn step(asked: &v1::SessionCommand) -> Result<Step, Status> {
    fn write<W: Write>(request: &W::Request) -> Result<Step, Status> {
        checked(W::command(request)?)
    }
    fn checked(command: Command) -> Result<Step, Status> {
        command.validate().map_err(errors::invalid)?;
        Ok(Step::Write(command))
    }
    let wrong = |field, value: &str, limit| errors::invalid(Invalid::new(field, value, limit));
    match asked.command.as_ref() {
        Some(Asked::Allocate(request)) if request.dry_run => {
            Err(wrong("dry_run", "true", "false on a session"))
        }
        Some(Asked::Allocate(request)) => {
            checked(allocate_command(&convert::claims(&request.claims)?))
        }
        Some(Asked::Confirm(request)) => write::<Confirm>(request),
        Some(Asked::Attach(request)) => write::<Attach>(request),
        Some(Asked::Release(request)) => write::<Release>(request),
        Some(Asked::ReportConflict(request)) => write::<ReportConflict>(request),
        Some(Asked::Get(request))
            if request.read.is_some_and(|read| read != Default::default()) =>
        {
            Err(wrong("read", "given", "left out on a session"))
        }
        Some(Asked::Get(request)) => Ok(Step::Read(convert::instance(&request.name)?)),
        None => Err(wrong("command", "", "one of those that a session takes")),
    }
}

/// As a unary call of it would be.
fn is_urgent(asked: &v1::SessionCommand) -> bool {
    match asked.command {
        Some(
            Asked::Confirm(_) | Asked::Attach(_) | Asked::Release(_) | Asked::ReportConflict(_),
        ) => true,
        Some(Asked::Allocate(_) | Asked::Get(_)) | None => false,
    }
}

/// The error, where another node leads and nothing was done here: all of it may be sent there.
fn all_elsewhere(
    applied: &[Result<Written, CallError>],
    read: Option<&Result<State, CallError>>,
) -> Option<CallError> {
    let writes = applied.iter().map(|applied| applied.as_ref().err());
    let mut all = writes.chain(read.map(|read| read.as_ref().err())).peekable();
    let first = all.peek().copied().flatten().cloned();
    let elsewhere = |error: Option<&CallError>| matches!(error, Some(CallError::NotLeader { .. }));
    first.filter(|_| all.all(elsewhere))
}

fn written(applied: Result<Written, CallError>) -> Result<Answer, Status> {
    let Written { applied, specs } = applied.map_err(errors::call)?;
    let specs = &*specs;
    let outcome = applied.outcome.map_err(errors::refusal)?;
    let revision = applied.revision.0;
    let answer = match &outcome {
        Outcome::Allocated { .. } => {
            Allocate::answer(revision, outcome, specs).map(Answer::Allocate)
        }
        Outcome::Confirmed(_) => Confirm::answer(revision, outcome, specs).map(Answer::Confirm),
        Outcome::Attached(_) => Attach::answer(revision, outcome, specs).map(Answer::Attach),
        Outcome::Released(_) => Release::answer(revision, outcome, specs).map(Answer::Release),
        Outcome::Swapped(_) | Outcome::Reclaimed { .. } => {
            ReportConflict::answer(revision, outcome, specs).map(Answer::ReportConflict)
        }
        _ => None,
    };
    // It is done: what goes wrong here must not read as if it were not.
    answer.ok_or_else(|| errors::outcome_unknown("it was answered with another's outcome"))
}

fn answered(id: u64, answer: Result<Answer, Status>) -> v1::SessionAnswer {
    let answer = answer.unwrap_or_else(|status| {
        Answer::Error(v1::SessionError {
            code: status.code().into(),
            message: status.message().into(),
            details: status.details().to_vec(),
        })
    });
    v1::SessionAnswer { id, answer: Some(answer) }
}

/// Answers of so many bytes, in messages that are small enough to be sent.
fn in_parts(
    response: v1::SessionResponse,
    bytes: usize,
) -> impl Iterator<Item = v1::SessionResponse> {
    if bytes <= RESPONSE_BYTES {
        return Either::Left((!response.answers.is_empty()).then_some(response).into_iter());
    }
    let mut answers = response.answers.into_iter().peekable();
    Either::Right(std::iter::from_fn(move || {
        let mut part = v1::SessionResponse { answers: vec![answers.next()?] };
        let mut bytes = part.encoded_len();
        while let Some(next) =
            answers.next_if(|answer| bytes + answer.encoded_len() < RESPONSE_BYTES)
        {
            bytes += next.encoded_len();
            part.answers.push(next);
        }
        Some(part)
    }))
}

impl Api {
    pub(super) fn serve_session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Responses<v1::SessionResponse>>, Status> {
        let (metadata, _, messages) = request.into_parts();
        let (api, stopping) = (self.clone(), self.stopping());
        // Messages under way are answered, whatever ends the stream.
        let messages = messages.take_until(Box::pin(stopping));
        let answers = Ahead::new(SESSION_MESSAGES_AT_ONCE).answers(messages, move |message| {
            let (api, metadata) = (api.clone(), metadata.clone());
            async move {
                let response = api.serve_message(metadata, message).await;
                let bytes = response.as_ref().map_or(0, v1::SessionResponse::encoded_len);
                (response, bytes)
            }
        });
        let responses = answers.flat_map(|(response, bytes)| match response {
            Ok(response) => stream::iter(in_parts(response, bytes).map(Ok)).left_stream(),
            Err(status) => stream::iter([Err(status)]).right_stream(),
        });
        Ok(Response::new(Box::pin(responses)))
    }

    /// An error ends the stream.
    pub(super) async fn serve_message(
        self,
        metadata: MetadataMap,
        message: Result<v1::SessionRequest, Status>,
    ) -> Result<v1::SessionResponse, Status> {
        let message = message?;
        check_bounds(&message)?;
        let time = match message.timeout_ms {
            0 => TIMEOUT_DEFAULT,
            ms => Duration::from_millis(ms.into()),
        };
        let urgent = message.commands.iter().any(is_urgent);
        let ids: Vec<u64> = message.commands.iter().map(|asked| asked.id).collect();
        let call = |deadline| self.dispatch::<Session>(message, deadline);
        let response = self.observed_for(time, urgent, Session::PATH, &metadata, call).await;
        Ok(response.map(Response::into_inner).unwrap_or_else(|status| v1::SessionResponse {
            answers: ids.into_iter().map(|id| answered(id, Err(status.clone()))).collect(),
        }))
    }
}
