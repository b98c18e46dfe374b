//! Addresses that callers name. They are not in the table's own rules: those hold for what was taken
//! before too.

use std::net::{IpAddr, Ipv6Addr};

use crate::core::{Invalid, check_text, limits};

/// Where a worker is reached.
pub(super) fn check_host(field: &str, value: &str) -> Result<(), Invalid> {
    match is_name(value) || value.parse::<IpAddr>().is_ok() {
        true => Ok(()),
        false => Err(Invalid::new(field, value, "a host name or IP address, without a port")),
    }
}

/// Where a node is reached: IPv6 stands in brackets.
pub fn check_host_port(field: &str, value: &str) -> Result<(), Invalid> {
    check_text(field, value, limits::ADDRESS_MAX_BYTES)?;
    let limit = "HOST:PORT, a host name or address ([…] around IPv6) and a port of 1 to 65535";
    let bad = || Invalid::new(field, value, limit);
    let (host, port) = value.rsplit_once(':').ok_or_else(bad)?;
    let is_host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
        None => is_name(host) || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4()),
    };
    match port.parse::<u16>() {
        Ok(1..) if is_host && !port.starts_with('+') => Ok(()),
        _ => Err(bad()),
    }
}

fn is_name(text: &str) -> bool {
    let is_label = |label: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        !label.is_empty() && label.chars().all(inner)
    };
    // What ends in a number would be an IPv4 address.
    let numeric = |label: &str| label.chars().all(|c| c.is_ascii_digit());
    let mut labels = text.strip_suffix('.').unwrap_or(text).split('.');
    labels.clone().all(is_label) && !labels.next_back().is_some_and(numeric)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port_and_nothing_else() {
        for good in ["a:1", "10.0.0.1:65535", "[::1]:7701", "0.0.0.0:1", "node-1.example_x.:7701"] {
            assert_eq!(check_host_port("peer", good), Ok(()), "{good}");
        }
        for bad in [
            "a",
            "a:",
            ":1",
            "a:0",
            "a:65536",
            "a:+1",
            "::1:7701",
            "[::g]:1",
            "[a]:1",
            "http://a:1",
            "x y:1",
            "a,b:1",
            "ü:1",
            "a:1,b:2",
            "a/b:1",
            "user@a:1",
            "10.0.0.300:1",
            "10.0.0:1",
        ] {
            let error = check_host_port("peer", bad).unwrap_err();
            assert_eq!((error.field.as_str(), error.value.as_str()), ("peer", bad));
        }
    }
}
