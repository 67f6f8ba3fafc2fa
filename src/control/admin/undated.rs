//! Answers without hyper, which panics where the clock is before 1970 or after 9999, whatever headers it is to write.

use std::{io, time::Duration};

use axum::{Router, body::Body, extract::Request};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tower::ServiceExt as _;

/// Bytes and lines of a request's head, and how long it may take altogether.
const HEAD: usize = 8 << 10;
const LINES: usize = 64;
const TIME: Duration = Duration::from_secs(10);

/// Answers one request, and closes the connection.
pub(super) async fn answer(connection: impl AsyncRead + AsyncWrite + Unpin, router: Router) {
    match tokio::time::timeout(TIME, serve(connection, router)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("a request could not be answered: {error}"),
        Err(_) => tracing::debug!("a request took too long"),
    }
}

async fn serve(mut connection: impl AsyncRead + AsyncWrite + Unpin, router: Router) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() >= HEAD || connection.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    let request = parse(&head).ok_or(io::ErrorKind::InvalidData)?;
    let response = router
        .oneshot(request)
        .await
        .unwrap_or_else(|never| match never {});
    let (parts, body) = response.into_parts();
    let body = axum::body::to_bytes(body, usize::MAX)
        .await
        .map_err(io::Error::other)?;
    let mut out = format!("HTTP/1.1 {}\r\nconnection: close\r\n", parts.status).into_bytes();
    for (name, value) in &parts.headers {
        out.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    if !parts.headers.contains_key("content-length") {
        out.extend(format!("content-length: {}\r\n", body.len()).into_bytes());
    }
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(&body);
    connection.write_all(&out).await?;
    connection.shutdown().await
}

fn parse(head: &[u8]) -> Option<Request> {
    let mut headers = [httparse::EMPTY_HEADER; LINES];
    let mut parsed = httparse::Request::new(&mut headers);
    parsed.parse(head).ok().filter(httparse::Status::is_complete)?;
    let mut request = Request::builder().method(parsed.method?).uri(parsed.path?);
    for header in &*parsed.headers {
        request = request.header(header.name, header.value);
    }
    request.body(Body::empty()).ok()
}

#[cfg(test)]
mod tests {
    use axum::routing::get;

    use super::*;

    #[tokio::test]
    async fn a_request_is_answered_and_what_is_none_is_not() {
        let router = Router::new().route("/healthz", get(|| async { "ok\n" }));
        for (request, expected) in [
            ("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK\r\n"),
            ("GET /x HTTP/1.0\r\n\r\n", "HTTP/1.1 404 Not Found\r\n"),
            ("nonsense\r\n\r\n", ""),
            ("GET /healthz HTTP/1.1\r\nHost", ""),
            (&format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(20_000)), ""),
        ] {
            let (mut client, server) = tokio::io::duplex(64 << 10);
            client.write_all(request.as_bytes()).await.unwrap();
            client.shutdown().await.unwrap();
            answer(server, router.clone()).await;
            let mut answered = String::new();
            client.read_to_string(&mut answered).await.unwrap();
            assert!(answered.starts_with(expected), "{request}: {answered}");
            assert_eq!(answered.is_empty(), expected.is_empty(), "{request}: {answered}");
            assert_eq!(answered.ends_with("\r\n\r\nok\n"), expected.contains("200"));
        }
    }
}
