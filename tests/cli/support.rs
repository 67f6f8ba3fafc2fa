//! A cache, a build in it, and the real binary, all with bounded waits.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex},
    time::Duration,
};

use outhaul::{
    demo::{GeneratedBuild, GeneratedContent, GeneratedOutput, Setting, play},
    digest::Digest,
    embedded_cache::{Builder, EmbeddedCache, RunningCache},
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The binary, without anything of the caller's environment that concerns it.
pub fn outhaul() -> Command {
    clean(Command::new(env!("CARGO_BIN_EXE_outhaul")))
}

/// A command that gets no settings from the caller's environment.
pub fn clean(mut command: Command) -> Command {
    let ours = |name: &str| {
        ["OUTHAUL_", "LISTEN_", "BAZEL"]
            .iter()
            .any(|p| name.starts_with(p))
    };
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(ours) {
            command.env_remove(name);
        }
    }
    command
        .env_remove("NOTIFY_SOCKET")
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("XDG_STATE_HOME")
        .env("HOME", "/nonexistent")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// How a command ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    pub err: String,
}

impl Ran {
    pub fn out(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }

    /// One JSON value a line.
    pub fn json(&self) -> Vec<serde_json::Value> {
        let out = self.out();
        out.lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}")))
            .collect()
    }

    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{}{}", self.out(), self.err);
        self
    }

    /// An error that says what is wrong, in words.
    #[track_caller]
    pub fn says(self, code: i32, parts: &[&str]) -> Self {
        let ran = self.expect(code);
        for part in parts {
            assert!(ran.err.contains(part), "no {part:?} in: {}", ran.err);
        }
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
        ran
    }
}

/// Runs a command to its end.
pub async fn finish(mut command: Command) -> Ran {
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .unwrap_or_else(|_| panic!("hangs: {command:?}"))
        .unwrap();
    Ran {
        code: output.status.code(),
        stdout: output.stdout,
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs the binary with arguments.
pub async fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    let mut command = outhaul();
    command.args(args);
    finish(command).await
}

/// A directory, a cache, and a build whose outputs are in it.
pub struct World {
    pub dir: tempfile::TempDir,
    pub cache: RunningCache,
    pub build: GeneratedBuild,
}

impl World {
    pub async fn new() -> Self {
        Self::with(EmbeddedCache::builder(), "").await
    }

    pub async fn with(cache: Builder, instance_name: &str) -> Self {
        let cache = cache.start().await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let exec_root = dir.path().join("execroot/_main");
        std::fs::create_dir_all(&exec_root).unwrap();
        let setting = Setting {
            workspace: dir.path().join("workspace").display().to_string(),
            exec_root: exec_root.display().to_string(),
            remote_cache: cache.endpoint(),
            instance_name: instance_name.to_owned(),
        };
        let build = GeneratedBuild::new(cache.store(), setting, 1);
        Self { dir, cache, build }
    }

    pub fn exec_root(&self) -> PathBuf {
        self.dir.path().join("execroot/_main")
    }

    pub fn state(&self) -> String {
        format!("--state-dir={}", self.dir.path().join("state").display())
    }

    pub fn cache_flag(&self) -> String {
        format!("--remote-cache={}", self.cache.endpoint())
    }

    /// A path below the directory, as text.
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// An output that is a file with bytes.
    pub fn file(&self, suffix: &str) -> (&GeneratedOutput, &Digest) {
        let output = self.build.outputs().iter().find(|o| o.path.ends_with(suffix));
        let output = output.unwrap_or_else(|| panic!("no output {suffix}"));
        match &output.content {
            GeneratedContent::File(digest) => (output, digest),
            other => panic!("{other:?}"),
        }
    }

    /// The build's events as Bazel's binary event file has them.
    pub fn event_bytes(&self) -> Vec<u8> {
        delimited(self.build.events())
    }

    pub fn event_file(&self) -> String {
        let path = self.path("events.bin");
        std::fs::write(&path, self.event_bytes()).unwrap();
        path
    }

    /// The build's outputs that are not below a directory as they should be.
    pub fn wrong_below(&self, root: &Path) -> Vec<String> {
        let wrong = self.build.outputs().iter().filter(|output| {
            let path = root.join(&output.path);
            !match &output.content {
                GeneratedContent::File(digest) => {
                    std::fs::read(&path).is_ok_and(|bytes| Digest::of(digest.function(), &bytes) == *digest)
                }
                GeneratedContent::Symlink(target) => {
                    std::fs::read_link(&path).is_ok_and(|t| t == Path::new(target))
                }
                GeneratedContent::EmptyDirectory => path.is_dir(),
            }
        });
        wrong.map(|output| output.path.clone()).collect()
    }

    #[track_caller]
    pub fn assert_complete(&self) {
        assert_eq!(self.wrong_below(&self.exec_root()), Vec::<String>::new());
    }

    /// A daemon with this cache and these further arguments.
    pub async fn serve(&self, args: &[&str]) -> Server {
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
            .args([self.state(), self.cache_flag()])
            .args(args);
        Server::start(command).await
    }

    /// Plays a build to a door, as Bazel would.
    pub async fn play(&self, build: &GeneratedBuild, door: &str) {
        let (invocation, build_id) = (build.invocation_id(), build.build_id());
        let played = play(door, &invocation, &build_id, build.events());
        tokio::time::timeout(PATIENCE, played).await.unwrap().unwrap();
    }
}

/// Messages with their length in front.
pub fn delimited(messages: impl Iterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        prost::encode_length_delimiter(message.len(), &mut bytes).unwrap();
        bytes.extend_from_slice(&message);
    }
    bytes
}

/// Copies a program. Not by this process: while a file is open for writing, if only in a child that another test is about
/// to start, the system refuses to run it.
pub fn install(from: &Path, to: impl AsRef<Path>) {
    let copied = std::process::Command::new("install")
        .args(["-m", "755", "--"])
        .args([from, to.as_ref()])
        .status();
    assert!(copied.unwrap().success());
}

/// Makes a program of this text.
pub fn program(path: impl AsRef<Path>, text: &str) {
    let mut written = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut written, text.as_bytes()).unwrap();
    install(written.path(), path);
}

/// A daemon, killed when this is dropped.
pub struct Server {
    pub child: Child,
    /// Where it takes build events.
    pub doors: Vec<String>,
    log: Arc<Mutex<String>>,
}

impl Server {
    /// Starts a command that is a daemon, and waits until its doors are open.
    pub async fn start(mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::<Mutex<String>>::default();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let kept = log.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let mut log = kept.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        let mut server = Self {
            child,
            doors: Vec::new(),
            log,
        };
        let log = server.logged("control socket").await;
        server.doors = log
            .lines()
            .filter_map(|line| line.split_once("listening for build events on "))
            .map(|(_, address)| match address.strip_prefix("unix:") {
                Some(_) => address.to_owned(),
                None => format!("grpc://{address}"),
            })
            .collect();
        server
    }

    pub fn door(&self) -> &str {
        &self.doors[0]
    }

    /// Waits for words in the log, and gives all of it.
    pub async fn logged(&self, part: &str) -> String {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let log = self.log.lock().unwrap().clone();
            if log.contains(part) {
                return log;
            }
            assert!(tokio::time::Instant::now() < deadline, "no {part:?} in: {log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for it to end by itself.
    pub async fn end(&mut self) -> Option<i32> {
        let ended = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        ended.expect("the daemon ends").unwrap().code()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
    }
}

/// The key file of a service account whose token endpoint always answers so. The key is for tests alone.
pub async fn googles_account(answer: &'static str) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let account = serde_json::json!({
        "type": "service_account",
        "client_email": "me@project.example",
        "private_key": include_str!("../google/key.pem"),
        "token_uri": format!("http://{}/token", listener.local_addr().unwrap()),
    });
    let app = axum::Router::new().fallback(async move || answer);
    tokio::spawn(async move { axum::serve(listener, app).await });
    account.to_string()
}
