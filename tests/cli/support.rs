//! A cache, a build in it, and the real binary, all with bounded waits.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use outhaul::{
    demo::{GeneratedBuild, GeneratedContent, GeneratedOutput, Setting, play},
    digest::Digest,
    proto::google::devtools::build::v1::{
        BuildEvent, OrderedBuildEvent, PublishBuildToolEventStreamRequest, StreamId,
        build_event::{BuildComponentStreamFinished, Event, build_component_stream_finished::FinishType},
        stream_id::BuildComponent,
    },
};
use outhaul_testkit::{
    Ran, Running,
    cache::{Builder, EmbeddedCache, RunningCache},
    clean, finish, in_time,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout},
};

/// The binary, without anything of the caller's environment that concerns it.
pub fn outhaul() -> Command {
    clean(Command::new(env!("CARGO_BIN_EXE_outhaul")))
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
        let build = GeneratedBuild::new(|bytes| cache.store().put(bytes), setting, 1);
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
    pub async fn serve(&self, args: &[&str]) -> Running {
        let cache = self.cache_flag();
        self.serve_alone(&[&[cache.as_str()], args].concat()).await
    }

    /// The same without the world's cache.
    pub async fn serve_alone(&self, args: &[&str]) -> Running {
        let mut command = outhaul();
        command
            .args(["serve", "--bes-listen=127.0.0.1:0", "--admin-listen=none"])
            .arg(self.state())
            .args(args);
        Running::serve(command).await
    }

    /// Plays a build to a listener, as Bazel would.
    pub async fn play(&self, build: &GeneratedBuild, address: &str) {
        let (invocation, build_id) = (build.invocation_id(), build.build_id());
        let played = play(address, &invocation, &build_id, build.events());
        in_time(played).await.unwrap();
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
    let copied = Command::new("install")
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

/// The requests of a stream: of these events, and of its end if it `finishes`.
pub fn requests(
    build_id: &str,
    invocation_id: &str,
    events: impl IntoIterator<Item = Vec<u8>>,
    finishes: bool,
) -> Vec<PublishBuildToolEventStreamRequest> {
    let stream_id = StreamId {
        build_id: build_id.to_owned(),
        invocation_id: invocation_id.to_owned(),
        component: BuildComponent::Tool.into(),
    };
    let events = events.into_iter().map(|value| {
        Event::BazelEvent(prost_types::Any {
            type_url: "type.googleapis.com/build_event_stream.BuildEvent".to_owned(),
            value,
        })
    });
    let end = finishes.then(|| {
        Event::ComponentStreamFinished(BuildComponentStreamFinished {
            r#type: FinishType::Finished.into(),
        })
    });
    (1..)
        .zip(events.chain(end))
        .map(|(number, event)| PublishBuildToolEventStreamRequest {
            ordered_build_event: Some(OrderedBuildEvent {
                stream_id: Some(stream_id.clone()),
                sequence_number: number,
                event: Some(BuildEvent {
                    event: Some(event),
                    ..BuildEvent::default()
                }),
            }),
            ..Default::default()
        })
        .collect()
}

/// A command that goes on, and the lines that it prints. It ends with its handle.
pub fn following(command: Command) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut command = tokio::process::Command::from(command);
    command.stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}
