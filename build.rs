//! Generates the protocol types from `proto/` without a system `protoc`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const PROTOS: &[&str] = &[
    "proto/build_event_stream.proto",
    "proto/google/devtools/build/v1/publish_build_event.proto",
    "proto/outhaul/v1/control.proto",
    "proto/outhaul/v1/record.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build.rs");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    // Served by the reflection service, so that generic gRPC tools can talk to the daemon.
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .bytes(".")
        .include_file("protocols.rs")
        .compile_fds(descriptors)?;
    Ok(())
}
