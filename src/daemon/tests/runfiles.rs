//! What programs need at run time, by a manifest and an action cache on disk: through all rooms.
//!
//! `OUTHAUL_HOSTILE_CASES` is how many random builds there are, `OUTHAUL_HOSTILE_SEED` repeats one.

use std::{fs, path::PathBuf, time::SystemTime};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{
    action_cache::write::{Action, Metadata, Written},
    bep::event::CommandLine,
    builds::Settlement,
    invocation::policy::DownloadMode,
    record::OutputState,
};

const BIN: &str = "bazel-out/k8/bin";

pub(super) fn metadata(digest: &Digest) -> Metadata {
    Metadata {
        hash: digest.hash().to_vec(),
        size: i64::try_from(digest.size()).unwrap(),
        expires_ms: -1,
        link_to: None,
    }
}

/// A build of one program, whose manifest is on disk, beside what Bazel has in its action cache.
struct World {
    f: Fixture,
    cache: Written,
    manifest: String,
}

impl World {
    async fn new() -> Self {
        let f = Fixture::new(false).await;
        fs::create_dir_all(f.dir.path().join("execroot/_main").join(BIN)).unwrap();
        Self {
            f,
            cache: Written::new(16),
            manifest: String::new(),
        }
    }

    /// Begins the next build, once the one before has its root: the newest build of a root is the one that opens it last.
    async fn again(&mut self, invocation_id: &str) {
        let before = self.f.services.engine.snapshot(&self.f.key.invocation_id).await;
        assert!(before.is_some_and(|(row, _)| row.root.is_some()));
        self.f.again(invocation_id).await;
    }

    fn exec_root(&self) -> PathBuf {
        self.f.dir.path().join("execroot/_main")
    }

    fn at(&self, name: &str) -> PathBuf {
        self.exec_root().join(BIN).join(name)
    }

    /// The program needs this.
    fn needs(&mut self, name: &str) {
        let target = self.at(name);
        self.manifest += &format!("_main/{name} {}\n", target.display());
    }

    /// Bazel has it in the cache, where it also is.
    fn cached(&mut self, name: &str, text: &str) -> Digest {
        let digest = self.f.cache.store().put(text.to_owned());
        let path = format!("{BIN}/{name}");
        let action = Action {
            primary: path.clone(),
            files: vec![(path, metadata(&digest))],
            ..Action::default()
        };
        self.cache.put(&action, false);
        digest
    }

    /// The same of a tree.
    fn cached_tree(&mut self, name: &str, files: &[(&str, &str)]) {
        let children = files
            .iter()
            .map(|(below, text)| {
                let digest = self.f.cache.store().put((*text).to_owned());
                ((*below).to_owned(), metadata(&digest))
            })
            .collect();
        let path = format!("{BIN}/{name}");
        let action = Action {
            primary: path.clone(),
            trees: vec![(path, children)],
            ..Action::default()
        };
        self.cache.put(&action, false);
    }

    fn write_action_cache(&self, format: i64) {
        self.cache.save(self.f.dir.path(), format);
    }

    /// The build's events: a program that was asked for, and the end with this exit code.
    async fn build(&mut self, options: &[(&str, &str)], exit_code: i32) -> Settlement {
        fs::write(self.at("app.runfiles_manifest"), &self.manifest).unwrap();
        let options = options
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let line = CommandLine {
            label: "canonical".to_owned(),
            options: options.collect(),
        };
        self.f.send(Event::CommandLine(line)).await;
        let program = self.f.cache.store().put("#!/bin/sh\n");
        self.f.set("0", vec![output("app", &program)], &[]).await;
        self.f.complete("//:app", &["0"]).await;
        self.f.send(finished(exit_code)).await;
        self.f.finish().await;
        let settled = self.f.services.engine.settled(&self.f.key);
        timeout(PATIENCE, settled).await.expect("in time")
    }

    /// A target of no outputs, in a command that began then.
    async fn hidden(&mut self, command: &str, begun: SystemTime) {
        let begun = begun.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let started = Started {
            command: command.to_owned(),
            started_ms: i64::try_from(begun.as_millis()).unwrap(),
            ..Started::default()
        };
        self.f.send(Event::Started(started)).await;
        self.f
            .send(Event::Configuration {
                id: "c".to_owned(),
                mnemonic: "k8".to_owned(),
            })
            .await;
        let mut hidden = target("//:hidden");
        hidden.configuration = "c".to_owned();
        let completed = Completed {
            target: hidden,
            success: true,
            groups: Vec::new(),
            directories: Vec::new(),
        };
        self.f.send(Event::Completed(completed)).await;
    }

    fn text(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.at(name)).ok()
    }
}

fn finished(exit_code: i32) -> Event {
    Event::Finished {
        exit_code,
        name: String::new(),
        ended_ms: 0,
    }
}

#[tokio::test]
async fn files_trees_and_links_come_by_the_action_cache_and_only_what_is_absent() {
    let mut w = World::new().await;
    for name in ["data", "tree", "empty", "link", "linked", "here", "source"] {
        w.needs(name);
    }
    w.manifest += "_main/src /home/u/src\n_main/nothing \n";
    w.cached("data", "data");
    w.cached_tree("tree", &[("a", "tree a"), ("sub/b c", "tree b")]);
    // Created by Bazel before: trees, and links to nothing.
    fs::create_dir(w.at("tree")).unwrap();
    fs::create_dir(w.at("empty")).unwrap();
    w.cached("link", "behind the link");
    std::os::unix::fs::symlink(w.at("real"), w.at("link")).unwrap();
    w.cached_tree("linked", &[("a", "tree a")]);
    std::os::unix::fs::symlink(w.at("tree"), w.at("linked")).unwrap();
    // What lies there is newer than what the action cache says.
    w.cached("here", "older");
    fs::write(w.at("here"), "newer").unwrap();
    std::os::unix::fs::symlink("/etc/hostname", w.at("source")).unwrap();
    // Another action's, which is not needed.
    w.cached("unneeded", "unneeded");
    w.write_action_cache(16);
    let settlement = w.build(&[], 0).await;
    assert_eq!(settlement.failed, 0, "{settlement:?}");
    for (name, text) in [
        ("app", "#!/bin/sh\n"),
        ("data", "data"),
        ("tree/a", "tree a"),
        ("tree/sub/b c", "tree b"),
        ("real", "behind the link"),
        ("linked/a", "tree a"),
        ("here", "newer"),
    ] {
        assert_eq!(w.text(name).as_deref(), Some(text), "{name}");
    }
    assert!(w.at("link").is_symlink() && w.at("linked").is_symlink());
    assert_eq!(w.text("unneeded"), None);
    // And whatever it names is known.
    timeout(PATIENCE, w.f.services.engine.done(&w.f.key))
        .await
        .expect("in time");
    let root =
        w.f.services
            .record
            .invocation("invocation")
            .unwrap()
            .root
            .unwrap();
    let row = |name: &str| {
        let path = ExecPath::new(&format!("{BIN}/{name}")).unwrap();
        w.f.services.record.output(root, &path)
    };
    let unneeded = row("unneeded").unwrap();
    assert_eq!(
        (unneeded.state, &*unneeded.event),
        (OutputState::Known, "action_cache")
    );
    assert_eq!(&*row("data").unwrap().label, "//:app");
}

#[tokio::test]
async fn what_cannot_be_known_is_counted_with_its_reason() {
    type Prepare = fn(&mut World);
    let cached: Prepare = |w| {
        w.cached("data", "data");
        w.write_action_cache(16);
    };
    for (prepare, options, exit_code, reason) in [
        ((|_| ()) as Prepare, &[][..], 0, "there is no action cache"),
        (|w| w.write_action_cache(12), &[], 0, "no digests of outputs"),
        (|w| w.write_action_cache(21), &[], 0, "not supported"),
        (cached, &[], 8, "interrupted"),
        (cached, &[], 37, "interrupted"),
        (cached, &[("use_action_cache", "0")], 0, "--nouse_action_cache"),
        (
            |w| w.write_action_cache(16),
            &[],
            0,
            "neither the build's events nor",
        ),
        (
            |w| {
                w.cached("data", "data");
                w.cache.index.pop();
                w.write_action_cache(16);
            },
            &[],
            0,
            "is damaged at byte",
        ),
        (
            // It says something else of the program than the stream does.
            |w| {
                w.cached("data", "data");
                w.cached("app", "another program");
                w.write_action_cache(16);
            },
            &[],
            0,
            "disagrees with this build's events",
        ),
        (
            |w| {
                for text in ["one", "two"] {
                    let digest = w.f.cache.store().put(text);
                    let action = Action {
                        primary: format!("{BIN}/{text}"),
                        files: vec![(format!("{BIN}/data"), metadata(&digest))],
                        ..Action::default()
                    };
                    w.cache.put(&action, false);
                }
                w.write_action_cache(16);
            },
            &[],
            0,
            "two digests",
        ),
        (
            // The cache has lost it.
            |w| {
                let digest = absent("lost");
                let action = Action {
                    primary: format!("{BIN}/data"),
                    files: vec![(format!("{BIN}/data"), metadata(&digest))],
                    ..Action::default()
                };
                w.cache.put(&action, false);
                w.write_action_cache(16);
            },
            &[],
            0,
            "evicted",
        ),
    ] {
        let mut w = World::new().await;
        w.needs("data");
        prepare(&mut w);
        let settlement = w.build(options, exit_code).await;
        assert_eq!(settlement.failed, 1, "{reason}: {settlement:?}");
        let messages = settlement.messages.join("\n");
        assert!(
            messages.contains(reason) && messages.contains("data"),
            "{reason}: {messages}"
        );
        assert_eq!(w.text("data"), None, "{reason}");
        assert!(w.text("app").is_some(), "{reason}");
        timeout(PATIENCE, w.f.services.engine.done(&w.f.key))
            .await
            .expect("in time");
        let rows = w.f.services.record.targets("invocation");
        let app = rows.iter().find(|row| row.label == "//:app").unwrap();
        assert_eq!((app.state, app.failed), (TargetState::Failed, 1), "{reason}");
    }
}

/// Bazel never removes what it has of an action that is gone, and has no digests of what is made on this machine.
#[tokio::test]
async fn what_another_action_made_before_costs_no_runfiles() {
    let mut w = World::new().await;
    w.needs("data");
    w.cached("data", "data");
    let before = w.f.cache.store().put("another program");
    let action = Action {
        primary: format!("{BIN}/renamed"),
        files: vec![
            (format!("{BIN}/renamed"), metadata(&before)),
            (format!("{BIN}/app"), metadata(&before)),
        ],
        ..Action::default()
    };
    w.cache.put(&action, false);
    w.write_action_cache(16);
    let settlement = w.build(&[], 0).await;
    assert_eq!(settlement.failed, 0, "{settlement:?}");
    assert_eq!(w.text("data").as_deref(), Some("data"));
    assert_eq!(w.text("app").as_deref(), Some("#!/bin/sh\n"));
    timeout(PATIENCE, w.f.services.engine.done(&w.f.key))
        .await
        .expect("in time");
    let invocation = w.f.services.record.invocation("invocation").unwrap();
    let row = |name: &str| {
        let path = ExecPath::new(&format!("{BIN}/{name}")).unwrap();
        w.f.services.record.output(invocation.root.unwrap(), &path)
    };
    assert_eq!(&*row("renamed").unwrap().event, "action_cache");
    assert_ne!(&*row("app").unwrap().event, "action_cache");
}

#[tokio::test]
async fn a_build_that_does_not_make_runfiles_has_none() {
    for (options, said) in [
        (&[("output_groups", "other")][..], false),
        (
            &[
                ("build_runfile_manifests", "0"),
                ("remote_download_outputs", "minimal"),
            ],
            true,
        ),
        // Bazel has downloaded them.
        (&[("build_runfile_manifests", "0")], false),
    ] {
        let mut w = World::new().await;
        w.needs("data");
        w.cached("data", "data");
        w.write_action_cache(16);
        let settlement = w.build(options, 0).await;
        assert_eq!((settlement.failed, w.text("data")), (0, None), "{options:?}");
        let is_said = settlement
            .messages
            .iter()
            .any(|said| said.contains("--nobuild_runfile_manifests"));
        assert_eq!(is_said, said, "{options:?}");
    }
}

#[tokio::test]
async fn a_rule_for_some_runfiles_brings_them_also_where_no_others_are_wanted() {
    let mut w = World::new().await;
    w.f.services.engine.set_policy(Policy {
        mode: DownloadMode::Minimal,
        rules: vec![
            "required runfiles path=.*/data".parse().unwrap(),
            "required runfiles min-size=20".parse().unwrap(),
        ],
        ..Policy::default()
    });
    w.again("minimal").await;
    // Says where the program of a target is whose outputs are not asked for.
    w.f.send(Event::Configuration {
        id: String::new(),
        mnemonic: "k8".to_owned(),
    })
    .await;
    for (name, text) in [
        ("data", "data"),
        ("large", "more than twenty bytes"),
        ("other", "other"),
    ] {
        w.needs(name);
        w.cached(name, text);
    }
    w.write_action_cache(16);
    let settlement = w.build(&[], 0).await;
    assert_eq!(settlement.failed, 0, "{settlement:?}");
    assert_eq!(w.text("data").as_deref(), Some("data"));
    assert_eq!(w.text("large").as_deref(), Some("more than twenty bytes"));
    assert_eq!((w.text("other"), w.text("app")), (None, None));
}

#[tokio::test]
async fn the_execution_log_of_the_build_itself_says_what_the_action_cache_cannot() {
    const LOGGED: &str = "11111111-2222-3333-4444-555555555555";
    let mut w = World::new().await;
    let entries = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/execution_log/actions");
    let entries = fs::read(entries).unwrap();
    let log = w.f.dir.path().join("log");
    fs::write(&log, zstd::encode_all(&*entries, 3).unwrap()).unwrap();
    for (id, is_reported) in [("another", false), (LOGGED, true)] {
        w.again(id).await;
        let options = [("execution_log_compact_file", log.to_str().unwrap())];
        assert_eq!(w.build(&options, 0).await.failed, 0);
        timeout(PATIENCE, w.f.services.engine.done(&w.f.key))
            .await
            .expect("in time");
        let root = w.f.services.record.invocation(id).unwrap().root.unwrap();
        let path = ExecPath::new(&format!("{BIN}/link")).unwrap();
        let row = w.f.services.record.output(root, &path);
        let event = row.map(|row| row.event.to_string());
        assert_eq!(
            event.as_deref() == Some("execution_log"),
            is_reported,
            "{event:?}"
        );
    }
}

/// What the stream names, and does not ask for, it names rightly: the action cache may not know it, as that of an old
/// Bazel.
#[tokio::test]
async fn what_the_stream_names_without_asking_for_it_needs_no_action_cache() {
    let mut w = World::new().await;
    w.needs("data");
    let digest = w.f.cache.store().put("named");
    w.f.set("known", vec![output("data", &digest)], &[]).await;
    let completed = Completed {
        target: target("//:incomplete"),
        success: false,
        groups: vec![OutputGroup {
            name: "default".to_owned(),
            sets: vec!["known".to_owned()],
            incomplete: true,
            ..OutputGroup::default()
        }],
        directories: Vec::new(),
    };
    w.f.send(Event::Completed(completed)).await;
    let settlement = w.build(&[], 0).await;
    assert_eq!(settlement.failed, 0, "{settlement:?}");
    assert_eq!(w.text("data").as_deref(), Some("named"));
}

/// Its place and name are the rule's choice. That it is of this build shows in the manifest, which the build has made, or in
/// what an earlier build of the target had.
#[tokio::test]
async fn a_program_that_is_not_among_its_targets_outputs_is_found_by_its_manifest() {
    let now = SystemTime::now();
    let an_hour_ago = now - Duration::from_secs(3600);
    for (program, made, brought) in [
        ("hidden", an_hour_ago, true),
        ("deep/hidden.launcher", an_hour_ago, true),
        ("hiddenother.sh", an_hour_ago, false),
        ("hidden_test", an_hour_ago, false),
        ("hidden_test.sh", an_hour_ago, false),
        ("hidden.executable", now, true),
        ("hidden_/any.sh", now, true),
        ("some/deep/any.sh", now, true),
        ("of_another_package/any.sh", now, false),
        ("of_an_older_build", an_hour_ago, false),
    ] {
        let mut w = World::new().await;
        w.needs(program);
        w.needs("data");
        w.cached(program, "a program");
        w.cached("data", "data");
        w.write_action_cache(16);
        let other = w.exec_root().join("of_another_package");
        fs::create_dir(&other).unwrap();
        fs::write(other.join("BUILD"), "").unwrap();
        let manifest = w.at(&format!("{program}.runfiles_manifest"));
        fs::create_dir_all(manifest.parent().unwrap()).unwrap();
        fs::write(&manifest, std::mem::take(&mut w.manifest)).unwrap();
        let age = |time| fs::File::open(&manifest).unwrap().set_modified(time).unwrap();
        age(made);
        w.hidden("build", now).await;
        let settlement = w.build(&[], 0).await;
        assert_eq!(settlement.failed, 0, "{settlement:?}");
        let expected = brought.then_some("data");
        assert_eq!(w.text("data").as_deref(), expected, "{program}");
        assert_eq!(w.text(program).is_some(), brought, "{program}");

        // Bazel leaves the manifest as it is, and would bring again what was deleted.
        age(an_hour_ago);
        if brought {
            fs::remove_file(w.at("data")).unwrap();
        }
        w.again("b").await;
        w.hidden("build", now).await;
        w.build(&[], 0).await;
        assert_eq!(w.text("data").as_deref(), expected, "{program}, once more");
    }
}

/// The program is not the test's own, whose runfiles stay remote.
#[tokio::test]
async fn a_program_beside_a_test_comes_with_its_runfiles() {
    let now = SystemTime::now();
    let mut w = World::new().await;
    w.needs("hidden.executable");
    w.needs("data");
    w.cached("hidden.executable", "a program");
    w.cached("data", "data");
    w.write_action_cache(16);
    let manifest = w.at("hidden.executable.runfiles_manifest");
    fs::write(&manifest, std::mem::take(&mut w.manifest)).unwrap();
    w.hidden("test", now).await;
    w.f.send(Event::Configured {
        label: "//:app".to_owned(),
        kind: "sh_test rule".to_owned(),
        completions: Vec::new(),
    })
    .await;
    w.build(&[], 0).await;
    assert_eq!(w.text("data").as_deref(), Some("data"));
    assert_eq!(w.text("hidden.executable").as_deref(), Some("a program"));
}

/// A group of files hands a program on, and does not build its runfiles: the manifest is of an earlier build. Unless the
/// program's own target was asked for as well.
#[tokio::test]
async fn a_program_in_a_group_of_files_comes_without_its_runfiles() {
    for (is_asked, brought) in [(false, None), (true, Some("data"))] {
        let mut w = World::new().await;
        w.needs("data");
        w.needs("of_no_digest");
        w.cached("data", "data");
        w.write_action_cache(16);
        fs::create_dir(w.at("app_")).unwrap();
        fs::write(w.at("app_/run.runfiles_manifest"), &w.manifest).unwrap();
        w.manifest.clear();
        w.f.send(Event::Configured {
            label: "//:group".to_owned(),
            kind: "filegroup rule".to_owned(),
            completions: Vec::new(),
        })
        .await;
        let program = w.f.cache.store().put("a program");
        w.f.set("group", vec![output("app_/run", &program)], &[]).await;
        w.f.complete("//:group", &["group"]).await;
        if is_asked {
            w.f.complete("//:runner", &["group"]).await;
        }
        let settlement = if is_asked {
            w.build(&[], 0).await
        } else {
            w.f.send(finished(0)).await;
            w.f.finish().await;
            let settled = w.f.services.engine.settled(&w.f.key);
            timeout(PATIENCE, settled).await.expect("in time")
        };
        // It is not certain whose manifest this is: what is missing is reported, and fails nothing.
        assert_eq!(settlement.failed, 0, "{settlement:?}");
        assert_eq!(settlement.messages.is_empty(), !is_asked, "{settlement:?}");
        assert_eq!(w.text("data").as_deref(), brought);
        assert_eq!(w.text("app_/run").as_deref(), Some("a program"));
    }
}

/// Bazel names an alias by its own label, which may be in another package than the program, and in another repository.
#[tokio::test]
async fn a_program_that_is_asked_for_by_an_alias_comes_with_its_runfiles() {
    for (program, label) in [
        ("bazel-out/k8/bin/y/prog", "//x:tool"),
        ("bazel-out/k8/bin/external/r/y/prog", "//x:tool"),
        ("bazel-out/r/k8/bin/y/prog", "//x:tool"),
        ("bazel-out/r/k8/bin/y/prog", "@@r//y:prog"),
    ] {
        let mut w = World::new().await;
        w.needs("data");
        w.cached("data", "data");
        w.write_action_cache(16);
        let manifest = w.exec_root().join(format!("{program}.runfiles_manifest"));
        fs::create_dir_all(manifest.parent().unwrap()).unwrap();
        fs::write(manifest, &w.manifest).unwrap();
        w.manifest.clear();
        let digest = w.f.cache.store().put("a program");
        let file = File {
            path: program.into(),
            prefix_len: program.len() - "/y/prog".len(),
            content: Content::Blob(digest),
            uri: None,
        };
        w.f.set("tool", vec![file], &[]).await;
        w.f.complete(label, &["tool"]).await;
        w.f.send(finished(0)).await;
        w.f.finish().await;
        let settled = w.f.services.engine.settled(&w.f.key);
        let settlement = timeout(PATIENCE, settled).await.expect("in time");
        assert_eq!(settlement.failed, 0, "{program} {label}: {settlement:?}");
        assert_eq!(w.text("data").as_deref(), Some("data"), "{program} {label}");
    }
}

/// The alias has another package, and its events name no program.
#[tokio::test]
async fn a_program_that_no_event_names_is_found_beside_what_an_alias_of_its_target_has() {
    let mut w = World::new().await;
    w.needs("y/deep/any.sh");
    w.needs("data");
    w.cached("y/deep/any.sh", "a program");
    w.cached("data", "data");
    w.write_action_cache(16);
    let manifest = w.at("y/deep/any.sh.runfiles_manifest");
    fs::create_dir_all(manifest.parent().unwrap()).unwrap();
    fs::write(manifest, std::mem::take(&mut w.manifest)).unwrap();
    let file = File {
        path: format!("{BIN}/y/out.txt").into(),
        prefix_len: BIN.len(),
        content: Content::Blob(w.f.cache.store().put("an output")),
        uri: None,
    };
    w.f.set("tool", vec![file], &[]).await;
    w.f.complete("//x:tool", &["tool"]).await;
    let settlement = w.build(&[], 0).await;
    assert_eq!(settlement.failed, 0, "{settlement:?}");
    assert_eq!(w.text("y/out.txt").as_deref(), Some("an output"));
    assert_eq!(w.text("y/deep/any.sh").as_deref(), Some("a program"));
    assert_eq!(w.text("data").as_deref(), Some("data"));
}

/// Any mixture of what is needed, cached, there already, wrong and damaged: what is there stays as it is, what comes is
/// right, and whatever is missing in the end is counted.
#[tokio::test]
async fn random_runfiles_are_right_or_counted() {
    let number = |variable: &str| -> Option<u64> { std::env::var(variable).ok()?.parse().ok() };
    let cases = number("OUTHAUL_HOSTILE_CASES").unwrap_or(12);
    let first = number("OUTHAUL_HOSTILE_SEED").unwrap_or_else(|| rand::rng().random_range(0..1 << 32));
    for seed in first..first.saturating_add(cases) {
        eprintln!("OUTHAUL_HOSTILE_SEED={seed} OUTHAUL_HOSTILE_CASES=1");
        let mut random = StdRng::seed_from_u64(seed);
        let mut w = World::new().await;
        let mut expected = Vec::new();
        let mut must_fail = 0;
        for n in 0..random.random_range(0..12) {
            let name = match random.random_range(0..4) {
                0 => format!("pkg/{n}"),
                1 => format!("with space {n}"),
                _ => format!("{n}"),
            };
            w.needs(&name);
            let text = format!("text {n}");
            let is_there = random.random_range(0..4) == 0;
            if is_there {
                fs::create_dir_all(w.at(&name).parent().unwrap()).unwrap();
                fs::write(w.at(&name), "already there").unwrap();
                expected.push((name.clone(), "already there".to_owned()));
            }
            match random.random_range(0..4) {
                0 if !is_there => must_fail += 1,
                0 => {}
                1 => {
                    let below = format!("{name}.tree");
                    w.needs(&below);
                    w.cached_tree(&below, &[("x", &text), ("d/y", &text)]);
                    expected.push((format!("{below}/x"), text.clone()));
                    expected.push((format!("{below}/d/y"), text.clone()));
                    if random.random() {
                        fs::create_dir_all(w.at(&below)).unwrap();
                    }
                    if !is_there {
                        w.cached(&name, &text);
                        expected.push((name, text));
                    }
                }
                _ => {
                    w.cached(&name, &text);
                    if !is_there {
                        expected.push((name, text));
                    }
                }
            }
        }
        // Half of them are damaged, each in its own way.
        let is_damaged = random.random_range(0..2) == 0;
        if is_damaged {
            let file = if random.random() {
                &mut w.cache.actions
            } else {
                &mut w.cache.index
            };
            let at = random.random_range(0..file.len());
            if random.random() {
                file.truncate(at);
            } else {
                file[at] ^= 1 << random.random_range(0..8);
            }
        }
        w.write_action_cache(16);
        let settlement = w.build(&[], 0).await;
        let mut missing = 0;
        for (name, text) in &expected {
            match w.text(name) {
                Some(found) => assert!(found == *text || is_damaged, "{name}: {found:?}"),
                // The files have no checksum: of a tree whose directory is there, a damaged name can't be distinguished from one
                // that was made here.
                None if is_damaged && name.contains(".tree/") => {}
                None => missing += 1,
            }
        }
        for (name, text) in expected.iter().filter(|(_, text)| text == "already there") {
            assert_eq!(w.text(name).as_ref(), Some(text));
        }
        if is_damaged {
            // A name may have become another one; but then it has the same bytes, and what is missing is reported.
            assert!(missing == 0 || settlement.failed > 0, "{settlement:?}");
        } else {
            assert_eq!((settlement.failed, missing), (must_fail, 0), "{settlement:?}");
        }
    }
}
