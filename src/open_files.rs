//! How many files this process may open, and how many its children may.
//!
//! The usual limit of 1024 is low for many builds, writer threads and their directories, so the daemon raises it to the
//! maximum. Its children get the original limit: programs that use `select` break with more, and some close every
//! descriptor up to the limit when they start.
//!
//! If the limit is still reached, files that are only kept open for reuse are closed, and operations that need a
//! descriptor are retried for a while.

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::fd::AsFd,
    sync::{OnceLock, Weak},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{
    fs::{FileType, Mode, OFlags, fstat, openat},
    io::Errno,
    path::Arg,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::process::Command;

/// How a file is opened to be read that anybody may have put there: not through a link, and without waiting for the other
/// end of a pipe.
pub(crate) const GUARDED: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

/// Opens a file so, and returns its size in bytes; `None` if it is not a regular file.
pub(crate) fn open_regular(directory: impl AsFd, path: impl Arg) -> rustix::io::Result<Option<(File, u64)>> {
    let file = openat(directory, path, GUARDED, Mode::empty())?;
    let found = fstat(&file)?;
    let is_regular = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
    Ok(is_regular.then(|| (file.into(), found.st_size.cast_unsigned())))
}

/// Whether an error says that a system call cannot be had, so that the caller does without: of the kernel, the file system
/// or a sandbox. Some sandboxes answer as if it were forbidden (Docker's, for calls that its profile does not know); if it
/// really is, the other way fails with that as well.
pub(crate) const fn is_lacking(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::NOSYS | Errno::INVAL | Errno::OPNOTSUPP | Errno::PERM
    )
}

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

/// Takes back what [`raise`] did, before this process becomes another program or starts its last child.
pub(crate) fn lower() {
    if let Some(current) = INHERITED.get() {
        let limit = Rlimit {
            current: *current,
            ..getrlimit(Resource::Nofile)
        };
        let _ = setrlimit(Resource::Nofile, limit);
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
/// program that cannot be started is reported by the exit codes 126 and 127.
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

/// How often, and how long apart, something is tried while there are no descriptors.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(100);

/// Holds descriptors that it can do without.
pub(crate) trait Spare: Send + Sync {
    /// Closes them, from whichever thread there are none left in. Must not wait for anybody who may be opening something.
    fn spare(&self);
}

/// Who has some to spare. A try to lock it also keeps a thread that opens something while it closes from being asked in turn.
static SPARE: Mutex<Vec<Weak<dyn Spare>>> = Mutex::new(Vec::new());

/// When waiting for a descriptor was last in vain.
static IN_VAIN: Mutex<Option<Instant>> = Mutex::new(None);

/// From now on, this is asked to close what it can do without when there are no descriptors.
pub(crate) fn spares(spare: Weak<dyn Spare>) {
    let mut all = SPARE.lock();
    all.retain(|spare| spare.strong_count() > 0);
    all.push(spare);
}

/// Has everybody close what they can do without. Blocks.
pub(crate) fn spare() {
    let Some(all) = SPARE.try_lock() else { return };
    // The last first: output roots come after the writers, which let go of those that are not open any more.
    for spare in all.iter().rev().filter_map(Weak::upgrade) {
        spare.spare();
    }
}

/// Whether there are no descriptors just now.
pub(crate) fn are_wanting() -> bool {
    rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).is_err_and(|errno| errno.is_want())
}

/// Whether an error says that the process, or the system, has no descriptors just now.
pub(crate) trait Want {
    fn is_want(&self) -> bool;
}

impl Want for Errno {
    fn is_want(&self) -> bool {
        matches!(*self, Self::MFILE | Self::NFILE)
    }
}

impl Want for io::Error {
    fn is_want(&self) -> bool {
        Errno::from_io_error(self).is_some_and(|errno| errno.is_want())
    }
}

/// Opens something. Where there are no descriptors, those to spare are closed, and it is tried again for two seconds;
/// once only if that was in vain a moment ago, so that what needs thousands of files does not wait for each. Blocks.
pub(crate) fn patient<T, E: Want>(mut open: impl FnMut() -> Result<T, E>) -> Result<T, E> {
    let is_want = |opened: &Result<T, E>| opened.as_ref().is_err_and(Want::is_want);
    let first = open();
    if !is_want(&first) {
        return first;
    }
    let tries = match *IN_VAIN.lock() {
        Some(at) if at.elapsed() < TRIES * PAUSE => 1,
        _ => TRIES,
    };
    for n in 0..tries {
        if n > 0 {
            thread::sleep(PAUSE);
        }
        spare();
        let again = open();
        if !is_want(&again) {
            return again;
        }
    }
    if tries > 1 {
        *IN_VAIN.lock() = Some(Instant::now());
    }
    first
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use super::*;

    #[derive(Default)]
    struct Idle(AtomicBool);

    impl Spare for Idle {
        fn spare(&self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_can_be_spared_is_closed_for_what_needs_a_descriptor_and_for_nothing_else() {
        let idle = Arc::<Idle>::default();
        let spare: Arc<dyn Spare> = idle.clone();
        spares(Arc::downgrade(&spare));
        let is_closed = || idle.0.load(Ordering::Relaxed);
        assert_eq!(patient(|| Err::<(), _>(Errno::NOENT)), Err(Errno::NOENT));
        assert!(!is_closed());
        for want in [Errno::MFILE, Errno::NFILE] {
            idle.0.store(false, Ordering::Relaxed);
            let opened = patient(|| if is_closed() { Ok(()) } else { Err(want) });
            assert_eq!(opened, Ok(()));
            idle.0.store(false, Ordering::Relaxed);
            let opened = patient(|| {
                if is_closed() {
                    Ok(())
                } else {
                    Err(io::Error::from(want))
                }
            });
            assert!(opened.is_ok());
        }
    }
}
