//! Outputs on disk that are checked once more: because the build tool may have deleted them at its end, or because
//! another process may have replaced them ([`super::others`]).
//!
//! In minimal mode, Bazels before 6 delete at the end of a command whatever they have fetched in it as inputs of
//! actions of their own (`RemoteModule`, measured with 4.2.3), be it asked for or not: an output that was rightly found
//! present when its target was completed, or that was put there by us before, is gone when the command returns. They
//! do so before they end the stream.
//!
//! Newer ones leave what is there alone once they have named it, and are not looked after: it would cost a look at every
//! output while the command waits.

use std::{collections::HashMap, path::Path, thread};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, statat};
use tokio::task::{JoinSet, spawn_blocking};

use super::{Actor, phase::Step};
use crate::{exec_path::ExecPath, materialize::Outcome, output::Stamp};

/// The first version that deletes nothing at its end.
const TIDY_SINCE: u32 = 6;
/// How many looks are worth a thread of their own.
const LOOKS: usize = 512;
/// Threads beyond which the disk gains nothing.
const THREADS: usize = 4;

/// An output that is on disk.
#[derive(Clone)]
pub(super) struct Placed {
    pub(super) path: ExecPath,
    pub(super) outcome: Outcome,
}

/// What is checked once more, and why.
#[derive(Default)]
pub(super) struct Recheck {
    /// What is on disk, or was when it was looked at.
    pub(super) placed: Vec<Placed>,
    /// Whether another process may still place an older build's files here, and the task that watches it.
    pub(super) doubt: Option<Doubt>,
    pub(super) others: JoinSet<bool>,
}

/// Why what is on disk may not be what was placed or found there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doubt {
    /// Another process is placing files.
    Placing,
    /// The same, for so long that the build is not held any more.
    Stuck,
    /// They are done, and what is on disk is to be looked at; once more if what is optional was still on its way.
    Done { looked: bool },
}

impl Recheck {
    /// Whether nothing may be reported as on disk yet.
    pub(super) const fn holds(&self) -> bool {
        matches!(self.doubt, Some(Doubt::Placing | Doubt::Done { looked: false }))
    }
}

impl Actor {
    /// Whether what is on disk now is checked once more.
    pub(super) fn is_rechecked(&self) -> bool {
        let deletes = !self.phase.has_checked_again() && deletes_at_its_end(&self.row.build_tool_version);
        deletes || self.recheck.doubt.is_some()
    }

    /// Wants once more what the build tool has deleted. Once for each end of the stream.
    pub(super) async fn look_again(&mut self) {
        if !self.phase.takes(Step::CheckAgain) || !deletes_at_its_end(&self.row.build_tool_version) {
            return;
        }
        self.come_back().await;
        let placed = match self.recheck.doubt {
            Some(_) => self.recheck.placed.clone(),
            None => std::mem::take(&mut self.recheck.placed),
        };
        let outputs = self.want_again(placed).await;
        if outputs > 0 {
            tracing::debug!(
                invocation = %self.row.invocation_id,
                outputs,
                "the build tool deleted or changed outputs at the end of the build; downloading them again"
            );
        }
    }

    /// Wants once more what of this is not on disk any more. Gives how many that are.
    pub(super) async fn want_again(&mut self, placed: Vec<Placed>) -> usize {
        let (Some(place), Some(session)) = (self.site.open_root(), self.site.session()) else {
            return 0;
        };
        if placed.is_empty() {
            return 0;
        }
        let (root, version) = (place.root.clone(), place.version);
        let gone = spawn_blocking(move || {
            // What a newer build does with its outputs is no business of this one.
            if root.epoch.is_newest(version) {
                gone(root.place.path(), placed)
            } else {
                Vec::new()
            }
        });
        let mut wants = Vec::new();
        for placed in gone.await.unwrap_or_default() {
            wants.extend(self.ledger.want_again(placed.path, &placed.outcome));
        }
        let outputs = wants.len();
        if outputs > 0 {
            self.shared.materializer.want(session, wants).await;
        }
        outputs
    }
}

/// Whether a build tool of this version may delete at the end of a command what is there. One that does not say its
/// version, or says it in another way, may.
pub(super) fn deletes_at_its_end(version: &str) -> bool {
    let major = version.split(['.', '-', ' ']).next().unwrap_or_default();
    major.parse::<u32>().map_or(true, |major| major < TIDY_SINCE)
}

/// What of this is not there any more, or is another file.
fn gone(root: &Path, placed: Vec<Placed>) -> Vec<Placed> {
    // A directory's outputs are looked at together, from its descriptor.
    let mut directories: HashMap<String, Vec<Placed>> = HashMap::new();
    for placed in placed {
        let directory = placed.path.parent().unwrap_or_default();
        match directories.get_mut(directory) {
            Some(list) => list.push(placed),
            None => {
                directories.insert(directory.to_owned(), vec![placed]);
            }
        }
    }
    let looks = directories.values().map(Vec::len).sum::<usize>();
    let available = thread::available_parallelism().map_or(1, usize::from);
    let threads = looks.div_ceil(LOOKS).clamp(1, available.clamp(1, THREADS));
    let mut shares: Vec<Vec<(String, Vec<Placed>)>> = (0..threads).map(|_| Vec::new()).collect();
    for (number, directory) in directories.into_iter().enumerate() {
        shares[number % threads].push(directory);
    }
    let look = |share: Vec<(String, Vec<Placed>)>| -> Vec<Placed> {
        let lost = |(directory, placed): (String, Vec<Placed>)| gone_from(&root.join(directory), placed);
        share.into_iter().flat_map(lost).collect()
    };
    thread::scope(|scope| {
        let mut shares = shares.into_iter();
        let mine = shares.next().unwrap_or_default();
        let others: Vec<_> = shares.map(|share| scope.spawn(move || look(share))).collect();
        let mut gone = look(mine);
        for other in others {
            match other.join() {
                Ok(more) => gone.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        gone
    })
}

/// The same of one directory.
fn gone_from(directory: &Path, mut placed: Vec<Placed>) -> Vec<Placed> {
    // Only decides whether there is a closer look, so links on the way are followed wherever they lead.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if let Ok(directory) = openat(CWD, directory, flags, Mode::empty()) {
        placed.retain(|placed| {
            let name = placed.path.file_name();
            match placed.stamp() {
                Some(stamp) => !statat(&directory, name, AtFlags::empty()).is_ok_and(|now| {
                    (now.st_dev, now.st_ino, now.st_size.cast_unsigned())
                        == (stamp.device, stamp.inode, stamp.size)
                }),
                // In the place of a link or a directory, anything at all.
                None => statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).is_err(),
            }
        });
    }
    placed
}

impl Placed {
    fn stamp(&self) -> Option<&Stamp> {
        match &self.outcome {
            Outcome::Downloaded { stamp, .. } | Outcome::Present { stamp, .. } => stamp.as_ref(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt as _};

    use super::*;

    #[test]
    fn only_old_and_unknown_build_tools_are_looked_after() {
        for version in [
            "",
            "4.2.3",
            "5.4.1",
            "5.0.0-pre.20211011.2",
            "no_version",
            "head (@abc)",
        ] {
            assert!(deletes_at_its_end(version), "{version}");
        }
        for version in ["6.0.0", "6.0.0-pre.1", "7.7.1", "8.0.0rc1", "10.1.0", "9"] {
            assert!(!deletes_at_its_end(version), "{version}");
        }
    }

    #[test]
    fn what_was_deleted_or_changed_since_is_found_among_many() {
        let root = tempfile::tempdir().unwrap();
        let mut placed = Vec::new();
        for number in 0..3 * LOOKS {
            let path = format!("d{}/f{number}", number % 7);
            let on_disk = root.path().join(&path);
            fs::create_dir_all(on_disk.parent().unwrap()).unwrap();
            fs::write(&on_disk, "bytes").unwrap();
            let seen = fs::metadata(&on_disk).unwrap();
            let stamp = Stamp {
                size: seen.len(),
                inode: seen.ino(),
                device: seen.dev(),
                ..Stamp::default()
            };
            placed.push(Placed {
                path: ExecPath::new(&path).unwrap(),
                outcome: Outcome::Present {
                    stamp: Some(stamp),
                    hashed: false,
                },
            });
        }
        std::os::unix::fs::symlink("nowhere", root.path().join("link")).unwrap();
        for path in ["link", "tree"] {
            placed.push(Placed {
                path: ExecPath::new(path).unwrap(),
                outcome: Outcome::Present {
                    stamp: None,
                    hashed: true,
                },
            });
        }
        fs::remove_file(root.path().join("d3/f10")).unwrap();
        fs::write(root.path().join("d4/f11"), "other bytes").unwrap();
        fs::remove_dir_all(root.path().join("d0")).unwrap();
        let mut gone: Vec<String> = gone(root.path(), placed)
            .into_iter()
            .map(|placed| placed.path.as_str().to_owned())
            .collect();
        gone.sort_unstable();
        let mut expected: Vec<String> = (0..3 * LOOKS).step_by(7).map(|n| format!("d0/f{n}")).collect();
        expected.extend(["d3/f10", "d4/f11", "tree"].map(str::to_owned));
        expected.sort_unstable();
        assert_eq!(gone, expected);
    }
}
