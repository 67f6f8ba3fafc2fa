//! Where documents are posted.

use std::{fmt, str::FromStr};

use anyhow::{Error, anyhow};
use base64::Engine as _;
use http::{HeaderValue, Uri, uri::Authority};
use percent_encoding::percent_decode_str;

use crate::transport::http_url;

/// An http or https URL. What may be a secret in it (user name and password, path, query) is never shown: many services'
/// webhooks are known by nothing but their path.
#[derive(Clone)]
pub(crate) struct NotifyUrl {
    /// Without user name and password.
    uri: Uri,
    /// `Basic ...`, made of these.
    authorization: Option<HeaderValue>,
    /// Scheme, host and port.
    origin: String,
}

impl NotifyUrl {
    /// What to ask for.
    pub(super) const fn uri(&self) -> &Uri {
        &self.uri
    }

    /// The `authorization` header, if the URL names a user.
    pub(super) const fn authorization(&self) -> Option<&HeaderValue> {
        self.authorization.as_ref()
    }

    /// Whether it asks for TLS.
    pub(super) fn is_https(&self) -> bool {
        self.uri.scheme_str() == Some("https")
    }
}

impl FromStr for NotifyUrl {
    type Err = anyhow::Error;

    /// The reasons never repeat the text.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (uri, user_info) = http_url(text).map_err(Error::msg)?;
        let authority = uri.authority().map_or("", Authority::as_str);
        Ok(Self {
            origin: format!("{}://{authority}", uri.scheme_str().unwrap_or_default()),
            authorization: user_info.as_deref().map(basic).transpose()?,
            uri,
        })
    }
}

fn basic(user_info: &str) -> anyhow::Result<HeaderValue> {
    let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
    let mut plain: Vec<u8> = percent_decode_str(user).collect();
    plain.push(b':');
    plain.extend(percent_decode_str(password));
    let encoded = base64::engine::general_purpose::STANDARD.encode(plain);
    let mut value = HeaderValue::from_str(&format!("Basic {encoded}"))
        .map_err(|_| anyhow!("its user name cannot be sent in a header"))?;
    value.set_sensitive(true);
    Ok(value)
}

impl fmt::Display for NotifyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.origin)
    }
}

impl fmt::Debug for NotifyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NotifyUrl({})", self.origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_may_be_secret_is_shown_or_lost() {
        let url: NotifyUrl = "https://user:p%40ss@hooks.example.com:8443/T0/B0/xyz?token=t"
            .parse()
            .unwrap();
        assert_eq!(url.to_string(), "https://hooks.example.com:8443");
        assert_eq!(format!("{url:?}"), "NotifyUrl(https://hooks.example.com:8443)");
        assert_eq!(
            url.uri().to_string(),
            "https://hooks.example.com:8443/T0/B0/xyz?token=t"
        );
        // "user:p@ss"
        let header = url.authorization().unwrap();
        assert_eq!(header, "Basic dXNlcjpwQHNz");
        assert!(header.is_sensitive() && url.is_https());
        let url: NotifyUrl = "http://[::1]:80".parse().unwrap();
        assert!(url.authorization().is_none() && !url.is_https());
        assert_eq!(url.uri().path(), "/");
    }

    #[test]
    fn what_is_no_url_is_refused_without_being_repeated() {
        for text in [
            "",
            "hooks.example.com/secret",
            "/secret",
            "ftp://h/secret",
            "http://",
            "http:///secret",
            "http://user:secret@/",
            "https://h/a b secret",
        ] {
            let reason = text.parse::<NotifyUrl>().unwrap_err().to_string();
            assert!(
                !reason.contains("secret") && !reason.is_empty(),
                "{text}: {reason}"
            );
        }
    }
}
