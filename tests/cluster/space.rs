//! Nodes on small file systems of their own: one runs full, all run full, room is made.
//!
//! Needs root, to mount them. Without it these tests fail; they do not pass by doing nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Cluster, assert_unique, wait_for};

const LOW: &str = "12MiB";
const RESERVE: u64 = 3 << 20;

/// A tmpfs; it goes with this.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, size: &str) -> Disk {
        std::fs::create_dir_all(at).expect("a mount point");
        let options = format!("size={size},mode=700");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).output();
        let mounted = mounted.expect("mount runs");
        let why = String::from_utf8_lossy(&mounted.stderr).into_owned();
        assert!(
            mounted.status.success(),
            "this test must run as root, to mount a small disk: {why}"
        );
        Disk(at.to_path_buf())
    }

    fn free_bytes(&self) -> u64 {
        portwarden::store::free_bytes(&self.0).expect("its free space")
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Takes space until so much is left.
    fn fill(&self, leave_bytes: u64) {
        let file = File::options().append(true).create(true).open(self.ballast()).expect("a file");
        let length = file.metadata().expect("its length").len();
        let take = self.free_bytes().saturating_sub(leave_bytes);
        let flags = rustix::fs::FallocateFlags::empty();
        if take > 0 {
            // What the node takes meanwhile may be missing at the end.
            let _ = rustix::fs::fallocate(&file, flags, length, take);
        }
    }

    /// Takes everything, the last block too.
    fn fill_up(&self) {
        self.fill(0);
        let mut file = File::options().append(true).open(self.ballast()).expect("the file");
        while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    }

    fn make_room(&self) {
        std::fs::remove_file(self.ballast()).expect("the ballast goes");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// Three nodes, each on a disk of its own. The disks are dropped after the nodes.
fn start() -> (Cluster, Vec<Disk>) {
    let mut cluster = Cluster::prepare(3);
    cluster.flags = ["--low-space", LOW, "--checkpoint-every", "0"].map(String::from).to_vec();
    let disks = (0..3).map(|at| Disk::mount(&cluster.data_dir(at), "48m")).collect();
    for at in 0..3 {
        cluster.spawn(at);
    }
    cluster.leader();
    cluster.worker("w", 40_063);
    cluster.worker("big", 59_999);
    for at in 0..3 {
        wait_for("the reserve", || {
            let reserve = std::fs::metadata(cluster.data_dir(at).join("reserve")).ok()?;
            (reserve.len() == RESERVE).then_some(())
        });
    }
    (cluster, disks)
}

fn allocate(cluster: &Cluster, name: &str) -> crate::support::Ran {
    let args = ["allocate", name, "--worker", "w", "--ports", "1", "-o", "json"];
    cluster.cli(&[&args[..], &["--uid", name]].concat())
}

fn problems(cluster: &Cluster) -> String {
    cluster.cli(&["status", "-o", "json"]).ok()["problems"].to_string()
}

#[test]
fn one_node_runs_full_and_the_cluster_goes_on() {
    let (mut cluster, disks) = start();
    allocate(&cluster, "before").ok();
    // The leader, of all nodes.
    let full = cluster.leader();
    disks[full].fill(4 << 20);
    wait_for("the node to be low", || {
        cluster.metric(full, "portwarden_low_space").filter(|low| *low == 1.0)
    });
    let id = cluster.nodes[full].id;
    wait_for("status to say so, and that the others have room", || {
        let problems = problems(&cluster);
        let named = problems.contains(&format!("member {id} at"));
        (named && !problems.contains("only what frees")).then_some(())
    });
    allocate(&cluster, "low").ok();

    // To the last byte, reserve included: it cannot write, and must not go on.
    cluster.signal(full, "STOP");
    let _ = std::fs::remove_file(cluster.data_dir(full).join("reserve"));
    disks[full].fill_up();
    cluster.signal(full, "CONT");
    let mut granted = Vec::new();
    for number in 0..8 {
        let ran = cluster.large_gang("big", &format!("gang{number}"));
        match ran.code() {
            0 => granted.push(format!("gang{number}-0")),
            // It led, and its disk failed it in the middle of the call.
            code => assert_eq!(code, 6, "{}", ran.stderr()),
        }
    }
    assert!(granted.len() >= 7, "{granted:?}");
    assert_eq!(cluster.ended(full), Some(74), "the disk failed it: {}", cluster.log(full));
    let held = cluster.list();
    assert_unique(&held);
    for name in granted.iter().map(String::as_str).chain(["before", "low"]) {
        assert!(held.iter().any(|a| a["name"] == name), "{name} was lost");
    }

    // With room it comes back under its own id, with all that it had promised.
    disks[full].make_room();
    cluster.spawn(full);
    wait_for("all to be well", || (cluster.cli(&["status", "--check"]).code() == 0).then_some(()));
}

#[test]
fn all_run_full_growth_is_refused_releases_work_and_room_ends_it() {
    let (mut cluster, disks) = start();
    let token = |name| allocate(&cluster, name).ok()["token"].to_string();
    let (a, b) = (token("a"), token("b"));
    for disk in &disks {
        disk.fill(256 << 10);
    }
    for (at, disk) in disks.iter().enumerate() {
        wait_for("the reserve to be given up", || {
            let gone = !cluster.data_dir(at).join("reserve").exists();
            (gone && disk.free_bytes() < 12 << 20).then_some(())
        });
    }
    wait_for("growth to be refused", || {
        problems(&cluster).contains("only what frees").then_some(())
    });
    allocate(&cluster, "more").refused(5, "low on space");
    let register = ["worker", "register", "x", "--address", "a", "--range", "s=1-9"];
    cluster.cli(&register).refused(5, "low on space");
    let refused = |at| cluster.metric(at, "portwarden_proposals_refused_total");
    assert!((0..3).filter_map(refused).sum::<f64>() >= 2.0);
    // A repeat of what was granted is an answer, not growth.
    assert_eq!(allocate(&cluster, "a").ok()["token"].to_string(), a);
    cluster.cli(&["confirm", "a", "--token", &a]).ok();
    cluster.cli(&["worker", "quarantine", "w", "--port", "40050", "--reason", "seen"]).ok();
    cluster.cli(&["release", "b", "--token", &b]).ok();

    // A node opens on the full disk too, reserve or not.
    let restarted = cluster.leader();
    cluster.kill(restarted);
    cluster.spawn(restarted);
    wait_for("it to be a member again", || {
        let ready = cluster.metric(restarted, "portwarden_has_leader");
        ready.filter(|has| *has == 1.0)
    });
    allocate(&cluster, "still").refused(5, "low on space");

    for disk in &disks {
        disk.make_room();
    }
    wait_for("room to be seen", || (allocate(&cluster, "after").code() == 0).then_some(()));
    wait_for("all to be well", || (cluster.cli(&["status", "--check"]).code() == 0).then_some(()));
    for at in 0..3 {
        wait_for("the reserve again", || {
            cluster.data_dir(at).join("reserve").exists().then_some(())
        });
    }
    let held = cluster.list();
    let names: Vec<_> = held.iter().map(|a| a["name"].as_str().unwrap_or_default()).collect();
    assert_eq!(names, ["a", "after"]);
    assert_eq!(held[0]["phase"], "BOUND");
}
