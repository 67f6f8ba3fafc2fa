//! From the task that downloads to the thread that writes or unpacks.

use std::{
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Buf as _, Bytes};
use futures::{FutureExt as _, future::BoxFuture};
use tokio::sync::mpsc;

use super::{Checksum, CollectionError, Wanted};
use crate::{
    digest::{Digest, DigestFunction, Hasher},
    remote::Sink,
    transport::RemoteErrorKind,
};

/// How many pieces wait for the thread. Servers send pieces of some 100 KiB, local files are read in pieces of 1 MiB.
const WAITING: usize = 4;

/// Bytes that have come, of all archives together; counted again if an archive is read again.
#[derive(Debug, Default)]
pub struct Progress(AtomicU64);

impl Progress {
    /// How many there are so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

enum Piece {
    Bytes(Bytes),
    End,
}

struct Inlet {
    sender: mpsc::Sender<Piece>,
    progress: Arc<Progress>,
}

impl Inlet {
    async fn send(&self, piece: Piece) -> Result<(), String> {
        let sent = self.sender.send(piece).await;
        sent.map_err(|_| "the bytes were not taken".to_owned())
    }
}

impl Sink for Inlet {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), String>> {
        self.progress.0.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.send(Piece::Bytes(bytes)).boxed()
    }
}

/// The bytes as they come, for a thread that may wait for them; hashed on the way.
pub(super) struct Outlet {
    receiver: mpsc::Receiver<Piece>,
    piece: Bytes,
    has_ended: bool,
    hasher: Hasher,
}

impl Read for Outlet {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.has_ended {
            match self.receiver.blocking_recv() {
                Some(Piece::Bytes(piece)) => {
                    self.hasher.update(&piece);
                    self.piece = piece;
                }
                Some(Piece::End) => self.has_ended = true,
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the download did not end",
                    ));
                }
            }
        }
        let length = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

/// Reads an archive and hands its bytes to `work`, on a thread of its own. Gives what that gives, and the digest of all
/// bytes, whether `work` has read them or not; compares it with the archive's checksum.
pub(super) async fn through<T: Send + 'static>(
    wanted: &Wanted,
    progress: &Arc<Progress>,
    work: impl FnOnce(&mut Outlet) -> Result<T, CollectionError> + Send + 'static,
) -> Result<(T, Digest), CollectionError> {
    let (sender, receiver) = mpsc::channel(WAITING);
    let function = wanted
        .checksum
        .as_ref()
        .map_or(DigestFunction::Sha256, |sum| sum.function());
    let mut outlet = Outlet {
        receiver,
        piece: Bytes::new(),
        has_ended: false,
        hasher: Hasher::new(function),
    };
    let name = wanted.address();
    let working = tokio::task::spawn_blocking(move || {
        let made = work(&mut outlet)?;
        io::copy(&mut outlet, &mut io::sink()).map_err(|source| CollectionError::Read { name, source })?;
        Ok((made, outlet.hasher.finish()))
    });
    let mut inlet = Inlet {
        sender,
        progress: Arc::clone(progress),
    };
    let mut read = wanted
        .collection
        .read(&wanted.item, &mut inlet)
        .await
        .map_err(Some);
    if read.is_ok() {
        // If nobody takes it, the thread says why.
        read = inlet.send(Piece::End).await.map_err(|_| None);
    }
    drop(inlet);
    let worked = working.await.unwrap_or_else(|e| {
        Err(CollectionError::Read {
            name: wanted.address(),
            source: io::Error::other(e),
        })
    });
    match (read, worked) {
        // The thread's error is then that the download did not end.
        (Err(Some(error)), _) if error.kind != RemoteErrorKind::Sink => Err(error.into()),
        (_, Err(error)) => Err(error),
        (Err(Some(error)), Ok(_)) => Err(error.into()),
        (_, Ok((made, digest))) => match &wanted.checksum {
            Some(expected) if !expected.fits(&digest) => Err(CollectionError::Wrong {
                name: wanted.address(),
                expected: expected.clone(),
                actual: Checksum::from(&digest),
            }),
            _ => Ok((made, digest)),
        },
    }
}
