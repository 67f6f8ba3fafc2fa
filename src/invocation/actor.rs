//! One invocation's task: takes its events, records what they name, wants what is wanted, and knows when all of that
//! is settled.
//!
//! Everything about an invocation is owned by its task; others send it a [`Message`]. The order of things is the
//! promise: an output's metadata is in the record before the coordinator hears of it.

mod action_cache;
mod again;
mod ledger;
mod local;
mod naming;
mod others;
mod parts;
mod phase;
mod progress;
mod runfiles;
mod site;
mod sought;
mod stream_progress;
mod traced;

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::mpsc;

use self::{
    again::{Placed, Recheck},
    ledger::Ledger,
    parts::{Followers, PathHasher, Sought, Unwritten},
    phase::{End, Phase, Step},
    site::Site,
};
use super::{
    build::{Build, Named},
    feed::{Change, Hold, OutputEnded, Report},
    message::Message,
    rows::{self, Naming},
    shared::{Shared, Task},
    timeline::{Arrival, Timeline},
    watching::{Begun, PAGE, Page, Recorded},
};
use crate::{
    bep::event::{Event, StreamEvent},
    builds::{Settlement, StreamEnd, StreamKey},
    exec_path::ExecPath,
    materialize::{Completion, Outcome},
    output::STAMP_AGE,
    record::{InvocationRow, InvocationState, OutputCounts, TargetRow, with_fields_of},
    telemetry::{self, Trace},
    units::now_ns,
};

/// Messages taken at once: their outputs are recorded and wanted together.
const MESSAGES_AT_ONCE: usize = 8;
/// Messages that may wait. Most are a good many events.
const INBOX: usize = 16;

pub(super) struct Actor {
    shared: Arc<Shared>,
    row: InvocationRow,
    phase: Phase,
    /// While the end of the stream is held back.
    hold: Option<Hold>,
    timeline: Timeline,
    trace: Option<Arc<Trace>>,
    build: Build,
    site: Site,
    completions: mpsc::UnboundedSender<Vec<Completion>>,
    ledger: Ledger,
    followers: Followers,
    /// Completions whose rows are not written yet.
    unwritten: Unwritten,
    recheck: Recheck,
    /// Outputs that are only looked for, and were not yet.
    sought: HashMap<ExecPath, Sought, PathHasher>,
    /// Outputs that are to be recorded, and then wanted if there is a way to have them.
    unasked: Vec<(Naming, Vec<Named>, bool)>,
    /// See [`Task`].
    is_recorded: Arc<AtomicBool>,
}

fn new_build(shared: &Shared) -> Build {
    let policy = shared.policy.read().clone();
    Build::new(policy).holding_sets(shared.holds_sets)
}

/// Puts an output that was downloaded into the timeline.
fn chart(timeline: &mut Timeline, completion: &Completion, now_us: i64) {
    let Outcome::Downloaded { bytes, .. } = completion.outcome else {
        return;
    };
    let us = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    let wanted_us = now_us.saturating_sub(us(completion.took));
    let after = |time: Duration| wanted_us.saturating_add(us(time));
    timeline.add(&Arrival {
        path: completion.path.as_str(),
        bytes,
        source: &completion.outcome.source(),
        wanted_us,
        fetched_us: completion
            .fetched
            .map(|(asked, came)| (after(asked), after(came))),
        placed_us: now_us,
    });
}

impl Actor {
    /// Starts the task of one invocation, with what is on record of one that comes again. A caller that asks before its
    /// events have come learns at least which build it is.
    pub(super) fn start(shared: Arc<Shared>, key: &StreamKey, recorded: Option<InvocationRow>) -> Task {
        let (sender, inbox) = mpsc::channel(INBOX);
        let (completions, completed) = mpsc::unbounded_channel();
        let trace = shared.traces().of(telemetry::Build {
            invocation_id: &key.invocation_id,
            build_id: &key.build_id,
            attempt: key.attempt,
            is_resumed: recorded.is_some(),
        });
        let recorded = recorded.unwrap_or_default();
        let row = InvocationRow {
            invocation_id: key.invocation_id.clone(),
            build_id: key.build_id.clone(),
            attempt: key.attempt,
            version: recorded.version,
            command: recorded.command,
            workspace: recorded.workspace,
            exec_root: recorded.exec_root,
            started_ms: recorded.started_ms,
            build_tool_version: recorded.build_tool_version,
            ..InvocationRow::default()
        };
        let actor = Self {
            build: new_build(&shared),
            shared,
            row,
            phase: Phase::Unheard,
            hold: None,
            timeline: Timeline::default(),
            trace,
            site: Site::Closed(None),
            completions,
            ledger: Ledger::default(),
            followers: Followers::default(),
            unwritten: Unwritten::default(),
            recheck: Recheck::default(),
            sought: HashMap::default(),
            unasked: Vec::new(),
            is_recorded: Arc::default(),
        };
        let task = Task {
            inbox: sender,
            is_recorded: actor.is_recorded.clone(),
        };
        tokio::spawn(actor.run(inbox, completed));
        task
    }

    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Message>,
        mut completed: mpsc::UnboundedReceiver<Vec<Completion>>,
    ) {
        let mut received = Vec::new();
        // Since when there has been nothing but questions.
        let mut quiet_since = Instant::now();
        loop {
            // Who follows the build upstream may still ask where its files are.
            let asked = self.shared.holds_sets && self.followers.progress.receiver_count() > 0;
            // One that was only asked about, and never heard of its build, has nothing to wait for.
            let is_open = matches!(self.phase, Phase::Open { .. });
            let idle = !is_open && !asked && self.ledger.is_quiet() && self.recheck.doubt.is_none();
            let nap = if self.unwritten.is_empty() {
                self.shared.linger().saturating_sub(quiet_since.elapsed())
            } else {
                STAMP_AGE
            };
            tokio::select! {
                biased;
                Some(list) = completed.recv() => {
                    quiet_since = Instant::now();
                    self.on_completions(list);
                }
                count = inbox.recv_many(&mut received, MESSAGES_AT_ONCE) => {
                    if count == 0 {
                        break;
                    }
                    if !received.iter().all(Message::is_question) {
                        quiet_since = Instant::now();
                    }
                    for message in received.drain(..) {
                        self.on_message(message).await;
                    }
                    self.ask().await;
                }
                Some(alone) = self.recheck.others.join_next() => self.on_others(alone.unwrap_or(true)),
                () = self.followers.progress.closed(), if self.is_unloadable() => self.unload(),
                () = tokio::time::sleep(nap) => {
                    if self.unwritten.is_empty() && idle {
                        break;
                    }
                    if !idle {
                        quiet_since = Instant::now();
                    }
                }
            }
            self.write_rows(false).await;
            self.look_after_others().await;
            self.announce_progress();
            self.settle().await;
            self.answer();
            self.leave_root().await;
            if matches!(self.phase, Phase::Unloaded(_)) && self.unwritten.is_empty() {
                self.is_recorded.store(true, Ordering::Release);
            }
        }
        self.write_rows(true).await;
        drop(inbox);
        self.shared.forget(&StreamKey {
            build_id: self.row.build_id.clone(),
            invocation_id: self.row.invocation_id.clone(),
            attempt: self.row.attempt,
        });
    }

    async fn on_message(&mut self, message: Message) {
        // Anyone who asked may have gone, which is why no result of a send is looked at.
        match message {
            Message::Events(events) => self.on_events(events).await,
            Message::Limited(reason) => {
                let effects = self.build.limit(reason);
                self.apply(effects).await;
            }
            Message::Lost => {
                if let Phase::Open { lost, .. } = &mut self.phase {
                    *lost = true;
                }
                self.end_build().await;
            }
            Message::Ended(end) => self.on_end(end).await,
            Message::Settled(waiter) => self.followers.settled.push(waiter),
            Message::Done(waiter) if self.phase.report().is_some() => {
                let _ = waiter.send(());
            }
            Message::Done(waiter) => self.followers.done.push(waiter),
            // It may come after the hold has ended.
            Message::Holds(hold) if self.phase.report().is_none() => self.on_holds(hold),
            Message::Holds(_) => {}
            Message::Waiting(most, answer) => {
                let _ = answer.send(self.ledger.waiting(most, self.hold.clone()));
            }
            Message::Timeline(answer) => {
                let _ = answer.send(self.timeline.clone());
            }
            Message::Held(took, timed_out) => self.on_held(took, timed_out),
            Message::Snapshot(answer) => self.followers.asked.push(answer),
            Message::Busy(answer) => {
                let is_heard = !matches!(self.phase, Phase::Unheard);
                let _ = answer.send(is_heard && !self.row.state.is_over());
            }
            Message::Targets(answer) => {
                let _ = answer.send(self.target_rows());
            }
            Message::Watch(answer) => {
                // What came before can be read in the record.
                self.write_rows(true).await;
                let _ = answer.send(self.begin_watch());
            }
            Message::Page(from, answer) => {
                let page = match self.phase {
                    Phase::Unloaded(_) => Err(self.begin_watch()),
                    _ => Ok(self.page(from)),
                };
                let _ = answer.send(page);
            }
            Message::Progress(answer) => {
                let _ = answer.send(self.followers.progress.subscribe());
            }
            Message::LocalFiles(files, answer) => {
                let _ = answer.send(self.local_files(&files));
            }
            Message::Cancel(answer) => {
                self.ask().await;
                if let Some(session) = self.site.session() {
                    self.shared.materializer.cancel(session).await;
                }
                let _ = answer.send(());
            }
        }
    }

    fn on_holds(&mut self, hold: Hold) {
        if let Some(trace) = &self.trace {
            trace.holds(&hold.limit);
        }
        self.hold = Some(hold);
    }

    fn on_held(&mut self, took: Duration, timed_out: bool) {
        self.hold = None;
        if let Some(trace) = &self.trace {
            trace.held(took, timed_out, self.ledger.required);
        }
        self.row.hold_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if timed_out {
            let message = format!(
                "the build was released after {} while {} outputs were still downloading",
                crate::units::show_duration(took),
                self.ledger.required
            );
            tracing::warn!(invocation = %self.row.invocation_id, "{message}");
            self.ledger.tally.note(&message);
        }
        self.save_row();
    }

    async fn on_events(&mut self, events: Vec<(i64, StreamEvent)>) {
        self.shared.metrics.events.inc_by(events.len() as u64);
        self.enter(InvocationState::Running);
        let ended_at = match self.phase {
            Phase::Open { ended_at, .. } => ended_at,
            _ => None,
        };
        self.phase = Phase::Open {
            ended_at,
            lost: false,
        };
        self.come_back().await;
        for (sequence, framed) in events {
            // The command's last words; whatever comes after them (metrics, logs) names no outputs of targets.
            let last = framed.last || matches!(framed.event, Event::Finished { .. });
            if !self.ledger.stream.take(sequence) {
                continue;
            }
            let effects = self.build.handle(sequence, framed.event);
            self.apply(effects).await;
            if last && let Phase::Open { ended_at, .. } = &mut self.phase {
                *ended_at = Some(Instant::now());
            }
        }
    }

    /// The stream ended. One that has broken off and been settled may still come to its proper end, and what waited for
    /// that has to be brought.
    async fn on_end(&mut self, end: StreamEnd) {
        if matches!(self.phase, Phase::Unloaded(_)) {
            return;
        }
        match &end {
            StreamEnd::Finished => {
                self.come_back().await;
                let effects = self.build.end();
                self.apply(effects).await;
                // Nothing comes after it, so no number is waited for, not even of an event that cannot be decoded.
                self.ledger.stream.take(i64::MAX);
            }
            // More may come: what waits for it goes on waiting.
            StreamEnd::Broken(reason) => {
                tracing::info!(invocation = %self.row.invocation_id, %reason, "the stream was interrupted; its \
                                                                               downloads continue");
            }
        }
        self.end_build().await;
        self.note_unused_cache();
        self.enter(InvocationState::Draining);
        self.phase = Phase::Ended {
            end: End {
                at: self.phase.ended_at().unwrap_or_else(Instant::now),
                interrupted: matches!(end, StreamEnd::Broken(_)),
            },
            next: Step::BringRunfiles,
        };
    }

    fn on_completions(&mut self, list: Vec<Completion>) {
        self.unwritten.last = Some(Instant::now());
        if self.unwritten.is_empty() {
            self.unwritten.since = self.unwritten.last;
        }
        let is_rechecked = self.is_rechecked();
        let now_us = now_ns() / 1000;
        let followed = !self.followers.listeners.is_empty();
        let exec_root = followed.then(|| {
            let place = self.site.open_root();
            Arc::<Path>::from(place.map_or(Path::new(""), |place| place.root.place.path()))
        });
        for completion in list {
            let Some(ended) = self.ledger.complete(&completion) else {
                continue;
            };
            if ended.is_missed {
                tracing::warn!(
                    invocation = %self.row.invocation_id,
                    path = %completion.path,
                    class = completion.class.name(),
                    outcome = ?completion.outcome,
                    "failed to download an output"
                );
            }
            if let Some(exec_root) = &exec_root {
                let change = Change::Output(Arc::new(OutputEnded {
                    exec_root: exec_root.clone(),
                    path: completion.path.clone(),
                    content: completion.content.clone(),
                    target: ended.target,
                    output_group: ended.group,
                    class: completion.class,
                    outcome: completion.outcome.clone(),
                }));
                self.followers.listeners.notify(None, &change);
            }
            chart(&mut self.timeline, &completion, now_us);
            if is_rechecked && completion.outcome.is_on_disk() {
                self.recheck.placed.push(Placed {
                    path: completion.path.clone(),
                    outcome: completion.outcome.clone(),
                });
            }
            // Its stamp was recorded with it, and is still that of the file.
            if !matches!(completion.outcome, Outcome::Present { hashed: false, .. }) {
                self.unwritten.ends.push(completion);
            }
        }
        self.pass_failures_on();
    }

    async fn write_rows(&mut self, now: bool) {
        let (true, Some(place)) = (now || self.unwritten.is_due(), self.site.open_root()) else {
            return;
        };
        if self.unwritten.is_empty() {
            return;
        }
        let ends = std::mem::take(&mut self.unwritten.ends);
        rows::conclude(&self.shared.record, place.id, place.version, ends).await;
        if matches!(self.phase, Phase::Unloaded(_)) {
            self.site = Site::Closed(None);
        }
    }

    /// Tells those who asked where the build is. They may look at the record next, so that what came of outputs has to be
    /// there, unless there is still more to come.
    fn answer(&mut self) {
        let is_written = self.unwritten.is_empty() || self.site.open_root().is_none();
        if self.followers.asked.is_empty() || self.ledger.is_quiet() && !is_written {
            return;
        }
        self.fill_row();
        for asked in self.followers.asked.drain(..) {
            let _ = asked.send((self.row.clone(), self.ledger.required));
        }
    }

    /// Answers waiting clients, once nothing required is on its way any more.
    async fn settle(&mut self) {
        // At once, while what the stream names is still on its way.
        self.bring_runfiles().await;
        let waits = self.ledger.required > 0 || self.recheck.holds();
        if self.phase.is_open() && self.followers.settled.is_empty() || waits {
            return;
        }
        self.look_again().await;
        if self.ledger.required > 0 {
            return;
        }
        self.look_for_sought().await;
        for waiter in self.followers.settled.drain(..) {
            let _ = waiter.send(Settlement {
                failed: self.ledger.tally.failed,
                messages: self.ledger.tally.messages.clone(),
                superseded: self.ledger.tally.superseded > 0,
            });
        }
        if let Phase::Ended { end, .. } = self.phase
            && self.ledger.optional == 0
        {
            self.report(end).await;
        }
    }

    /// Records and reports that the build is settled.
    async fn report(&mut self, end: End) {
        self.take_in_action_cache().await;
        // Nothing of the build holds the command any more, and word of its end may have been lost.
        self.hold = None;
        self.enter(if self.ledger.tally.superseded > 0 {
            InvocationState::Superseded
        } else if end.interrupted {
            InvocationState::Interrupted
        } else {
            InvocationState::Settled
        });
        let settled_in = end.at.elapsed();
        self.row.settled_ms = crate::units::now_ms();
        // Those whose tests' summaries never came, or which the last look at the disk has changed.
        let completed = self.ledger.unsettled();
        for target in completed {
            self.target_settled(&target);
        }
        self.save_row();
        self.end_trace();
        self.shared
            .record
            .put_targets(&self.row.invocation_id, &self.target_rows());
        let line = self.ledger.tally.summary(settled_in);
        for message in &self.ledger.tally.messages {
            tracing::warn!(invocation = %self.row.invocation_id, "{message}");
        }
        tracing::info!(invocation = %self.row.invocation_id, "{line}");
        let report = Report {
            invocation_id: self.row.invocation_id.clone(),
            build_id: self.row.build_id.clone(),
            workspace: self.row.workspace.clone(),
            exec_root: self.row.exec_root.clone(),
            command: self.row.command.clone(),
            state: self.row.state,
            line,
            messages: self.ledger.tally.messages.clone(),
            failed: self.ledger.tally.failed,
            exit_code: self.row.finished.then_some(self.row.exit_code),
            tally: self.ledger.tally.clone(),
        };
        self.phase = Phase::Settled {
            end,
            report: report.clone(),
        };
        for waiter in self.followers.done.drain(..) {
            let _ = waiter.send(());
        }
        self.shared.report(report.clone());
        self.notify(None, &Change::Settled(Box::new(report)));
        self.followers.listeners.dismiss();
        if self.is_unloadable() && (!self.shared.holds_sets || self.followers.progress.receiver_count() == 0)
        {
            self.unload();
        }
    }

    /// A row for each target so far.
    fn target_rows(&self) -> Vec<TargetRow> {
        let rows = self.ledger.targets.values().filter(|t| !t.label.is_empty());
        rows.map(|row| TargetRow::clone(row)).collect()
    }

    /// Lets a listener follow the build: it requests the targets so far page by page.
    fn begin_watch(&mut self) -> Begun {
        let report = self.phase.report().cloned();
        let is_unloaded = matches!(self.phase, Phase::Unloaded(_));
        self.fill_row();
        Begun {
            now: (self.row.clone(), self.ledger.required),
            changes: report.is_none().then(|| self.followers.listeners.add()),
            report,
            page: (!is_unloaded).then(|| self.page(0)),
            recorded: is_unloaded.then(|| Recorded::new(&self.shared.record, &self.row.invocation_id)),
        }
    }

    /// Targets from this one on.
    fn page(&self, from: usize) -> Page {
        let end = self.ledger.targets.len().min(from + PAGE);
        let rows = self.ledger.targets.get_range(from..end).into_iter();
        let rows = rows.flat_map(|page| page.values());
        Page {
            rows: rows.filter(|row| !row.label.is_empty()).cloned().collect(),
            number: self.followers.listeners.number(),
            full: self.ledger.targets.len() > end,
        }
    }

    /// Whether nothing more comes that would need what [`Self::unload`] gives back.
    const fn is_unloadable(&self) -> bool {
        let is_over = matches!(self.phase, Phase::Settled { end, .. } if !end.interrupted);
        is_over && self.ledger.is_quiet() && self.recheck.doubt.is_none()
    }

    /// Gives back what only a stream that goes on would need. The task itself stays for a while (see
    /// [`Shared::linger`]), and a build a few seconds must not add up to the memory of all builds of two minutes. Only
    /// a broken stream may go on: nothing comes after the event that finishes one.
    fn unload(&mut self) {
        if let Phase::Settled { report, .. } = &self.phase {
            self.phase = Phase::Unloaded(report.clone());
        }
        self.ledger.unload();
        self.build = new_build(&self.shared);
        match &mut self.site {
            Site::Open(place) if !self.unwritten.is_empty() => place.session = None,
            Site::Open(_) => self.site = Site::Closed(None),
            _ => {}
        }
    }

    /// To be called before the phase changes.
    fn enter(&mut self, state: InvocationState) {
        let before = (!matches!(self.phase, Phase::Unheard)).then_some(self.row.state);
        if before == Some(state) {
            return;
        }
        self.shared
            .metrics
            .invocation(before.map(InvocationState::name), state.name());
        if let Some(trace) = self.trace.as_ref().filter(|_| !state.is_over()) {
            trace.begin();
        }
        self.row.state = state;
        self.save_row();
    }

    fn fill_row(&mut self) {
        let tally = &self.ledger.tally;
        let stores = tally.stores.iter().filter(|(_, outputs)| *outputs > 0);
        self.row.outputs = with_fields_of!(tally, OutputCounts {
            stores: stores.map(|(name, outputs)| (name.to_string(), *outputs)).collect(),
            store_bytes: tally.store_bytes.iter().map(|(name, n)| (name.to_string(), *n)).collect(),
            rules: tally.transfers().collect(),
        } downloaded downloaded_bytes present failed known superseded);
        self.row.errors.clone_from(&tally.messages);
        if tally.warmed > 0 {
            self.row.errors.push(tally.warming());
        }
    }

    fn save_row(&mut self) {
        self.fill_row();
        self.shared.record.put_invocation(&self.row);
    }
}
