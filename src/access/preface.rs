//! Connections whose client has to say something first.
//!
//! Pings find a client that is gone, but only from the HTTP/2 preface on. One that goes before it, without a word, or
//! that just never speaks, would keep its connection forever.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, StreamExt as _};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};
use tonic::transport::server::Connected;

/// How long a client may take for its preface. It has nothing to wait for before that.
const PATIENCE: Duration = Duration::from_secs(20);

/// Its length (RFC 9113, section 3.4).
const PREFACE: usize = 24;

/// A connection that fails if the preface does not come.
#[derive(Debug)]
pub(crate) struct AwaitingPreface<S> {
    stream: S,
    /// Until the preface has come: how much of it has not, and when the time is up.
    awaited: Option<(usize, Pin<Box<Sleep>>)>,
}

/// These connections, each with a deadline for its preface. To be polled within the runtime.
pub(crate) fn expect_preface<S, E>(
    incoming: impl Stream<Item = Result<S, E>>,
) -> impl Stream<Item = Result<AwaitingPreface<S>, E>> {
    incoming.map(|accepted| accepted.map(AwaitingPreface::new))
}

impl<S> AwaitingPreface<S> {
    fn new(stream: S) -> Self {
        Self {
            stream,
            awaited: Some((PREFACE, Box::pin(tokio::time::sleep(PATIENCE)))),
        }
    }
}

impl<S: Connected> Connected for AwaitingPreface<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AwaitingPreface<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if let Some((left, deadline)) = &mut self.awaited {
            *left = left.saturating_sub(buffer.filled().len() - before);
            if *left == 0 {
                self.awaited = None;
            } else if read.is_pending() && deadline.as_mut().poll(context).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AwaitingPreface<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::{Instant, sleep, timeout},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_greet_is_let_go() {
        for said in [&b""[..], b"PRI * HTTP/2.0\r\n"] {
            let (mut client, server) = tokio::io::duplex(100);
            client.write_all(said).await.unwrap();
            let began = Instant::now();
            let error = AwaitingPreface::new(server)
                .read_to_end(&mut Vec::new())
                .await
                .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert_eq!(began.elapsed().as_secs(), PATIENCE.as_secs());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_has_greeted_may_be_silent() {
        let (mut client, server) = tokio::io::duplex(100);
        let mut server = AwaitingPreface::new(server);
        let mut preface = [0; PREFACE];
        let came = tokio::join!(server.read_exact(&mut preface), async {
            client.write_all(&[1; 20]).await.unwrap();
            sleep(PATIENCE / 2).await;
            client.write_all(&[1; 4]).await.unwrap();
        });
        came.0.unwrap();
        let silence = timeout(PATIENCE * 10, server.read_u8()).await;
        assert!(silence.is_err(), "{silence:?}");
    }
}
