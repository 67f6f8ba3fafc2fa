//! Flags of files and archives that are named by URL or digest: for `fetch archive` and `stage`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::exit::Failure;
use crate::{
    archive::Limits,
    collection::{Checking, Checksums},
    stage::Manner,
};

/// How files are verified, and how many are downloaded at the same time.
#[derive(Debug, Clone, Args)]
pub(super) struct FilesArgs {
    /// Whether to verify against the file NAME.sha256sum beside each file: if there is one, always (a missing one is an
    /// unfinished upload), or not; by default if there is one, and with --checksum-file always. A digest is always
    /// verified
    #[arg(long, value_name = "WHEN", value_enum)]
    pub(super) checksum: Option<When>,

    /// File with checksums, as sha256sum writes it (repeatable)
    #[arg(long, value_name = "FILE")]
    pub(super) checksum_file: Vec<PathBuf>,

    /// Files to download at the same time
    #[arg(long, value_name = "N", default_value_t = Manner::JOBS, value_parser = clap::value_parser!(u16).range(1..=Manner::MOST_JOBS.into()))]
    pub(super) jobs: u16,

    /// Change a limit of one archive (repeatable): archive-entries, archive-size, archive-ratio, archive-depth,
    /// archive-header, archive-manifest, archive-xz-memory, archive-zstd-window
    #[arg(long, value_name = "NAME=VALUE", value_delimiter = ',')]
    pub(super) limit: Vec<String>,
}

/// When files are verified against checksums that are beside them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum When {
    Auto,
    Require,
    None,
}

impl FilesArgs {
    /// The texts of `--checksum-file`, and what they say.
    pub(super) fn checksums(&self) -> Result<(String, Checksums), Failure> {
        let (mut text, mut sums) = (String::new(), Checksums::default());
        for path in &self.checksum_file {
            let failure = |why: &dyn std::fmt::Display| {
                Failure::usage(format!("--checksum-file={}: {why}", path.display()))
            };
            if self.checksum == Some(When::None) {
                return Err(failure(&"has no effect with --checksum=none"));
            }
            let of_file = std::fs::read_to_string(path).map_err(|e| failure(&e))?;
            let more = Checksums::parse(&of_file).map_err(|e| failure(&e))?;
            sums = sums.and(more).map_err(|e| failure(&e))?;
            text += &of_file;
            text.push('\n');
        }
        Ok((text, sums))
    }

    pub(super) fn checking(&self) -> Checking {
        match self.checksum {
            Some(When::Require) => Checking::Require,
            // A list that does not have a file, such as one of another release, must not pass for a check.
            None if !self.checksum_file.is_empty() => Checking::Require,
            Some(When::Auto) | None => Checking::Auto,
            Some(When::None) => Checking::None,
        }
    }

    pub(super) fn limits(&self) -> Result<Limits, Failure> {
        Limits::parse(&self.limit).map_err(|e| Failure::usage(format!("--limit={e}")))
    }
}
