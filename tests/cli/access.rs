//! Who may come in: tokens, certificates, whose process it is; and nothing is opened to others by mistake.

use std::{
    net::{SocketAddr, TcpListener as StdTcpListener},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use outhaul::{
    bes::{HoldPolicy, serve::routes},
    daemon::Services,
    invocation::policy::Policy,
    materialize::MaterializeOptions,
    record::Record,
    remote::{GrpcCache, RemoteOptions},
    roots::RootRules,
    sources::SourceRule,
    transport::Endpoint as CacheEndpoint,
};
use outhaul_testkit::{Running, clean, finish, in_time, until};
use rustix::process::Signal;
use rustls::pki_types::pem::PemObject as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Status};

use crate::{
    secured::{Pki, TOKEN, channel, publish},
    support::{World, install, outhaul, run},
};

fn code(result: Result<(), Status>) -> Code {
    result.map_or_else(|status| status.code(), |()| Code::Ok)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_listened_on_for_other_machines_unless_they_must_say_who_they_are() {
    let world = World::new().await;
    let pki = Pki::new(&world);
    let [certificate, key] = &pki.listen();
    let ca = &format!("--listen-tls-client-ca={}", pki.ca);
    let bes_token = &format!("--bes-token-file={}", pki.token);
    let admin_token = &format!("--admin-token-file={}", pki.token);
    let bes = "--bes-listen=0.0.0.0:0";
    let admin = "--admin-listen=[::]:0";
    for (args, parts) in [
        (vec![bes], ["--bes-listen=0.0.0.0:0", "--listen-tls-certificate"]),
        (
            vec![bes, bes_token],
            ["--bes-listen=0.0.0.0:0", "--listen-tls-certificate"],
        ),
        (
            vec![bes, certificate, key],
            ["--bes-listen=0.0.0.0:0", "--bes-token-file"],
        ),
        (
            vec![bes, certificate, key],
            ["--insecure", "--listen-tls-client-ca"],
        ),
        (
            vec![bes, certificate, bes_token],
            ["--listen-tls-key", "is required"],
        ),
        (
            vec![bes, ca, bes_token],
            ["--listen-tls-client-ca", "--listen-tls-certificate"],
        ),
        (vec![admin], ["--admin-listen=[::]:0", "--listen-tls-certificate"]),
        (
            vec![admin, certificate, key, bes_token],
            ["--admin-listen=[::]:0", "--admin-token-file"],
        ),
        (
            vec![admin, admin_token],
            ["--admin-listen=[::]:0", "--listen-tls-certificate"],
        ),
    ] {
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
            .args([world.state(), world.cache_flag()])
            .args(&args);
        finish(command).await.says(2, &parts);
        assert!(!std::path::Path::new(&world.path("state")).exists(), "{args:?}");
    }
    // What a service manager hands over is looked at as well.
    let inherited = || StdTcpListener::bind("0.0.0.0:0").unwrap();
    let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
    let started = |more: &[&str]| {
        let mut command = clean(Command::new("sh"));
        command
            .args(["-c", script, "sh", env!("CARGO_BIN_EXE_outhaul"), "serve"])
            .args(["--admin-listen=none", &world.state(), &world.cache_flag()])
            .args(more)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(inherited())));
        command
    };
    let refused = finish(started(&[])).await;
    refused.says(2, &["0.0.0.0", "--listen-tls-certificate"]);
    for more in [&["--insecure"][..], &[certificate, key, bes_token]] {
        let mut server = Running::serve(started(more)).await;
        server.signal(Signal::TERM);
        assert_eq!(server.end().await, Some(0));
    }
    let server = world.serve(&[bes, "--insecure"]).await;
    let address = server.addresses.last().unwrap().replace("0.0.0.0", "127.0.0.1");
    world.play(&world.build, &address).await;
    world.assert_complete();
}

#[tokio::test(flavor = "multi_thread")]
async fn build_tools_must_show_the_token_and_the_certificate_that_are_asked_for() {
    let world = World::new().await;
    let pki = Pki::new(&world);
    let [certificate, key] = &pki.listen();
    let ca = &format!("--listen-tls-client-ca={}", pki.ca);
    let token = &format!("--bes-token-file={}", pki.token);
    let bearer = &format!("Bearer {TOKEN}");
    let right: &[(&'static str, &str)] = &[("authorization", bearer)];
    let own: &[(&'static str, &str)] = &[("x-outhaul-token", TOKEN)];
    let wrong: &[(&'static str, &str)] = &[("authorization", "Bearer another-one-than-that")];
    let mut build = world.build.clone();

    // A token alone, on this machine.
    let mut server = world.serve(&[token]).await;
    for (headers, expected) in [
        (&[][..], Code::Unauthenticated),
        (wrong, Code::Unauthenticated),
        (right, Code::Ok),
        (own, Code::Ok),
    ] {
        let plain = channel(server.address(), None).await.unwrap();
        build = build.incremental();
        assert_eq!(
            code(publish(plain, &build, headers).await),
            expected,
            "{headers:?}"
        );
    }
    let plain = channel(server.address(), None).await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(plain);
    let answer = health
        .check(tonic_health::pb::HealthCheckRequest::default())
        .await;
    assert!(answer.is_ok(), "probes can show no token");
    let log = server.logged("refused a call").await;
    assert!(!log.contains("another-one-than-that"), "{log}");
    server.signal(Signal::TERM);
    assert_eq!(server.end().await, Some(0));

    // With TLS; with certificates; with both.
    for (args, callers) in [
        (
            vec![certificate, key, token],
            vec![
                (false, right, true),
                (false, wrong, false),
                (true, &[][..], false),
            ],
        ),
        (
            vec![certificate, key, ca],
            vec![
                (true, &[][..], true),
                (false, &[][..], false),
                (false, right, false),
            ],
        ),
        (
            vec![certificate, key, ca, token],
            vec![(true, right, true), (true, &[][..], false), (false, right, false)],
        ),
    ] {
        let args: Vec<&str> = args.iter().map(|arg| arg.as_str()).collect();
        let mut server = world.serve(&args).await;
        // Those who connect and say nothing keep nobody out.
        let address = server.address().trim_start_matches("grpc://");
        let mut silent = Vec::new();
        for _ in 0..20 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        for (with_certificate, headers, welcome) in callers {
            build = build.incremental();
            let came = match channel(server.address(), Some(pki.trusting(with_certificate))).await {
                Ok(channel) => publish(channel, &build, headers).await.is_ok(),
                Err(_) => false,
            };
            assert_eq!(came, welcome, "{args:?} {with_certificate} {headers:?}");
        }
        let plain = channel(server.address(), None).await;
        let came = match plain {
            Ok(channel) => publish(channel, &build, right).await.is_ok(),
            Err(_) => false,
        };
        assert!(!came, "unencrypted");
        server.signal(Signal::TERM);
        assert_eq!(server.end().await, Some(0));
    }
}

/// An event service that notes the headers of all calls.
pub async fn upstream(world: &World) -> (String, Arc<Mutex<Vec<http::HeaderMap>>>) {
    let (record, _) = Record::open(&world.dir.path().join("upstream")).unwrap();
    let cache = RemoteOptions::new(CacheEndpoint::parse("--remote-cache", &world.cache.endpoint()).unwrap());
    let services = Services::open(
        record,
        Policy::default(),
        RootRules::default(),
        SourceRule::Fixed(GrpcCache::new(cache).unwrap().into()),
        MaterializeOptions::default(),
        false,
    );
    let (routes, _) = routes(
        services
            .unwrap()
            .events(HoldPolicy::default(), None, None, Default::default()),
    )
    .await
    .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let heard = Arc::<Mutex<Vec<http::HeaderMap>>>::default();
    let noted = heard.clone();
    let note = tower::util::MapRequestLayer::new(move |request: http::Request<tonic::body::Body>| {
        noted.lock().unwrap().push(request.headers().clone());
        request
    });
    let server = tonic::transport::Server::builder().layer(note).add_routes(routes);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (format!("grpc://{address}"), heard)
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_token_is_neither_passed_on_nor_kept_and_other_headers_are() {
    let world = World::new().await;
    let pki = Pki::new(&world);
    let (backend, heard) = upstream(&world).await;
    let token = format!("--bes-token-file={}", pki.token);
    let backend = format!("--bes-backend={backend}");
    let server = world.serve(&[&token, &backend]).await;
    let bearer = format!("Bearer {TOKEN}");
    let theirs = ("authorization", "Bearer for-the-upstream-service");
    let mut build = world.build.clone();
    for own in [("authorization", bearer.as_str()), ("x-outhaul-token", TOKEN)] {
        build = build.incremental();
        let channel = channel(server.address(), None).await.unwrap();
        publish(channel, &build, &[own, theirs, ("x-api-key", "theirs-as-well")])
            .await
            .unwrap();
    }
    let heard = heard.lock().unwrap().clone();
    assert!(!heard.is_empty());
    for headers in &heard {
        assert_eq!(headers["authorization"], theirs.1);
        assert_eq!(headers["x-api-key"], "theirs-as-well");
        assert!(!format!("{headers:?}").contains(TOKEN));
    }
    // What is being written just now cannot be read yet.
    let mut journals = 0;
    until(
        "what goes upstream after a restart is in both journals",
        async || {
            journals = 0;
            for entry in std::fs::read_dir(world.path("state/journal")).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file()
                    && let Ok(plain) = zstd::decode_all(std::fs::File::open(&path).unwrap())
                    && let text = String::from_utf8_lossy(&plain).into_owned()
                    && text.contains("for-the-upstream-service")
                {
                    assert!(!text.contains(TOKEN), "{}", path.display());
                    journals += 1;
                }
            }
            journals >= 2
        },
    )
    .await;
    assert_eq!(journals, 2, "what goes upstream after a restart needs it");
}

/// Status line and body of a request over any connection.
async fn get(mut connection: impl AsyncRead + AsyncWrite + Unpin, path: &str, header: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{header}Connection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A server that closes without TLS's word of it is an error.
    let _ = in_time(connection.read_to_end(&mut answer)).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_shows_its_counts_to_who_has_the_token_and_its_health_to_all() {
    let world = World::new().await;
    let pki = Pki::new(&world);
    let [certificate, key] = &pki.listen();
    let token = &format!("--admin-token-file={}", pki.token);
    let server = world
        .serve(&["--admin-listen=127.0.0.1:0", certificate, key, token])
        .await;
    let log = server.logged("health and metrics on https://").await;
    let address = log.split("health and metrics on https://").nth(1).unwrap();
    let address = address.lines().next().unwrap().trim().to_owned();
    let mut roots = rustls::RootCertStore::empty();
    for authority in rustls::pki_types::CertificateDer::pem_slice_iter(pki.ca_pem.as_bytes()) {
        roots.add(authority.unwrap()).unwrap();
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connect = async || {
        let stream = TcpStream::connect(&address).await.unwrap();
        let name = "localhost".try_into().unwrap();
        tokio_rustls::TlsConnector::from(Arc::new(config.clone()))
            .connect(name, stream)
            .await
            .unwrap()
    };
    let bearer = format!("Authorization: Bearer {TOKEN}\r\n");
    for (path, header, status) in [
        ("/healthz", "", "200"),
        ("/readyz", "", "200"),
        ("/metrics", "", "401"),
        (
            "/metrics",
            "Authorization: Bearer another-one-than-that\r\n",
            "401",
        ),
        ("/metrics", &*bearer, "200"),
        ("/elsewhere", "", "401"),
    ] {
        let answer = get(connect().await, path, header).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{path} {header}: {answer}"
        );
        assert_eq!(answer.contains("outhaul_"), (path, status) == ("/metrics", "200"));
    }
    let plain = get(TcpStream::connect(&address).await.unwrap(), "/healthz", "").await;
    assert!(!plain.contains("200"), "unencrypted: {plain}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_open_the_control_port_too() {
    let world = World::new().await;
    let pki = Pki::new(&world);
    let [certificate, key] = &pki.listen();
    let ca = format!("--listen-tls-client-ca={}", pki.ca);
    let server = world
        .serve(&["--control-listen=127.0.0.1:0", certificate, key, &ca])
        .await;
    let log = server.logged("control API on").await;
    let line = log.lines().find(|line| line.contains("control API on")).unwrap();
    let control = format!(
        "--control=grpcs://localhost:{}",
        line.rsplit(':').next().unwrap().trim()
    );
    let trusted = format!("--tls-certificate={}", pki.ca);
    let ours = [
        format!("--tls-client-certificate={}", pki.client.0),
        format!("--tls-client-key={}", pki.client.1),
    ];
    run(["status", "--json", &control, &trusted, &ours[0], &ours[1]])
        .await
        .expect(0);
    run(["wait", "--timeout=100ms", &control, &trusted, &ours[0], &ours[1]])
        .await
        .expect(4);
    run(["status", &control, &trusted])
        .await
        .says(2, &["--tls-client-certificate"]);
    let token = format!("--control-token-file={}", pki.token);
    run(["status", &control, &trusted, &token]).await.expect(1);
}

/// Needs root, to be somebody else.
#[tokio::test(flavor = "multi_thread")]
async fn other_users_processes_hear_whom_a_listener_is_for() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("only root can try this");
        return;
    }
    let world = World::new().await;
    let pki = Pki::new(&world);
    let socket = world.path("bes.sock");
    // Everybody gets as far as the sockets, and finds a program that talks to them.
    let open = |path: &str| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    };
    let program = world.path("outhaul");
    install(std::path::Path::new(env!("CARGO_BIN_EXE_outhaul")), &program);
    std::fs::set_permissions(world.dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let serving = world.serve(&[&format!("--bes-listen=unix:{socket}")]).await;
    std::fs::set_permissions(world.path("state"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let control = world.path("state/control.sock");
    open(&socket);
    open(&control);
    let as_nobody = async |args: &[&str]| {
        let mut command = Command::new(&program);
        command.uid(NOBODY).gid(NOBODY).current_dir("/").args(args);
        finish(clean(command)).await
    };
    let said = [
        format!("user {NOBODY}"),
        "only accepts processes of user 0".to_owned(),
    ];
    let said: Vec<&str> = said.iter().map(String::as_str).collect();
    let probe = world.file("part0.h").1.to_string();
    let cache = async |endpoint: &str| {
        let flag = format!("--remote-cache={endpoint}");
        as_nobody(&["fetch", "blob", &probe, "-o", "-", &flag, "--remote-retries=0"]).await
    };
    as_nobody(&["status", &format!("--control=unix:{control}")])
        .await
        .says(1, &said);
    cache(&format!("unix:{socket}")).await.says(1, &said);
    // On a port, which is not as private as a socket's file, they are not greeted at all: to them, nobody serves there.
    let mut line = None;
    until("it is logged", async || {
        let refused = cache(&serving.addresses[0]).await;
        assert!(
            refused.code != Some(0) && !refused.err.contains("this port"),
            "{refused}"
        );
        // Logged at most once a second, and callers of the socket were logged just now.
        let log = serving.stderr();
        line = log
            .lines()
            .find(|line| line.contains("refused a connection"))
            .map(str::to_owned);
        line.is_some()
    })
    .await;
    let line = line.unwrap();
    assert!(said.iter().all(|part| line.contains(part)), "{line}");
    let wrapper = world.path("bazel");
    install(
        std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dist/bazel/tools/bazel")),
        &wrapper,
    );
    open(&wrapper);
    for (uid, is_theirs) in [(0, true), (NOBODY, false)] {
        let mut command = Command::new(&wrapper);
        command.uid(uid).gid(uid).current_dir("/").arg("build");
        let mut command = clean(command);
        command
            .env("BAZEL_REAL", "/bin/echo")
            .env("OUTHAUL_BES", &serving.addresses[0]);
        let given = finish(command).await.expect(0).out();
        assert_eq!(given.contains("--bes_backend"), is_theirs, "{uid}: {given}");
    }
    drop(serving);

    // With a token, or if all may, they get on: to where such a call is not known.
    let token = format!("--bes-token-file={}", pki.token);
    let state = format!("--state-dir={}", world.path("state2"));
    let serving = world.serve(&[&state, &token]).await;
    let header = format!("--remote-header=x-outhaul-token={TOKEN}");
    let flag = format!("--remote-cache={}", serving.address());
    let args = ["fetch", "blob", &probe, "-o", "-", &flag, "--remote-retries=0"];
    as_nobody(&args).await.says(1, &["token"]);
    let with_token = as_nobody(&[&args[..], &[&header]].concat()).await;
    assert!(
        !with_token.err.contains("this port only accepts"),
        "{}",
        with_token.err
    );
    drop(serving);
    let state = format!("--state-dir={}", world.path("state3"));
    let serving = world.serve(&[&state, "--insecure"]).await;
    let welcome = cache(serving.address()).await;
    assert!(!welcome.err.contains("this port only accepts"), "{}", welcome.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_daemon_keeps_is_its_users_alone() {
    let world = World::new().await;
    let mut command = clean(Command::new("sh"));
    // Whatever the user's mask is.
    command
        .args([
            "-c",
            "umask 000; exec \"$@\"",
            "sh",
            env!("CARGO_BIN_EXE_outhaul"),
        ])
        .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
        .args([world.state(), world.cache_flag()]);
    let server = Running::serve(command).await;
    world.play(&world.build, server.address()).await;
    let mut seen = 0;
    let mut open = vec![std::path::PathBuf::from(world.path("state"))];
    while let Some(path) = open.pop() {
        let metadata = std::fs::symlink_metadata(&path).unwrap();
        let mode = metadata.permissions().mode() & 0o7777;
        let is_inside = path != std::path::Path::new(&world.path("state"));
        // Nobody gets below the state directory; what lies there is closed all the same where it may hold secrets.
        if !is_inside || path.to_string_lossy().contains("journal") {
            assert_eq!(mode & 0o077, 0, "{} has mode {mode:04o}", path.display());
        }
        seen += 1;
        if metadata.is_dir() {
            open.extend(
                std::fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
    }
    assert!(seen > 4);
}
