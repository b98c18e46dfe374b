//! Hand-made histories: good ones, and for each rule bad ones that this rule alone finds.

use portwarden::api::meaning::{self, Request, Response};
use portwarden::core::{Command, Leader, LeaseId, Millis, Origin, State, apply};
use portwarden::proto::v1;

use super::{Report, Rule, check};
use crate::history::{Header, History, Nanos, Record};

const MS: Nanos = 1_000_000;
const WITHIN: Millis = Millis(600_000);

/// Makes a history by asking the core, one instant a step.
struct Script {
    state: State,
    records: Vec<Record>,
    now: Nanos,
    op: u64,
    /// What watchers will have been told.
    events: Vec<Vec<v1::WatchEvent>>,
}

impl Script {
    fn new() -> Script {
        Script::with_header(true)
    }

    /// One of which the beginning is not known: nothing can be replayed.
    fn torn() -> Script {
        Script::with_header(false)
    }

    fn with_header(complete: bool) -> Script {
        let header = Header {
            command: "by hand".into(),
            seed: 0,
            complete,
            confirm_within_ms: WITHIN.0,
            available_within_ms: 100,
        };
        let records = vec![Record::Header(header)];
        Script { state: State::default(), records, now: 0, op: 0, events: Vec::new() }
    }

    fn tick(&mut self) -> Nanos {
        self.now += MS;
        self.now
    }

    fn invoke(&mut self, request: &Request) -> u64 {
        self.invoke_as(request, false)
    }

    fn invoke_as(&mut self, request: &Request, repeats: bool) -> u64 {
        self.op += 1;
        let (at, op, request) = (self.tick(), self.op, request.clone());
        self.records.push(Record::Invoke { at, op, process: 1, repeats, request });
        op
    }

    /// Does it, and nobody hears of it.
    fn happens(&mut self, request: &Request) -> Result<Response, tonic::Status> {
        match request.command(WITHIN)? {
            None => request.read(&self.state),
            Some(command) => {
                let applied = self.apply(&command);
                request.answer(applied, &self.state)
            }
        }
    }

    fn apply(&mut self, command: &Command) -> portwarden::core::Applied {
        let (applied, events) = apply(&mut self.state, &Origin::default(), command);
        if !events.is_empty() {
            self.events.push(meaning::shown(&events, self.state.revision, &self.state));
        }
        applied
    }

    fn end(&mut self, op: u64, answer: Result<Response, tonic::Status>) {
        let at = self.tick();
        self.records.push(match answer {
            Ok(response) => Record::Ok { at, op, response },
            Err(status) => {
                let (code, message) = (status.code() as i32, status.message().to_string());
                Record::Refused { at, op, code, message }
            }
        });
    }

    fn call(&mut self, request: Request) -> Result<Response, tonic::Status> {
        let op = self.invoke(&request);
        let answer = self.happens(&request);
        self.end(op, answer.clone());
        answer
    }

    fn answered(&mut self, request: Request, response: Response) {
        let op = self.invoke(&request);
        self.end(op, Ok(response));
    }

    fn worker(&mut self, name: &str, last: u32) {
        let range = v1::PortRange { name: "service".into(), first: 40_000, last };
        let gpu = v1::GpuSpec { memory_bytes: 100, ..Default::default() };
        let spec = v1::WorkerSpec {
            address: "host".into(),
            ranges: vec![range],
            gpus: vec![gpu],
            ..Default::default()
        };
        let request = v1::RegisterRequest { name: name.into(), spec: Some(spec) };
        self.call(Request::Register(request)).expect("a worker");
    }

    fn grant(&mut self, name: &str) -> v1::Allocation {
        granted(self.call(Request::Allocate(wants(name, true))))
    }

    /// A watcher's stream of everything so far, from revision `from`.
    fn watch(&mut self, watcher: u32, from: u64) {
        let at = self.tick();
        let (endpoint, worker) = ("n".into(), String::new());
        self.records.push(Record::WatchBegins { at, watcher, endpoint, from, worker });
        for events in self.events.clone().into_iter().skip(from as usize - 1) {
            self.watched(watcher, events[0].revision, events);
        }
    }

    fn watched(&mut self, watcher: u32, revision: u64, events: Vec<v1::WatchEvent>) {
        let message = v1::WatchResponse { revision, events, partial: false };
        let at = self.tick();
        self.records.push(Record::Watched { at, watcher, message });
    }

    fn report(&self) -> Report {
        check(&History::new(self.records.clone()).expect("a history"))
    }

    fn good(&self) {
        let report = self.report();
        assert!(report.violations.is_empty(), "{:#?}", report.violations);
    }

    /// Broken, and this rule alone finds it.
    fn breaks(&self, rule: Rule) -> String {
        let report = self.report();
        let rules: Vec<_> = report.violations.iter().map(|violation| violation.rule).collect();
        assert!(!rules.is_empty(), "nothing was found; {:?}", report.notes);
        assert!(rules.iter().all(|found| *found == rule), "{:#?}", report.violations);
        report.violations[0].what.clone()
    }
}

fn wants(name: &str, bound: bool) -> v1::AllocateRequest {
    let ports =
        v1::PortRequest { ports: Some(v1::port_request::Ports::Count(1)), ..Default::default() };
    let claim = v1::Claim {
        name: name.into(),
        uid: format!("{name}-uid"),
        placement: Some(v1::claim::Placement::Worker("w".into())),
        ports: vec![ports],
        bound,
        ..Default::default()
    };
    v1::AllocateRequest { claims: vec![claim], dry_run: false }
}

fn granted(answer: Result<Response, tonic::Status>) -> v1::Allocation {
    match answer {
        Ok(Response::Allocate(r)) => r.allocations[0].clone(),
        other => panic!("{other:?}"),
    }
}

fn get(name: &str) -> Request {
    Request::Get(v1::GetRequest { name: name.into(), read: None })
}

fn list() -> Request {
    Request::List(v1::ListRequest::default())
}

fn release(held: &v1::Allocation) -> Request {
    let authority = Some(v1::release_request::Authority::Token(held.token));
    Request::Release(v1::ReleaseRequest { name: held.name.clone(), authority })
}

fn force(name: &str) -> Request {
    let force = v1::Force { reason: "an operator".into() };
    let authority = Some(v1::release_request::Authority::Force(force));
    Request::Release(v1::ReleaseRequest { name: name.into(), authority })
}

fn confirm(held: &v1::Allocation) -> Request {
    let (name, token) = (held.name.clone(), held.token);
    Request::Confirm(v1::ConfirmRequest { name, token, ..Default::default() })
}

fn conflict(held: &v1::Allocation) -> Request {
    Request::ReportConflict(v1::ReportConflictRequest {
        name: held.name.clone(),
        token: held.token,
        version: 0,
        port: held.ports[0].number,
    })
}

/// An answer to `Allocate` as somebody might have made it up.
fn made_up(name: &str, uid: &str, token: u64, port: u32) -> Response {
    let port = v1::Port { range: "service".into(), number: port, ..Default::default() };
    let allocation = v1::Allocation {
        name: name.into(),
        uid: uid.into(),
        worker: "w".into(),
        address: "host".into(),
        ports: vec![port],
        token,
        version: token,
        phase: v1::Phase::Bound.into(),
        ..Default::default()
    };
    let allocations = vec![allocation];
    Response::Allocate(v1::AllocateResponse {
        allocations,
        repeated_request: false,
        revision: token,
    })
}

fn allocate(name: &str) -> Request {
    Request::Allocate(wants(name, true))
}

// Good ones.

#[test]
fn a_whole_life_is_accepted() {
    let mut s = Script::new();
    s.worker("w", 40_003);
    let a = granted(s.call(Request::Allocate(wants("a", false))));
    s.call(confirm(&a)).expect("confirmed");
    s.call(confirm(&a)).expect("a repeat");
    s.call(conflict(&a)).expect("swapped");
    s.call(Request::Allocate(wants("a", false))).expect("a repeat");
    let b = s.grant("b");
    s.call(allocate("b")).expect("a repeat");
    s.call(list()).expect("a list");
    s.call(get("none")).expect_err("nobody");
    s.call(release(&v1::Allocation { token: 99, ..b.clone() })).expect_err("a wrong token");
    s.call(release(&b)).expect("released");
    s.call(release(&b)).expect("gone already");
    s.grant("b");
    s.call(force("b")).expect("forced out");
    s.call(get("b")).expect_err("it tells why");
    let names = ["c", "d", "e"].map(|name| s.call(allocate(name)).is_ok());
    assert_eq!(names, [true, true, false], "the last one finds no port");
    s.good();
    s.watch(1, 1);
    s.watch(2, 3);
    s.good();
}

#[test]
fn an_unknown_call_may_be_done_at_once_later_or_never() {
    for done_after in [0, 1, 2, 9] {
        for watched in [false, true] {
            let mut s = Script::new();
            s.worker("w", 40_009);
            s.invoke(&allocate("x"));
            for round in 0..3 {
                if round == done_after {
                    s.happens(&allocate("x")).expect("granted");
                }
                s.grant(&format!("y{round}"));
            }
            s.call(list()).expect("a list");
            if watched {
                s.watch(1, 1);
            }
            s.good();
        }
    }
}

#[test]
fn among_many_unknown_calls_the_order_that_fits_is_found() {
    let mut s = Script::new();
    s.worker("w", 40_009);
    for name in ["p", "q", "r"] {
        s.invoke(&allocate(name));
    }
    for name in ["r", "p", "q"] {
        s.happens(&allocate(name)).expect("granted");
    }
    s.grant("y");
    s.call(list()).expect("a list");
    s.good();
}

#[test]
fn a_call_that_repeats_may_be_done_twice() {
    let mut s = Script::new();
    s.worker("w", 40_009);
    let op = s.invoke_as(&allocate("x"), true);
    let first = s.happens(&allocate("x"));
    s.happens(&force("x")).expect("forced out"); // by whom, nobody knows
    let (at, request) = (s.tick(), force("x"));
    s.records.insert(3, Record::Invoke { at: MS, op: 77, process: 9, repeats: false, request });
    let second = s.happens(&allocate("x"));
    assert_ne!(granted(first).token, granted(second.clone()).token);
    s.end(op, second);
    assert!(at > 0);
    s.good();
}

#[test]
fn an_earlier_attempt_may_have_made_the_revision_that_its_repeat_is_answered_with() {
    for watched in [false, true] {
        let mut s = Script::new();
        s.worker("w", 40_009);
        let a = s.grant("a");
        let op = s.invoke_as(&release(&a), true);
        s.happens(&release(&a)).expect("released");
        let repeated = s.happens(&release(&a));
        s.end(op, repeated);
        s.grant("b");
        if watched {
            s.watch(1, 1);
        }
        s.good();
    }
}

#[test]
fn what_a_timer_does_explains_itself() {
    for watched in [false, true] {
        let mut s = Script::new();
        s.worker("w", 40_009);
        let lease = s.call(Request::GrantLease(v1::GrantRequest { ttl_ms: 1000 }));
        let Ok(Response::GrantLease(lease)) = lease else { panic!("{lease:?}") };
        let id = lease.lease.expect("a lease").id;
        let mut request = wants("x", true);
        request.claims[0].lease = id;
        s.call(Request::Allocate(request)).expect("granted");
        s.now += 2_000 * MS;
        s.apply(&Command::ExpireLease { id: LeaseId(id), under: Leader::default() });
        s.call(get("x")).expect_err("reclaimed");
        s.grant("y");
        if watched {
            s.watch(1, 1);
        }
        s.good();
    }
}

#[test]
fn refusals_find_their_state_while_others_change_it() {
    let mut s = Script::new();
    s.worker("w", 40_009);
    let a = s.grant("a");
    let read = s.invoke(&get("a"));
    s.call(release(&a)).expect("released");
    let refused = s.happens(&get("a"));
    s.grant("a");
    s.end(read, refused);
    s.good();
}

// Bad ones, by rule.

#[test]
fn one_port_for_two() {
    let mut s = Script::torn();
    s.answered(allocate("a"), made_up("a", "u", 5, 40_000));
    s.answered(allocate("b"), made_up("b", "v", 6, 40_000));
    let what = s.breaks(Rule::Holding);
    assert!(what.contains("port 40000 of w"), "{what}");
}

#[test]
fn one_port_for_two_by_what_was_seen_of_them() {
    let mut s = Script::torn();
    // On a lease, so that it is certain only between two sights.
    let on_lease = |response| match response {
        Response::Allocate(mut r) => {
            r.allocations[0].lease = 3;
            r
        }
        other => panic!("{other:?}"),
    };
    let a = on_lease(made_up("a", "u", 5, 40_000));
    s.answered(allocate("a"), Response::Allocate(a.clone()));
    s.answered(allocate("b"), made_up("b", "v", 6, 40_000));
    s.good();
    let allocation = a.allocations.first().cloned();
    s.answered(get("a"), Response::Get(v1::GetResponse { allocation, revision: 6 }));
    s.breaks(Rule::Holding);
}

#[test]
fn a_port_that_was_released_meanwhile_may_be_given() {
    let mut s = Script::torn();
    s.answered(allocate("a"), made_up("a", "u", 5, 40_000));
    // Nobody knows whether it was done.
    s.invoke(&force("a"));
    s.answered(allocate("b"), made_up("b", "v", 7, 40_000));
    s.good();
}

fn with_gpu(response: Response, memory_bytes: u64, exclusive: bool) -> Response {
    let Response::Allocate(mut r) = response else { panic!("{response:?}") };
    r.allocations[0].gpus = vec![v1::Gpu { memory_bytes, exclusive, ..Default::default() }];
    Response::Allocate(r)
}

#[test]
fn more_of_a_gpu_than_there_is() {
    let with = |b: u64, exclusive| {
        let mut s = Script::torn();
        s.worker("w", 40_000);
        s.answered(allocate("a"), with_gpu(made_up("a", "u", 5, 40_001), 60, false));
        s.answered(allocate("b"), with_gpu(made_up("b", "v", 6, 40_002), b, exclusive));
        s
    };
    with(40, false).good();
    assert!(with(41, false).breaks(Rule::Holding).contains("101 bytes"));
    assert!(with(40, true).breaks(Rule::Holding).contains("exclusively"));
}

fn socket(at: Nanos, open: bool) -> Record {
    let (name, token, worker, port) = ("a".into(), 3, "w".into(), 40_000);
    match open {
        true => Record::Listens { at, name, token, worker, port },
        false => Record::Closed { at, name, token, worker, port },
    }
}

#[test]
fn somebody_still_listens_on_a_port_that_is_anothers() {
    let with = |closed: bool, forced: bool| {
        let mut s = Script::torn();
        let at = s.tick();
        s.records.push(socket(at, true));
        if forced {
            s.invoke(&force("a"));
        }
        if closed {
            let at = s.tick();
            s.records.push(socket(at, false));
        }
        s.answered(allocate("b"), made_up("b", "v", 6, 40_000));
        s
    };
    with(true, false).good();
    with(false, true).good();
    assert!(with(false, false).breaks(Rule::Holding).contains("listened"));
}

#[test]
fn an_answer_that_is_not_the_cores() {
    let mut s = Script::new();
    s.worker("w", 40_009);
    let op = s.invoke(&allocate("a"));
    let Ok(Response::Allocate(mut r)) = s.happens(&allocate("a")) else { panic!() };
    r.allocations[0].ports[0].number += 1;
    s.end(op, Ok(Response::Allocate(r)));
    assert!(s.breaks(Rule::Linear).contains("the core answers"));
}

#[test]
fn a_refusal_that_no_state_explains() {
    let mut s = Script::new();
    s.worker("w", 40_009);
    let a = granted(s.call(Request::Allocate(wants("a", false))));
    let op = s.invoke(&get("a"));
    s.end(op, Err(tonic::Status::not_found("no allocation a")));
    assert!(s.breaks(Rule::Linear).contains("no state explains"));
    // Once somebody may have released it, it is in order.
    let release = Record::Invoke {
        at: s.now - 2 * MS,
        op: 50,
        process: 2,
        repeats: false,
        request: release(&a),
    };
    let at = s.records.len() - 2;
    s.records.insert(at, release);
    s.happens(&self::release(&a)).expect("released");
    s.call(get("a")).expect_err("gone");
    s.good();
}

#[test]
fn two_refusals_in_an_order_that_time_forbids() {
    let mut s = Script::new();
    s.worker("w", 40_009);
    let not_held = s.happens(&get("a"));
    let grant = s.invoke(&Request::Allocate(wants("a", false)));
    let granted = s.happens(&Request::Allocate(wants("a", false)));
    let wrong =
        Request::Confirm(v1::ConfirmRequest { name: "a".into(), token: 9, ..Default::default() });
    let held = s.happens(&wrong);
    // It is seen to be held, and afterwards not to be, while its grant is under way.
    let first = s.invoke(&wrong);
    s.end(first, held);
    let second = s.invoke(&get("a"));
    s.end(second, not_held);
    s.end(grant, granted);
    s.breaks(Rule::Linear);
}

#[test]
fn what_was_answered_as_not_done_was_done() {
    for watched in [false, true] {
        let mut s = Script::new();
        s.worker("w", 40_009);
        let op = s.invoke(&allocate("a"));
        s.happens(&allocate("a")).expect("granted");
        let at = s.tick();
        s.records.push(Record::Fail { at, op, why: "no leader".into() });
        s.grant("b");
        if watched {
            s.watch(1, 1);
        }
        assert!(s.breaks(Rule::Linear).contains("nothing explains revision 2"));
    }
}

#[test]
fn a_read_of_what_was_not_there_yet() {
    let mut s = Script::new();
    s.worker("w", 40_009);
    let read = Some(v1::ReadOptions { stale: true, min_revision: 0 });
    let stale = Request::GetWorker(v1::GetWorkerRequest { name: "later".into(), read });
    let mut future = Script::new();
    future.worker("w", 40_009);
    future.worker("later", 40_009);
    let op = s.invoke(&stale);
    s.end(op, future.happens(&stale));
    s.worker("later", 40_009);
    assert!(s.breaks(Rule::Linear).contains("began only"));
}

#[test]
fn a_revision_that_goes_back() {
    let mut s = Script::torn();
    s.answered(allocate("a"), made_up("a", "u", 9, 40_000));
    let request = v1::GetLeaseRequest { id: 1, read: None };
    let response = v1::GetLeaseResponse { revision: 8, ..Default::default() };
    s.answered(Request::GetLease(request), Response::GetLease(response.clone()));
    assert!(s.breaks(Rule::Growth).contains("speaks of revision 8"));
    // An old copy may be old, but not older than was asked for.
    for (min_revision, good) in [(8, true), (9, false)] {
        s.records.truncate(3);
        let read = Some(v1::ReadOptions { stale: true, min_revision });
        let request = v1::GetLeaseRequest { read, ..request };
        s.answered(Request::GetLease(request), Response::GetLease(response.clone()));
        match good {
            true => s.good(),
            false => drop(s.breaks(Rule::Growth)),
        }
    }
}

#[test]
fn a_gang_that_is_granted_in_part() {
    let gang = |names: [&str; 2]| {
        let claims = names.into_iter().flat_map(|name| wants(name, true).claims).collect();
        Request::Allocate(v1::AllocateRequest { claims, dry_run: false })
    };
    let Response::Allocate(mut whole) = made_up("a", "u", 9, 40_000) else { panic!() };
    let Response::Allocate(b) = made_up("b", "v", 9, 40_001) else { panic!() };
    whole.allocations.extend(b.allocations);
    let (mut without_b, mut without_its_port) = (whole.clone(), whole.clone());
    without_b.allocations.pop();
    without_its_port.allocations[1].ports.clear();
    let answered = |answer| {
        let mut s = Script::torn();
        s.answered(gang(["a", "b"]), Response::Allocate(answer));
        s
    };
    answered(whole).good();
    for part in [without_b, without_its_port] {
        assert!(answered(part).breaks(Rule::Whole).contains("asked for"));
    }
}

#[test]
fn a_token_that_is_older_than_what_was_known() {
    let mut s = Script::torn();
    s.answered(allocate("a"), made_up("a", "u", 9, 40_000));
    let Response::Allocate(mut r) = made_up("b", "v", 7, 40_001) else { panic!() };
    r.revision = 10;
    s.answered(allocate("b"), Response::Allocate(r));
    assert!(s.breaks(Rule::Growth).contains("token 7"));
}

#[test]
fn one_token_for_two_grants() {
    let mut s = Script::torn();
    s.answered(allocate("a"), made_up("a", "u", 9, 40_000));
    let Response::Allocate(mut r) = made_up("a", "another", 9, 40_000) else { panic!() };
    r.repeated_request = true;
    s.answered(allocate("a"), Response::Allocate(r));
    assert!(s.breaks(Rule::Growth).contains("under token 9"));
}

#[test]
fn an_acknowledged_grant_that_is_lost() {
    let with = |request: Request, answer: Result<Response, tonic::Status>| {
        let mut s = Script::torn();
        s.answered(allocate("a"), made_up("a", "u", 5, 40_000));
        let op = s.invoke(&request);
        s.end(op, answer);
        s
    };
    let not_found = || Err(tonic::Status::not_found("no allocation a"));
    assert!(with(get("a"), not_found()).breaks(Rule::Survival).contains("acknowledged"));
    let empty = v1::ListResponse { revision: 7, ..Default::default() };
    with(list(), Ok(Response::List(empty))).breaks(Rule::Survival);
    let held = v1::Allocation { name: "a".into(), token: 5, ..Default::default() };
    let gone = v1::ReleaseResponse { revision: 8, ..Default::default() };
    let mut s = with(release(&held), Ok(Response::Release(gone)));
    s.good(); // its own release may have been done by an earlier one of its attempts
    s.records.truncate(3);
    let op = s.invoke(&confirm(&held));
    s.end(op, not_found());
    s.breaks(Rule::Survival);
}

#[test]
fn a_released_grant_that_comes_back() {
    let mut s = Script::torn();
    let a = match made_up("a", "u", 5, 40_000) {
        Response::Allocate(r) => r.allocations[0].clone(),
        other => panic!("{other:?}"),
    };
    let response = v1::ReleaseResponse { released: true, allocation: Some(a.clone()), revision: 6 };
    s.answered(release(&a), Response::Release(response));
    let again = |token| {
        let allocation = Some(v1::Allocation { token, version: token, ..a.clone() });
        Response::Get(v1::GetResponse { allocation, revision: 7 })
    };
    s.answered(get("a"), again(7));
    s.good();
    s.records.truncate(s.records.len() - 2);
    s.answered(get("a"), again(5));
    assert!(s.breaks(Rule::Survival).contains("was released"));
}

#[test]
fn a_lease_that_ends_too_early() {
    let with = |wait_ms: u64| {
        let mut s = Script::torn();
        let keep = Request::KeepAlive(v1::KeepAliveRequest { id: 4 });
        let alive = v1::KeepAliveResponse { id: 4, ttl_ms: 1000 };
        s.answered(keep.clone(), Response::KeepAlive(alive));
        s.now += wait_ms * MS;
        s.answered(keep, Response::KeepAlive(v1::KeepAliveResponse { id: 4, ttl_ms: 0 }));
        s
    };
    with(1000).good();
    assert!(with(500).breaks(Rule::Survival).contains("too early"));
}

/// A complete history with one stream, whose messages are changed by hand.
fn watched(change: impl FnOnce(&mut Vec<Record>)) -> Script {
    let mut s = Script::new();
    s.worker("w", 40_009);
    let a = s.grant("a");
    s.call(release(&a)).expect("released");
    s.grant("b");
    s.call(list()).expect("a list");
    s.watch(1, 1);
    s.watch(2, 1);
    change(&mut s.records);
    s
}

#[test]
fn streams_that_leave_out_repeat_or_differ() {
    watched(|_| ()).good();
    let what = watched(|records| drop(records.remove(records.len() - 2))).breaks(Rule::Watches);
    assert!(what.contains("leaves out revision 3"), "{what}");
    let what = watched(|records| records.push(records.last().expect("a message").clone()));
    assert!(what.breaks(Rule::Watches).contains("after all up to 4 was told"));
    let what = watched(|records| {
        if let Some(Record::Watched { message, .. }) = records.last_mut() {
            message.events[0].reason = "made up".into();
        }
    });
    assert!(what.breaks(Rule::Watches).contains("another one as"));
    let what = watched(|records| {
        if let Some(Record::Watched { message, .. }) = records.last_mut() {
            message.revision = 3;
        }
    });
    what.breaks(Rule::Watches);
}

#[test]
fn a_stream_of_one_worker_hears_of_that_one_alone_and_of_all_that_concerns_it() {
    let with = |worker: &str, revisions: &[usize]| {
        let mut s = watched(|_| ());
        let at = s.tick();
        let (endpoint, worker) = ("n".into(), worker.into());
        s.records.push(Record::WatchBegins { at, watcher: 3, endpoint, from: 1, worker });
        for at in revisions {
            let events = s.events[*at - 1].clone();
            s.watched(3, *at as u64, events);
        }
        s.watched(3, 4, Vec::new());
        s
    };
    with("w", &[1, 2, 3, 4]).good();
    with("other", &[]).good();
    with("w", &[1, 2, 4]).breaks(Rule::Watches);
    with("other", &[2]).breaks(Rule::Watches);
}

#[test]
fn copies_that_differ() {
    let copy = |node, revision, digest: &str| Record::Copy {
        at: 0,
        node,
        revision,
        digest: digest.into(),
    };
    let mut s = Script::torn();
    s.records.extend([copy(1, 7, "x"), copy(2, 7, "x"), copy(3, 8, "y")]);
    s.good();
    s.records.push(copy(3, 7, "y"));
    assert!(s.breaks(Rule::Replicas).contains("node 3 has y"));
}

#[test]
fn what_heals_too_late_or_not_at_all() {
    let with = |took_ms: Option<u64>| {
        let mut s = Script::torn();
        s.records.push(Record::Healed { at: MS });
        s.records.extend(took_ms.map(|ms| Record::Available { at: (1 + ms) * MS }));
        s
    };
    with(Some(100)).good();
    assert!(with(Some(101)).breaks(Rule::Healing).contains("101 ms"));
    assert!(with(None).breaks(Rule::Healing).contains("never available"));
}

#[test]
fn a_node_that_ends_by_itself() {
    let mut s = Script::torn();
    s.records.push(Record::Ended { at: MS, node: 2, code: 101 });
    assert!(s.breaks(Rule::Healing).contains("exit status 101"));
}

#[test]
fn what_leaks() {
    let with = |give_back: bool| {
        let mut s = Script::new();
        s.worker("w", 40_009);
        let a = s.grant("a");
        if give_back {
            s.call(release(&a)).expect("released");
        }
        let at = s.tick();
        s.records.push(Record::Emptied { at });
        s.call(list()).expect("a list");
        let worker = v1::GetWorkerRequest { name: "w".into(), read: None };
        s.call(Request::GetWorker(worker)).expect("a worker");
        s
    };
    with(true).good();
    assert!(with(false).breaks(Rule::Healing).contains("a is still held"));
}
