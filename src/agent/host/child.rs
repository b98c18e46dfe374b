//! The process that `run` supervises.
//!
//! - It does not outlive its supervisor: the kernel kills it when the thread that started it ends
//!   (`PR_SET_PDEATHSIG`). That thread is one of its own, which lives as long as the [`Child`].
//! - It leads a process group of its own, so that a signal from a terminal reaches it once, through
//!   the supervisor, and so that what it leaves behind can be found and ended.
//! - What leaves that group, as a daemon does, is found by its parent: once its own has ended, that is
//!   the supervisor ([`adopt_orphans`]).

use std::ffi::OsString;
use std::io::{self, IsTerminal as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, child_subreaper, getpid, getppid, kill_process,
    kill_process_group, pidfd_open, pidfd_send_signal, set_child_subreaper,
    set_parent_process_death_signal, waitpid,
};
use tokio::process::{Child as Process, Command};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use super::processes;
use crate::agent::{Process as Seen, Processes};
use crate::blocking::spawn_blocking;
use crate::proto::v1;

/// Between two looks for orphans that have ended: each goes through all processes.
const REAP_PAUSE: Duration = Duration::from_secs(1);
/// Signals by which a program is asked to end.
pub const ENDING: [Signal; 4] = [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM];

/// Makes this process the parent of its descendants whose own have ended, so that none of them is lost
/// from sight; or says why not. Not where it has children already, as after a shell's `exec`: theirs
/// could not be told from the program's.
pub fn adopt_orphans() -> Result<(), String> {
    let all = processes::processes(&[]).map_err(|error| error.to_string())?;
    let me = std::process::id();
    let before = all.iter().find(|process| process.parent == me && !process.dead);
    // The attribute comes through an `exec`, too.
    let reaper = before.is_none().then(getpid);
    set_child_subreaper(reaper).map_err(|error| error.to_string())?;
    match before {
        Some(child) => Err(format!("this process had a child before, {}", child.pid)),
        None => Ok(()),
    }
}

/// What is to be started.
#[derive(Debug, Clone)]
pub struct Program {
    pub path: OsString,
    pub args: Vec<OsString>,
    /// Beyond the environment of this process.
    pub env: Vec<(String, String)>,
}

pub struct Child {
    process: Process,
    pid: Pid,
    handle: v1::Process,
    /// Orphans of its come to this process.
    adopts: bool,
    /// Ends the thread that is its parent, once dropped.
    _parent: mpsc::Sender<()>,
}

/// Starts it. To be called in a runtime.
pub async fn start(program: Program) -> io::Result<Child> {
    let (parent, dropped) = mpsc::channel::<()>();
    let (started, start) = tokio::sync::oneshot::channel();
    let runtime = Handle::current();
    thread::Builder::new().name("parent".into()).spawn(move || {
        let _entered = runtime.enter();
        let _ = started.send(spawn(&program));
        // Until the `Child` is dropped.
        let _ = dropped.recv();
    })?;
    let process = start.await.map_err(io::Error::other)??;
    let gone = || io::Error::other("it has no pid");
    let number = process.id().ok_or_else(gone)?;
    let pid = i32::try_from(number).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
    // It stays in /proc until it is waited for.
    let start_ticks = processes::start_ticks(number).map_err(io::Error::other)?;
    let handle = v1::Process { pid: number, start_ticks };
    let adopts = child_subreaper().is_ok_and(|reaper| reaper.is_some());
    Ok(Child { process, pid, handle, adopts, _parent: parent })
}

fn spawn(program: &Program) -> io::Result<Process> {
    let mut command = Command::new(&program.path);
    command.args(&program.args).envs(program.env.iter().map(|(key, value)| (key, value)));
    command.process_group(0);
    if io::stdin().is_terminal() {
        // Its group is not the terminal's: reading from it would stop it.
        command.stdin(Stdio::null());
    }
    let supervisor = getpid();
    let tie = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have ended before that.
        match getppid() == Some(supervisor) {
            true => Ok(()),
            false => Err(io::Error::other("the supervisor has ended")),
        }
    };
    // SAFETY: between fork and exec it makes two system calls, and allocates nothing unless the
    // supervisor is gone, when nobody is left who could hold the allocator's lock for long.
    unsafe { command.pre_exec(tie) };
    command.spawn()
}

impl Child {
    /// What tells it from every other process on this boot.
    pub fn handle(&self) -> v1::Process {
        self.handle
    }

    /// Waits until it has ended. May be dropped and called again.
    pub async fn ended(&mut self) -> io::Result<ExitStatus> {
        let orphans = reap_orphans(self.handle.pid);
        tokio::select! {
            status = self.process.wait() => status,
            error = orphans, if self.adopts => Err(error),
        }
    }

    /// Sends it a signal; one that has ended gets none. Of one that is stopped, and is asked to end, it is
    /// heeded.
    pub fn signal(&self, signal: Signal) {
        if self.process.id().is_some() {
            let _ = kill_process(self.pid, signal); // it may be ending
            if ENDING.contains(&signal) {
                let _ = kill_process(self.pid, Signal::CONT);
            }
        }
    }

    /// Asks all that is left of it to end, or kills it; each process once.
    ///
    /// Its group's number is not given anew while anything is in it; where nothing is, a new group
    /// could only have it if its pid were given anew too, in the moment since it was waited for.
    pub async fn signal_all(&self, signal: Signal) {
        let elsewhere = self.left().await.unwrap_or_default();
        let elsewhere = elsewhere.into_iter().filter(|process| process.group != self.handle.pid);
        for signal in [signal, Signal::CONT] {
            let _ = kill_process_group(self.pid, signal); // nothing may be left
            elsewhere.clone().for_each(|process| drop(send(&process, signal))); // it may have ended
        }
    }

    /// Is anything of it left that has not ended? Of what has ended and waits for its parent to take
    /// note, nobody can say when it does.
    pub async fn has_left(&self) -> bool {
        self.left().await.map_or(true, |left| !left.is_empty())
    }

    /// Is this process the program, or one that it has started?
    pub fn has_started(&self, pid: u32, all: &Processes) -> bool {
        all.belongs(pid, &v1::liveness::Handle::Process(self.handle))
            || self.is_below_here(pid, all)
    }

    fn is_below_here(&self, pid: u32, all: &Processes) -> bool {
        self.adopts && all.is_below(pid, std::process::id())
    }

    /// Itself, its process group, and all that descends from it where orphans are adopted.
    async fn left(&self) -> io::Result<Vec<Seen>> {
        let all = scan().await?;
        let is_left =
            |p: &&Seen| !p.dead && (p.group == self.handle.pid || self.is_below_here(p.pid, &all));
        Ok(all.iter().filter(is_left).cloned().collect())
    }

    /// Has it ended, and was its status told?
    pub fn has_ended(&self) -> bool {
        self.process.id().is_none()
    }
}

/// All processes: on a large host that takes a while.
async fn scan() -> io::Result<Processes> {
    let scan = || processes::processes(&[]).map_err(io::Error::other);
    spawn_blocking(scan).await.map_err(io::Error::other)?
}

/// Sends a signal to a process that was seen, and to no later one of its pid, as far as the kernel can
/// tell them apart.
fn send(process: &Seen, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(process.pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::NotFound)?;
    let open = pidfd_open(pid, PidfdFlags::empty());
    match processes::start_ticks(process.pid).map_err(io::Error::other)? == process.start_ticks {
        true => match open {
            Ok(open) => Ok(pidfd_send_signal(&open, signal)?),
            // Before Linux 5.3, or not allowed.
            Err(_) => Ok(kill_process(pid, signal)?),
        },
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Takes note of the end of adopted processes, all but `program`; why it cannot.
async fn reap_orphans(program: u32) -> io::Error {
    let mut ends = match signal(SignalKind::child()) {
        Ok(ends) => ends,
        Err(error) => return error,
    };
    let me = std::process::id();
    loop {
        ends.recv().await;
        let all = scan().await.unwrap_or_default();
        for orphan in all.iter().filter(|p| p.dead && p.parent == me && p.pid != program) {
            let pid = i32::try_from(orphan.pid).ok().and_then(Pid::from_raw);
            let _ = waitpid(pid, WaitOptions::NOHANG); // nobody asks for its status
        }
        sleep(REAP_PAUSE).await;
    }
}

/// The exit code by which a shell would tell it.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Program {
        let args = ["-c", script].map(OsString::from).to_vec();
        Program { path: "/bin/sh".into(), args, env: vec![("GREETING".into(), "7".into())] }
    }

    #[tokio::test]
    async fn its_status_is_told_as_a_shell_would() {
        for (script, code) in [("exit $GREETING", 7), ("kill -TERM $$", 143), ("true", 0)] {
            let mut child = start(shell(script)).await.unwrap();
            assert_eq!(exit_code(child.ended().await.unwrap()), code, "{script}");
        }
        let missing = Program { path: "/no/such/program".into(), args: vec![], env: vec![] };
        assert_eq!(start(missing).await.err().unwrap().kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn a_signal_reaches_it_and_what_it_leaves_behind_is_found() {
        let mut child = start(shell("sleep 1000 & wait")).await.unwrap();
        let (handle, group) = (child.handle(), child.handle().pid);
        let of_its_group =
            || processes::processes(&[]).unwrap().iter().filter(|p| p.group == group).count();
        while of_its_group() < 2 {
            tokio::task::yield_now().await;
        }
        child.signal(Signal::TERM);
        assert_eq!(exit_code(child.ended().await.unwrap()), 143);
        child.signal(Signal::TERM); // it is gone
        assert!(child.has_left().await, "its child is left");
        child.signal_all(Signal::KILL).await;
        while processes::processes(&[&handle]).unwrap().is_alive(&handle) {
            tokio::task::yield_now().await;
        }
    }

    /// The thread that starts it must not be one that ends.
    #[tokio::test]
    async fn it_dies_with_its_parent_and_not_before() {
        let child = tokio::task::spawn_blocking(|| {
            Handle::current().block_on(start(shell("exec sleep 1000")))
        });
        let mut child = child.await.unwrap().unwrap();
        let handle = child.handle();
        assert!(processes::processes(&[&handle]).unwrap().is_alive(&handle));
        child._parent = mpsc::channel().0;
        assert_eq!(exit_code(child.ended().await.unwrap()), 137);
    }
}
