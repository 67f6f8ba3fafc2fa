//! The store that an address leads to.

use std::sync::Arc;

use super::{ActionStore, DiskCache, GrpcCache, HttpCache, RemoteOptions};
use crate::transport::RemoteError;

/// Opens the store at the options' address. Connects nothing yet.
///
/// # Errors
/// [`RemoteErrorKind::Config`](crate::transport::RemoteErrorKind::Config), naming the flag, when the options cannot work.
pub(crate) fn open(options: RemoteOptions) -> Result<Arc<dyn ActionStore>, RemoteError> {
    if let Some(path) = options.connect.endpoint.directory_path() {
        let cache = DiskCache::new(path, options.touch);
        return Ok(Arc::new(if options.is_optional {
            cache.optional()
        } else {
            cache
        }));
    }
    if options.connect.endpoint.is_http() {
        return Ok(Arc::new(HttpCache::new(options)?));
    }
    if options.connect.endpoint.bucket().is_some() {
        return bucket(&options);
    }
    Ok(Arc::new(GrpcCache::new(options)?))
}

#[cfg(feature = "object-stores")]
fn bucket(options: &RemoteOptions) -> Result<Arc<dyn ActionStore>, RemoteError> {
    Ok(Arc::new(super::object::ObjectCache::new(options)?))
}

#[cfg(not(feature = "object-stores"))]
fn bucket(options: &RemoteOptions) -> Result<Arc<dyn ActionStore>, RemoteError> {
    let context = format!("--remote-cache={}", options.connect.endpoint);
    let message = "this outhaul was built without object stores (the feature object-stores)";
    Err(RemoteError::config(context, message))
}
