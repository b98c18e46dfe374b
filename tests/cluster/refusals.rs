//! Bad input and wrong starts: each is refused by field, value and limit, and the server is unharmed.

use std::io::Write;

use crate::support::Cluster;

#[test]
fn every_bad_field_is_named() {
    let cluster = Cluster::start(1);
    cluster.worker("w", 40063);
    let long = "n".repeat(10_000);
    let w = ["--worker", "w"];
    for (args, says) in [
        (vec!["allocate", "a", "--port", "0"], "65535"),
        (vec!["allocate", "a", "--port", "65536"], "65535"),
        (vec!["allocate", "a", "--ports", "0"], "256"),
        (vec!["allocate", "a", "--ports", "257"], "256"),
        (vec!["allocate", "a", "--contiguous", "0"], "256"),
        (vec!["allocate", "a"], "--ports"),
        (vec!["allocate", "", "--ports", "1"], "253"),
        (vec!["allocate", long.as_str(), "--ports", "1"], "253"),
        (vec!["allocate", "a b", "--ports", "1"], "A-Z"),
        (vec!["allocate", "a", "--ports", "1", "--label", "k"], "k"),
        (vec!["allocate", "a", "--gpus", "1", "--gpu-memory", "-1"], "gpu-memory"),
        (vec!["allocate", "a", "--gpus", "1", "--gpu-memory", "99999999TiB"], "16 TiB"),
        (
            vec!["allocate", "a", "--gpus", "1", "--gpu-memory", "99999999999999999999"],
            "gpu-memory",
        ),
        (vec!["allocate", "a", "--gpus", "0", "--gpu-exclusive"], "64"),
        (vec!["allocate", "a", "--ports", "1", "--range", "-"], "63"),
    ] {
        let ran = cluster.cli(&[&args[..], &w[..]].concat());
        ran.refused(2, says);
    }
    let register = ["worker", "register", "x", "--address", "127.0.0.1"];
    for (flags, says) in [
        (["--range", "s=0-10"], "65535"),
        (["--range", "s=40000-65536"], "65535"),
        (["--range", "s=40010-40000"], "rising"),
        (["--range", "s"], "range"),
        (["--gpu", "memory=0"], "memory"),
        (["--gpu", "memory=-5GiB"], "memory"),
        (["--reserve", "0"], "65535"),
    ] {
        cluster.cli(&[&register[..], &flags[..]].concat()).refused(2, says);
    }
    cluster.cli(&["allocate", "a", "--worker", "nowhere", "--ports", "1"]).refused(3, "nowhere");
    cluster.cli(&["confirm", "a", "--token", "1"]).refused(3, "a");
    cluster.cli(&["get", "a"]).refused(3, "a");
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "65"]).refused(5, "64");
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
}

#[test]
fn raw_rubbish_leaves_the_server_unharmed() {
    let cluster = Cluster::start(1);
    cluster.worker("w", 40063);
    for addr in [cluster.nodes[0].client(), cluster.nodes[0].peer(), cluster.nodes[0].http()] {
        let mut stream = std::net::TcpStream::connect(&addr).expect("it listens");
        // The server may close in the middle: that is its answer.
        let _ = stream.write_all(&vec![0xff; 1 << 20]);
    }
    cluster.cli(&["allocate", "a", "--worker", "w", "--ports", "1"]).ok();
}

#[test]
fn without_a_server_the_exit_code_is_6() {
    let cluster = Cluster::prepare(1);
    let ran = cluster.cli(&["list", "--timeout", "1s"]);
    ran.refused(6, &cluster.nodes[0].client());
}

#[test]
fn wrong_starts_are_refused_by_name() {
    let mut cluster = Cluster::start(1);
    let serve = |flags: &[&str]| {
        let data = cluster.dir().join("other").display().to_string();
        let args =
            ["serve", "--id", "1", "--data-dir", &data, "--initial-cluster", "1=127.0.0.1:7701"];
        cluster.cli(&[&args[..], flags].concat())
    };
    serve(&["--listen", "0.0.0.0:7601"]).refused(2, "TLS");
    // The data directory of a running node is locked.
    let same: Vec<_> = cluster.serve_args(0);
    let same: Vec<_> = same
        .iter()
        .map(|arg| {
            arg.replace(":7601", ":7611").replace(":7701", ":7711").replace(":7801", ":7811")
        })
        .collect();
    let same: Vec<_> = same.iter().map(String::as_str).collect();
    let data = cluster.data_dir(0).display().to_string();
    cluster.cli(&same).refused(1, &data);
    // Its directory under another id is refused too.
    cluster.kill(0);
    let args = ["--listen-http", "127.0.0.1:0", "--initial-cluster", "9=127.0.0.1:7701"];
    let other = ["serve", "--id", "9", "--data-dir", &data];
    let ran = cluster.cli(&[&other[..], &args[2..]].concat());
    ran.refused(1, &data);
}
