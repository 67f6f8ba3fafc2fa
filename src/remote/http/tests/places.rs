//! Where the server is: paths, sockets, TLS.

use std::{fs, net::SocketAddr};

use rustls::{RootCertStore, ServerConfig, pki_types::PrivateKeyDer, server::WebPkiClientVerifier};

use super::*;

#[tokio::test]
async fn the_prefix_is_the_urls_path_with_or_without_a_slash_at_its_end() {
    let hash = digest(b"x").hash_hex();
    for (path, asked) in [
        ("", format!("/cas/{hash}")),
        ("/", format!("/cas/{hash}")),
        ("/cas", format!("/cas/cas/{hash}")),
        ("/a%20b/main/", format!("/a%20b/main/cas/{hash}")),
    ] {
        let fake = Fake::new(|_, _| reply(200, &[], b"x"));
        let address = fake.start().await;
        let (cache, _) = opened(options(&format!("http://{address}{path}")));
        assert_eq!(cache.whole(&digest(b"x"), false).await.unwrap(), "x");
        let request = fake.log()[0].clone();
        assert_eq!(request.path, asked);
        assert_eq!(request.header("host"), address);
        assert!(request.header("user-agent").starts_with("outhaul/"));
        assert_eq!(
            cache.describe(),
            format!("http://{address}{}", path.trim_end_matches('/'))
        );
    }
}

#[tokio::test]
async fn an_address_of_ipv6_is_reached() {
    let Ok(listener) = tokio::net::TcpListener::bind("[::1]:0").await else {
        eprintln!("SKIPPED: no IPv6 here");
        return;
    };
    let address: SocketAddr = listener.local_addr().unwrap();
    let fake = Fake::new(|_, _| reply(200, &[], b"x"));
    let server = fake.clone();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        server.serve(stream).await;
    });
    let (cache, _) = opened(options(&format!("http://{address}")));
    assert_eq!(cache.whole(&digest(b"x"), false).await.unwrap(), "x");
}

#[tokio::test]
async fn a_unix_socket_leads_to_the_cache_and_the_host_is_the_urls() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("proxy.sock");
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let fake = Fake::new(|_, _| reply(200, &[], b"x"));
    let server = fake.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(server.clone().serve(stream));
        }
    });
    let mut through = options("http://cache.example/x");
    through.connect.proxy = Some(path);
    let (cache, _) = opened(through);
    assert_eq!(cache.whole(&digest(b"x"), false).await.unwrap(), "x");
    assert_eq!(fake.log()[0].header("host"), "cache.example");
    let mut nowhere = options("http://cache.example/x");
    nowhere.connect.proxy = Some(dir.path().join("none.sock"));
    nowhere.retries = 0;
    let error = opened(nowhere).0.whole(&digest(b"x"), false).await.unwrap_err();
    assert!(error.to_string().contains("none.sock"), "{error}");
}

/// A certificate authority.
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
        let issuer = rcgen::Issuer::new(params, key);
        Self { certificate, issuer }
    }

    fn sign(&self, name: &str) -> (rcgen::Certificate, rcgen::KeyPair) {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }
}

/// A server on `localhost` that wants certificates of this authority's; its port.
async fn serve_tls(fake: &Fake, authority: &Authority) -> u16 {
    let (certificate, key) = authority.sign("localhost");
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let fake = fake.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, fake) = (acceptor.clone(), fake.clone());
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    fake.serve(stream).await;
                }
            });
        }
    });
    port
}

#[tokio::test]
async fn tls_is_trusted_only_with_the_right_authority_and_both_sides_certificates() {
    let authority = Authority::new();
    let fake = Fake::new(|_, _| reply(200, &[], b"x"));
    let port = serve_tls(&fake, &authority).await;
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        Some(path)
    };
    let ca = write("ca.pem", &authority.certificate.pem());
    let (certificate, key) = authority.sign("client");
    let client = (
        write("client.pem", &certificate.pem()),
        write("client.key", &key.serialize_pem()),
    );
    let other = write("other.pem", &Authority::new().certificate.pem());
    let read = |ca: Option<std::path::PathBuf>, (certificate, key)| async move {
        let mut options = options(&format!("https://localhost:{port}"));
        options.retries = 0;
        options.connect.tls.certificate = ca;
        options.connect.tls.client_certificate = certificate;
        options.connect.tls.client_key = key;
        let (cache, _) = opened(options);
        cache.whole(&digest(b"x"), false).await
    };
    assert_eq!(read(ca.clone(), client.clone()).await.unwrap(), "x");
    let error = read(ca.clone(), (None, None)).await.unwrap_err();
    assert!(error.to_string().contains("--tls-client-certificate"), "{error}");
    let error = read(other, client.clone()).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Config);
    assert!(error.to_string().contains("--tls-certificate"), "{error}");
    let no = write("no.pem", "hello");
    let mut wrong = options(&format!("https://localhost:{port}"));
    wrong.connect.tls.certificate = no;
    let error = HttpCache::new(wrong).unwrap_err();
    assert!(error.to_string().contains("no.pem"), "{error}");
}

#[tokio::test]
async fn a_server_without_tls_or_one_that_never_ends_the_handshake_is_named_as_such() {
    let plain = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let plainly = plain.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let (mut stream, _) = plain.accept().await.unwrap();
        let said = b"HTTP/1.1 400 Bad Request\r\n\r\n";
        tokio::io::AsyncWriteExt::write_all(&mut stream, said)
            .await
            .unwrap();
        std::future::pending::<()>().await;
    });
    let authority = Authority::new();
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    fs::write(&ca, authority.certificate.pem()).unwrap();
    // Its queue takes connections, and nobody looks at them.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    for (address, words) in [
        (plainly, "use http://"),
        (silent.local_addr().unwrap().to_string(), "no connection within"),
    ] {
        let mut options = options(&format!("https://{address}"));
        options.retries = 0;
        options.connect.connect_timeout = Duration::from_secs(3);
        options.connect.tls.certificate = Some(ca.clone());
        let error = opened(options).0.whole(&digest(b"x"), false).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}
