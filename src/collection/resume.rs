//! Reading a file over connections that break.

use std::{fmt::Display, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt as _, stream::BoxStream};

use super::Item;
use crate::{
    remote::{Sink, retry::RetryPolicy},
    transport::{RemoteError, RemoteErrorKind},
    units::show_duration,
};

/// An answer that brings a file's bytes.
pub(crate) struct Opened {
    /// Where in the file its bytes begin: at the offset that was asked for, or at 0 from servers that know no ranges.
    pub(crate) begin: u64,
    /// The size of the whole file in bytes, where the server says so.
    pub(crate) size: Option<u64>,
    /// What is another one when the file has changed, such as its entity tag.
    pub(crate) version: Option<String>,
    /// The bytes, to the end of the file.
    pub(crate) bytes: BoxStream<'static, Result<Bytes, RemoteError>>,
}

/// A source of files that can begin in the middle of one.
#[async_trait]
pub(super) trait Ranged: Send + Sync {
    /// Asks once for a file's bytes from an offset. If `version` is given and the file has another one now, the answer
    /// may begin at 0.
    ///
    /// # Errors
    /// When the source refuses, or cannot be asked.
    async fn open(&self, item: &Item, offset: u64, version: Option<&str>) -> Result<Opened, RemoteError>;

    /// The file's address, for messages; without credentials.
    fn address(&self, item: &Item) -> String;
}

/// How often and how long to try.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    /// The tries after the first.
    pub(crate) retry: RetryPolicy,
    /// How long a server may send nothing.
    pub(crate) idle: Duration,
    /// How many bytes may come of a file whose size the server does not say.
    pub(crate) most: u64,
}

/// Gives a file's bytes to a sink; goes on after a break where it stopped. See [`super::Collection::read`].
///
/// # Errors
/// As there.
pub(crate) async fn read(
    source: &dyn Ranged,
    item: &Item,
    patience: &Patience,
    sink: &mut dyn Sink,
) -> Result<(), RemoteError> {
    let mut reading = Reading {
        source,
        item,
        idle: patience.idle,
        most: patience.most,
        offset: 0,
        size: item.size,
        version: item.etag.clone(),
        sink,
    };
    let mut backoff = patience.retry.start();
    while let Err(error) = reading.attempt().await {
        backoff.resume(error, reading.offset).await?;
    }
    Ok(())
}

struct Reading<'a> {
    source: &'a dyn Ranged,
    item: &'a Item,
    idle: Duration,
    most: u64,
    /// How many of the file's bytes the sink has.
    offset: u64,
    size: Option<u64>,
    version: Option<String>,
    sink: &'a mut dyn Sink,
}

impl Reading<'_> {
    fn error(&self, kind: RemoteErrorKind, message: impl Display) -> RemoteError {
        RemoteError::new(kind, self.source.address(self.item), message)
    }

    fn changed(&self) -> RemoteError {
        self.error(
            RemoteErrorKind::Protocol,
            "the file changed while it was being downloaded",
        )
    }

    fn silent(&self) -> RemoteError {
        let idle = show_duration(self.idle);
        self.error(
            RemoteErrorKind::Timeout,
            format!("the server sent nothing for {idle}"),
        )
    }

    /// One connection, from the offset to the end, however that comes.
    async fn attempt(&mut self) -> Result<(), RemoteError> {
        if self.offset > 0 && self.size == Some(self.offset) {
            return Ok(());
        }
        if self.offset > 0 && self.version.is_none() {
            let message = format!(
                "the connection broke after {} bytes, and the server gives nothing (ETag, Last-Modified) that shows \
                 whether the file is still the same",
                self.offset
            );
            return Err(self.error(RemoteErrorKind::Protocol, message));
        }
        let opened = self.source.open(self.item, self.offset, self.version.as_deref());
        let Ok(opened) = tokio::time::timeout(self.idle, opened).await else {
            return Err(self.silent());
        };
        let opened = opened?;
        self.compare(&opened)?;
        let mut skip = self.offset - opened.begin;
        let mut bytes = opened.bytes;
        loop {
            let Ok(next) = tokio::time::timeout(self.idle, bytes.next()).await else {
                return Err(self.silent());
            };
            let Some(piece) = next else { break };
            let mut piece = piece?;
            let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
            skip -= skipped as u64;
            let piece = piece.split_off(skipped);
            if !piece.is_empty() {
                self.take(piece).await?;
            }
        }
        match self.size {
            Some(size) if self.offset < size => Err(self.error(
                RemoteErrorKind::Unavailable,
                format!("the connection ended after {} of {size} bytes", self.offset),
            )),
            None if skip > 0 => Err(self.changed()),
            _ => Ok(()),
        }
    }

    /// Whether the answer is about the same file as those before it.
    fn compare(&mut self, opened: &Opened) -> Result<(), RemoteError> {
        if opened.begin > self.offset {
            let message = format!(
                "the server sent bytes from {} on instead of {}",
                opened.begin, self.offset
            );
            return Err(self.error(RemoteErrorKind::Protocol, message));
        }
        if opened.begin > 0 && opened.size.or(self.size).is_none() {
            let message = "the server does not say whether its range goes to the end of the file";
            return Err(self.error(RemoteErrorKind::Protocol, message));
        }
        let differ = |before: &Option<String>, now: &Option<String>| before.is_some() && before != now;
        let resized = opened.size.is_some() && self.size.is_some() && opened.size != self.size;
        // Before the first byte, the list may be older than the file.
        if self.offset > 0 && (resized || differ(&self.version, &opened.version)) {
            return Err(self.changed());
        }
        if self.offset == 0 {
            self.version.clone_from(&opened.version);
            self.size = opened.size.or(self.size);
        }
        self.size = self.size.or(opened.size);
        Ok(())
    }

    async fn take(&mut self, piece: Bytes) -> Result<(), RemoteError> {
        let end = self.offset.saturating_add(piece.len() as u64);
        if self.size.is_none() && end > self.most {
            let message = format!(
                "the server does not say how large the file is, and sent more than archive-size={}; allow more with --limit",
                self.most
            );
            return Err(self.error(RemoteErrorKind::Rejected, message));
        }
        if let Some(size) = self.size
            && end > size
        {
            let message = format!("the server sent more than the {size} bytes that it announced");
            return Err(self.error(RemoteErrorKind::Protocol, message));
        }
        let written = self.sink.write(piece).await;
        written.map_err(|reason| self.error(RemoteErrorKind::Sink, reason))?;
        self.offset = end;
        Ok(())
    }
}
