//! The API as any gRPC client sees it: every call through the leader and through followers alike.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::Duration;

use portwarden::proto::v1::session_answer::Answer;
use portwarden::proto::v1::session_command::Command as Asked;
use portwarden::proto::v1::{self, claim::Placement, port_request::Ports};
use portwarden::proto::{DOMAIN, reason as reasons};
use tonic::{Code, Request};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::v1 as reflection;

use crate::support::{BOUND, Cluster, wait_for};
use crate::wire::{Door, block_on, claim, details, ports, reason, refused, spec, violation};

#[test]
fn every_node_takes_every_call() {
    let cluster = Cluster::start(3);
    block_on(async {
        let last = Cell::new(0);
        let later = |revision: u64| {
            let last = last.replace(revision);
            assert!(revision > last, "revision {revision} after {last}");
        };
        for (at, mut door) in Door::all(&cluster).into_iter().enumerate() {
            let worker = format!("w{at}");
            let register = v1::RegisterRequest { name: worker.clone(), spec: Some(spec(40_063)) };
            let answer = door.workers.register(register.clone()).await.unwrap().into_inner();
            later(answer.revision);
            let again = door.workers.register(register).await.unwrap().into_inner();
            assert_eq!(again, answer, "a repeat changes nothing");
            let labelled = v1::WorkerSpec {
                labels: [("zone".to_string(), worker.clone())].into(),
                ..v1::WorkerSpec::default()
            };
            let (name, fields) = (worker.clone(), vec!["labels".to_string()]);
            let update = v1::UpdateRequest { name, spec: Some(labelled), fields };
            let updated = door.workers.update(update).await.unwrap().into_inner();
            later(updated.revision);
            assert_eq!(updated.worker.unwrap().spec.unwrap().ranges, spec(40_063).ranges);
            for phase in
                [v1::WorkerPhase::Cordoned, v1::WorkerPhase::Draining, v1::WorkerPhase::Ready]
            {
                let set = v1::SetPhaseRequest { name: worker.clone(), phase: phase.into() };
                let set = door.workers.set_phase(set).await.unwrap().into_inner();
                assert_eq!(set.worker.unwrap().phase(), phase);
                later(set.revision);
            }
            let quarantine = v1::QuarantineRequest {
                worker: worker.clone(),
                ports: vec![40_050],
                reason: "sshd".into(),
            };
            let held = door.workers.quarantine(quarantine).await.unwrap().into_inner();
            later(held.revision);
            let shown = &held.worker.unwrap().ranges[0];
            assert_eq!((shown.quarantined[0].number, shown.free), (40_050, 63));
            let lift = v1::LiftQuarantineRequest { worker: worker.clone(), ports: vec![40_050] };
            let lifted = door.workers.lift_quarantine(lift).await.unwrap().into_inner();
            later(lifted.revision);

            let name = format!("i{at}");
            let mut wanted = claim(&name, &worker, 2);
            wanted.placement = Some(Placement::Select(v1::Selection {
                selector: format!("zone={worker}"),
                policy: v1::Policy::Spread.into(),
            }));
            wanted.gpus = Some(v1::GpuRequest {
                count: 1,
                indexes: vec![],
                share: Some(v1::gpu_request::Share::Exclusive(true)),
            });
            let request = v1::AllocateRequest { claims: vec![wanted], dry_run: false };
            let granted = door.allocator.allocate(request.clone()).await.unwrap().into_inner();
            later(granted.revision);
            assert!(!granted.repeated_request);
            let allocation = granted.allocations[0].clone();
            assert_eq!(
                (allocation.token, allocation.version),
                (granted.revision, granted.revision)
            );
            assert_eq!(allocation.phase(), v1::Phase::Reserved);
            assert_eq!(
                (allocation.worker.as_str(), allocation.address.as_str()),
                (worker.as_str(), "127.0.0.1")
            );
            assert!(allocation.gpus[0].exclusive);
            let repeated = door.allocator.allocate(request).await.unwrap().into_inner();
            assert!(repeated.repeated_request);
            assert_eq!(repeated.allocations[0], allocation);

            let token = allocation.token;
            let confirm = v1::ConfirmRequest {
                name: name.clone(),
                token,
                version: allocation.version,
                ..Default::default()
            };
            let confirmed = door.allocator.confirm(confirm).await.unwrap().into_inner();
            later(confirmed.revision);
            let bound = confirmed.allocation.unwrap();
            assert_eq!((bound.phase(), bound.token), (v1::Phase::Bound, token));
            assert_eq!(bound.version, confirmed.revision);

            let port = bound.ports[0].number;
            let report = v1::ReportConflictRequest {
                name: name.clone(),
                token,
                version: bound.version,
                port,
            };
            let swapped =
                door.allocator.report_conflict(report.clone()).await.unwrap().into_inner();
            later(swapped.revision);
            assert!(!swapped.reclaimed);
            let now = swapped.allocation.clone().unwrap();
            assert_eq!((now.swaps, now.phase(), now.token), (1, v1::Phase::Reserved, token));
            assert!(now.ports.iter().all(|p| p.number != port), "{now:?}");
            let retried = door.allocator.report_conflict(report).await.unwrap().into_inner();
            assert_eq!(retried.allocation, swapped.allocation, "a retry returns the last swap");

            let get = v1::GetRequest { name: name.clone(), read: None };
            assert_eq!(
                door.allocator.get(get).await.unwrap().into_inner().allocation,
                Some(now.clone())
            );
            let get = v1::GetWorkerRequest { name: worker.clone(), read: None };
            let seen = door.workers.get(get).await.unwrap().into_inner().worker.unwrap();
            assert_eq!(
                (seen.allocations, seen.ranges[0].held, seen.ranges[0].quarantined_count),
                (1, 2, 1)
            );
            let list = v1::ListRequest { worker: worker.clone(), ..v1::ListRequest::default() };
            assert_eq!(door.allocator.list(list).await.unwrap().into_inner().allocations, [now]);
            let workers = door.workers.list(v1::ListWorkersRequest::default()).await.unwrap();
            assert_eq!(workers.into_inner().workers.len(), 1);

            let released = door.release(&name, token).await.unwrap();
            later(released.revision);
            assert!(released.released && released.allocation.is_some());
            let again = door.release(&name, token).await.unwrap();
            assert!(!again.released && again.allocation.is_none());

            door.allocate(claim(&name, &worker, 1)).await.unwrap();
            let force = v1::Force { reason: "an operator's".into() };
            let authority = Some(v1::release_request::Authority::Force(force));
            let forced = v1::ReleaseRequest { name: name.clone(), authority };
            assert!(door.allocator.release(forced).await.unwrap().into_inner().released);
            let spare = v1::RegisterRequest { name: "spare".into(), spec: Some(spec(40_001)) };
            door.workers.register(spare).await.unwrap();
            for removed in [true, false] {
                let remove = v1::RemoveRequest { name: "spare".into(), force: None };
                assert_eq!(
                    door.workers.remove(remove).await.unwrap().into_inner().removed,
                    removed
                );
            }
            let remove = v1::RemoveRequest { name: worker, force: None };
            later(door.workers.remove(remove).await.unwrap().into_inner().revision);

            let status = door.cluster.status(v1::StatusRequest {}).await.unwrap().into_inner();
            assert_eq!(status.node, cluster.nodes[at].id);
            assert_eq!(status.members.len(), 3);
            let members =
                door.cluster.list_members(v1::ListMembersRequest::default()).await.unwrap();
            assert_eq!(members.into_inner().members.len(), 3);
        }
    });
}

/// A refusal made by the table comes through a follower as it left the leader.
#[test]
fn refusals_say_the_same_through_every_node() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_003);
    block_on(async {
        let mut doors = Door::all(&cluster);
        let owned = v1::WorkerSpec {
            gpus: vec![v1::GpuSpec {
                uuid: "GPU-1".into(),
                memory_bytes: 1 << 30,
                ..Default::default()
            }],
            ..spec(40_063)
        };
        let register = |name: &str, spec: &v1::WorkerSpec| v1::RegisterRequest {
            name: name.into(),
            spec: Some(spec.clone()),
        };
        doors[0].workers.register(register("owner", &owned)).await.unwrap();
        let held = doors[0].allocate(claim("held", "w", 2)).await.unwrap();

        let mut heard = Vec::new();
        for door in &mut doors {
            let mut statuses = Vec::new();

            let rival = v1::Claim { uid: "rival".into(), ..claim("held", "w", 2) };
            let status = refused(Code::AlreadyExists, door.allocate(rival).await);
            let info = details(&status).error_info().unwrap().clone();
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (reasons::NAME_TAKEN, DOMAIN));
            let fact = |key: &str| info.metadata[key].as_str();
            assert_eq!((fact("worker"), fact("uid")), ("w", "held-uid"));
            assert_eq!(
                (fact("token"), fact("difference")),
                (held.token.to_string().as_str(), "uid")
            );
            let resource = details(&status).resource_info().unwrap().clone();
            assert_eq!(
                (resource.resource_type.as_str(), resource.resource_name.as_str()),
                ("allocation", "held")
            );
            statuses.push(status);

            let status =
                refused(Code::ResourceExhausted, door.allocate(claim("big", "w", 3)).await);
            assert_eq!(reason(&status).as_deref(), Some(reasons::CAPACITY));
            let info = details(&status).error_info().unwrap().clone();
            let fact = |key: &str| info.metadata[key].as_str();
            assert_eq!((fact("worker"), fact("range"), fact("claim")), ("w", "service", "big"));
            assert_eq!((fact("wanted"), fact("free")), ("3", "2"));
            assert!(status.message().contains("held"), "it says who holds them: {status:?}");
            statuses.push(status);

            for (answer, kind, name) in [
                (door.allocate(claim("x", "nowhere", 1)).await.map(|_| ()), "worker", "nowhere"),
                (
                    door.allocator
                        .get(v1::GetRequest { name: "nobody".into(), read: None })
                        .await
                        .map(|_| ()),
                    "allocation",
                    "nobody",
                ),
            ] {
                let status = refused(Code::NotFound, answer);
                let resource = details(&status).resource_info().unwrap().clone();
                assert_eq!(
                    (resource.resource_type.as_str(), resource.resource_name.as_str()),
                    (kind, name)
                );
                statuses.push(status);
            }

            let status = refused(Code::FailedPrecondition, door.release("held", 1).await);
            let broken = details(&status).precondition_failure().unwrap().clone();
            assert_eq!(
                (broken.violations[0].r#type.as_str(), broken.violations[0].subject.as_str()),
                ("TOKEN", "held")
            );
            statuses.push(status);

            let confirm = v1::ConfirmRequest {
                name: "held".into(),
                token: held.token,
                version: 1,
                ..Default::default()
            };
            let status = refused(Code::FailedPrecondition, door.allocator.confirm(confirm).await);
            let broken = details(&status).precondition_failure().unwrap().clone();
            assert_eq!(broken.violations[0].r#type, "VERSION");
            statuses.push(status);

            let thief = door.workers.register(register("thief", &owned)).await;
            let status = refused(Code::AlreadyExists, thief);
            assert_eq!(reason(&status).as_deref(), Some(reasons::IDENTITY_TAKEN));
            assert_eq!(details(&status).resource_info().unwrap().owner, "owner");
            statuses.push(status);

            let remove = v1::RemoveRequest { name: "w".into(), force: None };
            let status = refused(Code::FailedPrecondition, door.workers.remove(remove).await);
            assert_eq!(
                details(&status).precondition_failure().unwrap().violations[0].r#type,
                "WORKER_IN_USE"
            );
            statuses.push(status);

            let mut bad = claim("x", "w", 1);
            bad.ports.push(ports(Ports::Specific(65_536)));
            let (field, text) = violation(door.allocate(bad).await);
            assert_eq!(field, "claims[0].ports[1].specific");
            assert_eq!(text, "\"65536\" must be 1 to 65535");
            let (field, _) = violation(door.allocate(claim("a b", "w", 1)).await);
            assert_eq!(field, "claims[0].name");
            let gang = (0..65).map(|i| claim(&format!("g{i}"), "w", 1)).collect();
            let gang = v1::AllocateRequest { claims: gang, dry_run: false };
            let (field, text) = violation(door.allocator.allocate(gang).await);
            assert_eq!(
                (field.as_str(), text.as_str()),
                ("claims", "\"65\" must be 1 to 64 claims")
            );
            let read = Some(v1::ReadOptions { stale: false, min_revision: 1 });
            let get = v1::GetRequest { name: "held".into(), read };
            assert_eq!(violation(door.allocator.get(get).await).0, "read.min_revision");

            let said: Vec<_> = statuses
                .iter()
                .map(|s| (s.code(), s.message().to_string(), format!("{:?}", sorted(s))))
                .collect();
            heard.push(said);
        }
        assert_eq!(heard[0], heard[1]);
        assert_eq!(heard[0], heard[2]);
        assert_eq!(cluster.list().len(), 1, "refusals change nothing");
    });
}

/// The facts of an ErrorInfo come in any order.
fn sorted(status: &tonic::Status) -> Vec<(String, String)> {
    let info = details(status).error_info().cloned();
    let mut facts: Vec<_> = info.into_iter().flat_map(|info| info.metadata).collect();
    facts.sort();
    facts
}

/// What is left of a lease's time, as its keepalive is answered; 0 once it is gone.
async fn keep_alive(door: &mut Door, id: u64) -> u64 {
    let once = tokio_stream::iter([v1::KeepAliveRequest { id }]);
    let mut answers = door.leases.keep_alive(once).await.unwrap().into_inner();
    answers.message().await.unwrap().expect("an answer").ttl_ms
}

#[test]
fn a_lease_lives_while_it_is_kept_alive_and_takes_what_is_on_it_along() {
    const TTL_MS: u64 = 10_000;
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_063);
    block_on(async {
        let mut doors = Door::all(&cluster);
        let granted = doors[0].leases.grant(v1::GrantRequest { ttl_ms: TTL_MS }).await.unwrap();
        let lease = granted.into_inner().lease.unwrap().id;
        doors[0].allocate(v1::Claim { lease, bound: true, ..claim("a", "w", 1) }).await.unwrap();
        // For longer than its time, at one node after the other.
        for i in 0..6 {
            tokio::time::sleep(Duration::from_millis(TTL_MS / 4)).await;
            assert_eq!(keep_alive(&mut doors[i % 3], lease).await, TTL_MS);
        }
        for door in &mut doors {
            let get = v1::GetLeaseRequest { id: lease, read: None };
            let shown = door.leases.get(get).await.unwrap().into_inner();
            assert_eq!(
                (shown.lease.unwrap().ttl_ms, shown.allocations),
                (TTL_MS, vec!["a".into()])
            );
        }
        // Nobody keeps it any more.
        let get = || v1::GetRequest { name: "a".into(), read: None };
        let gone = async {
            while doors[0].allocator.get(get()).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        tokio::time::timeout(BOUND, gone).await.expect("it goes with its lease");
        for door in &mut doors {
            let status = refused(Code::NotFound, door.allocator.get(get()).await);
            assert!(status.message().contains(&format!("lease {lease} expired")), "{status:?}");
            assert_eq!(keep_alive(door, lease).await, 0);
            let revoked = door.leases.revoke(v1::RevokeRequest { id: lease }).await.unwrap();
            assert!(!revoked.into_inner().revoked);
        }
    });
}

/// A session at a node: messages in, answers out.
struct Session {
    messages: tokio::sync::mpsc::Sender<v1::SessionRequest>,
    answers: tonic::Streaming<v1::SessionResponse>,
}

impl Session {
    async fn open(door: &mut Door) -> Session {
        let (messages, queue) = tokio::sync::mpsc::channel(1000);
        let queue = tokio_stream::wrappers::ReceiverStream::new(queue);
        let answers = door.allocator.session(queue).await.unwrap().into_inner();
        Session { messages, answers }
    }

    async fn send(&self, commands: Vec<(u64, Asked)>) {
        let command = |(id, command)| v1::SessionCommand { id, command: Some(command) };
        let commands = commands.into_iter().map(command).collect();
        self.messages.send(v1::SessionRequest { commands, timeout_ms: 0 }).await.unwrap();
    }

    /// The next so many answers.
    async fn answers(&mut self, count: usize) -> Vec<(u64, Answer)> {
        let mut all = Vec::new();
        while all.len() < count {
            let response = self.answers.message().await.unwrap().expect("more answers");
            all.extend(response.answers.into_iter().map(|a| (a.id, a.answer.unwrap())));
        }
        assert_eq!(all.len(), count);
        all
    }
}

fn asking(name: &str, worker: &str, ports: u32) -> Asked {
    let claims = vec![claim(name, worker, ports)];
    Asked::Allocate(v1::AllocateRequest { claims, dry_run: false })
}

#[test]
fn a_session_answers_all_commands_in_order_on_every_node() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_063);
    block_on(async {
        for (at, mut door) in Door::all(&cluster).into_iter().enumerate() {
            let mut session = Session::open(&mut door).await;
            // What is wrong does not stand in the way of the rest.
            let name = |i: usize| format!("s{at}-{i}");
            let get = |name: String| Asked::Get(v1::GetRequest { name, read: None });
            let token = v1::release_request::Authority::Token(1);
            session
                .send((0..8).map(|i| (100 + i as u64, asking(&name(i), "w", 1))).collect())
                .await;
            session
                .send(vec![
                    (3, get("nobody".into())),
                    (1, asking(&name(9), "w", 200)),
                    (1, asking("not a name", "w", 1)),
                    (
                        4,
                        Asked::Release(v1::ReleaseRequest {
                            name: "nobody".into(),
                            authority: Some(token),
                        }),
                    ),
                ])
                .await;
            let answers = session.answers(12).await;
            let ids: Vec<_> = answers.iter().map(|(id, _)| *id).collect();
            assert_eq!(ids, [100, 101, 102, 103, 104, 105, 106, 107, 3, 1, 1, 4]);
            let mut held = Vec::new();
            for (_, answer) in &answers[..8] {
                let Answer::Allocate(granted) = answer else { panic!("{answer:?}") };
                held.extend(granted.allocations.clone());
            }
            let numbers: BTreeSet<_> = held.iter().map(|held| held.ports[0].number).collect();
            assert_eq!(numbers.len(), 8, "{held:?}");
            let failed = |at: usize| match &answers[at].1 {
                Answer::Error(error) => Err::<(), _>(tonic::Status::with_details(
                    error.code.into(),
                    error.message.clone(),
                    error.details.clone().into(),
                )),
                other => panic!("{other:?}"),
            };
            refused(Code::NotFound, failed(8));
            assert_eq!(reason(&failed(9).unwrap_err()).as_deref(), Some(reasons::CAPACITY));
            assert_eq!(violation(failed(10)).0, "claims[0].name");
            let Answer::Release(none) = &answers[11].1 else { panic!("{answers:?}") };
            assert!(!none.released);

            // On with what was learnt; the stream ends when the caller does, and all is answered.
            let first = &held[0];
            let (name, token) = (first.name.clone(), first.token);
            let confirm = v1::ConfirmRequest { name, token, ..Default::default() };
            session.send(vec![(1, Asked::Confirm(confirm)), (2, get(held[1].name.clone()))]).await;
            let release = |held: &v1::Allocation| {
                let authority = Some(v1::release_request::Authority::Token(held.token));
                (9, Asked::Release(v1::ReleaseRequest { name: held.name.clone(), authority }))
            };
            let answers = session.answers(2).await;
            let Answer::Confirm(confirmed) = &answers[0].1 else { panic!("{answers:?}") };
            assert_eq!(confirmed.allocation.as_ref().unwrap().phase(), v1::Phase::Bound);
            let Answer::Get(got) = &answers[1].1 else { panic!("{answers:?}") };
            assert_eq!(got.allocation.as_ref(), Some(&held[1]));
            for held in held.chunks(3) {
                session.send(held.iter().map(release).collect()).await;
            }
            let Session { messages, answers } = session;
            drop(messages);
            let mut session = Session { messages: tokio::sync::mpsc::channel(1).0, answers };
            for (_, answer) in session.answers(8).await {
                assert!(matches!(&answer, Answer::Release(done) if done.released), "{answer:?}");
            }
            assert_eq!(session.answers.message().await.unwrap(), None);
        }
    });
    assert!(cluster.list().is_empty());
}

#[test]
fn a_session_ends_at_a_message_beyond_its_limits() {
    let cluster = Cluster::start(1);
    cluster.worker("w", 40_999);
    let get = |_| (7, Asked::Get(v1::GetRequest { name: "a".into(), read: None }));
    let gang = |count: usize, ports: u32| {
        let claims = (0..count).map(|i| claim(&format!("g{i}"), "w", ports)).collect();
        (7, Asked::Allocate(v1::AllocateRequest { claims, dry_run: false }))
    };
    block_on(async {
        let mut door = Door::to(&cluster, 0);
        for (within, beyond, field) in [
            ((0..256).map(get).collect(), (0..257).map(get).collect(), "commands"),
            (
                (0..16).map(|_| gang(64, 1)).collect(),
                (0..17).map(|_| gang(61, 1)).collect(),
                "claims",
            ),
            (vec![gang(64, 256)], vec![gang(64, 256), gang(1, 1)], "ports"),
        ] as [(Vec<_>, Vec<_>, _); 3]
        {
            let mut session = Session::open(&mut door).await;
            let count = within.len();
            session.send(within).await;
            session.send(beyond).await;
            session.answers(count).await;
            assert_eq!(violation(session.answers.message().await).0, field);
        }
        let mut session = Session::open(&mut door).await;
        let message = v1::SessionRequest { commands: vec![], timeout_ms: 60_001 };
        session.messages.send(message).await.unwrap();
        assert_eq!(violation(session.answers.message().await).0, "timeout_ms");
    });
}

#[test]
fn health_and_reflection_answer_on_every_node() {
    let cluster = Cluster::start(3);
    block_on(async {
        for at in 0..3 {
            let door = Door::to(&cluster, at);
            let mut health =
                tonic_health::pb::health_client::HealthClient::new(door.channel.clone());
            for service in
                ["", "portwarden.v1.Allocator", "portwarden.v1.Workers", "portwarden.v1.Cluster"]
            {
                let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
                loop {
                    let answer = health.check(request.clone()).await.unwrap().into_inner();
                    if answer.status() == ServingStatus::Serving {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
            }
            let request = tonic_health::pb::HealthCheckRequest { service: "nonsense".into() };
            refused(Code::NotFound, health.check(request).await);

            let mut client =
                reflection::server_reflection_client::ServerReflectionClient::new(door.channel);
            use reflection::server_reflection_request::MessageRequest;
            use reflection::server_reflection_response::MessageResponse;
            let ask = |message| {
                let message_request = Some(message);
                tokio_stream::iter([reflection::ServerReflectionRequest {
                    host: String::new(),
                    message_request,
                }])
            };
            let mut answers = client
                .server_reflection_info(ask(MessageRequest::ListServices(String::new())))
                .await
                .unwrap()
                .into_inner();
            let answer = answers.message().await.unwrap().expect("an answer").message_response;
            let Some(MessageResponse::ListServicesResponse(list)) = answer else {
                panic!("{answer:?}")
            };
            let listed: BTreeSet<_> = list.service.iter().map(|s| s.name.as_str()).collect();
            let served = [
                "grpc.health.v1.Health",
                "grpc.reflection.v1.ServerReflection",
                "portwarden.v1.Allocator",
                "portwarden.v1.Cluster",
                "portwarden.v1.Leases",
                "portwarden.v1.Workers",
            ];
            assert_eq!(listed, served.into(), "what the listener serves, no more and no less");
            let symbol = MessageRequest::FileContainingSymbol("portwarden.v1.Claim".into());
            let mut answers =
                client.server_reflection_info(ask(symbol)).await.unwrap().into_inner();
            let answer = answers.message().await.unwrap().expect("an answer").message_response;
            assert!(
                matches!(answer, Some(MessageResponse::FileDescriptorResponse(_))),
                "{answer:?}"
            );
        }
    });
}

#[test]
fn a_listing_through_a_follower_stays_at_its_revision() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_063);
    cluster.worker("v", 40_063);
    let leader = cluster.leader();
    let follower = (leader + 1) % 3;
    block_on(async {
        let (mut door, mut leader) = (Door::to(&cluster, follower), Door::to(&cluster, leader));
        let mut tokens = Vec::new();
        for i in 0..7 {
            tokens.push(door.allocate(claim(&format!("p{i}"), "w", 1)).await.unwrap().token);
        }
        let list = |page_token: &str| v1::ListRequest {
            page_size: 2,
            page_token: page_token.into(),
            ..v1::ListRequest::default()
        };
        let (mut names, mut revisions, mut pages) = (Vec::new(), BTreeSet::new(), Vec::new());
        let mut token = String::new();
        loop {
            let page = door.allocator.list(list(&token)).await.unwrap().into_inner();
            names.extend(page.allocations.iter().map(|a| a.name.clone()));
            revisions.insert(page.revision);
            pages.push(page.next_page_token.clone());
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
            // Before, behind and at the listing's end, through either node.
            let name = format!("p{}x", pages.len());
            door.allocate(claim(&name, "w", 1)).await.unwrap();
            if pages.len() == 1 {
                assert!(leader.release("p6", tokens[6]).await.unwrap().released);
            }
        }
        assert_eq!(names, ["p0", "p1", "p2", "p3", "p4", "p5", "p6"]);
        assert_eq!((revisions.len(), pages.len()), (1, 4));
        let now = door.allocator.list(v1::ListRequest::default()).await.unwrap().into_inner();
        assert_eq!(now.allocations.len(), 9, "seven, three more, one less");

        // The follower never had that view, and a revision that nobody listed at has none anywhere.
        let elsewhere = v1::ListRequest {
            read: Some(v1::ReadOptions { stale: true, min_revision: 0 }),
            ..list(&pages[0])
        };
        for request in [elsewhere, list("1.p0"), list("18446744073709551615.p0")] {
            let status = refused(Code::Aborted, door.allocator.list(request).await);
            assert_eq!(reason(&status).as_deref(), Some(reasons::PAGE_EXPIRED));
        }
        for bad in ["x", "1", "-1.p0", "99999999999999999999.p0", &"9".repeat(10_000)] {
            let (field, _) = violation(door.allocator.list(list(bad)).await);
            assert_eq!(field, "page_token", "{bad}");
        }

        let workers = |page_token: &str| v1::ListWorkersRequest {
            page_size: 1,
            page_token: page_token.into(),
            ..v1::ListWorkersRequest::default()
        };
        let first = door.workers.list(workers("")).await.unwrap().into_inner();
        door.allocate(claim("q", "w", 1)).await.unwrap();
        let second = door.workers.list(workers(&first.next_page_token)).await.unwrap().into_inner();
        assert_eq!((first.workers[0].name.as_str(), second.workers[0].name.as_str()), ("v", "w"));
        assert_eq!((first.revision, second.next_page_token.as_str()), (second.revision, ""));
        assert_eq!(second.workers[0].allocations, 9, "as it was");
        let status = refused(Code::Aborted, door.workers.list(workers("1.v")).await);
        assert_eq!(reason(&status).as_deref(), Some(reasons::PAGE_EXPIRED));
    });
}

#[test]
fn a_stale_read_is_as_fresh_as_it_is_asked_to_be() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40_999);
    block_on(async {
        let mut doors = Door::all(&cluster);
        for round in 0..20 {
            let name = format!("i{round}");
            let written = doors[round % 3].allocate(claim(&name, "w", 1)).await.unwrap();
            for door in &mut doors {
                let read = Some(v1::ReadOptions { stale: true, min_revision: written.version });
                let get = v1::GetRequest { name: name.clone(), read };
                let seen = door.allocator.get(get).await.unwrap().into_inner();
                assert!(seen.revision >= written.version);
                assert_eq!(seen.allocation.as_ref(), Some(&written));
            }
        }
        // A revision that never comes is waited for until the deadline, and not passed off.
        for door in &mut doors {
            let read = Some(v1::ReadOptions { stale: true, min_revision: 1 << 40 });
            let mut get = Request::new(v1::GetRequest { name: "i0".into(), read });
            get.set_timeout(Duration::from_millis(300));
            let status = door.allocator.get(get).await.unwrap_err();
            assert!(
                matches!(status.code(), Code::DeadlineExceeded | Code::Unavailable),
                "{status:?}"
            );
        }
    });
    // Without a quorum the own copy still answers, and nothing else does.
    let leader = cluster.leader();
    let alone = (leader + 1) % 3;
    cluster.kill(leader);
    cluster.kill((leader + 2) % 3);
    block_on(async {
        let mut door = Door::to(&cluster, alone);
        let get = |stale| {
            let read = Some(v1::ReadOptions { stale, min_revision: 0 });
            let mut get = Request::new(v1::GetRequest { name: "i0".into(), read });
            get.set_timeout(Duration::from_secs(1));
            get
        };
        assert!(door.allocator.get(get(true)).await.is_ok());
        let status = door.allocator.get(get(false)).await.unwrap_err();
        assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Unavailable), "{status:?}");
    });
}

/// A deadline that is over before anything can be done: whatever the caller hears is true.
#[test]
fn a_deadline_of_a_millisecond_is_never_answered_with_what_is_not_so() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_999);
    let pids: Vec<_> = cluster.nodes.iter().map(|n| n.pid()).collect();
    block_on(async {
        let mut doors = Door::all(&cluster);
        for door in &mut doors {
            door.cluster.status(v1::StatusRequest {}).await.unwrap();
        }
        let mut heard = Vec::new();
        for i in 0..60 {
            let name = format!("i{i}");
            let request =
                v1::AllocateRequest { claims: vec![claim(&name, "w", 1)], dry_run: false };
            let mut request = Request::new(request);
            request.set_timeout(Duration::from_millis(1));
            heard.push((name, doors[i % 3].allocator.allocate(request).await));
        }
        assert!(
            heard.iter().any(|(_, answer)| answer.is_err()),
            "a millisecond was enough 60 times"
        );
        doors[0].allocate(claim("fence", "w", 1)).await.unwrap();
        let table = doors[0].allocator.list(v1::ListRequest::default()).await.unwrap().into_inner();
        let find = |name: &str| table.allocations.iter().find(|a| a.name == name);
        for (name, answer) in heard {
            match answer {
                Ok(granted) => assert_eq!(find(&name), granted.into_inner().allocations.first()),
                Err(status) => {
                    let surely_not = matches!(
                        reason(&status).as_deref(),
                        Some(reasons::NOT_EXECUTED | reasons::NOT_READY)
                    );
                    assert!(!surely_not || find(&name).is_none(), "{name}: {status:?}");
                    let known =
                        [Code::DeadlineExceeded, Code::Cancelled, Code::Unavailable, Code::Unknown];
                    assert!(known.contains(&status.code()), "{name}: {status:?}");
                }
            }
        }
        for door in &mut doors {
            door.allocator.get(v1::GetRequest { name: "fence".into(), read: None }).await.unwrap();
        }
    });
    let now: Vec<_> = cluster.nodes.iter().map(|n| n.pid()).collect();
    assert_eq!(now, pids);
    cluster.cli(&["status", "--check"]).ok();
}

#[test]
fn the_same_request_through_three_nodes_at_once_is_granted_once() {
    let cluster = Cluster::start(3);
    cluster.worker("w", 40_063);
    block_on(async {
        for round in 0..10 {
            let name = format!("i{round}");
            let mut calls = tokio::task::JoinSet::new();
            for door in Door::all(&cluster) {
                for _ in 0..4 {
                    let (mut door, claim) = (door.clone(), claim(&name, "w", 2));
                    calls.spawn(async move { door.allocate(claim).await });
                }
            }
            let answers: Vec<_> = calls.join_all().await.into_iter().map(Result::unwrap).collect();
            assert!(answers.iter().all(|a| *a == answers[0]), "{answers:?}");
        }
    });
    let listed = wait_for("the table", || Some(cluster.list()));
    assert_eq!(listed.len(), 10);
    crate::support::assert_unique(&listed);
}
