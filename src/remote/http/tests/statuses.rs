//! What statuses mean, and what comes of them.

use super::*;

#[tokio::test]
async fn statuses_are_sorted_into_kinds_and_only_those_that_may_pass_are_asked_again() {
    use RemoteErrorKind as K;
    for (status, headers, kind, requests) in [
        (404, vec![], K::NotFound, 1),
        (410, vec![], K::NotFound, 1),
        (204, vec![], K::NotFound, 1),
        (401, vec![], K::Unauthenticated, 1),
        (
            400,
            vec![("www-authenticate", "Bearer realm=\"x\", error=\"invalid_token\"")],
            K::Unauthenticated,
            1,
        ),
        (403, vec![], K::Denied, 1),
        (400, vec![], K::Rejected, 1),
        (405, vec![], K::Rejected, 1),
        (412, vec![], K::Rejected, 1),
        (301, vec![("location", "/elsewhere")], K::Rejected, 1),
        (302, vec![("location", "http://127.0.0.1:1/")], K::Rejected, 1),
        (408, vec![], K::Unavailable, 3),
        (425, vec![], K::Unavailable, 3),
        (429, vec![("retry-after", "7")], K::Unavailable, 3),
        (500, vec![], K::Unavailable, 3),
        (502, vec![], K::Unavailable, 3),
        (503, vec![], K::Unavailable, 3),
        (504, vec![], K::Unavailable, 3),
    ] {
        let fake = Fake::new(move |_, _| reply(status, &headers, b""));
        let cache = client(&fake, |options| options.retries = 2).await;
        let error = streamed(&cache, &digest(b"x"), 0, false).await.1.unwrap_err();
        assert_eq!(error.kind, kind, "{status}: {error}");
        assert_eq!(fake.log().len(), requests, "{status}");
        assert!(error.to_string().contains("http://127.0.0.1"), "{error}");
        assert!(
            kind == K::NotFound || error.to_string().contains(&status.to_string()),
            "{error}"
        );
        assert!(
            fake.log()
                .iter()
                .all(|request| request.path.starts_with("/some/cas/cas/"))
        );
    }
}

#[tokio::test]
async fn what_is_forbidden_counts_as_missing_only_if_the_caller_says_so() {
    for (reported, kind) in [
        (false, RemoteErrorKind::Denied),
        (true, RemoteErrorKind::NotFound),
    ] {
        let fake = Fake::new(|_, _| reply(403, &[], b""));
        let cache = client(&fake, |options| options.forbidden_is_missing = reported).await;
        let error = streamed(&cache, &digest(b"x"), 0, false).await.1.unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.to_string().contains("403"), "{error}");
        let missing = cache.find_missing(&[digest(b"x")], &nobody()).await;
        assert_eq!(missing.is_ok(), reported, "{missing:?}");
    }
}

#[tokio::test]
async fn a_server_says_for_how_long_it_wants_to_be_left_alone() {
    for (text, seconds) in [("7", 7), ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("soon", 0)] {
        let fake = Fake::new(move |_, number| match number {
            0 => reply(503, &[("retry-after", text)], b""),
            _ => reply(200, &[], b"x"),
        });
        let (cache, timer) = opened(options(&format!("http://{}", fake.start().await)));
        assert_eq!(cache.whole(&digest(b"x"), false).await.unwrap(), "x");
        let slept = timer.slept.lock().unwrap().clone();
        assert_eq!(slept.len(), 1);
        let is_asked_for = slept[0] == Duration::from_secs(7);
        assert_eq!(is_asked_for, seconds == 7, "{text}: {slept:?}");
    }
}

#[tokio::test]
async fn a_servers_message_is_shown_if_it_is_text() {
    for (kind, body, reported) in [
        ("text/plain; charset=utf-8", "Hash\r\nis\x1b[31m too short", true),
        ("text/html", "<html>Hash is too short</html>", false),
    ] {
        let fake = Fake::new(move |_, _| reply(400, &[("content-type", kind)], body.as_bytes()));
        let cache = client(&fake, |_| {}).await;
        let error = streamed(&cache, &digest(b"x"), 0, false)
            .await
            .1
            .unwrap_err()
            .to_string();
        assert_eq!(error.contains("too short"), reported, "{error}");
        assert!(!error.contains('\x1b') && !error.contains('\n'), "{error}");
    }
}

#[tokio::test]
async fn a_kept_connection_that_the_server_closes_costs_no_try() {
    let fake = Fake::new(|_, number| match number {
        // The second one is read, and then the connection is closed without an answer.
        1 => Reply(Vec::new(), Then::Close),
        _ => reply(200, &[], b"x"),
    });
    let cache = client(&fake, |options| options.retries = 0).await;
    for _ in 0..2 {
        assert_eq!(cache.whole(&digest(b"x"), false).await.unwrap(), "x");
    }
    assert_eq!(fake.log().len(), 3);
}

#[tokio::test]
async fn a_dead_server_does_not_cost_every_blob_its_tries() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let mut options = options(&format!("http://{address}"));
    (options.retries, options.connections) = (3, Some(2));
    let (cache, timer) = opened(options);
    let asked: Vec<Digest> = (1..100).map(|n| digest(&blob(n))).collect();
    for (_, answer) in cache.read_batch(&asked, &nobody(), false).await {
        assert_eq!(answer.unwrap_err().kind, RemoteErrorKind::Unavailable);
    }
    let waits = timer.slept.lock().unwrap().len();
    assert!(waits <= 9, "{waits}");
    let error = cache.probe().await.unwrap_err();
    assert!(
        error.to_string().contains("failed to reach the server"),
        "{error}"
    );
    assert!(cache.find_missing(&asked, &nobody()).await.is_err());
}

#[tokio::test]
async fn servers_without_head_are_asked_for_a_byte() {
    let fake = Fake::new(|request, _| match (&*request.method, &request.path) {
        ("HEAD", _) => reply(405, &[], b""),
        (_, path) if path.ends_with(&digest(b"absent").hash_hex()) => reply(404, &[], b""),
        (_, path) if path.ends_with(&digest(b"odd").hash_hex()) => {
            reply(200, &[("transfer-encoding", "chunked")], &chunked(b"odd"))
        }
        _ => reply(206, &[("content-range", "bytes 0-0/17")], b"x"),
    });
    let cache = client(&fake, |_| {}).await;
    let asked = [digest(b"absent"), digest(b"there")];
    assert_eq!(cache.find_missing(&asked, &nobody()).await.unwrap(), asked[..1]);
    let size = |text: &str| {
        let (cache, digest) = (cache.clone(), digest(text.as_bytes()));
        async move { cache.blob_size(digest.function(), digest.hash()).await.unwrap() }
    };
    assert_eq!(size("there").await, Some(17));
    assert_eq!(size("absent").await, None);
    // Where no head says it, it is counted.
    assert_eq!(size("odd").await, Some(3));
    cache.probe().await.unwrap();
}

#[tokio::test]
async fn a_probe_says_what_is_wrong() {
    for (status, words) in [
        (200, None),
        (404, None),
        (401, Some("requires credentials")),
        (403, Some("permission denied")),
        (302, Some("not an HTTP cache")),
        (500, Some("failed to reach")),
    ] {
        let fake = Fake::new(move |_, _| reply(status, &[], b""));
        let probed = client(&fake, |_| {}).await.probe().await;
        match (words, probed) {
            (None, Ok(())) => {}
            (Some(words), Err(error)) => assert!(error.to_string().contains(words), "{error}"),
            (_, probed) => panic!("{status}: {probed:?}"),
        }
        assert_eq!(fake.log().len(), 1, "without retries");
    }
}

#[test]
fn a_refused_blob_says_nothing_of_those_under_way() {
    use RemoteErrorKind as Kind;
    for (at_once, kind, enough) in [
        (100, Kind::Denied, 100),
        (100, Kind::Rejected, 100),
        (1, Kind::Denied, 3),
        (1, Kind::Unavailable, 1),
        (100, Kind::Unavailable, 3),
        (100, Kind::Config, 3),
    ] {
        let hope = Hope::new(at_once);
        for failures in 1..=enough {
            assert!(hope.is_lost().is_none(), "{kind:?} {failures}");
            hope.heard(&Err(RemoteError::new(kind, "reading", "no")));
        }
        assert_eq!(hope.is_lost().unwrap().kind, kind);
        hope.heard(&Err(RemoteError::new(Kind::NotFound, "reading", "no")));
        assert!(hope.is_lost().is_none(), "it answers");
    }
}
