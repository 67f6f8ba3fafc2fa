//! From what intake hands over to events that are ready to be sent, in the window.

use std::{collections::VecDeque, future::Future, path::PathBuf, sync::Arc};

use bytes::Bytes;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, watch},
    time::Instant,
};
use tonic::metadata::MetadataMap;

use super::{
    gate::{Gate, Verdict},
    outgoing::{Outgoing, OutgoingEvent},
    rewrite,
    shared::{Inner, Surroundings},
    window::{Kept, Room},
};
use crate::{
    builds::{Builds, StreamEnd, StreamKey},
    journal::{self, FrameAt, RecordKind},
};

/// Events that are in the window already, on their way to its owner.
const READY: usize = 256;

/// The wait before a frame that cannot be read is tried again.
const REREAD: std::time::Duration = std::time::Duration::from_secs(10);

/// What the forwarder gets.
pub(super) enum Ready {
    /// An event, which has its room in the window.
    Event(Kept),
    /// The stream's end so far.
    Ended(End),
}

/// How the forwarder is to leave the stream upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// The build tool was done.
    Finished,
    /// It went away; more may come.
    Broken,
    /// The next event would say what is not true. Nothing more comes.
    Refused,
}

/// Where [`Ready`] things and the client's newest headers come from.
pub(super) struct Source {
    pub(super) ready: mpsc::Receiver<Ready>,
    pub(super) headers: watch::Receiver<MetadataMap>,
}

/// One stream's supply.
pub(super) struct Supply {
    key: StreamKey,
    builds: Arc<dyn Builds>,
    rewrites: bool,
    gate: Gate,
    inbox: Inbox,
    /// The highest number that is known to be upstream or on its way there.
    highest: i64,
    room: Arc<Room>,
    ready: mpsc::Sender<Ready>,
    refused: bool,
}

/// The queue from intake. It is read while something else is waited for, so that it is known when things came, and so
/// that new headers are heard of at once.
struct Inbox {
    queue: mpsc::UnboundedReceiver<Outgoing>,
    closed: bool,
    waiting: VecDeque<(Instant, Outgoing)>,
    /// The newest ones.
    headers: watch::Sender<MetadataMap>,
    /// A client has said something itself, which is newer than what the journal has.
    heard: bool,
}

impl Supply {
    pub(super) fn new(
        around: &Surroundings,
        upstream: &Inner,
        key: &StreamKey,
        acked: i64,
        queue: mpsc::UnboundedReceiver<Outgoing>,
        room: Arc<Room>,
    ) -> (Self, Source) {
        let (ready, events) = mpsc::channel(READY);
        let (headers, newest) = watch::channel(MetadataMap::new());
        let rewrites = upstream.options.rewrite_uris;
        let gate = Gate::new(
            Arc::clone(&around.builds),
            key.clone(),
            around.hold,
            rewrites,
            around.shutdown.clone(),
        );
        let supply = Self {
            key: key.clone(),
            builds: Arc::clone(&around.builds),
            rewrites,
            gate,
            inbox: Inbox {
                queue,
                closed: false,
                waiting: VecDeque::new(),
                headers,
                heard: false,
            },
            highest: acked,
            room,
            ready,
            refused: false,
        };
        let source = Source {
            ready: events,
            headers: newest,
        };
        (supply, source)
    }

    /// Works until the queue is closed and empty.
    pub(super) async fn run(mut self) {
        while let Some((came, outgoing)) = self.inbox.next().await {
            match outgoing {
                // The inbox has passed them on.
                Outgoing::Headers(_) => {}
                Outgoing::Events { events, room } => self.events(came, events, room).await,
                Outgoing::Journaled { file, path, at } => self.frame(came, file, path, at).await,
                Outgoing::Ended(end) => {
                    self.gate.leave();
                    let end = match end {
                        StreamEnd::Finished => End::Finished,
                        StreamEnd::Broken(_) => End::Broken,
                    };
                    self.pass(Ready::Ended(end)).await;
                }
            }
        }
    }

    async fn events(
        &mut self,
        came: Instant,
        events: Vec<OutgoingEvent>,
        room: Option<Arc<OwnedSemaphorePermit>>,
    ) {
        for event in events {
            self.event(came, event).await;
        }
        drop(room);
    }

    /// Reads a frame of the journal back. What cannot be read back cannot be sent, now or later.
    async fn frame(&mut self, came: Instant, file: Arc<std::fs::File>, path: PathBuf, at: FrameAt) {
        let mut logged = false;
        let records = loop {
            let (file, path) = (Arc::clone(&file), path.clone());
            let read = tokio::task::spawn_blocking(move || journal::read_frame(&file, &path, at));
            let why = match read.await {
                Ok(Ok(records)) => break records,
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            };
            // Later events must not go upstream without it; so the rest waits, and the journal stays unfinished.
            if !std::mem::replace(&mut logged, true) {
                tracing::error!(
                    stream = %self.key, error = why,
                    "failed to read events back from the journal; this build is not forwarded until they can \
                     be read"
                );
            }
            self.inbox.meanwhile(tokio::time::sleep(REREAD)).await;
        };
        for record in records {
            match record.kind {
                RecordKind::Event | RecordKind::Finished | RecordKind::Other => {
                    let event = OutgoingEvent {
                        sequence: record.sequence,
                        kind: record.kind,
                        // The record's bytes are a part of the whole frame, which should not stay for them.
                        request: Bytes::copy_from_slice(&record.payload),
                    };
                    self.event(came, event).await;
                }
                RecordKind::Runfile => {}
                RecordKind::Headers => {
                    if let Some(headers) = record.headers() {
                        self.inbox.recovered(headers);
                    }
                }
            }
        }
    }

    async fn event(&mut self, came: Instant, event: OutgoingEvent) {
        let OutgoingEvent {
            sequence,
            kind,
            mut request,
        } = event;
        if self.refused || sequence <= self.highest {
            return;
        }
        self.gate.follow().await;
        if self.gate.holds(&request) {
            let verdict = self.inbox.meanwhile(self.gate.pass(sequence, came)).await;
            if let Verdict::Refuse(why) = verdict {
                tracing::error!(stream = %self.key, sequence, why, "the stream to upstream is cut short (see \
                                                                    --strict)");
                self.refused = true;
                self.gate.leave();
                return self.pass(Ready::Ended(End::Refused)).await;
            }
        }
        if self.rewrites {
            request = self.rewritten(request).await;
        }
        self.highest = sequence;
        let weight = Room::weight(&request);
        if !self.room.try_enter(weight) {
            self.inbox.meanwhile(self.room.enter(weight)).await;
        }
        self.pass(Ready::Event(Kept {
            sequence,
            request,
            last: kind == RecordKind::Finished,
            weight,
        }))
        .await;
    }

    async fn rewritten(&self, request: Bytes) -> Bytes {
        let blobs = rewrite::blobs(&request);
        if blobs.is_empty() {
            return request;
        }
        let local = self.builds.local_files(&self.key, blobs).await;
        rewrite::rewritten(&request, &local).unwrap_or(request)
    }

    async fn pass(&mut self, ready: Ready) {
        let Err(error) = self.ready.try_send(ready) else {
            return;
        };
        // Closed only if the forwarder panicked; then nothing needs to go on.
        let _ = self.inbox.meanwhile(self.ready.send(error.into_inner())).await;
    }
}

impl Inbox {
    async fn next(&mut self) -> Option<(Instant, Outgoing)> {
        self.drain();
        // Headers alone are nothing to wait for.
        while self.waiting.is_empty() && !self.closed {
            match self.queue.recv().await {
                Some(outgoing) => self.take(outgoing),
                None => self.closed = true,
            }
        }
        self.waiting.pop_front()
    }

    fn drain(&mut self) {
        while let Ok(outgoing) = self.queue.try_recv() {
            self.take(outgoing);
        }
    }

    fn take(&mut self, outgoing: Outgoing) {
        if let Outgoing::Headers(headers) = &outgoing {
            self.heard = true;
            self.headers.send_replace(headers.clone());
            return;
        }
        self.waiting.push_back((Instant::now(), outgoing));
    }

    /// What the journal has of a client's headers.
    fn recovered(&self, headers: MetadataMap) {
        if !self.heard {
            self.headers.send_replace(headers);
        }
    }

    /// Reads on while something else is waited for.
    async fn meanwhile<F: Future>(&mut self, future: F) -> F::Output {
        tokio::pin!(future);
        loop {
            tokio::select! {
                biased;
                output = &mut future => return output,
                outgoing = self.queue.recv(), if !self.closed => match outgoing {
                    Some(outgoing) => self.take(outgoing),
                    None => self.closed = true,
                },
            }
        }
    }
}
