//! Journals that a start did not survive.
//!
//! What is replayed at a start may be what ended the process before: a build whose outputs made it overflow its stack,
//! or take more memory than there is. Nobody could start the daemon then. So a replay is marked before it begins, in
//! `NAME.replaying`, a byte for each, and the mark goes when the build is done with, or the process ends in good order.
//! A process that finds a mark of one that did not is careful with that journal ([`Journal::lost_replays`]), and one
//! that finds marks of [`MOST_LOST`] sets it aside, as `NAME.set-aside`: nothing of it is lost, and anyone who gives it
//! its name back has it replayed again.

use std::{
    ffi::OsStr,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

use super::{
    error::JournalError,
    store::{Entry, Journal, UNFINISHED},
};
use crate::{builds::StreamKey, open_files::is_lacking};

pub(super) const REPLAYING: &str = "replaying";
const ASIDE: &str = "set-aside";

/// Processes that died in a journal's replay, one after the other, before it is set aside. One may have been killed for
/// another reason.
pub(crate) const MOST_LOST: u64 = 2;

/// A journal that was set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SetAside {
    /// Its stream.
    pub key: StreamKey,
    /// In words, what has become of it and what can be done.
    pub message: String,
}

/// The mark of a replay, taken away when it is dropped or the replay is over; not if the process dies.
#[derive(Debug)]
pub(crate) struct Replaying(PathBuf);

impl Drop for Replaying {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

fn remove(mark: &Path) {
    match fs::remove_file(mark) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(mark = %mark.display(), %error, "failed to remove the marker of a replay");
        }
        _ => {}
    }
}

/// How many replays a mark reports.
fn lost(mark: &Path) -> u64 {
    fs::symlink_metadata(mark).map_or(0, |mark| mark.len())
}

impl Journal {
    /// Sets aside what processes died of again and again. Before anything is replayed.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub(crate) fn set_aside(&self) -> Result<Vec<SetAside>, JournalError> {
        let mut all = Vec::new();
        for entry in self.unfinished()? {
            if lost(&entry.path.with_extension(REPLAYING)) < MOST_LOST {
                continue;
            }
            match aside(&entry.path) {
                Ok(moved) => {
                    let message = format!(
                        "its journal was moved to {}, because outhaul crashed {MOST_LOST} times in a row while \
                         resuming this build from it: outputs that are missing will not be downloaded; to try \
                         again, rename the file to {} and restart outhaul",
                        moved.display(),
                        entry.path.display(),
                    );
                    all.push(SetAside {
                        key: entry.key,
                        message,
                    });
                }
                Err(error) => tracing::error!(
                    journal = %entry.path.display(), %error,
                    "not replaying this journal: outhaul crashed {MOST_LOST} times in a row while resuming a \
                     build from it, and it cannot be moved aside"
                ),
            }
        }
        Ok(all)
    }

    /// How many processes died, one after the other, while they replayed a journal.
    pub(crate) fn lost_replays(&self, entry: &Entry) -> u64 {
        lost(&entry.path.with_extension(REPLAYING))
    }

    /// Marks that a stream's journal is about to be replayed; `None` if it has no journal or
    /// the mark cannot be written.
    pub(crate) fn replaying(&self, key: &StreamKey) -> Option<Replaying> {
        let stem = self.stem(key).ok()?;
        if !stem.with_extension(UNFINISHED).exists() {
            return None;
        }
        let mark = stem.with_extension(REPLAYING);
        let marked = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&mark)
            .and_then(|mut file| file.write_all(b"."));
        match marked {
            Ok(()) => Some(Replaying(mark)),
            Err(error) => {
                // Without it only the guard against a journal that ends the process is missing.
                tracing::debug!(mark = %mark.display(), %error, "failed to write the marker of a replay");
                None
            }
        }
    }

    /// The process ends in good order: no journal was its end.
    pub(crate) fn forget_replays(&self) {
        for mark in self.marks() {
            remove(&mark);
        }
    }

    /// Every mark.
    pub(super) fn marks(&self) -> impl Iterator<Item = PathBuf> {
        fs::read_dir(self.dir())
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .map(|item| item.path())
            .filter(|path| path.extension() == Some(OsStr::new(REPLAYING)))
    }
}

/// Renames a journal to a free name under which it is not replayed.
fn aside(journal: &Path) -> Result<PathBuf, JournalError> {
    let mut number = 1_u32;
    loop {
        let to = match number {
            1 => journal.with_extension(ASIDE),
            n => journal.with_extension(format!("{ASIDE}-{n}")),
        };
        match renameat_with(CWD, journal, CWD, &to, RenameFlags::NOREPLACE) {
            Ok(()) => {
                remove(&journal.with_extension(REPLAYING));
                return Ok(to);
            }
            Err(Errno::EXIST) if number < 1000 => number += 1,
            // Nobody else writes here.
            Err(errno) if is_lacking(errno) && to.exists() && number < 1000 => number += 1,
            Err(errno) if is_lacking(errno) && !to.exists() => {
                fs::rename(journal, &to).map_err(JournalError::io("set aside", journal))?;
                remove(&journal.with_extension(REPLAYING));
                return Ok(to);
            }
            Err(error) => return Err(JournalError::io("set aside", journal)(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Batch, JournalOptions, RecordKind};

    fn key() -> StreamKey {
        StreamKey {
            build_id: "b".to_owned(),
            invocation_id: "i".to_owned(),
            ..StreamKey::default()
        }
    }

    fn journal(dir: &Path) -> Journal {
        let journal = Journal::open(dir, JournalOptions::default()).unwrap();
        let (mut writer, _) = journal.stream(&key()).unwrap();
        let mut batch = Batch::default();
        batch.add(1, RecordKind::Other, 1, b"call");
        writer.append(&batch).unwrap();
        journal
    }

    /// As a process that dies.
    fn die(journal: &Journal) {
        std::mem::forget(journal.replaying(&key()).unwrap());
    }

    #[test]
    fn what_processes_died_of_twice_is_set_aside_whole_and_never_over_another() {
        let dir = tempfile::tempdir().unwrap();
        for n in 1..=3 {
            let journal = journal(dir.path());
            let entry = journal.unfinished().unwrap().remove(0);
            let bytes = fs::read(&entry.path).unwrap();
            die(&journal);
            assert_eq!(journal.lost_replays(&entry), 1);
            assert_eq!(journal.set_aside().unwrap(), []);
            die(&journal);
            let aside = journal.set_aside().unwrap().remove(0);
            assert_eq!(aside.key, key());
            assert_eq!(journal.list().unwrap(), []);
            let suffix = if n == 1 { String::new() } else { format!("-{n}") };
            let to = entry.path.with_extension(format!("{ASIDE}{suffix}"));
            assert!(aside.message.contains(to.to_str().unwrap()), "{}", aside.message);
            assert_eq!(fs::read(&to).unwrap(), bytes);
            assert_eq!(journal.marks().count(), 0);
        }
        let journal = Journal::open(dir.path(), JournalOptions::default()).unwrap();
        let (_, recovered) = journal.stream(&key()).unwrap();
        assert_eq!(recovered.highest, None);
        // Its name back, it is itself again.
        let stem = journal.stem(&key()).unwrap();
        fs::rename(stem.with_extension(ASIDE), stem.with_extension(UNFINISHED)).unwrap();
        let (_, recovered) = journal.stream(&key()).unwrap();
        assert_eq!(recovered.highest, Some(1));
    }

    #[test]
    fn a_replay_that_was_survived_is_none_that_was_lost() {
        let dir = tempfile::tempdir().unwrap();
        let journal = journal(dir.path());
        let entry = journal.unfinished().unwrap().remove(0);
        die(&journal);
        drop(journal.replaying(&key()));
        assert_eq!(journal.lost_replays(&entry), 0);
        die(&journal);
        journal.forget_replays();
        die(&journal);
        assert_eq!(journal.set_aside().unwrap(), []);
        let none = StreamKey::default();
        assert!(journal.replaying(&none).is_none(), "there is nothing to replay");
    }
}
