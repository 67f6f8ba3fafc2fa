//! The program itself: as a daemon, and as the commands that ask it.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

use outhaul_testkit::{Ran, Running, clean, eventually};
use rustix::process::Signal;
use serde_json::Value;

use super::{
    cache::{Cache, Settings},
    scratch::Scratch,
};

/// The command line with a state directory of its own.
pub(crate) struct Outhaul {
    dir: Scratch,
    /// A command in front of `outhaul serve`.
    wrapper: Vec<String>,
    variables: Vec<(&'static str, &'static str)>,
}

impl Outhaul {
    pub(crate) fn new() -> Self {
        Self {
            dir: Scratch::new("state"),
            wrapper: Vec::new(),
            variables: Vec::new(),
        }
    }

    /// With what a cache needs in the environment.
    pub(crate) fn reading(settings: &Settings) -> Self {
        Self {
            variables: settings.variables.clone(),
            ..Self::new()
        }
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// A command that knows nothing of the user's own settings.
    pub(crate) fn command(&self, subcommand: &str, cwd: &Path) -> Command {
        // Another binary than this build's may be tried: a release, say.
        let program = std::env::var_os("OUTHAUL_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_outhaul").into());
        let command = match self.wrapper.split_first() {
            Some((first, rest)) if subcommand == "serve" => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            _ => Command::new(program),
        };
        let mut command = clean(command);
        command
            .current_dir(cwd)
            .arg(subcommand)
            .arg("--state-dir")
            .arg(self.state_dir())
            .envs(self.variables.iter().copied());
        command
    }

    /// Starts a subcommand from a directory, with the state directory's flag put in front of the arguments.
    pub(crate) fn start<S: AsRef<OsStr>>(&self, cwd: &Path, subcommand: &str, args: &[S]) -> Running {
        let mut command = self.command(subcommand, cwd);
        command.args(args);
        Running::start(command)
    }

    /// Runs a subcommand that has no state directory.
    pub(crate) fn stateless<S: AsRef<OsStr>>(&self, cwd: &Path, subcommand: &str, args: &[S]) -> Ran {
        let program = std::env::var_os("OUTHAUL_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_outhaul").into());
        let mut command = clean(Command::new(program));
        command.current_dir(cwd).arg(subcommand).args(args);
        Running::start(command).wait()
    }

    /// Runs a subcommand from a directory.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, cwd: &Path, subcommand: &str, args: &[S]) -> Ran {
        self.start(cwd, subcommand, args).wait()
    }

    /// What a subcommand answers with `--json`, a value a line; demands that it succeeds.
    #[track_caller]
    pub(crate) fn json(&self, cwd: &Path, subcommand: &str, args: &[&str]) -> Vec<Value> {
        let args: Vec<&str> = std::iter::once("--json").chain(args.iter().copied()).collect();
        self.run(cwd, subcommand, &args).ok().json()
    }

    /// What `stat` says of one output.
    #[track_caller]
    pub(crate) fn stat(&self, cwd: &Path, path: &str) -> Value {
        one(self.json(cwd, "stat", &[path]))
    }

    /// What `why` says of one output.
    #[track_caller]
    pub(crate) fn why(&self, cwd: &Path, path: &str) -> Value {
        one(self.json(cwd, "why", &[path]))
    }

    /// What `status` says of all invocations, newest first.
    #[track_caller]
    pub(crate) fn statuses(&self) -> Vec<Value> {
        self.json(Path::new("/"), "status", &[])
    }

    /// What `status` says of the newest invocation.
    #[track_caller]
    pub(crate) fn status(&self) -> Value {
        self.statuses()
            .into_iter()
            .next()
            .expect("an invocation is recorded")
    }
}

#[track_caller]
fn one(mut values: Vec<Value>) -> Value {
    assert_eq!(values.len(), 1, "{values:?}");
    values.remove(0)
}

/// A running daemon. Killed when dropped.
pub(crate) struct Daemon {
    outhaul: Outhaul,
    args: Vec<String>,
    /// The port that the system chose at the first start.
    address: String,
    process: Option<Running>,
    /// What its earlier processes said.
    said: String,
}

impl Daemon {
    /// A daemon that reads from a cache.
    pub(crate) fn start(cache: &Cache) -> Self {
        Self::reading(cache.settings(), &[])
    }

    /// A daemon with these arguments of `outhaul serve`.
    pub(crate) fn with(args: &[&str]) -> Self {
        Self::reading(&Settings::default(), args)
    }

    /// A daemon that reads from a cache, with further arguments.
    pub(crate) fn reading(settings: &Settings, more: &[&str]) -> Self {
        let args = settings.and(more);
        let mut daemon = Self {
            outhaul: Outhaul::reading(settings),
            args: args.iter().map(ToString::to_string).collect(),
            address: "127.0.0.1:0".to_owned(),
            process: None,
            said: String::new(),
        };
        daemon.launch();
        daemon
    }

    /// Starts it again through another command, which must become it.
    pub(crate) fn restart_after(&mut self, wrapper: &[&str], args: &[&str]) {
        self.outhaul.wrapper = wrapper.iter().map(ToString::to_string).collect();
        self.restart_with(args);
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().expect("the daemon runs").id()
    }

    fn launch(&mut self) {
        let listen = format!("--bes-listen={}", self.address);
        let mut args = vec![listen.as_str()];
        if !self.args.iter().any(|arg| arg.starts_with("--admin-listen")) {
            args.push("--admin-listen=none");
        }
        args.extend(self.args.iter().map(String::as_str));
        let mut process = self.outhaul.start(Path::new("/"), "serve", &args);
        eventually("the daemon listens", || process.is_open());
        self.address = process.address().trim_start_matches("grpc://").to_owned();
        self.process = Some(process);
    }

    /// Starts it again, with the same state and on the same port.
    pub(crate) fn restart(&mut self) {
        self.kill();
        self.launch();
    }

    /// As [`Daemon::restart`], with other arguments.
    pub(crate) fn restart_with(&mut self, args: &[&str]) {
        self.args = args.iter().map(ToString::to_string).collect();
        self.restart();
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.signal(Signal::KILL);
            self.said += &process.wait().err;
        }
    }

    /// SIGTERM, and waits for the end.
    pub(crate) fn terminate(&mut self) -> Ran {
        let process = self.process.take().expect("the daemon runs");
        process.signal(Signal::TERM);
        let run = process.wait();
        self.said += &run.err;
        run
    }

    /// The build tool's flag that sends events here.
    pub(crate) fn bes(&self) -> String {
        format!("--bes_backend=grpc://{}", self.address)
    }

    /// Its log, of all its processes.
    pub(crate) fn log(&self) -> String {
        let now = self.process.as_ref().map(Running::stderr).unwrap_or_default();
        format!("{}{now}", self.said)
    }

    /// The commands that ask it.
    pub(crate) fn outhaul(&self) -> &Outhaul {
        &self.outhaul
    }

    /// Demands of the newest invocation that it is settled and that nothing failed. Gives its status.
    #[track_caller]
    pub(crate) fn settled(&self) -> Value {
        let status = self.outhaul.status();
        assert!(
            status["state"] == "settled" && status["failed"] == 0 && status["pending"] == 0,
            "{status:#}\nthe daemon said\n{}",
            self.log()
        );
        status
    }
}
