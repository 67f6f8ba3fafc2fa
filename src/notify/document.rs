//! Notifications, as JSON. The fields are documented in `docs/notifications.md`, and are only ever added to.

use std::{collections::HashMap, fmt, str::FromStr};

use anyhow::anyhow;
use bytes::Bytes;
use serde::Serialize;

use crate::{
    invocation::{
        Report,
        feed::{Change, InvocationChange},
    },
    record::{TargetRow, with_fields_of},
    units::{now_ms, random_uuid},
};

/// The version of the schema, raised when a field changes its meaning.
const SCHEMA: u32 = 1;

/// Invocations whose workspace is remembered for their targets' documents.
const REMEMBERED: usize = 1024;

/// What a document reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Event {
    /// A target came to its end: its required outputs are there, or something failed, or it will not come.
    TargetSettled,
    /// A build came to its end.
    InvocationSettled,
}

impl Event {
    /// As it stands in documents, headers and the command's environment.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::TargetSettled => "target_settled",
            Self::InvocationSettled => "invocation_settled",
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Event {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        [Self::TargetSettled, Self::InvocationSettled]
            .into_iter()
            .find(|event| event.name() == text)
            .ok_or_else(|| anyhow!("expected target_settled or invocation_settled, got {text:?}"))
    }
}

/// A document on its way to a receiver. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) event: Event,
    pub(super) invocation_id: String,
    /// Stays the same over retries, and for every receiver.
    pub(super) delivery: String,
    /// The JSON text.
    pub(super) body: Bytes,
}

/// Makes documents of changes. Knows the workspaces of the builds that began last.
#[derive(Debug, Default)]
pub(super) struct Writer {
    begun: HashMap<String, Begun>,
    /// Counts the builds.
    number: u64,
}

#[derive(Debug)]
struct Begun {
    number: u64,
    workspace: String,
    command: String,
}

impl Writer {
    /// The document that reports a change, if one does.
    pub(super) fn write(&mut self, change: InvocationChange) -> Option<Document> {
        let id = change.invocation_id;
        match change.change {
            Change::Begun { workspace, command } => {
                self.remember(id, workspace, command);
                None
            }
            Change::Target(row) => {
                if !row.state.is_over() {
                    return None;
                }
                let begun = self.begun.get(&id);
                let body = TargetDocument {
                    head: Head::new(Event::TargetSettled, &id),
                    workspace: begun.map(|b| b.workspace.as_str()),
                    command: begun.map(|b| b.command.as_str()),
                    target: Target::of(&row),
                };
                document(Event::TargetSettled, &id, &body)
            }
            Change::Settled(report) => {
                // A broken stream that goes on may bring more of this build; its targets then come without workspace.
                self.begun.remove(&id);
                let body = InvocationDocument::of(Head::new(Event::InvocationSettled, &id), &report);
                document(Event::InvocationSettled, &id, &body)
            }
            Change::Output(_) => None,
        }
    }

    fn remember(&mut self, id: String, workspace: String, command: String) {
        if self.begun.len() >= REMEMBERED
            && let Some(oldest) = self
                .begun
                .iter()
                .min_by_key(|(_, begun)| begun.number)
                .map(|(id, _)| id.clone())
        {
            self.begun.remove(&oldest);
        }
        self.number += 1;
        let begun = Begun {
            number: self.number,
            workspace,
            command,
        };
        self.begun.insert(id, begun);
    }
}

fn document<T: Serialize>(event: Event, invocation_id: &str, body: &T) -> Option<Document> {
    let body = match serde_json::to_vec(body) {
        Ok(body) => body.into(),
        Err(error) => {
            // Strings and numbers can be written; this is for the signature's sake.
            tracing::error!("failed to encode a notification: {error}");
            return None;
        }
    };
    Some(Document {
        event,
        invocation_id: invocation_id.to_owned(),
        delivery: random_uuid(),
        body,
    })
}

#[derive(Serialize)]
struct Head<'a> {
    schema: u32,
    event: &'static str,
    time_ms: i64,
    invocation_id: &'a str,
}

impl<'a> Head<'a> {
    fn new(event: Event, invocation_id: &'a str) -> Self {
        Self {
            schema: SCHEMA,
            event: event.name(),
            time_ms: now_ms(),
            invocation_id,
        }
    }
}

#[derive(Serialize)]
struct TargetDocument<'a> {
    #[serde(flatten)]
    head: Head<'a>,
    workspace: Option<&'a str>,
    command: Option<&'a str>,
    target: Target<'a>,
}

#[derive(Serialize)]
struct Target<'a> {
    label: &'a str,
    aspect: Option<&'a str>,
    configuration: Option<&'a str>,
    state: &'static str,
    success: bool,
    required: u64,
    optional: u64,
    failed: u64,
    known: u64,
}

impl<'a> Target<'a> {
    fn of(row: &'a TargetRow) -> Self {
        Self {
            label: &row.label,
            aspect: filled(&row.aspect),
            configuration: filled(&row.configuration),
            state: row.state.name(),
            success: row.success,
            required: row.required,
            optional: row.optional,
            failed: row.failed,
            known: row.known,
        }
    }
}

#[derive(Serialize)]
struct InvocationDocument<'a> {
    #[serde(flatten)]
    head: Head<'a>,
    workspace: Option<&'a str>,
    command: Option<&'a str>,
    exec_root: Option<&'a str>,
    state: &'static str,
    exit_code: Option<i32>,
    summary: Summary,
    summary_line: &'a str,
    failures: &'a [String],
}

#[derive(Serialize)]
struct Summary {
    downloaded: u64,
    downloaded_bytes: u64,
    present: u64,
    failed: u64,
    optional_failed: u64,
    known: u64,
    superseded: u64,
}

impl<'a> InvocationDocument<'a> {
    fn of(head: Head<'a>, report: &'a Report) -> Self {
        let tally = &report.tally;
        Self {
            head,
            workspace: filled(&report.workspace),
            command: filled(&report.command),
            exec_root: filled(&report.exec_root),
            state: report.state.name(),
            exit_code: report.exit_code,
            summary: with_fields_of!(tally, Summary {}
                downloaded downloaded_bytes present failed optional_failed known superseded),
            summary_line: &report.line,
            failures: &report.messages,
        }
    }
}

fn filled(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::{
        invocation::tally::Tally,
        record::{InvocationState, TargetState},
    };

    fn change(change: Change) -> InvocationChange {
        InvocationChange {
            invocation_id: "i".to_owned(),
            change,
        }
    }

    fn begun(workspace: &str) -> Change {
        Change::Begun {
            workspace: workspace.to_owned(),
            command: "build".to_owned(),
        }
    }

    fn target(state: TargetState) -> Change {
        Change::Target(Arc::new(TargetRow {
            label: "//a:b".to_owned(),
            configuration: "c".to_owned(),
            state,
            success: true,
            required: 3,
            failed: 1,
            ..TargetRow::default()
        }))
    }

    /// A document's JSON, with the time taken out.
    fn json_of(document: &Document) -> Value {
        let mut value: Value = serde_json::from_slice(&document.body).unwrap();
        assert!(value["time_ms"].as_i64() > Some(1_600_000_000_000), "{value}");
        value.as_object_mut().unwrap().remove("time_ms");
        value
    }

    #[test]
    fn a_target_is_reported_when_it_has_come_to_its_end() {
        let mut writer = Writer::default();
        assert!(writer.write(change(begun("/ws"))).is_none());
        for state in [TargetState::Announced, TargetState::Completed] {
            assert!(writer.write(change(target(state))).is_none(), "{state:?}");
        }
        let document = writer.write(change(target(TargetState::Failed))).unwrap();
        assert_eq!(document.event, Event::TargetSettled);
        assert_eq!(
            json_of(&document),
            json!({
                "schema": 1, "event": "target_settled", "invocation_id": "i",
                "workspace": "/ws", "command": "build",
                "target": {
                    "label": "//a:b", "aspect": null, "configuration": "c", "state": "failed", "success": true,
                    "required": 3, "optional": 0, "failed": 1, "known": 0,
                },
            })
        );
        for (state, name) in [
            (TargetState::Settled, "settled"),
            (TargetState::Aborted, "aborted"),
        ] {
            let document = writer.write(change(target(state))).unwrap();
            assert_eq!(json_of(&document)["target"]["state"], name);
        }
    }

    #[test]
    fn a_build_is_reported_with_counts_and_failures() {
        let report = Report {
            invocation_id: "i".to_owned(),
            build_id: String::new(),
            line: "outhaul: ...".to_owned(),
            messages: vec!["bazel-out/x: evicted".to_owned()],
            failed: 1,
            exit_code: None,
            workspace: "/ws".to_owned(),
            exec_root: "/e".to_owned(),
            command: "test".to_owned(),
            state: InvocationState::Interrupted,
            tally: Tally {
                downloaded: 2,
                downloaded_bytes: 30,
                present: 4,
                failed: 1,
                optional_failed: 5,
                known: 6,
                superseded: 7,
                ..Tally::default()
            },
        };
        let document = Writer::default()
            .write(change(Change::Settled(Box::new(report))))
            .unwrap();
        assert_eq!(
            json_of(&document),
            json!({
                "schema": 1, "event": "invocation_settled", "invocation_id": "i",
                "workspace": "/ws", "command": "test", "exec_root": "/e",
                "state": "interrupted", "exit_code": null,
                "summary": {
                    "downloaded": 2, "downloaded_bytes": 30, "present": 4, "failed": 1, "optional_failed": 5,
                    "known": 6, "superseded": 7,
                },
                "summary_line": "outhaul: ...",
                "failures": ["bazel-out/x: evicted"],
            })
        );
    }

    #[test]
    fn memory_for_builds_that_never_settle_is_bounded() {
        let mut writer = Writer::default();
        for number in 0..REMEMBERED + 10 {
            writer.write(InvocationChange {
                invocation_id: number.to_string(),
                change: begun("/ws"),
            });
        }
        assert_eq!(writer.begun.len(), REMEMBERED);
        assert!(!writer.begun.contains_key("9") && writer.begun.contains_key("10"));
    }

    #[test]
    fn deliveries_have_uuids_of_their_own() {
        let (one, other) = (random_uuid(), random_uuid());
        assert_ne!(one, other);
        for uuid in [one, other] {
            let parts: Vec<&str> = uuid.split('-').collect();
            assert_eq!(
                parts.iter().map(|p| p.len()).collect::<Vec<_>>(),
                [8, 4, 4, 4, 12],
                "{uuid}"
            );
            assert!(
                parts[2].starts_with('4') && "89ab".contains(&parts[3][..1]),
                "{uuid}"
            );
        }
    }
}
