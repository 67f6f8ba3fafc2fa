//! Simulated connections, as tonic's clients and servers take them.

use std::{
    cell::Cell,
    io,
    net::Ipv4Addr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, stream};
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Channel, Endpoint, server::Connected};
use turmoil::net::{TcpListener, TcpStream};

use super::Chance;

thread_local! {
    // A simulation runs on one thread, and one at a time.
    static SEGMENT: Cell<usize> = const { Cell::new(usize::MAX) };
    static RECEIVED: Cell<u64> = const { Cell::new(0) };
}

/// Bytes that connections made by clients have received so far.
pub(crate) fn received() -> u64 {
    RECEIVED.get()
}

/// One end of a simulated connection.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: TcpStream,
    client: bool,
}

/// What the network is like while nothing is wrong with it.
pub(crate) fn network(chance: &mut Chance) -> turmoil::Builder {
    let tick = Duration::from_millis(chance.pick(&[10, 20, 40]));
    let nearest = Duration::from_millis(chance.pick(&[0, 1, 20]));
    SEGMENT.set(chance.pick(&[1400, 16 << 10, 256 << 10]));
    RECEIVED.set(0);
    let mut builder = turmoil::Builder::new();
    builder
        .rng_seed(chance.number())
        .tick_duration(tick)
        .simulation_duration(Duration::from_secs(1 << 30))
        .min_message_latency(nearest)
        .max_message_latency(nearest + Duration::from_millis(chance.pick(&[0, 10, 100])))
        .tcp_capacity(chance.pick(&[64, 1024]));
    if chance.happens(0.5) {
        builder.enable_random_order();
    }
    builder
}

/// Connects to the host and the port of a URI.
pub(crate) fn connector() -> impl tower::Service<
    Uri,
    Response = TokioIo<Wire>,
    Error = io::Error,
    Future = impl Future<Output = io::Result<TokioIo<Wire>>> + Send,
> + Clone
+ Send
+ 'static {
    tower::service_fn(|uri: Uri| async move {
        let place = (uri.host().unwrap_or_default(), uri.port_u16().unwrap_or(80));
        let stream = TcpStream::connect(place).await?;
        Ok(TokioIo::new(Wire { stream, client: true }))
    })
}

/// A channel that connects when it is first used.
pub(crate) fn channel(endpoint: &Endpoint) -> Channel {
    endpoint.connect_with_connector_lazy(connector())
}

/// Connections as they come.
pub(crate) async fn incoming(port: u16) -> io::Result<impl Stream<Item = io::Result<Wire>>> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await?;
    Ok(stream::unfold(listener, async |listener| {
        let accepted = listener.accept().await;
        let wire = accepted.map(|(stream, _)| Wire {
            stream,
            client: false,
        });
        Some((wire, listener))
    }))
}

impl Connected for Wire {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if self.client {
            RECEIVED.set(RECEIVED.get() + (buffer.filled().len() - before) as u64);
        }
        read
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        // The network loses whole writes.
        let segment = &bytes[..bytes.len().min(SEGMENT.get())];
        Pin::new(&mut self.stream).poll_write(context, segment)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
