//! The task that sends: spans from the queue, and the metrics every now and then.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use super::{
    client::Client,
    collector::Collector,
    parent::TraceParent,
    span::Span,
    trace::{Sink, Traces},
};
use crate::{
    metrics::Metrics,
    transport::{Delays, RemoteError},
    units::show_duration,
};

/// Spans that may wait for the collector: some 300 bytes each.
const QUEUE: usize = 4096;
/// Spans in one request.
const BATCH: usize = 512;
/// How long further ones are waited for.
const GATHERING: Duration = Duration::from_secs(1);
/// Waits after failures.
const DELAYS: Delays = Delays::doubling(Duration::from_secs(1), Duration::from_secs(60));
/// How long the collector gets at the end for what it does not have yet.
const CLOSING: Duration = Duration::from_secs(3);
/// The same where it has not answered so far, and has not failed either.
const FIRST_ANSWER: Duration = Duration::from_secs(1);

/// Whether something was taken, or why not.
type Answer = Result<(), String>;

/// What the collector did not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Why, without secrets.
    pub(super) reason: String,
    /// Whether the same may be taken later.
    pub(super) is_passing: bool,
}

/// Exports until it is closed.
pub(crate) struct Exporter {
    traces: Traces,
    stop: CancellationToken,
    /// Whether the collector has taken what it was sent last, if it was sent anything.
    answers: watch::Receiver<Option<Answer>>,
    /// The collector's address.
    name: String,
    task: JoinHandle<()>,
}

impl Exporter {
    /// Whether exporting can start: without the feature, or a certificate that can be read, it cannot. To be called within
    /// the runtime; connects nothing.
    ///
    /// # Errors
    /// Naming what is wrong.
    pub(crate) fn check(collector: &Collector) -> Result<(), RemoteError> {
        Client::new(collector).map(drop)
    }

    /// Starts exporting, on the current tokio runtime. All builds are a part of the `parent`.
    ///
    /// # Errors
    /// When the settings cannot work, such as a certificate that cannot be read.
    pub(crate) fn start(
        collector: &Collector,
        parent: Option<TraceParent>,
        metrics: &Metrics,
    ) -> Result<Self, RemoteError> {
        let client = Client::new(collector)?;
        let (queue, spans) = mpsc::channel(QUEUE);
        let dropped = Arc::<AtomicU64>::default();
        let (answered, answers) = watch::channel(None);
        let stop = CancellationToken::new();
        let name = collector.connect.endpoint.to_string();
        let work = Work {
            client,
            name: name.clone(),
            metrics: metrics.clone(),
            spans,
            pending: Vec::new(),
            due: None,
            failures: 0,
            dropped: dropped.clone(),
            answered,
            stop: stop.clone(),
        };
        let sink = Sink {
            queue,
            dropped,
            parent,
        };
        Ok(Self {
            traces: Traces::to(sink),
            stop,
            answers,
            name,
            task: tokio::spawn(work.run(collector.every)),
        })
    }

    /// Where spans go.
    pub(crate) fn traces(&self) -> Traces {
        self.traces.clone()
    }

    /// Sends what is queued, and the metrics once more: for a few seconds, and not where the collector does not answer.
    /// Says why something was not sent, if so.
    pub(crate) async fn close(mut self) -> Option<String> {
        self.stop.cancel();
        let patience = match &*self.answers.borrow() {
            Some(Ok(())) => CLOSING,
            Some(Err(_)) => Duration::ZERO,
            None => FIRST_ANSWER,
        };
        let ended = tokio::time::timeout(patience, &mut self.task).await;
        self.task.abort();
        let reason = match &*self.answers.borrow() {
            Some(Err(reason)) => reason.clone(),
            _ if ended.is_ok() => return None,
            _ => format!("no answer within {}", show_duration(patience)),
        };
        Some(failure(&self.name, &reason))
    }
}

fn failure(name: &str, reason: &str) -> String {
    format!("failed to export to the OpenTelemetry collector {name} (--otlp-endpoint): {reason}")
}

/// What the task has.
struct Work {
    client: Client,
    /// The collector's address.
    name: String,
    metrics: Metrics,
    spans: mpsc::Receiver<Span>,
    /// What is sent next.
    pending: Vec<Span>,
    /// When that is.
    due: Option<Instant>,
    /// How often in a row it could not be sent.
    failures: u32,
    /// Spans that were lost and not reported yet.
    dropped: Arc<AtomicU64>,
    answered: watch::Sender<Option<Answer>>,
    stop: CancellationToken,
}

impl Work {
    async fn run(mut self, every: Duration) {
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = self.due;
            let sending = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            let room = BATCH - self.pending.len();
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                _ = ticks.tick() => self.send_metrics().await,
                () = sending => self.send_spans().await,
                _ = self.spans.recv_many(&mut self.pending, room), if room > 0 => self.schedule(),
            }
        }
        // What came before the end.
        while let Ok(span) = self.spans.try_recv() {
            self.pending.push(span);
        }
        while !self.pending.is_empty() && self.failures == 0 {
            self.send_spans().await;
        }
        if self.failures == 0 {
            self.send_metrics().await;
        }
    }

    /// Some spans have come.
    fn schedule(&mut self) {
        let now = Instant::now();
        let is_full = self.failures == 0 && self.pending.len() >= BATCH;
        let due = self.due.unwrap_or(now + GATHERING);
        self.due = Some(if is_full { now } else { due });
    }

    async fn send_spans(&mut self) {
        let count = self.pending.len().min(BATCH);
        let sent = self.client.send_spans(&self.pending[..count]).await;
        let is_done = sent
            .as_ref()
            .map_or_else(|refusal| !refusal.is_passing, |()| true);
        if is_done {
            self.pending.drain(..count);
        }
        if is_done && sent.is_err() {
            self.dropped.fetch_add(count as u64, Relaxed);
        }
        self.heed(sent);
        self.due = match (self.failures, self.pending.is_empty()) {
            (_, true) => None,
            (0, false) => Some(Instant::now()),
            (failures, false) => Some(Instant::now() + DELAYS.after(failures - 1, rand::random())),
        };
    }

    async fn send_metrics(&mut self) {
        let text = self.metrics.render();
        let sent = self.client.send_metrics(&text).await;
        self.heed(sent);
        self.report_lost();
    }

    /// Says once that the collector does not take anything, and once that it does again.
    fn heed(&mut self, sent: Result<(), Refusal>) {
        let has_failed = self.failures > 0;
        let name = &self.name;
        let answer = sent
            .as_ref()
            .map_or_else(|refusal| Err(refusal.reason.clone()), |()| Ok(()));
        self.answered.send_replace(Some(answer));
        match sent {
            Ok(()) => {
                self.failures = 0;
                if has_failed {
                    // What waited is sent at once.
                    self.due = (!self.pending.is_empty()).then(Instant::now);
                    tracing::info!("exporting to the OpenTelemetry collector {name} works again");
                    self.report_lost();
                }
            }
            Err(Refusal { reason, .. }) => {
                self.failures = self.failures.saturating_add(1);
                if has_failed {
                    tracing::debug!(%reason, "failed to export to {name} again");
                } else {
                    tracing::warn!("{}; trying again in the background", failure(name, &reason));
                }
            }
        }
    }

    /// Not while nothing can be sent at all: that was said.
    fn report_lost(&self) {
        if self.failures > 0 {
            return;
        }
        let lost = self.dropped.swap(0, Relaxed);
        if lost > 0 {
            tracing::warn!(
                "{lost} spans were not exported to the OpenTelemetry collector {}",
                self.name
            );
        }
    }
}
