//! The Bazel of a workspace: which it is, and what it says of the command's options, if it may be asked.

use std::{
    ffi::OsString,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use super::finding::Finding;
use crate::{
    cli::{
        paths::workspace_around,
        run::{CommandInfo, KNOWN, Line, Probe, find, is_bazel, is_ours, path_without},
        scratch::Scratch,
    },
    transport::without_user_info,
};

/// The beginning of the names of doctor's own directories.
pub(super) const SCRATCH: &str = "outhaul-doctor-";

/// Startup options that choose rc files: no server is told of them.
const RC: &[&str] = &[
    "bazelrc",
    "home_rc",
    "system_rc",
    "workspace_rc",
    "ignore_all_rc_files",
];

/// The workspace and its Bazel, as far as there are any.
pub(super) struct Place {
    /// Where the command is called.
    pub(super) directory: PathBuf,
    pub(super) workspace: Option<PathBuf>,
    /// The Bazel that the command means.
    pub(super) program: Option<PathBuf>,
    /// The command: its first word is the program's name.
    pub(super) command: Vec<OsString>,
}

impl Place {
    /// The command that is meant where none is given.
    pub(super) fn new(directory: PathBuf, command: &[OsString]) -> Self {
        let path = path_without();
        let found = |name: &OsString| find(name, &path, is_ours).filter(|file| is_bazel(file));
        let mut command = command.to_vec();
        if command.is_empty() {
            let has_bazel = found(&"bazel".into()).is_some();
            let name = if has_bazel { "bazel" } else { "bazelisk" };
            command = vec![name.into(), "build".into()];
        }
        let program = command.first().and_then(found);
        let program = program.and_then(|file| std::path::absolute(file).ok());
        Self {
            workspace: workspace_around(&directory),
            program: program.filter(|file| file.exists()),
            directory,
            command,
        }
    }

    /// What is known of the command, and whether Bazel was asked. It is only asked if a server of this workspace runs, or if
    /// `starts` allows to start one; else the options are unknown, with the reason.
    pub(super) async fn ask(&self, line: &Line<'_>, starts: bool) -> Option<(CommandInfo, bool)> {
        let program = self.program.as_deref()?;
        let path = path_without();
        let scratch = Scratch::temporary(SCRATCH);
        let probe = Probe {
            program,
            path: &path,
            directory: Some(&self.directory),
            scratch: scratch.as_ref().map_or(Path::new("/"), Scratch::path),
        };
        let reason = match (&scratch, &self.workspace) {
            (_, None) => "there is no workspace".to_owned(),
            (Err(failure), _) => failure.message.clone(),
            (Ok(_), Some(workspace)) if starts || has_server(workspace, line.startup()) => {
                // Of another command that runs, the server says so at once.
                let mut command = self.command.clone();
                command.insert(1, "--noblock_for_lock".into());
                let line = Line::building(&command)?;
                return Some((probe.ask(&line).await, true));
            }
            (Ok(_), Some(_)) => "no Bazel server runs for this workspace, and doctor starts none".to_owned(),
        };
        let info = CommandInfo {
            word: line.word().to_owned(),
            directory: self.directory.clone(),
            version: probe.version().await,
            backend: None,
            options: Err(reason),
            is_refused: false,
            is_script: false,
        };
        Some((info, false))
    }
}

/// Whether this user runs a Bazel server for a workspace with these startup options: asking it starts no other one.
fn has_server(workspace: &Path, startup: &[OsString]) -> bool {
    let Ok(workspace) = workspace.canonicalize() else {
        return false;
    };
    let base = super::machine::output_base(&workspace);
    let user = rustix::process::geteuid().as_raw();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut ours = processes.filter(|entry| entry.metadata().is_ok_and(|meta| meta.uid() == user));
    ours.any(|entry| {
        let command = std::fs::read(entry.path().join("cmdline"));
        command.is_ok_and(|command| is_server(&command, &workspace, base.as_deref(), startup))
    })
}

/// Whether a process's arguments (proc(5)) are those of the server of a workspace, whose own output base may be known.
fn is_server(command: &[u8], workspace: &Path, base: Option<&Path>, startup: &[OsString]) -> bool {
    let args: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
    let workspace = [b"--workspace_directory=", workspace.as_os_str().as_bytes()].concat();
    let mut told = startup.iter().filter(|option| !is_of_rc(option));
    // One with another output base is not the one that would be asked.
    let names_base = |option: &OsString| option.as_bytes().starts_with(b"--output_base");
    let own = [
        b"--output_base=",
        base.unwrap_or(Path::new("")).as_os_str().as_bytes(),
    ]
    .concat();
    args.contains(&&*workspace)
        && told.all(|option| args.contains(&option.as_bytes()))
        && (startup.iter().any(names_base) || base.is_none() || args.contains(&&*own))
}

fn is_of_rc(option: &OsString) -> bool {
    let name = option.to_str().and_then(|option| option.strip_prefix("--"));
    let name = name.and_then(|name| name.split('=').next()).unwrap_or_default();
    RC.contains(&name) || name.strip_prefix("no").is_some_and(|name| RC.contains(&name))
}

/// Whether there is a workspace.
pub(super) fn workspace(place: &Place) -> Finding {
    const CODE: &str = "workspace";
    match &place.workspace {
        Some(workspace) => Finding::ok(CODE, format!("the workspace is {}", workspace.display())),
        None => Finding::error(
            CODE,
            format!(
                "{} is not in a Bazel workspace: there is no MODULE.bazel, REPO.bazel, WORKSPACE.bazel or WORKSPACE above",
                place.directory.display()
            ),
            "change to a workspace, or name one with --workspace",
        ),
    }
}

/// Which Bazel there is, and whether `run` knows its version.
pub(super) fn program(place: &Place, version: Option<u32>) -> Finding {
    const CODE: &str = "bazel";
    let Some(program) = &place.program else {
        let name = place
            .command
            .first()
            .map_or_else(Default::default, |name| name.to_string_lossy());
        return Finding::error(
            CODE,
            format!("{name} is not a Bazel that can be run"),
            "install Bazel or Bazelisk, or name it: outhaul doctor -- /path/to/bazel build //...",
        );
    };
    let program = program.display();
    match version {
        Some(version) if KNOWN.contains(&version) => {
            Finding::ok(CODE, format!("{program} is Bazel {version}"))
        }
        Some(version) => Finding::note(
            CODE,
            format!(
                "{program} is Bazel {version}: under `outhaul run`, only Bazels {} to {} leave downloads to outhaul",
                KNOWN.start(),
                KNOWN.end()
            ),
            "use one of these, or let Bazel download outputs itself",
        ),
        None => Finding::note(
            CODE,
            format!(
                "{program} does not tell its version: under `outhaul run`, Bazel then downloads outputs itself"
            ),
            "look at what `bazel --version` prints; outhaul knows `bazel N…`",
        ),
    }
}

/// Whether the options are known. `is_asked` is whether Bazel was asked for them.
pub(super) fn options(info: &CommandInfo, is_asked: bool) -> Finding {
    const CODE: &str = "bazel-options";
    match &info.options {
        Ok(_) => Finding::ok(
            CODE,
            format!(
                "Bazel told the options of `bazel {}`, rc files included",
                info.word
            ),
        ),
        Err(reason) if is_asked => Finding::warning(
            CODE,
            format!(
                "Bazel's options are unknown ({reason}): under `outhaul run`, Bazel downloads outputs itself"
            ),
            "run the command with Bazel alone; if it works, look for an --invocation_policy",
        ),
        Err(reason) => Finding::note(
            CODE,
            format!(
                "{reason}: options in rc files, the cache that they name, and the output base were not looked at"
            ),
            "build once, or run `outhaul doctor --start-bazel`",
        ),
    }
}

/// A server that does not get to this `outhaul`, with the reason.
pub(super) fn server(reason: &anyhow::Error) -> Finding {
    Finding::error(
        "bazel-server",
        format!("under `outhaul run`, nothing is downloaded: {reason}"),
        "run outhaul where Bazel's server runs, or `bazel shutdown` there and build here",
    )
}

/// Where the command's events go. `forward` tells whether `run` can send them on; `is_ours` whether outhaul itself is there.
pub(super) fn backend(address: Option<&str>, is_ours: bool, forward: Result<(), String>) -> Finding {
    const CODE: &str = "bes-backend";
    let Some(address) = address.map(without_user_info) else {
        return Finding::ok(
            CODE,
            "the command names no event service; `outhaul run` gets its events",
        );
    };
    match forward {
        _ if is_ours => Finding::ok(CODE, format!("events go to outhaul at {address}")),
        Ok(()) => Finding::ok(
            CODE,
            format!("events go to {address}; `outhaul run` gets them and forwards them there"),
        ),
        Err(reason) => Finding::error(
            CODE,
            format!("events go to {address}, and under `outhaul run` nothing is downloaded: {reason}"),
            "change --bes_backend or what the message names, or remove them for `outhaul run`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Level, *};
    use crate::cli::run::Options;

    #[test]
    fn the_server_of_a_workspace_is_known_by_its_arguments() {
        let command = b"bazel(ws)\0-Xmx1g\0--output_base=/ob\0--workspace_directory=/home/me/ws\0";
        let startup = |options: &[&str]| options.iter().map(OsString::from).collect::<Vec<_>>();
        let is = |workspace: &str, options: &[&str]| {
            is_server(command, Path::new(workspace), None, &startup(options))
        };
        assert!(is("/home/me/ws", &[]));
        assert!(is("/home/me/ws", &["--output_base=/ob"]));
        assert!(!is("/home/me/ws", &["--output_base=/other"]));
        assert!(is("/home/me/ws", &["--nohome_rc", "--bazelrc=/x", "-Xmx1g"]));
        assert!(!is("/home/me/w", &[]));
        assert!(!is("/home/me/ws2", &[]));
        assert!(!is_server(b"", Path::new("/home/me/ws"), None, &[]));
    }

    #[test]
    fn a_directory_without_a_workspace_and_a_command_without_a_bazel_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path().to_owned(), &["/no/such/bazel".into(), "build".into()]);
        let found = workspace(&place);
        assert_eq!((found.code, found.level), ("workspace", Level::Error));
        assert!(found.message.contains(dir.path().to_str().unwrap()));
        let found = program(&place, None);
        assert_eq!((found.code, found.level), ("bazel", Level::Error));
        std::fs::write(dir.path().join("MODULE.bazel"), "").unwrap();
        let place = Place::new(dir.path().to_owned(), &[]);
        assert_eq!(workspace(&place).level, Level::Ok);
    }

    #[test]
    fn old_and_unknown_bazels_are_worth_a_note() {
        let place = Place {
            directory: "/".into(),
            workspace: None,
            program: Some("/usr/bin/bazel".into()),
            command: vec!["bazel".into()],
        };
        for (version, level) in [
            (Some(9), Level::Note),
            (Some(8), Level::Ok),
            (Some(7), Level::Ok),
            (Some(6), Level::Note),
            (None, Level::Note),
        ] {
            assert_eq!(program(&place, version).level, level, "{version:?}");
        }
    }

    #[test]
    fn options_that_are_not_known_are_said_to_be() {
        let info = |options| CommandInfo {
            word: "build".to_owned(),
            directory: "/".into(),
            version: Some(7),
            backend: None,
            options,
            is_refused: false,
            is_script: false,
        };
        assert_eq!(options(&info(Ok(Options::default())), true).level, Level::Ok);
        let unknown = info(Err("a reason".to_owned()));
        assert_eq!(options(&unknown, true).level, Level::Warning);
        let note = options(&unknown, false);
        assert_eq!(note.level, Level::Note);
        assert!(note.message.contains("a reason") && note.fix.unwrap().contains("--start-bazel"));
    }

    #[test]
    fn an_event_service_that_cannot_be_forwarded_to_is_an_error_and_no_password_is_shown() {
        for (address, is_ours, forward, level) in [
            (None, false, Ok(()), Level::Ok),
            (Some("grpc://127.0.0.1:8985"), true, Ok(()), Level::Ok),
            (Some("grpcs://me:pass@bes"), false, Ok(()), Level::Ok),
            (
                Some("grpcs://me:pass@bes"),
                false,
                Err("no".to_owned()),
                Level::Error,
            ),
        ] {
            let found = backend(address, is_ours, forward);
            assert_eq!(found.level, level, "{address:?}");
            assert!(!found.message.contains("pass"), "{}", found.message);
        }
    }
}
