//! Where clients connect: TCP addresses, unix sockets, and listeners inherited from a service manager.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    os::unix::{
        fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
        net::{UnixListener as StdUnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};

use tokio::net::{TcpListener, UnixListener};

use crate::{
    access::{ListenerRules, Listening},
    removal::remove_all,
    transport::without_user_info,
};

/// An address to listen on: `HOST:PORT`, or `unix:PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BesAddress {
    /// A TCP port; 0 for any free one.
    Tcp(SocketAddr),
    /// A unix socket.
    Unix(PathBuf),
}

/// Why an address is invalid, or cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The text is neither form of an address.
    #[error("{0:?} is not an address to listen on: expected IP:PORT or unix:PATH")]
    Form(String),
    /// Another process answers on the socket.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// There is a file that is not a socket.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Others could put a socket of theirs in the place of ours.
    #[error(
        "{} is in a directory that every user of this machine can write to; choose another one, such as one \
         with mode 0700",
        .0.display()
    )]
    Exposed(PathBuf),
    /// The system refused.
    #[error("failed to listen on {address}: {source}")]
    Io {
        /// The address to listen on.
        address: String,
        /// The system's words.
        source: io::Error,
    },
}

impl FromStr for BesAddress {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        if let Some(path) = text.strip_prefix("unix:") {
            // `unix:///run/x` and `unix:/run/x` are the same file (gRPC's naming).
            let path = path.strip_prefix("//").unwrap_or(path);
            if path.is_empty() {
                return Err(ListenError::Form(text.to_owned()));
            }
            return Ok(Self::Unix(path.into()));
        }
        let text = text.strip_prefix("grpc://").unwrap_or(text);
        let named = text
            .strip_prefix("localhost:")
            .map(|port| format!("127.0.0.1:{port}"));
        named
            .as_deref()
            .unwrap_or(text)
            .parse()
            .map(Self::Tcp)
            .map_err(|_| ListenError::Form(without_user_info(text).to_string()))
    }
}

impl fmt::Display for BesAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A listening socket, and whom it is for: with [`ListenerRules`]'s defaults, our own user's processes.
pub struct BesListener {
    socket: Socket,
    access: ListenerRules,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, Option<SocketFile>),
}

/// A socket's file, removed with it unless another process has replaced it.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl BesListener {
    /// Listens on an address. A unix socket has mode 0600; a file left there by a process that is gone is replaced.
    /// Call it on the runtime that will serve.
    ///
    /// # Errors
    /// When the address is in use or the system refuses.
    pub fn bind(address: &BesAddress) -> Result<Self, ListenError> {
        let failed = |source| ListenError::Io {
            address: address.to_string(),
            source,
        };
        match address {
            BesAddress::Tcp(at) => {
                let listener = std::net::TcpListener::bind(at).map_err(failed)?;
                Self::from_tcp(listener).map_err(failed)
            }
            BesAddress::Unix(path) => {
                if is_exposed(path) {
                    return Err(ListenError::Exposed(path.clone()));
                }
                refuse_unless_stale(path).map_err(|e| e.unwrap_or_else(failed))?;
                let (listener, file) = bind_private(path).map_err(failed)?;
                let listener = UnixListener::from_std(listener).map_err(failed)?;
                Ok(Self::new(Socket::Unix(listener, Some(file))))
            }
        }
    }

    /// Takes over an inherited TCP listener.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub(crate) fn from_tcp(listener: std::net::TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        TcpListener::from_std(listener).map(|l| Self::new(Socket::Tcp(l)))
    }

    /// Takes over an inherited unix listener; its file is its maker's to remove.
    ///
    /// # Errors
    /// When it cannot be made non-blocking.
    pub(crate) fn from_unix(listener: StdUnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        UnixListener::from_std(listener).map(|l| Self::new(Socket::Unix(l, None)))
    }

    /// With these rules.
    pub fn with_rules(self, access: ListenerRules) -> Self {
        Self { access, ..self }
    }

    /// As what connections are taken from, and by which rules; with the file that goes with a unix socket.
    pub(crate) fn into_parts(self) -> (Listening, ListenerRules, Option<SocketFile>) {
        match self.socket {
            Socket::Tcp(listener) => (Listening::Tcp(listener), self.access, None),
            Socket::Unix(listener, file) => (Listening::Unix(listener), self.access, file),
        }
    }

    fn new(socket: Socket) -> Self {
        Self {
            socket,
            access: ListenerRules::default(),
        }
    }

    /// Where it listens, with the port that was chosen.
    ///
    /// # Errors
    /// When the system does not say, or an inherited unix socket has no path.
    pub fn address(&self) -> io::Result<BesAddress> {
        match &self.socket {
            Socket::Tcp(listener) => listener.local_addr().map(BesAddress::Tcp),
            Socket::Unix(_, Some(file)) => Ok(BesAddress::Unix(file.path.clone())),
            Socket::Unix(listener, None) => match listener.local_addr()?.as_pathname() {
                Some(path) => Ok(BesAddress::Unix(path.to_owned())),
                None => Err(io::Error::other("the inherited socket has no path")),
            },
        }
    }
}

/// Whether the path may be taken: nothing is there, or a socket on which no process answers.
fn refuse_unless_stale(path: &Path) -> Result<(), Result<ListenError, io::Error>> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Err(e)),
    };
    if !metadata.file_type().is_socket() {
        return Err(Ok(ListenError::NotASocket(path.to_owned())));
    }
    match UnixStream::connect(path) {
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            Ok(())
        }
        // Also if connecting is not permitted, or its queue is full: then a process listens.
        _ => Err(Ok(ListenError::InUse(path.to_owned()))),
    }
}

/// Whether anybody can replace what is at a path: its directory is open to all, and not as `/tmp` is (sticky).
fn is_exposed(path: &Path) -> bool {
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return false,
    };
    fs::metadata(directory).is_ok_and(|m| m.mode() & 0o1002 == 0o002)
}

/// Makes the socket in a private directory and moves it, so that no one can connect before its mode is set, and a
/// stale file is replaced in one step.
fn bind_private(path: &Path) -> io::Result<(StdUnixListener, SocketFile)> {
    static BINDS: AtomicU64 = AtomicU64::new(0);
    let name = format!(
        ".outhaul-{}-{}",
        std::process::id(),
        BINDS.fetch_add(1, Ordering::Relaxed)
    );
    let dir = path.parent().unwrap_or_else(|| Path::new("")).join(name);
    // Left by a killed process that had our id.
    let _ = remove_all(&dir);
    fs::DirBuilder::new().mode(0o700).create(&dir)?;
    let made = (|| {
        let inside = dir.join("s");
        let listener = StdUnixListener::bind(&inside)?;
        listener.set_nonblocking(true)?;
        fs::set_permissions(&inside, fs::Permissions::from_mode(0o600))?;
        let inode = fs::symlink_metadata(&inside)?.ino();
        fs::rename(&inside, path)?;
        let path = path.to_owned();
        Ok((listener, SocketFile { path, inode }))
    })();
    let _ = remove_all(&dir);
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_users_write_them() {
        for (text, expected) in [
            ("127.0.0.1:8985", "127.0.0.1:8985"),
            ("grpc://127.0.0.1:8985", "127.0.0.1:8985"),
            ("localhost:0", "127.0.0.1:0"),
            ("[::1]:80", "[::1]:80"),
            ("unix:/run/x.sock", "unix:/run/x.sock"),
            ("unix:///run/x.sock", "unix:/run/x.sock"),
        ] {
            assert_eq!(text.parse::<BesAddress>().unwrap().to_string(), expected);
        }
        for text in ["", "8985", "unix:", "host:", "127.0.0.1"] {
            text.parse::<BesAddress>().expect_err(text);
        }
    }

    #[tokio::test]
    async fn only_a_dead_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bes.sock");
        let address = BesAddress::Unix(path.clone());
        let first = BesListener::bind(&address).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(BesListener::bind(&address), Err(ListenError::InUse(_))));
        drop(first);
        assert!(!path.exists());
        // What a killed process leaves.
        drop(StdUnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let second = BesListener::bind(&address).unwrap();
        assert_eq!(second.address().unwrap(), address);
        drop(second);
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            BesListener::bind(&address),
            Err(ListenError::NotASocket(_))
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    #[tokio::test]
    async fn a_socket_is_not_made_where_others_could_replace_it() {
        let dir = tempfile::tempdir().unwrap();
        let address = BesAddress::Unix(dir.path().join("bes.sock"));
        let mode = |mode| fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        mode(0o777);
        assert!(matches!(
            BesListener::bind(&address),
            Err(ListenError::Exposed(_))
        ));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        mode(0o1777);
        BesListener::bind(&address).unwrap();
    }
}
