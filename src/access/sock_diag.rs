//! Asks the kernel for one TCP socket (sock_diag(7)), at the cost of two system calls, however many sockets there are.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect,
        netlink::{SOCK_DIAG, SocketAddrNetlink},
        recv, send, socket_with,
    },
};

/// Of `linux/netlink.h`, `linux/sock_diag.h`, `linux/in.h` and `net/tcp_states.h`.
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const IPPROTO_TCP: u8 = 6;
const TCP_ESTABLISHED: u8 = 1;
/// The loopback interface: it has this number in every network namespace. A socket that is bound to it is found as well.
const LOOPBACK: u32 = 1;

/// A message's header (`nlmsghdr`), and what names a socket (`inet_diag_sockid`).
const HEADER: usize = 16;
const ID: usize = 48;
/// Our request (`inet_diag_req_v2`), and what answers it at least (`inet_diag_msg`).
const REQUEST: usize = HEADER + 8 + ID;
const ANSWER: usize = HEADER + 4 + ID + 20;

/// What the kernel has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// The socket.
    Socket {
        /// Whether the connection is open at both ends.
        established: bool,
        /// User ID of the socket's owner.
        uid: u32,
    },
    /// One that takes connections at the first of its addresses, for no socket has this one.
    Listener,
    /// None; or the kernel lacks the module that could say.
    Nothing,
}

/// A netlink socket that only the kernel talks to.
#[derive(Debug)]
pub(super) struct SockDiag {
    socket: OwnedFd,
    requests: u32,
}

impl SockDiag {
    /// # Errors
    /// When the system does not have or allow this, or has no room for another open file.
    pub(super) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(SOCK_DIAG))?;
        // Others' messages are refused from here on.
        connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, requests: 0 })
    }

    /// The TCP socket whose own address is `own`, and whose other one is `other`. Both are of the loopback interface, and
    /// none is an IPv4 address that is written as an IPv6 one.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub(super) fn find(&mut self, own: SocketAddr, other: SocketAddr) -> io::Result<Found> {
        self.requests = self.requests.wrapping_add(1);
        send(
            &self.socket,
            &request(self.requests, own, other),
            SendFlags::empty(),
        )?;
        let mut answer = [0; 1024];
        loop {
            // It is there already: the kernel answers while it is asked.
            let (_, length) = recv(&self.socket, &mut answer, RecvFlags::empty())?;
            let answer = answer.get(..length).ok_or(Errno::MSGSIZE)?;
            if word(answer, 8) == Some(self.requests) {
                return read(answer, own, other);
            }
        }
    }
}

fn request(number: u32, own: SocketAddr, other: SocketAddr) -> Vec<u8> {
    let family = match own.ip() {
        IpAddr::V4(_) => AddressFamily::INET,
        IpAddr::V6(_) => AddressFamily::INET6,
    };
    let mut bytes = Vec::with_capacity(REQUEST);
    bytes.extend((REQUEST as u32).to_ne_bytes());
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    bytes.extend(number.to_ne_bytes());
    bytes.extend(0u32.to_ne_bytes());
    // No more about the socket than the answer has anyway, in whatever state it is.
    bytes.extend([family.as_raw() as u8, IPPROTO_TCP, 0, 0]);
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(own.port().to_be_bytes());
    bytes.extend(other.port().to_be_bytes());
    bytes.extend(padded(own.ip()));
    bytes.extend(padded(other.ip()));
    bytes.extend(LOOPBACK.to_ne_bytes());
    // Whichever socket it is.
    bytes.extend([u8::MAX; 8]);
    bytes
}

fn read(answer: &[u8], own: SocketAddr, other: SocketAddr) -> io::Result<Found> {
    let cut_short = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let kind = answer.get(4..6).ok_or_else(cut_short)?;
    if kind == NLMSG_ERROR.to_ne_bytes() {
        let code = word(answer, HEADER).ok_or_else(cut_short)?;
        let error = io::Error::from_raw_os_error((code as i32).wrapping_neg());
        return if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) {
            Ok(Found::Nothing)
        } else {
            Err(error)
        };
    }
    if kind != SOCK_DIAG_BY_FAMILY.to_ne_bytes() || answer.len() < ANSWER {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let id = &answer[HEADER + 4..HEADER + 4 + ID];
    let is_ipv6 = u16::from(answer[HEADER]) == AddressFamily::INET6.as_raw();
    let end = |port: usize, ip: usize| {
        let port = u16::from_be_bytes([id[port], id[port + 1]]);
        let ip = if is_ipv6 {
            IpAddr::from(<[u8; 16]>::try_from(&id[ip..ip + 16]).ok()?).to_canonical()
        } else {
            IpAddr::from(<[u8; 4]>::try_from(&id[ip..ip + 4]).ok()?)
        };
        Some(SocketAddr::new(ip, port))
    };
    if (end(0, 4), end(2, 20)) != (Some(own), Some(other)) {
        return Ok(Found::Listener);
    }
    Ok(Found::Socket {
        established: answer[HEADER + 1] == TCP_ESTABLISHED,
        uid: word(answer, ANSWER - 8).ok_or_else(cut_short)?,
    })
}

fn padded(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let mut padded = [0; 16];
            padded[..4].copy_from_slice(&ip.octets());
            padded
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found_by_both_addresses_and_listeners_distinguished_from_them() {
        // Neither every kernel nor every sandbox has it.
        let Ok(mut kernel) = SockDiag::open() else { return };
        let uid = rustix::process::geteuid().as_raw();
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(address) else {
                continue;
            };
            let port = listener.local_addr().unwrap().port();
            // A socket that can do both is asked about as an IPv4 one.
            let host = if address == "[::1]:0" { "::1" } else { "127.0.0.1" };
            let client = std::net::TcpStream::connect((host, port)).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            let (own, other) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
            let open = Found::Socket {
                established: true,
                uid,
            };
            if kernel.find(own, other).unwrap() == Found::Nothing {
                return;
            }
            assert_eq!(kernel.find(own, other).unwrap(), open, "{address}");
            assert_eq!(kernel.find(other, own).unwrap(), open, "{address}");
            drop(client);
            for (own, other) in [(own, other), (other, own)] {
                let found = kernel.find(own, other).unwrap();
                assert!(
                    matches!(
                        found,
                        Found::Socket {
                            established: false,
                            ..
                        }
                    ),
                    "{found:?}"
                );
            }
            drop(accepted);
            let other_port = SocketAddr::new(own.ip(), 1);
            assert_eq!(
                kernel.find(other, other_port).unwrap(),
                Found::Listener,
                "{address}"
            );
            drop(listener);
            assert_eq!(
                kernel.find(other, other_port).unwrap(),
                Found::Nothing,
                "{address}"
            );
        }
    }

    #[test]
    fn torn_answers_are_errors() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let (own, other) = (at("127.0.0.1:1"), at("127.0.0.1:2"));
        let mut answer = vec![0; ANSWER];
        answer[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        assert_eq!(read(&answer, own, other).unwrap(), Found::Listener);
        for length in 0..ANSWER {
            read(&answer[..length], own, other).unwrap_err();
        }
        let mut error = vec![0; HEADER + 4];
        error[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        for (code, found) in [(-2i32, true), (-1, false), (0, false), (i32::MIN, false)] {
            error[HEADER..].copy_from_slice(&code.to_ne_bytes());
            assert_eq!(read(&error, own, other).is_ok(), found, "{code}");
        }
    }
}
