//! How many files this process may open, and how many its children may.
//!
//! The usual 1024 are few for many builds, writer threads and their directories, so the daemon takes as many as it may.
//! Its children are to have what they would have without us: programs that use `select` break with more, and some
//! close every descriptor up to the limit when they start.

use std::{ffi::OsStr, sync::OnceLock};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::process::Command;

/// The soft limit as it was, once it has been raised; `None` in it is no limit.
static INHERITED: OnceLock<Option<u64>> = OnceLock::new();

/// Takes as many open files as we may.
pub(crate) fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    // If not, the limit stays what it is.
    if current != maximum && setrlimit(Resource::Nofile, raised).is_ok() {
        let _ = INHERITED.set(current);
    }
}

/// What a shell has to do first, so that what it runs has the limit that we have inherited; nothing if we have not
/// raised it. (Without `unsafe`, nothing can be done in a child between its start and its program's.)
pub(crate) fn lowering() -> Option<String> {
    let soft = INHERITED.get()?;
    let soft = soft.map_or_else(|| "unlimited".to_owned(), |soft| soft.to_string());
    Some(format!("ulimit -S -n {soft}; "))
}

/// A program of the user's to be run with the limit that we have inherited. Where that takes a shell in between, a
/// program that can't be started is told by the exit codes 126 and 127.
pub(crate) fn command(program: &OsStr) -> Command {
    match lowering() {
        None => Command::new(program),
        Some(lowering) => {
            let mut command = Command::new("sh");
            command
                .args(["-c", &format!("{lowering}exec \"$@\""), "sh"])
                .arg(program);
            command
        }
    }
}
