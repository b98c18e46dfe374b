//! Compiles the protos in Rust alone: no protoc is needed.

use std::path::PathBuf;

use prost::Message as _;

const PROTOS: [&str; 5] = [
    "portwarden/v1/allocator.proto",
    "portwarden/v1/workers.proto",
    "portwarden/v1/leases.proto",
    "portwarden/v1/cluster.proto",
    "portwarden/peer/v1/peer.proto",
];

/// Set, it plants what must never be: src/planted.rs. A build without assertions refuses it.
const PLANT: &str = "PORTWARDEN_PLANTABLE";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-env-changed={PLANT}");
    if std::env::var_os(PLANT).is_some() {
        println!("cargo:rustc-cfg=planted");
    }
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .btree_map(".")
        .bytes(".portwarden.peer.v1")
        // Recorded histories of tests are JSON; what is left out of a message has its default.
        .type_attribute(".portwarden.v1", "#[derive(serde::Serialize, serde::Deserialize)]")
        .message_attribute(".portwarden.v1", "#[serde(default)]")
        .compile_fds(descriptors)?;
    Ok(())
}
