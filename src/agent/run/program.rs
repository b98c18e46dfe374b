//! What a program is told of what it holds: its environment, and places in its arguments.
//!
//! | | |
//! |---|---|
//! | `PORT`, `{port}` | the first port |
//! | `PORT_<NAME>`, `{port:name}` | the port of this name, in capitals, what is no letter or digit as `_` |
//! | `PORTS`, `{ports}` | all ports, with commas |
//! | `CUDA_VISIBLE_DEVICES` | the GPUs: by UUID, or by index where one has no UUID |
//! | `PORTWARDEN_NAME`, `_TOKEN`, `_WORKER`, `_ADDRESS` | of the allocation |
//!
//! A port that was asked for by name and count has several numbers: then it is the first of them.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use crate::agent::host::child::Program;
use crate::proto::v1;

/// A place in an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place<'a> {
    First,
    Named(&'a [u8]),
    All,
}

/// Are all places in the command such that a claim with these ports fills them, and have no two names
/// one variable? Else which.
pub fn check(command: &[OsString], ports: &[v1::PortRequest]) -> Result<(), String> {
    let named = || ports.iter().map(|p| &p.name).filter(|name| !name.is_empty());
    for name in named() {
        let rival = |other: &&String| *other != name && variable(other) == variable(name);
        if let Some(other) = named().find(rival) {
            let shared = variable(name);
            return Err(format!("ports {name:?} and {other:?} would both be PORT_{shared}"));
        }
    }
    for word in command {
        let mut wrong = None;
        fill(word.as_bytes(), |place| {
            let known = match place {
                Place::First | Place::All => !ports.is_empty(),
                Place::Named(name) => ports.iter().any(|p| p.name.as_bytes() == name),
            };
            if !known {
                wrong = Some(word.to_string_lossy().into_owned());
            }
            Vec::new()
        });
        if let Some(word) = wrong {
            return Err(format!("{word:?} speaks of a port that is not asked for"));
        }
    }
    Ok(())
}

/// The command with what the allocation holds. The command is not empty.
pub fn program(command: &[OsString], held: &v1::Allocation) -> Program {
    let mut words = command.iter().map(|word| {
        OsString::from_vec(fill(word.as_bytes(), |place| text(place, held).into_bytes()))
    });
    Program {
        path: words.next().unwrap_or_default(),
        args: words.collect(),
        env: environment(held),
    }
}

fn text(place: Place<'_>, held: &v1::Allocation) -> String {
    let mut numbers = held.ports.iter().filter(|port| match place {
        Place::Named(name) => port.name.as_bytes() == name,
        Place::First | Place::All => true,
    });
    match place {
        Place::All => all_ports(held),
        _ => numbers.next().map_or_else(String::new, |port| port.number.to_string()),
    }
}

fn all_ports(held: &v1::Allocation) -> String {
    held.ports.iter().map(|port| port.number.to_string()).collect::<Vec<_>>().join(",")
}

/// A word with each place replaced; other braces stay.
fn fill(word: &[u8], mut with: impl FnMut(Place<'_>) -> Vec<u8>) -> Vec<u8> {
    let mut filled = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some(start) = rest.iter().position(|byte| *byte == b'{') {
        let (before, from) = rest.split_at(start);
        filled.extend_from_slice(before);
        let end = from.iter().position(|byte| *byte == b'}');
        match end.and_then(|end| Some((end, place(&from[1..end])?))) {
            Some((end, place)) => {
                filled.extend(with(place));
                rest = &from[end + 1..];
            }
            None => {
                filled.push(b'{');
                rest = &from[1..];
            }
        }
    }
    filled.extend_from_slice(rest);
    filled
}

fn place(inside: &[u8]) -> Option<Place<'_>> {
    match inside {
        b"port" => Some(Place::First),
        b"ports" => Some(Place::All),
        _ => inside.strip_prefix(b"port:").map(Place::Named),
    }
}

fn environment(held: &v1::Allocation) -> Vec<(String, String)> {
    let mut env = Vec::new();
    let mut set = |key: &str, value: String| env.push((key.to_string(), value));
    if let Some(first) = held.ports.first() {
        set("PORT", first.number.to_string());
        set("PORTS", all_ports(held));
    }
    // Of several ports of one name, the first is set last.
    for port in held.ports.iter().rev().filter(|port| !port.name.is_empty()) {
        set(&format!("PORT_{}", variable(&port.name)), port.number.to_string());
    }
    if !held.gpus.is_empty() {
        let by_uuid = held.gpus.iter().all(|gpu| !gpu.uuid.is_empty());
        let shown = held.gpus.iter().map(|gpu| match by_uuid {
            true => gpu.uuid.clone(),
            false => gpu.index.to_string(),
        });
        set("CUDA_VISIBLE_DEVICES", shown.collect::<Vec<_>>().join(","));
        // Else CUDA counts the fastest first.
        set("CUDA_DEVICE_ORDER", "PCI_BUS_ID".into());
    }
    set("PORTWARDEN_NAME", held.name.clone());
    set("PORTWARDEN_TOKEN", held.token.to_string());
    set("PORTWARDEN_WORKER", held.worker.clone());
    set("PORTWARDEN_ADDRESS", held.address.clone());
    env
}

fn variable(name: &str) -> String {
    let sign = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    name.chars().map(sign).collect()
}

/// For messages.
pub fn shown(command: &[OsString]) -> String {
    let words = command.iter().map(|word| OsStr::to_string_lossy(word));
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held() -> v1::Allocation {
        let port =
            |name: &str, number| v1::Port { name: name.into(), number, ..Default::default() };
        v1::Allocation {
            name: "a".into(),
            worker: "w".into(),
            token: 7,
            ports: vec![port("http", 40001), port("", 40002), port("ray-gcs", 40003)],
            gpus: vec![v1::Gpu { index: 1, uuid: "GPU-1".into(), ..Default::default() }],
            ..Default::default()
        }
    }

    fn filled(word: &str) -> String {
        program(&["x".into(), word.into()], &held()).args[0].to_string_lossy().into_owned()
    }

    #[test]
    fn places_in_arguments_are_filled_and_other_braces_stay() {
        for (word, expected) in [
            ("--port={port}", "--port=40001"),
            ("{port:ray-gcs}:{port:http}", "40003:40001"),
            ("{ports}", "40001,40002,40003"),
            ("{\"port\": {port}}", "{\"port\": 40001}"),
            ("{", "{"),
            ("{}{port", "{}{port"),
            ("{{port}}", "{40001}"),
            ("plain", "plain"),
        ] {
            assert_eq!(filled(word), expected, "{word}");
        }
    }

    #[test]
    fn the_environment_names_ports_and_gpus() {
        let env = program(&["x".into()], &held()).env;
        let value = |key: &str| {
            let found = env.iter().find(|(k, _)| k == key);
            found.map(|(_, value)| value.as_str())
        };
        for (key, expected) in [
            ("PORT", Some("40001")),
            ("PORTS", Some("40001,40002,40003")),
            ("PORT_HTTP", Some("40001")),
            ("PORT_RAY_GCS", Some("40003")),
            ("CUDA_VISIBLE_DEVICES", Some("GPU-1")),
            ("PORTWARDEN_TOKEN", Some("7")),
            ("PORT_", None),
        ] {
            assert_eq!(value(key), expected, "{key}");
        }
        let mut unnamed = held();
        unnamed.gpus.push(v1::Gpu { index: 3, ..Default::default() });
        let env = program(&["x".into()], &unnamed).env;
        assert!(env.contains(&("CUDA_VISIBLE_DEVICES".into(), "1,3".into())), "{env:?}");
    }

    #[test]
    fn a_place_that_nothing_fills_is_found_before_anything_is_asked_for() {
        let ports = [v1::PortRequest { name: "http".into(), ..Default::default() }];
        let check = |word: &str, ports| check(&[word.into()], ports);
        assert!(check("{port} {port:http} {ports} {other}", &ports).is_ok());
        assert!(check("{port:htpp}", &ports).unwrap_err().contains("htpp"));
        assert!(check("{port}", &[]).is_err());
        let named = |name: &str| v1::PortRequest { name: name.into(), ..Default::default() };
        let rivals = [named("ray-gcs"), named(""), named("ray_gcs"), named("")];
        assert!(check("x", &rivals).unwrap_err().contains("PORT_RAY_GCS"));
        assert!(check("x", &[named("a"), named("a"), named("b")]).is_ok());
    }
}
