//! Bodies: encodings, lengths, cuts.

use std::io::Write as _;

use prost::Message as _;

use super::*;

const SIZE: usize = 40_000;

/// What the client makes of an answer.
enum Expected {
    /// The blob, within this many requests.
    Whole(usize),
    /// An error with these words, within this many requests.
    Error(RemoteErrorKind, &'static str, usize),
}
use Expected::{Error, Whole as Right};

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// zstd as bazel-remote sends it: the header of its own file format comes first, as a frame to be skipped.
fn casblob(bytes: &[u8]) -> Vec<u8> {
    let mut all = vec![0x50, 0x2a, 0x4d, 0x18, 37, 0, 0, 0];
    all.extend([7; 37]);
    for chunk in bytes.chunks(10_000) {
        all.extend(zstd::bulk::compress(chunk, 1).unwrap());
    }
    all
}

type Answer = fn(&Request, usize) -> Reply;

#[tokio::test]
async fn whatever_comes_the_sink_gets_the_blob_or_an_error() {
    use RemoteErrorKind::{Protocol, Unavailable};
    let cases: Vec<(&str, Answer, Expected)> = vec![
        ("plain", |_, _| reply(200, &[], &blob(SIZE)), Right(1)),
        (
            "chunked",
            |_, _| reply(200, &[("transfer-encoding", "chunked")], &chunked(&blob(SIZE))),
            Right(1),
        ),
        (
            "gzip though identity was asked for",
            |_, _| reply(200, &[("content-encoding", "gzip")], &gzip(&blob(SIZE))),
            Right(1),
        ),
        (
            "zstd after a header that is skipped",
            |_, _| reply(200, &[("content-encoding", "zstd")], &casblob(&blob(SIZE))),
            Right(1),
        ),
        (
            "an encoding that is named, and a body that is plain",
            |_, _| reply(200, &[("content-encoding", "gzip")], &blob(SIZE)),
            Right(2),
        ),
        (
            "an encoding that is unknown",
            |_, _| reply(200, &[("content-encoding", "br")], b"x"),
            Error(Protocol, "bytes of it", 2),
        ),
        (
            "more bytes than the blob has, by the length given",
            |_, _| reply(200, &[], &blob(SIZE + 1)),
            Error(Protocol, "40001 bytes", 1),
        ),
        (
            "fewer bytes than the blob has, by the length given",
            |_, _| reply(200, &[], &blob(SIZE - 1)),
            Error(Protocol, "39999 bytes", 1),
        ),
        (
            "more bytes than the blob has, without a word",
            |_, _| {
                let mut all = reply(200, &[("transfer-encoding", "chunked")], &[]);
                all.0.extend(chunked(&blob(SIZE + 1)));
                all
            },
            Error(Protocol, "more bytes", 1),
        ),
        (
            "fewer bytes than the blob has, without a word",
            |_, _| {
                reply(
                    200,
                    &[("transfer-encoding", "chunked")],
                    &chunked(&blob(SIZE - 1)),
                )
            },
            Error(Protocol, "ended at byte 39999", 1),
        ),
        (
            "a bomb",
            |_, _| reply(200, &[("content-encoding", "gzip")], &gzip(&vec![0; 50_000_000])),
            Error(Protocol, "bytes of it", 2),
        ),
        (
            "gzip that is cut",
            |_, _| {
                let all = gzip(&blob(SIZE));
                reply(200, &[("content-encoding", "gzip")], &all[..all.len() - 100])
            },
            Error(Protocol, "", 2),
        ),
        (
            "a page",
            |_, _| {
                reply(
                    200,
                    &[("content-type", "text/html")],
                    b"<html>Please log in</html>",
                )
            },
            Error(Protocol, "26 bytes", 1),
        ),
        (
            "HTTP/1.0, which the end of the connection ends",
            |_, _| Reply([b"HTTP/1.0 200 OK\r\n\r\n", &*blob(SIZE)].concat(), Then::Close),
            Right(1),
        ),
        (
            "HTTP/1.0 that breaks off always",
            |_, _| Reply([b"HTTP/1.0 200 OK\r\n\r\n", &*blob(10)].concat(), Then::Close),
            Error(Unavailable, "ended at byte 10", 6),
        ),
        (
            "no HTTP",
            |_, _| Reply(b"220 ready when you are\r\n".to_vec(), Then::Close),
            Error(Unavailable, "", 6),
        ),
        (
            "a length that is no number",
            |_, _| reply(200, &[("content-length", "many")], &blob(SIZE)).then(Then::Close),
            Error(Unavailable, "", 6),
        ),
    ];
    for (name, script, expected) in cases {
        let fake = Fake::new(script);
        let cache = client(&fake, |_| {}).await;
        let expected_blob = blob(SIZE);
        let (bytes, ended) = streamed(&cache, &digest(&expected_blob), 0, false).await;
        let asked = fake.log().len();
        match (expected, ended) {
            (Right(most), Ok(())) => {
                assert!(bytes == expected_blob, "{name}");
                assert!(asked <= most, "{name}: {asked}");
            }
            (Error(kind, words, most), Err(error)) => {
                assert_eq!(error.kind, kind, "{name}: {error}");
                assert!(error.to_string().contains(words), "{name}: {error}");
                assert!(asked <= most, "{name}: {asked}");
                assert!(expected_blob.starts_with(&bytes), "{name}");
            }
            (_, ended) => panic!("{name}: {ended:?}, {} bytes", bytes.len()),
        }
    }
}

#[tokio::test]
async fn zstd_is_asked_for_where_it_pays_and_its_absence_is_learned() {
    let fake = Fake::new(|request, _| match request.header("accept-encoding") {
        "zstd" if request.path.ends_with('0') => {
            reply(200, &[("content-encoding", "zstd")], &casblob(&blob(SIZE)))
        }
        _ => reply(200, &[], &blob(SIZE)),
    });
    let cache = client(&fake, |options| options.compression = Compression::Always).await;
    for _ in 0..2 {
        let (bytes, ended) = streamed(&cache, &digest(&blob(SIZE)), 0, false).await;
        ended.unwrap();
        assert!(bytes == blob(SIZE));
    }
    // A retry after wrong bytes leaves it out.
    streamed(&cache, &digest(&blob(SIZE)), 0, true).await.1.unwrap();
    let asked: Vec<String> = fake
        .log()
        .iter()
        .map(|r| r.header("accept-encoding").to_owned())
        .collect();
    let sent = digest(&blob(SIZE)).hash_hex().ends_with('0');
    let second = if sent { "zstd" } else { "identity" };
    assert_eq!(asked, ["zstd", second, "identity"]);
    assert_eq!(
        fake.connections(),
        2,
        "what is asked for again goes over a new connection"
    );
}

#[tokio::test]
async fn a_stall_is_cut_and_resumed() {
    let fake = Fake::new(|request, number| {
        let from = request.from().unwrap_or(0);
        let all = blob(SIZE);
        let range = format!("bytes {from}-{}/{SIZE}", SIZE - 1);
        match number {
            0 => reply(200, &[], &all).cut(10_000, Then::Hang),
            _ => reply(206, &[("content-range", &range)], &all[from..]),
        }
    });
    let cache = client(&fake, |options| {
        options.stall_timeout = Duration::from_millis(300)
    })
    .await;
    let (bytes, ended) = streamed(&cache, &digest(&blob(SIZE)), 0, false).await;
    ended.unwrap();
    assert!(bytes == blob(SIZE));
    assert!(fake.log().len() >= 2);
    // Without a head it is the same.
    let fake = Fake::new(|_, _| Reply(Vec::new(), Then::Hang));
    let cache = client(&fake, |options| {
        options.stall_timeout = Duration::from_secs(2);
        options.retries = 1;
    });
    let error = streamed(&cache.await, &digest(b"x"), 0, false)
        .await
        .1
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Timeout, "{error}");
    assert!(fake.log().len() <= 2);
}

#[tokio::test]
async fn a_batch_has_one_answer_for_each_digest_in_the_order_asked() {
    let blobs: Vec<Vec<u8>> = (1..300).map(blob).collect();
    let by_path: HashMap<String, Vec<u8>> = blobs
        .iter()
        .map(|bytes| {
            (
                format!("/some/cas/cas/{}", digest(bytes).hash_hex()),
                bytes.clone(),
            )
        })
        .collect();
    let fake = Fake::new(move |request, _| match by_path.get(&request.path) {
        Some(bytes) if request.method == "HEAD" => reply(200, &[], bytes).cut(bytes.len(), Then::Keep),
        Some(bytes) => reply(200, &[], bytes),
        None if request.method == "HEAD" => reply(404, &[], b""),
        None => reply(404, &[("content-type", "text/html")], b"<html>not found</html>"),
    });
    let cache = client(&fake, |options| options.connections = Some(5)).await;
    let mut asked: Vec<Digest> = blobs.iter().map(|bytes| digest(bytes)).collect();
    let (absent, empty) = (digest(b"absent"), digest(b""));
    asked.extend([absent.clone(), empty.clone(), asked[0].clone()]);
    let answers = cache.read_batch(&asked, &nobody(), false).await;
    assert_eq!(answers.len(), asked.len());
    for (asked, (digest, answer)) in asked.iter().zip(answers) {
        assert_eq!(*asked, digest);
        match answer {
            Ok(bytes) => assert_eq!(Digest::of(DigestFunction::Sha256, &bytes), digest),
            Err(error) => assert!(error.is_not_found() && digest == absent, "{error}"),
        }
    }
    assert_eq!(
        cache.find_missing(&asked, &nobody()).await.unwrap(),
        std::slice::from_ref(&absent)
    );
    // The empty blob is not asked for, and none twice; connections are used again, after a miss as well.
    assert_eq!(fake.log().len(), 2 * 300);
    assert!(
        !fake
            .log()
            .iter()
            .any(|request| request.path.ends_with(&empty.hash_hex()))
    );
    assert!(fake.connections() <= 5, "{}", fake.connections());
    let first = asked[0].clone();
    assert_eq!(
        cache.blob_size(first.function(), first.hash()).await.unwrap(),
        Some(1)
    );
    assert_eq!(
        cache.blob_size(absent.function(), absent.hash()).await.unwrap(),
        None
    );
}

#[tokio::test]
async fn results_of_actions_are_read_within_limits() {
    let result = ActionResult {
        exit_code: 7,
        ..ActionResult::default()
    };
    let encoded = result.encode_to_vec();
    let fake = Fake::new(move |request, number| match number {
        0 => {
            assert!(request.path.starts_with("/some/cas/ac/"), "{}", request.path);
            reply(200, &[("content-encoding", "gzip")], &gzip(&encoded))
        }
        1 => reply(404, &[], b"no"),
        2 => reply(200, &[], b"{\"exitCode\":7}"),
        3 => reply(200, &[], b""),
        _ => reply(
            200,
            &[("content-encoding", "gzip")],
            &gzip(&vec![0; MAX_MESSAGE + 1]),
        ),
    });
    let cache = client(&fake, |_| {}).await;
    let action = digest(b"action");
    let read = || async { cache.action_result(&action, &nobody()).await };
    assert_eq!(read().await.unwrap().unwrap().exit_code, 7);
    assert!(read().await.unwrap().is_none());
    assert!(
        read()
            .await
            .unwrap_err()
            .to_string()
            .contains("not an action result")
    );
    assert!(read().await.unwrap_err().to_string().contains("it is empty"));
    assert!(read().await.unwrap_err().to_string().contains("maximum"));
}
