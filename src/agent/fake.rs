//! For tests: a node in memory, served on a socket, and a client of it.

use std::future::pending;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::api::fake::{Fake, fake};
use crate::api::{Readiness, serve, tcp_incoming};
use crate::client::{Client, Options};

pub async fn served() -> (Arc<Fake>, Client) {
    let (fake, api) = fake();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let readiness = Readiness::new().await;
    readiness.set(true).await;
    tokio::spawn(serve(api, readiness, tcp_incoming(listener, 100), pending()));
    (fake, Client::connect(vec![address], Options::default()).unwrap())
}
