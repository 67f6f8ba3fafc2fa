//! Why there is no token of Google's.

use std::{io, path::PathBuf};

/// Why there is no token. No key, token or answer is in it.
#[derive(Debug, thiserror::Error)]
pub(super) enum GoogleError {
    #[error("--google-auth-scopes names no scope")]
    NoScope,
    #[error(
        "there are none: GOOGLE_APPLICATION_CREDENTIALS is not set, gcloud has left no \
         application_default_credentials.json, and this machine does not say that it is Google's (if it is, set \
         GCE_METADATA_HOST=metadata.google.internal)"
    )]
    NoCredentials,
    #[error("GCE_METADATA_HOST is not a host")]
    MetadataHost,
    /// In a file that no flag names.
    #[error("{file}: {error}")]
    In { file: String, error: Box<Self> },
    #[error("failed to read the credentials: {0}")]
    Unreadable(io::Error),
    #[error("the file does not contain Google credentials")]
    NotCredentials,
    #[error(
        "the file's credentials are not a service_account, authorized_user, external_account or \
         impersonated_service_account; others cannot be used"
    )]
    UnknownType,
    #[error("the file's credentials have no {0}")]
    Missing(&'static str),
    #[error("the file's {0} is not a URL")]
    NotUrl(&'static str),
    #[error("the file's private_key is not an RSA key in PKCS #8")]
    PrivateKey,
    #[error("the file's private_key does not sign")]
    Signature,
    #[error("the file's credential_source is neither a file nor a url; others cannot be used")]
    UnknownSource,
    #[error("failed to read {}: {error}", file.display())]
    UnreadableSource { file: PathBuf, error: io::Error },
    #[error("its credential_source gives no token")]
    EmptySource,
    #[error("{server}: {reason}")]
    Server { server: String, reason: String },
    #[error("{0}: its answer has no token")]
    NoToken(String),
    #[error("the token cannot be sent in a header")]
    TokenHeader,
    #[error("the file's quota_project_id cannot be sent in a header")]
    ProjectHeader,
}
