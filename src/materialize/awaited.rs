//! Outputs that are requested together, and what has become of them so far.

use std::{sync::Arc, time::Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{Completion, Materializer, Session, Want};
use crate::output::{Class, STAMP_AGE};

/// How far requested outputs are.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Outputs that came to their end, and all.
    pub(crate) outputs: u64,
    pub(crate) all_outputs: u64,
    /// Bytes that were downloaded, and those with the ones that may still have to be.
    pub(crate) bytes: u64,
    pub(crate) all_bytes: u64,
}

impl Counts {
    /// Another output came to its end: so many of its bytes were downloaded.
    const fn end(&mut self, size: u64, downloaded: u64) {
        self.outputs += 1;
        self.bytes = self.bytes.saturating_add(downloaded);
        // What came without a download is not to come any more.
        self.all_bytes = self.all_bytes.saturating_sub(size).saturating_add(downloaded);
    }
}

/// How far requests are, for those who ask meanwhile.
#[derive(Debug, Default)]
pub(crate) struct Counted(Mutex<Counts>);

impl Counted {
    pub(crate) fn now(&self) -> Counts {
        *self.0.lock()
    }
}

/// Wants of one session that are awaited by the code that requested them.
pub struct Awaited {
    completed: mpsc::UnboundedReceiver<Vec<Completion>>,
    /// Required outputs that are not settled.
    pub required: usize,
    /// Optional outputs that are not settled.
    pub optional: usize,
    /// When the last completion came.
    last: Option<Instant>,
    /// All of their bytes.
    bytes: u64,
    /// Who is told how far they are.
    counted: Option<Arc<Counted>>,
}

impl Materializer {
    /// Wants outputs of a session that asks for nothing else; it gets the sender of its completions.
    pub async fn request(
        &self,
        session: impl FnOnce(mpsc::UnboundedSender<Vec<Completion>>) -> Session,
        wants: Vec<Want>,
    ) -> Awaited {
        let (completions, completed) = mpsc::unbounded_channel();
        let required = wants.iter().filter(|want| want.class == Class::Required).count();
        let optional = wants.len() - required;
        let sizes = wants.iter().map(|want| want.content.size());
        let bytes = sizes.fold(0, u64::saturating_add);
        self.want(&Arc::new(session(completions)), wants).await;
        Awaited {
            completed,
            required,
            optional,
            last: None,
            bytes,
            counted: None,
        }
    }
}

impl Awaited {
    /// Adds them to what is counted there, now and when they come to their ends.
    pub(crate) fn counted_by(mut self, counted: Arc<Counted>) -> Self {
        let mut now = counted.0.lock();
        now.all_outputs += (self.required + self.optional) as u64;
        now.all_bytes = now.all_bytes.saturating_add(self.bytes);
        drop(now);
        self.counted = Some(counted);
        self
    }

    /// The next completions; `None` when every want has been answered, or the coordinator is gone.
    pub async fn next(&mut self) -> Option<Vec<Completion>> {
        if self.required + self.optional == 0 {
            return None;
        }
        let list = self.completed.recv().await?;
        self.last = Some(Instant::now());
        if let Some(counted) = &self.counted {
            let mut now = counted.0.lock();
            for end in &list {
                now.end(end.content.size(), end.outcome.bytes());
            }
        }
        let required = list.iter().filter(|end| end.class == Class::Required).count();
        self.required = self.required.saturating_sub(required);
        self.optional = self.optional.saturating_sub(list.len() - required);
        Some(list)
    }

    /// Waits until the stamps of all files that were placed so far may be recorded (see [`STAMP_AGE`]).
    pub async fn stamps(&self) {
        if let Some(last) = self.last {
            tokio::time::sleep(STAMP_AGE.saturating_sub(last.elapsed())).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_without_a_download_is_not_to_come_any_more() {
        let mut counts = Counts {
            all_outputs: 3,
            all_bytes: 600,
            ..Counts::default()
        };
        counts.end(100, 100);
        counts.end(200, 0);
        assert_eq!((counts.outputs, counts.bytes, counts.all_bytes), (2, 100, 400));
        counts.end(300, 300);
        assert_eq!((counts.outputs, counts.bytes, counts.all_bytes), (3, 400, 400));
    }
}
