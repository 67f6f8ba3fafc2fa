//! Large blobs: streamed from the cache into a file of their own, hashed on the way.

use std::sync::Arc;

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture};
use tokio::sync::{mpsc, oneshot};

use super::{
    place::{LargeFile, PlaceError, Placed},
    want::Root,
};
use crate::{
    digest::Digest,
    remote::{Attribution, BlobStore, RemoteError, Sink},
};

/// Pieces that may wait between the network and the disk.
const PIECES: usize = 4;

/// Why a large blob did not arrive.
pub(super) enum LargeError {
    Remote(RemoteError),
    Place(PlaceError),
    /// Nobody wants it any more.
    Cancelled,
}

/// Hands pieces to the thread that writes.
struct Pipe(mpsc::Sender<Bytes>);

impl Sink for Pipe {
    fn write(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), String>> {
        async move {
            self.0
                .send(bytes)
                .await
                .map_err(|_| "the file could not be written".to_owned())
        }
        .boxed()
    }
}

/// Streams a blob into the file that `file` is about to yield, verifies and publishes it.
pub(super) async fn fetch(
    store: Arc<dyn BlobStore>,
    digest: Digest,
    attribution: Arc<Attribution>,
    avoid: bool,
    file: oneshot::Receiver<Result<LargeFile, PlaceError>>,
    root: Arc<Root>,
    version: u64,
) -> Result<Placed, LargeError> {
    let file = file
        .await
        .map_err(|_| LargeError::Place(PlaceError::internal("a writer thread is gone")))?
        .map_err(LargeError::Place)?;
    let (pieces, written) = mpsc::channel(PIECES);
    let writer = tokio::task::spawn_blocking(move || write(file, written));
    let read = store
        .read_stream(&digest, 0, &attribution, avoid, &mut Pipe(pieces))
        .await;
    // The pipe is closed now, so the writer comes to its end.
    let file = match writer.await {
        Ok(file) => file.map_err(LargeError::Place)?,
        Err(_) => {
            return Err(LargeError::Place(PlaceError::internal(
                "writing a large file panicked",
            )));
        }
    };
    read.map_err(LargeError::Remote)?;
    tokio::task::spawn_blocking(move || file.finish(&root.epoch, version))
        .await
        .unwrap_or_else(|_| Err(PlaceError::internal("publishing a large file panicked")))
        .map_err(LargeError::Place)
}

fn write(mut file: LargeFile, mut pieces: mpsc::Receiver<Bytes>) -> Result<LargeFile, PlaceError> {
    while let Some(piece) = pieces.blocking_recv() {
        file.write(&piece)?;
    }
    Ok(file)
}
