//! A backup that was taken while all was used, restored as a new cluster.
//!
//! What the old cluster did after the backup is forgotten, so that names and ports come round again:
//! tokens must not. A holder of the old cluster that comes with its token is nobody to the new one.

use std::collections::BTreeMap;
use std::future::Future;

use portwarden::client::{Client, ClientError};
use portwarden::core::{Allocation, Millis, State};
use portwarden::proto::v1;

use crate::cluster::Cluster;
use crate::plan::AVAILABLE_WITHIN;
use crate::sim::{Broken, Sim};
use crate::workload::HOT;

const FIRST_ID: u64 = 101;
const NODES: u64 = 3;
const RESTORED: &str = "it is restored";

impl Sim {
    /// The last thing that a run does: the old cluster is gone after it.
    pub fn restore(&mut self, backup: &State) -> Result<(), Broken> {
        let old = self.witness.tables.reference().state().revision.0;
        self.begin_anew(backup.clone())?;
        let client = self.operator();
        let asked = client.clone();
        let listed = self.until_answered("a restored table", move || {
            let client = asked.clone();
            async move { client.list(v1::ListRequest::default()).await }
        })?;
        let held = |held: &Allocation| {
            let ports = held.ports.iter().map(|port| u32::from(port.number)).collect();
            (held.name().to_string(), ports)
        };
        let wanted: BTreeMap<String, Vec<u32>> =
            backup.allocations_after(None).map(|allocation| held(allocation)).collect();
        let ports = |held: &v1::Allocation| held.ports.iter().map(|port| port.number).collect();
        let found = listed.items.iter().map(|held| (held.name.clone(), ports(held))).collect();
        if wanted != found {
            return Err(format!("restore: the backup holds {wanted:?}, the new cluster {found:?}"));
        }
        let granted = self.grant(client)?;
        for held in listed.items.iter().chain(&granted) {
            if held.token <= old {
                return Err(format!(
                    "restore: {} has token {}, and the old cluster had come to revision {old}",
                    held.name, held.token
                ));
            }
        }
        Ok(())
    }

    /// The restored nodes run in place of all others.
    fn begin_anew(&mut self, backup: State) -> Result<(), Broken> {
        for host in (0..self.world.hosts()).filter(|host| *host != self.operator) {
            self.world.kill(host);
        }
        self.watches_over = false;
        let ids = FIRST_ID..FIRST_ID + NODES;
        self.cluster = Cluster::new(&mut self.world, &self.dir, ids, self.plan.settings.clone());
        let members: BTreeMap<_, _> =
            self.cluster.seats.iter().map(|seat| (seat.id, seat.peer())).collect();
        let seat = &self.cluster.seats[0];
        let (host, disk, dir) = (seat.host, seat.disk.clone(), seat.dir().to_path_buf());
        self.world.start(host, || {
            Box::pin(async move {
                let restored =
                    Cluster::restore(dir, FIRST_ID, disk, backup.anew(Millis(0)), members).await;
                restored.map_or_else(|why| why, |_| RESTORED.into())
            })
        });
        let exit = loop {
            if let Some(exit) = self.world.step().pop() {
                break exit;
            }
        };
        self.world.kill(host);
        if exit.why != RESTORED {
            return Err(format!("restore: {}", exit.why));
        }
        (0..self.cluster.seats.len()).for_each(|at| self.start(at));
        Ok(())
    }

    /// Asks until somebody answers.
    fn until_answered<T: 'static, F>(
        &mut self,
        what: &str,
        ask: impl Fn() -> F,
    ) -> Result<T, Broken>
    where
        F: Future<Output = Result<T, ClientError>> + 'static,
    {
        let began = self.now();
        loop {
            match self.operate(ask())? {
                Ok(answer) => return Ok(answer),
                Err(why) if self.now() - began > AVAILABLE_WITHIN => {
                    return Err(format!("restore: no answer to {what}: {why}"));
                }
                Err(_) => {}
            }
        }
    }

    /// A worker that is verified grants again, if it has a port left.
    fn grant(&mut self, client: Client) -> Result<Vec<v1::Allocation>, Broken> {
        let asked = client.clone();
        self.until_answered("a verification", move || {
            let client = asked.clone();
            async move { client.worker_verify(HOT).await }
        })?;
        let ports = Some(v1::port_request::Ports::Count(1));
        let claim = v1::Claim {
            name: "after-the-restore".into(),
            placement: Some(v1::claim::Placement::Worker(HOT.into())),
            ports: vec![v1::PortRequest { ports, ..Default::default() }],
            ..Default::default()
        };
        match self.operate(async move { client.allocate(vec![claim]).await })? {
            Ok(granted) => Ok(granted.allocations),
            Err(ClientError::Refused(_)) => Ok(Vec::new()),
            Err(why) => Err(format!("restore: no grant: {why}")),
        }
    }
}
