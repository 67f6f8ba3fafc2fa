//! Builds that no build tool reports, through all rooms: they settle, with a reason for whatever can't be had, and
//! nothing appears where it does not belong.
//!
//! `OUTHAUL_HOSTILE_CASES` is how many random builds there are, `OUTHAUL_HOSTILE_SEED` repeats one.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{digest::DigestFunction, output::OutputContent};

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number")),
    )
}

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

async fn settlement(f: &Fixture) -> crate::builds::Settlement {
    f.finish().await;
    match timeout(PATIENCE * 3, f.rooms.engine.settled(&f.key)).await {
        Ok(settlement) => {
            // Its rows are written right after that.
            let written = f.rooms.engine.snapshot(&f.key.invocation_id);
            assert!(timeout(PATIENCE * 3, written).await.is_ok(), "it is not recorded");
            settlement
        }
        Err(_) => {
            let now = timeout(PATIENCE, f.rooms.engine.snapshot(&f.key.invocation_id)).await;
            let metrics = f.rooms.metrics.render();
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
    let recorded = f.rooms.engine.snapshot(&f.key.invocation_id).await.unwrap();
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
    let mut reports = f.rooms.engine.reports();
    let broken = StreamEnd::Broken("the connection was lost".to_owned());
    for end in [broken.clone(), broken, StreamEnd::Finished] {
        let finished = end == StreamEnd::Finished;
        f.rooms.engine.ended(&f.key, end).await;
        let settled = timeout(PATIENCE, f.rooms.engine.settled(&f.key)).await;
        assert_eq!(settled.expect("it settles").failed, 0);
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
    assert!(!f.rooms.engine.is_busy().await);
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
    f.rooms.engine.lost(&f.key).await;
    closed(&f.exec_root()).await;
    // As an old Bazel does at its end.
    let file = f.exec_root().join("bazel-out/k8/bin/file");
    fs::remove_file(&file).unwrap();
    let broken = StreamEnd::Broken("gone".to_owned());
    f.rooms.engine.ended(&f.key, broken).await;
    let settled = timeout(PATIENCE, f.rooms.engine.settled(&f.key)).await;
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
        f.rooms.engine.ended(&f.key, broken).await;
        let settled = timeout(PATIENCE, f.rooms.engine.settled(&f.key)).await;
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
        f.rooms.engine.snapshot(id).await.unwrap();
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
            f.rooms.engine.ended(&f.key, end.clone()).await;
        } else {
            f.rooms.engine.lost(&f.key).await;
        }
        let (_, pending) = f.rooms.engine.snapshot(&f.key.invocation_id).await.unwrap();
        assert_eq!(pending, 1);
        fs::rename(&out, f.exec_root().join("cleaned")).unwrap();
        fs::create_dir(&out).unwrap();
        f.rooms.engine.ended(&f.key, end).await;
        f.cache.faults().clear();
        f.cache.faults().sever_connections();
        let settled = timeout(PATIENCE, f.rooms.engine.settled(&f.key)).await.unwrap();
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

#[tokio::test]
async fn links_of_builds_lead_no_output_to_sources_or_to_our_own_files() {
    let mut f = Fixture::new(false).await;
    settlement(&f).await;
    let base = f.dir.path().to_owned();
    let exec_root = base.join("execroot/_main");
    fs::create_dir_all(exec_root.join("sources")).unwrap();
    fs::create_dir_all(exec_root.join("bazel-out")).unwrap();
    let precious = ["execroot/_main/BUILD", "execroot/_main/sources/a.c"];
    for path in precious {
        fs::write(base.join(path), "precious").unwrap();
    }
    let before = elsewhere(&base);
    let newest = ".outhaul-newest._main";
    let evil = |path: &str| at(path, Content::Inline("evil".into()));
    let link = |path: &str, target: &str| at(path, Content::Symlink(target.to_owned()));
    let exec_root = exec_root.display().to_string();
    for (n, (target, names)) in [
        ("..", ["BUILD", "sources/a.c", "new"]),
        (&*exec_root, ["BUILD", "sources/a.c", "new"]),
        ("../sources", ["a.c", "new", "new/deep"]),
        ("m", ["BUILD", "sources/a.c", "new"]),
        ("../../..", [newest, ".outhaul-tmp/x", "state/x"]),
    ]
    .into_iter()
    .enumerate()
    {
        let m = if target == "m" { ".." } else { "nowhere" };
        let mut files = vec![link("bazel-out/l", target), link("bazel-out/m", m)];
        let behind = names.map(|name| evil(&format!("bazel-out/l/{name}")));
        // In the same build, and in one after it.
        files.extend(behind.clone());
        let settled = build(&mut f, &format!("same {n}"), files).await;
        assert_eq!(settled.failed, 3, "{target}: {settled:?}");
        let settled = build(&mut f, &format!("next {n}"), behind.to_vec()).await;
        assert_eq!(settled.failed, 3, "{target}: {settled:?}");
        // With a link in the place of the file itself.
        let name = format!("bazel-out/own{n}");
        let settled = build(
            &mut f,
            &format!("link {n}"),
            vec![link(&name, &format!("{target}/{}", names[0]))],
        )
        .await;
        assert_eq!(settled.failed, 0, "{settled:?}");
        let settled = build(&mut f, &format!("file {n}"), vec![evil(&name)]).await;
        assert_eq!(settled.failed, 0, "{settled:?}");
        assert!(!Path::new(&exec_root).join(&name).is_symlink());
    }
    for path in precious {
        assert_eq!(fs::read_to_string(base.join(path)).unwrap(), "precious");
    }
    assert_eq!(elsewhere(&base), before);
    // No event made a later build an old one.
    let settled = build(&mut f, "honest", vec![evil("bazel-out/honest")]).await;
    assert_eq!(settled.failed, 0, "{settled:?}");
}

#[tokio::test]
async fn a_file_in_the_place_of_an_earlier_builds_link_leaves_alone_what_that_led_to() {
    for into_directory in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let (destination, top) = if into_directory {
            let (path, flatten) = (out.clone(), false);
            (Destination::Directory { path, flatten }, out)
        } else {
            (Destination::ExecRoot, dir.path().join("execroot/_main"))
        };
        let mut f = Fixture::within(dir, "execroot/_main", "/w", destination, false).await;
        settlement(&f).await;
        let [one, two] = ["one", "two"].map(|bytes| Content::Blob(f.cache.store().put(bytes)));
        let bytes = |name: &str| fs::read_to_string(top.join("bazel-out").join(name)).unwrap();
        let real = |content: &Content| at("bazel-out/real", content.clone());
        let alias = |content: &Content| at("bazel-out/alias", content.clone());
        for (n, swapped) in [false, true, false, true].into_iter().enumerate() {
            let link = Content::Symlink("real".to_owned());
            let settled = build(&mut f, &format!("link {n}"), vec![alias(&link), real(&one)]).await;
            assert_eq!((settled.failed, &*bytes("alias")), (0, "one"));
            for round in 0..2 {
                let mut files = vec![alias(&one), real(&two)];
                if swapped {
                    files.reverse();
                }
                let settled = build(&mut f, &format!("files {n} {round}"), files).await;
                assert_eq!(settled.failed, 0, "{settled:?}");
                assert_eq!((&*bytes("alias"), &*bytes("real")), ("one", "two"));
            }
        }
        // A directory where a link was.
        let link = at("bazel-out/dir", Content::Symlink("tree".to_owned()));
        let tree = |content: &Content| at("bazel-out/tree/file", content.clone());
        build(&mut f, "directory link", vec![link, tree(&one)]).await;
        let files = vec![at("bazel-out/dir/file", two.clone()), tree(&one)];
        let settled = build(&mut f, "directory", files).await;
        assert_eq!(bytes("tree/file"), "one");
        // In an exec root the link may be the build tool's own, which others go through as well.
        if into_directory {
            assert_eq!((settled.failed, &*bytes("dir/file")), (0, "two"), "{settled:?}");
        } else {
            assert_eq!(settled.failed, 1, "{settled:?}");
            assert!(settled.messages[0].contains("symlink"), "{settled:?}");
        }
    }
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
    let rows = f.rooms.record.targets("invocation");
    let x = rows.iter().find(|row| row.label == "//:x").unwrap();
    assert_eq!(
        (x.state, x.failed, x.required),
        (TargetState::Failed, 2, 3),
        "{x:?}"
    );
}

/// A name of few, so that they meet.
fn name(random: &mut StdRng) -> String {
    let odd = [
        "..", ".", "", "a\nb", "\u{7f}", "x\0", "A", "é", "link", "very", "deep", "a",
    ];
    let mut name = String::new();
    for n in 0..random.random_range(1..4) {
        if n > 0 {
            name.push('/');
        }
        match random.random_range(0..8) {
            0 => name.push_str(odd[random.random_range(0..odd.len())]),
            _ => name.push_str(["a", "b", "c"][random.random_range(0..3)]),
        }
    }
    name
}

/// Links, files and directories that earlier builds may have left where this one has outputs.
fn plant(bin: &Path, random: &mut StdRng) {
    let names = ["a", "b", "c", "a/b", "b/c", "c/a"];
    for _ in 0..random.random_range(0..8) {
        let path = bin.join(names[random.random_range(0..names.len())]);
        let to = names[random.random_range(0..names.len())];
        fs::create_dir_all(bin).unwrap();
        let _ = match random.random_range(0..5) {
            0 => std::os::unix::fs::symlink(bin.join(to), path),
            1 => std::os::unix::fs::symlink(to, path),
            2 => fs::hard_link(bin.join(to), path),
            3 => fs::create_dir(path),
            _ => fs::write(path, random.random_range(0..6_u32).to_string()),
        };
    }
}

/// Outputs that are said to be on disk and have other bytes there.
async fn wrong(f: &Fixture) -> Vec<String> {
    let Some((row, _)) = f.rooms.engine.snapshot(&f.key.invocation_id).await else {
        return Vec::new();
    };
    let Some(root) = row.root else { return Vec::new() };
    let exec_root = f.dir.path().join("execroot/_main");
    let outputs = f.rooms.record.scan_outputs(root, "");
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

fn content(f: &Fixture, random: &mut StdRng) -> Content {
    let bytes = random.random_range(0..6_u32).to_string();
    match random.random_range(0..10) {
        0 => Content::Symlink(
            [
                "../..",
                "/etc/passwd",
                "a",
                "loop",
                "",
                "b/../c",
                "../../..",
                "../../../..",
                "../../../../sources",
                "a/b",
                "../b",
                "c",
            ][random.random_range(0..12)]
            .to_owned(),
        ),
        1 => Content::Inline(bytes.into()),
        2 => Content::Unknown,
        3 => Content::Blob(absent(&bytes)),
        4 => {
            let hash = [random.random(); 32];
            Content::Blob(Digest::new(DigestFunction::Sha256, &hash, random.random()).unwrap())
        }
        _ => Content::Blob(f.cache.store().put(bytes)),
    }
}

fn event(f: &Fixture, random: &mut StdRng) -> Event {
    let id = |random: &mut StdRng| random.random_range(0..12_u32).to_string();
    let label = |random: &mut StdRng| match random.random_range(0..20) {
        0 => "not a label\n".to_owned(),
        1 => "/".repeat(random.random_range(0..40)),
        _ => format!("//p:{}", random.random_range(0..6)),
    };
    let files = |random: &mut StdRng| -> Vec<File> {
        (0..random.random_range(0..5))
            .map(|_| {
                let mut file = of(&name(random), content(f, random));
                if random.random_range(0..12) == 0 {
                    // Test logs and sources have no prefix.
                    (file.path, file.prefix_len) = ("test.log".into(), 0);
                }
                file
            })
            .collect()
    };
    let ids =
        |random: &mut StdRng| -> Vec<String> { (0..random.random_range(0..4)).map(|_| id(random)).collect() };
    let target = |random: &mut StdRng| TargetId {
        label: label(random),
        aspect: ["", "", "//x.bzl%a"][random.random_range(0..3)].to_owned(),
        configuration: String::new(),
    };
    match random.random_range(0..14) {
        0 => Event::Started(Started {
            command: ["build", "test", "run", "", "query"][random.random_range(0..5)].to_owned(),
            started_ms: random.random(),
            ..Started::default()
        }),
        1 => Event::ExecRoot(f.dir.path().join("execroot/_main").display().to_string()),
        2 => Event::TestResult(TestResult {
            label: label(random),
            run: random.random(),
            shard: random.random_range(0..3),
            attempt: random.random(),
            files: files(random),
            ..TestResult::default()
        }),
        3 => Event::TestSummary {
            label: label(random),
            configuration: String::new(),
            shard_count: random.random(),
            run_count: random.random_range(0..3),
        },
        4 => Event::Aborted {
            target: random.random::<bool>().then(|| target(random)),
            reason: "X".to_owned(),
            description: "\u{1b}".to_owned(),
        },
        5 => Event::Configured {
            label: label(random),
            kind: "sh_test rule".to_owned(),
            completions: (0..random.random_range(0..3)).map(|_| target(random)).collect(),
        },
        6 => Event::Unreadable(vec![format!("/{}", name(random))]),
        7 => Event::Finished {
            exit_code: random.random(),
            name: String::new(),
        },
        8..=10 => Event::NamedSet(NamedSet {
            id: id(random),
            files: files(random),
            children: ids(random),
            authority: None,
        }),
        _ => Event::Completed(Completed {
            target: target(random),
            success: random.random(),
            groups: vec![OutputGroup {
                name: "default".to_owned(),
                sets: ids(random),
                files: files(random),
                incomplete: random.random_range(0..4) == 0,
            }],
            directories: files(random),
        }),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn builds_of_nonsense_settle_and_write_nothing_elsewhere() {
    let cases = number("OUTHAUL_HOSTILE_CASES").unwrap_or(12);
    let first = number("OUTHAUL_HOSTILE_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    for seed in first..first.saturating_add(cases) {
        eprintln!("OUTHAUL_HOSTILE_SEED={seed} OUTHAUL_HOSTILE_CASES=1");
        let random = &mut StdRng::seed_from_u64(seed);
        let mut f = Fixture::new(random.random()).await;
        let exec_root = f.dir.path().join("execroot/_main");
        fs::create_dir_all(exec_root.join("sources")).unwrap();
        fs::write(exec_root.join("a"), "a source").unwrap();
        plant(&exec_root.join("bazel-out/k8/bin"), random);
        let before = elsewhere(f.dir.path());
        for _ in 0..random.random_range(1..80) {
            let event = event(&f, random);
            f.send(event).await;
            if random.random_range(0..30) == 0 {
                // The client goes, and comes back.
                f.rooms
                    .engine
                    .ended(&f.key, StreamEnd::Broken("gone".to_owned()))
                    .await;
            }
        }
        let settlement = settlement(&f).await;
        for message in &settlement.messages {
            assert!(!message.contains(char::is_control), "{message:?}");
        }
        assert_eq!(elsewhere(f.dir.path()), before, "OUTHAUL_HOSTILE_SEED={seed}");
        assert_eq!(fs::read_to_string(exec_root.join("a")).unwrap(), "a source");
        assert_eq!(
            wrong(&f).await,
            Vec::<String>::new(),
            "OUTHAUL_HOSTILE_SEED={seed}"
        );
    }
}
