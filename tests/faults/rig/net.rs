//! A network of our own: every host a network namespace, all on one bridge in yet another one. The
//! namespaces of the machine itself are not touched, and nothing leads out.
//!
//! What the bridge forwards is decided by one nftables table in its namespace, which is replaced as
//! a whole whenever a fault begins or ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Where `ip netns` keeps its namespaces.
const NAMESPACES: &str = "/run/netns";

/// One host: a namespace with one address.
#[derive(Debug, Clone)]
pub struct Host {
    pub namespace: String,
    pub address: Ipv4Addr,
}

pub struct Net {
    tag: String,
    hosts: Vec<Host>,
    /// By the fault that they belong to.
    rules: BTreeMap<u64, Vec<String>>,
}

impl Net {
    /// Needs root, iproute2 and nftables.
    pub fn create() -> Result<Net, String> {
        remove_leftovers();
        let net = Net {
            tag: format!("pwf{}", std::process::id()),
            hosts: Vec::new(),
            rules: BTreeMap::new(),
        };
        let switch = net.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "br0", "up"])?;
        Ok(net)
    }

    fn switch(&self) -> String {
        format!("{}-switch", self.tag)
    }

    /// Another host on the bridge. Addresses are of the range that is set aside for tests of
    /// networks (RFC 2544).
    pub fn host(&mut self, name: &str) -> Result<Host, String> {
        let number = self.hosts.len() as u16 + 1;
        let [high, low] = number.to_be_bytes();
        let address = Ipv4Addr::new(198, 18, high, low);
        let namespace = format!("{}-{name}", self.tag);
        let (switch, port) = (self.switch(), format!("p{number}"));
        ip(&["netns", "add", &namespace])?;
        let pair = ["type", "veth", "peer", "name", "eth0", "netns", &namespace];
        ip(&[&["-n", &switch, "link", "add", &port][..], &pair].concat())?;
        ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
        ip(&["-n", &namespace, "addr", "add", &format!("{address}/16"), "dev", "eth0"])?;
        ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
        let host = Host { namespace, address };
        self.hosts.push(host.clone());
        Ok(host)
    }

    /// What the bridge does with packets while a fault lasts: rules of nftables.
    pub fn impede(&mut self, fault: u64, rules: Vec<String>) {
        self.rules.insert(fault, rules);
        self.apply();
    }

    pub fn relieve(&mut self, fault: u64) {
        if self.rules.remove(&fault).is_some() {
            self.apply();
        }
    }

    fn apply(&self) {
        let rules: Vec<_> = self.rules.values().flatten().map(String::as_str).collect();
        let table = format!(
            "table bridge faults\ndelete table bridge faults\ntable bridge faults {{\n\
             chain forward {{\ntype filter hook forward priority 0; policy accept;\n{}\n}}\n}}\n",
            rules.join("\n")
        );
        let switch = Host { namespace: self.switch(), address: Ipv4Addr::UNSPECIFIED };
        let mut nft = Command::new("nft");
        switch.run_in(&mut nft);
        let mut nft = nft.args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft runs");
        let written = nft.stdin.take().expect("piped").write_all(table.as_bytes());
        written.expect("nft reads");
        assert!(nft.wait().expect("nft ends").success(), "nft refuses:\n{table}");
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let hosts = self.hosts.iter().map(|host| host.namespace.clone());
        for namespace in hosts.chain([self.switch()]) {
            let _ = ip(&["netns", "delete", &namespace]);
        }
    }
}

/// Drops what goes from one to the other.
pub fn cut(from: Ipv4Addr, to: Ipv4Addr) -> String {
    format!("ip saddr {from} ip daddr {to} drop")
}

/// Drops so many of a hundred packets from one to the other.
pub fn lose(from: Ipv4Addr, to: Ipv4Addr, percent: u32) -> String {
    format!("ip saddr {from} ip daddr {to} numgen random mod 100 < {percent} drop")
}

impl Host {
    fn file(&self) -> File {
        let path: PathBuf = [NAMESPACES, &self.namespace].iter().collect();
        File::open(path).expect("the namespace is there")
    }

    /// Moves the calling thread there, for good: what it opens from now on is there.
    pub fn enter(&self) {
        let file = self.file();
        // SAFETY: a system call on a descriptor that is open; it changes this thread alone.
        let moved = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
        assert_eq!(moved, 0, "setns: {}", std::io::Error::last_os_error());
    }

    /// The command will run there, and end with the thread that starts it.
    pub fn run_in(&self, command: &mut Command) {
        let file = self.file();
        // SAFETY: between fork and exec, only system calls.
        unsafe {
            command.pre_exec(move || {
                let moved = libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET);
                let bound = libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                match moved == 0 && bound == 0 {
                    true => Ok(()),
                    false => Err(std::io::Error::last_os_error()),
                }
            });
        }
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(args).output();
    let output = output.map_err(|e| format!("ip (of iproute2) does not run: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let why = String::from_utf8_lossy(&output.stderr).into_owned();
            Err(format!("ip {}: {why}", args.join(" ")))
        }
    }
}

/// Namespaces of runs that were killed before they could clean up.
fn remove_leftovers() {
    for entry in std::fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name.strip_prefix("pwf").and_then(|rest| rest.split('-').next());
        let gone = |pid: &str| !std::path::Path::new("/proc").join(pid).exists();
        if pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && gone(pid)) {
            let _ = ip(&["netns", "delete", &name]);
        }
    }
}
