//! With the servers of others, as `scripts/install-peers` installs them. A test whose server is missing says so.

use bazel_remote_apis::build::bazel::remote::execution::v2::{ActionResult, OutputFile};
use outhaul_testkit::{
    in_time,
    stores::{BUCKET, Store, StoreKind},
};
use prost::Message as _;

use super::*;
use crate::{
    remote::{ActionStore as _, casblob},
    transport::RemoteErrorKind,
};

/// A layout's settings, the names of its blobs and action results, and how the blobs are in their objects.
type Written = (
    &'static str,
    fn(&Digest) -> String,
    Option<fn(&Digest) -> String>,
    fn(&[u8]) -> Vec<u8>,
);

fn two(digest: &Digest) -> String {
    digest.hash_hex()[..2].to_owned()
}

/// As those write who fill such buckets.
const LAYOUTS: [Written; 9] = [
    (
        "",
        |d| format!("cas/{}", d.hash_hex()),
        Some(|d| format!("ac/{}", d.hash_hex())),
        <[u8]>::to_vec,
    ),
    (
        "layout=disk",
        |d| format!("cas/{}/{}", two(d), d.hash_hex()),
        Some(|d| format!("ac/{}/{}", two(d), d.hash_hex())),
        <[u8]>::to_vec,
    ),
    (
        "layout=bazel-remote",
        |d| format!("cas.v2/{}/{}", two(d), d.hash_hex()),
        Some(|d| format!("ac/{}/{}", two(d), d.hash_hex())),
        |b| casblob::encode(b, 1 << 20),
    ),
    (
        "layout=bazel-remote-plain",
        |d| format!("cas/{}/{}", two(d), d.hash_hex()),
        Some(|d| format!("ac/{}/{}", two(d), d.hash_hex())),
        <[u8]>::to_vec,
    ),
    (
        "layout=bazel-remote-flat",
        |d| format!("cas.v2/{}", d.hash_hex()),
        Some(|d| format!("ac/{}", d.hash_hex())),
        |b| casblob::encode(b, 1 << 20),
    ),
    (
        "layout=nativelink",
        |d| format!("{}-{}", d.hash_hex(), d.size()),
        None,
        <[u8]>::to_vec,
    ),
    (
        "layout=buildbuddy",
        |d| format!("{0}/{0}", d.hash_hex()),
        Some(|d| format!("ac/{0}/{0}", d.hash_hex())),
        <[u8]>::to_vec,
    ),
    (
        "template=x:y%2Bz/{kind}-{hash}&encoding=zstd",
        |d| format!("x:y+z/cas-{}", d.hash_hex()),
        Some(|d| format!("x:y+z/ac-{}", d.hash_hex())),
        |b| zstd::encode_all(b, 3).unwrap(),
    ),
    (
        "template={size_bytes}/{hash}&encoding=casblob",
        |d| format!("{}/{}", d.size(), d.hash_hex()),
        None,
        |b| casblob::encode(b, 1 << 16),
    ),
];

async fn every_layout_is_read(kind: StoreKind) {
    if !kind.is_there("every_layout_is_read") {
        return;
    }
    let store = Store::start(kind);
    let blobs = [noise(3_000_000), b"x".to_vec(), noise(70_000), noise(20_000)];
    let digests: Vec<Digest> = blobs.iter().map(|blob| sha256(blob)).collect();
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "a/b".to_owned(),
            ..OutputFile::default()
        }],
        ..ActionResult::default()
    };
    let (action, absent) = (sha256(b"an action"), sha256(b"absent"));
    for (number, (settings, blob_name, action_name, encode)) in LAYOUTS.into_iter().enumerate() {
        let prefix = format!("p{number}");
        for (digest, blob) in digests.iter().zip(&blobs) {
            store.put(&format!("{prefix}/{}", blob_name(digest)), &encode(blob));
        }
        if let Some(name) = action_name {
            store.put(&format!("{prefix}/{}", name(&action)), &result.encode_to_vec());
        }
        let cache = cache(&store.url(&prefix, settings), &store.variables()).unwrap();
        let nobody = Attribution::default();
        cache.probe().await.unwrap();
        let asked = [digests.clone(), vec![absent.clone()]].concat();
        let answers = batch(&cache, &asked).await;
        for (answer, blob) in answers.iter().zip(&blobs) {
            assert!(answer.as_ref().unwrap() == blob, "{settings}");
        }
        assert!(
            answers[4].as_ref().unwrap_err().is_not_found(),
            "{:?}",
            answers[4]
        );
        for offset in [0, 1, 1 << 20, 2_999_999, 3_000_000] {
            let bytes = stream(&cache, &digests[0], offset).await.unwrap();
            assert!(
                bytes == blobs[0][usize::try_from(offset).unwrap()..],
                "{settings} {offset}"
            );
        }
        let missing = cache.find_missing(&asked, &nobody).await.unwrap();
        assert_eq!(missing, std::slice::from_ref(&absent), "{settings}");
        let found = cache.action_result(&action, &nobody).await;
        match action_name {
            Some(name) => {
                assert_eq!(found.unwrap().as_deref(), Some(&result), "{settings}");
                assert_eq!(cache.action_result(&absent, &nobody).await, Ok(None));
                let empty = sha256(b"cut by a crash");
                store.put(&format!("{prefix}/{}", name(&empty)), b"");
                let cut = cache.action_result(&empty, &nobody).await.unwrap_err();
                assert_eq!(cut.kind, RemoteErrorKind::Protocol, "{cut}");
            }
            // The store's blobs are of use all the same.
            None => assert_eq!(found.unwrap_err().kind, RemoteErrorKind::Rejected),
        }
        let size = cache.blob_size(DigestFunction::Sha256, digests[2].hash()).await;
        if settings.contains("encoding") || settings.contains("nativelink") {
            assert_eq!(size.unwrap_err().kind, RemoteErrorKind::Config, "{settings}");
        } else {
            assert_eq!(size, Ok(Some(70_000)), "{settings}");
            let size = cache.blob_size(DigestFunction::Sha256, absent.hash()).await;
            assert_eq!(size, Ok(None), "{settings}");
        }
    }
}

#[tokio::test]
async fn every_layout_is_read_from_strict_s3() {
    every_layout_is_read(StoreKind::S3).await;
}

#[tokio::test]
async fn every_layout_is_read_from_public_s3() {
    every_layout_is_read(StoreKind::PublicS3).await;
}

#[tokio::test]
async fn every_layout_is_read_from_google() {
    every_layout_is_read(StoreKind::Gcs).await;
}

#[tokio::test]
async fn every_layout_is_read_from_azure() {
    every_layout_is_read(StoreKind::Azure).await;
}

#[tokio::test]
async fn listings_are_whole_and_of_one_prefix() {
    let names = ["gfx942:xnack+.tar.zst", "50%25 + more", "a b", "xy", "ü"];
    for kind in StoreKind::ALL {
        if !kind.is_there("listings_are_whole_and_of_one_prefix") {
            continue;
        }
        let store = Store::start(kind);
        for name in names {
            store.put(&format!("run-1/{name}"), name.as_bytes());
        }
        // The same beginning, and not below the prefix; and further below.
        store.put("run-10/other", b"no");
        store.put("run-1/sub/dir/x", b"no");
        // More than one page, where writing is quick.
        let many = if matches!(kind, StoreKind::S3 | StoreKind::PublicS3) {
            2500
        } else {
            10
        };
        for number in 0..many {
            store.put(&format!("run-1/many-{number:04}"), b"12");
        }
        for (prefix, below) in [("run-1", ""), ("", "run-1/")] {
            let bucket = bucket(&store.url(prefix, ""), &store.variables()).unwrap();
            let listed = in_time(bucket.list(below)).await.unwrap();
            assert_eq!(listed.len(), many + names.len(), "{kind:?}");
            assert!(listed.is_sorted_by(|a, b| a.name < b.name));
            for name in names {
                let whole = format!("{below}{name}");
                let found = listed.iter().find(|listed| listed.name == whole);
                let found = found.unwrap_or_else(|| panic!("{kind:?}: {whole} of {listed:?}"));
                assert_eq!(found.size, name.len() as u64);
                let mut reading = bucket.get(&whole, 1, found.etag.as_deref()).await.unwrap();
                assert_eq!(reading.size, found.size);
                let mut bytes = Vec::new();
                while let Some(piece) = reading.next().await.unwrap() {
                    bytes.extend_from_slice(&piece);
                }
                assert_eq!(bytes, name.as_bytes()[1..], "{kind:?}");
            }
            assert_eq!(bucket.list(&format!("{below}nothing")).await, Ok(Vec::new()));
            let absent = bucket.get("run-1/absent", 0, None).await.unwrap_err();
            assert!(absent.is_not_found(), "{kind:?}: {absent}");
            let bad = bucket.get("a//b", 0, None).await.unwrap_err();
            assert_eq!(bad.kind, RemoteErrorKind::Rejected);
        }
    }
}

#[tokio::test]
async fn wrong_settings_are_not_taken_for_missing_blobs() {
    const WRONG: &str = "d3JvbmctczNjcmV0";
    for kind in StoreKind::ALL {
        if !kind.is_there("wrong_settings_are_not_taken_for_missing_blobs") {
            continue;
        }
        let store = Store::start(kind);
        let digest = sha256(b"x");
        store.put(&format!("cas/{}", digest.hash_hex()), b"x");
        let good = store.url("", "");
        let elsewhere = good.replace(&format!("://{BUCKET}"), "://nowhere");
        let wrong_keys: Vec<_> = store
            .variables()
            .into_iter()
            .map(|(name, value)| (name, if name == "AWS_ACCESS_KEY_ID" { value } else { WRONG }))
            .collect();
        let unknown = [
            ("AWS_ACCESS_KEY_ID", "AKNOBODY"),
            ("AWS_SECRET_ACCESS_KEY", WRONG),
        ];
        let mut cases = vec![(elsewhere, store.variables(), "bucket")];
        if matches!(kind, StoreKind::S3 | StoreKind::Azure) {
            // Azurite has another word for it than Azure.
            let part = if kind == StoreKind::S3 {
                "secret key is wrong"
            } else {
                "asked with the account's key"
            };
            cases.push((good.clone(), wrong_keys, part));
            cases.push((
                format!("{good}&anonymous=yes"),
                store.variables(),
                "asked with no credentials",
            ));
        }
        if kind == StoreKind::S3 {
            cases.push((good, unknown.to_vec(), "does not know the access key"));
        }
        // Google's emulator does not distinguish a missing bucket from a missing object.
        for (url, variables, part) in cases.into_iter().filter(|_| kind != StoreKind::Gcs) {
            let cache = cache(&url, &variables).unwrap();
            let probed = cache.probe().await;
            let probed = probed.map_or_else(|error| error, |()| panic!("{kind:?} {url}: is let in"));
            let read = batch(&cache, std::slice::from_ref(&digest))
                .await
                .remove(0)
                .unwrap_err();
            let listed = bucket(&url, &variables).unwrap().list("").await.unwrap_err();
            let asked = cache
                .find_missing(std::slice::from_ref(&digest), &Attribution::default())
                .await;
            let asked = asked.map_or_else(|error| error, |missing| panic!("{kind:?} {url}: {missing:?}"));
            for error in [probed, read, listed, asked] {
                let shown = format!("{error} {error:?}");
                assert!(!error.is_not_found() && shown.contains(part), "{kind:?}: {shown}");
                assert!(!shown.contains(WRONG) && !shown.contains("AKNOBODY"), "{shown}");
            }
        }
    }
}

#[tokio::test]
async fn foreign_objects_are_named_by_their_keys() {
    if !StoreKind::S3.is_there("foreign_objects_are_named_by_their_keys") {
        return;
    }
    let store = Store::start(StoreKind::S3);
    let blob = noise(200_000);
    let digest = sha256(&blob);
    let good = casblob::encode(&blob, 1 << 16);
    let cut = |at: usize| good[..at].to_vec();
    let with = |at: usize, bytes: &[u8]| {
        let mut object = good.clone();
        object[at..at + bytes.len()].copy_from_slice(bytes);
        object
    };
    let Ok(casblob::Parsed::Header(header)) = casblob::Header::parse(&good, None) else {
        panic!("it is whole");
    };
    let (last, _) = header.place_of(150_000);
    let key = format!("cas.v2/{}/{}", two(&digest), digest.hash_hex());
    let of_s3 = store.variables();
    let packed = cache(&store.url("", "layout=bazel-remote"), &of_s3).unwrap();
    for (object, part) in [
        (
            b"10000;chunk-signature=ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648"
                .to_vec(),
            "not a casblob",
        ),
        (Vec::new(), "bytes"),
        (cut(40), "ends within"),
        (cut(5000), "object's size"),
        (with(21, &(1_u64 << 60).to_le_bytes()), "out of bounds"),
        (with(16, &[7]), "unknown way 7"),
        (with(37, &[0; 8]), "do not rise"),
        (casblob::encode(&blob[1..], 1 << 16), "199999 bytes, not 200000"),
        (
            with(usize::try_from(last).unwrap(), &[0; 4]),
            "cannot be unpacked",
        ),
    ] {
        store.put(&key, &object);
        for offset in [0, 150_000] {
            let error = stream(&packed, &digest, offset)
                .await
                .map(|bytes| bytes.len())
                .unwrap_err();
            let shown = error.to_string();
            let is_about_header = !part.contains("unpacked") && part != "bytes";
            assert_eq!(error.kind, RemoteErrorKind::Protocol, "{shown}");
            assert!(shown.contains(&key), "{shown}");
            assert!(
                offset > 0 || !is_about_header || shown.contains(part),
                "{part}: {shown}"
            );
        }
    }
    store.put(&key, &good);
    assert!(stream(&packed, &digest, 150_000).await.unwrap() == blob[150_000..]);
    // A plain blob that begins as a compressed one is what its layout says.
    let digest = sha256(&good);
    store.put(&format!("cas/{}", digest.hash_hex()), &good);
    let plain = cache(&store.url("", ""), &of_s3).unwrap();
    assert!(stream(&plain, &digest, 0).await.unwrap() == good);
    store.put(&format!("cas/{}", digest.hash_hex()), &good[1..]);
    let shown = stream(&plain, &digest, 0).await.unwrap_err().to_string();
    assert!(shown.contains("bytes instead of"), "{shown}");
    // What our side does not take is not a fault of the store's.
    let nobody = Attribution::default();
    store.put(&format!("cas/{}", digest.hash_hex()), &good);
    let error = plain
        .read_stream(&digest, 0, &nobody, false, &mut Full(10))
        .await
        .unwrap_err();
    assert_eq!(error.kind, RemoteErrorKind::Sink);
}
