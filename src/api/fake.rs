//! For tests: a node in memory that fails as told.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tonic::Status;

use super::convert;
use super::dispatch::{Api, Backend, Backup};
use super::{Readiness, serve};
use crate::connections::{Kind, tcp_incoming};
use crate::core::{Command, LeaseId, Millis, Origin, Revision, Specs, State, WorkerName, apply};
use crate::node::members::{MemberChange, NotChanged};
use crate::node::sweeper::{Heard, Sample, Unheard};
use crate::node::watch::Hub;
use crate::node::{CallError, Deadline, ForwardError, MemberReport, NodeId, StatusReport, Written};
use crate::proto::v1;

pub(crate) fn claim(name: &str) -> v1::Claim {
    v1::Claim {
        name: name.into(),
        uid: format!("{name}-uid"),
        placement: Some(v1::claim::Placement::Worker("w".into())),
        ports: vec![count(1)],
        ..Default::default()
    }
}

pub(crate) fn count(n: u32) -> v1::PortRequest {
    request(v1::port_request::Ports::Count(n))
}

pub(crate) fn request(ports: v1::port_request::Ports) -> v1::PortRequest {
    v1::PortRequest { ports: Some(ports), ..Default::default() }
}

pub(crate) fn spec() -> v1::WorkerSpec {
    v1::WorkerSpec {
        address: "10.0.0.1".into(),
        ranges: vec![v1::PortRange { name: "service".into(), first: 40000, last: 40063 }],
        ..Default::default()
    }
}

/// A table with worker `w` and, on it, allocation `a`.
pub(crate) fn table() -> State {
    let mut state = State::default();
    let register = Command::RegisterWorker {
        name: "w".parse().unwrap(),
        spec: convert::worker_spec(Some(&spec())).unwrap(),
    };
    assert!(apply(&mut state, &Origin::default(), &register).0.outcome.is_ok());
    assert!(apply(&mut state, &Origin::default(), &allocate("a")).0.outcome.is_ok());
    state
}

/// What [`claim`] asks for.
pub(crate) fn allocate(name: &str) -> Command {
    Command::allocate(convert::claims(&[claim(name)]).unwrap(), Millis(600_000))
}

pub(crate) type Forwarded = Result<Result<Vec<u8>, Status>, ForwardError>;

/// A node with a table of its own. What is queued happens first; then it leads.
#[derive(Default)]
pub(crate) struct Fake {
    pub state: Mutex<State>,
    /// Answers of `propose` and `read` before the table's own.
    pub failures: Mutex<VecDeque<CallError>>,
    /// Answers of `forward`; while there are any, node 2 leads.
    pub forwards: Mutex<VecDeque<Forwarded>>,
    pub proposed: Mutex<usize>,
    pub reads: Mutex<usize>,
    pub turned_away: Mutex<usize>,
    pub members: Mutex<Vec<MemberReport>>,
    pub hub: Hub,
    /// Told when another node leads.
    pub elections: Notify,
}

#[tonic::async_trait]
impl Backend for Fake {
    fn id(&self) -> NodeId {
        1
    }
    fn check(&self) -> Result<(), CallError> {
        Ok(())
    }
    fn turn_urgent_away(&self) {
        *self.turned_away.lock().unwrap() += 1;
    }
    async fn propose(&self, command: Command, _: Deadline) -> Result<Written, CallError> {
        *self.proposed.lock().unwrap() += 1;
        match self.failures.lock().unwrap().pop_front() {
            Some(error) => Err(error),
            None => {
                let mut state = self.state.lock().unwrap();
                let (applied, _) = apply(&mut state, &Origin::default(), &command);
                let specs = state.specs_of(&applied.workers().collect());
                Ok(Written { applied, specs: Arc::new(specs) })
            }
        }
    }
    async fn propose_all(
        &self,
        commands: Vec<Command>,
        deadline: Deadline,
    ) -> Vec<Result<Written, CallError>> {
        let mut answers = Vec::new();
        for command in commands {
            answers.push(self.propose(command, deadline).await);
        }
        answers
    }
    async fn read(&self, _: Deadline) -> Result<State, CallError> {
        *self.reads.lock().unwrap() += 1;
        match self.failures.lock().unwrap().pop_front() {
            Some(error) => Err(error),
            None => Ok(self.state.lock().unwrap().clone()),
        }
    }
    async fn read_stale(&self, _: Revision, _: Deadline) -> Result<State, CallError> {
        Ok(self.state.lock().unwrap().clone())
    }
    fn specs_of(&self, workers: &BTreeSet<&WorkerName>) -> Specs {
        self.state.lock().unwrap().specs_of(workers)
    }
    async fn route(&self, _: Deadline) -> Result<Option<NodeId>, CallError> {
        Ok((!self.forwards.lock().unwrap().is_empty()).then_some(2))
    }
    async fn led_by_another(&self, _: NodeId) {
        self.elections.notified().await;
    }
    async fn forward(&self, _: NodeId, _: &str, _: Vec<u8>, _: Deadline) -> Forwarded {
        self.forwards.lock().unwrap().pop_front().expect("route saw one")
    }
    fn membership(&self) -> StatusReport {
        let members = self.members.lock().unwrap().clone();
        StatusReport { members, ..StatusReport::default() }
    }
    async fn status(&self, _: Deadline) -> StatusReport {
        StatusReport::default()
    }
    fn hub(&self) -> &Hub {
        &self.hub
    }
    fn confirm_within(&self) -> Millis {
        Millis(600_000)
    }
    async fn keep_alive(&self, id: LeaseId, _: Deadline) -> Result<Option<Millis>, CallError> {
        Ok(self.state.lock().unwrap().lease(id).map(|lease| lease.ttl))
    }
    fn backup(&self) -> Result<Backup, CallError> {
        Ok((v1::SnapshotChunk::default(), mpsc::channel(1).1))
    }
    async fn change_members(&self, _: MemberChange, _: Deadline) -> Result<(), NotChanged> {
        Ok(())
    }
    async fn report(&self, sample: Sample, _: Deadline) -> Result<Heard, Unheard> {
        Err(Unheard::NoWorker(sample.worker))
    }
}

pub(crate) fn fake() -> (Arc<Fake>, Api) {
    let fake = Arc::new(Fake { state: Mutex::new(table()), ..Fake::default() });
    (fake.clone(), Api::over(fake))
}

/// Serves at an address of its own until `shutdown`.
pub(crate) async fn listen(
    api: Api,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let readiness = Readiness::new().await;
    readiness.set(true).await;
    tokio::spawn(serve(api, readiness, tcp_incoming(listener, Kind::Client), shutdown));
    address
}
