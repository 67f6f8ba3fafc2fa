//! Digests as users write them.

use std::str::FromStr;

use super::ActionStore;
use crate::{
    digest::{Digest, DigestError, DigestFunction},
    transport::{RemoteError, RemoteErrorKind},
};

/// A digest with a size or without one, and perhaps with the name of its function: `[FUNCTION/]HASH[/SIZE]`, or
/// `FUNCTION:HASH` as we print it, or the `bytestream://` URI of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WrittenDigest {
    named: Option<DigestFunction>,
    /// Its size is 0 where none is written.
    digest: Digest,
    is_sized: bool,
}

impl FromStr for WrittenDigest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let text = match text.split_once("://") {
            Some(("bytestream", place)) => place.rsplit_once("/blobs/").map_or(place, |(_, blob)| blob),
            _ => text,
        };
        let text = text.replacen(':', "/", 1);
        let text = text.as_str();
        let (named, rest) = match text.split_once('/') {
            Some((name, rest)) => match name.parse::<DigestFunction>() {
                Ok(function) => (Some(function), rest),
                Err(_) => (None, text),
            },
            None => (None, text),
        };
        let is_sized = rest.contains('/');
        let digest = if is_sized {
            text.parse()?
        } else {
            Digest::from_hex(named, rest, 0)?
        };
        Ok(Self {
            named,
            digest,
            is_sized,
        })
    }
}

impl WrittenDigest {
    /// The digest that is meant. A hash of 64 digits may be SHA-256 or BLAKE3: `assumed` says. Of a hash alone, the store
    /// knows the size.
    ///
    /// # Errors
    /// When the store has no blob with the hash, or cannot say.
    pub(crate) async fn find(
        &self,
        assumed: DigestFunction,
        store: &dyn ActionStore,
    ) -> Result<Digest, RemoteError> {
        let hash = self.digest.hash();
        let function = self.named.unwrap_or(assumed);
        let function = match Digest::new(function, hash, 0) {
            Ok(_) => function,
            Err(_) => self.digest.function(),
        };
        let empty = Digest::of(function, b"");
        let size = if self.is_sized {
            Some(self.digest.size())
        } else if empty.hash() == hash {
            // Nobody uploads it.
            Some(0)
        } else {
            store.blob_size(function, hash).await?
        };
        let hex = self.digest.hash_hex();
        let size = size.ok_or_else(|| {
            let message = format!("no blob with the hash {hex}");
            RemoteError::new(RemoteErrorKind::NotFound, store.describe(), message)
        })?;
        Digest::new(function, hash, size).map_err(|e| RemoteError::config(hex, e.to_string()))
    }
}
