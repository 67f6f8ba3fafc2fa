//! Reading the file, into a journal and a record.

use std::{fs::File, io::BufReader, path::Path};

use super::{
    super::{error::StageError, recorded::Recorded},
    format::{Header, Reader},
};
use crate::{
    builds::StreamKey,
    invocation::build::TargetEnd,
    journal::{Journal, JournalError, RecordKind},
    record::{InvocationRow, InvocationState, Record, TargetRow, TargetState, with_fields_of},
};

/// What was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Imported {
    /// What the file says of the build.
    pub(crate) header: Header,
    /// Events in it.
    pub(crate) events: u64,
    /// Whether the build's events were here before.
    pub(crate) known: bool,
}

/// Takes a build in: its events into the journal, where nothing is left to do for them, and its row into the record,
/// without an output root, so that it is nobody's newest build and nothing is ever written for it unasked. What is here
/// already stays as it is, but an import without runfiles makes way for one with them. Blocks.
///
/// # Errors
/// When the file is damaged or cannot be read, or the journal not be written; nothing is taken in then.
pub(crate) fn import(path: &Path, journal: &Journal, record: &Record) -> Result<Imported, StageError> {
    let file = File::open(path).map_err(StageError::io("open", path))?;
    let (mut reader, header) = Reader::new(BufReader::new(file), path)?;
    let key = StreamKey {
        build_id: header.build_id.clone(),
        invocation_id: header.invocation_id.clone(),
        ..StreamKey::default()
    };
    if key.invocation_id.is_empty() {
        return Err(StageError::Archive {
            path: path.to_owned(),
            offset: 0,
            reason: "its header has no invocation id".to_owned(),
        });
    }
    refuse_another(&key, path, journal, record)?;
    let failed = &StageError::journal(&key.invocation_id);
    let mut inlet = journal
        .inlet(&key, u64::try_from(header.started_ms).unwrap_or(0))
        .map_err(failed)?;
    let (mut events, mut runfiles) = (0, false);
    while let Some(lines) = reader.lines()? {
        for line in lines {
            runfiles |= line.kind == RecordKind::Runfile;
            inlet
                .push(line.kind, line.sequence, line.received_ms, line.event)
                .map_err(failed)?;
            events += 1;
        }
    }
    let known = !inlet
        .settle(runfiles && lacks_runfiles(&key, journal, record).map_err(failed)?)
        .map_err(failed)?;
    if record.invocation(&key.invocation_id).is_none() {
        let entry = journal.find_stream(&key).map_err(failed)?;
        let recorded = Recorded::read(entry.read().map_err(failed)?, None).map_err(failed)?;
        record.put_invocation(&row(&header));
        record.put_targets(&key.invocation_id, &targets(&recorded));
    }
    Ok(Imported {
        header,
        events,
        known,
    })
}

/// Whether a build was imported before from a file without runfiles.
fn lacks_runfiles(key: &StreamKey, journal: &Journal, record: &Record) -> Result<bool, JournalError> {
    let row = record.invocation(&key.invocation_id);
    if !row.is_some_and(|row| row.imported) || !journal.has(key) {
        return Ok(false);
    }
    // One that cannot be read is as good as none.
    let recorded = journal.find_stream(key).and_then(|found| found.read());
    let recorded = recorded.and_then(|records| Recorded::read(records, None));
    Ok(recorded.map_or(true, |recorded| recorded.carried.is_empty()))
}

/// Builds are named by their invocation's id, so that a file with the id of another build would stand in its place.
fn refuse_another(
    key: &StreamKey,
    path: &Path,
    journal: &Journal,
    record: &Record,
) -> Result<(), StageError> {
    let recorded = record.invocation(&key.invocation_id).map(|row| row.build_id);
    let journals = journal.list().map_err(StageError::journal(&key.invocation_id))?;
    let journalled = journals
        .into_iter()
        .map(|entry| entry.key)
        .filter(|here| here.invocation_id == key.invocation_id)
        .map(|here| here.build_id);
    match journalled.chain(recorded).find(|here| *here != key.build_id) {
        Some(here) => Err(StageError::Taken {
            path: path.to_owned(),
            invocation_id: key.invocation_id.clone(),
            here,
            there: key.build_id.clone(),
        }),
        None => Ok(()),
    }
}

fn row(header: &Header) -> InvocationRow {
    let header = header.clone();
    with_fields_of!(
        header,
        InvocationRow {
            imported: true,
            state: if header.finished { InvocationState::Settled } else { InvocationState::Interrupted },
            exit_code: header.exit_code.unwrap_or_default(),
            finished: header.exit_code.is_some(),
        } invocation_id build_id command workspace exec_root started_ms settled_ms build_tool_version remote_cache
          remote_instance_name,
        ..InvocationRow::default()
    )
}

fn targets(recorded: &Recorded) -> Vec<TargetRow> {
    let row = |(target, end): (crate::bep::event::TargetId, TargetEnd)| TargetRow {
        label: target.label,
        aspect: target.aspect,
        configuration: target.configuration,
        state: match end {
            TargetEnd::Completed { success: true, .. } => TargetState::Completed,
            TargetEnd::Completed { success: false, .. } => TargetState::Failed,
            TargetEnd::Aborted => TargetState::Aborted,
        },
        success: matches!(end, TargetEnd::Completed { success: true, .. }),
        ..TargetRow::default()
    };
    recorded.targets().into_iter().map(row).collect()
}
