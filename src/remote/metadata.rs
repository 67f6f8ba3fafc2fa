//! What a request carries beside its message: headers, and to which build it belongs.

use std::collections::BTreeMap;

use bazel_remote_apis::build::bazel::remote::execution::v2::{RequestMetadata, ToolDetails};
use prost::Message as _;
use tonic::metadata::{Ascii, AsciiMetadataKey, MetadataMap, MetadataValue};

use crate::transport::{Header, RemoteError};

/// What a build's requests are attributed to, sent as the Remote Execution API's `RequestMetadata`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Attribution {
    /// The build's invocation id.
    pub invocation_id: String,
    /// The build's build id, which ties several invocations together.
    pub build_id: String,
    /// The target asked for, if there is one.
    pub target: String,
}

/// The Remote Execution API's header for [`RequestMetadata`].
const METADATA_HEADER: &str = "build.bazel.remote.execution.v2.requestmetadata-bin";

/// The metadata of a request.
///
/// # Errors
/// [`RemoteErrorKind::Config`](crate::transport::RemoteErrorKind::Config) when a header cannot be sent.
pub(super) fn metadata(attribution: &Attribution, headers: &[Header]) -> Result<MetadataMap, RemoteError> {
    let mut map = MetadataMap::new();
    map.insert_bin(
        METADATA_HEADER,
        MetadataValue::from_bytes(&request_metadata(attribution).encode_to_vec()),
    );
    insert(&mut map, headers)?;
    Ok(map)
}

/// Adds headers; those of one name are joined by a comma, as Bazel does.
fn insert(map: &mut MetadataMap, headers: &[Header]) -> Result<(), RemoteError> {
    let mut joined = BTreeMap::<&str, String>::new();
    for header in headers {
        joined
            .entry(header.name())
            .and_modify(|value| {
                value.push(',');
                value.push_str(header.value());
            })
            .or_insert_with(|| header.value().to_owned());
    }
    for (name, value) in joined {
        let unusable = || RemoteError::config(format!("header {name}"), "not usable");
        let key = AsciiMetadataKey::from_bytes(name.as_bytes()).map_err(|_| unusable())?;
        let mut value = MetadataValue::<Ascii>::try_from(value).map_err(|_| unusable())?;
        value.set_sensitive(true);
        map.insert(key, value);
    }
    Ok(())
}

fn request_metadata(attribution: &Attribution) -> RequestMetadata {
    RequestMetadata {
        tool_details: Some(ToolDetails {
            tool_name: "outhaul".to_owned(),
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        }),
        // What Bazel calls its own downloads of outputs.
        action_id: "output".to_owned(),
        tool_invocation_id: attribution.invocation_id.clone(),
        correlated_invocations_id: attribution.build_id.clone(),
        target_id: attribution.target.clone(),
        ..RequestMetadata::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_attributed_to_the_build() {
        let attribution = Attribution {
            invocation_id: "i".into(),
            build_id: "b".into(),
            target: "//a:b".into(),
        };
        let map = metadata(&attribution, &[]).unwrap();
        let bytes = map.get_bin(METADATA_HEADER).unwrap().to_bytes().unwrap();
        let metadata = RequestMetadata::decode(bytes).unwrap();
        assert_eq!(metadata.tool_details.unwrap().tool_name, "outhaul");
        assert_eq!(metadata.tool_invocation_id, "i");
        assert_eq!(metadata.correlated_invocations_id, "b");
        assert_eq!(metadata.action_id, "output");
        assert_eq!(metadata.target_id, "//a:b");
    }

    #[test]
    fn headers_of_one_name_are_joined_and_never_shown() {
        let headers = ["x-a=1", "x-b=s3cret", "X-A=2"];
        let headers = headers.map(|text| Header::parse("--remote-header", text).unwrap());
        let map = metadata(&Attribution::default(), &headers).unwrap();
        assert_eq!(map.get("x-a").unwrap(), "1,2");
        assert!(!format!("{map:?} {headers:?}").contains("s3cret"));
    }
}
