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
    time::{Instant, sleep, sleep_until, timeout},
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

/// Spans that may wait for the collector: some 300 bytes each, and a few KiB at most.
const QUEUE: usize = 4096;
/// Spans in one request.
const BATCH: usize = 512;
/// How long further ones are waited for.
const GATHERING: Duration = Duration::from_secs(1);
/// Waits after failures.
const DELAYS: Delays = Delays::doubling(Duration::from_secs(1), Duration::from_secs(60));
/// How long the collector gets at the end for what it does not have yet.
const CLOSING: Duration = Duration::from_secs(3);
/// How long its first answer is waited for at the end, if there was none so far.
const FIRST_ANSWER: Duration = Duration::from_secs(1);

/// What the collector did not take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// Why, without secrets.
    pub(super) reason: String,
    /// Whether the same may be taken later.
    pub(super) is_passing: bool,
    /// Whether it takes nothing of the kind.
    pub(super) is_of_kind: bool,
    /// When to try again, if the collector says so.
    pub(super) retry_after: Option<Duration>,
}

/// What the collector says of what it took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Taken {
    /// Spans, or points of metrics, that it rejected and that are not sent again.
    pub(super) rejected: u64,
    /// Why, or a hint: without secrets.
    pub(super) note: String,
}

/// Spans and metrics go to two services of a collector, and some collectors have only one of them. So each kind fails, and
/// works again, by itself.
const KINDS: [&str; 2] = ["spans", "metrics"];
const SPANS: usize = 0;
const METRICS: usize = 1;

/// What came of the last request of each kind, if there was one.
type Answers = [Option<Result<(), Refusal>>; KINDS.len()];

/// Whether the collector answers, if that is known: by the spans if possible.
fn is_there(answers: &Answers) -> Option<bool> {
    let last = answers[SPANS].as_ref().or(answers[METRICS].as_ref())?;
    // A refusal that will not pass is an answer, too.
    Some(!last.as_ref().is_err_and(|refusal| refusal.is_passing))
}

/// Exports until it is closed.
pub(crate) struct Exporter {
    traces: Traces,
    stop: CancellationToken,
    task: JoinHandle<Option<String>>,
}

impl Exporter {
    /// Whether exporting can start: Outhaul was built with the feature, and the certificate can be read. To be called within
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
        let connect = &collector.connect;
        if !connect.headers.is_empty() && connect.is_unencrypted() {
            tracing::warn!(
                "credentials or headers are sent unencrypted to the OpenTelemetry collector {}: anyone on the way can read \
                 them; use https:// if the collector has it",
                connect.endpoint
            );
        }
        let (sender, queue) = mpsc::channel(QUEUE);
        let dropped = Arc::<AtomicU64>::default();
        let stop = CancellationToken::new();
        let mut kinds = <[Kind; KINDS.len()]>::default();
        kinds[METRICS].due = Some(Instant::now());
        let work = Work {
            client,
            name: connect.endpoint.to_string(),
            metrics: metrics.clone(),
            every: collector.every,
            queue,
            pending: Vec::new(),
            kinds,
            dropped: dropped.clone(),
            reported: 0,
            answers: watch::Sender::default(),
            stop: stop.clone(),
        };
        let sink = Sink {
            queue: sender,
            dropped,
            parent,
        };
        Ok(Self {
            traces: Traces::to(sink),
            stop,
            task: tokio::spawn(work.run()),
        })
    }

    /// Where spans go.
    pub(crate) fn traces(&self) -> Traces {
        self.traces.clone()
    }

    /// Sends what is queued, and the metrics once more: for a few seconds, and not if the collector does not answer. Says what
    /// was not exported and why, if so.
    pub(crate) async fn close(self) -> Option<String> {
        self.stop.cancel();
        self.task
            .await
            .unwrap_or_else(|fault| Some(format!("the export to OpenTelemetry has failed: {fault}")))
    }
}

/// Ends when the collector has had enough time after the stop, and says how much that was.
async fn patience(stop: CancellationToken, mut answers: watch::Receiver<Answers>) -> Duration {
    stop.cancelled().await;
    let first = timeout(
        FIRST_ANSWER,
        answers.wait_for(|answers| is_there(answers).is_some()),
    );
    let answers_now = match first.await {
        Ok(Ok(answers)) => is_there(&answers),
        _ => None,
    };
    match answers_now {
        Some(true) => {
            sleep(CLOSING).await;
            CLOSING
        }
        Some(false) => Duration::ZERO,
        None => FIRST_ANSWER,
    }
}

/// Waits for the moment, if there is one.
async fn reached(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

fn count(spans: u64) -> String {
    match spans {
        1 => "1 span was".to_owned(),
        spans => format!("{spans} spans were"),
    }
}

/// What is known of the requests of one kind.
#[derive(Default)]
struct Kind {
    /// When the next one may be sent, if that is set.
    due: Option<Instant>,
    /// How many in a row have failed.
    failures: u32,
    /// Whether that was said, as something that passes or not.
    warned: Option<Warned>,
    /// What the log has last of what the collector said of those that it took.
    note: String,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Warned {
    Passing,
    Lasting,
}

/// What the task has.
struct Work {
    client: Client,
    /// The collector's address.
    name: String,
    metrics: Metrics,
    /// How long after the last ones the metrics are sent again.
    every: Duration,
    queue: mpsc::Receiver<Span>,
    /// What is sent next.
    pending: Vec<Span>,
    kinds: [Kind; KINDS.len()],
    /// Spans that were lost so far.
    dropped: Arc<AtomicU64>,
    /// How many of these the log has.
    reported: u64,
    answers: watch::Sender<Answers>,
    stop: CancellationToken,
}

impl Work {
    /// Says what was not exported, if so.
    async fn run(mut self) -> Option<String> {
        let enough = patience(self.stop.clone(), self.answers.subscribe());
        let given = tokio::select! {
            biased;
            () = self.export() => None,
            given = enough => Some(given),
        };
        self.ending(given)
    }

    /// Until all that came before the stop is sent, or the collector does not answer.
    async fn export(&mut self) {
        loop {
            let room = BATCH - self.pending.len();
            let has_spans = room < BATCH;
            let [spans_due, metrics_due] = [SPANS, METRICS].map(|kind| self.kinds[kind].due);
            // The metrics come last, so that they keep no span waiting, however often they are sent.
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                came = self.queue.recv_many(&mut self.pending, room), if room > 0 => match came {
                    0 => break,
                    _ => self.schedule(),
                },
                () = reached(spans_due), if has_spans => self.send_spans().await,
                () = reached(metrics_due) => self.send_metrics().await,
            }
        }
        while let Ok(span) = self.queue.try_recv() {
            self.pending.push(span);
        }
        while !self.pending.is_empty() && self.may_answer() {
            self.send_spans().await;
        }
        if self.may_answer() {
            self.send_metrics().await;
        }
    }

    fn may_answer(&self) -> bool {
        is_there(&self.answers.borrow()) != Some(false)
    }

    /// Some spans have come.
    fn schedule(&mut self) {
        let now = Instant::now();
        let spans = &mut self.kinds[SPANS];
        let is_full = spans.failures == 0 && self.pending.len() >= BATCH;
        let due = spans.due.unwrap_or(now + GATHERING);
        spans.due = Some(if is_full { now } else { due });
    }

    async fn send_spans(&mut self) {
        let count = self.pending.len().min(BATCH);
        let sent = self.client.send_spans(&self.pending[..count]).await;
        let lost = match &sent {
            Ok(taken) => Some(taken.rejected.min(count as u64)),
            Err(refusal) => (!refusal.is_passing).then_some(count as u64),
        };
        if let Some(lost) = lost {
            self.pending.drain(..count);
            self.dropped.fetch_add(lost, Relaxed);
        }
        let wait = self.heed(SPANS, sent);
        // After a refusal that will not pass, those that come next wait, too.
        let is_due = !self.pending.is_empty() || !wait.is_zero();
        self.kinds[SPANS].due = Instant::now().checked_add(wait).filter(|_| is_due);
    }

    async fn send_metrics(&mut self) {
        let text = self.metrics.render();
        let sent = self.client.send_metrics(&text).await;
        let wait = self.heed(METRICS, sent);
        self.kinds[METRICS].due = Instant::now().checked_add(wait.max(self.every));
        self.report_lost();
    }

    /// Says once that the collector does not take something, and once that it does again. How long to wait now.
    fn heed(&mut self, kind: usize, sent: Result<Taken, Refusal>) -> Duration {
        let answer = sent.as_ref().map(|_| ()).map_err(Refusal::clone);
        self.answers.send_modify(|answers| answers[kind] = Some(answer));
        match sent {
            Ok(taken) => {
                self.took(kind, taken);
                Duration::ZERO
            }
            Err(refusal) => self.failed(kind, &refusal),
        }
    }

    fn took(&mut self, kind: usize, taken: Taken) {
        let (name, what) = (&self.name, KINDS[kind]);
        let Taken { rejected, note } = taken;
        let of_kind = &mut self.kinds[kind];
        if !note.is_empty() && note != of_kind.note {
            if rejected > 0 {
                tracing::warn!("the OpenTelemetry collector {name} rejected some of the {what}: {note}");
            } else {
                tracing::warn!("the OpenTelemetry collector {name} took the {what} and says: {note}");
            }
            of_kind.note = note;
        }
        of_kind.failures = 0;
        if of_kind.warned.take().is_some() {
            tracing::info!("exporting {what} to the OpenTelemetry collector {name} works again");
            // What waits of the other kind is sent at once.
            let other = &mut self.kinds[1 - kind];
            other.due = other.due.map(|due| due.min(Instant::now()));
            self.report_lost();
        }
    }

    /// How long to wait now.
    fn failed(&mut self, kind: usize, refusal: &Refusal) -> Duration {
        let is_away = |kind: &Kind| kind.warned == Some(Warned::Passing);
        let warning = if refusal.is_passing {
            Warned::Passing
        } else {
            Warned::Lasting
        };
        // One that does not answer takes neither kind.
        let is_said = self.kinds[kind].warned >= Some(warning)
            || warning == Warned::Passing && is_away(&self.kinds[1 - kind]);
        let failure = self.failure(kind, refusal);
        let of_kind = &mut self.kinds[kind];
        let failures = of_kind.failures;
        of_kind.failures = failures.saturating_add(1);
        if is_said || self.stop.is_cancelled() {
            tracing::debug!("{failure}");
        } else {
            of_kind.warned = Some(warning);
            match warning {
                Warned::Passing => tracing::warn!("{failure}; trying again in the background"),
                Warned::Lasting => tracing::warn!("{failure}"),
            }
        }
        let wait = DELAYS.after(failures, rand::random());
        wait.max(refusal.retry_after.unwrap_or_default())
    }

    fn failure(&self, kind: usize, refusal: &Refusal) -> String {
        let (name, what, reason) = (&self.name, KINDS[kind], &refusal.reason);
        match refusal {
            Refusal { is_of_kind: true, .. } => {
                format!("the OpenTelemetry collector {name} (--otlp-endpoint) takes no {what}: {reason}")
            }
            Refusal { is_passing: true, .. } => {
                format!("failed to export to the OpenTelemetry collector {name} (--otlp-endpoint): {reason}")
            }
            _ => format!(
                "failed to export {what} to the OpenTelemetry collector {name} (--otlp-endpoint): {reason}"
            ),
        }
    }

    /// Not while no spans can be sent at all: that was said.
    fn report_lost(&mut self) {
        if self.kinds[SPANS].failures > 0 {
            return;
        }
        let dropped = self.dropped.load(Relaxed);
        let lost = dropped - self.reported;
        self.reported = dropped;
        if lost > 0 {
            let (lost, name) = (count(lost), &self.name);
            tracing::warn!("{lost} not exported to the OpenTelemetry collector {name}");
        }
    }

    /// What there is to say at the end, after this much patience if that was not enough.
    fn ending(&self, given: Option<Duration>) -> Option<String> {
        let name = &self.name;
        let waiting = self.pending.len() + self.queue.len();
        let lost = self.dropped.load(Relaxed) + waiting as u64;
        let answers = self.answers.borrow();
        let refusal = |kind: usize| {
            answers[kind]
                .as_ref()?
                .as_ref()
                .err()
                .map(|refusal| (kind, refusal))
        };
        // Many collectors are for traces alone.
        let refusal = refusal(SPANS).or_else(|| refusal(METRICS).filter(|(_, refusal)| !refusal.is_of_kind));
        let reason = match (refusal, given) {
            (Some((kind, refusal)), _) => Some(self.failure(kind, refusal)),
            (None, Some(given)) => Some(format!(
                "failed to export to the OpenTelemetry collector {name} (--otlp-endpoint): no answer within {}",
                show_duration(given)
            )),
            (None, None) => None,
        };
        match (reason, lost) {
            (reason, 0) => reason,
            (Some(reason), lost) => Some(format!("{reason}; {} lost in all", count(lost))),
            (None, lost) => Some(format!(
                "{} not exported to the OpenTelemetry collector {name} (--otlp-endpoint)",
                count(lost)
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(is_passing: bool) -> Option<Result<(), Refusal>> {
        Some(Err(Refusal {
            reason: "no".to_owned(),
            is_passing,
            is_of_kind: !is_passing,
            retry_after: None,
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_end_a_collector_gets_time_if_it_answers_and_none_if_it_failed() {
        let (taken, away, none) = (Some(Ok(())), refused(true), refused(false));
        for (answers, seconds) in [
            ([None, None], 1),
            ([None, taken.clone()], 3),
            ([None, away.clone()], 0),
            ([None, none.clone()], 3),
            ([taken.clone(), none.clone()], 3),
            ([taken.clone(), away.clone()], 3),
            ([away.clone(), taken.clone()], 0),
            ([none, away], 3),
        ] {
            let (_sender, answers) = watch::channel(answers);
            let stop = CancellationToken::new();
            stop.cancel();
            let begun = Instant::now();
            let given = patience(stop, answers.clone()).await;
            let expected = Duration::from_secs(seconds);
            assert_eq!(
                (given, begun.elapsed()),
                (expected, expected),
                "{:?}",
                answers.borrow()
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_first_answer_that_comes_late_leaves_all_the_time_for_the_spans() {
        let (sender, answers) = watch::channel([None, None]);
        let stop = CancellationToken::new();
        stop.cancel();
        let begun = Instant::now();
        let waiting = tokio::spawn(patience(stop, answers));
        sleep(Duration::from_millis(900)).await;
        sender.send_modify(|answers| answers[METRICS] = Some(Ok(())));
        waiting.await.unwrap();
        assert_eq!(begun.elapsed(), Duration::from_millis(3900));
    }
}
