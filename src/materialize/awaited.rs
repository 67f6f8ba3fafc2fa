//! Outputs that are requested together, and what has become of them so far.

use std::{sync::Arc, time::Instant};

use tokio::sync::mpsc;

use super::{Completion, Materializer, Session, Want};
use crate::output::{Class, STAMP_AGE};

/// Wants of one session that are awaited by the code that requested them.
pub struct Awaited {
    completed: mpsc::UnboundedReceiver<Vec<Completion>>,
    /// Required outputs that are not settled.
    pub required: usize,
    /// Optional outputs that are not settled.
    pub optional: usize,
    /// When the last completion came.
    last: Option<Instant>,
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
        self.want(&Arc::new(session(completions)), wants).await;
        Awaited {
            completed,
            required,
            optional,
            last: None,
        }
    }
}

impl Awaited {
    /// The next completions; `None` when every want has been answered, or the coordinator is gone.
    pub async fn next(&mut self) -> Option<Vec<Completion>> {
        if self.required + self.optional == 0 {
            return None;
        }
        let list = self.completed.recv().await?;
        self.last = Some(Instant::now());
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
