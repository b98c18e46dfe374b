//! For tests: a node in memory, served on a socket, and a client of it.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use crate::api::fake::{Fake, claim, fake, listen, spec};
use crate::client::{Client, Holding, Keeper, Options};
use crate::proto::v1;

pub async fn served() -> (Arc<Fake>, Client) {
    let (fake, api) = fake();
    let address = listen(api, pending()).await;
    (fake, Client::connect(vec![address], Options::default()).unwrap())
}

/// One with a worker `w` that an agent watches.
pub async fn node() -> (Arc<Fake>, Client) {
    let (fake, client) = served().await;
    let identity = v1::Identity { machine_id: "m".into(), boot_id: "b".into(), namespace: 7 };
    let watched = v1::WorkerSpec { identity: Some(identity), ..spec() };
    client.worker_register("w", watched).await.unwrap();
    (fake, client)
}

/// An allocation `b` there, on a lease of this time to live.
pub async fn granted(client: &Client, ttl: Duration) -> (Keeper, Holding, v1::Allocation) {
    let keeper = Keeper::start(client.clone());
    let lease = keeper.grant(ttl).await.unwrap();
    let leased = v1::Claim { lease: lease.id(), ..claim("b") };
    let held = client.allocate(vec![leased]).await.unwrap().allocations.remove(0);
    (keeper, lease, held)
}
