//! Downloads from a server that does what no good server does.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use super::{
    resume::{Opened, Ranged, read as read_resumed},
    *,
};
use crate::{
    digest::{Digest, DigestFunction},
    output::Class,
    remote::{
        ActionStore, Chain, Collect, DiskCache, RemoteOptions,
        retry::{RetryPolicy, tests::FakeTimer},
    },
    transport::{Endpoint, RemoteErrorKind},
};

const TEXT: &str = "0123456789";

/// A server that answers each request with the next of these texts, and then closes the connection; or, after the last
/// one, never answers.
struct Server {
    url: String,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Server {
    async fn start(answers: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/dir/a.tar", listener.local_addr().unwrap());
        let heads = Arc::new(Mutex::new(Vec::new()));
        let mut answers: Vec<String> = answers.iter().rev().map(|text| (*text).to_owned()).collect();
        let seen = Arc::clone(&heads);
        tokio::spawn(async move {
            let mut silent = Vec::new();
            while let Ok((mut connection, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match connection.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => break,
                    }
                }
                if head.is_empty() {
                    continue;
                }
                seen.lock()
                    .unwrap()
                    .push(String::from_utf8(head).unwrap().to_lowercase());
                match answers.pop() {
                    Some(answer) => connection.write_all(answer.as_bytes()).await.unwrap(),
                    None => silent.push(connection),
                }
            }
        });
        Self { url, heads }
    }

    fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

/// An answer with a status, headers and a body; its length only if the headers have it.
fn answer(status: &str, headers: &[&str], body: &str) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("HTTP/1.1 {status}\r\nConnection: close\r\n{headers}\r\n{body}")
}

fn access(retries: u32, timer: &Arc<FakeTimer>) -> Access {
    let endpoint = Endpoint::parse("x", "grpc://localhost:1").unwrap();
    Access {
        patience: Patience {
            retry: RetryPolicy::new(retries, Duration::from_secs(1), timer.clone()),
            idle: Duration::from_secs(60),
            most: 12,
        },
        options: RemoteOptions::new(endpoint),
    }
}

/// What comes of reading the file from a server that answers so: the bytes, or the error and how many bytes were there.
async fn read(answers: &[&str]) -> (Result<String, RemoteError>, Vec<String>) {
    let server = Server::start(answers).await;
    let collection = open(&server.url, None, &access(3, &Arc::default())).unwrap();
    let mut kept = Collect::default();
    let item = Item::named("a.tar".to_owned());
    let read = tokio::time::timeout(Duration::from_secs(60), collection.read(&item, &mut kept)).await;
    let read = read
        .unwrap()
        .map(|()| String::from_utf8(kept.into_bytes().into()).unwrap());
    (read, server.heads())
}

#[tokio::test]
async fn what_breaks_is_resumed_where_it_broke_if_it_is_the_same_file() {
    let cut = answer("200 OK", &["Content-Length: 10", "ETag: \"v1\""], "0123");
    let rest = answer(
        "206 Partial Content",
        &["Content-Length: 6", "Content-Range: bytes 4-9/10", "ETag: \"v1\""],
        "456789",
    );
    let (bytes, heads) = read(&[&cut, &rest]).await;
    assert_eq!(bytes.unwrap(), TEXT);
    assert!(!heads[0].contains("range"), "{}", heads[0]);
    assert!(
        heads[1].contains("range: bytes=4-\r\n") && heads[1].contains("if-range: \"v1\"\r\n"),
        "{}",
        heads[1]
    );

    // Again and again, and without a word about the size.
    let chunked = ["Transfer-Encoding: chunked", "ETag: W/\"v1\""];
    let first = answer("200 OK", &chunked, "4\r\n0123\r\n");
    let second = answer(
        "206 Partial Content",
        &[
            "Content-Length: 6",
            "Content-Range: bytes 4-9/10",
            "ETag: W/\"v1\"",
        ],
        "4567",
    );
    let third = answer(
        "206 Partial Content",
        &[
            "Content-Length: 2",
            "Content-Range: bytes 8-9/*",
            "ETag: W/\"v1\"",
        ],
        "89",
    );
    let (bytes, heads) = read(&[&first, &second, &third]).await;
    assert_eq!(bytes.unwrap(), TEXT);
    // A weak tag promises nothing about bytes.
    assert!(
        heads[1..].iter().all(|head| !head.contains("if-range")),
        "{heads:?}"
    );

    // It broke after the last byte.
    let all = answer("200 OK", &chunked, "a\r\n0123456789\r\n");
    let at_end = answer(
        "416 Range Not Satisfiable",
        &["Content-Range: bytes */10", "Content-Length: 0"],
        "",
    );
    assert_eq!(read(&[&all, &at_end]).await.0.unwrap(), TEXT);
}

#[tokio::test]
async fn a_server_without_ranges_is_read_again_from_the_beginning() {
    let date = "Last-Modified: Fri, 27 Nov 2026 10:00:00 GMT";
    let cut = answer("200 OK", &["Content-Length: 10", date], "01234");
    let whole = answer("200 OK", &["Content-Length: 10", date], TEXT);
    assert_eq!(read(&[&cut, &whole]).await.0.unwrap(), TEXT);
    // Without anything to distinguish versions, it may be another file.
    let cut = answer("200 OK", &["Content-Length: 10"], "01234");
    let whole = answer("200 OK", &["Content-Length: 10"], TEXT);
    let (error, heads) = read(&[&cut, &whole]).await;
    let error = error.unwrap_err();
    assert_eq!((error.kind, heads.len()), (RemoteErrorKind::Protocol, 1));
    assert!(error.to_string().contains("ETag"), "{error}");
}

#[tokio::test]
async fn a_file_that_changed_is_not_put_together_of_two() {
    let cut = answer("200 OK", &["Content-Length: 10", "ETag: \"v1\""], "0123");
    for other in [
        answer("200 OK", &["Content-Length: 10", "ETag: \"v2\""], "abcdefghij"),
        answer("200 OK", &["Content-Length: 11", "ETag: \"v1\""], "abcdefghijk"),
        answer("200 OK", &["Content-Length: 10"], "abcdefghij"),
        answer(
            "206 Partial Content",
            &["Content-Length: 6", "Content-Range: bytes 4-9/10", "ETag: \"v2\""],
            "efghij",
        ),
        answer(
            "206 Partial Content",
            &[
                "Content-Length: 7",
                "Content-Range: bytes 4-10/11",
                "ETag: \"v1\"",
            ],
            "efghijk",
        ),
        answer(
            "416 Range Not Satisfiable",
            &["Content-Range: bytes */3", "Content-Length: 0"],
            "",
        ),
    ] {
        let error = read(&[&cut, &other]).await.0.unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Protocol, "{other}: {error}");
    }
}

#[tokio::test]
async fn lies_about_ranges_and_lengths_are_not_believed() {
    let tag = "ETag: \"v1\"";
    let cut = answer("200 OK", &["Content-Length: 10", tag], "0123");
    let part = |headers: &[&str], body: &str| {
        let headers: Vec<&str> = headers.iter().copied().chain([tag]).collect();
        answer("206 Partial Content", &headers, body)
    };
    for lie in [
        part(&["Content-Length: 6"], "456789"),
        part(&["Content-Length: 6", "Content-Range: bytes 3-8/10"], "345678"),
        part(&["Content-Length: 5", "Content-Range: bytes 4-8/10"], "45678"),
        part(&["Content-Length: 9", "Content-Range: bytes 4-9/10"], "456789abc"),
    ] {
        let error = read(&[&cut, &lie]).await.0.unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Protocol, "{lie}: {error}");
    }
    // A size that is said may be any.
    let large = answer("200 OK", &["Content-Length: 13"], "0123456789abc");
    assert!(read(&[&large]).await.0.is_ok());
    let large = answer(
        "200 OK",
        &["Transfer-Encoding: chunked"],
        "d\r\n0123456789abc\r\n0\r\n\r\n",
    );
    let error = read(&[&large]).await.0.unwrap_err();
    assert!(error.to_string().contains("archive-size=12"), "{error}");
    let endless = answer("200 OK", &["Transfer-Encoding: chunked", tag], "4\r\n0123\r\n");
    let some = part(&["Content-Length: 3", "Content-Range: bytes 4-6/*"], "456");
    let error = read(&[&endless, &some]).await.0.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Protocol, "{error}");
    for lie in [
        // Nobody knows whether that is all.
        answer("200 OK", &[], TEXT),
        answer("200 OK", &["Transfer-Encoding: gzip"], TEXT),
        answer("200 OK", &["Content-Length: 10", "Content-Encoding: br"], TEXT),
        part(&["Content-Length: 10", "Content-Range: bytes 0-9/10"], TEXT),
    ] {
        let error = read(&[&lie]).await.0.unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Protocol, "{lie}: {error}");
    }
    // More than the first answer said there is.
    let more = part(
        &["Transfer-Encoding: chunked", "Content-Range: bytes 4-9/10"],
        "7\r\n456789a\r\n0\r\n\r\n",
    );
    let error = read(&[&cut, &more]).await.0.unwrap_err();
    assert!(error.to_string().contains("more than the 10 bytes"), "{error}");
}

#[tokio::test]
async fn busy_servers_are_asked_again_when_they_say_and_not_for_ever() {
    let busy = answer(
        "429 Too Many Requests",
        &["Retry-After: 7", "Content-Length: 0"],
        "",
    );
    let broken = answer("503 Service Unavailable", &["Content-Length: 0"], "");
    let whole = answer("200 OK", &["Content-Length: 10"], TEXT);
    let server = Server::start(&[&busy, &broken, &whole]).await;
    let timer = Arc::new(FakeTimer::default());
    let collection = open(&server.url, None, &access(3, &timer)).unwrap();
    let item = Item::named("a.tar".to_owned());
    let mut kept = Collect::default();
    collection.read(&item, &mut kept).await.unwrap();
    assert_eq!(kept.into_bytes(), TEXT.as_bytes());
    let slept: Vec<_> = timer
        .slept
        .lock()
        .unwrap()
        .iter()
        .map(Duration::as_millis)
        .collect();
    assert_eq!(slept, [7000, 100]);

    let (error, heads) = read(&[&broken, &broken, &broken, &broken, &whole]).await;
    let error = error.unwrap_err();
    assert_eq!(
        (error.kind, heads.len()),
        (RemoteErrorKind::Unavailable, 4),
        "{error}"
    );
    assert!(error.to_string().contains("503"), "{error}");
    for (status, kind) in [
        ("404 Not Found", RemoteErrorKind::NotFound),
        ("403 Forbidden", RemoteErrorKind::Denied),
        ("400 Bad Request", RemoteErrorKind::Rejected),
    ] {
        let (error, heads) = read(&[&answer(status, &["Content-Length: 0"], ""), &whole]).await;
        assert_eq!((error.unwrap_err().kind, heads.len()), (kind, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_goes_silent_is_left() {
    // With its clock paused, the runtime goes on to the next deadline as soon as all tasks wait.
    struct Silent;
    #[async_trait]
    impl Ranged for Silent {
        async fn open(&self, _: &Item, _: u64, _: Option<&str>) -> Result<Opened, RemoteError> {
            let opened = Opened {
                begin: 0,
                size: Some(10),
                version: None,
                bytes: Box::pin(futures::stream::pending()),
            };
            Ok(opened)
        }

        fn address(&self, item: &Item) -> String {
            item.name.clone()
        }
    }
    let patience = access(1, &Arc::default()).patience;
    let item = Item::named("a.tar".to_owned());
    let error = read_resumed(&Silent, &item, &patience, &mut Collect::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Timeout, "{error}");
}

#[tokio::test]
async fn redirects_are_followed_and_passwords_are_not_taken_along() {
    let whole = answer("200 OK", &["Content-Length: 10"], TEXT);
    let elsewhere = Server::start(&[&whole]).await;
    let to = answer(
        "302 Found",
        &[&format!("Location: {}", elsewhere.url), "Content-Length: 0"],
        "",
    );
    let to_itself = answer(
        "307 Temporary Redirect",
        &["Location: /other", "Content-Length: 0"],
        "",
    );
    let server = Server::start(&[&to_itself, &to]).await;
    let url = server.url.replace("http://", "http://me:s3cret@");
    let collection = open(&url, None, &access(0, &Arc::default())).unwrap();
    assert!(
        !collection.describe().contains("s3cret"),
        "{}",
        collection.describe()
    );
    let mut kept = Collect::default();
    collection
        .read(&Item::named("a.tar".to_owned()), &mut kept)
        .await
        .unwrap();
    assert_eq!(kept.into_bytes(), TEXT.as_bytes());
    let heads = server.heads();
    assert!(
        heads.iter().all(|head| head.contains("authorization: basic ")),
        "{heads:?}"
    );
    assert!(heads[1].starts_with("get /other "), "{heads:?}");
    let heads = elsewhere.heads();
    assert!(!heads[0].contains("authorization"), "{heads:?}");

    let to_itself: Vec<&str> = vec![&to_itself; 20];
    let error = read(&to_itself).await.0.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Rejected, "{error}");
}

#[tokio::test]
async fn wrong_bytes_are_asked_for_once_more_and_never_kept() {
    let digest = Digest::of(DigestFunction::Sha256, TEXT.as_bytes());
    let sum = answer("200 OK", &["Content-Length: 64"], &digest.hash_hex());
    let whole = answer("200 OK", &["Content-Length: 10"], TEXT);
    let wrong = answer("200 OK", &["Content-Length: 10"], "abcdefghij");
    for (answers, is_right) in [
        (vec![&*sum, &*whole], true),
        (vec![&*sum, &*wrong, &*whole], true),
        (vec![&*sum, &*wrong, &*wrong], false),
    ] {
        let server = Server::start(&answers).await;
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::create(dir.path()).unwrap();
        let collections = [open(&server.url, None, &access(0, &Arc::default())).unwrap()];
        let choice = Arc::new(Choice::new(&Patterns::default()).unwrap());
        let wanted = choose(&collections, &choice, Offer::Archives).await.unwrap();
        assert_eq!((wanted.len(), wanted[0].class), (1, Class::Required));
        let mut wanted = check_all(wanted, Checking::Require, &Arc::default()).await;
        let (wanted, checked) = wanted.pop().unwrap();
        checked.unwrap();
        let ended = download(&wanted, &directory, &Arc::default()).await;
        assert_eq!(ended.is_ok(), is_right, "{ended:?}");
        assert!(server.heads()[0].starts_with("get /dir/a.tar.sha256sum "));
        let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(files.len(), usize::from(is_right));
        match ended {
            Ok(_) => {
                // The server has nothing more to say, and is not asked.
                let again = download(&wanted, &directory, &Arc::default()).await.unwrap();
                assert!(again.was_present);
            }
            Err(error) => assert!(matches!(error, CollectionError::Wrong { .. }), "{error}"),
        }
    }
}

#[tokio::test]
async fn wrong_bytes_of_one_cache_are_asked_of_the_next_one() {
    let digest = Digest::of(DigestFunction::Sha256, TEXT.as_bytes());
    let caches = ["abcdefghij", TEXT].map(|bytes| {
        let cache = tempfile::tempdir().unwrap();
        let hash = digest.hash_hex();
        let directory = cache.path().join("cas").join(&hash[..2]);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(hash), bytes).unwrap();
        cache
    });
    let stores = caches
        .iter()
        .map(|cache| Arc::new(DiskCache::new(cache.path(), false)) as Arc<dyn ActionStore>);
    let blob = BlobArchive::new(
        Arc::new(Chain::new(stores.collect())),
        digest.clone(),
        Some("a.tar".to_owned()),
    );
    let collections: [Arc<dyn Collection>; 1] = [Arc::new(blob)];
    let choice = Arc::new(Choice::new(&Patterns::default()).unwrap());
    let wanted = choose(&collections, &choice, Offer::Archives).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let directory = Directory::create(dir.path()).unwrap();
    let ended = download(&wanted[0], &directory, &Arc::default()).await.unwrap();
    assert_eq!(ended.digest, digest);
}

#[tokio::test]
async fn a_missing_checksum_is_an_unfinished_upload_only_if_it_is_required() {
    let missing = answer("404 Not Found", &["Content-Length: 0"], "");
    let html = answer("200 OK", &["Content-Length: 6"], "<html>");
    let [bad, unknown, forbidden, other] = [
        "400 Bad Request",
        "401 Unauthorized",
        "403 Forbidden",
        "405 Method Not Allowed",
    ]
    .map(|status| answer(status, &["Content-Length: 0"], ""));
    for (first, checking, is_right) in [
        (&bad, Checking::Auto, true),
        (&unknown, Checking::Auto, true),
        (&forbidden, Checking::Auto, true),
        (&other, Checking::Auto, true),
        (&other, Checking::Require, false),
        (&missing, Checking::Auto, true),
        (&missing, Checking::Require, false),
        (&html, Checking::Auto, false),
        (&html, Checking::None, true),
    ] {
        let server = Server::start(&[first]).await;
        let collections = [open(&server.url, None, &access(0, &Arc::default())).unwrap()];
        let choice = Arc::new(Choice::new(&Patterns::default()).unwrap());
        let wanted = choose(&collections, &choice, Offer::Archives).await.unwrap();
        let (wanted, checked) = check_all(wanted, checking, &Arc::default()).await.pop().unwrap();
        assert_eq!(checked.is_ok(), is_right, "{checking:?}: {checked:?}");
        assert!(wanted.checksum.is_none());
    }
}

#[tokio::test]
async fn only_the_remote_cache_learns_who_we_are() {
    let mut access = access(0, &Arc::default());
    // Files that are read would be missed.
    access.options.connect.tls.client_certificate = Some("/nonexistent".into());
    access.options.connect.tls.client_key = Some("/nonexistent".into());
    assert!(open("http://localhost:1/a.tar", None, &access).is_ok());
}
