//! The admin port: is the daemon alive, is it ready, what has it counted; and whatever else is to be served beside that.

use std::{
    net::IpAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Extension, Router,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header, uri::Authority},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use futures::StreamExt as _;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected as _;

use crate::{
    access::{Caller, Connection, Incoming, ListenerRules, Listening, Protocol, places},
    metrics::Metrics,
    record::Record,
    units::has_date,
};

/// How long a request's head may take, and the wait for it on a connection that is kept alive.
const HEAD: Duration = Duration::from_secs(20);
/// Bytes of a head: a browser sends a machine the cookies of all its ports, and pages have paths in their addresses.
const BUFFER: usize = 32 << 10;
/// Connections that are open at a time: at most this part of the files that may be. Everybody on the machine can connect.
const FILES_SHARE: usize = 32;
const CONNECTIONS: usize = 64;
/// How long what is under way may take once the token is cancelled.
const PARTING: Duration = Duration::from_secs(1);

/// What the admin port shows.
#[derive(Clone)]
pub(crate) struct Admin {
    metrics: Metrics,
    record: Record,
    ready: Arc<std::sync::atomic::AtomicBool>,
}

impl Admin {
    /// Not ready yet.
    pub(crate) fn new(metrics: Metrics, record: Record) -> Self {
        Self {
            metrics,
            record,
            ready: Arc::default(),
        }
    }

    /// From now on `/readyz` says so.
    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, std::sync::atomic::Ordering::Release);
    }

    /// Serves whom the listener lets in until the token is cancelled. What is none of its own paths goes to `others`,
    /// which finds the connection's [`crate::access::Origin`] among a request's extensions, and has to judge it.
    pub(crate) async fn serve(
        self,
        listener: Listening,
        access: ListenerRules,
        others: Router,
        shutdown: CancellationToken,
    ) {
        let places = places(FILES_SHARE, CONNECTIONS);
        let mut incoming = Incoming::new(listener, access.clone(), Protocol::Http1, places);
        let router = Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .layer(middleware::from_fn(move |request, next| {
                guard(access.clone(), request, next)
            }))
            .with_state(self)
            .fallback_service(others);
        let mut open = JoinSet::new();
        loop {
            tokio::select! {
                Some(Ok(connection)) = incoming.next() => {
                    open.spawn(converse(connection, router.clone(), shutdown.clone()));
                }
                Some(_) = open.join_next() => {}
                () = shutdown.cancelled() => break,
            }
        }
        drop(incoming);
        while open.join_next().await.is_some() {}
    }
}

/// Answers one connection's requests.
async fn converse(connection: Connection, router: Router, shutdown: CancellationToken) {
    let router = router.layer(Extension(connection.connect_info()));
    let mut serving = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .max_buf_size(BUFFER)
            // hyper panics where the clock is out of what a date can tell.
            .auto_date_header(has_date(SystemTime::now()))
            .serve_connection(TokioIo::new(connection), TowerToHyperService::new(router))
    );
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = shutdown.cancelled() => {
            serving.as_mut().graceful_shutdown();
            let Ok(ended) = tokio::time::timeout(PARTING, serving).await else { return };
            ended
        }
    };
    if let Err(error) = ended {
        tracing::debug!("connection to the admin port: {error}");
    }
}

/// Whether a request is for this port by an address or as `localhost`. Who is led here by a name that is another's (DNS
/// rebinding) has a web page's script read what is answered.
pub(crate) fn is_for_us(request: &Request) -> bool {
    let named = request.headers().get_all(header::HOST).into_iter();
    let mut hosts = named
        .map(|host| host.as_bytes().try_into().ok())
        .chain(request.uri().authority().map(|authority| Some(authority.clone())));
    hosts.all(|host: Option<Authority>| {
        host.is_some_and(|host| !host.as_str().contains('@') && is_ours(host.host()))
    })
}

fn is_ours(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches([']', '.']);
    let name = host.rsplit('.').next().unwrap_or_default();
    host.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost")
}

/// Whose process it is does not matter here: nothing can be changed, and what collects metrics is another user's as a
/// rule. Without a token or TLS, which a web page has not, it must know where it is.
async fn guard(access: ListenerRules, mut request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let rules = access.rules();
    if rules.token.is_none() && rules.tls.is_none() && !rules.other_users && !is_for_us(&request) {
        let refused = "this port only answers requests for its own address or localhost; with \
                       --admin-token-file, TLS or --insecure it also answers to other host names\n";
        return (StatusCode::MISDIRECTED_REQUEST, refused).into_response();
    }
    match rules.judge(Caller::Remote, &path, request.headers_mut()) {
        Ok(()) => next.run(request).await,
        Err(refused) => {
            let challenge = [(header::WWW_AUTHENTICATE, "Bearer")];
            (StatusCode::UNAUTHORIZED, challenge, format!("{refused}\n")).into_response()
        }
    }
}

/// Ready: the listeners are open. A degraded record does not stop builds, so it is told and no failure.
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

/// OpenMetrics for those who ask for it, as Prometheus does; its specification wants the older format for all others.
async fn metrics(State(admin): State<Admin>, headers: HeaderMap) -> Response {
    let mut accepted = headers.get_all(header::ACCEPT).into_iter();
    let is_openmetrics = accepted.any(|accept| {
        let accept = accept.to_str().unwrap_or_default();
        accept.contains("application/openmetrics-text")
    });
    let (content_type, text) = if is_openmetrics {
        let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        (content_type, admin.metrics.render())
    } else {
        (
            "text/plain; version=0.0.4; charset=utf-8",
            admin.metrics.render_classic(),
        )
    };
    ([(header::CONTENT_TYPE, content_type)], text).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        time::Instant,
    };

    use super::*;

    /// What the other end still says.
    async fn rest(client: &mut TcpStream) -> String {
        let mut said = String::new();
        let reading = client.read_to_string(&mut said);
        let _ = tokio::time::timeout(10 * HEAD, reading).await;
        said
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_request_and_none_are_waited_for_to_a_deadline_and_not_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(dir.path()).unwrap();
        let page = Admin::new(Metrics::default(), record);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let access = ListenerRules::default();
        let serving = page.serve(Listening::Tcp(listener), access, Router::new(), stop.clone());
        let serving = tokio::spawn(serving);
        let whole = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n";
        for (said, answer) in [("", ""), ("GET /healthz HTTP/1.1\r\nA: ", ""), (whole, "ok\n")] {
            let mut client = TcpStream::connect(address).await.unwrap();
            let began = Instant::now();
            client.write_all(said.as_bytes()).await.unwrap();
            assert!(rest(&mut client).await.ends_with(answer), "{said}");
            let waited = began.elapsed();
            assert!(waited >= HEAD && waited < HEAD + PARTING, "{said}: {waited:?}");
        }
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET").await.unwrap();
        let began = Instant::now();
        stop.cancel();
        serving.await.unwrap();
        assert!(began.elapsed() <= PARTING);
    }

    #[test]
    fn a_name_that_is_anothers_is_not_ours() {
        let request = |uri: &str, hosts: &[&str]| {
            let mut request = Request::builder().uri(uri);
            for host in hosts {
                request = request.header(header::HOST, *host);
            }
            is_for_us(&request.body(axum::body::Body::empty()).unwrap())
        };
        for host in [
            "127.0.0.1:8986",
            "localhost",
            "LocalHost:8986",
            "localhost.:1",
            "a.localhost",
            "[::1]:8986",
            "10.1.2.3",
        ] {
            assert!(request("/metrics", &[host]), "{host}");
        }
        assert!(request("/metrics", &[]), "HTTP/1.0");
        for host in [
            "evil.example",
            "evil.example:8986",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "notlocalhost",
            "127.0.0.1@evil.example",
            "evil.example@127.0.0.1",
            "",
            "a b",
        ] {
            assert!(!request("/metrics", &[host]), "{host}");
        }
        assert!(!request("/metrics", &["127.0.0.1", "evil.example"]));
        assert!(!request("http://evil.example/metrics", &["127.0.0.1"]));
    }
}
