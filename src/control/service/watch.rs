//! Following one build: which one is meant, and what happens to it until it is settled.

use std::sync::Arc;

use tokio::sync::mpsc;
use tonic::Status;

use super::{Service, show};
use crate::{
    invocation::{
        feed::{Change, InvocationChange},
        watching::Recorded,
    },
    proto::outhaul::v1::{self as pb, watch_invocation_response::Event},
    record::{InvocationRow, TargetRow, Which},
};

/// Invocations that are looked through for the one that is meant.
const LOOKED_AT: usize = 1000;
/// Messages that wait for the listeners. When there are more, it falls behind the engine.
const WAITING: usize = 256;

/// What a follower hears; an error is the last it hears.
pub(crate) type Heard = Result<News, Status>;

/// Something about a build.
#[derive(Debug)]
pub(crate) enum News {
    /// A target as it is now: the one copy that all followers share.
    Target(Arc<TargetRow>),
    /// Any other message.
    Other(Box<Event>),
}

impl From<Event> for News {
    fn from(event: Event) -> Self {
        Self::Other(Box::new(event))
    }
}

impl News {
    /// As the protocol has it.
    pub(crate) fn into_event(self) -> Event {
        match self {
            Self::Target(row) => show::target_event(&row),
            Self::Other(event) => *event,
        }
    }
}

/// A choice, and whether a build is the one that is meant.
struct Chooser {
    choice: pb::InvocationChoice,
    workspace: String,
}

impl Chooser {
    fn new(choice: pb::InvocationChoice) -> Self {
        let workspace = plain(&choice.workspace).to_owned();
        Self { choice, workspace }
    }

    /// Whether an invocation may be meant. A workspace within another has its first build yet to come.
    fn fits(&self, row: &InvocationRow) -> bool {
        row.is_build() && (self.workspace.is_empty() || plain(&row.workspace) == self.workspace)
    }

    /// Of the invocations that have begun, newest first, the one that is meant. Looks at no more of them than it must.
    fn among(&self, rows: impl Iterator<Item = InvocationRow>) -> Option<InvocationRow> {
        if !self.choice.next {
            return Which::default().newest(rows.filter(|row| self.fits(row)));
        }
        let since_ms = self.choice.since_ms;
        rows.take_while(|row| since_ms > 0 && row.started_ms >= since_ms)
            .filter(|row| self.fits(row))
            .last()
    }

    fn nothing(&self) -> Status {
        let choice = &self.choice;
        if choice.next && choice.invocation_id.is_empty() {
            return Status::not_found("no new builds can start");
        }
        let which = Which {
            invocation_id: choice.invocation_id.clone(),
            workspace: choice.workspace.clone(),
        };
        Status::not_found(which.not_recorded())
    }
}

fn plain(path: &str) -> &str {
    path.trim_end_matches('/')
}

impl Service {
    /// Follows an invocation until it is settled. Where `may_come`, one that has not begun is waited for; else the
    /// record is all there is. The channel ends after [`Event::Settled`] or an error.
    pub(crate) fn watch(&self, choice: pb::InvocationChoice, may_come: bool) -> mpsc::Receiver<Heard> {
        let (listener, heard) = mpsc::channel(WAITING);
        let (service, call) = (self.clone(), self.calls.token());
        // First of all, so that once this has returned, nothing begins unheard.
        let changes = self
            .engine
            .as_ref()
            .filter(|_| may_come)
            .map(|engine| engine.subscribe());
        let chooser = Chooser::new(choice);
        tokio::spawn(async move {
            tokio::select! {
                // The caller has gone.
                () = listener.closed() => {}
                () = service.follow(chooser, changes, &listener) => {}
            }
            drop(call);
        });
        heard
    }

    async fn follow(
        &self,
        chooser: Chooser,
        changes: Option<mpsc::UnboundedReceiver<InvocationChange>>,
        listener: &mpsc::Sender<Heard>,
    ) {
        let told = match self.choose(&chooser, changes).await {
            Ok(id) => self.follow_one(&id, listener).await,
            Err(reason) => Err(reason),
        };
        if let Err(reason) = told {
            let _ = listener.send(Err(reason)).await;
        }
    }

    /// The id of the invocation that is meant, once it has begun.
    async fn choose(
        &self,
        chooser: &Chooser,
        mut changes: Option<mpsc::UnboundedReceiver<InvocationChange>>,
    ) -> Result<String, Status> {
        let id = chooser.choice.invocation_id.clone();
        if id.is_empty() {
            if let Some(row) = chooser.among(self.record.scan_invocations().take(LOOKED_AT)) {
                return Ok(row.invocation_id);
            }
        } else if self.now(&id).await.is_some() {
            return Ok(id);
        }
        let Some(changes) = &mut changes else {
            return Err(chooser.nothing());
        };
        while let Some(told) = changes.recv().await {
            if !matches!(told.change, Change::Begun { .. }) {
                continue;
            }
            // The record has the row before anybody is told.
            let row = self.record.invocation(&told.invocation_id);
            let is_meant = match id.as_str() {
                // One that goes on after a restart began before.
                "" => row.is_some_and(|row| chooser.fits(&row) && row.started_ms >= chooser.choice.since_ms),
                id => told.invocation_id == id,
            };
            if is_meant {
                return Ok(told.invocation_id);
            }
        }
        Err(chooser.nothing())
    }

    /// An invocation as it is now.
    async fn now(&self, id: &str) -> Option<pb::Invocation> {
        let row = match self.record.invocation(id) {
            Some(row) => row,
            // Its task may be there before its row.
            None => self.engine.as_ref()?.snapshot(id).await?.0,
        };
        Some(self.present(row).await)
    }

    async fn follow_one(&self, id: &str, listener: &mpsc::Sender<Heard>) -> Result<(), Status> {
        let forgotten = || Status::not_found(format!("invocation {id:?} is no longer recorded"));
        let mut first = true;
        loop {
            // In this order: what ends in between is in the record.
            let changes = match &self.engine {
                Some(engine) => engine.watch(id).await,
                None => None,
            };
            let invocation = match &changes {
                // It waits for nothing, so that what comes from now on does not wait for it.
                Some(changes) => {
                    let (row, pending) = changes.now().clone();
                    self.shown(row, pending)
                }
                None => self.now(id).await.ok_or_else(forgotten)?,
            };
            let opening = if first {
                Event::Invocation(invocation.clone())
            } else {
                Event::Lagged(pb::Lagged {})
            };
            first = false;
            if listener.send(Ok(News::from(opening))).await.is_err() {
                return Ok(());
            }
            let Some(mut changes) = changes else {
                self.recorded(id, listener).await;
                let _ = listener.send(Ok(News::from(Event::Settled(invocation)))).await;
                return Ok(());
            };
            while let Some(change) = changes.recv().await {
                let news = match change {
                    Change::Begun { .. } => continue,
                    Change::Target(row) => News::Target(row),
                    Change::Output(ended) => News::from(Event::Output(show::output_end(&ended))),
                    Change::Settled(_) => {
                        let invocation = self.now(id).await.ok_or_else(forgotten)?;
                        let _ = listener.send(Ok(News::from(Event::Settled(invocation)))).await;
                        return Ok(());
                    }
                };
                if listener.send(Ok(news)).await.is_err() {
                    return Ok(());
                }
            }
        }
    }

    /// Sends the recorded targets.
    async fn recorded(&self, id: &str, listener: &mpsc::Sender<Heard>) {
        let mut recorded = Recorded::new(&self.record, id);
        while let Some(rows) = recorded.page().await {
            for row in rows {
                if listener.send(Ok(News::Target(row))).await.is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: &str, workspace: &str, command: &str, started_ms: i64) -> InvocationRow {
        InvocationRow {
            invocation_id: id.to_owned(),
            workspace: workspace.to_owned(),
            command: command.to_owned(),
            started_ms,
            ..InvocationRow::default()
        }
    }

    fn choice(workspace: &str, next: bool, since_ms: i64) -> pb::InvocationChoice {
        pb::InvocationChoice {
            invocation_id: String::new(),
            workspace: workspace.to_owned(),
            next,
            since_ms,
        }
    }

    fn chosen(chooser: &Chooser, rows: &[InvocationRow]) -> Option<String> {
        let row = chooser.among(rows.iter().cloned())?;
        Some(row.invocation_id)
    }

    #[test]
    fn the_newest_build_of_a_workspace_is_meant_and_not_what_builds_nothing() {
        let rows = [
            row("unbegun", "", "", 0),
            row("info", "/w", "info", 40),
            row("b", "/w", "test", 30),
            row("other", "/v", "build", 20),
            row("a", "/w", "build", 10),
        ];
        let newest = |workspace| chosen(&Chooser::new(choice(workspace, false, 0)), &rows);
        assert_eq!(newest("/w").as_deref(), Some("b"));
        assert_eq!(newest("/w/").as_deref(), Some("b"));
        assert_eq!(newest("/v").as_deref(), Some("other"));
        assert_eq!(newest("").as_deref(), Some("b"));
        assert_eq!(newest("/x"), None);
    }

    #[test]
    fn an_imported_build_is_the_newest_only_where_there_are_no_others() {
        let imported = InvocationRow {
            imported: true,
            ..row("imported", "/w", "build", 50)
        };
        let own = row("own", "/w", "build", 10);
        let newest = |rows: &[InvocationRow]| chosen(&Chooser::new(choice("/w", false, 0)), rows);
        assert_eq!(newest(&[imported.clone(), own]).as_deref(), Some("own"));
        let others = row("others", "/v", "build", 10);
        assert_eq!(newest(&[imported, others]).as_deref(), Some("imported"));
    }

    #[test]
    fn the_next_build_is_one_of_the_workspace_that_begins_later() {
        let chooser = Chooser::new(choice("/w", true, 0));
        assert_eq!(chosen(&chooser, &[row("old", "/w", "build", 10)]), None);
        for (workspace, command, fits) in [
            ("/w", "query", false),
            ("/v", "build", false),
            ("/w", "build", true),
            ("/w/", "test", true),
        ] {
            assert_eq!(
                chooser.fits(&row("new", workspace, command, 20)),
                fits,
                "{workspace} {command}"
            );
        }
    }

    #[test]
    fn asking_again_means_what_began_since_it_asked_first() {
        let rows = [
            row("query", "/w", "query", 40),
            row("b", "/w", "build", 30),
            row("elsewhere", "/v", "build", 20),
            row("a", "/w", "build", 10),
        ];
        let since = |ms| chosen(&Chooser::new(choice("/w", true, ms)), &rows);
        assert_eq!(since(20).as_deref(), Some("b"));
        assert_eq!(since(5).as_deref(), Some("a"));
        assert_eq!(since(31), None);
    }
}
