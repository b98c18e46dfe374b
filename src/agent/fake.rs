//! For tests: a node in memory, served on a socket, and a client of it.

use std::future::pending;
use std::sync::Arc;

use crate::api::fake::{Fake, fake, listen};
use crate::client::{Client, Options};

pub async fn served() -> (Arc<Fake>, Client) {
    let (fake, api) = fake();
    let address = listen(api, pending()).await;
    (fake, Client::connect(vec![address], Options::default()).unwrap())
}
