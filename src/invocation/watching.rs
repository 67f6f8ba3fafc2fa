//! Following one build from where it is.

use std::{sync::Arc, vec};

use tokio::{
    sync::{broadcast, mpsc},
    task::spawn_blocking,
};

use super::{
    feed::{Change, Numbered, Report},
    message::{Message, ask},
};
use crate::record::{InvocationRow, Record, TargetRow};

/// Targets that are asked for at once.
pub(crate) const PAGE: usize = 256;

/// How a listener follows a build's task.
pub(super) struct Begun {
    /// What the build had come to, and how many required outputs were still on their way.
    pub(super) now: (InvocationRow, u64),
    /// What changes from now on; nothing of a build that is over.
    pub(super) changes: Option<broadcast::Receiver<Arc<Numbered>>>,
    /// What was reported at its end.
    pub(super) report: Option<Report>,
    /// The first targets, where the task has them.
    pub(super) page: Option<Page>,
    /// The targets, where the task has given them back.
    pub(super) recorded: Option<Recorded>,
}

/// Targets of an invocation as the record has them.
pub struct Recorded(Option<Box<dyn Iterator<Item = TargetRow> + Send>>);

impl Recorded {
    /// Nothing is read yet.
    pub fn new(record: &Record, invocation_id: &str) -> Self {
        Self(Some(Box::new(record.scan_targets(invocation_id))))
    }

    /// The next ones; `None` after the last.
    pub async fn page(&mut self) -> Option<Vec<Arc<TargetRow>>> {
        let mut rows = self.0.take()?;
        let read = spawn_blocking(move || {
            let page: Vec<_> = rows.by_ref().take(PAGE).map(Arc::new).collect();
            (page, rows)
        });
        let (page, rows) = read.await.ok()?;
        self.0 = Some(rows);
        (!page.is_empty()).then_some(page)
    }
}

/// Some of a build's targets, and the number of the last change that they show.
pub(super) struct Page {
    pub(super) rows: Vec<Arc<TargetRow>>,
    pub(super) number: u64,
    /// Whether there may be more after them.
    pub(super) full: bool,
}

/// Hears of one build: its targets so far, then every change. It keeps no more than a page of them, however slowly it is
/// read.
pub struct Watch {
    task: mpsc::Sender<Message>,
    begun: Begun,
    page: vec::IntoIter<Arc<TargetRow>>,
    /// Up to which target pages went, and the last change that they show.
    pages: Vec<(usize, u64)>,
    /// All targets so far were reported.
    all_shown: bool,
}

impl Watch {
    pub(super) fn new(task: mpsc::Sender<Message>, begun: Begun) -> Self {
        let mut watch = Self {
            task,
            begun,
            page: Vec::new().into_iter(),
            pages: Vec::new(),
            all_shown: false,
        };
        if let Some(page) = watch.begun.page.take() {
            watch.show(page);
        }
        watch
    }

    /// What the build had come to when this began, and how many required outputs were still on their way: the changes are
    /// what comes after it.
    pub(crate) const fn now(&self) -> &(InvocationRow, u64) {
        &self.begun.now
    }

    fn show(&mut self, page: Page) {
        let from = self.pages.last().map_or(0, |(end, _)| *end);
        self.all_shown = !page.full;
        self.pages.push((from + PAGE, page.number));
        self.page = page.rows.into_iter();
    }

    /// The next change. The last one is [`Change::Settled`], unless the listener falls behind or the build's task ends.
    pub async fn recv(&mut self) -> Option<Change> {
        loop {
            if let Some(row) = self.page.next() {
                return Some(Change::Target(row));
            }
            if !self.all_shown {
                self.turn().await?;
                continue;
            }
            if let Some(report) = self.begun.report.take() {
                return Some(Change::Settled(Box::new(report)));
            }
            let next = self.begun.changes.as_mut()?.recv().await.ok()?;
            if self.is_new(&next) {
                return Some(next.change.clone());
            }
        }
    }

    /// Gets the next targets.
    async fn turn(&mut self) -> Option<()> {
        if let Some(recorded) = &mut self.begun.recorded {
            let page = recorded.page().await;
            self.all_shown = page.is_none();
            self.page = page.unwrap_or_default().into_iter();
            return Some(());
        }
        let from = self.pages.last().map_or(0, |(end, _)| *end);
        match ask(&self.task, |answer| Message::Page(from, answer)).await? {
            Ok(page) => self.show(page),
            // It was settled meanwhile, and has given them back.
            Err(begun) => {
                self.begun = begun;
                self.pages.clear();
            }
        }
        Some(())
    }

    /// Whether a change is newer than the page that has its target.
    fn is_new(&self, numbered: &Numbered) -> bool {
        let Some(target) = numbered.target else {
            return true;
        };
        let page = self.pages.partition_point(|(end, _)| *end <= target);
        self.pages
            .get(page)
            .is_none_or(|(_, number)| numbered.number > *number)
    }
}
