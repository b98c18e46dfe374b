//! Managed ports that the kernel would give to outgoing connections (field failures gpustack-5181,
//! gpustack-4557, nomad-4285).
//!
//! The kernel takes the local end of a connection from `ip_local_port_range`, and leaves out what
//! `ip_local_reserved_ports` lists. A managed range that lies in the one and not in the other loses
//! its ports to whatever connects anywhere.

use std::collections::BTreeSet;

use crate::proto::v1;

/// Ports, both ends included.
pub type Span = (u16, u16);

/// What the kernel says, in one network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPorts {
    pub first: u16,
    pub last: u16,
    /// In rising order.
    pub reserved: Vec<Span>,
}

impl LocalPorts {
    /// May a connection get this port by itself?
    pub fn gives(&self, port: u16) -> bool {
        let reserved =
            || self.reserved.iter().any(|(first, last)| (*first..=*last).contains(&port));
        (self.first..=self.last).contains(&port) && !reserved()
    }

    /// What is wrong with these ranges, and the line that mends it; `None` where nothing is.
    pub fn warning(&self, ranges: &[v1::PortRange]) -> Option<String> {
        let exposed: Vec<String> = ranges.iter().filter_map(|range| self.exposed(range)).collect();
        if exposed.is_empty() {
            return None;
        }
        let all = ranges.iter().filter_map(span).chain(self.reserved.iter().copied());
        Some(format!(
            "outgoing connections may take managed ports: {} in ip_local_port_range ({}-{}). \
             Reserve them:\n  sysctl -w net.ipv4.ip_local_reserved_ports={}\nand put the same in \
             /etc/sysctl.d/ to keep it over a reboot",
            exposed.join(", "),
            self.first,
            self.last,
            show_spans(&merged(all)),
        ))
    }

    /// "3 ports of range service lie", with the first and last of them.
    fn exposed(&self, range: &v1::PortRange) -> Option<String> {
        let (first, last) = span(range)?;
        let given: Vec<u16> = (first..=last).filter(|port| self.gives(*port)).collect();
        let (first, last) = (given.first()?, given.last()?);
        let count = given.len();
        Some(format!("{count} of range {} ({first} to {last}) lie", range.name))
    }
}

fn span(range: &v1::PortRange) -> Option<Span> {
    Some((u16::try_from(range.first).ok()?, u16::try_from(range.last).ok()?))
}

/// `1,5-9`, as the kernel writes it.
pub fn parse_spans(text: &str) -> Option<Vec<Span>> {
    let parts = text.trim().split(',').filter(|part| !part.is_empty());
    let span = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    parts.map(span).collect()
}

fn show_spans(spans: &[Span]) -> String {
    let shown = spans.iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    shown.collect::<Vec<_>>().join(",")
}

/// The same ports in as few spans as it takes.
fn merged(spans: impl Iterator<Item = Span>) -> Vec<Span> {
    let sorted: BTreeSet<Span> = spans.collect();
    let mut merged: Vec<Span> = Vec::new();
    for (first, last) in sorted {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(name: &str, first: u32, last: u32) -> v1::PortRange {
        v1::PortRange { name: name.into(), first, last }
    }

    fn kernel(reserved: &str) -> LocalPorts {
        LocalPorts { first: 32768, last: 60999, reserved: parse_spans(reserved).unwrap() }
    }

    #[test]
    fn a_range_that_the_kernel_gives_away_is_named_with_the_line_that_mends_it() {
        let ranges = [range("service", 32000, 40063), range("low", 8000, 8009)];
        let warning = kernel("8080,32760-32770").warning(&ranges).unwrap();
        assert!(warning.contains("range service (32771 to 40063)"), "{warning}");
        assert!(!warning.contains("range low"), "{warning}");
        let line = "sysctl -w net.ipv4.ip_local_reserved_ports=8000-8009,8080,32000-40063";
        assert!(warning.contains(line), "{warning}");
        // The line does mend it.
        let (_, spans) = line.split_once('=').unwrap();
        assert_eq!(kernel(spans).warning(&ranges), None);
    }

    #[test]
    fn a_range_beside_the_kernels_is_no_matter() {
        assert_eq!(kernel("").warning(&[range("a", 20000, 32767), range("b", 61000, 65535)]), None);
        assert_eq!(kernel("").warning(&[]), None);
    }

    #[test]
    fn spans_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_spans("\n"), Some(vec![]));
        assert_eq!(parse_spans("1,5-9\n"), Some(vec![(1, 1), (5, 9)]));
        assert_eq!(parse_spans("x"), None);
        assert_eq!(merged([(5, 9), (1, 3), (4, 4), (9, 65535)].into_iter()), [(1, 65535)]);
    }
}
