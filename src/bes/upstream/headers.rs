//! What an upstream call says in its headers: what the client said, and the user's own.

use tonic::metadata::MetadataMap;

use crate::transport::{Header, Secrets};

/// The client's headers without those that are of its connection to us, and with the user's in place of the client's of
/// the same names.
pub(super) fn upstream(client: &MetadataMap, own: &[Header]) -> MetadataMap {
    let mut headers = http::HeaderMap::new();
    for (name, value) in client.clone().into_headers().iter() {
        if !is_of_the_connection(name.as_str()) {
            headers.append(name.clone(), value.clone());
        }
    }
    for header in own {
        headers.remove(header.name());
    }
    for header in own {
        let name = http::HeaderName::from_bytes(header.name().as_bytes());
        let value = http::HeaderValue::from_str(header.value());
        // Both were checked when they were parsed.
        if let (Ok(name), Ok(mut value)) = (name, value) {
            value.set_sensitive(true);
            headers.append(name, value);
        }
    }
    MetadataMap::from_headers(headers)
}

/// What upstream's words are shown without: what it was sent, in case that it quotes it.
pub(super) fn secrets(sent: &MetadataMap, authority: Option<&Header>) -> Secrets {
    let headers = sent.clone().into_headers();
    // The build tool's own word on the request is no secret, and is binary.
    let values = headers.values().filter_map(|value| value.to_str().ok());
    Secrets::of(values.chain(authority.into_iter().flat_map(Header::secrets)))
}

/// gRPC's own and HTTP's hop-by-hop headers (RFC 9110, 7.6.1).
fn is_of_the_connection(name: &str) -> bool {
    name.starts_with("grpc-")
        || matches!(
            name,
            "te" | "trailer"
                | "content-type"
                | "content-length"
                | "user-agent"
                | "host"
                | "connection"
                | "keep-alive"
                | "proxy-connection"
                | "transfer-encoding"
                | "upgrade"
        )
}

#[cfg(test)]
mod tests {
    use tonic::metadata::MetadataValue;

    use super::*;

    #[test]
    fn the_clients_words_are_passed_on_and_the_users_come_first() {
        let mut client = MetadataMap::new();
        for (name, value) in [
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "bazel"),
            ("grpc-accept-encoding", "gzip"),
            ("grpc-timeout", "1S"),
            ("x-api-key", "client's"),
            ("x-tag", "a"),
        ] {
            client.insert(name, MetadataValue::from_static(value));
        }
        client.append("x-tag", MetadataValue::from_static("b"));
        let metadata = "build.bazel.remote.execution.v2.requestmetadata-bin";
        client.insert_bin(metadata, MetadataValue::from_bytes(b"\x00\xffrm"));
        let own = [
            Header::parse("--bes-header", "X-Api-Key=own").unwrap(),
            Header::parse("--bes-header", "x-more=1").unwrap(),
            Header::parse("--bes-header", "x-more=2").unwrap(),
        ];
        let headers = upstream(&client, &own);
        let all = |name| {
            headers
                .get_all(name)
                .iter()
                .map(|v| v.to_str().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(all("x-api-key"), ["own"]);
        assert_eq!(all("x-more"), ["1", "2"]);
        assert_eq!(all("x-tag"), ["a", "b"]);
        let binary = headers.get_bin(metadata).unwrap().to_bytes().unwrap();
        assert_eq!(&*binary, b"\x00\xffrm");
        assert_eq!(headers.len(), 6, "{headers:?}");
    }
}
