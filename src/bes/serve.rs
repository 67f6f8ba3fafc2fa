//! Serves the Build Event Service, with health and reflection beside it, on any number of listeners.

use std::time::Duration;

use futures::future::join_all;
use tokio_util::sync::CancellationToken;
use tonic::{
    codec::CompressionEncoding,
    service::{LayerExt as _, Routes},
    transport::Server,
};
use tonic_health::server::HealthReporter;
use tower::util::MapResponseLayer;

use super::{
    counted::CountedLayer, limits::BesLimits, listen::BesListener, raw::PublishBuildEventServer,
    server::BesService,
};
use crate::{
    access::{Guard, Incoming, Protocol, dated, expect_preface, places},
    proto::DESCRIPTORS,
};

/// Bytes that a client may send ahead of those that are read, which no budget counts.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// Largest request about health, or of a reflection.
const ASIDE: usize = 64 << 10;
/// Connections of build tools that are open at a time: as many as a quarter of the files that may be, for all listeners.
/// Each has a stream with its journal, and directories that its build's outputs are written to.
const FILES_SHARE: usize = 4;
const CONNECTIONS: usize = 4096;
/// How long connections, and what goes upstream, may take to end after a shutdown; then they are cut.
const DRAIN: Duration = Duration::from_secs(8);

/// Why serving failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The reflection service could not be made from the descriptors.
    #[error("failed to create the reflection service: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// A listener failed.
    #[error("failed to serve build events: {0}")]
    Transport(#[from] tonic::transport::Error),
}

/// The services: build events, health, reflection. The reporter is for taking build events out of health.
///
/// # Errors
/// When the reflection service cannot be made.
pub async fn routes(service: BesService) -> Result<(Routes, HealthReporter), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    let health_service = health_service.max_decoding_message_size(ASIDE);
    health.set_serving::<PublishBuildEventServer<BesService>>().await;
    let reflection =
        || tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(DESCRIPTORS);
    let most = service.limits().message;
    let counted = CountedLayer {
        budget: service.budget(),
        most,
    };
    let events = PublishBuildEventServer::new(service)
        .max_decoding_message_size(most)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Zstd);
    let routes = Routes::new(counted.named_layer(events))
        .add_service(health_service)
        .add_service(reflection().build_v1()?.max_decoding_message_size(ASIDE))
        .add_service(reflection().build_v1alpha()?.max_decoding_message_size(ASIDE));
    Ok((routes, health))
}

/// A server's settings for build tools. Nothing here answers pings with "too many": Bazel sends one a minute while
/// calls are open (`--grpc_keepalive_time`), and this stack limits none.
pub fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(1 << 20)
        // Finds clients that are gone without a word, such as a machine that sleeps.
        .http2_keepalive_interval(Some(Duration::from_secs(60)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
}

/// The same with what clients may ask for.
fn limited(server: Server, limits: BesLimits) -> Server {
    server
        .max_concurrent_streams(limits.streams_per_connection)
        .http2_max_header_list_size(limits.headers)
}

/// Serves the clients that the listeners accept until `shutdown`, then lets every client go ([`BesService::close`]) and
/// returns. Unix sockets' files are removed.
///
/// # Errors
/// When a listener fails; the others are shut down then.
pub async fn serve(
    service: BesService,
    listeners: Vec<BesListener>,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let (routes, health) = routes(service.clone()).await?;
    // A failed listener stops the others, not the caller's token.
    let stop = shutdown.child_token();
    let places = places(FILES_SHARE * listeners.len(), CONNECTIONS);
    let serving = listeners.into_iter().map(|listener| {
        let (listener, access, file) = listener.into_parts();
        let router = limited(server(), service.limits())
            .layer(MapResponseLayer::new(dated))
            .layer(Guard(access.clone()))
            .add_routes(routes.clone());
        let incoming = expect_preface(Incoming::new(listener, access, Protocol::Http2, places));
        let stop = stop.clone();
        async move {
            let stopped = stop.clone().cancelled_owned();
            let served = router.serve_with_incoming_shutdown(incoming, stopped).await;
            drop(file);
            stop.cancel();
            served
        }
    });
    let closing = async {
        stop.cancelled().await;
        health
            .set_not_serving::<PublishBuildEventServer<BesService>>()
            .await;
        service.close().await;
    };
    let drained = async {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    let all = async { tokio::join!(join_all(serving), closing).0 };
    tokio::select! {
        served = all => served.into_iter().collect::<Result<(), _>>().map_err(Into::into),
        () = drained => {
            tracing::warn!("closed connections that did not end in time");
            Ok(())
        }
    }
}
