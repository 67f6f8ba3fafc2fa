//! An archive that is a blob of the cache.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use super::{Checksum, Collection, Item, Listing};
use crate::{
    digest::Digest,
    remote::{Attribution, BlobStore, Sink},
    transport::RemoteError,
};
use async_trait::async_trait;

/// A blob, under a name.
pub(crate) struct BlobArchive {
    store: Arc<dyn BlobStore>,
    digest: Digest,
    name: String,
    /// Whether it was read before. Who reads it again found the bytes wrong.
    was_read: AtomicBool,
}

impl BlobArchive {
    /// The blob with this digest. Without a name, it is called by its hash.
    pub(crate) fn new(store: Arc<dyn BlobStore>, digest: Digest, name: Option<String>) -> Self {
        Self {
            name: name.unwrap_or_else(|| digest.hash_hex()),
            store,
            digest,
            was_read: AtomicBool::new(false),
        }
    }
}

#[async_trait]
impl Collection for BlobArchive {
    async fn list(&self) -> Result<Listing, RemoteError> {
        let item = Item {
            size: Some(self.digest.size()),
            ..Item::named(self.name.clone())
        };
        Ok(Listing::whole(vec![item]))
    }

    async fn read(&self, _: &Item, sink: &mut dyn Sink) -> Result<(), RemoteError> {
        let nobody = Attribution::default();
        if self.digest.is_empty() {
            return Ok(());
        }
        let avoid = self.was_read.swap(true, Ordering::Relaxed);
        self.store
            .read_stream(&self.digest, 0, &nobody, avoid, sink)
            .await
    }

    fn distrust(&self) -> bool {
        self.store.distrust(&self.digest)
    }

    fn checksum(&self) -> Option<Checksum> {
        Some(Checksum::from(&self.digest))
    }

    fn describe(&self) -> String {
        format!("{} of {}", self.digest, self.store.describe())
    }
}
