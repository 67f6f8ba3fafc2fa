//! Generates the protocol types from `proto/` without a system `protoc`.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;
use prost_types::DescriptorProto;

const PROTOS: &[&str] = &[
    "proto/build_event_stream.proto",
    "proto/execution_log.proto",
    "proto/google/devtools/build/v1/publish_build_event.proto",
    "proto/outhaul/v1/control.proto",
    "proto/outhaul/v1/record.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-changed=build.rs");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut numbers = String::new();
    for (package, module) in [
        ("build_event_stream", "bep"),
        ("google.devtools.build.v1", "bes"),
        ("google.protobuf", "protobuf"),
    ] {
        let files = descriptors.file.iter().filter(|file| file.package() == package);
        let modules: String = files.map(|file| field_numbers(&file.message_type)).collect();
        numbers += &format!("pub mod {module} {{\n{modules}}}\n");
    }
    fs::write(out.join("field_numbers.rs"), numbers)?;
    // Served by the reflection service, so that generic gRPC tools can talk to the daemon.
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_client(true)
        .build_server(true)
        .bytes(".")
        .include_file("protocols.rs")
        .compile_fds(descriptors)?;
    tonic_build::manual::Builder::new().compile(&[raw_event_service()]);
    Ok(())
}

/// A module for each message, with the numbers of its fields: for what is read and written on the wire itself.
fn field_numbers(messages: &[DescriptorProto]) -> String {
    let mut code = String::new();
    for message in messages {
        let mut module = String::new();
        for letter in message.name().chars() {
            if letter.is_uppercase() && !module.is_empty() {
                module.push('_');
            }
            module.push(letter.to_ascii_lowercase());
        }
        code += &format!("pub mod {module} {{\n{}", field_numbers(&message.nested_type));
        for field in &message.field {
            code += &format!(
                "pub const {}: u32 = {};\n",
                field.name().to_uppercase(),
                field.number()
            );
        }
        code += "}\n";
    }
    code
}

/// The event service once more, with requests as the bytes that they are: what is forwarded and journalled has to be
/// exactly what came, with fields that nobody here knows.
fn raw_event_service() -> tonic_build::manual::Service {
    let method = |name: &str, route: &str, response: &str| {
        tonic_build::manual::Method::builder()
            .name(name)
            .route_name(route)
            .input_type("::prost::bytes::Bytes")
            .output_type(response)
            .codec_path("crate::bes::raw::RawCodec")
    };
    tonic_build::manual::Service::builder()
        .name("PublishBuildEvent")
        .package("google.devtools.build.v1")
        .method(
            method(
                "publish_lifecycle_event",
                "PublishLifecycleEvent",
                "crate::bes::raw::Empty",
            )
            .build(),
        )
        .method(
            method(
                "publish_build_tool_event_stream",
                "PublishBuildToolEventStream",
                "crate::proto::google::devtools::build::v1::PublishBuildToolEventStreamResponse",
            )
            .client_streaming()
            .server_streaming()
            .build(),
        )
        .build()
}
