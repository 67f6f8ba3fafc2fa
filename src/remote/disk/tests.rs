use std::{
    os::unix::fs::{MetadataExt as _, symlink},
    time::{Duration, SystemTime},
};

use bazel_remote_apis::build::bazel::remote::execution::v2::OutputFile;

use super::*;
use crate::remote::reading::Collect;

const LONG_AGO: Duration = Duration::from_secs(1_000_000);

fn sha256(text: &str) -> Digest {
    Digest::of(DigestFunction::Sha256, text.as_bytes())
}

fn put(dir: &Path, kind: Kind, digest: &Digest, bytes: &[u8]) -> PathBuf {
    let path = dir.join(path_of(kind, digest.function(), digest.hash()));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + LONG_AGO).unwrap();
    path
}

fn is_touched(path: &Path) -> bool {
    std::fs::metadata(path).unwrap().mtime() as u64 != LONG_AGO.as_secs()
}

#[tokio::test]
async fn blobs_are_read_whole_from_where_bazel_keeps_them_and_count_as_used() {
    let dir = tempfile::tempdir().unwrap();
    let nobody = Attribution::default();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n as u8).collect();
    for (function, below) in [
        (DigestFunction::Sha256, "cas"),
        (DigestFunction::Sha1, "cas"),
        (DigestFunction::Md5, "cas"),
        (DigestFunction::Blake3, "blake3/cas"),
    ] {
        let digest = Digest::of(function, &bytes);
        let path = put(dir.path(), Kind::Blob, &digest, &bytes);
        assert!(path.starts_with(dir.path().join(below).join(&digest.hash_hex()[..2])));
        for touch in [false, true] {
            let cache = DiskCache::new(dir.path(), touch);
            let mut kept = Collect::default();
            cache
                .read_stream(&digest, 1000, &nobody, false, &mut kept)
                .await
                .unwrap();
            assert_eq!(kept.into_bytes(), bytes[1000..]);
            let asked = std::slice::from_ref(&digest);
            let answers = cache.read_batch(asked, &nobody, false).await;
            assert_eq!(answers[0].1.as_ref().unwrap()[..], bytes);
            assert!(cache.find_missing(asked, &nobody).await.unwrap().is_empty());
            let size = cache.blob_size(function, digest.hash()).await.unwrap();
            assert_eq!(size, Some(digest.size()));
            assert_eq!(is_touched(&path), touch, "{function}");
        }
    }
}

#[tokio::test]
async fn asking_what_is_missing_is_use_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let path = put(dir.path(), Kind::Blob, &sha256("a"), b"a");
    let cache = DiskCache::new(dir.path(), true);
    let asked = [sha256("a"), sha256(""), sha256("b")];
    let missing = cache.find_missing(&asked, &Attribution::default()).await.unwrap();
    assert_eq!(missing, [sha256("b")]);
    assert!(is_touched(&path));
}

#[tokio::test]
async fn what_is_cut_or_no_file_or_a_link_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let cache = DiskCache::new(dir.path(), true);
    let all = [
        "cut",
        "long",
        "empty",
        "dir",
        "link",
        "fifo",
        "absent",
        "below a link",
    ]
    .map(sha256);
    let [cut, long, empty, directory, link, fifo, _, below] = &all;
    put(dir.path(), Kind::Blob, cut, b"cu");
    put(dir.path(), Kind::Blob, long, b"longer");
    put(dir.path(), Kind::Blob, empty, b"");
    let path = |digest: &Digest| {
        dir.path()
            .join(path_of(Kind::Blob, digest.function(), digest.hash()))
    };
    std::fs::create_dir_all(path(directory)).unwrap();
    let target = put(dir.path(), Kind::Blob, link, b"link");
    std::fs::rename(&target, dir.path().join("elsewhere")).unwrap();
    symlink(dir.path().join("elsewhere"), &target).unwrap();
    std::fs::create_dir_all(path(fifo).parent().unwrap()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path(fifo),
        rustix::fs::FileType::Fifo,
        Mode::RWXU,
        0,
    )
    .unwrap();
    let outside = tempfile::tempdir().unwrap();
    let real = put(outside.path(), Kind::Blob, below, b"below a link");
    symlink(real.parent().unwrap(), path(below).parent().unwrap()).unwrap();
    let nobody = Attribution::default();
    for (digest, answer) in cache.read_batch(&all, &nobody, false).await {
        assert!(answer.unwrap_err().is_not_found(), "{digest}");
    }
    let mut sink = Collect::default();
    for digest in &all {
        let read = cache.read_stream(digest, 0, &nobody, false, &mut sink);
        assert!(read.await.unwrap_err().is_not_found(), "{digest}");
    }
    assert_eq!(cache.find_missing(&all, &nobody).await.unwrap(), all);
    for digest in [directory, link, fifo] {
        let size = cache.blob_size(digest.function(), digest.hash()).await;
        assert_eq!(size.unwrap(), None, "{digest}");
    }
}

#[tokio::test]
async fn a_directory_that_is_not_there_has_nothing_until_it_appears() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("later");
    let cache = DiskCache::new(&root, true);
    let (nobody, asked) = (Attribution::default(), [sha256("a")]);
    for round in 0..2 {
        cache.probe().await.unwrap();
        let answers = cache.read_batch(&asked, &nobody, false).await;
        assert!(answers[0].1.as_ref().unwrap_err().is_not_found(), "{round}");
        assert_eq!(cache.find_missing(&asked, &nobody).await.unwrap(), asked);
        assert_eq!(cache.action_result(&asked[0], &nobody).await.unwrap(), None);
        put(&root, Kind::Blob, &asked[0], b"a");
        let answers = cache.read_batch(&asked, &nobody, false).await;
        assert_eq!(answers[0].1.as_ref().unwrap()[..], b"a"[..]);
        std::fs::remove_dir_all(&root).unwrap();
    }
    std::fs::write(&root, "no directory").unwrap();
    for error in [
        cache.probe().await.unwrap_err(),
        cache.find_missing(&asked, &nobody).await.unwrap_err(),
    ] {
        assert_eq!(error.kind, RemoteErrorKind::Config);
        assert!(error.to_string().contains("later"), "{error}");
    }
}

#[tokio::test]
async fn results_of_actions_are_read_and_what_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let cache = DiskCache::new(dir.path(), true);
    let nobody = Attribution::default();
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "bazel-out/a".to_owned(),
            ..OutputFile::default()
        }],
        ..ActionResult::default()
    };
    for function in [DigestFunction::Sha256, DigestFunction::Blake3] {
        let action = Digest::of(function, b"action");
        assert_eq!(cache.action_result(&action, &nobody).await.unwrap(), None);
        let path = put(dir.path(), Kind::Result, &action, &result.encode_to_vec());
        let found = cache.action_result(&action, &nobody).await.unwrap();
        assert_eq!(found.as_deref(), Some(&result));
        assert!(is_touched(&path));
        for (bytes, part) in [(&b""[..], "empty"), (b"\xff\xff\xff", "cannot be decoded")] {
            put(dir.path(), Kind::Result, &action, bytes);
            let error = cache.action_result(&action, &nobody).await.unwrap_err();
            assert_eq!(error.kind, RemoteErrorKind::Protocol);
            assert!(error.to_string().contains(part), "{error}");
        }
        let large = File::options().write(true).open(&path).unwrap();
        large.set_len(MAX_MESSAGE as u64 + 1).unwrap();
        let error = cache.action_result(&action, &nobody).await.unwrap_err();
        assert!(error.to_string().contains("; at most "), "{error}");
    }
}

#[tokio::test]
async fn what_is_no_directory_is_an_error_or_has_nothing_where_nobody_asked_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (file, link) = (dir.path().join("file"), dir.path().join("link"));
    std::fs::write(&file, "").unwrap();
    symlink(&link, &link).unwrap();
    let (blob, nobody) = (sha256("x"), Attribution::default());
    for path in [file.clone(), file.join("below"), link] {
        let cache = DiskCache::new(&path, true);
        assert_eq!(cache.probe().await.unwrap_err().kind, RemoteErrorKind::Config);
        let cache = cache.optional();
        cache.probe().await.unwrap();
        let answers = cache
            .read_batch(std::slice::from_ref(&blob), &nobody, false)
            .await;
        assert!(answers[0].1.as_ref().unwrap_err().is_not_found());
        assert_eq!(cache.action_result(&blob, &nobody).await, Ok(None));
    }
}
