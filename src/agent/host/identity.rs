//! Who this host is.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use crate::proto::v1;

/// Where a machine's id may be, the best first. systemd writes the first one at the first boot; the
/// last one is the firmware's and readable by root.
const MACHINE_ID_FILES: [&str; 3] =
    ["/etc/machine-id", "/var/lib/dbus/machine-id", "/sys/class/dmi/id/product_uuid"];

/// The network namespace that this process is in.
pub fn identity() -> io::Result<v1::Identity> {
    Ok(v1::Identity {
        machine_id: machine_id()?,
        boot_id: boot_id()?,
        namespace: network_namespace()?,
    })
}

fn machine_id() -> io::Result<String> {
    let read = |path: &&str| fs::read_to_string(path).ok().map(|text| text.trim().to_string());
    let ids = MACHINE_ID_FILES.iter().filter_map(read);
    // "uninitialized" stands there until the first boot is through.
    let mut ids = ids.filter(|id| !id.is_empty() && id != "uninitialized");
    ids.next().or_else(host_name).ok_or_else(|| {
        let files = MACHINE_ID_FILES.join(", ");
        io::Error::other(format!("the machine has no id in {files}, and no host name"))
    })
}

fn host_name() -> Option<String> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    let name = name.trim();
    (!name.is_empty() && name != "localhost").then(|| format!("host:{name}"))
}

pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_string())
}

fn network_namespace() -> io::Result<u64> {
    Ok(fs::metadata("/proc/self/ns/net")?.ino())
}
