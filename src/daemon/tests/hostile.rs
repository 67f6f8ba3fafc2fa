//! Builds that no build tool reports, through all rooms: they settle, with a reason for each output that fails, and
//! nothing appears where it does not belong.

mod links;
mod nonsense;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use super::*;
use crate::{digest::DigestFunction, output::OutputContent};

/// Everything below a directory that is not in the exec root's `bazel-out`, our state or our temp directory.
fn elsewhere(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(path) = todo.pop() {
        for entry in fs::read_dir(&path).into_iter().flatten() {
            let path = entry.unwrap().path();
            let below = path.strip_prefix(dir).unwrap();
            let ours = [
                "state",
                ".outhaul-tmp",
                ".outhaul-newest._main",
                "execroot/_main/bazel-out",
            ];
            if ours.iter().any(|ours| below.starts_with(ours)) {
                continue;
            }
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                todo.push(path.clone());
            }
            found.insert(path);
        }
    }
    found
}

fn of(name: &str, content: Content) -> File {
    File {
        path: format!("bazel-out/k8/bin/{name}").into(),
        prefix_len: "bazel-out/k8/bin".len(),
        content,
        uri: None,
    }
}

/// An output by its exec path.
fn at(path: &str, content: Content) -> File {
    File {
        path: path.into(),
        prefix_len: "bazel-out".len(),
        content,
        uri: None,
    }
}

/// One build of files that are named in this order, to its end.
async fn build(f: &mut Fixture, invocation_id: &str, files: Vec<File>) -> crate::builds::Settlement {
    f.again(invocation_id).await;
    for (n, file) in files.into_iter().enumerate() {
        let id = n.to_string();
        f.set(&id, vec![file], &[]).await;
        f.complete(&format!("//x:{n}"), &[&id]).await;
    }
    settlement(f).await
}

async fn settlement(f: &Fixture) -> crate::builds::Settlement {
    f.finish().await;
    match timeout(PATIENCE * 3, f.services.engine.settled(&f.key)).await {
        Ok(settlement) => {
            // Its rows are written right after that.
            let written = f.services.engine.snapshot(&f.key.invocation_id);
            assert!(timeout(PATIENCE * 3, written).await.is_ok(), "it is not recorded");
            settlement
        }
        Err(_) => {
            let now = timeout(PATIENCE, f.services.engine.snapshot(&f.key.invocation_id)).await;
            let metrics = f.services.metrics.render();
            let metrics = metrics
                .lines()
                .filter(|line| !line.starts_with('#') && !line.ends_with(" 0"));
            let metrics: Vec<&str> = metrics.collect();
            panic!("it does not settle: {now:?}\n{}", metrics.join("\n"))
        }
    }
}

#[tokio::test]
async fn evil_outputs_cost_themselves_alone() {
    let mut f = Fixture::new(false).await;
    let before = elsewhere(f.dir.path());
    let good = f.cache.store().put("good");
    let outside = f.dir.path().join("outside").display().to_string();
    let huge = |size| Content::Blob(Digest::new(DigestFunction::Sha256, &[7; 32], size).unwrap());
    let evil = vec![
        of("../../../../../up", Content::Blob(good.clone())),
        of("nul\0", Content::Blob(good.clone())),
        of(&"n".repeat(300), Content::Blob(good.clone())),
        of(&"d/".repeat(2100), Content::Blob(good.clone())),
        of("size/a", huge(i64::MAX as u64)),
        of("size/b", huge(u64::MAX)),
        of("size/c", huge(1 << 50)),
        of(
            "functions/md5",
            Content::Blob(Digest::of(DigestFunction::Md5, b"x")),
        ),
        of(
            "functions/sha512",
            Content::Blob(Digest::of(DigestFunction::Sha512, b"x")),
        ),
        of(
            "functions/blake3",
            Content::Blob(Digest::of(DigestFunction::Blake3, b"x")),
        ),
    ];
    let links = vec![
        of("links/absolute", Content::Symlink(outside.clone())),
        of(
            "links/up",
            Content::Symlink("../../../../../../outside".to_owned()),
        ),
        of("links/loop", Content::Symlink("loop".to_owned())),
        // Files that lie behind them.
        of("links/absolute/file", Content::Blob(good.clone())),
        of("links/up/file", Content::Blob(good.clone())),
        of("links/loop/file", Content::Blob(good.clone())),
        of("links/nul", Content::Symlink("a\0b".to_owned())),
        of("links/empty", Content::Symlink(String::new())),
        of("links/long", Content::Symlink("x".repeat(5000))),
    ];
    let conflicts = vec![
        of("conflict", Content::Blob(good.clone())),
        of("conflict/below", Content::Blob(good.clone())),
        of("conflict/below/further", Content::Blob(good.clone())),
        of("Case", Content::Blob(good.clone())),
        of("case", Content::Inline("inline".into())),
    ];
    let fine = vec![
        of("line\nend", Content::Blob(good.clone())),
        of("\u{1b}[2Jescape", Content::Blob(good.clone())),
        of(".outhaul-tmp/1-2/3", Content::Blob(good.clone())),
        of(".outhaul-tmp-1-2-3", Content::Blob(good.clone())),
        of("fine", Content::Blob(good.clone())),
    ];
    for (n, files) in [evil, links, conflicts, fine.clone()].into_iter().enumerate() {
        f.set(&n.to_string(), files, &[]).await;
    }
    f.complete("//evil", &["0", "1", "2", "3"]).await;
    let settlement = settlement(&f).await;
    assert!(settlement.failed >= 10, "{settlement:?}");
    for message in &settlement.messages {
        assert!(!message.contains(char::is_control), "{message:?}");
    }
    let exec_root = f.dir.path().join("execroot/_main");
    for file in fine {
        let bytes = fs::read_to_string(exec_root.join(&*file.path));
        assert_eq!(bytes.ok().as_deref(), Some("good"), "{:?}", file.path);
    }
    assert_eq!(elsewhere(f.dir.path()), before);
}

#[tokio::test]
async fn names_with_control_characters_are_downloaded_to_like_any_other() {
    // "Straße" as Bazel may give it: each byte as a character.
    const STREET: &str = "Stra\u{c3}\u{9f}e";
    let exec_root = format!("{STREET}/execroot/_main");
    let mut f = Fixture::at(&exec_root, &format!("/home/x/{STREET}"), false).await;
    let good = f.cache.store().put("good");
    let names = [STREET, "a\nb", "\u{1b}[2J"];
    for name in names {
        let files = vec![of(name, Content::Blob(good.clone()))];
        f.set(name, files, &[]).await;
        f.complete(&format!("//{name}"), &[name]).await;
    }
    let settled = settlement(&f).await;
    assert_eq!(settled.failed, 0, "{settled:?}");
    for name in names {
        let path = f.dir.path().join(&exec_root).join("bazel-out/k8/bin").join(name);
        assert_eq!(fs::read_to_string(path).ok().as_deref(), Some("good"), "{name:?}");
    }
    let recorded = f.services.engine.snapshot(&f.key.invocation_id).await.unwrap();
    assert_eq!(recorded.0.workspace, format!("/home/x/{STREET}"));
}

/// As a client does that comes back only to say that it had sent everything.
#[tokio::test]
async fn a_settled_broken_stream_that_still_comes_to_its_end_settles_again() {
    let mut f = Fixture::new(false).await;
    let good = f.cache.store().put("good");
    // It waits for a set that never comes, to the very end.
    f.set("0", vec![of("late", Content::Blob(good))], &["nowhere"])
        .await;
    f.complete("//x", &["0"]).await;
    let mut reports = f.services.engine.reports();
    let broken = StreamEnd::Broken("the connection was lost".to_owned());
    for end in [broken.clone(), broken, StreamEnd::Finished] {
        let finished = end == StreamEnd::Finished;
        f.services.engine.ended(&f.key, end).await;
        let settled = timeout(PATIENCE, f.services.engine.settled(&f.key)).await;
        // Only then is it sure that the set does not come.
        assert_eq!(settled.expect("it settles").failed, u64::from(finished));
        let report = timeout(PATIENCE, reports.recv())
            .await
            .expect("a report")
            .unwrap();
        let (state, downloaded) = if finished {
            (InvocationState::Settled, 1)
        } else {
            (InvocationState::Interrupted, 0)
        };
        assert_eq!((report.state, report.tally.downloaded), (state, downloaded));
    }
    let late = f.dir.path().join("execroot/_main/bazel-out/k8/bin/late");
    assert_eq!(fs::read_to_string(late).unwrap(), "good");
    assert!(!f.services.engine.is_busy().await);
}

/// What this process has open below a directory.
fn open_below(dir: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir("/proc/self/fd").unwrap().flatten();
    let mut open: Vec<PathBuf> = all.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
    open.retain(|path| path.starts_with(dir));
    open
}

/// Waits until that is nothing.
async fn closed(dir: &Path) {
    let closed = async {
        loop {
            crate::open_files::spare();
            if open_below(dir).is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let closed = timeout(PATIENCE, closed).await;
    closed.unwrap_or_else(|_| panic!("open: {:?}", open_below(dir)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_whose_client_was_lost_keeps_nothing_open_and_is_looked_after_at_its_end() {
    let mut f = Fixture::new(false).await;
    let good = f.cache.store().put("good");
    f.set("0", vec![of("file", Content::Blob(good))], &[]).await;
    let completed = f.complete("//:file", &["0"]).await;
    reached(&mut f.progress().await, completed).await;
    f.services.engine.lost(&f.key).await;
    closed(&f.exec_root()).await;
    // As an old Bazel does at its end.
    let file = f.exec_root().join("bazel-out/k8/bin/file");
    fs::remove_file(&file).unwrap();
    let broken = StreamEnd::Broken("gone".to_owned());
    f.services.engine.ended(&f.key, broken).await;
    let settled = timeout(PATIENCE, f.services.engine.settled(&f.key)).await;
    assert_eq!(settled.unwrap().failed, 0);
    assert_eq!(fs::read_to_string(file).unwrap(), "good");
    closed(&f.exec_root()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn builds_whose_streams_broke_off_keep_nothing_open_and_go_on_where_they_were() {
    let mut f = Fixture::new(false).await;
    let [one, two] = ["one", "two"].map(|bytes| Content::Blob(f.cache.store().put(bytes)));
    let roots = f.dir.path().join("roots");
    let [goes_on, cleaned, replaced] = ["goes_on", "cleaned", "replaced"];
    let root = |id: &str| roots.join(id).join("execroot/_main");
    let bin = |id: &str| root(id).join("bazel-out/k8/bin");
    for id in [goes_on, cleaned, replaced] {
        fs::create_dir_all(bin(id)).unwrap();
        // The output leans on a link of the build tool's.
        std::os::unix::fs::symlink("real", bin(id).join("alias")).unwrap();
        fs::write(bin(id).join("real"), "one").unwrap();
        f.key.invocation_id = id.to_owned();
        f.begin(&root(id), "/w").await;
        f.set("0", vec![of("alias", one.clone())], &[]).await;
        f.complete("//:alias", &["0"]).await;
        let broken = StreamEnd::Broken("gone".to_owned());
        f.services.engine.ended(&f.key, broken).await;
        let settled = timeout(PATIENCE, f.services.engine.settled(&f.key)).await;
        assert_eq!(settled.expect("it settles").failed, 0);
    }
    closed(&roots).await;

    for again in [root(cleaned).join("bazel-out"), root(replaced)] {
        fs::remove_dir_all(&again).unwrap();
        fs::create_dir_all(again).unwrap();
    }
    for (id, failed) in [(goes_on, 0), (cleaned, 1), (replaced, 1)] {
        f.key.invocation_id = id.to_owned();
        f.set("1", vec![of("real", two.clone())], &[]).await;
        f.complete("//:real", &["1"]).await;
        let settled = settlement(&f).await;
        assert_eq!(settled.failed, failed, "{id}: {settled:?}");
    }
    let read = |name: &str| fs::read_to_string(bin(goes_on).join(name)).unwrap();
    assert_eq!((&*read("alias"), &*read("real")), ("one", "two"));
    assert!(!bin(cleaned).exists() && !bin(replaced).exists());
}

#[tokio::test]
async fn whatever_is_cleaned_moved_or_swapped_a_build_fills_the_bazel_out_that_is_there() {
    let mut f = Fixture::new(false).await;
    // Over, so that it can't pass for the newer one.
    settlement(&f).await;
    let good = f.cache.store().put("good");
    let root = f.exec_root();
    let (out, moved) = (root.join("bazel-out"), root.join("moved"));
    let remove = |path: &Path| fs::remove_dir_all(path).unwrap();
    let (away, back) = (
        || fs::rename(&out, &moved).unwrap(),
        || fs::rename(&moved, &out).unwrap(),
    );
    let swap = || {
        away();
        fs::create_dir(&out).unwrap();
        remove(&moved);
    };
    let nothing: &dyn Fn() = &|| {};
    // What happens before the build, between its beginning and its first output, and before its second.
    type Way<'a> = (&'a str, [&'a dyn Fn(); 3]);
    let ways: [Way<'_>; 8] = [
        ("nothing", [nothing; 3]),
        ("put back", [&away, &back, nothing]),
        ("moved away", [&away, &|| remove(&moved), nothing]),
        ("swapped at once", [nothing, &swap, nothing]),
        ("swapped time and again", [&swap; 3]),
        (
            "cleaned",
            [&|| remove(&root), &|| fs::create_dir(&root).unwrap(), nothing],
        ),
        (
            "expunged",
            [
                &|| remove(root.parent().unwrap()),
                &|| fs::create_dir_all(&root).unwrap(),
                &swap,
            ],
        ),
        (
            "cleaned, and made again",
            [
                &|| {
                    remove(&root);
                    fs::create_dir_all(&out).unwrap();
                },
                nothing,
                nothing,
            ],
        ),
    ];
    let mut key = f.key.clone();
    for (id, [before, begun, between]) in ways {
        key.invocation_id = id.to_owned();
        f.key.clone_from(&key);
        before();
        f.again(id).await;
        f.services.engine.snapshot(id).await.unwrap();
        for (name, happens) in [("one", begun), ("two", between)] {
            // For so long, directories that are open for checks stand for their paths.
            tokio::time::sleep(Duration::from_millis(60)).await;
            happens();
            f.set(name, vec![of(name, Content::Blob(good.clone()))], &[])
                .await;
            f.complete(&format!("//:{name}"), &[name]).await;
            let placed = out.join("k8/bin").join(name);
            let there = async {
                while !placed.exists() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            if timeout(PATIENCE, there).await.is_err() {
                panic!("{id}: {name}: {:?}", settlement(&f).await);
            }
        }
        let settled = settlement(&f).await;
        assert_eq!(settled.failed, 0, "{id}: {settled:?}");
    }
}

#[tokio::test]
async fn a_bazel_out_that_comes_after_a_builds_client_was_lost_gets_none_of_its_outputs() {
    for broken in [false, true] {
        let mut f = Fixture::new(false).await;
        f.stall();
        let good = f.cache.store().put("good");
        let out = f.exec_root().join("bazel-out");
        fs::create_dir(&out).unwrap();
        f.set("0", vec![of("late", Content::Blob(good))], &[]).await;
        f.complete("//:late", &["0"]).await;
        let end = StreamEnd::Broken("the client did not reconnect".to_owned());
        if broken {
            f.services.engine.ended(&f.key, end.clone()).await;
        } else {
            f.services.engine.lost(&f.key).await;
        }
        let (_, pending) = f.services.engine.snapshot(&f.key.invocation_id).await.unwrap();
        assert_eq!(pending, 1);
        fs::rename(&out, f.exec_root().join("cleaned")).unwrap();
        fs::create_dir(&out).unwrap();
        f.services.engine.ended(&f.key, end).await;
        f.cache.faults().clear();
        f.cache.faults().sever_connections();
        let settled = timeout(PATIENCE, f.services.engine.settled(&f.key))
            .await
            .unwrap();
        assert_eq!(settled.failed, 1, "{broken}: {settled:?}");
        assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn exec_roots_that_are_not_ours_get_nothing() {
    let home = std::env::var("HOME").unwrap_or_else(|_| "/root".to_owned());
    let roots = [
        "/",
        "",
        ".",
        "relative/execroot",
        "/proc/self",
        "/dev",
        "/etc",
        "/nowhere/at/all",
        "/\0",
        &home,
    ];
    for root in roots {
        let mut f = Fixture::new(false).await;
        f.key.invocation_id = "another".to_owned();
        let good = f.cache.store().put("good");
        for event in [
            Event::Started(Started {
                command: "build".to_owned(),
                ..Started::default()
            }),
            Event::ExecRoot(root.to_owned()),
        ] {
            f.send(event).await;
        }
        f.set("0", vec![of("outhaul-was-here", Content::Blob(good))], &[])
            .await;
        f.complete("//x", &["0"]).await;
        let settlement = settlement(&f).await;
        assert!(settlement.failed > 0, "{root:?}: {settlement:?}");
        let there = Path::new(root).join("bazel-out/k8/bin/outhaul-was-here");
        assert!(!there.exists(), "{}", there.display());
    }
}

#[tokio::test]
async fn an_exec_root_outside_of_what_is_allowed_is_refused_however_it_is_spelled() {
    let victim = tempfile::tempdir().unwrap();
    fs::create_dir_all(victim.path().join("execroot/_main/bazel-out")).unwrap();
    let name = victim.path().file_name().unwrap().to_str().unwrap().to_owned();
    for spelled in [
        "link/execroot/_main".to_owned(),
        format!("../{name}/execroot/_main"),
    ] {
        let mut f = Fixture::new(false).await;
        std::os::unix::fs::symlink(victim.path(), f.dir.path().join("link")).unwrap();
        f.key.invocation_id = "another".to_owned();
        let good = f.cache.store().put("good");
        let root = f.dir.path().join(spelled).display().to_string();
        f.send(Event::Started(Started::default())).await;
        f.send(Event::ExecRoot(root.clone())).await;
        f.set("0", vec![of("file", Content::Blob(good))], &[]).await;
        f.complete("//x", &["0"]).await;
        let settlement = settlement(&f).await;
        assert_eq!(settlement.failed, 1, "{root}: {settlement:?}");
    }
    let out = victim.path().join("execroot/_main/bazel-out");
    assert_eq!(fs::read_dir(out).unwrap().count(), 0, "nothing was written there");
}

#[tokio::test]
async fn of_outputs_that_contradict_each_other_the_first_is_there_and_the_others_fail() {
    let mut f = Fixture::new(false).await;
    settlement(&f).await;
    let one = Content::Blob(f.cache.store().put("one"));
    let link = Content::Symlink("elsewhere".to_owned());
    let top = f.dir.path().join("execroot/_main/bazel-out");
    for (n, (files, failed)) in [
        (
            vec![at("bazel-out/x", one.clone()), at("bazel-out/x/y", one.clone())],
            "x/y",
        ),
        (
            vec![at("bazel-out/x/y", one.clone()), at("bazel-out/x", one.clone())],
            "x:",
        ),
        (
            vec![
                at("bazel-out/x/y/z", one.clone()),
                at("bazel-out/x", link.clone()),
            ],
            "x:",
        ),
        (
            vec![at("bazel-out/x", link), at("bazel-out/x/y/z", one.clone())],
            "x/y/z",
        ),
        (
            vec![
                at("bazel-out/x", Content::Inline("one".into())),
                at("bazel-out/x/y", one),
            ],
            "x/y",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let (first, of) = (top.join(&files[0].path["bazel-out/".len()..]), files.len());
        let settled = build(&mut f, &format!("build {n}"), files).await;
        assert_eq!((settled.failed, of), (1, 2), "{n}: {settled:?}");
        assert!(
            settled.messages[0].contains(&format!("bazel-out/{failed}")),
            "{settled:?}"
        );
        assert!(settled.messages[0].contains("of this build"), "{settled:?}");
        assert!(fs::symlink_metadata(first).is_ok(), "{n}");
        let _ = fs::remove_file(top.join("x"));
        let _ = fs::remove_dir_all(top.join("x"));
    }
}

#[tokio::test]
async fn of_two_contents_for_one_path_in_one_event_the_first_is_there_and_the_other_fails() {
    let mut f = Fixture::new(false).await;
    let [one, two] = ["one", "two"].map(|bytes| Content::Blob(f.cache.store().put(bytes)));
    let inline = |bytes: &'static str| Content::Inline(bytes.into());
    let files = [one.clone(), two.clone(), inline("one"), inline("three")];
    f.set("0", files.map(|content| of("x", content)).into(), &[])
        .await;
    // What another event says is newer.
    f.set("1", vec![of("y", one)], &[]).await;
    f.set("2", vec![of("y", two)], &[]).await;
    f.complete("//:x", &["0"]).await;
    f.complete("//:y", &["1"]).await;
    f.complete("//:again", &["2"]).await;
    let settled = settlement(&f).await;
    assert_eq!(settled.failed, 2, "{settled:?}");
    for said in [
        "bin/x: the same event names it",
        "bin/y: the build names it again",
    ] {
        assert!(settled.messages.iter().any(|m| m.contains(said)), "{settled:?}");
    }
    let bin = f.exec_root().join("bazel-out/k8/bin");
    assert_eq!(fs::read_to_string(bin.join("x")).unwrap(), "one");
    assert_eq!(fs::read_to_string(bin.join("y")).unwrap(), "two");
    assert_eq!(wrong(&f).await, Vec::<String>::new());
    let rows = f.services.record.targets("invocation");
    let x = rows.iter().find(|row| row.label == "//:x").unwrap();
    assert_eq!(
        (x.state, x.failed, x.required),
        (TargetState::Failed, 2, 3),
        "{x:?}"
    );
}

/// Outputs that are said to be on disk and have other bytes there.
async fn wrong(f: &Fixture) -> Vec<String> {
    let Some((row, _)) = f.services.engine.snapshot(&f.key.invocation_id).await else {
        return Vec::new();
    };
    let Some(root) = row.root else { return Vec::new() };
    let exec_root = f.dir.path().join("execroot/_main");
    let outputs = f.services.record.scan_outputs(root, "");
    let there = outputs.filter(|(_, row)| row.state == crate::record::OutputState::Materialized);
    there
        .filter_map(|(path, row)| {
            let found = fs::read(exec_root.join(path.as_path()));
            let is_right = match &row.content {
                OutputContent::Blob(digest) => {
                    found.is_ok_and(|bytes| Digest::of(digest.function(), &bytes) == *digest)
                }
                OutputContent::Inline(bytes) => found.is_ok_and(|found| found == *bytes),
                OutputContent::Symlink(target) => fs::read_link(exec_root.join(path.as_path()))
                    .is_ok_and(|found| found == Path::new(target)),
                OutputContent::Directory => exec_root.join(path.as_path()).is_dir(),
            };
            (!is_right).then(|| format!("{path}: {row:?}"))
        })
        .collect()
}
