//! What is read from the wrapped command, and what is put into it.

use std::{
    ffi::{OsStr, OsString},
    path::Path,
};

/// Commands of Bazel's that build something; and those that build nothing but share the analysis of the ones that do,
/// which a flag of difference would throw away. `query` and `fetch` send events, too, but have no outputs, and old
/// Bazels refuse flags about outputs there.
const BUILDING: &[&str] = &[
    "build",
    "test",
    "run",
    "coverage",
    "mobile-install",
    "aquery",
    "cquery",
];

/// Bazel's other commands: a word of the list above behind one of these is no command.
const OTHER: &[&str] = &[
    "analyze-profile",
    "canonicalize-flags",
    "clean",
    "config",
    "dump",
    "fetch",
    "help",
    "info",
    "license",
    "mod",
    "print_action",
    "query",
    "shutdown",
    "sync",
    "vendor",
    "version",
];

/// What tells Bazel of a daemon's address.
pub(super) fn flags(address: &str, keep_download_mode: bool) -> Vec<OsString> {
    let mut flags = vec![
        OsString::from(format!("--bes_backend=grpc://{address}")),
        // The command is to return when its outputs are there.
        "--bes_upload_mode=wait_for_upload_complete".into(),
        "--bes_timeout=0s".into(),
    ];
    if !keep_download_mode {
        // Not --remote_download_outputs=minimal: in old Bazels (4.x) that alone is refused, for it needs two more flags,
        // into which only this one expands.
        flags.push("--remote_download_minimal".into());
    }
    flags
}

/// Where the build tool's own command line begins. An `outhaul run` in the command wraps the one behind its `--`, and
/// other programs (`env`, `nice`, a container's) the one that begins with a Bazel by name; else it is all of it. `None`
/// if there is none.
pub(super) fn tool(command: &[OsString]) -> Option<usize> {
    let mut start = 0;
    loop {
        let rest = command.get(start..)?;
        let end = rest.iter().position(|arg| arg == "--");
        if !rest
            .iter()
            .take(end.unwrap_or(rest.len()))
            .any(|arg| is_outhaul(arg))
        {
            break;
        }
        start += end? + 1;
    }
    let rest = command.get(start..)?;
    let bazel = rest.iter().position(|arg| is_bazel(arg));
    let bazel = bazel.filter(|at| rest.get(*at..).is_some_and(|rest| word(rest).is_some()));
    (!rest.is_empty()).then(|| start + bazel.unwrap_or(0))
}

fn name(arg: &OsStr) -> &[u8] {
    Path::new(arg).file_name().unwrap_or_default().as_encoded_bytes()
}

fn is_outhaul(arg: &OsStr) -> bool {
    // Also under another name.
    let own = std::env::current_exe().ok();
    name(arg) == b"outhaul" || own.is_some_and(|own| Path::new(arg) == own)
}

/// `bazel`, `bazelisk`, `/opt/bazel-7.7.1`; no label, option or assignment.
fn is_bazel(arg: &OsStr) -> bool {
    let text = arg.as_encoded_bytes();
    name(arg).starts_with(b"bazel")
        && !text.starts_with(b"-")
        && !text.starts_with(b"//")
        && !text.contains(&b'=')
}

/// Where the word of a command that builds is, behind the program.
fn word(command: &[OsString]) -> Option<usize> {
    let is = |words: &[&str], arg: &OsString| arg.to_str().is_some_and(|arg| words.contains(&arg));
    let (at, word) = command
        .iter()
        .enumerate()
        .skip(1)
        .find(|(_, arg)| is(BUILDING, arg) || is(OTHER, arg))?;
    is(BUILDING, word).then_some(at)
}

/// The command with flags behind Bazel's command word. Without such a word the command is left as it is.
pub(super) fn with_flags(command: &[OsString], flags: &[OsString]) -> Vec<OsString> {
    let at = tool(command).and_then(|start| Some(start + word(command.get(start..)?)?));
    let mut command = command.to_vec();
    if let Some(at) = at {
        command.splice(at + 1..at + 1, flags.iter().cloned());
    }
    command
}

/// The command without its word of where its events go, and that word: they come here first and are passed on. Bazel
/// has one such place, and the last word wins.
pub(super) fn without_backend(command: &[OsString]) -> (Vec<OsString>, Option<String>) {
    let start = tool(command).unwrap_or(command.len());
    let mut kept = Vec::with_capacity(command.len());
    kept.extend(command.iter().take(start).cloned());
    let mut backend = None;
    let mut args = command.iter().skip(start);
    while let Some(arg) = args.next() {
        match arg.to_str() {
            Some("--") => {
                kept.push(arg.clone());
                break;
            }
            Some("--bes_backend") => {
                backend = args.next().map(|value| value.to_string_lossy().into_owned());
            }
            Some(text) if text.starts_with("--bes_backend=") => {
                backend = text.split_once('=').map(|(_, value)| value.to_owned());
            }
            _ => kept.push(arg.clone()),
        }
    }
    kept.extend(args.cloned());
    (kept, backend)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn bazel_is_told_to_download_nothing_in_a_way_that_every_version_takes() {
        let told = |keep| flags("127.0.0.1:1", keep).contains(&"--remote_download_minimal".into());
        assert!(told(false) && !told(true));
    }

    #[test]
    fn flags_stand_right_behind_the_command_word() {
        for (command, expected) in [
            ("bazel build //a", "bazel build -F //a"),
            (
                "bazel --batch test -k //a -- -//b",
                "bazel --batch test -F -k //a -- -//b",
            ),
            (
                "bazel --output_base /x run //a -- build",
                "bazel --output_base /x run -F //a -- build",
            ),
            ("bazel info", "bazel info"),
            ("bazel help build", "bazel help build"),
            ("bazel query //a", "bazel query //a"),
            ("make", "make"),
            (
                "outhaul run -- bazel build //a",
                "outhaul run -- bazel build -F //a",
            ),
            (
                "/x/outhaul run --strict -- outhaul run -- ./b --x test //a -- run",
                "/x/outhaul run --strict -- outhaul run -- ./b --x test -F //a -- run",
            ),
            ("env outhaul run -- ./b build", "env outhaul run -- ./b build -F"),
            ("outhaul run --help", "outhaul run --help"),
            ("outhaul run --", "outhaul run --"),
            ("outhaul stage build", "outhaul stage build"),
            ("docker run x bazel build //a", "docker run x bazel build -F //a"),
            (
                "env B=bazel /x/bazelisk build //a",
                "env B=bazel /x/bazelisk build -F //a",
            ),
            ("./b build //bazel", "./b build -F //bazel"),
            ("./b build bazel", "./b build -F bazel"),
        ] {
            assert_eq!(with_flags(&words(command), &words("-F")), words(expected));
        }
    }

    #[test]
    fn a_backend_of_the_commands_own_is_taken_out_and_used() {
        for (command, kept, backend) in [
            (
                "bazel build --bes_backend=grpc://x //a",
                "bazel build //a",
                Some("grpc://x"),
            ),
            (
                "bazel build --bes_backend grpc://x //a",
                "bazel build //a",
                Some("grpc://x"),
            ),
            (
                "bazel build --bes_backend=a --bes_backend=b //a -- --bes_backend=c",
                "bazel build //a -- --bes_backend=c",
                Some("b"),
            ),
            ("bazel build --bes_backend= //a", "bazel build //a", Some("")),
            (
                "outhaul run --bes_backend=a -- bazel build --bes_backend=b //a",
                "outhaul run --bes_backend=a -- bazel build //a",
                Some("b"),
            ),
            (
                "bazel run //a -- --bes_backend=grpc://x",
                "bazel run //a -- --bes_backend=grpc://x",
                None,
            ),
        ] {
            assert_eq!(
                without_backend(&words(command)),
                (words(kept), backend.map(str::to_owned)),
                "{command}"
            );
        }
    }
}
