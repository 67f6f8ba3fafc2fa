//! Parts of pages that are sent again when they change (server-sent events), for as long as somebody looks.
//!
//! While a build runs, it is looked at twice a second at most, and less often where a look takes longer; only parts that have
//! changed are sent. Of a list in which nothing runs, nothing is looked at before something happens. A client that takes
//! nothing is not asked to: the next look waits until what was sent before is taken.

use std::{
    collections::HashMap,
    convert::Infallible,
    hash::{BuildHasher as _, RandomState},
    sync::Arc,
    time::Duration,
};

use axum::{
    http::StatusCode,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use maud::Markup;
use serde_json::Value;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc::UnboundedReceiver},
    time::Instant,
};

use super::{Pages, build, builds, timeline};
use crate::invocation::feed::InvocationChange;

/// The shortest time between two looks.
const PAUSE: Duration = Duration::from_millis(500);
/// The share of the time that looks may take is one in so many.
const SHARE: u32 = 20;
/// How often a client that hears nothing is written to, so that one that is gone is noticed.
const SIGN: Duration = Duration::from_secs(15);

/// One who looks at a page.
struct Looking {
    pages: Pages,
    what: What,
    /// Hashes of the parts as they were sent last.
    sent: HashMap<&'static str, u64>,
    hasher: RandomState,
    /// Not before then.
    next: Instant,
    /// The chart takes longer than the rest: not before then.
    next_chart: Instant,
    is_over: bool,
    _place: OwnedSemaphorePermit,
}

enum What {
    Builds {
        limit: u32,
        changes: Option<UnboundedReceiver<InvocationChange>>,
        /// Whether some of them are running.
        run: bool,
    },
    Build(String),
}

/// The list of builds.
pub(super) fn of_builds(pages: Pages, limit: u32) -> Response {
    let changes = pages.service.changes();
    let what = What::Builds {
        limit,
        changes,
        // What began between the page and this.
        run: true,
    };
    answer(pages, what)
}

/// One build, until it is over.
pub(super) fn of_build(pages: Pages, id: String) -> Response {
    answer(pages, What::Build(id))
}

fn answer(pages: Pages, what: What) -> Response {
    let Ok(place) = Arc::clone(&pages.live).try_acquire_owned() else {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many live pages are open\n").into_response();
    };
    let now = Instant::now();
    let looking = Looking {
        pages,
        what,
        sent: HashMap::new(),
        hasher: RandomState::new(),
        next: now,
        next_chart: now,
        is_over: false,
        _place: place,
    };
    let events = futures::stream::unfold(looking, |mut looking| async move {
        let shutdown = looking.pages.shutdown.clone();
        let event = tokio::select! {
            event = looking.next() => event?,
            () = shutdown.cancelled() => return None,
        };
        Some((Ok::<_, Infallible>(event), looking))
    });
    let sign = KeepAlive::new().interval(SIGN);
    Sse::new(events).keep_alive(sign).into_response()
}

impl Looking {
    /// The next parts that are others than before; `None` when no more can come.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if self.is_over {
                return None;
            }
            self.wait().await;
            let began = Instant::now();
            let parts = self.look().await?;
            self.next = Instant::now() + PAUSE.max(began.elapsed() * SHARE);
            let mut changed = serde_json::Map::new();
            for (id, markup) in parts {
                let text = markup.into_string();
                let hash = self.hasher.hash_one(&text);
                if self.sent.insert(id, hash) != Some(hash) {
                    changed.insert(id.to_owned(), Value::String(text));
                }
            }
            if self.is_over || !changed.is_empty() {
                let name = if self.is_over { "over" } else { "parts" };
                return Some(
                    Event::default()
                        .event(name)
                        .data(Value::Object(changed).to_string()),
                );
            }
        }
    }

    /// Waits until there may be something new, and until it may be looked at.
    async fn wait(&mut self) {
        if let What::Builds {
            changes: Some(changes),
            run,
            ..
        } = &mut self.what
        {
            if !*run && changes.recv().await.is_none() {
                std::future::pending::<()>().await;
            }
            // What comes meanwhile is seen with it. It must not pile up.
            let until = tokio::time::sleep_until(self.next);
            tokio::pin!(until);
            loop {
                tokio::select! {
                    () = &mut until => break,
                    change = changes.recv() => if change.is_none() {
                        std::future::pending::<()>().await;
                    },
                }
            }
            while changes.try_recv().is_ok() {}
        } else {
            tokio::time::sleep_until(self.next).await;
        }
    }

    /// The parts as they are now. `None` if there is nothing to look at.
    async fn look(&mut self) -> Option<Vec<(&'static str, Markup)>> {
        let service = &self.pages.service;
        match &mut self.what {
            What::Builds { limit, changes, run } => {
                let list = service.invocations(*limit).await;
                *run = list.iter().any(|build| !build.state().is_over()) || changes.is_none();
                Some(vec![("builds", builds::table(&list, *limit))])
            }
            What::Build(id) => {
                let seen = build::Seen::look(service, id).await?;
                self.is_over = seen.invocation.state().is_over();
                let mut parts: Vec<_> = seen.parts().into();
                if self.is_over || Instant::now() >= self.next_chart {
                    let began = Instant::now();
                    if let Some(chart) = service.timeline(id).await {
                        parts.push(("timeline", timeline::view(&chart)));
                    }
                    self.next_chart = Instant::now() + PAUSE.max(began.elapsed() * SHARE);
                }
                Some(parts)
            }
        }
    }
}
