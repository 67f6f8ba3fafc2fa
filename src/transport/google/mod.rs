//! Google's credentials, as Bazel's `--google_credentials` and `--google_default_credentials` name them: from a service
//! account's key, a user's refresh token, another provider's token (“workload identity federation”) or a Google machine's
//! metadata to a token that is good for an hour or so.
//!
//! Keys and tokens are in no error, log or `Debug`, and neither is what a server says of them. A file is read again for
//! each token, so that nothing keeps a key, and a newer file counts.

mod call;
mod error;
mod file;

#[cfg(test)]
mod tests;
mod token;

pub(crate) use token::DEFAULT_SCOPE;
pub(crate) use token::Google;
