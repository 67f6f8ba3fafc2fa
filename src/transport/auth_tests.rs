//! Credential helpers are real programs here: shell scripts in a temporary directory.

use std::{io::Write as _, path::Path};

use super::*;
use crate::transport::Endpoint;

fn options(endpoint: &str) -> ConnectOptions {
    ConnectOptions::new(Endpoint::parse("--remote-cache", endpoint).unwrap())
}

/// Written by a shell: a file that this process holds open for writing, if only in the child that another test is
/// starting, can't be executed.
fn script(dir: &Path, body: &str) -> String {
    let path = dir.join("helper");
    let path = path.to_str().unwrap();
    let mut shell = std::process::Command::new("sh")
        .args(["-c", "cat > \"$0\" && chmod +x \"$0\"", path])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let text = format!("#!/bin/sh\n{body}\n");
    shell.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(shell.wait().unwrap().success());
    path.to_owned()
}

async fn value(auth: &Auth, name: &str) -> Option<String> {
    let (headers, _) = auth.headers(SERVICE).await.unwrap();
    let header = headers.iter().find(|header| header.name() == name)?;
    Some(header.value().to_owned())
}

#[test]
fn what_others_could_read_on_the_way_is_known() {
    for (endpoint, header, is_unencrypted) in [
        ("http://cache.example.com", true, true),
        ("http://192.0.2.1:8080/team", true, true),
        ("http://cache.example.com", false, false),
        ("https://cache.example.com", true, false),
        ("http://localhost:1", true, false),
        ("http://127.0.0.1:1", true, false),
        ("http://[::1]:1", true, false),
    ] {
        let mut options = ConnectOptions::new(Endpoint::parse_cache("--remote-cache", endpoint).unwrap());
        options
            .headers
            .extend(header.then(|| Header::basic("user", "password")));
        let is = |options: &ConnectOptions| Auth::new(options).unwrap().is_unencrypted(options);
        assert_eq!(is(&options), is_unencrypted, "{endpoint}");
        options.proxy = Some("/run/proxy.sock".into());
        assert!(!is(&options), "{endpoint} by a socket");
        if is_unencrypted {
            options.proxy = None;
            options.headers.clear();
            options.credential_helpers = vec!["helper".to_owned()];
            assert!(is(&options), "{endpoint} with a helper");
        }
    }
}

const SERVICE: &str = "a.Service";

#[tokio::test]
async fn headers_are_never_shown() {
    let mut options = options("grpc://localhost:1");
    options
        .headers
        .push(Header::parse("--remote-header", "x-b=s3cret").unwrap());
    let auth = Auth::new(&options).unwrap();
    let (headers, run) = auth.headers(SERVICE).await.unwrap();
    assert_eq!(run, None);
    assert!(!format!("{headers:?} {auth:?}").contains("s3cret"));
}

#[test]
fn the_closest_scope_wins() {
    let chosen = |endpoint: &str, helpers: &[&str]| {
        let mut options = options(endpoint);
        options.credential_helpers = helpers.iter().map(|&h| h.to_owned()).collect();
        options.workspace = Some("/ws".into());
        Helper::choose(&options)
            .unwrap()
            .map(|h| h.path.to_str().unwrap().to_owned())
    };
    let helpers = [
        "cache.a.example=/exact",
        "/any",
        "*.a.example=%workspace%/tools/closer",
        "*.example=in-path",
    ];
    for (endpoint, path) in [
        ("grpcs://cache.a.example", "/exact"),
        ("grpcs://other.a.example", "/ws/tools/closer"),
        ("grpcs://a.example", "/ws/tools/closer"),
        ("grpcs://b.example", "in-path"),
        ("grpcs://notexample", "/any"),
    ] {
        assert_eq!(chosen(endpoint, &helpers).as_deref(), Some(path), "{endpoint}");
    }
    assert_eq!(chosen("grpcs://b.test", &["*.a.test=/x"]), None);
    assert_eq!(
        chosen("grpcs://b.test", &["/first", "/last"]).as_deref(),
        Some("/last")
    );
    assert_eq!(chosen("unix:/socket", &["/any"]), None);
}

#[test]
fn helpers_that_cannot_be_are_refused_by_name() {
    for (text, part) in [
        ("a.example=", "does not name a program"),
        ("relative/path", "absolute"),
        ("%workspace%/x", "unknown"),
        ("*=/x", "scope"),
        ("a:b=/x", "scope"),
    ] {
        let mut options = options("grpcs://a.example");
        options.credential_helpers = vec![text.to_owned()];
        let error = Auth::new(&options).expect_err(text);
        assert_eq!(error.kind, RemoteErrorKind::Config);
        let shown = error.to_string();
        assert!(
            shown.contains(part) && shown.contains(&format!("--credential-helper={text}")),
            "{shown}"
        );
    }
}

#[tokio::test]
async fn a_helper_is_asked_once_and_again_when_its_answer_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let count = dir.path().join("count");
    let body = format!(
        r#"[ "$1" = get ] || exit 3
grep -q '"uri":"https://cache.example/[a-z]*\.Service"' || exit 4
echo x >> {count}
n=$(wc -l < {count} | tr -d ' ')
echo "{{\"headers\": {{\"Authorization\": [\"token $n\"]}}, \"expires\": \"2999-01-01T00:00:00Z\"}}""#,
        count = count.display()
    );
    let mut options = options("grpcs://cache.example");
    options
        .headers
        .push(Header::parse("--remote-header", "authorization=old").unwrap());
    options.credential_helpers = vec![script(dir.path(), &body)];
    let auth = Auth::new(&options).unwrap();
    assert_eq!(value(&auth, "authorization").await.as_deref(), Some("token 1"));
    let (_, run) = auth.headers(SERVICE).await.unwrap();
    assert!(run.is_some());
    // Two requests were refused with the same credentials: one new run.
    assert!(auth.refresh(run).await);
    assert_eq!(value(&auth, "authorization").await.as_deref(), Some("token 2"));
    assert!(auth.refresh(run).await);
    assert_eq!(value(&auth, "authorization").await.as_deref(), Some("token 2"));
    assert!(!auth.refresh(None).await);
    // Each service has its own.
    let (headers, _) = auth.headers("other.Service").await.unwrap();
    assert_eq!(headers[0].value(), "token 3");
    assert_eq!(value(&auth, "authorization").await.as_deref(), Some("token 2"));
    assert!(
        auth.secrets()
            .conceal("token 2 token 3".to_owned())
            .find("token")
            .is_none()
    );
}

#[tokio::test]
async fn a_failing_helper_says_why_without_its_output() {
    for (body, part) in [
        (
            "cat > /dev/null; echo s3cret; echo '+ curl -u me:s3cret' >&2; exit 7",
            "exit status: 7",
        ),
        (
            "cat > /dev/null; echo '{\"headers\": {\"a\": \"s3cret\"}}'",
            "JSON",
        ),
        (
            "cat > /dev/null; echo '{\"headers\": {\"a b\": [\"s3cret\"]}}'",
            "a header with an invalid name or value",
        ),
        (
            "cat > /dev/null; echo '{\"headers\": {}, \"expires\": \"soon\"}'",
            "RFC 3339",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut options = options("grpcs://cache.example");
        options.credential_helpers = vec![script(dir.path(), body)];
        let auth = Auth::new(&options).unwrap();
        let error = auth.headers(SERVICE).await.expect_err(body);
        assert_eq!(error.kind, RemoteErrorKind::Unauthenticated);
        let shown = error.to_string();
        assert!(shown.contains(part) && !shown.contains("s3cret"), "{shown}");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut slow = options("grpcs://cache.example");
    slow.credential_helpers = vec![script(dir.path(), "sleep 60")];
    slow.credential_helper_timeout = Duration::from_millis(50);
    let error = Auth::new(&slow).unwrap().headers(SERVICE).await.unwrap_err();
    assert!(error.to_string().contains("did not answer within"), "{error}");
    let mut missing = options("grpcs://cache.example");
    missing.credential_helpers = vec!["/nonexistent/helper".to_owned()];
    let error = Auth::new(&missing).unwrap().headers(SERVICE).await.unwrap_err();
    assert!(error.to_string().contains("failed to start"), "{error}");
}
