//! Simulated connections, as tonic's clients and servers take them.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    net::Ipv4Addr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, stream};
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};
use tonic::transport::{Channel, Endpoint, server::Connected};
use turmoil::net::{TcpListener, TcpStream};

use super::Chance;

thread_local! {
    // A simulation runs on one thread, and one at a time.
    static SEGMENT: Cell<usize> = const { Cell::new(usize::MAX) };
    static RECEIVED: Cell<u64> = const { Cell::new(0) };
    /// Connections so far, and how many of them the network has forgotten.
    static MADE: Cell<u64> = const { Cell::new(0) };
    static FORGOTTEN: Cell<u64> = const { Cell::new(0) };
    /// Open ends, by the port of the server and whether it is the client's.
    static OPEN: RefCell<BTreeMap<(u16, Side), usize>> = const { RefCell::new(BTreeMap::new()) };
}

/// Whose end of a connection it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Side {
    Client,
    Server,
}

/// Bytes that connections made by clients have received so far.
pub(crate) fn received() -> u64 {
    RECEIVED.get()
}

/// Ends of connections that are open, on whichever host.
pub(crate) fn open(port: u16, side: Side) -> usize {
    OPEN.with_borrow(|open| open.get(&(port, side)).copied().unwrap_or(0))
}

/// Every connection that there is gets no answer any more, and no error: what is between its ends has forgotten it, as
/// address translators do with those that are idle. New ones work.
pub(crate) fn forget() {
    FORGOTTEN.set(MADE.get());
}

/// One end of a simulated connection.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: TcpStream,
    port: u16,
    side: Side,
    number: u64,
    /// While the other end's buffer is full.
    stuck: Option<Pin<Box<Sleep>>>,
}

/// How long the system tries to get bytes to the other end before the connection breaks. Real ones take some minutes.
const RETRANSMITTED: Duration = Duration::from_secs(100);

impl Wire {
    fn new(stream: TcpStream, port: u16, side: Side) -> Self {
        OPEN.with_borrow_mut(|open| *open.entry((port, side)).or_default() += 1);
        MADE.set(MADE.get() + 1);
        Self {
            stream,
            port,
            side,
            number: MADE.get(),
            stuck: None,
        }
    }

    fn is_forgotten(&self) -> bool {
        self.number <= FORGOTTEN.get()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        OPEN.with_borrow_mut(|open| {
            if let Some(count) = open.get_mut(&(self.port, self.side)) {
                *count = count.saturating_sub(1);
            }
        });
    }
}

/// A network that is the same each time: 100 ms there and back, and a megabyte in that time.
pub(crate) fn plain() -> turmoil::Builder {
    let mut builder = network(&mut Chance::new(0));
    SEGMENT.set(16 << 10);
    let way = Duration::from_millis(50);
    builder
        .tick_duration(Duration::from_millis(10))
        .min_message_latency(way)
        .max_message_latency(way)
        .tcp_capacity(64);
    builder
}

/// What the network is like while nothing is wrong with it.
pub(crate) fn network(chance: &mut Chance) -> turmoil::Builder {
    let tick = Duration::from_millis(chance.pick(&[10, 20, 40]));
    let nearest = Duration::from_millis(chance.pick(&[0, 1, 20]));
    SEGMENT.set(chance.pick(&[1400, 16 << 10, 256 << 10]));
    RECEIVED.set(0);
    MADE.set(0);
    FORGOTTEN.set(0);
    OPEN.with_borrow_mut(BTreeMap::clear);
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
        let port = uri.port_u16().unwrap_or(80);
        let stream = TcpStream::connect((uri.host().unwrap_or_default(), port)).await?;
        Ok(TokioIo::new(Wire::new(stream, port, Side::Client)))
    })
}

/// A channel that connects when it is first used.
pub(crate) fn channel(endpoint: &Endpoint) -> Channel {
    endpoint.connect_with_connector_lazy(connector())
}

/// Connections as they come.
pub(crate) async fn incoming(port: u16) -> io::Result<impl Stream<Item = io::Result<Wire>>> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await?;
    Ok(stream::unfold((listener, port), async |(listener, port)| {
        let accepted = listener.accept().await;
        let wire = accepted.map(|(stream, _)| Wire::new(stream, port, Side::Server));
        Some((wire, (listener, port)))
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
        if self.is_forgotten() {
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if self.side == Side::Client {
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
        if self.is_forgotten() {
            return Poll::Ready(Ok(bytes.len()));
        }
        // The network loses whole writes.
        let segment = &bytes[..bytes.len().min(SEGMENT.get())];
        let written = Pin::new(&mut self.stream).poll_write(context, segment);
        if written.is_ready() {
            self.stuck = None;
            return written;
        }
        let stuck = self
            .stuck
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(RETRANSMITTED)));
        match stuck.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
