//! The status page: what [`control`](crate::control) knows of builds, as HTML.
//!
//! Everything is rendered here and comes with the program: no page asks another host for anything. One script makes pages
//! live by server-sent events, brings parts that take longer, and sends what the buttons ask for; without it, pages are
//! complete as of when they were asked for.
//!
//! * `gate`: who may see it, and who may change something.
//! * `builds`, `build`, `outputs`, `timeline`, `caches`, `disk`: one view each, from values to markup.
//! * `live`: parts of pages that are sent again when they change, as long as somebody looks.
//! * `html`: what all views share.

mod build;
mod builds;
mod caches;
mod disk;
mod gate;
mod html;
mod live;
mod outputs;
mod timeline;

use std::sync::Arc;

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, RawQuery, State},
    http::{HeaderMap, StatusCode, header},
    middleware,
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use maud::{Markup, html};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use self::html::{Section, query};
use crate::{access::ListenerRules, control::Service, metrics::Metrics};

/// Bytes of a request's body.
const BODY: usize = 64 << 10;
/// Requests to download something that are under way at a time.
const GETS: usize = 8;
/// Pages that are kept live at a time; the others of the port's connections are for those who come.
const LIVE: usize = 24;

/// What the pages show, and to how many.
#[derive(Clone)]
struct Pages {
    service: Service,
    metrics: Metrics,
    gets: Arc<Semaphore>,
    live: Arc<Semaphore>,
    /// Live pages look at builds one after the other.
    looks: Arc<Semaphore>,
    shutdown: CancellationToken,
}

/// The pages, for those whom the listener's rules let in.
pub(crate) fn router(
    service: Service,
    metrics: Metrics,
    access: ListenerRules,
    shutdown: CancellationToken,
) -> Router {
    let pages = Pages {
        service,
        metrics,
        gets: Arc::new(Semaphore::new(GETS)),
        live: Arc::new(Semaphore::new(LIVE)),
        looks: Arc::new(Semaphore::new(1)),
        shutdown,
    };
    Router::new()
        .route("/", get(builds))
        .route("/live", get(builds_live))
        .route("/build/{id}", get(build))
        .route("/build/{id}/live", get(build_live))
        .route("/build/{id}/targets", get(targets))
        .route("/build/{id}/timeline", get(timeline))
        .route("/outputs", get(outputs))
        .route("/output", get(output))
        .route("/caches", get(caches))
        .route("/disk", get(disk))
        .route("/disk/usage", get(disk_usage))
        .route("/get", post(bring))
        .route("/page.css", get(style))
        .route("/page.js", get(script))
        .fallback(nowhere)
        .layer(DefaultBodyLimit::max(BODY))
        .layer(middleware::from_fn(move |request, next| {
            gate::gate(access.clone(), request, next)
        }))
        .with_state(pages)
}

async fn style() -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/css; charset=utf-8")];
    (content_type, include_str!("page.css")).into_response()
}

async fn script() -> Response {
    let content_type = [(header::CONTENT_TYPE, "text/javascript; charset=utf-8")];
    (content_type, include_str!("page.js")).into_response()
}

fn page(markup: Markup) -> Response {
    Html(markup.into_string()).into_response()
}

async fn nowhere() -> Response {
    not_found("There is no such page.")
}

fn not_found(text: &str) -> Response {
    let body = html! { p.empty { (text) } };
    let markup = html::layout("Not found", Section::None, None, &body);
    (StatusCode::NOT_FOUND, page(markup)).into_response()
}

fn no_build() -> Response {
    not_found("No such build is on record. Builds that are older than the retention period are deleted.")
}

/// A part of a page for the script; all of a page for everyone else.
fn part(headers: &HeaderMap, title: &str, section: Section, body: &Markup) -> Response {
    if headers.contains_key(gate::OWN_HEADER) {
        page(body.clone())
    } else {
        page(html::layout(title, section, None, body))
    }
}

async fn builds(State(pages): State<Pages>, RawQuery(asked): RawQuery) -> Response {
    let limit = builds::limit(&query(asked.as_deref()));
    let list = pages.service.invocations(limit).await;
    let live = format!("/live?limit={limit}");
    let body = builds::view(&list, limit, pages.service.paused().as_ref());
    page(html::layout("Builds", Section::Builds, Some(&live), &body))
}

async fn builds_live(State(pages): State<Pages>, RawQuery(asked): RawQuery) -> Response {
    let limit = builds::limit(&query(asked.as_deref()));
    live::of_builds(pages, limit).into_response()
}

async fn build(State(pages): State<Pages>, Path(id): Path<String>) -> Response {
    let Some(seen) = build::Seen::look(&pages.service, &id).await else {
        return no_build();
    };
    let some = outputs::Wish::of_build(&seen.invocation.invocation_id);
    let found = pages.service.find_outputs(some.query()).await.unwrap_or_default();
    let live = (!seen.invocation.state().is_over()).then(|| format!("{}/live", html::build_path(&id)));
    let title = build::title(&seen.invocation);
    let body = build::view(seen, &found);
    page(html::layout(&title, Section::Builds, live.as_deref(), &body))
}

async fn build_live(State(pages): State<Pages>, Path(id): Path<String>) -> Response {
    live::of_build(pages, id).into_response()
}

async fn targets(
    State(pages): State<Pages>,
    Path(id): Path<String>,
    RawQuery(asked): RawQuery,
    headers: HeaderMap,
) -> Response {
    let Some((invocation, targets)) = pages.service.invocation(&id).await else {
        return no_build();
    };
    let from = query(asked.as_deref()).number("from");
    let body = build::targets(&invocation, targets, from);
    part(&headers, "Targets", Section::Builds, &body)
}

async fn timeline(State(pages): State<Pages>, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let Some(timeline) = pages.service.timeline(&id).await else {
        return no_build();
    };
    part(&headers, "Timeline", Section::Builds, &timeline::view(&timeline))
}

async fn outputs(State(pages): State<Pages>, RawQuery(asked): RawQuery) -> Response {
    let wish = outputs::Wish::read(&query(asked.as_deref()));
    let Some(found) = pages.service.find_outputs(wish.query()).await else {
        return no_build();
    };
    let body = outputs::view(&wish, &found);
    page(html::layout("Outputs", Section::Outputs, None, &body))
}

async fn output(State(pages): State<Pages>, RawQuery(asked): RawQuery) -> Response {
    let path = query(asked.as_deref()).text("path");
    let answers = pages.service.why(vec![path]).await;
    let Some((answer, output)) = answers
        .first()
        .and_then(|answer| Some((answer, answer.output.as_ref()?)))
        .filter(|(_, output)| !output.exec_path.is_empty())
    else {
        return not_found("No recorded build has named this output.");
    };
    let body = outputs::one(output, &answer.lines);
    page(html::layout("Output", Section::Outputs, None, &body))
}

async fn caches(State(pages): State<Pages>) -> Response {
    let report = pages.service.report(caches::request()).await;
    let body = caches::view(&pages.service.caches(), &pages.metrics, &report);
    page(html::layout("Caches", Section::Caches, None, &body))
}

async fn disk() -> Response {
    page(html::layout("Disk", Section::Disk, None, &disk::view()))
}

async fn disk_usage(State(pages): State<Pages>, RawQuery(asked): RawQuery, headers: HeaderMap) -> Response {
    let by = disk::by(&query(asked.as_deref()));
    let usage = pages.service.disk_usage(disk::request(by)).await;
    part(&headers, "Disk", Section::Disk, &disk::usage(by, &usage))
}

/// Downloads recorded outputs, which are in the body as JSON: `{"paths": ["/…"]}`.
async fn bring(State(pages): State<Pages>, body: Bytes) -> Response {
    let Some(paths) = outputs::paths(&body) else {
        let refused =
            "the body must be JSON of the form {\"paths\": [\"/absolute/path\"]}, with at most 100 paths\n";
        return (StatusCode::BAD_REQUEST, refused).into_response();
    };
    let Ok(turn) = pages.gets.acquire_owned().await else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    // On its own: for a caller who hangs up, it still counts, and what came is recorded.
    let asked = tokio::spawn(async move {
        let _turn = turn;
        pages.service.materialize(paths).await
    });
    let Ok(results) = asked.await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let content_type = [(header::CONTENT_TYPE, "application/json")];
    (content_type, outputs::results(&results)).into_response()
}
