//! Starting, capabilities, and access.

use super::*;

#[tokio::test]
async fn capabilities_say_what_bazel_needs_to_hear() {
    for (zstd, compressors) in [(true, vec![1]), (false, vec![])] {
        let cache = EmbeddedCache::builder()
            .zstd(zstd)
            .digest_functions(vec![DigestFunction::Sha256, DigestFunction::Blake3])
            .start()
            .await
            .unwrap();
        let mut client = CapabilitiesClient::new(channel(&cache).await);
        let answer = client
            .get_capabilities(GetCapabilitiesRequest::default())
            .await
            .unwrap()
            .into_inner();
        let (low, high) = (answer.low_api_version.unwrap(), answer.high_api_version.unwrap());
        assert_eq!((low.major, low.minor, high.major, high.minor), (2, 0, 2, 3));
        let cache_capabilities = answer.cache_capabilities.unwrap();
        assert_eq!(cache_capabilities.digest_functions, [1, 9]);
        assert_eq!(cache_capabilities.supported_compressors, compressors);
        assert!(cache_capabilities.max_batch_total_size_bytes < 4 << 20);
        assert!(
            cache_capabilities
                .action_cache_update_capabilities
                .unwrap()
                .update_enabled
        );
    }
}

#[tokio::test]
async fn other_instances_and_digest_functions_are_refused() {
    let cache = EmbeddedCache::builder()
        .instance_name(Some("main/one".to_owned()))
        .digest_functions(vec![DigestFunction::Sha256, DigestFunction::Blake3])
        .start()
        .await
        .unwrap();
    let client = Client::of(&cache).await;
    let digest = cache.store().put(&b"blob"[..]);
    let named = cache.store().put_with(DigestFunction::Blake3, &b"blob"[..]);
    let sha1 = Digest::of(DigestFunction::Sha1, b"blob");
    let hash = named.hash_hex();
    for name in [
        format!("main/one/blobs/{digest}"),
        format!("main/one/blobs/{named}"),
    ] {
        assert_eq!(client.read_from(&name, 0, 0).await.0, b"blob", "{name}");
    }
    for (name, expected) in [
        (format!("blobs/{digest}"), Code::InvalidArgument),
        (format!("main/blobs/{digest}"), Code::InvalidArgument),
        (format!("main/one/blobs/{sha1}"), Code::InvalidArgument),
        (format!("main/one/blobs/sha256/{digest}"), Code::InvalidArgument),
        // Unnamed, the hash is one of SHA-256.
        (format!("main/one/blobs/{hash}/4"), Code::NotFound),
    ] {
        assert_eq!(code(client.read_from(&name, 0, 0).await.1), expected, "{name}");
    }
    let refused = client.batch(&[&digest], false).await.unwrap_err();
    assert!(refused.message().contains("main/one"), "{refused}");
}

#[tokio::test]
async fn calls_without_the_required_header_are_unauthenticated() {
    let cache = EmbeddedCache::builder()
        .required_header("X-Token", "one")
        .start()
        .await
        .unwrap();
    let client = Client::of(&cache).await;
    let digest = cache.store().put(&b"blob"[..]);
    let with = async |token: &str| {
        let mut request = tonic::Request::new(FindMissingBlobsRequest {
            blob_digests: vec![wire(&digest)],
            ..Default::default()
        });
        request.metadata_mut().insert("x-token", token.parse().unwrap());
        client.cas().find_missing_blobs(request).await
    };
    assert_eq!(code(client.batch(&[&digest], false).await), Code::Unauthenticated);
    assert_eq!(code(with("two").await), Code::Unauthenticated);
    assert!(with("one").await.is_ok());
    cache.require_header(Some(("x-token", "two")));
    assert!(with("two").await.is_ok());
    assert_eq!(cache.last_headers()["x-token"], "two");
    assert_eq!(cache.stats().unauthenticated, 2);
}

#[tokio::test]
async fn tls_asks_for_the_clients_certificate() {
    let authority = rcgen::KeyPair::generate().unwrap();
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = parameters.self_signed(&authority).unwrap();
    let issuer = rcgen::Issuer::new(parameters, authority);
    let issue = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let parameters = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (
            parameters.signed_by(&key, &issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    };
    let (certificate, key) = issue("localhost");
    let tls = ServerTls {
        certificate,
        key,
        client_ca: Some(root.pem()),
    };
    let cache = EmbeddedCache::builder().tls(tls).start().await.unwrap();
    let digest = cache.store().put(noise(1000));
    let uri = cache.endpoint().replace("grpcs://", "https://");
    let config = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(root.pem()))
        .domain_name("localhost");
    let connect = |config| {
        Endpoint::from_shared(uri.clone())
            .unwrap()
            .tls_config(config)
            .unwrap()
            .connect_lazy()
    };
    let anonymous = Client(connect(config.clone()));
    assert!(anonymous.read(&digest, false).await.1.is_err());
    let (certificate, key) = issue("client");
    let known = Client(connect(config.identity(Identity::from_pem(certificate, key))));
    let (bytes, end) = known.read(&digest, false).await;
    assert!(end.is_ok() && bytes == noise(1000), "{end:?}");
}

#[tokio::test]
async fn a_cache_that_cannot_start_says_why() {
    let (cache, _) = start().await;
    let taken = cache.endpoint().replace("grpc://", "");
    for (builder, expected) in [
        (EmbeddedCache::builder().bind(&taken), taken.as_str()),
        (EmbeddedCache::builder().bind("nowhere"), "IP:PORT"),
        (
            EmbeddedCache::builder().digest_functions(vec![]),
            "no digest function",
        ),
    ] {
        let error = builder.start().await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
