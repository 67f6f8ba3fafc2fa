//! The demo's cache: blobs in memory, by HTTP as Bazel's own HTTP caches have them.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::Ipv4Addr,
    sync::Arc,
    time::Duration,
};

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

/// Bytes that are kept; with more, the oldest blobs go.
const KEPT: usize = 256 << 20;

/// The blobs by their SHA-256. A handle: clones share them.
#[derive(Debug, Clone, Default)]
pub(crate) struct DemoCache {
    blobs: Arc<RwLock<Blobs>>,
    /// How long it takes for an answer, and for each mebibyte of it.
    delay: Duration,
}

#[derive(Debug, Default)]
struct Blobs {
    by_hash: HashMap<String, Bytes>,
    /// Hashes, the oldest first.
    order: VecDeque<String>,
    bytes: usize,
}

impl DemoCache {
    /// As far away as a real one: it takes so long for an answer, and as much again for each mebibyte.
    pub(crate) fn far_away(delay: Duration) -> Self {
        Self {
            delay,
            ..Self::default()
        }
    }

    /// Puts a blob in.
    pub(crate) fn put(&self, bytes: Vec<u8>) -> Digest {
        let digest = Digest::of(DigestFunction::Sha256, &bytes);
        let hash = digest.hash_hex();
        let mut blobs = self.blobs.write();
        blobs.bytes += bytes.len();
        if let Some(before) = blobs.by_hash.insert(hash.clone(), bytes.into()) {
            blobs.bytes -= before.len();
        } else {
            blobs.order.push_back(hash);
        }
        while blobs.bytes > KEPT
            && let Some(oldest) = blobs.order.pop_front()
            && let Some(gone) = blobs.by_hash.remove(&oldest)
        {
            blobs.bytes -= gone.len();
        }
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
    let found = cache.blobs.read().by_hash.get(&hash).cloned();
    let mebibytes = found
        .as_ref()
        .map_or(0.0, |blob| blob.len() as f64 / f64::from(1 << 20));
    if !cache.delay.is_zero() {
        tokio::time::sleep(cache.delay.mul_f64(1.0 + mebibytes)).await;
    }
    found.ok_or(StatusCode::NOT_FOUND)
}
