//! `portwarden.v1.Cluster`: what this node knows of the Raft group, answered by every node itself, and
//! changes of its membership, made by the leader.

use std::future::ready;

use futures::StreamExt as _;
use futures::stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::address::check_host_port;
use super::dispatch::{Api, Failure, Method, Responses};
use super::errors;
use crate::core::Invalid;
use crate::node::members::{MemberChange, NotChanged};
use crate::node::{Deadline, MemberReport, StatusReport};
use crate::proto::v1;

fn member(report: MemberReport) -> v1::Member {
    let MemberReport { id, role, state, endpoint, peer_endpoint, applied, lag, version, pending } =
        report;
    v1::Member {
        id,
        role: role.to_string(),
        state: state.to_string(),
        endpoint,
        peer_endpoint,
        applied,
        lag,
        version,
        pending,
    }
}

fn status(report: StatusReport) -> v1::StatusResponse {
    v1::StatusResponse {
        cluster_id: report.cluster_id,
        leader: report.leader.unwrap_or(0),
        revision: report.revision,
        members: report.members.into_iter().map(member).collect(),
        problems: report.problems,
        table_problems: report.table_problems,
        node: report.node,
        term: report.term,
        workers: report.workers,
        allocations: report.allocations,
        feature_level: report.feature_level,
        version: env!("CARGO_PKG_VERSION").to_string(),
    }
}

/// A change of the membership, answered with what it is then.
macro_rules! member_change {
    ($name:ident, $request:ty, $path:literal, $change:expr) => {
        pub(super) struct $name;

        impl Method for $name {
            type Request = $request;
            type Response = v1::ListMembersResponse;
            type Parsed = MemberChange;
            const PATH: &'static str = concat!("/portwarden.v1.Cluster/", $path);
            const WRITES: bool = true;

            fn parse(request: &$request) -> Result<MemberChange, Status> {
                if request.id == 0 {
                    return Err(errors::invalid(Invalid::new("id", 0, "1 or more")));
                }
                let change: fn(&$request) -> Result<MemberChange, Status> = $change;
                change(request)
            }

            async fn run(
                api: &Api,
                change: &MemberChange,
                deadline: Deadline,
            ) -> Result<v1::ListMembersResponse, Failure> {
                self::change(api, change.clone(), deadline).await?;
                Ok(members(api.inner.node.status(deadline).await))
            }
        }
    };
}

member_change!(AddMember, v1::AddMemberRequest, "AddMember", |request| {
    Ok(MemberChange::Add {
        id: request.id,
        peer: address("peer", &request.peer)?,
        client: address("client", &request.client)?,
        incarnation: String::new(),
    })
});
member_change!(PromoteMember, v1::MemberRequest, "PromoteMember", |request| {
    Ok(MemberChange::Promote { id: request.id })
});
member_change!(RemoveMember, v1::RemoveMemberRequest, "RemoveMember", |request| {
    Ok(MemberChange::Remove { id: request.id, force: request.force })
});
member_change!(TransferLeader, v1::MemberRequest, "TransferLeader", |request| {
    Ok(MemberChange::Transfer { id: request.id })
});

pub(super) struct SetFeatureLevel;

impl Method for SetFeatureLevel {
    type Request = v1::SetFeatureLevelRequest;
    type Response = v1::SetFeatureLevelResponse;
    type Parsed = u32;
    const PATH: &'static str = "/portwarden.v1.Cluster/SetFeatureLevel";
    const WRITES: bool = true;

    fn parse(request: &v1::SetFeatureLevelRequest) -> Result<u32, Status> {
        match request.level {
            0 => Err(errors::invalid(Invalid::new("level", 0, "1 or more"))),
            level => Ok(level),
        }
    }

    async fn run(
        api: &Api,
        level: &u32,
        deadline: Deadline,
    ) -> Result<v1::SetFeatureLevelResponse, Failure> {
        change(api, MemberChange::FeatureLevel { level: *level }, deadline).await?;
        Ok(v1::SetFeatureLevelResponse { feature_level: *level })
    }
}

fn address(field: &str, text: &str) -> Result<String, Status> {
    check_host_port(field, text).map_err(errors::invalid)?;
    Ok(text.into())
}

async fn change(api: &Api, asked: MemberChange, deadline: Deadline) -> Result<(), Failure> {
    match api.inner.node.change_members(asked, deadline).await {
        Ok(()) => Ok(()),
        Err(NotChanged::Call(error)) => Err(Failure::Call(error)),
        Err(NotChanged::Refused(why)) => Err(Failure::Answer(errors::refusal(why))),
        Err(why) => Err(Failure::Answer(errors::membership(&why))),
    }
}

fn members(report: StatusReport) -> v1::ListMembersResponse {
    v1::ListMembersResponse { members: report.members.into_iter().map(member).collect() }
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
        let endpoints_only = request.get_ref().endpoints_only;
        self.observed(path, request.metadata(), |deadline| async move {
            Ok(match endpoints_only {
                true => members(node.membership()),
                false => members(node.status(deadline).await),
            })
        })
        .await
    }

    async fn add_member(
        &self,
        request: Request<v1::AddMemberRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        self.serve_unary::<AddMember>(request).await
    }

    async fn promote_member(
        &self,
        request: Request<v1::MemberRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        self.serve_unary::<PromoteMember>(request).await
    }

    async fn remove_member(
        &self,
        request: Request<v1::RemoveMemberRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        self.serve_unary::<RemoveMember>(request).await
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::MemberRequest>,
    ) -> Result<Response<v1::ListMembersResponse>, Status> {
        self.serve_unary::<TransferLeader>(request).await
    }

    async fn set_feature_level(
        &self,
        request: Request<v1::SetFeatureLevelRequest>,
    ) -> Result<Response<v1::SetFeatureLevelResponse>, Status> {
        self.serve_unary::<SetFeatureLevel>(request).await
    }

    type SnapshotStream = Responses<v1::SnapshotChunk>;

    async fn snapshot(
        &self,
        request: Request<v1::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let path = "/portwarden.v1.Cluster/Snapshot";
        let begun = self.observed(path, request.metadata(), |deadline| async move {
            // So that everything acknowledged before the call is in it.
            self.current(deadline).await?;
            self.inner.node.backup().map_err(errors::call)
        });
        let (head, pieces) = begun.await?.into_inner();
        let pieces = ReceiverStream::new(pieces).map(|piece| match piece {
            Ok(data) => Ok(v1::SnapshotChunk { data, ..Default::default() }),
            Err(error) => Err(errors::not_ready(&format!("the backup broke off: {error}"))),
        });
        let chunks = stream::once(ready(Ok(head))).chain(pieces);
        // What just ends would pass for the whole table.
        let stopping = stream::once(ready(Err(errors::not_ready("this node is stopping"))));
        let whole = chunks.map(Some).chain(stream::once(ready(None)));
        let until_stopping = whole.take_until(self.stopping()).chain(stopping.map(Some));
        let chunks = until_stopping.take_while(|chunk| ready(chunk.is_some())).filter_map(ready);
        Ok(Response::new(Box::pin(chunks)))
    }
}
