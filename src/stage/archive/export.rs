//! Writing the file.

use std::io::Write;

use prost::Message as _;

use super::{
    super::{carried::Carried, error::StageError, recorded::Recorded},
    format::{Header, Line, Writer},
    redact::redact,
};
use crate::{
    journal::{Entry, RecordKind},
    record::{InvocationRow, with_fields_of},
    sources::address_of,
};

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Exported {
    /// What the file says of the build.
    pub(crate) header: Header,
    /// Events in it.
    pub(crate) events: u64,
    /// Events that could not be read and are not in it.
    pub(crate) left_out: u64,
}

/// Writes what is needed of a build's events to a file, with its runfiles, or those that came with it. Blocks.
///
/// # Errors
/// When the journal cannot be read or the file not be written.
pub(crate) fn export<W: Write>(
    entry: &Entry,
    row: &InvocationRow,
    runfiles: &[Carried],
    out: W,
) -> Result<(Exported, W), StageError> {
    let journal = &StageError::journal(&entry.key.invocation_id);
    let recorded = Recorded::read(entry.read().map_err(journal)?, None).map_err(journal)?;
    let header = header(entry, row, &recorded);
    let failed = |error| StageError::io("write", "the exported build")(error);
    let mut writer = Writer::new(out, &header).map_err(failed)?;
    let (mut left_out, mut last) = (0, (0, 0));
    for record in entry.read().map_err(journal)? {
        let record = record.map_err(journal)?;
        // Whatever else a journal keeps, such as the client's headers, is nobody else's business.
        let event = match record.kind {
            RecordKind::Event => match record.build_event().map(|event| redact(&event)) {
                Some(Ok(event)) if event.is_empty() => continue,
                Some(Ok(event)) => event,
                _ => {
                    left_out += 1;
                    continue;
                }
            },
            RecordKind::Finished => Vec::new(),
            RecordKind::Runfile if runfiles.is_empty() => record.payload.to_vec(),
            _ => continue,
        };
        let line = Line {
            kind: record.kind,
            sequence: record.sequence,
            received_ms: record.received_ms,
            event: event.into(),
        };
        last = (line.sequence, line.received_ms);
        writer.line(&line).map_err(failed)?;
    }
    for runfile in runfiles {
        let line = Line {
            kind: RecordKind::Runfile,
            sequence: last.0,
            received_ms: last.1,
            event: runfile.encode_to_vec().into(),
        };
        writer.line(&line).map_err(failed)?;
    }
    let (out, events) = writer.end().map_err(failed)?;
    let exported = Exported {
        header,
        events,
        left_out,
    };
    Ok((exported, out))
}

fn header(entry: &Entry, row: &InvocationRow, recorded: &Recorded) -> Header {
    let row = row.clone();
    let mut header = with_fields_of!(row, Header {
        invocation_id: entry.key.invocation_id.clone(),
        build_id: entry.key.build_id.clone(),
        exit_code: row.finished.then_some(row.exit_code),
        digest_function: recorded.function.unwrap_or_default().name().to_owned(),
        finished: recorded.finished,
        written_by: format!("outhaul {}", env!("CARGO_PKG_VERSION")),
    } command workspace exec_root started_ms settled_ms build_tool_version remote_cache remote_instance_name);
    if header.remote_cache.is_empty() {
        // Nothing was downloaded, so nobody has needed it; the build itself says where it is.
        let named = recorded.command_line().as_ref().and_then(address_of);
        if let Some((endpoint, instance_name)) = named {
            header.remote_cache = endpoint;
            header.remote_instance_name = instance_name;
        }
    }
    header
}
