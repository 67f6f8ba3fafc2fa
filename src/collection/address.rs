//! HTTP URLs of files.

use std::fmt;

use anyhow::{Error, anyhow, bail};
use http::{Uri, uri::Authority, uri::Scheme};
use percent_encoding::percent_decode_str;
use url::Url;

use crate::transport::{Header, http_url};

/// An http or https URL. User name and password are kept apart, and neither they nor the query, which may be a signature,
/// are shown.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Address {
    /// Without user name and password.
    uri: Uri,
    login: Option<Header>,
}

impl Address {
    /// Reads a URL. The reasons never repeat the text.
    ///
    /// # Errors
    /// When it is not an http or https URL.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        // What follows `#` is for readers of documents.
        let text = text.split('#').next().unwrap_or(text);
        let (uri, user_info) = http_url(text).map_err(Error::msg)?;
        let login = user_info.as_deref().map(login).transpose()?;
        Ok(Self { uri, login })
    }

    /// What to ask for.
    pub(super) const fn uri(&self) -> &Uri {
        &self.uri
    }

    /// What its user name and password are sent as.
    pub(super) const fn login(&self) -> Option<&Header> {
        self.login.as_ref()
    }

    pub(super) fn is_https(&self) -> bool {
        self.uri.scheme() == Some(&Scheme::HTTPS)
    }

    /// The host, an IPv6 address without its brackets.
    pub(super) fn host(&self) -> &str {
        let host = self.uri.host().unwrap_or_default();
        host.trim_start_matches('[').trim_end_matches(']')
    }

    pub(super) fn port(&self) -> u16 {
        let default = if self.is_https() { 443 } else { 80 };
        self.uri.port_u16().unwrap_or(default)
    }

    /// The last part of the path, decoded; empty where the path ends in a slash.
    pub(super) fn file_name(&self) -> anyhow::Result<String> {
        let last = self.uri.path().rsplit('/').next().unwrap_or_default();
        let decoded = percent_decode_str(last).decode_utf8();
        decoded
            .map(Into::into)
            .map_err(|_| anyhow!("names a file whose name is not UTF-8"))
    }

    /// The URL of a file whose name is this one's with something added. The query stays: one that lets us in often is for
    /// all of a directory.
    pub(super) fn with_suffix(&self, suffix: &str) -> anyhow::Result<Self> {
        let query = self.uri.query().map(|query| format!("?{query}"));
        let path = format!("{}{suffix}{}", self.uri.path(), query.unwrap_or_default());
        let mut parts = self.uri.clone().into_parts();
        let parsed = path.parse().map_err(|_| anyhow!("is not a path"))?;
        parts.path_and_query = Some(parsed);
        let uri = Uri::from_parts(parts).map_err(|_| anyhow!("is not a URL"))?;
        Ok(Self {
            uri,
            login: self.login.clone(),
        })
    }

    /// Where a `Location` leads from here (RFC 9110, 10.2.2). The user name and password stay with their own host.
    pub(super) fn follow(&self, location: &str) -> anyhow::Result<Self> {
        let next = Url::parse(&self.uri.to_string()).and_then(|from| from.join(location));
        let next = next.map_err(|_| anyhow!("redirects to an invalid URL"))?;
        let mut next = Self::parse(next.as_str())?;
        if self.is_https() && !next.is_https() {
            bail!("redirects to {next}, which is not encrypted");
        }
        next.login = self.login.clone().filter(|_| next.is_same_server(self));
        Ok(next)
    }

    /// Whether both are of one scheme, host and port.
    pub(super) fn is_same_server(&self, other: &Self) -> bool {
        let of = |address: &Self| {
            let host = address.host().to_ascii_lowercase();
            (address.is_https(), host, address.port())
        };
        of(self) == of(other)
    }
}

fn login(user_info: &str) -> anyhow::Result<Header> {
    let decoded = |text: &str| {
        let text = percent_decode_str(text).decode_utf8();
        text.map(|text| text.into_owned())
            .map_err(|_| anyhow!("has a user name or password that is not UTF-8"))
    };
    let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
    Ok(Header::basic(&decoded(user)?, &decoded(password)?))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.uri.scheme_str().unwrap_or_default();
        let authority = self.uri.authority().map_or("", Authority::as_str);
        write!(f, "{scheme}://{authority}{}", self.uri.path())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_secret_is_sent_and_not_shown() {
        let address = Address::parse("https://me:s%40cret@h:8443/a/b%2Bc.tar.zst?sig=s3cret#x").unwrap();
        for shown in [address.to_string(), format!("{address:?}")] {
            assert!(shown.contains("https://h:8443/a/b%2Bc.tar.zst"), "{shown}");
            assert!(!shown.contains("cret"), "{shown}");
        }
        assert_eq!(address.uri(), "https://h:8443/a/b%2Bc.tar.zst?sig=s3cret");
        // "me:s@cret"
        assert_eq!(address.login().unwrap().value(), "Basic bWU6c0BjcmV0");
        assert_eq!(address.file_name().unwrap(), "b+c.tar.zst");
        let sidecar = address.with_suffix(".sha256sum").unwrap();
        assert_eq!(
            sidecar.uri(),
            "https://h:8443/a/b%2Bc.tar.zst.sha256sum?sig=s3cret"
        );
        assert_eq!(sidecar.login(), address.login());
        for text in [
            "",
            "h/a",
            "ftp://h/a",
            "http://",
            "http:///a",
            "https://h/a b",
            "http://a:s3cret@/",
        ] {
            let reason = Address::parse(text).unwrap_err().to_string();
            assert!(!reason.contains("s3cret"), "{text}: {reason}");
        }
    }

    #[test]
    fn a_redirect_never_takes_the_password_elsewhere_nor_gives_up_encryption() {
        let from = Address::parse("https://me:pw@h/a/b?q=1").unwrap();
        for (location, uri, stays) in [
            ("/x/y?z#f", "https://h/x/y?z", true),
            ("c", "https://h/a/c", true),
            ("?x=2", "https://h/a/b?x=2", true),
            ("../x/./y", "https://h/x/y", true),
            ("", "https://h/a/b?q=1", true),
            ("c d/\u{fc}", "https://h/a/c%20d/%C3%BC", true),
            ("https://H:443/c", "https://h/c", true),
            ("//other/c", "https://other/c", false),
            ("https://h:444/c", "https://h:444/c", false),
            ("https://you:other@i/c", "https://i/c", false),
        ] {
            let next = from.follow(location).unwrap();
            assert_eq!(
                (next.uri().to_string().as_str(), next.login().is_some()),
                (uri, stays)
            );
        }
        for location in ["https://", "ftp://h/", "https://s3cret:x:y@h:99999/"] {
            let reason = from.follow(location).unwrap_err().to_string();
            assert!(!reason.contains("s3cret"), "{reason}");
        }
        assert!(
            from.follow("http://h/a")
                .unwrap_err()
                .to_string()
                .contains("not encrypted")
        );
    }
}
