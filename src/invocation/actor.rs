//! One invocation's task: takes its events, records what they name, wants what is wanted, and knows when all of that
//! is settled.
//!
//! Everything about an invocation is owned by its task; others send it a [`Message`]. The order of things is the
//! promise: an output's metadata is in the record before the coordinator hears of it.

mod action_cache;
mod again;
mod course;
mod ledger;
mod local;
mod naming;
mod others;
mod parted;
mod parts;
mod progress;
mod runfiles;
mod undigested;

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

use self::{
    ledger::Ledger,
    parted::Parted,
    parts::{Doubt, Known, PathHasher, Place, Placed},
};
use super::{
    build::{Build, Named},
    feed::{Change, Listeners, Report},
    message::Message,
    rows::{self, Naming},
    shared::Shared,
    watching::{Begun, PAGE, Page, Recorded},
};
use crate::{
    bep::event::{CommandLine, Event, TargetId},
    builds::{Progress, Settlement, StreamEnd, StreamKey},
    exec_path::ExecPath,
    materialize::{Completion, Outcome, Session},
    output::{Class, STAMP_AGE},
    record::{InvocationRow, InvocationState, TargetRow},
};

/// For how long rows are put off while more come, and how many (some 200 bytes each): they are of no use to the build
/// that waits, and would take its processor time.
const ROWS_PUT_OFF: Duration = Duration::from_secs(1);
const ROWS_AT_ONCE: usize = 1 << 16;
/// Messages taken at once: their outputs are recorded and wanted together.
const MESSAGES_AT_ONCE: usize = 8;
/// Messages that may wait. Most are a good many events.
const INBOX: usize = 16;

pub(super) struct Actor {
    shared: Arc<Shared>,
    row: InvocationRow,
    state: Option<InvocationState>,
    build: Build,
    command_line: Option<CommandLine>,
    /// Where the build's client was started, as the build tool sees it.
    working_directory: String,
    /// The exec root that the stream names, while it is not there yet.
    awaited_root: Option<String>,
    place: Option<Place>,
    /// What is kept in its place while the stream is broken off.
    parted: Option<Parted>,
    session: Option<Arc<Session>>,
    /// Why outputs cannot be placed at all.
    blocked: Option<String>,
    completions: mpsc::UnboundedSender<Vec<Completion>>,
    ledger: Ledger,
    progress: watch::Sender<Progress>,
    listeners: Listeners,
    waiters: Vec<oneshot::Sender<Settlement>>,
    /// Who waits for what is optional.
    done: Vec<oneshot::Sender<()>>,
    /// Completions whose rows are not written yet.
    unwritten: Vec<Completion>,
    /// What is on disk, or was when it was looked at, if that is looked at again.
    placed: Vec<Placed>,
    /// Whether the build tool may delete at its end what is on disk, or another process may replace it.
    look_after: bool,
    /// Whether another process may still place an older build's files here, and the task that watches it.
    doubt: Option<Doubt>,
    others: JoinSet<bool>,
    /// What the stream has named without its content, and nobody has looked for yet.
    undigested: HashMap<ExecPath, (Class, Arc<TargetId>), PathHasher>,
    /// Outputs that are to be recorded, and then wanted if there is a way to have them.
    unasked: Vec<(Naming, Vec<Named>, bool)>,
    /// Whether that has been looked at again, after the end of the stream.
    looked_again: bool,
    /// Whether what programs need at run time was asked for, after the end of the stream.
    brought_runfiles: bool,
    /// What the action cache told then, until it is recorded.
    told: Option<Known>,
    last_completion: Instant,
    /// When the first of the unwritten ones came.
    unwritten_since: Instant,
    stream_open: bool,
    interrupted: bool,
    /// When the stream's last event came.
    ended_at: Option<Instant>,
    /// What was told when all of it was settled.
    reported: Option<Report>,
    /// Whether what only a stream that goes on would need is still to be given back.
    loaded: bool,
}

fn new_build(shared: &Shared) -> Build {
    let policy = shared
        .policy
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    Build::new(policy).holding_sets(shared.holds_sets)
}

impl Actor {
    /// Starts the task of one invocation, with what is on record of one that comes again. Who asks before its events
    /// have come is told at least which build it is.
    pub(super) fn start(
        shared: Arc<Shared>,
        key: &StreamKey,
        recorded: Option<InvocationRow>,
    ) -> mpsc::Sender<Message> {
        let (sender, inbox) = mpsc::channel(INBOX);
        let (completions, completed) = mpsc::unbounded_channel();
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
            state: None,
            command_line: None,
            working_directory: String::new(),
            awaited_root: None,
            place: None,
            parted: None,
            session: None,
            blocked: None,
            completions,
            ledger: Ledger::default(),
            progress: watch::Sender::new(Progress::default()),
            listeners: Listeners::default(),
            waiters: Vec::new(),
            done: Vec::new(),
            unwritten: Vec::new(),
            placed: Vec::new(),
            look_after: true,
            doubt: None,
            others: JoinSet::new(),
            undigested: HashMap::default(),
            unasked: Vec::new(),
            looked_again: false,
            brought_runfiles: false,
            told: None,
            last_completion: Instant::now(),
            unwritten_since: Instant::now(),
            stream_open: true,
            interrupted: false,
            ended_at: None,
            reported: None,
            loaded: true,
        };
        tokio::spawn(actor.run(inbox, completed));
        sender
    }

    async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Message>,
        mut completed: mpsc::UnboundedReceiver<Vec<Completion>>,
    ) {
        let mut open = true;
        let mut received = Vec::new();
        // Since when there has been nothing but questions.
        let mut quiet_since = Instant::now();
        loop {
            // One that was only asked about, and never heard of its build, has nothing to wait for.
            let open_stream = self.stream_open && self.state.is_some();
            // Who follows the build upstream may still ask where its files are.
            let asked = self.shared.holds_sets && self.progress.receiver_count() > 0;
            let idle = !open_stream && !asked && self.ledger.is_quiet();
            if idle && self.unwritten.is_empty() && !open {
                break;
            }
            let idle = idle && self.doubt.is_none();
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
                count = inbox.recv_many(&mut received, MESSAGES_AT_ONCE), if open => {
                    if count == 0 {
                        open = false;
                        self.stream_open = false;
                    }
                    for message in received.drain(..) {
                        if !matches!(message, Message::Snapshot(_) | Message::Busy(_)) {
                            quiet_since = Instant::now();
                        }
                        self.on_message(message).await;
                    }
                    self.ask().await;
                }
                Some(alone) = self.others.join_next() => self.on_others(alone.unwrap_or(true)),
                () = self.progress.closed(), if self.loaded && self.is_unloadable() => self.unload(),
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
            self.tell_progress();
            self.settle().await;
            self.part().await;
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
        match message {
            Message::Events(events) => {
                if !self.stream_open {
                    // The client of a broken stream has come back.
                    self.ended_at = None;
                }
                self.stream_open = true;
                self.reported = None;
                self.loaded = true;
                self.looked_again = false;
                self.brought_runfiles = false;
                self.shared.metrics.events.inc_by(events.len() as u64);
                self.enter(InvocationState::Running);
                for (sequence, framed) in events {
                    // The command's last words; whatever comes after them (metrics, logs) names no outputs of targets.
                    let last = framed.last || matches!(framed.event, Event::Finished { .. });
                    if !self.ledger.course.take(sequence) {
                        continue;
                    }
                    let effects = self.build.handle(sequence, framed.event);
                    self.apply(effects).await;
                    if last {
                        self.ended_at = Some(Instant::now());
                    }
                }
            }
            Message::Limited(reason) => {
                let effects = self.build.limit(reason);
                self.apply(effects).await;
            }
            Message::Ended(end) => {
                // A stream that has broken off and been settled may still come to its end, and what waited for that has
                // to be brought: there is another word of it.
                self.reported = None;
                self.looked_again = false;
                self.brought_runfiles = false;
                // Behind a broken stream more may come: what waits for it goes on waiting.
                if end == StreamEnd::Finished {
                    self.come_back().await;
                    let effects = self.build.end();
                    self.apply(effects).await;
                    // Nothing comes after it, so no number is waited for, not even of an event that cannot be decoded.
                    self.ledger.course.take(i64::MAX);
                }
                self.stream_open = false;
                self.interrupted = matches!(end, StreamEnd::Broken(_));
                if let StreamEnd::Broken(reason) = end {
                    tracing::info!(invocation = %self.row.invocation_id, %reason, "the stream was interrupted; \
                                                                                   its downloads continue");
                }
                self.ended_at.get_or_insert_with(Instant::now);
                self.enter(InvocationState::Draining);
            }
            Message::Settled(waiter) => self.waiters.push(waiter),
            Message::Done(waiter) if self.reported.is_some() => {
                let _ = waiter.send(());
            }
            Message::Done(waiter) => self.done.push(waiter),
            Message::Held(took, timed_out) => {
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
            Message::Snapshot(answer) => {
                self.fill_row();
                // Who asked may have gone.
                let _ = answer.send((self.row.clone(), self.ledger.required));
            }
            Message::Busy(answer) => {
                let _ = answer.send(self.state.is_some_and(|state| !state.is_over()));
            }
            Message::Targets(answer) => {
                let _ = answer.send(self.target_rows());
            }
            Message::Watch(answer) => {
                // Who asked may have gone.
                let _ = answer.send(self.begin_watch());
            }
            Message::Page(from, answer) => {
                let page = if self.loaded {
                    Ok(self.page(from))
                } else {
                    Err(self.begin_watch())
                };
                let _ = answer.send(page);
            }
            Message::Progress(answer) => {
                let _ = answer.send(self.progress.subscribe());
            }
            Message::LocalFiles(files, answer) => {
                let _ = answer.send(self.local_files(&files));
            }
            Message::Cancel(answer) => {
                self.ask().await;
                if let Some(session) = &self.session {
                    self.shared.materializer.cancel(session).await;
                }
                let _ = answer.send(());
            }
        }
    }

    fn on_completions(&mut self, list: Vec<Completion>) {
        self.last_completion = Instant::now();
        if self.unwritten.is_empty() {
            self.unwritten_since = self.last_completion;
        }
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
            if !self.listeners.is_empty() {
                let change = Change::Output {
                    path: completion.path.clone(),
                    label: ended.target.label.as_str().into(),
                    class: completion.class,
                    outcome: completion.outcome.clone(),
                };
                self.listeners.tell(None, &change);
            }
            if self.look_after
                && (!self.looked_again || self.doubt.is_some())
                && completion.outcome.is_on_disk()
            {
                self.placed.push(Placed {
                    path: completion.path.clone(),
                    outcome: completion.outcome.clone(),
                });
            }
            // Its stamp was recorded with it, and is still that of the file.
            if !matches!(completion.outcome, Outcome::Present { hashed: false, .. }) {
                self.unwritten.push(completion);
            }
        }
        self.pass_failures_on();
    }

    async fn write_rows(&mut self, now: bool) {
        let due = now
            || self.unwritten.len() >= ROWS_AT_ONCE
            || self.last_completion.elapsed() >= STAMP_AGE
            || self.unwritten_since.elapsed() >= ROWS_PUT_OFF;
        let (true, Some(place)) = (due && !self.unwritten.is_empty(), &self.place) else {
            return;
        };
        let (record, root, version) = (self.shared.record.clone(), place.id, place.version);
        rows::conclude(&record, root, version, std::mem::take(&mut self.unwritten)).await;
        if !self.loaded {
            self.place = None;
        }
    }

    /// Answers waiting clients, once nothing required is on its way any more.
    async fn settle(&mut self) {
        // At once, while what the stream names is still on its way.
        self.bring_runfiles().await;
        let waits = self.ledger.required > 0 || self.is_in_doubt();
        if self.stream_open && self.waiters.is_empty() || waits {
            return;
        }
        self.look_again().await;
        if self.ledger.required > 0 {
            return;
        }
        self.look_for_undigested().await;
        if !self.waiters.is_empty() {
            let settlement = Settlement {
                failed: self.ledger.tally.failed,
                messages: self.ledger.tally.messages.clone(),
                superseded: self.ledger.tally.superseded > 0,
            };
            for waiter in self.waiters.drain(..) {
                let _ = waiter.send(settlement.clone());
            }
        }
        if self.stream_open || self.reported.is_some() || self.ledger.optional > 0 {
            return;
        }
        self.take_in_action_cache().await;
        self.enter(if self.ledger.tally.superseded > 0 {
            InvocationState::Superseded
        } else if self.interrupted {
            InvocationState::Interrupted
        } else {
            InvocationState::Settled
        });
        let settled_in = self.ended_at.map_or(Duration::ZERO, |at| at.elapsed());
        self.row.settled_ms = crate::units::now_ms();
        // Those whose tests' summaries never came, or which the last look at the disk has changed.
        let completed = self.ledger.unsettled();
        for target in completed {
            self.target_settled(&target);
        }
        self.save_row();
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
        self.reported = Some(report.clone());
        for waiter in self.done.drain(..) {
            let _ = waiter.send(());
        }
        self.shared.report(report.clone());
        self.tell(None, &Change::Settled(report));
        self.listeners.dismiss();
        if self.is_unloadable() && (!self.shared.holds_sets || self.progress.receiver_count() == 0) {
            self.unload();
        }
    }

    /// A row for each target so far.
    fn target_rows(&self) -> Vec<TargetRow> {
        let rows = self.ledger.targets.values().filter(|t| !t.label.is_empty());
        rows.map(|row| TargetRow::clone(row)).collect()
    }

    /// Lets somebody follow the build: its targets so far are asked for page by page.
    fn begin_watch(&mut self) -> Begun {
        Begun {
            changes: self.reported.is_none().then(|| self.listeners.add()),
            report: self.reported.clone(),
            page: self.loaded.then(|| self.page(0)),
            recorded: (!self.loaded).then(|| Recorded::new(&self.shared.record, &self.row.invocation_id)),
        }
    }

    /// Targets from this one on.
    fn page(&self, from: usize) -> Page {
        let end = self.ledger.targets.len().min(from + PAGE);
        let rows = self.ledger.targets.get_range(from..end).into_iter();
        let rows = rows.flat_map(|page| page.values());
        Page {
            rows: rows.filter(|row| !row.label.is_empty()).cloned().collect(),
            number: self.listeners.number(),
            full: self.ledger.targets.len() > end,
        }
    }

    /// Whether nothing more comes that would need what [`Self::unload`] gives back.
    fn is_unloadable(&self) -> bool {
        let pending = !self.ledger.is_quiet();
        self.reported.is_some() && !self.interrupted && !pending && self.doubt.is_none()
    }

    /// Gives back what only a stream that goes on would need. The task itself stays for a while (see
    /// [`Shared::linger`]), and a build a few seconds must not add up to the memory of all builds of two minutes. Only
    /// a broken stream may go on: nothing comes after the event that finishes one.
    fn unload(&mut self) {
        self.loaded = false;
        self.ledger.unload();
        self.build = new_build(&self.shared);
        self.session = None;
        if self.unwritten.is_empty() {
            self.place = None;
        }
    }

    fn enter(&mut self, state: InvocationState) {
        if self.state == Some(state) {
            return;
        }
        self.shared
            .metrics
            .invocation(self.state.map(InvocationState::name), state.name());
        self.state = Some(state);
        self.save_row();
    }

    fn fill_row(&mut self) {
        let tally = &self.ledger.tally;
        self.row.state = self.state.unwrap_or_default();
        self.row.downloaded = tally.downloaded;
        self.row.downloaded_bytes = tally.downloaded_bytes;
        self.row.present = tally.present;
        self.row.failed = tally.failed;
        self.row.known = tally.known;
        self.row.superseded = tally.superseded;
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
