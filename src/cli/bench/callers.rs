//! Callers of a portwarden cluster, one kind for each workload.

use std::sync::Arc;

use super::load::{Caller, Done};
use crate::client::session::{Answer, Command, release};
use crate::client::{Client, Session};
use crate::proto::v1;

/// Workers that claims go to in turns, once they were granted; where there are none, each stays where it
/// is.
#[derive(Clone)]
pub struct Turns {
    workers: Arc<[String]>,
    next: usize,
}

impl Turns {
    pub fn new(workers: Arc<[String]>, first: usize) -> Turns {
        Turns { workers, next: first }
    }

    fn place(&mut self, claims: &mut [v1::Claim]) {
        for claim in claims {
            let Some(worker) = self.workers.get(self.next % self.workers.len().max(1)) else {
                return;
            };
            claim.placement = Some(v1::claim::Placement::Worker(worker.clone()));
            self.next += 1;
        }
    }
}

/// Allocates one instance, or a gang of so many, and releases it again.
pub struct Pairs {
    pub client: Client,
    pub claims: Vec<v1::Claim>,
    pub turns: Turns,
    pub held: Vec<v1::Allocation>,
}

#[tonic::async_trait]
impl Caller for Pairs {
    async fn call(&mut self) -> Result<Done, String> {
        if let Some(held) = self.held.pop() {
            let released = self.client.release(&held.name, held.token).await;
            return released.map(|_| Done::one("release")).map_err(|e| e.to_string());
        }
        let granted = self.client.allocate(self.claims.clone()).await.map_err(|e| e.to_string())?;
        self.turns.place(&mut self.claims);
        self.held = granted.allocations;
        let ports = self.held.iter().map(|held| held.ports.len() as u64).sum();
        Ok(Done { kind: "allocate", operations: self.claims.len() as u64, ports })
    }
}

/// The same over a session: a batch of commands, each a claim of its own or a gang, under way at once;
/// then their releases.
pub struct Batches {
    pub session: Session,
    pub gangs: Vec<Vec<v1::Claim>>,
    pub turns: Turns,
    pub held: Vec<v1::Allocation>,
}

#[tonic::async_trait]
impl Caller for Batches {
    async fn call(&mut self) -> Result<Done, String> {
        let releasing = !self.held.is_empty();
        let operations = match releasing {
            true => self.held.len(),
            false => self.gangs.iter().map(Vec::len).sum(),
        };
        let commands: Vec<Command> = match releasing {
            true => self.held.drain(..).map(|held| release(&held.name, held.token)).collect(),
            false => {
                let allocate =
                    |claims| Command::Allocate(v1::AllocateRequest { claims, dry_run: false });
                self.gangs.iter().cloned().map(allocate).collect()
            }
        };
        let mut failed = None;
        for answer in self.session.all(commands).await {
            match answer {
                Ok(Answer::Allocate(granted)) => self.held.extend(granted.allocations),
                Ok(_) => {}
                Err(error) => failed = Some(error.to_string()),
            }
        }
        let ports = self.held.iter().map(|held| held.ports.len() as u64).sum();
        let kind = if releasing { "release" } else { "allocate" };
        if !releasing && failed.is_none() {
            self.gangs.iter_mut().for_each(|claims| self.turns.place(claims));
        }
        failed.map_or(Ok(Done { kind, operations: operations as u64, ports }), Err)
    }
}

/// Reads what one instance holds.
pub struct Reads {
    pub client: Client,
    pub name: String,
    pub stale: bool,
}

#[tonic::async_trait]
impl Caller for Reads {
    async fn call(&mut self) -> Result<Done, String> {
        let read = v1::ReadOptions { stale: self.stale, min_revision: 0 };
        let got = self.client.get(&self.name, Some(read)).await;
        got.map(|_| Done::one("get")).map_err(|e| e.to_string())
    }
}

/// The same on a session.
pub struct SessionReads {
    pub session: Session,
    pub name: String,
}

#[tonic::async_trait]
impl Caller for SessionReads {
    async fn call(&mut self) -> Result<Done, String> {
        let got = self.session.get(&self.name).await;
        got.map(|_| Done::one("get")).map_err(|e| e.to_string())
    }
}
