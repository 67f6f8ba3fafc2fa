//! How any server is reached: addresses, connections with TLS or through sockets, and the credentials that it is shown.

pub(crate) mod auth;
pub(crate) mod bucket;
mod channel;
mod conceal;
mod delays;
mod endpoint;
mod error;
mod fault;
pub(crate) mod google;
mod header;
mod http_client;
pub(crate) mod http_head;
pub(crate) mod https;
pub(crate) mod netrc;
mod options;
mod retry_after;
mod shown;
mod tls;

pub(crate) use auth::Auth;
pub(crate) use bucket::BucketAddress;
pub(crate) use channel::Connector;
pub(crate) use conceal::Secrets;
pub(crate) use delays::Delays;
pub use endpoint::Endpoint;
#[cfg(feature = "object-stores")]
pub(crate) use endpoint::is_this_machine;
pub(crate) use endpoint::{http_url, is_http, split_user_info, without_user_info};
pub use error::RemoteError;
pub(crate) use error::RemoteErrorKind;
pub(crate) use fault::Fault;
pub(crate) use google::Google;
pub use header::Header;
pub(crate) use http_client::{HttpClient, HttpFault};
pub(crate) use options::ConnectOptions;
#[cfg(test)]
pub(crate) use retry_after::RetryInfo;
pub(crate) use retry_after::{retry_after, retry_delay};
pub(crate) use shown::{HIDDEN, without_secrets};
pub(crate) use tls::TlsFiles;
