//! Hands a service's calls over with their messages counted: see [`super::inbound`].

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::{FutureExt as _, future::BoxFuture, stream};
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::StreamBody;
use parking_lot::Mutex;
use tonic::{Status, body::Body};
use tower::{Layer, Service};

use super::{
    budget::Budget,
    inbound::{Inbound, PREFIX},
};

/// The calls of which the client sends many messages; the service reads them itself.
const STREAMS: &[&str] = &["/PublishBuildToolEventStream"];

/// Counts the messages of a service's calls.
#[derive(Debug, Clone)]
pub(crate) struct CountedLayer {
    /// What they are counted in.
    pub(crate) budget: Budget,
    /// The largest message.
    pub(crate) most: usize,
}

/// A service whose calls' messages are counted.
#[derive(Debug, Clone)]
pub(crate) struct Counted<S> {
    inner: S,
    rule: CountedLayer,
}

/// A call's messages for the service that reads them itself, in the call's extensions.
#[derive(Clone)]
pub(super) struct Handed(Arc<Mutex<Option<Inbound>>>);

impl Handed {
    /// The messages; they are there once.
    pub(super) fn take(&self) -> Option<Inbound> {
        self.0.lock().take()
    }
}

impl<S> Layer<S> for CountedLayer {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted {
            inner,
            rule: self.clone(),
        }
    }
}

impl<S> Service<Request<Body>> for Counted<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (mut parts, body) = request.into_parts();
        let mut inbound = Inbound::new(body, &parts.headers, self.rule.most, self.rule.budget.clone());
        if STREAMS.iter().any(|path| parts.uri.path().ends_with(path)) {
            parts
                .extensions
                .insert(Handed(Arc::new(Mutex::new(Some(inbound)))));
            return self.inner.call(Request::from_parts(parts, Body::empty())).boxed();
        }
        let mut inner = self.inner.clone();
        async move {
            // The library copies it once more.
            inbound.copied();
            let message = match inbound.message().await {
                Ok(message) => message,
                Err(status) => return Ok(refusal(status)),
            };
            let Some(message) = message else {
                return inner.call(Request::from_parts(parts, Body::empty())).await;
            };
            readable(&mut parts.headers);
            let answer = inner
                .call(Request::from_parts(parts, framed(message.bytes)))
                .await;
            drop(message.room);
            answer
        }
        .boxed()
    }
}

fn refusal(status: Status) -> Response<Body> {
    status.into_http()
}

/// The message is not compressed any more.
fn readable(headers: &mut HeaderMap) {
    headers.remove("grpc-encoding");
    headers.remove(http::header::CONTENT_LENGTH);
}

fn framed(message: Bytes) -> Body {
    let mut prefix = [0; PREFIX];
    // No longer than a length can say: it came with one, or was limited when it was decompressed.
    prefix[1..].copy_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    let frames = [Bytes::copy_from_slice(&prefix), message];
    let frames = frames.into_iter().filter(|frame| !frame.is_empty());
    Body::new(StreamBody::new(stream::iter(
        frames.map(|frame| Ok::<_, Status>(Frame::data(frame))),
    )))
}
