//! The kept corpora of the fuzzers, as plain tests: no fuzzer and no nightly compiler is needed.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::path::Path;

/// Runs a target on all that is kept for it. A panic names the file.
fn run(name: &str) -> usize {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let (_, target) = targets::TARGETS.iter().find(|(known, _)| *known == name).expect("a target");
    let mut files: Vec<_> = std::fs::read_dir(&corpus)
        .unwrap_or_else(|e| panic!("{}: {e}", corpus.display()))
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    for file in &files {
        let bytes = std::fs::read(file).expect("a file");
        let ran = std::panic::catch_unwind(|| target(&bytes));
        assert!(ran.is_ok(), "{}", file.display());
    }
    files.len()
}

#[test]
fn every_target_has_a_corpus_and_none_of_it_breaks_anything() {
    for (name, _) in targets::TARGETS {
        let count = run(name);
        println!("{name}: {count}");
        assert!(count > 0, "{name} has nothing to run on");
    }
}

/// Cut off anywhere, or with any one byte changed, what is kept breaks nothing either.
#[test]
fn damage_to_what_is_kept_breaks_nothing() {
    for (name, target) in targets::TARGETS {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        for entry in std::fs::read_dir(&corpus).expect("a corpus") {
            let bytes = std::fs::read(entry.expect("an entry").path()).expect("a file");
            let step = (bytes.len() / 64).max(1);
            for at in (0..bytes.len()).step_by(step) {
                target(&bytes[..at]);
                let mut changed = bytes.clone();
                changed[at] ^= 1 << (at % 8);
                target(&changed);
            }
        }
    }
}

/// Writes what the fuzzers begin with: real messages, and the fixtures of the formats on disk. Run by
/// hand when there is something new: `cargo test --test corpora keep -- --ignored`.
#[test]
#[ignore = "writes into fuzz/corpus"]
fn keep_what_is_well_formed() {
    let keep = |target: &str, name: &str, bytes: &[u8]| {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        std::fs::create_dir_all(&dir).expect("a directory");
        std::fs::write(dir.join(name), bytes).expect("a file");
    };
    let fixtures = std::fs::read_to_string("tests/storage/fixtures/v1.txt").expect("fixtures");
    let mut records = vec![0x52, 0x01];
    for (name, hex) in fixtures.lines().filter_map(|line| line.split_once(' ')) {
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
        let bytes: Vec<u8> = (0..hex.len() / 2).map(|i| byte(2 * i)).collect();
        match name.split('-').next() {
            Some("entry") => keep("log_entries", name, &bytes),
            _ if name.starts_with("snapshot-file") => keep("snapshot_files", name, &bytes),
            _ if name.starts_with("snapshot-records") => records.extend(&bytes[2..]),
            _ => {}
        }
    }
    keep("snapshot_blocks", "all", &records);
    seeds::peers(&keep);
    seeds::requests(&keep);
    seeds::texts(&keep);
}

mod seeds {
    use portwarden::proto::{peer, v1};
    use prost::Message;

    type Keep<'a> = dyn Fn(&str, &str, &[u8]) + 'a;

    pub fn peers(keep: &Keep) {
        let fixtures = std::fs::read_to_string("tests/storage/fixtures/v1.txt").expect("fixtures");
        let entries = fixtures.lines().filter_map(|line| line.split_once(' '));
        for (name, hex) in entries.filter(|(name, _)| name.starts_with("entry-")) {
            let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
            let payload: Vec<u8> = (0..hex.len() / 2).map(|i| byte(2 * i)).collect();
            let leader = Some(peer::LeaderId { term: 3, node: 1 });
            let id = Some(peer::LogId { leader, index: 7 });
            let entry = peer::Entry { id, payload: payload.into() };
            keep("peer_messages", name, &entry.encode_to_vec());
        }
    }

    fn framed(kind: u8, message: &impl Message) -> Vec<u8> {
        let bytes = message.encode_to_vec();
        let length = u16::try_from(bytes.len()).expect("a short message");
        [&[kind][..], &length.to_be_bytes(), &bytes].concat()
    }

    /// A worker, a gang on it, a confirmation, a conflict, a release.
    pub fn requests(keep: &Keep) {
        let spec = v1::WorkerSpec {
            address: "h".into(),
            labels: [("zone".to_string(), "a".to_string())].into(),
            ranges: vec![v1::PortRange { name: "s".into(), first: 40_000, last: 40_009 }],
            reserved: vec![40_001],
            gpus: vec![v1::GpuSpec { memory_bytes: 1 << 30, ..Default::default() }],
            identity: None,
        };
        let register = v1::RegisterRequest { name: "w".into(), spec: Some(spec) };
        let counted = |n| v1::PortRequest {
            ports: Some(v1::port_request::Ports::Count(n)),
            ..Default::default()
        };
        let claim = |name: &str, placement| v1::Claim {
            name: name.into(),
            uid: "u".into(),
            placement: Some(placement),
            ports: vec![counted(2)],
            gpus: Some(v1::GpuRequest {
                count: 1,
                share: Some(v1::gpu_request::Share::MemoryBytes(1 << 20)),
                ..Default::default()
            }),
            ..Default::default()
        };
        let select = v1::Selection { selector: "zone in (a,b), !x".into(), policy: 1 };
        let claims = vec![
            claim("a", v1::claim::Placement::Worker("w".into())),
            claim("b", v1::claim::Placement::Select(select)),
        ];
        let allocate = v1::AllocateRequest { claims, dry_run: false };
        let name = || "a".to_string();
        let confirm = v1::ConfirmRequest { name: name(), token: 2, ..Default::default() };
        let conflict =
            v1::ReportConflictRequest { name: name(), token: 2, version: 0, port: 40_000 };
        let release = v1::ReleaseRequest {
            name: name(),
            authority: Some(v1::release_request::Authority::Token(2)),
        };
        let ports = vec![40_003, 40_004];
        let quarantine = v1::QuarantineRequest {
            worker: "w".into(),
            ports: ports.clone(),
            reason: "seen".into(),
        };
        let lift = v1::LiftQuarantineRequest { worker: "w".into(), ports };
        let phase = v1::SetPhaseRequest { name: "w".into(), phase: 2 };
        let all = [
            framed(0, &register),
            framed(1, &allocate),
            framed(2, &confirm),
            framed(11, &quarantine),
            framed(5, &conflict),
            framed(14, &v1::ListRequest::default()),
            framed(12, &lift),
            framed(9, &phase),
            framed(4, &release),
            framed(6, &v1::GrantRequest { ttl_ms: 5_000 }),
            framed(7, &v1::RevokeRequest { id: 7 }),
        ];
        for (at, request) in all.iter().enumerate() {
            keep("requests", &format!("one-{at}"), request);
        }
        keep("requests", "story", &all.concat());
    }

    pub fn texts(keep: &Keep) {
        let config = "id = 1\ndata-dir = \"./n1\"\nlisten = \"127.0.0.1:1\"\nsnapshot-every = 50\n\
                      low-space = \"8MiB\"\nquarantine = \"5m\"\ninsecure = true\n";
        keep("config", "node", config.as_bytes());
        let gang = "claims:\n- {name: a, worker: w, ports: [{count: 2}]}\n- name: b\n  selector: \
                    zone=a\n  gpus: {count: 1, memory: 8GiB}\n";
        keep("config", "gang", gang.as_bytes());
        let lines = [
            "allocate a --worker w --ports 2 --port http=40001 --gpus 1 --gpu-memory 8GiB",
            "worker register w --address h --range s=1-9 --reserve 3 --gpu memory=24GiB,uuid=U",
            "run a --selector zone=a,!x --ports 1 --lease-ttl 5s -- ./serve --port {port}",
            "serve --id 1 --data-dir d --initial-cluster 1=127.0.0.1:1,2=127.0.0.1:2",
            "report-conflict a --token 7 --port 40001 -o json --timeout 3s",
            "member add 4 --peer h:1 --client h:2",
        ];
        for (at, line) in lines.iter().enumerate() {
            keep("command_lines", &format!("line-{at}"), line.as_bytes());
        }
        let values = [
            "zone in (a,b), tier!=x, !y",
            "1h 30m",
            "8GiB",
            "http=40001",
            "40000-40063",
            "service=1-9",
            "k=v",
            "h:1",
            "memory=24GiB,model=RTX4090,uuid=GPU-1",
            "1=h:1,2=h:2",
        ];
        for (at, value) in values.iter().enumerate() {
            keep("values", &format!("value-{at}"), value.as_bytes());
        }
    }
}
