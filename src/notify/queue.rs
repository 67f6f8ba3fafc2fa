//! Documents that wait for one receiver.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::document::Document;

/// A queue with a bound, which loses its oldest documents when it is full: what is newest says most of how things
/// stand. One task takes from it.
#[derive(Debug)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    changed: Notify,
    bound: usize,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: VecDeque<Document>,
    closed: bool,
    /// Whether the document that was taken last is still being delivered.
    under_way: bool,
    /// Documents lost in a row, so that not each of them is worth a line in the log.
    lost: u64,
}

/// How an addition went.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pushed {
    /// There was room.
    Kept,
    /// The oldest was lost. Says how many have been since there was room last.
    Lost(u64),
}

impl Queue {
    pub(super) fn new(bound: usize) -> Self {
        Self {
            inner: Mutex::default(),
            changed: Notify::new(),
            bound,
        }
    }

    /// Adds a document. Never waits.
    pub(super) fn push(&self, document: Document) -> Pushed {
        let mut inner = self.inner.lock();
        let pushed = if inner.waiting.len() >= self.bound {
            inner.waiting.pop_front();
            inner.lost += 1;
            Pushed::Lost(inner.lost)
        } else {
            inner.lost = 0;
            Pushed::Kept
        };
        inner.waiting.push_back(document);
        drop(inner);
        self.changed.notify_one();
        pushed
    }

    /// No more documents come.
    pub(super) fn close(&self) {
        self.inner.lock().closed = true;
        self.changed.notify_one();
    }

    /// The next document; the one before counts as delivered then. `None` when it is closed and empty.
    pub(super) async fn pop(&self) -> Option<Document> {
        loop {
            {
                let mut inner = self.inner.lock();
                inner.under_way = false;
                if let Some(document) = inner.waiting.pop_front() {
                    inner.under_way = true;
                    return Some(document);
                }
                if inner.closed {
                    return None;
                }
            }
            // A permit is kept for what changed in between.
            self.changed.notified().await;
        }
    }

    /// How many have not been delivered yet.
    pub(super) fn undelivered(&self) -> u64 {
        let inner = self.inner.lock();
        inner.waiting.len() as u64 + u64::from(inner.under_way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notify::Event;

    fn document(number: usize) -> Document {
        Document {
            event: Event::TargetSettled,
            invocation_id: "i".to_owned(),
            delivery: number.to_string(),
            body: bytes::Bytes::new(),
        }
    }

    #[tokio::test]
    async fn the_oldest_are_lost_and_the_rest_keeps_its_order() {
        let queue = Queue::new(3);
        let pushed: Vec<Pushed> = (0..5).map(|n| queue.push(document(n))).collect();
        assert_eq!(
            pushed,
            [
                Pushed::Kept,
                Pushed::Kept,
                Pushed::Kept,
                Pushed::Lost(1),
                Pushed::Lost(2)
            ]
        );
        assert_eq!(queue.pop().await.unwrap().delivery, "2");
        assert_eq!(queue.push(document(5)), Pushed::Kept);
        assert_eq!(queue.undelivered(), 4);
        queue.close();
        let mut rest = Vec::new();
        while let Some(document) = queue.pop().await {
            rest.push(document.delivery);
        }
        assert_eq!(rest, ["3", "4", "5"]);
        assert_eq!(queue.undelivered(), 0);
    }

    #[tokio::test]
    async fn who_waits_hears_of_documents_and_of_the_end() {
        let queue = std::sync::Arc::new(Queue::new(3));
        let taker = tokio::spawn({
            let queue = queue.clone();
            async move { (queue.pop().await.map(|d| d.delivery), queue.pop().await.is_none()) }
        });
        tokio::task::yield_now().await;
        queue.push(document(1));
        tokio::task::yield_now().await;
        queue.close();
        assert_eq!(taker.await.unwrap(), (Some("1".to_owned()), true));
    }
}
