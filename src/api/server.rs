//! The listener for clients: the four services, health and reflection.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::Stream;
use tonic::transport::Server;
use tonic::transport::server::Connected;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tonic_reflection::pb::v1::server_reflection_server::SERVICE_NAME as REFLECTION;

use super::dispatch::Api;
use crate::proto::v1::allocator_server::AllocatorServer;
use crate::proto::v1::cluster_server::ClusterServer;
use crate::proto::v1::leases_server::LeasesServer;
use crate::proto::v1::workers_server::WorkersServer;
use crate::proto::{DESCRIPTORS, v1};

/// Largest request. The largest that is within all limits takes two thirds of it; what is read may
/// take a hundred times the memory (an empty claim is two bytes), so more is not even read.
pub const REQUEST_MAX_BYTES: usize = 1 << 20;
/// Largest answer.
pub const ANSWER_MAX_BYTES: usize = 4 << 20;
/// Calls at a time on one connection.
pub const STREAMS_PER_CONNECTION_MAX: u32 = 1024;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// What is served here besides health and reflection; the peer protocol has a listener of its own.
const SERVICES: [&str; 4] = [
    v1::allocator_server::SERVICE_NAME,
    v1::workers_server::SERVICE_NAME,
    v1::leases_server::SERVICE_NAME,
    v1::cluster_server::SERVICE_NAME,
];

/// Tells callers of `grpc.health.v1` whether this node serves. A clone speaks for the same server;
/// until it is told otherwise, the node does not serve.
#[derive(Clone)]
pub struct Readiness(HealthReporter);

impl Readiness {
    pub async fn new() -> Self {
        let readiness = Readiness(HealthReporter::new());
        readiness.set(false).await;
        readiness
    }

    /// For the server as a whole and for each service.
    pub async fn set(&self, ready: bool) {
        let status = if ready { ServingStatus::Serving } else { ServingStatus::NotServing };
        for service in SERVICES.into_iter().chain([""]) {
            self.0.set_service_status(service, status).await;
        }
    }
}

/// Serves until `shutdown` resolves and the calls then in flight have ended.
pub async fn serve<IO, IE>(
    api: Api,
    readiness: Readiness,
    incoming: impl Stream<Item = Result<IO, IE>>,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()>
where
    IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    IE: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
    let reflection = SERVICES
        .into_iter()
        .chain([tonic_health::pb::health_server::SERVICE_NAME, REFLECTION])
        .fold(reflection, |builder, service| builder.with_service_name(service))
        .build_v1()
        .map_err(io::Error::other)?;
    let health = HealthServer::new(HealthService::from_health_reporter(readiness.0));
    macro_rules! bounded {
        ($server:ident) => {
            $server::new(api.clone())
                .max_decoding_message_size(REQUEST_MAX_BYTES)
                .max_encoding_message_size(ANSWER_MAX_BYTES)
        };
    }
    Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        // All that a client has under way it may give up at once; h2's own limit is 20.
        .http2_max_pending_accept_reset_streams(Some(STREAMS_PER_CONNECTION_MAX as usize))
        .concurrency_limit_per_connection(STREAMS_PER_CONNECTION_MAX as usize)
        .add_service(health)
        .add_service(reflection)
        .add_service(bounded!(AllocatorServer))
        .add_service(bounded!(WorkersServer))
        .add_service(bounded!(LeasesServer))
        .add_service(bounded!(ClusterServer))
        .serve_with_incoming_shutdown(incoming, shutdown)
        .await
        .map_err(io::Error::other)
}
