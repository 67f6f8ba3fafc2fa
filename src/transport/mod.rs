//! How any server is reached: its address, and the credentials that it is shown.

mod conceal;
mod endpoint;
mod error;
pub(crate) mod google;
mod header;
pub(crate) mod https;
pub(crate) mod netrc;

pub(crate) use conceal::Secrets;
pub use endpoint::Endpoint;
pub(crate) use endpoint::{split_user_info, without_user_info};
pub use error::{RemoteError, RemoteErrorKind};
pub use google::Google;
pub use header::Header;
