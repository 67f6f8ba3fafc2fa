//! Blobs that are resumed, and every way in which servers get ranges wrong.

use super::*;

const SIZE: usize = 40_000;
const CUT: usize = 30_000;

type Answer = fn(usize) -> Reply;

fn part(status: u16, from: usize, to: usize, total: &str) -> Reply {
    let range = format!("bytes {from}-{}/{total}", to - 1);
    reply(status, &[("content-range", &range)], &blob(SIZE)[from..to])
}

#[tokio::test]
async fn a_blob_that_broke_off_goes_on_whatever_becomes_of_ranges() {
    let total = SIZE.to_string();
    assert_eq!(total, "40000");
    // What the server makes of a range, and how many requests that costs.
    let cases: [(&str, Answer, usize); 10] = [
        ("the part", |from| part(206, from, SIZE, "40000"), 2),
        (
            "the part, of who knows how much",
            |from| part(206, from, SIZE, "*"),
            2,
        ),
        ("the part, named 200", |from| part(200, from, SIZE, "40000"), 2),
        (
            "less of the part",
            |from| part(206, from, SIZE.min(from + 4000), "40000"),
            4,
        ),
        ("an earlier part", |from| part(206, from - 7, SIZE, "40000"), 2),
        ("all of it", |_| reply(200, &[], &blob(SIZE)), 2),
        ("a later part", |_| part(206, SIZE - 7, SIZE, "40000"), 3),
        (
            "a part of something else",
            |from| part(206, from, SIZE, "50000"),
            3,
        ),
        (
            "no range",
            |_| reply(416, &[("content-range", "bytes */40000")], b"no"),
            3,
        ),
        (
            "parts",
            |_| {
                reply(
                    206,
                    &[("content-type", "multipart/byteranges; boundary=x")],
                    b"--x",
                )
            },
            3,
        ),
    ];
    for (name, ranged, requests) in cases {
        let fake = Fake::new(move |request, number| match request.from() {
            None if number == 0 => reply(200, &[], &blob(SIZE)).cut(SIZE - CUT, Then::Close),
            None => reply(200, &[], &blob(SIZE)),
            Some(from) => {
                assert_eq!(request.header("accept-encoding"), "identity");
                ranged(from)
            }
        });
        let cache = client(&fake, |_| {}).await;
        let (bytes, ended) = streamed(&cache, &digest(&blob(SIZE)), 0, false).await;
        ended.expect(name);
        assert!(bytes == blob(SIZE), "{name}");
        assert_eq!(fake.log().len(), requests, "{name}");
        // Nor does it matter who had the beginning.
        let (bytes, ended) = streamed(&cache, &digest(&blob(SIZE)), 39_000, false).await;
        ended.expect(name);
        assert!(bytes == blob(SIZE)[39_000..], "{name}");
    }
}

#[tokio::test]
async fn an_encoded_part_is_not_used() {
    let fake = Fake::new(|request, _| match request.from() {
        Some(from) => {
            let range = format!("bytes {from}-39999/40000");
            reply(
                206,
                &[("content-range", &range), ("content-encoding", "gzip")],
                b"x",
            )
        }
        None => reply(200, &[], &blob(SIZE)),
    });
    let cache = client(&fake, |_| {}).await;
    let (bytes, ended) = streamed(&cache, &digest(&blob(SIZE)), 1, false).await;
    ended.unwrap();
    assert!(bytes == blob(SIZE)[1..]);
}

#[tokio::test]
async fn what_is_complete_or_past_the_end_costs_no_request() {
    let fake = Fake::new(|_, _| reply(500, &[], b""));
    let cache = client(&fake, |_| {}).await;
    let all = digest(&blob(SIZE));
    assert!(streamed(&cache, &all, SIZE as u64, false).await.1.is_ok());
    assert!(streamed(&cache, &digest(b""), 0, false).await.1.is_ok());
    let error = streamed(&cache, &all, SIZE as u64 + 1, false)
        .await
        .1
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Rejected);
    assert!(fake.log().is_empty());
}

#[tokio::test]
async fn a_part_that_nobody_asked_for_is_an_error() {
    let fake = Fake::new(|_, _| part(206, 5, SIZE, "40000"));
    let cache = client(&fake, |_| {}).await;
    let (bytes, ended) = streamed(&cache, &digest(&blob(SIZE)), 0, false).await;
    assert_eq!(ended.unwrap_err().kind, RemoteErrorKind::Protocol);
    assert!(bytes.is_empty());
}

#[tokio::test]
async fn a_server_that_cuts_every_answer_is_left_in_the_end_unless_it_gets_on() {
    // A thousand bytes each time, of forty thousand: less than what counts as progress.
    let fake = Fake::new(|request, _| {
        let from = request.from().unwrap_or(0);
        let whole = part(206, from, SIZE, "40000");
        let less = SIZE - from - 1000.min(SIZE - from);
        whole.cut(less, Then::Close)
    });
    let cache = client(&fake, |_| {}).await;
    let error = streamed(&cache, &digest(&blob(SIZE)), 0, false)
        .await
        .1
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Unavailable, "{error}");
    assert_eq!(fake.log().len(), 6);
}
