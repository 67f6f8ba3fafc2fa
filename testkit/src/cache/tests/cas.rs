//! Batches, trees and action results.

use super::*;

#[tokio::test]
async fn batches_answer_blob_by_blob() {
    let (cache, client) = start().await;
    let large = cache.store().put(noise(10_000));
    let small = cache.store().put(&b"small"[..]);
    let empty = Digest::of(DigestFunction::Sha256, b"");
    let absent = Digest::of(DigestFunction::Sha256, b"absent");
    for zstd in [false, true] {
        let answers = client
            .batch(&[&large, &absent, &small, &empty], zstd)
            .await
            .unwrap();
        assert_eq!(answers.len(), 4);
        let codes: Vec<_> = answers.iter().map(|a| a.status.as_ref().unwrap().code).collect();
        assert_eq!(codes, [0, Code::NotFound.into(), 0, 0]);
        assert_eq!(answers[0].compressor, i32::from(zstd));
        if zstd {
            assert!(zstd::decode_all(&*answers[0].data).unwrap() == noise(10_000));
        } else {
            assert!(answers[0].data == noise(10_000));
        }
        assert_eq!(answers[2].data, b"small");
        assert_eq!(answers[2].compressor, 0);
    }
    let request = FindMissingBlobsRequest {
        blob_digests: [&small, &absent, &empty].map(wire).to_vec(),
        ..Default::default()
    };
    let answer = client
        .cas()
        .find_missing_blobs(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(answer.missing_blob_digests, [wire(&absent)]);
    assert_eq!(cache.stats().batch_read_blobs, 8);
    assert_eq!(cache.stats().find_missing_blobs, 3);
}

#[tokio::test]
async fn batch_uploads_are_verified_blob_by_blob() {
    let (cache, client) = start().await;
    let bytes = noise(1000);
    let digest = Digest::of(DigestFunction::Sha256, &bytes);
    let other = Digest::of(DigestFunction::Sha256, b"other");
    let update =
        |digest: &Digest, data: Vec<u8>, compressor: compressor::Value| batch_update_blobs_request::Request {
            digest: Some(wire(digest)),
            data,
            compressor: compressor.into(),
        };
    let request = BatchUpdateBlobsRequest {
        requests: vec![
            update(
                &digest,
                zstd::encode_all(&*bytes, 1).unwrap(),
                compressor::Value::Zstd,
            ),
            update(&other, b"wrong".to_vec(), compressor::Value::Identity),
            update(&other, b"no frame".to_vec(), compressor::Value::Zstd),
            update(&other, b"other".to_vec(), compressor::Value::Brotli),
        ],
        ..Default::default()
    };
    let answers = client
        .cas()
        .batch_update_blobs(request)
        .await
        .unwrap()
        .into_inner()
        .responses;
    let codes: Vec<_> = answers.iter().map(|a| a.status.as_ref().unwrap().code).collect();
    assert_eq!(codes, [0, 3, 3, 3]);
    assert!(cache.store().get(&digest).unwrap() == bytes);
    assert!(!cache.store().contains(&other));
}

#[tokio::test]
async fn batches_above_the_limit_are_refused() {
    let cache = EmbeddedCache::builder()
        .max_batch_bytes(1000)
        .start()
        .await
        .unwrap();
    let client = Client::of(&cache).await;
    let (one, two) = (cache.store().put(noise(600)), cache.store().put(noise(401)));
    assert_eq!(client.batch(&[&one], false).await.unwrap().len(), 1);
    assert_eq!(
        code(client.batch(&[&one, &two], false).await),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn trees_are_walked_page_by_page() {
    let (cache, client) = start().await;
    let put = |directory: &Directory| cache.store().put(directory.encode_to_vec());
    let leaf = put(&Directory::default());
    let parent = |children: &[&Digest]| Directory {
        directories: children
            .iter()
            .enumerate()
            .map(|(index, child)| DirectoryNode {
                name: index.to_string(),
                digest: Some(wire(child)),
            })
            .collect(),
        ..Default::default()
    };
    // The empty directory's digest is that of the empty blob, which is always there.
    let middle = put(&parent(&[&leaf]));
    let gone = Digest::of(DigestFunction::Sha256, b"gone");
    let root = put(&parent(&[&middle, &leaf, &gone]));
    let request = |page_size, token: &str| GetTreeRequest {
        root_digest: Some(wire(&root)),
        page_size,
        page_token: token.to_owned(),
        ..Default::default()
    };
    let mut pages = client.cas().get_tree(request(2, "")).await.unwrap().into_inner();
    let first = pages.message().await.unwrap().unwrap();
    let second = pages.message().await.unwrap().unwrap();
    assert!(pages.message().await.unwrap().is_none());
    assert_eq!((first.directories.len(), second.directories.len()), (2, 1));
    assert_eq!(second.next_page_token, "");
    let mut rest = client
        .cas()
        .get_tree(request(0, &first.next_page_token))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        rest.message().await.unwrap().unwrap().directories,
        second.directories
    );
    cache.store().remove(&root);
    assert_eq!(code(client.cas().get_tree(request(0, "")).await), Code::NotFound);
}

#[tokio::test]
async fn action_results_are_kept_by_action() {
    let (cache, client) = start().await;
    let mut actions = ActionCacheClient::new(client.0.clone());
    let action = Digest::of(DigestFunction::Sha256, b"action");
    let get = || GetActionResultRequest {
        action_digest: Some(wire(&action)),
        ..Default::default()
    };
    assert_eq!(code(actions.get_action_result(get()).await), Code::NotFound);
    let result = ActionResult {
        exit_code: 1,
        ..Default::default()
    };
    let update = UpdateActionResultRequest {
        action_digest: Some(wire(&action)),
        action_result: Some(result.clone()),
        ..Default::default()
    };
    actions.update_action_result(update).await.unwrap();
    assert_eq!(
        actions.get_action_result(get()).await.unwrap().into_inner(),
        result
    );
    let stats = cache.stats();
    assert_eq!(
        (stats.get_actions, stats.action_hits, stats.update_actions),
        (2, 1, 1)
    );
}
