//! The process that `run` supervises.
//!
//! - It does not outlive its supervisor: the kernel kills it when the thread that started it ends
//!   (`PR_SET_PDEATHSIG`). That thread is one of its own, which lives as long as the [`Child`].
//! - It leads a process group of its own, so that a signal from a terminal reaches it once, through
//!   the supervisor, and so that what it leaves behind can be found and ended.

use std::ffi::OsString;
use std::io::{self, IsTerminal as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;

use rustix::process::{
    Pid, Signal, getpid, getppid, kill_process, kill_process_group,
    set_parent_process_death_signal, test_kill_process_group,
};
use tokio::process::{Child as Process, Command};
use tokio::runtime::Handle;

use super::processes;
use crate::proto::v1;

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
    Ok(Child { process, pid, handle, _parent: parent })
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
        self.process.wait().await
    }

    /// Sends it a signal; one that has ended gets none.
    pub fn signal(&self, signal: Signal) {
        if self.process.id().is_some() {
            let _ = kill_process(self.pid, signal); // it may be ending
        }
    }

    /// Sends a signal to all that is left of its process group.
    ///
    /// The group's number is not given anew while anything is in it; where nothing is, a new group
    /// could only have it if its pid were given anew too, in the moment since it was waited for.
    pub fn signal_group(&self, signal: Signal) {
        let _ = kill_process_group(self.pid, signal); // nothing may be left
    }

    /// Is anything of its process group left that has not ended? Of what has ended and waits for its
    /// parent to take note, nobody can say when it does.
    pub fn has_group(&self) -> bool {
        // Of another user it would be PERM.
        test_kill_process_group(self.pid) != Err(rustix::io::Errno::SRCH)
            && processes::processes(&[])
                .map_or(true, |all| all.iter().any(|p| !p.dead && p.group == self.handle.pid))
    }

    /// Has it ended, and was its status told?
    pub fn has_ended(&self) -> bool {
        self.process.id().is_none()
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
        assert!(child.has_group(), "its child is left");
        child.signal_group(Signal::KILL);
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
