//! Unpacks archives into a directory of its own, and gives the whole its final name.
//!
//! Blocking code, called from threads for that. The order of calls: [`Staging::open`] beside the target, [`unpack`] or
//! [`unpack_zip`] once for each archive (also at the same time from several threads), and after the caller has verified
//! the bytes of all of them, [`Staging::publish`]. Until then nothing is in the target; a [`Staging`] that is dropped
//! removes what it holds, and what a killed process left is removed by the next one beside it.
//!
//! Archives are input from anyone. Every name is judged, parents are opened without following links, and whatever
//! cannot be unpacked exactly is an error, never left out.
//!
//! | file | what it is about |
//! |---|---|
//! | `format`, `options`, `limits`, `error` | what the callers see |
//! | `budget` | what an archive may still ask for, and all that are listed together |
//! | `decode` | compressors, and where their streams properly end |
//! | `tar`, `zip` | members of an archive |
//! | `pax` | extended headers of tars |
//! | `member` | names and link targets: what may be unpacked, and where |
//! | `flatten` | TheRock's manifest: which part of a name is cut |
//! | `staging`, `tree`, `publish` | the directory: files and links beneath its descriptor; to the final name |

mod budget;
mod decode;
mod error;
mod flatten;
mod format;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod limits;
mod member;
mod options;
mod pax;
mod publish;
mod staging;
mod tar;
#[cfg(test)]
mod tests;
mod tree;
mod zip;

pub(crate) use self::tar::unpack;
pub(crate) use self::zip::unpack as unpack_zip;
pub(crate) use budget::Listable;
pub(crate) use error::ArchiveError;
pub(crate) use format::{Format, Mode};
pub(crate) use limits::{Limit, Limits};
pub(crate) use options::{Archive, Existing, Listed, OnConflict, Published, StagingOptions, Unpacked};
pub(crate) use staging::Staging;
