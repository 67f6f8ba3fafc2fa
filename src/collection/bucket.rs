//! Objects in a bucket.

use async_trait::async_trait;
use futures::{StreamExt as _, stream};

use super::{
    Collection, Item, Listing,
    resume::{self, Opened, Patience, Ranged},
};
use crate::{
    remote::{Sink, object::Bucket},
    transport::RemoteError,
};

/// The objects right below a prefix, or one of them.
pub(super) struct BucketDirectory {
    pub(super) bucket: Bucket,
    /// The object's name below the prefix, if one is named.
    pub(super) only: Option<String>,
    pub(super) patience: Patience,
}

#[async_trait]
impl Ranged for BucketDirectory {
    async fn open(&self, item: &Item, offset: u64, version: Option<&str>) -> Result<Opened, RemoteError> {
        let version = version.filter(|_| offset > 0);
        let reading = self.bucket.get(&item.name, offset, version).await?;
        let (size, version) = (Some(reading.size), reading.etag.clone());
        let bytes = stream::try_unfold(reading, |mut reading| async move {
            let piece = reading.next().await?;
            Ok(piece.map(|piece| (piece, reading)))
        });
        Ok(Opened {
            begin: offset,
            size,
            version,
            bytes: bytes.boxed(),
        })
    }

    fn address(&self, item: &Item) -> String {
        format!("{}/{}", place(&self.bucket), item.name)
    }
}

/// The bucket and the prefix, without settings.
fn place(bucket: &Bucket) -> String {
    let address = bucket.address().to_string();
    let place = address.split('?').next().unwrap_or(&address);
    place.trim_end_matches('/').to_owned()
}

#[async_trait]
impl Collection for BucketDirectory {
    async fn list(&self) -> Result<Listing, RemoteError> {
        if let Some(name) = &self.only {
            return Ok(Listing::of_one(name));
        }
        // What is further below are logs and the like.
        let all = self.bucket.list("").await?;
        let items = all.into_iter().map(|object| Item {
            name: object.name,
            size: Some(object.size),
            etag: object.etag,
        });
        Ok(Listing::whole(items.collect()))
    }

    async fn read(&self, item: &Item, sink: &mut dyn Sink) -> Result<(), RemoteError> {
        resume::read(self, item, &self.patience, sink).await
    }

    fn describe(&self) -> String {
        match &self.only {
            Some(name) => format!("{}/{name}", place(&self.bucket)),
            None => place(&self.bucket),
        }
    }
}
