//! Caches that are not there, are something else, or don't let us in: a clear message in time, and the build goes on.

use std::time::Instant;

use outhaul_testkit::{
    PATIENCE, Ran,
    cache::{EmbeddedCache, ServerTls},
    until,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::{io::AsyncWriteExt as _, net::TcpListener};

use crate::support::{World, program, run};

/// Few retries, so that tests don't wait for them.
const QUICK: [&str; 2] = ["--remote-retries=1", "--remote-retry-max-delay=50ms"];

/// Fetches a blob of the world's from an endpoint.
async fn blob(world: &World, endpoint: &str, args: &[&str]) -> Ran {
    let digest = world.file("part0.h").1.to_string();
    let cache = format!("--remote-cache={endpoint}");
    let begun = Instant::now();
    let args = ["fetch", "blob", &digest, "-o", "-", &cache]
        .into_iter()
        .chain(QUICK)
        .chain(args.iter().copied());
    let ran = run(args).await;
    assert!(begun.elapsed() < PATIENCE);
    assert!(ran.code == Some(0) || ran.stdout.is_empty());
    ran
}

/// Somebody who accepts and speaks something else.
async fn speaker(words: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.write_all(words).await;
        }
    });
    format!("grpc://{address}")
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_that_are_no_cache_are_named() {
    let world = World::new().await;
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("grpc://{}", listener.local_addr().unwrap())
    };
    let http = speaker(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    // Speaks gRPC, but not this.
    let server = world.serve(&[]).await;
    let address = server.address().to_owned();
    let socket = format!("unix:{}", world.path("no.sock"));
    for endpoint in [&closed, &http, &address, &socket, "grpc://no-such-host.invalid:1"] {
        let ran = blob(&world, endpoint, &[]).await;
        let named = endpoint.strip_prefix("unix:").unwrap_or(endpoint);
        ran.says(1, &[named]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_server_is_given_up_after_the_time_out() {
    let world = World::new().await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("grpc://{}", listener.local_addr().unwrap());
    let ran = blob(&world, &endpoint, &["--remote-timeout=1s"]).await;
    ran.says(1, &[&endpoint]);
}

#[tokio::test(flavor = "multi_thread")]
async fn instance_names_and_headers_that_the_server_refuses_are_reported() {
    let builder = EmbeddedCache::builder()
        .instance_name(Some("main".to_owned()))
        .required_header("x-token", "secret-value");
    let world = World::with(builder, "main").await;
    let endpoint = world.cache.endpoint();
    let (instance, header) = (
        "--remote-instance-name=main",
        "--remote-header=x-token=secret-value",
    );
    blob(&world, &endpoint, &[instance, header]).await.expect(0);
    let ran = blob(&world, &endpoint, &["--remote-instance-name=other", header]).await;
    ran.says(1, &[&endpoint, "other"]);
    for args in [
        &[instance][..],
        &[instance, "--remote-header=x-token=wrong-value"],
    ] {
        let ran = blob(&world, &endpoint, args)
            .await
            .says(1, &[&endpoint, "--remote-header"]);
        assert!(!ran.err.contains("wrong-value"), "{}", ran.err);
    }
}

struct Certificates {
    world: World,
    ca: String,
    other_ca: String,
    client: (String, String),
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

async fn with_tls(client_certificates: bool) -> Certificates {
    let (ca, other) = (authority(), authority());
    let issued = |name: &str| {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &ca).unwrap().pem(), key.serialize_pem())
    };
    let (certificate, key) = issued("127.0.0.1");
    let tls = ServerTls {
        certificate,
        key,
        client_ca: client_certificates.then(|| ca.pem()),
    };
    let world = World::with(EmbeddedCache::builder().tls(tls), "").await;
    let write = |name: &str, text: &str| {
        let path = world.path(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let client = issued("client");
    Certificates {
        ca: write("ca.pem", &ca.pem()),
        other_ca: write("other.pem", &other.pem()),
        client: (write("client.pem", &client.0), write("client.key", &client.1)),
        world,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_mismatches_are_named_as_such() {
    let certificates = with_tls(false).await;
    let world = &certificates.world;
    let tls = world.cache.endpoint();
    let trusted = format!("--tls-certificate={}", certificates.ca);
    blob(world, &tls, &[&trusted]).await.expect(0);
    // A plain call to a TLS port, and the other way about.
    let plain = tls.replace("grpcs://", "grpc://");
    blob(world, &plain, &["--remote-timeout=5s"])
        .await
        .says(1, &[&plain]);
    let other = World::new().await;
    let wrong = other.cache.endpoint().replace("grpc://", "grpcs://");
    blob(world, &wrong, &[&trusted]).await.says(1, &[&wrong]);
    // An authority that nobody knows.
    let untrusted = format!("--tls-certificate={}", certificates.other_ca);
    for args in [&[untrusted.as_str()][..], &[]] {
        blob(world, &tls, args).await.says(1, &[&tls, "ertificate"]);
    }
    // A file that is not a certificate.
    let garbage = world.path("garbage.pem");
    std::fs::write(&garbage, "garbage").unwrap();
    let ran = blob(world, &tls, &[&format!("--tls-certificate={garbage}")]).await;
    ran.says(2, &["--tls-certificate", &garbage]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_client_certificate_is_reported() {
    let certificates = with_tls(true).await;
    let world = &certificates.world;
    let tls = world.cache.endpoint();
    let trusted = format!("--tls-certificate={}", certificates.ca);
    let (certificate, key) = &certificates.client;
    let (certificate, key) = (
        format!("--tls-client-certificate={certificate}"),
        format!("--tls-client-key={key}"),
    );
    blob(world, &tls, &[&trusted, &certificate, &key]).await.expect(0);
    blob(world, &tls, &[&trusted])
        .await
        .says(1, &[&tls, "ertificate"]);
    blob(world, &tls, &[&trusted, &certificate])
        .await
        .says(2, &["--tls-client-key"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn credential_helpers_that_fail_are_named_and_their_words_kept_secret() {
    let world = World::with(EmbeddedCache::builder().required_header("x-token", "t"), "").await;
    let endpoint = world.cache.endpoint();
    let helper = |name: &str, script: &str| {
        let path = world.path(name);
        program(&path, &format!("#!/bin/sh\n{script}\n"));
        path
    };
    let good = helper("good", r#"cat >/dev/null; echo '{"headers":{"x-token":["t"]}}'"#);
    blob(&world, &endpoint, &[&format!("--credential-helper={good}")])
        .await
        .expect(0);
    for (name, script) in [
        ("failing", "echo 'no keyring' >&2; exit 7"),
        ("garbage", "echo 's3cret not json'"),
        ("silent", "exit 0"),
        ("wrong", r#"echo '{"headers":{"x-token":"s3cret"}}'"#),
        ("killed", "kill -9 $$"),
        ("hanging", "exec sleep 1000"),
    ] {
        let path = helper(name, script);
        let ran = blob(&world, &endpoint, &[&format!("--credential-helper={path}")]).await;
        let ran = ran.says(1, &[&path]);
        assert!(!ran.err.contains("s3cret"), "{}", ran.err);
    }
    let nowhere = world.path("nowhere");
    let ran = blob(&world, &endpoint, &[&format!("--credential-helper={nowhere}")]).await;
    assert_ne!(ran.code, Some(0));
    assert!(ran.err.contains(&nowhere), "{}", ran.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_goes_on_whatever_its_cache_does_and_says_why_nothing_came() {
    let world = World::new().await;
    let http = speaker(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    let closed = "grpc://127.0.0.1:1".to_owned();
    for (n, endpoint) in [closed, http].into_iter().enumerate() {
        let cache = format!("--remote-cache={endpoint}");
        let mut server = world.serve_alone(&[&cache, QUICK[0], QUICK[1]]).await;
        let build = if n == 0 {
            world.build.clone()
        } else {
            world.build.incremental()
        };
        world.play(&build, server.address()).await;
        server.logged("is not usable at the moment").await;
        let mut answer = serde_json::Value::Null;
        until("the build is settled", async || {
            let args = ["status", "--json", &world.state(), &build.invocation_id()];
            answer = run(args).await.expect(0).json()[0].clone();
            answer["state"] == "settled"
        })
        .await;
        assert!(answer["failed"].as_u64().unwrap() > 0);
        assert!(
            answer["errors"][0].as_str().unwrap().contains(&endpoint),
            "{answer}"
        );
        server.signal(rustix::process::Signal::TERM);
        assert_eq!(server.end().await, Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_named_at_another_host_come_from_the_configured_cache_which_is_said() {
    let world = World::new().await;
    let setting = outhaul::demo::Setting {
        workspace: world.path("workspace"),
        exec_root: world.exec_root().display().to_string(),
        remote_cache: "grpc://elsewhere.example:9092".to_owned(),
        instance_name: String::new(),
    };
    let build = outhaul::demo::GeneratedBuild::new(|bytes| world.cache.store().put(bytes), setting, 1);
    let server = world.serve(&[]).await;
    world.play(&build, server.address()).await;
    world.assert_complete();
    let log = server.logged("elsewhere.example:9092").await;
    let line = log.lines().find(|l| l.contains("elsewhere.example")).unwrap();
    assert!(
        line.contains("INFO") && line.contains(&world.cache.endpoint()),
        "{line}"
    );
}
