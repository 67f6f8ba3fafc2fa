//! One daemon per state directory: a lock file that says who holds it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::fs::{FlockOperation, flock};

use super::error::RecordError;

/// The lock file's name in the state directory.
const FILE_NAME: &str = "lock";

/// The longest holder's text that is read; more is not ours.
const MAX_TEXT: u64 = 4096;

/// Who holds a state directory, as far as the lock file says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holder {
    /// Process id.
    pub pid: Option<u32>,
    /// Program and subcommand, without options: those may hold secrets.
    pub command: String,
    /// Since when, in seconds since the epoch.
    pub since: Option<u64>,
}

impl Holder {
    /// This process.
    pub(crate) fn of_this_process() -> Self {
        let mut args = std::env::args_os()
            .take(2)
            .map(|a| a.to_string_lossy().into_owned());
        let program = args.next().unwrap_or_default();
        let mut command = Path::new(&program)
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        if let Some(subcommand) = args.next().filter(|a| a.bytes().all(|b| b.is_ascii_lowercase())) {
            command.push(' ');
            command.push_str(&subcommand);
        }
        Self {
            pid: Some(std::process::id()),
            command,
            since: Some(seconds_now()),
        }
    }

    /// Whether it has the record for as long as a question takes.
    fn only_asks(&self) -> bool {
        let asking = ["mount", "ls", "stat", "why", "status", "du", "doctor", "mcp"];
        let command = self.command.split_once(' ');
        command.is_some_and(|(program, command)| program == "outhaul" && asking.contains(&command))
    }

    fn to_text(&self) -> String {
        format!(
            "pid {}\ncommand {}\nsince {}\n",
            self.pid.unwrap_or_default(),
            self.command.replace('\n', " "),
            self.since.unwrap_or_default()
        )
    }

    fn from_text(text: &str) -> Self {
        let mut holder = Self::default();
        for line in text.lines() {
            match line.split_once(' ') {
                Some(("pid", pid)) => holder.pid = pid.parse().ok(),
                Some(("command", command)) => holder.command = command.to_owned(),
                Some(("since", since)) => holder.since = since.parse().ok(),
                _ => {}
            }
        }
        holder
    }
}

impl std::fmt::Display for Holder {
    /// `pid 4711 (outhaul serve) for 5 min`, or less where the lock file says less.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "pid {pid}")?,
            None => f.write_str("another process")?,
        }
        if !self.command.is_empty() {
            write!(f, " ({})", self.command)?;
        }
        if let Some(since) = self.since {
            match seconds_now().saturating_sub(since) {
                s @ 0..=119 => write!(f, " for {s} s")?,
                s @ 120..=7199 => write!(f, " for {} min", s / 60)?,
                s => write!(f, " for {} h", s / 3600)?,
            }
        }
        Ok(())
    }
}

fn seconds_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

/// How long a lock may stay with somebody who is just ending, or with a child that was forked a moment ago and has
/// not yet closed what it inherited.
const PATIENCE: Duration = Duration::from_millis(300);

/// The same with a command that only asks, such as `outhaul mount` when somebody looks at a build: a build that begins in this
/// moment need not be recorded elsewhere.
const PATIENCE_WITH_QUESTIONS: Duration = Duration::from_secs(3);

/// Who holds a state directory, if anyone does. The lock is free again when this returns.
///
/// # Errors
/// When there is no lock file, or it cannot be read.
pub(super) fn holder(state_dir: &Path) -> io::Result<Option<Holder>> {
    let mut file = File::open(state_dir.join(FILE_NAME))?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(None),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Some(read_holder(&mut file))),
        Err(error) => Err(error.into()),
    }
}

/// The held lock. Freed when dropped, and by the kernel when the process dies.
#[derive(Debug)]
pub(super) struct InstanceLock {
    _file: File,
}

impl InstanceLock {
    /// Takes the state directory's lock, waiting no longer than [`PATIENCE`], or [`PATIENCE_WITH_QUESTIONS`].
    pub(super) fn take(state_dir: &Path) -> Result<Self, RecordError> {
        let path = state_dir.join(FILE_NAME);
        let failed = |source| RecordError::Lock {
            path: path.clone(),
            source,
        };
        // Not truncated before it is ours: the holder's text is in it.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        let since = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let holder = read_holder(&mut file);
                    let patience = if holder.only_asks() {
                        PATIENCE_WITH_QUESTIONS
                    } else {
                        PATIENCE
                    };
                    if since.elapsed() >= patience {
                        let path = state_dir.to_owned();
                        return Err(RecordError::Held { path, holder });
                    }
                    std::thread::sleep(PATIENCE / 10);
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
        if let Err(error) = write_holder(&mut file) {
            // The lock is what counts; on a full disk only the words are missing.
            tracing::debug!(path = %PathBuf::from(&path).display(), %error, "failed to write the lock's owner");
        }
        Ok(Self { _file: file })
    }
}

fn write_holder(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(Holder::of_this_process().to_text().as_bytes())
}

fn read_holder(file: &mut File) -> Holder {
    let mut text = Vec::new();
    let _ = file.rewind();
    match file.take(MAX_TEXT).read_to_end(&mut text) {
        Ok(_) => Holder::from_text(&String::from_utf8_lossy(&text)),
        Err(_) => Holder::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_taker_hears_who_holds_it_and_which_flag_helps() {
        let dir = tempfile::tempdir().unwrap();
        let held = InstanceLock::take(dir.path()).unwrap();
        let message = InstanceLock::take(dir.path()).unwrap_err().to_string();
        assert!(
            message.contains(&format!("pid {}", std::process::id())),
            "{message}"
        );
        assert!(message.contains("--state-dir"), "{message}");
        assert!(message.contains(dir.path().to_str().unwrap()), "{message}");
        drop(held);
        InstanceLock::take(dir.path()).unwrap();
    }

    #[test]
    fn a_question_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let held = InstanceLock::take(dir.path()).unwrap();
        let text = "pid 1\ncommand outhaul mount\nsince 5\n";
        std::fs::write(dir.path().join(FILE_NAME), text).unwrap();
        let asked = std::thread::spawn(move || {
            std::thread::sleep(3 * PATIENCE);
            drop(held);
        });
        InstanceLock::take(dir.path()).unwrap();
        asked.join().unwrap();
        for (command, only_asks) in [
            ("outhaul mount", true),
            ("outhaul ls", true),
            ("outhaul stage", false),
            ("outhaul serve", false),
            ("outhaul run", false),
            ("outhaul", false),
            ("bazel build", false),
            ("", false),
        ] {
            let holder = Holder::from_text(&format!("pid 1\ncommand {command}\n"));
            assert_eq!(holder.only_asks(), only_asks, "{command}");
        }
    }

    #[test]
    fn a_dead_holders_words_are_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(
            dir.path().join(FILE_NAME),
            "pid 1\ncommand x\nsince 5\n and much more than that",
        )
        .unwrap();
        let _held = InstanceLock::take(dir.path()).unwrap();
        let text = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
        assert_eq!(Holder::from_text(&text).pid, Some(std::process::id()));
        assert!(!text.contains("more"), "{text}");
    }

    #[test]
    fn a_garbled_holder_is_still_another_process() {
        assert!(
            Holder::from_text("\u{1}pid x\n\nsince")
                .to_string()
                .starts_with("another process")
        );
    }
}
