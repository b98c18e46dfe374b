//! Conversions at their limits, the status of every refusal, and the rules of the dispatcher.

use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, StreamExt as _};
use prost::Message as _;
use tokio::time::{Instant, sleep};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use super::allocator::EXPLAINING_MAX;
use super::dispatch::{CALLS_IN_FLIGHT_MAX, URGENT_CALLS_MAX};
use super::fake::{claim, count, fake, request, spec, table};
use super::pages::{PAGE_SIZE_MAX, PAGE_SOFT_BYTES, SCAN_MAX, fill, page_size};
use super::session::Session;
use super::{convert, errors};
use crate::core::{
    self, Command, Invalid, LeaseId, Millis, Origin, Refusal, Revision, apply, limits,
};
use crate::node::{CallError, ForwardError, LocalCalls as _};
use crate::proto::v1::allocator_server::Allocator as _;
use crate::proto::{reason, v1};
use crate::raft::ApplyObserver as _;

// Conversions.

/// The field of the violation and its text.
fn violation(status: &Status) -> (String, String) {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let bad = status.get_details_bad_request().expect("a BadRequest");
    (bad.field_violations[0].field.clone(), bad.field_violations[0].description.clone())
}

fn allocating(claims: Vec<Arc<core::Claim>>) -> Command {
    Command::allocate(claims, Millis(600_000))
}

fn checked(claims: Vec<v1::Claim>) -> Result<(), Status> {
    let claims = convert::claims(&claims)?;
    allocating(claims).validate().map_err(errors::invalid)
}

fn refused(change: impl FnOnce(&mut v1::Claim)) -> (String, String) {
    let mut claim = claim("a");
    change(&mut claim);
    violation(&checked(vec![claim]).unwrap_err())
}

fn accepted(change: impl FnOnce(&mut v1::Claim)) {
    let mut claim = claim("a");
    change(&mut claim);
    checked(vec![claim]).unwrap();
}

#[test]
fn a_claim_at_its_limits_is_accepted_and_one_more_is_refused_by_name() {
    let gang = |n| (0..n).map(|i| claim(&format!("a{i}"))).collect::<Vec<_>>();
    checked(gang(limits::CLAIMS_MAX)).unwrap();
    let error = checked(gang(limits::CLAIMS_MAX + 1)).unwrap_err();
    assert_eq!(violation(&error), ("claims".into(), "\"65\" must be 1 to 64 claims".into()));

    // It is kept: without room for more.
    let kept = convert::claims(&[claim("a")]).unwrap();
    assert_eq!(kept[0].ports.capacity(), kept[0].ports.len());

    accepted(|c| c.name = "a".repeat(limits::NAME_MAX_BYTES));
    let (field, text) = refused(|c| c.name = "a".repeat(limits::NAME_MAX_BYTES + 1));
    assert_eq!(field, "claims[0].name");
    assert!(text.contains("253"), "{text}");

    accepted(|c| c.ports = vec![count(limits::PORTS_PER_CLAIM_MAX)]);
    let (field, text) = refused(|c| c.ports = vec![count(limits::PORTS_PER_CLAIM_MAX + 1)]);
    assert_eq!(
        (field.as_str(), text.as_str()),
        ("claims[0].ports[0].count", "\"257\" must be 1 to 256")
    );

    accepted(|c| c.ports = vec![count(1); limits::PORT_REQUESTS_MAX]);
    assert_eq!(
        refused(|c| c.ports = vec![count(1); limits::PORT_REQUESTS_MAX + 1]).0,
        "claims[0].ports"
    );

    let labels = |n| (0..n).map(|i| (format!("k{i}"), String::new())).collect();
    accepted(|c| c.labels = labels(limits::LABELS_MAX));
    assert_eq!(refused(|c| c.labels = labels(limits::LABELS_MAX + 1)).0, "claims[0].labels");

    assert_eq!(refused(|c| c.uid = String::new()).0, "claims[0].uid");
    assert_eq!(refused(|c| c.placement = None).0, "claims[0].placement");
    assert_eq!(refused(|c| c.ports.clear()).0, "claims[0].claim");
    let bad = |c: &mut v1::Claim| c.labels = [("k".to_string(), "ä".to_string())].into();
    assert_eq!(refused(bad).0, "claims[0].labels[k]");
}

#[test]
fn the_largest_request_within_the_limits_can_be_sent() {
    let text = |n: usize| "x".repeat(n);
    let numbered = |i: usize, width: usize| format!("{i:0>width$}");
    let port = |i: usize| v1::PortRequest {
        name: numbered(i, limits::SHORT_NAME_MAX_BYTES),
        range: text(limits::SHORT_NAME_MAX_BYTES),
        ports: Some(v1::port_request::Ports::Specific(65_535 - i as u32)),
    };
    let selector = format!("{:<width$}", "k=v", width = limits::SELECTOR_MAX_BYTES);
    let label =
        |i: usize| (numbered(i, limits::LABEL_KEY_MAX_BYTES), text(limits::LABEL_VALUE_MAX_BYTES));
    let claim = |i: usize| v1::Claim {
        name: numbered(i, limits::NAME_MAX_BYTES),
        uid: text(limits::UID_MAX_BYTES),
        placement: Some(v1::claim::Placement::Select(v1::Selection {
            selector: selector.clone(),
            policy: v1::Policy::Spread.into(),
        })),
        ports: (0..limits::PORT_REQUESTS_MAX).map(port).collect(),
        gpus: Some(v1::GpuRequest {
            count: 0,
            indexes: (0..=limits::GPU_INDEX_MAX).rev().take(limits::GPUS_PER_CLAIM_MAX).collect(),
            share: Some(v1::gpu_request::Share::MemoryBytes(limits::GPU_MEMORY_MAX_BYTES)),
        }),
        labels: (0..limits::LABELS_MAX).map(label).collect(),
        ..v1::Claim::default()
    };
    let claims: Vec<_> = (0..limits::CLAIMS_MAX).map(claim).collect();
    checked(claims.clone()).unwrap();
    let bytes = v1::AllocateRequest { claims, dry_run: false }.encoded_len();
    assert!(bytes <= super::REQUEST_MAX_BYTES, "{bytes}");
}

#[test]
fn ports_end_where_tcp_ends() {
    use v1::port_request::Ports;
    accepted(|c| c.ports = vec![request(Ports::Specific(65_535))]);
    for number in [0, 65_536] {
        let (field, text) = refused(|c| c.ports = vec![request(Ports::Specific(number))]);
        assert_eq!(field, "claims[0].ports[0].specific");
        assert_eq!(text, format!("\"{number}\" must be 1 to 65535"));
    }
    let none = |c: &mut v1::Claim| c.ports = vec![v1::PortRequest::default()];
    assert_eq!(refused(none).0, "claims[0].ports[0].ports");
}

#[test]
fn gpus_are_counted_or_named_and_shared_or_exclusive() {
    use v1::gpu_request::Share;
    let gpus = |count, indexes: &[u32], share| {
        Some(v1::GpuRequest { count, indexes: indexes.into(), share })
    };
    let memory = |n| Some(Share::MemoryBytes(n));
    accepted(|c| c.gpus = gpus(1, &[], memory(limits::GPU_MEMORY_MAX_BYTES)));
    accepted(|c| c.gpus = gpus(0, &[0, limits::GPU_INDEX_MAX], Some(Share::Exclusive(true))));
    for (gpus, field) in [
        (gpus(1, &[], memory(limits::GPU_MEMORY_MAX_BYTES + 1)), "gpus.memory_bytes"),
        (gpus(1, &[], memory(0)), "gpus.memory_bytes"),
        (gpus(0, &[], memory(1)), "gpus.count"),
        (gpus(65, &[], memory(1)), "gpus.count"),
        (gpus(1, &[0], memory(1)), "gpus.count"),
        (gpus(0, &[1, 1], memory(1)), "gpus.indexes"),
        (gpus(0, &[256], memory(1)), "gpus.indexes"),
        (gpus(1, &[], None), "gpus.share"),
        (gpus(1, &[], Some(Share::Exclusive(false))), "gpus.exclusive"),
    ] {
        assert_eq!(refused(|c| c.gpus = gpus).0, format!("claims[0].{field}"));
    }
}

#[test]
fn a_worker_is_checked_before_it_is_proposed() {
    let refused = |change: &dyn Fn(&mut v1::WorkerSpec)| {
        let mut spec = spec();
        change(&mut spec);
        violation(&convert::worker_spec(Some(&spec)).unwrap_err())
    };
    assert!(convert::worker_spec(Some(&spec())).is_ok());
    assert_eq!(violation(&convert::worker_spec(None).unwrap_err()).0, "spec");
    assert_eq!(refused(&|s| s.ranges[0].first = 0).0, "spec.ranges[0].first");
    assert_eq!(refused(&|s| s.ranges[0].last = 65_536).0, "spec.ranges[0].last");
    let (field, text) = refused(&|s| s.ranges[0].last = 39_999);
    assert_eq!(field, "spec.ranges[0]");
    assert!(text.contains("40000-39999") && text.contains("first ≤ last"), "{text}");
    assert_eq!(refused(&|s| s.reserved = vec![40_000, 0]).0, "spec.reserved[1]");
    assert_eq!(refused(&|s| s.address.clear()).0, "spec.address");

    let patch = |fields: &[&str]| {
        let fields: Vec<_> = fields.iter().map(ToString::to_string).collect();
        convert::worker_patch(Some(&spec()), &fields)
    };
    assert!(patch(&["address", "ranges"]).unwrap().labels.is_none());
    assert_eq!(violation(&patch(&[]).unwrap_err()).0, "fields");
    assert_eq!(violation(&patch(&["address", "name"]).unwrap_err()).0, "fields[1]");
    let (field, text) = violation(&patch(&["identity"]).unwrap_err());
    assert_eq!(field, "spec.identity");
    assert!(text.contains("an agent stays an agent"), "{text}");
    assert!(convert::settable_phase(v1::WorkerPhase::Lost.into()).is_err());
    assert!(convert::settable_phase(99).is_err());
}

#[test]
fn a_lease_and_a_deadline_of_zero_are_none() {
    let parsed = |lease, confirm_within_ms| {
        let claim = v1::Claim { lease, confirm_within_ms, ..claim("a") };
        convert::claims(&[claim]).map(|mut claims| claims.remove(0))
    };
    let bare = parsed(0, 0).unwrap();
    assert_eq!((bare.lease, bare.confirm_within), (None, None));
    let full = parsed(7, 1_000).unwrap();
    assert_eq!((full.lease, full.confirm_within), (Some(LeaseId(7)), Some(Millis(1_000))));
    let (field, text) = violation(&parsed(0, 999).unwrap_err());
    assert_eq!(field, "claims[0].confirm_within_ms");
    assert!(text.contains("999ms") && text.contains("1s to 24h"), "{text}");
}

#[test]
fn a_handle_names_its_boot_and_one_thing_that_lives() {
    let parsed = |handle| {
        convert::parse_liveness(&v1::Liveness { boot_id: "b".into(), handle }).map_err(|e| e.field)
    };
    let process = v1::Process { pid: 7, start_ticks: 9 };
    let liveness = parsed(Some(v1::liveness::Handle::Process(process))).unwrap();
    let handle = core::Handle::Process { pid: 7, start_ticks: 9 };
    assert_eq!(liveness, core::Liveness { boot_id: "b".into(), handle });
    assert_eq!(parsed(None).unwrap_err(), "liveness.handle");
}

// Errors.

#[test]
fn every_refusal_has_a_code_and_details() {
    let name: core::InstanceName = "a".parse().unwrap();
    let worker: core::WorkerName = "w".parse().unwrap();
    let port = core::Port::new("port", 40_000).unwrap();
    let holder = table().allocation(&name).unwrap().clone();
    let lack = core::Lack::NoRanges;
    let shortage = core::Shortage::OnWorker { worker: worker.clone(), lack };
    let phase = core::WorkerPhase::Cordoned;
    let (given, held) = (core::Token(1), core::Token(2));
    let (old, new) = (Revision(1), Revision(2));
    let (lease, leader) = (LeaseId(1), core::Leader::default());
    let taken = core::Taken::Reserved;
    let precondition = Code::FailedPrecondition;
    for (refusal, code) in [
        (Refusal::Invalid(Invalid::new("f", "v", "l")), Code::InvalidArgument),
        (Refusal::NoWorker(worker.clone()), Code::NotFound),
        (Refusal::NoAllocation { name: name.clone(), departed: None }, Code::NotFound),
        (Refusal::NoLease(lease), Code::NotFound),
        (Refusal::LeaseFull { lease, limit: 1 }, Code::ResourceExhausted),
        (Refusal::Lingers { name: name.clone(), reason: "x".into() }, precondition),
        (Refusal::NotProven { name: name.clone(), what: "x".into() }, precondition),
        (Refusal::Deposed { proposed: leader, leader }, precondition),
        (Refusal::NameTaken { name: name.clone(), holder, difference: "uid" }, Code::AlreadyExists),
        (Refusal::WrongToken { name: name.clone(), given, held }, precondition),
        (Refusal::WrongVersion { name: name.clone(), given: old, held: new }, precondition),
        (Refusal::PortNotHeld { name: name.clone(), port }, precondition),
        (Refusal::WorkerNotReady { worker: worker.clone(), phase }, precondition),
        (
            Refusal::WorkerInUse { worker: worker.clone(), count: 1, example: name.clone() },
            precondition,
        ),
        (Refusal::WouldLose { worker: worker.clone(), what: "x".into() }, precondition),
        (Refusal::FeatureLevelPassed { asked: 1, held: 2 }, precondition),
        (Refusal::FeatureLevelUnknown { asked: 2, known: 1 }, precondition),
        (
            Refusal::IdentityTaken { what: "GPU", value: "U".into(), owner: worker.clone() },
            Code::AlreadyExists,
        ),
        (Refusal::PortNotFree { worker, port, taken }, precondition),
        (Refusal::NothingFits { name, shortage }, Code::ResourceExhausted),
        (Refusal::TableFull { what: "workers", limit: 1 }, Code::ResourceExhausted),
    ] {
        let text = refusal.to_string();
        let status = errors::refusal(refusal);
        let details = status.get_error_details();
        assert_eq!(status.code(), code, "{text}");
        assert_eq!(status.message(), text);
        let detailed = match code {
            Code::InvalidArgument => details.bad_request().is_some(),
            Code::NotFound => details.resource_info().is_some(),
            Code::AlreadyExists => {
                details.resource_info().is_some() && details.error_info().is_some()
            }
            Code::FailedPrecondition => details.precondition_failure().is_some(),
            _ => details.error_info().is_some_and(|info| info.reason == reason::CAPACITY),
        };
        assert!(detailed, "{text}: {details:?}");
    }
}

#[test]
fn who_holds_a_name_and_what_differs_is_told() {
    let mut state = table();
    let mut rival = claim("a");
    rival.uid = "rival".into();
    let command = allocating(convert::claims(&[rival]).unwrap());
    let (applied, _) = apply(&mut state, &Origin::default(), &command);
    let status = errors::refusal(applied.outcome.unwrap_err());
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.reason, reason::NAME_TAKEN);
    for (key, value) in [("worker", "w"), ("uid", "a-uid"), ("token", "2"), ("difference", "uid")] {
        assert_eq!(info.metadata[key], value);
    }
}

// The dispatcher.

fn allocate(name: &str) -> Request<v1::AllocateRequest> {
    let mut request =
        Request::new(v1::AllocateRequest { claims: vec![claim(name)], dry_run: false });
    request.set_timeout(Duration::from_secs(1));
    request
}

fn get(name: &str) -> Request<v1::GetRequest> {
    let mut request = Request::new(v1::GetRequest { name: name.into(), read: None });
    request.set_timeout(Duration::from_secs(1));
    request
}

fn reason_of(status: &Status) -> Option<String> {
    status.get_details_error_info().map(|info| info.reason)
}

#[tokio::test]
async fn an_allocation_comes_back_with_its_address_and_revision() {
    let (_, api) = fake();
    let response = api.allocate(allocate("b")).await.unwrap().into_inner();
    assert_eq!(response.allocations[0].address, "10.0.0.1");
    assert_eq!(response.allocations[0].token, response.revision);
    assert!(!response.repeated_request);
    let again = api.allocate(allocate("b")).await.unwrap().into_inner();
    assert!(again.repeated_request);
    assert_eq!(again.allocations, response.allocations);
}

#[tokio::test]
async fn a_dry_run_and_an_explanation_show_the_servers_deadline_and_nothing_that_nobody_holds() {
    let (fake, api) = fake();
    let held = fake.state.lock().unwrap().allocation(&"a".parse().unwrap()).unwrap().token.0;
    let dry_run = async |name: &str| {
        let mut request = allocate(name);
        request.get_mut().dry_run = true;
        api.allocate(request).await.unwrap().into_inner()
    };
    let explain = async |name: &str| {
        let request = v1::ExplainRequest { claims: vec![claim(name)], read: None };
        let answer = api.explain(Request::new(request)).await.unwrap().into_inner();
        answer.allocations[0].clone()
    };
    let shown = dry_run("b").await;
    assert!(!shown.repeated_request);
    for shown in [shown.allocations[0].clone(), explain("b").await] {
        assert_eq!((shown.confirm_within_ms, shown.token, shown.version), (600_000, 0, 0));
    }
    let repeated = dry_run("a").await;
    assert!(repeated.repeated_request);
    assert_eq!([repeated.allocations[0].token, explain("a").await.token], [held; 2]);
    assert_eq!(*fake.proposed.lock().unwrap(), 0);
}

/// Many claims, many workers, and names as long as may be.
#[tokio::test]
async fn an_explanation_is_bounded_in_bytes_and_in_how_many_are_under_way() {
    use v1::port_request::Ports;
    let (fake, api) = fake();
    let long = |prefix: &str, i: usize| {
        format!("{prefix}{i:0>width$}", width = limits::NAME_MAX_BYTES - prefix.len())
    };
    let done = |command: Command| {
        let (applied, _) = apply(&mut fake.state.lock().unwrap(), &Origin::default(), &command);
        applied.outcome.unwrap();
    };
    for i in 0..limits::EXPLAINED_WORKERS_MAX {
        let spec = convert::worker_spec(Some(&spec())).unwrap();
        done(Command::RegisterWorker { name: long("w", i).parse().unwrap(), spec });
        let holder = v1::Claim {
            placement: Some(v1::claim::Placement::Worker(long("w", i))),
            ports: vec![request(Ports::Specific(40_000))],
            ..claim(&long("a", i))
        };
        let holder = v1::Claim { uid: "u".into(), ..holder };
        done(allocating(convert::claims(&[holder]).unwrap()));
    }
    let anywhere = |i: usize| v1::Claim {
        uid: "u".into(),
        placement: Some(v1::claim::Placement::Select(v1::Selection::default())),
        ports: vec![request(Ports::Specific(40_000))],
        ..claim(&format!("c{i}"))
    };
    let claims: Vec<_> = (0..limits::CLAIMS_MAX).map(anywhere).collect();
    let request = || Request::new(v1::ExplainRequest { claims: claims.clone(), read: None });
    let answer = api.explain(request()).await.unwrap().into_inner();
    let bytes = answer.encoded_len();
    assert!(bytes < super::ANSWER_MAX_BYTES, "{bytes}");
    assert_eq!(answer.claims.len(), limits::CLAIMS_MAX);
    assert_eq!(answer.claims[0].workers.len(), limits::EXPLAINED_WORKERS_MAX);
    assert_eq!(answer.claims.last().unwrap().workers, [], "it would be larger");

    let others = api.inner.explaining.try_acquire_many(EXPLAINING_MAX as u32).unwrap();
    let refused = api.explain(request()).await.unwrap_err();
    assert_eq!(reason_of(&refused).as_deref(), Some(reason::OVERLOADED));
    drop(others);
    api.explain(request()).await.unwrap();
}

#[tokio::test]
async fn what_was_surely_not_done_is_tried_again() {
    let (fake, api) = fake();
    fake.failures.lock().unwrap().push_back(CallError::NotLeader { leader: Some(2) });
    *fake.forwards.lock().unwrap() = [
        Err(ForwardError::NotSent("refused".into())),
        Ok(Err(errors::call(CallError::NotLeader { leader: None }))),
    ]
    .into();
    let response = api.allocate(allocate("b")).await.unwrap().into_inner();
    assert_eq!(response.allocations.len(), 1);
    assert_eq!(*fake.proposed.lock().unwrap(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_a_leader_goes_on_once_there_is_another() {
    let (fake, api) = fake();
    for (elected, waits) in [(true, Duration::ZERO), (false, Duration::from_millis(5))] {
        fake.failures.lock().unwrap().push_back(CallError::NotLeader { leader: None });
        if elected {
            fake.elections.notify_one();
        }
        let began = Instant::now();
        api.allocate(allocate("b")).await.unwrap();
        assert_eq!(began.elapsed(), waits);
    }
}

#[tokio::test]
async fn a_write_that_was_given_up_before_it_could_be_looked_at_is_not_done() {
    let (fake, api) = fake();
    assert!(
        api.allocate(allocate("b")).now_or_never().is_none(),
        "it is dropped at its first rest"
    );
    let asked = v1::session_command::Command::Allocate(allocate("b").into_inner());
    let commands = vec![v1::SessionCommand { id: 1, command: Some(asked) }];
    let message = v1::SessionRequest { commands, timeout_ms: 0 };
    let deadline = Instant::now() + Duration::from_secs(60);
    assert!(api.dispatch::<Session>(message, deadline).now_or_never().is_none());
    assert_eq!(*fake.proposed.lock().unwrap(), 0);
    api.allocate(allocate("b")).await.unwrap();
    assert_eq!(*fake.proposed.lock().unwrap(), 1);
}

#[tokio::test]
async fn a_write_in_doubt_is_reported_and_never_repeated() {
    let (fake, api) = fake();
    fake.failures.lock().unwrap().push_back(CallError::Unknown("discarded".into()));
    let status = api.allocate(allocate("b")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unknown);
    assert_eq!(reason_of(&status).as_deref(), Some(reason::OUTCOME_UNKNOWN));
    assert_eq!(*fake.proposed.lock().unwrap(), 1);

    fake.forwards.lock().unwrap().push_back(Err(ForwardError::Broken("reset".into())));
    let status = api.allocate(allocate("b")).await.unwrap_err();
    assert_eq!(reason_of(&status).as_deref(), Some(reason::OUTCOME_UNKNOWN));
    assert_eq!(*fake.proposed.lock().unwrap(), 1);
}

#[tokio::test]
async fn a_read_in_doubt_is_repeated() {
    let (fake, api) = fake();
    fake.failures.lock().unwrap().push_back(CallError::Unknown("lost".into()));
    *fake.forwards.lock().unwrap() =
        [Err(ForwardError::Broken("reset".into())), Ok(Err(errors::outcome_unknown("lost")))]
            .into();
    let response = api.get(get("a")).await.unwrap().into_inner();
    assert_eq!(response.allocation.unwrap().name, "a");
}

#[tokio::test(start_paused = true)]
async fn without_a_leader_the_call_ends_before_the_deadline_and_nothing_is_done() {
    let (fake, api) = fake();
    *fake.failures.lock().unwrap() = vec![CallError::NotLeader { leader: None }; 1000].into();
    let started = Instant::now();
    let status = api.allocate(allocate("b")).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(reason_of(&status).as_deref(), Some(reason::NOT_READY));
}

#[tokio::test]
async fn failures_of_the_node_have_their_codes() {
    let retry_after = Duration::from_millis(70);
    for (error, code, told) in [
        (CallError::NotReady("starting".into()), Code::Unavailable, reason::NOT_READY),
        (CallError::Overloaded { retry_after }, Code::ResourceExhausted, reason::OVERLOADED),
        (
            CallError::LowSpace { why: "node 1".into(), retry_after },
            Code::ResourceExhausted,
            reason::LOW_SPACE,
        ),
        (CallError::Expired, Code::DeadlineExceeded, reason::NOT_EXECUTED),
    ] {
        let (fake, api) = fake();
        fake.failures.lock().unwrap().push_back(error.clone());
        let status = api.allocate(allocate("b")).await.unwrap_err();
        assert_eq!(status.code(), code, "{error:?}");
        assert_eq!(reason_of(&status).as_deref(), Some(told));
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let wanted = [reason::OVERLOADED, reason::LOW_SPACE].contains(&told);
        assert_eq!(retry.is_some(), wanted);
    }
}

#[tokio::test]
async fn a_forwarded_call_runs_here_and_never_goes_on() {
    let (fake, api) = fake();
    let calls = api.local_calls();
    let deadline = Instant::now() + Duration::from_secs(1);
    let path = "/portwarden.v1.Allocator/Get";
    let request = get("a").into_inner().encode_to_vec();
    let answer = calls.call(path, &request, "id", deadline).await.unwrap();
    let response = v1::GetResponse::decode(answer.as_slice()).unwrap();
    assert_eq!(response.allocation.unwrap().name, "a");

    fake.failures.lock().unwrap().push_back(CallError::NotLeader { leader: Some(3) });
    let status = api.call(path, &request, "id", deadline).await.unwrap_err();
    assert!(errors::is_not_leader(&status));
    let status = api.call("/portwarden.v1.Cluster/Status", b"", "id", deadline).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    let status = api.call(path, b"\xff", "id", deadline).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

fn list(page_token: &str) -> v1::ListRequest {
    v1::ListRequest { page_size: 2, page_token: page_token.into(), ..Default::default() }
}

#[tokio::test]
async fn a_listing_goes_on_at_its_revision_until_its_view_is_gone() {
    let (_, api) = fake();
    for name in ["b", "c", "d"] {
        api.allocate(allocate(name)).await.unwrap();
    }
    let page = api.list(Request::new(list(""))).await.unwrap().into_inner();
    api.allocate(allocate("bb")).await.unwrap();
    let next = api.list(Request::new(list(&page.next_page_token))).await.unwrap().into_inner();
    let names: Vec<_> =
        page.allocations.iter().chain(&next.allocations).map(|a| a.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "d"], "bb came later");
    assert_eq!(page.revision, next.revision);
    assert_eq!(next.next_page_token, "");

    for _ in 0..super::pages::VIEWS_MAX {
        api.allocate(allocate("z")).await.unwrap();
        api.list(Request::new(list(""))).await.unwrap();
        let authority = Some(v1::release_request::Authority::Force(v1::Force::default()));
        let release = v1::ReleaseRequest { name: "z".into(), authority };
        api.release(Request::new(release)).await.unwrap();
    }
    let status = api.list(Request::new(list(&page.next_page_token))).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted);
    assert_eq!(reason_of(&status).as_deref(), Some(reason::PAGE_EXPIRED));
}

/// What changed since a view would else stay in memory, for as long as nobody lists.
#[tokio::test(start_paused = true)]
async fn a_view_goes_when_its_listing_is_over_or_given_up() {
    use super::pages::{VIEW_ENDED_MAX, VIEW_IDLE_MAX, VIEWS_EXPIRE_EVERY};
    let (_, api) = fake();
    for name in ["b", "c", "d"] {
        api.allocate(allocate(name)).await.unwrap();
    }
    let ask = async |token: &str| api.list(Request::new(list(token))).await;
    let begin = async || ask("").await.unwrap().into_inner().next_page_token;
    let little = Duration::from_millis(10);
    let kept = || api.views().count();

    let token = begin().await;
    sleep(VIEW_IDLE_MAX - little).await;
    assert_eq!(kept(), 1);
    sleep(VIEWS_EXPIRE_EVERY + little).await;
    assert_eq!(kept(), 0, "given up");
    assert_eq!(ask(&token).await.unwrap_err().code(), Code::Aborted);

    let token = begin().await;
    ask(&token).await.unwrap();
    sleep(VIEW_ENDED_MAX - little).await;
    ask(&token).await.expect("the last page again");
    sleep(VIEW_ENDED_MAX + VIEWS_EXPIRE_EVERY).await;
    assert_eq!(kept(), 0, "over");

    let (one, other) = (begin().await, begin().await);
    ask(&one).await.unwrap();
    sleep(VIEW_ENDED_MAX / 2).await;
    ask(&other).await.expect("another listing at the same revision");
    let later = begin().await;
    sleep(VIEW_ENDED_MAX + VIEWS_EXPIRE_EVERY).await;
    ask(&later).await.expect("one that began at a revision at which others had ended");
    sleep(VIEW_ENDED_MAX + VIEWS_EXPIRE_EVERY).await;
    assert_eq!(kept(), 0);
}

#[tokio::test]
async fn filters_hold_together() {
    let (_, api) = fake();
    for name in ["qwen-0", "qwen-1", "qwen", "r", "qwen_0"] {
        let mut request = allocate(name);
        let number = name.len().to_string();
        request.get_mut().claims[0].labels = [("length".to_string(), number)].into();
        api.allocate(request).await.unwrap();
    }
    let names = async |request: v1::ListRequest| {
        let answer = api.list(Request::new(request)).await.unwrap().into_inner();
        answer.allocations.into_iter().map(|a| a.name).collect::<Vec<_>>()
    };
    let prefix = |p: &str| v1::ListRequest { name_prefix: p.into(), ..Default::default() };
    assert_eq!(names(prefix("qwen-")).await, ["qwen-0", "qwen-1"]);
    assert_eq!(names(prefix("qwen")).await, ["qwen", "qwen-0", "qwen-1", "qwen_0"]);
    let on = v1::ListRequest { worker: "w".into(), selector: "length=6".into(), ..prefix("qwen_") };
    assert_eq!(names(on).await, ["qwen_0"]);
    let elsewhere = v1::ListRequest { worker: "v".into(), ..Default::default() };
    assert!(names(elsewhere).await.is_empty());
    let bound = v1::ListRequest { phase: v1::Phase::Bound.into(), ..Default::default() };
    assert!(names(bound).await.is_empty());
    let bad = v1::ListRequest { page_size: 10_001, ..Default::default() };
    assert_eq!(violation(&api.list(Request::new(bad)).await.unwrap_err()).0, "page_size");
}

#[tokio::test]
async fn workers_are_served() {
    use crate::proto::v1::workers_server::Workers as _;
    let (_, api) = fake();
    let phase = v1::SetPhaseRequest { name: "w".into(), phase: v1::WorkerPhase::Cordoned.into() };
    let worker = api.set_phase(Request::new(phase)).await.unwrap().into_inner().worker.unwrap();
    assert_eq!(worker.phase(), v1::WorkerPhase::Cordoned);
    assert_eq!((worker.ranges[0].held, worker.ranges[0].free), (1, 63));
    let remove = v1::RemoveRequest { name: "w".into(), force: None };
    let status = api.remove(Request::new(remove)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let quarantine =
        v1::QuarantineRequest { worker: "w".into(), ports: vec![40_010], reason: "x".into() };
    let response = api.quarantine(Request::new(quarantine)).await.unwrap().into_inner();
    assert_eq!(response.worker.unwrap().ranges[0].quarantined[0].number, 40_010);
}

// Limits of a node.

#[test]
fn a_page_ends_at_its_size_its_bytes_or_what_it_looked_at() {
    let names: Vec<String> = (0..=SCAN_MAX).map(|i| format!("n{i:05}")).collect();
    let page = |pass: fn(usize) -> Option<v1::Drift>, items: usize, size: usize| {
        let all = names[..items].iter().enumerate().map(|(i, name)| (name.as_str(), pass(i)));
        let page = fill(all, size);
        (page.items.len(), page.after)
    };
    let every = |_| Some(v1::Drift::default());
    assert_eq!(page(every, 10, 10), (10, None));
    assert_eq!(page(every, 11, 10), (10, Some("n00009".into())));
    let none = |_| None;
    assert_eq!(page(none, SCAN_MAX, 10), (0, None));
    assert_eq!(page(none, SCAN_MAX + 1, 10), (0, Some(format!("n{:05}", SCAN_MAX - 1))));
    let large =
        |_| Some(v1::Drift { detail: "x".repeat(PAGE_SOFT_BYTES / 2), ..Default::default() });
    assert_eq!(page(large, 2, 10), (2, None));
    assert_eq!(page(large, 3, 10), (2, Some("n00001".into())));
    assert_eq!(page_size(PAGE_SIZE_MAX).unwrap(), PAGE_SIZE_MAX as usize);
    assert_eq!(violation(&page_size(PAGE_SIZE_MAX + 1).unwrap_err()).0, "page_size");
}

#[test]
fn a_report_at_its_limits_is_taken_and_one_more_is_refused_by_name() {
    let named = |i: usize| v1::HandleState { name: format!("a{i}"), token: 1, alive: true };
    let drift = v1::Drift { kind: v1::DriftKind::OpenButUnknown.into(), ..Default::default() };
    let port = |n: usize| v1::PortInUse { number: n.min(65_535) as u32, ..Default::default() };
    type Grow<'a> = &'a dyn Fn(&mut v1::ReportRequest, usize);
    let ports: Grow = &|r, n| r.ports = (1..=n).map(port).collect();
    let handles: Grow = &|r, n| r.handles = (0..n).map(named).collect();
    let drifts: Grow = &|r, n| r.drift = vec![drift.clone(); n];
    let gpus: Grow = &|r, n| r.gpus = vec![v1::GpuInUse::default(); n];
    for (field, limit, grow) in [
        ("ports", convert::REPORTED_PORTS_MAX, ports),
        ("handles", convert::REPORTED_HANDLES_MAX, handles),
        ("drift", convert::REPORTED_DRIFT_MAX, drifts),
        ("gpus", limits::GPUS_PER_WORKER_MAX, gpus),
    ] {
        let report = |n| {
            let identity = Some(v1::Identity::default());
            let mut report =
                v1::ReportRequest { worker: "w".into(), identity, ..Default::default() };
            grow(&mut report, n);
            convert::sample(&report).map(drop)
        };
        assert_eq!(report(limit), Ok(()), "{field}");
        let refused = report(limit + 1).unwrap_err();
        assert_eq!(refused, Invalid::new(field, limit + 1, format!("at most {limit}")));
    }
}

#[test]
fn what_is_shown_of_a_worker_is_bounded() {
    let (shown, holders) = (convert::QUARANTINED_SHOWN_MAX, convert::HOLDERS_SHOWN_MAX);
    let mut state = core::State::default();
    let mut done = |command: Command| {
        apply(&mut state, &Origin::default(), &command).0.outcome.unwrap();
    };
    let range = v1::PortRange { name: "service".into(), first: 40_000, last: 49_999 };
    let gpu = v1::GpuSpec { memory_bytes: 1 << 30, ..Default::default() };
    let spec = v1::WorkerSpec { ranges: vec![range], gpus: vec![gpu], ..spec() };
    let spec = convert::worker_spec(Some(&spec)).unwrap();
    done(Command::RegisterWorker { name: "w".parse().unwrap(), spec });
    let ports: Vec<_> = (40_000..=40_000 + shown as u64).collect();
    for some in ports.chunks(limits::QUARANTINE_PORTS_MAX) {
        let ports = some.iter().map(|n| core::Port::new("port", *n).unwrap()).collect();
        let (worker, reason) = ("w".parse().unwrap(), "x".into());
        done(Command::Quarantine { worker, ports, reason, by: core::Actor::Operator });
    }
    for i in 0..=holders {
        let gpus = v1::GpuRequest {
            count: 1,
            share: Some(v1::gpu_request::Share::MemoryBytes(1 << 20)),
            ..Default::default()
        };
        let claim = v1::Claim { ports: vec![], gpus: Some(gpus), ..claim(&format!("g{i:03}")) };
        done(allocating(convert::claims(&[claim]).unwrap()));
    }
    let worker = convert::worker(state.worker(&"w".parse().unwrap()).unwrap());
    assert_eq!(worker.ranges[0].quarantined.len(), shown);
    assert_eq!(worker.ranges[0].quarantined_count as usize, shown + 1);
    assert_eq!(worker.gpus[0].holders.len(), holders);
    assert_eq!(worker.gpus[0].holder_count as usize, holders + 1);
}

/// What just ends would pass for the whole table.
#[tokio::test]
async fn a_backup_that_is_cut_off_by_a_stop_ends_with_an_error() {
    let (fake, api) = fake();
    fake.hub.installed(&fake.state.lock().unwrap());
    let read = async |api: &crate::api::Api| {
        let request = Request::new(v1::SnapshotRequest {});
        let chunks = v1::cluster_server::Cluster::snapshot(api, request).await.unwrap();
        chunks.into_inner().collect::<Vec<_>>().await
    };
    let whole = read(&api).await;
    assert!(!whole.is_empty() && whole.iter().all(Result::is_ok), "{whole:?}");
    api.end_streams();
    let cut_off = read(&api).await;
    let end = cut_off.last().expect("it does not just end").as_ref().unwrap_err();
    assert_eq!(end.code(), Code::Unavailable);
}

#[tokio::test]
async fn as_many_calls_as_there_may_be_are_served_and_one_more_is_not() {
    let (fake, api) = fake();
    let others = api.inner.in_flight.try_acquire_many(CALLS_IN_FLIGHT_MAX as u32 - 1).unwrap();
    api.get(get("a")).await.unwrap();
    let last = api.inner.in_flight.try_acquire().unwrap();
    let refused = api.get(get("a")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(reason_of(&refused).as_deref(), Some(reason::OVERLOADED));
    // What is urgent has room of its own, and where that is full, no deadline passes for it.
    let release = || {
        Request::new(v1::ReleaseRequest {
            name: "a".into(),
            authority: Some(v1::release_request::Authority::Token(99)),
        })
    };
    let answer = api.release(release()).await.unwrap_err();
    assert_eq!(answer.code(), Code::FailedPrecondition, "it came to the table");
    let on_a_session = async |command| {
        let commands = vec![v1::SessionCommand { id: 1, command: Some(command) }];
        let message = v1::SessionRequest { commands, ..Default::default() };
        let answered = api.clone().serve_message(Default::default(), Ok(message)).await.unwrap();
        let Some(v1::session_answer::Answer::Error(refused)) = &answered.answers[0].answer else {
            panic!("{answered:?}")
        };
        Code::from(refused.code)
    };
    let asked = v1::session_command::Command::Get(get("a").into_inner());
    assert_eq!(on_a_session(asked).await, Code::ResourceExhausted);
    let asked = v1::session_command::Command::Release(release().into_inner());
    assert_eq!(on_a_session(asked).await, Code::FailedPrecondition, "it came to the table");
    let urgent = api.inner.urgent_in_flight.try_acquire_many(URGENT_CALLS_MAX as u32).unwrap();
    assert_eq!(*fake.turned_away.lock().unwrap(), 0);
    let refused = api.release(release()).await.unwrap_err();
    assert_eq!(reason_of(&refused).as_deref(), Some(reason::OVERLOADED));
    assert_eq!(*fake.turned_away.lock().unwrap(), 1);
    drop((last, urgent));
    api.get(get("a")).await.unwrap();
    drop(others);
}
