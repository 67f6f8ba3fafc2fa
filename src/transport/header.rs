//! Headers that the user wants in requests.

use std::fmt;

use super::RemoteError;

/// A header that the user wants in every request. Its value is a secret: nothing here shows it.
#[derive(Clone, PartialEq, Eq)]
pub struct Header {
    name: String,
    value: String,
}

impl Header {
    /// Reads `NAME=VALUE`, the value of the flag `flag`.
    ///
    /// # Errors
    /// [`RemoteErrorKind::Config`](super::RemoteErrorKind::Config) when the name or the value is not valid in HTTP/2, or the name is reserved for gRPC.
    /// The value is not repeated.
    pub fn parse(flag: &str, text: &str) -> Result<Self, RemoteError> {
        let wrong = |context: String, reason| RemoteError::config(context, reason);
        let Some((name, value)) = text.split_once('=') else {
            return Err(wrong(flag.to_owned(), "not of the form NAME=VALUE"));
        };
        Self::new(name, value).map_err(|reason| {
            // An invalid name may hold the value: `authorization: Basic bWU6cGFzcw==`.
            match http::HeaderName::from_bytes(name.trim().as_bytes()) {
                Ok(name) => wrong(format!("{flag}={name}=…"), reason),
                Err(_) => wrong(flag.to_owned(), reason),
            }
        })
    }

    /// The header that user name and password make.
    pub(crate) fn basic(user: &str, password: &str) -> Self {
        use base64::Engine as _;
        let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        Self {
            name: "authorization".to_owned(),
            value: format!("Basic {encoded}"),
        }
    }

    /// User name and password of a gRPC server's address as gRPC sends them: before the host in `:authority` (measured with
    /// Bazel 7.7.1). `None` if they cannot stand there.
    pub(crate) fn of_authority(user: &str, password: &str, authority: &str) -> Option<Self> {
        let separator = if password.is_empty() { "" } else { ":" };
        let value = format!("{user}{separator}{password}@{authority}");
        value.parse::<http::uri::Authority>().ok()?;
        let name = ":authority".to_owned();
        Some(Self { name, value })
    }

    /// What of it is secret: the value, and of an `:authority` what stands before the host.
    pub(crate) fn secrets(&self) -> impl Iterator<Item = &str> {
        let user_info = match (&*self.name, self.value.rsplit_once('@')) {
            (":authority", Some((user_info, _))) => Some(user_info),
            _ => None,
        };
        let whole = user_info.is_none().then_some(&*self.value);
        let parts = user_info
            .into_iter()
            .flat_map(|info| info.splitn(2, ':').chain([info]));
        whole.into_iter().chain(parts)
    }

    /// From a name and a value.
    ///
    /// # Errors
    /// What is wrong with them, without the value.
    pub fn new(name: &str, value: &str) -> Result<Self, &'static str> {
        let name = name.trim().to_ascii_lowercase();
        let value = value.trim();
        if http::HeaderName::from_bytes(name.as_bytes()).is_err() {
            return Err("the header name is empty or contains an invalid character");
        }
        if name.ends_with("-bin") {
            return Err("binary headers are not supported");
        }
        if name.starts_with("grpc-") || matches!(&*name, "te" | "content-type" | "user-agent" | "host") {
            return Err("this header is reserved for gRPC");
        }
        if !value.bytes().all(|b| (0x20..0x7f).contains(&b)) {
            return Err("the value must be printable ASCII");
        }
        Ok(Self {
            name,
            value: value.to_owned(),
        })
    }

    /// The name, in lower case.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The value. Not to be shown.
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=…", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_name_and_value() {
        let header = Header::parse("--remote-header", "X-Key=a=b ").unwrap();
        assert_eq!((header.name(), header.value()), ("x-key", "a=b"));
    }

    #[test]
    fn bad_headers_are_refused_without_their_value() {
        for (text, part) in [
            ("s3cret", "NAME=VALUE"),
            ("a b=s3cret", "character"),
            ("=s3cret", "empty"),
            ("key-bin=s3cret", "binary"),
            ("grpc-timeout=s3cret", "reserved for gRPC"),
            ("key=s3cret\n", ""),
            ("key=s3cret\u{1}x", "printable"),
        ] {
            if let Err(error) = Header::parse("--remote-header", text) {
                let shown = error.to_string();
                assert!(shown.contains(part) && !shown.contains("s3cret"), "{shown}");
                assert!(shown.starts_with("--remote-header"), "{shown}");
            }
        }
    }
}
