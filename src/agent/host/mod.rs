//! The host: all that an agent and `run` know of it goes through here.
//!
//! The rest of the agent holds rules over what a [`Host`] shows, so that tests give it one made up.
//! Everything here reads and waits for the kernel; callers are asynchronous and go through
//! [`crate::blocking`].

mod cgroups;
pub mod child;
mod clock;
pub mod gpus;
mod identity;
mod local_ports;
pub mod probe;
mod processes;
pub mod sockets;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::RangeInclusive;
use std::sync::Mutex;

use super::processes::Processes;
use super::ranges::LocalPorts;
use crate::lock::guard;
use crate::proto::v1;
use crate::proto::v1::liveness::Handle;
pub use clock::{boot_clock, wall_clock_ms};
use gpus::{GpuSeen, Gpus};
pub use identity::boot_id;
pub use processes::start_ticks;
use sockets::{Socket, State};

/// What is to be looked at in one sample.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    pub ports: Vec<RangeInclusive<u16>>,
    pub handles: Vec<Handle>,
}

/// One sample.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Sockets on the wanted ports that somebody has, with the processes that have them open as far
    /// as those are known.
    pub sockets: Vec<(Socket, BTreeSet<u32>)>,
    /// For each wanted handle, whether it lives; `None` where that cannot be told from here.
    pub alive: Vec<Option<bool>>,
    pub processes: Processes,
    /// Those that the driver tells of; empty without one.
    pub gpus: Vec<GpuSeen>,
    /// What the driver cannot tell, in words.
    pub gpu_trouble: Option<String>,
}

pub trait Host: Send + Sync + 'static {
    fn identity(&self) -> io::Result<v1::Identity>;
    fn local_ports(&self) -> io::Result<LocalPorts>;
    /// The GPUs of the host; empty without a driver.
    fn gpus(&self) -> Result<Vec<v1::GpuSpec>, String>;
    /// Why something cannot be told from here, in words.
    fn blind_spots(&self) -> Vec<String>;
    fn look(&self, wanted: &Wanted) -> io::Result<Seen>;
}

/// Scans of all processes' file descriptors are spared while nothing new turns up and somebody of those
/// who had a socket open lives, but for one in so many samples: who has it open may change.
const OWNERS_KEPT_SAMPLES: u32 = 12;

/// This host.
pub struct Linux {
    gpus: Box<dyn Gpus>,
    owners: Mutex<Owners>,
}

/// Who has which socket open, as of the last scan.
#[derive(Default)]
struct Owners {
    of: BTreeMap<u64, BTreeSet<u32>>,
    samples: u32,
}

impl Owners {
    fn of(&mut self, inodes: &BTreeSet<u64>) -> &BTreeMap<u64, BTreeSet<u32>> {
        self.samples += 1;
        // One may have left its socket to a child and ended.
        let lives = |pid: &u32| processes::lives(*pid);
        let is_known = |pids: &BTreeSet<u32>| pids.is_empty() || pids.iter().any(lives);
        let known = inodes.iter().all(|inode| self.of.get(inode).is_some_and(is_known));
        if !known || self.samples >= OWNERS_KEPT_SAMPLES {
            self.samples = 0;
            self.of = inodes.iter().map(|inode| (*inode, BTreeSet::new())).collect();
            self.of.extend(processes::owners(inodes));
        }
        &self.of
    }
}

impl Linux {
    pub fn new(gpus: Box<dyn Gpus>) -> Self {
        Linux { gpus, owners: Mutex::default() }
    }

    fn sockets(&self, ports: &[RangeInclusive<u16>]) -> io::Result<Vec<(Socket, BTreeSet<u32>)>> {
        let mut found = sockets::sockets()?;
        found.retain(|socket| {
            socket.state != State::Closing && ports.iter().any(|p| p.contains(&socket.port))
        });
        let inodes = found.iter().map(|socket| socket.inode).filter(|inode| *inode != 0).collect();
        let mut owners = guard(&self.owners);
        let owners = owners.of(&inodes);
        let owned = |socket: Socket| (socket, owners.get(&socket.inode).cloned());
        Ok(found.into_iter().map(owned).map(|(s, pids)| (s, pids.unwrap_or_default())).collect())
    }
}

impl Host for Linux {
    fn identity(&self) -> io::Result<v1::Identity> {
        identity::identity()
    }

    fn local_ports(&self) -> io::Result<LocalPorts> {
        local_ports::local_ports()
    }

    fn gpus(&self) -> Result<Vec<v1::GpuSpec>, String> {
        self.gpus.inventory()
    }

    fn blind_spots(&self) -> Vec<String> {
        [processes::blind_spot(), cgroups::Hierarchies::mounted().err()]
            .into_iter()
            .flatten()
            .collect()
    }

    fn look(&self, wanted: &Wanted) -> io::Result<Seen> {
        let sockets = self.sockets(&wanted.ports)?;
        let named: Vec<&v1::Process> = wanted.handles.iter().filter_map(process_of).collect();
        // Without a handle nothing is asked of them.
        let mut processes = match wanted.handles.is_empty() {
            true => Processes::default(),
            false => processes::processes(&named).map_err(io::Error::other)?,
        };
        if named.len() < wanted.handles.len() {
            let owners = sockets.iter().flat_map(|(_, pids)| pids.iter().copied()).collect();
            processes::read_cgroups(&mut processes, &owners);
        }
        let judge = Judge::new(&processes, &wanted.handles);
        let alive = wanted.handles.iter().map(|handle| judge.alive(handle)).collect();
        let (gpus, gpu_trouble) = self.gpus.in_use();
        Ok(Seen { sockets, alive, processes, gpus, gpu_trouble })
    }
}

fn process_of(handle: &Handle) -> Option<&v1::Process> {
    match handle {
        Handle::Process(process) => Some(process),
        Handle::Cgroup(_) | Handle::Container(_) => None,
    }
}

/// Tells whether handles live. What is found lives; what is not found has gone only where all
/// would have been seen.
struct Judge<'a> {
    processes: &'a Processes,
    sees_all_processes: bool,
    cgroups: Option<cgroups::Hierarchies>,
}

impl<'a> Judge<'a> {
    fn new(processes: &'a Processes, handles: &[Handle]) -> Self {
        let of_processes = handles.iter().any(|handle| process_of(handle).is_some());
        let of_cgroups = handles.iter().any(|handle| process_of(handle).is_none());
        Judge {
            processes,
            sees_all_processes: of_processes && processes::blind_spot().is_none(),
            cgroups: of_cgroups.then(cgroups::Hierarchies::mounted).and_then(Result::ok),
        }
    }

    fn alive(&self, handle: &Handle) -> Option<bool> {
        match handle {
            Handle::Process(process) => match self.processes.is_alive(process) {
                true => Some(true),
                false => {
                    let all_seen = self.sees_all_processes && self.processes.unread.is_none();
                    all_seen.then_some(false)
                }
            },
            Handle::Cgroup(path) => self.cgroups.as_ref()?.is_populated(path),
            Handle::Container(id) => self.cgroups.as_ref()?.is_container_populated(id),
        }
    }
}

/// A handle to a process of this host, as its worker's agent knows it; or why there can be none.
pub fn process_handle(process: v1::Process) -> Result<v1::Liveness, String> {
    if processes::in_time_namespace() {
        return Err("this is a time namespace: its agent counts starts from elsewhere".into());
    }
    let boot_id = boot_id().map_err(|error| format!("the boot has no id: {error}"))?;
    Ok(v1::Liveness { boot_id, handle: Some(Handle::Process(process)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver as there is none here: two GPUs, the first of which may fail.
    struct Fake {
        fails: bool,
    }

    impl Gpus for Fake {
        fn inventory(&self) -> Result<Vec<v1::GpuSpec>, String> {
            let gpu = |index| v1::GpuSpec { index, memory_bytes: 8 << 30, ..Default::default() };
            if self.fails {
                Err("it has fallen off the bus".into())
            } else {
                Ok(vec![gpu(0), gpu(1)])
            }
        }

        fn in_use(&self) -> (Vec<GpuSeen>, Option<String>) {
            let seen = |index| GpuSeen { index, uuid: String::new(), processes: index };
            match self.fails {
                true => (vec![seen(1)], Some("GPU 0: it has fallen off the bus".into())),
                false => (vec![seen(0), seen(1)], None),
            }
        }
    }

    #[test]
    fn the_gpus_of_a_driver_are_seen_and_one_that_fails_hides_no_other() {
        let host = Linux::new(Box::new(Fake { fails: false }));
        assert_eq!(host.gpus().unwrap().len(), 2);
        let processes: Vec<_> =
            host.look(&Wanted::default()).unwrap().gpus.iter().map(|gpu| gpu.processes).collect();
        assert_eq!(processes, [0, 1]);
        let failed = Linux::new(Box::new(Fake { fails: true }));
        assert!(failed.gpus().is_err());
        let seen = failed.look(&Wanted::default()).unwrap();
        assert_eq!(seen.gpus.iter().map(|gpu| gpu.index).collect::<Vec<_>>(), [1]);
        assert!(seen.gpu_trouble.unwrap().starts_with("GPU 0"));
    }

    /// As nginx does: it binds its port, leaves it to a child and ends.
    #[test]
    fn who_has_a_socket_is_looked_for_anew_when_those_who_had_it_have_ended() {
        let host = Linux::new(Box::new(gpus::NoGpus));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let wanted = Wanted { ports: vec![port..=port], handles: vec![] };
        host.look(&wanted).unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let ended = child.id();
        child.wait().unwrap();
        for pids in guard(&host.owners).of.values_mut() {
            *pids = [ended].into();
        }
        let seen = host.look(&wanted).unwrap();
        assert!(seen.sockets[0].1.contains(&std::process::id()), "{:?}", seen.sockets);
    }

    #[test]
    fn a_look_tells_who_has_a_wanted_port_and_which_handles_live() {
        let host = Linux::new(Box::new(gpus::NoGpus));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let pid = std::process::id();
        let me = v1::Process { pid, start_ticks: start_ticks(pid).unwrap() };
        let gone = v1::Process { start_ticks: me.start_ticks - 1, ..me };
        let handles = [me, gone].map(Handle::Process).to_vec();
        let seen = host.look(&Wanted { ports: vec![port..=port], handles }).unwrap();
        assert_eq!(seen.sockets.len(), 1);
        assert!(seen.sockets[0].1.contains(&pid));
        assert!(seen.processes.belongs(pid, &Handle::Process(me)));
        let told = processes::blind_spot().is_none();
        assert_eq!(seen.alive, [Some(true), told.then_some(false)]);
        drop(listener);
        assert!(
            host.look(&Wanted { ports: vec![port..=port], handles: vec![] })
                .unwrap()
                .sockets
                .is_empty()
        );
    }
}
