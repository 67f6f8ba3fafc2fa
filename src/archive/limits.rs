//! How much an archive may ask for.

use std::{fmt, ops::Index};

use anyhow::anyhow;

use crate::units::parse_named;

/// What is limited, of one archive. What is over a limit is an error, and nothing of the archive is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// Members, and directories that only their names imply.
    Entries,
    /// Bytes of all its files, holes and copies for hard links included, and of many zeros after the end of a tar.
    Bytes,
    /// Bytes of files for each byte of the archive, beyond the first [`Limits::FREE`].
    Ratio,
    /// Components of a path.
    Depth,
    /// Bytes of the headers of one member of a tar: long names, extended headers, maps of sparse files.
    Header,
    /// Bytes of `artifact_manifest.txt`.
    Manifest,
    /// Bytes of memory to decompress xz.
    XzMemory,
    /// Bytes of the window of zstd, which are held in memory.
    ZstdWindow,
}

/// All limits in their order: what each is called, whether it is in bytes, and its default.
const ALL: [(Limit, &str, bool, u64); 8] = [
    (Limit::Entries, "archive-entries", false, 2_000_000),
    (Limit::Bytes, "archive-size", true, 16 << 30),
    (Limit::Ratio, "archive-ratio", false, 200),
    (Limit::Depth, "archive-depth", false, 256),
    (Limit::Header, "archive-header", true, 1 << 20),
    (Limit::Manifest, "archive-manifest", true, 16 << 20),
    (Limit::XzMemory, "archive-xz-memory", true, 1 << 30),
    (Limit::ZstdWindow, "archive-zstd-window", true, 128 << 20),
];

/// The value of each [`Limit`], in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits(pub(super) [u64; ALL.len()]);

impl Limits {
    /// How many bytes of files the ratio does not look at: a small archive of zeros is not a bomb.
    pub(crate) const FREE: u64 = 64 << 20;

    /// The defaults with these changes, each as `NAME=VALUE`.
    ///
    /// # Errors
    /// In words, naming the one that is unknown or has an impossible value.
    pub(crate) fn parse(texts: &[String]) -> anyhow::Result<Self> {
        let mut limits = Self::default();
        for text in texts {
            let known = || ALL.iter().map(|(_, name, is_size, _)| (*name, *is_size));
            let (at, value) = parse_named(text, known).map_err(|reason| anyhow!("{text}: {reason}"))?;
            limits.0[at] = value;
        }
        Ok(limits)
    }

    /// The first limit that is higher here than there.
    pub(crate) fn exceeds(&self, other: &Self) -> Option<Limit> {
        let mut all = ALL.iter().map(|(limit, ..)| *limit);
        all.find(|limit| self[*limit] > other[*limit])
    }

    /// Changes a limit.
    #[cfg(test)]
    pub(super) const fn set(&mut self, limit: Limit, value: u64) {
        self.0[limit as usize] = value;
    }
}

impl Index<Limit> for Limits {
    type Output = u64;

    fn index(&self, limit: Limit) -> &u64 {
        &self.0[limit as usize]
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self(ALL.map(|(.., value)| value))
    }
}

impl Limit {
    /// A value as it is written, in the largest unit that it is a multiple of.
    pub(super) fn shown(self, value: u64) -> String {
        const UNITS: [(u32, &str); 3] = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        let is_whole = |bits: u32| value > 0 && value.trailing_zeros() >= bits;
        match UNITS.iter().find(|(bits, _)| is_whole(*bits)) {
            Some((bits, unit)) if ALL[self as usize].2 => format!("{}{unit}", value >> bits),
            _ => value.to_string(),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ALL[*self as usize].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_shown_as_they_are_written() {
        for (limit, value, shown) in [
            (Limit::ZstdWindow, 128 << 20, "128MiB"),
            (Limit::Bytes, 16 << 30, "16GiB"),
            (Limit::Bytes, 1025, "1025"),
            (Limit::Bytes, 0, "0"),
            (Limit::Entries, 1 << 20, "1048576"),
        ] {
            assert_eq!(limit.shown(value), shown);
            if value > 0 {
                let parsed = Limits::parse(&[format!("{limit}={shown}")]).unwrap();
                assert_eq!(parsed[limit], value);
            }
        }
    }

    #[test]
    fn every_limit_has_a_name_and_changes_alone() {
        for (at, (limit, name, ..)) in ALL.iter().enumerate() {
            assert_eq!((*limit as usize, limit.to_string()), (at, (*name).to_owned()));
            let mut changed = Limits::default();
            changed.set(*limit, 1234);
            assert_eq!(changed[*limit], 1234, "{name}");
            assert_eq!(format!("{changed:?}").matches("1234").count(), 1, "{name}");
            let more = Limits::default()[*limit] + 1;
            let more = Limits::parse(&[format!("{name}={more}")]).unwrap();
            assert_eq!(more.exceeds(&Limits::default()), Some(*limit));
            assert_eq!(Limits::default().exceeds(&more), None);
        }
    }
}
