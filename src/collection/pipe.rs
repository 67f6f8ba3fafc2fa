//! From the task that downloads to the thread that writes or unpacks.

use std::{
    io::{self, Read},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::{Buf as _, Bytes};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{Checksum, CollectionError, Wanted};
use crate::{
    digest::{Digest, DigestFunction, Hasher},
    remote::Sink,
    transport::RemoteErrorKind,
};

/// How many bytes wait for the thread: as much as lets it work on while the task that downloads waits for its turn, and the
/// other way round. A larger piece waits alone.
const WAITING: usize = 2 << 20;
/// What a piece counts for at least, in bytes: many small ones take more memory than their bytes.
const LEAST: usize = 16 << 10;

/// Bytes that have come, of all archives together; counted again if an archive is read again.
#[derive(Debug, Default)]
pub(crate) struct Progress(AtomicU64);

impl Progress {
    /// How many there are so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

enum Piece {
    /// Some bytes, and their part of what may wait.
    Bytes(Bytes, OwnedSemaphorePermit),
    End,
}

struct Inlet {
    sender: mpsc::UnboundedSender<Piece>,
    /// For each byte that may still wait.
    room: Arc<Semaphore>,
    progress: Arc<Progress>,
}

impl Inlet {
    fn send(&self, piece: Piece) -> io::Result<()> {
        let sent = self.sender.send(piece);
        sent.map_err(|_| io::Error::other("the bytes were not taken"))
    }

    async fn send_bytes(&self, bytes: Bytes) -> io::Result<()> {
        let length = u32::try_from(bytes.len().clamp(LEAST, WAITING)).unwrap_or(u32::MAX);
        // If the thread has ended, there is room: what waited is gone with it.
        let part = Arc::clone(&self.room).acquire_many_owned(length).await;
        self.send(Piece::Bytes(bytes, part.map_err(io::Error::other)?))
    }
}

#[async_trait]
impl Sink for Inlet {
    async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        self.progress.0.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.send_bytes(bytes).await
    }
}

/// The bytes as they come, for a thread that may wait for them; hashed on the way.
pub(super) struct Outlet {
    receiver: mpsc::UnboundedReceiver<Piece>,
    piece: Bytes,
    /// The piece's part of what may wait.
    part: Option<OwnedSemaphorePermit>,
    has_ended: bool,
    hasher: Hasher,
}

impl Read for Outlet {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.has_ended {
            // What has been read makes room for the next piece.
            self.part = None;
            match self.receiver.blocking_recv() {
                Some(Piece::Bytes(piece, part)) => {
                    self.hasher.update(&piece);
                    (self.piece, self.part) = (piece, Some(part));
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
    let (sender, receiver) = mpsc::unbounded_channel();
    let function = wanted
        .checksum
        .as_ref()
        .map_or(DigestFunction::Sha256, |sum| sum.function());
    let mut outlet = Outlet {
        receiver,
        piece: Bytes::new(),
        part: None,
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
        room: Arc::new(Semaphore::new(WAITING)),
        progress: Arc::clone(progress),
    };
    let mut read = wanted
        .collection
        .read(&wanted.item, &mut inlet)
        .await
        .map_err(Some);
    if read.is_ok() {
        // If nobody takes it, the thread says why.
        read = inlet.send(Piece::End).map_err(|_| None);
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

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    /// How many pieces of a size are taken while nobody reads.
    fn taken(size: usize) -> usize {
        let (sender, _receiver) = mpsc::unbounded_channel();
        let mut inlet = Inlet {
            sender,
            room: Arc::new(Semaphore::new(WAITING)),
            progress: Arc::default(),
        };
        let piece = Bytes::from(vec![0; size]);
        let mut count = 0;
        while let Some(sent) = inlet.write(piece.clone()).now_or_never() {
            sent.unwrap();
            count += 1;
        }
        count
    }

    #[test]
    fn what_waits_is_limited_by_bytes_and_by_number() {
        assert_eq!(taken(WAITING / 8), 8);
        assert_eq!(taken(WAITING), 1);
        assert_eq!(taken(5 * WAITING), 1);
        assert_eq!(taken(1), WAITING / LEAST);
    }

    #[tokio::test]
    async fn a_piece_for_which_there_is_no_room_is_refused_when_the_thread_ends() {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut inlet = Inlet {
            sender,
            room: Arc::new(Semaphore::new(WAITING)),
            progress: Arc::default(),
        };
        let piece = Bytes::from(vec![0; WAITING]);
        inlet.write(piece.clone()).await.unwrap();
        let mut waiting = inlet.write(piece);
        assert!((&mut waiting).now_or_never().is_none());
        drop(receiver);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(60), waiting).await;
        assert!(ended.expect("it ends").is_err());
    }

    #[tokio::test]
    async fn large_pieces_are_read_one_after_the_other() {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut inlet = Inlet {
            sender,
            room: Arc::new(Semaphore::new(WAITING)),
            progress: Arc::default(),
        };
        let mut outlet = Outlet {
            receiver,
            piece: Bytes::new(),
            part: None,
            has_ended: false,
            hasher: Hasher::new(DigestFunction::Sha256),
        };
        let reading = tokio::task::spawn_blocking(move || io::copy(&mut outlet, &mut io::sink()).unwrap());
        let sizes = [WAITING, WAITING / 2 + 1, WAITING, 3 * WAITING];
        for size in sizes {
            let piece = Bytes::from(vec![0; size]);
            let sent = tokio::time::timeout(std::time::Duration::from_secs(60), inlet.write(piece));
            sent.await.expect("there is room in time").unwrap();
        }
        assert!(inlet.send(Piece::End).is_ok());
        assert_eq!(reading.await.unwrap(), sizes.iter().sum::<usize>() as u64);
    }
}
