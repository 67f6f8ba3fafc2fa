//! Outputs from buckets of object stores, by the real binary.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use bazel_remote_apis::build::bazel::remote::execution::v2::ActionResult;
use outhaul::digest::{Digest, DigestFunction};
use outhaul_testkit::{
    Ran, Running, clean, peers,
    stores::{Store, StoreKind},
};
use prost::Message as _;

use crate::harness::{Bazel, Cache, CacheKind, Scratch, Version};

/// What a bucket is filled with: the files of a disk cache, by `cas` or `ac` and hash.
type Blobs = BTreeMap<(String, String), Vec<u8>>;

fn blobs_of(disk_cache: &Path) -> Blobs {
    let mut blobs = Blobs::new();
    for kind in ["ac", "cas"] {
        for below in fs::read_dir(disk_cache.join(kind)).unwrap() {
            for file in fs::read_dir(below.unwrap().path()).unwrap() {
                let path = file.unwrap().path();
                let hash = path.file_name().unwrap().to_str().unwrap().to_owned();
                blobs.insert((kind.to_owned(), hash), fs::read(path).unwrap());
            }
        }
    }
    blobs
}

/// A blob as bazel-remote keeps it: the header of its file format, and chunks of a mebibyte.
fn casblob(plain: &[u8]) -> Vec<u8> {
    let chunks: Vec<Vec<u8>> = plain
        .chunks(1 << 20)
        .map(|chunk| zstd::encode_all(chunk, 1).unwrap())
        .collect();
    let count = chunks.len() as u64 + 1;
    let mut object = 0x184D_2A50_u32.to_le_bytes().to_vec();
    object.extend(u32::try_from(21 + 8 * count).unwrap().to_le_bytes());
    object.extend((plain.len() as u64).to_le_bytes());
    object.push(1);
    object.extend((1_u32 << 20).to_le_bytes());
    object.extend(count.to_le_bytes());
    let mut at = 29 + 8 * count;
    object.extend(at.to_le_bytes());
    for chunk in &chunks {
        at += chunk.len() as u64;
        object.extend(at.to_le_bytes());
    }
    object.extend(chunks.concat());
    object
}

/// Fills a bucket as Bazel behind an HTTP front does, and as bazel-remote does.
fn fill(store: &Store, blobs: &Blobs) {
    for ((kind, hash), bytes) in blobs {
        store.put(&format!("plain/{kind}/{hash}"), bytes);
        let two = &hash[..2];
        if kind == "ac" {
            store.put(&format!("packed/ac/{two}/{hash}"), bytes);
        } else if !bytes.is_empty() {
            store.put(&format!("packed/cas.v2/{two}/{hash}"), &casblob(bytes));
        }
    }
}

/// The two, as `--remote-cache` takes them.
fn urls(store: &Store) -> [String; 2] {
    [store.url("plain", ""), store.url("packed", "layout=bazel-remote")]
}

/// `outhaul fetch`, logging everything, from a store.
fn fetch(store: &Store, url: &str, args: &[&str]) -> Ran {
    let mut command = clean(Command::new(env!("CARGO_BIN_EXE_outhaul")));
    command
        .arg("fetch")
        .args(args)
        .arg(format!("--remote-cache={url}"))
        .env("OUTHAUL_LOG", "trace,outhaul=trace")
        .envs(store.variables());
    let ran = Running::start(command).wait();
    for (name, value) in store
        .variables()
        .iter()
        .filter(|(name, _)| *name != "AWS_ACCESS_KEY_ID")
    {
        assert!(
            !ran.out().contains(value) && !ran.err.contains(value),
            "{name} is shown"
        );
    }
    ran
}

/// A build of everything, with its event file and the files of its disk cache.
fn built(dir: &Scratch) -> (Bazel, Cache, PathBuf, Blobs) {
    let cache = Cache::start(CacheKind::Embedded);
    let bazel = Bazel::new(Version::Seven, cache.url());
    let (disk_cache, events) = (dir.join("disk"), dir.join("events"));
    let flags = [
        format!("--disk_cache={}", disk_cache.display()),
        format!("--build_event_binary_file={}", events.display()),
        "//...".to_owned(),
    ];
    bazel.build(&flags.each_ref().map(String::as_str)).ok();
    let mut blobs = blobs_of(&disk_cache);
    // What Bazel writes itself, without an action that is cached, it uploads with its events.
    for bytes in files_below(&bazel.exec_root().join("bazel-out")).into_values() {
        let digest = Digest::of(DigestFunction::Sha256, &bytes);
        blobs.insert(("cas".to_owned(), digest.hash_hex()), bytes);
    }
    assert!(blobs.len() > 20, "{}", blobs.len());
    (bazel, cache, events, blobs)
}

/// The files below a directory, by their paths.
fn files_below(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut directories = vec![dir.to_owned()];
    while let Some(next) = directories.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.is_symlink() {
                directories.push(path);
            } else if path.is_file() {
                let bytes = fs::read(&path).unwrap();
                files.insert(path.strip_prefix(dir).unwrap().to_owned(), bytes);
            }
        }
    }
    files
}

#[test]
fn a_builds_outputs_come_from_a_bucket_in_two_layouts() {
    if !peers::are_there(
        "a_builds_outputs_come_from_a_bucket_in_two_layouts",
        &["bazel7", "versitygw"],
    ) {
        return;
    }
    let dir = Scratch::new("stores");
    let (bazel, cache, events, blobs) = built(&dir);
    // Nothing can come from there any more.
    cache.kill();
    let store = Store::start(StoreKind::S3);
    fill(&store, &blobs);
    // By the build's own account: what it made, and where.
    let made = files_below(&bazel.exec_root().join("bazel-out"));
    let mut fetched = Vec::new();
    for (number, url) in urls(&store).iter().enumerate() {
        let out = dir.join(format!("out{number}"));
        let args = [
            "bep",
            events.to_str().unwrap(),
            "--output-dir",
            out.to_str().unwrap(),
        ];
        let ran = fetch(&store, url, &args).ok();
        assert!(ran.err.contains(" 0 failed"), "{ran}");
        let files = files_below(&out);
        assert!(files.len() > 10, "{files:?}");
        for (path, bytes) in &files {
            let below = path.strip_prefix("bazel-out").unwrap_or(path);
            assert!(made.get(below) == Some(bytes), "{}", path.display());
        }
        assert!(
            files.keys().any(|path| path.ends_with("gen/top.txt")),
            "{:?}",
            files.keys()
        );
        fetched.push(files);
    }
    assert!(fetched[0] == fetched[1]);
}

#[test]
fn blobs_trees_and_actions_come_from_every_store() {
    let test = "blobs_trees_and_actions_come_from_every_store";
    if !peers::are_there(test, &["bazel7"]) {
        return;
    }
    let dir = Scratch::new("stores");
    let (_bazel, _cache, _, blobs) = built(&dir);
    let size = |hash: &str| blobs[&("cas".to_owned(), hash.to_owned())].len();
    // An action that made a tree.
    let with_tree = blobs.iter().find_map(|((kind, hash), bytes)| {
        let result = (kind == "ac").then(|| ActionResult::decode(&**bytes).unwrap())?;
        let tree = result.output_directories.first()?.tree_digest.clone()?;
        // One with something in it.
        (tree.size_bytes > 10).then(|| (hash.clone(), tree.hash))
    });
    let (action, tree) = with_tree.expect("rules/nested.d is a tree");
    for kind in StoreKind::ALL {
        if !kind.is_there(test) {
            continue;
        }
        let store = Store::start(kind);
        fill(&store, &blobs);
        for (number, url) in urls(&store).iter().enumerate() {
            let out = dir.join(format!("{kind:?}{number}"));
            let digest = format!("{tree}/{}", size(&tree));
            let blob = out.join("blob");
            fs::create_dir(&out).unwrap();
            fetch(
                &store,
                url,
                &["blob", &digest, "--output", blob.to_str().unwrap()],
            )
            .ok();
            assert!(fs::read(&blob).unwrap() == blobs[&("cas".to_owned(), tree.clone())]);
            for (what, digest) in [
                ("tree", digest.clone()),
                ("action", format!("{action}/{}", size(&action))),
            ] {
                let to = out.join(what);
                fetch(
                    &store,
                    url,
                    &[what, &digest, "--output-dir", to.to_str().unwrap()],
                )
                .ok();
                assert!(!files_below(&to).is_empty(), "{what} {url}");
            }
            let absent = format!("{}/5", "0".repeat(64));
            let ran = fetch(&store, url, &["blob", &absent, "--output", "-"]);
            assert_eq!(ran.code, Some(3), "{ran}");
            if kind != StoreKind::Gcs {
                let nowhere = url.replace("://bkt", "://nowhere");
                let ran = fetch(&store, &nowhere, &["blob", &digest, "--output", "-"]);
                assert!(
                    ran.code == Some(1) && ran.err.contains("there is no such bucket"),
                    "{ran}"
                );
            }
        }
    }
}

#[test]
fn a_wrong_address_is_reported_at_once() {
    let dir = Scratch::new("stores");
    let digest = format!("{}/5", "0".repeat(64));
    for (url, variables, part) in [
        ("s3://b?layout=bazle", vec![], "layout=bazle is not known"),
        ("s3://b?sig=s3cretSignature", vec![], "unknown setting sig="),
        ("s3://b?template=%7Bkind%7D", vec![], "does not contain {hash}"),
        ("az://c", vec![], "account="),
        (
            "s3://b",
            vec![("AWS_SECRET_ACCESS_KEY", "s3cretSignature")],
            "must both be set",
        ),
    ] {
        let mut command = clean(Command::new(env!("CARGO_BIN_EXE_outhaul")));
        command
            .args(["fetch", "blob", &digest, "--output", "-"])
            .arg(format!("--remote-cache={url}"))
            .current_dir(dir.path())
            .env("OUTHAUL_LOG", "trace,outhaul=trace")
            .envs(variables);
        for name in ["AWS_ACCESS_KEY_ID", "AZURE_STORAGE_ACCOUNT"] {
            command.env_remove(name);
        }
        let ran = Running::start(command).wait();
        assert!(ran.code != Some(0) && ran.err.contains(part), "{ran}");
        assert!(!ran.err.contains("s3cretSignature"), "{ran}");
    }
}
