//! Secrets are planted wherever they can come in, and looked for in everything that is shown.
//!
//! What is private to our user may hold them: the journal, the configuration, what is passed on to whom it is meant for.

use std::sync::{Arc, Mutex};

use axum::{Router, extract::State};
use outhaul::demo::GeneratedBuild;
use outhaul_testkit::{Ran, Running, cache::EmbeddedCache, finish, in_time};
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Status, body::Body};

use crate::{
    secured::{channel, publish_events},
    support::{World, googles_account, outhaul, program},
};

/// What no secret may be shown in: where it is from, and the text.
type Shown = Vec<(String, String)>;

/// Secrets, each of which says where it was planted.
#[derive(Default)]
struct Secrets(Mutex<Vec<String>>);

impl Secrets {
    fn plant(&self, at: &str) -> String {
        let secret = format!("hush-{at}-hush");
        self.0.lock().unwrap().push(secret.clone());
        secret
    }

    #[track_caller]
    fn assert_kept(&self, shown: &Shown) {
        let secrets = self.0.lock().unwrap();
        assert!(!shown.is_empty() && secrets.len() > 8);
        let mut reported = Vec::new();
        for (place, text) in shown {
            for secret in secrets.iter().filter(|secret| text.contains(*secret)) {
                let line = text
                    .lines()
                    .find(|line| line.contains(secret))
                    .unwrap_or_default();
                let line: String = line.chars().take(600).collect();
                reported.push(format!("{secret} is shown in {place}: {line}"));
            }
        }
        assert!(reported.is_empty(), "{}", reported.join("\n"));
    }
}

/// A field of a message, with bytes in it.
fn field(number: u32, content: impl AsRef<[u8]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, &mut bytes);
    prost::encoding::encode_varint(content.as_ref().len() as u64, &mut bytes);
    bytes.extend_from_slice(content.as_ref());
    bytes
}

/// The build's events with secrets in its command lines, environment and output, as Bazel has them there.
fn events(build: &GeneratedBuild, secrets: &Secrets, name: &str) -> Vec<Vec<u8>> {
    let plant = |at: &str| secrets.plant(&format!("{name}-{at}"));
    let header = format!("--remote_header=authorization=Bearer {}", plant("build-header"));
    let bes_header = format!("--bes_header=x-key={}", plant("build-bes-header"));
    let client_env = format!("--client_env=GITHUB_PAT={}", plant("client-env"));
    let action_env = format!("--action_env=API_KEY={}", plant("action-env"));
    let url = format!("--bes_results_url=https://me:{}@ci.example/", plant("user-info"));
    let arguments = [&header, &bes_header, &client_env, &action_env, &url];
    let option = |text: &str, name: &str, value: &str| {
        field(1, [field(1, text), field(2, name), field(3, value)].concat())
    };
    let structured = plant("structured");
    let value = format!("authorization=Bearer {structured}");
    let options = option(
        &format!("--remote_cache_header={value}"),
        "remote_cache_header",
        &value,
    );
    let printed = format!("running: tool --remote_header=x={} now", plant("printed"));

    let mut events: Vec<_> = build.events().collect();
    // `started`: all options as one text.
    let described = format!("{header} {client_env} --x={}", plant("options-description"));
    events[0].extend(field(5, field(4, described)));
    // The canonical command line, one section more.
    events[1].extend(field(
        22,
        field(2, [field(1, "command options"), field(3, options)].concat()),
    ));
    let all = |number| {
        arguments
            .iter()
            .flat_map(|text| field(number, text.as_str()))
            .collect::<Vec<u8>>()
    };
    let unstructured = [field(1, field(11, "")), field(12, all(1))].concat();
    let parsed = [field(1, field(12, "")), field(13, [all(3), all(4)].concat())].concat();
    let progress = [
        field(1, field(2, "")),
        field(3, [field(1, &printed), field(2, &printed)].concat()),
    ]
    .concat();
    events.splice(2..2, [unstructured, parsed, progress]);
    events
}

/// Refuses every call, and quotes all headers that it was sent.
async fn echo() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let refuse = tower::service_fn(|request: http::Request<Body>| async move {
        let words: Vec<_> = request
            .headers()
            .iter()
            .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value.as_bytes())))
            .collect();
        let status = Status::permission_denied(format!("you are not welcome with {}", words.join(", ")));
        Ok::<_, std::convert::Infallible>(status.into_http::<Body>())
    });
    let server = tonic::transport::Server::builder();
    tokio::spawn(async move {
        server
            .serve_with_incoming(refuse, TcpListenerStream::new(listener))
            .await
    });
    format!("grpc://{address}")
}

/// Takes whatever is posted.
async fn receiver() -> (String, Arc<Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let got = Arc::<Mutex<String>>::default();
    let take =
        async |State(got): State<Arc<Mutex<String>>>, body: String| got.lock().unwrap().push_str(&body);
    let app = Router::new().fallback(take).with_state(got.clone());
    tokio::spawn(async move { axum::serve(listener, app).await });
    (address, got)
}

struct Planted {
    world: World,
    secrets: Secrets,
    shown: Shown,
}

impl Planted {
    fn script(&self, name: &str, text: &str) -> String {
        let path = self.world.path(name);
        program(&path, &format!("#!/bin/sh\ncat >/dev/null\n{text}\n"));
        path
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.world.path(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Runs a command and keeps what it says.
    async fn run(&mut self, place: &str, args: &[&str], variables: &[(&str, &str)]) -> Ran {
        let mut command = outhaul();
        command.args(args).envs(variables.iter().copied());
        let ran = finish(command).await;
        let text = format!("{}\n{}", String::from_utf8_lossy(&ran.stdout), ran.err);
        self.shown.push((format!("{place}: {}", args[0]), text));
        ran
    }

    /// A daemon with secrets in all its settings, and a build through it; everything that it, and what can be asked of
    /// it, says.
    async fn build(&mut self, name: &str, cache: &str, credentials: &str, log: &str) {
        let (receiver, posted) = receiver().await;
        let plant = |at: &str| self.secrets.plant(&format!("{name}-{at}"));
        let (bes_token, admin_token, control_token) =
            (plant("bes-token"), plant("admin-token"), plant("control-token"));
        let file = |kind: &str, text: &str| self.file(&format!("{name}.{kind}"), text);
        let config = file(
            "toml",
            &format!(
                "[serve]\nremote_header = ['x-from-file=Bearer {}', 'x-region=eu']\n",
                plant("config-file")
            ),
        );
        let state = format!("--state-dir={}", self.world.path(&format!("state-{name}")));
        // What is started shows its command line to every user of the machine.
        let started = self.world.path(&format!("{name}.started"));
        let collector = echo().await.replace("grpc://", "");
        let otlp = format!("--otlp-endpoint=http://me:{}@{collector}", plant("otlp-url"));
        let mut command = outhaul();
        command
            .args([
                "serve",
                "--bes-listen=127.0.0.1:0",
                "--admin-listen=127.0.0.1:0",
                &state,
            ])
            .args([
                "--control-listen=127.0.0.1:0",
                "--remote-retries=1",
                "--remote-retry-max-delay=50ms",
            ])
            .args([
                format!("--config={config}"),
                format!("--log={log}"),
                format!("--remote-cache={cache}"),
            ])
            .arg(format!("--remote-header=x-basic=Basic {}", plant("header")))
            .arg(credentials)
            .arg(format!("--bes-backend={}", echo().await))
            .arg(format!("--bes-token-file={}", file("bes", &bes_token)))
            .arg(format!("--admin-token-file={}", file("admin", &admin_token)))
            .arg(format!(
                "--control-token-file={}",
                file("control", &control_token)
            ))
            .arg(format!(
                "--notify-url=http://me:{}@{receiver}/{}",
                plant("url"),
                plant("path")
            ))
            .arg(format!(
                "--notify-url=http://me:{}@127.0.0.1:1/?t={}",
                plant("url2"),
                plant("query")
            ))
            .args(cfg!(feature = "otlp").then_some(otlp))
            .env(
                "OTEL_EXPORTER_OTLP_HEADERS",
                format!("x-otlp-key={}", plant("otlp-header")),
            )
            .arg(format!(
                "--notify-secret-file={}",
                file("signing", &plant("notify-secret"))
            ))
            .arg(format!(
                "--on-settled=TOKEN={}; tr '\\0' ' ' < /proc/$$/cmdline >> {started}; no-such-program",
                plant("command")
            ))
            .env(
                "OUTHAUL_BES_HEADER",
                format!("x-upstream-key={}", plant("bes-header")),
            );
        let mut server = Running::serve(command).await;

        let client_header = plant("client-header");
        let build = self.world.build.incremental();
        let events = events(&build, &self.secrets, name);
        let own = ("x-outhaul-token", bes_token.as_str());
        let theirs = ("x-buildbuddy-api-key", client_header.as_str());
        let address = channel(server.address(), None).await.unwrap();
        publish_events(address, &build, events.into_iter(), &[own, theirs])
            .await
            .unwrap();
        // A caller who is turned away.
        let wrong = plant("wrong-token");
        let address = channel(server.address(), None).await.unwrap();
        let refused = publish_events(
            address,
            &build,
            std::iter::empty(),
            &[("x-outhaul-token", &wrong)],
        )
        .await;
        self.shown
            .push((format!("{name}: refused"), refused.unwrap_err().to_string()));

        let id = build.invocation_id();
        let output = self.world.exec_root().join(&self.world.file("app/app").0.path);
        let output = output.display().to_string();
        let export = self.world.path(&format!("{name}.exported"));
        let trace = "--log=trace,outhaul=trace";
        for args in [
            vec!["status", "--json", &state, &id],
            vec!["status", &state, &id],
            vec!["ls", "--json", &state, &id],
            vec!["stat", "--json", &state, &output],
            vec!["why", "--json", &state, &output],
            vec!["wait", "--json", &state, "--invocation", &id, "--timeout=30s"],
            vec!["get", "--json", &state, &output],
            vec![
                "stage",
                "--json",
                &state,
                "--invocation",
                &id,
                "--to",
                &self.world.path(name),
            ],
            vec!["export", &state, &id, "--output", &export],
        ] {
            let args: Vec<String> = args.into_iter().chain([trace]).map(str::to_owned).collect();
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            self.run(name, &args, &[]).await;
        }
        let archive = std::fs::read(&export).unwrap();
        let archive = zstd::decode_all(&*archive).unwrap_or(archive);
        assert!(!archive.is_empty());
        self.shown.push((
            format!("{name}: export"),
            String::from_utf8_lossy(&archive).into_owned(),
        ));

        let log = server.logged("health and metrics on http://").await;
        let admin = log.split("health and metrics on http://").nth(1).unwrap();
        let admin = admin.lines().next().unwrap().trim();
        let (build, chart) = (format!("/build/{id}"), format!("/build/{id}/timeline"));
        for path in [
            "/healthz",
            "/readyz",
            "/metrics",
            "/elsewhere",
            "/",
            &build,
            &chart,
            "/outputs",
            "/caches",
            "/disk/usage?by=target",
        ] {
            let page = get(admin, path, &admin_token).await;
            let is_ok = page.starts_with("HTTP/1.1 200") || path == "/elsewhere";
            assert!(is_ok, "{path}: {page}");
            self.shown.push((format!("{name}: {path}"), page));
        }
        let port = log.lines().find(|line| line.contains("control API on")).unwrap();
        let control = format!(
            "--control=grpc://localhost:{}",
            port.rsplit(':').next().unwrap().trim()
        );
        let wrong = format!(
            "--control-token-file={}",
            self.file("wrong", &self.secrets.plant(&format!("{name}-wrong-control")))
        );
        self.run(name, &["status", &control, &wrong, trace], &[]).await;

        server.signal(Signal::TERM);
        assert_eq!(server.end().await, Some(0));
        self.shown.push((
            format!("{name}: the daemon's log"),
            server.logged("shutting down: SIGTERM").await,
        ));
        let posted = posted.lock().unwrap().clone();
        assert!(posted.contains("invocation_settled"), "{posted}");
        self.shown.push((format!("{name}: notifications"), posted));
        let started = std::fs::read_to_string(&started).unwrap();
        assert!(started.contains("sh -c"), "{started}");
        self.shown.push((format!("{name}: what was started"), started));
    }
}

async fn get(address: &str, path: &str, token: &str) -> String {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\nConnection: close\r\n\r\n"
    );
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    in_time(connection.read_to_string(&mut answer)).await.unwrap();
    answer
}

async fn planted() -> Planted {
    let secrets = Secrets::default();
    let cache = EmbeddedCache::builder().required_header("x-token", &secrets.plant("helper"));
    Planted {
        world: World::with(cache, "").await,
        secrets,
        shown: Shown::new(),
    }
}

/// Plants the lines of the private key of a service account, and its token.
async fn account(planted: &Planted) -> String {
    let account = googles_account(r#"{"access_token":"hush-google-hush","expires_in":3600}"#).await;
    planted.secrets.plant("google");
    let read: serde_json::Value = serde_json::from_str(&account).unwrap();
    let key = read["private_key"].as_str().unwrap();
    let lines = key.lines().filter(|line| !line.starts_with("---"));
    planted.secrets.0.lock().unwrap().extend(lines.map(str::to_owned));
    account
}

/// Everything of ours, and everything of the libraries below.
const LOGS: [&str; 2] = ["trace", "trace,outhaul=trace"];

#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_goes_well_shows_no_secret() {
    let mut planted = planted().await;
    let helper = planted.script(
        "helper",
        "echo hush-helper-words-hush >&2; echo '{\"headers\":{\"x-token\":[\"hush-helper-hush\"]}}'",
    );
    let helper = format!("--credential-helper={helper}");
    planted.secrets.plant("helper-words");
    let cache = planted.world.cache.endpoint();
    for (n, log) in LOGS.into_iter().enumerate() {
        let _ = std::fs::remove_dir_all(planted.world.exec_root().join("bazel-out"));
        planted.build(&format!("well{n}"), &cache, &helper, log).await;
        planted.world.assert_complete();
    }
    planted.secrets.assert_kept(&planted.shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_quotes_what_it_was_sent_makes_no_secret_known() {
    let mut planted = planted().await;
    let secret = planted.secrets.plant("quoted");
    let helper = planted.script(
        "helper",
        &format!("echo '{{\"headers\":{{\"authorization\":[\"Bearer {secret}\"]}}}}'"),
    );
    let helper = format!("--credential-helper={helper}");
    for (n, log) in LOGS.into_iter().enumerate() {
        planted
            .build(&format!("quoted{n}"), &echo().await, &helper, log)
            .await;
    }
    let said = |what| planted.shown.iter().any(|(_, text)| text.contains(what));
    assert!(said("you are not welcome"), "the cache's words are not heard of");
    assert!(said("<concealed>"), "nothing was quoted");
    planted.secrets.assert_kept(&planted.shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn googles_key_and_token_are_shown_nowhere() {
    let secrets = Secrets::default();
    let cache = EmbeddedCache::builder().required_header("authorization", "Bearer hush-google-hush");
    let mut planted = Planted {
        world: World::with(cache, "").await,
        secrets,
        shown: Shown::new(),
    };
    let account = account(&planted).await;
    let credentials = format!("--google-credentials={}", planted.file("account.json", &account));
    let endpoint = planted.world.cache.endpoint();
    let [_, log] = LOGS;
    planted.build("google", &endpoint, &credentials, log).await;
    planted.world.assert_complete();
    planted
        .build("google-quoted", &echo().await, &credentials, log)
        .await;
    // Files that are something like it.
    let [half, mixed] = [
        &account[..account.len() / 2],
        &account.replace("token_uri", "type"),
    ];
    for (name, text) in [("half", half), ("mixed", mixed)] {
        let wrong = format!("--google-credentials={}", planted.file(name, text));
        let cache = format!("--remote-cache={endpoint}");
        let state = planted.world.state();
        planted
            .run(name, &["serve", &cache, &state, &wrong], &[])
            .await
            .says(2, &["--google-credentials="]);
    }
    planted.secrets.assert_kept(&planted.shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn helpers_that_fail_and_settings_that_are_wrong_are_reported_without_their_secrets() {
    let mut planted = planted().await;
    let endpoint = planted.world.cache.endpoint();
    let digest = planted.world.file("part0.h").1.to_string();
    let cache = format!("--remote-cache={endpoint}");
    for (name, script) in [
        ("fails", "echo $SECRET; echo + curl -u me:$SECRET >&2; exit 7"),
        ("no-json", "echo $SECRET"),
        ("no-headers", "echo '{\"headers\":{\"x\":\"'$SECRET'\"}}'"),
        (
            "no-name",
            "echo '{\"headers\":{\"authorization: '$SECRET'\":[\"x\"]}}'",
        ),
        (
            "no-value",
            "printf '{\"headers\":{\"x\":[\"%s\\\\u0007\"]}}' $SECRET",
        ),
        ("no-time", "echo '{\"headers\":{},\"expires\":\"'$SECRET'\"}'"),
        ("killed", "echo $SECRET; kill -9 $$"),
    ] {
        let secret = planted.secrets.plant(name);
        let helper = planted.script(name, script);
        let helper = format!("--credential-helper={helper}");
        let args = [
            "fetch",
            "blob",
            &digest,
            "-o",
            "-",
            &cache,
            &helper,
            "--remote-retries=0",
            "--log=trace,outhaul=trace",
        ];
        let ran = planted.run(name, &args, &[("SECRET", &secret)]).await;
        assert_eq!(ran.code, Some(1), "{name}: {}", ran.err);
    }
    let state = planted.world.state();
    for (name, flag) in [
        ("no-equals", "--remote-header={}"),
        ("basic", "--remote-header=authorization: Basic {}=="),
        ("newline", "--remote-header=x=a\n{}"),
        ("bes", "--bes-header=authorization: Bearer {}="),
        ("user", "--remote-cache=grpcs://me:{}@host"),
        ("user-and-port", "--remote-cache=grpc://me:{}@host:x"),
        ("http", "--remote-cache=https://me:{}@host:0/path"),
        ("backend", "--bes-backend=grpc://me:{}@host:x"),
        ("backend-scheme", "--bes-backend=ftp://me:{}@host"),
        ("allowed", "--allow-remote-cache=ftp://me:{}@host"),
        ("notify", "--notify-url=ftp://me:{}@host/"),
        ("notify-path", "--notify-url=http://no host/{}"),
        ("control", "--control-listen=https://me:{}@host"),
        ("bes-listen", "--bes-listen=https://me:{}@host"),
        ("admin-listen", "--admin-listen=https://me:{}@host"),
    ] {
        let secret = planted.secrets.plant(name);
        let wrong = flag.replace("{}", &secret);
        let mut args = vec!["serve", "--admin-listen=none", "--bes-listen=127.0.0.1:0", &state];
        args.push(if name == "allowed" {
            "--remote-cache=from-build"
        } else {
            &cache
        });
        args.push(&wrong);
        if name == "bes" {
            args.push("--bes-backend=grpc://127.0.0.1:1");
        }
        let ran = planted.run(name, &args, &[]).await;
        assert_eq!(ran.code, Some(2), "{name}: {}", ran.err);
        let flag = wrong.split_once('=').unwrap().0;
        assert!(ran.err.contains(flag), "{name}: {}", ran.err);
        // The same from the environment, and from the file.
        let variable = flag.trim_start_matches('-').replace('-', "_");
        let quoted = format!("{variable} = {:?}\n", wrong.split_once('=').unwrap().1);
        let file = format!("--config={}", planted.file("wrong.toml", &quoted));
        let last = args.iter().position(|arg| *arg == wrong).unwrap();
        args[last] = &file;
        // What the command line says counts more.
        args.retain(|arg| arg.split('=').next() != Some(flag));
        let ran = planted.run(name, &args, &[]).await;
        assert_eq!(ran.code, Some(2), "{name}: {}", ran.err);
    }
    // A file that is no TOML is not quoted.
    let secret = planted.secrets.plant("toml");
    let file = format!(
        "--config={}",
        planted.file("torn.toml", &format!("remote_header = [ 'x={secret}\n"))
    );
    planted
        .run("toml", &["serve", &file, &state], &[])
        .await
        .says(2, &["torn.toml"]);
    for kind in ["bes", "admin", "control"] {
        let secret = planted.secrets.plant(&format!("{kind}-two-lines"));
        let flag = format!(
            "--{kind}-token-file={}",
            planted.file("two", &format!("{secret}\n{secret}\n"))
        );
        planted
            .run(kind, &["serve", &cache, &state, &flag], &[])
            .await
            .says(2, &[&flag]);
    }
    planted.secrets.assert_kept(&planted.shown);
}
