//! The client against nodes that serve, that are gone, and that accept and never answer.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{join, join_all};
use tokio::net::TcpListener;
use tokio::task::{JoinSet, yield_now};
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use tonic::transport::Channel;

use super::session::{Answer, Command};
use super::{
    Client, ClientError, Filter, Follow, Keeper, News, Options, Session, Standing, StartError, Try,
};
use crate::api::fake::{Fake, allocate, claim, fake, listen, spec, table};
use crate::api::{REQUEST_MAX_BYTES, Readiness, serve};
use crate::connections::{Kind, tcp_incoming};
use crate::core;
use crate::node::{CallError, MemberReport};
use crate::proto::v1;
use crate::raft::ApplyObserver as _;

const PATIENT: Duration = Duration::from_secs(60);

/// A node that serves, and its address. It ends with the test's runtime.
async fn node() -> (Arc<Fake>, String) {
    let (fake, api) = fake();
    (fake, listen(api, std::future::pending()).await)
}

/// A node at an address where nobody has answered yet.
async fn begin_at(listener: TcpListener) -> Arc<Fake> {
    let (fake, api) = fake();
    let readiness = Readiness::new().await;
    readiness.set(true).await;
    let incoming = tcp_incoming(listener, Kind::Client);
    tokio::spawn(serve(api, readiness, incoming, std::future::pending()));
    fake
}

/// For tests where an attempt that is given up would be counted.
fn patient(address: &str) -> Client {
    let options = Options { timeout: PATIENT, attempt_timeout: PATIENT, ..options() };
    Client::connect(vec![address.into()], options).unwrap()
}

/// The leader's timers find that it was not confirmed in time.
fn miss_deadline(fake: &Fake, held: &v1::Allocation) {
    let missed = core::Command::Reclaim {
        name: held.name.parse().unwrap(),
        token: core::Token(held.token),
        version: core::Revision(held.version),
        ground: core::Ground::Unconfirmed,
        under: core::Leader::default(),
    };
    let origin = core::Origin::default();
    core::apply(&mut fake.state.lock().unwrap(), &origin, &missed).0.outcome.unwrap();
}

/// An address where nobody listens.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().to_string()
}

/// An address that accepts and never says a word.
async fn silent() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((socket, _)) = listener.accept().await {
            held.push(socket);
        }
    });
    address
}

fn options() -> Options {
    Options {
        timeout: Duration::from_secs(2),
        attempt_timeout: Duration::from_millis(200),
        learn_every: Duration::from_secs(10),
        seed: Some(1),
    }
}

fn client(endpoints: &[&String]) -> Client {
    Client::connect(endpoints.iter().map(ToString::to_string).collect(), options()).unwrap()
}

#[tokio::test]
async fn calls_go_over_the_wire_and_back() {
    let (_, address) = node().await;
    let client = client(&[&address]);
    let mut unnamed = claim("b");
    unnamed.uid.clear();
    let granted = client.allocate(vec![unnamed]).await.unwrap();
    let held = &granted.allocations[0];
    assert!(!held.uid.is_empty(), "the library gives a uid");
    assert_eq!(client.get("b", None).await.unwrap().allocation.as_ref(), Some(held));
    client.confirm(held).await.unwrap();
    let request = v1::ListRequest { page_size: 1, ..Default::default() };
    let names: Vec<_> =
        client.list(request).await.unwrap().items.into_iter().map(|a| a.name).collect();
    assert_eq!(names, ["a", "b"]);
    assert!(client.release("b", held.token).await.unwrap().released);
    assert!(!client.release("b", held.token).await.unwrap().released);
    assert_eq!(client.worker_list(Default::default()).await.unwrap().items.len(), 1);
    assert_eq!(client.status().await.unwrap().leader, 0);

    let error = client.get("nope", None).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::NotFound));
    let ClientError::Refused(refused) = error else { panic!("a refusal") };
    assert_eq!(refused.details.resource_info().unwrap().resource_name, "nope");
}

#[tokio::test]
async fn a_dead_endpoint_is_passed_over_and_then_left_alone() {
    let (_, address) = node().await;
    let client = client(&[&nobody().await, &address]);
    client.get("a", None).await.unwrap();
    assert_eq!(client.last_endpoint(), address);
    client.get("a", None).await.unwrap();
}

/// It accepts and never answers, and one attempt may take as long as the call.
#[tokio::test]
async fn a_silent_endpoint_leaves_time_for_the_others() {
    let (_, address) = node().await;
    let options = Options { attempt_timeout: Duration::from_secs(3), ..options() };
    let client = Client::connect(vec![silent().await, address.clone()], options).unwrap();
    client.get("a", None).await.unwrap();
    assert_eq!(client.last_endpoint(), address);
}

/// Its own bounds are reached, and the other one's are not.
#[tokio::test]
async fn an_overloaded_node_is_left_for_another() {
    let ((full, first), (_, second)) = (node().await, node().await);
    let overloaded = || CallError::Overloaded { retry_after: Duration::from_millis(1) };
    full.failures.lock().unwrap().extend(std::iter::repeat_with(overloaded).take(1_000));
    let client = client(&[&first, &second]);
    client.get("a", None).await.unwrap();
    assert_eq!(client.last_endpoint(), second);
}

/// A client that was given one node learns of another, and goes on there when the first is gone.
#[tokio::test]
async fn members_that_were_added_are_found() {
    let (_, stays) = node().await;
    let (fake, goes) = node().await;
    let member = |endpoint: &str| MemberReport { endpoint: endpoint.into(), ..Default::default() };
    *fake.members.lock().unwrap() = vec![member(&goes), member(&stays)];
    let options = Options { learn_every: Duration::ZERO, ..options() };
    let client = Client::connect(vec![goes.clone()], options).unwrap();
    client.get("a", None).await.unwrap();
    while client.endpoints().len() < 2 {
        tokio::task::yield_now().await;
    }
    fake.failures.lock().unwrap().extend(vec![CallError::NotReady("removed".into()); 9]);
    client.get("a", None).await.unwrap();
    assert_eq!(client.last_endpoint(), stays);
}

#[tokio::test]
async fn without_any_node_nothing_is_done_and_that_is_known() {
    let client = client(&[&nobody().await, &nobody().await]);
    let asked = timeout(Duration::from_secs(20), client.allocate(vec![claim("b")]));
    let error = asked.await.unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Unavailable { .. }), "{error}");
}

#[tokio::test]
async fn a_silent_node_costs_one_attempt_where_a_repeat_is_safe() {
    let (_, address) = node().await;
    let options = Options { timeout: PATIENT, ..options() };
    let client = Client::connect(vec![silent().await, address], options).unwrap();
    let asked = timeout(PATIENT / 3, client.allocate(vec![claim("b")]));
    asked.await.expect("not half of the time").unwrap();
}

#[tokio::test]
async fn what_is_not_safe_to_repeat_is_left_unknown_at_once() {
    let (fake, address) = node().await;
    let client = client(&[&silent().await, &address]);
    let error = client.force_release("a", "").await.unwrap_err();
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    assert_eq!(*fake.proposed.lock().unwrap(), 0);
}

#[tokio::test]
async fn what_is_not_safe_to_repeat_may_take_longer_than_an_attempt() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = client(&[&listener.local_addr().unwrap().to_string()]);
    let slow = tokio::spawn(async move { client.force_release("a", "").await });
    sleep(2 * options().attempt_timeout).await;
    begin_at(listener).await;
    assert!(slow.await.unwrap().unwrap().released);
}

#[tokio::test]
async fn silence_to_the_end_is_an_unknown_outcome_of_a_write_only() {
    let address = silent().await;
    let client = client(&[&address]);
    let error = client.allocate(vec![claim("b")]).await.unwrap_err();
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    let error = client.get("a", None).await.unwrap_err();
    assert!(matches!(error, ClientError::Unavailable { .. }), "{error}");
}

#[tokio::test]
async fn a_refused_repeat_settles_a_doubt_only_under_a_token() {
    let (_, address) = node().await;
    let silent = silent().await;
    let mut elsewhere = claim("b");
    elsewhere.placement = Some(v1::claim::Placement::Worker("nope".into()));
    let other = v1::Allocation { name: "a".into(), token: 99, ..Default::default() };
    let error = client(&[&silent, &address]).allocate(vec![elsewhere]).await.unwrap_err();
    assert!(matches!(error, ClientError::OutcomeUnknown { .. }), "{error}");
    let error = client(&[&silent, &address]).confirm(&other).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::FailedPrecondition), "{error}");
}

#[tokio::test]
async fn a_version_that_refuses_a_repeat_may_be_of_the_attempt_before() {
    let (_, address) = node().await;
    let silent = silent().await;
    let sure = client(&[&address]);
    let held = sure.allocate(vec![claim("b")]).await.unwrap().allocations.remove(0);
    sure.confirm(&held).await.unwrap();
    let lease = sure.lease_grant(Duration::from_secs(60)).await.unwrap().lease.unwrap().id;
    sure.attach("b", held.token, 0, lease).await.unwrap();

    let attach =
        |client: Client| async move { client.attach("b", held.token, held.version, 0).await };
    let refused = attach(sure.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::FailedPrecondition), "{refused}");
    let unknown = attach(client(&[&silent, &address])).await.unwrap_err();
    assert!(matches!(unknown, ClientError::OutcomeUnknown { .. }), "{unknown}");
    // That it is confirmed can be seen.
    let held = v1::Allocation {
        version: held.version,
        ..sure.get("b", None).await.unwrap().allocation.unwrap()
    };
    let refused = sure.confirm(&held).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::FailedPrecondition), "{refused}");
    let confirmed = client(&[&silent, &address]).confirm(&held).await.unwrap().allocation.unwrap();
    assert_eq!((confirmed.phase(), confirmed.lease), (v1::Phase::Bound, lease));
}

#[tokio::test]
async fn overload_and_unreadiness_are_waited_out() {
    let (fake, address) = node().await;
    *fake.failures.lock().unwrap() = [
        CallError::Overloaded { retry_after: Duration::from_millis(20) },
        CallError::NotReady("starting".into()),
        CallError::Expired,
    ]
    .into();
    client(&[&address]).allocate(vec![claim("b")]).await.unwrap();
}

#[tokio::test]
async fn overload_to_the_end_is_told_from_a_node_that_does_not_serve() {
    let (fake, address) = node().await;
    let asked = CallError::Overloaded { retry_after: Duration::from_millis(100) };
    for (then, told) in [(asked.clone(), true), (CallError::NotReady("starting".into()), false)] {
        *fake.failures.lock().unwrap() = vec![then; 1000].into();
        fake.failures.lock().unwrap().push_front(asked.clone());
        match client(&[&address]).get("a", None).await {
            Err(ClientError::Unavailable { overloaded, .. }) => assert_eq!(overloaded, told),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_backup_waits_as_long_as_an_overloaded_node_asks() {
    let (fake, address) = node().await;
    fake.hub.installed(&fake.state.lock().unwrap());
    let retry_after = Duration::from_millis(600);
    fake.failures.lock().unwrap().push_back(CallError::Overloaded { retry_after });
    let began = Instant::now();
    client(&[&address]).backup(|| Ok(Vec::new()), |_| ()).await.unwrap();
    assert!(began.elapsed() >= retry_after / 2, "{:?}", began.elapsed());
}

/// Where it is known that nothing was done, a try that cannot be answered would leave it unknown.
#[tokio::test]
async fn no_try_begins_without_time_for_its_answer() {
    let (fake, address) = node().await;
    let client = patient(&address);
    let longer = CallError::Overloaded { retry_after: 2 * PATIENT };
    *fake.failures.lock().unwrap() = vec![longer].into();
    let asked = timeout(PATIENT / 2, client.allocate(vec![claim("b")]));
    let refused = asked.await.unwrap().unwrap_err();
    assert!(matches!(refused, ClientError::Unavailable { overloaded: true, .. }), "{refused}");
}

/// Sixty commands wait out an overload together, and not one after the other.
#[tokio::test]
async fn what_an_overloaded_node_refuses_on_a_session_goes_again_as_one() {
    let (fake, address) = node().await;
    let session = patient(&address).session();
    let overloaded = CallError::Overloaded { retry_after: Duration::from_millis(500) };
    let asked = |i: usize| {
        let claims = vec![claim(&format!("b{i}"))];
        Command::Allocate(v1::AllocateRequest { claims, dry_run: false })
    };
    *fake.failures.lock().unwrap() = vec![overloaded.clone(); 50].into();
    let all = session.all((0..60).map(asked).collect());
    let answers = timeout(PATIENT / 4, all).await.unwrap();
    let name = |answer| match answer {
        Ok(Answer::Allocate(granted)) => granted.allocations[0].name.clone(),
        other => panic!("{other:?}"),
    };
    let names: Vec<_> = answers.into_iter().map(name).collect();
    assert_eq!(names, (0..60).map(|i| format!("b{i}")).collect::<Vec<_>>());
    assert_eq!(*fake.proposed.lock().unwrap(), 110);

    let longer = CallError::Overloaded { retry_after: PATIENT };
    *fake.failures.lock().unwrap() = [vec![overloaded; 10], vec![longer; 10]].concat().into();
    let all = session.all((100..110).map(asked).collect());
    for answer in timeout(PATIENT, all).await.unwrap() {
        let overloaded = matches!(answer, Err(ClientError::Unavailable { overloaded: true, .. }));
        assert!(overloaded, "{answer:?}");
    }
    assert_eq!(*fake.proposed.lock().unwrap(), 130);
}

/// A session that a message ended would leave what is forced out unknown.
#[tokio::test]
async fn what_is_more_than_a_request_may_have_goes_in_several_messages() {
    let (_, address) = node().await;
    let forced = |reason: String| {
        let authority = Some(v1::release_request::Authority::Force(v1::Force { reason }));
        Command::Release(v1::ReleaseRequest { name: "b".into(), authority })
    };
    let mut commands = vec![forced("r".repeat(10_000)); 250];
    commands.push(forced("r".repeat(REQUEST_MAX_BYTES)));
    let answers = client(&[&address]).session().all(commands).await;
    for (at, answer) in answers.into_iter().enumerate() {
        let refused = answer.expect_err("its reason is too long").code();
        let code = if at < 250 { Code::InvalidArgument } else { Code::OutOfRange };
        assert_eq!(refused, Some(code), "{at}");
    }
}

/// The node waits for a leader, longer than the caller waits for it.
#[tokio::test]
async fn what_is_sent_on_a_session_is_not_done_after_its_caller_gave_up() {
    let (fake, address) = node().await;
    *fake.failures.lock().unwrap() = vec![CallError::NotLeader { leader: None }; 10_000].into();
    let options = Options { attempt_timeout: Duration::from_secs(30), ..options() };
    let client = Client::connect(vec![address], options).unwrap();
    let session = client.with_timeout(Duration::from_millis(500)).session();
    session.allocate(vec![claim("b")]).await.unwrap_err();
    // What was on its way.
    sleep(Duration::from_millis(100)).await;
    let proposed = *fake.proposed.lock().unwrap();
    sleep(Duration::from_millis(700)).await;
    assert_eq!(*fake.proposed.lock().unwrap(), proposed);
}

/// Each, in a task of its own, waits for its answer before it asks again; a message is read once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shares_a_session_asks_in_the_same_messages() {
    let (fake, address) = node().await;
    let session = client(&[&address]).session();
    let ask = |session: Session| async move {
        for _ in 0..20 {
            let got = session.get("a").await.unwrap();
            assert_eq!(got.allocation.unwrap().name, "a");
        }
    };
    let all: JoinSet<()> = (0..32).map(|_| ask(session.clone())).collect();
    timeout(Duration::from_secs(20), all.join_all()).await.unwrap();
    let messages = *fake.reads.lock().unwrap();
    assert!((20..32 * 20 / 2).contains(&messages), "{messages}");
}

#[tokio::test]
async fn who_shares_a_session_is_answered_in_time_where_no_node_is_there() {
    let given = Duration::from_secs(2);
    let session = client(&[&nobody().await]).with_timeout(given).session();
    let all = (0..300).map(|i| {
        let session = session.clone();
        async move { session.allocate(vec![claim(&format!("b{i}"))]).await }
    });
    // On a busy machine an attempt may be over before it is known that nobody listens.
    let open = |e: &ClientError| {
        matches!(e, ClientError::Unavailable { .. } | ClientError::OutcomeUnknown { .. })
    };
    for answer in timeout(10 * given, join_all(all)).await.expect("an answer to each") {
        assert!(answer.as_ref().is_err_and(open), "{answer:?}");
    }
}

/// Placed anew meanwhile, it would be there twice.
#[tokio::test]
async fn what_nobody_waits_for_any_more_is_not_sent_on_a_session() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let session = client(&[&address]).session();
    for i in 0..3 {
        let given_up = session.allocate(vec![claim(&format!("b{i}"))]);
        assert!(timeout(Duration::from_millis(100), given_up).await.is_err());
    }
    let fake = begin_at(silent).await;
    let granted = session.allocate(vec![claim("b")]).await.unwrap().allocations;
    assert_eq!(granted[0].name, "b");
    assert_eq!(*fake.proposed.lock().unwrap(), 1);
}

#[test]
fn endpoints_are_checked() {
    for bad in ["", "a", "a:0", "a:65536", "https://a:1", "a b:1", "a:x"] {
        assert!(Client::endpoint(bad).is_err(), "{bad}");
    }
    for good in ["127.0.0.1:7601", "http://node-1:7601", "[::1]:7601"] {
        assert!(Client::endpoint(good).is_ok(), "{good}");
    }
    assert!(Client::connect(vec![], Options::default()).is_err());
}

fn until(standing: Standing) -> Duration {
    let Standing::Held { until } = standing else { panic!("{standing:?}") };
    until
}

#[tokio::test]
async fn a_lease_is_kept_alive_over_the_death_of_a_node() {
    let (_, api) = fake();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let first = listen(api.clone(), async move { drop(stopped.await) }).await;
    let second = listen(api, std::future::pending()).await;
    let keeper = Keeper::start(client(&[&first, &second]));
    let ttl = Duration::from_secs(5);
    let mut lease = keeper.grant(ttl).await.unwrap();
    let granted = until(lease.standing());
    assert!(until(lease.changed().await) > granted);
    stop.send(()).unwrap();
    // Sent since then, so acknowledged by the other one.
    let beyond = keeper.now() + ttl;
    while until(lease.changed().await) <= beyond {}
}

#[tokio::test]
async fn many_leases_are_kept_and_one_that_is_revoked_is_gone() {
    let (_, address) = node().await;
    let client = patient(&address);
    let keeper = Keeper::start(client.clone());
    let mut leases = Vec::new();
    for _ in 0..100 {
        leases.push(keeper.grant(Duration::from_secs(5)).await.unwrap());
    }
    let mut revoked = leases.pop().unwrap();
    assert!(client.lease_revoke(revoked.id()).await.unwrap().revoked);
    assert!(!client.lease_revoke(revoked.id()).await.unwrap().revoked);
    assert_eq!(revoked.lost().await, Standing::Gone);
    let before: Vec<_> = leases.iter().map(|lease| until(lease.standing())).collect();
    for (lease, before) in leases.iter_mut().zip(before) {
        while until(lease.standing()) == before {
            lease.changed().await;
        }
    }
    assert_eq!(client.lease_list(Default::default()).await.unwrap().items.len(), 99);
}

#[tokio::test]
async fn a_lease_that_nobody_acknowledges_is_unproven_when_its_time_is_over() {
    let (_, api) = fake();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let address = listen(api, async move { drop(stopped.await) }).await;
    let keeper = Keeper::start(client(&[&address]));
    let mut lease = keeper.grant(Duration::from_secs(1)).await.unwrap();
    stop.send(()).unwrap();
    let mut known = until(lease.standing());
    while let standing @ Standing::Held { .. } = lease.changed().await {
        known = until(standing);
    }
    assert_eq!(lease.standing(), Standing::Unproven);
    assert!(keeper.now() >= known);
}

#[tokio::test]
async fn a_copy_follows_the_table_and_is_listed_anew_where_the_changes_are_not_kept() {
    let (fake, address) = node().await;
    fake.hub.installed(&fake.state.lock().unwrap());
    let telling = fake.clone();
    tokio::spawn(async move { telling.hub.run().await });
    let client = client(&[&address]);
    let mut copy = client.follow(Filter { worker: "w".into(), ..Filter::default() });
    let names = |copy: &Follow| copy.allocations().keys().cloned().collect::<Vec<_>>();
    assert_eq!(copy.next().await.unwrap(), News::Listed);
    assert_eq!(names(&copy), ["a"]);

    let change = |command: core::Command| {
        let mut state = fake.state.lock().unwrap();
        let (applied, events) = core::apply(&mut state, &core::Origin::default(), &command);
        applied.outcome.as_ref().unwrap();
        fake.hub.applied(&command, &applied, &events);
        fake.hub.published(&state);
    };
    let release = |name: &str| core::Command::Release {
        name: name.parse().unwrap(),
        authority: core::Authority::Operator { reason: "test".into() },
    };
    change(allocate("b"));
    change(release("a"));
    while names(&copy) != ["b"] {
        assert!(matches!(copy.next().await.unwrap(), News::Heard(_)));
    }
    let revision = fake.state.lock().unwrap().revision.0;
    assert_eq!(copy.revision(), revision);

    // Another table, which begins where nobody has watched.
    let restored = fake.state.lock().unwrap().anew(core::Millis(0));
    *fake.state.lock().unwrap() = restored.clone();
    fake.hub.installed(&restored);
    while copy.next().await.unwrap() != News::Listed {}
    assert_eq!((names(&copy), copy.revision()), (vec!["b".to_string()], restored.revision.0));
    // And one that has not come so far: as when an older backup was restored elsewhere.
    *fake.state.lock().unwrap() = table();
    fake.hub.installed(&table());
    while copy.next().await.unwrap() != News::Listed {}
    assert_eq!((names(&copy), copy.revision()), (vec!["a".to_string()], table().revision.0));
}

#[tokio::test]
async fn a_start_goes_from_port_to_port_until_one_is_free() {
    let (_, address) = node().await;
    let client = client(&[&address]);
    let held = client.get("a", None).await.unwrap().allocation.unwrap();
    let in_use = |port| Ok::<_, ()>(Try::InUse { port, why: "address in use".into() });
    let (held, started) = client
        .start_on(held, 10, async |held| match held.ports[0].number {
            port @ 40000..40003 => in_use(port),
            port => Ok(Try::Started(port)),
        })
        .await
        .unwrap();
    assert_eq!((started, held.ports[0].number, held.swaps), (40003, 40003, 3));

    let given_up = client.start_on(held, 1, async |held| in_use(held.ports[0].number)).await;
    let Err(StartError::NoPortLeft(error)) = given_up else { panic!("no port was free") };
    assert!(!error.reclaimed);
    assert_eq!(error.tried.iter().map(|(port, _)| *port).collect::<Vec<_>>(), [40003, 40004]);
}

#[tokio::test]
async fn a_start_for_which_no_port_is_left_says_which_were_tried() {
    let (_, address) = node().await;
    let client = client(&[&address]);
    let mut only = claim("b");
    only.ports[0].ports = Some(v1::port_request::Ports::Specific(40010));
    let held = client.allocate(vec![only]).await.unwrap().allocations.remove(0);
    let in_use = async |held: &v1::Allocation| {
        Ok::<Try<()>, ()>(Try::InUse { port: held.ports[0].number, why: "held".into() })
    };
    let Err(StartError::NoPortLeft(error)) = client.start_on(held, 10, in_use).await else {
        panic!("it was the only one")
    };
    assert!(error.reclaimed, "{error}");
    assert!(error.to_string().ends_with("tried 40010 (held)"), "{error}");
}

/// Its start took longer than its deadline: meanwhile it lingered, and came off its lease.
#[tokio::test]
async fn a_start_that_missed_its_deadline_is_confirmed_on_its_lease_again() {
    let (fake, address) = node().await;
    let client = patient(&address);
    let held = watched(&client).await;
    miss_deadline(&fake, &held);
    let lingering = client.get("b", None).await.unwrap().allocation.unwrap();
    assert_eq!((lingering.phase(), lingering.lease), (v1::Phase::Lingering, 0));

    let revived = client.confirm(&held).await.unwrap().allocation.unwrap();
    assert_eq!((revived.phase(), revived.lease), (v1::Phase::Bound, held.lease));
    assert_eq!(revived.token, held.token);
    // What changed otherwise is not overridden: its ports are others now.
    let swapped = client.report_conflict("b", held.token, 0, held.ports[0].number).await.unwrap();
    miss_deadline(&fake, &swapped.allocation.unwrap());
    let refused = client.confirm(&held).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::FailedPrecondition));
}

/// On a lease, and on a worker with an agent.
async fn watched(client: &Client) -> v1::Allocation {
    let identity = v1::Identity { machine_id: "m".into(), boot_id: "b".into(), namespace: 7 };
    let watched = v1::WorkerSpec { identity: Some(identity), ..spec() };
    client.worker_register("w", watched).await.unwrap();
    let lease = client.lease_grant(Duration::from_secs(60)).await.unwrap().lease.unwrap().id;
    let leased = v1::Claim { lease, ..claim("b") };
    client.allocate(vec![leased]).await.unwrap().allocations.remove(0)
}

/// It is in doubt, then seen not to have been done yet, and the second one is not served.
#[tokio::test]
async fn a_doubtful_confirmation_stays_so_until_a_second_one_settles_it() {
    let (fake, address) = node().await;
    let client = client(&[&address]);
    let held = watched(&client).await;
    let moved = client.attach("b", held.token, 0, 0).await.unwrap().allocation.unwrap();
    miss_deadline(&fake, &moved);
    let reads = *fake.reads.lock().unwrap();
    fake.failures.lock().unwrap().push_back(CallError::Unknown("lost".into()));
    let once_seen = async {
        while *fake.reads.lock().unwrap() == reads {
            yield_now().await;
        }
        let not_served = vec![CallError::NotReady("starting".into()); 1000];
        fake.failures.lock().unwrap().extend(not_served);
    };
    let both = join(client.confirm(&held), once_seen);
    let (confirmed, ()) = timeout(Duration::from_secs(20), both).await.unwrap();
    let unknown = matches!(confirmed, Err(ClientError::OutcomeUnknown { .. }));
    assert!(unknown, "{confirmed:?}");
}

fn get_a(channel: &Channel) -> impl Future<Output = Result<(), tonic::Status>> + use<> {
    let mut client = v1::allocator_client::AllocatorClient::new(channel.clone());
    async move { client.get(v1::GetRequest { name: "a".into(), read: None }).await.map(drop) }
}

/// A node is held up, and most of its callers give up: the others' calls go on. (h2 closes a connection
/// after 20 resets of what it has not looked at yet.)
#[tokio::test]
async fn calls_that_are_given_up_in_masses_break_no_other() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let channel = Client::endpoint(&address).unwrap().connect_lazy();
    let patient = tokio::spawn(get_a(&channel));
    let given_up = (0..60).map(|_| timeout(Duration::from_millis(200), get_a(&channel)));
    assert!(join_all(given_up).await.iter().all(Result::is_err));
    begin_at(listener).await;
    patient.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_dry_run_and_an_explanation_change_nothing() {
    let (fake, address) = node().await;
    let client = client(&[&address]);
    let shown = client.allocate_dry_run(vec![claim("b")]).await.unwrap();
    assert_eq!(shown.allocations[0].ports[0].number, 40001);
    let explained = client.explain(vec![claim("b")], None).await.unwrap();
    assert!(explained.refusal.is_empty() && explained.claims[0].workers[0].fits);
    assert_eq!(*fake.proposed.lock().unwrap(), 0);
}
