//! The admin port: is the daemon alive, is it ready, what has it counted.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{metrics::Metrics, record::Record};

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

    /// Serves until the token is cancelled.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) -> std::io::Result<()> {
        let router = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .with_state(self);
        axum::serve(listener, router)
            .with_graceful_shutdown(async move { shutdown.cancelled().await })
            .await
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
        format!("ready; the record is degraded: {:?}\n", health.state).into_response()
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], admin.metrics.render()).into_response()
}
