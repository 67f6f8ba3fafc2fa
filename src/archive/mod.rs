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
//! | `format`, `limits`, `error` | what the callers see |
//! | `decode` | compressors, and where their streams properly end |
//! | `tar`, `zip` | members of an archive |
//! | `pax` | extended headers of tars |
//! | `member` | names and link targets: what may be unpacked, and where |
//! | `flatten` | TheRock's manifest: which part of a name is cut |
//! | `staging`, `tree`, `publish` | the directory: files and links beneath its descriptor; to the final name |

mod error;
mod format;
mod limits;

use std::{fs::File, io::Read};

pub use error::ArchiveError;
pub use format::{Format, Mode};
pub use limits::{Limit, Limits};

/// One archive that is to be unpacked.
#[derive(Debug, Clone, Copy)]
pub struct Archive<'a> {
    /// What messages call it: its URL or digest, without secrets.
    pub name: &'a str,
    /// Its place among those of one [`Staging`], from 0. With [`OnConflict::Last`] the highest wins, whichever is
    /// unpacked first.
    pub order: u32,
    /// What it is.
    pub format: Format,
    /// Where its members go.
    pub mode: &'a Mode,
    /// How much it may ask for.
    pub limits: &'a Limits,
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Regular files, those made from hard links too.
    pub files: u64,
    /// Symlinks.
    pub links: u64,
    /// Directories that are members. Parents that no member names do not count.
    pub directories: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

/// What becomes of a target that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// It is replaced as a whole, in one step where the file system can exchange directories.
    Replace,
    /// It is kept, and each file is renamed into it, in the place of what has its name.
    Merge,
}

/// What becomes of two members with the same path and different bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnConflict {
    /// An error that names both archives.
    #[default]
    Fail,
    /// The last member of the last archive wins, as in TheRock's tools.
    Last,
}

/// What a [`Staging`] obeys.
#[derive(Debug, Clone, Copy)]
pub struct StagingOptions {
    /// What becomes of a target that exists.
    pub existing: Existing,
    /// What becomes of members with the same path.
    pub on_conflict: OnConflict,
    /// Whether symlinks may lead anywhere. Nothing is written through them in either case.
    pub unsafe_links: bool,
}

/// A directory of our own on the target's file system, gone when dropped. Shared by the threads that unpack.
#[derive(Debug)]
pub struct Staging {}

/// What was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Files and symlinks that are in the target now.
    pub files: u64,
    /// Whether there was a target before.
    pub existed: bool,
}

impl Staging {
    /// Makes the directory, and the target's parents where they are missing.
    ///
    /// # Errors
    /// When the target cannot be a directory, or nothing can be written beside it.
    pub fn open(target: &std::path::Path, options: StagingOptions) -> Result<Self, ArchiveError> {
        // Not written yet.
        let _ = (target, options);
        todo!()
    }

    /// Moves everything to its final name. To be called only when the bytes of all archives are verified.
    ///
    /// # Errors
    /// When something in the target is in the way, or the system refuses. With [`Existing::Merge`] nothing was renamed
    /// if it is the former; each file there is whole in any case, and the same archives can be unpacked again.
    pub fn publish(self) -> Result<Published, ArchiveError> {
        todo!()
    }
}

/// Unpacks a tar as it comes, to the proper end of it and of its compressor, and reads `source` to its end.
///
/// # Errors
/// When `source` fails ([`ArchiveError::Source`]), or anything in the archive is damaged, not allowed or over a limit.
/// The [`Staging`] must not be published then.
pub fn unpack(source: impl Read, archive: &Archive<'_>, staging: &Staging) -> Result<Unpacked, ArchiveError> {
    let _ = (source, archive, staging);
    todo!()
}

/// Unpacks a zip. The whole file must be there, and verified, since its directory is at the end.
///
/// # Errors
/// As [`unpack`].
pub fn unpack_zip(file: &File, archive: &Archive<'_>, staging: &Staging) -> Result<Unpacked, ArchiveError> {
    let _ = (file, archive, staging);
    todo!()
}
