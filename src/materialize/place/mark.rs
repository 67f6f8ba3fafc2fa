//! What is to stay free of a file system, and why a file is not written.

use std::{fmt, str::FromStr};

use anyhow::{anyhow, bail};
use rustix::{fd::AsFd, fs};

use crate::units::{parse_size, show_size};

/// A shortage that this many bytes less would not have averted concerns every file.
const SMALL: u64 = 1 << 20;

/// The default mark, and the part of a smaller file system that is kept instead.
const DEFAULT_BYTES: u64 = 64 << 20;
const DEFAULT_PART: u64 = 20;

/// A part of the whole, in hundredths of a percent.
const WHOLE: u64 = 10_000;

/// A low-water mark: what is to stay free of every file system that outputs go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mark {
    /// 64 MiB; of a file system with less than 20 times as much, the twentieth part.
    #[default]
    Default,
    /// The same for optional outputs, and nothing for what somebody waits for: Bazel keeps nothing free, either.
    ForOptional,
    /// A number of bytes.
    Amount(u64),
    /// A part of the file system, in hundredths of a percent.
    Part(u64),
}

impl Mark {
    /// Everything may be filled.
    pub const NOTHING: Self = Self::Amount(0);

    /// Why no required file, or no optional one, is written to the file system of an open directory, if none is.
    pub(crate) fn shortage(self, directory: impl AsFd, is_optional: bool) -> Option<Shortage> {
        Free::of(directory).shortage(self, is_optional, 1)
    }

    /// How many bytes are to be freed on the file system of an open directory, where optional outputs are not downloaded any
    /// more: until there is room for some of them.
    pub(crate) fn lacks(self, directory: impl AsFd) -> Option<u64> {
        Free::of(directory).lacks(self)
    }

    /// How much is to stay free of a file system of this size.
    fn of(self, total: u64, is_optional: bool) -> u64 {
        let mark = match self {
            Self::ForOptional if !is_optional => 0,
            Self::Default | Self::ForOptional => DEFAULT_BYTES.min(total / DEFAULT_PART),
            Self::Amount(amount) => amount,
            Self::Part(part) => {
                let part = u128::from(total) * u128::from(part) / u128::from(WHOLE);
                u64::try_from(part).unwrap_or(u64::MAX)
            }
        };
        mark.saturating_mul(if is_optional { 2 } else { 1 })
    }
}

/// A size, as `10GiB`, or a percentage from 0% to 100%.
impl FromStr for Mark {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let Some(percent) = text.trim().strip_suffix('%') else {
            return parse_size(text)
                .map(Self::Amount)
                .map_err(|e| anyhow!("{e}, nor a percentage of the disk (write 5%)"));
        };
        let percent: f64 = percent
            .trim()
            .parse()
            .map_err(|_| anyhow!("{text:?} is not a percentage"))?;
        if !(0.0..=100.0).contains(&percent) {
            bail!("{text:?} is not between 0% and 100%");
        }
        // Checked above: it is from 0 to 10,000.
        Ok(Self::Part((percent * 100.0).round() as u64))
    }
}

/// What a file system has, in bytes; all 0 where it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Free {
    /// What users may still fill.
    pub(super) bytes: u64,
    total: u64,
}

impl Free {
    #[cfg(test)]
    pub(super) const fn new(bytes: u64, total: u64) -> Self {
        Self { bytes, total }
    }

    pub(super) fn of(fd: impl AsFd) -> Self {
        // Where that fails nothing is known, and nothing is held back: what is full says so by itself.
        let found = fs::fstatvfs(fd).ok();
        found.map_or_else(Self::default, |found| Self {
            bytes: found.f_bavail.saturating_mul(found.f_frsize),
            total: found.f_blocks.saturating_mul(found.f_frsize),
        })
    }

    /// How many bytes more there must be for a required file of this size.
    #[cfg(feature = "mount")]
    pub(super) fn missing(self, mark: Mark, needs: u64) -> u64 {
        let all = needs
            .saturating_add(mark.of(self.total, false))
            .saturating_sub(self.bytes);
        if self.total > 0 { all } else { 0 }
    }

    /// What is to be freed where less than twice the mark is free: half of the mark more than that.
    fn lacks(self, mark: Mark) -> Option<u64> {
        let least = mark.of(self.total, true);
        (self.total > 0 && self.bytes < least).then(|| least.saturating_add(least / 4) - self.bytes)
    }

    /// Why a file of this size is not to be written, if it is not.
    pub(super) fn shortage(self, mark: Mark, is_optional: bool, needs: u64) -> Option<Shortage> {
        let keeps = mark.of(self.total, is_optional);
        // Nothing is held back where nothing is to be kept, but what cannot fit.
        let is_short = self.total > 0
            && match keeps {
                0 => mark == Mark::ForOptional && self.bytes < needs,
                keeps => self.bytes.saturating_sub(needs) < keeps,
            };
        is_short.then_some(Shortage {
            free: self,
            needs,
            keeps,
            is_optional,
        })
    }
}

/// Why a file is not written: there would be less left than is to stay free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    free: Free,
    needs: u64,
    keeps: u64,
    pub(super) is_optional: bool,
}

impl Shortage {
    /// Whether nothing is to stay free, so that there is no room at all.
    pub(super) const fn is_of_nothing(&self) -> bool {
        self.keeps == 0
    }

    /// Whether a small file is no better off.
    pub(super) const fn is_of_everything(&self) -> bool {
        self.free.bytes.saturating_sub(SMALL) < self.keeps
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no space left: the file system has {} free of {}, ",
            show_size(self.free.bytes),
            show_size(self.free.total)
        )?;
        if self.free.bytes >= self.keeps {
            write!(f, "the file has {}, ", show_size(self.needs))?;
        }
        let keeps = show_size(self.keeps);
        if self.keeps == 0 {
            write!(f, "which does not fit")
        } else if self.is_optional {
            write!(
                f,
                "and optional outputs must leave {keeps} free (twice --min-free-space)"
            )
        } else {
            write!(f, "and {keeps} must stay free (--min-free-space)")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_lacking_below_twice_the_mark_and_until_there_is_a_little_more() {
        for (free, mark, lacks) in [
            (200, "100", None),
            (199, "100", Some(51)),
            (0, "100", Some(250)),
            (999, "50%", Some(251)),
            (0, "0", None),
        ] {
            assert_eq!(
                Free::new(free, 1000).lacks(mark.parse().unwrap()),
                lacks,
                "{free} {mark}"
            );
        }
        // Of a file system that does not say what it has.
        assert_eq!(Free::default().lacks(Mark::Default), None);
        assert_eq!(Free::default().lacks(Mark::Amount(500)), None);
    }

    const GIB: u64 = 1 << 30;
    const MARK: Mark = Mark::Amount(GIB);

    fn free(bytes: u64) -> Free {
        Free::new(bytes, 100 * GIB)
    }

    #[test]
    fn marks_are_read_as_written() {
        assert_eq!("10GiB".parse::<Mark>().unwrap(), Mark::Amount(10 * GIB));
        assert_eq!("5%".parse::<Mark>().unwrap(), Mark::Part(500));
        assert_eq!(" 0.25 % ".parse::<Mark>().unwrap(), Mark::Part(25));
        assert_eq!("0".parse::<Mark>().unwrap(), Mark::Amount(0));
        for bad in ["", "%", "-1%", "101%", "nan%", "much", "-5"] {
            assert!(
                bad.parse::<Mark>().unwrap_err().to_string().contains(bad),
                "{bad}"
            );
        }
        for (mark, total, required, optional) in [
            (Mark::Part(500), 100 * GIB, 5 * GIB, 10 * GIB),
            (Mark::Part(WHOLE), u64::MAX, u64::MAX, u64::MAX),
            (Mark::Default, 100 * GIB, DEFAULT_BYTES, 2 * DEFAULT_BYTES),
            // A small disk can be used.
            (Mark::Default, 20 << 20, 1 << 20, 2 << 20),
            (Mark::ForOptional, 100 * GIB, 0, 2 * DEFAULT_BYTES),
        ] {
            let of = |is_optional| mark.of(total, is_optional);
            assert_eq!((of(false), of(true)), (required, optional), "{mark:?}");
        }
    }

    #[test]
    fn optional_files_end_at_twice_the_mark_and_no_file_goes_below_it() {
        for (bytes, needs, required, optional) in [
            (10 * GIB, 1, true, true),
            (2 * GIB, 0, true, true),
            (2 * GIB, 1, true, false),
            (GIB, 0, true, false),
            (GIB, 1, false, false),
            (10 * GIB, 9 * GIB, true, false),
            (10 * GIB, 9 * GIB + 1, false, false),
            (10 * GIB, u64::MAX, false, false),
            (0, 0, false, false),
        ] {
            let fits = |optional| free(bytes).shortage(MARK, optional, needs).is_none();
            assert_eq!((fits(false), fits(true)), (required, optional), "{bytes} {needs}");
            #[cfg(feature = "mount")]
            {
                let missing = free(bytes).missing(MARK, needs);
                assert_eq!(missing == 0, required, "{bytes} {needs}");
                let more = Free::new(bytes.saturating_add(missing), 100 * GIB);
                assert_eq!(more.missing(MARK, needs), 0, "{bytes} {needs}");
            }
        }
    }

    #[test]
    fn what_the_file_system_does_not_count_holds_nothing_back() {
        assert_eq!(Free::default().shortage(MARK, true, 1), None);
        assert_eq!(free(0).shortage(Mark::NOTHING, true, 1), None);
    }

    #[test]
    fn a_refusal_says_what_there_is_and_which_flag_decides() {
        let said = |bytes, optional, needs| free(bytes).shortage(MARK, optional, needs).unwrap().to_string();
        assert_eq!(
            said(GIB / 2, false, 5),
            "no space left: the file system has 512.0 MiB free of 100.0 GiB, and 1.0 GiB must stay free \
             (--min-free-space)"
        );
        assert!(said(5 * GIB, false, 5 * GIB).contains("the file has 5.0 GiB"));
        assert!(
            said(GIB, true, 5).contains("optional outputs must leave 2.0 GiB free (twice --min-free-space)")
        );
    }
}
