//! The demo's cache: blobs in memory, by HTTP as Bazel's own HTTP caches have them.

use std::{collections::HashMap, io, net::Ipv4Addr, sync::Arc};

use axum::{
    Router,
    extract::{Path, State},
    http::StatusCode,
    routing::get,
};
use bytes::Bytes;
use parking_lot::RwLock;
use tokio::net::TcpListener;

use crate::digest::{Digest, DigestFunction};

/// The blobs by their SHA-256. A handle: clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct DemoCache(Arc<RwLock<HashMap<String, Bytes>>>);

impl DemoCache {
    /// Puts a blob in.
    pub(crate) fn put(&self, bytes: Vec<u8>) -> Digest {
        let digest = Digest::of(DigestFunction::Sha256, &bytes);
        self.0.write().insert(digest.hash_hex(), bytes.into());
        digest
    }

    /// Serves the blobs on a free port of this machine until the process ends, and gives the cache's address.
    ///
    /// # Errors
    /// When no port can be listened on.
    pub(crate) async fn serve(&self) -> io::Result<String> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let router = Router::new()
            .route("/cas/{hash}", get(blob))
            .with_state(self.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(format!("http://{address}"))
    }
}

async fn blob(State(cache): State<DemoCache>, Path(hash): Path<String>) -> Result<Bytes, StatusCode> {
    cache.0.read().get(&hash).cloned().ok_or(StatusCode::NOT_FOUND)
}
