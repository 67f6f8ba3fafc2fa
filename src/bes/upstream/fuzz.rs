//! What the fuzz targets run of this room: see [`crate::fuzzing`].

use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::{peek, rewrite};

/// What a request is, by a look at its event's id alone.
pub(in crate::bes) fn kind(request: &[u8]) -> String {
    format!("{:?}", peek::kind(request))
}

/// How many of a request's files are blobs.
pub(in crate::bes) fn blobs(request: &[u8]) -> usize {
    rewrite::blobs(request).len()
}

/// The request with these files in place of them.
pub(in crate::bes) fn rewritten(request: &[u8], local: &[Option<PathBuf>]) -> Option<Bytes> {
    rewrite::rewritten(request, local)
}

/// What a file is called then.
pub(in crate::bes) fn file_uri(path: &Path) -> String {
    rewrite::file_uri(path)
}
