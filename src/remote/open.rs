//! The store that an address leads to.

use std::sync::Arc;

use super::{ActionStore, DiskCache, GrpcCache, HttpCache, RemoteOptions};
use crate::transport::RemoteError;

/// Opens the store at the options' address. Connects nothing yet.
///
/// # Errors
/// [`RemoteErrorKind::Config`](crate::transport::RemoteErrorKind::Config), naming the flag, when the options cannot work.
pub fn open(options: RemoteOptions) -> Result<Arc<dyn ActionStore>, RemoteError> {
    if let Some(path) = options.connect.endpoint.directory_path() {
        return Ok(Arc::new(DiskCache::new(path, options.touch)));
    }
    if options.connect.endpoint.is_http() {
        return Ok(Arc::new(HttpCache::new(options)?));
    }
    Ok(Arc::new(GrpcCache::new(options)?))
}
