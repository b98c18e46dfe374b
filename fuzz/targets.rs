//! What the fuzzers feed: one function a target, of any bytes. None may panic, and what is accepted
//! must be sound. Also run on the kept corpora by `tests/corpora.rs`, without a fuzzer.

use portwarden::api::meaning::Request;
use portwarden::core::{Millis, Origin, State, apply, check_invariants};
use portwarden::proto::{peer, v1};
use portwarden::store::codec;
use prost::Message;

/// What is done with the bytes of a fuzzer.
pub type Target = fn(&[u8]);

/// By the name of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("requests", requests),
    ("peer_messages", peer_messages),
    ("log_entries", log_entries),
    ("snapshot_blocks", snapshot_blocks),
    ("snapshot_files", snapshot_files),
    ("config", config),
    ("command_lines", command_lines),
    ("values", values),
];

/// Requests of clients, one after the other, on an empty table: each is a byte for its kind, two for
/// its length, and the message. Whatever they are, the invariants hold.
pub fn requests(mut bytes: &[u8]) {
    let mut state = State::default();
    while let Some((request, rest)) = next_request(bytes) {
        bytes = rest;
        let Some(request) = request else { continue };
        match request.command(Millis(60_000)) {
            Ok(Some(command)) => {
                let (applied, _) = apply(&mut state, &Origin::default(), &command);
                let _ = request.answer(applied, &state); // a refusal is an answer
            }
            Ok(None) => drop(request.read(&state)),
            Err(_) => {}
        }
    }
    check_invariants(&state).expect("the invariants");
}

fn next_request(bytes: &[u8]) -> Option<(Option<Request>, &[u8])> {
    let (kind, rest) = bytes.split_first()?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let (message, rest) = rest.split_at(rest.len().min(u16::from_be_bytes(*length).into()));
    macro_rules! kinds {
        ($($name:ident: $message:ident,)*) => {{
            let kinds: &[fn(&[u8]) -> Option<Request>] =
                &[$(|bytes| v1::$message::decode(bytes).ok().map(Request::$name),)*];
            kinds[usize::from(*kind) % kinds.len()](message)
        }};
    }
    let request = kinds! {
        Register: RegisterRequest,
        Allocate: AllocateRequest,
        Confirm: ConfirmRequest,
        Attach: AttachRequest,
        Release: ReleaseRequest,
        ReportConflict: ReportConflictRequest,
        GrantLease: GrantRequest,
        RevokeLease: RevokeRequest,
        Update: UpdateRequest,
        SetPhase: SetPhaseRequest,
        Remove: RemoveRequest,
        Quarantine: QuarantineRequest,
        LiftQuarantine: LiftQuarantineRequest,
        Get: GetRequest,
        List: ListRequest,
        GetWorker: GetWorkerRequest,
        GetLease: GetLeaseRequest,
        KeepAlive: KeepAliveRequest,
    };
    Some((request, rest))
}

/// Entries, votes and positions as peers send them: read or refused.
pub fn peer_messages(bytes: &[u8]) {
    if let Ok(entry) = peer::Entry::decode(bytes)
        && let Ok(again) = portwarden::raft::reread_entry(entry)
    {
        let once_more = portwarden::raft::reread_entry(again.clone());
        assert_eq!(once_more, Ok(again), "what is read and written is the same");
    }
}

/// Log entries as they are on disk: what is read is written the same, and can be applied.
pub fn log_entries(bytes: &[u8]) {
    let Ok(payload) = codec::decode_payload(&bytes.to_vec().into()) else { return };
    let codec::Payload::Batch(batch) = &payload else {
        let written = codec::encode_payload(&payload);
        assert_eq!(codec::decode_payload(&written).as_ref(), Ok(&payload));
        return;
    };
    // Not from the bytes that it was read from.
    let written = codec::Batch::new(batch.at(), batch.commands().to_vec());
    assert_eq!(codec::decode_payload(written.payload()).as_ref(), Ok(&payload));
    let mut state = State::default();
    let origin = Origin { at: batch.at(), ..Origin::default() };
    for command in batch.commands() {
        apply(&mut state, &origin, command);
    }
    check_invariants(&state).expect("the invariants");
}

/// One block of a snapshot: a state with every invariant, or an error.
pub fn snapshot_blocks(bytes: &[u8]) {
    let mut decoder = codec::StateDecoder::default();
    if decoder.block(bytes).is_err() {
        return;
    }
    let Ok(state) = decoder.finish() else { return };
    let mut again = codec::StateDecoder::default();
    let written = codec::encode_state(&state, 1 << 16, |block| again.block(block));
    written.expect("what was written is read");
    assert_eq!(again.finish().as_ref(), Ok(&state), "what is read and written is the same");
}

/// Snapshot files as a peer sends them, with a checksum that fits: only the inside is hostile.
pub fn snapshot_files(bytes: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    let store = portwarden::store::SnapshotStore::open(dir.path()).expect("a store");
    let mut incoming = store.receive().expect("a file");
    incoming.write(bytes).expect("a write");
    let crc32 = crc32fast::hash(bytes);
    if let Ok(file) = incoming.finish(bytes.len() as u64, crc32)
        && let Ok(state) = file.load()
    {
        check_invariants(&state).expect("the invariants");
    }
}

pub fn config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        portwarden::cli::edge::config(text);
        portwarden::cli::edge::gang(text);
    }
}

pub fn command_lines(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        portwarden::cli::edge::command_line(text);
    }
}

pub fn values(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        portwarden::cli::edge::value(text);
    }
}
