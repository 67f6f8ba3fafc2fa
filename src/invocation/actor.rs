//! One invocation's task: takes its events, records what they name, wants what is wanted, and knows when all of that
//! is settled.
//!
//! Everything about an invocation is owned by its task; others send it a [`Message`]. The order of things is the
//! promise: an output's metadata is in the record before the coordinator hears of it.

mod again;
mod naming;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot},
    task::spawn_blocking,
};

use super::{build::Build, engine::Shared, rows, tally::Tally};
use crate::{
    bep::event::{CommandLine, Event, Framed, TargetId},
    bes::{Settlement, StreamEnd, StreamKey},
    exec_path::ExecPath,
    materialize::{Completion, Outcome, Root, Session},
    output::{Class, OutputContent},
    record::{InvocationRow, InvocationState, RootId, TargetRow, TargetState},
};

/// How long a completion waits before its row is written, so that the file's stamp is older than the row by more
/// than a clock tick (see [`crate::output::Stamp::vouches_for`]).
const STAMP_AGE: Duration = Duration::from_millis(25);
/// Rows of completions that are written at once.
const ROWS_AT_ONCE: usize = 4096;
/// How long a task stays after its end, for a client that comes back to the same stream. Longer than the event service
/// remembers the stream ([`crate::bes::BesOptions`]), so that one which resumes it finds the task that has heard its
/// beginning.
const LINGER: Duration = Duration::from_secs(330);

/// What an invocation's task is told.
pub(super) enum Message {
    Event(Framed),
    Ended(StreamEnd),
    /// Answer when everything required is there or has failed.
    Settled(oneshot::Sender<Settlement>),
    /// The end of the stream was held back for so long.
    Held(Duration, bool),
    /// Answer with the present state, and the number of required outputs that are still on their way.
    Snapshot(oneshot::Sender<(InvocationRow, u64)>),
}

/// An output that is on disk.
struct Placed {
    path: ExecPath,
    outcome: Outcome,
}

struct Wanted {
    content: OutputContent,
    class: Class,
    target: Arc<TargetId>,
    done: bool,
}

/// What is needed to ask for outputs, once the stream has told it.
struct Place {
    id: RootId,
    root: Arc<Root>,
    version: u64,
}

pub(super) struct Actor {
    shared: Arc<Shared>,
    row: InvocationRow,
    state: Option<InvocationState>,
    build: Build,
    command_line: Option<CommandLine>,
    /// The exec root that the stream names, while it is not there yet.
    awaited_root: Option<String>,
    place: Option<Place>,
    session: Option<Arc<Session>>,
    /// Why outputs can't be placed at all.
    blocked: Option<String>,
    completions: mpsc::UnboundedSender<Vec<Completion>>,
    wanted: HashMap<ExecPath, Wanted>,
    /// Where each flattened name came from.
    flattened: HashMap<ExecPath, ExecPath>,
    pending_required: u64,
    pending_optional: u64,
    targets: HashMap<Arc<TargetId>, TargetRow>,
    tally: Tally,
    waiters: Vec<oneshot::Sender<Settlement>>,
    /// Completions whose rows are not written yet.
    unwritten: Vec<Completion>,
    /// What is on disk, or was when it was looked at.
    placed: Vec<Placed>,
    /// Whether that has been looked at again, behind the end of the stream.
    looked_again: bool,
    last_completion: Instant,
    stream_open: bool,
    interrupted: bool,
    /// When the stream's last event came.
    ended_at: Option<Instant>,
    reported: bool,
}

impl Actor {
    /// Starts the task of one invocation. `version` is given for one that is replayed.
    pub(super) fn start(shared: Arc<Shared>, key: &StreamKey, version: Option<u64>) -> mpsc::Sender<Message> {
        let (sender, inbox) = mpsc::channel(256);
        let (completions, completed) = mpsc::unbounded_channel();
        let row = InvocationRow {
            invocation_id: key.invocation_id.clone(),
            build_id: key.build_id.clone(),
            version: version.unwrap_or(0),
            ..InvocationRow::default()
        };
        let actor = Self {
            build: Build::new(shared.policy.clone()),
            shared,
            row,
            state: None,
            command_line: None,
            awaited_root: None,
            place: None,
            session: None,
            blocked: None,
            completions,
            wanted: HashMap::new(),
            flattened: HashMap::new(),
            pending_required: 0,
            pending_optional: 0,
            targets: HashMap::new(),
            tally: Tally::default(),
            waiters: Vec::new(),
            unwritten: Vec::new(),
            placed: Vec::new(),
            looked_again: false,
            last_completion: Instant::now(),
            stream_open: true,
            interrupted: false,
            ended_at: None,
            reported: false,
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
        // Since when there has been nothing but questions.
        let mut quiet_since = Instant::now();
        loop {
            let idle = !self.stream_open && self.pending_required + self.pending_optional == 0;
            if idle && self.unwritten.is_empty() && !open {
                break;
            }
            let nap = if self.unwritten.is_empty() {
                LINGER.saturating_sub(quiet_since.elapsed())
            } else {
                STAMP_AGE
            };
            tokio::select! {
                biased;
                Some(list) = completed.recv() => {
                    quiet_since = Instant::now();
                    self.on_completions(list);
                }
                message = inbox.recv(), if open => match message {
                    Some(message) => {
                        if !matches!(message, Message::Snapshot(_)) {
                            quiet_since = Instant::now();
                        }
                        self.on_message(message).await;
                    }
                    None => {
                        open = false;
                        self.stream_open = false;
                    }
                },
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
            self.settle().await;
        }
        self.write_rows(true).await;
        drop(inbox);
        self.shared.forget(&StreamKey {
            build_id: self.row.build_id.clone(),
            invocation_id: self.row.invocation_id.clone(),
        });
    }

    async fn on_message(&mut self, message: Message) {
        match message {
            Message::Event(framed) => {
                if !self.stream_open {
                    // The client of a broken stream has come back.
                    self.ended_at = None;
                }
                self.stream_open = true;
                self.reported = false;
                self.looked_again = false;
                self.shared.metrics.events.inc();
                self.enter(InvocationState::Running);
                // The command's last words; whatever comes behind them (metrics, logs) names no outputs of targets.
                let last = framed.last || matches!(framed.event, Event::Finished { .. });
                let effects = self.build.handle(framed.event);
                self.apply(effects).await;
                if last {
                    self.ended_at = Some(Instant::now());
                }
            }
            Message::Ended(end) => {
                // Behind a broken stream more may come: what waits for it goes on waiting.
                if end == StreamEnd::Finished {
                    let effects = self.build.end();
                    self.apply(effects).await;
                }
                self.stream_open = false;
                self.interrupted = matches!(end, StreamEnd::Broken(_));
                if let StreamEnd::Broken(reason) = end {
                    tracing::info!(invocation = %self.row.invocation_id, %reason, "the stream broke off; its downloads go on");
                }
                self.ended_at.get_or_insert_with(Instant::now);
                self.enter(InvocationState::Draining);
            }
            Message::Settled(waiter) => self.waiters.push(waiter),
            Message::Held(took, timed_out) => {
                self.row.hold_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                if timed_out {
                    let message = format!(
                        "the build was let go after {} although {} outputs were still on their way (--hold-timeout)",
                        crate::units::show_duration(took),
                        self.pending_required
                    );
                    tracing::warn!(invocation = %self.row.invocation_id, "{message}");
                    self.tally.note(&message);
                }
                self.save_row();
            }
            Message::Snapshot(answer) => {
                self.fill_row();
                // Who asked may have gone.
                let _ = answer.send((self.row.clone(), self.pending_required));
            }
        }
    }

    fn on_completions(&mut self, list: Vec<Completion>) {
        self.last_completion = Instant::now();
        for completion in list {
            let Some(wanted) = self.wanted.get_mut(&completion.path) else {
                continue;
            };
            if wanted.done || completion.class != wanted.class || completion.content != wanted.content {
                // The answer to a want that a later one of this invocation has replaced.
                continue;
            }
            wanted.done = true;
            match wanted.class {
                Class::Required => self.pending_required -= 1,
                _ => self.pending_optional -= 1,
            }
            if !completion.outcome.is_on_disk() && completion.outcome != Outcome::Superseded {
                tracing::warn!(
                    invocation = %self.row.invocation_id,
                    path = %completion.path,
                    class = completion.class.name(),
                    outcome = ?completion.outcome,
                    "an output could not be had"
                );
                if wanted.class == Class::Required
                    && let Some(row) = self.targets.get_mut(&wanted.target)
                {
                    row.failed += 1;
                }
            }
            self.tally.add(&completion);
            if !self.looked_again && completion.outcome.is_on_disk() {
                self.placed.push(Placed {
                    path: completion.path.clone(),
                    outcome: completion.outcome.clone(),
                });
            }
            self.unwritten.push(completion);
        }
    }

    async fn write_rows(&mut self, now: bool) {
        let due = now
            || self.unwritten.len() >= ROWS_AT_ONCE
            || (!self.unwritten.is_empty() && self.last_completion.elapsed() >= STAMP_AGE);
        let (true, Some(place)) = (due && !self.unwritten.is_empty(), &self.place) else {
            return;
        };
        let (record, root) = (self.shared.record.clone(), place.id);
        let ends = std::mem::take(&mut self.unwritten);
        if spawn_blocking(move || rows::conclude(&record, root, &ends))
            .await
            .is_err()
        {
            tracing::error!("recording completions panicked; this is a bug in outhaul");
        }
    }

    /// Answers whoever waits, once nothing required is on its way any more.
    async fn settle(&mut self) {
        if self.stream_open && self.waiters.is_empty() || self.pending_required > 0 {
            return;
        }
        self.look_again().await;
        if self.pending_required > 0 {
            return;
        }
        if !self.waiters.is_empty() {
            let settlement = Settlement {
                failed: self.tally.failed,
                messages: self.tally.messages.clone(),
                superseded: self.tally.superseded > 0,
            };
            for waiter in self.waiters.drain(..) {
                let _ = waiter.send(settlement.clone());
            }
        }
        if self.stream_open || self.reported || self.pending_optional > 0 {
            return;
        }
        self.reported = true;
        self.enter(if self.tally.superseded > 0 {
            InvocationState::Superseded
        } else if self.interrupted {
            InvocationState::Interrupted
        } else {
            InvocationState::Settled
        });
        let settled_in = self.ended_at.map_or(Duration::ZERO, |at| at.elapsed());
        self.row.settled_ms = crate::units::now_ms();
        for row in self.targets.values_mut() {
            if row.failed > 0 {
                row.state = TargetState::Failed;
            } else if row.state == TargetState::Completed {
                row.state = TargetState::Settled;
            }
        }
        self.save_row();
        let targets: Vec<TargetRow> = self
            .targets
            .values()
            .filter(|t| !t.label.is_empty())
            .cloned()
            .collect();
        self.shared.record.put_targets(&self.row.invocation_id, &targets);
        let line = self.tally.summary(settled_in);
        for message in &self.tally.messages {
            tracing::warn!(invocation = %self.row.invocation_id, "{message}");
        }
        tracing::info!(invocation = %self.row.invocation_id, "{line}");
        self.shared.report(super::engine::Report {
            invocation_id: self.row.invocation_id.clone(),
            line,
            messages: self.tally.messages.clone(),
            failed: self.tally.failed,
            exit_code: self.row.finished.then_some(self.row.exit_code),
        });
        if !self.interrupted {
            self.unload();
        }
    }

    /// Gives back what only a stream that goes on would need. The task itself stays for a while (see [`LINGER`]), and
    /// a build a few seconds must not add up to the memory of all builds of two minutes. Only a broken stream may go
    /// on: nothing comes behind the event that finishes one.
    fn unload(&mut self) {
        self.build = Build::new(self.shared.policy.clone());
        self.wanted = HashMap::new();
        self.flattened = HashMap::new();
        self.targets = HashMap::new();
        self.session = None;
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
        let tally = &self.tally;
        self.row.state = self.state.unwrap_or_default();
        self.row.downloaded = tally.downloaded;
        self.row.downloaded_bytes = tally.downloaded_bytes;
        self.row.present = tally.present;
        self.row.failed = tally.failed;
        self.row.known = tally.known;
        self.row.superseded = tally.superseded;
        self.row.errors.clone_from(&tally.messages);
    }

    fn save_row(&mut self) {
        self.fill_row();
        self.shared.record.put_invocation(&self.row);
    }
}
