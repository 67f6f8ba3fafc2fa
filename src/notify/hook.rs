//! A command that is run for each document.

use std::{
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::AsyncWriteExt as _,
    process::{Child, Command},
};

use super::{document::Document, error::HookError, printed::Printed, queue::Queue};
use crate::{
    metrics::{Metrics, Notified},
    open_files,
};

/// A command of the user's for the shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hook {
    /// What the shell runs, with the document on standard input.
    pub command: String,
    /// It and its process group are killed after so long.
    pub timeout: Duration,
}

/// Takes the command from the environment, which only its user can read: every user can read command lines.
const SHELL: &str =
    "command=$OUTHAUL_ON_SETTLED_COMMAND; unset OUTHAUL_ON_SETTLED_COMMAND; eval \"$command\"";

/// Runs the command until the queue is closed and empty. How it ends is logged, and changes nothing else.
pub(super) async fn run(queue: Arc<Queue>, hook: Hook, metrics: Metrics) {
    while let Some(document) = queue.pop().await {
        let outcome = match run_one(&hook, &document).await {
            Ok(status) if status.success() => {
                tracing::debug!(
                    invocation = %document.invocation_id, event = %document.event, "--on-settled: {status}"
                );
                Notified::Sent
            }
            Ok(status) => {
                tracing::warn!(
                    invocation = %document.invocation_id, event = %document.event, "--on-settled: {status}"
                );
                Notified::Failed
            }
            Err(reason) => {
                tracing::warn!(
                    invocation = %document.invocation_id, event = %document.event, "--on-settled: {reason}"
                );
                Notified::Failed
            }
        };
        metrics.notification("command", outcome, 1);
    }
}

/// Kills a command's process group when it is dropped while the command runs: also when the daemon ends.
struct Group(Option<Pid>);

impl Group {
    fn kill(&mut self) {
        if let Some(group) = self.0.take() {
            // It may have ended just now. Its leader is not reaped yet, so the number is still its own.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn run_one(hook: &Hook, document: &Document) -> Result<ExitStatus, HookError> {
    let began = Instant::now();
    // Both into one pipe, so that what it prints stays in order.
    let (mut printed, writer) = Printed::pipe(document)
        .and_then(|(printed, writer)| Ok((printed, [writer.try_clone()?, writer])))
        .map_err(HookError::Pipe)?;
    let [stdout, stderr] = writer;
    let shell = format!("{}{SHELL}", open_files::lowering().unwrap_or_default());
    let mut child = Command::new("sh")
        .args(["-c", &shell])
        .env("OUTHAUL_ON_SETTLED_COMMAND", &hook.command)
        .env("OUTHAUL_EVENT", document.event.name())
        .env("OUTHAUL_INVOCATION_ID", &document.invocation_id)
        .stdin(Stdio::piped())
        .stdout(stdout)
        .stderr(stderr)
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(HookError::Start)?;
    let mut group = Group(
        child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw),
    );
    let fed = async {
        tokio::select! {
            status = feed(&mut child, document) => status,
            () = async { printed.read().await; std::future::pending().await } => unreachable!("waits for ever"),
        }
    };
    let ended = tokio::time::timeout(hook.timeout, fed).await;
    let ended = match ended {
        Ok(status) => {
            // What it has left running in the background is its own business.
            group.0 = None;
            status.map_err(HookError::Wait)
        }
        Err(_) => {
            group.kill();
            // Killed, it is gone at once.
            let _ = child.wait().await;
            Err(HookError::TimedOut(hook.timeout))
        }
    };
    printed.end(hook.timeout.saturating_sub(began.elapsed()));
    ended
}

/// Writes the document while the command runs. One that does not read it need not.
async fn feed(child: &mut Child, document: &Document) -> std::io::Result<ExitStatus> {
    let stdin = child.stdin.take();
    let write = async {
        if let Some(mut stdin) = stdin {
            let _ = stdin.write_all(&document.body).await;
            let _ = stdin.write_all(b"\n").await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        status = child.wait() => status,
        () = write => unreachable!("waits for ever"),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use outhaul_testkit::until;

    use super::*;
    use crate::notify::Event;

    fn document(body: String) -> Document {
        Document {
            event: Event::InvocationSettled,
            invocation_id: "some-id".to_owned(),
            delivery: String::new(),
            body: body.into(),
        }
    }

    fn hook(command: String) -> Hook {
        Hook {
            command,
            timeout: Duration::from_secs(60),
        }
    }

    #[tokio::test]
    async fn the_command_gets_the_document_and_says_how_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let command = format!(
            "cat > '{}'; echo $OUTHAUL_EVENT $OUTHAUL_INVOCATION_ID >> '{0}'; exit 3",
            out.display()
        );
        // Larger than a pipe.
        let body = format!("{{\"x\": \"{}\"}}", "y".repeat(200_000));
        let status = run_one(&hook(command), &document(body.clone())).await.unwrap();
        assert_eq!(status.code(), Some(3));
        assert_eq!(
            std::fs::read_to_string(out).unwrap(),
            format!("{body}\ninvocation_settled some-id\n")
        );
    }

    #[tokio::test]
    async fn a_command_need_not_read() {
        let status = run_one(&hook("exit 0".to_owned()), &document("y".repeat(200_000)))
            .await
            .unwrap();
        assert!(status.success());
    }

    #[tokio::test]
    async fn what_is_printed_without_end_holds_nobody_up_and_a_background_process_may_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let done = dir.path().join("done");
        let command = format!(
            "head -c 10000000 /dev/zero; printf '\\033[2J\\nlast'; (sleep 0.3; echo late; echo late; touch '{}') &",
            done.display()
        );
        let status = run_one(&hook(command), &document(String::new())).await.unwrap();
        assert!(status.success());
        until("the end of the command", async || done.exists()).await;
    }

    #[tokio::test]
    async fn a_command_that_takes_too_long_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let slow = Hook {
            command: format!("sleep 1000 & echo $! > '{}'; wait", pids.display()),
            timeout: Duration::from_secs(1),
        };
        let reason = run_one(&slow, &document(String::new()))
            .await
            .unwrap_err()
            .to_string();
        assert!(reason.contains("--on-settled-timeout"), "{reason}");
        gone(&pids).await;
    }

    #[tokio::test]
    async fn a_command_does_not_outlive_its_task() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        let slow = hook(format!("sleep 1000 & echo $! > '{}'; wait", pids.display()));
        let task = tokio::spawn(async move { run_one(&slow, &document(String::new())).await });
        until("its process ids", async || {
            std::fs::read_to_string(&pids).is_ok_and(|text| text.ends_with('\n'))
        })
        .await;
        task.abort();
        gone(&pids).await;
    }

    async fn gone(pids: &Path) {
        let pid = std::fs::read_to_string(pids).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        // There may be no parent to reap it.
        until("its end", async || {
            std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
        })
        .await;
    }
}
