//! Artifacts of a build, staged here and on a machine that never ran it.

use std::path::{Path, PathBuf};

use crate::harness::{Daemon, Outhaul, Scratch, Stage, Tree, Version};

for_each_bazel!(real with 4 rarely:
    a_builds_artifacts_are_staged_here_and_elsewhere_and_its_secrets_stay,
    archives_of_a_build_are_unpacked_where_they_are_staged,
);

const SECRET: &str = "pl4nted-s3cr3t";

fn a_builds_artifacts_are_staged_here_and_elsewhere_and_its_secrets_stay(stage: &Stage) {
    let cache = stage.cache();
    let mut daemon = Daemon::with(&[&format!("--remote-cache={}", cache.url()), "--download=minimal"]);
    let bazel = stage.bazel(&cache);
    let targets = [
        "//gen/...",
        "//rules:nested",
        "//rules:hollow",
        "//rules:link",
        "//tests:pass",
    ];
    let secret = |flag: &str| format!("--{flag}{SECRET}");
    let mut flags = vec![
        daemon.bes(),
        secret("remote_header=x-token="),
        secret("action_env=MY_KEY="),
        secret("test_env=MY_KEY="),
        secret("define=MY_PASSWORD="),
        // What a build prints is in its events as well.
        "--announce_rc".to_owned(),
    ];
    if bazel.version() == Version::Seven {
        flags.push(secret("bes_header=x-token="));
        flags.push(secret("remote_cache_header=x-token="));
    }
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(targets).collect();
    bazel.test(&flags).ok();
    let bin = bazel.bin();
    let build = |name: &str| bin.only(|path| path.starts_with(name)).without_runfiles();
    let (top, nested) = (build("gen/top.txt"), build("rules/nested.d"));
    assert_eq!(top.files().len() + nested.files().len(), 6);
    let below = bazel.path("bazel-bin").canonicalize().unwrap();
    let below = below.strip_prefix(bazel.exec_root()).unwrap().to_owned();
    // Cold: what the build had on its own disk is gone.
    bazel.clean();

    let dir = Scratch::new("staged");
    let to = |name: &str| dir.join(name).display().to_string();
    let workspace = bazel.workspace();
    let staged = |root: &str| Tree::of(&Path::new(root).join(&below));
    // Two that overlap, at once.
    let (first, second) = (to("here"), to("here"));
    let both = [
        vec!["--to", &first, "//gen:top", "//rules/..."],
        vec!["--to", &second, "//rules:nested", "//tests:pass"],
    ]
    .map(|args| daemon.outhaul().start(workspace, "stage", &args));
    for running in both {
        running.wait().ok();
    }
    let tree = staged(&first);
    for expected in [&top, &nested] {
        let found = tree.only(|path| expected.0.contains_key(path));
        assert_eq!(expected.differences(&found), Vec::<String>::new());
    }
    assert!(Path::new(&first).join(&below).join("rules/hollow.d").is_dir());
    assert_eq!(logs(Path::new(&first)), 1, "{first}");
    is_staged(&first, &[]);

    let no_match = daemon
        .outhaul()
        .run(workspace, "stage", &["--to", &to("none"), "//gen:no_such"])
        .expect(3);
    assert!(no_match.err.contains("//gen:no_such"), "{no_match}");
    let file = to("build.outhaul");
    daemon.outhaul().run(workspace, "export", &["-o", &file]).ok();
    let journals = |outhaul: &Outhaul| -> Vec<Vec<u8>> {
        let entries = std::fs::read_dir(outhaul.state_dir().join("journal")).unwrap();
        let files: Vec<PathBuf> = entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "settled"))
            .collect();
        let read = |path: &PathBuf| zstd::decode_all(std::fs::File::open(path).unwrap()).unwrap();
        files.iter().map(read).collect()
    };
    assert!(
        journals(daemon.outhaul()).iter().any(|bytes| has(bytes, SECRET)),
        "it was planted"
    );
    daemon.terminate();

    // Elsewhere: another state directory, and nothing of the output tree.
    let elsewhere = Outhaul::new();
    elsewhere.run(dir.path(), "import", &[&file]).ok();
    for bytes in journals(&elsewhere) {
        let at = bytes
            .windows(SECRET.len())
            .position(|window| window == SECRET.as_bytes());
        let around = at.map(|at| String::from_utf8_lossy(&bytes[at.saturating_sub(200)..at]).into_owned());
        assert_eq!(around, None, "it has come along");
    }
    assert!(
        journals(&elsewhere)
            .iter()
            .any(|bytes| has(bytes, "digest_function") || has(bytes, "remote_cache"))
    );
    let there = to("there");
    elsewhere
        .run(
            dir.path(),
            "stage",
            &["--to", &there, "--", "//...", "-//rules:link"],
        )
        .ok();
    let tree = staged(&there);
    for expected in [&top, &nested] {
        let found = tree.only(|path| expected.0.contains_key(path));
        assert_eq!(expected.differences(&found), Vec::<String>::new());
    }
    is_staged(&there, &[]);
    assert!(
        !bazel.has("bazel-bin/gen/top.txt"),
        "the output tree is not touched"
    );
}

pub(crate) fn is_staged(to: &str, wish: &[&str]) {
    let program = std::env::var_os("OUTHAUL_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_outhaul").into());
    let status = std::process::Command::new(program)
        .args(["is-staged", "--to", to])
        .args(wish)
        .status()
        .unwrap();
    assert!(status.success(), "{to}");
}

fn has(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// How many files below are called `test.log`.
fn logs(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => logs(&entry.path()),
            _ => usize::from(entry.file_name() == "test.log"),
        })
        .sum()
}

fn archives_of_a_build_are_unpacked_where_they_are_staged(stage: &Stage) {
    let cache = stage.cache();
    let mut daemon = Daemon::with(&[&format!("--remote-cache={}", cache.url()), "--download=minimal"]);
    let bazel = stage.bazel(&cache);
    let package = bazel.workspace().join("packed");
    std::fs::create_dir(&package).unwrap();
    let rule = |content: &str| {
        format!(
            r#"
genrule(
    name = "packed",
    outs = ["sdk.tar.gz", "notes.txt"],
    cmd = """
mkdir -p in/lib && echo '{content}' > in/lib/a && echo b > in/b && ln -s lib/a in/link
tar -czf $(location sdk.tar.gz) -C in . && echo notes > $(location notes.txt)
""",
)
"#
        )
    };
    let build = |content: &str| {
        bazel.write("packed/BUILD", &rule(content));
        bazel.build(&[&*daemon.bes(), "//packed"]).ok();
    };
    build("one");
    let below = bazel.path("bazel-bin").canonicalize().unwrap();
    let below = below.strip_prefix(bazel.exec_root()).unwrap().to_owned();
    bazel.clean();
    let dir = Scratch::new("unpacked");
    let (plain, flat) = (dir.join("plain"), dir.join("flat"));
    let stage_to = |to: &Path, flags: &[&str]| {
        let to = to.display().to_string();
        let args = [&["--to", &*to, "--json", "//packed"], flags].concat();
        let ran = daemon.outhaul().run(bazel.workspace(), "stage", &args).ok();
        is_staged(&to, &[]);
        ran
    };
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    stage_to(&plain, &["--extract"]);
    stage_to(&flat, &["--extract", "--flatten"]);
    let there = plain.join(&below).join("packed");
    for packed in [&there, &flat] {
        assert_eq!(read(&packed.join("sdk/lib/a")), "one\n");
        assert_eq!(read(&packed.join("sdk/link")), "one\n");
        assert_eq!(read(&packed.join("notes.txt")), "notes\n");
        assert!(!packed.join("sdk.tar.gz").exists());
    }
    // A second time, nothing is downloaded.
    let ran = stage_to(&plain, &["--extract"]);
    let present = ran
        .json()
        .iter()
        .filter(|line| line["outcome"] == "present")
        .count();
    assert_eq!(present, 2, "{ran}");
    // And after another build, what it says.
    build("two");
    bazel.clean();
    stage_to(&plain, &["--extract"]);
    assert_eq!(read(&there.join("sdk/lib/a")), "two\n");
    // As it is, in another place of the same directory.
    stage_to(&plain, &[]);
    assert!(there.join("sdk.tar.gz").is_file());
    daemon.terminate();
}
