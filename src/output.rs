//! An output: its expected content, its class, and what is known about it on disk.

use std::{collections::HashSet, time::Duration};

use anyhow::bail;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{digest::Digest, exec_path::ExecPath};

/// What should be at an output's path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputContent {
    /// A file with this blob's bytes.
    Blob(Digest),
    /// A file with these bytes, which came inside the event.
    Inline(Bytes),
    /// A symlink with this target, to be made as it is.
    Symlink(String),
    /// A directory of its own: the root of an empty tree.
    Directory,
}

impl OutputContent {
    /// Bytes of the file; 0 for what is none.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Blob(digest) => digest.size(),
            Self::Inline(bytes) => bytes.len() as u64,
            Self::Symlink(_) | Self::Directory => 0,
        }
    }

    /// Whether both come to the same on disk, wherever the bytes come from.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Blob(digest), Self::Inline(bytes)) | (Self::Inline(bytes), Self::Blob(digest)) => {
                digest.size() == bytes.len() as u64 && Digest::of(digest.function(), bytes) == *digest
            }
            _ => self == other,
        }
    }
}

/// The directories that outputs lie in: none of them can be another output's file or link.
#[derive(Debug, Default)]
pub struct Directories(HashSet<Box<str>, foldhash::fast::RandomState>);

impl Directories {
    /// Takes an output in, unless it contradicts others. `is_file` says of a path whether an output that was taken in
    /// has it, other than as a directory.
    ///
    /// # Errors
    /// In words: what it contradicts.
    pub(crate) fn take_in(
        &mut self,
        path: &ExecPath,
        content: &OutputContent,
        is_file: impl Fn(&str) -> bool,
    ) -> anyhow::Result<()> {
        if *content != OutputContent::Directory && self.0.contains(path.as_str()) {
            bail!("{path}: other outputs of this build are inside it");
        }
        // What is in here has been looked at, with all that is above it.
        let mut new: Vec<Box<str>> = Vec::new();
        let mut above = path.parent();
        while let Some(directory) = above.filter(|directory| !self.0.contains(*directory)) {
            if is_file(directory) {
                bail!("{path}: its parent {directory} is also an output of this build, and not a directory");
            }
            new.push(directory.into());
            above = directory.rsplit_once('/').map(|(above, _)| above);
        }
        self.0.extend(new);
        Ok(())
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|directory| &**directory)
    }

    /// Whether outputs lie below a path.
    pub fn contains(&self, path: &ExecPath) -> bool {
        self.0.contains(path.as_str())
    }
}

/// How much an output is wanted. Ordered: more wanted is greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Class {
    /// Only its metadata is recorded.
    #[default]
    Known,
    /// Fetched best-effort, after everything required.
    Optional,
    /// Fetched, and its target is not settled without it.
    Required,
}

impl Class {
    /// The class of this name.
    pub fn named(name: &str) -> Option<Self> {
        let classes = [Self::Known, Self::Optional, Self::Required];
        classes.into_iter().find(|class| class.name() == name)
    }

    /// `known`, `optional` or `required`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Known => "known",
            Self::Optional => "optional",
            Self::Required => "required",
        }
    }
}

/// What `lstat` said of a file while its bytes were known to be right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stamp {
    /// Size in bytes.
    pub size: u64,
    /// Modification time in nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// Change time in nanoseconds since the epoch.
    pub ctime_ns: i64,
    /// Inode number.
    pub inode: u64,
    /// Device number.
    pub device: u64,
    /// Wall clock when the stamp was taken, in nanoseconds since the epoch.
    pub taken_ns: i64,
}

/// How far apart the times are that Linux gives to changes of files: it takes that of the last timer tick, at most 10 ms
/// ago, however fine the file system's own steps are.
pub const CLOCK_TICK_NS: i64 = 10_000_000;

/// How long a file has to be there before its stamp is recorded, so that the stamp is older than the record by more than a
/// clock tick: see [`Stamp::recorded_at`].
pub const STAMP_AGE: Duration = Duration::from_millis(25);

/// Steps in which file systems keep times that are coarser than a tick: vfat's two seconds, the second of ext3, of ext4
/// with small inodes and of old NFS servers, and whatever else there may be.
const COARSE_STEPS_NS: [i64; 3] = [2_000_000_000, 1_000_000_000, 100_000_000];

/// How long after a time of a file another change may still have left the same time. Which steps a file system has, its
/// times say: all of them are multiples of a step, and on one with fine steps next to none is.
const fn step_of(time_ns: i64) -> i64 {
    let [two_seconds, second, tenth] = COARSE_STEPS_NS;
    if time_ns % two_seconds == 0 {
        two_seconds + CLOCK_TICK_NS
    } else if time_ns % second == 0 {
        second + CLOCK_TICK_NS
    } else if time_ns % tenth == 0 {
        tenth + CLOCK_TICK_NS
    } else {
        CLOCK_TICK_NS
    }
}

impl Stamp {
    /// Whether a file with the stamp `now` is still the one that this stamp was taken of, without a look at its
    /// bytes. A file that may have been changed after its stamp was taken and have the same times, because the clock has
    /// made no step in between, is not trusted (git's rule for its index). The times of a file server count as those of
    /// our clock: if it is behind by more than a step, that is not noticed.
    pub(crate) const fn vouches_for(&self, now: &Self) -> bool {
        self.size == now.size
            && self.mtime_ns == now.mtime_ns
            && self.ctime_ns == now.ctime_ns
            && self.inode == now.inode
            && self.device == now.device
            // A file's times may be as far in the future as its owner likes.
            && self.ctime_ns.saturating_add(step_of(self.ctime_ns)) < self.taken_ns
            && self.mtime_ns.saturating_add(step_of(self.mtime_ns)) < self.taken_ns
    }

    /// The stamp of a file that was placed, for a row that is written now, a clock tick or more after that. It counts as
    /// taken now, since nobody changes a file within the tick in which it was placed. Where times have coarser steps,
    /// such a change is possible: there it counts as taken when it was. The next look at the file reads it,
    /// and the stamp of that look is old enough.
    pub(crate) const fn recorded_at(self, now_ns: i64) -> Self {
        if step_of(self.ctime_ns) > CLOCK_TICK_NS || step_of(self.mtime_ns) > CLOCK_TICK_NS {
            self
        } else {
            Self {
                taken_ns: now_ns,
                ..self
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Stamp = Stamp {
        size: 5,
        mtime_ns: 1_000_000_001,
        ctime_ns: 2_000_000_001,
        inode: 7,
        device: 1,
        taken_ns: 3_000_000_000,
    };

    #[test]
    fn any_difference_ends_the_trust() {
        assert!(OLD.vouches_for(&Stamp {
            taken_ns: 9_000_000_000,
            ..OLD
        }));
        for changed in [
            Stamp { size: 6, ..OLD },
            Stamp { mtime_ns: 1, ..OLD },
            Stamp { ctime_ns: 1, ..OLD },
            Stamp { inode: 8, ..OLD },
            Stamp { device: 2, ..OLD },
        ] {
            assert!(!OLD.vouches_for(&changed), "{changed:?}");
        }
    }

    #[test]
    fn a_stamp_as_young_as_its_file_is_not_trusted() {
        let racy = Stamp {
            taken_ns: OLD.ctime_ns + CLOCK_TICK_NS,
            ..OLD
        };
        assert!(!racy.vouches_for(&racy));
    }

    #[test]
    fn where_times_have_coarse_steps_a_stamp_is_trusted_a_step_later_and_not_before() {
        const SECOND: i64 = 1_000_000_000;
        let of = |changed_ns: i64, after_ns: i64| Stamp {
            mtime_ns: changed_ns,
            ctime_ns: changed_ns,
            taken_ns: changed_ns + after_ns,
            ..OLD
        };
        for (changed_ns, step_ns) in [
            // vfat; it may as well be a second's.
            (1_700_000_000 * SECOND, 2 * SECOND),
            // ext3, ext4 with inodes of 128 bytes, some NFS.
            (1_700_000_001 * SECOND, SECOND),
            (1_700_000_001 * SECOND + 300_000_000, SECOND / 10),
            (1_700_000_001 * SECOND + 123_456_789, 0),
            // Before the epoch.
            (-SECOND, SECOND),
        ] {
            for after_ns in [0, step_ns / 2, step_ns, step_ns + CLOCK_TICK_NS] {
                let young = of(changed_ns, after_ns);
                assert!(!young.vouches_for(&young), "{young:?}");
                // Writing it down later makes it no older.
                let recorded = young.recorded_at(changed_ns + 60 * SECOND);
                assert_eq!(recorded.vouches_for(&young), step_ns == 0, "{young:?}");
            }
            let old = of(changed_ns, step_ns + CLOCK_TICK_NS + 1);
            assert!(old.vouches_for(&old), "{old:?}");
            assert!(old.recorded_at(changed_ns + 60 * SECOND).vouches_for(&old));
        }
        // Either time may be the one with coarse steps.
        let mtime_alone = Stamp {
            ctime_ns: 1_700_000_001 * SECOND + 5,
            ..of(1_700_000_001 * SECOND, SECOND / 2)
        };
        assert!(!mtime_alone.vouches_for(&mtime_alone));
        assert_eq!(mtime_alone.recorded_at(i64::MAX), mtime_alone);
    }

    #[test]
    fn a_file_from_the_future_or_of_before_the_clock_was_set_back_is_not_trusted() {
        for times in [OLD.taken_ns + 1, i64::MAX - CLOCK_TICK_NS / 2, i64::MAX] {
            for stamp in [
                Stamp {
                    mtime_ns: times,
                    ..OLD
                },
                Stamp {
                    ctime_ns: times,
                    ..OLD
                },
            ] {
                assert!(!stamp.vouches_for(&stamp), "{stamp:?}");
            }
        }
        let before_everything = Stamp {
            mtime_ns: i64::MIN,
            ..OLD
        };
        assert!(before_everything.vouches_for(&before_everything));
        let without_a_clock = Stamp { taken_ns: 0, ..OLD };
        assert!(!without_a_clock.vouches_for(&without_a_clock));
    }
}
