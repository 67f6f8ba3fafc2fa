//! How much an archive may ask for.

use std::fmt;

use crate::units::parse_named;

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// [`Limits::entries`]
    Entries,
    /// [`Limits::bytes`]
    Bytes,
    /// [`Limits::ratio`]
    Ratio,
    /// [`Limits::depth`]
    Depth,
    /// [`Limits::header`]
    Header,
    /// [`Limits::manifest`]
    Manifest,
    /// [`Limits::xz_memory`]
    XzMemory,
    /// [`Limits::zstd_window`]
    ZstdWindow,
}

/// Limits of one archive. What is over one is an error, and nothing of the archive is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Members, and directories that only their names imply.
    pub(crate) entries: u64,
    /// Bytes of all its files, holes and copies for hard links included, and of many zeros after the end of a tar.
    pub(crate) bytes: u64,
    /// Bytes of files for each byte of the archive, beyond the first [`Self::FREE`].
    pub(crate) ratio: u64,
    /// Components of a path.
    pub(crate) depth: u64,
    /// Bytes of the headers of one member of a tar: long names, extended headers, maps of sparse files.
    pub(crate) header: u64,
    /// Bytes of `artifact_manifest.txt`.
    pub(crate) manifest: u64,
    /// Bytes of memory to decompress xz.
    pub(crate) xz_memory: u64,
    /// Bytes of the window of zstd, which are held in memory.
    pub(crate) zstd_window: u64,
}

impl Limits {
    /// How many bytes of files the ratio does not look at: a small archive of zeros is no bomb.
    pub(crate) const FREE: u64 = 64 << 20;

    /// The limits by their names, with a word about each, and whether it is in bytes.
    pub(crate) const NAMES: &'static [(&'static str, Limit, &'static str, bool)] = &[
        ("archive-entries", Limit::Entries, "members of an archive", false),
        ("archive-size", Limit::Bytes, "bytes of an archive's files", true),
        (
            "archive-ratio",
            Limit::Ratio,
            "bytes of files for each byte of the archive",
            false,
        ),
        (
            "archive-depth",
            Limit::Depth,
            "components of a path in an archive",
            false,
        ),
        (
            "archive-header",
            Limit::Header,
            "bytes of the headers of one member",
            true,
        ),
        (
            "archive-manifest",
            Limit::Manifest,
            "bytes of artifact_manifest.txt",
            true,
        ),
        (
            "archive-xz-memory",
            Limit::XzMemory,
            "bytes of memory to decompress xz",
            true,
        ),
        (
            "archive-zstd-window",
            Limit::ZstdWindow,
            "bytes of the window of zstd",
            true,
        ),
    ];

    /// The defaults with these changes, each as `NAME=VALUE`.
    ///
    /// # Errors
    /// In words, naming the one that is unknown or has an impossible value.
    pub(crate) fn parse(texts: &[String]) -> Result<Self, String> {
        let mut limits = Self::default();
        for text in texts {
            let known = || Self::NAMES.iter().map(|(name, _, _, is_size)| (*name, *is_size));
            let (at, value) = parse_named(text, known).map_err(|reason| format!("{text}: {reason}"))?;
            let (_, limit, ..) = Self::NAMES[at];
            limits.set(limit, value);
        }
        Ok(limits)
    }

    /// The first limit that is higher here than there.
    pub(crate) fn exceeds(&self, other: &Self) -> Option<Limit> {
        let mut all = Self::NAMES.iter().map(|(_, limit, ..)| *limit);
        all.find(|limit| self.get(*limit) > other.get(*limit))
    }

    /// The value of a limit.
    pub(crate) const fn get(&self, limit: Limit) -> u64 {
        match limit {
            Limit::Entries => self.entries,
            Limit::Bytes => self.bytes,
            Limit::Ratio => self.ratio,
            Limit::Depth => self.depth,
            Limit::Header => self.header,
            Limit::Manifest => self.manifest,
            Limit::XzMemory => self.xz_memory,
            Limit::ZstdWindow => self.zstd_window,
        }
    }

    /// Changes a limit.
    pub(crate) const fn set(&mut self, limit: Limit, value: u64) {
        let field = match limit {
            Limit::Entries => &mut self.entries,
            Limit::Bytes => &mut self.bytes,
            Limit::Ratio => &mut self.ratio,
            Limit::Depth => &mut self.depth,
            Limit::Header => &mut self.header,
            Limit::Manifest => &mut self.manifest,
            Limit::XzMemory => &mut self.xz_memory,
            Limit::ZstdWindow => &mut self.zstd_window,
        };
        *field = value;
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: 2_000_000,
            bytes: 16 << 30,
            ratio: 200,
            depth: 256,
            header: 1 << 20,
            manifest: 16 << 20,
            xz_memory: 1 << 30,
            zstd_window: 128 << 20,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = Limits::NAMES.iter().find(|(_, limit, ..)| limit == self);
        f.write_str(found.map_or("", |(name, ..)| name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_has_a_name_and_changes_alone() {
        for (name, limit, ..) in Limits::NAMES {
            assert_eq!(limit.to_string(), *name);
            let mut changed = Limits::default();
            changed.set(*limit, 1234);
            assert_eq!(changed.get(*limit), 1234, "{name}");
            assert_eq!(format!("{changed:?}").matches("1234").count(), 1, "{name}");
            let more = Limits::default().get(*limit) + 1;
            let more = Limits::parse(&[format!("{name}={more}")]).unwrap();
            assert_eq!(more.exceeds(&Limits::default()), Some(*limit));
            assert_eq!(Limits::default().exceeds(&more), None);
        }
    }
}
