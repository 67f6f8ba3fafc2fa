//! Where archives and other files are staged from, when it is not a recorded build: which URLs a caller may name, and how
//! a marker remembers one.

use std::{fmt, sync::Arc};

use percent_encoding::percent_decode_str;

use crate::transport::{http_url, without_secrets};

/// Several URLs and digests as markers remember them: sorted, since the same comes of them in any order.
pub(crate) fn remembered(from: &[String]) -> Vec<String> {
    let mut all: Vec<String> = from.iter().map(|from| without_secrets(from)).collect();
    all.sort();
    all
}

/// Which URLs a caller may name.
#[derive(Debug, Clone, Default)]
pub(crate) enum Origins {
    /// Any.
    #[default]
    Anywhere,
    /// These, and those below them.
    Below(Arc<[Origin]>),
}

impl Origins {
    /// Whether a URL may be named. What cannot be read may not.
    pub(crate) fn allow(&self, url: &str) -> bool {
        match self {
            Self::Anywhere => true,
            Self::Below(all) => Origin::parse(url).is_ok_and(|url| all.iter().any(|one| one.has(&url))),
        }
    }
}

/// A URL that is compared, not requested.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    scheme: String,
    /// Host and port, or the bucket.
    authority: String,
    path: String,
    /// Of a bucket: its settings, among them who is asked.
    settings: String,
}

/// Why a URL is not one of an [`Origin`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum OriginError {
    /// Another scheme, or none.
    #[error("must begin with http://, https://, s3://, gs:// or az://")]
    Scheme,
    /// No host or bucket.
    #[error("has no valid host or bucket")]
    Host,
    /// A bucket with more than a name.
    #[error("must have the name of a bucket alone, without a user name, a password or a port")]
    Bucket,
    /// A path that servers may take for another one.
    #[error(
        "must not have `.`, `..`, an encoded slash, a dot or slash that is encoded twice, or, of a bucket, `#` in its path"
    )]
    Path,
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.path)
    }
}

impl Origin {
    /// Reads a URL. User name and password do not count, and only for a bucket does the query.
    ///
    /// # Errors
    /// When it is not the address of a server or a bucket.
    pub(crate) fn parse(url: &str) -> Result<Self, OriginError> {
        let (url, fragment) = url
            .split_once('#')
            .map_or((url, None), |(url, rest)| (url, Some(rest)));
        let (scheme, rest) = url.split_once("://").ok_or(OriginError::Scheme)?;
        let scheme = scheme.to_ascii_lowercase();
        let origin = match &*scheme {
            "http" | "https" => {
                let (uri, _) = http_url(url).map_err(|_| OriginError::Host)?;
                let host = uri
                    .host()
                    .filter(|host| !host.is_empty())
                    .ok_or(OriginError::Host)?;
                let default = if scheme == "https" { 443 } else { 80 };
                let port = uri.port_u16().unwrap_or(default);
                Self {
                    authority: format!("{}:{port}", host.to_ascii_lowercase()),
                    path: uri.path().to_owned(),
                    settings: String::new(),
                    scheme,
                }
            }
            // Nothing is cut off from their names.
            "s3" | "gs" | "az" if fragment.is_some() => return Err(OriginError::Path),
            "s3" | "gs" | "az" => {
                let (place, settings) = rest.split_once('?').unwrap_or((rest, ""));
                let (bucket, path) = place.split_at(place.find('/').unwrap_or(place.len()));
                if bucket.contains(['@', ':']) {
                    return Err(OriginError::Bucket);
                }
                Self {
                    authority: bucket.to_owned(),
                    path: path.to_owned(),
                    settings: settings.to_owned(),
                    scheme,
                }
            }
            _ => return Err(OriginError::Scheme),
        };
        if origin.authority.is_empty() {
            return Err(OriginError::Host);
        }
        let decoded = percent_decode_str(&origin.path)
            .decode_utf8()
            .map_err(|_| OriginError::Path)?;
        // Some servers cut off what comes after a semicolon, and some decode twice.
        let is_odd = |part: &str| matches!(part.split(';').next(), Some("." | "..")) || part.contains('\\');
        let slashes = |text: &str| text.matches('/').count();
        let lower = decoded.to_ascii_lowercase();
        let is_encoded = ["%2e", "%2f", "%5c"].iter().any(|code| lower.contains(code));
        if decoded.split('/').any(is_odd) || is_encoded || slashes(&decoded) != slashes(&origin.path) {
            return Err(OriginError::Path);
        }
        Ok(origin)
    }

    /// Whether another one is this, or below it.
    fn has(&self, other: &Self) -> bool {
        let own = self.path.trim_end_matches('/');
        let is_below = other
            .path
            .strip_prefix(own)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        is_below
            && (&self.scheme, &self.authority, &self.settings)
                == (&other.scheme, &other.authority, &other.settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_below_an_allowed_url_is_allowed() {
        let allowed = [
            "https://user:secret@cache.example.com/builds/",
            "s3://bucket/ci?endpoint=http://localhost:9000",
            "http://plain:81",
            "s3://other",
        ];
        let allowed: Result<Vec<_>, _> = allowed.iter().map(|url| Origin::parse(url)).collect();
        let origins = Origins::Below(allowed.unwrap().into());
        for (url, fine) in [
            ("https://cache.example.com/builds/a.tar", true),
            ("HTTPS://Cache.Example.COM:443/builds/x/a.tar?sig=1#part", true),
            ("https://other@cache.example.com/builds/a.tar", true),
            ("https://cache.example.com/builds", true),
            ("https://cache.example.com/builds-secret/a.tar", false),
            ("https://cache.example.com/a.tar", false),
            ("https://cache.example.com/builds/../a.tar", false),
            ("https://cache.example.com/builds/%2e%2E/a.tar", false),
            ("https://cache.example.com/builds/..%2fa.tar", false),
            ("https://cache.example.com/builds/..%5ca.tar", false),
            ("https://cache.example.com/builds/..;/a.tar", false),
            ("https://cache.example.com/builds/..;x=1/a.tar", false),
            ("https://cache.example.com/builds/.;x/a.tar", false),
            ("https://cache.example.com/builds/..%3Bx/a.tar", false),
            ("https://cache.example.com/builds/a;x/b.tar", true),
            ("https://cache.example.com/builds/%252E%252e/a.tar", false),
            ("https://cache.example.com/builds/..%252Fa.tar", false),
            ("https://cache.example.com/builds/..%255ca.tar", false),
            ("https://cache.example.com/builds/100%25.tar", true),
            ("http://cache.example.com/builds/a.tar", false),
            ("https://cache.example.com:444/builds/a.tar", false),
            ("https://cache.example.com@evil/builds/a.tar", false),
            ("https://evil/builds/a.tar", false),
            ("s3://bucket/ci/1/?endpoint=http://localhost:9000", true),
            ("s3://bucket/ci/1/", false),
            ("s3://other/ci/1/", true),
            ("s3://other/ci/1/#?endpoint=http://evil", false),
            ("s3://AKIA:secret@other/ci/1/", false),
            ("s3://AKIA:sec/ret@other/ci/1/", false),
            ("s3://other:9000/ci/1/", false),
            ("s3://bucket/ci/1/?endpoint=http://evil", false),
            ("s3://bucket/cia/?endpoint=http://localhost:9000", false),
            ("s3://bucket-2/ci/?endpoint=http://localhost:9000", false),
            ("gs://bucket/ci/", false),
            ("http://plain:81/any/a.tar", true),
            ("http://plain/any/a.tar", false),
            ("file:///etc/", false),
            ("file://cache.example.com/builds/", false),
            ("/etc", false),
            ("", false),
        ] {
            assert_eq!(origins.allow(url), fine, "{url}");
            assert!(Origins::Anywhere.allow(url));
        }
        assert!(!Origins::Below([].into()).allow("https://cache.example.com/a"));
        let shown = format!("{origins:?}");
        assert!(!shown.contains("secret") && !shown.contains("user"), "{shown}");
        for url in ["s3://AKIA:secret@bucket/ci", "gs://token@bucket", "az://a:b"] {
            assert_eq!(Origin::parse(url), Err(OriginError::Bucket), "{url}");
        }
    }
}
