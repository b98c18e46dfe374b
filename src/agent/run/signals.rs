//! Signals that are passed on to a program.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use futures::FutureExt as _;
use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind, signal};

use crate::agent::host::child::ENDING;

/// Those that a supervisor is sent for its program. From here on none of them ends this process. What was
/// ignored when it started, as by `nohup`, stays ignored, here and by the program.
const PASSED_ON: [Signal; 9] = [
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::TERM,
    Signal::USR1,
    Signal::USR2,
    Signal::WINCH,
    // From a terminal: the program is stopped, and what it holds is kept for it.
    Signal::TSTP,
    Signal::CONT,
];

pub struct Signals(Vec<(Signal, unix::Signal)>);

impl Signals {
    #[cfg(test)]
    pub fn none() -> Self {
        Signals(Vec::new())
    }

    pub fn listen() -> io::Result<Self> {
        let status = procfs::process::Process::myself().and_then(|process| process.status());
        let ignored = status.map_err(io::Error::other)?.sigign;
        let heeded = |kind: &Signal| ignored & (1 << (kind.as_raw() - 1)) == 0;
        let listen = |kind: Signal| Ok((kind, signal(SignalKind::from_raw(kind.as_raw()))?));
        PASSED_ON.into_iter().filter(heeded).map(listen).collect::<io::Result<_>>().map(Signals)
    }

    /// The next one. May be dropped and called again.
    pub async fn next(&mut self) -> Signal {
        poll_fn(|context| {
            for (kind, stream) in &mut self.0 {
                if let Poll::Ready(Some(())) = stream.poll_recv(context) {
                    return Poll::Ready(*kind);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Those that came already are over and done with.
    pub fn forget(&mut self) {
        while self.next().now_or_never().is_some() {}
    }

    /// The next one that asks for an end.
    pub async fn stop(&mut self) -> Signal {
        loop {
            let signal = self.next().await;
            if asks_for_an_end(signal) {
                return signal;
            }
        }
    }
}

/// What a program does about it is its own affair; one that is starting is not started anew after it.
pub fn asks_for_an_end(signal: Signal) -> bool {
    ENDING.contains(&signal)
}
