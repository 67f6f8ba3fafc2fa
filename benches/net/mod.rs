//! A slow link: a TCP proxy that holds back what it carries as distance and bandwidth would.
//!
//! Every piece is handed on half a round trip after it came in, and each direction carries no more than a given number of bits a
//! second over all connections together, as one line does. Order is kept, nothing is lost, and there is no slow start:
//! it is a link that TCP has already learned to fill. The clock behind it ticks once a millisecond.

use std::{
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, sleep_until},
};

/// Bytes per read: short enough that connections take turns on a slow line.
const PIECE: usize = 64 * 1024;
/// Bytes of one direction of one connection that may be under way; more than any line here holds at once.
const UNDER_WAY: usize = 64 << 20;
/// How much a line's sender may be ahead of it: a router's queue.
const QUEUE: Duration = Duration::from_millis(10);

/// A running proxy. It ends when this is dropped.
pub(crate) struct Delay {
    addr: SocketAddr,
    _stop: oneshot::Sender<()>,
}

impl Delay {
    /// Starts a proxy in front of `upstream` on a thread of its own, with a round trip of that length and, if given, that many
    /// bits a second in each direction.
    pub(crate) fn start(
        upstream: SocketAddr,
        rtt: Duration,
        bits_per_second: Option<u64>,
    ) -> io::Result<Self> {
        let listener = StdListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let link = |_| Arc::new(Link::new(rtt / 2, bits_per_second));
        let links = [(); 2].map(link);
        thread::Builder::new().name("delay".to_owned()).spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    // Nobody is left who would read an error; the next client notices.
                    _ = accept(listener, upstream, links) => {}
                    _ = stopped => {}
                }
            });
        })?;
        Ok(Self { addr, _stop: stop })
    }

    /// Where it listens.
    pub(crate) const fn addr(&self) -> SocketAddr {
        self.addr
    }
}

async fn accept(listener: StdListener, upstream: SocketAddr, links: [Arc<Link>; 2]) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        let (client, _) = listener.accept().await?;
        let [up, down] = links.clone();
        tokio::spawn(async move {
            // A connection that can't be made is closed again, as seen from the client.
            let Ok(server) = TcpStream::connect(upstream).await else {
                return;
            };
            // Only a hint: without it the delays would be longer.
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = server.into_split();
            tokio::join!(
                up.carry(from_client, to_server),
                down.carry(from_server, to_client)
            );
        });
    }
}

/// One direction of the line.
struct Link {
    /// From one end to the other.
    latency: Duration,
    bits_per_second: Option<u64>,
    /// When all that was sent so far has left the sender.
    free: Mutex<Instant>,
}

impl Link {
    fn new(latency: Duration, bits_per_second: Option<u64>) -> Self {
        Self {
            latency,
            bits_per_second,
            free: Mutex::new(Instant::now()),
        }
    }

    /// Sends that many bytes: when they will have left the sender.
    fn send(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        let Some(rate) = self.bits_per_second else {
            return now;
        };
        let took = Duration::from_secs_f64(bytes as f64 * 8.0 / rate as f64);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        *free = (*free).max(now) + took;
        *free
    }

    /// Carries one connection's bytes until either end is gone.
    async fn carry(&self, mut from: OwnedReadHalf, to: OwnedWriteHalf) {
        let (pieces, arriving) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(UNDER_WAY));
        let read = async move {
            loop {
                let mut piece = Vec::with_capacity(PIECE);
                let Ok(length @ 1..) = from.read_buf(&mut piece).await else {
                    return;
                };
                let left = self.send(length);
                let Ok(share) = room.clone().acquire_many_owned(length as u32).await else {
                    return;
                };
                if pieces.send((left + self.latency, piece, share)).is_err() {
                    return;
                }
                if left > Instant::now() + QUEUE {
                    sleep_until(left - QUEUE).await;
                }
            }
        };
        tokio::join!(read, deliver(arriving, to));
    }
}

/// A piece, when it arrives, and its share of what may be under way.
type Arriving = (Instant, Vec<u8>, OwnedSemaphorePermit);

async fn deliver(mut arriving: mpsc::UnboundedReceiver<Arriving>, mut to: OwnedWriteHalf) {
    while let Some((at, piece, _share)) = arriving.recv().await {
        // Sleeping ends at the next tick, half of one late on average.
        let at = at - Duration::from_micros(500);
        if at > Instant::now() {
            sleep_until(at).await;
        }
        if to.write_all(&piece).await.is_err() {
            return;
        }
    }
    // The end of the stream is handed on like its bytes.
    let _ = to.shutdown().await;
}
