//! Whose process is at the other end of a connection over the loopback interface.
//!
//! Any user of the machine can connect to a loopback port, and what is sent there makes us write files with our user's
//! rights. The peer's end of the connection is a socket of this machine as well, and the kernel knows whose. It is asked
//! for that socket ([`super::sock_diag`]), or, where a sandbox or an old kernel does not have that, for all
//! ([`super::tables`]).

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::io::Errno;
use tokio::sync::Mutex;

use super::{
    sock_diag::{Found, SockDiag},
    tables::Tables,
};

/// How often the tables are looked at: they change while they are read, and a line may be missed then.
const TRIES: u32 = 5;

/// What the kernel says of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    /// The user whose process has made it.
    User(u32),
    /// Nobody's process has it open.
    Unknown,
    /// It cannot say: it cannot be asked, or knows other sockets than ours only. Why, in words.
    Undetermined(String),
}

/// Says whose connections are. One question is asked at a time, on one thread, however many wait. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Peers(Arc<Mutex<Sources>>);

#[derive(Default)]
struct Sources {
    kernel: Kernel,
    tables: Option<Tables>,
}

#[derive(Default)]
enum Kernel {
    #[default]
    Unasked,
    Open(SockDiag),
    /// It does not answer, and will not.
    Closed,
}

/// What is known after one look.
enum Seen {
    /// The owner was found.
    Owner(Owner),
    /// The peer's end was not there; whether our own was, which says that the tables are about this connection.
    NotYet { own_end: bool },
}

impl Peers {
    /// The user of the process that has connected from `peer` to `local`.
    ///
    /// # Errors
    /// When it could not be found out this time.
    pub(super) async fn owner(&self, local: SocketAddr, peer: SocketAddr) -> io::Result<Owner> {
        let (local, peer) = (canonical(local), canonical(peer));
        let mut failure = None;
        let mut own_end = false;
        for attempt in 0..TRIES {
            if attempt > 0 {
                tokio::time::sleep(Duration::from_millis(10 * u64::from(attempt))).await;
            }
            let came = Instant::now();
            let mut sources = self.0.clone().lock_owned().await;
            let seen = tokio::task::spawn_blocking(move || sources.look(local, peer, came)).await;
            match seen.map_err(io::Error::other)? {
                Ok(Seen::Owner(owner)) => return Ok(owner),
                Ok(Seen::NotYet { own_end: seen }) => own_end |= seen,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                    ) =>
                {
                    return Ok(Owner::Undetermined(error.to_string()));
                }
                // Such as no room for another open file, which comes and goes and must not let anyone in.
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            Some(error) => Err(error),
            None if own_end => Ok(Owner::Unknown),
            None => Ok(elsewhere()),
        }
    }
}

impl Sources {
    /// Blocks, if only for the tables.
    fn look(&mut self, local: SocketAddr, peer: SocketAddr, came: Instant) -> io::Result<Seen> {
        if let Some(owner) = self.kernel.ask(local, peer) {
            return Ok(Seen::Owner(owner));
        }
        let tables = Tables::since(self.tables.take(), came)?;
        let (own, other) = (tables.find(local, peer), tables.find(peer, local));
        self.tables = Some(tables);
        if own.is_some() && matches!(self.kernel, Kernel::Open(_)) {
            // It knows nothing of a connection that is there: the module that knows is missing. Each question would
            // have the system look for it once more.
            self.kernel = Kernel::Closed;
        }
        Ok(match (own, other) {
            (_, Some(end)) if end.established => Seen::Owner(Owner::User(end.uid)),
            (Some(end), _) if !end.established => Seen::Owner(Owner::Unknown),
            _ => Seen::NotYet {
                own_end: own.is_some(),
            },
        })
    }
}

impl Kernel {
    /// Nothing where it does not say.
    fn ask(&mut self, local: SocketAddr, peer: SocketAddr) -> Option<Owner> {
        let asked = match self {
            Self::Unasked => SockDiag::open().and_then(|mut open| {
                let asked = ask(&mut open, local, peer);
                *self = Self::Open(open);
                asked
            }),
            Self::Open(open) => ask(open, local, peer),
            Self::Closed => return None,
        };
        match asked {
            Ok(owner) => owner,
            Err(error) => {
                tracing::debug!("failed to ask the kernel for the user of a connection: {error}");
                // No room at present.
                let passes = Errno::from_io_error(&error).is_some_and(|errno| {
                    [
                        Errno::MFILE,
                        Errno::NFILE,
                        Errno::NOMEM,
                        Errno::NOBUFS,
                        Errno::INTR,
                    ]
                    .contains(&errno)
                });
                *self = if passes { Self::Unasked } else { Self::Closed };
                None
            }
        }
    }
}

fn ask(kernel: &mut SockDiag, local: SocketAddr, peer: SocketAddr) -> io::Result<Option<Owner>> {
    // In another state it calls root the owner: the process has closed its end.
    if let Found::Socket {
        established: true,
        uid,
    } = kernel.find(peer, local)?
    {
        return Ok(Some(Owner::User(uid)));
    }
    Ok(match kernel.find(local, peer)? {
        Found::Socket { .. } => Some(Owner::Unknown),
        Found::Listener => Some(elsewhere()),
        // Perhaps it knows of no TCP socket at all.
        Found::Nothing => None,
    })
}

/// A socket keeps the network namespace that it was made in; the kernel reports those in ours.
fn elsewhere() -> Owner {
    Owner::Undetermined("the socket is not in the tables".to_owned())
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// That asks the kernel, and that cannot.
    fn both() -> [Peers; 2] {
        let tables = Sources {
            kernel: Kernel::Closed,
            tables: None,
        };
        [Peers::default(), Peers(Arc::new(Mutex::new(tables)))]
    }

    #[tokio::test]
    async fn a_connection_of_our_own_is_ours() {
        for (peers, address) in both().into_iter().flat_map(|peers| {
            let and = move |address| (peers.clone(), address);
            ["127.0.0.1:0", "[::1]:0"].map(and)
        }) {
            // Not every machine has IPv6.
            let Ok(listener) = TcpListener::bind(address).await else {
                continue;
            };
            let local = listener.local_addr().unwrap();
            let stream = TcpStream::connect(local).await.unwrap();
            let (_accepted, peer) = listener.accept().await.unwrap();
            let ours = rustix::process::geteuid().as_raw();
            assert_eq!(peers.owner(local, peer).await.unwrap(), Owner::User(ours));
            drop(stream);
            assert_eq!(
                peers.owner(local, peer).await.unwrap(),
                Owner::Unknown,
                "whose it was can't be found out any more"
            );
        }
    }

    #[tokio::test]
    async fn tables_without_our_own_end_say_nothing() {
        // As of a socket that was handed over from another network namespace.
        let (local, peer) = ("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
        for peers in both() {
            let reported = peers.owner(local, peer).await.unwrap();
            assert!(matches!(reported, Owner::Undetermined(_)), "{reported:?}");
        }
    }

    #[tokio::test]
    async fn many_who_come_and_go_are_found_with_few_readings_and_none_where_the_kernel_answers() {
        let [kernel, tables] = both();
        // Neither every kernel nor every sandbox can be asked.
        let mut can_ask = false;
        for peers in [kernel, tables] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let local = listener.local_addr().unwrap();
            let mut gone = Vec::new();
            for _ in 0..100 {
                drop(TcpStream::connect(local).await.unwrap());
                gone.push(listener.accept().await.unwrap());
            }
            if let Ok(mut asked) = SockDiag::open() {
                let found = asked.find(local, gone[0].1);
                can_ask = matches!(found, Ok(Found::Socket { .. })) && !can_ask;
            }
            let asked = gone.iter().map(|(_, peer)| peers.owner(local, *peer));
            for owner in futures::future::join_all(asked).await {
                assert_eq!(owner.unwrap(), Owner::Unknown);
            }
            let sources = peers.0.lock().await;
            assert_eq!(matches!(sources.kernel, Kernel::Open(_)), can_ask);
            assert_eq!(sources.tables.is_none(), can_ask);
        }
    }
}
