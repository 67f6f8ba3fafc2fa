//! Whose process is at the other end of a connection over the loopback interface.
//!
//! Any user of the machine can connect to a loopback port, and what is told there makes us write files with our user's
//! rights. The kernel's tables of TCP sockets (`/proc/self/net/tcp`, proc_pid_net(5)) have the owner of each; the peer's
//! end of the connection is a socket of this machine as well.

use std::{io, net::SocketAddr, time::Duration};

/// The state of a connection that is open at both ends. Others are left out: the kernel calls root the owner of a
/// socket that its process has closed already.
const ESTABLISHED: &str = "01";
/// How often the tables are looked at: they change while they are read, and a line may be missed then.
const TRIES: u32 = 5;

/// What the tables say of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    /// The user whose process has made it.
    User(u32),
    /// Nobody's process has it open.
    Unknown,
    /// They can't say: there are none, or they are about other sockets than ours. Why, in words.
    Untold(String),
}

/// The user of the process that has connected from `peer` to `local`.
///
/// # Errors
/// When the tables could not be read this time.
pub(super) async fn owner(local: SocketAddr, peer: SocketAddr) -> io::Result<Owner> {
    let mut failure = None;
    let mut own_end = false;
    for attempt in 0..TRIES {
        if attempt > 0 {
            tokio::time::sleep(Duration::from_millis(10 * u64::from(attempt))).await;
        }
        let seen = tokio::task::spawn_blocking(move || look(local, peer)).await;
        match seen.map_err(io::Error::other)? {
            Ok(Seen { owner: Some(uid), .. }) => return Ok(Owner::User(uid)),
            Ok(seen) => own_end |= seen.own_end,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
                ) =>
            {
                return Ok(Owner::Untold(error.to_string()));
            }
            // Such as no room for another open file, which comes and goes and must not open a door.
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) => Err(error),
        None if own_end => Ok(Owner::Unknown),
        // A socket keeps the network namespace that it was made in; the tables are those of ours.
        None => Ok(Owner::Untold("the socket is not in the tables".to_owned())),
    }
}

fn look(local: SocketAddr, peer: SocketAddr) -> io::Result<Seen> {
    // An IPv4 connection of a socket that can do both (Java's) is in the second table, which is not there without IPv6.
    let mut all = Seen::default();
    let (mut failure, mut tables) = (None, 0);
    for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        match std::fs::read_to_string(table) {
            Ok(text) => {
                let seen = find(&text, local, peer);
                if seen.owner.is_some() {
                    return Ok(seen);
                }
                all.own_end |= seen.own_end;
                tables += 1;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) => Err(error),
        None if tables == 0 => Err(io::Error::new(io::ErrorKind::NotFound, "no tables of sockets")),
        None => Ok(all),
    }
}

/// What was found in a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Seen {
    /// The owner of the peer's end.
    owner: Option<u32>,
    /// Whether our own end is there, in whatever state: then the table is about this connection.
    own_end: bool,
}

/// The peer's end is the line whose own address is `peer` and whose other one is `local`; ours is the reverse.
fn find(table: &str, local: SocketAddr, peer: SocketAddr) -> Seen {
    let (local, peer) = (canonical(local), canonical(peer));
    let mut seen = Seen::default();
    for line in table.lines().skip(1) {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let mut end = || address(fields.next()?);
        let (Some(own), Some(other)) = (end(), end()) else {
            continue;
        };
        if own == local && other == peer {
            seen.own_end = true;
        } else if own == peer && other == local && fields.next() == Some(ESTABLISHED) {
            // Behind the queues, the timer and the retransmissions.
            seen.owner = fields.nth(3).and_then(|uid| uid.parse().ok());
            if seen.owner.is_some() {
                break;
            }
        }
    }
    seen
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// `0100007F:2319`: words of the address as this machine has them in memory, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (hex, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |n: usize| {
        Some(
            u32::from_str_radix(hex.get(8 * n..8 * n + 8)?, 16)
                .ok()?
                .to_ne_bytes(),
        )
    };
    let ip = match hex.len() {
        8 => std::net::IpAddr::from(word(0)?),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            <[u8; 16]>::try_from(words).ok()?.into()
        }
        _ => return None,
    };
    Some(canonical(SocketAddr::new(ip, port)))
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn the_tables_are_read_as_the_kernel_writes_them() {
        let four = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:2319 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 x 100\n   \
            1: 0100007F:D431 0100007F:2319 01 00000000:00000000 00:00000000 00000000  1000        0 2 1 x 20\n   \
            2: 0100007F:D432 0100007F:2319 04 00000000:00000000 00:00000000 00000000     0        0 0 1 x 20\n";
        let six = "  sl  local_address                         remote_address                        st ...\n   \
            0: 0000000000000000FFFF00000100007F:D433 0000000000000000FFFF00000100007F:2319 01 0:0 00:0 0  1001 0 3\n   \
            1: 00000000000000000000000001000000:D434 00000000000000000000000001000000:2319 01 0:0 00:0 0  1002 0 3\n";
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let local = at("127.0.0.1:8985");
        assert_eq!(find(four, local, at("127.0.0.1:54321")).owner, Some(1000));
        assert_eq!(
            find(four, local, at("127.0.0.1:54322")).owner,
            None,
            "its process has closed it"
        );
        let elsewhere = find(four, at("127.0.0.1:8986"), at("127.0.0.1:54321"));
        assert_eq!(elsewhere, Seen::default());
        // From the other end, the same line is one's own; in any state.
        assert!(find(four, at("127.0.0.1:54321"), local).own_end);
        assert!(find(four, at("127.0.0.1:54322"), local).own_end);
        assert_eq!(find(six, local, at("127.0.0.1:54323")).owner, Some(1001));
        assert_eq!(find(six, at("[::1]:8985"), at("[::1]:54324")).owner, Some(1002));
        for torn in [
            "",
            "\n",
            "x\n 0: 0100007F",
            "x\n 0: 0100007:2319 0100007F:D431 01",
            "x\n 0: a b 01 c",
        ] {
            assert_eq!(find(torn, local, at("127.0.0.1:54321")), Seen::default());
        }
    }

    #[tokio::test]
    async fn a_connection_of_our_own_is_ours() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // Not every machine has IPv6.
            let Ok(listener) = TcpListener::bind(address).await else {
                continue;
            };
            let local = listener.local_addr().unwrap();
            let stream = TcpStream::connect(local).await.unwrap();
            let (_accepted, peer) = listener.accept().await.unwrap();
            let ours = rustix::process::geteuid().as_raw();
            assert_eq!(owner(local, peer).await.unwrap(), Owner::User(ours));
            drop(stream);
            assert_eq!(
                owner(local, peer).await.unwrap(),
                Owner::Unknown,
                "whose it was can't be told any more"
            );
        }
    }

    #[tokio::test]
    async fn tables_without_our_own_end_say_nothing() {
        // As of a socket that was handed over from another network namespace.
        let (local, peer) = ("127.0.0.1:1".parse().unwrap(), "127.0.0.1:2".parse().unwrap());
        let told = owner(local, peer).await.unwrap();
        assert!(matches!(told, Owner::Untold(_)), "{told:?}");
    }
}
