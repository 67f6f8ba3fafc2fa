//! Taking in a stream from elsewhere, as one that is settled.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
};

use bytes::Bytes;
use prost::Message as _;

use super::{
    error::JournalError,
    format::{Batch, Head, RecordKind},
    store::{Journal, SETTLED, UNFINISHED},
    writer::compressed_in_pieces,
};
use crate::{
    builds::StreamKey,
    proto::google::devtools::build::v1::{
        BuildEvent, OrderedBuildEvent, PublishBuildToolEventStreamRequest, StreamId,
        build_event::{self, BuildComponentStreamFinished},
        stream_id::BuildComponent,
    },
};

/// The name of a file while it is being imported. Files with such names are never read.
const TAKEN_IN: &str = "importing";
/// Events are gathered to about this many bytes.
const FRAME: usize = 1 << 20;
const LEVEL: i32 = 3;
/// What Bazel calls its events.
const EVENT_TYPE: &str = "type.googleapis.com/build_event_stream.BuildEvent";

/// A journal file on its way in; it goes if it is dropped before [`Inlet::settle`]. All calls block.
pub(crate) struct Inlet {
    file: File,
    /// The file's path without extension.
    stem: PathBuf,
    key: StreamKey,
    batch: Batch,
    /// Whether the stream has a file here already, which is left as it is.
    known: bool,
}

impl Journal {
    /// Begins to take in a stream that came to its end elsewhere.
    ///
    /// # Errors
    /// When the journal was opened for reading only, or the file cannot be written.
    pub(crate) fn inlet(&self, key: &StreamKey, created_ms: u64) -> Result<Inlet, JournalError> {
        let stem = self.stem(key)?;
        let path = stem.with_extension(TAKEN_IN);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(JournalError::io("create", &path))?;
        let known = [UNFINISHED, SETTLED]
            .iter()
            .any(|extension| stem.with_extension(extension).exists());
        let mut inlet = Inlet {
            file,
            stem,
            key: key.clone(),
            batch: Batch::default(),
            known,
        };
        let head = Head {
            key: key.clone(),
            created_ms,
        };
        inlet.write(&head.encode())?;
        Ok(inlet)
    }
}

impl Inlet {
    /// Appends an event: the bytes of a `build_event_stream.BuildEvent`, or nothing for the end of the stream. Or else what
    /// came with the build.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn push(
        &mut self,
        kind: RecordKind,
        sequence: i64,
        received_ms: u64,
        event: Bytes,
    ) -> Result<(), JournalError> {
        if kind == RecordKind::Runfile {
            return self.add(received_ms, kind, sequence, &event);
        }
        let inner = match kind {
            RecordKind::Finished => {
                build_event::Event::ComponentStreamFinished(BuildComponentStreamFinished::default())
            }
            _ => build_event::Event::BazelEvent(prost_types::Any {
                type_url: EVENT_TYPE.to_owned(),
                value: event.into(),
            }),
        };
        let ordered = OrderedBuildEvent {
            stream_id: Some(StreamId {
                build_id: self.key.build_id.clone(),
                invocation_id: self.key.invocation_id.clone(),
                component: BuildComponent::Tool.into(),
            }),
            sequence_number: sequence,
            event: Some(BuildEvent {
                event_time: None,
                event: Some(inner),
            }),
        };
        let request = PublishBuildToolEventStreamRequest {
            ordered_build_event: Some(ordered),
            ..PublishBuildToolEventStreamRequest::default()
        };
        self.add(received_ms, kind, sequence, &request.encode_to_vec())
    }

    fn add(
        &mut self,
        received_ms: u64,
        kind: RecordKind,
        sequence: i64,
        payload: &[u8],
    ) -> Result<(), JournalError> {
        self.batch.add(received_ms, kind, sequence, payload);
        if self.batch.len() >= FRAME {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// Ends it. `false` when the stream has a file here already: that one stays, unless it is to be replaced.
    ///
    /// # Errors
    /// When it cannot be written or renamed.
    pub(crate) fn settle(mut self, replace: bool) -> Result<bool, JournalError> {
        self.flush()?;
        if self.known && !replace {
            return Ok(false);
        }
        let (from, to) = (
            self.stem.with_extension(TAKEN_IN),
            self.stem.with_extension(SETTLED),
        );
        fs::rename(&from, to).map_err(JournalError::io("rename", from))?;
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), JournalError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let path = self.stem.with_extension(TAKEN_IN);
        let body =
            compressed_in_pieces(&self.batch, LEVEL).map_err(JournalError::io("compress for", path))?;
        let head = self.batch.head(&body);
        self.write(&head)?;
        self.write(&body)?;
        self.batch.clear();
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), JournalError> {
        let path = self.stem.with_extension(TAKEN_IN);
        self.file
            .write_all(bytes)
            .map_err(JournalError::io("write", path))
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        // Renamed by now if all went well.
        let _ = fs::remove_file(self.stem.with_extension(TAKEN_IN));
    }
}
