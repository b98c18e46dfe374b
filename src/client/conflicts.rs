//! The loop of a start: a port that something else occupies is reported and swapped for the next
//! one, until the instance has started or there is no other.

use std::fmt;

use super::{Client, ClientError};
use crate::proto::v1;

/// What came of one try to start on the ports of an allocation.
pub enum Try<T> {
    Started(T),
    /// Binding it failed with "address in use": nothing else counts as a conflict.
    InUse {
        port: u32,
        why: String,
    },
}

/// `E`: what the start itself may fail with.
#[derive(Debug, thiserror::Error)]
pub enum StartError<E> {
    #[error(transparent)]
    Start(E),
    #[error(transparent)]
    Call(#[from] ClientError),
    #[error(transparent)]
    NoPortLeft(Box<NoPortLeft>),
}

/// Each port that was tried, and why there is no other.
#[derive(Debug)]
pub struct NoPortLeft {
    pub name: String,
    pub tried: Vec<(u32, String)>,
    pub reason: String,
    /// The allocation is gone; else it is there, with another port that was not tried.
    pub reclaimed: bool,
}

impl std::error::Error for NoPortLeft {}

impl fmt::Display for NoPortLeft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; tried", self.name, self.reason)?;
        let mut between = "";
        for (port, why) in &self.tried {
            write!(f, "{between} {port} ({why})")?;
            between = ",";
        }
        Ok(())
    }
}

impl Client {
    /// Tries to start on the ports of an allocation. After a conflict `start` is called anew with
    /// the allocation as it is then, `retries` times at most. Returns it with what `start` gave.
    ///
    /// Where `start` fails or a call does, the allocation is as it was last seen by `start`, or one
    /// swap further: the caller releases it.
    pub async fn start_on<T, E>(
        &self,
        mut held: v1::Allocation,
        retries: u32,
        mut start: impl AsyncFnMut(&v1::Allocation) -> Result<Try<T>, E>,
    ) -> Result<(v1::Allocation, T), StartError<E>> {
        let mut tried = Vec::new();
        loop {
            let (port, why) = match start(&held).await.map_err(StartError::Start)? {
                Try::Started(started) => return Ok((held, started)),
                Try::InUse { port, why } => (port, why),
            };
            tried.push((port, why));
            // The last one too: it must not be given to the next one who asks.
            let answer = self.report_conflict(&held.name, held.token, held.version, port).await?;
            let reclaimed = answer.reclaimed;
            let reason = match reclaimed {
                true => answer.reason,
                false if tried.len() > retries as usize => {
                    format!("no port was free in {retries} retries")
                }
                // What lingered meanwhile is off its lease: it is to be confirmed on that.
                false => {
                    let lease = held.lease;
                    held = v1::Allocation { lease, ..answer.allocation.unwrap_or_default() };
                    continue;
                }
            };
            let no_port_left = NoPortLeft { name: held.name, tried, reason, reclaimed };
            return Err(StartError::NoPortLeft(Box::new(no_port_left)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_lists_each_port_and_why() {
        let in_use = |port| (port, "TCP 0.0.0.0: address in use".to_string());
        let error = NoPortLeft {
            name: "a".into(),
            tried: vec![in_use(40000), in_use(40001)],
            reason: "range service has 0 of 2 ports free".into(),
            reclaimed: true,
        };
        assert_eq!(
            error.to_string(),
            "a: range service has 0 of 2 ports free; tried 40000 (TCP 0.0.0.0: address in use), \
             40001 (TCP 0.0.0.0: address in use)"
        );
    }
}
