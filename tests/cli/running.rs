//! `outhaul run`, in front of a Bazel of a few lines, and in front of other programs.

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use outhaul_testkit::{Ran, Running, cache::EmbeddedCache, clean, finish, until};
use rustix::process::Signal;

use crate::{
    control::stall,
    support::{World, googles_account, outhaul, program},
};

/// A Bazel that reports its options as a real one does, the rc file's first, and writes down how it was called. With
/// `CODES`, its calls end with one after the other. With `WAITS`, it goes on until there is a file `go`, as one that heeds
/// no signal while its last event is not acknowledged. With `ELSEWHERE`, its output base is not to be seen from here.
const BAZEL: &str = r#"#!/bin/bash
here=${BASH_SOURCE%/*}
[ "$1" = --version ] && { echo "bazel $VERSION"; exit; }
list=$RC
for arg; do case "$arg" in
  --build_event_json_file=*) file=${arg#*=}; list="$list,\"$arg\"" ;;
  --*) list="$list,\"$arg\"" ;;
esac; done
if [ -n "$file" ]; then
  echo asked >> "$here/asked"
  [ -n "$SILENT" ] && exit 2
  case "$list" in *--unknown*) echo "ERROR: --unknown :: Unrecognized option: --unknown" >&2; exit 2 ;; esac
  [ -n "$ELSEWHERE" ] || mkdir -p "$BASE/server"
  echo "{\"optionsParsed\":{\"startupOptions\":[\"--output_base=$BASE\"],\"cmdLine\":[${list#,}]}}" > "$file"
  exit 2
fi
case "$list" in *--unknown*) exit 2 ;; esac
[ -n "$WAITS" ] && trap '' TERM
for arg; do printf '<%s>' "$arg"; done >> "$here/calls"
echo >> "$here/calls"
echo "$PATH|$OUTHAUL_RUN" >> "$here/environment"
[ -n "$WAITS" ] && until [ -e "$here/go" ]; do sleep 0.05; done
codes=($CODES)
exit ${codes[$(wc -l < "$here/calls") - 1]:-${CODE:-0}}
"#;

/// A directory with programs, and the variables that the fake Bazel goes by.
pub struct Place {
    dir: tempfile::TempDir,
    variables: Vec<(&'static str, String)>,
    args: Vec<String>,
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("bin")).unwrap();
        let place = Self {
            dir,
            variables: vec![("VERSION", "7.7.1".to_owned())],
            args: Vec::new(),
        };
        place.program("bazel", BAZEL);
        place
    }

    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        self.variables.push((name, value.to_owned()));
        self
    }

    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    pub fn bin(&self) -> PathBuf {
        self.dir.path().join("bin")
    }

    pub fn program(&self, name: &str, text: &str) -> String {
        let path = self.bin().join(name);
        program(&path, text);
        path.display().to_string()
    }

    fn path(&self) -> String {
        format!("{}:/usr/bin:/bin", self.bin().display())
    }

    pub fn path_of(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        self.calling("run", words)
    }

    /// A command of ours that is about a command.
    pub fn calling(&self, name: &str, words: &[&str]) -> Command {
        let mut command = outhaul();
        command
            .arg(name)
            .args(&self.args)
            .arg("--")
            .args(words)
            .current_dir(self.dir.path())
            .env("PATH", self.path())
            .env("HOME", self.dir.path())
            .env("BASE", self.dir.path().join("base"))
            .envs(self.variables.iter().map(|(name, value)| (*name, value)));
        command
    }

    async fn run(&self, words: &[&str]) -> Ran {
        finish(self.command(words)).await
    }

    pub fn lines(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.bin().join(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// How the Bazel was called, its listener's port left out.
    fn calls(&self) -> Vec<String> {
        let port = regex::Regex::new("grpc://127.0.0.1:[0-9]+>").unwrap();
        let calls = self.lines("calls");
        calls
            .iter()
            .map(|call| port.replace_all(call, "grpc://OURS>").into_owned())
            .collect()
    }
}

const OURS: &str = "<--bes_backend=grpc://OURS>";

#[tokio::test(flavor = "multi_thread")]
async fn flags_stand_last_whatever_the_rc_files_say() {
    let world = World::new().await;
    let cache = format!("\"--remote_cache={}\"", world.cache.endpoint());
    for (rc, more) in [
        ("", ""),
        (
            "\"--config=ci\",\"--bes_upload_mode=nowait_for_upload_complete\"",
            "",
        ),
        (
            "\"--bes_timeout=30s\",\"--bes_header=a=b\",\"--bes_keywords=k\"",
            "",
        ),
        (
            "\"--bes_backend=grpc://127.0.0.1:1\",\"--bes_proxy=unix:/x\"",
            "<--bes_proxy=>",
        ),
        ("\"--bes_backend=\"", ""),
        (&*cache, "<--remote_download_minimal>"),
        // This Bazel is a script, and `run` does not wait before its next line.
        (&*format!("{cache},\"--bes_upload_mode=fully_async\""), ""),
        (
            &*format!("{cache},\"--remote_download_toplevel\""),
            "<--remote_download_minimal>",
        ),
        (&*format!("{cache},\"--remote_download_all\""), ""),
        (
            &*format!("{cache},\"--disk_cache=/d\""),
            "<--remote_download_minimal>",
        ),
        // Nobody is there: nothing is uploaded, nor taken from Bazel.
        (
            "\"--remote_cache=http://127.0.0.1:1\"",
            "<--experimental_build_event_upload_strategy=local>",
        ),
    ] {
        let place = Place::new().with("RC", rc).with("CODE", "1");
        let ran = place
            .run(&["bazel", "build", "//a", "--config=late", "--", "-//b"])
            .await
            .expect(1);
        let expected = format!("<build><//a><--config=late>{OURS}{more}<--><-//b>");
        assert_eq!(place.calls(), [expected], "{rc}");
        ran.says(1, &["received no events of `bazel build`"]);
    }
}

/// Bazel builds on without a cache that goes away in the middle, but for what it uploads for our events.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_goes_away_fails_no_build_because_of_our_events() {
    let world = World::new().await;
    let cache = format!("\"--remote_cache={}\"", world.cache.endpoint());
    let executor = format!("{cache},\"--remote_executor={}\"", world.cache.endpoint());
    for (rc, codes, calls, code) in [
        (&cache, "38", 2, 0),
        (&cache, "38 1", 2, 1),
        (&cache, "38 34", 3, 0),
        (&cache, "38 34 1", 3, 1),
        (&executor, "38 34", 2, 34),
    ] {
        let place = Place::new().with("RC", rc).with("CODES", codes);
        place.run(&["bazel", "build", "//a"]).await.expect(code);
        let called = place.calls();
        assert_eq!(called.len(), calls, "{codes}: {called:?}");
        let uncached = called.iter().filter(|call| call.contains("<--remote_cache=>"));
        assert_eq!(uncached.count(), calls.saturating_sub(2), "{codes}: {called:?}");
    }
}

/// What is missing after tests have run is brought without running them again. No event came here, so all is missing.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_after_tests_is_brought_without_running_them_again() {
    let world = World::new().await;
    let cache = format!("\"--remote_cache={}\"", world.cache.endpoint());
    let tests_only = format!("{cache},\"--build_tests_only\"");
    for (word, rc, codes, calls, code) in [
        ("test", &cache, "0 4", 2, 0),
        ("coverage", &cache, "0 4", 2, 0),
        ("test", &cache, "0 1 4", 3, 0),
        ("test", &cache, "0 36", 2, 0),
        ("test", &tests_only, "0", 1, 0),
        ("test", &cache, "3 4", 2, 3),
        ("test", &cache, "2", 1, 2),
        ("test", &cache, "0 137", 2, 137),
        ("run", &cache, "0", 1, 0),
    ] {
        let place = Place::new().with("RC", rc).with("CODES", codes);
        let ran = place.run(&["bazel", word, "//a"]).await;
        // It is unknown which tests' files there should be.
        let is_said = ran.err.contains("some outputs are still missing");
        assert_eq!(is_said, calls > 1 && code != 137, "{word} {codes}: {}", ran.err);
        ran.expect(code);
        let called = place.calls();
        assert_eq!(called.len(), calls, "{word} {codes}: {called:?}");
        assert!(called[0].contains("<--remote_download_minimal>"), "{called:?}");
        for (number, call) in called.iter().enumerate() {
            let runs_none = "<--test_tag_filters=outhaul-runs-no-tests><--nobuild_tests_only>";
            assert_eq!(call.contains(runs_none), number > 0, "{word} {codes}: {call}");
            assert_eq!(
                call.contains("<--disk_cache=>"),
                number > 1,
                "{word} {codes}: {call}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_known_leaves_bazels_mode_alone() {
    let world = World::new().await;
    let cache = format!("\"--remote_cache={}\"", world.cache.endpoint());
    let own = format!("<build><//a>{OURS}");
    let place = Place::new().with("RC", &cache).with("SILENT", "1");
    let ran = place.run(&["bazel", "build", "//a"]).await;
    ran.says(0, &["failed to determine Bazel's options"]);
    // Our port may be out of its reach, too, which must not fail it.
    let waits_not = "<--bes_upload_mode=nowait_for_upload_complete>";
    assert_eq!(place.calls(), [format!("{own}{waits_not}")]);
    let uploads_nothing = "<--experimental_build_event_upload_strategy=local>";
    for (version, rc, more) in [
        ("no_version", "", String::new()),
        // These upload what their events name, which must fail nothing, and what they were told not to.
        ("6.5.0", "", waits_not.to_owned()),
        ("4.2.3", "", waits_not.to_owned()),
        (
            "4.2.3",
            ",\"--noremote_upload_local_results\"",
            format!("{uploads_nothing}{waits_not}"),
        ),
        ("4.2.3", ",\"--build_event_json_file=/x\"", String::new()),
    ] {
        let rc = format!("{cache}{rc}");
        let place = Place::new().with("RC", &rc).with("VERSION", version);
        place.run(&["bazel", "build", "//a"]).await.expect(0);
        assert_eq!(place.calls(), [format!("{own}{more}")], "{version} {rc}");
    }
    let gone = "\"--remote_cache=grpc://127.0.0.1:1\"";
    let place = Place::new().with("RC", gone);
    let ran = place.run(&["bazel", "build", "//a"]).await;
    ran.says(0, &["Bazel downloads outputs itself", "127.0.0.1:1"]);
    // It takes no logs either, which must not fail the command.
    assert_eq!(place.calls(), [format!("{own}{uploads_nothing}")]);
    // Every user may write there.
    let place = Place::new().with("RC", &cache);
    let base = place.dir.path().join("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o777)).unwrap();
    let ran = place.run(&["bazel", "build", "//a"]).await;
    ran.says(
        0,
        &["Bazel downloads outputs itself", "mode 0777", "--allow-exec-root"],
    );
    assert_eq!(place.calls(), [own.as_str()]);
    // Bazel has its output tree in another mount namespace, where we bring nothing.
    let place = Place::new().with("RC", &cache).with("ELSEWHERE", "1");
    let ran = place.run(&["bazel", "build", "//a"]).await;
    ran.says(
        0,
        &[
            "Bazel downloads outputs itself",
            "sees no output base",
            "--path-map",
        ],
    );
    assert_eq!(place.calls(), [own.as_str()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn events_that_cannot_be_forwarded_are_left_to_bazel() {
    for (rc, part) in [
        (
            "\"--bes_backend=grpcs://h\",\"--bes_proxy=unix:/x\"",
            "--bes_proxy=unix:/x",
        ),
        ("\"--bes_backend=ftp://h\"", "ftp://h"),
        (
            "\"--bes_backend=grpcs://h\",\"--tls_certificate=/no/such/file\"",
            "/no/such/file",
        ),
    ] {
        let place = Place::new().with("RC", rc);
        place
            .run(&["bazel", "test", "//a"])
            .await
            .says(0, &[part, "downloads nothing"]);
        assert_eq!(place.calls(), ["<test><//a>"], "{rc}");
        let strict = Place::new().with("RC", rc).arg("--strict");
        strict.run(&["bazel", "test", "//a"]).await.expect(45);
    }
    let helped = Place::new().with("RC", "\"--credential_helper=/h\"");
    helped.run(&["bazel", "test", "//a"]).await.expect(0);
    let call = helped.calls().remove(0);
    let start = format!("<test><//a>{OURS}<--credential_helper=127.0.0.1=/");
    assert!(
        call.starts_with(&start) && call.ends_with("no-credentials>"),
        "{call}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn googles_credentials_are_for_the_cache_and_not_for_us() {
    let cache = EmbeddedCache::builder().required_header("authorization", "Bearer t0ken");
    let world = World::with(cache, "").await;
    let place = Place::new();
    let file = place.dir.path().join("account.json");
    let account = googles_account(r#"{"access_token":"t0ken","expires_in":3600}"#).await;
    std::fs::write(&file, account).unwrap();
    let rc = format!(
        "\"--remote_cache={}\",\"--google_credentials={}\"",
        world.cache.endpoint(),
        file.display()
    );
    let place = place.with("RC", &rc);
    place.run(&["bazel", "build", "//a"]).await.expect(0);
    // The cache is at 127.0.0.1, too, where the helper must not take Bazel's credentials away.
    let call = place.calls().remove(0);
    let expected = "^<build><//a><--bes_backend=grpc://localhost:[0-9]+><--credential_helper=localhost=/[^>]+\
                    no-credentials><--remote_download_minimal>$";
    assert!(regex::Regex::new(expected).unwrap().is_match(&call), "{call}");
    // One that cannot be read costs nothing but itself, and is named if the cache refuses us.
    std::fs::remove_file(&file).unwrap();
    let ran = place.run(&["bazel", "build", "//a"]).await;
    ran.says(0, &["Bazel downloads outputs itself", "--google-credentials="]);
    let older = place.with("VERSION", "6.5.0");
    let ran = older.run(&["bazel", "test", "//a"]).await;
    ran.says(0, &["Google", "downloads nothing"]);
    assert_eq!(older.calls().pop().unwrap(), "<test><//a>");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_of_the_build_comes_before_our_own_and_that_is_said() {
    let place = Place::new()
        .with("RC", "\"--bes_backend=grpc://127.0.0.1:1\"")
        .arg("--bes-backend=grpc://127.0.0.1:2")
        .arg("--bes-header=a=b");
    let ran = place.run(&["bazel", "build", "//a"]).await;
    ran.says(0, &["grpc://127.0.0.1:1, not to --bes-backend"]);
    assert_eq!(place.calls(), [format!("<build><//a>{OURS}")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_build_nothing_and_programs_that_are_no_bazel_run_as_they_are() {
    let place = Place::new();
    for words in [
        &["bazel"][..],
        &["bazel", "info"],
        &["bazel", "query", "build"],
        &["bazel", "--output_base", "build", "shutdown"],
    ] {
        let ran = place.run(words).await.expect(0);
        assert_eq!(ran.err, "", "{words:?}");
    }
    assert_eq!(
        place.calls(),
        ["", "<info>", "<query><build>", "<--output_base><build><shutdown>"]
    );
    assert_eq!(place.lines("asked"), Vec::<String>::new());
    for name in ["make", "bazel-ci.sh", "bazel-remote"] {
        let program = place.program(name, "#!/bin/sh\nprintf '<%s>' \"$@\"\nexit 7\n");
        let ran = place.run(&[&program, "build", "//a"]).await;
        let ran = ran.says(
            7,
            &["did not run a Bazel build that outhaul could see", "tools/bazel"],
        );
        assert_eq!(ran.out(), "<build><//a>");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bazels_below_a_wrapped_program_are_heard_with_the_environment_that_they_would_have() {
    let place = Place::new().with("CODE", "3");
    let script = "bazel build //a; env X=1 bazel --batch test //b -- -//c & wait; bazel info; bazelisk build; \
                  env -i PATH=\"$PATH\" bazel build //d";
    let ran = place.run(&["sh", "-c", script]).await.expect(0);
    assert!(
        ran.err.contains("bazelisk: not found"),
        "no other Bazel than those that there are: {}",
        ran.err
    );
    let mut calls = place.calls();
    calls.sort();
    assert_eq!(
        calls,
        [
            format!("<--batch><test><//b>{OURS}<--><-//c>"),
            format!("<build><//a>{OURS}"),
            format!("<build><//d>{OURS}"),
            "<info>".to_owned(),
        ]
    );
    assert_eq!(place.lines("asked").len(), 3);
    for environment in place.lines("environment") {
        assert_eq!(environment, format!("{}|", place.path()));
    }
    assert_eq!(
        ran.err.matches("received no events of `bazel").count(),
        3,
        "{}",
        ran.err
    );
    // Called by its path, and with variables that no shell would hand on.
    let odd = Place::new();
    let bazel =
        "#!/bin/bash\ntr '\\0' '\\n' < /proc/$$/environ | grep '^a.b=' >> ${BASH_SOURCE%/*}/odd\nexit 0\n";
    odd.program("bazel", bazel);
    let script = "env a.b=c $(command -v bazel) info; env -i a.b=d $(command -v bazel) info";
    odd.run(&["sh", "-c", script]).await.expect(0);
    assert_eq!(odd.lines("odd"), ["a.b=c", "a.b=d"]);
    let strict = Place::new().arg("--strict");
    strict.run(&["sh", "-c", "bazel build //a"]).await.expect(45);
    // It is looked whether Bazel knows an option.
    let looking = Place::new().arg("--strict");
    let ran = looking
        .run(&["sh", "-c", "bazel build --unknown //a; echo $?"])
        .await
        .expect(0);
    assert_eq!((ran.out().trim(), &*ran.err), ("2", ""));
    let alone = Place::new().arg("--strict");
    alone.run(&["bazel", "build", "--unknown", "//a"]).await.expect(2);
    let failing = Place::new().arg("--strict");
    failing
        .run(&["sh", "-c", "bazel build //a; exit 9"])
        .await
        .expect(9);
    let none = Place::new().arg("--strict");
    none.run(&["true"]).await.expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_below_another_one_hears_its_own_bazel() {
    let place = Place::new();
    let outer = "\"$0\" run --strict -- bazel build //a; echo inner $?";
    let ran = place
        .run(&["sh", "-c", outer, env!("CARGO_BIN_EXE_outhaul")])
        .await
        .expect(0);
    assert_eq!(ran.out(), "inner 45\n", "the fake one sends nothing");
    assert_eq!(place.calls(), [format!("<build><//a>{OURS}")]);
    assert_eq!(place.lines("environment"), [format!("{}|", place.path())]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_lets_bazel_go_and_a_command_whose_outputs_are_missing_fails() {
    let world = World::new().await;
    stall(&world);
    for (words, code) in [
        (&["bazel", "build", "//a"][..], 8),
        (&["sh", "-c", "trap '' TERM; bazel build //a"], 143),
    ] {
        let place = Place::new().with("WAITS", "yes").arg(&world.cache_flag());
        let run = Running::start(place.command(words));
        until("Bazel runs", async || !place.lines("calls").is_empty()).await;
        let call = place.lines("calls").remove(0);
        let (_, address) = call.split_once("--bes_backend=").unwrap();
        let (address, _) = address.split_once('>').unwrap();
        // Its last event is not acknowledged before its outputs are there, which would be never. (What a shell starts in the
        // background ignores SIGINT, and so may this test's processes.)
        run.signal(Signal::TERM);
        world.play(&world.build, address).await;
        std::fs::write(place.bin().join("go"), "").unwrap();
        let ran = tokio::task::spawn_blocking(|| run.wait()).await.unwrap();
        ran.says(code, &["interrupted by a signal before", "build again"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outer_run_knows_what_became_of_an_inner_one() {
    let ours = env!("CARGO_BIN_EXE_outhaul");
    for (inner, seen) in [
        ("\"$0\" run -- bazel build //a", true),
        ("\"$0\" run -- sh -c 'bazel build //a'", true),
        ("\"$0\" run -- \"$0\" run -- bazel build //a", true),
        ("\"$0\" run -- bazel info", false),
    ] {
        for (args, code) in [(&[][..], 0), (&["--strict"], if seen { 45 } else { 0 })] {
            let place = Place::new();
            let place = args.iter().fold(place, |place, arg| place.arg(arg));
            // Whatever code the inner one ends with.
            let script = format!("{inner}; true");
            let ran = place.run(&["sh", "-c", &script, ours]).await.expect(code);
            assert_eq!(
                ran.err.contains("did not run a Bazel build"),
                !seen,
                "{inner}: {ran}"
            );
            let said = ran.err.matches("received no events of `bazel").count();
            assert_eq!(said, usize::from(seen), "{inner}: {ran}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bazel_that_is_called_by_its_path_is_heard_through_tools_bazel() {
    let place = Place::new();
    let wrapper = concat!(env!("CARGO_MANIFEST_DIR"), "/dist/bazel/tools/bazel");
    let launcher = format!(
        "#!/bin/sh\nBAZEL_REAL={0}/bazel exec {wrapper} \"$@\"\n",
        place.bin().display()
    );
    let launcher = place.program("launcher", &launcher);
    place
        .run(&["sh", "-c", &format!("{launcher} build //a")])
        .await
        .expect(0);
    assert_eq!(place.calls(), [format!("<build><//a>{OURS}")]);
    assert_eq!(place.lines("environment"), [format!("{}|", place.path())]);
}

/// As CMake and configure scripts write down where they have found it.
#[tokio::test(flavor = "multi_thread")]
async fn a_bazel_whose_place_was_noted_is_there_after_the_run() {
    let place = Place::new();
    let noted = place.bin().join("noted");
    let note = format!("command -v bazel > {}", noted.display());
    place.run(&["sh", "-c", &note]).await.expect(0);
    let bazel = std::fs::read_to_string(&noted).unwrap();
    let bazel = bazel.trim();
    assert!(!bazel.starts_with(&place.bin().display().to_string()), "{bazel}");
    // Without a run, and in another one.
    let mut command = clean(Command::new(bazel));
    command.args(["build", "//a b"]).env("PATH", place.path());
    let ran = finish(command).await.expect(0);
    assert_eq!(ran.err, "");
    place.run(&[bazel, "build", "//b"]).await.expect(0);
    let within = format!("{bazel} build //c");
    place.run(&["sh", "-c", &within]).await.expect(0);
    assert_eq!(
        place.calls(),
        [
            "<build><//a b>".to_owned(),
            format!("<build><//b>{OURS}"),
            format!("<build><//c>{OURS}")
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_runs_in_poor_environments() {
    let place = Place::new().with("CODE", "5");
    let full = tempfile::tempdir().unwrap();
    let nowhere = full.path().join("none");
    let unwritable = Path::new("/proc/self");
    for (home, temp, said) in [
        (None, None, "is not recorded for later commands"),
        (
            Some(Path::new("/dev/null/x")),
            None,
            "is not recorded for later commands",
        ),
        (Some(unwritable), None, "is not recorded for later commands"),
        (None, Some(&*nowhere), "running the command without outhaul"),
        (
            Some(unwritable),
            Some(unwritable),
            "running the command without outhaul",
        ),
    ] {
        let mut command = place.command(&["bazel", "build", "//a"]);
        match home {
            Some(home) => command.env("HOME", home),
            None => command.env_remove("HOME"),
        };
        if let Some(temp) = temp {
            command.env("TMPDIR", temp);
        }
        finish(command).await.says(5, &[said]);
    }
    assert_eq!(place.calls().len(), 5);
    let heard = place.calls().iter().filter(|call| call.contains(OURS)).count();
    assert_eq!(heard, 3, "{:?}", place.calls());
    // Nothing is made where the command runs.
    std::fs::create_dir(place.dir.path().join("relative")).unwrap();
    for temp in ["", "relative"] {
        let script = "ls . relative; case $PATH in /*) ;; *) exit 9 ;; esac";
        let mut command = place.command(&["sh", "-c", script]);
        command.env("TMPDIR", temp);
        let ran = finish(command).await.expect(0);
        assert!(!ran.out().contains("outhaul-run"), "{}", ran.out());
    }
    // The state directory serves where the temporary one is full.
    let mut command = place.command(&["bazel", "build", "//a"]);
    command.env("TMPDIR", &nowhere);
    finish(command).await.says(5, &["received no events of"]);
    let mut few = clean(Command::new("sh"));
    let line = format!(
        "ulimit -n 64; exec {} run -- bazel build //a",
        env!("CARGO_BIN_EXE_outhaul")
    );
    few.args(["-c", &line])
        .env("PATH", place.path())
        .env("HOME", place.dir.path());
    few.env("CODE", "5").current_dir(place.dir.path());
    finish(few).await.says(5, &["received no events of"]);
    // Files may not become long enough for the record.
    let mut short = clean(Command::new("sh"));
    short.args(["-c", &line.replace("-n 64", "-f 1")]);
    short.env("PATH", place.path()).env("HOME", place.dir.path());
    short.env("CODE", "5").current_dir(place.dir.path());
    let ran = finish(short).await;
    assert_eq!(ran.code, Some(5), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_are_wrong_are_still_errors() {
    let place = Place::new().arg("--hold=never");
    place.run(&["bazel", "build"]).await.says(2, &["--hold"]);
    assert!(place.calls().is_empty());
    let place = Place::new();
    let mut command = place.command(&["bazel", "build"]);
    command.env("OUTHAUL_REMOTE_CACHE", "ftp://x");
    finish(command).await.says(2, &["--remote-cache=ftp://x"]);
}
