//! Calls that take their time: while there are any, the daemon is at work.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// How many such calls are under way. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Calls(Arc<AtomicUsize>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub(super) struct Call(Arc<AtomicUsize>);

impl Calls {
    pub(super) fn begin(&self) -> Call {
        self.0.fetch_add(1, Ordering::Relaxed);
        Call(Arc::clone(&self.0))
    }

    pub(super) fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
