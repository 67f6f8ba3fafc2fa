//! Archives by name: in a directory, at an HTTP URL, in a bucket, or as blobs of the cache.
//!
//! A collection lists names and gives a file's bytes, unverified: anyone who reads them compares their hash with the
//! file's [`Checksum`], if it has one. [`Choice`] says which of the names are wanted.

use futures::future::BoxFuture;

use crate::{
    exec_path::{ExecPath, is_reserved},
    remote::Sink,
    transport::RemoteError,
};

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

pub use blob::BlobArchive;
pub use checksum::{Checksum, ChecksumError, Checksums};
pub use choice::{Choice, ChoiceError, Patterns};
pub use download::{Downloaded, download};
pub use error::CollectionError;
pub use extract::{
    Extracted, Extraction, Extractions, Unpacking, check_places, extract, own_directory, save_into,
    unpack_into,
};
pub use open::{Access, Place, Source, open};
pub use pipe::Progress;
pub use plan::{Checking, Offer, Wanted, check_all, choose};
pub use resume::{Opened, Patience, Ranged, read as read_resumed};
pub use save::{Directory, SavedFile};

/// What the name of the file with an archive's SHA-256 adds to the archive's name.
pub const SIDECAR: &str = ".sha256sum";

/// A file of a collection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its file name, without directories.
    pub name: String,
    /// Its size in bytes, where the list says so.
    pub size: Option<u64>,
    /// Its entity tag, where the list says so.
    pub etag: Option<String>,
}

impl Item {
    /// A file of which only the name is known.
    #[must_use]
    pub const fn named(name: String) -> Self {
        Self {
            name,
            size: None,
            etag: None,
        }
    }
}

/// What a collection has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Its files, in the order of their names.
    pub items: Vec<Item>,
    /// Whether a file that is not listed is not there. Where a single file is named, nobody knows of its neighbours.
    pub is_complete: bool,
}

/// Files that are side by side somewhere.
pub trait Collection: Send + Sync + 'static {
    /// The names that it has: those of files that are right in it, not below it.
    ///
    /// # Errors
    /// When it cannot be asked.
    fn list(&self) -> BoxFuture<'_, Result<Listing, RemoteError>>;

    /// Gives a file's bytes to a sink, from the first to the last, whatever connections break on the way. They are not
    /// verified.
    ///
    /// # Errors
    /// When there is no such file, the sink fails, or the retries are used up. [`RemoteErrorKind::Protocol`] when the
    /// file changed while it was read: what the sink has is then of no use.
    ///
    /// [`RemoteErrorKind::Protocol`]: crate::transport::RemoteErrorKind::Protocol
    fn read<'a>(&'a self, item: &'a Item, sink: &'a mut dyn Sink) -> BoxFuture<'a, Result<(), RemoteError>>;

    /// What the bytes must be, where the name of the collection is the digest of its only file.
    fn checksum(&self) -> Option<Checksum> {
        None
    }

    /// Where it is, for messages; without credentials.
    fn describe(&self) -> String;
}

/// Whether a file can be put into a directory under this name.
#[must_use]
pub fn is_file_name(name: &str) -> bool {
    !name.contains('/') && !is_reserved(name) && ExecPath::new(name).is_ok()
}
