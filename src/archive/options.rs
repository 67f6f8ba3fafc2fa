//! What is to be unpacked and how, and what came of it.

use super::{Format, Limits, Mode};
use crate::{exec_path::ExecPath, output::OutputContent};

/// One archive that is to be unpacked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Archive<'a> {
    /// What messages call it: its URL or digest, without secrets.
    pub(crate) name: &'a str,
    /// Its place among those of one [`Staging`](super::Staging), from 0. With [`OnConflict::Last`] the highest wins, whichever is
    /// unpacked first.
    pub(crate) order: u32,
    /// What it is.
    pub(crate) format: Format,
    /// Where its members go.
    pub(crate) mode: &'a Mode,
    /// The directory in the target that all of them go below; empty for the target itself.
    pub(crate) below: &'a str,
    /// How much it may ask for.
    pub(crate) limits: &'a Limits,
}

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Regular files, those made from hard links too.
    pub(crate) files: u64,
    /// Symlinks.
    pub(crate) links: u64,
    /// Directories that are members. Parents that no member names do not count.
    pub(crate) directories: u64,
    /// Bytes of all files.
    pub(crate) bytes: u64,
}

/// What becomes of a target that exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    /// It is replaced as a whole, in one step where the file system can exchange directories.
    Replace,
    /// It is kept, and each file is renamed into it, in the place of what has its name.
    Merge,
}

/// What becomes of two members with the same path and different bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum OnConflict {
    /// An error that names both archives.
    #[default]
    Fail,
    /// The last member of the last archive wins, as in TheRock's tools. An archive whose hard links lead to files that a
    /// later one has as well must be unpacked before that one begins, or it is an error.
    Last,
}

/// What a [`Staging`](super::Staging) obeys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StagingOptions {
    /// What becomes of a target that exists.
    pub(crate) existing: Existing,
    /// What becomes of members with the same path.
    pub(crate) on_conflict: OnConflict,
    /// Whether symlinks may lead anywhere. Nothing is written through them in either case.
    pub(crate) unsafe_links: bool,
    /// Whether it is listed what was unpacked, for [`Staging::listed`](super::Staging::listed). Costs a SHA-256 of each file.
    pub(crate) lists: bool,
}

/// A path that was unpacked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Listed {
    /// Below the target.
    pub(crate) path: ExecPath,
    /// What it is. Directories are listed only if nothing is in them.
    pub(crate) content: OutputContent,
    /// The [`Archive::order`] of an archive that has it. What several have with the same content is listed for each.
    pub(crate) order: u32,
    /// Inode number of a file; 0 for others.
    pub(crate) inode: u64,
}

/// What was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Published {
    /// Files and symlinks that are in the target now.
    pub(crate) files: u64,
    /// Whether there was a target before.
    pub(crate) existed: bool,
}
