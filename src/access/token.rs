//! The secret that a listener asks for.

use std::{fmt, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc};

use http::{HeaderMap, header::AUTHORIZATION};
use subtle::ConstantTimeEq as _;
use tonic::{Request, Status, metadata::MetadataValue};

/// Shorter ones could be guessed.
const SHORTEST: usize = 16;

/// The header for callers whose `authorization` is for somebody else, to whom it is passed on.
pub(super) const OWN_HEADER: &str = "x-outhaul-token";

/// A secret that callers send as `authorization: Bearer TOKEN`, or as `x-outhaul-token: TOKEN`. Never shown.
#[derive(Clone)]
pub struct Token(Arc<str>);

/// Why a token file has no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The system's words.
    #[error("{0}")]
    Read(#[from] std::io::Error),
    /// It is empty or short.
    #[error("contains a token of {0} characters; at least {SHORTEST} are required")]
    Short(usize),
    /// It cannot be sent in a header.
    #[error("contains more than one line, or characters that are not allowed in a header")]
    Characters,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(***)")
    }
}

impl Token {
    /// Reads a file that holds a token and nothing else but white space around it.
    ///
    /// # Errors
    /// When it cannot be read, or holds none.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let token = Self::new(&std::fs::read_to_string(path)?)?;
        warn_if_readable(path);
        Ok(token)
    }

    /// From its text, with white space around it or not.
    ///
    /// # Errors
    /// When it is not a valid token.
    pub fn new(text: &str) -> Result<Self, TokenError> {
        let token = text.trim();
        if !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(TokenError::Characters);
        }
        if token.len() < SHORTEST {
            return Err(TokenError::Short(token.len()));
        }
        Ok(Self(token.into()))
    }

    /// Puts it into a request.
    ///
    /// # Errors
    /// Never, for the characters were looked at; a status all the same.
    pub fn put<T>(&self, request: &mut Request<T>) -> Result<(), Status> {
        let mut value: MetadataValue<_> = format!("Bearer {}", self.0)
            .parse()
            .map_err(|_| Status::internal("the token cannot be sent in a header"))?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
        Ok(())
    }

    /// Takes it out of a call's headers: every value that is the token. Whether there was any.
    pub(super) fn take(&self, headers: &mut HeaderMap) -> bool {
        let bearer = |value: &[u8]| {
            value
                .split_at_checked("Bearer ".len())
                .is_some_and(|(scheme, token)| scheme.eq_ignore_ascii_case(b"Bearer ") && self.is(token))
        };
        let by_authorization = take_from(headers, AUTHORIZATION.as_str(), bearer);
        let by_own = take_from(headers, OWN_HEADER, |value| self.is(value));
        by_authorization || by_own
    }

    /// How long the token is may show in the time taken; what it is may not.
    fn is(&self, text: &[u8]) -> bool {
        text.ct_eq(self.0.as_bytes()).into()
    }
}

/// Takes those values of a header out of which `ours` holds. Whether there was any.
fn take_from(headers: &mut HeaderMap, name: &'static str, ours: impl Fn(&[u8]) -> bool) -> bool {
    let all: Vec<_> = headers.get_all(name).iter().cloned().collect();
    let count = all.len();
    let others: Vec<_> = all.into_iter().filter(|value| !ours(value.as_bytes())).collect();
    if others.len() == count {
        return false;
    }
    headers.remove(name);
    for value in others {
        headers.append(name, value);
    }
    true
}

/// Anyone who can read a secret has it.
pub(super) fn warn_if_readable(path: &Path) {
    if std::fs::metadata(path).is_ok_and(|m| m.permissions().mode() & 0o004 != 0) {
        tracing::warn!(
            "{} is a secret and can be read by every user of this machine",
            path.display()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "0123456789abcdef";

    #[test]
    fn only_the_token_opens() {
        let token = Token::new(&format!("{SECRET}\n")).unwrap();
        let mut ours = Request::new(());
        token.put(&mut ours).unwrap();
        assert!(token.take(&mut ours.into_parts().0.into_headers()));
        for (name, value, opens) in [
            ("authorization", format!("bearer {SECRET}"), true),
            ("x-outhaul-token", SECRET.to_owned(), true),
            ("authorization", String::new(), false),
            ("authorization", "Bearer ".to_owned(), false),
            ("authorization", SECRET.to_owned(), false),
            ("authorization", "Bearer 0123456789abcdeg".to_owned(), false),
            ("authorization", "Bearer 0123456789abcde".to_owned(), false),
            ("authorization", "Bearer 0123456789abcdef0".to_owned(), false),
            ("authorization", format!("Basic {SECRET}"), false),
            ("x-outhaul-token", format!("Bearer {SECRET}"), false),
            ("x-api-key", SECRET.to_owned(), false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            assert_eq!(token.take(&mut headers), opens, "{name}: {value}");
            assert_eq!(headers.is_empty(), opens, "what is not ours stays");
        }
    }

    #[test]
    fn what_is_no_token_is_refused_and_not_shown() {
        for text in [
            "",
            "short",
            "0123456789 abcdef",
            "0123456789\nabcdef",
            "0123456789abcdefü",
        ] {
            let error = Token::new(text).expect_err(text).to_string();
            assert!(text.is_empty() || !error.contains(text), "{error}");
        }
        let shown = format!("{:?}", Token::new(SECRET).unwrap());
        assert!(!shown.contains(SECRET), "{shown}");
    }
}
