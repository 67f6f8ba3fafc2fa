//! Sends a stream's events upstream, over as many calls as it takes.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Channel};

use super::{
    call::{Answer, Call},
    headers,
    order::Opened,
    outgoing::ForwardStatus,
    shared::{Credentials, Inner, Surroundings},
    supply::{End, Ready, Source},
    window::{Room, Window},
};
use crate::{bes::counters::Counters, builds::StreamKey, transport::Secrets};

/// Acknowledged numbers are kept at most this often.
const SAVED_EVERY: Duration = Duration::from_millis(100);

/// How often to look at what does not report changes.
const LOOK: Duration = Duration::from_millis(100);

/// How long it takes to think that upstream acknowledges nothing before the end.
const UNHEARD: Duration = Duration::from_secs(1);

/// Things handled between two looks at everything else.
const AT_ONCE: usize = 128;

/// One stream's forwarder.
pub(super) struct Forwarder {
    key: StreamKey,
    upstream: Arc<Inner>,
    counters: Arc<Counters>,
    channel: Channel,
    /// Those that the channel was made with.
    credentials: Arc<Credentials>,
    /// What the last call was made with.
    secrets: Secrets,
    source: Source,
    /// No more comes from the source.
    dry: bool,
    room: Arc<Room>,
    window: Window,
    /// The end so far, unless more events came after it.
    ended: Option<End>,
    acked: i64,
    status: watch::Sender<ForwardStatus>,
    saver: Saver,
    /// Tries that failed since upstream last took something.
    failures: u32,
    /// Upstream took something since this stream's last failure, if there was one.
    proven: bool,
}

/// Why the loop of a call woke.
enum Wake {
    Answer(Result<Answer, Status>),
    /// The connection takes more.
    Ready,
    Taken(Option<Ready>),
    Save,
    TookTooLong,
    /// Nothing was acknowledged for a while, though everything in the window was sent.
    Unheard,
    /// The same at the end of a stream that broke off.
    Unanswered,
}

/// When something is done about an upstream that acknowledges nothing. Some services do that only when the client has
/// said that nothing more comes.
#[derive(Default)]
struct Unheard {
    look: Option<Instant>,
    /// It was looked before: it seems to be such a service.
    looked: bool,
    give_up: Option<Instant>,
}

impl Unheard {
    fn look_at(&mut self, all_sent: bool, heard: bool) -> Option<Instant> {
        if !all_sent || heard {
            self.look = None;
            return None;
        }
        let wait = if self.looked { LOOK } else { UNHEARD };
        Some(*self.look.get_or_insert_with(|| Instant::now() + wait))
    }

    fn give_up_at(&mut self, waits: bool, after: Duration) -> Option<Instant> {
        if !waits {
            self.give_up = None;
            return None;
        }
        Some(*self.give_up.get_or_insert_with(|| Instant::now() + after))
    }
}

impl Forwarder {
    pub(super) fn new(
        around: &Surroundings,
        upstream: &Arc<Inner>,
        key: &StreamKey,
        status: watch::Sender<ForwardStatus>,
        save: Arc<dyn Fn(i64) + Send + Sync>,
        source: Source,
        room: Arc<Room>,
    ) -> Self {
        let acked = status.borrow().acked;
        let credentials = upstream.credentials();
        Self {
            key: key.clone(),
            upstream: Arc::clone(upstream),
            counters: Arc::clone(&around.counters),
            channel: credentials.open(),
            credentials,
            secrets: Secrets::default(),
            source,
            dry: false,
            room,
            window: Window::default(),
            ended: None,
            acked,
            status,
            saver: Saver {
                save,
                unsaved: None,
                saving: None,
                last: None,
            },
            failures: 0,
            proven: false,
        }
    }

    /// Works until everything is delivered and nothing more can come, or `halt`.
    pub(super) async fn run(mut self, opened: Opened, halt: CancellationToken) {
        let work = async {
            let opened = opened.wait();
            tokio::pin!(opened);
            while tokio::time::timeout(LOOK, &mut opened).await.is_err() {
                // Meanwhile another one may learn that upstream cannot be reached, and no client should be held for it.
                self.report();
            }
            self.work().await;
        };
        halt.run_until_cancelled(work).await;
        self.saver.save().await;
        // Its end is only reported when the number is kept.
        self.report();
        self.upstream.calls.prune(&self.key.build_id);
    }

    async fn work(&mut self) {
        loop {
            while self.window.is_empty() {
                // A call that failed after the last acknowledgement has not reported the end.
                self.conclude().await;
                if self.dry {
                    return;
                }
                let ready = self.source.ready.recv().await;
                self.take(ready);
                self.conclude().await;
            }
            let failed = match self.call().await {
                Ok(()) => {
                    self.failures = 0;
                    self.conclude().await;
                    continue;
                }
                Err(status) => Status::new(status.code(), self.secrets.conceal(status.message().to_owned())),
            };
            Counters::add(&self.counters.reconnects);
            let upstream = Arc::clone(&self.upstream);
            let wait = upstream
                .delays
                .after(self.failures, failed.code(), rand::random());
            upstream.health.failed(&self.key.invocation_id, &failed, wait);
            if self.failures > 0 {
                self.room.widen(false);
            }
            self.failures = self.failures.saturating_add(1);
            self.proven = false;
            self.report();
            self.saver.save().await;
            self.wait(wait).await;
        }
    }

    /// Waits before another try; other credentials are reason enough for one at once.
    async fn wait(&mut self, wait: Duration) {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            Ok(()) = self.source.headers.changed() => {}
        }
    }

    /// Opens a call, by the credentials that count now.
    async fn open(&mut self) -> Result<Call, Status> {
        let credentials = self.upstream.credentials();
        if !Arc::ptr_eq(&credentials, &self.credentials) {
            self.channel = credentials.open();
            self.credentials = credentials;
        }
        let client = self.source.headers.borrow_and_update().clone();
        let headers = self.credentials.headers(&client).await?;
        self.secrets = headers::secrets(&headers, self.upstream.options.connect.authority.as_ref());
        self.window.rewind();
        Ok(Call::open(self.channel.clone(), headers))
    }

    /// Opens a call, sends what is not acknowledged, and goes on until everything so far is acknowledged and there is
    /// nothing to wait for on this call.
    async fn call(&mut self) -> Result<(), Status> {
        let close_timeout = self.upstream.options.close_timeout;
        let mut call = self.open().await?;
        let mut close_by = None;
        // Whether upstream has acknowledged anything on this call, and what is done if it does not.
        let mut heard = false;
        let mut unheard = Unheard::default();
        loop {
            self.send(&mut call);
            let save_at = self.saver.due();
            let look_at = unheard.look_at(self.window.is_all_sent(), heard);
            let give_up_at = unheard.give_up_at(
                self.window.is_all_sent() && matches!(self.ended, Some(End::Broken | End::Refused)),
                close_timeout,
            );
            let sends = self.window.unsent().is_some() && call.is_sending();
            let wake = tokio::select! {
                biased;
                answered = call.ready_or_answer(sends) => answered.map_or(Wake::Ready, Wake::Answer),
                ready = self.source.ready.recv(), if !self.dry => Wake::Taken(ready),
                () = until(save_at) => Wake::Save,
                () = until(close_by) => Wake::TookTooLong,
                () = until(look_at) => Wake::Unheard,
                () = until(give_up_at) => Wake::Unanswered,
            };
            heard |= matches!(wake, Wake::Answer(Ok(Answer::Ack(_))));
            if matches!(wake, Wake::Answer(_)) {
                unheard = Unheard::default();
            }
            let answer = match wake {
                // Answers are not kept waiting by a long backlog.
                Wake::Ready => call.answer_now(),
                Wake::Answer(answer) => Some(answer),
                Wake::Taken(ready) => {
                    self.take_all(ready);
                    None
                }
                Wake::Save => {
                    self.saver.save().await;
                    None
                }
                Wake::Unheard => {
                    (unheard.look, unheard.looked) = (None, true);
                    self.room.grow();
                    None
                }
                Wake::Unanswered if call.is_half_closed() => {
                    return Err(Status::deadline_exceeded(
                        "upstream does not acknowledge the events it was sent",
                    ));
                }
                Wake::Unanswered => {
                    unheard.give_up = None;
                    call.half_close();
                    None
                }
                Wake::TookTooLong => {
                    tracing::debug!(stream = %self.key, "upstream has acknowledged all events but did not \
                                                         close the stream");
                    return Ok(());
                }
            };
            if let Some(answer) = answer
                && self.answers(answer, &mut call)?
            {
                return Ok(());
            }
            if self.window.is_empty() {
                if call.is_half_closed() {
                    close_by.get_or_insert_with(|| Instant::now() + close_timeout);
                } else if self.dry || self.ended.is_some() {
                    // As a client that died: the call is dropped, and so cancelled.
                    return Ok(());
                }
            }
        }
    }

    /// Takes what is ready, up to a limit.
    fn take_all(&mut self, first: Option<Ready>) {
        self.take(first);
        for _ in 0..AT_ONCE {
            match self.source.ready.try_recv() {
                Ok(ready) => self.take(Some(ready)),
                Err(_) => break,
            }
        }
    }

    /// Sends what the connection takes now.
    fn send(&mut self, call: &mut Call) {
        while let Some(event) = self.window.unsent() {
            let len = event.request.len();
            if !call.try_send(&event.request) {
                return;
            }
            Counters::add_many(&self.counters.forwarded_bytes, len as u64);
            // As the build tool does: a service may wait for it before it acknowledges the end.
            if event.last {
                call.half_close();
            }
            self.window.sent();
        }
    }

    /// Handles an answer, and those that are there already. True if the call is done.
    fn answers(&mut self, first: Result<Answer, Status>, call: &mut Call) -> Result<bool, Status> {
        let mut answer = first;
        let before = self.acked;
        let mut result = Ok(false);
        for handled in 1.. {
            result = self.answer(answer);
            // Nothing is taken out that is not handled.
            if handled == AT_ONCE || !matches!(result, Ok(false)) {
                break;
            }
            match call.answer_now() {
                Some(next) => answer = next,
                None => break,
            }
        }
        if self.acked > before {
            self.failures = 0;
            self.proven = true;
            self.upstream.health.works();
            self.room.widen(true);
            self.saver.note(self.acked);
            self.report();
        }
        result
    }

    fn answer(&mut self, answer: Result<Answer, Status>) -> Result<bool, Status> {
        match answer {
            Ok(Answer::Ack(sequence)) => {
                let event = self
                    .window
                    .ack(sequence)
                    .map_err(|error| Status::data_loss(error.to_string()))?;
                self.room.leave(event.weight);
                self.acked = self.acked.max(sequence);
                Counters::add(&self.counters.forwarded);
                Ok(false)
            }
            Ok(Answer::Closed) if self.window.is_empty() => Ok(true),
            Ok(Answer::Closed) => Err(Status::new(
                Code::Unavailable,
                "upstream closed the stream before it had acknowledged everything",
            )),
            Err(status) if self.window.is_empty() => {
                // It has what there is; the next event brings another call.
                let message = self.secrets.conceal(status.message().to_owned());
                tracing::debug!(stream = %self.key, code = ?status.code(), message, "closed upstream");
                Ok(true)
            }
            Err(status) => Err(status),
        }
    }

    /// Takes what is ready.
    fn take(&mut self, ready: Option<Ready>) {
        match ready {
            Some(Ready::Event(event)) => {
                self.ended = None;
                if event.last {
                    self.ended = Some(End::Finished);
                }
                self.window.push(event);
                if self.status.borrow().finished {
                    self.status.send_modify(|status| status.finished = false);
                }
            }
            Some(Ready::Ended(end)) => self.ended = Some(end),
            None => self.dry = true,
        }
    }

    /// Between calls: reports the end, once the number is kept.
    async fn conclude(&mut self) {
        if self.window.is_empty() && self.ended.is_some() {
            self.saver.save().await;
            self.report();
        }
    }

    fn report(&self) {
        let status = ForwardStatus {
            acked: self.acked,
            // The last event's number is kept, and upstream has closed: see where `conclude` is called.
            finished: self.window.is_empty() && self.ended.is_some() && self.saver.has_kept_all(),
            healthy: self.failures == 0 && (self.proven || self.upstream.health.is_good()),
        };
        self.status.send_if_modified(|now| {
            let changed = *now != status;
            *now = status;
            changed
        });
    }
}

/// Keeps acknowledged numbers, not too often.
struct Saver {
    save: Arc<dyn Fn(i64) + Send + Sync>,
    unsaved: Option<i64>,
    /// One that is being kept.
    saving: Option<JoinHandle<()>>,
    last: Option<Instant>,
}

impl Saver {
    fn note(&mut self, acked: i64) {
        self.unsaved = Some(acked);
    }

    /// When there is something to do.
    fn due(&self) -> Option<Instant> {
        self.unsaved?;
        Some(self.last.map_or_else(Instant::now, |last| last + SAVED_EVERY))
    }

    const fn has_kept_all(&self) -> bool {
        self.unsaved.is_none() && self.saving.is_none()
    }

    async fn save(&mut self) {
        // A halt may have ended the wait for an earlier one.
        self.wait().await;
        if let Some(acked) = self.unsaved.take() {
            let save = Arc::clone(&self.save);
            self.saving = Some(tokio::task::spawn_blocking(move || save(acked)));
            self.wait().await;
        }
    }

    async fn wait(&mut self) {
        let Some(saving) = &mut self.saving else { return };
        // A number that is not kept costs events that are sent again after a restart.
        if saving.await.is_err() {
            tracing::warn!("failed to record what upstream has acknowledged");
        }
        self.saving = None;
        self.last = Some(Instant::now());
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
