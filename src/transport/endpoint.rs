//! Where a server listens.

use std::{
    ffi::OsString,
    fmt,
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    path::{Path, PathBuf},
};

use http::{
    Uri,
    uri::{Authority, Scheme},
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use super::{BucketAddress, RemoteError};

/// What is not written as it is in the path of a `file://` address: all that could end an address in a list, too.
const ENCODED_IN_PATHS: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~')
    .remove(b'+')
    .remove(b':')
    .remove(b'=')
    .remove(b'@');

/// The port of `grpcs://` without one.
const TLS_PORT: u16 = 443;
/// The port of `grpc://` without one, as gRPC has it.
const PLAIN_PORT: u16 = 80;

/// The address of a server: of one that speaks gRPC or, where it is a cache's, of an HTTP cache, a directory or a bucket.
/// Holds no credentials, so it may be shown anywhere.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Endpoint(Address);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Address {
    /// `host` is lowercase, an IPv6 address without its brackets.
    Tcp {
        tls: bool,
        host: String,
        port: u16,
    },
    Unix(PathBuf),
    /// A directory, absolute: Bazel's disk cache.
    Directory(PathBuf),
    /// An HTTP cache. `path` is empty, or begins with a slash and does not end with one.
    Http {
        tls: bool,
        host: String,
        port: u16,
        path: String,
    },
    Bucket(Box<BucketAddress>),
}

impl Endpoint {
    /// Reads a cache's address, the value of the flag `flag`: what [`Endpoint::parse`] reads; `file:///DIR`, in which
    /// `%` and two hexadecimal digits stand for a byte; or `http(s)://HOST[:PORT][/PREFIX]`, from which a user name and
    /// password must have been taken off; or a bucket's, see [`BucketAddress`].
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`](super::RemoteErrorKind::Config) for anything else, as [`Endpoint::parse`].
    pub fn parse_cache(flag: &str, text: &str) -> Result<Self, RemoteError> {
        if BucketAddress::is_one(text) {
            return BucketAddress::parse(flag, text).map(|address| Self(Address::Bucket(address.into())));
        }
        if let Some((scheme, rest)) = text.split_once("://").filter(|_| is_http(text)) {
            return Self::parse_http(flag, text, scheme.eq_ignore_ascii_case("https"), rest);
        }
        match text.get(..5) {
            Some(scheme) if scheme.eq_ignore_ascii_case("file:") => Self::parse_file(flag, text, &text[5..]),
            _ => Self::parse(flag, text),
        }
    }

    fn parse_file(flag: &str, text: &str, rest: &str) -> Result<Self, RemoteError> {
        let error = |reason: &str| RemoteError::config(format!("{flag}={}", without_user_info(text)), reason);
        let path = rest.strip_prefix("//").unwrap_or(rest);
        if !path.starts_with('/') {
            return Err(error(
                "a directory's address has no host and an absolute path: file:///DIR",
            ));
        }
        let path = OsString::from_vec(percent_encoding::percent_decode_str(path).collect());
        Self::directory(PathBuf::from(path)).ok_or_else(|| error("not a directory's path"))
    }

    /// The directory at a path; `None` if it is not absolute, or cannot be one.
    pub fn directory(path: PathBuf) -> Option<Self> {
        let is_possible = path.is_absolute() && !path.as_os_str().as_bytes().contains(&0);
        // Without what does not count: `/a//b/./`.
        is_possible.then(|| Self(Address::Directory(path.components().collect())))
    }

    /// The directory's path, if it is one.
    pub(crate) fn directory_path(&self) -> Option<&Path> {
        match &self.0 {
            Address::Directory(path) => Some(path),
            _ => None,
        }
    }

    fn parse_http(flag: &str, text: &str, tls: bool, rest: &str) -> Result<Self, RemoteError> {
        let error = |reason: &str| RemoteError::config(format!("{flag}={}", without_user_info(text)), reason);
        let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
        if authority.contains('@') {
            return Err(error("credentials are not allowed in this URL"));
        }
        if rest.contains(['?', '#']) {
            return Err(error(
                "an HTTP cache's URL must not contain a query or a fragment",
            ));
        }
        let path = path.trim_end_matches('/');
        let is_dots =
            |segment: &str| matches!(&*segment.to_ascii_lowercase().replace("%2e", "."), "." | "..");
        if path.split('/').any(is_dots) {
            return Err(error("the path must not contain the segments . and .."));
        }
        if !path.bytes().all(|b| b.is_ascii_graphic())
            || path.parse::<http::Uri>().is_err() && !path.is_empty()
        {
            return Err(error(
                "the path contains an invalid character; use percent-encoding",
            ));
        }
        let (host, port) = host_and_port(authority, if tls { 443 } else { 80 }).map_err(error)?;
        let path = path.to_owned();
        Ok(Self(Address::Http {
            tls,
            host,
            port,
            path,
        }))
    }

    /// Reads the value of the flag `flag`: `grpc://HOST:PORT`, `grpcs://HOST[:PORT]`, `HOST[:PORT]` (TLS, as in
    /// Bazel), `unix:PATH` or `unix:///PATH`.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`](super::RemoteErrorKind::Config) for anything else; a user name or password in the text is not repeated.
    pub fn parse(flag: &str, text: &str) -> Result<Self, RemoteError> {
        let error = |reason: &str| RemoteError::config(format!("{flag}={}", without_user_info(text)), reason);
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                return Err(error("the path of a unix socket must be absolute: unix:/PATH"));
            }
            if path.contains('\0') || path.ends_with('/') {
                return Err(error("the path of the unix socket is not a file path"));
            }
            return Ok(Self(Address::Unix(PathBuf::from(path))));
        }
        let (tls, rest) = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("grpc") => (false, rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("grpcs") => (true, rest),
            // gRPC's own spelling of a name to look up, which Bazel passes on.
            Some(("dns", rest)) if rest.starts_with('/') => (true, rest.trim_start_matches('/')),
            Some(_) => return Err(error("unknown scheme; use grpc://, grpcs:// or unix:")),
            None => (true, text.strip_prefix("dns:").unwrap_or(text)),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains('@') {
            return Err(error(
                "credentials are not allowed in the URL; use --remote-header",
            ));
        }
        if rest.contains(['/', '?', '#']) {
            return Err(error(
                "only a host and a port may follow the scheme; use --remote-instance-name for the instance name",
            ));
        }
        let (host, port) = host_and_port(rest, if tls { TLS_PORT } else { PLAIN_PORT }).map_err(error)?;
        Ok(Self(Address::Tcp { tls, host, port }))
    }

    /// The unix socket at a path.
    pub const fn unix(path: PathBuf) -> Self {
        Self(Address::Unix(path))
    }

    /// Whether the connection is encrypted.
    pub(crate) fn is_tls(&self) -> bool {
        match &self.0 {
            Address::Tcp { tls, .. } | Address::Http { tls, .. } => *tls,
            Address::Unix(_) | Address::Directory(_) => false,
            Address::Bucket(address) => address.is_tls(),
        }
    }

    /// Whether it is an HTTP cache.
    pub(crate) const fn is_http(&self) -> bool {
        matches!(self.0, Address::Http { .. })
    }

    /// Whether a permission for this address is one for the other: they are the same or, of HTTP caches, this one's path
    /// is the beginning of the other's.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Address::Http { path, .. }, Address::Http { path: longer, .. }) => {
                let below = longer.strip_prefix(path.as_str());
                self.http_uri() == other.http_uri()
                    && below.is_some_and(|below| below.is_empty() || below.starts_with('/'))
            }
            _ => self == other,
        }
    }

    /// The bucket, if it is one.
    pub fn bucket(&self) -> Option<&BucketAddress> {
        match &self.0 {
            Address::Bucket(address) => Some(address),
            _ => None,
        }
    }

    /// The host, without a port or brackets; `None` for a unix socket.
    pub fn host(&self) -> Option<&str> {
        match &self.0 {
            Address::Tcp { host, .. } | Address::Http { host, .. } => Some(host),
            Address::Unix(_) | Address::Directory(_) => None,
            Address::Bucket(address) => address.host(),
        }
    }

    /// The unix socket's path, if it is one.
    pub(crate) fn unix_path(&self) -> Option<&Path> {
        match &self.0 {
            Address::Unix(path) => Some(path),
            _ => None,
        }
    }

    /// Whether it is on this machine, as far as the address says.
    pub(crate) fn is_local(&self) -> bool {
        let has_no_host = matches!(self.0, Address::Unix(_) | Address::Directory(_));
        has_no_host || self.host().is_some_and(is_this_machine)
    }

    /// `HOST:PORT`, as a gRPC channel's authority and so `bytestream://` URIs have it.
    pub fn authority(&self) -> String {
        let uri = self.http_uri();
        uri.split_once("://")
            .map_or_else(String::new, |(_, authority)| authority.to_owned())
    }

    /// The URI of the server's root. A unix socket has no authority of its own; `localhost` is what gRPC sends for one.
    pub(crate) fn http_uri(&self) -> String {
        match &self.0 {
            Address::Tcp { tls, host, port } | Address::Http { tls, host, port, .. } => {
                let scheme = if *tls { "https" } else { "http" };
                format!("{scheme}://{}:{port}", Bracketed(host))
            }
            Address::Unix(_) | Address::Directory(_) => "http://localhost".to_owned(),
            // Nobody speaks gRPC there.
            Address::Bucket(_) => "https://invalid".to_owned(),
        }
    }

    /// The URI that a credential helper is asked about; `None` for a unix socket, where none is asked. For gRPC always
    /// `https` and without the default port, as gRPC's call credentials have it; for an HTTP cache its base URL with the
    /// port (Bazel's `HttpCacheClient`; measured with 7.7.1).
    pub(crate) fn credential_uri(&self) -> Option<String> {
        match &self.0 {
            Address::Tcp {
                host, port: TLS_PORT, ..
            } => Some(format!("https://{}/", Bracketed(host))),
            Address::Tcp { host, port, .. } => Some(format!("https://{}:{port}/", Bracketed(host))),
            Address::Http { .. } => Some(self.to_string()),
            Address::Unix(_) | Address::Directory(_) | Address::Bucket(_) => None,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Address::Tcp { tls, host, port } => {
                write!(
                    f,
                    "grpc{}://{}:{port}",
                    if *tls { "s" } else { "" },
                    Bracketed(host)
                )
            }
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Directory(path) => {
                write!(
                    f,
                    "file://{}",
                    percent_encode(path.as_os_str().as_bytes(), ENCODED_IN_PATHS)
                )
            }
            Address::Http { path, .. } => write!(f, "{}{path}", self.http_uri()),
            Address::Bucket(address) => address.fmt(f),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Endpoint({self})")
    }
}

/// A host as URIs write it.
struct Bracketed<'a>(&'a str);

impl fmt::Display for Bracketed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.contains(':') {
            write!(f, "[{}]", self.0)
        } else {
            f.write_str(self.0)
        }
    }
}

/// Whether a cache's address is that of an HTTP cache.
pub(crate) fn is_http(address: &str) -> bool {
    let scheme = address.split_once("://").map_or("", |(scheme, _)| scheme);
    scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https")
}

/// Whether a host, without brackets, is this machine, as far as its name says.
pub(crate) fn is_this_machine(host: &str) -> bool {
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// The host in lower case, and the port or the default one; or what is wrong with them.
fn host_and_port(text: &str, default: u16) -> Result<(String, u16), &'static str> {
    let (host, port) = split_port(text).ok_or("not of the form HOST:PORT or [IPV6]:PORT")?;
    let port = match port {
        Some(port) => port_of(port).ok_or("the port is not a number from 1 to 65535")?,
        None => default,
    };
    if !is_host(host) {
        return Err("the host name is empty or contains an invalid character");
    }
    Ok((host.to_ascii_lowercase(), port))
}

fn port_of(text: &str) -> Option<u16> {
    let port = text.parse().ok();
    port.filter(|&port| port != 0 && !text.starts_with('+'))
}

/// Host and port of `HOST`, `HOST:PORT`, `[IPV6]` or `[IPV6]:PORT`.
fn split_port(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, after) = rest.split_once(']')?;
        if !host.contains(':') {
            return None;
        }
        return match after {
            "" => Some((host, None)),
            _ => Some((host, Some(after.strip_prefix(':')?))),
        };
    }
    match text.split_once(':') {
        Some((_, port)) if port.contains(':') => None,
        Some((host, port)) => Some((host, Some(port))),
        None => Some((text, None)),
    }
}

fn is_host(host: &str) -> bool {
    if host.contains(':') {
        return host.parse::<std::net::Ipv6Addr>().is_ok();
    }
    !host.is_empty()
        && host.len() <= 253
        && host
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

/// An address without the user name and password in it, and those. An `@` in the path of an HTTP cache is the path's.
pub(crate) fn split_user_info(text: &str) -> (String, Option<(String, String)>) {
    let end = match text.split_once("://") {
        Some((scheme, rest)) if is_http(text) => scheme.len() + 3 + rest.find('/').unwrap_or(rest.len()),
        // A path.
        _ if text.starts_with("unix:") => 0,
        _ => text.len(),
    };
    let Some(at) = text[..end].rfind('@') else {
        return (text.to_owned(), None);
    };
    let (before, host) = (&text[..at], &text[at + 1..]);
    let (scheme, user_info) = match before.split_once("://") {
        Some((scheme, user_info)) => (format!("{scheme}://"), user_info),
        None => (String::new(), before),
    };
    let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
    let decoded = |text: &str| {
        percent_encoding::percent_decode_str(text)
            .decode_utf8_lossy()
            .into_owned()
    };
    (
        format!("{scheme}{host}"),
        Some((decoded(user), decoded(password))),
    )
}

/// Reads the URL of an HTTP server: without its user info, and that.
///
/// # Errors
/// In words that go after what names the URL.
pub(crate) fn http_url(text: &str) -> Result<(Uri, Option<String>), &'static str> {
    let uri: Uri = text.parse().map_err(|_| "is not a URL")?;
    let mut parts = uri.into_parts();
    if !matches!(parts.scheme.as_ref().map(Scheme::as_str), Some("http" | "https")) {
        return Err("must begin with http:// or https://");
    }
    let authority = parts.authority.take().ok_or("has no host")?;
    let (user_info, place) = match authority.as_str().rsplit_once('@') {
        Some((user_info, place)) => (Some(user_info.to_owned()), place),
        None => (None, authority.as_str()),
    };
    let place: Authority = place.parse().map_err(|_| "has no host")?;
    if place.host().is_empty() {
        return Err("has no host");
    }
    // The library takes any text for a port, and has none then.
    let port = place.as_str()[place.host().len()..]
        .strip_prefix(':')
        .unwrap_or_default();
    if !port.is_empty() && port_of(port).is_none() {
        return Err("has a port that is not a number from 1 to 65535");
    }
    parts.authority = Some(place);
    let uri = Uri::from_parts(parts).map_err(|_| "is not a URL")?;
    // It is stricter with hosts, and the code that asks for the URL may rely on that.
    if url::Url::parse(&uri.to_string()).is_err() {
        return Err("has no valid host");
    }
    Ok((uri, user_info))
}

/// An address as it may be shown: without what might be a user name and password. Everything before the last `@` goes,
/// since what stands there is wrong in an address whatever it is.
pub(crate) fn without_user_info(text: &str) -> String {
    match text.rsplit_once('@') {
        Some((before, after)) => {
            let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
            let separator = if scheme.is_empty() { "" } else { "://" };
            format!("{scheme}{separator}***@{after}")
        }
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests;
