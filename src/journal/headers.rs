//! What a client said in its headers, as the payload of a record: what goes upstream after a restart needs it.
//!
//! They are secrets as a rule: never shown, and no more readable than the journal itself.

use bytes::Bytes;
use prost::Message;
use tonic::metadata::MetadataMap;

#[derive(Clone, PartialEq, Message)]
struct Headers {
    #[prost(message, repeated, tag = "1")]
    headers: Vec<Header>,
}

#[derive(Clone, PartialEq, Message)]
struct Header {
    #[prost(string, tag = "1")]
    name: String,
    /// As it is on the wire: what is binary is in base64.
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// The record's payload.
pub(crate) fn encode(headers: &MetadataMap) -> Bytes {
    let headers = headers.clone().into_headers();
    let headers = headers.iter().map(|(name, value)| Header {
        name: name.as_str().to_owned(),
        value: Bytes::copy_from_slice(value.as_bytes()),
    });
    let message = Headers {
        headers: headers.collect(),
    };
    message.encode_to_vec().into()
}

/// The headers of a record's payload, without any that make no sense.
pub(crate) fn decode(payload: Bytes) -> MetadataMap {
    let mut map = http::HeaderMap::new();
    for header in Headers::decode(payload).unwrap_or_default().headers {
        let name = http::HeaderName::from_bytes(header.name.as_bytes());
        let value = http::HeaderValue::from_maybe_shared(header.value);
        if let (Ok(name), Ok(value)) = (name, value) {
            map.append(name, value);
        }
    }
    MetadataMap::from_headers(map)
}

#[cfg(test)]
mod tests {
    use tonic::metadata::MetadataValue;

    use super::*;

    #[test]
    fn headers_read_back_binary_and_repeated_ones_too() {
        let mut headers = MetadataMap::new();
        headers.append("x-api-key", MetadataValue::from_static("one"));
        headers.append("x-api-key", MetadataValue::from_static("two"));
        headers.append_bin("some-bin", MetadataValue::from_bytes(&[0, 255, 7]));
        let read = decode(encode(&headers));
        assert_eq!(read.clone().into_headers(), headers.into_headers());
        assert_eq!(
            read.get_bin("some-bin").unwrap().to_bytes().unwrap().as_ref(),
            [0, 255, 7]
        );
        assert!(decode(Bytes::from_static(b"\xff\xff")).is_empty());
    }
}
