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

/// The user of the process that has connected from `peer` to `local`; `None` if there is no such open connection.
///
/// # Errors
/// When the system has no such tables.
pub(super) async fn owner(local: SocketAddr, peer: SocketAddr) -> io::Result<Option<u32>> {
    for attempt in 0..TRIES {
        if attempt > 0 {
            tokio::time::sleep(Duration::from_millis(10 * u64::from(attempt))).await;
        }
        let found = tokio::task::spawn_blocking(move || look(local, peer)).await;
        if let Some(uid) = found.map_err(io::Error::other)?? {
            return Ok(Some(uid));
        }
    }
    Ok(None)
}

fn look(local: SocketAddr, peer: SocketAddr) -> io::Result<Option<u32>> {
    // An IPv4 connection of a socket that can do both (Java's) is in the second table.
    let mut readable = Err(io::ErrorKind::NotFound.into());
    for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
        match std::fs::read_to_string(table) {
            Ok(text) => {
                if let Some(uid) = find(&text, local, peer) {
                    return Ok(Some(uid));
                }
                readable = Ok(None);
            }
            Err(error) => {
                if readable.is_err() {
                    readable = Err(error);
                }
            }
        }
    }
    readable
}

/// The owner that a table tells: from the line whose own end is `peer` and whose other end is `local`.
fn find(table: &str, local: SocketAddr, peer: SocketAddr) -> Option<u32> {
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (own, other, state) = (fields.next()?, fields.next()?, fields.next()?);
        if state != ESTABLISHED || address(own)? != canonical(peer) || address(other)? != canonical(local) {
            return None;
        }
        // Behind the queues, the timer and the retransmissions.
        fields.nth(3)?.parse().ok()
    })
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
        assert_eq!(find(four, local, at("127.0.0.1:54321")), Some(1000));
        assert_eq!(
            find(four, local, at("127.0.0.1:54322")),
            None,
            "its process has closed it"
        );
        assert_eq!(find(four, at("127.0.0.1:8986"), at("127.0.0.1:54321")), None);
        assert_eq!(find(six, local, at("127.0.0.1:54323")), Some(1001));
        assert_eq!(find(six, at("[::1]:8985"), at("[::1]:54324")), Some(1002));
        for torn in [
            "",
            "\n",
            "x\n 0: 0100007F",
            "x\n 0: 0100007:2319 0100007F:D431 01",
            "x\n 0: a b 01 c",
        ] {
            assert_eq!(find(torn, local, at("127.0.0.1:54321")), None);
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
            assert_eq!(owner(local, peer).await.unwrap(), Some(ours));
            drop(stream);
            assert_eq!(
                owner(local, peer).await.unwrap(),
                None,
                "whose it was can't be told any more"
            );
        }
    }
}
