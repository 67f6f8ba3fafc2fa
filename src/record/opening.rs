//! Opening a store whatever its directory holds: a damaged or foreign one is set aside, and a new one is made.
//!
//! sled does not only fail on damage, it panics, and may hang or end the process (an absurd length, allocated). So
//! opening has its own thread and a deadline, and a marker file counts openings that nobody came back from.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;
use rustix::fs::statvfs;

use super::{
    error::StoreError,
    store::{Found, Store, exchange},
};
use crate::{removal::remove_all, units::now_ms};

pub(super) const DIR_NAME: &str = "record";
const COMPACT_NAME: &str = "record.compact";
const MARKER_NAME: &str = "record.opening";
const QUARANTINE_PREFIX: &str = "record.quarantined-";

/// Quarantined stores that are kept for a look at what went wrong.
const KEPT_QUARANTINED: usize = 3;

/// Openings in a row that ended with the process before a store is taken for damaged. One or two may have been
/// killed by somebody.
const MAX_LOST_OPENINGS: u32 = 3;

/// Recovery of a million rows takes seconds; this is for a recovery that does not end.
const OPENING_DEADLINE: Duration = Duration::from_secs(120);

/// How long a store may have taken to open to be rewritten, and how long that may take. Well within the deadline.
const COMPACTING: Duration = Duration::from_secs(20);

/// What was found where the record should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Opening {
    /// No record, or an empty one: it starts with nothing known.
    Fresh,
    /// The record of earlier runs.
    Existing,
    /// A damaged or foreign store, or one of another version. It was moved away, and the record starts with nothing
    /// known.
    Quarantined {
        /// Where it is now.
        moved_to: PathBuf,
        /// What was wrong with it.
        reason: String,
    },
    /// The system does not let a store be opened, as on a full disk. The record works from memory, and tries again
    /// now and then.
    Unavailable {
        /// The system's words.
        reason: String,
    },
}

/// Where a state directory's store is.
#[derive(Debug, Clone)]
pub(super) struct StoreLocation {
    state_dir: PathBuf,
    clock: fn() -> SystemTime,
    /// Whether the store is to blame if the process ends while it opens it. Commands are interrupted by their users.
    pub(super) blames: bool,
}

impl StoreLocation {
    pub(super) fn new(state_dir: &Path) -> Self {
        Self {
            state_dir: state_dir.to_owned(),
            clock: SystemTime::now,
            blames: true,
        }
    }

    /// Where the store is, and where it is rewritten.
    #[cfg(test)]
    pub(super) fn dirs(&self) -> (PathBuf, PathBuf) {
        (self.dir(), self.state_dir.join(COMPACT_NAME))
    }

    fn dir(&self) -> PathBuf {
        self.state_dir.join(DIR_NAME)
    }

    fn marker(&self) -> PathBuf {
        self.state_dir.join(MARKER_NAME)
    }

    /// Opens the store, setting a damaged one aside, and writing one again that takes too much space.
    pub(super) fn open(&self) -> (Option<Store>, Opening) {
        self.open_and(true)
    }

    /// The same without writing anything again: the disk may be full.
    pub(super) fn reopen(&self) -> (Option<Store>, Opening) {
        self.open_and(false)
    }

    fn open_and(&self, compacts: bool) -> (Option<Store>, Opening) {
        let lost = self.lost_openings();
        let first = if lost >= MAX_LOST_OPENINGS {
            Err(StoreError::Damaged(format!(
                "the process ended in each of the last {lost} attempts to open it"
            )))
        } else {
            if self.blames {
                self.mark(lost + 1);
            }
            self.try_open(compacts)
        };
        let outcome = match first {
            Ok((store, found)) => (Some(store), found.into()),
            Err(StoreError::Unavailable(reason)) => (None, Opening::Unavailable { reason }),
            Err(StoreError::Damaged(reason)) => self.start_anew(reason),
        };
        self.unmark();
        outcome
    }

    /// Sets the store aside and makes a new one.
    pub(super) fn start_anew(&self, reason: String) -> (Option<Store>, Opening) {
        let moved_to = match self.quarantine() {
            Ok(moved_to) => moved_to,
            Err(error) => {
                let reason = format!("{reason}; failed to move it away: {error}");
                return (None, Opening::Unavailable { reason });
            }
        };
        match self.try_open(false) {
            Ok((store, _)) => (Some(store), Opening::Quarantined { moved_to, reason }),
            Err(error) => {
                let reason = format!("{reason}; moved it away, but failed to create a new one: {error}");
                (None, Opening::Unavailable { reason })
            }
        }
    }

    fn try_open(&self, compacts: bool) -> Result<(Store, Found), StoreError> {
        // sled panics then before it looks at the store, which is as good as ever.
        if (self.clock)() < SystemTime::UNIX_EPOCH {
            let reason = "the system clock is before 1970; the record cannot be opened until it is set";
            return Err(StoreError::Unavailable(reason.into()));
        }
        let (dir, compact) = (self.dir(), self.state_dir.join(COMPACT_NAME));
        let had_files = fs::read_dir(&dir).is_ok_and(|mut entries| entries.next().is_some());
        let (send, receive) = mpsc::sync_channel(1);
        let wanted = Arc::new(Mutex::new(true));
        let still_wanted = wanted.clone();
        let place = self.clone();
        thread::Builder::new()
            .name("outhaul-record-open".into())
            .spawn(move || {
                let began = Instant::now();
                let mut opened = open_patiently(&dir);
                if opened.is_ok() {
                    remove_compact(&compact);
                }
                if let Ok((store, found)) = opened {
                    // One that takes its time to open is left alone: the deadline is for all of it.
                    opened = if compacts && began.elapsed() < COMPACTING && store.is_bloated() {
                        // It can be opened. Anyone who is killed from here on has not lost it.
                        place.unmark();
                        make_compact(store, &dir, &compact, &still_wanted)
                    } else {
                        Ok((store, found))
                    };
                }
                // Nobody listens after the deadline; the late store is closed by being dropped.
                let _ = send.send(opened);
            })
            .map_err(|e| StoreError::Unavailable(format!("failed to start a thread to open it: {e}")))?;
        let opened = receive.recv_timeout(OPENING_DEADLINE).unwrap_or_else(|_| {
            *wanted.lock() = false;
            Err(StoreError::Damaged(format!(
                "opening it did not end within {} s",
                OPENING_DEADLINE.as_secs()
            )))
        });
        if had_files && matches!(opened, Ok((_, Found::Fresh))) {
            // sled opens a store cut short as an empty one.
            tracing::info!(path = %self.dir().display(), "the record's store was truncated or empty; starting \
                                                          without data");
        }
        opened
    }

    /// Moves the store away under a name that says when.
    fn quarantine(&self) -> io::Result<PathBuf> {
        let time = u64::try_from(now_ms() / 1000).unwrap_or(0);
        // After all that are there: numbers of deleted ones are not used again, so names are in order of age.
        let newest = self.quarantined().pop();
        let moved_to = self.state_dir.join(match newest {
            Some(((newest, n), _)) if newest >= time => format!("{QUARANTINE_PREFIX}{newest}-{}", n + 1),
            _ => format!("{QUARANTINE_PREFIX}{time}"),
        });
        match fs::rename(self.dir(), &moved_to) {
            // Somebody deleted it: as good.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        self.prune_quarantined();
        Ok(moved_to)
    }

    /// Deletes all but the newest quarantined stores.
    fn prune_quarantined(&self) {
        let mut found = self.quarantined();
        let surplus = found.len().saturating_sub(KEPT_QUARANTINED);
        for (_, path) in found.drain(..surplus) {
            if let Err(error) = remove_all(&path) {
                tracing::warn!(path = %path.display(), %error, "failed to delete an old quarantined record");
            }
        }
    }

    /// The quarantined stores that are there, oldest first.
    fn quarantined(&self) -> Vec<((u64, u64), PathBuf)> {
        let Ok(entries) = fs::read_dir(&self.state_dir) else {
            return Vec::new();
        };
        let mut found: Vec<_> = entries
            .flatten()
            .filter_map(|entry| Some((age_key(entry.file_name().to_str()?)?, entry.path())))
            .collect();
        found.sort();
        found
    }

    fn lost_openings(&self) -> u32 {
        fs::read_to_string(self.marker())
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    fn mark(&self, attempt: u32) {
        if let Err(error) = fs::write(self.marker(), format!("{attempt}\n")) {
            // Without it only the guard against a store that ends the process is missing.
            tracing::debug!(%error, "failed to write the record's opening marker");
        }
    }

    fn unmark(&self) {
        match fs::remove_file(self.marker()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(%error, "failed to remove the record's opening marker");
            }
            _ => {}
        }
    }
}

/// Opens a store. sled's own lock may still be held by a store that is just closing, or by a child that was forked a
/// moment ago and has not yet closed what it inherited.
fn open_patiently(dir: &Path) -> Result<(Store, Found), StoreError> {
    let mut opened = Store::open(dir, now_ms());
    for _ in 0..50 {
        if !matches!(&opened, Err(StoreError::Unavailable(why)) if why.contains("acquire lock")) {
            break;
        }
        thread::sleep(Duration::from_millis(20));
        opened = Store::open(dir, now_ms());
    }
    opened
}

/// Rewrites a store beside itself, and exchanges the two while `wanted`. Whatever fails, the store stays as it was.
pub(super) fn make_compact(
    store: Store,
    dir: &Path,
    compact: &Path,
    wanted: &Mutex<bool>,
) -> Result<(Store, Found), StoreError> {
    let before = store.size_on_disk().unwrap_or(0);
    let room = statvfs(dir).map_or(0, |disk| disk.f_bavail.saturating_mul(disk.f_frsize));
    if room < before {
        tracing::debug!(
            room,
            before,
            "not enough disk space to compact the record's store"
        );
        return Ok((store, Found::Existing));
    }
    if let Err(error) = store.copy_to(compact, Instant::now() + COMPACTING) {
        tracing::debug!(%error, "failed to compact the record's store");
        remove_compact(compact);
        return Ok((store, Found::Existing));
    }
    drop(store);
    let wanted = wanted.lock();
    // After the deadline there is another store in the place.
    if !*wanted {
        return Err(StoreError::Unavailable("too late".into()));
    }
    let exchanged = exchange(compact, dir);
    if let Err(error) = &exchanged {
        tracing::debug!(%error, "failed to replace the record's store with its compacted copy");
    }
    let mut opened = open_patiently(dir);
    if exchanged.is_ok() && matches!(opened, Err(StoreError::Damaged(_))) && exchange(compact, dir).is_ok() {
        tracing::warn!("failed to open the compacted copy of the record's store; keeping the old one");
        opened = open_patiently(dir);
    }
    drop(wanted);
    if let Ok((store, _)) = &opened {
        remove_compact(compact);
        let after = store.size_on_disk().unwrap_or(0);
        tracing::info!(before, after, "compacted the record's store to free space");
    }
    opened
}

/// Removes what an exchange left behind, or did not come to.
fn remove_compact(compact: &Path) {
    if let Err(error) = remove_all(compact) {
        tracing::debug!(%error, "failed to remove the leftovers of a compaction of the record's store");
    }
}

impl From<Found> for Opening {
    fn from(found: Found) -> Self {
        match found {
            Found::Fresh => Self::Fresh,
            Found::Existing => Self::Existing,
        }
    }
}

/// Time and number in a quarantined store's name.
fn age_key(name: &str) -> Option<(u64, u64)> {
    let rest = name.strip_prefix(QUARANTINE_PREFIX)?;
    let (time, n) = rest.split_once('-').unwrap_or((rest, "1"));
    // A number of 32 bits: adding to it is safe, and larger ones are not ours. The clock may say anything.
    Some((time.parse().ok()?, u64::from(n.parse::<u32>().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_quarantined_stores_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let place = StoreLocation::new(dir.path());
        let mut last = PathBuf::new();
        for _ in 0..6 {
            fs::create_dir(place.dir()).unwrap();
            fs::write(place.dir().join("db"), "x").unwrap();
            crate::removal::nest(&place.dir().join("deep"), 5000).unwrap();
            last = place.quarantine().unwrap();
        }
        fs::create_dir(dir.path().join("record.quarantined-by-me")).unwrap();
        place.prune_quarantined();
        let kept = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(kept, KEPT_QUARANTINED + 1, "and what is not ours");
        assert!(last.exists());
        assert!(!place.dir().exists());
        for (_, path) in place.quarantined() {
            remove_all(&path).unwrap();
        }
    }

    #[test]
    fn before_1970_a_store_is_left_alone_and_found_again_after_that() {
        let dir = tempfile::tempdir().unwrap();
        let mut place = StoreLocation::new(dir.path());
        let (store, _) = place.open();
        let identity = store.unwrap().identity().to_owned();
        place.clock = || SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        for _ in 0..5 {
            let (store, opening) = place.open();
            assert!(store.is_none());
            assert!(
                matches!(&opening, Opening::Unavailable { reason } if reason.contains("1970")),
                "{opening:?}"
            );
        }
        place.clock = || SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        let (store, opening) = place.open();
        assert_eq!(opening, Opening::Existing);
        assert_eq!(store.unwrap().identity(), identity);
    }

    #[test]
    fn quarantined_stores_of_any_time_are_known() {
        assert_eq!(age_key("record.quarantined-1-2"), Some((1, 2)));
        assert_eq!(
            age_key("record.quarantined-253402300800"),
            Some((253_402_300_800, 1))
        );
        assert_eq!(age_key("record.quarantined-x"), None);
    }

    #[test]
    fn a_store_that_ends_the_process_again_and_again_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let place = StoreLocation::new(dir.path());
        drop(place.open());
        place.mark(MAX_LOST_OPENINGS - 1);
        let (store, opening) = place.open();
        assert_eq!(opening, Opening::Existing);
        drop(store.unwrap());
        place.mark(MAX_LOST_OPENINGS);
        let (store, opening) = place.open();
        assert!(matches!(opening, Opening::Quarantined { .. }), "{opening:?}");
        drop(store.unwrap());
        assert_eq!(place.lost_openings(), 0);
    }

    #[test]
    fn a_store_written_anew_is_the_same_record_and_what_a_killed_one_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let place = StoreLocation::new(dir.path());
        let (store, _) = place.open();
        let store = store.unwrap();
        let identity = store.identity().to_owned();
        let compact = dir.path().join(COMPACT_NAME);
        fs::create_dir(&compact).unwrap();
        fs::write(compact.join("db"), "half a store").unwrap();
        remove_compact(&compact);
        let (store, found) = make_compact(store, &place.dir(), &compact, &Mutex::new(true)).unwrap();
        assert_eq!((store.identity(), found), (&*identity, Found::Existing));
        assert!(!compact.exists());
        // Not in the place of what came there after the deadline.
        assert!(make_compact(store, &place.dir(), &compact, &Mutex::new(false)).is_err());
        assert!(compact.exists());
        let (store, opening) = place.open();
        assert_eq!(opening, Opening::Existing);
        assert_eq!(store.unwrap().identity(), identity);
        assert!(!compact.exists());
    }
}
