//! Server processes. None outlives this one, in whichever way it ends: the kernel sends them a signal.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{
    Pid, Signal, getpid, getppid, kill_process, set_parent_process_death_signal,
};

/// For what ends by another signal than KILL; then it is killed. PostgreSQL gives its own 5 s.
const ENDS_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(10);

pub struct Process {
    child: Child,
    ends_by: Signal,
}

impl Process {
    /// Its output goes to `log`.
    ///
    /// # Panics
    ///
    /// On another thread than the main one: the process would end with that thread.
    pub fn start(command: &mut Command, log: &Path) -> anyhow::Result<Process> {
        Process::start_to_end_by(Signal::KILL, command, log)
    }

    /// The same for a server that has something to tidy up when it is killed.
    pub fn start_to_end_by(
        ends_by: Signal,
        command: &mut Command,
        log: &Path,
    ) -> anyhow::Result<Process> {
        assert_eq!(thread::current().name(), Some("main"));
        let out = File::create(log)?;
        let parent = getpid();
        let tie = move || {
            // A shell has its background jobs ignore some, and what is ignored stays so until the server
            // has a handler of its own.
            // SAFETY: a system call. For KILL it does nothing.
            unsafe { libc::signal(ends_by.as_raw(), libc::SIG_DFL) };
            set_parent_process_death_signal(Some(ends_by))?;
            // It may have ended before that.
            match getppid() == Some(parent) {
                true => Ok(()),
                false => Err(io::ErrorKind::NotFound.into()),
            }
        };
        // SAFETY: between fork and exec it makes three system calls, and allocates nothing.
        unsafe { command.pre_exec(tie) };
        let child = command
            // Out of reach of the terminal's signals: this process ends the servers in order.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("{command:?} cannot be started"))?;
        Ok(Process { child, ends_by })
    }

    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Returns when it has ended.
    pub fn kill(&mut self) {
        if self.ends_by != Signal::KILL && self.lives() {
            let _ = self.signal(self.ends_by);
            let looks = ENDS_WITHIN.as_millis() / LOOK_EVERY.as_millis();
            (0..looks).take_while(|_| self.lives()).for_each(|_| thread::sleep(LOOK_EVERY));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Ports that nobody listens on just now.
pub fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    let listeners: Vec<_> =
        (0..count).map(|_| std::net::TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

/// What a program prints on stdout, trimmed.
pub fn output(command: &mut Command) -> anyhow::Result<String> {
    let run = command.stdin(Stdio::null()).output();
    let run = run.with_context(|| format!("{command:?} cannot be started"))?;
    let said = String::from_utf8_lossy(&run.stderr);
    anyhow::ensure!(run.status.success(), "{command:?} failed, {}: {said}", run.status);
    Ok(String::from_utf8_lossy(&run.stdout).trim().to_string())
}
