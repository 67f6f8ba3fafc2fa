//! Events as proto3 JSON, one object a line, as in Bazel's `--build_event_json_file`.
//!
//! What is read is what `build_event_stream.proto` has; everything else is skipped without being kept. The rules are
//! those of proto3 JSON: lowerCamel names or those of the proto files, 64-bit integers as strings or numbers, bytes as
//! base64, enums by name or number, `null` for a default.

use std::sync::LazyLock;

use prost::Message as _;
use prost_reflect::{DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor};
use prost_types::{FileDescriptorSet, field_descriptor_proto::Type};
use serde::de::Error as _;

use crate::{
    bep::{decode::from_proto, error::BepError, event::StreamEvent},
    digest::DigestFunction,
    proto,
};

/// The description of an event, by which JSON is read. `None` only if what the compiler made of the proto files does not
/// describe itself.
static EVENT: LazyLock<Option<MessageDescriptor>> = LazyLock::new(|| {
    let mut files = FileDescriptorSet::decode(proto::DESCRIPTORS).ok()?;
    // Its one field is a string that is read as bytes from the wire, and so would be base64 here.
    let messages = files.file.iter_mut().flat_map(|file| &mut file.message_type);
    for field in messages
        .filter(|m| m.name() == "Progress")
        .flat_map(|m| &mut m.field)
    {
        field.set_type(Type::String);
    }
    let pool = DescriptorPool::from_file_descriptor_set(files).ok()?;
    pool.get_message_by_name("build_event_stream.BuildEvent")
});

/// Reads one line of a build whose digest function is known: see [`Decoder`](super::Decoder).
///
/// # Errors
/// When it is no JSON object, a field that is read has another type, or the line is not UTF-8.
pub(crate) fn decode_json(
    line: &[u8],
    default_function: Option<DigestFunction>,
) -> Result<StreamEvent, BepError> {
    let description = EVENT.clone();
    let description = description.ok_or_else(|| serde_json::Error::custom("events are not described"))?;
    let options = DeserializeOptions::new().deny_unknown_fields(false);
    let mut json = serde_json::Deserializer::from_slice(line);
    let event = DynamicMessage::deserialize_with_options(description, &mut json, &options)?;
    json.end()?;
    let mut event: proto::build_event_stream::BuildEvent = event.transcode_to()?;
    event.id.get_or_insert_default();
    Ok(from_proto(event, default_function))
}

#[cfg(test)]
mod tests;
