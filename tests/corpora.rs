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
