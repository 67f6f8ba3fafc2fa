//! Faults of whatever is between a client and the services: proxies, and the transport itself.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context as TaskContext, Poll, ready},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{Full, StreamBody};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::Service;

use super::{
    context::Shared,
    direct::{BATCH, READ, answer, batch, read},
    faults::RequestFault,
    stats::Rpc,
};

/// What a proxy shows a browser.
const PAGE: &str =
    "<html><head><title>502 Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>";

/// A service behind a connection that has faults.
#[derive(Clone)]
pub(super) struct Wire<S> {
    service: S,
    context: Shared,
}

impl<S> Wire<S> {
    pub(super) const fn new(service: S, context: Shared) -> Self {
        Self { service, context }
    }
}

impl<S> Wire<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    /// What the service answers, or is answered in its place.
    fn answer(
        &mut self,
        request: http::Request<Body>,
    ) -> BoxFuture<'static, Result<http::Response<Body>, Infallible>> {
        let context = self.context.clone();
        match request.uri().path() {
            READ => Box::pin(async move { Ok(answer(read(context, request).await)) }),
            BATCH => Box::pin(async move { Ok(answer(batch(context, request).await)) }),
            _ => Box::pin(self.service.call(request)),
        }
    }
}

impl<S: NamedService> NamedService for Wire<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Wire<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let rpc = rpc(request.uri().path());
        let Some((rpc, fault)) = rpc.and_then(|rpc| Some((rpc, self.context.faults.on_wire(rpc)?))) else {
            return self.answer(request);
        };
        let cut = match fault {
            RequestFault::NoTrailers => Cut::Trailers,
            RequestFault::Reset => Cut::AfterFirst,
            fault => {
                // The service does not see it; it was asked all the same.
                self.context.counters.call(rpc);
                let answer = instead(fault, request.headers());
                return Box::pin(std::future::ready(Ok(answer)));
            }
        };
        let answer = self.answer(request);
        Box::pin(async move {
            let (parts, body) = answer.await?.into_parts();
            let body = Body::new(Broken { body, cut });
            Ok(http::Response::from_parts(parts, body))
        })
    }
}

/// The call of a path; `None` for calls that are not counted.
fn rpc(path: &str) -> Option<Rpc> {
    let (_, method) = path.rsplit_once('/')?;
    Some(match method {
        "GetCapabilities" => Rpc::Capabilities,
        "FindMissingBlobs" => Rpc::FindMissing,
        "BatchReadBlobs" => Rpc::BatchRead,
        "BatchUpdateBlobs" => Rpc::BatchUpdate,
        "GetTree" => Rpc::GetTree,
        "Read" => Rpc::StreamRead,
        "Write" => Rpc::StreamWrite,
        "QueryWriteStatus" => Rpc::QueryWrite,
        "GetActionResult" => Rpc::GetAction,
        "UpdateActionResult" => Rpc::UpdateAction,
        _ => return None,
    })
}

/// The answer that comes instead of the service's.
fn instead(fault: RequestFault, asked: &HeaderMap) -> http::Response<Body> {
    match fault {
        RequestFault::Http(code) => {
            let mut answer = http::Response::new(Body::new(Full::new(Bytes::from_static(PAGE.as_bytes()))));
            *answer.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_GATEWAY);
            let html = HeaderValue::from_static("text/html");
            answer.headers_mut().insert(header::CONTENT_TYPE, html);
            answer
        }
        RequestFault::Babble(code) => babble(code, asked),
        RequestFault::TrailersOnly(code) => Status::new(code, "injected fault").into_http(),
        RequestFault::HugeHead(bytes) => {
            let mut answer = Status::unavailable("injected fault").into_http::<Body>();
            // In pieces: there is a limit to what one header may have before a head is even sent.
            for piece in vec![b'x'; bytes].chunks(8 << 10) {
                if let Ok(value) = HeaderValue::from_bytes(piece) {
                    answer.headers_mut().append("x-huge", value);
                }
            }
            answer
        }
        RequestFault::AbsurdLength => raw(&[&[0, 0xff, 0xff, 0xff, 0xff], &*vec![0x0a; 100]].concat()),
        // A field of wire type 7, which there is not.
        _ => raw(&[0, 0, 0, 0, 2, 0x0f, 0xff]),
    }
}

/// A failure in whose words there is what should be nowhere.
fn babble(code: Code, asked: &HeaderMap) -> http::Response<Body> {
    let mut words = "\u{1b}[31mrefused\r\n\u{0}\u{202e}".to_owned();
    for (name, value) in asked {
        words.push_str(&format!(" {name}={}", String::from_utf8_lossy(value.as_bytes())));
    }
    let mut answer = Status::new(code, "").into_http::<Body>();
    let encoded = utf8_percent_encode(&words, NON_ALPHANUMERIC).to_string();
    if let Ok(value) = HeaderValue::from_str(&encoded) {
        answer.headers_mut().insert(Status::GRPC_MESSAGE, value);
    }
    answer
}

/// An answer of these bytes, with a good end.
fn raw(bytes: &[u8]) -> http::Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert(Status::GRPC_STATUS, HeaderValue::from_static("0"));
    let frames = [
        Frame::data(Bytes::copy_from_slice(bytes)),
        Frame::trailers(trailers),
    ];
    let body = StreamBody::new(futures::stream::iter(frames.map(Ok::<_, Infallible>)));
    let mut answer = http::Response::new(Body::new(body));
    let grpc = HeaderValue::from_static("application/grpc");
    answer.headers_mut().insert(header::CONTENT_TYPE, grpc);
    answer
}

/// Where a good answer is broken.
#[derive(Clone, Copy)]
enum Cut {
    /// Before its trailers.
    Trailers,
    /// After its first frame, by a reset.
    AfterFirst,
    /// Now.
    Now,
}

/// An answer's body, up to where it is broken.
struct Broken {
    body: Body,
    cut: Cut,
}

impl HttpBody for Broken {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Cut::Now = self.cut {
            return Poll::Ready(Some(Err(Status::internal("injected fault: reset"))));
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        match (self.cut, &frame) {
            (Cut::Trailers, Some(Ok(frame))) if frame.is_trailers() => return Poll::Ready(None),
            (Cut::AfterFirst, Some(Ok(_))) => self.cut = Cut::Now,
            _ => {}
        }
        Poll::Ready(frame)
    }
}
