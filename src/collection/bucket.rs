//! Objects in a bucket.

use async_trait::async_trait;
use futures::{StreamExt as _, stream};

use super::{
    Checksum, Collection, Item, Listing, Only,
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
    pub(super) only: Option<Only>,
    pub(super) patience: Patience,
}

#[async_trait]
impl Ranged for BucketDirectory {
    async fn open(&self, item: &Item, offset: u64, version: Option<&str>) -> Result<Opened, RemoteError> {
        let version = version.filter(|_| offset > 0);
        let reading = self.bucket.get(&self.name_of(item), offset, version).await?;
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
        format!("{}/{}", place(&self.bucket), self.name_of(item))
    }
}

impl BucketDirectory {
    fn name_of(&self, item: &Item) -> String {
        match &self.only {
            Some(only) => only.own_name(item),
            None => item.name.clone(),
        }
    }

    /// Whether a name is that of a prefix, as far as that can be known.
    async fn has_below(&self, name: &str) -> bool {
        self.bucket.has_below(name).await.unwrap_or(false)
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
        if let Some(only) = &self.only {
            return Ok(Listing::of_one(&only.name));
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
        let read = resume::read(self, item, &self.patience, sink).await;
        match (read, &self.only) {
            (Err(error), Some(only))
                if error.is_not_found() && item.name == only.name && self.has_below(&only.own).await =>
            {
                let message = format!(
                    "{}; for what is below it, end the URL with a slash",
                    error.message
                );
                Err(RemoteError { message, ..error })
            }
            (read, _) => read,
        }
    }

    fn own_name(&self) -> Option<String> {
        self.only.as_ref().map(|only| only.own.clone())
    }

    async fn stored_checksum(&self, item: &Item) -> Result<Option<Checksum>, RemoteError> {
        let sum = self.bucket.sha256(&self.name_of(item)).await?;
        Ok(sum.map(Checksum::of_sha256))
    }

    fn describe(&self) -> String {
        match &self.only {
            Some(only) => format!("{}/{}", place(&self.bucket), only.own),
            None => place(&self.bucket),
        }
    }
}
