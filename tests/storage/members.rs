//! What the log and the snapshots say of the members: their bytes, and what is refused.

use portwarden::core::{State, digest};
use portwarden::store::codec::{self, *};

fn membership() -> MembershipRecord {
    let member = MemberRecord {
        cluster_id: "c".into(),
        peer: "p".into(),
        client: "q".into(),
        incarnation: "i".into(),
    };
    MembershipRecord { configs: vec![[1].into()], nodes: [(1, member)].into() }
}

/// One config of one id; one member: 1, `c`, `p`, `q`, `i`.
const MEMBERSHIP: &[u8] = b"\x01\x01\x01\x01\x01\x01c\x01p\x01q\x01i";

#[test]
fn the_incarnation_rides_in_the_membership() {
    let entry = [b"E\x01\x02", MEMBERSHIP].concat();
    assert_eq!(codec::encode_payload(&Payload::Membership(membership())), entry);
    assert_eq!(codec::decode_payload(&entry.clone().into()), Ok(Payload::Membership(membership())));

    let head = SnapshotHead { membership: membership(), ..SnapshotHead::default() };
    let bytes = [b"H\x01\x00\x00", MEMBERSHIP].concat();
    assert_eq!(codec::encode_head(&head), bytes);
    assert_eq!(codec::decode_head(&bytes), Ok(head));
}

fn read(bytes: &[u8]) -> Result<State, String> {
    let mut decoder = StateDecoder::default();
    decoder.block(bytes).and_then(|()| decoder.finish()).map_err(|error| error.to_string())
}

#[test]
fn a_snapshot_remembers_every_id() {
    let mut state = State::default();
    let written = |state: &State| {
        let mut bytes = Vec::new();
        let sink = |block: &[u8]| {
            bytes.extend_from_slice(block);
            Ok::<_, ()>(())
        };
        codec::encode_state(state, 1 << 20, sink).unwrap();
        bytes
    };
    let header = b"R\x01\x00\x01\x00\x00\x00\x00\x00";
    assert_eq!(written(&state), header, "without members, as ever");
    state.remember_member(7, "i");
    state.remember_member(8, "");
    let bytes = [&header[..], b"\x05\x02\x07\x01i\x08\x00"].concat();
    assert_eq!(written(&state), bytes);
    let found = read(&bytes).unwrap();
    assert_eq!((digest(&found), &found), (digest(&state), &state));

    let twice = [&bytes[..], b"\x05\x01\x09\x00"].concat();
    assert!(read(&twice).unwrap_err().contains("out of place"));
    for wrong in [&b"\x05\x00"[..], b"\x05\x02\x08\x00\x07\x00", b"\x05\x02\x07\x00\x07\x00"] {
        let why = read(&[&header[..], wrong].concat()).unwrap_err();
        assert!(why.contains("empty or out of order"), "{why}");
    }
}
