//! The command line as scripts use it: JSON shapes, where settings come from, exit codes, pipes.

use std::io::{Read as _, Write as _};
use std::process::{Command, Output, Stdio};

use clap::CommandFactory as _;
use serde_json::{Value, json};

use crate::support::{BINARY, Cluster, assert_unique, wait_for};

/// The value has these keys and no others, and their values these types: `string`, `number`,
/// `bool`, `map` (of strings), each with `?` if it may be null; `[shape]` is an array of any length.
fn assert_shape(value: &Value, shape: &Value, at: &str) {
    match shape {
        Value::Object(keys) => {
            let object =
                value.as_object().unwrap_or_else(|| panic!("{at}: not an object: {value}"));
            let found: Vec<_> = object.keys().collect();
            assert_eq!(found, keys.keys().collect::<Vec<_>>(), "the keys of {at}");
            for (key, shape) in keys {
                assert_shape(&object[key], shape, &format!("{at}.{key}"));
            }
        }
        Value::Array(shape) => {
            let array = value.as_array().unwrap_or_else(|| panic!("{at}: not an array: {value}"));
            for (i, item) in array.iter().enumerate() {
                assert_shape(item, &shape[0], &format!("{at}[{i}]"));
            }
        }
        Value::String(kind) => {
            let fits = match kind.trim_end_matches('?') {
                "string" => value.is_string(),
                "number" => value.is_u64(),
                "decimal" => value.is_number(),
                "bool" => value.is_boolean(),
                "map" => value.as_object().is_some_and(|map| map.values().all(Value::is_string)),
                other => panic!("{other} is no kind"),
            };
            assert!(fits || (kind.ends_with('?') && value.is_null()), "{at}: no {kind}: {value}");
        }
        other => panic!("{other} is no shape"),
    }
}

fn allocation() -> Value {
    json!({
        "name": "string", "uid": "string", "worker": "string", "address": "string",
        "ports": [{"name": "string?", "range": "string", "number": "number"}],
        "gpus": [{
            "index": "number", "uuid": "string?", "memory_bytes": "number", "exclusive": "bool",
        }],
        "token": "number", "version": "number", "phase": "string", "lease": "number?",
        "labels": "map", "reason": "string?", "liveness": "string?", "granted_at_ms": "number",
        "changed_at_ms": "number", "confirm_within_ms": "number", "swaps": "number",
    })
}

fn worker() -> Value {
    json!({
        "name": "string", "address": "string", "phase": "string", "phase_before": "string?",
        "labels": "map",
        "ranges": [{
            "name": "string", "first": "number", "last": "number", "managed": "number",
            "free": "number", "held": "number", "reserved": "number",
            "quarantined_count": "number",
            "quarantined": [{"number": "number", "reason": "string", "since": "number"}],
        }],
        "reserved": ["number"],
        "gpus": [{
            "index": "number", "uuid": "string?", "model": "string?", "memory_bytes": "number",
            "held_bytes": "number", "exclusive": "bool", "holder_count": "number",
            "holders": ["string"],
        }],
        "allocations": "number", "created": "number", "version": "number", "identity": "map?",
    })
}

fn member() -> Value {
    json!({
        "id": "number", "role": "string", "state": "string", "endpoint": "string",
        "applied": "number", "lag": "number",
        "peer_endpoint": "string", "version": "string", "pending": "bool",
    })
}

/// The CLI with this on stdin and these variables in its environment.
fn run(args: &[&str], env: &[(&str, &str)], stdin: &str) -> Output {
    let mut child = Command::new(BINARY)
        .args(args)
        .envs(env.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the CLI runs");
    // It may end without having read all of it.
    let _ = child.stdin.take().expect("piped").write_all(stdin.as_bytes());
    child.wait_with_output().expect("the CLI ends")
}

fn json_of(out: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{:?}: {stderr}", out.status);
    serde_json::from_slice(&out.stdout).expect("JSON on stdout")
}

#[test]
fn json_has_the_documented_shapes() {
    let cluster = Cluster::start(3);
    let ok = |args: &[&str]| cluster.cli(&[args, &["-o", "json"]].concat()).ok();
    let register = ["worker", "register", "w", "--address", "127.0.0.1"];
    let flags = [
        "--range",
        "service=40000-40063",
        "--range",
        "ray=41000-41009",
        "--reserve",
        "40010",
        "--gpu",
        "memory=24GiB,model=RTX4090,uuid=GPU-1",
        "--gpu",
        "memory=8GiB",
        "--label",
        "zone=a",
    ];
    assert_shape(&ok(&[&register[..], &flags[..]].concat()), &worker(), "register");
    for (line, shape) in [
        ("worker apply w --label zone=b", worker()),
        ("worker list", json!([worker()])),
        ("worker get w", worker()),
        ("worker cordon w", worker()),
        ("worker uncordon w", worker()),
        ("worker quarantine w --port 40020 --reason sshd", worker()),
        ("worker get w", worker()),
        ("worker lift w --port 40020", worker()),
        ("list", json!([allocation()])),
        (
            "allocate a --worker w --ports 2 --port http=40001 --contiguous 3 --range service",
            allocation(),
        ),
        (
            "allocate b --selector zone=b --gpus 1 --gpu-memory 1GiB --bound --label k=v",
            allocation(),
        ),
        ("allocate c --worker w --gpu 0 --gpu-exclusive", allocation()),
        ("get a", allocation()),
        ("list", json!([allocation()])),
        ("list --stale --worker w --phase bound --prefix b", json!([allocation()])),
        (
            "release b --force --reason test",
            json!({
                "released": "bool", "allocation": allocation(), "revision": "number",
            }),
        ),
        (
            "release b --token 1",
            json!({
                "released": "bool", "allocation": "map?", "revision": "number",
            }),
        ),
        ("member list", json!([member()])),
        (
            "status",
            json!({
                "cluster_id": "string", "leader": "number?", "revision": "number",
                "members": [member()], "problems": ["string"],
                "term": "number", "feature_level": "number", "workers": "number",
                "allocations": "number", "node": "number",
            }),
        ),
    ] {
        let args: Vec<_> = line.split(' ').collect();
        assert_shape(&ok(&args), &shape, line);
    }
    let a = ok(&["get", "a"]);
    let token = a["token"].to_string();
    assert_eq!(a["ports"].as_array().map(Vec::len), Some(6));
    let confirmed = ok(&["confirm", "a", "--token", &token]);
    assert_shape(&confirmed, &allocation(), "confirm");
    assert_eq!(confirmed["phase"], "BOUND");
    let swapped = json!({
        "reclaimed": "bool", "reason": "string", "allocation": allocation(), "revision": "number",
    });
    let counted = a["ports"][0]["number"].to_string();
    let report = ok(&["report-conflict", "a", "--token", &token, "--port", &counted]);
    assert_shape(&report, &swapped, "report-conflict");
    // What could not be swapped is on stdout too, beside exit code 5.
    let report = ["report-conflict", "a", "--token", &token, "--port", "40001", "-o", "json"];
    let reclaimed = cluster.cli(&report);
    reclaimed.refused(5, "reclaimed");
    assert_shape(&reclaimed.json().expect("JSON"), &swapped, "a reclaimed allocation");
    ok(&["release", "c", "--force"]);
    let removed = json!({"removed": "bool", "held": ["string"], "revision": "number"});
    assert_shape(&ok(&["worker", "remove", "w"]), &removed, "worker remove");

    let status = ok(&["status"]);
    assert_eq!(status["members"], ok(&["member", "list"]), "the same members");
    for m in status["members"].as_array().expect("members") {
        assert!(["voter", "learner"].contains(&m["role"].as_str().expect("a role")), "{m}");
        let state = m["state"].as_str().expect("a state");
        assert!(["leader", "follower", "candidate", "unreachable"].contains(&state), "{m}");
    }
    let latency = json!({
        "calls": "number", "p50_ms": "decimal", "p90_ms": "decimal", "p99_ms": "decimal",
        "max_ms": "decimal",
    });
    let bench = json!({
        "workload": "string", "clients": "number", "seconds": "decimal", "operations": "number",
        "operations_per_second": "decimal", "ports_per_second": "decimal", "errors": "number",
        "example_error": "string?",
        "latency": {"all": latency, "allocate": latency, "release": latency},
    });
    let report = ok(&["bench", "--clients", "4", "--seconds", "1", "--workers", "2"]);
    assert_shape(&report, &bench, "bench");
    assert_eq!(report["errors"], 0, "{report}");
    let session = ["bench", "--workload", "session", "--batch", "300", "--gang", "2"];
    let report = ok(&[&session[..], &["--clients", "2", "--seconds", "1"]].concat());
    assert_shape(&report, &bench, "bench of sessions");
    assert_eq!(report["errors"], 0, "{report}");
    assert_eq!(ok(&["worker", "list"]), json!([]), "a benchmark leaves nothing behind");
}

#[test]
fn files_and_stdin_take_claims_and_workers() {
    let cluster = Cluster::start(1);
    let endpoints = cluster.endpoints();
    let json = |args: &[&str], stdin: &str| {
        json_of(&run(&[&["--endpoints", &endpoints, "-o", "json"], args].concat(), &[], stdin))
    };
    let workers = "workers:\n\
        - {name: w1, address: 10.0.0.1, labels: {zone: a}, reserved: [40010], \
           ranges: [{name: service, first: 40000, last: 40063}], gpus: [{memory: 24GiB, uuid: GPU-1}]}\n\
        - {name: w2, address: 10.0.0.2, ranges: [{name: service, first: 40000, last: 40003}]}\n";
    let path = cluster.dir().join("workers.yaml");
    std::fs::write(&path, workers).expect("a file");
    let path = path.display().to_string();
    for (args, stdin) in
        [(["worker", "apply", "-f", &path], ""), (["worker", "apply", "-f", "-"], workers)]
    {
        let applied = json(&args, stdin);
        assert_shape(&applied, &json!([worker()]), "worker apply -f");
        assert_eq!(
            (applied[0]["name"].as_str(), applied[1]["name"].as_str()),
            (Some("w1"), Some("w2"))
        );
        assert_eq!(applied[0]["gpus"][0]["memory_bytes"], 24u64 << 30);
    }

    let gang = "claims:\n\
        - {name: rank-0, worker: w1, ports: [{name: http, count: 1}], gpus: {count: 1, memory: 8GiB}}\n\
        - {name: rank-1, selector: '!zone', ports: [{contiguous: 2}], labels: {job: j}, bound: true}\n";
    let granted = json(&["allocate", "-f", "-"], gang);
    assert_shape(&granted, &json!([allocation()]), "a gang");
    assert_eq!(granted.as_array().map(Vec::len), Some(2));
    assert_eq!(granted[0]["token"], granted[1]["token"]);
    assert_eq!(
        (granted[1]["worker"].as_str(), granted[1]["phase"].as_str()),
        (Some("w2"), Some("BOUND"))
    );
    let one = r#"[{"name": "alone", "uid": "u", "worker": "w1", "ports": [{"specific": 40020}]}]"#;
    let granted = json(&["allocate", "-f", "-"], one);
    assert_shape(&granted, &json!([allocation()]), "a gang of one is an array too");
    assert_eq!(json(&["allocate", "-f", "-"], one), granted, "its uid makes it a retry");

    // All or nothing: the second claim does not fit.
    let gang = "- {name: g1, worker: w1, ports: [{count: 1}]}\n- {name: g2, worker: w2, ports: [{count: 9}]}\n";
    let out = run(&["--endpoints", &endpoints, "allocate", "-f", "-"], &[], gang);
    assert_eq!(out.status.code(), Some(5), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(cluster.list().len(), 3);
    for (bad, says) in [("- {name: x, wroker: w}", "wroker"), ("", "claims"), ("\u{0}", "-")] {
        let out = run(&["--endpoints", &endpoints, "allocate", "-f", "-"], &[], bad);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{bad:?}: {stderr}");
        assert!(stderr.contains(says), "{bad:?}: {stderr}");
    }
}

#[test]
fn global_flags_stand_anywhere_and_win_over_the_environment() {
    let cluster = Cluster::start(1);
    cluster.worker("w", 40_063);
    let (endpoints, nowhere) = (cluster.endpoints(), "127.0.0.1:9");
    let lists = |args: &[&str], env: &[(&str, &str)]| {
        assert_eq!(json_of(&run(args, env, "")), json!([]), "{args:?}");
    };
    lists(&["--endpoints", &endpoints, "-o", "json", "--timeout", "5s", "list"], &[]);
    lists(&["list", "--endpoints", &endpoints, "-o", "json", "--timeout", "5s"], &[]);
    lists(&["-o", "json", "list", "--endpoints", &endpoints], &[]);
    let both = format!("{nowhere},{endpoints}");
    lists(&["list", "-o", "json"], &[("PORTWARDEN_ENDPOINTS", &both)]);
    lists(&["list", "-o", "json", "--endpoints", &endpoints], &[("PORTWARDEN_ENDPOINTS", nowhere)]);
    // Two levels down too.
    let deep = run(&["worker", "-o", "json", "get", "w", "--endpoints", &endpoints], &[], "");
    assert_shape(&json_of(&deep), &worker(), "worker get");
    let out = run(&["list", "--timeout", "300ms"], &[("PORTWARDEN_ENDPOINTS", nowhere)], "");
    assert_eq!(out.status.code(), Some(6));
    assert!(String::from_utf8_lossy(&out.stderr).contains(nowhere));
}

/// The line that `serve` logs when it starts.
fn starting_line(cluster: &Cluster, starts: usize) -> String {
    wait_for("the node to say how it starts", || {
        let log = std::fs::read_to_string(cluster.log_path(0)).ok()?;
        let mut lines = log.lines().filter(|line| line.contains(" starting "));
        lines.nth(starts).map(String::from)
    })
}

#[test]
fn serve_takes_a_flag_before_the_environment_before_the_file() {
    let mut cluster = Cluster::prepare(1);
    let host = cluster.nodes[0].client().trim_end_matches(":7601").to_string();
    let config = cluster.dir().join("node.toml");
    let text = format!(
        "id = 1\ndata-dir = {:?}\nlisten = \"{host}:7621\"\nlisten-peer = \"{host}:7701\"\n\
         listen-http = \"{host}:7801\"\ninitial-cluster = \"1={host}:7701\"\nlog-level = \"info\"\n",
        cluster.data_dir(0)
    );
    std::fs::write(&config, &text).expect("a file");
    let config = config.display().to_string();
    let (by_env, by_flag) = (format!("{host}:7631"), format!("{host}:7641"));
    for (start, (env, flag, listens)) in [
        (false, false, format!("{host}:7621")),
        (true, false, by_env.clone()),
        (true, true, by_flag.clone()),
    ]
    .into_iter()
    .enumerate()
    {
        let mut command = Command::new(BINARY);
        command.arg("serve");
        match env {
            // The file itself by its variable, too.
            true => command.env("PORTWARDEN_CONFIG", &config).env("PORTWARDEN_LISTEN", &by_env),
            false => command.args(["--config", &config]),
        };
        if flag {
            command.args(["--listen", &by_flag]);
        }
        cluster.spawn_as(0, command);
        let line = starting_line(&cluster, start);
        assert!(line.contains(&format!("clients={listens} ")), "{line}");
        assert!(line.contains(&format!("http={host}:7801 ")), "the rest is the file's: {line}");
        cluster.cli_at(&listens, &["worker", "register", "w", "--address", "h"]).ok();
        assert_eq!(cluster.terminate(0), Some(0));
    }

    // --insecure is a flag, and has a value where it comes from elsewhere.
    let beyond = ["serve", "--config", &config, "--listen", "0.0.0.0:7621"];
    let out = run(&beyond, &[], "");
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("--insecure"));
    let advertised = |value: &str| {
        // Let through by --insecure, it stops at the next thing that is missing.
        let out = run(&beyond, &[("PORTWARDEN_INSECURE", value)], "");
        assert_eq!(out.status.code(), Some(2));
        String::from_utf8_lossy(&out.stderr).into_owned()
    };
    for yes in ["1", "true", "yes"] {
        assert!(advertised(yes).contains("--advertise"), "{yes}: {}", advertised(yes));
    }
    for no in ["0", "false", "no"] {
        assert!(advertised(no).contains("TLS"), "{no}: {}", advertised(no));
    }
    std::fs::write(&config, format!("{text}insecure = true\n")).expect("a file");
    assert!(advertised("false").contains("TLS"), "the environment goes before the file");
    let out = run(&beyond, &[], "");
    assert!(String::from_utf8_lossy(&out.stderr).contains("--advertise"));

    for (bad, says) in
        [("idd = 1\n", "idd"), ("id = \"x\"\n", "id"), ("id = \n", "TOML"), ("id = 0\n", "--id")]
    {
        std::fs::write(&config, bad).expect("a file");
        let out = run(&["serve", "--config", &config, "--data-dir", "d"], &[], "");
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{bad}: {stderr}");
        assert!(stderr.contains(says), "{bad}: {stderr}");
    }
    let out = run(&["serve", "--config", "/nonexistent.toml"], &[], "");
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("/nonexistent.toml"));
}

/// Every subcommand's path, its parents' included.
fn subcommands(command: &clap::Command, path: &[String], all: &mut Vec<Vec<String>>) {
    all.push(path.to_vec());
    for inner in command.get_subcommands() {
        let path = [path, &[inner.get_name().to_string()]].concat();
        subcommands(inner, &path, all);
    }
}

#[test]
fn help_has_examples_and_completion_is_a_script() {
    let mut all = Vec::new();
    subcommands(&portwarden::cli::Cli::command(), &[], &mut all);
    assert!(all.len() > 20, "{all:?}");
    let mut without = Vec::new();
    for path in &all {
        let args: Vec<_> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let out = run(&args, &[], "");
        assert_eq!(out.status.code(), Some(0), "{path:?}");
        if !String::from_utf8_lossy(&out.stdout).contains("Examples:\n  ") {
            without.push(path.join(" "));
        }
    }
    assert!(without.is_empty(), "no examples in the help of {without:?}");

    let script = run(&["completion", "bash"], &[], "").stdout;
    let mut bash = Command::new("bash")
        .args(["-c", "source /dev/stdin && complete -p portwarden"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("bash runs");
    bash.stdin.take().expect("piped").write_all(&script).expect("it reads");
    let out = bash.wait_with_output().expect("bash ends");
    assert!(out.status.success() && out.stdout.starts_with(b"complete "), "{out:?}");
    let script = String::from_utf8_lossy(&script).into_owned();
    for path in &all {
        assert!(path.iter().all(|word| script.contains(word)), "{path:?} is not completed");
    }
}

/// A reader that goes away is not the command's failure, and no reason to panic.
#[test]
fn a_closed_pipe_is_no_panic() {
    let cluster = Cluster::start(1);
    cluster.worker("w", 40_063);
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
    let endpoints = cluster.endpoints();
    let closed = |args: &[&str], close_stderr: bool| {
        let mut command = Command::new(BINARY);
        command.args(["--endpoints", &endpoints]).args(args).stdin(Stdio::null());
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the CLI runs");
        drop(child.stdout.take());
        let mut stderr = String::new();
        let pipe = child.stderr.take();
        if !close_stderr {
            pipe.expect("piped").read_to_string(&mut stderr).expect("text");
        }
        let code = child.wait().expect("it ends").code();
        assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
        (code, stderr)
    };
    for args in [
        &["list"][..],
        &["list", "-o", "json"],
        &["get", "a"],
        &["worker", "list"],
        &["status"],
        &["member", "list", "-o", "json"],
        &["completion", "zsh"],
        &["--help"],
        &["worker", "register", "--help"],
        &["demo"],
        &["demo", "-o", "json"],
    ] {
        let (code, stderr) = closed(args, false);
        assert_eq!(code, Some(0), "{args:?}: {stderr}");
    }
    // Without a stderr the exit code still tells.
    assert_eq!(closed(&["get", "nobody"], true).0, Some(3));
    assert_eq!(closed(&["list", "--phase", "x"], true).0, Some(2));
    assert_eq!(closed(&["allocate", "a", "--worker", "w", "--ports", "1"], true).0, Some(4));
}

#[test]
fn the_demo_counts_ten_ports_and_no_conflicts() {
    let demo = json_of(&run(&["demo", "-o", "json"], &[], ""));
    let shape = json!({
        "replicas": "number", "schedulers": "number", "allocations": [allocation()],
        "unique_ports": "number", "conflicts": "number", "leader_kills": "number",
        "naive_conflicts": "number",
    });
    assert_shape(&demo, &shape, "demo");
    assert_eq!((demo["replicas"].as_u64(), demo["schedulers"].as_u64()), (Some(10), Some(4)));
    let allocations = demo["allocations"].as_array().expect("allocations");
    assert_eq!(allocations.len(), 10);
    assert_unique(allocations);
    assert_eq!((demo["unique_ports"].as_u64(), demo["conflicts"].as_u64()), (Some(10), Some(0)));
    assert_eq!(demo["leader_kills"], 1);
    assert!(demo["naive_conflicts"].as_u64() > Some(0), "{demo}");
}

#[test]
fn exit_codes_tell_what_a_script_can_do() {
    let mut cluster = Cluster::start(3);
    cluster.worker("w", 40_001);
    for (line, code) in [
        ("allocate a --worker w --ports 1 --uid u", 0),
        ("allocate a --worker w --ports 1 --uid u", 0),
        ("list", 0),
        ("status --check", 0),
        ("release nobody --token 1", 0),
        ("nonsense", 2),
        ("allocate a --worker w --ports 0", 2),
        ("allocate a --worker w --ports 1 --timeout 0s", 2),
        ("list --selector ((", 2),
        ("list --min-revision 1", 2),
        ("--endpoints nonsense list", 2),
        ("allocate b --worker w --ports 1 --range nowhere --gpu-exclusive --gpus 99", 2),
        ("get nobody", 3),
        ("confirm nobody --token 1", 3),
        ("allocate b --worker nowhere --ports 1", 3),
        ("worker get nowhere", 3),
        ("worker cordon nowhere", 3),
        ("allocate a --worker w --ports 1", 4),
        ("allocate a --worker w --ports 2 --uid u", 4),
        ("confirm a --token 1", 4),
        ("release a --token 1", 4),
        ("worker remove w", 4),
        ("report-conflict a --token 1 --port 40000", 4),
        ("allocate b --worker w --ports 2", 5),
        ("allocate b --worker w --range nowhere --ports 1", 5),
        ("allocate b --selector zone=x --ports 1", 5),
        ("allocate b --worker w --gpus 1 --gpu-memory 25GiB", 5),
        ("list --stale --min-revision 99999999 --timeout 500ms", 6),
    ] {
        let ran = cluster.cli(&line.split(' ').collect::<Vec<_>>());
        assert_eq!(ran.code(), code, "{line}: {}", ran.stderr());
        assert_eq!(ran.stderr().is_empty(), code == 0, "{line}: {}", ran.stderr());
        assert!(code == 0 || ran.stdout().is_empty(), "errors are no results: {line}");
    }
    let others = [cluster.leader(), (cluster.leader() + 1) % 3];
    others.into_iter().for_each(|at| cluster.kill(at));
    for line in ["list", "get a", "allocate z --worker w --ports 1", "worker list"] {
        let args: Vec<_> = line.split(' ').chain(["--timeout", "1s"]).collect();
        let ran = cluster.cli(&args);
        assert_eq!(ran.code(), 6, "{line}: {}", ran.stderr());
    }
    cluster.cli(&["status", "--timeout", "5s"]).ok();
    assert_eq!(cluster.cli(&["status", "--check", "--timeout", "5s"]).code(), 1);
}

/// The second act: what goes wrong is dealt with, and nothing is left.
#[test]
fn the_lifecycle_demo_leaves_nothing() {
    let output = Command::new(BINARY)
        .args(["demo", "--lifecycle", "-o", "json"])
        .output()
        .expect("the demo runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["leaked"], 0);
    assert_eq!(report["acts"].as_array().expect("acts").len(), 7);
}
