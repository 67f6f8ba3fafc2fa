//! Listens to the engine and hands documents to the receivers' queues.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use super::{
    delivery::deliver,
    document::{Document, Event, Writer},
    error::NotifyError,
    hook::{self, Hook},
    http::Poster,
    queue::{Pushed, Queue},
    retry::Patience,
    signature::Secret,
    url::NotifyUrl,
};
use crate::{
    invocation::feed::InvocationChange,
    metrics::{Metrics, Notified},
};

/// Documents that wait for one receiver; the oldest are lost beyond that. Some hundred bytes each.
const QUEUE: usize = 10_000;
/// How long receivers get at the end for what has not been delivered.
const DRAIN: Duration = Duration::from_secs(5);
/// Losses between two lines about them in the log.
const LINE_EVERY: u64 = 1000;

/// Receivers, and what each of them gets.
#[derive(Debug, Clone, Default)]
pub(crate) struct NotifyOptions {
    /// Where documents are posted.
    pub urls: Vec<NotifyUrl>,
    /// What they are signed with.
    pub secret: Option<Secret>,
    /// What is run for them.
    pub hook: Option<Hook>,
    /// What they report.
    pub events: Vec<Event>,
}

impl NotifyOptions {
    /// Whether there is any receiver.
    pub(crate) fn is_empty(&self) -> bool {
        self.urls.is_empty() && self.hook.is_none()
    }
}

/// A receiver's queue, and what to call it.
struct Receiver {
    name: String,
    via: &'static str,
    queue: Arc<Queue>,
}

/// What receivers still have to get. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Backlog(Arc<[Arc<Queue>]>);

impl Backlog {
    /// Whether every receiver has got everything, or will never get it.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|queue| queue.undelivered() == 0)
    }
}

/// Sends notifications of what happens, until it is closed.
pub(crate) struct Notifier {
    stop: CancellationToken,
    listening: JoinHandle<()>,
    backlog: Backlog,
}

impl Notifier {
    /// Starts listening, on the current tokio runtime.
    ///
    /// # Errors
    /// Naming the receiver: the system has no certificate authorities.
    pub(crate) fn start(
        options: NotifyOptions,
        changes: mpsc::UnboundedReceiver<InvocationChange>,
        metrics: &Metrics,
    ) -> Result<Self, NotifyError> {
        Self::with_patience(options, changes, metrics, Patience::default(), QUEUE, DRAIN)
    }

    pub(super) fn with_patience(
        options: NotifyOptions,
        changes: mpsc::UnboundedReceiver<InvocationChange>,
        metrics: &Metrics,
        patience: Patience,
        bound: usize,
        drain: Duration,
    ) -> Result<Self, NotifyError> {
        let posters = options
            .urls
            .into_iter()
            .map(|url| {
                let receiver = Box::new(url.clone());
                Poster::new(url, options.secret.clone())
                    .map_err(|error| NotifyError::Client { receiver, error })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut receivers = Vec::new();
        let mut tasks = JoinSet::new();
        let mut receiver = |name: String, via: &'static str| {
            let queue = Arc::new(Queue::new(bound));
            receivers.push(Receiver {
                name,
                via,
                queue: queue.clone(),
            });
            queue
        };
        for poster in posters {
            let queue = receiver(poster.url().to_string(), "url");
            tasks.spawn(deliver(queue, poster, patience, metrics.clone()));
        }
        if let Some(hook) = options.hook {
            let queue = receiver("--on-settled".to_owned(), "command");
            tasks.spawn(hook::run(queue, hook, metrics.clone()));
        }
        let backlog = Backlog(receivers.iter().map(|receiver| receiver.queue.clone()).collect());
        let stop = CancellationToken::new();
        let listener = Listener {
            receivers,
            events: options.events,
            writer: Writer::default(),
            metrics: metrics.clone(),
        };
        let listening = tokio::spawn(listener.run(changes, tasks, stop.clone(), drain));
        Ok(Self {
            stop,
            listening,
            backlog,
        })
    }

    /// What receivers still have to get, from now on.
    pub(crate) fn backlog(&self) -> Backlog {
        self.backlog.clone()
    }

    /// Processes the changes until now, and gives the receivers a few seconds for what they have not got yet.
    pub(crate) async fn close(self) {
        self.stop.cancel();
        if self.listening.await.is_err_and(|e| e.is_panic()) {
            tracing::error!("reporting settled builds panicked; this is a bug in outhaul");
        }
    }
}

struct Listener {
    receivers: Vec<Receiver>,
    events: Vec<Event>,
    writer: Writer,
    metrics: Metrics,
}

impl Listener {
    async fn run(
        mut self,
        mut changes: mpsc::UnboundedReceiver<InvocationChange>,
        mut tasks: JoinSet<()>,
        stop: CancellationToken,
        drain: Duration,
    ) {
        loop {
            tokio::select! {
                change = changes.recv() => match change {
                    Some(change) => self.announce(change),
                    None => break,
                },
                () = stop.cancelled() => break,
            }
        }
        // Changes from before the end are still processed.
        while let Ok(change) = changes.try_recv() {
            self.announce(change);
        }
        for receiver in &self.receivers {
            receiver.queue.close();
        }
        let drained = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(drain, drained).await.is_err() {
            for receiver in &self.receivers {
                let lost = receiver.queue.undelivered();
                if lost > 0 {
                    tracing::warn!(
                        receiver = receiver.name,
                        lost,
                        "exiting with undelivered notifications"
                    );
                    self.metrics.notification(receiver.via, Notified::Dropped, lost);
                }
            }
            tasks.shutdown().await;
        }
    }

    fn announce(&mut self, change: InvocationChange) {
        let Some(document) = self.writer.write(change) else {
            return;
        };
        if !self.events.contains(&document.event) {
            return;
        }
        for receiver in &self.receivers {
            self.push(receiver, document.clone());
        }
    }

    fn push(&self, receiver: &Receiver, document: Document) {
        if let Pushed::Lost(lost) = receiver.queue.push(document) {
            self.metrics.notification(receiver.via, Notified::Dropped, 1);
            if lost % LINE_EVERY == 1 {
                tracing::warn!(
                    receiver = receiver.name,
                    lost,
                    "too many pending notifications; dropped the oldest"
                );
            }
        }
    }
}
