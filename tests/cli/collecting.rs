//! `outhaul stage --from`: files and archives of collections, with a daemon and without.

use std::path::Path;

#[cfg(feature = "object-stores")]
use outhaul_testkit::{
    Ran, Running, finish, peers,
    stores::{Store, StoreKind},
    until,
};
use serde_json::Value;

use crate::{
    archives::{Archives, nginx, sha256, tar, therock, zst},
    staging::{is_staged, stop},
    support::{World, outhaul},
};

/// A collection, a directory to stage into, and a state directory.
struct Place(Archives);

impl Place {
    fn new() -> Self {
        Self(Archives::new())
    }

    fn to(&self) -> String {
        self.0.path("out").display().to_string()
    }

    fn state(&self) -> String {
        format!("--state-dir={}", self.0.path("state").display())
    }

    async fn serve(&self, args: &[&str]) -> Running {
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
            .args(["--remote-cache=grpc://127.0.0.1:1", &self.state()])
            .args(args);
        Running::serve(command).await
    }

    fn command(&self, from: &str, args: &[&str]) -> std::process::Command {
        let mut command = outhaul();
        command
            .args([
                "stage",
                "--json",
                "--to",
                &self.to(),
                "--from",
                from,
                &self.state(),
            ])
            .args(args);
        command
    }

    async fn stage(&self, args: &[&str]) -> Ran {
        finish(self.command(&self.0.url(), args)).await
    }

    async fn is_staged(&self, args: &[&str]) -> Ran {
        is_staged(&self.to(), args).await
    }

    /// Every file of the directory but the marker's, with its bytes.
    fn found(&self) -> Vec<(String, String)> {
        let out = self.0.path("out");
        let files = crate::staging::entries(&out)
            .into_iter()
            .filter(|path| !path.is_dir());
        let name = |path: &Path| path.strip_prefix(&out).unwrap().display().to_string();
        files
            .map(|path| (name(&path), std::fs::read_to_string(&path).unwrap()))
            .collect()
    }

    #[track_caller]
    fn assert_found(&self, expected: &[(&str, &str)]) {
        let found = self.found();
        let found: Vec<_> = found.iter().map(|(name, bytes)| (&**name, &**bytes)).collect();
        assert_eq!(found, expected);
    }
}

fn outcomes(ran: &Ran) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let line = |line: &Value| (text(&line["exec_path"]), text(&line["outcome"]));
    ran.json().iter().map(line).collect()
}

fn pair(name: &str, outcome: &str) -> (String, String) {
    (name.to_owned(), outcome.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_a_collection_are_staged_once_with_a_daemon_and_without() {
    for with_daemon in [false, true] {
        let place = Place::new();
        place.0.with_sum("a.bin", b"aa");
        place.0.with_sum("b.tar", b"bb");
        place.0.file("c.txt", b"cc");
        let server = match with_daemon {
            true => Some(place.serve(&[]).await),
            false => None,
        };
        let args = ["--include=^[ab]"];
        let ran = place.stage(&args).await.expect(0);
        assert_eq!(
            outcomes(&ran),
            [pair("a.bin", "downloaded"), pair("b.tar", "downloaded")]
        );
        assert_eq!(ran.json()[0]["digest"], format!("sha256:{}", sha256(b"aa")));
        place.assert_found(&[("a.bin", "aa"), ("b.tar", "bb")]);
        let ran = place.stage(&args).await.expect(0);
        assert_eq!(
            outcomes(&ran),
            [pair("a.bin", "present"), pair("b.tar", "present")]
        );
        let url = place.0.url();
        let reported = place.is_staged(&["--from", &url]).await.expect(0).json();
        assert_eq!(
            (&reported[0]["files"], &reported[0]["complete"]),
            (&2.into(), &true.into())
        );
        assert_eq!(reported[0]["from"], Value::from(vec![url.clone()]));
        place.is_staged(&["--from", &url, args[0]]).await.expect(0);
        place.is_staged(&["--from", &url, "--include=c"]).await.expect(1);
        place.is_staged(&["--from", "file:///other/"]).await.expect(1);
        // No build was staged.
        place.is_staged(&["--include=^[ab]"]).await.expect(1);
        // What was changed is noticed and made good; what is nobody's stays.
        std::fs::write(place.0.path("out/a.bin"), "changed").unwrap();
        std::fs::remove_file(place.0.path("out/b.tar")).unwrap();
        std::fs::write(place.0.path("out/mine"), "mine").unwrap();
        place.is_staged(&[]).await.says(1, &[]);
        place.stage(&args).await.expect(0);
        place.assert_found(&[("a.bin", "aa"), ("b.tar", "bb"), ("mine", "mine")]);
        // The collection has other files now: what is not in it any more goes.
        for gone in ["in/b.tar", "in/b.tar.sha256sum"] {
            std::fs::remove_file(place.0.path(gone)).unwrap();
        }
        place.0.with_sum("a.bin", b"new");
        place.stage(&args).await.expect(0);
        place.assert_found(&[("a.bin", "new"), ("mine", "mine")]);
        place.is_staged(&[]).await.expect(0);
        if let Some(server) = server {
            stop(server).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_are_unpacked_and_looked_after_file_by_file() {
    let place = Place::new();
    place.0.with_sum(
        "one.tar.zst",
        &zst(&tar(&[("a/x", "1"), ("a/y", "2"), ("b", "3")])),
    );
    place.0.with_sum("two.tar", &tar(&[("x", "4")]));
    place.0.file("notes.txt", b"n");
    let ran = place.stage(&["--extract"]).await.expect(0);
    assert_eq!(ran.json().len(), 3);
    let all = [
        ("notes.txt", "n"),
        ("one/a/x", "1"),
        ("one/a/y", "2"),
        ("one/b", "3"),
        ("two/x", "4"),
    ];
    place.assert_found(&all);
    let ran = place.stage(&["--extract"]).await.expect(0);
    let again = [
        pair("notes.txt", "downloaded"),
        pair("one.tar.zst", "present"),
        pair("two.tar", "present"),
    ];
    assert_eq!(outcomes(&ran), again);
    place.is_staged(&[]).await.expect(0);
    for (path, bytes, word) in [
        ("out/one/a/x", Some("9"), "changed"),
        ("out/one/b", None, "missing"),
        ("out/two/z", Some("z"), "not part of the staged tree"),
    ] {
        match bytes {
            Some(bytes) => std::fs::write(place.0.path(path), bytes).unwrap(),
            None => std::fs::remove_file(place.0.path(path)).unwrap(),
        }
        let reported = place.is_staged(&[]).await.expect(1).json()[0]["problems"].to_string();
        assert!(reported.contains(word), "{reported}");
    }
    std::fs::remove_file(place.0.path("out/two/z")).unwrap();
    place.stage(&["--extract"]).await.expect(0);
    place.assert_found(&all);
    // A file is a directory now, and others are gone.
    place
        .0
        .with_sum("one.tar.zst", &zst(&tar(&[("a", "now a file"), ("b/c", "5")])));
    place.stage(&["--extract"]).await.expect(0);
    let now = [
        ("notes.txt", "n"),
        ("one/a", "now a file"),
        ("one/b/c", "5"),
        ("two/x", "4"),
    ];
    place.assert_found(&now);
    place
        .is_staged(&["--extract", "--from", &place.0.url()])
        .await
        .expect(0);
    // The same collection by the rules of TheRock, into the same directory: another set.
    std::fs::remove_dir_all(place.0.path("in")).unwrap();
    std::fs::create_dir(place.0.path("in")).unwrap();
    place.0.with_sum(
        "blas_lib_generic.tar.zst",
        &therock("blas/stage", &[("lib/a.so", "a")]),
    );
    place.0.with_sum(
        "core_run_generic.tar.zst",
        &therock("core/stage", &[("bin/run", "r")]),
    );
    place.stage(&["--flatten"]).await.expect(0);
    let found = place.found();
    assert!(
        found.contains(&pair("lib/a.so", "a")) && found.contains(&pair("bin/run", "r")),
        "{found:?}"
    );
    let ran = place.stage(&["--flatten"]).await.expect(0);
    assert!(
        outcomes(&ran).iter().all(|(_, outcome)| outcome == "present"),
        "{ran}"
    );
    place.is_staged(&[]).await.expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_required_is_there_as_a_whole_or_not_at_all_and_the_rest_is_reported_again() {
    let place = Place::new();
    let url = place.0.url();
    place.0.with_sum("a.tar", &tar(&[("x", "1")]));
    place.0.with_sum("b.tar", &tar(&[("x", "2")]));
    place.0.file("b.tar", &tar(&[("x", "wrong")]));
    for (flags, wrong) in [
        (&["--extract"][..], &["b.tar"][..]),
        (&[], &["b.tar"]),
        (&["--extract", "--required=no-such"], &["--required=no-such"]),
        (&["--extract", "//target"], &["--from"]),
        (&["--include=["], &["--include=["]),
    ] {
        let ran = place.stage(flags).await;
        assert_ne!(ran.code, Some(0));
        assert!(wrong.iter().all(|part| ran.err.contains(part)), "{ran}");
        assert_eq!(place.found(), []);
        place.is_staged(&["--from", &url]).await.expect(1);
    }
    let args = ["--extract", "--optional=^b"];
    for _ in 0..2 {
        place
            .stage(&args)
            .await
            .says(0, &["b.tar", &sha256(&tar(&[("x", "2")]))]);
        place.assert_found(&[("a/x", "1")]);
        let reported = place.is_staged(&["--from", &url]).await.expect(0).json();
        assert_eq!(reported[0]["complete"], true);
        assert_eq!(reported[0]["missing"][0]["path"], "b.tar");
        let error = reported[0]["missing"][0]["error"].to_string();
        assert!(error.contains(&sha256(&tar(&[("x", "2")]))), "{error}");
    }
    // It is there now.
    place.0.with_sum("b.tar", &tar(&[("x", "2")]));
    place.stage(&args).await.expect(0);
    place.assert_found(&[("a/x", "1"), ("b/x", "2")]);
    let reported = place.is_staged(&["--from", &url]).await.expect(0).json();
    assert_eq!(reported[0]["missing"], Value::Array(Vec::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_optional_archive_takes_nothing_away_from_what_is_required() {
    let required = therock(
        "a/stage",
        &[("lib/x", "required"), ("lib/same", "s"), ("d/f", "1")],
    );
    for (optional, path) in [
        (&[("lib/x", "optional"), ("lib/new", "n")][..], "lib/x"),
        (&[("d", "a file")], "d"),
        (&[("lib/x/y", "below a file")], "lib/x/y"),
    ] {
        let place = Place::new();
        place.0.with_sum("a_lib_generic.tar.zst", &required);
        place
            .0
            .with_sum("b_lib_generic.tar.zst", &therock("b/stage", optional));
        let args = ["--flatten", "--optional=^b"];
        let ran = place.stage(&args).await;
        ran.says(0, &["b_lib_generic.tar.zst", path, "a_lib_generic.tar.zst"]);
        let all = [("d/f", "1"), ("lib/same", "s"), ("lib/x", "required")];
        place.assert_found(&all);
        // Nor does it the second time, when what is required is there.
        place.stage(&args).await.expect(0);
        place.assert_found(&all);
        // The same bytes are no contradiction.
        place
            .0
            .with_sum("b_lib_generic.tar.zst", &therock("b/stage", &[("lib/same", "s")]));
        place.stage(&args).await.expect(0);
        let reported = place.is_staged(&[]).await.expect(0).json();
        assert_eq!(reported[0]["missing"], Value::Array(Vec::new()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_two_archives_stays_while_one_of_them_has_it() {
    for (gone, left) in [
        ("a", &[("lib/b", "b"), ("lib/same", "s")][..]),
        ("b", &[("lib/a", "a"), ("lib/same", "s")]),
    ] {
        let place = Place::new();
        for name in ["a", "b"] {
            let files = [("lib/same", "s"), (&*format!("lib/{name}"), name)];
            let archive = therock(&format!("{name}/stage"), &files);
            place.0.with_sum(&format!("{name}_lib_generic.tar.zst"), &archive);
        }
        place.stage(&["--flatten"]).await.expect(0);
        let reported = place.is_staged(&[]).await.expect(0).json();
        assert_eq!(reported[0]["files"], 3);
        for ending in ["", ".sha256sum"] {
            let name = format!("in/{gone}_lib_generic.tar.zst{ending}");
            std::fs::remove_file(place.0.path(&name)).unwrap();
        }
        let ran = place.stage(&["--flatten"]).await.expect(0);
        assert!(
            outcomes(&ran).iter().all(|(_, outcome)| outcome == "present"),
            "{ran}"
        );
        place.assert_found(left);
        place.is_staged(&[]).await.expect(0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_collections_and_blobs_of_the_cache_are_one_set() {
    for with_daemon in [false, true] {
        let place = Place::new();
        let world = World::new().await;
        let blob = world.cache.store().put(b"blob".to_vec()).to_string();
        let cache = world.cache_flag();
        place.0.with_sum("a.bin", b"aa");
        let other = place.0.path("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::write(other.join("b.tar"), tar(&[("x", "1")])).unwrap();
        let other = format!("--from=file://{}/", other.display());
        let named = format!("--from=c.bin={blob}");
        let server = match with_daemon {
            true => Some(place.serve(&[&cache]).await),
            false => None,
        };
        let all = [other.as_str(), &named, &cache, "--jobs=1"];
        let ran = place.stage(&[&all[..], &["--extract"]].concat()).await.expect(0);
        let outcomes_of = |outcome: &str| {
            ["a.bin", "b.tar", "c.bin"]
                .map(|name| pair(name, outcome))
                .to_vec()
        };
        assert_eq!(outcomes(&ran), outcomes_of("downloaded"));
        let found = [("a.bin", "aa"), ("b/x", "1"), ("c.bin", "blob")];
        place.assert_found(&found);
        // What has a checksum or a digest is known again, in whatever order it is named.
        let url = place.0.url();
        let again = [
            named.as_str(),
            &other,
            "--from",
            &url,
            &cache,
            "--extract",
            "--json",
            &place.state(),
        ];
        let mut command = outhaul();
        command.args(["stage", "--to", &place.to()]).args(again);
        let mut known = outcomes_of("present");
        known[1] = pair("b.tar", "downloaded");
        assert_eq!(outcomes(&finish(command).await.expect(0)), known);
        let markers = std::fs::read_dir(place.0.path("out/.outhaul")).unwrap();
        let markers = markers.filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .path()
                .extension()
                .is_some_and(|e| e == "json")
        });
        assert_eq!(markers.count(), 1);
        place.is_staged(&[&named, &other, "--from", &url]).await.expect(0);
        place.is_staged(&[&named, &other]).await.expect(1);
        place.is_staged(&["--from", &url]).await.expect(1);
        // A blob that nobody has, and one set without what was in it.
        let gone = format!("--from=d.bin={}/7", sha256(b"no such"));
        place
            .stage(&[&gone, &cache])
            .await
            .says(1, &[&sha256(b"no such")]);
        place.assert_found(&found);
        if let Some(server) = server {
            stop(server).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_set_that_cannot_be_is_refused_before_anything_is_written() {
    let place = Place::new();
    place.0.with_sum("a.tar", &tar(&[("x", "1"), ("y", "2")]));
    place.0.file("b.bin", b"b");
    let file = |name: &str| format!("--from={}{name}", place.0.url());
    let hash = sha256(b"a");
    let digest = format!("--from=a.tar={hash}/1");
    let sums = place.0.path("sums");
    std::fs::write(&sums, format!("{}  b.bin\n", sha256(b"other"))).unwrap();
    let sums = format!("--checksum-file={}", sums.display());
    let fixed = "--remote-cache=grpc://127.0.0.1:1";
    for (flags, code, parts) in [
        (&[&*file("a.tar")][..], 1, &["a.tar"][..]),
        (
            &[&digest, fixed, "--flatten", "--exclude=b"],
            1,
            &["both called a.tar", "NAME=DIGEST"],
        ),
        (&[&digest], 2, &["--from=a.tar=", "--remote-cache"]),
        (
            &["--from=nonsense"],
            2,
            &["--from=nonsense", "neither a URL nor a digest"],
        ),
        (&["--checksum=require"], 1, &["b.bin", "no checksum"]),
        (&[&sums], 1, &["b.bin", &sha256(b"other")]),
        (
            &["--extract", "--limit=archive-entries=1"],
            1,
            &["a.tar", "archive-entries"],
        ),
        (&["--limit=archive-entries"], 2, &["--limit", "NAME=VALUE"]),
        (&["--jobs=0"], 2, &["--jobs"]),
    ] {
        place.stage(flags).await.says(code, parts);
        assert_eq!(place.found(), [], "{flags:?}");
    }
    // What would have no effect.
    for (flag, part) in [
        ("--checksum=none", "--from"),
        (&*sums, "--from"),
        ("--jobs=3", "--extract"),
        ("--limit=archive-entries=1", "--extract"),
    ] {
        let mut command = outhaul();
        command.args(["stage", "--to", &place.to(), &place.state(), flag]);
        finish(command)
            .await
            .says(2, &[flag.split('=').next().unwrap(), part]);
    }
    let both = [&*sums, "--checksum=none"];
    place
        .stage(&both)
        .await
        .says(2, &["--checksum-file", "--checksum=none"]);
    // Verified only if that is asked for.
    place.stage(&["--checksum=none"]).await.expect(0);
    place.0.file("b.bin", b"other");
    place.stage(&[&sums, "--checksum=require"]).await.expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_no_build_need_no_state_directory_and_wait_for_no_other_command() {
    let place = Place::new();
    place.0.file("a.bin", b"aa");
    place.stage(&[]).await.expect(0);
    assert!(!place.0.path("state").exists());
    // As another command has it.
    let state = place.0.path("state");
    let (record, _) = outhaul::record::Record::open(&state).unwrap();
    place.0.file("b.bin", b"b");
    place.stage(&[]).await.expect(0);
    assert_eq!(place.found().len(), 2);
    drop(record);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_named_file_with_a_name_of_outhauls_own_is_refused() {
    let place = Place::new();
    for name in [".outhaul", ".Outhaul-tmp"] {
        place.0.file(name, b"x");
        let url = format!("{}{name}", place.0.url());
        let ran = finish(place.command(&url, &[])).await;
        ran.says(1, &[name]);
        assert_eq!(place.found(), []);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stage_that_is_killed_leaves_nothing_and_is_made_good() {
    let test = "a_stage_that_is_killed_leaves_nothing_and_is_made_good";
    if !peers::are_there(test, &["nginx"]) {
        return;
    }
    let place = Place::new();
    let big: Vec<u8> = (0..1_500_000_u32).flat_map(u32::to_le_bytes).collect();
    let text = "0123456789abcdef".repeat(100_000);
    place
        .0
        .with_sum("big.tar", &tar(&[("big", &text), ("small", "s")]));
    place.0.with_sum("big.bin", &big);
    let (slow, server) = nginx(place.0.dir.path(), "limit_rate 400k;");
    for name in ["big.tar", "big.bin"] {
        let url = format!("{server}/{name}");
        let with_password = url.replace("http://", "http://me:pl4nted@");
        let mut running = Running::start(place.command(&with_password, &["--extract"]));
        until("it downloads", async || {
            is_downloading(&place.0.path("out"), running.id())
        })
        .await;
        running.kill();
        running.end().await;
        assert_eq!(place.found().len(), usize::from(name == "big.bin") * 2, "{name}");
        place.is_staged(&["--from", &url]).await.expect(1);
        let ran = finish(place.command(&with_password, &["--extract"]))
            .await
            .expect(0);
        assert!(!format!("{}{}", ran.out(), ran.err).contains("pl4nted"), "{ran}");
        place.is_staged(&["--from", &url]).await.expect(0);
    }
    assert_eq!(std::fs::read(place.0.path("out/big.bin")).unwrap(), big);
    assert_eq!(std::fs::read_to_string(place.0.path("out/big")).unwrap(), text);
    let mut left: Vec<_> = std::fs::read_dir(place.0.path("out"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, [".outhaul", "big", "big.bin", "small"]);
    for entry in std::fs::read_dir(place.0.path("out/.outhaul")).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        assert!(!text.contains("pl4nted"), "{text}");
    }
    drop(slow);
}

/// Whether a file that has bytes is open in a directory, or in one of ours in it.
fn is_downloading(directory: &Path, pid: u32) -> bool {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
    let is_it = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?.path();
        let path = std::fs::read_link(&entry).ok()?;
        let bytes = std::fs::metadata(&entry).ok()?;
        Some(path.starts_with(directory) && bytes.is_file() && bytes.len() > 0)
    };
    open.into_iter().any(|entry| is_it(entry) == Some(true))
}

#[cfg(feature = "object-stores")]
#[tokio::test(flavor = "multi_thread")]
async fn a_run_in_a_bucket_is_staged() {
    let test = "a_run_in_a_bucket_is_staged";
    for kind in [StoreKind::S3, StoreKind::PublicS3, StoreKind::Azure] {
        if !kind.is_there(test) {
            continue;
        }
        let store = Store::start(kind);
        let place = Place::new();
        store.put(
            "runs/1/blas_lib_generic.tar.zst",
            &therock("blas/stage", &[("lib/a.so", "a")]),
        );
        store.put(
            "runs/1/core_run_generic.tar.zst",
            &therock("core/stage", &[("bin/run", "r")]),
        );
        store.put("runs/1/deep/other.tar", b"not right below");
        let url = store.url("runs/1/", "");
        let stage = async |args: &[&str]| {
            let mut command = place.command(&url, args);
            command.envs(store.variables());
            finish(command).await
        };
        stage(&["--flatten"]).await.expect(0);
        let both = [("bin/run", "r"), ("lib/a.so", "a")];
        place.assert_found(&both);
        // There is no checksum, but the list says that they have not changed: not where files were put beside the store.
        let has_tags = kind != StoreKind::S3;
        let count = |ran: &Ran, outcome: &str| outcomes(ran).iter().filter(|(_, o)| o == outcome).count();
        let ran = stage(&["--flatten"]).await.expect(0);
        assert_eq!(
            count(&ran, "present"),
            if has_tags { 2 } else { 0 },
            "{kind:?} {ran}"
        );
        store.put(
            "runs/1/core_run_generic.tar.zst",
            &therock("core/stage", &[("bin/run", "new")]),
        );
        let ran = stage(&["--flatten"]).await.expect(0);
        assert_eq!(count(&ran, "present"), usize::from(has_tags), "{kind:?} {ran}");
        place.assert_found(&[("bin/run", "new"), both[1]]);
        place.is_staged(&["--flatten", "--from", &url]).await.expect(0);
    }
}
