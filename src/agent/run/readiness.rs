//! Has a program begun to listen where it should?

use std::collections::BTreeSet;

use crate::agent::host::Seen;
use crate::agent::host::sockets::State;

/// On which of its ports a program must listen before it is said to be bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    All,
    Any,
    /// It is as soon as it is started.
    Started,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    Ready,
    /// Not yet.
    Waiting,
    /// Somebody else listens on one of its ports.
    Stranger {
        port: u16,
        pid: u32,
    },
}

/// A socket is the program's if a process of its has it open. One whose owner cannot be told is not:
/// saying that a stranger's port is bound would send it what is not its. Nor is it a stranger's: who had it
/// may have ended since and left it to a child.
pub fn stage(
    ports: &[u16],
    ready: Ready,
    is_the_programs: impl Fn(u32) -> bool,
    seen: &Seen,
) -> Stage {
    let mut listening = BTreeSet::new();
    for (socket, pids) in seen.sockets.iter().filter(|(s, _)| s.state == State::Listening) {
        if pids.iter().any(|pid| is_the_programs(*pid)) {
            listening.insert(socket.port);
        } else if let Some(pid) = pids.iter().find(|pid| seen.processes.lives(**pid))
            && ports.contains(&socket.port)
        {
            return Stage::Stranger { port: socket.port, pid: *pid };
        }
    }
    let mut ports = ports.iter();
    let is_ready = match ready {
        Ready::All => ports.all(|port| listening.contains(port)),
        Ready::Any => ports.len() == 0 || ports.any(|port| listening.contains(port)),
        Ready::Started => true,
    };
    if is_ready { Stage::Ready } else { Stage::Waiting }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Process;
    use crate::agent::host::sockets::Socket;

    fn stage_of(ready: Ready, sockets: &[(u16, State, u32)]) -> Stage {
        let socket = |&(port, state, pid): &(u16, State, u32)| {
            (Socket { port, state, udp: false, inode: 1 }, BTreeSet::from([pid]))
        };
        let process = |pid| Process { pid, ..Process::default() };
        let seen = Seen {
            sockets: sockets.iter().map(socket).collect(),
            processes: [50, 51, 90].map(process).into_iter().collect(),
            ..Seen::default()
        };
        stage(&[1, 2], ready, |pid| [50, 51].contains(&pid), &seen)
    }

    #[test]
    fn a_program_is_ready_when_its_processes_listen_on_its_ports() {
        let one = [(1, State::Listening, 50)];
        let both = [(1, State::Listening, 50), (2, State::Listening, 51)];
        for (ready, sockets, expected) in [
            (Ready::All, &one[..], Stage::Waiting),
            (Ready::All, &both[..], Stage::Ready),
            (Ready::Any, &one[..], Stage::Ready),
            (Ready::Any, &[][..], Stage::Waiting),
            (Ready::Any, &[(1, State::Otherwise, 50)][..], Stage::Waiting),
            (Ready::Started, &[][..], Stage::Ready),
        ] {
            assert_eq!(stage_of(ready, sockets), expected, "{ready:?} {sockets:?}");
        }
    }

    #[test]
    fn a_stranger_that_listens_is_named_and_never_taken_for_the_program() {
        let stranger = [(1, State::Listening, 50), (2, State::Listening, 90)];
        assert_eq!(stage_of(Ready::All, &stranger), Stage::Stranger { port: 2, pid: 90 });
        let elsewhere = [(9, State::Listening, 90)];
        assert_eq!(stage_of(Ready::All, &elsewhere), Stage::Waiting);
        let has_ended = [(1, State::Listening, 91), (2, State::Listening, 51)];
        assert_eq!(stage_of(Ready::All, &has_ended), Stage::Waiting);
    }
}
