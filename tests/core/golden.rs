//! What feature level 1 did, it does for ever: a script of commands with its outcomes and the
//! digests of the table, as recorded in `tests/golden/level-1.txt`.
//!
//! Nodes of different builds apply the same log, so a digest that changes here is a cluster that
//! splits there. A change of `apply` gets a new feature level and a new file beside the old one. The
//! file of a level that was released is never written anew; one that was not is by
//! `PORTWARDEN_WRITE_GOLDEN=1 cargo test --test core golden`.

use std::fmt::Write;

use super::make::*;
use super::*;

const RECORDED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/level-1.txt");

/// A group of commands may use the tokens that earlier ones granted: the revision of the grant.
fn script() -> Vec<(&'static str, Vec<Command>)> {
    let gpu_worker = |uuid: &str, gib: &[u64]| {
        with(spec(&[("service", 40000, 40015), ("ray", 41000, 41007)], gib), |s| {
            s.labels = labels(&[("zone", "a"), ("gpu", "4090")]);
            s.reserved = [port(40003)].into();
            s.gpus[0].uuid = uuid.into();
            s.identity = Some(golden_identity("b-1"));
        })
    };
    let plain = |first| spec(&[("service", first, first + 7)], &[]);
    let binpack = |c: Claim, s: &str| c.select(s, Policy::Binpack);
    let spread = |c: Claim, s: &str| c.select(s, Policy::Spread);
    let any = |name: &str| claim(name, "w1");
    vec![
        (
            "workers",
            vec![
                register("w1", gpu_worker("GPU-1", &[24, 24])),
                register("w2", plain(40000)),
                register("w3", with(plain(50000), |s| s.labels = labels(&[("zone", "b")]))),
                register("w4", gpu_worker("GPU-1", &[8])),
                register("w1", gpu_worker("GPU-1", &[24, 24])),
            ],
        ),
        (
            "placement",
            vec![
                allocate(&[any("a").count(2).specific(40000).band(3)]),
                allocate(&[binpack(any("b").count(1), "zone in (a,b)")]),
                allocate(&[spread(any("c").count(1), "zone!=a")]),
                allocate(&[spread(any("d").count(1), "zone")]),
                allocate(&[binpack(any("e").gpu_gib(1, 10), "")]),
                allocate(&[spread(any("f").gpu_gib(1, 10).count(1), "gpu=4090")]),
                allocate(&[binpack(any("g").gpus_alone(1), "")]),
                allocate(&[any("a").count(2).specific(40000).band(3)]),
                allocate(&[any("a").count(2).specific(40000).band(3).uid("u2")]),
            ],
        ),
        (
            "gangs",
            vec![
                allocate(&[claim("g1", "w2").count(3), claim("g2", "w2").band(4)]),
                allocate(&[claim("g3", "w3").count(2), claim("g4", "w3").count(9)]),
                allocate(&[claim("g1", "w2").count(3), claim("g2", "w2").band(4)]),
            ],
        ),
        (
            "life",
            vec![
                confirm("a", Token(4), 4),
                confirm("a", Token(4), 4),
                report("a", Token(4), 0, 40005),
                report("a", Token(4), 0, 40005),
                report("a", Token(4), 0, 40004),
                report("a", Token(4), 4, 40001),
                report("g2", Token(10), 10, 40004),
                confirm("g1", Token(10), 0),
                release("g1", Token(9)),
                release("g1", Token(10)),
                release("g1", Token(10)),
                force("e", "stuck"),
                report("a", Token(4), 0, 40000),
            ],
        ),
        (
            "quarantines and reuse",
            vec![
                quarantine("w1", &[40010, 40011, 40015]),
                quarantine("w1", &[40010, 40002]),
                lift("w1", &[40010, 40005, 40012]),
                allocate(&[claim("h", "w1").count(5)]),
                allocate(&[claim("i", "w1").band(2).ask(Some("ray"), Ports::Contiguous(4))]),
                release("h", Token(21)),
                allocate(&[claim("j", "w1").count(3)]),
            ],
        ),
        (
            "changes of workers",
            vec![
                register(
                    "w1",
                    with(gpu_worker("GPU-1", &[24, 48]), |s| {
                        s.ranges = ranges(&[("ray", 41000, 41015), ("service", 39998, 40020)]);
                    }),
                ),
                report("j", Token(24), 0, 40001),
                allocate(&[claim("k", "w1").count(2).ask(Some("service"), Ports::Count(4))]),
                phase("w3", WorkerPhase::Draining),
                allocate(&[claim("l", "w3").count(1)]),
                allocate(&[spread(any("l").count(1), "zone=b")]),
                remove("w3"),
                force("d", "drained"),
                force("b", "drained"),
                remove("w3"),
                update("w1", WorkerPatch { gpus: Some(vec![]), ..WorkerPatch::default() }),
                allocate(&[with(spread(any("m").band(3), ""), |c| c.bound = true)]),
            ],
        ),
        (
            "leases",
            vec![
                grant_lease(10_000),
                grant_lease(10_000),
                grant_lease(999),
                allocate(&[claim("n", "w1").count(1).on(LeaseId(33))]),
                allocate(&[
                    claim("o", "w2").count(1).on(LeaseId(33)),
                    claim("p", "w2").count(1).on(LeaseId(34)),
                ]),
                allocate(&[claim("q", "w2").count(1).on(LeaseId(35))]),
                confirm_with("n", Token(35), 35, process("b-1", 7), None),
                attach("p", Token(36), 36, Some(LeaseId(33))),
                attach("p", Token(36), 36, Some(LeaseId(33))),
                attach("p", Token(36), 0, None),
                Command::ExpireLease { id: LeaseId(33), under: DEPOSED },
                expire(LeaseId(33)),
                expire(LeaseId(33)),
                attach("n", Token(35), 0, Some(LeaseId(34))),
                confirm_with("n", Token(35), 37, None, Some(LeaseId(34))),
                confirm_with("n", Token(35), 37, None, Some(LeaseId(34))),
                revoke(LeaseId(34)),
            ],
        ),
        (
            "deadlines and evidence",
            vec![
                unconfirmed("n", 35, 42),
                unconfirmed("k", 27, 27),
                unconfirmed("p", 36, 39),
                seen_gone("k", 27, 43, 42),
                seen_gone("n", 35, 42, 99),
                confirm("k", Token(27), 27),
                confirm("k", Token(27), 27),
                reboot("w1", golden_identity("b-2")),
                seen_gone("n", 35, 42, 45),
                lose("w1"),
                judged("n", 35, 42, gone(golden_identity("b-2"), Revision(46))),
            ],
        ),
        (
            "what is seen in use",
            vec![
                find("w1"),
                judged("n", 35, 42, gone(golden_identity("b-2"), Revision(47))),
                observe("w2", &[40005, 40006]),
                quarantine("w2", &[40006]),
                clear("w2", &[40005, 40006], Revision(40)),
                clear("w2", &[40005, 40006], Revision(60)),
                observe("w1", &[40016, 40019]),
            ],
        ),
        (
            "the end of a worker",
            vec![
                lose("w2"),
                phase("w1", WorkerPhase::Cordoned),
                lose("w1"),
                phase("w1", WorkerPhase::Ready),
                report("k", Token(27), 0, 40016),
                evict("w1", "burned"),
                confirm("k", Token(27), 0),
                allocate(&[claim("k", "w2").count(1)]),
                remove("w1"),
            ],
        ),
        (
            "the feature level",
            [1, 0, u32::MAX].map(|level| Command::SetFeatureLevel { level }).to_vec(),
        ),
    ]
}

fn golden_identity(boot: &str) -> Identity {
    let (machine_id, boot_id) = ("m-1".into(), boot.into());
    Identity { machine_id, boot_id, namespace: 4026531840 }
}

fn judged(name: &str, token: u64, version: u64, ground: Ground) -> Command {
    let (name, token, version) = (instance(name), Token(token), Revision(version));
    Command::Reclaim { name, token, version, ground, under: LEADER }
}

fn unconfirmed(name: &str, token: u64, version: u64) -> Command {
    judged(name, token, version, Ground::Unconfirmed)
}

/// On the first boot, as of revision `seen`.
fn seen_gone(name: &str, token: u64, version: u64, seen: u64) -> Command {
    judged(name, token, version, gone(golden_identity("b-1"), Revision(seen)))
}

fn play() -> String {
    let mut state = Restore::new(1, Revision(0)).finish().unwrap();
    let mut played = String::new();
    for (group, commands) in script() {
        writeln!(played, "# {group}").unwrap();
        for command in &commands {
            let (applied, _) = apply(&mut state, &ORIGIN, command);
            check_invariants(&state).unwrap();
            writeln!(played, "{}: {}", command.kind(), answer(&applied.outcome)).unwrap();
        }
        writeln!(played, "revision {} digest {}\n", state.revision, digest(&state)).unwrap();
    }
    played
}

#[test]
fn golden_level_1_is_what_it_was() {
    if std::env::var_os("PORTWARDEN_WRITE_GOLDEN").is_some() {
        std::fs::write(RECORDED, play()).unwrap();
    }
    let recorded = std::fs::read_to_string(RECORDED).unwrap();
    for (now, then) in play().lines().zip(recorded.lines()) {
        assert_eq!(now, then, "feature level 1 no longer does what it did");
    }
    assert_eq!(play(), recorded);
}
