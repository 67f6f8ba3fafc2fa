//! Whether upstream can be reached, as far as the last try of any stream says, and the log's words on it.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tonic::Status;

/// An upstream that comes and goes is worth two lines in so long.
const QUIET: Duration = Duration::from_secs(60);

pub(super) struct Health {
    endpoint: String,
    down: AtomicBool,
    log: Mutex<Log>,
}

#[derive(Default)]
struct Log {
    /// An outage that was reported.
    warned: bool,
    last: Option<Instant>,
}

impl Health {
    pub(super) fn new(endpoint: String) -> Self {
        Self {
            endpoint,
            down: AtomicBool::new(false),
            log: Mutex::default(),
        }
    }

    pub(super) fn is_good(&self) -> bool {
        !self.down.load(Ordering::Relaxed)
    }

    /// A try failed. The first one of an outage is a warning.
    pub(super) fn failed(&self, of: &str, status: &Status, wait: Duration) {
        self.down.store(true, Ordering::Relaxed);
        let (code, message) = (status.code(), status.message());
        let mut log = self.log.lock();
        if log.warned || log.last.is_some_and(|last| last.elapsed() < QUIET) {
            tracing::debug!(
                upstream = self.endpoint,
                of,
                ?code,
                message,
                ?wait,
                "not forwarded yet"
            );
            return;
        }
        *log = Log {
            warned: true,
            last: Some(Instant::now()),
        };
        drop(log);
        tracing::warn!(
            upstream = self.endpoint,
            of,
            ?code,
            message,
            "failed to forward build events; they are kept, and retried until upstream has them"
        );
    }

    /// Upstream took something.
    pub(super) fn works(&self) {
        // Read before it is written: every acknowledgement comes here.
        if self.is_good() || !self.down.swap(false, Ordering::Relaxed) {
            return;
        }
        let mut log = self.log.lock();
        if std::mem::take(&mut log.warned) {
            tracing::info!(upstream = self.endpoint, "build events are forwarded again");
        }
    }
}
