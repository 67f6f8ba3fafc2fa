//! Why a request failed.

use std::{fmt::Display, time::Duration};

/// What went wrong, for decisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RemoteErrorKind {
    /// The cache does not have the blob or action.
    NotFound,
    /// No connection, or it broke, or the server asked to try later.
    Unavailable,
    /// A deadline or the minimum throughput was missed.
    Timeout,
    /// The server does not let us.
    Denied,
    /// Credentials are missing or expired.
    Unauthenticated,
    /// The request cannot succeed as it is: a wrong instance name, digest function or limit.
    Rejected,
    /// The answer is not what the protocol promises: missing answers, wrong sizes, undecodable data.
    Protocol,
    /// Our side could not take the bytes.
    Sink,
    /// Settings that cannot work: an endpoint, a certificate, a credential helper.
    Config,
}

/// A failed request: what, where, and the server's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{context}: {message}")]
pub struct RemoteError {
    /// Kind of the error, for decisions.
    pub kind: RemoteErrorKind,
    /// What was tried on what: operation, digest, endpoint.
    pub context: String,
    /// The server's or the system's words.
    pub message: String,
    /// How long the server asked us to wait.
    pub retry_after: Option<Duration>,
}

/// Constructors of the kinds that are made most.
macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident: $kind:ident,)*) => {$(
        $(#[$doc])*
        pub(crate) fn $name(context: impl Into<String>, message: impl Display) -> Self {
            Self::new(RemoteErrorKind::$kind, context, message)
        }
    )*};
}

impl RemoteError {
    kinds! {
        /// What is wrong with a setting, named by its flag or file.
        config: Config,
        /// An answer that makes no sense.
        protocol: Protocol,
        /// A request that is refused.
        rejected: Rejected,
        /// Bytes that our side could not take.
        sink: Sink,
        /// No answer in time.
        timeout: Timeout,
        /// Nobody answers for now.
        unavailable: Unavailable,
    }

    /// An error of a kind.
    pub fn new(kind: RemoteErrorKind, context: impl Into<String>, message: impl Display) -> Self {
        Self {
            kind,
            context: context.into(),
            message: message.to_string(),
            retry_after: None,
        }
    }

    /// Whether the same request may succeed later.
    pub(crate) const fn is_retryable(&self) -> bool {
        matches!(self.kind, RemoteErrorKind::Unavailable | RemoteErrorKind::Timeout)
    }

    /// Whether the cache said that it does not have it.
    pub(crate) const fn is_not_found(&self) -> bool {
        matches!(self.kind, RemoteErrorKind::NotFound)
    }
}
