//! Whether Bazel's own downloads may be taken away from it: only where everything that it would bring is sure to come
//! by us.

use std::{ops::RangeInclusive, path::Path};

use crate::{bep::event::CommandLine, transport::is_http};

/// The Bazels that tell in their events, and keep on their disks, what all of their own download mode needs. The action
/// caches of newer ones have other formats ([`crate::action_cache`]).
pub(in crate::cli) const KNOWN: RangeInclusive<u32> = 7..=8;

/// What counts for the decision, and is not among the options.
#[derive(Debug)]
pub(in crate::cli) struct Setting<'a> {
    /// Whether the user wants the mode left as it is.
    pub(in crate::cli) keep: bool,
    /// The command word.
    pub(in crate::cli) word: &'a str,
    /// Whether it can run again, should the cache lack what its results name.
    pub(in crate::cli) repeats: bool,
    /// Bazel's major version.
    pub(in crate::cli) version: Option<u32>,
    /// The options; or why they are not known.
    pub(in crate::cli) options: Result<&'a CommandLine, &'a str>,
    /// Whether the output tree may be written into; or why not.
    pub(in crate::cli) place: Result<(), String>,
    /// Whether the remote cache answers us; or why not.
    pub(in crate::cli) cache: Result<(), String>,
    /// Whether that is the build's own.
    pub(in crate::cli) is_builds_cache: bool,
    /// Whether Bazel's action cache may be read.
    pub(in crate::cli) reads_action_cache: bool,
    /// Whether whatever needs the outputs next waits until they are there.
    pub(in crate::cli) is_waited_for: bool,
}

/// Whether Bazel or Outhaul downloads.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::cli) enum Mode {
    /// We: Bazel is told to download nothing.
    Minimal,
    /// Bazel, as its user has it; the reason is nothing to complain of.
    Own(&'static str),
    /// The same, and the user should hear why nothing comes by us, or only what Bazel leaves.
    Unable(String),
}

/// Decides who downloads.
pub(in crate::cli) fn decide(setting: &Setting<'_>) -> Mode {
    if setting.keep {
        return Mode::Own("--keep-download-mode");
    }
    let options = match setting.options {
        Ok(options) => options,
        // Said when the command has ended, see `Host::faults`.
        Err(_) => return Mode::Own("Bazel's options are unknown"),
    };
    if let Err(reason) = &setting.place {
        return Mode::Unable(format!("Bazel downloads outputs itself: {reason}"));
    }
    if setting.version.is_none_or(|version| !KNOWN.contains(&version)) {
        return Mode::Own("this Bazel is older than 7 or newer than 8, or its version is unknown");
    }
    if !setting.reads_action_cache {
        return Mode::Own("--no-action-cache");
    }
    if !setting.is_waited_for {
        return Mode::Own("Bazel waits for its events not at all, or only so long");
    }
    if setting.word == "mobile-install" {
        return Mode::Own("mobile-install needs its outputs while it runs");
    }
    match options.download_mode() {
        Some("minimal") => return Mode::Own("the command downloads nothing anyway"),
        Some("toplevel") | None => {}
        Some(_) => return Mode::Own("the command asks for all outputs"),
    }
    if let Some(reason) = hides_outputs(options) {
        return Mode::Own(reason);
    }
    if !setting.repeats && !setting.is_builds_cache {
        return Mode::Own("outhaul reads another cache, which may lack what the build's own has");
    }
    // Without both, Outhaul does not learn all runfiles, or not their digests.
    for (name, reason) in [
        ("build_runfile_manifests", "no manifests name the runfiles"),
        ("use_action_cache", "no action cache has the digests of runfiles"),
    ] {
        if options.switch(name) == Some(false) {
            return Mode::Own(reason);
        }
    }
    let remote = options.remote_cache();
    let is_test = matches!(setting.word, "test" | "coverage");
    if remote.is_none() && options.given("disk_cache").is_none() {
        return Mode::Own("the command uses no cache");
    }
    if is_test && remote.is_none_or(|(_, url)| is_http(url)) {
        return Mode::Own("with an HTTP or disk cache, events name no digests of tests' files");
    }
    // Bazel asks a gRPC cache and its own disk cache for the results of actions whose outputs they have.
    if !setting.repeats && remote.is_some_and(|(_, url)| is_http(url)) {
        return Mode::Own("an HTTP cache may lack outputs of the results that it has");
    }
    if options.last("experimental_build_event_upload_strategy") == Some("local") {
        return Mode::Own("the events name local files");
    }
    if is_test && let Some(reason) = reads_test_files(setting, options) {
        return Mode::Own(reason);
    }
    if is_test && !zips_test_outputs(setting, options) {
        return Mode::Own("events do not name the undeclared outputs of tests");
    }
    match &setting.cache {
        Ok(()) => Mode::Minimal,
        Err(_) if remote.is_none() => Mode::Own("the disk cache is not there yet, or cannot be read"),
        Err(reason) => Mode::Unable(format!("Bazel downloads outputs itself: {reason}")),
    }
}

/// Whether Bazel waits until its stream is acknowledged to the end.
pub(super) fn waits(options: &CommandLine) -> bool {
    options
        .last("bes_upload_mode")
        .is_none_or(|mode| mode == "wait_for_upload_complete")
}

/// The same, however long that takes.
pub(in crate::cli) fn waits_for_all(options: &CommandLine) -> bool {
    waits(options) && options.bes_timeout().is_none()
}

/// Whether a cache is named that can be asked, and is reached as it is named.
pub(in crate::cli) fn names_a_cache(options: &CommandLine) -> bool {
    let is_named = options.remote_cache().is_some() || options.given("disk_cache").is_some();
    options.given("remote_proxy").is_none() && is_named
}

/// Why not all outputs are where events say, or none says where.
fn hides_outputs(options: &CommandLine) -> Option<&'static str> {
    [
        (
            "experimental_remote_output_service",
            "an output service provides the outputs",
        ),
        ("remote_proxy", "the remote cache is behind a proxy"),
        (
            "experimental_action_listener",
            "no event names the outputs of extra actions",
        ),
        (
            "remote_download_symlink_template",
            "outputs are symlinks into another file system",
        ),
    ]
    .into_iter()
    .find_map(|(name, reason)| options.given(name).map(|_| reason))
}

/// Why Bazel itself needs tests' files, or no event names some of them.
fn reads_test_files(setting: &Setting<'_>, options: &CommandLine) -> Option<&'static str> {
    if matches!(options.last("test_summary"), Some("detailed" | "testcase")) {
        return Some("Bazel reads the tests' reports for its summary");
    }
    // `coverage` brings them also in minimal mode.
    let is_on = |name| options.switch(name) == Some(true);
    (setting.word == "test"
        && is_on("collect_code_coverage")
        && is_on("experimental_fetch_all_coverage_outputs"))
    .then_some("no event names the coverage directories of tests")
}

/// Whether what tests leave comes as an archive, which events name. Without a word of the command: until Bazel 8.
fn zips_test_outputs(setting: &Setting<'_>, options: &CommandLine) -> bool {
    let name = "zip_undeclared_test_outputs";
    options.switch(name).unwrap_or(setting.version < Some(8))
}

/// The name of a build's exec root, if it can be told: `_main` with bzlmod, which Bazel has on by default as of 7; else that of the
/// workspace.
pub(super) fn exec_root(workspace: &Path, line: &CommandLine, version: Option<u32>) -> Option<String> {
    let has_bzlmod = line.switch("enable_bzlmod");
    if has_bzlmod.or(version.map(|version| version >= 7))? {
        return Some("_main".to_owned());
    }
    let files = ["WORKSPACE.bazel", "WORKSPACE"].map(|name| workspace.join(name));
    let text = files.iter().find_map(|file| std::fs::read_to_string(file).ok())?;
    let is_call = |line: &str| {
        let rest = line.trim_start().strip_prefix("workspace");
        rest.is_some_and(|rest| rest.trim_start().starts_with('('))
    };
    let calls = text.lines().position(is_call);
    let Some(at) = calls else {
        return Some("__main__".to_owned());
    };
    let call: String = text.lines().skip(at).collect();
    let (_, name) = call.split(')').next()?.split_once("name")?;
    let mut parts = name.split(['"', '\'']);
    (parts.next()?.trim() == "=").then_some(())?;
    parts.next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::{super::probe::Options, *};

    const CACHE: &str = "--remote_cache=grpc://h:1";

    fn decided(options: &[&str], change: impl FnOnce(&mut Setting<'_>)) -> Mode {
        let line = Options::of(options).line();
        let mut setting = Setting {
            keep: false,
            word: "build",
            repeats: true,
            version: Some(7),
            options: Ok(&line),
            place: Ok(()),
            cache: Ok(()),
            is_builds_cache: true,
            reads_action_cache: true,
            is_waited_for: true,
        };
        change(&mut setting);
        decide(&setting)
    }

    #[test]
    fn an_exec_root_has_the_name_of_the_workspace_but_with_bzlmod() {
        let dir = tempfile::tempdir().unwrap();
        let name = |options: &[&str], version| exec_root(dir.path(), &Options::of(options).line(), version);
        assert_eq!(name(&[], Some(7)).as_deref(), Some("_main"));
        assert_eq!(name(&["--enable_bzlmod"], Some(6)).as_deref(), Some("_main"));
        assert_eq!(name(&["--x"], None), None, "whether it has bzlmod is unknown");
        assert_eq!(name(&["--noenable_bzlmod"], Some(7)), None, "there is no file");
        for (text, expected) in [
            ("", Some("__main__")),
            ("load(\"x\", \"y\")\nworkspace(name = \"a_b\")\n", Some("a_b")),
            (
                "workspace(\n    name='c',\n    managed_directories = {},\n)\n",
                Some("c"),
            ),
            ("# workspace(name = \"no\")\n", Some("__main__")),
            (
                "workspace_rules(name = \"no\")\nworkspace (name = \"d\")\n",
                Some("d"),
            ),
            ("workspace(name = NAME)\nx(\"y\")\n", None),
        ] {
            std::fs::write(dir.path().join("WORKSPACE"), text).unwrap();
            assert_eq!(
                name(&["--noenable_bzlmod"], Some(7)).as_deref(),
                expected,
                "{text}"
            );
            assert_eq!(name(&["--x"], Some(4)).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn downloads_are_taken_over_only_where_all_of_them_are_sure_to_come() {
        for (options, taken) in [
            (vec![], false),
            (vec![CACHE], true),
            (vec!["--remote_executor=grpc://h:1"], true),
            (vec![CACHE, "--remote_cache="], false),
            (vec!["--remote_cache=http://h"], true),
            (vec!["--remote_cache=https://h/x", "--disk_cache=/d"], true),
            (vec!["--disk_cache=/d"], true),
            (vec!["--disk_cache="], false),
            (vec!["--remote_cache=http://h", "--remote_proxy=unix:/s"], false),
            (vec![CACHE, "--experimental_action_listener=//:x"], false),
            (vec![CACHE, "--remote_download_toplevel"], true),
            (vec![CACHE, "--remote_download_outputs=toplevel"], true),
            (vec![CACHE, "--remote_download_outputs=all"], false),
            (vec![CACHE, "--remote_download_all"], false),
            (
                vec![
                    CACHE,
                    "--remote_download_all",
                    "--remote_download_outputs=toplevel",
                ],
                true,
            ),
            (
                vec![
                    CACHE,
                    "--remote_download_outputs=toplevel",
                    "--remote_download_all",
                ],
                false,
            ),
            (vec![CACHE, "--remote_download_minimal"], false),
            (vec![CACHE, "--remote_download_outputs=minimal"], false),
            (vec![CACHE, "--remote_download_outputs=something-new"], false),
            (vec![CACHE, "--disk_cache=/d"], true),
            (vec![CACHE, "--disk_cache=/d", "--disk_cache="], true),
            (vec![CACHE, "--experimental_remote_output_service=unix:/s"], false),
            (vec![CACHE, "--remote_proxy=unix:/s"], false),
            (
                vec![
                    CACHE,
                    "--remote_download_symlink_template=/cas/{hash}-{size_bytes}",
                ],
                false,
            ),
            (
                vec![CACHE, "--experimental_build_event_upload_strategy=local"],
                false,
            ),
            (vec![CACHE, "--remote_download_regex=.*"], true),
            (vec![CACHE, "--nobuild_runfile_manifests"], false),
            (vec![CACHE, "--build_runfile_manifests=0"], false),
            (
                vec![CACHE, "--nobuild_runfile_manifests", "--build_runfile_manifests"],
                true,
            ),
            (vec![CACHE, "--nouse_action_cache"], false),
            (vec![CACHE, "--use_action_cache=yes"], true),
            (vec![CACHE, "--nobuild_runfile_links"], true),
            (vec![CACHE, "--noenable_runfiles"], true),
            (vec![CACHE, "--noaction_cache_store_output_metadata"], true),
        ] {
            let mode = decided(&options, |_| {});
            assert!(!matches!(mode, Mode::Unable(_)), "{options:?}: {mode:?}");
            assert_eq!(mode == Mode::Minimal, taken, "{options:?}: {mode:?}");
        }
    }

    #[test]
    fn version_word_and_wish_count() {
        let kept = |change: fn(&mut Setting<'_>)| matches!(decided(&[CACHE], change), Mode::Own(_));
        assert!(kept(|s| s.keep = true));
        assert!(kept(|s| s.version = None));
        assert!(kept(|s| s.version = Some(6)));
        assert!(!kept(|s| s.version = Some(8)));
        assert!(kept(|s| s.version = Some(9)), "its action cache cannot be read");
        assert!(kept(|s| s.reads_action_cache = false));
        assert!(kept(|s| s.is_waited_for = false));
        assert!(kept(|s| s.word = "mobile-install"));
        assert!(!kept(|s| s.word = "run"));
    }

    #[test]
    fn a_command_waits_for_all_unless_it_says_otherwise() {
        for (options, expected) in [
            (&[][..], true),
            (&["--bes_timeout=0"], true),
            (&["--bes_timeout=60s"], false),
            (&["--bes_timeout=60s", "--bes_timeout="], true),
            (&["--bes_upload_mode=fully_async"], false),
            (&["--bes_upload_mode=nowait_for_upload_complete"], false),
            (
                &[
                    "--bes_upload_mode=fully_async",
                    "--bes_upload_mode=wait_for_upload_complete",
                ],
                true,
            ),
        ] {
            assert_eq!(
                waits_for_all(&Options::of(options).line()),
                expected,
                "{options:?}"
            );
        }
    }

    #[test]
    fn what_tests_leave_in_a_directory_is_bazels_to_bring() {
        for (word, version, flag, taken) in [
            ("test", 7, "--x", true),
            ("test", 7, "--nozip_undeclared_test_outputs", false),
            ("coverage", 7, "--zip_undeclared_test_outputs=0", false),
            ("build", 7, "--nozip_undeclared_test_outputs", true),
            ("test", 8, "--x", false),
            ("test", 8, "--zip_undeclared_test_outputs", true),
        ] {
            let change = |setting: &mut Setting<'_>| (setting.word, setting.version) = (word, Some(version));
            let mode = decided(&[CACHE, flag], change);
            assert_eq!(mode == Mode::Minimal, taken, "{word} {version} {flag}: {mode:?}");
        }
    }

    #[test]
    fn what_bazel_reads_of_tests_is_bazels_to_bring() {
        const ALL: &str = "--experimental_fetch_all_coverage_outputs";
        for (word, options, taken) in [
            ("test", &["--test_summary=detailed"][..], false),
            ("coverage", &["--test_summary=testcase"], false),
            ("test", &["--test_summary=detailed", "--test_summary=short"], true),
            ("build", &["--test_summary=detailed"], true),
            ("test", &["--collect_code_coverage", ALL], false),
            ("test", &["--collect_code_coverage"], true),
            (
                "test",
                &["--collect_code_coverage", ALL, "--nocollect_code_coverage"],
                true,
            ),
            ("coverage", &["--collect_code_coverage", ALL], true),
        ] {
            let mode = decided(&[&[CACHE], options].concat(), |setting| setting.word = word);
            assert_eq!(mode == Mode::Minimal, taken, "{word} {options:?}: {mode:?}");
        }
    }

    #[test]
    fn tests_files_are_bazels_to_bring_where_events_name_no_digests_of_them() {
        for (options, taken) in [
            (vec!["--remote_cache=http://h"], false),
            (vec!["--disk_cache=/d"], false),
            (vec!["--remote_cache=http://h", "--disk_cache=/d"], false),
            (vec![CACHE, "--disk_cache=/d"], true),
        ] {
            for word in ["test", "coverage"] {
                let mode = decided(&options, |setting| setting.word = word);
                assert_eq!(mode == Mode::Minimal, taken, "{word} {options:?}: {mode:?}");
            }
        }
    }

    #[test]
    fn what_an_http_cache_may_lack_is_left_to_bazel_where_the_command_runs_only_once() {
        for (options, taken) in [
            (vec!["--remote_cache=http://h"], false),
            (vec!["--remote_cache=https://h", "--disk_cache=/d"], false),
            (vec!["--disk_cache=/d"], true),
            (vec![CACHE], true),
        ] {
            let mode = decided(&options, |setting| setting.repeats = false);
            assert_eq!(mode == Mode::Minimal, taken, "{options:?}: {mode:?}");
        }
    }

    #[test]
    fn a_disk_cache_that_is_not_there_yet_is_nothing_to_complain_of() {
        let mode = decided(&["--disk_cache=/d"], |setting| {
            setting.cache = Err("none".to_owned())
        });
        assert!(matches!(mode, Mode::Own(_)), "{mode:?}");
    }

    #[test]
    fn what_cannot_be_done_is_said() {
        let why = |change: fn(&mut Setting<'_>)| match decided(&[CACHE], change) {
            Mode::Unable(reason) => reason,
            mode => panic!("{mode:?}"),
        };
        assert!(why(|s| s.place = Err("mode 0777".to_owned())).contains("mode 0777"));
        assert!(why(|s| s.cache = Err("refused".to_owned())).contains("refused"));
    }

    #[test]
    fn the_last_word_on_a_switch_counts() {
        for (options, on) in [
            (vec![], None),
            (vec!["--x"], Some(true)),
            (vec!["--x=1"], Some(true)),
            (vec!["--x=false"], Some(false)),
            (vec!["--x", "--nox"], Some(false)),
            (vec!["--nox", "--x=true"], Some(true)),
        ] {
            assert_eq!(Options::of(&options).line().switch("x"), on, "{options:?}");
        }
    }
}
