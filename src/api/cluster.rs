//! `portwarden.v1.Cluster`: what this node knows of the Raft group. Every node answers by itself.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::dispatch::Api;
use super::errors;
use crate::node::{MemberReport, StatusReport};
use crate::proto::v1;

fn member(report: MemberReport) -> v1::Member {
    let MemberReport { id, role, state, endpoint, peer_endpoint, applied, lag } = report;
    v1::Member {
        id,
        role: role.to_string(),
        state: state.to_string(),
        endpoint,
        peer_endpoint,
        applied,
        lag,
    }
}

fn status(report: StatusReport) -> v1::StatusResponse {
    v1::StatusResponse {
        cluster_id: report.cluster_id,
        leader: report.leader.unwrap_or(0),
        revision: report.revision,
        members: report.members.into_iter().map(member).collect(),
        problems: report.problems,
        node: report.node,
        term: report.term,
        workers: report.workers,
        allocations: report.allocations,
        feature_level: report.feature_level,
        version: env!("CARGO_PKG_VERSION").to_string(),
    }
}

fn no_change<T>(what: &str) -> Result<Response<T>, Status> {
    Err(errors::unimplemented(&format!("{what}: changes of the membership are")))
}

#[tonic::async_trait]
impl v1::cluster_server::Cluster for Api {
    async fn status(
        &self,
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let node = &self.inner.node;
        self.observed("/portwarden.v1.Cluster/Status", request.metadata(), |deadline| async move {
            Ok(status(node.status(deadline).await))
        })
        .await
    }

    async fn list_members(
        &self,
        request: Request<v1::ListMembersRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        let node = &self.inner.node;
        let path = "/portwarden.v1.Cluster/ListMembers";
        self.observed(path, request.metadata(), |deadline| async move {
            let report = node.status(deadline).await;
            let members = report.members.into_iter().map(member).collect();
            Ok(v1::ListMembersResponse { members })
        })
        .await
    }

    async fn add_member(
        &self,
        _: Request<v1::AddMemberRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        no_change("AddMember")
    }

    async fn promote_member(
        &self,
        _: Request<v1::MemberRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        no_change("PromoteMember")
    }

    async fn remove_member(
        &self,
        _: Request<v1::MemberRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        no_change("RemoveMember")
    }

    async fn transfer_leader(
        &self,
        _: Request<v1::MemberRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        Err(errors::unimplemented("TransferLeader: handing over the lead on request is"))
    }

    type SnapshotStream = Pin<Box<dyn Stream<Item = Result<v1::SnapshotChunk, Status>> + Send>>;

    async fn snapshot(
        &self,
        _: Request<v1::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        Err(errors::unimplemented("Snapshot: backups over the API are"))
    }
}
