//! What the spans of a build say of its downloads, and of placing them.

use super::place::{PlaceError, Placed};
use crate::{
    digest::Digest,
    remote::{BatchAnswer, BlobStore, counting_retries},
    telemetry::Open,
    transport::RemoteError,
};

/// Asks a store, and counts the retries that it takes if there is a span that says it.
pub(super) async fn asked<T>(span: Option<&mut Open>, asking: impl Future<Output = T>) -> T {
    let Some(span) = span else {
        return asking.await;
    };
    let (answer, retries) = counting_retries(asking).await;
    span.note("outhaul.retries", retries);
    answer
}

/// A batch was answered.
pub(super) fn end_batch(mut span: Open, store: &dyn BlobStore, answers: &[BatchAnswer]) {
    let came = answers.iter().filter_map(|(_, answer)| answer.as_ref().ok());
    let bytes: u64 = came.clone().map(|bytes| bytes.len() as u64).sum();
    let came = came.count();
    let first = answers.iter().find(|(_, answer)| answer.is_ok());
    span.store(first.and_then(|(digest, _)| store.origin(digest)));
    span.note("outhaul.blobs", answers.len() as u64);
    span.note("outhaul.bytes", bytes);
    let mut errors = answers.iter().filter_map(|(_, answer)| answer.as_ref().err());
    let outcome = match answers.len() - came {
        0 => "downloaded",
        _ if errors.clone().all(RemoteError::is_not_found) => "not found",
        failed if failed == answers.len() => "failed",
        _ => "partly failed",
    };
    // What the cache does not have may be on disk.
    let error = errors.find(|error| !error.is_not_found());
    span.outcome(outcome, error.map(ToString::to_string));
}

/// A large blob was read, or not.
pub(super) fn end_stream(
    mut span: Open,
    store: &dyn BlobStore,
    digest: &Digest,
    read: &Result<(), RemoteError>,
) {
    span.note("outhaul.blobs", 1);
    match read {
        Ok(()) => {
            span.store(store.origin(digest));
            span.note("outhaul.bytes", digest.size());
            span.outcome("downloaded", None);
        }
        Err(error) if error.is_not_found() => span.outcome("not found", None),
        Err(error) => span.outcome("failed", Some(error.to_string())),
    }
}

/// Some outputs were placed, or not.
pub(super) fn end_place<'a>(
    mut span: Open,
    bytes: u64,
    placed: impl ExactSizeIterator<Item = &'a Result<Placed, PlaceError>>,
) {
    span.note("outhaul.outputs", placed.len() as u64);
    span.note("outhaul.bytes", bytes);
    let mut errors = placed.filter_map(|placed| placed.as_ref().err()).peekable();
    let is_placed = errors.peek().is_none();
    // Those that a newer build owns by now have not failed.
    let outcome = match errors.find(|error| !error.is_superseded()) {
        Some(error) => ("failed", Some(error.to_string())),
        None if is_placed => ("placed", None),
        None => ("superseded", None),
    };
    span.outcome(outcome.0, outcome.1);
}
