//! Who may ask over TCP: whoever has the token.

use std::{fmt, path::Path, sync::Arc};

use subtle::ConstantTimeEq as _;
use tonic::{Request, Status, metadata::MetadataValue, service::Interceptor};

/// Shorter ones could be guessed.
const SHORTEST: usize = 16;

/// A secret that callers send as `authorization: Bearer TOKEN`. Never shown.
#[derive(Clone)]
pub struct Token(Arc<str>);

/// Why a token file has no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The system's words.
    #[error("{0}")]
    Read(#[from] std::io::Error),
    /// It is empty or short.
    #[error("holds a token of {0} characters; it needs at least {SHORTEST}")]
    Short(usize),
    /// It can't be sent in a header.
    #[error("holds more than one line, or characters that a header can't have")]
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
    /// When it can't be read, or holds none.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        Self::new(&std::fs::read_to_string(path)?)
    }

    fn new(text: &str) -> Result<Self, TokenError> {
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
            .map_err(|_| Status::internal("the token can't be sent"))?;
        value.set_sensitive(true);
        request.metadata_mut().insert("authorization", value);
        Ok(())
    }

    fn is_in<T>(&self, request: &Request<T>) -> bool {
        let Some(value) = request.metadata().get("authorization") else {
            return false;
        };
        let Some((scheme, token)) = value.as_bytes().split_at_checked("Bearer ".len()) else {
            return false;
        };
        // How long the token is may be told by the time; what it is may not.
        scheme.eq_ignore_ascii_case(b"Bearer ") && bool::from(token.ct_eq(self.0.as_bytes()))
    }
}

/// Lets only calls with the token through.
#[derive(Debug, Clone)]
pub struct TokenCheck(pub Token);

impl Interceptor for TokenCheck {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        if self.0.is_in(&request) {
            Ok(request)
        } else {
            Err(Status::unauthenticated(
                "this control API wants the token of --control-token-file",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "0123456789abcdef";

    fn with(header: Option<&str>) -> Request<()> {
        let mut request = Request::new(());
        if let Some(header) = header {
            request
                .metadata_mut()
                .insert("authorization", header.parse().unwrap());
        }
        request
    }

    #[test]
    fn only_the_token_opens() {
        let token = Token::new(&format!("{SECRET}\n")).unwrap();
        let mut check = TokenCheck(token.clone());
        let mut ours = with(None);
        token.put(&mut ours).unwrap();
        check.call(ours).unwrap();
        check.call(with(Some(&format!("bearer {SECRET}")))).unwrap();
        for wrong in [
            None,
            Some(""),
            Some("Bearer "),
            Some(SECRET),
            Some("Bearer 0123456789abcdeg"),
            Some("Bearer 0123456789abcde"),
            Some("Bearer 0123456789abcdef0"),
            Some("Basic 0123456789abcdef"),
        ] {
            let status = check.call(with(wrong)).expect_err("wrong");
            assert_eq!(status.code(), tonic::Code::Unauthenticated, "{wrong:?}");
            assert!(!status.message().contains(SECRET));
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
        let shown = format!("{:?}", TokenCheck(Token::new(SECRET).unwrap()));
        assert!(!shown.contains(SECRET), "{shown}");
    }
}
