//! Parsing, exit codes and JSON shapes.

use std::collections::HashMap;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser as _};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::error::describe;
use super::{Cli, CliError, Format, output};
use crate::client::{ClientError, Refused};
use crate::proto::{DOMAIN, reason, v1};

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("portwarden").chain(line.split_whitespace()))
}

#[test]
fn the_command_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn globals_stand_before_or_after_the_subcommand() {
    for line in [
        "--endpoints a:1,b:2 -o json --timeout 3s worker list",
        "worker list --endpoints a:1,b:2 -o json --timeout 3s",
        "--endpoints a:1,b:2 worker -o json list --timeout 3s",
    ] {
        let globals = parse(line).unwrap().globals;
        assert_eq!(globals.endpoints, ["a:1", "b:2"], "{line}");
        assert_eq!(globals.output, Format::Json, "{line}");
        assert_eq!(globals.timeout.as_secs(), 3, "{line}");
    }
    let globals = parse("status").unwrap().globals;
    assert_eq!(globals.timeout.as_secs(), 10);
    assert_eq!(globals.output, Format::Table);
}

#[test]
fn every_form_of_the_design_parses() {
    for line in [
        "allocate a --worker w --ports 2",
        "allocate a --worker w --port 40001 --port http=40002 --contiguous 4 --range ray",
        "allocate a --selector zone=a --policy spread --gpus 2 --gpu-memory 8GiB --bound",
        "allocate a --worker w --gpu 0 --gpu 3 --gpu-exclusive --uid u --label k=v --label l=",
        "allocate -f gang.yaml",
        "allocate -f - --uid u",
        "allocate a --worker w --ports 1 --lease 7 --confirm-within 60s --dry-run",
        "explain a --selector k=v --gpus 1 --gpu-memory 8GiB --stale",
        "explain -f gang.yaml",
        "confirm a --token 7 --version 8",
        "confirm a --token 7 --lease 9 --pid 42 --start-ticks 7 --boot-id b",
        "confirm a --token 7 --cgroup /system.slice/a.service",
        "confirm a --token 7 --container 0123456789ab",
        "attach a --token 7 --version 8 --lease 9",
        "attach a --token 7 --detach",
        "watch --from-revision 7 --worker w --selector k=v --prefix a",
        "lease grant --ttl 30s",
        "lease grant 5m",
        "lease get 7",
        "lease keep-alive 7 8 --once",
        "lease revoke 7",
        "lease list",
        "worker drain w --wait",
        "worker remove w --force --reason scrapped",
        "release a --token 7",
        "release a --force --reason scrapped",
        "report-conflict a --token 7 --port 40001",
        "get a",
        "list --worker w --selector k=v --phase BOUND --prefix qwen- --stale --min-revision 9",
        "worker register w --address 10.0.0.1 --range service=40000-40063 --reserve 40010 \
         --reserve 40020-40022 --gpu memory=24GiB,model=RTX4090,uuid=U --label k=v",
        "worker apply -f workers.yaml",
        "worker apply w --label k=v",
        "allocate a --worker w --gpus 1 --gpu-memory 8589934592",
        "allocate a --worker w --gpus 1 --gpu-memory 8B",
        "worker apply w --no-labels --no-gpus --reserve 40010",
        "worker quarantine w --port 40001 --port 40003-40004 --reason stray",
        "worker lift w --port 40001",
        "worker cordon w",
        "worker uncordon w",
        "worker remove w",
        "member list",
        "status --check",
        "completion bash",
        "serve --id 1 --data-dir d --listen 127.0.0.1:7601 --listen-peer 127.0.0.1:7701 \
         --listen-http 127.0.0.1:7801 --initial-cluster 1=a:1,2=b:2,3=c:3 --insecure \
         --log-level debug --advertise a:1 --advertise-peer a:2",
        "dev --nodes 3 --data-dir d",
        "demo --replicas 10 --schedulers 4 -o json",
        "bench --clients 64 --seconds 10 --hot",
        "bench --spread --workers 4",
    ] {
        if let Err(error) = parse(line) {
            panic!("{line}: {error}");
        }
    }
}

/// The arguments of `portwarden` as a shell takes them from a line: single quotes, and no word after a `#`,
/// a redirection or the end of a substitution.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), String::new(), false);
    let (_, args) = line.split_once("portwarden ").unwrap_or_default();
    for c in args.chars() {
        match c {
            '\'' => quoted = !quoted,
            '#' if !quoted && word.is_empty() => break,
            '>' | ')' if !quoted => break,
            ' ' if !quoted => words.push(std::mem::take(&mut word)),
            c => word.push(c),
        }
    }
    words.push(word);
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn every_example_of_the_help_can_be_pasted() {
    fn examples(command: &clap::Command, found: &mut Vec<String>) {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let help = help.replace("\\\n", " ");
        let is_one = |line: &&str| {
            ["  portwarden ", "  source "].iter().any(|begins| line.starts_with(begins))
        };
        found.extend(help.lines().filter(is_one).map(String::from));
        command.get_subcommands().for_each(|inner| examples(inner, found));
    }
    let mut found = Vec::new();
    examples(&Cli::command(), &mut found);
    assert!(found.len() > 70, "{}", found.len());
    for line in found {
        if let Err(error) = Cli::try_parse_from([vec!["portwarden".into()], words(&line)].concat())
        {
            panic!("{line}: {error}");
        }
    }
}

#[test]
fn bad_input_is_a_usage_error_that_names_flag_and_limit() {
    for (line, named) in [
        ("allocate a --worker w --ports 0", "--ports"),
        ("allocate a --worker w --ports 257", "256"),
        ("allocate a --worker w --ports -1", "--ports"),
        ("allocate a --worker w --port 0", "1 to 65535"),
        ("allocate a --worker w --port 65536", "1 to 65535"),
        ("allocate a --worker w --port -1", "1 to 65535"),
        ("allocate a --worker w --gpus 1", "--gpu-memory"),
        ("allocate a --worker w --gpus 1 --gpu-memory -1GiB", "16 TiB"),
        ("allocate a --worker w --gpus 1 --gpu-memory 17TiB", "16 TiB"),
        ("allocate a --worker w --gpus 1 --gpu-memory 8", "name a unit, such as 8GiB"),
        ("allocate a --worker w --gpus 1 --gpu-memory 99999999999999999999GiB", "16 TiB"),
        ("allocate a --worker w --gpus 1 --gpu 0 --gpu-exclusive", "--gpu"),
        ("allocate a --worker w --ports 1 --gpu-memory 1GiB", "--gpus"),
        ("allocate a --worker w --ports 1 --gpu-exclusive", "--gpus"),
        ("allocate a --worker w --gpus 1 --gpu-exclusive --range ray", "--ports"),
        ("allocate a --worker w --ports 1 --policy spread", "--policy"),
        ("allocate a --worker w --ports 1 --lease 0", "1.."),
        ("allocate a --worker w --ports 1 --lease -1", "--lease"),
        ("allocate a --worker w", "--ports"),
        ("allocate a --ports 1", "--worker"),
        ("allocate a --worker w --selector k=v --ports 1", "--selector"),
        ("allocate a -f gang.yaml", "--file"),
        ("allocate -a- --worker w --ports 1", "-a"),
        ("allocate a_ --worker w --ports 1", "253"),
        ("allocate a --worker w --ports 1 --bound --confirm-within 9s", "--bound"),
        ("allocate a --worker w --ports 1 --confirm-within 25h", "1s to 24h"),
        ("allocate -f gang.yaml --lease 7", "--lease"),
        ("explain a --worker w", "--ports"),
        ("confirm a --token 1 --pid 1 --cgroup x", "--cgroup"),
        ("confirm a --token 1 --boot-id b", "--pid"),
        ("confirm a --token -1", "--token"),
        ("confirm a --token 1 --lease 0", "1.."),
        ("attach a --token 1", "--lease"),
        ("attach a --token 1 --lease 0", "1.."),
        ("status --members", "--check"),
        ("attach a --token 1 --lease 1 --detach", "--detach"),
        ("lease grant", "TTL"),
        ("lease grant --ttl 500ms", "1s to 24h"),
        ("lease get 0", "1.."),
        ("worker remove w --reason x", "--force"),
        ("release a", "--token"),
        ("release a --token 1 --force", "--force"),
        ("release a --token 1 --reason x", "--reason"),
        ("list --min-revision 3", "--stale"),
        ("worker register w --range s=1-2", "--address"),
        ("worker register w --address h --range s=2-1", "rising"),
        ("worker register w --address h --range s=0-1", "1 to 65535"),
        ("worker register w --address h --gpu model=x", "memory"),
        ("worker register w --address h --gpu memory=1GiB,index=256", "255"),
        ("worker register w --address h --label k", "key=value"),
        ("worker apply w", "--"),
        ("worker apply w --label k=v --no-labels", "--no-labels"),
        ("worker apply -f workers.yaml --no-labels", "--no-labels"),
        ("--timeout 0s status", "1ms to 24h"),
        ("--timeout 25h status", "1ms to 24h"),
        ("status -o yaml", "table, json"),
        ("bench --hot --spread", "--spread"),
        ("frobnicate", "frobnicate"),
    ] {
        let error = parse(line).expect_err(line);
        assert_eq!(error.exit_code(), 2, "{line}");
        assert!(error.to_string().contains(named), "{line}: {error}");
    }
    assert_eq!(parse("worker register w").unwrap_err().kind(), ErrorKind::MissingRequiredArgument);
}

fn refused(code: Code, details: ErrorDetails) -> anyhow::Error {
    let status = Status::with_error_details(code, "what happened", details.clone());
    ClientError::Refused(Box::new(Refused { status, details })).into()
}

#[test]
fn errors_have_the_exit_codes_of_the_design() {
    let info = |reason| ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    for (error, code) in [
        (refused(Code::InvalidArgument, ErrorDetails::new()), 2),
        (refused(Code::NotFound, ErrorDetails::new()), 3),
        (refused(Code::AlreadyExists, info(reason::NAME_TAKEN)), 4),
        (refused(Code::FailedPrecondition, ErrorDetails::new()), 4),
        (refused(Code::ResourceExhausted, info(reason::CAPACITY)), 5),
        (refused(Code::Unimplemented, ErrorDetails::new()), 1),
        (ClientError::Unavailable { why: "w".into(), overloaded: false }.into(), 6),
        (ClientError::OutcomeUnknown { why: "w".into() }.into(), 6),
        (CliError::Usage("u".into()).into(), 2),
        (anyhow::anyhow!("other"), 1),
    ] {
        assert_eq!(describe(&error).0, code, "{error}");
    }
}

#[test]
fn errors_say_what_then_details_then_what_to_do() {
    let bad = ErrorDetails::with_bad_request_violation("claims[0].name", "\"\" must be longer");
    let (_, text) = describe(&refused(Code::InvalidArgument, bad));
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[0], "error: the request is not valid");
    assert_eq!(lines[1], "  claims[0].name: \"\" must be longer");
    assert!(lines[2].starts_with("hint: "), "{text}");

    let error = ClientError::OutcomeUnknown { why: "the connection broke".into() };
    let error = CliError::repeat_with("--uid u1".into())(error).into();
    let (code, text) = describe(&error);
    assert_eq!(code, 6);
    assert!(text.contains("outcome unknown") && text.contains("--uid u1"), "{text}");

    for (overloaded, advice) in [(true, "try again later"), (false, "have a majority")] {
        let error = ClientError::Unavailable { why: "w".into(), overloaded };
        let (_, text) = describe(&error.into());
        assert!(text.contains("nothing was changed") && text.contains(advice), "{text}");
    }
}

#[test]
fn the_json_of_an_allocation_is_that_of_the_design_and_a_little_more() {
    let allocation = v1::Allocation {
        name: "qwen-0".into(),
        uid: "u".into(),
        worker: "w1".into(),
        address: "10.0.0.1".into(),
        ports: vec![
            v1::Port { name: "http".into(), range: "service".into(), number: 40001 },
            v1::Port { name: String::new(), range: "service".into(), number: 40002 },
        ],
        gpus: vec![v1::Gpu { index: 0, uuid: "G".into(), memory_bytes: 8 << 30, exclusive: false }],
        token: 7,
        version: 9,
        phase: v1::Phase::Bound.into(),
        lease: 0,
        labels: [("k".to_string(), "v".to_string())].into(),
        swaps: 1,
        reason: "shown to people".into(),
        ..Default::default()
    };
    let shown = serde_json::to_value(output::Allocation::from(allocation)).unwrap();
    let expected = json!({
        "name": "qwen-0", "uid": "u", "worker": "w1", "address": "10.0.0.1",
        "ports": [
            {"name": "http", "range": "service", "number": 40001},
            {"name": null, "range": "service", "number": 40002},
        ],
        "gpus": [{"index": 0, "uuid": "G", "memory_bytes": 8_589_934_592_u64, "exclusive": false}],
        "token": 7, "version": 9, "phase": "BOUND", "lease": null, "labels": {"k": "v"},
        // Beyond the design: why it lingers, how it lives, and since when.
        "reason": "shown to people", "liveness": null, "granted_at_ms": 0, "changed_at_ms": 0,
        "confirm_within_ms": 0, "swaps": 1,
    });
    assert_eq!(shown, expected);
}

#[test]
fn the_json_of_the_status_is_that_of_the_design_and_a_little_more() {
    let member = v1::Member {
        id: 1,
        role: "voter".into(),
        state: "leader".into(),
        endpoint: "a:1".into(),
        peer_endpoint: "a:2".into(),
        applied: 5,
        lag: 0,
        version: "0.1.0".into(),
        pending: false,
    };
    let mut status = v1::StatusResponse {
        cluster_id: "c".into(),
        leader: 1,
        revision: 4,
        members: vec![member],
        problems: vec!["p".into()],
        node: 1,
        term: 2,
        feature_level: 1,
        workers: 3,
        allocations: 6,
        ..Default::default()
    };
    let shown = serde_json::to_value(output::Status::from(status.clone())).unwrap();
    let expected = json!({
        "cluster_id": "c", "leader": 1, "revision": 4,
        "members": [{"id": 1, "role": "voter", "state": "leader", "endpoint": "a:1",
                     "applied": 5, "lag": 0, "peer_endpoint": "a:2", "version": "0.1.0",
                     "pending": false}],
        "problems": ["p"],
        "term": 2, "feature_level": 1, "workers": 3, "allocations": 6, "node": 1,
    });
    assert_eq!(shown, expected);
    status.leader = 0;
    let shown = serde_json::to_value(output::Status::from(status)).unwrap();
    assert!(shown["leader"].is_null());
}

#[test]
fn a_table_has_no_borders_and_no_trailing_blanks() {
    let rows = [vec!["a".to_string(), "1".to_string()], vec!["long-name".into(), "22".into()]];
    let text = output::table(&["NAME", "N"], rows);
    assert_eq!(text, "NAME       N\na          1\nlong-name  22");
}

#[test]
fn a_list_says_how_long_ago_and_why_it_lingers() {
    let allocation = |name: &str, changed_at_ms, reason: &str| v1::Allocation {
        name: name.into(),
        changed_at_ms,
        reason: reason.into(),
        ..Default::default()
    };
    let bound = allocation("a", 1_000, "");
    let text = output::allocations_list(std::slice::from_ref(&bound), 120_000);
    assert!(text.lines().next().unwrap().ends_with("VERSION  CHANGED"), "{text}");
    assert!(text.ends_with("119s"), "{text}");
    let lingers = allocation("b", 0, "lease 7 expired");
    let text = output::allocations_list(&[bound, lingers], 2 * 86_400_000);
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[1].contains("47h      -"), "{text}");
    assert!(lines[2].ends_with("2d       lease 7 expired"), "{text}");
}

/// A node in memory, served over TCP until the test ends.
async fn node() -> (std::sync::Arc<crate::api::fake::Fake>, String) {
    use crate::api::{Readiness, serve};
    use crate::connections::{Kind, tcp_incoming};
    let (fake, api) = crate::api::fake::fake();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let incoming = tcp_incoming(listener, Kind::Client);
    tokio::spawn(serve(api, Readiness::new().await, incoming, std::future::pending()));
    (fake, address)
}

#[tokio::test]
async fn subcommands_end_with_the_exit_codes_of_the_design() {
    let (_, address) = node().await;
    for (line, code) in [
        ("worker register v --address h --range service=1-9 --gpu memory=8GiB", 0),
        ("worker list -o json", 0),
        ("worker get v", 0),
        ("worker apply v --label zone=b", 0),
        ("worker apply v --no-labels", 0),
        ("worker apply v --label zone=a", 0),
        ("worker quarantine v --port 9 --reason stray", 0),
        ("worker lift v --port 9", 0),
        ("allocate b --selector zone=a --ports 2 --gpu 0 --gpu-memory 1GiB --uid u", 0),
        ("allocate b --selector zone=a --ports 2 --gpu 0 --gpu-memory 1GiB --uid u -o json", 0),
        ("allocate b --worker v --ports 1", 4),
        ("allocate c --worker v --ports 9", 5),
        ("allocate c --worker nope --ports 1", 3),
        ("get nope", 3),
        ("confirm b --token 1", 4),
        ("list --prefix b", 0),
        ("worker cordon v", 0),
        ("allocate c --worker v --ports 1", 4),
        ("worker uncordon v", 0),
        ("worker remove v", 4),
        ("explain c --worker v --ports 1", 0),
        ("explain c --worker v --ports 1 -o json", 0),
        ("allocate c --worker w --ports 1 --dry-run", 0),
        ("lease grant --ttl 30s", 0),
        ("lease list -o json", 0),
        ("lease get 999", 3),
        ("lease keep-alive 999", 3),
        ("lease revoke 999", 0),
        ("attach b --token 1 --lease 999", 4),
        ("worker drain v", 0),
        ("release b --force --reason test", 0),
        ("get b", 3),
        ("release b --token 1", 0),
        ("worker drain v", 0),
        ("worker remove v --force --reason test", 0),
        ("status", 0),
        ("member list", 0),
        ("allocate -f /nonexistent", 2),
    ] {
        let cli = parse(&format!("--endpoints {address} {line}")).unwrap();
        assert_eq!(super::run(cli).await, code.into(), "{line}");
    }
    let cli = parse("--endpoints 127.0.0.1:1 --timeout 100ms get a").unwrap();
    assert_eq!(super::run(cli).await, 6.into());
}

#[tokio::test]
async fn a_benchmark_leaves_nothing_behind() {
    let (fake, address) = node().await;
    for mode in ["--hot", "--workers 2"] {
        let line = format!("--endpoints {address} bench --clients 4 --seconds 1 {mode}");
        assert_eq!(super::run(parse(&line).unwrap()).await, 0.into());
    }
    let state = fake.state.lock().unwrap();
    assert_eq!((state.worker_count(), state.allocation_count()), (1, 1));
}
