//! gRPC without the client library: calls to one node, whose statuses a test sees as they are.

use std::time::Duration;

use portwarden::proto::DOMAIN;
use portwarden::proto::v1::allocator_client::AllocatorClient;
use portwarden::proto::v1::cluster_client::ClusterClient;
use portwarden::proto::v1::leases_client::LeasesClient;
use portwarden::proto::v1::workers_client::WorkersClient;
use portwarden::proto::v1::{self, claim::Placement, port_request::Ports};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::support::{BOUND, Cluster};

/// Runs the test's own side.
pub fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        tokio::time::timeout(3 * BOUND, test).await.expect("the test is stuck: a call never ended")
    })
}

/// All services of one node, over one connection.
#[derive(Clone)]
pub struct Door {
    pub channel: Channel,
    pub allocator: AllocatorClient<Channel>,
    pub workers: WorkersClient<Channel>,
    pub cluster: ClusterClient<Channel>,
    pub leases: LeasesClient<Channel>,
}

impl Door {
    /// To be called on a runtime; connects at the first call.
    pub fn to(cluster: &Cluster, at: usize) -> Door {
        Door::at(&cluster.nodes[at].client())
    }

    pub fn at(address: &str) -> Door {
        let endpoint = Endpoint::from_shared(format!("http://{address}"));
        let channel = endpoint.expect("an address").timeout(Duration::from_secs(20)).connect_lazy();
        Door {
            allocator: AllocatorClient::new(channel.clone()),
            workers: WorkersClient::new(channel.clone()),
            cluster: ClusterClient::new(channel.clone()),
            leases: LeasesClient::new(channel.clone()),
            channel,
        }
    }

    pub fn all(cluster: &Cluster) -> Vec<Door> {
        (0..cluster.nodes.len()).map(|at| Door::to(cluster, at)).collect()
    }

    /// One claim, to the allocation.
    pub async fn allocate(&mut self, claim: v1::Claim) -> Result<v1::Allocation, Status> {
        let request = v1::AllocateRequest { claims: vec![claim], dry_run: false };
        let response = self.allocator.allocate(request).await?.into_inner();
        Ok(response.allocations.into_iter().next().expect("one allocation of one claim"))
    }

    pub async fn release(&mut self, name: &str, token: u64) -> Result<v1::ReleaseResponse, Status> {
        let authority = Some(v1::release_request::Authority::Token(token));
        let request = v1::ReleaseRequest { name: name.into(), authority };
        Ok(self.allocator.release(request).await?.into_inner())
    }
}

/// `count` ports on a worker, under the uid `NAME-uid`.
pub fn claim(name: &str, worker: &str, count: u32) -> v1::Claim {
    v1::Claim {
        name: name.into(),
        uid: format!("{name}-uid"),
        placement: Some(Placement::Worker(worker.into())),
        ports: vec![ports(Ports::Count(count))],
        ..v1::Claim::default()
    }
}

pub fn ports(ports: Ports) -> v1::PortRequest {
    v1::PortRequest { ports: Some(ports), ..v1::PortRequest::default() }
}

/// Ports 40000 to `last` and a GPU of 24 GiB.
pub fn spec(last: u32) -> v1::WorkerSpec {
    v1::WorkerSpec {
        address: "127.0.0.1".into(),
        ranges: vec![v1::PortRange { name: "service".into(), first: 40_000, last }],
        gpus: vec![v1::GpuSpec { memory_bytes: 24 << 30, ..v1::GpuSpec::default() }],
        ..v1::WorkerSpec::default()
    }
}

pub fn details(status: &Status) -> ErrorDetails {
    status.get_error_details()
}

/// The reason of our own in the details, or nothing.
pub fn reason(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN).then_some(info.reason)
}

/// The call was refused with this code; its status.
pub fn refused<T: std::fmt::Debug>(code: Code, answer: Result<T, Status>) -> Status {
    let status = answer.expect_err("the call should have been refused");
    assert_eq!(status.code(), code, "{status:?}");
    status
}

/// The field that a BadRequest names, and what it says of it.
pub fn violation<T: std::fmt::Debug>(answer: Result<T, Status>) -> (String, String) {
    let status = refused(Code::InvalidArgument, answer);
    let bad = status.get_details_bad_request();
    let bad = bad.unwrap_or_else(|| panic!("no BadRequest in {status:?}"));
    let first = bad.field_violations.into_iter().next().expect("a violation");
    (first.field, first.description)
}
