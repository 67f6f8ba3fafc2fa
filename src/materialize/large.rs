//! Large blobs: streamed from the cache into a file of their own, hashed on the way.

use std::{io, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};

use super::{
    place::{LargeFile, PlaceError, Placed},
    rate::Pace,
    traced::{asked, end_place, end_stream},
    want::Root,
};
use crate::{
    digest::{Digest, Hasher},
    exec_path::ExecPath,
    remote::{Attribution, BlobStore, Sink},
    telemetry::{Open, Trace, open},
    transport::RemoteError,
};

/// Portions that may wait between the network and the disk.
const PORTIONS: usize = 4;
/// Bytes in a chunk. Many servers send 16 KiB at a time, for which waking a thread is too expensive.
const PORTION: usize = 512 << 10;

/// Why a large blob did not arrive.
pub(super) enum LargeError {
    Remote(RemoteError),
    Place(PlaceError),
    /// It is not wanted any more.
    Cancelled,
}

/// A blob that is streamed.
pub(super) struct Download {
    pub(super) store: Arc<dyn BlobStore>,
    pub(super) digest: Digest,
    pub(super) attribution: Arc<Attribution>,
    /// Another connection than the last time, after bytes that turned out wrong.
    pub(super) avoid: bool,
    pub(super) pace: Pace,
    /// That of the build that asks, if it is traced.
    pub(super) trace: Option<Arc<Trace>>,
}

impl Download {
    /// Streams it into a channel that is closed when this returns.
    async fn stream(&self, portions: mpsc::Sender<Vec<Bytes>>) -> Result<(), RemoteError> {
        let mut span = open(self.trace.as_ref(), "download stream").map(Open::calling);
        let mut pipe = Pipe::new(portions, self.pace.clone());
        let reading = self
            .store
            .read_stream(&self.digest, 0, &self.attribution, self.avoid, &mut pipe);
        let read = asked(span.as_mut(), reading).await;
        if let Some(span) = span {
            end_stream(span, &*self.store, &self.digest, &read);
        }
        if read.is_ok() {
            // If the other end takes nothing more, it reports why.
            let _ = pipe.flush().await;
        }
        read
    }
}

/// Hands bytes to the thread that writes, in portions.
struct Pipe {
    portions: mpsc::Sender<Vec<Bytes>>,
    portion: Vec<Bytes>,
    bytes: usize,
    pace: Pace,
}

impl Pipe {
    const fn new(portions: mpsc::Sender<Vec<Bytes>>, pace: Pace) -> Self {
        Self {
            portions,
            portion: Vec::new(),
            bytes: 0,
            pace,
        }
    }

    /// Hands on what there is.
    async fn flush(&mut self) -> io::Result<()> {
        self.pace.take(self.bytes as u64).await;
        self.bytes = 0;
        self.portions
            .send(std::mem::take(&mut self.portion))
            .await
            .map_err(|_| io::Error::other("failed to write the file"))
    }
}

#[async_trait]
impl Sink for Pipe {
    async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        self.bytes += bytes.len();
        self.portion.push(bytes);
        if self.bytes < PORTION {
            return Ok(());
        }

        self.flush().await
    }
}

/// Streams a blob into the file that `file` is about to yield, verifies and publishes it.
pub(super) async fn fetch(
    download: Download,
    file: oneshot::Receiver<Result<LargeFile, PlaceError>>,
    root: Arc<Root>,
    version: u64,
) -> Result<Placed, LargeError> {
    let file = file
        .await
        .map_err(|_| LargeError::Place(PlaceError::internal("a writer thread is gone")))?
        .map_err(LargeError::Place)?;
    let (portions, written) = mpsc::channel(PORTIONS);
    let writer = tokio::task::spawn_blocking(move || write(file, written));
    let read = download.stream(portions).await;
    // The channel is closed now, so the writer comes to its end.
    let file = match writer.await {
        Ok(file) => file.map_err(LargeError::Place)?,
        Err(_) => {
            return Err(LargeError::Place(PlaceError::internal(
                "writing a large file panicked",
            )));
        }
    };
    read.map_err(LargeError::Remote)?;
    let span = open(download.trace.as_ref(), "place");
    let placed = tokio::task::spawn_blocking(move || file.finish(&root.epoch, version))
        .await
        .unwrap_or_else(|_| Err(PlaceError::internal("publishing a large file panicked")));
    if let Some(span) = span {
        end_place(span, download.digest.size(), std::iter::once(&placed));
    }
    placed.map_err(LargeError::Place)
}

/// Streams a blob, verifies it and keeps nothing of it.
pub(super) async fn read(download: Download, path: ExecPath) -> Result<Placed, LargeError> {
    let digest = &download.digest;
    let (portions, mut received) = mpsc::channel::<Vec<Bytes>>(PORTIONS);
    let mut hasher = Hasher::new(digest.function());
    let hashing = tokio::task::spawn_blocking(move || {
        while let Some(portion) = received.blocking_recv() {
            portion.iter().for_each(|piece| hasher.update(piece));
        }
        hasher.finish()
    });
    let read = download.stream(portions).await;
    let actual = hashing.await;
    read.map_err(LargeError::Remote)?;
    let actual =
        actual.map_err(|_| LargeError::Place(PlaceError::internal("hashing a large blob panicked")))?;
    Placed::nowhere(&path, digest, actual).map_err(LargeError::Place)
}

fn write(mut file: LargeFile, mut portions: mpsc::Receiver<Vec<Bytes>>) -> Result<LargeFile, PlaceError> {
    while let Some(portion) = portions.blocking_recv() {
        for piece in portion {
            file.write(&piece)?;
        }
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::Class;

    #[tokio::test]
    async fn small_pieces_are_handed_on_together() {
        let (portions, mut received) = mpsc::channel(PORTIONS);
        let mut pipe = Pipe::new(portions, Pace::new(None, Class::Required));
        let piece = Bytes::from(vec![1; PORTION / 4]);
        for _ in 0..3 {
            pipe.write(piece.clone()).await.unwrap();
        }
        assert!(received.try_recv().is_err());
        pipe.write(piece.clone()).await.unwrap();
        pipe.write(piece).await.unwrap();
        pipe.flush().await.unwrap();
        let lengths = [received.recv().await, received.recv().await].map(|p| p.map(|p| p.len()));
        assert_eq!(lengths, [Some(4), Some(1)]);
        drop(received);
        assert!(pipe.flush().await.is_err());
    }
}
