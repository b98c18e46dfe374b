//! What clients, watchers and the harness saw, in the order in which they saw it.
//!
//! A history is a file of JSON lines, one [`Record`] each, in real-time order: `at` is nanoseconds of
//! one clock. It begins with a [`Header`]. A call is an `Invoke` and, later, one record of its end:
//!
//! - `Ok`, `Refused`: the table's answer;
//! - `Fail`: surely not done;
//! - `Unknown`, or no end at all: it may have been done, or may yet be.

use std::collections::BTreeMap;
use std::io::{BufRead, BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use portwarden::api::meaning::{Request, Response};
use portwarden::proto::v1;
use serde::{Deserialize, Serialize};

pub type Nanos = u64;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "snake_case")]
pub enum Record {
    Header(Header),
    Invoke {
        at: Nanos,
        op: u64,
        process: u32,
        /// The client may send it again when in doubt: it may be done more than once.
        #[serde(default)]
        repeats: bool,
        request: Request,
    },
    Ok {
        at: Nanos,
        op: u64,
        response: Response,
    },
    Refused {
        at: Nanos,
        op: u64,
        code: i32,
        message: String,
    },
    Fail {
        at: Nanos,
        op: u64,
        why: String,
    },
    Unknown {
        at: Nanos,
        op: u64,
        why: String,
    },
    /// A stream of changes begins with revision `from`. Another one of the same watcher ends it.
    WatchBegins {
        at: Nanos,
        watcher: u32,
        endpoint: String,
        from: u64,
        /// As asked for: only allocations of this worker.
        #[serde(default)]
        worker: String,
    },
    Watched {
        at: Nanos,
        watcher: u32,
        message: v1::WatchResponse,
    },
    /// A process of the instance listens on its port on the worker's host, or does so no more.
    Listens {
        at: Nanos,
        name: String,
        token: u64,
        worker: String,
        port: u32,
    },
    Closed {
        at: Nanos,
        name: String,
        token: u64,
        worker: String,
        port: u32,
    },
    /// What one node's own copy of the table was at a revision.
    Copy {
        at: Nanos,
        node: u64,
        revision: u64,
        digest: String,
    },
    /// A node ended because its table differs from the others'.
    Differs {
        at: Nanos,
        node: u64,
        why: String,
    },
    /// A node ended, and nobody had told it to.
    Ended {
        at: Nanos,
        node: u64,
        code: i32,
    },
    /// What was done to the cluster; for people.
    Fault {
        at: Nanos,
        what: String,
    },
    /// From now on nothing is done to it.
    Healed {
        at: Nanos,
    },
    /// Every node serves, and reads and writes go through.
    Available {
        at: Nanos,
    },
    /// Everything that anybody held was given back: the table must be empty from now on.
    Emptied {
        at: Nanos,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// How to make it again.
    pub command: String,
    pub seed: u64,
    /// The table was empty when it began, and nobody else wrote to it.
    pub complete: bool,
    /// The servers' default.
    pub confirm_within_ms: u64,
    /// Longest time from `Healed` to `Available`.
    pub available_within_ms: u64,
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "almost all are Ok")]
pub enum End {
    Ok(Response),
    Refused { code: i32, message: String },
    Fail,
    Unknown,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Op {
    pub id: u64,
    pub process: u32,
    pub repeats: bool,
    pub request: Request,
    pub invoked: Nanos,
    /// [`Nanos::MAX`] where no answer came.
    pub returned: Nanos,
    pub end: End,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Stream {
    pub watcher: u32,
    pub endpoint: String,
    pub from: u64,
    pub worker: String,
    /// With the place in the history of each.
    pub messages: Vec<(Nanos, v1::WatchResponse)>,
}

/// A history, sorted out.
#[derive(Debug, Clone, PartialEq)]
pub struct History {
    pub header: Header,
    /// In the order of their invocations.
    pub ops: Vec<Op>,
    pub streams: Vec<Stream>,
    /// All records, as they came.
    pub records: Vec<Record>,
}

impl History {
    pub fn read(path: &Path) -> Result<History, String> {
        let file = std::fs::File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut records = Vec::new();
        for (at, line) in std::io::BufReader::new(file).lines().enumerate() {
            let line = line.map_err(|e| format!("{}: {e}", path.display()))?;
            let record = serde_json::from_str(&line)
                .map_err(|e| format!("{}:{}: {e}", path.display(), at + 1))?;
            records.push(record);
        }
        History::new(records)
    }

    pub fn new(records: Vec<Record>) -> Result<History, String> {
        let Some(Record::Header(header)) = records.first() else {
            return Err("a history begins with its header".into());
        };
        let header = header.clone();
        let mut ops: Vec<Op> = Vec::new();
        let mut places = BTreeMap::new();
        let mut streams: Vec<Stream> = Vec::new();
        let mut open: BTreeMap<u32, usize> = BTreeMap::new();
        for record in &records {
            match record.clone() {
                Record::Invoke { at, op, process, repeats, request } => {
                    if places.insert(op, ops.len()).is_some() {
                        return Err(format!("op {op} is invoked twice"));
                    }
                    let (returned, end) = (Nanos::MAX, End::Unknown);
                    ops.push(Op { id: op, process, repeats, request, invoked: at, returned, end });
                }
                Record::Ok { at, op, response } => {
                    finish(&mut ops, &places, op, at, End::Ok(response))?;
                }
                Record::Refused { at, op, code, message } => {
                    finish(&mut ops, &places, op, at, End::Refused { code, message })?;
                }
                Record::Fail { at, op, .. } => finish(&mut ops, &places, op, at, End::Fail)?,
                Record::WatchBegins { watcher, endpoint, from, worker, .. } => {
                    open.insert(watcher, streams.len());
                    streams.push(Stream { watcher, endpoint, from, worker, messages: Vec::new() });
                }
                Record::Watched { at, watcher, message } => {
                    let stream = open.get(&watcher).ok_or("a message of no stream")?;
                    streams[*stream].messages.push((at, message));
                }
                _ => {}
            }
        }
        Ok(History { header, ops, streams, records })
    }
}

fn finish(
    ops: &mut [Op],
    places: &BTreeMap<u64, usize>,
    id: u64,
    at: Nanos,
    end: End,
) -> Result<(), String> {
    let place = places.get(&id).ok_or_else(|| format!("op {id} ends and never began"))?;
    let op = &mut ops[*place];
    if op.returned != Nanos::MAX {
        return Err(format!("op {id} ends twice"));
    }
    (op.returned, op.end) = (at, end);
    Ok(())
}

/// Writes a history while it happens.
pub struct Recorder {
    began: Instant,
    out: Mutex<Out>,
}

struct Out {
    file: BufWriter<std::fs::File>,
    next_op: u64,
}

impl Recorder {
    pub fn create(path: &Path, header: Header) -> std::io::Result<Recorder> {
        let file = BufWriter::new(std::fs::File::create(path)?);
        let out = Mutex::new(Out { file, next_op: 1 });
        let recorder = Recorder { began: Instant::now(), out };
        recorder.put(|_| Record::Header(header));
        Ok(recorder)
    }

    fn out(&self) -> std::sync::MutexGuard<'_, Out> {
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time is taken under the lock, so that lines and times have one order.
    pub fn put(&self, record: impl FnOnce(Nanos) -> Record) {
        let mut out = self.out();
        let at = self.began.elapsed().as_nanos() as Nanos;
        out.write(&record(at));
    }

    pub fn invoke(&self, process: u32, repeats: bool, request: Request) -> u64 {
        let mut out = self.out();
        let op = out.next_op;
        out.next_op += 1;
        let at = self.began.elapsed().as_nanos() as Nanos;
        out.write(&Record::Invoke { at, op, process, repeats, request });
        op
    }

    pub fn fault(&self, what: impl Into<String>) {
        let what = what.into();
        self.put(|at| Record::Fault { at, what });
    }

    pub fn flush(&self) {
        let flushed = self.out().file.flush();
        flushed.expect("the history can be written");
    }
}

impl Out {
    fn write(&mut self, record: &Record) {
        serde_json::to_writer(&mut self.file, record).expect("the history can be written");
        self.file.write_all(b"\n").expect("the history can be written");
    }
}
