//! A real Bazel with a server, an output root and a workspace of its own.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
};

use outhaul_testkit::{Ran, Running, peers};

use super::{
    scratch::{Scratch, clean_up_at_the_end, copy},
    tree::Tree,
};

/// The Bazels that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// 2.1.0, for one test
    Two,
    /// 4.2.3
    Four,
    /// 7.7.1
    Seven,
}

impl Version {
    pub(super) const fn peer(self) -> &'static str {
        match self {
            Self::Two => "bazel2",
            Self::Four => "bazel4",
            Self::Seven => "bazel7",
        }
    }
}

/// A Bazel. When the last copy of this is dropped, the next test that wants one gets it, with its server: to start one
/// takes longer than most of what is done with it. After a test that failed, and where one was
/// [kept out](Self::keep_out), the server ends.
#[derive(Clone)]
pub(crate) struct Bazel {
    version: Version,
    dir: Arc<Scratch>,
    workspace: PathBuf,
    /// After every command that builds.
    flags: Vec<String>,
    is_kept_out: bool,
}

/// Bazels that no test has at the moment.
static IDLE: Mutex<Vec<(Version, Arc<Scratch>)>> = Mutex::new(Vec::new());
/// How many of each version are kept: each is half a gigabyte.
const KEPT: usize = 2;

impl Bazel {
    /// A Bazel in a fresh copy of `tests/workspace`, which uses a cache in minimal mode: what comes from the cache
    /// stays there.
    pub(crate) fn new(version: Version, cache: &str) -> Self {
        Self::using(version, &[format!("--remote_cache={cache}")])
    }

    /// The same, with the flags of a cache.
    pub(crate) fn using(version: Version, cache: &[String]) -> Self {
        let bazel = |dir: Arc<Scratch>| Self {
            version,
            workspace: dir.join("ws"),
            dir,
            flags: [cache, &["--remote_download_minimal".to_owned()]].concat(),
            is_kept_out: false,
        };
        while let Some(dir) = take_idle(version) {
            let mut bazel = bazel(dir);
            bazel.renew_workspace();
            // A test may have left it so that it cannot go on.
            if bazel.run("clean", &[]).code == Some(0) {
                return bazel;
            }
            bazel.keep_out();
        }
        let dir = Arc::new(Scratch::new(version.peer()));
        clean_up_at_the_end(&dir, "$(cat \"$0\"/o/*/server/server.pid.txt)");
        let bazel = bazel(dir);
        bazel.write_workspace();
        bazel
    }

    /// Ends the server when the last copy is dropped, for no other test is to have it as it is.
    pub(crate) fn keep_out(&mut self) {
        self.is_kept_out = true;
    }

    fn write_workspace(&self) {
        let original = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/workspace");
        copy(&original, &self.workspace);
    }

    /// Whether nobody else has a copy of it.
    pub(super) fn is_free(&self) -> bool {
        Arc::strong_count(&self.dir) == 1
    }

    /// Makes it as good as new: without outputs, and with the workspace as it was. Its server goes on.
    #[track_caller]
    pub(super) fn renew(&self) {
        self.clean();
        self.renew_workspace();
    }

    fn renew_workspace(&self) {
        std::fs::remove_dir_all(&self.workspace).unwrap();
        self.write_workspace();
    }

    pub(crate) fn version(&self) -> Version {
        self.version
    }

    pub(crate) fn workspace(&self) -> &Path {
        &self.workspace
    }

    /// Overwrites a source file.
    pub(crate) fn write(&self, path: &str, text: &str) {
        std::fs::write(self.workspace.join(path), text).unwrap();
    }

    /// An output by a path as users write it, such as `bazel-bin/a.txt`.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.workspace.join(path)
    }

    /// The text of an output; the message of the panic names it.
    #[track_caller]
    pub(crate) fn text(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    /// Whether there is a file, link or directory of that name; a link that leads nowhere is not there.
    pub(crate) fn has(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// Removes an output, a directory with what is below.
    #[track_caller]
    pub(crate) fn delete(&self, path: &str) {
        let path = self.path(path);
        let result = if path.is_dir() && !path.is_symlink() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        result.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    /// Everything below `bazel-bin`.
    pub(crate) fn bin(&self) -> Tree {
        Tree::of(&self.path("bazel-bin"))
    }

    /// Everything below `bazel-testlogs`.
    pub(crate) fn testlogs(&self) -> Tree {
        Tree::of(&self.path("bazel-testlogs"))
    }

    /// The exec root, where `bazel-out` is.
    pub(crate) fn exec_root(&self) -> PathBuf {
        let out = self.path("bazel-out").canonicalize().unwrap();
        out.parent().unwrap().to_owned()
    }

    /// Where Bazel has everything of its own: output bases, and so outputs.
    pub(crate) fn output_user_root(&self) -> PathBuf {
        self.dir.join("o")
    }

    /// The command line of a Bazel command, without the flags for the cache: for `outhaul run` and the like.
    pub(crate) fn command_line(&self, command: &str) -> Vec<String> {
        let mut line = vec![
            peers::program(self.version.peer()).display().to_string(),
            format!("--output_user_root={}", self.dir.join("o").display()),
            // Debian's Bazels need the system's rc file, which says where they are unpacked.
            "--nohome_rc".to_owned(),
            "--host_jvm_args=-Xmx512m".to_owned(),
            // For builds of some seconds: it takes half of the processor time.
            "--host_jvm_args=-XX:TieredStopAtLevel=1".to_owned(),
            "--host_jvm_args=-XX:+UseSerialGC".to_owned(),
            // A server that nobody ends, for the test was killed, ends by itself.
            "--max_idle_secs=120".to_owned(),
            command.to_owned(),
        ];
        if self.version == Version::Seven && command != "shutdown" {
            line.push("--config=bazel7".to_owned());
        }
        line
    }

    /// Starts a command with the flags for the cache.
    pub(crate) fn start(&self, command: &str, args: &[&str]) -> Running {
        let line = self.command_line(command);
        let mut process = Command::new(&line[0]);
        process.args(&line[1..]).current_dir(&self.workspace);
        if !matches!(command, "clean" | "dump" | "help" | "shutdown" | "info") {
            process.args(&self.flags);
        }
        process.args(args);
        Running::start(process)
    }

    /// Runs a command with the flags for the cache.
    pub(crate) fn run(&self, command: &str, args: &[&str]) -> Ran {
        self.start(command, args).wait()
    }

    /// `bazel build`.
    pub(crate) fn build(&self, args: &[&str]) -> Ran {
        self.run("build", args)
    }

    /// `bazel test`.
    pub(crate) fn test(&self, args: &[&str]) -> Ran {
        self.run("test", args)
    }

    /// Forgets every output and every action: what comes next is cold.
    #[track_caller]
    pub(crate) fn clean(&self) {
        self.run("clean", &[]).ok();
    }
}

impl Drop for Bazel {
    fn drop(&mut self) {
        if !self.is_free() {
            return;
        }
        if !self.is_kept_out && !std::thread::panicking() {
            let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
            if idle
                .iter()
                .filter(|(version, _)| *version == self.version)
                .count()
                < KEPT
            {
                idle.push((self.version, Arc::clone(&self.dir)));
                return;
            }
        }
        // From inside the workspace: elsewhere a Bazel does not know its server.
        let line = self.command_line("shutdown");
        let _ = Command::new(&line[0])
            .args(&line[1..])
            .current_dir(&self.workspace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

fn take_idle(version: Version) -> Option<Arc<Scratch>> {
    let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
    let at = idle.iter().position(|(of, _)| *of == version)?;
    Some(idle.swap_remove(at).1)
}

/// Number of actions that a Bazel ran: of its "N processes", those that came neither from a cache nor from within.
#[track_caller]
pub(crate) fn executed(run: &Ran) -> u64 {
    processes(run)
        .iter()
        .filter(|(kind, _)| !kind.ends_with("cache hit") && kind != "internal")
        .map(|(_, count)| count)
        .sum()
}

/// Number of actions that a Bazel took from the remote cache, or from the disk cache.
#[track_caller]
pub(crate) fn cache_hits(run: &Ran) -> u64 {
    processes(run)
        .iter()
        .filter(|(kind, _)| ["remote cache hit", "disk cache hit"].contains(&kind.as_str()))
        .map(|(_, count)| count)
        .sum()
}

/// `INFO: 9 processes: 4 remote cache hit, 5 internal.`
#[track_caller]
fn processes(run: &Ran) -> Vec<(String, u64)> {
    let line = run.err.lines().find_map(|line| {
        line.split_once(" processes: ")
            .or_else(|| line.split_once(" process: "))
    });
    let Some((_, kinds)) = line else {
        panic!("no line names the processes; {run}");
    };
    kinds
        .trim_end_matches('.')
        .split(", ")
        .map(|part| {
            let (count, kind) = part.split_once(' ').unwrap();
            (kind.to_owned(), count.parse().unwrap())
        })
        .collect()
}
