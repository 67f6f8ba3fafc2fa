//! What the server is shown, and that nobody else is.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::Mutex,
};

use super::*;

/// Written by a shell, see the tests of credential helpers.
fn script(dir: &Path, body: &str) -> String {
    let path = dir.join("helper").to_str().unwrap().to_owned();
    let mut shell = Command::new("sh")
        .args(["-c", "cat > \"$0\" && chmod +x \"$0\"", &path])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let text = format!("#!/bin/sh\n{body}\n");
    std::io::Write::write_all(&mut shell.stdin.take().unwrap(), text.as_bytes()).unwrap();
    assert!(shell.wait().unwrap().success());
    path
}

#[tokio::test]
async fn a_helper_is_asked_about_the_base_url_and_once_more_when_its_token_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let helper = script(
        dir.path(),
        "cat >> \"$0.asked\"; echo >> \"$0.asked\"\n\
         echo \"{\\\"headers\\\":{\\\"Authorization\\\":[\\\"Bearer token-$(wc -l < \"$0.asked\")\\\"]}}\"",
    );
    let fake = Fake::new(|request, _| match request.header("authorization") {
        "Bearer token-2" => reply(200, &[], b"x"),
        _ => reply(401, &[], b""),
    });
    let address = fake.start().await;
    let mut options = options(&format!("http://{address}/team/"));
    options.connect.credential_helpers = vec![helper.clone()];
    // The user's own is replaced.
    options.connect.headers = vec![Header::new("authorization", "mine").unwrap()];
    let (cache, _) = opened(options);
    let asked = [digest(b"x")];
    for _ in 0..20 {
        for (_, answer) in cache.read_batch(&asked, &nobody(), false).await {
            assert_eq!(answer.unwrap(), "x");
        }
    }
    let asked = fs::read_to_string(format!("{helper}.asked")).unwrap();
    let question = format!("{{\"uri\":\"http://{address}/team\"}}");
    assert_eq!(asked.lines().collect::<Vec<_>>(), [&question, &question]);
    assert_eq!(fake.log().len(), 21);
}

#[tokio::test]
async fn what_is_refused_twice_is_an_error_that_names_the_flags() {
    let dir = tempfile::tempdir().unwrap();
    let helper = script(
        dir.path(),
        "echo '{\"headers\":{\"Authorization\":[\"Bearer s3cret-token\"]}}'",
    );
    let fake = Fake::new(|_, _| reply(401, &[("content-type", "text/plain")], b"bad token: s3cret-token"));
    let mut options = options(&format!("http://{}", fake.start().await));
    options.connect.credential_helpers = vec![helper];
    options.left_out = vec!["--remote_header=x: redacted".to_owned()];
    let (cache, _) = opened(options);
    let error = cache.whole(&digest(b"x"), false).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Unauthenticated);
    let shown = error.to_string();
    for part in [
        "--remote-header",
        "--credential-helper",
        "--remote_header=x: redacted",
    ] {
        assert!(shown.contains(part), "{shown}");
    }
    assert!(!shown.contains("s3cret"), "{shown}");
    assert_eq!(fake.log().len(), 2);
}

#[tokio::test]
async fn all_headers_are_sent_and_none_of_their_values_is_shown_anywhere() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let writer = {
        let log = log.clone();
        move || Log(log.clone())
    };
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(writer)
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let said = b"who is me:s3cret/pass? bWU6czNjcmV0L3Bhc3M= and s3cret-header are wrong";
    for status in [200, 400, 403, 500] {
        let fake = Fake::new(move |_, _| reply(status, &[("content-type", "text/plain")], said));
        let mut options = options(&format!("http://{}", fake.start().await));
        options.retries = 1;
        options.connect.headers = vec![
            Header::basic("me", "s3cret/pass"),
            Header::new("x-key", "s3cret-header").unwrap(),
            Header::new("x-key", "s3cret-header-2").unwrap(),
        ];
        let shown = format!("{options:?}");
        let (cache, _) = opened(options);
        let read = cache.whole(&digest(b"x"), false).await.unwrap_err();
        let probed = cache.probe().await;
        let request = fake.log()[0].clone();
        assert_eq!(request.header("authorization"), "Basic bWU6czNjcmV0L3Bhc3M=");
        assert_eq!(request.headers["x-key"], ["s3cret-header", "s3cret-header-2"]);
        let shown = format!(
            "{shown} {read} {read:?} {probed:?} {cache:?} {}",
            cache.describe()
        );
        for secret in ["s3cret", "bWU6"] {
            assert!(!shown.contains(secret), "{status}: {shown}");
        }
    }
    let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    assert!(log.contains("retrying"), "something is logged");
    assert!(!log.contains("s3cret") && !log.contains("bWU6"), "{log}");
}

/// Keeps what is logged.
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
