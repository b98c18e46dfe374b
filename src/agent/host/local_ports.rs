//! From which ports the kernel takes the local ends of outgoing connections.

use std::fs;
use std::io;

use crate::agent::ranges::{LocalPorts, parse_spans};

pub fn local_ports() -> io::Result<LocalPorts> {
    let read = |name: &str| {
        let path = format!("/proc/sys/net/ipv4/{name}");
        fs::read_to_string(&path).map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))
    };
    let malformed = |text: &str| io::Error::other(format!("{text:?} is not what a kernel says"));
    let range = read("ip_local_port_range")?;
    let mut ends = range.split_whitespace().map(str::parse);
    let (Some(Ok(first)), Some(Ok(last))) = (ends.next(), ends.next()) else {
        return Err(malformed(&range));
    };
    let reserved = read("ip_local_reserved_ports")?;
    let reserved = parse_spans(&reserved).ok_or_else(|| malformed(&reserved))?;
    Ok(LocalPorts { first, last, reserved })
}
