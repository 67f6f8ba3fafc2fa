//! The admin port: is the daemon alive, is it ready, what has it counted.

use std::sync::Arc;

use axum::{
    Router,
    extract::{Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio_util::sync::CancellationToken;

use crate::{
    doors::{Caller, Door, Incoming, Listening, Protocol},
    metrics::Metrics,
    record::Record,
};

/// What the admin port shows.
#[derive(Clone)]
pub struct Admin {
    metrics: Metrics,
    record: Record,
    ready: Arc<std::sync::atomic::AtomicBool>,
}

impl Admin {
    /// Not ready yet.
    #[must_use]
    pub fn new(metrics: Metrics, record: Record) -> Self {
        Self {
            metrics,
            record,
            ready: Arc::default(),
        }
    }

    /// From now on `/readyz` says so.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, std::sync::atomic::Ordering::Release);
    }

    /// Serves whom the door lets in until the token is cancelled.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(
        self,
        listener: Listening,
        door: Door,
        shutdown: CancellationToken,
    ) -> std::io::Result<()> {
        let listener = Incoming::new(listener, door.clone(), Protocol::Http1);
        let router = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .layer(middleware::from_fn(move |request, next| {
                guard(door.clone(), request, next)
            }))
            .with_state(self);
        axum::serve(listener, router)
            .with_graceful_shutdown(async move { shutdown.cancelled().await })
            .await
    }
}

/// Whose process it is does not matter here: nothing can be changed, and what collects metrics is another user's as a
/// rule.
async fn guard(door: Door, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    match door.rules().judge(Caller::Remote, &path, request.headers_mut()) {
        Ok(()) => next.run(request).await,
        Err(refused) => {
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
            (StatusCode::UNAUTHORIZED, challenge, format!("{refused}\n")).into_response()
        }
    }
}

/// Ready: the doors are open. A degraded record does not stop builds, so it is told and no failure.
async fn ready(State(admin): State<Admin>) -> Response {
    if !admin.ready.load(std::sync::atomic::Ordering::Acquire) {
        return (StatusCode::SERVICE_UNAVAILABLE, "starting or stopping\n").into_response();
    }
    let health = admin.record.health();
    if health.is_ok() {
        "ready\n".into_response()
    } else {
        // No more of it: this is told to everybody who can connect. The log has the reason.
        "ready; the record is degraded\n".into_response()
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], admin.metrics.render()).into_response()
}
