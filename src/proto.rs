//! The generated code of `proto/`: the API for clients and the protocol between nodes.

#![allow(missing_docs, clippy::all)]

pub mod v1 {
    tonic::include_proto!("portwarden.v1");
}

pub mod peer {
    tonic::include_proto!("portwarden.peer.v1");
}

/// All descriptors, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
