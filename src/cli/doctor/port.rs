//! Who listens on a port of this machine, as the kernel's tables tell it. Nothing is sent there.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command as Process, Stdio},
    time::Duration,
};

use tokio::process::Command;

use super::finding::Finding;

/// What a service manager's program is called that has the port for a daemon which is not started yet.
const MANAGERS: &[&str] = &["systemd"];
/// How long a program may take to tell its version.
const VERSION: Duration = Duration::from_secs(5);

/// Who listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Listener {
    Nobody,
    /// An outhaul of this user, with what `--version` prints.
    Outhaul {
        pid: u32,
        version: Option<String>,
    },
    /// A service manager, which starts a daemon when somebody connects.
    Manager {
        name: String,
    },
    /// Another program.
    Other {
        name: String,
        pid: u32,
    },
    /// A program of this user id, which we may not look at.
    Unknown {
        uid: u32,
    },
}

/// A listening socket.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    uid: u32,
    inode: u64,
}

/// Who listens where a client that connects to this address would be answered.
pub(super) async fn listener(address: SocketAddr) -> Listener {
    let tables =
        ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let Some(socket) = tables.iter().find_map(|table| listening(table, address)) else {
        return Listener::Nobody;
    };
    let Some((pid, program)) = owner(socket.inode) else {
        return Listener::Unknown { uid: socket.uid };
    };
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    // As it is called when another file was put into its place.
    let name = name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned();
    if MANAGERS.contains(&&*name) {
        Listener::Manager { name }
    } else if name.starts_with("outhaul") && socket.uid == rustix::process::geteuid().as_raw() {
        let version = version(Path::new(&format!("/proc/{pid}/exe"))).await;
        Listener::Outhaul { pid, version }
    } else {
        Listener::Other { name, pid }
    }
}

/// The row of a listening socket in a table of proc(5) that takes connections to an address.
fn listening(table: &str, address: SocketAddr) -> Option<Socket> {
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (ip, port) = fields.get(1)?.split_once(':')?;
        let is_listening = *fields.get(3)? == "0A";
        let ip = ip_of(ip)?;
        let port = u16::from_str_radix(port, 16).ok()?;
        let takes = ip.is_unspecified() || ip.to_canonical() == address.ip().to_canonical();
        (is_listening && takes && port == address.port()).then_some(Socket {
            uid: fields.get(7)?.parse().ok()?,
            inode: fields.get(9)?.parse().ok()?,
        })
    })
}

/// An address of 8 or 32 hexadecimal digits, in words of this machine's byte order.
fn ip_of(text: &str) -> Option<IpAddr> {
    let word = |at: usize| {
        let word = text.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(word, 16).ok()?.to_ne_bytes())
    };
    if text.len() == 8 {
        return Some(Ipv4Addr::from(word(0)?).into());
    }
    let words = [word(0)?, word(1)?, word(2)?, word(3)?];
    let bytes: [u8; 16] = words.concat().try_into().ok()?;
    Some(Ipv6Addr::from(bytes).into())
}

/// The process that has a socket open, and its program.
fn owner(inode: u64) -> Option<(u32, PathBuf)> {
    let wanted = format!("socket:[{inode}]");
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let mut processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    processes.find_map(|pid| {
        // Those of others cannot be read.
        let mut files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
        let has_it = files.any(|file| {
            let link = std::fs::read_link(file.path());
            link.is_ok_and(|link| link.as_os_str() == &*wanted)
        });
        has_it.then(|| Some((pid, std::fs::read_link(format!("/proc/{pid}/exe")).ok()?)))?
    })
}

/// What a running outhaul's own file says. It may have been replaced since.
async fn version(program: &Path) -> Option<String> {
    let mut command = Process::new(program);
    command
        .arg("--version")
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let mut command = Command::from(command);
    command.kill_on_drop(true);
    let said = tokio::time::timeout(VERSION, command.output()).await.ok()?.ok()?;
    let said = String::from_utf8(said.stdout).ok()?;
    Some(said.trim().strip_prefix("outhaul ")?.to_owned())
}

/// Whose the port is that `outhaul serve` listens on.
pub(super) fn port(address: SocketAddr, listener: &Listener, is_named: bool) -> Finding {
    const CODE: &str = "port";
    const OURS: &str = env!("CARGO_PKG_VERSION");
    let named = if is_named {
        ", which --bes_backend names"
    } else {
        ""
    };
    match listener {
        Listener::Nobody if is_named => Finding::error(
            CODE,
            format!(
                "nothing listens on {address}{named}: without `outhaul run`, Bazel fails successful builds with exit \
                 code 38 after 16 s"
            ),
            "start `outhaul serve`, or remove --bes_backend from the rc file and build with `outhaul run`",
        ),
        Listener::Nobody => Finding::ok(CODE, format!("nothing listens on {address}")),
        Listener::Manager { name } => Finding::ok(
            CODE,
            format!("{name} listens on {address} for a daemon that it starts"),
        ),
        Listener::Outhaul {
            pid,
            version: Some(version),
        } if version == OURS => Finding::ok(
            CODE,
            format!("outhaul {version} listens on {address} (pid {pid})"),
        ),
        Listener::Outhaul { pid, version } => Finding::warning(
            CODE,
            format!(
                "outhaul {} listens on {address} (pid {pid}), and this is outhaul {OURS}",
                version.as_deref().unwrap_or("of an unknown version")
            ),
            "restart `outhaul serve` with this version",
        ),
        Listener::Other { .. } | Listener::Unknown { .. } => {
            let who = match listener {
                Listener::Other { name, pid } => format!("{name} (pid {pid})"),
                Listener::Unknown { uid } => format!("a program of user {uid}"),
                _ => String::new(),
            };
            let message = format!("{who} listens on {address}{named}; `outhaul serve` cannot listen there");
            let fix = "stop it, or choose another port with `outhaul serve --bes-listen=127.0.0.1:PORT` and the same in \
                       --bes_backend";
            // Then it may be another event service, to which `outhaul run` forwards.
            if is_named {
                Finding::note(CODE, message, fix)
            } else {
                Finding::warning(CODE, message, fix)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::finding::Level, *};

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:2319 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4242 1 0 100 0 0 10 0
   1: 0100007F:2319 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     7        0 4243 1 0 100 0 0 10 0
   2: 00000000:231A 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4244 1 0 100 0 0 10 0
   3: 0200000A:231B 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4245 1 0 100 0 0 10 0
";
    const TABLE_6: &str = "header
   0: 00000000000000000000000000000000:2319 00000000000000000000000000000000:0000 0A 0:0 0:0 0  5        0 4246 1
   1: 0000000000000000FFFF00000100007F:231C 00000000000000000000000000000000:0000 0A 0:0 0:0 0  5        0 4247 1
";

    #[test]
    #[cfg(target_endian = "little")]
    fn the_tables_of_the_kernel_tell_who_listens() {
        let inode = |table: &str, address: &str| {
            listening(table, address.parse().unwrap()).map(|socket| (socket.uid, socket.inode))
        };
        assert_eq!(inode(TABLE, "127.0.0.1:8985"), Some((1000, 4242)));
        assert_eq!(inode(TABLE, "127.0.0.1:8986"), Some((0, 4244)));
        assert_eq!(inode(TABLE, "127.0.0.1:8987"), None, "another address");
        assert_eq!(inode(TABLE, "127.0.0.1:40000"), None, "not listening");
        assert_eq!(inode(TABLE_6, "127.0.0.1:8985"), Some((5, 4246)));
        assert_eq!(inode(TABLE_6, "127.0.0.1:8988"), Some((5, 4247)));
        assert_eq!(inode("garbage\nand more", "127.0.0.1:8985"), None);
    }

    #[tokio::test]
    async fn a_listener_of_this_process_is_found_and_a_free_port_is_free() {
        let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listening.local_addr().unwrap();
        let pid = std::process::id();
        // The tests' own program has a name that begins with the crate's, and knows no `--version`.
        let expected = Listener::Outhaul { pid, version: None };
        assert_eq!(listener(address).await, expected);
        drop(listening);
        assert_eq!(listener(address).await, Listener::Nobody);
    }

    #[test]
    fn each_kind_of_listener_is_judged() {
        let address: SocketAddr = "127.0.0.1:8985".parse().unwrap();
        let ours = |version: Option<&str>| Listener::Outhaul {
            pid: 5,
            version: version.map(str::to_owned),
        };
        let name = "nc".to_owned();
        for (listener, is_named, level, part) in [
            (Listener::Nobody, false, Level::Ok, "nothing listens"),
            (Listener::Nobody, true, Level::Error, "38"),
            (
                Listener::Manager {
                    name: "systemd".to_owned(),
                },
                true,
                Level::Ok,
                "systemd",
            ),
            (ours(Some(env!("CARGO_PKG_VERSION"))), true, Level::Ok, "pid 5"),
            (ours(Some("0.0.1")), true, Level::Warning, "outhaul 0.0.1"),
            (ours(None), false, Level::Warning, "unknown version"),
            (
                Listener::Other { name, pid: 6 },
                false,
                Level::Warning,
                "nc (pid 6)",
            ),
            (Listener::Unknown { uid: 7 }, true, Level::Note, "user 7"),
        ] {
            let finding = port(address, &listener, is_named);
            assert_eq!(finding.level, level, "{listener:?}");
            assert!(finding.message.contains(part), "{}", finding.message);
            assert_eq!(finding.fix.is_some(), level > Level::Ok);
        }
    }
}
