//! `portwarden.v1.Leases`: not yet served.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::dispatch::Api;
use super::errors;
use crate::proto::v1;

#[tonic::async_trait]
impl v1::leases_server::Leases for Api {
    async fn grant(
        &self,
        _: Request<v1::GrantRequest>,
    ) -> Result<Response<v1::GrantResponse>, Status> {
        Err(errors::unimplemented("Grant: leases are"))
    }

    type KeepAliveStream =
        Pin<Box<dyn Stream<Item = Result<v1::KeepAliveResponse, Status>> + Send>>;

    async fn keep_alive(
        &self,
        _: Request<Streaming<v1::KeepAliveRequest>>,
    ) -> Result<Response<Self::KeepAliveStream>, Status> {
        Err(errors::unimplemented("KeepAlive: leases are"))
    }

    async fn revoke(
        &self,
        _: Request<v1::RevokeRequest>,
    ) -> Result<Response<v1::RevokeResponse>, Status> {
        Err(errors::unimplemented("Revoke: leases are"))
    }

    async fn list(
        &self,
        _: Request<v1::ListLeasesRequest>,
    ) -> Result<Response<v1::ListLeasesResponse>, Status> {
        Err(errors::unimplemented("List: leases are"))
    }
}
