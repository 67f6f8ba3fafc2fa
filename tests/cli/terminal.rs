//! A real terminal: what `outhaul top` shows there and that it leaves it as it was, and the progress of other commands.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

use outhaul_testkit::{clean, in_time, until};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, ChildStdin},
};

use crate::{
    control::stall,
    support::{World, run},
    waiting::{PERSISTENT, unblock},
};

/// A shell in a terminal of its own, of 24 lines and 80 columns.
struct Terminal {
    child: Child,
    keys: ChildStdin,
    shown: Arc<Mutex<String>>,
}

impl Terminal {
    /// Runs a bash script in it, with these variables.
    fn run(script: &str, variables: &[(&str, &str)]) -> Self {
        let mut command = clean(Command::new("script"));
        let script = format!("stty rows 24 cols 80\n{script}");
        command
            .args([
                "--quiet",
                "--flush",
                "--command",
                "bash -c \"$SCRIPT\"",
                "/dev/null",
            ])
            .env("SHELL", "/bin/sh")
            .env("TERM", "xterm")
            .env("SCRIPT", script)
            .env("OUTHAUL", env!("CARGO_BIN_EXE_outhaul"))
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut command = tokio::process::Command::from(command);
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut output, all) = (child.stdout.take().unwrap(), shown.clone());
        tokio::spawn(async move {
            let mut some = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut some).await {
                all.lock().unwrap().push_str(&String::from_utf8_lossy(&some[..n]));
            }
        });
        let keys = child.stdin.take().unwrap();
        Self { child, keys, shown }
    }

    async fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).await.unwrap();
        self.keys.flush().await.unwrap();
    }

    /// Waits until it shows this, after what it has shown when it was asked the last time.
    async fn shows(&self, text: &str) {
        until(&format!("the terminal shows {text:?}"), async || {
            let mut shown = self.shown.lock().unwrap();
            let found = shown.find(text).map(|at| at + text.len());
            if let Some(end) = found {
                shown.drain(..end);
            }
            found.is_some()
        })
        .await;
    }

    /// The same of the whole screen: only what changes is written, and not always in one piece.
    async fn redrawn_shows(&mut self, text: &str) {
        for _ in 0..120 {
            self.press("\u{c}").await;
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
            if self.shown.lock().unwrap().contains(text) {
                return self.shows(text).await;
            }
        }
        panic!("the terminal does not show {text:?}");
    }

    async fn end(mut self) {
        assert!(in_time(self.child.wait()).await.unwrap().success());
    }
}

fn settings(directory: &Path, when: &str) -> String {
    std::fs::read_to_string(directory.join(when)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn top_follows_the_daemon_and_leaves_the_terminal_as_it_was() {
    let world = World::new().await;
    let server = world.serve(&[]).await;
    world.play(&world.build, server.address()).await;
    let directory = world.path(".");
    let script = r#"set -m
        cd "$DIRECTORY"
        stty -a > before
        "$OUTHAUL" top "$STATE"
        stty -a > stopped
        echo it-is-stopped
        fg
        echo "code=$?"
        stty -a > after"#;
    let variables = [("DIRECTORY", &*directory), ("STATE", &*world.state())];
    let mut terminal = Terminal::run(script, &variables);
    terminal.shows("\u{1b}[?1049h").await;
    terminal.shows("Workspace").await;
    terminal.shows("orkspace").await;
    terminal.press("\r").await;
    terminal.redrawn_shows("Targets (").await;
    terminal.press("/app/app\r").await;
    terminal.redrawn_shows("bazel-out/").await;
    // Ctrl-Z, and `fg`.
    terminal.press("\u{1a}").await;
    terminal.shows("\u{1b}[?1049l").await;
    terminal.shows("it-is-stopped").await;
    terminal.shows("\u{1b}[?1049h").await;
    terminal.shows("bazel-out/").await;
    drop(server);
    terminal.press("\u{1b}[C").await;
    terminal.redrawn_shows("No daemon answers").await;
    let _server = world.serve(&[]).await;
    terminal
        .redrawn_shows("What builds on record have downloaded")
        .await;
    terminal.press("q").await;
    terminal.shows("\u{1b}[?1049l").await;
    terminal.shows("code=0").await;
    terminal.end().await;
    let directory = Path::new(&directory);
    let before = settings(directory, "before");
    assert!(before.contains("icanon"), "{before}");
    assert_eq!(settings(directory, "stopped"), before);
    assert_eq!(settings(directory, "after"), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_top_and_leaves_the_terminal_as_it_was() {
    let world = World::new().await;
    let directory = world.path(".");
    let script = r#"cd "$DIRECTORY"
        stty -a > before
        bash -c 'echo $$ > pid.new && mv pid.new pid; exec "$OUTHAUL" top "$STATE"'
        echo "code=$?"
        stty -a > after"#;
    let variables = [("DIRECTORY", &*directory), ("STATE", &*world.state())];
    let terminal = Terminal::run(script, &variables);
    // Nobody has to be there.
    terminal.shows("No daemon answers").await;
    let pid = settings(Path::new(&directory), "pid");
    let killed = Command::new("kill").args(["-TERM", pid.trim()]).status();
    assert!(killed.unwrap().success());
    terminal.shows("\u{1b}[?1049l").await;
    terminal.shows("code=143").await;
    terminal.end().await;
    let directory = Path::new(&directory);
    assert_eq!(settings(directory, "after"), settings(directory, "before"));
}

#[tokio::test]
async fn top_without_a_terminal_names_what_is_for_scripts() {
    let ran = run(["top"]).await;
    ran.says(2, &["outhaul top needs a terminal", "outhaul status --watch"]);
}

/// A fetch that has all of its bytes when the cache is unblocked.
const FETCH: &str =
    r#""$OUTHAUL" fetch bep "$DIRECTORY/events.bin" --output-dir="$DIRECTORY/fetched" "$CACHE""#;

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_shows_how_far_a_fetch_is_and_nothing_of_that_at_the_end() {
    let world = World::new().await;
    stall(&world);
    world.event_file();
    let directory = world.path("");
    let script = format!("{FETCH}\necho code=$?");
    let variables = [("DIRECTORY", &*directory), ("CACHE", &*world.cache_flag())];
    let terminal = Terminal::run(&script, &variables);
    terminal.shows("[-----").await;
    terminal.shows(" outputs, ").await;
    unblock(&world);
    until("the fetch has ended", async || {
        terminal.shown.lock().unwrap().contains("code=0")
    })
    .await;
    // The line is cleared before anything else is said.
    let shown = terminal.shown.lock().unwrap().clone();
    let (before, _) = shown.split_once(" downloaded (").expect(&shown);
    let since = before.rfind("outputs, ").unwrap_or_default();
    assert!(before[since..].contains("\r\u{1b}[2K"), "{shown:?}");
    terminal.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_shows_how_far_the_daemon_is_with_what_it_was_asked_for() {
    let world = World::new().await;
    let server = world.serve(&[PERSISTENT, &["--download=minimal"]].concat()).await;
    world.play(&world.build, server.address()).await;
    let (output, _) = world.file("app/app");
    let path = world.exec_root().join(&output.path).display().to_string();
    let staged = world.path("staged");
    for command in [
        r#""$OUTHAUL" get "$STATE" "$OUTPUT""#,
        r#""$OUTHAUL" stage "$STATE" //app:app --to="$STAGED""#,
    ] {
        stall(&world);
        let script = format!("{command}\necho code=$?");
        let variables = [
            ("STATE", &*world.state()),
            ("OUTPUT", &*path),
            ("STAGED", &*staged),
        ];
        let terminal = Terminal::run(&script, &variables);
        terminal.shows("[-----").await;
        terminal.shows(" outputs, ").await;
        unblock(&world);
        terminal.shows("code=0").await;
        terminal.end().await;
        // What is staged next has to be downloaded, too.
        let _ = std::fs::remove_file(&path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_has_nothing_of_a_fetch_that_is_done_soon() {
    let world = World::new().await;
    let events = world.event_file();
    let to = format!("--output-dir={}", world.path("fetched"));
    let ran = run(["fetch", "bep", &events, &to, &world.cache_flag()]).await;
    assert!(ran.err.contains(" downloaded ("), "{}", ran.err);
    for drawn in ["\r", "\u{1b}", "[--", "[##"] {
        assert!(!ran.err.contains(drawn), "{:?}", ran.err);
    }
}
