//! What the bytes on disk and between peers look like, for good.
//!
//! `fixtures/v1.txt` has a line for each kind of value: its name and its bytes in hex. It is never
//! changed once released. Lines for what is new are made with
//! `UPDATE_FIXTURES=1 cargo test --test storage codec::`, and looked at before they are committed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use portwarden::core::{Claim, Command, Millis, Placement, Ports, State, digest};
use portwarden::store::SnapshotStore;
use portwarden::store::codec::*;
use proptest::prelude::*;

use crate::samples;

fn fixtures() -> BTreeMap<String, Vec<u8>> {
    let text = std::fs::read_to_string(path()).unwrap_or_default();
    let line = |line: &str| {
        let (name, hex) = line.split_once(' ').expect("a name and bytes");
        let byte = |i| u8::from_str_radix(&hex[i..i + 2], 16).expect("hex");
        (name.to_string(), (0..hex.len()).step_by(2).map(byte).collect())
    };
    text.lines().map(line).collect()
}

fn path() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests/storage/fixtures/v1.txt"].iter().collect()
}

fn at(index: u64) -> Position {
    Position { term: 3, node: 2, index }
}

fn membership() -> MembershipRecord {
    let member = |id: u64| MemberRecord {
        cluster_id: "5be0a9a1".into(),
        peer: format!("node{id}:7701"),
        client: format!("node{id}:7601"),
        incarnation: if id == 5 { String::new() } else { format!("incarnation-{id}") },
    };
    MembershipRecord {
        configs: vec![[1, 2, 3].into(), [2, 3, 4].into()],
        nodes: (1..=5).map(|id| (id, member(id))).collect(),
    }
}

fn head() -> SnapshotHead {
    SnapshotHead { last: Some(at(300)), membership_at: Some(at(7)), membership: membership() }
}

fn batch(commands: &[Command]) -> Payload {
    Payload::Batch(Batch::new(samples::ORIGIN.at, commands.to_vec()))
}

fn payloads() -> Vec<(String, Payload)> {
    let mut all = vec![
        ("entry-blank".to_string(), Payload::Blank),
        ("entry-membership".into(), Payload::Membership(membership())),
        ("entry-two-commands".into(), batch(&samples::commands()[..2])),
    ];
    for (i, command) in samples::commands().into_iter().enumerate() {
        let name = format!("entry-{i:02}-{}", command.kind());
        all.push((name, batch(&[command])));
    }
    all
}

fn blocks(state: &State) -> Vec<Vec<u8>> {
    let mut blocks = Vec::new();
    encode_state(state, 600, |block| {
        blocks.push(block.to_vec());
        Ok::<_, ()>(())
    })
    .unwrap();
    blocks
}

fn decode(blocks: &[Vec<u8>]) -> Result<State, CodecError> {
    let mut decoder = StateDecoder::default();
    blocks.iter().try_for_each(|block| decoder.block(block))?;
    decoder.finish()
}

fn snapshot_file() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(dir.path()).unwrap();
    std::fs::read(store.write(&head(), &State::default()).unwrap().path()).unwrap()
}

/// All that this build writes, by name.
fn written() -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    all.extend(
        payloads().iter().map(|(name, payload)| (name.clone(), encode_payload(payload).to_vec())),
    );
    let vote = |committed| encode_ballot(&Ballot { term: 300, node: 2, committed });
    all.insert("vote".into(), vote(false));
    all.insert("vote-committed".into(), vote(true));
    all.insert("position".into(), encode_position(&at(70_000)));
    all.insert("snapshot-head".into(), encode_head(&head()));
    all.insert("snapshot-head-of-nothing".into(), encode_head(&SnapshotHead::default()));
    for (i, block) in blocks(&samples::state()).into_iter().enumerate() {
        all.insert(format!("snapshot-records-{i}"), block);
    }
    all.insert("snapshot-file".into(), snapshot_file());
    all
}

#[test]
fn what_is_written_is_as_it_always_was() {
    let written = written();
    if std::env::var_os("UPDATE_FIXTURES").is_some() {
        let mut text = String::new();
        for (name, bytes) in &written {
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            writeln!(text, "{name} {hex}").unwrap();
        }
        std::fs::write(path(), text).unwrap();
    }
    let fixtures = fixtures();
    for (name, bytes) in &written {
        assert_eq!(Some(bytes), fixtures.get(name), "{name}");
    }
    assert_eq!(written.len(), fixtures.len());
}

#[test]
fn what_was_written_can_be_read() {
    let fixtures = fixtures();
    for (name, payload) in payloads() {
        assert_eq!(decode_payload(&fixtures[&name].clone().into()), Ok(payload), "{name}");
    }
    let vote = |committed| Ok(Ballot { term: 300, node: 2, committed });
    assert_eq!(decode_ballot(&fixtures["vote"]), vote(false));
    assert_eq!(decode_ballot(&fixtures["vote-committed"]), vote(true));
    assert_eq!(decode_position(&fixtures["position"]), Ok(at(70_000)));
    assert_eq!(decode_head(&fixtures["snapshot-head"]), Ok(head()));
    assert_eq!(decode_head(&fixtures["snapshot-head-of-nothing"]), Ok(SnapshotHead::default()));
    let records: Vec<_> = fixtures
        .iter()
        .filter(|(name, _)| name.starts_with("snapshot-records-"))
        .map(|(_, bytes)| bytes.clone())
        .collect();
    assert!((3..10).contains(&records.len()), "sorted by name, as they were written");
    let state = decode(&records).unwrap();
    assert_eq!(digest(&state), digest(&samples::state()));
}

/// A claim stays in the table, a million of them in a large one.
#[test]
fn what_is_read_has_no_room_for_more() {
    let exact = |claim: &Claim| assert_eq!(claim.ports.capacity(), claim.ports.len());
    let mut claims = 0;
    for (_, payload) in payloads() {
        let Ok(Payload::Batch(batch)) = decode_payload(&encode_payload(&payload)) else { continue };
        for command in batch.commands() {
            let Command::Allocate { claims: all, .. } = command else { continue };
            all.iter().for_each(|claim| exact(claim));
            claims += all.len();
        }
    }
    assert!(claims > 0);
    let state = decode(&blocks(&samples::state())).unwrap();
    assert!(state.allocation_count() > 0);
    state.allocations_after(None).for_each(|held| exact(&held.claim));
    for worker in state.workers_after(None) {
        assert_eq!(worker.pools.capacity(), worker.pools.len());
        assert_eq!(worker.spec.ranges.capacity(), worker.spec.ranges.len());
    }
}

#[test]
fn an_unknown_version_is_named() {
    let newer = |mut bytes: Vec<u8>| {
        bytes[1] = 9;
        bytes
    };
    let fixtures = fixtures();
    let errors = [
        decode_payload(&newer(fixtures["entry-blank"].clone()).into()).unwrap_err(),
        decode_ballot(&newer(fixtures["vote"].clone())).unwrap_err(),
        decode_position(&newer(fixtures["position"].clone())).unwrap_err(),
        decode_head(&newer(fixtures["snapshot-head"].clone())).unwrap_err(),
        decode(&[newer(fixtures["snapshot-records-0"].clone())]).unwrap_err(),
    ];
    for (error, what) in
        errors.iter().zip(["log entry", "vote", "log position", "snapshot head", "snapshot record"])
    {
        let expected = format!("{what} has format version 9, this build reads 1");
        assert_eq!(error.to_string(), expected);
    }
    // One kind is not taken for another.
    assert!(decode_ballot(&fixtures["position"]).is_err());
    assert!(decode_payload(&Vec::new().into()).is_err());
}

/// A build that is too old for its cluster's table says so, and does not call it damaged.
#[test]
fn a_newer_feature_level_is_named() {
    let mut blocks = blocks(&samples::state());
    assert_eq!(blocks[0][..4], *b"R\x01\x00\x01", "kind, version, header, level");
    blocks[0][3] = 2;
    assert_eq!(decode(&blocks).unwrap_err(), CodecError::FeatureLevel { found: 2, known: 1 });
}

#[test]
fn a_state_is_read_only_whole_and_in_order() {
    let whole = blocks(&samples::state());
    let n = whole.len();
    assert!(n > 3);
    assert!(decode(&whole).is_ok());
    assert!(decode(&[]).is_err());
    assert!(decode(&whole[..n - 1]).is_err());
    assert!(decode(&whole[1..]).is_err());
    let mut twice = whole.clone();
    twice.push(whole[n - 1].clone());
    assert!(decode(&twice).is_err());
    let mut swapped = whole.clone();
    swapped.swap(n - 1, n - 2);
    assert!(decode(&swapped).is_err());
}

/// More than threads encode at one go, so that they take turns.
fn large_state() -> State {
    let mut commands = samples::commands();
    for worker in 0..30 {
        commands.push(samples::register(&format!("many-{worker}"), 0));
        for i in 0..50 {
            let on = Placement::Worker(samples::worker(&format!("many-{worker}")));
            let claim = samples::claim(&format!("many-{i}-{worker}"), on, Ports::Count(1), None);
            commands.push(Command::allocate([claim], Millis(600_000)));
        }
    }
    let state = samples::state_of(&commands);
    assert!(state.allocation_count() > 1500);
    state
}

#[test]
fn a_large_state_is_the_same_whoever_encodes_it() {
    let state = large_state();
    let first = blocks(&state);
    assert_eq!(decode(&first).unwrap(), state);
    for _ in 0..20 {
        assert!(blocks(&state) == first, "other blocks, or in another order");
    }
}

#[test]
fn what_cannot_be_written_ends_the_encoding() {
    let state = large_state();
    let all = blocks(&state).len();
    for last in [0, 1, 5, 20, all / 2, all - 1] {
        let mut written = 0;
        let result = encode_state(&state, 600, |_| {
            written += 1;
            if written > last { Err("the disk is full") } else { Ok(()) }
        });
        assert_eq!((result, written), (Err("the disk is full"), last + 1));
    }
}

/// The table has the name of a port once, and the bytes twice.
#[test]
fn a_port_is_called_what_its_claim_calls_it() {
    let mut blocks = blocks(&samples::state());
    let name = b"http";
    let places = |block: &Vec<u8>| {
        let found = block.windows(name.len()).enumerate().filter(|(_, bytes)| bytes == name);
        found.map(|(at, _)| at).collect::<Vec<_>>()
    };
    let block = blocks.iter_mut().find(|block| places(block).len() >= 2).unwrap();
    let second = places(block)[1];
    block[second] = b'x';
    let error = decode(&blocks).unwrap_err().to_string();
    assert!(error.contains("is not as asked"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..Default::default() })]

    /// Peers and disks may send anything: it is refused or means something, and never panics.
    #[test]
    fn no_bytes_are_too_strange(
        which in any::<prop::sample::Index>(),
        place in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let all: Vec<Vec<u8>> = fixtures().into_values().collect();
        let mut bytes = which.get(&all).clone();
        let place = place.index(bytes.len());
        bytes[place] = byte;
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = decode_payload(&bytes.clone().into());
        let _ = decode_ballot(&bytes);
        let _ = decode_position(&bytes);
        let _ = decode_head(&bytes);
        let _ = decode(std::slice::from_ref(&bytes));
    }

    /// The same of a whole state, whose parts refer to each other.
    #[test]
    fn no_state_is_too_strange(place in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut blocks = blocks(&samples::state());
        let bytes: Vec<(usize, usize)> = blocks
            .iter()
            .enumerate()
            .flat_map(|(i, block)| (0..block.len()).map(move |j| (i, j)))
            .collect();
        let (block, place) = *place.get(&bytes);
        blocks[block][place] = byte;
        if let Ok(state) = decode(&blocks) {
            prop_assert!(portwarden::core::check_invariants(&state).is_ok());
        }
    }
}
