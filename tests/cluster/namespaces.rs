//! Network namespaces: workers that are really apart, and can be cut off.
//!
//! A namespace is joined to this host by a pair of interfaces. The cluster listens on loopback, so a
//! small relay on this host's end carries connections to it. Needs root and `ip` (iproute2).

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::spawned::Spawned;
use crate::support::{BINARY, Cluster};

pub struct Namespace {
    name: String,
    /// Endpoints of the cluster, as they are reached from inside.
    endpoints: String,
    /// This host's end.
    link: String,
}

fn ip(args: &[&str]) {
    let Output { status, stderr, .. } =
        Command::new("ip").args(args).output().unwrap_or_else(|e| {
            panic!("this test needs network namespaces: ip (iproute2) cannot be run: {e}")
        });
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(status.success(), "ip {}: {stderr} (this test needs root)", args.join(" "));
}

impl Namespace {
    /// A namespace from which the nodes of a cluster are reached.
    pub fn new(cluster: &Cluster) -> Namespace {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let name = format!("pw-{process}-{number}");
        let (link, inside) = (format!("pw{process}h{number}"), format!("pw{process}i{number}"));
        // 10.64 to 10.127 by process; four addresses each.
        let subnet = |last: u8| {
            let third = (process << 2 | number >> 6) as u8;
            Ipv4Addr::new(
                10,
                64 + (process >> 6) as u8 % 64,
                third,
                ((number & 63) << 2) as u8 + last,
            )
        };
        let (host, guest) = (subnet(1), subnet(2));
        ip(&["netns", "add", &name]);
        let mut namespace = Namespace { endpoints: String::new(), name, link };
        ip(&["link", "add", &namespace.link, "type", "veth", "peer", "name", &inside]);
        ip(&["link", "set", &inside, "netns", &namespace.name]);
        ip(&["address", "add", &format!("{host}/30"), "dev", &namespace.link]);
        ip(&["link", "set", &namespace.link, "up"]);
        for args in [
            &["address", "add", &format!("{guest}/30"), "dev", &inside][..],
            &["link", "set", &inside, "up"],
            &["link", "set", "lo", "up"],
        ] {
            ip(&[&["-n", &namespace.name], args].concat());
        }
        let reached = cluster.nodes.iter().map(|node| relay(host, node.client()));
        let endpoints = reached.collect::<Vec<_>>().join(",");
        namespace.endpoints = endpoints;
        namespace
    }

    /// A command that runs inside.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// A subcommand that goes on inside.
    pub fn cli(&self, cluster: &Cluster, args: &[&str]) -> Spawned {
        let mut command = self.command(Path::new(BINARY));
        command.args(["--endpoints", &self.endpoints]).args(args);
        Spawned::start(cluster, format!("in {}: {}", self.name, args.join(" ")), command)
    }

    /// Nothing goes in or out any more.
    pub fn cut_off(&self) {
        ip(&["link", "set", &self.link, "down"]);
    }

    pub fn join(&self) {
        ip(&["link", "set", &self.link, "up"]);
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // What still runs inside keeps the namespace until it ends.
        let _ = Command::new("ip").args(["link", "delete", &self.link]).output();
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).output();
    }
}

/// Carries connections on; where they are to be made.
fn relay(host: Ipv4Addr, to: String) -> String {
    let listener = TcpListener::bind((host, 0)).expect("an address of this host");
    let at = listener.local_addr().expect("it is bound").to_string();
    std::thread::spawn(move || {
        for from in listener.incoming().flatten() {
            // A node that is down refuses: so does this.
            let Ok(to) = TcpStream::connect(&to) else { continue };
            for (mut from, mut to) in [(clone(&from), clone(&to)), (to, from)] {
                std::thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Both);
                    let _ = from.shutdown(std::net::Shutdown::Both);
                });
            }
        }
    });
    at
}

fn clone(stream: &TcpStream) -> TcpStream {
    stream.try_clone().expect("another handle")
}
