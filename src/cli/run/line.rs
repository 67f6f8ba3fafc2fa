//! Bazel's command line: where its command word stands, and where flags go that are to count.
//!
//! The last flag counts, and an rc file's `--config` expands in the place of the flag that names it, so ours go after
//! all options: before a `--`, or at the very end.

use std::{ffi::OsString, os::unix::fs::FileTypeExt as _};

use crate::bep::commands;

/// Startup options whose value may be an argument of its own.
const VALUED: &[&str] = &[
    "--bazelrc",
    "--command_port",
    "--connect_timeout_secs",
    "--digest_function",
    "--experimental_cgroup_parent",
    "--failure_detail_out",
    "--host_jvm_args",
    "--host_jvm_profile",
    "--install_base",
    "--invocation_policy",
    "--io_nice_level",
    "--local_startup_timeout_secs",
    "--macos_qos_class",
    "--max_idle_secs",
    "--output_base",
    "--output_user_root",
    "--server_javabase",
    "--server_jvm_out",
    "--unix_digest_hash_attribute_name",
];

/// Startup options without a value that may stand right before a command word.
const SWITCHES: &[&str] = &[
    "--autodetect_server_javabase",
    "--batch",
    "--batch_cpu_scheduling",
    "--block_for_lock",
    "--client_debug",
    "--expand_configs_in_place",
    "--home_rc",
    "--host_jvm_debug",
    "--idle_server_tasks",
    "--ignore_all_rc_files",
    "--preemptible",
    "--shutdown_on_low_sys_mem",
    "--system_rc",
    "--unlimit_coredumps",
    "--watchfs",
    "--windows_enable_symlinks",
    "--workspace_rc",
    "--write_command_log",
];

/// Options whose value may be an argument of its own that is a `--`, which ends no options then.
const FREE: &[&str] = &["--test_arg"];

/// A command line of a command that builds. The first argument is the program.
#[derive(Debug, Clone, Copy)]
pub(in crate::cli) struct Line<'a> {
    command: &'a [OsString],
    /// Where the command word is.
    word: usize,
    /// Where a further option goes.
    end: usize,
}

impl<'a> Line<'a> {
    /// Reads a command line; none if it is not one of a command that builds.
    pub(in crate::cli) fn building(command: &'a [OsString]) -> Option<Self> {
        let word = word(command)?;
        let is_building = text(command, word).is_some_and(commands::builds);
        let is_end = |at: &usize| {
            let is_value = at
                .checked_sub(1)
                .and_then(|before| text(command, before))
                .is_some_and(|before| FREE.contains(&before));
            command.get(*at).is_some_and(|arg| arg == "--") && !is_value
        };
        let end = (word + 1..command.len()).find(is_end).unwrap_or(command.len());
        is_building.then_some(Self { command, word, end })
    }

    /// What stands before the command word: startup options.
    pub(in crate::cli) fn startup(&self) -> &'a [OsString] {
        self.command.get(1..self.word).unwrap_or_default()
    }

    /// The command word.
    pub(in crate::cli) fn word(&self) -> &'a str {
        text(self.command, self.word).unwrap_or_default()
    }

    /// The arguments, without the program, with further options at the end of theirs.
    pub(in crate::cli) fn with(&self, flags: &[String]) -> Vec<OsString> {
        let mut args = self.up_to_end(flags);
        args.extend_from_slice(self.command.get(self.end..).unwrap_or_default());
        args
    }

    /// The same without a `--` and what follows it.
    pub(in crate::cli) fn up_to_end(&self, flags: &[String]) -> Vec<OsString> {
        let args = self.command.get(1..self.end).unwrap_or_default();
        args.iter()
            .cloned()
            .chain(flags.iter().map(OsString::from))
            .collect()
    }

    /// An rc file that gives its lines only once: a named pipe, say. What is not there yet may be one.
    pub(super) fn reads_once(&self) -> Option<String> {
        let is_pipe = |file: &String| std::fs::metadata(file).is_ok_and(|meta| meta.file_type().is_fifo());
        values(self.startup(), "bazelrc").into_iter().find(is_pipe)
    }

    /// Values of an option that the command itself gives, as one argument or as two.
    pub(in crate::cli) fn own_values(&self, name: &str) -> Vec<String> {
        let own = self.command.get(self.word + 1..self.end);
        values(own.unwrap_or_default(), name)
    }
}

/// Values that arguments give an option, as one argument or as two.
fn values(args: &[OsString], name: &str) -> Vec<String> {
    let mut values = Vec::new();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let Some(option) = arg.to_str().and_then(|arg| arg.strip_prefix("--")) else {
            continue;
        };
        if option == name {
            values.extend(args.next().and_then(|value| value.to_str()).map(str::to_owned));
        } else if let Some(("", value)) = option.strip_prefix(name).and_then(|rest| rest.split_once('=')) {
            values.push(value.to_owned());
        }
    }
    values
}

fn text(command: &[OsString], at: usize) -> Option<&str> {
    command.get(at).and_then(|arg| arg.to_str())
}

/// Whether a startup option is known to have no value.
fn is_switch(option: &str) -> bool {
    SWITCHES.iter().any(|switch| {
        let name = switch.trim_start_matches('-');
        option
            .strip_prefix("--")
            .is_some_and(|option| option == name || option.strip_prefix("no") == Some(name))
    })
}

/// Where Bazel's command word is.
fn word(command: &[OsString]) -> Option<usize> {
    let is_word = |at: usize| text(command, at).is_some_and(commands::is_known);
    let mut at = 1;
    loop {
        let arg = command.get(at).filter(|arg| *arg != "--")?;
        let Some(option) = arg.to_str().filter(|arg| arg.starts_with('-')) else {
            return Some(at);
        };
        at += 1;
        if option.contains('=') {
            continue;
        }
        let is_valued = VALUED.contains(&option);
        // A startup option that is not known here has a value if only that makes sense of what follows. Where both make
        // sense, the command is left alone.
        let is_dash = text(command, at).is_some_and(|next| next.starts_with('-'));
        match (is_word(at), is_word(at + 1)) {
            _ if is_valued => at += 1,
            (false, true) if !is_dash => at += 1,
            (true, true) if !is_switch(option) => return None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn flags_stand_behind_all_options_of_commands_that_build() {
        for (command, expected) in [
            ("bazel build //a", "build //a -F"),
            ("bazel build", "build -F"),
            (
                "bazel build --config=ci //a --config=late",
                "build --config=ci //a --config=late -F",
            ),
            (
                "bazel --batch test -k //a -- -//b",
                "--batch test -k //a -F -- -//b",
            ),
            (
                "bazel --output_base /x run //a -- build",
                "--output_base /x run //a -F -- build",
            ),
            ("bazel run //a arg", "run //a arg -F"),
            (
                "bazel test //a --test_arg -- --test_arg -k -- -//b",
                "test //a --test_arg -- --test_arg -k -F -- -//b",
            ),
            (
                "bazel test --test_arg -- --test_arg=--",
                "test --test_arg -- --test_arg=-- -F",
            ),
            (
                "bazel --output_base build build //a",
                "--output_base build build //a -F",
            ),
            ("bazel --bazelrc run test", "--bazelrc run test -F"),
            ("bazel --bazelrc=run coverage", "--bazelrc=run coverage -F"),
            (
                "bazel --host_jvm_args -Xmx1g --nohome_rc build",
                "--host_jvm_args -Xmx1g --nohome_rc build -F",
            ),
            (
                "bazel --not_known_yet x build //a",
                "--not_known_yet x build //a -F",
            ),
            ("bazel --not_known_yet build //a", "--not_known_yet build //a -F"),
            ("bazel --nohome_rc build test", "--nohome_rc build test -F"),
            ("bazel mobile-install //a", "mobile-install //a -F"),
        ] {
            let command = words(command);
            let line = Line::building(&command).unwrap();
            assert_eq!(line.with(&["-F".to_owned()]), words(expected));
        }
    }

    #[test]
    fn other_commands_are_left_alone() {
        for command in [
            "bazel",
            "bazel --version",
            "bazel info",
            "bazel help build",
            "bazel query build",
            "bazel cquery //a",
            "bazel aquery //a",
            "bazel --output_base build shutdown",
            "bazel --bazelrc run",
            "bazel --output_base",
            "bazel no-such-command build",
            "bazel -- build",
            "bazel --not_known_yet build shutdown",
        ] {
            assert!(Line::building(&words(command)).is_none(), "{command}");
        }
    }

    #[test]
    fn what_follows_two_dashes_is_not_asked_about() {
        let command = words("bazel run //a -- --bes_backend=x");
        let line = Line::building(&command).unwrap();
        assert_eq!(line.up_to_end(&["-F".to_owned()]), words("run //a -F"));
        assert!(line.own_values("bes_backend").is_empty());
    }

    #[test]
    fn values_of_the_commands_own_options_are_found_in_both_forms() {
        let command = words("bazel --h=0 build --h=a=b --hh=x --h c --noh //h --h -- --h=d");
        let line = Line::building(&command).unwrap();
        assert_eq!(line.own_values("h"), ["a=b", "c"]);
    }
}
