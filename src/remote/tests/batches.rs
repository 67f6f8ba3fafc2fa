//! Every digest gets one answer, whatever the server does.

use tonic::{Code, Status};

use super::{fake::status, *};

#[tokio::test]
async fn answers_come_in_the_order_asked_and_name_what_is_missing() {
    let fake = Fake::new();
    let (a, b) = (fake.put(b"a"), fake.put(b"bb"));
    let (missing, empty) = (digest(b"missing"), digest(b""));
    let cache = client(&fake, |_| {}).await;
    let asked = [b.clone(), missing, empty, a, b];
    let answers = cache.read_batch(&asked, &attribution(), false).await;
    assert!(answers.iter().map(|(d, _)| d).eq(&asked));
    let bytes: Vec<_> = answers
        .iter()
        .map(|(_, answer)| answer.as_ref().map(|b| b.to_vec()).map_err(|e| e.kind))
        .collect();
    assert_eq!(bytes[0], Ok(b"bb".to_vec()));
    assert_eq!(bytes[1], Err(RemoteErrorKind::NotFound));
    assert_eq!(bytes[2], Ok(vec![]));
    assert_eq!(bytes[3], Ok(b"a".to_vec()));
    assert_eq!(bytes[4], bytes[0]);
    // Neither the empty blob nor the repeated one was asked for.
    assert_eq!(fake.script().log[1..], ["batch 3"]);
}

#[tokio::test]
async fn the_empty_blob_alone_needs_no_request() {
    let fake = Fake::new();
    let cache = client(&fake, |_| {}).await;
    let answers = cache.read_batch(&[digest(b"")], &attribution(), false).await;
    assert!(answers[0].1.as_ref().unwrap().is_empty());
    assert_eq!(fake.count("batch"), 0);
}

#[tokio::test]
async fn an_unavailable_server_is_asked_again_until_the_tries_are_used_up() {
    let fake = Fake::new();
    let a = fake.put(b"a");
    let cache = client(&fake, |o| o.retries = 2).await;
    fake.script().errors = [Status::unavailable("x"), Status::aborted("x")].into();
    let answers = cache
        .read_batch(std::slice::from_ref(&a), &attribution(), false)
        .await;
    assert!(answers[0].1.is_ok());
    fake.script().errors = vec![Status::unavailable("gone fishing"); 3].into();
    let answers = cache.read_batch(&[a], &attribution(), false).await;
    let error = answers[0].1.as_ref().unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Unavailable);
    assert!(error.to_string().contains("gone fishing"), "{error}");
}

#[tokio::test]
async fn what_cannot_succeed_is_not_tried_again() {
    let fake = Fake::new();
    let a = fake.put(b"a");
    let cache = client(&fake, |_| {}).await;
    fake.script().errors = [Status::permission_denied("no")].into();
    let answers = cache.read_batch(&[a], &attribution(), false).await;
    assert_eq!(answers[0].1.as_ref().unwrap_err().kind, RemoteErrorKind::Denied);
    assert_eq!(fake.count("batch"), 1);
}

#[tokio::test]
async fn only_the_digests_that_failed_for_now_are_asked_for_again() {
    let fake = Fake::new();
    let digests = [fake.put(b"a"), fake.put(b"b"), fake.put(b"c")];
    fake.script().tamper = [(|answers: &mut Vec<_>| {
        answers[0].status = Some(status(Code::PermissionDenied, "no"));
        answers[1].status = Some(status(Code::ResourceExhausted, "busy"));
    }) as fake::Tamper]
    .into();
    let cache = client(&fake, |_| {}).await;
    let answers = cache.read_batch(&digests, &attribution(), false).await;
    assert_eq!(answers[0].1.as_ref().unwrap_err().kind, RemoteErrorKind::Denied);
    assert_eq!(answers[1].1.as_ref().unwrap().as_ref(), b"b");
    assert_eq!(answers[2].1.as_ref().unwrap().as_ref(), b"c");
    assert_eq!(fake.script().log[1..], ["batch 3", "batch 1"]);
}

#[tokio::test]
async fn left_out_doubled_unasked_and_short_answers_harm_nobody_else() {
    let fake = Fake::new();
    let digests = [
        fake.put(b"aaa"),
        fake.put(b"bbb"),
        fake.put(b"ccc"),
        fake.put(b"ddd"),
    ];
    fake.script().tamper = [(|answers: &mut Vec<_>| {
        // The second is left out, the third is short, the first comes again with other bytes, and one more that
        // was not requested.
        answers.remove(1);
        answers[1].data.pop();
        let mut again = answers[0].clone();
        again.data = b"xxx".to_vec();
        answers.push(again.clone());
        again.digest.as_mut().unwrap().size_bytes = 4;
        answers.push(again);
        answers.push(Default::default());
    }) as fake::Tamper]
    .into();
    let cache = client(&fake, |_| {}).await;
    let answers = cache.read_batch(&digests, &attribution(), false).await;
    assert_eq!(answers.len(), 4);
    assert_eq!(answers[0].1.as_ref().unwrap().as_ref(), b"aaa");
    for (i, part) in [(1, "missing from the server's response"), (2, "2 bytes")] {
        let error = answers[i].1.as_ref().unwrap_err();
        assert_eq!(error.kind, RemoteErrorKind::Protocol);
        let shown = error.to_string();
        assert!(
            shown.contains(part) && shown.contains(&digests[i].hash_hex()),
            "{shown}"
        );
    }
    assert_eq!(answers[3].1.as_ref().unwrap().as_ref(), b"ddd");
}

#[tokio::test]
async fn zstd_is_taken_where_offered_and_wanted() {
    let fake = Fake::new();
    fake.script().zstd = true;
    let a = fake.put(&blob(5000));
    for wanted in [Compression::Always, Compression::Never] {
        let cache = client(&fake, |o| o.compression = wanted).await;
        let answers = cache
            .read_batch(std::slice::from_ref(&a), &attribution(), false)
            .await;
        assert_eq!(answers[0].1.as_ref().unwrap().as_ref(), blob(5000));
    }
}

#[tokio::test]
async fn bombs_and_unknown_compressors_are_refused() {
    let fake = Fake::new();
    fake.script().zstd = true;
    let digests = [fake.put(&blob(500)), fake.put(&blob(600)), fake.put(&blob(700))];
    fake.script().tamper = [(|answers: &mut Vec<_>| {
        answers[0].data = zstd::encode_all(vec![0; 10_000_000].as_slice(), 3).unwrap();
        answers[1].compressor = 3;
        answers[2].data = b"not valid zstd".to_vec();
    }) as fake::Tamper]
    .into();
    let cache = client(&fake, |_| {}).await;
    for (digest, answer) in cache.read_batch(&digests, &attribution(), false).await {
        assert_eq!(
            answer.expect_err("refused").kind,
            RemoteErrorKind::Protocol,
            "{digest}"
        );
    }
}

#[tokio::test]
async fn requests_stay_within_the_servers_limit_and_larger_blobs_are_streamed() {
    let fake = Fake::new();
    fake.script().max_batch = 1000;
    let digests = [400, 500, 300, 2000].map(|n| fake.put(&blob(n)));
    let cache = client(&fake, |_| {}).await;
    assert_eq!(cache.capabilities().await.unwrap().max_batch_bytes, 1000);
    let answers = cache.read_batch(&digests, &attribution(), false).await;
    for (digest, answer) in answers {
        assert_eq!(answer.unwrap().len() as u64, digest.size());
    }
    assert_eq!(fake.script().log[1..3], ["batch 2", "batch 1"]);
    assert_eq!(fake.count("read 0 blobs/"), 1);
}

#[tokio::test]
async fn a_server_without_batches_is_read_by_streams() {
    let fake = Fake::new();
    fake.script().no_batches = true;
    let digests = [fake.put(b"a"), fake.put(b"b")];
    let cache = client(&fake, |_| {}).await;
    let answers = cache.read_batch(&digests, &attribution(), false).await;
    assert_eq!(answers[1].1.as_ref().unwrap().as_ref(), b"b");
    assert_eq!(fake.count("read"), 2);
}

#[tokio::test]
async fn after_wrong_bytes_another_connection_is_taken() {
    let fake = Fake::new();
    let a = fake.put(b"a");
    let cache = client(&fake, |o| o.connections = Some(2)).await;
    for _ in 0..4 {
        cache
            .read_batch(std::slice::from_ref(&a), &attribution(), true)
            .await;
    }
    let peers = fake.script().peers.clone();
    assert!(peers.windows(2).all(|pair| pair[0] != pair[1]), "{peers:?}");
}
