//! Invalid event files, and events that name what must not be written.

use std::{collections::BTreeMap, path::Path};

use outhaul::proto::build_event_stream::{BuildEvent, File, build_event::Payload, file};
use outhaul_testkit::Ran;
use prost::Message as _;

use crate::support::{World, delimited, run};

async fn bep(path: &str) -> Ran {
    run(["fetch", "bep", path, "--remote-retries=0"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_no_event_files_are_named() {
    let world = World::new().await;
    let good = world.event_bytes();
    let cases: BTreeMap<&str, Vec<u8>> = [
        ("empty", Vec::new()),
        (
            "garbage",
            (0..5000_u32)
                .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
                .collect(),
        ),
        ("text", b"not an event\n".repeat(20)),
        ("json", b"{\"a\": [1, 2}\n{\"b\"\n".to_vec()),
        ("other-json", b"{\"a\": 1}\n".to_vec()),
        ("varint", vec![0xff; 20]),
        ("half-varint", vec![0x80]),
        (
            "huge",
            [vec![0xff, 0xff, 0xff, 0xff, 0x7f], good[..100].to_vec()].concat(),
        ),
        ("zeros", vec![0; 4096]),
        ("utf8", delimited([vec![0x0a, 0x02, 0xff, 0xfe]].into_iter())),
        ("headless", delimited(world.build.events().skip(1))),
    ]
    .into();
    for (name, bytes) in cases {
        let path = world.path(&format!("{name}.bep"));
        std::fs::write(&path, bytes).unwrap();
        let ran = bep(&path).await.says(1, &[&path]);
        assert!(ran.err.len() < 4000, "{name}: {}", ran.err);
    }
    let directory = world.path("");
    bep(&directory).await.says(1, &[directory.trim_end_matches('/')]);
    bep("/nowhere/at.all").await.says(2, &["/nowhere/at.all"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_in_the_middle_costs_no_more_than_it_must() {
    let world = World::new().await;
    let mut events: Vec<Vec<u8>> = world.build.events().collect();
    // An event that does not decode, whole in its frame: the ones after it are read.
    events.insert(5, vec![0x0a, 0x05, 0xff]);
    let path = world.path("damaged.bin");
    std::fs::write(&path, delimited(events.into_iter())).unwrap();
    bep(&path).await.says(1, &[&path, "byte"]);
    world.assert_complete();
}

/// The build with these files added to the first target's.
fn with_files(world: &World, files: &[File]) -> impl Iterator<Item = Vec<u8>> + Send + use<> {
    let files = files.to_vec();
    world.build.events().map(move |bytes| {
        let mut event = BuildEvent::decode(&*bytes).unwrap();
        if let Some(Payload::NamedSetOfFiles(set)) = &mut event.payload
            && set.files.iter().any(|f| f.name == "lib/liblib.a")
        {
            set.files.extend(files.iter().cloned());
        }
        event.encode_to_vec()
    })
}

fn file_named(world: &World, prefix: &[&str], name: &str) -> File {
    let digest = world.file("part0.h").1;
    let authority = world.cache.endpoint().replace("grpc://", "");
    File {
        path_prefix: prefix.iter().map(|&s| s.to_owned()).collect(),
        name: name.to_owned(),
        digest: digest.hash_hex(),
        length: i64::try_from(digest.size()).unwrap(),
        file: Some(file::File::Uri(format!(
            "bytestream://{authority}/blobs/{digest}"
        ))),
    }
}

/// Every entry below a directory.
fn everything_below(dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        found.push(path.display().to_string());
        if path.is_dir() && !path.is_symlink() {
            everything_below(&path, found);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_lead_elsewhere_are_refused_and_the_rest_is_brought() {
    let world = World::new().await;
    let bin = ["bazel-out", "k8-fastbuild", "bin"];
    let files = [
        file_named(&world, &bin, "../../../../escaped"),
        file_named(&world, &["..", "bazel-out"], "escaped"),
        file_named(&world, &["bazel-out", "..", ".."], "escaped"),
        file_named(&world, &["bazel-out"], "../../escaped"),
        file_named(&world, &["/"], "tmp/outhaul-escaped"),
        file_named(&world, &[], "/tmp/outhaul-escaped"),
        file_named(&world, &bin, "/tmp/outhaul-escaped"),
        file_named(&world, &bin, "nul\0escaped"),
        file_named(&world, &bin, ""),
        file_named(&world, &bin, "."),
        file_named(&world, &["external"], "escaped"),
    ];
    let events: Vec<Vec<u8>> = with_files(&world, &files).collect();
    let path = world.path("escaping.bin");
    std::fs::write(&path, delimited(events.iter().cloned())).unwrap();
    let ran = bep(&path).await;
    let ran = ran.says(1, &["escaped"]);
    world.assert_complete();
    // The same from a stream, to a daemon.
    std::fs::remove_dir_all(world.exec_root().join("bazel-out")).unwrap();
    let server = world.serve(&[]).await;
    let (invocation, build) = (world.build.invocation_id(), world.build.build_id());
    outhaul::demo::play(server.address(), &invocation, &build, events.into_iter())
        .await
        .unwrap();
    world.assert_complete();
    let mut found = Vec::new();
    everything_below(world.dir.path(), &mut found);
    found.retain(|path| path.contains("escaped"));
    assert_eq!(found, Vec::<String>::new(), "{}", ran.err);
    assert!(!Path::new("/tmp/outhaul-escaped").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_digests_fail_their_output_by_name() {
    let world = World::new().await;
    let bin = ["bazel-out", "k8-fastbuild", "bin"];
    let authority = world.cache.endpoint().replace("grpc://", "");
    let digest = world.file("part0.h").1;
    let uri = |rest: &str| Some(file::File::Uri(format!("bytestream://{authority}/{rest}")));
    let mut files = Vec::new();
    for (name, hash, length, uri) in [
        ("short", "abcd".to_owned(), 4, uri("blobs/abcd/4")),
        (
            "letters",
            "z".repeat(64),
            4,
            uri(&format!("blobs/{}/4", "z".repeat(64))),
        ),
        (
            "negative",
            digest.hash_hex(),
            -4,
            uri(&format!("blobs/{}/-4", digest.hash_hex())),
        ),
        (
            "no-size",
            String::new(),
            0,
            uri(&format!("blobs/{}", digest.hash_hex())),
        ),
        ("no-blobs", String::new(), 0, uri("nonsense")),
        (
            "scheme",
            String::new(),
            0,
            Some(file::File::Uri("ftp://h/x".to_owned())),
        ),
    ] {
        let mut file = file_named(&world, &bin, &format!("bad/{name}"));
        (file.digest, file.length, file.file) = (hash, length, uri);
        files.push(file);
    }
    let path = world.path("digests.bin");
    std::fs::write(&path, delimited(with_files(&world, &files))).unwrap();
    let ran = bep(&path).await;
    let ran = ran.says(1, &["bad/short"]);
    world.assert_complete();
    for name in ["letters", "no-size", "no-blobs"] {
        assert!(ran.err.contains(&format!("bad/{name}")), "{name}: {}", ran.err);
    }
    assert!(
        !world
            .exec_root()
            .join("bazel-out/k8-fastbuild/bin/bad/short")
            .exists()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_root_that_must_not_be_written_is_refused_by_name() {
    let world = World::new().await;
    for exec_root in ["/", "relative/root", "/nowhere/at/all", "/proc"] {
        let setting = outhaul::demo::Setting {
            workspace: world.path("workspace"),
            exec_root: exec_root.to_owned(),
            remote_cache: world.cache.endpoint(),
            instance_name: String::new(),
        };
        let build = outhaul::demo::GeneratedBuild::new(|bytes| world.cache.store().put(bytes), setting, 1);
        let path = world.path("root.bin");
        std::fs::write(&path, delimited(build.events())).unwrap();
        bep(&path).await.says(1, &[exec_root]);
        let server = world.serve(&[]).await;
        world.play(&build, server.address()).await;
        drop(server);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_root_that_the_build_makes_only_later_is_found() {
    // As Bazel after `clean`: it is there when the outputs are named.
    let world = World::new().await;
    std::fs::remove_dir(world.exec_root()).unwrap();
    let events: Vec<Vec<u8>> = world.build.events().collect();
    let path = world.path("growing.bin");
    std::fs::write(&path, delimited(events[..5].iter().cloned())).unwrap();
    let server = async {
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        std::fs::create_dir(world.exec_root()).unwrap();
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        std::io::Write::write_all(&mut file, &delimited(events[5..].iter().cloned())).unwrap();
    };
    let (ran, ()) = tokio::join!(run(["fetch", "bep", &path, "--follow"]), server);
    ran.expect(0);
    world.assert_complete();
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_ours_are_never_flattened_to() {
    let world = World::new().await;
    let bin = ["bazel-out", "k8-fastbuild", "bin"];
    let names = [
        ".outhaul-tmp",
        "a/.outhaul-tmp",
        ".outhaul",
        "b/.outhaul-newest.ws",
        "c/.OutHaul-Tmp",
    ];
    let files: Vec<File> = names.iter().map(|name| file_named(&world, &bin, name)).collect();
    let path = world.path("ours.bin");
    std::fs::write(&path, delimited(with_files(&world, &files))).unwrap();
    let flat = world.path("flat");
    let args = [
        "fetch",
        "bep",
        &path,
        "--output-dir",
        &flat,
        "--flatten",
        "--target=//lib:lib",
    ];
    let ran = run(args).await;
    let ran = ran.says(1, &["is reserved for outhaul", "5 failed"]);
    assert!(ran.err.contains("c/.OutHaul-Tmp"), "{}", ran.err);
    let mut found = Vec::new();
    everything_below(Path::new(&flat), &mut found);
    assert!(found.iter().any(|path| path.ends_with("/part0.h")), "{found:?}");
    assert!(
        !found.iter().any(|path| path.to_lowercase().contains("outhaul")),
        "{found:?}"
    );
}
