//! An archive that is a blob of the cache.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::{FutureExt as _, future::BoxFuture};

use super::{Checksum, Collection, Item, Listing};
use crate::{
    digest::Digest,
    remote::{Attribution, BlobStore, Sink},
    transport::RemoteError,
};

/// A blob, under a name.
pub struct BlobArchive {
    store: Arc<dyn BlobStore>,
    digest: Digest,
    name: String,
    /// Whether it was read before. Who reads it again found the bytes wrong.
    was_read: AtomicBool,
}

impl BlobArchive {
    /// The blob with this digest. Without a name, it is called by its hash.
    #[must_use]
    pub fn new(store: Arc<dyn BlobStore>, digest: Digest, name: Option<String>) -> Self {
        Self {
            name: name.unwrap_or_else(|| digest.hash_hex()),
            store,
            digest,
            was_read: AtomicBool::new(false),
        }
    }
}

impl Collection for BlobArchive {
    fn list(&self) -> BoxFuture<'_, Result<Listing, RemoteError>> {
        let item = Item {
            size: Some(self.digest.size()),
            ..Item::named(self.name.clone())
        };
        let listing = Listing {
            items: vec![item],
            is_complete: true,
        };
        futures::future::ready(Ok(listing)).boxed()
    }

    fn read<'a>(&'a self, _: &'a Item, sink: &'a mut dyn Sink) -> BoxFuture<'a, Result<(), RemoteError>> {
        async move {
            let nobody = Attribution::default();
            if self.digest.is_empty() {
                return Ok(());
            }
            let avoid = self.was_read.swap(true, Ordering::Relaxed);
            self.store
                .read_stream(&self.digest, 0, &nobody, avoid, sink)
                .await
        }
        .boxed()
    }

    fn checksum(&self) -> Option<Checksum> {
        Some(Checksum::from(&self.digest))
    }

    fn describe(&self) -> String {
        format!("{} of {}", self.digest, self.store.describe())
    }
}
