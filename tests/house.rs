//! The pages that list what the code has: complete, and with the code's values.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// The cells of a page's table rows, without back ticks.
fn rows(page: &str) -> Vec<Vec<String>> {
    let row = |line: &str| {
        let cells = line.trim_matches('|').split('|');
        cells.map(|cell| cell.trim().trim_matches('`').to_string()).collect()
    };
    page.lines().filter(|line| line.starts_with('|')).map(row).skip(2).collect()
}

#[test]
fn every_limit_is_on_its_page_with_its_value() {
    let source = read("src/core/limits.rs");
    let page = read("docs/limits.md");
    let (of_the_table, _) = page.split_once("## Of a node").unwrap();
    let mut listed = rows(of_the_table).into_iter();
    for line in source.lines().filter_map(|line| line.strip_prefix("pub const ")) {
        let (name, rest) = line.split_once(": ").unwrap();
        let number = number(rest.split_once(" = ").unwrap().1).unwrap();
        let row = listed.next().unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(row[0], name, "in the order of the code");
        assert_eq!(row[1].replace(' ', ""), number.to_string(), "{name}");
    }
    assert_eq!(listed.next(), None, "no longer a limit");
}

/// Of `1_024;` or `16 << 20;`; `None` for what is made of other constants.
fn number(value: &str) -> Option<u64> {
    let value = value.trim_end_matches(';').replace('_', "");
    match value.split_once(" << ") {
        Some((base, shift)) => Some(base.parse::<u64>().ok()? << shift.parse::<u32>().ok()?),
        None => value.parse().ok(),
    }
}

/// Every `.rs` file below `dir`, by its path from there.
fn sources(dir: &Path, from: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir.join(from)).unwrap() {
        let path = from.join(entry.unwrap().file_name());
        if dir.join(&path).is_dir() {
            sources(dir, &path, found);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            found.push(path.display().to_string());
        }
    }
}

#[test]
fn every_limit_of_a_node_is_on_its_page_with_its_value() {
    let page = read("docs/limits.md");
    let (_, of_a_node) = page.split_once("## Of a node").unwrap();
    let listed: BTreeMap<(String, String), String> = rows(of_a_node)
        .into_iter()
        .map(|row| ((row[1].clone(), row[0].clone()), row[2].replace(' ', "")))
        .collect();
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, Path::new(""), &mut files);
    let mut limits = BTreeSet::new();
    for file in files.iter().filter(|file| !file.starts_with("core/")) {
        for line in read(&format!("src/{file}")).lines() {
            let Some((_, constant)) = line.split_once("const ") else { continue };
            let Some((name, rest)) = constant.split_once(": ") else { continue };
            let Some((kind, value)) = rest.split_once(" = ") else { continue };
            let counts = ["usize", "u16", "u32", "u64"].contains(&kind);
            if !name.ends_with("_MAX") && !name.contains("_MAX_") || !counts {
                continue;
            }
            let limit = (file.clone(), name.to_string());
            let shown = listed.get(&limit).unwrap_or_else(|| panic!("{limit:?} is missing"));
            if let Some(value) = number(value) {
                assert_eq!(*shown, value.to_string(), "{limit:?}");
            }
            limits.insert(limit);
        }
    }
    assert_eq!(listed.into_keys().collect::<BTreeSet<_>>(), limits, "no longer limits");
}

#[test]
fn every_dependency_has_its_reason() {
    let manifest: toml::Table = read("Cargo.toml").parse().unwrap();
    let sections = ["dependencies", "build-dependencies", "dev-dependencies"];
    let tables = sections.iter().filter_map(|section| manifest.get(*section)?.as_table());
    let used: BTreeSet<String> = tables.flat_map(|table| table.keys().cloned()).collect();
    let listed: BTreeSet<String> =
        rows(&read("docs/dependencies.md")).into_iter().map(|row| row[0].clone()).collect();
    assert_eq!(used, listed);
}

/// A cell lists a file, and then tests in it, and so on.
#[test]
fn every_failure_elsewhere_has_its_tests() {
    let listed = rows(&read("docs/field-failures.md"));
    assert!(listed.len() >= 14, "the page lists {} of them", listed.len());
    for row in listed {
        let mut source = None;
        let mut tests = 0;
        for word in row[3].split('`').filter(|word| !word.trim_matches([',', ' ']).is_empty()) {
            if word.ends_with(".rs") {
                source = Some(read(word));
                continue;
            }
            let source = source.as_ref().expect("a file comes first");
            let declared = source.contains(&format!("fn {word}() {{"));
            assert!(declared, "{}: there is no test {word}", row[0]);
            tests += 1;
        }
        assert!(tests > 0, "{} has no test", row[0]);
    }
}
