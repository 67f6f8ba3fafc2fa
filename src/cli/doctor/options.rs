//! What the command's own options do to a build with Outhaul. Each function looks at one thing.

use std::collections::BTreeSet;

use super::finding::Finding;
use crate::{
    bep::event::CommandLine,
    cli::run::{Mode, Setting, decide},
    transport::{Endpoint, without_user_info},
    units::parse_duration,
};

/// The oldest Bazel whose events and action cache have all that minimal mode needs.
const OLDEST: u32 = 7;

/// A command's options, the rc files' included, and the Bazel that they are for.
pub(super) struct Command<'a> {
    pub(super) version: Option<u32>,
    pub(super) line: &'a CommandLine,
}

/// What is found in the options alone.
pub(super) const CHECKS: &[fn(&Command<'_>) -> Option<Finding>] = &[
    timeout,
    upload_mode,
    upload_strategy,
    unix_sockets,
    conflicts,
    credential_helper,
    downloads_twice,
];

impl Command<'_> {
    /// The event service's address, if it is on this machine: it may be Outhaul's.
    pub(super) fn local_backend(&self) -> Option<Endpoint> {
        let backend = self.line.given("bes_backend")?;
        let endpoint = Endpoint::parse("--bes_backend", backend).ok()?;
        endpoint.is_local().then_some(endpoint)
    }
}

fn timeout(command: &Command<'_>) -> Option<Finding> {
    let value = command.line.given("bes_timeout")?;
    if parse_duration(value).is_ok_and(|limit| limit.is_zero()) {
        return None;
    }
    Some(Finding::warning(
        "bes-timeout",
        format!(
            "--bes_timeout={value} limits how long Bazel waits for the event service: a command whose outputs take \
             longer returns before they are on disk"
        ),
        "remove --bes_timeout; `--hold-timeout` of `outhaul run` and `outhaul serve` limits the wait without failing \
         a build",
    ))
}

fn upload_mode(command: &Command<'_>) -> Option<Finding> {
    const CODE: &str = "bes-upload-mode";
    match command.line.given("bes_upload_mode")? {
        "nowait_for_upload_complete" => Some(Finding::warning(
            CODE,
            "with --bes_upload_mode=nowait_for_upload_complete and `outhaul serve`, commands return before their \
             outputs are on disk, and the next command waits up to 5 s for the old stream",
            "remove --bes_upload_mode, or build with `outhaul run`, which waits for the outputs itself",
        )),
        "fully_async" => Some(Finding::note(
            CODE,
            "with --bes_upload_mode=fully_async and `outhaul serve`, commands return before their outputs are on disk",
            "remove --bes_upload_mode, or build with `outhaul run`; with `outhaul serve --hold=none`, nothing waits",
        )),
        _ => None,
    }
}

fn upload_strategy(command: &Command<'_>) -> Option<Finding> {
    let value = command.line.given("experimental_build_event_upload_strategy")?;
    (value == "local").then(|| {
        Finding::warning(
            "upload-strategy",
            "with --experimental_build_event_upload_strategy=local, events name no digests of tests' files, and with \
             Bazel 4 of no file, so outhaul cannot download them",
            "remove --experimental_build_event_upload_strategy",
        )
    })
}

fn unix_sockets(command: &Command<'_>) -> Option<Finding> {
    let names = [
        "bes_backend",
        "bes_proxy",
        "remote_cache",
        "remote_executor",
        "remote_proxy",
    ];
    let is_socket = |name: &&str| {
        let value = command.line.given(name);
        value.is_some_and(|value| value.starts_with("unix:"))
    };
    let flags: Vec<_> = names
        .into_iter()
        .filter(is_socket)
        .map(|name| format!("--{name}"))
        .collect();
    (!flags.is_empty()).then(|| {
        Finding::note(
            "unix-sockets",
            format!(
                "{} names a unix socket, which not every Bazel supports: Debian's builds of 4.2.3 and 7.7.1 fail with \
                 exit code 36",
                flags.join(", ")
            ),
            "if Bazel fails so, use grpc://127.0.0.1:PORT instead",
        )
    })
}

/// Flags that are given several times and differ: it is easy to take the wrong one for what counts.
fn conflicts(command: &Command<'_>) -> Option<Finding> {
    let mut found = Vec::new();
    let modes: BTreeSet<&str> = {
        let options = command.line.options.iter();
        options.filter_map(|(name, value)| mode_of(name, value)).collect()
    };
    if modes.len() > 1 {
        let counts = command.line.download_mode().unwrap_or_default();
        let modes: Vec<&str> = modes.into_iter().collect();
        found.push(format!(
            "the download modes {} ({counts} counts)",
            modes.join(" and ")
        ));
    }
    for name in ["bes_backend", "remote_cache", "remote_executor", "disk_cache"] {
        let values: BTreeSet<&str> = command.line.all(name).collect();
        if values.len() > 1 {
            let last = without_user_info(command.line.last(name).unwrap_or_default());
            let last = if last.is_empty() { "no value" } else { &last };
            found.push(format!("several values of --{name} ({last} counts)"));
        }
    }
    (!found.is_empty()).then(|| {
        Finding::note(
            "conflicting-flags",
            format!(
                "the command line and its rc files give {}: the last one counts",
                found.join(", and ")
            ),
            "keep one of them, or a --config for each",
        )
    })
}

fn mode_of<'a>(name: &str, value: &'a str) -> Option<&'a str> {
    match name {
        "remote_download_outputs" | "experimental_remote_download_outputs" => Some(value),
        "remote_download_minimal" => Some("minimal"),
        "remote_download_toplevel" => Some("toplevel"),
        "remote_download_all" => Some("all"),
        _ => None,
    }
}

fn credential_helper(command: &Command<'_>) -> Option<Finding> {
    command.local_backend()?;
    let asks = command.version.is_none_or(|version| version >= OLDEST);
    let mut helpers = ["credential_helper", "experimental_credential_helper"]
        .into_iter()
        .flat_map(|name| command.line.all(name));
    (asks && helpers.any(|helper| !helper.contains('='))).then(|| {
        Finding::warning(
            "credential-helper",
            "Bazel also asks a --credential_helper without a scope about outhaul's address, and fails the upload of \
             events if the helper has no answer",
            "give the helper a scope, as in --credential_helper=*.example.com=PROGRAM; `outhaul run` needs none",
        )
    })
}

fn downloads_twice(command: &Command<'_>) -> Option<Finding> {
    command.local_backend()?;
    let is_new = command.version.is_some_and(|version| version >= OLDEST);
    let has_cache = command.line.remote_cache().is_some();
    (is_new && has_cache && command.line.download_mode() != Some("minimal")).then(|| {
        Finding::note(
            "download-twice",
            "--bes_backend names a service on this machine, and Bazel downloads outputs itself: outhaul finds most of \
             them already on disk",
            "add --remote_download_minimal to the rc file, or build with `outhaul run`, which does that where it can",
        )
    })
}

/// Who downloads under `outhaul run`.
pub(super) fn downloads(setting: &Setting<'_>) -> Finding {
    const CODE: &str = "download-mode";
    match decide(setting) {
        Mode::Minimal => Finding::ok(
            CODE,
            "under `outhaul run`, outhaul downloads the outputs and Bazel downloads nothing",
        ),
        Mode::Own(reason) => Finding::note(
            CODE,
            format!("under `outhaul run`, Bazel downloads outputs itself: {reason}"),
            "nothing is missing: outhaul downloads what Bazel leaves out. docs/bazel.md says when outhaul downloads",
        ),
        Mode::Unable(reason) => Finding::warning(
            CODE,
            format!("under `outhaul run`, {reason}"),
            "see `cache` and `output-base`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Level, *};
    use crate::cli::run::Options;

    const CACHE: &str = "--remote_cache=grpc://cache:1";
    const LOCAL: &str = "--bes_backend=grpc://127.0.0.1:8985";

    /// The codes and levels of what is found in options.
    fn found(version: Option<u32>, options: &[&str]) -> Vec<(&'static str, Level)> {
        let line = Options::of(options).line();
        let command = Command { version, line: &line };
        let found = CHECKS.iter().filter_map(|check| check(&command));
        found.map(|finding| (finding.code, finding.level)).collect()
    }

    #[test]
    fn each_option_that_changes_a_build_with_outhaul_is_found() {
        use Level::{Note, Warning};
        for (options, expected) in [
            (vec![], vec![]),
            (vec![CACHE, LOCAL, "--remote_download_minimal"], vec![]),
            (vec!["--bes_timeout=30s"], vec![("bes-timeout", Warning)]),
            (vec!["--bes_timeout=30s", "--bes_timeout=0s"], vec![]),
            (vec!["--bes_timeout=0"], vec![]),
            (
                vec!["--bes_upload_mode=nowait_for_upload_complete"],
                vec![("bes-upload-mode", Warning)],
            ),
            (
                vec!["--bes_upload_mode=fully_async"],
                vec![("bes-upload-mode", Note)],
            ),
            (vec!["--bes_upload_mode=wait_for_upload_complete"], vec![]),
            (
                vec!["--experimental_build_event_upload_strategy=local"],
                vec![("upload-strategy", Warning)],
            ),
            (vec!["--experimental_build_event_upload_strategy=remote"], vec![]),
            (vec!["--bes_proxy=unix:/s"], vec![("unix-sockets", Note)]),
            (vec!["--bes_proxy=unix:/s", "--bes_proxy="], vec![]),
            (vec!["--remote_cache=unix:/s"], vec![("unix-sockets", Note)]),
            (
                vec!["--remote_download_minimal", "--remote_download_outputs=all"],
                vec![("conflicting-flags", Note)],
            ),
            (
                vec!["--remote_download_minimal", "--remote_download_outputs=minimal"],
                vec![],
            ),
            (vec![CACHE, CACHE], vec![]),
            (
                vec![CACHE, "--remote_cache=grpc://other:1"],
                vec![("conflicting-flags", Note)],
            ),
            (vec!["--credential_helper=/h"], vec![]),
            (
                vec![LOCAL, "--credential_helper=/h"],
                vec![("credential-helper", Warning)],
            ),
            (vec![LOCAL, "--credential_helper=*.x=/h"], vec![]),
            (
                vec!["--bes_backend=grpcs://bes.example:1", "--credential_helper=/h"],
                vec![],
            ),
            (vec![CACHE, LOCAL], vec![("download-twice", Note)]),
        ] {
            assert_eq!(found(Some(7), &options), expected, "{options:?}");
        }
        // Bazel 4 asks no helper about us, and has no use for minimal mode.
        assert_eq!(found(Some(4), &[CACHE, LOCAL, "--credential_helper=/h"]), []);
    }

    #[test]
    fn values_are_shown_without_credentials_and_the_last_one_is_named() {
        let line = Options::of(&[
            "--remote_cache=https://me:secret-1@a",
            "--remote_cache=https://me:secret-2@b",
            "--remote_download_all",
            "--remote_download_toplevel",
        ])
        .line();
        let command = Command {
            version: Some(7),
            line: &line,
        };
        let message = conflicts(&command).unwrap().message;
        assert!(!message.contains("secret"), "{message}");
        assert!(message.contains("https://***@b counts"), "{message}");
        assert!(
            message.contains("all and toplevel (toplevel counts)"),
            "{message}"
        );
    }

    #[test]
    fn who_downloads_is_what_run_decides() {
        let minimal = Options::of(&[CACHE]).line();
        let all = Options::of(&[CACHE, "--remote_download_all"]).line();
        let level = |line, cache: Result<(), String>| {
            downloads(&Setting {
                keep: false,
                word: "build",
                repeats: true,
                version: Some(7),
                options: Ok(line),
                place: Ok(()),
                cache,
                is_builds_cache: true,
                reads_action_cache: true,
                is_waited_for: true,
            })
            .level
        };
        assert_eq!(level(&minimal, Ok(())), Level::Ok);
        assert_eq!(level(&all, Ok(())), Level::Note);
        assert_eq!(level(&minimal, Err("down".to_owned())), Level::Warning);
    }
}
