//! Which streams have a task.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::command::Command;
use crate::{builds::StreamKey, journal::Journal};

/// Events that wait for a stream's task; the budget of bytes is elsewhere.
const QUEUED: usize = 1024;

#[derive(Default)]
pub(super) struct Streams {
    tasks: Mutex<HashMap<StreamKey, mpsc::Sender<Command>>>,
    /// How many of them are at work on a build: see [`StreamSlot`].
    at_work: Arc<AtomicUsize>,
}

/// One of the places that are for clients and for builds that are not settled.
///
/// A stream that only waits for upstream to have everything has none, else an upstream service that is away for long
/// would fail builds. The journal keeps what such a stream waits with, so the disk bounds how many there are; without a
/// journal, it keeps its place.
pub(super) struct StreamSlot {
    at_work: Arc<AtomicUsize>,
}

impl Drop for StreamSlot {
    fn drop(&mut self) {
        self.at_work.fetch_sub(1, Relaxed);
    }
}

impl Streams {
    /// The handle to a stream's task; `start` is called if it does not run.
    pub(super) fn sender(
        &self,
        key: &StreamKey,
        start: impl FnOnce(mpsc::Receiver<Command>, StreamSlot),
    ) -> mpsc::Sender<Command> {
        let mut tasks = self.tasks.lock();
        if let Some(sender) = tasks.get(key)
            && !sender.is_closed()
        {
            return sender.clone();
        }
        let (sender, commands) = mpsc::channel(QUEUED);
        start(commands, self.place());
        tasks.insert(key.clone(), sender.clone());
        sender
    }

    /// Whether one more client's stream may be at work, when `most` may; one that has a task already may.
    pub(super) fn may_open(&self, key: &StreamKey, most: usize) -> bool {
        let tasks = self.tasks.lock();
        let known = tasks.get(key).is_some_and(|sender| !sender.is_closed());
        known || self.at_work.load(Relaxed) < most
    }

    /// The newest stream with a key's ids that has a task or a journal, or else the first one. Whether there is any. Blocks.
    pub(super) fn newest(&self, key: &StreamKey, journal: Option<&Journal>) -> (StreamKey, bool) {
        let is_kept = |key: &StreamKey| {
            let has_task = {
                let tasks = self.tasks.lock();
                tasks.contains_key(key)
            };
            has_task || journal.is_some_and(|journal| journal.has(key))
        };
        let mut newest = key.clone();
        loop {
            let next = newest.next_attempt();
            if !is_kept(&next) {
                let is_any = is_kept(&newest);
                return (newest, is_any);
            }
            newest = next;
        }
    }

    /// A place for a stream that is at work.
    pub(super) fn place(&self) -> StreamSlot {
        self.at_work.fetch_add(1, Relaxed);
        StreamSlot {
            at_work: Arc::clone(&self.at_work),
        }
    }

    /// Whether there are too many streams for settled ones to linger.
    pub(super) fn is_crowded(&self, most: usize) -> bool {
        self.len() > most / 2
    }

    /// Forgets a stream, unless there is another handle to it: handles are only made under this lock, so a
    /// task that gets `true` cannot miss a command.
    pub(super) fn retire(&self, key: &StreamKey, commands: &mpsc::Receiver<Command>) -> bool {
        let mut tasks = self.tasks.lock();
        let idle = commands.sender_strong_count() == 1 && commands.is_empty();
        if idle {
            tasks.remove(key);
        }
        idle
    }

    pub(super) fn len(&self) -> usize {
        self.tasks.lock().len()
    }
}
