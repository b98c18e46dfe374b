//! Many commands over one stream: for schedulers that place hundreds of instances at a time.
//!
//! What callers ask for at the same time travels in the same messages, and the answers come back in
//! their order. A command that the stream does not settle (it broke, or the node could not serve)
//! goes on as a call of its own, under the same uid or token, through the other endpoints: whoever
//! calls hears the same as from the unary methods. What an overloaded node refuses goes over the stream
//! again, after the pause that it asks for. All of that within the client's timeout, which goes with the
//! commands, and what its caller waits for no longer is not sent. What confirms, moves on or frees does not
//! wait behind what allocates or reads.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::pending;
use futures::{StreamExt as _, stream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Status, Streaming};

use super::Client;
use super::call::{Tour, by, methods};
use super::error::{ClientError, Verdict, judge};
use crate::proto::session::{SESSION_MAX_BYTES, Size};
use crate::proto::v1;
pub use v1::session_answer::Answer;
pub use v1::session_command::Command;

const PATH: &str = "/portwarden.v1.Allocator/Session";
/// Commands under way on one stream, and their bytes; what comes then waits for the answers. A node takes a MiB
/// before it has read it: a stream that waits for more room there cannot be ended.
const WINDOW: usize = 8192;
const WINDOW_BYTES: usize = SESSION_MAX_BYTES;
/// Commands that go on as calls of their own at a time.
const ALONE_AT_ONCE: usize = 64;
/// Calls that may wait for their turn in each of the two queues.
const JOBS_MAX: usize = 1024;

/// Cheap to clone; clones share the stream. It is opened when first used, and ends with the last clone.
#[derive(Clone)]
pub struct Session {
    client: Client,
    jobs: Jobs,
}

/// Where jobs are put.
#[derive(Clone)]
struct Jobs {
    urgent: mpsc::Sender<Job>,
    others: mpsc::Sender<Job>,
}

/// And from where they are sent: the urgent ones first.
struct Queue {
    urgent: mpsc::Receiver<Job>,
    others: mpsc::Receiver<Job>,
    /// Did not fit beside what was under way. It goes before all others.
    next: Option<Job>,
}

impl Queue {
    fn new() -> (Jobs, Queue) {
        let (urgent, first) = mpsc::channel(JOBS_MAX);
        let (others, then) = mpsc::channel(JOBS_MAX);
        (Jobs { urgent, others }, Queue { urgent: first, others: then, next: None })
    }

    /// The next that fits beside what is under way; `None` once nobody can ask for anything any more. May be
    /// dropped and called again.
    async fn recv(&mut self, load: Load) -> Option<Job> {
        if self.next.is_none() {
            self.next = tokio::select! {
                biased;
                Some(job) = self.urgent.recv() => Some(job),
                Some(job) = self.others.recv() => Some(job),
                else => return None,
            };
        }
        match self.next.take_if(|job| load.takes(job)) {
            Some(job) => Some(job),
            // The answers make room.
            None => pending().await,
        }
    }

    fn try_recv(&mut self, load: Load) -> Option<Job> {
        let next = self.next.take().or_else(|| self.urgent.try_recv().ok());
        self.next = next.or_else(|| self.others.try_recv().ok());
        self.next.take_if(|job| load.takes(job))
    }

    /// One of those that are not urgent, unless another one waits for room.
    fn try_recv_other(&mut self, load: Load) -> Option<Job> {
        self.next = self.next.take().or_else(|| self.others.try_recv().ok());
        self.next.take_if(|job| load.takes(job))
    }
}

/// Commands that fit in one message, and who waits for their answers.
struct Job {
    commands: Vec<v1::SessionCommand>,
    size: Size,
    /// Whoever waits gives up then.
    deadline: Instant,
    /// Whoever sets it first decides: the stream that it is sent, the caller that it is not.
    decided: Arc<AtomicBool>,
    done: Done,
}

impl Job {
    /// Is it to be sent?
    fn decide_to_send(&self, now: Instant) -> bool {
        let waited_for = now < self.deadline && !self.done.is_closed();
        waited_for && !self.decided.swap(true, Ordering::AcqRel)
    }
}

/// The answers; or, where the stream gave none, why that leaves it open what became of the commands.
/// `None`: they were not sent.
type Given = Result<Vec<Answer>, Option<String>>;
type Done = oneshot::Sender<Given>;

impl Client {
    pub fn session(&self) -> Session {
        let (jobs, queue) = Queue::new();
        tokio::spawn(drive(self.clone(), queue));
        Session { client: self.clone(), jobs }
    }
}

impl Session {
    /// As [`Client::allocate`].
    pub async fn allocate(
        &self,
        claims: Vec<v1::Claim>,
    ) -> Result<v1::AllocateResponse, ClientError> {
        let request = v1::AllocateRequest { claims, dry_run: false };
        match self.one(Command::Allocate(request)).await? {
            Answer::Allocate(response) => Ok(response),
            other => Err(another(other)),
        }
    }

    /// As [`Client::get`], linearizable.
    pub async fn get(&self, name: &str) -> Result<v1::GetResponse, ClientError> {
        let request = v1::GetRequest { name: name.into(), read: None };
        match self.one(Command::Get(request)).await? {
            Answer::Get(response) => Ok(response),
            other => Err(another(other)),
        }
    }

    /// As [`Client::confirm_with`].
    pub async fn confirm(
        &self,
        request: v1::ConfirmRequest,
    ) -> Result<v1::ConfirmResponse, ClientError> {
        match self.one(Command::Confirm(request)).await? {
            Answer::Confirm(response) => Ok(response),
            other => Err(another(other)),
        }
    }

    /// As [`Client::release`].
    pub async fn release(
        &self,
        name: &str,
        token: u64,
    ) -> Result<v1::ReleaseResponse, ClientError> {
        match self.one(release(name, token)).await? {
            Answer::Release(response) => Ok(response),
            other => Err(another(other)),
        }
    }

    async fn one(&self, command: Command) -> Result<Answer, ClientError> {
        let mut answers = self.all(vec![command]).await;
        answers.pop().unwrap_or_else(|| Err(lost()))
    }

    /// Each command's own answer, in their order. They may be applied in any order. Claims without a
    /// uid get one.
    pub async fn all(&self, mut commands: Vec<Command>) -> Vec<Result<Answer, ClientError>> {
        for command in &mut commands {
            if let Command::Allocate(request) = command {
                self.client.give_uids(&mut request.claims);
            }
        }
        let deadline = Instant::now() + self.client.timeout;
        let mut answers: BTreeMap<usize, Result<Answer, ClientError>> = BTreeMap::new();
        let mut left: Vec<(usize, Command)> = commands.into_iter().enumerate().collect();
        let mut was_overloaded = false;
        loop {
            let (places, commands): (Vec<usize>, Vec<Command>) = left.into_iter().unzip();
            let (mut rest, mut refused, mut pause) = (Vec::new(), Vec::new(), Duration::ZERO);
            for (at, (command, settled)) in
                places.into_iter().zip(self.round(commands, deadline).await)
            {
                match settled {
                    Ok(answer) => drop(answers.insert(at, Ok(answer))),
                    // One that was not sent: what it was refused for before is why.
                    Err(Verdict::NotDone { why, pause: asked })
                        if (was_overloaded || asked.is_some())
                            && !self.client.has_time(asked.unwrap_or_default(), deadline) =>
                    {
                        answers.insert(at, Err(overloaded(why)));
                    }
                    Err(Verdict::NotDone { why, pause: Some(asked) }) => {
                        pause = pause.max(asked);
                        refused.push((at, command, why));
                    }
                    Err(verdict) => rest.push((at, command, verdict)),
                }
            }
            if !rest.is_empty() {
                answers.extend(Box::pin(self.each_alone(rest, deadline)).await);
            }
            if refused.is_empty() {
                return answers.into_values().collect();
            }
            // The cluster is overloaded, and these were not done: again, all of them together.
            let pause = self.client.jitter(pause);
            if !self.client.has_time(pause, deadline) {
                answers.extend(refused.into_iter().map(|(at, _, why)| (at, Err(overloaded(why)))));
                return answers.into_values().collect();
            }
            left = refused.into_iter().map(|(at, command, _)| (at, command)).collect();
            sleep(pause).await;
            was_overloaded = true;
        }
    }

    /// Sends the commands over the stream, in as many messages as it takes.
    async fn round(
        &self,
        commands: Vec<Command>,
        deadline: Instant,
    ) -> Vec<(Command, Result<Answer, Verdict>)> {
        let mut waiting = Vec::new();
        let queue = match commands.iter().all(is_urgent) {
            true => &self.jobs.urgent,
            false => &self.jobs.others,
        };
        let sized = |command| (Size::to_send(&command), command);
        let mut commands = commands.into_iter().map(sized).peekable();
        while let Some((mut size, first)) = commands.next() {
            let mut part = vec![first];
            while let Some((more, next)) =
                commands.next_if(|(more, _)| size.and(*more).beyond().is_none())
            {
                size = size.and(more);
                part.push(next);
            }
            waiting.push(self.submit(queue, part, size, deadline).await);
        }
        let mut settled = Vec::new();
        for (part, given) in waiting {
            settled.extend(settle(part, given.await));
        }
        settled
    }

    /// Sends commands on their way. They are kept, for what the stream does not settle.
    async fn submit(
        &self,
        queue: &mpsc::Sender<Job>,
        commands: Vec<Command>,
        size: Size,
        deadline: Instant,
    ) -> (Vec<Command>, impl Future<Output = Given> + use<>) {
        let (done, settled) = oneshot::channel();
        let decided = Arc::new(AtomicBool::new(false));
        let queued = match size.beyond() {
            None => {
                let numbered = |command: &Command| v1::SessionCommand {
                    id: 0,
                    command: Some(command.clone()),
                };
                let commands = commands.iter().map(numbered).collect();
                let job = Job { commands, size, deadline, decided: decided.clone(), done };
                matches!(timeout_at(deadline, queue.send(job)).await, Ok(Ok(())))
            }
            // A node refuses it, with the reason, as a call of its own.
            Some(_) => false,
        };
        let settled = async move {
            if !queued {
                return Err(None);
            }
            match timeout_at(deadline, settled).await {
                Ok(Ok(given)) => given,
                _ if !decided.swap(true, Ordering::AcqRel) => Err(None),
                Ok(Err(_)) => Err(Some("the session ended".into())),
                Err(_) => Err(Some("no answer on the session in time".into())),
            }
        };
        (commands, settled)
    }

    /// Each command, with its place, as a call of its own. Seldom needed, and large: boxed where it is.
    async fn each_alone(
        &self,
        commands: Vec<(usize, Command, Verdict)>,
        deadline: Instant,
    ) -> Vec<(usize, Result<Answer, ClientError>)> {
        let alone = commands.into_iter().map(|(at, command, verdict)| async move {
            (at, self.go_on(command, verdict, deadline).await)
        });
        stream::iter(alone).buffer_unordered(ALONE_AT_ONCE).collect().await
    }

    /// The command as a call of its own, where that may change what became of it.
    async fn go_on(
        &self,
        command: Command,
        verdict: Verdict,
        deadline: Instant,
    ) -> Result<Answer, ClientError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let doubt = match verdict {
            Verdict::Refused(refused) => return Err(ClientError::Refused(refused)),
            Verdict::NotDone { why, pause } if !self.client.has_time(Duration::ZERO, deadline) => {
                return Err(ClientError::Unavailable { why, overloaded: pause.is_some() });
            }
            Verdict::Doubtful { why } if left.is_zero() => {
                return Err(ClientError::OutcomeUnknown { why });
            }
            Verdict::NotDone { .. } => None,
            Verdict::Doubtful { why } => Some(why),
        };
        let client = &self.client.with_timeout(left);
        Ok(match command {
            Command::Allocate(request) => {
                Answer::Allocate(client.call_after(methods::ALLOCATE, request, doubt).await?)
            }
            Command::Confirm(request) => {
                Answer::Confirm(client.call_after(methods::CONFIRM, request, doubt).await?)
            }
            Command::Attach(request) => {
                Answer::Attach(client.call_after(methods::ATTACH, request, doubt).await?)
            }
            Command::Release(request) => {
                let method = match request.authority {
                    Some(v1::release_request::Authority::Force(_)) => methods::FORCE_RELEASE,
                    _ => methods::RELEASE,
                };
                Answer::Release(client.call_after(method, request, doubt).await?)
            }
            Command::ReportConflict(request) => Answer::ReportConflict(
                client.call_after(methods::REPORT_CONFLICT, request, doubt).await?,
            ),
            Command::Get(request) => {
                Answer::Get(client.call_after(methods::GET, request, None).await?)
            }
        })
    }
}

/// As the node has it.
fn is_urgent(command: &Command) -> bool {
    match command {
        Command::Confirm(_)
        | Command::Attach(_)
        | Command::Release(_)
        | Command::ReportConflict(_) => true,
        Command::Allocate(_) | Command::Get(_) => false,
    }
}

/// What the stream said of each command.
fn settle(commands: Vec<Command>, given: Given) -> Vec<(Command, Result<Answer, Verdict>)> {
    match given {
        Ok(answers) => {
            let one = |answer| match answer {
                Answer::Error(error) => Err(judge(status(error))),
                answer => Ok(answer),
            };
            commands.into_iter().zip(answers.into_iter().map(one)).collect()
        }
        Err(doubt) => {
            let verdict = || match doubt.clone() {
                None => Verdict::NotDone { why: "it was not sent".into(), pause: None },
                Some(why) => Verdict::Doubtful { why },
            };
            commands.into_iter().map(|command| (command, Err(verdict()))).collect()
        }
    }
}

/// A release by its holder, for [`Session::all`].
pub fn release(name: &str, token: u64) -> Command {
    let authority = Some(v1::release_request::Authority::Token(token));
    Command::Release(v1::ReleaseRequest { name: name.into(), authority })
}

/// A stream, and what is under way on it.
struct Line {
    messages: mpsc::UnboundedSender<Message>,
    answers: Streaming<v1::SessionResponse>,
    under_way: VecDeque<Waiting>,
    load: Load,
    /// Callers whose answers came together last; they may ask again together.
    answered: usize,
    timeout: Duration,
    /// With it goes what was not sent.
    _ends: oneshot::Sender<()>,
}

/// What is under way.
#[derive(Debug, Clone, Copy, Default)]
struct Load {
    commands: usize,
    /// Of those that are answered together, until all of them are.
    bytes: usize,
}

impl Load {
    fn takes(self, job: &Job) -> bool {
        let bytes = self.bytes + job.size.bytes();
        self.commands < WINDOW && (self.bytes == 0 || bytes <= WINDOW_BYTES)
    }

    fn add(&mut self, job: &Job) {
        self.commands += job.commands.len();
        self.bytes += job.size.bytes();
    }
}

struct Waiting {
    /// Answers still to come.
    missing: usize,
    bytes: usize,
    answers: Vec<Answer>,
    overdue: Instant,
    done: Done,
}

/// Commands that travel together, and have the same time there.
struct Message {
    commands: Vec<v1::SessionCommand>,
    size: Size,
    /// When the first of those who wait gives up, or the stream is given up.
    earliest: Instant,
    latest: Instant,
}

impl Message {
    fn new(commands: Vec<v1::SessionCommand>, size: Size, until: Instant) -> Message {
        Message { commands, size, earliest: until, latest: until }
    }

    /// Takes in another one, where that keeps within bounds, and none loses more than half of its time.
    fn join(&mut self, other: Message, now: Instant) -> Result<(), Message> {
        let size = self.size.and(other.size);
        let (earliest, latest) = (self.earliest.min(other.earliest), self.latest.max(other.latest));
        if size.beyond().is_some() || latest - now > 2 * (earliest - now) {
            return Err(other);
        }
        self.commands.extend(other.commands);
        (self.size, self.earliest, self.latest) = (size, earliest, latest);
        Ok(())
    }

    /// It may have waited until it could be sent.
    fn request(self, now: Instant) -> v1::SessionRequest {
        let left = self.earliest.saturating_duration_since(now).as_millis();
        // 0 would be the node's default.
        v1::SessionRequest { commands: self.commands, timeout_ms: left.clamp(1, 60_000) as u32 }
    }
}

async fn drive(client: Client, mut queue: Queue) {
    let mut tour = client.tour();
    while let Some(first) = queue.recv(Load::default()).await {
        let timeout = client.shared.attempt_timeout;
        let (messages, outgoing) = mpsc::unbounded_channel();
        let (ends, ended) = oneshot::channel::<()>();
        let outgoing = UnboundedReceiverStream::new(outgoing)
            .map(|message: Message| message.request(Instant::now()))
            .take_until(ended);
        let answers = match client.open(PATH, tour.door(), outgoing).await {
            Ok(answers) => answers,
            Err(verdict) => {
                tracing::debug!(at = tour.door().name, ?verdict, "a session was not opened");
                // Their callers try by themselves, while they have time.
                let waiting = std::iter::from_fn(|| queue.try_recv(Load::default()));
                std::iter::once(first)
                    .chain(waiting)
                    .for_each(|job| drop(job.done.send(Err(None))));
                sleep(tour.move_on(None)).await;
                continue;
            }
        };
        let (under_way, load) = Default::default();
        let mut line =
            Line { messages, answers, under_way, load, answered: 0, timeout, _ends: ends };
        line.send(vec![first]);
        let Some(why) = line.serve(&mut queue, &mut tour).await else { return };
        let why = by(tour.door(), why);
        tracing::debug!(why, "a session broke");
        // No command is still to come to the node when its caller goes on without it.
        let under_way = std::mem::take(&mut line.under_way);
        drop(line);
        for waiting in under_way {
            let _ = waiting.done.send(Err(Some(why.clone())));
        }
        sleep(tour.move_on(None)).await;
    }
}

impl Line {
    /// Until the stream breaks, and why; or until nobody can ask for anything any more.
    async fn serve(&mut self, queue: &mut Queue, tour: &mut Tour) -> Option<String> {
        let mut over = false;
        loop {
            if over && self.under_way.is_empty() {
                return None;
            }
            let overdue = self.under_way.front().map(|waiting| waiting.overdue);
            tokio::select! {
                biased;
                answers = self.answers.message() => match answers {
                    Ok(Some(response)) => {
                        tour.answered();
                        self.answered = 0;
                        if response.answers.into_iter().any(|answer| !self.take(answer)) {
                            return Some("an answer that nobody asked for".into());
                        }
                    }
                    Ok(None) => return Some("the node ended the session".into()),
                    Err(status) => return Some(status.message().to_string()),
                },
                first = queue.recv(self.load), if !over => {
                    let Some(first) = first else {
                        over = true;
                        continue;
                    };
                    let mut jobs = vec![first];
                    self.gather(&mut jobs, queue);
                    if self.is_shared() {
                        // Whoever else is about to ask goes in the same message.
                        yield_now().await;
                        self.gather(&mut jobs, queue);
                    }
                    self.send(jobs);
                }
                () = sleep_until(overdue.unwrap_or_else(Instant::now)), if overdue.is_some() => {
                    return Some(format!("no answer within {} ms", self.timeout.as_millis()));
                }
            }
        }
    }

    /// Do several ask at about the same time? One who is alone does not wait for others.
    fn is_shared(&self) -> bool {
        !self.under_way.is_empty() || self.answered > 1
    }

    /// Adds what is there already, while there is room: an urgent one may come yet. One of the others goes
    /// along in any case, or a flood of urgent ones would keep them all.
    fn gather(&self, jobs: &mut Vec<Job>, queue: &mut Queue) {
        let mut load = self.load;
        jobs.iter().for_each(|job| load.add(job));
        if let Some(job) = queue.try_recv_other(load) {
            load.add(&job);
            jobs.push(job);
        }
        while let Some(job) = queue.try_recv(load) {
            load.add(&job);
            jobs.push(job);
        }
    }

    /// Packs the jobs into as few messages as may be.
    fn send(&mut self, jobs: Vec<Job>) {
        let now = Instant::now();
        let overdue = now + self.timeout;
        let mut message: Option<Message> = None;
        for job in jobs.into_iter().filter(|job| job.decide_to_send(now)) {
            self.load.add(&job);
            let (missing, bytes) = (job.commands.len(), job.size.bytes());
            let answers = Vec::with_capacity(missing);
            self.under_way.push_back(Waiting { missing, bytes, answers, overdue, done: job.done });
            let next = Message::new(job.commands, job.size, job.deadline.min(overdue));
            let apart = match &mut message {
                Some(message) => message.join(next, now).err(),
                None => Some(next),
            };
            if let Some(next) = apart {
                message.replace(next).into_iter().for_each(|full| self.dispatch(full));
            }
        }
        message.into_iter().for_each(|last| self.dispatch(last));
    }

    fn dispatch(&self, message: Message) {
        // A stream that broke is found so by its answers.
        let _ = self.messages.send(message);
    }

    /// The next answer, for whoever waits for it. False where nobody does.
    fn take(&mut self, answer: v1::SessionAnswer) -> bool {
        let (Some(waiting), Some(answer)) = (self.under_way.front_mut(), answer.answer) else {
            return false;
        };
        waiting.answers.push(answer);
        waiting.missing -= 1;
        self.load.commands -= 1;
        if waiting.missing == 0
            && let Some(Waiting { answers, done, bytes, .. }) = self.under_way.pop_front()
        {
            self.load.bytes -= bytes;
            let _ = done.send(Ok(answers));
            self.answered += 1;
        }
        true
    }
}

fn status(error: v1::SessionError) -> Status {
    Status::with_details(error.code.into(), error.message, error.details.into())
}

fn overloaded(why: String) -> ClientError {
    ClientError::Unavailable { why, overloaded: true }
}

fn another(answer: Answer) -> ClientError {
    ClientError::OutcomeUnknown {
        why: format!("the answer is that of another command: {answer:?}"),
    }
}

fn lost() -> ClientError {
    ClientError::OutcomeUnknown { why: "the session lost the answer".into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Options;
    use crate::proto::{DOMAIN, reason};
    use tonic::Code;
    use tonic_types::{ErrorDetails, StatusExt as _};

    /// Where it is known that nothing was done, a try that cannot be answered would leave it unknown.
    #[tokio::test(start_paused = true)]
    async fn no_try_begins_without_time_for_its_answer() {
        let options = Options::default();
        let options = Options { timeout: Duration::from_secs(2), seed: Some(1), ..options };
        let client = Client::connect(vec!["127.0.0.1:1".into()], options).unwrap();
        let (jobs, mut queue) = Queue::new();
        let session = Session { client, jobs };
        let refuses = tokio::spawn(async move {
            let reason = reason::OVERLOADED;
            let mut details = ErrorDetails::with_error_info(reason, DOMAIN, []);
            details.set_retry_info(Some(Duration::from_millis(1_800)));
            let code = Code::ResourceExhausted;
            let status = Status::with_error_details(code, "overloaded", details);
            let (message, details) = (status.message().into(), status.details().to_vec());
            let refused = Answer::Error(v1::SessionError { code: code.into(), message, details });
            let mut tries = 0;
            while let Some(job) = queue.recv(Load::default()).await {
                let left = job.deadline.saturating_duration_since(Instant::now());
                assert!(left >= Duration::from_millis(50), "{left:?}");
                tries += 1;
                let _ = job.done.send(Ok(vec![refused.clone()]));
            }
            tries
        });
        for _ in 0..1_000 {
            let refused = session.release("a", 1).await.unwrap_err();
            assert!(matches!(refused, ClientError::Unavailable { overloaded: true, .. }));
        }
        drop(session);
        let tries = refuses.await.unwrap();
        assert!(tries > 1_000, "none had another try");
    }

    fn job(deadline: Instant) -> Job {
        let commands = vec![v1::SessionCommand { id: 0, command: Some(release("a", 1)) }];
        let (size, decided) = (Size::to_send(&release("a", 1)), Arc::default());
        Job { commands, size, deadline, decided, done: oneshot::channel().0 }
    }

    #[test]
    fn commands_travel_with_those_that_have_about_as_much_time() {
        let now = Instant::now();
        let until = |ms| {
            let Job { commands, size, .. } = job(now);
            Message::new(commands, size, now + Duration::from_millis(ms))
        };
        let mut message = until(1_000);
        assert!(message.join(until(501), now).is_ok());
        assert!(message.join(until(499), now).is_err(), "half of the longest");
        assert!(message.join(until(1_003), now).is_err(), "twice the shortest");
        assert!(message.join(until(1_002), now).is_ok());
        let sent_late = message.request(now + Duration::from_millis(100));
        assert_eq!((sent_late.commands.len(), sent_late.timeout_ms), (3, 401));
        assert_eq!(until(5).request(now + Duration::from_secs(1)).timeout_ms, 1);
    }

    #[test]
    fn what_its_caller_gave_up_is_not_sent() {
        let now = Instant::now();
        let given_up = job(now + Duration::from_secs(1));
        assert!(!given_up.decide_to_send(now));
        let (done, _waits) = oneshot::channel();
        let job = Job { done, ..given_up };
        assert!(!job.decide_to_send(job.deadline));
        assert!(job.decide_to_send(now));
        assert!(!job.decide_to_send(now), "it is decided");
    }

    #[tokio::test]
    async fn what_is_urgent_overtakes_what_waits() {
        let (jobs, mut queue) = Queue::new();
        let client = Client::connect(vec!["127.0.0.1:1".into()], Default::default()).unwrap();
        let session = Session { client, jobs };
        let get = || Command::Get(v1::GetRequest { name: "a".into(), read: None });
        for commands in [vec![get()], vec![release("a", 1), get()], vec![release("b", 1)]] {
            let session = session.clone();
            tokio::spawn(async move { session.all(commands).await });
            yield_now().await;
        }
        let idle = Load::default();
        let mut sent = vec![queue.recv(idle).await.unwrap()];
        sent.extend(std::iter::from_fn(|| queue.try_recv(idle)));
        let commands = |job: Job| job.commands.into_iter().filter_map(|one| one.command).collect();
        let sent: Vec<Vec<Command>> = sent.into_iter().map(commands).collect();
        assert_eq!(sent, [vec![release("b", 1)], vec![get()], vec![release("a", 1), get()]]);
    }

    /// Nothing overtakes it then: what is urgent would keep it for ever.
    #[tokio::test]
    async fn what_does_not_fit_beside_what_is_under_way_is_next() {
        let (jobs, mut queue) = Queue::new();
        let until = Instant::now() + Duration::from_secs(1);
        let large = release(&"x".repeat(WINDOW_BYTES / 2), 1);
        let large = || Job { size: Size::to_send(&large), ..job(until) };
        let mut load = Load::default();
        for _ in 0..2 {
            jobs.others.send(large()).await.unwrap();
        }
        load.add(&queue.recv(load).await.unwrap());
        assert!(queue.try_recv(load).is_none(), "the bytes around it");
        jobs.urgent.send(job(until)).await.unwrap();
        assert!(queue.try_recv(load).is_none());
        assert!(queue.try_recv_other(load).is_none());
        let waits = tokio::time::timeout(Duration::from_millis(10), queue.recv(load));
        assert!(waits.await.is_err());
        let mut sizes = Vec::new();
        while let Some(job) = queue.try_recv(Load::default()) {
            sizes.push(job.size.bytes() > WINDOW_BYTES / 2);
        }
        assert_eq!(sizes, [true, false]);
        let beyond =
            Job { size: Size::to_send(&release(&"x".repeat(WINDOW_BYTES), 1)), ..job(until) };
        assert!(Load::default().takes(&beyond), "it would never go");
    }
}
