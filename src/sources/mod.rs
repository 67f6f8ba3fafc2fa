//! Which remote cache a build's outputs are downloaded from: one for all builds, or the one that the build itself uses.
//!
//! [`Sources`] keeps the caches that are in use; `command_line` reads what a build's command line says of its cache.

mod caches;
mod command_line;
mod error;
#[cfg(test)]
mod tests;

pub(crate) use self::caches::Sources;
pub use self::caches::{SourceCache, SourceRule};
pub(crate) use self::command_line::{BuildDirectories, address_of};
pub(crate) use self::command_line::{add_login, google_of};
pub(crate) use self::error::SourceError;
