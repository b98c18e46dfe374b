//! Leases: the calls. [`Keeper`](super::Keeper) keeps them alive.

use std::time::Duration;

use super::call::methods;
use super::{Client, ClientError, Listing};
use crate::proto::v1;

impl Client {
    /// In doubt it is repeated: a lease that nobody knows of expires by itself. The holder counts
    /// its time from before this call; [`Keeper::grant`](super::Keeper::grant) does.
    pub async fn lease_grant(&self, ttl: Duration) -> Result<v1::GrantResponse, ClientError> {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
        self.call(methods::LEASE_GRANT, v1::GrantRequest { ttl_ms }).await
    }

    /// Ends a lease as if it had expired. `revoked` is false where it was gone already, also
    /// because an earlier attempt of this call did it.
    pub async fn lease_revoke(&self, id: u64) -> Result<v1::RevokeResponse, ClientError> {
        self.call(methods::LEASE_REVOKE, v1::RevokeRequest { id }).await
    }

    pub async fn lease_get(
        &self,
        id: u64,
        read: Option<v1::ReadOptions>,
    ) -> Result<v1::GetLeaseResponse, ClientError> {
        self.call(methods::LEASE_GET, v1::GetLeaseRequest { id, read }).await
    }

    /// All pages, in order of id; as [`Client::list`].
    pub async fn lease_list(
        &self,
        request: v1::ListLeasesRequest,
    ) -> Result<Listing<v1::Lease>, ClientError> {
        self.all_pages(async |page_token| {
            let request = v1::ListLeasesRequest { page_token, ..request.clone() };
            let page = self.call(methods::LEASE_LIST, request).await?;
            Ok((page.leases, page.next_page_token, page.revision))
        })
        .await
    }

    /// Moves an allocation to another lease; 0 takes it off its own. `version` 0 is unguarded.
    pub async fn attach(
        &self,
        name: &str,
        token: u64,
        version: u64,
        lease: u64,
    ) -> Result<v1::AttachResponse, ClientError> {
        let request = v1::AttachRequest { name: name.into(), token, version, lease };
        self.call(methods::ATTACH, request).await
    }
}
