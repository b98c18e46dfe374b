//! Every local port in use, in the network namespace of this process.
//!
//! /proc/net shows each TCP socket that listens or has a connection, and each UDP socket that has a
//! port. It does not show a TCP socket that is bound and neither listens nor connects: the kernel's
//! socket diagnostics do, since Linux 6.8. On older ones only binding the port tells, which is why a
//! start probes ([`super::probe`]).
//!
//! What is left of a connection after its process has closed it (TIME_WAIT and what else has no
//! inode) is nobody's: a port that has nothing else is not in use. A server that is to be bound there
//! at once must ask for SO_REUSEADDR, as servers do.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_core::{NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_sys::{Socket as Netlink, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use procfs::ProcError;
use procfs::net::{TcpNetEntry, TcpState, UdpNetEntry};

/// `TCP_BOUND_INACTIVE` of the kernel's `tcp_states.h`: asked of an older kernel, it gives none.
const BOUND_INACTIVE: u32 = 1 << 13;
/// One datagram of a dump; the kernel sends no larger ones.
const DATAGRAM_MAX_BYTES: usize = 32 << 10;
/// More datagrams than any host has sockets for.
const DATAGRAMS_MAX: usize = 1 << 16;

/// A socket that has a local port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Socket {
    pub port: u16,
    pub state: State,
    pub udp: bool,
    /// 0: no process has it.
    pub inode: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// It waits for whoever comes. A UDP socket that is not connected does.
    Listening,
    /// The local end of a connection, or bound and neither.
    Otherwise,
    /// What is left of a connection that its process has closed.
    Closing,
}

/// All of them, those of the kernel itself included.
pub fn sockets() -> io::Result<Vec<Socket>> {
    let mut found = Vec::new();
    for entries in [procfs::net::tcp(), procfs::net::tcp6()] {
        found.extend(present(entries)?.iter().map(tcp));
    }
    for entries in [procfs::net::udp(), procfs::net::udp6()] {
        found.extend(present(entries)?.iter().map(udp));
    }
    for family in [AF_INET, AF_INET6] {
        // Where the kernel has no diagnostics, there is one kind of socket that is not seen.
        found.extend(bound_inactive(family).unwrap_or_default());
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// A kernel without IPv6 has no sockets of it.
fn present<T>(entries: Result<Vec<T>, ProcError>) -> io::Result<Vec<T>> {
    match entries {
        Err(ProcError::NotFound(_)) => Ok(Vec::new()),
        entries => entries.map_err(io::Error::other),
    }
}

fn tcp(entry: &TcpNetEntry) -> Socket {
    let state = match entry.state {
        TcpState::Listen => State::Listening,
        TcpState::TimeWait => State::Closing,
        _ if entry.inode == 0 => State::Closing,
        _ => State::Otherwise,
    };
    Socket { port: entry.local_address.port(), state, udp: false, inode: entry.inode }
}

fn udp(entry: &UdpNetEntry) -> Socket {
    let connected = entry.remote_address.port() != 0;
    let state = if connected { State::Otherwise } else { State::Listening };
    Socket { port: entry.local_address.port(), state, udp: true, inode: entry.inode }
}

/// TCP sockets that are bound and neither listen nor connect.
fn bound_inactive(family: u8) -> io::Result<Vec<Socket>> {
    let mut netlink = Netlink::new(NETLINK_SOCK_DIAG)?;
    netlink.bind_auto()?;
    netlink.connect(&SocketAddr::new(0, 0))?;
    netlink.send(&request(family), 0)?;
    let mut found = Vec::new();
    for _ in 0..DATAGRAMS_MAX {
        let mut datagram = Vec::with_capacity(DATAGRAM_MAX_BYTES);
        netlink.recv(&mut datagram, 0)?;
        if !read(&datagram, &mut found)? {
            return Ok(found);
        }
    }
    Err(io::Error::other("the kernel's answer has no end"))
}

fn request(family: u8) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let socket_id = if family == AF_INET { SocketId::new_v4() } else { SocketId::new_v6() };
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::from_bits_retain(BOUND_INACTIVE),
        socket_id,
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// The messages of a datagram; false where the last one is among them.
fn read(mut datagram: &[u8], found: &mut Vec<Socket>) -> io::Result<bool> {
    while !datagram.is_empty() {
        let message = NetlinkMessage::<SockDiagMessage>::deserialize(datagram);
        let message = message.map_err(io::Error::other)?;
        match message.payload {
            NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                let port = response.header.socket_id.source_port;
                let inode = u64::from(response.header.inode);
                found.push(Socket { port, state: State::Otherwise, udp: false, inode });
            }
            NetlinkPayload::Done(_) => return Ok(false),
            NetlinkPayload::Error(error) => return Err(error.to_io()),
            _ => {}
        }
        let length = (message.header.length as usize).next_multiple_of(4).max(1);
        datagram = datagram.get(length..).unwrap_or_default();
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsFd;

    use rustix::net::{AddressFamily, SocketType, bind, socket};

    /// Of this socket alone: others may have its port towards other addresses.
    fn states(of: impl AsFd, port: u16, udp: bool) -> Vec<State> {
        let inode = rustix::fs::fstat(of).unwrap().st_ino;
        let all = sockets().unwrap().into_iter();
        all.filter(|s| (s.inode, s.port, s.udp) == (inode, port, udp)).map(|s| s.state).collect()
    }

    #[test]
    fn listening_connected_and_merely_bound_sockets_are_seen() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let at = listener.local_addr().unwrap();
            assert_eq!(states(&listener, at.port(), false), [State::Listening], "{address}");
            let stream = TcpStream::connect(at).unwrap();
            let local = stream.local_addr().unwrap().port();
            assert_eq!(states(&stream, local, false), [State::Otherwise], "{address}");

            let udp = UdpSocket::bind(address).unwrap();
            let port = udp.local_addr().unwrap().port();
            assert_eq!(states(&udp, port, true), [State::Listening], "{address}");
            udp.connect(at).unwrap();
            assert_eq!(states(&udp, port, true), [State::Otherwise], "{address}");
        }
    }

    #[test]
    fn a_socket_that_is_bound_and_no_more_is_seen_where_the_kernel_tells() {
        let bound = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&bound, &std::net::SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let name = rustix::net::getsockname(&bound).unwrap();
        let port = std::net::SocketAddrV4::try_from(name).unwrap().port();
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let version: Vec<u32> = release.split('.').map_while(|part| part.parse().ok()).collect();
        let told = version.as_slice() >= [6, 8].as_slice();
        let seen = states(&bound, port, false);
        assert_eq!(seen, if told { vec![State::Otherwise] } else { vec![] }, "Linux {release}");
    }

    #[test]
    fn what_is_left_of_a_closed_connection_is_nobodys() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let client = TcpStream::connect(at).unwrap();
        let (server, _) = listener.accept().unwrap();
        drop((server, listener)); // its side closes first
        drop(client);
        let left: Vec<_> =
            sockets().unwrap().into_iter().filter(|s| !s.udp && s.port == at.port()).collect();
        assert!(left.iter().all(|socket| socket.state == State::Closing), "{left:?}");
    }
}
