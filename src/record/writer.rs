//! The writer: one thread that moves rows from the queue into the store, and mends the store when it breaks.
//!
//! A full disk takes the store away for a while: sled refuses everything after its first failed write, so the store is
//! opened again every so often, and rows wait in the queue as far as they fit. A damaged store is set aside and
//! recreated. Neither is ever seen by a build.

use std::{
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{
    error::{FlushError, RecordError, StoreError},
    opening::Opening,
    pending::Changes,
    shared::{BATCH_BYTES, Down, Shared},
    store::{Store, TreeId},
};

/// How long rows wait for company.
const GATHER: Duration = Duration::from_millis(50);

/// How long written rows stay unflushed. What a killed process had written is kept anyway; only the tail inside
/// sled's own buffer is lost.
const FLUSH_EVERY: Duration = Duration::from_millis(500);

/// Waits before the store is opened again.
const RETRY_FIRST: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A store that breaks again so soon after it was recreated is left alone for [`BROKEN_WAIT`]: making yet another one
/// would do no good.
const BROKEN_SOON: Duration = Duration::from_secs(60);
const BROKEN_WAIT: Duration = Duration::from_secs(600);

type Waiters = Vec<oneshot::Sender<Result<(), FlushError>>>;

/// What the writer does next.
enum Work {
    /// Write these, flush if somebody waits for it or it is time, and notify them.
    Write(Option<Arc<Changes>>, Waiters),
    /// The store is damaged.
    Replace(String),
    /// The store may be available again.
    Reopen,
    /// Everything is written, and the record is closed.
    End,
}

struct Writer {
    shared: Arc<Shared>,
    /// Since when rows have been waiting for company.
    gathering: Option<Instant>,
    /// Since when written rows have not been flushed.
    unflushed: Option<Instant>,
    retry_at: Instant,
    retry_after: Duration,
    made_anew: Option<Instant>,
    tried_at_end: bool,
}

/// Starts the writer's thread. It ends when the record is closed.
pub(super) fn start(shared: Arc<Shared>) -> Result<(), RecordError> {
    let writer = Writer {
        shared,
        gathering: None,
        unflushed: None,
        retry_at: Instant::now() + RETRY_FIRST,
        retry_after: RETRY_FIRST,
        made_anew: None,
        tried_at_end: false,
    };
    thread::Builder::new()
        .name("outhaul-record".into())
        .spawn(move || writer.run())
        .map(drop)
        .map_err(|source| RecordError::Thread { source })
}

impl Drop for Writer {
    /// However the writer ends, all that wait for it are woken.
    fn drop(&mut self) {
        let lost = {
            let mut state = self.shared.state();
            state.closed = true;
            for waiter in state.waiters.drain(..) {
                let _ = waiter.send(Err(FlushError::Closed));
            }
            state.queue.discard()
        };
        self.shared.count_dropped(lost);
        // The lock after the store: the next process must find it closed.
        drop(self.shared.swap_store(None));
        self.shared.release_lock();
        self.shared.state().ended = true;
        self.shared.announce();
    }
}

impl Writer {
    fn run(mut self) {
        loop {
            match self.next_work() {
                Work::Write(changes, waiters) => self.write(changes, waiters),
                Work::Replace(reason) => self.replace(reason),
                Work::Reopen => self.reopen(),
                Work::End => return,
            }
        }
    }

    /// Waits for something to do.
    fn next_work(&mut self) -> Work {
        let shared = self.shared.clone();
        let mut state = shared.state();
        loop {
            if let Some((store, reason)) = state.damaged.take() {
                // A slow reader may speak of a store that was replaced meanwhile.
                if shared.store().is_some_and(|now| Arc::ptr_eq(&now, &store)) {
                    return Work::Replace(reason);
                }
                continue;
            }
            let wait = if let Some(down) = &state.down {
                let reason = down.reason.clone();
                for waiter in state.waiters.drain(..) {
                    let _ = waiter.send(Err(FlushError::Degraded(reason.clone())));
                }
                if state.closed {
                    if self.tried_at_end || state.queue.rows() == 0 {
                        return Work::End;
                    }
                    self.tried_at_end = true;
                    return Work::Reopen;
                }
                match self.retry_at.checked_duration_since(Instant::now()) {
                    Some(wait) if !wait.is_zero() => Some(wait),
                    _ => return Work::Reopen,
                }
            } else {
                let waiting = state.queue.waiting();
                let gathered = match (waiting, self.gathering) {
                    (0, _) => {
                        self.gathering = None;
                        None
                    }
                    (_, Some(since)) => Some(since.elapsed()),
                    (_, None) => {
                        self.gathering = Some(Instant::now());
                        Some(Duration::ZERO)
                    }
                };
                let flush_in = self
                    .unflushed
                    .map(|since| FLUSH_EVERY.saturating_sub(since.elapsed()));
                let urgent = !state.waiters.is_empty() || state.closed;
                match gathered {
                    Some(age) if urgent || state.queue.bytes() >= BATCH_BYTES || age >= GATHER => {
                        self.gathering = None;
                        let changes = state.queue.take();
                        return Work::Write(changes, std::mem::take(&mut state.waiters));
                    }
                    Some(age) => Some(GATHER - age),
                    None if !state.waiters.is_empty()
                        || flush_in.is_some_and(|left| left.is_zero() || state.closed) =>
                    {
                        return Work::Write(None, std::mem::take(&mut state.waiters));
                    }
                    None if state.closed => return Work::End,
                    None => flush_in,
                }
            };
            match wait {
                Some(wait) => drop(shared.wake.wait_for(&mut state, wait)),
                None => shared.wake.wait(&mut state),
            }
        }
    }

    fn write(&mut self, changes: Option<Arc<Changes>>, waiters: Waiters) {
        let Some(store) = self.shared.store() else {
            self.lose(StoreError::Unavailable("no store".into()), waiters);
            return;
        };
        let result = self.write_to(&store, changes.as_deref(), !waiters.is_empty());
        drop(store);
        match result {
            Ok(()) => {
                {
                    let mut state = self.shared.state();
                    state.queue.written();
                    state.stalled = false;
                }
                for waiter in waiters {
                    // Anyone who waited may have gone.
                    let _ = waiter.send(Ok(()));
                }
                self.shared.announce();
            }
            Err(error) => self.lose(error, waiters),
        }
    }

    fn write_to(&mut self, store: &Store, changes: Option<&Changes>, flush: bool) -> Result<(), StoreError> {
        if let Some(changes) = changes {
            for tree in TreeId::ALL {
                store.apply(tree, changes.tree(tree))?;
                if tree == TreeId::Outputs {
                    self.write_outputs(store, changes)?;
                }
            }
            self.unflushed.get_or_insert_with(Instant::now);
        }
        let due = self.unflushed.is_some_and(|since| since.elapsed() >= FLUSH_EVERY);
        if flush || due || changes.is_none() {
            self.unflushed = None;
            store.flush()?;
        }
        Ok(())
    }

    fn write_outputs(&self, store: &Store, changes: &Changes) -> Result<(), StoreError> {
        for (root, waiting) in changes.outputs.roots() {
            let unreadable = store.apply_outputs(root, waiting)?;
            self.shared.unreadable.fetch_add(unreadable, Ordering::Relaxed);
        }
        Ok(())
    }

    /// A write failed.
    fn lose(&mut self, error: StoreError, waiters: Waiters) {
        let words = error.to_string();
        match error {
            StoreError::Unavailable(reason) => {
                self.shared.state().queue.give_back();
                self.go_down(reason, RETRY_FIRST);
            }
            StoreError::Damaged(reason) => {
                // Not given back: should these rows be what the store stumbled over, the next one would too.
                let lost = {
                    let mut state = self.shared.state();
                    let in_hand = state.queue.rows() - state.queue.waiting();
                    state.queue.written();
                    in_hand
                };
                self.shared.count_dropped(lost);
                self.replace(reason);
            }
        }
        // Now that health says the same.
        for waiter in waiters {
            let _ = waiter.send(Err(FlushError::Degraded(words.clone())));
        }
    }

    /// Works without a store for a while.
    fn go_down(&mut self, reason: String, retry_after: Duration) {
        self.retire();
        self.shared.log_now_and_then(&format!(
            "the record is not being written at the moment: {reason}"
        ));
        self.retry_after = retry_after;
        self.retry_at = Instant::now() + retry_after;
        self.unflushed = None;
        {
            let mut state = self.shared.state();
            let since_ms = state.down.as_ref().map(|down| down.since_ms);
            let now = Down::now(reason);
            state.down = Some(Down {
                since_ms: since_ms.unwrap_or(now.since_ms),
                ..now
            });
        }
        self.shared.announce();
    }

    /// Takes the store away and closes it elsewhere: closing a broken sled may hang.
    fn retire(&self) {
        if let Some(store) = self.shared.swap_store(None) {
            let closing = thread::Builder::new()
                .name("outhaul-record-close".into())
                .spawn(move || drop(store));
            if let Err(error) = closing {
                // The closure, and the store with it, was dropped right here.
                tracing::debug!(%error, "failed to start a thread to close the record's store");
            }
        }
    }

    /// The store is damaged: sets it aside and starts another.
    fn replace(&mut self, reason: String) {
        if self.made_anew.is_some_and(|at| at.elapsed() < BROKEN_SOON) {
            self.go_down(format!("it failed again: {reason}"), BROKEN_WAIT);
            return;
        }
        self.made_anew = Some(Instant::now());
        self.retire();
        let opened = self.shared.place.start_anew(reason);
        self.take_over(opened);
    }

    fn reopen(&mut self) {
        let opened = self.shared.place.reopen();
        self.take_over(opened);
    }

    fn take_over(&mut self, (store, opening): (Option<Store>, Opening)) {
        match (store, opening) {
            (Some(store), opening) => {
                if let Opening::Quarantined { moved_to, reason } = &opening {
                    self.shared.quarantined.fetch_add(1, Ordering::Relaxed);
                    let moved_to = moved_to.display();
                    tracing::warn!(%moved_to, "the record was damaged; starting a new one: {reason}");
                }
                self.shared.swap_store(Some(store));
                self.shared.exchange_roots();
                self.unflushed = None;
                self.retry_after = RETRY_FIRST;
                if self.shared.state().down.take().is_some() {
                    tracing::info!("the record is being written again");
                }
                self.shared.announce();
            }
            (None, Opening::Unavailable { reason }) => {
                let after = (self.retry_after * 2).min(RETRY_MAX);
                self.go_down(reason, after);
            }
            (None, opening) => self.go_down(format!("{opening:?} without a store"), RETRY_MAX),
        }
    }
}
