//! The pages that list what the code has: complete, and with the code's values.

use std::collections::BTreeSet;
use std::fs;

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
    let mut listed = rows(&read("docs/limits.md")).into_iter();
    for line in source.lines().filter_map(|line| line.strip_prefix("pub const ")) {
        let (name, rest) = line.split_once(": ").unwrap();
        let value = rest.split_once(" = ").unwrap().1.trim_end_matches(';').replace('_', "");
        let number = match value.split_once(" << ") {
            Some((base, shift)) => base.parse::<u64>().unwrap() << shift.parse::<u32>().unwrap(),
            None => value.parse().unwrap(),
        };
        let row = listed.next().unwrap_or_else(|| panic!("{name} is missing"));
        assert_eq!(row[0], name, "in the order of the code");
        assert_eq!(row[1].replace(' ', ""), number.to_string(), "{name}");
    }
    assert_eq!(listed.next(), None, "no longer a limit");
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
