//! Parts of pages that are sent again when they change (server-sent events), for as long as somebody looks.
//!
//! While a build runs, it is looked at twice a second at most, and less often where a look takes longer; only parts that have
//! changed are sent. Of a list in which nothing runs, nothing is looked at before something happens. For a client that takes
//! nothing, nothing is kept: the next look waits until what was sent before is taken, and the connection ends after a while.

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
    sync::{OwnedSemaphorePermit, watch},
    time::Instant,
};

use super::{Pages, build, builds, timeline};

/// The shortest time between two looks of a page.
const PAUSE: Duration = Duration::from_millis(500);
/// The share of the time that a page's looks may take is one in so many,
const SHARE: u32 = 20;
/// unless it would hear nothing for longer than this.
const LONGEST: Duration = Duration::from_secs(5);
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
        changes: Option<watch::Receiver<()>>,
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

/// The time from a look that took this long to the next one.
fn pause(took: Duration) -> Duration {
    took.saturating_mul(SHARE).clamp(PAUSE, LONGEST)
}

impl Looking {
    /// The next parts that are others than before; `None` when no more can come.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if self.is_over {
                return None;
            }
            self.wait().await;
            let looks = Arc::clone(&self.pages.looks);
            // A look that hangs does not hold the other pages up.
            let turn = tokio::time::timeout(LONGEST, looks.acquire()).await;
            let began = Instant::now();
            let parts = self.look().await?;
            drop(turn);
            self.next = Instant::now() + pause(began.elapsed());
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
            run: false,
            ..
        } = &mut self.what
            && changes.changed().await.is_err()
        {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep_until(self.next).await;
    }

    /// The parts as they are now. `None` if there is nothing to look at.
    async fn look(&mut self) -> Option<Vec<(&'static str, Markup)>> {
        let service = &self.pages.service;
        match &mut self.what {
            What::Builds { limit, changes, run } => {
                // Before the look, so that what changes during it is looked at again.
                if let Some(changes) = changes {
                    changes.borrow_and_update();
                }
                let list = service.invocations(*limit).await;
                *run = list.iter().any(|build| !build.state().is_over()) || changes.is_none();
                Some(vec![("builds", builds::table(&list, *limit))])
            }
            What::Build(id) => {
                let seen = build::Seen::look(service, id).await?;
                self.is_over = seen.invocation.state().is_over();
                let mut parts = Vec::new();
                if self.is_over {
                    parts.push(("outputs", build::list(service, &seen.invocation).await));
                }
                parts.extend(seen.parts());
                if self.is_over || Instant::now() >= self.next_chart {
                    let began = Instant::now();
                    if let Some(chart) = service.timeline(id).await {
                        parts.push(("timeline", timeline::view(&chart)));
                    }
                    self.next_chart = Instant::now() + pause(began.elapsed());
                }
                Some(parts)
            }
        }
    }
}
