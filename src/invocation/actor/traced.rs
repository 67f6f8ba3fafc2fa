//! What the build's own span says of it.

use super::Actor;
use crate::telemetry::Value;

impl Actor {
    /// The build is settled, if it is traced.
    pub(super) fn end_trace(&self) {
        let Some(trace) = &self.trace else { return };
        let (row, tally) = (&self.row, &self.ledger.tally);
        let text = |text: &str| Value::from(text);
        let mut attributes = vec![
            ("outhaul.invocation.id", text(&row.invocation_id)),
            ("outhaul.build.id", text(&row.build_id)),
            ("outhaul.workspace", text(&row.workspace)),
            ("outhaul.command", text(&row.command)),
            ("outhaul.state", text(row.state.name())),
            ("outhaul.cache", text(&row.remote_cache)),
            ("outhaul.outputs.downloaded", tally.downloaded.into()),
            ("outhaul.outputs.present", tally.present.into()),
            ("outhaul.outputs.failed", tally.failed.into()),
            ("outhaul.outputs.optional_failed", tally.optional_failed.into()),
            ("outhaul.outputs.superseded", tally.superseded.into()),
            ("outhaul.outputs.known", tally.known.into()),
            ("outhaul.bytes", tally.downloaded_bytes.into()),
        ];
        if row.finished {
            attributes.push(("process.exit.code", row.exit_code.into()));
        }
        let error = match (row.exit_code, tally.failed) {
            (code, _) if row.finished && code != 0 => Some(format!("exit code {code}")),
            (_, 0) => None,
            (_, 1) => Some("1 required output could not be downloaded".to_owned()),
            (_, failed) => Some(format!("{failed} required outputs could not be downloaded")),
        };
        trace.end(attributes, error);
    }
}
