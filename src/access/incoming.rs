//! Takes connections at a listener.

use std::{
    future::Future as _,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use futures::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::transport::server::Connected;

use super::{
    ListenerRules, Protocol, Rules,
    peer::{Owner, Peers},
    room::{Call, ConnectionSlot, Room, Visit},
};
use crate::open_files::{self, Want as _};

/// How long it may take until a connection is agreed on, which is mostly TLS.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How long nothing is accepted when the system has no room for another connection.
const NO_ROOM: Duration = Duration::from_millis(100);
/// How often it is looked for connections whose time is up.
const TIDYING: Duration = Duration::from_secs(5);
/// How long a connection of the admin port lasts without a call that was let in, or after the last one. Those that everybody
/// may make take a moment.
const ADMIN: Duration = Duration::from_secs(300);
/// How long a client of the admin port may take nothing of an answer.
const STALL: Duration = Duration::from_secs(60);

/// Who has connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caller {
    /// A process of this machine.
    Process {
        /// User ID of the process.
        uid: u32,
        /// Whether it came by a unix socket.
        unix: bool,
    },
    /// A process of this machine that came over the loopback interface, and nobody says whose.
    Unknown,
    /// Somebody over the network, or one who is treated so because it cannot be found out here who it is.
    Remote,
}

/// What is known of a connection's other end.
#[derive(Clone)]
pub(crate) struct Origin {
    pub(super) caller: Caller,
    /// The rules of the listener when the connection was made. They hold for all of its calls.
    pub(super) rules: Arc<Rules>,
    pub(super) visit: Visit,
}

impl Origin {
    /// Who has connected.
    pub(crate) const fn caller(&self) -> Caller {
        self.caller
    }

    /// A call of this connection was let in. As long as it is under way, the connection keeps its place.
    pub(crate) fn admitted(&self) -> Call {
        self.visit.admitted()
    }
}

/// What connections come from.
#[derive(Debug)]
pub(crate) enum Listening {
    /// A TCP port.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

/// A connection, through TLS if the listener has that.
pub(crate) struct Connection {
    stream: AnyStream,
    origin: Origin,
    /// When it is to end at once.
    leave: Pin<Box<WaitForCancellationFutureOwned>>,
    /// How long the other end may take nothing, if not for ever.
    patience: Option<Duration>,
    /// Until when it may, since it takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Free when all else is dropped.
    _place: ConnectionSlot,
}

impl Connection {
    fn new(
        stream: AnyStream,
        caller: Caller,
        rules: Arc<Rules>,
        protocol: Protocol,
        place: ConnectionSlot,
    ) -> Self {
        Self {
            stream,
            origin: Origin {
                caller,
                rules,
                visit: place.visit(),
            },
            leave: Box::pin(place.leave().cancelled_owned()),
            // A client of gRPC may be stopped in a debugger, and has flow control.
            patience: (protocol == Protocol::Http1).then_some(STALL),
            stalled: None,
            _place: place,
        }
    }

    /// What is written, unless the other end lets it wait and the connection is to end, or lets it wait for too long.
    fn or_leave<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        if self.leave.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        if let Some(patience) = self.patience {
            let stalled = self
                .stalled
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
            ready!(stalled.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        written
    }
}

enum AnyStream {
    Tcp(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    Unix(UnixStream),
}

/// The connections of a listener, each agreed on as its rules say. Dropped, it closes the listener.
pub(crate) struct Incoming {
    listener: Listening,
    access: ListenerRules,
    protocol: Protocol,
    /// Connections that are not agreed on yet.
    agreeing: FuturesUnordered<BoxFuture<'static, Option<Connection>>>,
    peers: Peers,
    room: Room,
    /// One that waits until another has left.
    waiting: Option<AnyStream>,
    /// When it is looked for connections whose time is up, if there are any.
    tidying: Option<Pin<Box<Sleep>>>,
    /// Until when nothing is accepted.
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    /// Accepts connections from now on, at most this many at a time.
    pub(crate) fn new(listener: Listening, access: ListenerRules, protocol: Protocol, places: usize) -> Self {
        let silence = (protocol == Protocol::Http1).then_some(ADMIN);
        Self {
            listener,
            access,
            protocol,
            agreeing: FuturesUnordered::new(),
            peers: Peers::default(),
            room: Room::new(places, silence),
            waiting: None,
            tidying: None,
            pause: None,
        }
    }

    /// Has those leave whose time is up.
    fn poll_tidying(&mut self, cx: &mut Context<'_>) {
        while let Some(tidying) = &mut self.tidying {
            if tidying.as_mut().poll(cx).is_pending() {
                return;
            }
            let again = self.room.tidy(Instant::now());
            self.tidying = again.then(|| Box::pin(tokio::time::sleep(TIDYING)));
        }
    }

    /// After an error of one connection, which is gone already; or of all, and then it helps to have fewer and to wait.
    fn not_accepted(&mut self, error: &io::Error) {
        use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
        if let ConnectionAborted | ConnectionReset | ConnectionRefused | Interrupted = error.kind() {
            return;
        }
        self.room.make_place();
        if error.is_want() {
            tokio::task::spawn_blocking(open_files::spare);
        }
        self.access
            .warn(format_args!("failed to accept a connection: {error}"));
        self.pause = Some(Box::pin(tokio::time::sleep(NO_ROOM)));
    }

    fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<Connection> {
        self.poll_tidying(cx);
        loop {
            match self.agreeing.poll_next_unpin(cx) {
                Poll::Ready(Some(Some(connection))) => return Poll::Ready(connection),
                Poll::Ready(Some(None)) => continue,
                // Looked at again when one of them gets on.
                Poll::Ready(None) | Poll::Pending => {}
            }
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            let stream = match self.waiting.take() {
                Some(stream) => stream,
                None => match ready!(self.listener.poll_accept(cx)) {
                    Ok(stream) => stream,
                    Err(error) => {
                        self.not_accepted(&error);
                        continue;
                    }
                },
            };
            let place = match self.room.poll_enter(cx) {
                Poll::Ready(Some(place)) => place,
                Poll::Pending => {
                    self.waiting = Some(stream);
                    return Poll::Pending;
                }
                // Better than to let it wait for an answer.
                Poll::Ready(None) => {
                    self.access.warn(
                        "refused a connection: the limit of connections to this port is reached, and all of \
                         them have calls in progress",
                    );
                    continue;
                }
            };
            if self.tidying.is_none() {
                self.tidying = Some(Box::pin(tokio::time::sleep(TIDYING)));
                self.poll_tidying(cx);
            }
            match stream {
                AnyStream::Tcp(stream) => {
                    let (access, peers) = (self.access.clone(), self.peers.clone());
                    let taking = take(stream, access, self.protocol, peers, place);
                    self.agreeing.push(taking.boxed());
                }
                AnyStream::Unix(stream) => match caller_of(&stream) {
                    Ok(caller) => {
                        let stream = AnyStream::Unix(stream);
                        let rules = self.access.rules();
                        return Poll::Ready(Connection::new(stream, caller, rules, self.protocol, place));
                    }
                    Err(error) => self.access.warn(format_args!(
                        "refused a connection: failed to determine its user: {error}"
                    )),
                },
                AnyStream::Tls(_) => {}
            }
        }
    }
}

impl Listening {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<AnyStream>> {
        match self {
            Self::Tcp(listener) => listener
                .poll_accept(cx)
                .map_ok(|(stream, _)| AnyStream::Tcp(stream)),
            Self::Unix(listener) => listener
                .poll_accept(cx)
                .map_ok(|(stream, _)| AnyStream::Unix(stream)),
        }
    }
}

async fn take(
    stream: TcpStream,
    access: ListenerRules,
    protocol: Protocol,
    peers: Peers,
    place: ConnectionSlot,
) -> Option<Connection> {
    let agreeing = tokio::time::timeout(HANDSHAKE, agree(stream, &access, protocol, &peers));
    let leave = place.leave();
    let agreed = tokio::select! {
        agreed = agreeing => agreed,
        () = leave.cancelled() => {
            access.warn("closed a connection during its handshake to make room for another: the limit of \
                       connections to this port is reached");
            return None;
        }
    };
    match agreed {
        Ok(Ok((stream, caller, rules))) => Some(Connection::new(stream, caller, rules, protocol, place)),
        Ok(Err(error)) => {
            access.warn(format_args!("refused a connection: {error}"));
            None
        }
        Err(_) => {
            access.warn("refused a connection: its handshake did not finish within 10 s");
            None
        }
    }
}

/// Finds out who has connected over TCP, and agrees on TLS.
async fn agree(
    stream: TcpStream,
    access: &ListenerRules,
    protocol: Protocol,
    peers: &Peers,
) -> io::Result<(AnyStream, Caller, Arc<Rules>)> {
    // Acknowledgements are small, and each is waited for.
    stream.set_nodelay(true)?;
    let rules = access.rules();
    let caller = caller(&stream, peers).await?;
    // Before a word is said: who asks whether there is an event service for them shall not take this for a yes, and who
    // could not be found out gets another try by connecting again. The admin port answers some requests of everybody.
    if protocol == Protocol::Http2 {
        rules
            .receive(caller)
            .map_err(|refused| io::Error::new(io::ErrorKind::PermissionDenied, refused.to_string()))?;
    }
    let stream = match &rules.tls {
        None => AnyStream::Tcp(stream),
        Some(tls) => {
            let acceptor = TlsAcceptor::from(tls.config(protocol));
            AnyStream::Tls(Box::new(acceptor.accept(stream).await?))
        }
    };
    Ok((stream, caller, rules))
}

/// Whose process is at the other end of a unix socket.
fn caller_of(stream: &UnixStream) -> io::Result<Caller> {
    let uid = stream.peer_cred()?.uid();
    Ok(Caller::Process { uid, unix: true })
}

/// Finds out whose process is at the other end, if it is on this machine.
async fn caller(stream: &TcpStream, peers: &Peers) -> io::Result<Caller> {
    let (local, remote) = (stream.local_addr()?, stream.peer_addr()?);
    if !local.ip().to_canonical().is_loopback() {
        return Ok(Caller::Remote);
    }
    Ok(match peers.owner(local, remote).await {
        Ok(Owner::User(uid)) => Caller::Process { uid, unix: false },
        Ok(Owner::Unknown) => Caller::Unknown,
        Ok(Owner::Undetermined(why)) => {
            // A connection that its client has reset is in no table either, and may still hold what it has sent.
            stream.peer_addr()?;
            // No build shall suffer where the system has no such tables.
            tracing::debug!("the users of connections cannot be determined on this system: {why}");
            Caller::Remote
        }
        Err(error) => {
            tracing::debug!("failed to determine the user of a connection: {error}");
            Caller::Unknown
        }
    })
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_connection(cx).map(|connection| Some(Ok(connection)))
    }
}

impl Connected for Connection {
    type ConnectInfo = Origin;

    fn connect_info(&self) -> Origin {
        self.origin.clone()
    }
}

/// The same for whichever stream it is.
macro_rules! any {
    ($self:expr, $stream:ident => $call:expr) => {
        match &mut $self.stream {
            AnyStream::Tcp($stream) => $call,
            AnyStream::Tls($stream) => $call,
            AnyStream::Unix($stream) => $call,
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = any!(self, stream => Pin::new(stream).poll_read(cx, buf));
        if read.is_pending() && self.leave.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = any!(self, stream => Pin::new(stream).poll_write(cx, buf));
        self.or_leave(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = any!(self, stream => Pin::new(stream).poll_flush(cx));
        self.or_leave(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = any!(self, stream => Pin::new(stream).poll_shutdown(cx));
        self.or_leave(cx, shut)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = any!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs));
        self.or_leave(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            AnyStream::Tcp(stream) => stream.is_write_vectored(),
            AnyStream::Tls(stream) => stream.is_write_vectored(),
            AnyStream::Unix(stream) => stream.is_write_vectored(),
        }
    }
}

#[cfg(test)]
mod tests;
