//! Archives by name: in a directory, at an HTTP URL, in a bucket, or as blobs of the cache.
//!
//! A collection lists names and gives a file's bytes, unverified: anyone who reads them compares their hash with the
//! file's [`Checksum`], if it has one. [`Choice`] says which of the names are wanted.

use crate::{
    exec_path::{ExecPath, is_reserved},
    remote::Sink,
    transport::RemoteError,
};
use async_trait::async_trait;

mod address;
mod blob;
#[cfg(feature = "object-stores")]
mod bucket;
mod checksum;
mod choice;
mod directory;
mod download;
mod error;
mod extract;
mod http;
mod open;
mod page;
mod pipe;
mod plan;
mod resume;
mod save;

#[cfg(test)]
mod tests;

pub(crate) use blob::BlobArchive;
pub(crate) use checksum::{Checksum, ChecksumError, Checksums};
pub(crate) use choice::{Choice, ChoiceError, Patterns};
pub(crate) use download::download;
pub(crate) use error::CollectionError;
pub(crate) use extract::{
    Extraction, Unpacking, check_places, extract, own_directory, save_into, unpack_into,
};
pub(crate) use open::{Access, Location, Source, open};
pub(crate) use pipe::Progress;
pub(crate) use plan::{Checking, Offer, Wanted, check_all, choose};
pub(crate) use resume::Patience;
pub(crate) use save::{Directory, SavedFile};

/// What the name of the file with an archive's SHA-256 adds to the archive's name.
const SIDECAR: &str = ".sha256sum";

/// A file of a collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Item {
    /// Its file name, without directories.
    pub(crate) name: String,
    /// Its size in bytes, where the list says so.
    pub(crate) size: Option<u64>,
    /// Its entity tag, where the list says so.
    pub(crate) etag: Option<String>,
}

impl Item {
    /// A file of which only the name is known.
    pub(crate) const fn named(name: String) -> Self {
        Self {
            name,
            size: None,
            etag: None,
        }
    }
}

/// What a collection has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listing {
    /// Its files, in the order of their names.
    pub(crate) items: Vec<Item>,
    /// Whether a file that is not listed is not there. Where a single file is named, nobody knows of its neighbours.
    pub(crate) is_complete: bool,
}

impl Listing {
    /// All files that there are.
    pub(crate) const fn whole(items: Vec<Item>) -> Self {
        Self {
            items,
            is_complete: true,
        }
    }

    /// The one file that was named.
    fn of_one(name: &str) -> Self {
        Self {
            items: vec![Item::named(name.to_owned())],
            is_complete: false,
        }
    }
}

/// Files that are side by side somewhere.
#[async_trait]
pub(crate) trait Collection: Send + Sync + 'static {
    /// The names that it has: those of files that are right in it, not below it.
    ///
    /// # Errors
    /// When it cannot be asked.
    async fn list(&self) -> Result<Listing, RemoteError>;

    /// Gives a file's bytes to a sink, from the first to the last, whatever connections break on the way. They are not
    /// verified.
    ///
    /// # Errors
    /// When there is no such file, the sink fails, or the retries are used up. [`RemoteErrorKind::Protocol`] when the
    /// file changed while it was read: what the sink has is then of no use.
    ///
    /// [`RemoteErrorKind::Protocol`]: crate::transport::RemoteErrorKind::Protocol
    async fn read(&self, item: &Item, sink: &mut dyn Sink) -> Result<(), RemoteError>;

    /// Takes in that the bytes that were read last were wrong. Whether others may come, of another cache.
    fn distrust(&self) -> bool {
        false
    }

    /// What the bytes must be, where the name of the collection is the digest of its only file.
    fn checksum(&self) -> Option<Checksum> {
        None
    }

    /// The name that its only file has there, which may be another one than it is given here.
    fn own_name(&self) -> Option<String> {
        None
    }

    /// What a file's bytes must be, where the collection itself keeps that.
    ///
    /// # Errors
    /// When it cannot be asked, or has no such file.
    async fn stored_checksum(&self, _item: &Item) -> Result<Option<Checksum>, RemoteError> {
        Ok(None)
    }

    /// Where it is, for messages; without credentials.
    fn describe(&self) -> String;
}

/// The one file that a URL names, where it is not all of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Only {
    /// Its name there.
    own: String,
    /// The name that it is given.
    name: String,
}

impl Only {
    /// Under its own name or another one.
    fn new(own: String, given: Option<&str>) -> Self {
        let name = given.map_or_else(|| own.clone(), str::to_owned);
        Self { own, name }
    }

    /// What is called so there: this file, or the one beside it with its checksum.
    fn own_name(&self, item: &Item) -> String {
        let suffix = item.name.strip_prefix(&*self.name).unwrap_or(SIDECAR);
        format!("{}{suffix}", self.own)
    }
}

/// Whether a file can be put into a directory under this name.
fn is_file_name(name: &str) -> bool {
    !name.contains('/') && !is_reserved(name) && ExecPath::new(name).is_ok()
}
