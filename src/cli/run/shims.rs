//! Bazels inside a wrapped program: a directory first on its `PATH` has scripts of Bazel's names, which say what Bazel is
//! meant. This program is their interpreter: it asks the `outhaul run` above it what to add, and becomes that Bazel, with the
//! environment that it would have had.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{Read as _, Write as _},
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, symlink},
        net::UnixStream as StdUnixStream,
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Arc,
    time::Duration,
};

use anyhow::{anyhow, bail};
use rustix::fs::StatVfsMountFlags;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
};

use super::super::{
    print,
    scratch::{Scratch, temporary},
};
use super::{
    again::Attempt,
    host::{Answer, Host},
    line::Line,
    probe::{CommandInfo, Probe, VARIABLE},
    program,
};

/// Names that Bazels are called by.
const NAMES: &[&str] = &["bazel", "bazelisk"];
/// Called so, the first argument is the Bazel.
const NAMED: &str = "outhaul-bazel";
/// Called so, it is a credential helper without credentials.
const HELPER: &str = "outhaul-no-credentials";
const SOCKET: &str = "socket";
/// The directory of the scripts.
const BIN: &str = "bin";
/// A link beside it, to the directory of a `run` that uses them.
const RUN: &str = "run";
/// The longest name of an interpreter that every kernel takes.
const LONGEST: usize = 120;
/// How long a client may take to say what it is, and a `run` to take note of another one's end.
const ASKING: Duration = Duration::from_secs(10);
/// Bytes that it may say.
const MOST: u64 = 64 << 20;

/// The beginning of the names of directories that go with a `run`.
const PREFIX: &str = "outhaul-run-";
/// The beginning of the names of directories of scripts, which stay.
const STANDING: &str = "outhaul-bazel-";

/// What a shim or an inner `run` sends to the socket of a `run`.
#[derive(Debug, Serialize, Deserialize)]
enum ShimRequest {
    /// A Bazel is to be run, and wants its flags.
    Bazel(Box<CommandInfo>),
    /// Another `run` has heard Bazels, and ends. Whether anything is missing is all that it has not said itself.
    Ended { has_failed: bool },
}

/// A directory that goes with this `run`, and one of scripts.
pub(in crate::cli) struct Shims {
    dir: Scratch,
    /// Where the scripts are. What a program has noted of the place where it has found Bazel must be right after this `run`,
    /// too, so that this is below the state directory, if it can be.
    stands: PathBuf,
}

impl Shims {
    /// Makes the directories: that of the `run` in the temporary directory or, where that is full or not to be written, in
    /// the state directory.
    pub(in crate::cli) fn new(state: Option<&Path>) -> anyhow::Result<Self> {
        let mut failed = String::new();
        if let Some(state) = state {
            // If not, this is said below.
            let _ = std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(state);
        }
        for base in [Some(temporary()), state.map(Path::to_owned)]
            .into_iter()
            .flatten()
        {
            match Scratch::new(&base, PREFIX).and_then(|dir| Self::with(dir, state)) {
                Ok(shims) => return Ok(shims),
                Err(error) => failed = format!("failed to create a directory in {}: {error}", base.display()),
            }
        }
        bail!(failed)
    }

    /// Puts in what a `run` needs.
    fn with(dir: Scratch, state: Option<&Path>) -> std::io::Result<Self> {
        let ours = std::env::current_exe()?;
        // Such as a `tools/bazel` calls.
        for name in [HELPER, NAMED] {
            symlink(&ours, dir.path().join(name))?;
        }
        let mut bazels = Vec::new();
        let path = program::path();
        for name in NAMES {
            // Scripts look which of them there are.
            if let Some(bazel) = program::find(OsStr::new(name), &path, is_ours) {
                bazels.push((*name, std::path::absolute(bazel)?));
            }
        }
        // Others, that were found another time, have other scripts.
        let named: Vec<&[u8]> = bazels
            .iter()
            .map(|(_, bazel)| bazel.as_os_str().as_bytes())
            .collect();
        let hash = blake3::hash(&named.join(&0)).to_hex();
        let name = format!("{STANDING}{}", &hash.as_str()[..16]);
        let kept = state.map(|state| state.join(&name)).filter(|place| {
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(place)
                .is_ok()
                && takes_scripts(place)
                && fill(place, &bazels, &ours).is_ok()
        });
        let stands = match kept {
            Some(place) => place,
            None => {
                let place = dir.path().join(&name);
                std::fs::create_dir(&place)?;
                fill(&place, &bazels, &ours)?;
                place
            }
        };
        Ok(Self { dir, stands })
    }

    fn bin(&self) -> PathBuf {
        self.stands.join(BIN)
    }

    /// For what a Bazel writes when it is asked.
    pub(in crate::cli) fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// The credential helper without credentials.
    pub(super) fn helper(&self) -> PathBuf {
        self.scratch().join(HELPER)
    }

    /// Answers Bazels below this directory from now on.
    pub(super) fn serve(&self, host: Arc<Host>) -> std::io::Result<()> {
        let listener = self.listen()?;
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let host = host.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, &host).await {
                        tracing::debug!("failed to answer a Bazel: {error}");
                    }
                });
            }
        });
        Ok(())
    }

    fn listen(&self) -> std::io::Result<UnixListener> {
        let listener = UnixListener::bind(self.scratch().join(SOCKET))?;
        // For those whose environment does not tell. One that is around this one, or runs beside it, keeps them.
        let link = self.stands.join(RUN);
        let is_served = std::fs::read_link(&link)
            .ok()
            .filter(|directory| is_own(directory))
            .is_some_and(|directory| StdUnixStream::connect(directory.join(SOCKET)).is_ok());
        if !is_served {
            renamed(&self.stands, &link, |made| symlink(self.scratch(), made))?;
        }
        Ok(listener)
    }

    /// What the environment of a wrapped program differs in.
    pub(super) fn environment(&self) -> Vec<(&'static str, Option<OsString>)> {
        let mut path = self.bin().into_os_string();
        path.push(":");
        path.push(program::path());
        vec![("PATH", Some(path)), (VARIABLE, Some(self.scratch().into()))]
    }
}

/// The Bazel that one of our scripts stands in for.
fn meant_by(script: &Path) -> Option<OsString> {
    let is_script = is_stand_in(script) && script.metadata().is_ok_and(|meta| meta.len() < MOST);
    let text = is_script.then(|| std::fs::read(script).ok()).flatten()?;
    let line = text.iter().position(|byte| *byte == b'\n')?;
    Some(OsString::from_vec(text.get(line + 1..)?.to_vec()))
}

/// Whether a file lies where scripts of ours do.
fn is_stand_in(file: &Path) -> bool {
    file.parent().and_then(Path::parent).is_some_and(has_scripts)
}

/// Whether scripts of ours are in a directory.
fn has_scripts(directory: &Path) -> bool {
    let name = directory.file_name().unwrap_or_default();
    name.as_bytes().starts_with(STANDING.as_bytes()) && directory.join(NAMED).is_symlink()
}

/// Whether kernels run scripts whose interpreter is in a directory.
fn takes_scripts(directory: &Path) -> bool {
    let interpreter = directory.join(NAMED);
    let interpreter = interpreter.as_os_str().as_bytes();
    let flags = rustix::fs::statvfs(directory).map(|stat| stat.f_flag);
    let is_noexec = flags.is_ok_and(|flags| flags.contains(StatVfsMountFlags::NOEXEC));
    // A colon would end it in a `PATH`.
    let is_odd = |byte: &u8| byte.is_ascii_whitespace() || *byte == b':';
    !is_noexec && interpreter.len() <= LONGEST && !interpreter.iter().any(is_odd)
}

/// Makes something in a directory, and gives it a name there, whatever has that.
fn renamed(place: &Path, to: &Path, make: impl FnOnce(&Path) -> std::io::Result<()>) -> std::io::Result<()> {
    let made = place.join(format!("{}-{:08x}", std::process::id(), rand::random::<u32>()));
    make(&made)
        .and_then(|()| std::fs::rename(&made, to))
        .inspect_err(|_| {
            let _ = std::fs::remove_file(&made);
        })
}

/// Puts scripts into a directory, which another `run` may be doing at the same time.
fn fill(place: &Path, bazels: &[(&str, PathBuf)], ours: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .create(place.join(BIN))?;
    let interpreter = place.join(NAMED);
    renamed(place, &interpreter, |made| symlink(ours, made))?;
    // Not links to this program, where that can be: scripts follow links, and call what they find there.
    let are_links = !takes_scripts(place);
    for (name, bazel) in bazels {
        let to = place.join(BIN).join(name);
        if are_links {
            renamed(place, &to, |made| symlink(ours, made))?;
            continue;
        }
        // Not a shell's script: a shell leaves variables out whose names it could not have itself.
        let script = [
            b"#!",
            interpreter.as_os_str().as_bytes(),
            b"\n",
            bazel.as_os_str().as_bytes(),
        ]
        .concat();
        if std::fs::read(&to).is_ok_and(|there| there == script) {
            continue;
        }
        renamed(place, &to, |made| {
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(0o700)
                .open(made)?;
            file.write_all(&script)
        })?;
    }
    Ok(())
}

async fn answer(mut stream: UnixStream, host: &Host) -> std::io::Result<()> {
    let mut asked = Vec::new();
    let (reading, mut writing) = stream.split();
    tokio::time::timeout(ASKING, reading.take(MOST).read_to_end(&mut asked)).await??;
    let answer = match serde_json::from_slice(&asked)? {
        ShimRequest::Bazel(info) => host.answer(&info, Attempt::Only).await,
        ShimRequest::Ended { has_failed } => {
            host.note_inner(has_failed);
            Answer::default()
        }
    };
    writing.write_all(&serde_json::to_vec(&answer)?).await
}

/// Whether a file is this program, by whatever name, or a script that calls it in the place of a Bazel.
pub(in crate::cli) fn is_ours(file: &Path) -> bool {
    let Ok(file) = file.canonicalize() else {
        return false;
    };
    let ours = std::env::current_exe().and_then(std::fs::canonicalize);
    ours.is_ok_and(|ours| file == ours) || is_stand_in(&file)
}

/// A `PATH` without directories such as [`Shims`] puts first, as it was.
pub(in crate::cli) fn path_without() -> OsString {
    let path = program::path();
    let is_shim = |directory: &PathBuf| NAMES.iter().any(|name| is_ours(&directory.join(name)));
    let others = std::env::split_paths(&path).filter(|directory| !is_shim(directory));
    std::env::join_paths(others).unwrap_or(path)
}

/// Runs what this program is called as, if it is called by one of the names above.
pub(in crate::cli) fn called_as_another() -> Option<ExitCode> {
    let mut args = std::env::args_os();
    let called = args.next()?;
    let name = Path::new(&called).file_name()?.to_str()?;
    let args: Vec<OsString> = args.collect();
    if NAMES.contains(&name) {
        return Some(become_bazel(&called, OsStr::new(name), args, false));
    }
    match name {
        NAMED => {
            let (program, args) = args.split_first()?;
            let meant = meant_by(Path::new(program));
            let bazel = meant.as_ref().unwrap_or(program);
            Some(become_bazel(bazel, bazel, args.to_vec(), meant.is_some()))
        }
        HELPER => Some(tell_no_credentials()),
        _ => None,
    }
}

/// Speaks the protocol of credential helpers.
fn tell_no_credentials() -> ExitCode {
    let _ = std::io::stdin().take(MOST).read_to_end(&mut Vec::new());
    match writeln!(std::io::stdout(), "{{\"headers\":{{}}}}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Does not come back if there is such a Bazel. A script of ours may be called where no `run` is above, by what has noted its
/// path.
fn become_bazel(called: &OsStr, name: &OsStr, args: Vec<OsString>, is_script: bool) -> ExitCode {
    let mut err = print::err();
    let path = path_without();
    let Some(bazel) = program::find(name, &path, is_ours) else {
        let _ = writeln!(err, "outhaul: {}: command not found", Path::new(name).display());
        return ExitCode::from(127);
    };
    let scripts = scripts();
    let directory = directory(scripts.as_deref());
    let mut command = vec![bazel.clone().into_os_string()];
    // A script that hands its `PATH` on in an option means the one that it would have.
    command.extend(args.into_iter().map(|arg| match &scripts {
        Some(scripts) => without_shims(arg, scripts),
        None => arg,
    }));
    let asked = if is_script && directory.is_none() {
        Ok((command.split_off(1), Vec::new()))
    } else {
        asked(&bazel, &path, &command, directory.as_deref(), scripts.as_deref())
    };
    let args = match asked {
        Ok((args, messages)) => {
            for message in messages {
                let _ = writeln!(err, "outhaul: {message}");
            }
            args
        }
        Err(reason) => {
            let _ = writeln!(err, "outhaul: {reason}; running Bazel without outhaul");
            command.split_off(1)
        }
    };
    let mut process = Command::new(&bazel);
    process.args(args).env("PATH", &path).env_remove(VARIABLE);
    if !called.as_bytes().contains(&b'/') {
        process.arg0(called);
    }
    let error = process.exec();
    let _ = writeln!(err, "outhaul: failed to run {}: {error}", bazel.display());
    ExitCode::from(if error.kind() == std::io::ErrorKind::NotFound {
        127
    } else {
        126
    })
}

/// The arguments for a Bazel, and what the user should hear.
fn asked(
    bazel: &Path,
    path: &OsString,
    command: &[OsString],
    directory: Option<&Path>,
    scripts: Option<&Path>,
) -> anyhow::Result<(Vec<OsString>, Vec<String>)> {
    let Some(line) = Line::building(command).filter(|_| program::is_bazel(bazel)) else {
        return Ok((command.get(1..).unwrap_or_default().to_vec(), Vec::new()));
    };
    let directory = directory.ok_or_else(|| anyhow!("failed to find the `outhaul run` around this Bazel"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| anyhow!("failed to start: {e}"))?;
    let probe = Probe {
        program: bazel,
        path,
        directory: None,
        scratch: directory,
    };
    let told = runtime.block_on(probe.ask(&line));
    let mut flags = match (&told.options, scripts) {
        (Ok(options), Some(scripts)) => corrected(&options.list, scripts),
        _ => Vec::new(),
    };
    let answer = ask(&directory.join(SOCKET), &ShimRequest::Bazel(Box::new(told)))
        .map_err(|e| anyhow!("failed to reach the `outhaul run` around this Bazel: {e}"))?;
    flags.extend(answer.flags);
    Ok((line.with(&flags), answer.messages))
}

/// An argument without the directory of our scripts, where it stands before others in a list of directories.
fn without_shims(arg: OsString, directory: &Path) -> OsString {
    let bin = [directory.join(BIN).as_os_str().as_bytes(), b":"].concat();
    let mut rest = arg.as_bytes();
    let mut without = Vec::new();
    while let Some(at) = rest.windows(bin.len()).position(|part| part == bin) {
        without.extend_from_slice(&rest[..at]);
        rest = &rest[at + bin.len()..];
    }
    if without.is_empty() && rest.len() == arg.len() {
        return arg;
    }
    without.extend_from_slice(rest);
    OsString::from_vec(without)
}

/// Options of rc files that have it, once more without it: such a file may have been written by the same script.
fn corrected(options: &[String], directory: &Path) -> Vec<String> {
    let corrected = options.iter().filter_map(|option| {
        let without = without_shims(option.into(), directory);
        let without = without.into_string().ok()?;
        (without != *option).then_some(without)
    });
    corrected.collect()
}

/// The directory of the `outhaul run` above: the environment tells it, or else the `PATH` that led here.
fn directory(scripts: Option<&Path>) -> Option<PathBuf> {
    let directory = match std::env::var_os(VARIABLE) {
        Some(directory) => PathBuf::from(directory),
        // The link stays when that `run` has ended.
        None => std::fs::read_link(scripts?.join(RUN))
            .ok()
            .filter(|directory| directory.join(SOCKET).exists())?,
    };
    is_own(&directory).then_some(directory)
}

/// Whether a directory is there and our own user's. Where a `run` had one, anybody may make another: what is in it is told all
/// options, and says what Bazel is run with.
fn is_own(directory: &Path) -> bool {
    let found = directory.symlink_metadata();
    found.is_ok_and(|found| found.is_dir() && found.uid() == rustix::process::geteuid().as_raw())
}

/// The directory of the scripts that are in the `PATH`.
fn scripts() -> Option<PathBuf> {
    std::env::split_paths(&program::path())
        .filter_map(|bin| bin.parent().map(Path::to_owned))
        .find(|directory| has_scripts(directory))
}

fn ask(socket: &Path, request: &ShimRequest) -> std::io::Result<Answer> {
    let mut stream = StdUnixStream::connect(socket)?;
    stream.write_all(&serde_json::to_vec(request)?)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.take(MOST).read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}

/// Tells the `run` above, if there is one, that Bazels were heard here. It may have ended, and is not waited for long.
pub(super) async fn tell_outer(has_failed: bool) {
    let Some(directory) = directory(scripts().as_deref()) else {
        return;
    };
    let telling = async {
        let mut stream = UnixStream::connect(directory.join(SOCKET)).await?;
        stream
            .write_all(&serde_json::to_vec(&ShimRequest::Ended { has_failed })?)
            .await?;
        stream.shutdown().await?;
        stream.read_to_end(&mut Vec::new()).await
    };
    let told = tokio::time::timeout(ASKING, telling).await;
    if !matches!(told, Ok(Ok(_))) {
        tracing::debug!("failed to reach the `outhaul run` around this one: {told:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_with_a_path_have_the_one_that_there_would_be() {
        let directory = Path::new("/tmp/outhaul-run-1-2");
        for (given, meant) in [
            (
                "--action_env=PATH=/tmp/outhaul-run-1-2/bin:/usr/bin",
                "--action_env=PATH=/usr/bin",
            ),
            (
                "--test_env=PATH=/a:/tmp/outhaul-run-1-2/bin:/b:/tmp/outhaul-run-1-2/bin:/c",
                "--test_env=PATH=/a:/b:/c",
            ),
            ("/tmp/outhaul-run-1-2/bin:", ""),
            (
                "--define=x=/tmp/outhaul-run-1-2/binary:/b",
                "--define=x=/tmp/outhaul-run-1-2/binary:/b",
            ),
            ("//a:b", "//a:b"),
        ] {
            assert_eq!(without_shims(given.into(), directory), OsString::from(meant));
        }
        let options = ["--jobs=4", "--action_env=PATH=/tmp/outhaul-run-1-2/bin:/x"].map(str::to_owned);
        assert_eq!(corrected(&options, directory), ["--action_env=PATH=/x"]);
    }

    #[test]
    fn a_script_says_what_bazel_is_meant() {
        let base = tempfile::tempdir().unwrap();
        let ours = std::env::current_exe().unwrap();
        let place = base.path().join("outhaul-bazel-a");
        std::fs::create_dir(&place).unwrap();
        let bazels = [("a", "/a b/it's".into()), ("b", "/new\nline/bazel".into())];
        // The second time, everything is there.
        for _ in 0..2 {
            fill(&place, &bazels, &ours).unwrap();
            for (name, bazel) in &bazels {
                let script = place.join(BIN).join(name);
                assert_eq!(meant_by(&script), Some(bazel.into()));
                assert!(is_ours(&script));
                let text = std::fs::read_to_string(&script).unwrap();
                assert!(text.starts_with(&format!("#!{}\n", place.join(NAMED).display())));
            }
        }
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 2);
        // A kernel would take the rest of its name for an argument.
        let odd = base.path().join("a b/outhaul-bazel-a");
        std::fs::create_dir_all(&odd).unwrap();
        fill(&odd, &bazels, &ours).unwrap();
        assert!(odd.join(BIN).join("a").is_symlink());
        assert_eq!(meant_by(Path::new("/bin/sh")), None);
    }

    #[tokio::test]
    async fn scripts_stay_where_they_are_from_run_to_run() {
        let base = tempfile::tempdir().unwrap();
        let state = base.path().join("state");
        std::fs::create_dir(&state).unwrap();
        let make =
            |state: &Path| Shims::with(Scratch::new(base.path(), PREFIX).unwrap(), Some(state)).unwrap();
        let [first, second, third] = [(); 3].map(|()| make(&state));
        assert!(first.stands.starts_with(&state));
        assert_eq!(first.stands, second.stands);
        let stands = first.stands.clone();
        let leads_to = || directory(Some(&stands));
        assert_eq!(leads_to(), None, "nothing is served");
        // Only a `run` that is there has those without a word in their environment; one beside it does not take them over.
        let _first = first.listen().unwrap();
        assert_eq!(leads_to().unwrap(), first.scratch());
        let _second = second.listen().unwrap();
        assert_eq!(leads_to().unwrap(), first.scratch());
        drop(first);
        assert_eq!(leads_to(), None);
        let _third = third.listen().unwrap();
        assert_eq!(leads_to().unwrap(), third.scratch());
        drop((second, third));
        assert!(has_scripts(&stands) && leads_to().is_none());
        // Where there can be none, they go with the `run`.
        let file = base.path().join("file");
        std::fs::write(&file, "").unwrap();
        let shims = make(&file);
        assert!(shims.stands.starts_with(shims.scratch()));
    }
}
