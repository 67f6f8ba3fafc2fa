//! Which streams have a task.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::mpsc;

use super::{
    server::Shared,
    sink::StreamKey,
    stream::{Command, Stream},
};

/// Events that wait for a stream's task; the budget of bytes is elsewhere.
const QUEUED: usize = 1024;

#[derive(Default)]
pub(super) struct Streams {
    tasks: Mutex<HashMap<StreamKey, mpsc::Sender<Command>>>,
}

impl Streams {
    /// The way to a stream's task, which is started if there is none.
    pub(super) fn sender(&self, key: &StreamKey, shared: &Arc<Shared>) -> mpsc::Sender<Command> {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = tasks.get(key)
            && !sender.is_closed()
        {
            return sender.clone();
        }
        let (sender, commands) = mpsc::channel(QUEUED);
        shared
            .tasks
            .spawn(Stream::run(key.clone(), Arc::clone(shared), commands));
        tasks.insert(key.clone(), sender.clone());
        sender
    }

    /// The same for a client's stream, which is not begun when there are `most` already.
    pub(super) fn open(
        &self,
        key: &StreamKey,
        shared: &Arc<Shared>,
        most: usize,
    ) -> Option<mpsc::Sender<Command>> {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let known = tasks.get(key).is_some_and(|sender| !sender.is_closed());
        if !known && tasks.len() >= most {
            return None;
        }
        drop(tasks);
        Some(self.sender(key, shared))
    }

    /// Whether there are so many that settled ones go without lingering.
    pub(super) fn is_crowded(&self, most: usize) -> bool {
        self.len() > most / 2
    }

    /// Forgets a stream, unless somebody holds or has used a way to it: senders are only made under this lock, so a
    /// task that is told `true` can't miss a command.
    pub(super) fn retire(&self, key: &StreamKey, commands: &mpsc::Receiver<Command>) -> bool {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = commands.sender_strong_count() == 1 && commands.is_empty();
        if idle {
            tasks.remove(key);
        }
        idle
    }

    pub(super) fn len(&self) -> usize {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}
