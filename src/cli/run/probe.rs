//! What a Bazel command's options come to, rc files and configs included, as Bazel itself tells it.
//!
//! The same command is run once more, told to write its events to a file, and with two options that Bazel cannot start
//! a command with. It gives up after it has told all its options, within a tenth of a second, and before it reads a
//! package: it needs no network, its knowledge of the build stays as it is, and nothing is built. What users have it write
//! is switched off, so that no file of theirs is touched.

use std::{
    ffi::OsString,
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Command as Process, Stdio},
    time::{Duration, Instant},
};

use anyhow::{anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::process::{Child, Command};

use super::{line::Line, program};
use crate::bep::event::CommandLine;

/// Where the directory of the `outhaul run` around a program is. A `tools/bazel` calls `outhaul-bazel` in it.
pub(super) const VARIABLE: &str = "OUTHAUL_RUN";
/// How long it may take without a word of Bazel's; most of it is for a server that has to start first.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a Bazel that took too long may take to end.
const ENDING: Duration = Duration::from_secs(5);
/// How often it is looked whether Bazel only waits for another command.
const LOOK: Duration = Duration::from_millis(500);
/// What Bazel says while it waits for another command of the same output base, which may take hours. So does the command
/// itself then.
const WAITING: &str = "Another command";
/// What Bazel ends with that refuses its command line, an rc file or a config; it tells no options then.
const REFUSED: i32 = 2;
const UNTOLD: &str = "Bazel did not report them";
const UNRECOGNIZED: &str = "Unrecognized option: ";
/// Bytes that are read of what Bazel says, and of the file of its events.
const MOST: u64 = 64 << 20;

/// Where events go: with these after ours, they do not come here.
const WAY: &[&str] = &["--bes_backend=", "--bes_proxy="];

/// With these no command starts. One would do; a Bazel may not know one of them.
const STOPPING: &[&str] = &[
    "--experimental_workspace_rules_log_file=/",
    "--disk_cache=/dev/null/outhaul",
];
/// Nothing is built, asked or written. Where Bazel does not know an option, what stands before it counts all the same, and
/// what follows does not: first those that every version knows.
const QUIET: &[&str] = &[
    "--bes_backend=",
    "--build_event_text_file=",
    "--build_event_binary_file=",
    "--profile=/dev/null",
    "--nobuild",
    "--remote_cache=",
    "--remote_executor=",
    "--explain=",
    "--execution_log_binary_file=",
    "--execution_log_json_file=",
    "--starlark_cpu_profile=",
    "--memory_profile=/dev/null",
    "--experimental_repository_resolved_file=",
    // It would ask for a cache.
    "--experimental_remote_downloader=",
];
/// The same for what only newer Bazels, or only older ones, write.
const NEWER: &[&str] = &[
    "--execution_log_compact_file=",
    "--remote_grpc_log=",
    // It would ask for a cache, too.
    "--experimental_remote_output_service=",
];
const OLDER: &[&str] = &[
    "--experimental_execution_log_file=",
    "--experimental_remote_grpc_log=",
];

/// What is known of a Bazel command before it runs.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::cli) struct CommandInfo {
    /// The command word.
    pub(in crate::cli) word: String,
    /// Where it is called.
    pub(in crate::cli) directory: PathBuf,
    /// Bazel's major version, if it tells one.
    pub(in crate::cli) version: Option<u32>,
    /// The event service that its own arguments name.
    pub(in crate::cli) backend: Option<String>,
    /// Its options, or why they are not known.
    pub(in crate::cli) options: Result<Options, String>,
    /// Whether Bazel refuses the command for an option of its own: it builds nothing, and says so itself.
    #[serde(default)]
    pub(in crate::cli) is_refused: bool,
    /// Whether the program is a script, which may go on when its Bazel has ended.
    #[serde(default)]
    pub(in crate::cli) is_script: bool,
}

/// The options of a command, the rc files' included, in their order.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(in crate::cli) struct Options {
    /// As Bazel writes them.
    pub(super) list: Vec<String>,
    /// The option with which a wrapper around Bazel has the last word on where events go.
    pub(super) overruled: Option<String>,
    /// Where the output tree is.
    pub(in crate::cli) output_base: Option<PathBuf>,
    /// Whether Bazel's connections go through a proxy of Java's.
    #[serde(default)]
    pub(in crate::cli) has_proxy: bool,
}

impl Options {
    /// As names and values, such as events have them. `--noname` is a name, too.
    pub(in crate::cli) fn line(&self) -> CommandLine {
        let options = self.list.iter().map(|option| {
            let option = option.strip_prefix("--").unwrap_or(option);
            let (name, value) = option.split_once(['=', ' ']).unwrap_or((option, ""));
            (name.to_owned(), value.to_owned())
        });
        CommandLine {
            label: "canonical".to_owned(),
            options: options.collect(),
        }
    }

    /// For tests of what is made of them.
    #[cfg(test)]
    pub(in crate::cli) fn of(list: &[&str]) -> Self {
        Self {
            list: list.iter().map(|option| (*option).to_owned()).collect(),
            ..Self::default()
        }
    }
}

/// A Bazel that can be asked.
pub(in crate::cli) struct Probe<'a> {
    /// The program.
    pub(in crate::cli) program: &'a Path,
    /// The `PATH` that it is to have.
    pub(in crate::cli) path: &'a OsString,
    /// Where the command is called, if not here.
    pub(in crate::cli) directory: Option<&'a Path>,
    /// A directory for what it writes.
    pub(in crate::cli) scratch: &'a Path,
}

impl Probe<'_> {
    /// Asks for the options of a command.
    pub(in crate::cli) async fn ask(&self, line: &Line<'_>) -> CommandInfo {
        let version = self.version().await;
        let mut is_refused = false;
        let options = match line.reads_once() {
            Some(file) => Err(format!("--bazelrc={file} can be read only once")),
            None => {
                let asked = self.options(line, version, &mut is_refused).await;
                asked.map_err(|e| e.to_string())
            }
        };
        CommandInfo {
            word: line.word().to_owned(),
            directory: self
                .directory
                .map_or_else(|| std::env::current_dir().unwrap_or_default(), Path::to_owned),
            version,
            backend: line.own_values("bes_backend").pop(),
            options,
            is_refused,
            is_script: program::is_script(self.program),
        }
    }

    fn command(&self) -> Command {
        let mut command = Process::new(self.program);
        command
            .env("PATH", self.path)
            .env_remove(VARIABLE)
            .stdin(Stdio::null());
        if let Some(directory) = self.directory {
            command.current_dir(directory);
        }
        let mut command = Command::from(command);
        command.kill_on_drop(true);
        command
    }

    /// The client alone knows it.
    pub(in crate::cli) async fn version(&self) -> Option<u32> {
        let mut command = self.command();
        command.arg("--version").stderr(Stdio::null());
        let said = tokio::time::timeout(PATIENCE, command.output())
            .await
            .ok()?
            .ok()?;
        version(&String::from_utf8_lossy(&said.stdout))
    }

    async fn options(
        &self,
        line: &Line<'_>,
        version: Option<u32>,
        is_refused: &mut bool,
    ) -> anyhow::Result<Options> {
        let number = rand::random::<u64>();
        let events = self.scratch.join(format!("{number:016x}.json"));
        let said = self.scratch.join(format!("{number:016x}.txt"));
        let mut flags = vec![format!("--build_event_json_file={}", events.display())];
        // Each option that it does not know costs another run, which with --batch is another server.
        let names = if version.is_some_and(|version| version < 5) {
            OLDER
        } else {
            NEWER
        };
        flags.extend([QUIET, STOPPING, names].concat().into_iter().map(str::to_owned));
        let told = loop {
            let code = self.run(line, &flags, &said).await?;
            let told = read(&events, &flags);
            let _ = std::fs::remove_file(&events);
            if told.is_ok() {
                break told;
            }
            let excerpt = excerpt(&said);
            let fewer = without_unrecognized(&flags, &excerpt);
            // Not for one of ours, by whatever value.
            let name = |option: &str| option.split('=').next().unwrap_or_default().to_owned();
            let names_ours = flags.iter().any(|flag| excerpt.contains(&name(flag)));
            let is_untold = told.as_ref().is_err_and(|error| error.to_string() == UNTOLD);
            let says_why = ["ERROR", "Error", "FATAL"]
                .iter()
                .any(|word| excerpt.contains(word));
            *is_refused = fewer.is_none() && code == Some(REFUSED) && is_untold && says_why && !names_ours;
            match fewer {
                Some(fewer) if STOPPING.iter().any(|stop| fewer.iter().any(|flag| flag == stop)) => {
                    flags = fewer
                }
                _ => break told,
            }
        };
        let _ = std::fs::remove_file(&said);
        told
    }

    /// Gives Bazel's exit code.
    async fn run(&self, line: &Line<'_>, flags: &[String], said: &Path) -> anyhow::Result<Option<i32>> {
        let failed = |e: std::io::Error| anyhow!("failed to run Bazel: {e}");
        let file = File::create(said).map_err(failed)?;
        let mut command = self.command();
        // Files, not pipes: a server that Bazel leaves behind would keep those open.
        command
            .args(line.up_to_end(flags))
            .stdout(Stdio::null())
            .stderr(file);
        let mut child = command.spawn().map_err(failed)?;
        let (mut begun, mut heard) = (Instant::now(), 0);
        loop {
            if let Ok(ended) = tokio::time::timeout(LOOK, child.wait()).await {
                return ended.map(|status| status.code()).map_err(failed);
            }
            let now = excerpt(said);
            // A server that starts says so again and again.
            if now.len() != heard || now.contains(WAITING) {
                begun = Instant::now();
                heard = now.len();
            }
            if begun.elapsed() > PATIENCE {
                end(&mut child).await;
                bail!("Bazel did not report them within {} s", PATIENCE.as_secs());
            }
        }
    }
}

/// As Ctrl-C does it: Bazel's server ends the command, too.
async fn end(child: &mut Child) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok());
    if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
        // It may have ended just now.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
    }
    if tokio::time::timeout(ENDING, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

fn excerpt(file: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(file) {
        // What cannot be read is missing.
        let _ = file.take(MOST).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The major version in what `--version` prints: `bazel 7.7.1`.
fn version(said: &str) -> Option<u32> {
    let text = said.lines().find_map(|line| line.strip_prefix("bazel "))?;
    text.split(['.', '-', ' ']).next()?.parse().ok()
}

/// The option that Bazel does not know; it may suggest another one.
fn unrecognized(said: &str) -> Option<&str> {
    let line = said.split_once(UNRECOGNIZED)?.1.lines().next()?;
    Some(line.split(" (").next().unwrap_or_default().trim())
}

/// The flags without one that Bazel does not know, or with the old names instead of the new ones.
fn without_unrecognized(flags: &[String], said: &str) -> Option<Vec<String>> {
    let unknown = unrecognized(said)?;
    if NEWER.contains(&unknown) {
        let others = flags
            .iter()
            .filter(|flag| !NEWER.contains(&flag.as_str()))
            .cloned();
        return Some(
            others
                .chain(OLDER.iter().map(|flag| (*flag).to_owned()))
                .collect(),
        );
    }
    let fewer: Vec<String> = flags.iter().filter(|flag| *flag != unknown).cloned().collect();
    (fewer.len() < flags.len()).then_some(fewer)
}

/// Reads what Bazel tells: our own flags must be among it.
fn read(events: &Path, flags: &[String]) -> anyhow::Result<Options> {
    let file = File::open(events).map_err(|_| anyhow!(UNTOLD))?;
    let mut options = Options::default();
    let mut is_told = false;
    for line in BufReader::new(file.take(MOST)).split(b'\n') {
        let line = line.map_err(|e| anyhow!("failed to read what Bazel reported: {e}"))?;
        let Ok(event) = serde_json::from_slice::<Value>(&line) else {
            continue;
        };
        if let Some(parsed) = event.get("optionsParsed") {
            is_told = true;
            if parsed
                .get("invocationPolicy")
                .and_then(Value::as_object)
                .is_some_and(|policy| !policy.is_empty())
            {
                bail!("an invocation policy may change them");
            }
            let list = |name| strings(parsed.get(name));
            let startup = list("startupOptions");
            // The one of them that is about the cache.
            let of_cache = |option: &&String| option.starts_with("--digest_function=");
            options.list = startup.iter().filter(of_cache).cloned().collect();
            options.list.extend(list("cmdLine"));
            let proxies = ["-Dhttps.proxyHost=", "-Djava.net.useSystemProxies=true"];
            options.has_proxy = startup.iter().any(|option| {
                let arg = option.strip_prefix("--host_jvm_args=").unwrap_or_default();
                proxies.iter().any(|proxy| arg.starts_with(proxy))
            });
            options.output_base = startup
                .iter()
                .rev()
                .find_map(|option| option.strip_prefix("--output_base="))
                .map(PathBuf::from);
        }
    }
    if !is_told {
        bail!(UNTOLD);
    }
    // Behind them stands what Bazel adds for others, such as what --test_output=streamed implies.
    let ours = options
        .list
        .windows(flags.len())
        .rposition(|window| window == flags);
    let ours = ours.ok_or_else(|| anyhow!("Bazel reported other options than it was given"))?;
    let behind = options.list.split_off(ours + flags.len());
    let is_way = |option: &&String| WAY.iter().any(|way| option.starts_with(way));
    if let Some(option) = behind.iter().find(is_way) {
        options.overruled = option.split('=').next().map(str::to_owned);
    }
    options.list.truncate(ours);
    options.list.extend(behind);
    Ok(options)
}

fn strings(value: Option<&Value>) -> Vec<String> {
    let list = value.and_then(Value::as_array).into_iter().flatten();
    list.filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn versions_are_read_where_there_is_one() {
        for (said, expected) in [
            ("bazel 7.7.1\n", Some(7)),
            ("bazel 8.0.0-pre.20240101\n", Some(8)),
            ("WARNING: x\nbazel 6.4.0- (@non-git)\n", Some(6)),
            ("bazel 10\n", Some(10)),
            ("bazel no_version\n", None),
            ("GNU Make 4.3\n", None),
            ("", None),
        ] {
            assert_eq!(version(said), expected, "{said}");
        }
    }

    /// A Bazel of 20 lines. It knows the flags `known`, tells its options and the rc file's, and writes down how it was
    /// called.
    fn fake(dir: &Path, body: &str) -> PathBuf {
        let path = dir.join("bazel");
        std::fs::write(&path, format!("#!/bin/bash\n{body}")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    const TELLING: &str = r#"
[ "$1" = --version ] && { echo "bazel $VERSION"; exit; }
printf '%s\n' "$*" >> "$0.calls"
list='"--config=ci","--bes_backend=grpc://rc:1","--jobs=4"'
for arg; do
[[ -n "$UNKNOWN" && "$arg" =~ $UNKNOWN ]] && { echo "ERROR: $arg :: Unrecognized option: $arg" >&2; exit 2; }
case "$arg" in
  --build_event_json_file=*) file=${arg#*=}; list="$list,\"$arg\"" ;;
  --*) list="$list,\"$arg\"" ;;
esac; done
echo "{\"id\":{\"started\":{}},\"aborted\":{}}" > "$file"
echo "{\"optionsParsed\":{\"startupOptions\":[\"--output_base=/ob\",\"--digest_function=blake3\"],\"cmdLine\":[$list$IMPLIED]$POLICY}}" >> "$file"
exit 2
"#;

    async fn asked(dir: &Path, variables: &str, command: &str) -> CommandInfo {
        let program = fake(dir, &format!("{variables}\n{TELLING}"));
        let command: Vec<OsString> = command.split(' ').map(OsString::from).collect();
        let path = super::super::program::path();
        let probe = Probe {
            program: &program,
            path: &path,
            directory: None,
            scratch: dir,
        };
        probe.ask(&Line::building(&command).unwrap()).await
    }

    #[tokio::test]
    async fn options_are_told_with_those_of_rc_files_and_without_ours() {
        let dir = tempfile::tempdir().unwrap();
        for variables in [
            "VERSION=7.7.1",
            "VERSION=7.7.1 UNKNOWN=--execution_log_compact",
            "VERSION=7.7.1 UNKNOWN=--memory_profile",
            "VERSION=7.7.1 UNKNOWN=--experimental_workspace_rules",
        ] {
            let told = asked(dir.path(), variables, "bazel build --x=1 //a -- //b").await;
            assert_eq!((told.version, &*told.word), (Some(7), "build"));
            let options = told.options.unwrap();
            assert_eq!(
                options.list,
                [
                    "--digest_function=blake3",
                    "--config=ci",
                    "--bes_backend=grpc://rc:1",
                    "--jobs=4",
                    "--x=1"
                ]
            );
            assert_eq!(options.output_base.as_deref(), Some(Path::new("/ob")));
            assert_eq!(options.line().last("bes_backend"), Some("grpc://rc:1"));
        }
        let left: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(
            !std::fs::read_to_string(dir.path().join("bazel.calls"))
                .unwrap()
                .contains("//b")
        );
    }

    #[tokio::test]
    async fn options_that_others_imply_may_stand_behind_ours() {
        let dir = tempfile::tempdir().unwrap();
        let variables = "IMPLIED=',\"--test_sharding_strategy=disabled\"'";
        let told = asked(dir.path(), variables, "bazel test --test_output=streamed").await;
        let options = told.options.unwrap();
        assert_eq!(
            options.list[3..],
            [
                "--jobs=4",
                "--test_output=streamed",
                "--test_sharding_strategy=disabled"
            ]
        );
    }

    #[tokio::test]
    async fn what_a_wrapper_adds_after_ours_must_not_lead_events_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        for (added, name) in [
            ("--bes_backend=", Some("--bes_backend")),
            ("--bes_backend=grpc://h:1", Some("--bes_backend")),
            ("--bes_proxy=unix:/s", Some("--bes_proxy")),
            ("--remote_cache=grpc://h:1", None),
            ("--bes_backend_not=1", None),
        ] {
            let variables = format!("IMPLIED=',\"{added}\"'");
            let told = asked(dir.path(), &variables, "bazel build //a").await;
            let options = told.options.unwrap();
            assert_eq!(options.overruled.as_deref(), name, "{added}");
            assert_eq!(options.list.last().unwrap(), added);
        }
    }

    #[tokio::test]
    async fn a_command_that_bazel_refuses_is_known_by_its_code_and_by_telling_nothing() {
        for (body, expected) in [
            (
                "echo \"ERROR: Config value 'nope' is not defined\" >&2; exit 2",
                true,
            ),
            ("echo 'ERROR: --jobs=x: not a number' >&2; exit 2", true),
            ("exit 1", false),
            ("exit 2", false),
            // One of ours.
            ("echo 'ERROR: --profile=/dev/null: no' >&2; exit 2", false),
            (
                "for arg; do case $arg in --build_event_json_file=*) f=${arg#*=};; esac; done\n\
                 echo '{\"optionsParsed\":{\"invocationPolicy\":{\"a\":1}}}' > \"$f\"; exit 2",
                false,
            ),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let program = fake(
                dir.path(),
                &format!("[ \"$1\" = --version ] && echo bazel 7.7.1 && exit\n{body}"),
            );
            let command = ["bazel", "build", "//a"].map(OsString::from);
            let probe = Probe {
                program: &program,
                path: &std::env::var_os("PATH").unwrap(),
                directory: Some(dir.path()),
                scratch: dir.path(),
            };
            let told = probe.ask(&Line::building(&command).unwrap()).await;
            assert!(told.options.is_err(), "{body}");
            assert_eq!(told.is_refused, expected, "{body}");
        }
    }

    #[test]
    fn an_unknown_option_is_found_beside_what_bazel_suggests() {
        let flags = ["--profile=/dev/null", "--explain="].map(str::to_owned);
        for said in [
            "ERROR: --explain= :: Unrecognized option: --explain=\nmore",
            "ERROR: --explain= :: Unrecognized option: --explain= (did you mean '--expand'?)",
        ] {
            assert_eq!(without_unrecognized(&flags, said), Some(vec![flags[0].clone()]));
        }
    }

    #[tokio::test]
    async fn an_old_bazel_is_asked_once() {
        let dir = tempfile::tempdir().unwrap();
        let told = asked(
            dir.path(),
            "VERSION=4.2.3 UNKNOWN='compact|--remote_grpc_log'",
            "bazel build --batch",
        );
        assert!(told.await.options.is_ok());
        let calls = std::fs::read_to_string(dir.path().join("bazel.calls")).unwrap();
        assert_eq!(calls.lines().count(), 1, "{calls}");
    }

    #[tokio::test]
    async fn what_is_not_told_for_certain_is_not_known() {
        let dir = tempfile::tempdir().unwrap();
        for (variables, command, part) in [
            ("UNKNOWN=--x=1", "bazel build --x=1", "did not report"),
            (
                "UNKNOWN='--disk_cache=|--experimental_workspace_rules'",
                "bazel build",
                "did not report",
            ),
            (
                "POLICY=',\"invocationPolicy\":{\"flagPolicies\":[]}'",
                "bazel build",
                "policy",
            ),
        ] {
            let told = asked(dir.path(), variables, command).await;
            let error = told.options.unwrap_err();
            assert!(error.contains(part), "{variables}: {error}");
            assert_eq!(told.version, None);
        }
    }
}
