//! The kernel's tables of TCP sockets (`/proc/self/net/tcp`, proc_pid_net(5)), for where it cannot be asked for one.
//!
//! They have all sockets of the machine, so one reading serves all who wait for it.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::open_files::patient;

/// The state of a connection that is open at both ends.
const ESTABLISHED: &str = "01";

/// A socket in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line {
    /// Whether the connection is open at both ends.
    pub(super) established: bool,
    /// User ID of the socket's owner.
    pub(super) uid: u32,
}

/// What the tables said at some time.
#[derive(Debug)]
pub(super) struct Tables {
    began: Instant,
    ended: Instant,
    sockets: HashMap<(SocketAddr, SocketAddr), Line>,
}

impl Tables {
    /// Tables that were read after a time, such as that at which a connection was there already: these, or others.
    ///
    /// Reading them takes a quarter of a processor's time at the most. Blocks.
    ///
    /// # Errors
    /// When they could not be read this time, or there are none.
    pub(super) fn since(before: Option<Self>, time: Instant) -> io::Result<Self> {
        let Some(before) = before else {
            return Self::read();
        };
        if before.began >= time {
            return Ok(before);
        }
        let rest = 3 * (before.ended - before.began);
        std::thread::sleep(
            rest.saturating_sub(before.ended.elapsed())
                .min(Duration::from_secs(1)),
        );
        Self::read()
    }

    fn read() -> io::Result<Self> {
        let began = Instant::now();
        let mut sockets = HashMap::new();
        let (mut failure, mut tables) = (None, 0);
        // An IPv4 connection of a socket that can do both (Java's) is in the second table, which is not there without IPv6.
        for table in ["/proc/self/net/tcp", "/proc/self/net/tcp6"] {
            match patient(|| std::fs::read_to_string(table)) {
                Ok(text) => {
                    sockets.extend(lines(&text));
                    tables += 1;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            Some(error) => Err(error),
            None if tables == 0 => Err(io::Error::new(io::ErrorKind::NotFound, "no tables of sockets")),
            None => Ok(Self {
                began,
                ended: Instant::now(),
                sockets,
            }),
        }
    }

    /// The socket whose own address is `own`, and whose other one is `other`.
    pub(super) fn find(&self, own: SocketAddr, other: SocketAddr) -> Option<Line> {
        self.sockets.get(&(own, other)).copied()
    }
}

fn lines(table: &str) -> impl Iterator<Item = ((SocketAddr, SocketAddr), Line)> {
    table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let ends = (address(fields.next()?)?, address(fields.next()?)?);
        let established = fields.next()? == ESTABLISHED;
        // After the queues, the timer and the retransmissions.
        let uid = fields.nth(3)?.parse().ok()?;
        Some((ends, Line { established, uid }))
    })
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
    Some(SocketAddr::new(ip.to_canonical(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn the_tables_are_read_as_the_kernel_writes_them() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:2319 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 x 100\n   \
            1: 0100007F:D431 0100007F:2319 01 00000000:00000000 00:00000000 00000000  1000        0 2 1 x 20\n   \
            2: 0100007F:D432 0100007F:2319 04 00000000:00000000 00:00000000 00000000     0        0 0 1 x 20\n   \
            3: 0000000000000000FFFF00000100007F:D433 0000000000000000FFFF00000100007F:2319 01 0:0 00:0 0  1001 0 3\n   \
            4: 00000000000000000000000001000000:D434 00000000000000000000000001000000:2319 01 0:0 00:0 0  1002 0 3\n";
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let read: HashMap<_, _> = lines(text).collect();
        let find = |own, other| read.get(&(at(own), at(other))).map(|l| (l.established, l.uid));
        assert_eq!(find("127.0.0.1:54321", "127.0.0.1:8985"), Some((true, 1000)));
        assert_eq!(find("127.0.0.1:54322", "127.0.0.1:8985"), Some((false, 0)));
        assert_eq!(find("127.0.0.1:54323", "127.0.0.1:8985"), Some((true, 1001)));
        assert_eq!(find("[::1]:54324", "[::1]:8985"), Some((true, 1002)));
        assert_eq!(find("127.0.0.1:54321", "127.0.0.1:8986"), None);
        assert_eq!(find("127.0.0.1:8985", "127.0.0.1:54321"), None);
        for torn in [
            "",
            "\n",
            "x\n 0: 0100007F",
            "x\n 0: 0100007:2319 0100007F:D431 01",
            "x\n 0: a b 01 c",
            "x\n 0: 0100007F:2319 0100007F:D431 01 0:0 00:0 0",
        ] {
            assert_eq!(lines(torn).count(), 0);
        }
    }

    #[test]
    fn one_reading_serves_all_who_came_before_it() {
        let came = Instant::now();
        let first = Tables::since(None, came).unwrap();
        let began = first.began;
        let same = Tables::since(Some(first), came).unwrap();
        assert_eq!(same.began, began);
        let other = Tables::since(Some(same), Instant::now()).unwrap();
        assert!(other.began > began);
    }
}
