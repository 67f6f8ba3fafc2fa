//! What real stores do not do on request: an S3 of our own that misbehaves.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{HeaderMap, Response, StatusCode, header},
};
use outhaul_testkit::in_time;

use super::*;
use crate::{
    remote::{ActionStore as _, casblob},
    transport::RemoteErrorKind,
};

/// A request as a case sees it: its number, path with query, and headers.
struct Asked {
    number: u32,
    uri: String,
    range: Option<(u64, u64)>,
    headers: HeaderMap,
}

/// A store whose answers a case makes up; the number of requests so far.
async fn store(
    answer: impl Fn(Asked) -> Response<Body> + Clone + Send + Sync + 'static,
) -> (SocketAddr, Arc<AtomicU32>) {
    let count = Arc::new(AtomicU32::new(0));
    let counted = count.clone();
    let router = Router::new().fallback(move |request: Request| {
        let number = counted.fetch_add(1, SeqCst);
        let range = request.headers().get(header::RANGE).map(|range| {
            let range = range.to_str().unwrap().strip_prefix("bytes=").unwrap();
            let (from, to) = range.split_once('-').unwrap();
            (
                from.parse().unwrap(),
                to.parse().map_or(u64::MAX, |last: u64| last + 1),
            )
        });
        let asked = Asked {
            number,
            uri: request.uri().to_string(),
            range,
            headers: request.headers().clone(),
        };
        let answer = answer(asked);
        async move { answer }
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, count)
}

fn url(address: SocketAddr, settings: &str) -> String {
    format!("s3://b?endpoint=http://{address}{settings}")
}

const KEYS: [(&str, &str); 3] = [
    ("AWS_ACCESS_KEY_ID", "AKs3cret"),
    ("AWS_SECRET_ACCESS_KEY", "SKs3cret"),
    ("AWS_SESSION_TOKEN", "TOKENs3cret"),
];

/// What was asked for of an object, as a good store sends it.
fn part(asked: &Asked, object: &[u8], etag: &str) -> Response<Body> {
    let size = object.len() as u64;
    let answer = Response::builder()
        .header(header::ETAG, format!("\"{etag}\""))
        .header(header::LAST_MODIFIED, "Sat, 28 Nov 2026 12:00:00 GMT");
    let wanted = asked.headers.get(header::IF_MATCH);
    if wanted.is_some_and(|wanted| *wanted != format!("\"{etag}\"")) {
        return refuse(412, "PreconditionFailed");
    }
    let (status, from, to) = match asked.range {
        None => (200, 0, size),
        Some((from, to)) => (206, from, to.min(size)),
    };
    let bytes = object[usize::try_from(from).unwrap()..usize::try_from(to).unwrap()].to_vec();
    let answer = answer.status(status).header(header::CONTENT_LENGTH, bytes.len());
    let answer = match asked.range {
        Some(_) => answer.header(header::CONTENT_RANGE, format!("bytes {from}-{}/{size}", to - 1)),
        None => answer,
    };
    answer.body(Body::from(bytes)).unwrap()
}

fn refuse(status: u16, code: &str) -> Response<Body> {
    let body = format!("<Error><Code>{code}</Code><Message>AKs3cret TOKENs3cret</Message></Error>");
    Response::builder().status(status).body(Body::from(body)).unwrap()
}

/// The same, whose connection breaks after some bytes.
fn broken(answer: Response<Body>, bytes: usize) -> Response<Body> {
    use futures::StreamExt as _;
    let (head, body) = answer.into_parts();
    let mut left = bytes;
    let pieces = body.into_data_stream().map(move |piece| {
        let piece = piece.unwrap();
        if left == 0 {
            return Err(std::io::Error::other("cut"));
        }
        let taken = piece.len().min(left);
        left -= taken;
        Ok(piece.slice(..taken))
    });
    // What was written is sent when nothing more comes at once.
    let pieces = pieces.then(|piece| async move {
        if piece.is_err() {
            tokio::task::yield_now().await;
        }
        piece
    });
    let end = futures::stream::once(async {
        tokio::task::yield_now().await;
        Err(std::io::Error::other("cut"))
    });
    Response::from_parts(head, Body::from_stream(pieces.chain(end)))
}

#[tokio::test]
async fn names_below_a_directory_keep_nothing_of_it_from_being_listed() {
    let (address, count) = store(|asked| {
        assert!(asked.uri.contains("delimiter=%2F&"), "{}", asked.uri);
        assert!(asked.uri.contains("prefix=run%2F"), "{}", asked.uri);
        let object = |key| {
            format!(
                "<Contents><Key>{key}</Key><LastModified>2026-11-28T12:00:00Z</LastModified>\
                 <Size>3</Size><ETag>e</ETag></Contents>"
            )
        };
        let page = if asked.uri.contains("continuation-token=more") {
            object("run/a.tar")
        } else {
            // What `run/logs//x` comes as; and the directory itself.
            format!(
                "{}{}<CommonPrefixes><Prefix>run/logs/</Prefix></CommonPrefixes>\
                 <NextContinuationToken>more</NextContinuationToken>",
                object("run/"),
                object("run/b.tar")
            )
        };
        let body = format!("<ListBucketResult>{page}</ListBucketResult>");
        Response::builder().body(Body::from(body)).unwrap()
    })
    .await;
    let url = url(address, "").replace("s3://b", "s3://b/run");
    let bucket = bucket(&url, &[]).unwrap();
    let listed = in_time(bucket.list("")).await.unwrap();
    let names: Vec<_> = listed.iter().map(|listed| &*listed.name).collect();
    assert_eq!((&*names, count.load(SeqCst)), (&["a.tar", "b.tar"][..], 2));
}

#[tokio::test]
async fn a_listing_that_is_cut_is_no_listing() {
    for next in [
        "",
        "<NextMarker>m</NextMarker>",
        "<NextContinuationToken/>",
        "<NextContinuationToken></NextContinuationToken>",
    ] {
        let (address, _) = store(move |_| {
            let page = format!("<ListBucketResult><IsTruncated>true</IsTruncated>{next}</ListBucketResult>");
            Response::builder().body(Body::from(page)).unwrap()
        })
        .await;
        let bucket = bucket(&url(address, ""), &[]).unwrap();
        let error = in_time(bucket.list("")).await.unwrap_err();
        assert!(error.message.contains("cut its listing"), "{next}: {error}");
        in_time(bucket.probe("x")).await.unwrap();
    }
    let (address, count) = store(|_| {
        let page = "<ListBucketResult><IsTruncated>true</IsTruncated>\
                    <NextContinuationToken>same</NextContinuationToken></ListBucketResult>";
        Response::builder().body(Body::from(page)).unwrap()
    })
    .await;
    let bucket = bucket(&url(address, ""), &[]).unwrap();
    let error = in_time(bucket.list("")).await.unwrap_err();
    assert!(error.message.contains("does not go on"), "{error}");
    assert_eq!(count.load(SeqCst), 2);
}

#[tokio::test]
async fn broken_streams_go_on_where_they_broke() {
    let blob = noise(1_000_000);
    let digest = sha256(&blob);
    for settings in ["", "&layout=bazel-remote-flat", "&encoding=zstd&layout=bazel"] {
        let object = match settings {
            "" => blob.clone(),
            "&layout=bazel-remote-flat" => casblob::encode(&blob, 1 << 16),
            _ => zstd::encode_all(&*blob, 3).unwrap(),
        };
        let third = object.len() / 3;
        // The first reads of something large break, each after a third of the object: those that are not continued bring
        // nothing new.
        let most = if settings.contains("zstd") { 1 } else { 2 };
        let breaks = Arc::new(AtomicU32::new(0));
        let (address, _) = store(move |asked| {
            let answer = part(&asked, &object, "one");
            let is_small = asked.range.is_some_and(|(_, to)| to <= 4096);
            match is_small || breaks.fetch_add(1, SeqCst) > most {
                true => answer,
                false => broken(answer, third),
            }
        })
        .await;
        let cache = cache(&url(address, settings), &[]).unwrap();
        let bytes = in_time(stream(&cache, &digest, 0)).await.unwrap();
        assert!(bytes == blob, "{settings}");
    }
}

#[tokio::test]
async fn an_object_that_is_written_anew_is_read_by_its_new_chunks() {
    let blob = noise(1_000_000);
    let digest = sha256(&blob);
    let (old, new) = (casblob::encode(&blob, 1 << 16), casblob::encode(&blob, 1 << 15));
    let half = old.len() / 2;
    let (address, _) = store(move |asked| match asked.number {
        0 => broken(part(&asked, &old, "old"), half),
        // The header of the old one, and then there is another.
        1 => part(&asked, &old, "old"),
        _ => part(&asked, &new, "new"),
    })
    .await;
    let cache = cache(&url(address, "&layout=bazel-remote-flat"), &[]).unwrap();
    assert!(in_time(stream(&cache, &digest, 0)).await.unwrap() == blob);
    // Of a named object, it is an error.
    let bucket = bucket(&url(address, ""), &[]).unwrap();
    let error = bucket.get("x", 5, Some("\"old\"")).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Protocol, "{error}");
}

#[tokio::test]
async fn a_store_that_ignores_ranges_is_read_from_the_beginning() {
    let blob = noise(100_000);
    let digest = sha256(&blob);
    let object = blob.clone();
    let (address, count) = store(move |mut asked| {
        asked.range = None;
        part(&asked, &object, "one")
    })
    .await;
    let cache = cache(&url(address, ""), &[]).unwrap();
    assert!(stream(&cache, &digest, 99_000).await.unwrap() == blob[99_000..]);
    assert_eq!(count.load(SeqCst), 2);
}

#[tokio::test]
async fn what_may_pass_is_tried_again_and_nothing_else() {
    for (status, code, kind, requests) in [
        (503, "SlowDown", RemoteErrorKind::Unavailable, 3),
        (400, "RequestTimeout", RemoteErrorKind::Unavailable, 3),
        (404, "NoSuchKey", RemoteErrorKind::NotFound, 1),
        (404, "NoSuchBucket", RemoteErrorKind::Config, 1),
        (400, "ExpiredToken", RemoteErrorKind::Unauthenticated, 1),
        (403, "SignatureDoesNotMatch", RemoteErrorKind::Config, 1),
        (301, "PermanentRedirect", RemoteErrorKind::Config, 1),
        (405, "MethodNotAllowed", RemoteErrorKind::Rejected, 1),
    ] {
        let (address, count) = store(move |_| refuse(status, code)).await;
        let cache = cache(&url(address, ""), &KEYS).unwrap();
        let error = in_time(batch(&cache, &[sha256(b"x")]))
            .await
            .remove(0)
            .unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert_eq!(count.load(SeqCst), requests, "{code}");
        let shown = format!("{error} {error:?} {}", cache.describe());
        assert!(shown.contains(code) && !shown.contains("s3cret"), "{shown}");
    }
    let cache = cache("s3://b?endpoint=http://127.0.0.1:1", &KEYS).unwrap();
    let error = in_time(batch(&cache, &[sha256(b"x")]))
        .await
        .remove(0)
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn a_missing_object_is_missing_where_nobody_may_list() {
    for (may_list, kind) in [
        (false, RemoteErrorKind::NotFound),
        (true, RemoteErrorKind::Denied),
    ] {
        let (address, _) = store(move |asked| match asked.uri.contains("list-type") {
            true if may_list => Response::new(Body::from("<ListBucketResult></ListBucketResult>")),
            _ => refuse(403, "AccessDenied"),
        })
        .await;
        let cache = cache(&url(address, ""), &KEYS).unwrap();
        let error = batch(&cache, &[sha256(b"x")]).await.remove(0).unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
    }
}

#[tokio::test]
async fn an_answer_that_does_not_come_is_not_waited_for() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = Endpoint::parse_cache("--remote-cache", &url(silent.local_addr().unwrap(), "")).unwrap();
    let mut options = RemoteOptions::new(endpoint);
    options.retries = 0;
    options.stall_timeout = Duration::from_millis(300);
    let nothing = Environment::fake(&[], Path::new("/nonexistent"));
    let cache = ObjectCache::with(Bucket::open_in(&options, &nothing).unwrap()).unwrap();
    let error = in_time(batch(&cache, &[sha256(b"x")]))
        .await
        .remove(0)
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Timeout, "{error}");
    assert_eq!(
        in_time(cache.probe()).await.unwrap_err().kind,
        RemoteErrorKind::Timeout
    );
}

#[tokio::test]
async fn a_range_of_another_object_is_refused() {
    let (address, _) = store(|asked| {
        let mut answer = part(&asked, &noise(1000), "one");
        if asked.range.is_some() {
            *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
            let lie = "bytes 7-506/1000".parse().unwrap();
            answer.headers_mut().insert(header::CONTENT_RANGE, lie);
        }
        answer
    })
    .await;
    let cache = cache(&url(address, ""), &[]).unwrap();
    let error = stream(&cache, &sha256(&noise(1000)), 500).await.unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Protocol, "{error}");
}

#[tokio::test]
async fn a_metadata_service_without_a_role_is_reported_and_the_bucket_is_not_asked() {
    // The service knows sessions, and no role.
    let (service, _) = store(|asked| match asked.uri.as_str() {
        "/latest/api/token" => Response::new(Body::from("session")),
        _ => Response::builder().status(404).body(Body::empty()).unwrap(),
    })
    .await;
    let (address, asked) = store(|_| refuse(403, "AccessDenied")).await;
    let endpoint = format!("http://{service}");
    let variables = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint.as_str())];
    let cache = cache(&url(address, "&anonymous=no"), &variables).unwrap();
    let error = in_time(stream(&cache, &sha256(b"x"), 0)).await.unwrap_err();
    for part in [
        "the machine's role",
        "404",
        "give the machine a role",
        "anonymous=yes",
    ] {
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
    assert_eq!(asked.load(SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn a_metadata_service_that_does_not_answer_is_given_up_in_seconds() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let variables = [("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint.as_str())];
    let cache = cache("s3://b?endpoint=http://127.0.0.1:1&anonymous=no", &variables).unwrap();
    let began = tokio::time::Instant::now();
    let error = stream(&cache, &sha256(b"x"), 0).await.unwrap_err();
    // By the tests' clock, which runs while nobody works.
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}: {error}",
        began.elapsed()
    );
    assert!(error.to_string().contains("give the machine a role"), "{error}");
}
