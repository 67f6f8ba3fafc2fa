//! `outhaul fetch`: from event files, actions, trees and blobs.

use std::{io::Write as _, process::Command, time::Duration};

use bazel_remote_apis::build::bazel::remote::execution::v2::{
    self as re, ActionResult, Directory, DirectoryNode, FileNode, OutputDirectory, OutputFile, Tree,
};
use outhaul::digest::Digest;
use outhaul_testkit::{
    Ran,
    cache::{BlobFault, EmbeddedCache, Times},
    clean, finish,
};
use prost::Message as _;

use crate::support::{World, delimited, outhaul, run};

async fn bep(file: &str, args: &[&str]) -> Ran {
    run(["fetch", "bep", file].into_iter().chain(args.iter().copied())).await
}

/// Names below a directory, sorted.
fn listed(dir: &std::path::Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir).map_or(Vec::new(), |entries| {
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    });
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_file_is_enough() {
    let world = World::new().await;
    let file = world.event_file();
    // The file says where its cache is.
    bep(&file, &[]).await.expect(0);
    world.assert_complete();
    let elsewhere = world.path("out");
    bep(&file, &["--output-dir", &elsewhere]).await.expect(0);
    assert_eq!(world.wrong_below(elsewhere.as_ref()), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_growing_file_is_followed_to_the_builds_end() {
    let world = World::new().await;
    let path = world.path("growing.bin");
    let bytes = world.event_bytes();
    let fetched = bep(&path, &["--follow"]);
    let written = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let mut file = std::fs::File::create(&path).unwrap();
        // In pieces that end within events.
        for piece in bytes.chunks(bytes.len() / 7) {
            file.write_all(piece).unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let (ran, ()) = tokio::join!(fetched, written);
    ran.expect(0);
    world.assert_complete();
}

/// As two commands leave them that write to one file or pipe.
#[tokio::test(flavor = "multi_thread")]
async fn all_builds_of_a_file_are_fetched_in_their_order() {
    use outhaul::proto::build_event_stream::{BuildEvent, build_event::Payload};
    let world = World::new().await;
    let of_none = world.build.events().filter_map(|event| {
        let mut event = BuildEvent::decode(&*event).unwrap();
        match &mut event.payload {
            Some(Payload::Started(started)) => "another".clone_into(&mut started.uuid),
            Some(Payload::WorkspaceInfo(_) | Payload::StructuredCommandLine(_) | Payload::Finished(_)) => {}
            _ => return None,
        }
        Some(event.encode_to_vec())
    });
    let path = world.path("both.bin");
    std::fs::write(&path, delimited(world.build.events().chain(of_none))).unwrap();
    let ran = bep(&path, &[]).await;
    assert_eq!(ran.err.matches("downloaded").count(), 2, "{}", ran.err);
    ran.expect(0);
    world.assert_complete();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncated_file_is_reported_with_its_offset_after_everything_before_it() {
    let world = World::new().await;
    let events: Vec<Vec<u8>> = world.build.events().collect();
    let kept = events.len() - 2;
    let mut bytes = delimited(events[..kept].iter().cloned());
    let offset = bytes.len();
    bytes.extend(&delimited(events[kept..].iter().cloned())[..5]);
    let path = world.path("truncated.bin");
    std::fs::write(&path, bytes).unwrap();
    let ran = bep(&path, &[]).await;
    ran.says(1, &[&path, &format!("byte {offset}")]);
    world.assert_complete();
}

#[tokio::test(flavor = "multi_thread")]
async fn flattened_outputs_lie_side_by_side_and_collisions_name_both() {
    let world = World::new().await;
    let file = world.event_file();
    let flat = world.path("flat");
    let args = ["--output-dir", &flat, "--flatten", "--target=//lib:lib"];
    bep(&file, &args).await.expect(0);
    let names = listed(flat.as_ref());
    for name in ["part0.h", "part3.h", "liblib.a", "lint.report"] {
        assert!(names.iter().any(|n| n == name), "{names:?}");
    }
    bep(&file, &["--flatten"]).await.says(2, &["--output-dir"]);

    // Two outputs of one name in different directories, with different bytes.
    let (first, _) = world.file("part0.h");
    let (_, digest) = world.file("part1.h");
    let second = first.path.replace("lib/include/", "app/");
    let events = world.build.events().map(|event| {
        let mut event = outhaul::proto::build_event_stream::BuildEvent::decode(&*event).unwrap();
        if let Some(outhaul::proto::build_event_stream::build_event::Payload::NamedSetOfFiles(set)) =
            &mut event.payload
            && set.files.iter().any(|f| f.name == "lib/liblib.a")
        {
            let mut copy = set.files[0].clone();
            copy.name = "app/part0.h".to_owned();
            (copy.digest, copy.file) = (digest.hash_hex(), None);
            copy.length = i64::try_from(digest.size()).unwrap();
            set.files.push(copy);
        }
        event.encode_to_vec()
    });
    let path = world.path("collision.bin");
    std::fs::write(&path, delimited(events)).unwrap();
    let flat = world.path("flat2");
    let args = ["--output-dir", &flat, "--flatten", "--target=//lib:lib"];
    bep(&path, &args).await.says(1, &[&first.path, &second]);
}

#[tokio::test(flavor = "multi_thread")]
async fn evicted_outputs_fail_by_name_and_leave_nothing_partial() {
    let world = World::new().await;
    let (gone, digest) = world.file("app/app");
    world.cache.store().remove(digest);
    let ran = bep(&world.event_file(), &[]).await;
    ran.says(1, &[&gone.path, "evicted"]);
    assert_eq!(
        world.wrong_below(&world.exec_root()),
        std::slice::from_ref(&gone.path)
    );
    let dir = world.exec_root().join(&gone.path);
    let names = listed(dir.parent().unwrap());
    assert!(names.iter().all(|n| !n.contains("outhaul")), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_go_to_files_and_to_standard_output() {
    let world = World::new().await;
    let bytes = world.cache.store().get(world.file("liblib.a").1).unwrap();
    let digest = world.file("liblib.a").1.to_string();
    let cache = world.cache_flag();
    let ran = run(["fetch", "blob", &digest, &cache, "-o", "-"]).await.expect(0);
    assert_eq!(ran.stdout, bytes);
    let path = world.path("blob");
    run(["fetch", "blob", &digest, &cache, "-o", &path])
        .await
        .expect(0);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    // Where something else is already.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "other").unwrap();
    run(["fetch", "blob", &digest, &cache, "-o", &path])
        .await
        .expect(0);
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    let empty = Digest::of(outhaul::digest::DigestFunction::Sha256, b"").to_string();
    let ran = run(["fetch", "blob", &empty, &cache, "-o", "-"]).await.expect(0);
    assert!(ran.stdout.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_that_are_gone_or_wrong_are_never_left_behind() {
    let world = World::new().await;
    let gone = world.file("app/app").1;
    world.cache.store().remove(gone);
    let bad = world.file("liblib.a").1;
    world.cache.faults().blob(bad, BlobFault::Corrupt, Times::Always);
    let cache = world.cache_flag();
    for (digest, code) in [(gone, 3), (bad, 1)] {
        let digest = digest.to_string();
        let ran = run(["fetch", "blob", &digest, &cache, "-o", "-"]).await;
        let ran = ran.says(code, &[&digest[..16]]);
        assert!(ran.stdout.is_empty(), "not a byte that was not verified");
        let out = world.path("gone/blob");
        let ran = run(["fetch", "blob", &digest, &cache, "-o", &out]).await;
        ran.says(code, &[]);
        let mut left = listed(world.path("gone").as_ref());
        // The process may end before its directory for temporary files is removed, which is empty then.
        let temporary = world.path("gone/.outhaul-tmp");
        left.retain(|name| name != ".outhaul-tmp" || !listed(temporary.as_ref()).is_empty());
        assert_eq!(left, Vec::<String>::new());
    }
}

fn wire(digest: &Digest) -> re::Digest {
    re::Digest {
        hash: digest.hash_hex(),
        size_bytes: i64::try_from(digest.size()).unwrap(),
    }
}

fn file(name: &str, digest: &Digest) -> FileNode {
    FileNode {
        name: name.to_owned(),
        digest: Some(wire(digest)),
        ..FileNode::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_and_trees_are_fetched_by_digest() {
    let world = World::new().await;
    let store = world.cache.store();
    let (a, b) = (store.put("a"), store.put("bb"));
    let inner = Directory {
        files: vec![file("b", &b)],
        ..Directory::default()
    };
    let inner_digest = store.put(inner.encode_to_vec());
    let root = Directory {
        files: vec![file("a", &a)],
        directories: vec![DirectoryNode {
            name: "inner".to_owned(),
            digest: Some(wire(&inner_digest)),
        }],
        ..Directory::default()
    };
    let root_digest = store.put(root.encode_to_vec());
    let tree = Tree {
        root: Some(root),
        children: vec![inner],
    };
    let tree_digest = store.put(tree.encode_to_vec());
    let result = ActionResult {
        output_files: vec![OutputFile {
            path: "out/top".to_owned(),
            digest: Some(wire(&a)),
            ..OutputFile::default()
        }],
        output_directories: vec![OutputDirectory {
            path: "out/tree".to_owned(),
            tree_digest: Some(wire(&tree_digest)),
            ..OutputDirectory::default()
        }],
        ..ActionResult::default()
    };
    let action = store.put("an action");
    store.put_action(action.clone(), result);

    let cache = world.cache_flag();
    for (n, digest) in [&tree_digest, &root_digest].into_iter().enumerate() {
        let out = world.path(&format!("tree{n}"));
        run(["fetch", "tree", &digest.to_string(), &cache, "--output-dir", &out])
            .await
            .expect(0);
        let out = std::path::Path::new(&out);
        assert_eq!(std::fs::read(out.join("a")).unwrap(), b"a");
        assert_eq!(std::fs::read(out.join("inner/b")).unwrap(), b"bb");
    }
    let out = world.path("action");
    let named = format!("sha256/{action}");
    run(["fetch", "action", &named, &cache, "--output-dir", &out])
        .await
        .expect(0);
    let out = std::path::Path::new(&out);
    assert_eq!(std::fs::read(out.join("out/top")).unwrap(), b"a");
    assert_eq!(std::fs::read(out.join("out/tree/inner/b")).unwrap(), b"bb");

    for kind in ["action", "tree"] {
        let none = Digest::of(outhaul::digest::DigestFunction::Sha256, b"none").to_string();
        let out = world.path("none");
        let ran = run(["fetch", kind, &none, &cache, "--output-dir", &out]).await;
        ran.says(3, &[&none[..16]]);
        assert_eq!(listed(out.as_ref()), Vec::<String>::new());
    }
    // Names that are ours, right in the directory.
    let ours = Directory {
        files: vec![file("a", &a), file(".outhaul-tmp", &a), file(".outhaul", &a)],
        ..Directory::default()
    };
    let ours = store.put(ours.encode_to_vec()).to_string();
    let out = world.path("ours");
    let ran = run(["fetch", "tree", &ours, &cache, "--output-dir", &out]).await;
    ran.says(1, &[".outhaul-tmp", "is reserved for outhaul"]);
    assert_eq!(listed(out.as_ref()), ["a"]);
    // A blob that is not a tree.
    let out = world.path("no");
    let ran = run(["fetch", "tree", &b.to_string(), &cache, "--output-dir", &out]).await;
    ran.says(1, &[&b.hash_hex()[..16]]);
}

#[tokio::test(flavor = "multi_thread")]
async fn invalid_digests_are_usage_errors() {
    let long = "a".repeat(64);
    for digest in [
        "",
        "x",
        &long,
        &format!("{long}/-1"),
        &format!("{long}/x"),
        &format!("{}/1", &long[1..]),
        &format!("{long}a/1"),
        &format!("md5/{long}/1"),
        &format!("nonsense/{long}/1"),
        &format!("{}/1", long.replace('a', "g")),
        &format!("{long}/99999999999999999999"),
    ] {
        let ran = run([
            "fetch",
            "blob",
            digest,
            "--remote-cache=grpc://127.0.0.1:1",
            "-o",
            "/dev/null",
        ])
        .await;
        ran.says(2, &[digest]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_of_many_instances_is_asked_for_the_builds_own() {
    let builder = EmbeddedCache::builder().instance_name(Some("main/x".to_owned()));
    let world = World::with(builder, "main/x").await;
    bep(&world.event_file(), &[]).await.expect(0);
    world.assert_complete();
}

#[tokio::test(flavor = "multi_thread")]
async fn output_to_a_closed_pipe_ends_quietly() {
    let world = World::new().await;
    let digest = world.file("app/app").1.to_string();
    let mut command = clean(Command::new("sh"));
    let script = "{ \"$0\" fetch blob \"$1\" \"$2\" -o -; echo \"code $?\" >&2; } | head -c 10 >/dev/null";
    command.args([
        "-c",
        script,
        env!("CARGO_BIN_EXE_outhaul"),
        &digest,
        &world.cache_flag(),
    ]);
    let ran = finish(command).await.expect(0);
    assert_eq!(ran.err.trim(), "code 0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_directory_that_cannot_be_is_named() {
    let world = World::new().await;
    let file = world.path("file");
    std::fs::write(&file, "").unwrap();
    let events = world.event_file();
    let ran = bep(&events, &["--output-dir", &file]).await;
    assert_ne!(ran.code, Some(0));
    assert!(ran.err.contains(&file), "{}", ran.err);
    let digest = world.file("part0.h").1.to_string();
    let mut command = outhaul();
    command.args([
        "fetch",
        "blob",
        &digest,
        &world.cache_flag(),
        "-o",
        &format!("{file}/x"),
    ]);
    finish(command).await.says(2, &[&file]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_json_event_file_is_as_good() {
    let world = World::new().await;
    let (output, digest) = world.file("part0.h");
    let name = output.path.strip_prefix("bazel-out/k8-fastbuild/bin/").unwrap();
    let file = serde_json::json!({
        "name": name,
        "pathPrefix": ["bazel-out", "k8-fastbuild", "bin"],
        "digest": digest.hash_hex(),
        "length": digest.size().to_string(),
        "uri": format!("bytestream://h/blobs/{digest}"),
    });
    let label = "//lib:lib";
    let lines = [
        serde_json::json!({"id": {"started": {}}, "started": {
            "uuid": world.build.invocation_id(), "command": "build", "workspaceDirectory": "/w"}}),
        serde_json::json!({"id": {"workspace": {}}, "workspaceInfo": {"localExecRoot": world.exec_root()}}),
        serde_json::json!({"id": {"namedSet": {"id": "0"}}, "namedSetOfFiles": {"files": [file]}}),
        serde_json::json!({"id": {"targetCompleted": {"label": label, "configuration": {"id": "c"}}}, "completed": {
            "success": true, "outputGroup": [{"name": "default", "fileSets": [{"id": "0"}]}]}}),
        serde_json::json!({"id": {"buildFinished": {}}, "finished": {"exitCode": {"name": "SUCCESS"}}, "lastMessage": true}),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let path = world.path("events.json");
    std::fs::write(&path, &text).unwrap();
    bep(&path, &[&world.cache_flag()]).await.expect(0);
    let placed = world.exec_root().join(&output.path);
    assert_eq!(
        std::fs::read(&placed).unwrap(),
        world.cache.store().get(digest).unwrap()
    );
    // Cut off within its last line.
    std::fs::remove_file(&placed).unwrap();
    std::fs::write(&path, &text[..text.len() - 20]).unwrap();
    let offset = text.trim_end().rfind('\n').unwrap() + 1;
    let ran = bep(&path, &[&world.cache_flag()]).await;
    ran.says(1, &[&path, &format!("byte {offset}")]);
    assert!(placed.exists(), "what came before is brought");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_name_twice_with_the_same_bytes_is_flattened_once() {
    let world = World::new().await;
    let (_, digest) = world.file("part0.h");
    let (_, other) = world.file("part1.h");
    for (second, code) in [(digest, 0), (other, 1)] {
        let file = |name: &str, digest: &outhaul::digest::Digest| {
            serde_json::json!({
                "name": name,
                "pathPrefix": ["bazel-out", "k8-fastbuild", "bin"],
                "digest": digest.hash_hex(),
                "length": digest.size().to_string(),
                "uri": format!("bytestream://h/blobs/{digest}"),
            })
        };
        let files = [file("p/LICENSE", digest), file("q/LICENSE", second)];
        let lines = [
            serde_json::json!({"id": {"started": {}}, "started": {
                "uuid": world.build.invocation_id(), "command": "build", "workspaceDirectory": "/w"}}),
            serde_json::json!({"id": {"workspace": {}}, "workspaceInfo": {"localExecRoot": world.exec_root()}}),
            serde_json::json!({"id": {"namedSet": {"id": "0"}}, "namedSetOfFiles": {"files": files}}),
            serde_json::json!({"id": {"targetCompleted": {"label": "//:a", "configuration": {"id": "c"}}}, "completed": {
                "success": true, "outputGroup": [{"name": "default", "fileSets": [{"id": "0"}]}]}}),
            serde_json::json!({"id": {"buildFinished": {}}, "finished": {"exitCode": {"name": "SUCCESS"}}, "lastMessage": true}),
        ];
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let path = world.path("events.json");
        std::fs::write(&path, &text).unwrap();
        let to = world.path(&format!("out{code}"));
        let ran = bep(&path, &[&world.cache_flag(), "--output-dir", &to, "--flatten"]).await;
        if code == 0 {
            ran.expect(0);
            assert_eq!(
                std::fs::read(format!("{to}/LICENSE")).unwrap(),
                world.cache.store().get(digest).unwrap()
            );
        } else {
            ran.says(1, &["p/LICENSE", "q/LICENSE", "the same name"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_containers_absolute_links_are_translated_and_stay_as_they_are() {
    let world = World::new().await;
    let (_, digest) = world.file("part0.h");
    let file = |name: &str| {
        serde_json::json!({
            "name": name,
            "pathPrefix": ["bazel-out", "k8-fastbuild", "bin"],
            "digest": digest.hash_hex(),
            "length": digest.size().to_string(),
            "uri": format!("bytestream://h/blobs/{digest}"),
        })
    };
    let there = "/from/execroot/_main";
    let lines = [
        serde_json::json!({"id": {"started": {}}, "started": {
            "uuid": world.build.invocation_id(), "command": "build", "workspaceDirectory": "/w"}}),
        serde_json::json!({"id": {"workspace": {}}, "workspaceInfo": {"localExecRoot": there}}),
        serde_json::json!({"id": {"namedSet": {"id": "0"}}, "namedSetOfFiles": {"files": [file("link.d/x"), file("alias")]}}),
        serde_json::json!({"id": {"targetCompleted": {"label": "//:a", "configuration": {"id": "c"}}}, "completed": {
            "success": true, "outputGroup": [{"name": "default", "fileSets": [{"id": "0"}]}],
            "directoryOutput": [{"pathPrefix": ["bazel-out", "k8-fastbuild", "bin"], "name": "link.d"}]}}),
        serde_json::json!({"id": {"buildFinished": {}}, "finished": {"exitCode": {"name": "SUCCESS"}}, "lastMessage": true}),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let path = world.path("events.json");
    std::fs::write(&path, &text).unwrap();
    let bin = world.exec_root().join("bazel-out/k8-fastbuild/bin");
    std::fs::create_dir_all(bin.join("real.d")).unwrap();
    let links = [("link.d", "real.d"), ("alias", "real")];
    let target = |to: &str| format!("{there}/bazel-out/k8-fastbuild/bin/{to}");
    for (link, to) in links {
        std::os::unix::fs::symlink(target(to), bin.join(link)).unwrap();
    }
    let map = format!("--path-map=/from={}", world.dir.path().display());
    let bytes = world.cache.store().get(digest).unwrap();
    std::fs::write(bin.join("real"), &bytes).unwrap();
    for _ in 0..2 {
        bep(&path, &[&world.cache_flag(), &map]).await.expect(0);
    }
    for (link, to) in links {
        assert_eq!(
            std::fs::read_link(bin.join(link)).unwrap(),
            std::path::Path::new(&target(to))
        );
    }
    for place in ["real.d/x", "real"] {
        assert_eq!(std::fs::read(bin.join(place)).unwrap(), bytes, "{place}");
    }
}
