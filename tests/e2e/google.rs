//! Google's credentials with a cache over TLS and a token endpoint of our own. Bazel itself fills the cache without them:
//! Debian's builds crash where they are given.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use outhaul_testkit::{Running, peers};

use crate::harness::{Outhaul, Scratch, Stage, Version, run};

#[test]
fn googles_credentials() {
    let name = concat!(module_path!(), "::googles_credentials");
    run(
        name,
        Version::Seven,
        "embedded",
        googles_token_reaches_the_cache_and_is_shown_nowhere,
    );
}

/// What the token endpoint gives out.
const TOKEN: &str = "ya29.hush-google-token";

/// nginx before a cache: over TLS, for those who have the token alone. It writes down who came with which credentials.
const NGINX: &str = "daemon off; master_process off; pid DIR/pid; error_log DIR/error.log;
events { worker_connections 256; }
http {
    log_format calls '$http_user_agent|$http_authorization|$status';
    access_log DIR/calls.log calls;
    client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fastcgi;
    uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
    server {
        listen ADDRESS ssl http2;
        ssl_certificate DIR/cert.pem;
        ssl_certificate_key DIR/key.pem;
        client_max_body_size 0;
        location / {
            if ($http_authorization != 'Bearer TOKEN') { return 401; }
            grpc_pass CACHE;
        }
    }
}
";

/// Requests that a token endpoint got.
type Asked = Arc<Mutex<Vec<String>>>;

/// A token endpoint on this machine, and its address.
fn token_endpoint(runtime: &tokio::runtime::Runtime, asked: &Asked) -> String {
    let asked = Arc::clone(asked);
    let app = axum::Router::new().fallback(async move |headers: axum::http::HeaderMap, body: String| {
        asked.lock().unwrap().push(format!("{headers:?} {body}"));
        format!(r#"{{"access_token":"{TOKEN}","expires_in":3600,"token_type":"Bearer"}}"#)
    });
    let app = app.layer(axum::middleware::map_response(
        async |mut response: axum::response::Response| {
            let json = axum::http::HeaderValue::from_static("application/json");
            response.headers_mut().insert("content-type", json);
            response
        },
    ));
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move { axum::serve(listener, app).await });
    format!("http://{address}/token")
}

fn googles_token_reaches_the_cache_and_is_shown_nowhere(stage: &Stage) {
    if !peers::are_there("googles_token_reaches_the_cache_and_is_shown_nowhere", &["nginx"]) {
        return;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let asked = Asked::default();
    let cache = stage.cache();
    let dir = Scratch::new("google");
    let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    fs::write(dir.join("cert.pem"), signed.cert.pem()).unwrap();
    fs::write(dir.join("key.pem"), signed.signing_key.serialize_pem()).unwrap();
    let (_nginx, address) = Running::listening("nginx", |address| {
        let config = NGINX
            .replace("ADDRESS", &address.to_string())
            .replace("CACHE", cache.url())
            .replace("TOKEN", TOKEN)
            .replace("DIR", &dir.path().display().to_string());
        fs::write(dir.join("nginx.conf"), config).unwrap();
        let mut nginx = Command::new(peers::program("nginx"));
        nginx.arg("-p").arg(dir.path());
        nginx.arg("-c").arg(dir.join("nginx.conf"));
        nginx
    });
    let account = serde_json::json!({
        "type": "service_account",
        "client_email": "me@project.example",
        "client_id": "1",
        "private_key_id": "k",
        "private_key": include_str!("../google/key.pem"),
        "token_uri": token_endpoint(&runtime, &asked),
    });
    let bazel = stage.bazel(&cache);
    let events = dir.join("events");
    let flag = format!("--build_event_binary_file={}", events.display());
    bazel.build(&["//gen:all", &flag]).ok();
    let credentials = dir.join("account.json");
    fs::write(&credentials, account.to_string()).unwrap();
    let out = dir.join("out");
    let args = [
        "bep".to_owned(),
        events.display().to_string(),
        format!("--output-dir={}", out.display()),
        format!("--remote-cache=grpcs://localhost:{}", address.port()),
        format!("--tls-certificate={}", dir.join("cert.pem").display()),
        format!("--google-credentials={}", credentials.display()),
    ];
    let ran = Outhaul::new().stateless(dir.path(), "fetch", &args).ok();
    let top = find(&out, "top.txt").unwrap_or_else(|| panic!("top.txt is missing; {ran}"));
    assert_eq!(fs::read_to_string(top).unwrap(), "middle\ntop\n");
    let calls = fs::read_to_string(dir.join("calls.log")).unwrap();
    assert!(calls.lines().any(|call| call.starts_with("outhaul/")), "{calls}");
    assert!(
        calls
            .lines()
            .all(|call| call.ends_with(&format!("|Bearer {TOKEN}|200"))),
        "{calls}"
    );
    // It is shown nowhere, and who gives it out does not get it back.
    assert!(!ran.err.contains(TOKEN) && !ran.out().contains(TOKEN), "{ran}");
    let asked = asked.lock().unwrap();
    assert!(
        !asked.is_empty() && asked.iter().all(|request| !request.contains(TOKEN)),
        "{asked:?}"
    );
}

/// The file of a name below a directory.
fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.ends_with(name) {
                return Some(path);
            }
        }
    }
    None
}
