//! Is a port free? Binding it tells.
//!
//! A port is bound for TCP and UDP, over IPv4 and IPv6, on the wildcard address: whatever has it, on
//! whichever address, listening, connected or merely bound, makes one of the four fail. They are
//! bound without SO_REUSEADDR, with which a port would seem free while another server that uses it
//! too has bound it and not begun to listen.
//!
//! Without it, though, a port also seems in use for a minute after a server there has closed its
//! connections (TIME_WAIT). Servers ask for SO_REUSEADDR to be spared that. So where nothing but
//! such remains is on the port, and a socket with SO_REUSEADDR can be bound, it is [`Probe::Closing`]:
//! free for a server that asks for it.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, bind, socket, sockopt};

use super::processes;
use super::sockets::{State, sockets};

/// What binding a port has told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    Free,
    /// Free, but for remains of connections whose processes have closed them.
    Closing,
    /// "Address in use"; by whom, as far as that is known.
    InUse(String),
    /// This process may not bind it, so that nothing is known.
    Unknown(String),
}

const KINDS: [(SocketType, AddressFamily, &str); 4] = [
    (SocketType::STREAM, AddressFamily::INET, "TCP 0.0.0.0"),
    (SocketType::STREAM, AddressFamily::INET6, "TCP [::]"),
    (SocketType::DGRAM, AddressFamily::INET, "UDP 0.0.0.0"),
    (SocketType::DGRAM, AddressFamily::INET6, "UDP [::]"),
];

pub fn probe(port: u16) -> Probe {
    let mut closing = false;
    for (kind, family, shown) in KINDS {
        match try_bind(kind, family, port, false) {
            Ok(()) => {}
            // A host without IPv6.
            Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) if family == AddressFamily::INET6 => {}
            Err(Errno::ADDRINUSE) => {
                let remains = kind == SocketType::STREAM
                    && !has_owner(port)
                    && try_bind(kind, family, port, true).is_ok();
                if !remains {
                    let error = io::Error::from(Errno::ADDRINUSE);
                    return Probe::InUse(format!("{shown}: {error}{}", by_whom(port)));
                }
                closing = true;
            }
            Err(error) => return Probe::Unknown(format!("{shown}: {}", io::Error::from(error))),
        }
    }
    if closing { Probe::Closing } else { Probe::Free }
}

fn try_bind(kind: SocketType, family: AddressFamily, port: u16, reuse: bool) -> Result<(), Errno> {
    let socket = socket(family, kind, None)?;
    if reuse {
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    if family == AddressFamily::INET {
        return bind(&socket, &SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
    }
    // Else it would cover IPv4 too, and meet the probe of that.
    sockopt::set_ipv6_v6only(&socket, true)?;
    bind(&socket, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))
}

/// Does anything but remains have the port, as far as the kernel shows?
fn has_owner(port: u16) -> bool {
    let Ok(sockets) = sockets() else { return true };
    let mut on_it = sockets.iter().filter(|socket| socket.port == port).peekable();
    // What is not shown at all is no remains either.
    on_it.peek().is_none() || on_it.any(|socket| socket.state != State::Closing)
}

/// " by process 42 (python3)"; empty where nobody can tell.
fn by_whom(port: u16) -> String {
    let sockets = sockets().unwrap_or_default();
    let inodes: BTreeSet<u64> =
        sockets.iter().filter(|s| s.port == port && s.inode != 0).map(|s| s.inode).collect();
    if inodes.is_empty() {
        return String::new();
    }
    match processes::owners(&inodes).into_values().flatten().next() {
        Some(pid) => {
            let name = processes::name(pid).map_or(String::new(), |name| format!(" ({name})"));
            format!(" by process {pid}{name}")
        }
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Debug;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::sync::atomic::{AtomicU16, Ordering};
    use std::time::{Duration, Instant};

    fn in_use(probe: &Probe, shown: &str) -> bool {
        matches!(probe, Probe::InUse(why) if why.starts_with(shown))
    }

    /// A free port that no other test is given, below the ephemeral ones so that it stays free.
    fn free_port() -> u16 {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let start = 20_000 + (std::process::id() % 10_000) as u16;
        loop {
            let port = start + NEXT.fetch_add(1, Ordering::Relaxed);
            if probe(port) == Probe::Free {
                return port;
            }
        }
    }

    /// Another test may be starting a program: until that runs, it has what is open here, also the
    /// sockets of a probe.
    fn eventually<T, E: Debug>(mut attempt: impl FnMut() -> Result<T, E>) -> T {
        let began = Instant::now();
        loop {
            match attempt() {
                Ok(done) => return done,
                Err(error) if began.elapsed() > Duration::from_secs(20) => panic!("{error:?}"),
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    fn until(port: u16, wanted: Probe) {
        eventually(|| match probe(port) {
            found if found == wanted => Ok(()),
            found => Err(found),
        });
    }

    fn listen(address: &str, port: u16) -> TcpListener {
        eventually(|| TcpListener::bind((address, port)))
    }

    #[test]
    fn whatever_has_a_port_is_found_and_named() {
        let port = free_port();
        let listener = listen("127.0.0.1", port);
        let by = format!("by process {}", std::process::id());
        eventually(|| match probe(port) {
            Probe::InUse(why) if why.starts_with("TCP 0.0.0.0: Address") && why.contains(&by) => {
                Ok(())
            }
            found => Err(found),
        });
        drop(listener);
        until(port, Probe::Free);
        let listener = listen("::1", port);
        let found = probe(port);
        assert!(in_use(&found, "TCP [::]"), "{found:?}");
        drop(listener);
        until(port, Probe::Free);
        for (address, shown) in [("127.0.0.1", "UDP 0.0.0.0"), ("::1", "UDP [::]")] {
            let socket = eventually(|| UdpSocket::bind((address, port)));
            let found = probe(port);
            assert!(in_use(&found, shown), "{found:?}");
            drop(socket);
            until(port, Probe::Free);
        }
    }

    /// A socket that another server has bound with SO_REUSEADDR, and on which it does not listen yet.
    #[test]
    fn a_port_that_is_bound_for_reuse_and_not_listened_on_is_in_use() {
        let port = free_port();
        let bound = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        sockopt::set_socket_reuseaddr(&bound, true).unwrap();
        eventually(|| bind(&bound, &SocketAddr::from(([127, 0, 0, 1], port))));
        assert!(in_use(&probe(port), "TCP 0.0.0.0"));
    }

    #[test]
    fn a_port_with_remains_of_connections_is_closing_and_no_conflict() {
        let port = free_port();
        let listener = listen("127.0.0.1", port);
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (server, _) = listener.accept().unwrap();
        // Its side closes first, and so waits.
        drop((server, listener));
        drop(client);
        let left = sockets().unwrap();
        assert!(left.iter().any(|s| s.port == port && s.state == State::Closing), "{left:?}");
        until(port, Probe::Closing);
        listen("127.0.0.1", port); // std asks for SO_REUSEADDR
    }

    /// Field failure gpustack-4557 in the small: the local port of an outgoing connection.
    #[test]
    fn the_local_port_of_a_connection_is_in_use() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let local = stream.local_addr().unwrap().port();
        assert!(in_use(&probe(local), "TCP 0.0.0.0"));
    }
}
