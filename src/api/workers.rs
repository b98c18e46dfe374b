//! `portwarden.v1.Workers`: the machines that instances run on.

use tonic::{Request, Response, Status};

use super::convert::Addresses;
use super::dispatch::{Api, Failure, Freshness, Method, Read, Reading, Write, Writing};
use super::pages::{PageToken, fill, page_size};
use super::{convert, errors};
use crate::core::{Actor, Command, Outcome, Refusal, Revision, Selector, State, WorkerName};
use crate::node::Deadline;
use crate::node::sweeper::{Heard, Sample, Unheard};
use crate::proto::v1;

fn worker_answer(revision: u64, outcome: Outcome) -> Option<v1::WorkerResponse> {
    let Outcome::Worker(worker) = outcome else { return None };
    Some(v1::WorkerResponse { worker: Some(convert::worker(&worker)), revision })
}

/// A method that makes one command of its request and answers with the worker.
macro_rules! worker_write {
    ($name:ident, $request:ty, $path:literal, $command:expr) => {
        pub(super) struct $name;

        impl Write for $name {
            type Request = $request;
            type Response = v1::WorkerResponse;
            const PATH: &'static str = $path;

            fn command(request: &$request) -> Result<Command, Status> {
                let command: fn(&$request) -> Result<Command, Status> = $command;
                command(request)
            }

            fn answer(
                revision: u64,
                outcome: Outcome,
                _: &impl Addresses,
            ) -> Option<v1::WorkerResponse> {
                worker_answer(revision, outcome)
            }
        }
    };
}

worker_write!(Register, v1::RegisterRequest, "/portwarden.v1.Workers/Register", |request| {
    Ok(Command::RegisterWorker {
        name: convert::worker_name("name", &request.name)?,
        spec: convert::worker_spec(request.spec.as_ref())?,
    })
});

worker_write!(Update, v1::UpdateRequest, "/portwarden.v1.Workers/Update", |request| {
    Ok(Command::UpdateWorker {
        name: convert::worker_name("name", &request.name)?,
        patch: convert::worker_patch(request.spec.as_ref(), &request.fields)?,
    })
});

worker_write!(SetPhase, v1::SetPhaseRequest, "/portwarden.v1.Workers/SetPhase", |request| {
    Ok(Command::SetWorkerPhase {
        name: convert::worker_name("name", &request.name)?,
        phase: convert::settable_phase(request.phase)?,
        by: Actor::Operator,
    })
});

worker_write!(Verify, v1::VerifyRequest, "/portwarden.v1.Workers/Verify", |request| {
    let name = convert::worker_name("name", &request.name)?;
    Ok(Command::VerifyWorker { name, by: Actor::Operator })
});

worker_write!(Quarantine, v1::QuarantineRequest, "/portwarden.v1.Workers/Quarantine", |request| {
    Ok(Command::Quarantine {
        worker: convert::worker_name("worker", &request.worker)?,
        ports: convert::ports("ports", &request.ports)?,
        reason: request.reason.clone(),
        by: Actor::Operator,
    })
});

worker_write!(
    LiftQuarantine,
    v1::LiftQuarantineRequest,
    "/portwarden.v1.Workers/LiftQuarantine",
    |request| {
        Ok(Command::LiftQuarantine {
            worker: convert::worker_name("worker", &request.worker)?,
            ports: convert::ports("ports", &request.ports)?,
            by: Actor::Operator,
            seen: Revision(0),
        })
    }
);

/// A sample leaves nothing behind by itself, so that it may be repeated.
pub(super) struct Report;

impl Method for Report {
    type Request = v1::ReportRequest;
    type Response = v1::ReportResponse;
    type Parsed = Sample;
    const PATH: &'static str = "/portwarden.v1.Workers/Report";
    const WRITES: bool = false;

    fn parse(request: &v1::ReportRequest) -> Result<Sample, Status> {
        convert::sample(request).map_err(errors::invalid)
    }

    async fn run(
        api: &Api,
        sample: &Sample,
        deadline: Deadline,
    ) -> Result<v1::ReportResponse, Failure> {
        match api.inner.node.report(sample.clone(), deadline).await {
            Ok(Heard { ignored, revision, lost_after }) => Ok(v1::ReportResponse {
                ignored: ignored.unwrap_or_default().into(),
                revision: revision.0,
                lost_after_ms: lost_after.0,
            }),
            Err(Unheard::Call(error)) => Err(Failure::Call(error)),
            Err(Unheard::NoWorker(name)) => {
                Err(Failure::Answer(errors::refusal(Refusal::NoWorker(name))))
            }
            Err(Unheard::OtherIdentity { worker, held, given }) => {
                let why = Unheard::OtherIdentity { worker: worker.clone(), held, given };
                Err(Failure::Answer(errors::other_identity(&worker, &why.to_string())))
            }
        }
    }
}

pub(super) struct Remove;

impl Write for Remove {
    type Request = v1::RemoveRequest;
    type Response = v1::RemoveResponse;
    const PATH: &'static str = "/portwarden.v1.Workers/Remove";

    fn command(request: &v1::RemoveRequest) -> Result<Command, Status> {
        Ok(Command::RemoveWorker {
            name: convert::worker_name("name", &request.name)?,
            force: request.force.as_ref().map(|force| force.reason.clone()),
        })
    }

    fn answer(revision: u64, outcome: Outcome, _: &impl Addresses) -> Option<v1::RemoveResponse> {
        let Outcome::WorkerRemoved { removed } = outcome else { return None };
        Some(v1::RemoveResponse { removed, revision })
    }
}

pub(super) struct Get;

impl Read for Get {
    type Request = v1::GetWorkerRequest;
    type Response = v1::WorkerResponse;
    type Query = WorkerName;
    const PATH: &'static str = "/portwarden.v1.Workers/Get";

    fn query(request: &v1::GetWorkerRequest) -> Result<(Freshness, WorkerName), Status> {
        let name = convert::worker_name("name", &request.name)?;
        Ok((Freshness::parse(request.read.as_ref())?, name))
    }

    fn answer(_: &Api, view: &State, name: &WorkerName) -> Result<v1::WorkerResponse, Status> {
        get(view, name)
    }
}

pub(super) fn get(view: &State, name: &WorkerName) -> Result<v1::WorkerResponse, Status> {
    let found = view.worker(name);
    let found = found.ok_or_else(|| errors::refusal(Refusal::NoWorker(name.clone())))?;
    Ok(v1::WorkerResponse { worker: Some(convert::worker(found)), revision: view.revision.0 })
}

pub(super) struct List;

pub(super) struct ListQuery {
    selector: Selector,
    size: usize,
    token: Option<PageToken>,
}

impl Read for List {
    type Request = v1::ListWorkersRequest;
    type Response = v1::ListWorkersResponse;
    type Query = ListQuery;
    const PATH: &'static str = "/portwarden.v1.Workers/List";

    fn query(request: &v1::ListWorkersRequest) -> Result<(Freshness, ListQuery), Status> {
        let query = ListQuery {
            selector: convert::selector(&request.selector)?,
            size: page_size(request.page_size)?,
            token: PageToken::parse(&request.page_token)?,
        };
        Ok((Freshness::parse(request.read.as_ref())?, query))
    }

    fn resumes(query: &ListQuery) -> Option<&PageToken> {
        query.token.as_ref()
    }

    fn answer(
        api: &Api,
        view: &State,
        query: &ListQuery,
    ) -> Result<v1::ListWorkersResponse, Status> {
        let after = query.token.as_ref().map(|token| token.place(WorkerName::parse));
        let after = after.transpose()?;
        let workers = view.workers_after(after.as_ref()).map(|worker| {
            let shown = query.selector.matches(&worker.spec.labels);
            (worker.name.as_str(), shown.then(|| convert::worker(worker)))
        });
        let page = fill(workers, query.size);
        Ok(v1::ListWorkersResponse {
            workers: page.items,
            next_page_token: api.more(view, query.token.as_ref(), page.after),
            revision: view.revision.0,
        })
    }
}

#[tonic::async_trait]
impl v1::workers_server::Workers for Api {
    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::WorkerResponse>, Status> {
        self.serve_unary::<Writing<Register>>(request).await
    }

    async fn update(
        &self,
        request: Request<v1::UpdateRequest>,
    ) -> Result<Response<v1::WorkerResponse>, Status> {
        self.serve_unary::<Writing<Update>>(request).await
    }

    async fn set_phase(
        &self,
        request: Request<v1::SetPhaseRequest>,
    ) -> Result<Response<v1::WorkerResponse>, Status> {
        self.serve_unary::<Writing<SetPhase>>(request).await
    }

    async fn verify(
        &self,
        request: Request<v1::VerifyRequest>,
    ) -> Result<Response<v1::WorkerResponse>, Status> {
        self.serve_unary::<Writing<Verify>>(request).await
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveRequest>,
    ) -> Result<Response<v1::RemoveResponse>, Status> {
        self.serve_unary::<Writing<Remove>>(request).await
    }

    async fn get(
        &self,
        request: Request<v1::GetWorkerRequest>,
    ) -> Result<Response<v1::WorkerResponse>, Status> {
        self.serve_unary::<Reading<Get>>(request).await
    }

    async fn list(
        &self,
        request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        self.serve_unary::<Reading<List>>(request).await
    }

    async fn quarantine(
        &self,
        request: Request<v1::QuarantineRequest>,
    ) -> Result<Response<v1::WorkerResponse>, Status> {
        self.serve_unary::<Writing<Quarantine>>(request).await
    }

    async fn report(
        &self,
        request: Request<v1::ReportRequest>,
    ) -> Result<Response<v1::ReportResponse>, Status> {
        self.serve_unary::<Report>(request).await
    }

    async fn lift_quarantine(
        &self,
        request: Request<v1::LiftQuarantineRequest>,
    ) -> Result<Response<v1::WorkerResponse>, Status> {
        self.serve_unary::<Writing<LiftQuarantine>>(request).await
    }
}
