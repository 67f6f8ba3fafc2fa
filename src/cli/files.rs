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
    /// unfinished upload), or not. A digest is always verified
    #[arg(long, value_name = "WHEN", value_enum, default_value = "auto")]
    pub(super) checksum: When,

    /// File with checksums, as sha256sum writes it
    #[arg(long, value_name = "FILE")]
    pub(super) checksum_file: Option<PathBuf>,

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
    /// The text of `--checksum-file`; empty without it.
    pub(super) fn checksum_list(&self) -> Result<String, Failure> {
        let Some(path) = &self.checksum_file else {
            return Ok(String::new());
        };
        std::fs::read_to_string(path)
            .map_err(|e| Failure::usage(format!("--checksum-file={}: {e}", path.display())))
    }

    pub(super) fn checksums(&self) -> Result<Checksums, Failure> {
        Checksums::parse(&self.checksum_list()?).map_err(|e| {
            let path = self.checksum_file.clone().unwrap_or_default();
            Failure::usage(format!("--checksum-file={}: {e}", path.display()))
        })
    }

    pub(super) const fn checking(&self) -> Checking {
        match self.checksum {
            When::Auto => Checking::Auto,
            When::Require => Checking::Require,
            When::None => Checking::None,
        }
    }

    pub(super) fn limits(&self) -> Result<Limits, Failure> {
        Limits::parse(&self.limit).map_err(|e| Failure::usage(format!("--limit={e}")))
    }
}
