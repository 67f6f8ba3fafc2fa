//! Uploads under way: bytes go in, and come out as a verified blob.

use std::{
    collections::HashMap,
    io::{self, Write},
    sync::Arc,
};

use parking_lot::Mutex;

use super::store::Store;
use outhaul_digest::{Digest, Hasher};

/// Most interrupted uploads that are kept for their clients to resume.
const MOST_INTERRUPTED: usize = 64;

/// Most memory set aside on the word of a client that says how much it will send.
const MOST_RESERVED: u64 = 16 << 20;

/// Why an upload ended badly.
#[derive(Debug, thiserror::Error)]
pub(super) enum UploadError {
    #[error("more bytes than the {0} that the digest says")]
    TooLong(u64),
    #[error("undecodable zstd: {0}")]
    Zstd(io::Error),
    #[error("bytes have the digest {0}")]
    Mismatch(Digest),
}

/// One blob on its way in.
pub(super) struct Upload {
    digest: Digest,
    /// Bytes taken so far, as they were sent.
    received: u64,
    target: Target,
}

enum Target {
    Plain(Box<Receiver>),
    Zstd(Box<zstd::stream::write::Decoder<'static, Receiver>>),
}

/// Takes the blob's own bytes: hashes, counts and keeps them.
struct Receiver {
    hasher: Hasher,
    size: u64,
    too_long: bool,
    kept: Vec<u8>,
}

impl Upload {
    pub(super) fn new(digest: Digest, compressed: bool) -> Result<Self, UploadError> {
        let reserved = usize::try_from(digest.size().min(MOST_RESERVED)).unwrap_or_default();
        let receiver = Receiver {
            hasher: Hasher::new(digest.function()),
            size: digest.size(),
            too_long: false,
            kept: Vec::with_capacity(reserved),
        };
        let target = if compressed {
            let decoder = zstd::stream::write::Decoder::new(receiver).map_err(UploadError::Zstd)?;
            Target::Zstd(Box::new(decoder))
        } else {
            Target::Plain(Box::new(receiver))
        };
        Ok(Self {
            digest,
            received: 0,
            target,
        })
    }

    /// Bytes taken so far, as they were sent: where the client goes on.
    pub(super) const fn received(&self) -> u64 {
        self.received
    }

    pub(super) const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Takes the next bytes as they were sent.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), UploadError> {
        let (done, receiver) = match &mut self.target {
            Target::Plain(receiver) => (receiver.write_all(bytes), &mut **receiver),
            Target::Zstd(decoder) => (decoder.write_all(bytes), decoder.get_mut()),
        };
        if receiver.too_long {
            return Err(UploadError::TooLong(receiver.size));
        }
        done.map_err(UploadError::Zstd)?;
        self.received += bytes.len() as u64;
        Ok(())
    }

    /// Verifies the whole and puts it into the store.
    pub(super) fn finish(self, store: &Store) -> Result<(), UploadError> {
        let receiver = match self.target {
            Target::Plain(receiver) => *receiver,
            Target::Zstd(mut decoder) => {
                decoder.flush().map_err(UploadError::Zstd)?;
                decoder.into_inner()
            }
        };
        let actual = receiver.hasher.finish();
        if actual != self.digest {
            return Err(UploadError::Mismatch(actual));
        }
        store.put_unverified(actual, receiver.kept);
        Ok(())
    }
}

impl Write for Receiver {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.hasher.size() + bytes.len() as u64 > self.size {
            self.too_long = true;
            return Err(io::Error::other("too many bytes"));
        }
        self.kept.extend_from_slice(bytes);
        self.hasher.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Interrupted uploads by resource name.
#[derive(Default)]
struct Interrupted {
    uploads: HashMap<String, (u64, Upload)>,
    /// Grows with each one kept, so that the oldest is known.
    clock: u64,
}

/// The uploads that wait for their clients to come back.
#[derive(Clone, Default)]
pub(super) struct Uploads(Arc<Mutex<Interrupted>>);

impl std::fmt::Debug for Uploads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uploads").finish_non_exhaustive()
    }
}

impl Uploads {
    /// How many bytes an interrupted upload has, if there is one.
    pub(super) fn received(&self, name: &str) -> Option<u64> {
        Some(self.0.lock().uploads.get(name)?.1.received())
    }

    /// Takes an interrupted upload up again.
    pub(super) fn take(&self, name: &str) -> Option<Upload> {
        Some(self.0.lock().uploads.remove(name)?.1)
    }

    fn keep(&self, name: String, upload: Upload) {
        let mut interrupted = self.0.lock();
        interrupted.clock += 1;
        let now = interrupted.clock;
        interrupted.uploads.insert(name, (now, upload));
        if interrupted.uploads.len() > MOST_INTERRUPTED {
            let oldest = interrupted.uploads.iter().min_by_key(|(_, (kept, _))| *kept);
            if let Some(name) = oldest.map(|(name, _)| name.clone()) {
                interrupted.uploads.remove(&name);
            }
        }
    }
}

/// An upload that is kept for its client to resume when this is dropped, as it is with a broken call.
pub(super) struct Resumable {
    name: String,
    upload: Option<Upload>,
    uploads: Uploads,
}

impl Resumable {
    pub(super) fn new(name: String, upload: Upload, uploads: &Uploads) -> Self {
        Self {
            name,
            upload: Some(upload),
            uploads: uploads.clone(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The upload, unless it was taken out.
    pub(super) const fn get(&mut self) -> Option<&mut Upload> {
        self.upload.as_mut()
    }

    /// Takes it out, so that it is not kept.
    pub(super) const fn take(&mut self) -> Option<Upload> {
        self.upload.take()
    }
}

impl Drop for Resumable {
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            self.uploads.keep(std::mem::take(&mut self.name), upload);
        }
    }
}
