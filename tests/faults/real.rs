//! Real workers: hosts with an agent, and instances that really listen, under `portwarden run`.
//!
//! An instance is this test binary again, told by its environment to bind the port that it was given
//! ([`listen`]). It then opens a connection to the harness and says who it is; that connection ends
//! when the process does, however that comes. So the history knows who listened where and when, from
//! a little after the bind to a little after the end.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::history::{Record, Recorder};
use crate::rig::net::{Host, Net};
use crate::workload::REAL_WORKERS;

/// Where an instance finds its harness.
const SOCKET: &str = "PORTWARDEN_FAULTS_SOCKET";
const SLOTS: usize = 5;
/// Few more than instances, so that ports come round quickly.
const RANGE: &str = "service=20000-20011";
/// How long a supervisor may take to end when it is asked to.
const STOP_MAX: Duration = Duration::from_secs(15);

pub struct Worker {
    pub name: String,
    pub host: Host,
    agent: Option<Child>,
}

pub struct Site {
    pub workers: Vec<Worker>,
    binary: PathBuf,
    endpoints: String,
    dir: PathBuf,
    recorder: Arc<Recorder>,
    stop: Arc<AtomicBool>,
    slots: Vec<JoinHandle<()>>,
}

pub fn names() -> Vec<String> {
    REAL_WORKERS.map(String::from).to_vec()
}

impl Site {
    /// Hosts with agents; no instance yet.
    pub fn build(
        net: &mut Net,
        dir: &Path,
        binary: &Path,
        endpoints: &[String],
        recorder: Arc<Recorder>,
    ) -> Result<Site, String> {
        let mut workers = Vec::new();
        for name in names() {
            let host = net.host(&name)?;
            workers.push(Worker { name, host, agent: None });
        }
        let socket = std::path::absolute(dir.join("socket")).map_err(|e| e.to_string())?;
        let listener = UnixListener::bind(&socket).map_err(|e| e.to_string())?;
        let hears = recorder.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let recorder = hears.clone();
                std::thread::spawn(move || hear(stream, &recorder));
            }
        });
        Ok(Site {
            workers,
            binary: binary.into(),
            endpoints: endpoints.join(","),
            dir: dir.into(),
            recorder,
            stop: Arc::default(),
            slots: Vec::new(),
        })
    }

    pub fn start_agent(&mut self, at: usize) {
        let log = |name: &str| {
            let path = self.dir.join(format!("{name}-agent.log"));
            std::fs::File::options().create(true).append(true).open(path).expect("a log file")
        };
        let worker = &self.workers[at];
        let mut command = Command::new(&self.binary);
        command
            .args(["agent", "--endpoints", &self.endpoints, "--worker", &worker.name])
            .args(["--address", &worker.host.address.to_string(), "--range", RANGE])
            .args(["--label", "kind=real", "--interval", "1s"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log(&worker.name));
        worker.host.run_in(&mut command);
        self.workers[at].agent = Some(command.spawn().expect("the agent starts"));
    }

    /// Agents that ended by themselves are started again, as a service manager would.
    pub fn look_after(&mut self) {
        for at in 0..self.workers.len() {
            let ended = match &mut self.workers[at].agent {
                Some(agent) => agent.try_wait().ok().flatten(),
                None => continue,
            };
            if let Some(status) = ended {
                self.recorder
                    .fault(format!("the agent of {} ended: {status}", self.workers[at].name));
                self.start_agent(at);
            }
        }
    }

    pub fn kill_agent(&mut self, at: usize) {
        if let Some(mut agent) = self.workers[at].agent.take() {
            let _ = agent.kill(); // it may have ended by itself
            let _ = agent.wait();
        }
    }

    /// Instances come and go on every worker until [`Site::stop`].
    pub fn start_instances(&mut self, seed: u64) {
        for (number, worker) in self.workers.iter().enumerate() {
            for slot in 0..SLOTS {
                let mut slot = Slot {
                    name: format!("r{number}-{slot}"),
                    worker: worker.name.clone(),
                    host: worker.host.clone(),
                    binary: self.binary.clone(),
                    endpoints: self.endpoints.clone(),
                    dir: self.dir.clone(),
                    rng: StdRng::seed_from_u64(seed ^ (number * 100 + slot) as u64),
                    stop: self.stop.clone(),
                };
                self.slots.push(std::thread::spawn(move || slot.run()));
            }
        }
    }

    /// Every instance is asked to end, and has ended.
    pub fn stop_instances(&mut self) {
        self.stop.store(true, Ordering::Release);
        for slot in self.slots.drain(..) {
            let _ = slot.join(); // a slot that panicked has said so
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.stop_instances();
        for at in 0..self.workers.len() {
            self.kill_agent(at);
        }
    }
}

/// One place for an instance, on a thread of its own.
struct Slot {
    name: String,
    worker: String,
    host: Host,
    binary: PathBuf,
    endpoints: String,
    dir: PathBuf,
    rng: StdRng,
    stop: Arc<AtomicBool>,
}

impl Slot {
    fn run(&mut self) {
        for round in 0.. {
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let mut supervisor = self.start(round);
            let lives = Duration::from_millis(self.rng.random_range(500..8_000));
            let began = Instant::now();
            while began.elapsed() < lives && !self.stop.load(Ordering::Acquire) {
                if let Ok(Some(_)) = supervisor.try_wait() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            match self.rng.random_range(0..3) {
                0 => drop(supervisor.kill()), // the kernel ends its program too
                _ => self.ask_to_end(&mut supervisor),
            }
            let _ = supervisor.wait();
            std::thread::sleep(Duration::from_millis(self.rng.random_range(0..500)));
        }
    }

    /// `portwarden run` over this binary.
    fn start(&mut self, round: u32) -> Child {
        let lease = ["2s", "5s"][self.rng.random_range(0..2)];
        let name = match self.rng.random_range(0..3) {
            0 => self.name.clone(), // the same one again
            _ => format!("{}-{round}", self.name),
        };
        let log = self.dir.join(format!("{}.log", self.name));
        let log = std::fs::File::options().create(true).append(true).open(log);
        let program = std::env::current_exe().expect("this program");
        let mut command = Command::new(&self.binary);
        command
            .args(["run", &name, "--endpoints", &self.endpoints, "--worker", &self.worker])
            .args(["--ports", "1", "--lease-ttl", lease, "--start-timeout", "20s"])
            .args(["--confirm-within", "15s", "--timeout", "8s", "--stop-timeout", "2s", "--"])
            .arg(program)
            .args(["an_instance_listens", "--exact", "--ignored", "--nocapture"])
            .env(SOCKET, std::path::absolute(self.dir.join("socket")).expect("a path"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("a log file"));
        self.host.run_in(&mut command);
        command.spawn().expect("the supervisor starts")
    }

    fn ask_to_end(&self, supervisor: &mut Child) {
        // SAFETY: a system call; the process is a child that was not waited for.
        unsafe { libc::kill(supervisor.id() as libc::pid_t, libc::SIGTERM) };
        let asked = Instant::now();
        while asked.elapsed() < STOP_MAX {
            if let Ok(Some(_)) = supervisor.try_wait() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = supervisor.kill(); // it may have ended just now
    }
}

/// One instance's connection, from its word to its end.
fn hear(stream: UnixStream, recorder: &Recorder) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).is_err() {
        return;
    }
    let words: Vec<_> = line.split_whitespace().map(String::from).collect();
    let [name, token, worker, port] = words.as_slice() else { return };
    let (Ok(token), Ok(port)) = (token.parse(), port.parse()) else { return };
    let (name, worker) = (name.clone(), worker.clone());
    recorder.put(|at| Record::Listens {
        at,
        name: name.clone(),
        token,
        worker: worker.clone(),
        port,
    });
    let _ = reader.read_to_end(&mut Vec::new()); // until it is gone
    recorder.put(|at| Record::Closed { at, name, token, worker, port });
}

/// What an instance does. Ends with an error where the port is in use; else it is ended.
pub fn listen() {
    let told = |name: &str| std::env::var(name).unwrap_or_default();
    let port = told("PORT");
    let listener = match TcpListener::bind(format!("0.0.0.0:{port}")) {
        Ok(listener) => listener,
        Err(why) => {
            eprintln!("port {port}: {why}");
            std::process::exit(98);
        }
    };
    let mut harness = UnixStream::connect(told(SOCKET)).expect("the harness");
    let (name, token) = (told("PORTWARDEN_NAME"), told("PORTWARDEN_TOKEN"));
    let said = writeln!(harness, "{name} {token} {} {port}", told("PORTWARDEN_WORKER"));
    said.expect("the harness listens");
    for connection in listener.incoming() {
        drop(connection);
    }
}
