//! Where the server is and whether it lets us in, in words that help.

use std::{fs, time::Duration};

use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Status,
    transport::{Certificate, Identity, Server, ServerTlsConfig, server::TcpIncoming},
};

use super::*;

async fn probe(endpoint: &str, change: impl FnOnce(&mut RemoteOptions)) -> Result<(), String> {
    let mut options = options(endpoint);
    options.connect.connect_timeout = Duration::from_secs(5);
    change(&mut options);
    GrpcCache::new(options)
        .map_err(|e| e.to_string())?
        .probe()
        .await
        .map_err(|e| e.to_string())
}

#[tokio::test]
async fn a_unix_socket_serves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache.sock");
    let fake = Fake::new();
    let digest = fake.put(b"a");
    let listener = UnixListener::bind(&path).unwrap();
    tokio::spawn(
        fake.router()
            .serve_with_incoming(UnixListenerStream::new(listener)),
    );
    let cache = GrpcCache::new(options(&format!("unix:{}", path.display()))).unwrap();
    assert_eq!(
        read_blob(&cache, &digest, &attribution()).await.unwrap().as_ref(),
        b"a"
    );
    let gone = format!("unix:{}/none.sock", dir.path().display());
    let shown = probe(&gone, |_| {}).await.unwrap_err();
    assert!(
        shown.contains("failed to connect to the server") && shown.contains("No such file"),
        "{shown}"
    );
}

/// A certificate authority, and a key pair that it signed for a name.
struct Authority {
    certificate: rcgen::Certificate,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self {
            certificate,
            issuer: rcgen::Issuer::new(params, key),
        }
    }

    /// Certificate and key, in PEM.
    fn sign(&self, name: &str) -> (String, String) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

#[tokio::test]
async fn tls_is_trusted_only_with_the_right_authority_and_both_sides_certificates() {
    let authority = Authority::new();
    let (certificate, key) = authority.sign("localhost");
    let config = ServerTlsConfig::new()
        .identity(Identity::from_pem(certificate, key))
        .client_ca_root(Certificate::from_pem(authority.certificate.pem()))
        .client_auth_optional(true);
    let fake = Fake::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = fake.router_on(Server::builder().tls_config(config).unwrap());
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    let endpoint = format!("grpcs://localhost:{port}");

    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        Some(path)
    };
    let ca = write("ca.pem", &authority.certificate.pem());
    assert!(
        probe(&endpoint, |o| o.connect.tls.certificate.clone_from(&ca))
            .await
            .is_ok()
    );

    let (certificate, key) = authority.sign("client");
    let with_client = probe(&endpoint, |o| {
        o.connect.tls.certificate.clone_from(&ca);
        o.connect.tls.client_certificate = write("client.pem", &certificate);
        o.connect.tls.client_key = write("client.key", &key);
    });
    assert!(with_client.await.is_ok());

    // The certificate has the name `localhost`, the address has none.
    let by_number = format!("grpcs://127.0.0.1:{port}");
    for (name, is_trusted) in [(None, false), (Some("localhost"), true)] {
        let answer = probe(&by_number, |o| {
            o.connect.tls.certificate.clone_from(&ca);
            o.connect.tls_authority_override = name.map(str::to_owned);
        });
        let answer = answer.await;
        assert_eq!(answer.is_ok(), is_trusted, "{name:?}");
        if let Err(shown) = answer {
            assert!(shown.contains("not for the host name"), "{shown}");
        }
    }

    let other = write("other.pem", &Authority::new().certificate.pem());
    let shown = probe(&endpoint, |o| o.connect.tls.certificate = other)
        .await
        .unwrap_err();
    assert!(
        shown.contains("not trusted") && shown.contains("--tls-certificate"),
        "{shown}"
    );

    let shown = probe(&format!("grpc://localhost:{port}"), |_| {})
        .await
        .unwrap_err();
    assert!(shown.contains("use grpcs://"), "{shown}");
}

#[tokio::test]
async fn an_authoritys_own_certificate_as_a_servers_is_named_as_such() {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap().pem();
    let config = ServerTlsConfig::new().identity(Identity::from_pem(&certificate, key.serialize_pem()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = Fake::new().router_on(Server::builder().tls_config(config).unwrap());
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));

    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    fs::write(&ca, certificate).unwrap();
    let endpoint = format!("grpcs://localhost:{port}");
    let shown = probe(&endpoint, |o| o.connect.tls.certificate = Some(ca))
        .await
        .unwrap_err();
    assert!(
        shown.contains("CA:TRUE") && !shown.contains("not trusted"),
        "{shown}"
    );
}

#[tokio::test]
async fn tls_to_a_plain_server_is_named_as_such() {
    let fake = Fake::new();
    let endpoint = fake.start().await.replace("grpc://", "grpcs://");
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    fs::write(&ca, Authority::new().certificate.pem()).unwrap();
    let shown = probe(&endpoint, |o| o.connect.tls.certificate = Some(ca))
        .await
        .unwrap_err();
    assert!(shown.contains("use grpc://"), "{shown}");
}

#[tokio::test]
async fn an_endpoint_where_nobody_answers_is_named() {
    // Bound and dropped: free for now.
    let port = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let endpoint = format!("grpc://127.0.0.1:{port}");
    let shown = probe(&endpoint, |_| {}).await.unwrap_err();
    assert!(
        shown.contains("failed to connect to the server") && shown.contains(&endpoint),
        "{shown}"
    );
}

#[tokio::test]
async fn another_service_is_distinguished_from_a_cache_without_capabilities() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("grpc://{}", listener.local_addr().unwrap());
    let (_, health) = tonic_health::server::health_reporter();
    tokio::spawn(
        Server::builder()
            .add_service(health)
            .serve_with_incoming(TcpIncoming::from(listener)),
    );
    let shown = probe(&endpoint, |_| {}).await.unwrap_err();
    assert!(shown.contains("not a remote cache"), "{shown}");

    let fake = Fake::new();
    fake.script().capability_errors = vec![Status::unimplemented("what?"); 2].into();
    assert!(probe(&fake.start().await, |_| {}).await.is_ok());
}

#[tokio::test]
async fn refusals_name_what_to_change() {
    for (status, instance, part) in [
        (
            Status::invalid_argument("Invalid instance name"),
            "x",
            "does not have the instance \"x\"",
        ),
        (
            Status::not_found("Instance does not exist"),
            "",
            "may require --remote-instance-name",
        ),
        (Status::unauthenticated("who?"), "", "--remote-header"),
        (
            Status::permission_denied("no"),
            "",
            "permission denied by the server",
        ),
    ] {
        let fake = Fake::new();
        fake.script().capability_errors = [status].into();
        let shown = probe(&fake.start().await, |o| o.instance_name = instance.into())
            .await
            .unwrap_err();
        assert!(shown.contains(part), "{shown}");
    }
}

#[tokio::test]
async fn refused_credentials_are_fetched_anew_once() {
    let dir = tempfile::tempdir().unwrap();
    let count = dir.path().join("count");
    // sh reads the script as its argument, so that nothing needs to be made executable while other tests fork.
    let helper = dir.path().join("get");
    let body = format!(
        "cat > /dev/null; echo x >> {0}; echo \"{{\\\"headers\\\": {{\\\"authorization\\\": [\\\"$(wc -l < {0} | tr -d ' ')\\\"]}}}}\"\n",
        count.display()
    );
    fs::write(&helper, body).unwrap();
    let fake = Fake::new();
    let digest = fake.put(b"a");
    // The helper was asked about the server's capabilities as well.
    fake.script().token = Some("3".into());
    let cache = client(&fake, |o| {
        // `sh get` is run in the workspace, where the script has that name.
        o.connect.credential_helpers = vec!["sh".into()];
        o.connect.workspace = Some(dir.path().into());
    })
    .await;
    assert_eq!(
        read_blob(&cache, &digest, &attribution()).await.unwrap().as_ref(),
        b"a"
    );
    assert_eq!(fake.count("batch"), 2);
    // Refused again and again, it is not asked for ever.
    fake.script().token = Some("none".into());
    let error = read_blob(&cache, &digest, &attribution()).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Unauthenticated);
    assert_eq!(fake.count("batch"), 4);
}

#[tokio::test]
async fn a_malformed_status_is_an_error_and_no_panic() {
    let fake = Fake::new();
    let mut headers = ::http::HeaderMap::new();
    headers.insert("grpc-status-details-bin", "!!!".parse().unwrap());
    let metadata = tonic::metadata::MetadataMap::from_headers(headers);
    fake.script().errors =
        vec![Status::with_metadata(tonic::Code::PermissionDenied, "no", metadata); 2].into();
    let digest = fake.put(b"a");
    let cache = client(&fake, |_| {}).await;
    let answers = cache.read_batch(&[digest], &attribution(), false).await;
    let error = answers[0].1.as_ref().unwrap_err();
    assert!(error.to_string().contains("malformed"), "{error}");
}

#[tokio::test]
async fn requests_carry_the_builds_id() {
    let fake = Fake::new();
    let digest = fake.put(b"a");
    let cache = client(&fake, |_| {}).await;
    let attribution = Attribution {
        invocation_id: "the-invocation".into(),
        ..Attribution::default()
    };
    read_blob(&cache, &digest, &attribution).await.unwrap();
    let metadata = fake.script().last_metadata.clone().unwrap();
    let bytes = metadata
        .get_bin("build.bazel.remote.execution.v2.requestmetadata-bin")
        .unwrap()
        .to_bytes()
        .unwrap();
    assert!(bytes.windows(14).any(|w| w == b"the-invocation"));
}
