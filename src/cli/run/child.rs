//! The wrapped command's process: how it is started, what it is told of signals, and how it ended.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    future::poll_fn,
    io::{self, Read as _},
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::ExitStatus,
    task::Poll,
};

use rustix::process::{Pid, Signal, getpgrp, kill_process};
use tokio::{
    process::{Child, Command},
    signal::unix::{self, SignalKind},
};

use super::super::{
    ending::Ignored,
    exit::{self, Failure},
};

/// Signals that would end or stop this process without the command, which is left alone then: it hears of them.
const HEEDED: &[Signal] = &[
    Signal::HUP,
    Signal::INT,
    Signal::QUIT,
    Signal::TERM,
    Signal::USR1,
    Signal::USR2,
    Signal::ALARM,
    Signal::VTALARM,
    Signal::PROF,
    Signal::IO,
    Signal::POWER,
    Signal::TSTP,
    Signal::CONT,
];

/// The signals, heeded from when they are listened to.
pub(in crate::cli) struct Signals(Vec<(Signal, unix::Signal)>);

impl Signals {
    /// From now on they do not end the process by themselves. What it was started to ignore, as by `nohup`, it goes on
    /// ignoring, and so does the command.
    pub(in crate::cli) fn listen() -> io::Result<Self> {
        let ignored = Ignored::here();
        let kinds = HEEDED
            .iter()
            .map(|heeded| (*heeded, SignalKind::from_raw(heeded.as_raw())));
        kinds
            .filter(|(_, kind)| !ignored.has(*kind))
            .map(|(heeded, kind)| Ok((heeded, unix::signal(kind)?)))
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// The next one that comes.
    pub(in crate::cli) async fn next(&mut self) -> Signal {
        poll_fn(|cx| {
            for (signal, heard) in &mut self.0 {
                if heard.poll_recv(cx).is_ready() {
                    return Poll::Ready(*signal);
                }
            }
            Poll::Pending
        })
        .await
    }

    /// Waits for one that asks for an end, and says which. Being stopped is taken as ever.
    pub(super) async fn end(&mut self) -> Signal {
        loop {
            match self.next().await {
                Signal::TSTP => stop(),
                signal @ (Signal::HUP | Signal::INT | Signal::QUIT | Signal::TERM) => return signal,
                _ => {}
            }
        }
    }

    /// Waits for the command's end, and tells it of signals until then; and us, by `asked`, of those that ask it for its
    /// end.
    pub(in crate::cli) async fn see_through(
        &mut self,
        child: &mut Child,
        asked: impl Fn(Signal),
    ) -> io::Result<ExitStatus> {
        loop {
            let signal = tokio::select! {
                status = child.wait() => return status,
                signal = self.next() => signal,
            };
            let pid = child
                .id()
                .and_then(|id| i32::try_from(id).ok())
                .and_then(Pid::from_raw);
            // What a terminal's keys send reaches all of its foreground group, and to Bazel two interrupts are more
            // than one.
            let is_of_keys =
                matches!(signal, Signal::INT | Signal::QUIT | Signal::TSTP) && is_in_foreground();
            if let Some(pid) = pid.filter(|_| !is_of_keys) {
                // It may have ended just now.
                let _ = kill_process(pid, signal);
            }
            match signal {
                Signal::TSTP => stop(),
                // SIGQUIT makes Bazel tell what it does.
                Signal::HUP | Signal::INT | Signal::TERM => asked(signal),
                _ => {}
            }
        }
    }
}

/// Stops this process, until it is told to go on.
pub(in crate::cli) fn stop() {
    let _ = kill_process(rustix::process::getpid(), Signal::STOP);
}

/// Whether a terminal's keys are for our process group.
fn is_in_foreground() -> bool {
    File::open("/dev/tty")
        .ok()
        .and_then(|terminal| rustix::termios::tcgetpgrp(terminal).ok())
        .is_some_and(|group| group == getpgrp())
}

/// Starts the command, with these changes of its environment. One that cannot be started has the exit codes that shells
/// have for it.
pub(super) fn start(
    command: &[OsString],
    environment: &[(&str, Option<OsString>)],
) -> Result<Child, Failure> {
    let program: &OsStr = command.first().map_or(OsStr::new(""), OsString::as_os_str);
    let args = command.get(1..).unwrap_or_default();
    let spawn = |process: &mut Command| {
        for (name, value) in environment {
            match value {
                Some(value) => process.env(name, value),
                None => process.env_remove(name),
            };
        }
        process.args(args).spawn()
    };
    let started = match spawn(&mut Command::new(program)) {
        // No binary, and no `#!` line: for shells, `env` and their like a script of the shell's.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => {
            match found(program).filter(is_text) {
                Some(path) => spawn(Command::new("sh").arg(path)),
                None => Err(error),
            }
        }
        other => other,
    };
    started.map_err(|error| {
        let path = found(program);
        let (code, why) = match error.kind() {
            io::ErrorKind::NotFound if path.is_some() => (
                exit::NO_COMMAND,
                "its interpreter or loader does not exist".to_owned(),
            ),
            io::ErrorKind::NotFound => (exit::NO_COMMAND, "command not found".to_owned()),
            _ if path.is_some_and(|path| path.is_dir()) => (exit::NOT_RUN, "is a directory".to_owned()),
            _ => (exit::NOT_RUN, error.to_string()),
        };
        Failure::new(
            code,
            format!("failed to run {}: {why}", PathBuf::from(program).display()),
        )
    })
}

/// The file that a program's name stands for.
fn found(program: &OsStr) -> Option<PathBuf> {
    if program.is_empty() {
        return None;
    }
    let path = PathBuf::from(program);
    if program.as_encoded_bytes().contains(&b'/') {
        return path.exists().then_some(path);
    }
    let all = std::env::var_os("PATH")?;
    std::env::split_paths(&all)
        .map(|directory| directory.join(&path))
        .find(|path| path.is_file())
}

/// Whether a file begins as no binary does.
fn is_text(path: &PathBuf) -> bool {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(256).read_to_end(&mut start));
    read.is_ok() && !start.contains(&0)
}

/// The command's own code; 128 and the signal's number when a signal ended it, as shells have it.
pub(in crate::cli) fn code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1);
    u8::try_from(code & 0xff).unwrap_or(1)
}

/// The same for a signal that came before the command began.
pub(in crate::cli) fn code_of(signal: Signal) -> u8 {
    u8::try_from(128 + signal.as_raw()).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_the_commands_own() {
        assert_eq!(code(ExitStatus::from_raw(38 << 8)), 38);
        assert_eq!(code(ExitStatus::from_raw(9)), 137);
        assert_eq!(code(ExitStatus::from_raw(0)), 0);
    }
}
