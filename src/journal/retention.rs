//! Which journal files may go: planned first, so that it can be shown, then executed.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use super::{
    cursor::ACKED,
    error::JournalError,
    store::{Entry, Journal, SETTLED, UNFINISHED},
};

/// Files to delete.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What was not used for longest comes first.
    pub delete: Vec<Entry>,
    /// Bytes that stay.
    pub kept_bytes: u64,
}

/// What an executed plan did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Executed {
    /// Number of deleted files.
    pub files: u64,
    /// Bytes of the deleted files.
    pub bytes: u64,
    /// Files that could not be deleted, or are written again.
    pub skipped: u64,
}

impl Journal {
    /// Plans what to delete: everything not used for `max_age`, then what was not used for longest of the settled
    /// journals until the rest has at most `max_bytes`. Unfinished journals, which somebody still has to get something
    /// of, go by age only, open ones never. Last use is the file's time of modification.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn plan(&self, max_age: Option<Duration>, max_bytes: Option<u64>) -> Result<Plan, JournalError> {
        let listed = self.list()?.into_iter();
        let mut entries: Vec<_> = listed.map(|e| (self.open.contains(&e.path), e)).collect();
        entries.sort_by(|(_, a), (_, b)| (a.modified, &a.path).cmp(&(b.modified, &b.path)));
        Ok(plan(entries, SystemTime::now(), max_age, max_bytes))
    }

    /// Deletes what was planned, except what has changed since.
    pub(crate) fn execute(&self, plan: &Plan) -> Executed {
        let mut executed = Executed::default();
        for entry in &plan.delete {
            let unchanged = fs::symlink_metadata(&entry.path)
                .is_ok_and(|m| m.len() == entry.bytes && m.modified().is_ok_and(|t| t == entry.modified));
            if self.open.contains(&entry.path) || !unchanged {
                executed.skipped += 1;
                continue;
            }
            match fs::remove_file(&entry.path) {
                Ok(()) => {
                    executed.files += 1;
                    executed.bytes += entry.bytes;
                }
                Err(e) => {
                    tracing::warn!(journal = %entry.path.display(), error = %e, "failed to delete a journal \
                                                                                 file");
                    executed.skipped += 1;
                }
            }
        }
        self.sweep_cursors();
        executed
    }

    /// Deletes cursors and marks whose journals are gone: of those just deleted, and of a process that ended between the two.
    fn sweep_cursors(&self) {
        let cursors = fs::read_dir(self.dir())
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .map(|item| item.path())
            .filter(|path| path.extension().is_some_and(|e| e == ACKED));
        for path in cursors.chain(self.marks()) {
            let journal = [UNFINISHED, SETTLED]
                .iter()
                .any(|extension| path.with_extension(extension).exists());
            if !journal
                && !self.open.contains(&path)
                && let Err(e) = fs::remove_file(&path)
            {
                tracing::warn!(file = %path.display(), error = %e, "failed to delete a file that belongs to a \
                                                                    journal");
            }
        }
    }
}

/// The decision; entries are in the order of their last use, with whether they are open.
fn plan(
    entries: Vec<(bool, Entry)>,
    now: SystemTime,
    max_age: Option<Duration>,
    max_bytes: Option<u64>,
) -> Plan {
    let mut total: u64 = entries.iter().map(|(_, e)| e.bytes).sum();
    let mut plan = Plan::default();
    let mut rest = Vec::new();
    for (open, entry) in entries {
        // A time in the future counts as now.
        let age = now.duration_since(entry.modified).unwrap_or_default();
        if !open && max_age.is_some_and(|max| age > max) {
            total -= entry.bytes;
            plan.delete.push(entry);
        } else {
            rest.push((open, entry));
        }
    }
    for (open, entry) in rest {
        if !open && entry.settled && max_bytes.is_some_and(|max| total > max) {
            total -= entry.bytes;
            plan.delete.push(entry);
        }
    }
    plan.kept_bytes = total;
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builds::StreamKey;

    fn entry(name: &str, age: u64, bytes: u64, settled: bool) -> Entry {
        Entry {
            path: name.into(),
            key: StreamKey::default(),
            created_ms: 0,
            modified: now() - Duration::from_secs(age),
            bytes,
            settled,
        }
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000)
    }

    fn names(plan: &Plan) -> Vec<&str> {
        plan.delete.iter().filter_map(|e| e.path.to_str()).collect()
    }

    #[test]
    fn old_ones_go_and_then_the_oldest_settled_until_it_fits() {
        let entries = vec![
            (false, entry("ancient", 900, 1, false)),
            (false, entry("unfinished", 90, 100, false)),
            (true, entry("open", 80, 100, true)),
            (false, entry("first", 70, 100, true)),
            (false, entry("second", 60, 100, true)),
        ];
        let got = plan(entries, now(), Some(Duration::from_secs(500)), Some(300));
        assert_eq!(names(&got), ["ancient", "first"]);
        assert_eq!(got.kept_bytes, 300);
    }

    #[test]
    fn a_journal_of_the_future_has_no_age() {
        let mut ahead = entry("ahead", 0, 100, true);
        ahead.modified = now() + Duration::from_secs(1_000_000);
        let entries = vec![(false, entry("older", 90, 100, true)), (false, ahead)];
        let got = plan(entries, now(), Some(Duration::from_secs(50)), None);
        assert_eq!(names(&got), ["older"]);
    }

    #[test]
    fn without_limits_nothing_goes() {
        let got = plan(vec![(false, entry("a", 1_000_000, 7, true))], now(), None, None);
        assert_eq!((names(&got), got.kept_bytes), (vec![], 7));
    }
}
