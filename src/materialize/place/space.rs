//! How much of a file system is to stay free.
//!
//! A disk that fills up stops more than us: the build tool, the journal, the user's editor. So downloads end before,
//! at a low-water mark for what somebody waits for, and at twice as much for the rest. The file system is asked once
//! for each batch of files. A file system that has no inodes left says so itself when a file is made.

use std::{
    fmt,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::{fd::AsFd, fs};

use super::{
    error::{PlaceError, PlaceErrorKind},
    root::OutputRoot,
};
use crate::units::{parse_size, show_size};

/// How long a refusal stands for files that were not fetched yet. After that, one of them is tried.
const REFUSAL: Duration = Duration::from_millis(250);
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
    /// A number of bytes.
    Amount(u64),
    /// A part of the file system, in hundredths of a percent.
    Part(u64),
}

impl Mark {
    /// Everything may be filled.
    pub const NOTHING: Self = Self::Amount(0);

    fn of(self, total: u64) -> u64 {
        match self {
            Self::Default => DEFAULT_BYTES.min(total / DEFAULT_PART),
            Self::Amount(amount) => amount,
            Self::Part(part) => {
                let part = u128::from(total) * u128::from(part) / u128::from(WHOLE);
                u64::try_from(part).unwrap_or(u64::MAX)
            }
        }
    }
}

/// A size, as `10GiB`, or a percentage from 0% to 100%.
impl FromStr for Mark {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(percent) = text.trim().strip_suffix('%') else {
            return parse_size(text)
                .map(Self::Amount)
                .map_err(|e| format!("{e}, nor a part of the disk (write 5%)"));
        };
        let percent: f64 = percent
            .trim()
            .parse()
            .map_err(|_| format!("{text:?} is not a percentage"))?;
        if !(0.0..=100.0).contains(&percent) {
            return Err(format!("{text:?} is not from 0% to 100%"));
        }
        // Checked above: it is from 0 to 10,000.
        Ok(Self::Part((percent * 100.0).round() as u64))
    }
}

/// What a file system has, in bytes; all 0 where it does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Free {
    /// What users may still fill.
    bytes: u64,
    total: u64,
}

impl Free {
    fn of(fd: impl AsFd) -> Self {
        // Where that fails nothing is known, and nothing is held back: what is full says so by itself.
        let found = fs::fstatvfs(fd).ok();
        found.map_or_else(Self::default, |found| Self {
            bytes: found.f_bavail.saturating_mul(found.f_frsize),
            total: found.f_blocks.saturating_mul(found.f_frsize),
        })
    }

    /// Why a file of this size is not to be written, if it is not.
    fn shortage(self, mark: Mark, is_optional: bool, needs: u64) -> Option<Shortage> {
        let mark = mark.of(self.total);
        let keeps = mark.saturating_mul(if is_optional { 2 } else { 1 });
        // Nothing is held back where nothing is to be kept.
        let is_short = self.total > 0 && mark > 0 && self.bytes.saturating_sub(needs) < keeps;
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
    is_optional: bool,
}

impl Shortage {
    /// Whether something that is required might still be written.
    pub(super) const fn is_optional(&self) -> bool {
        self.is_optional
    }

    /// Whether a small file is no better off.
    const fn is_of_everything(&self) -> bool {
        self.free.bytes.saturating_sub(SMALL) < self.keeps
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "no space left that may be used: the file system has {} free of {}, ",
            show_size(self.free.bytes),
            show_size(self.free.total)
        )?;
        if self.free.bytes >= self.keeps {
            write!(f, "the file has {}, ", show_size(self.needs))?;
        }
        let keeps = show_size(self.keeps);
        if self.is_optional {
            write!(
                f,
                "and {keeps} are kept from what is optional (twice --min-free-space)"
            )
        } else {
            write!(f, "and {keeps} are to stay free (--min-free-space)")
        }
    }
}

/// What is known of a root's file system.
#[derive(Debug, Default)]
pub(super) struct Space {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes that were promised and perhaps not written yet: no answer of the file system knows of them.
    pending: u64,
    /// The last refusals of everything: for what is required, and for what is optional.
    refused: [Option<(Shortage, Instant)>; 2],
}

/// Space that a batch of files was promised. Dropped once they are written, or will not be.
#[derive(Debug)]
pub(in crate::materialize) struct Promised {
    root: Arc<OutputRoot>,
    bytes: u64,
    /// What the file system said when the first file asked.
    seen: Option<Free>,
}

impl Promised {
    /// Nothing yet.
    pub(super) const fn new(root: Arc<OutputRoot>) -> Self {
        Self {
            root,
            bytes: 0,
            seen: None,
        }
    }

    /// Asks for space for one more file.
    pub(in crate::materialize) fn ask(
        &mut self,
        mark: Mark,
        is_optional: bool,
        bytes: u64,
        path: &str,
    ) -> Result<(), PlaceError> {
        if mark == Mark::NOTHING {
            return Ok(());
        }
        let free = *self.seen.get_or_insert_with(|| Free::of(&*self.root));
        match self.root.space.state().judge(free, mark, is_optional, bytes) {
            Some(shortage) => Err(too_little(path, shortage)),
            None => {
                self.bytes += bytes;
                Ok(())
            }
        }
    }

    /// This many bytes are written: the file system knows of them now.
    pub(super) fn spend(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        let mut state = self.root.space.state();
        state.pending = state.pending.saturating_sub(bytes);
    }
}

impl Drop for Promised {
    fn drop(&mut self) {
        if self.bytes > 0 {
            self.spend(self.bytes);
        }
    }
}

impl Space {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The refusal that a small file would get, if one was refused a moment ago: it need not be fetched. What takes no
    /// refusal for an answer finds out, and so does one file every now and then.
    pub(super) fn refuses(&self, is_optional: bool, path: &str) -> Option<PlaceError> {
        let state = self.state();
        let (shortage, at) = state.refused[usize::from(is_optional)].as_ref()?;
        (at.elapsed() < REFUSAL).then(|| too_little(path, shortage.clone()))
    }
}

impl State {
    /// Promises the bytes, unless they are not there beside what was promised already.
    fn judge(&mut self, mut free: Free, mark: Mark, is_optional: bool, bytes: u64) -> Option<Shortage> {
        free.bytes = free.bytes.saturating_sub(self.pending);
        let shortage = free.shortage(mark, is_optional, bytes);
        let refused = &mut self.refused[usize::from(is_optional)];
        match &shortage {
            Some(shortage) if shortage.is_of_everything() => {
                *refused = Some((shortage.clone(), Instant::now()))
            }
            Some(_) => {}
            None => {
                *refused = None;
                self.pending = self.pending.saturating_add(bytes);
            }
        }
        shortage
    }
}

fn too_little(path: &str, shortage: Shortage) -> PlaceError {
    PlaceError::new("write", path, PlaceErrorKind::LowSpace(Box::new(shortage)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MARK: Mark = Mark::Amount(GIB);

    fn free(bytes: u64) -> Free {
        Free {
            bytes,
            total: 100 * GIB,
        }
    }

    #[test]
    fn marks_are_read_as_written() {
        assert_eq!("10GiB".parse(), Ok(Mark::Amount(10 * GIB)));
        assert_eq!("5%".parse(), Ok(Mark::Part(500)));
        assert_eq!(" 0.25 % ".parse(), Ok(Mark::Part(25)));
        assert_eq!("0".parse(), Ok(Mark::Amount(0)));
        for bad in ["", "%", "-1%", "101%", "nan%", "much", "-5"] {
            assert!(bad.parse::<Mark>().unwrap_err().contains(bad), "{bad}");
        }
        assert_eq!(Mark::Part(500).of(100 * GIB), 5 * GIB);
        assert_eq!(Mark::Part(WHOLE).of(u64::MAX), u64::MAX);
        assert_eq!(Mark::Default.of(100 * GIB), DEFAULT_BYTES);
        assert_eq!(Mark::Default.of(20 << 20), 1 << 20, "a small disk can be used");
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
            "no space left that may be used: the file system has 512.0 MiB free of 100.0 GiB, and 1.0 GiB are to \
             stay free (--min-free-space)"
        );
        assert!(said(5 * GIB, false, 5 * GIB).contains("the file has 5.0 GiB"));
        assert!(
            said(GIB, true, 5).contains("2.0 GiB are kept from what is optional (twice --min-free-space)")
        );
    }

    #[test]
    fn what_was_promised_and_is_not_written_yet_is_not_promised_twice() {
        let mut state = State::default();
        let ask = |state: &mut State, bytes| state.judge(free(GIB + (3 << 20)), MARK, false, bytes).is_none();
        for fits in [true, true, true, false, false] {
            assert_eq!(ask(&mut state, 1 << 20), fits);
        }
        assert!(state.refused[0].is_some());
        state.pending -= 1 << 20;
        assert!(ask(&mut state, 1 << 20));
        assert!(state.refused[0].is_none());
        state.pending = 0;
        assert!(!ask(&mut state, 5 * GIB));
        assert!(
            state.refused[0].is_none(),
            "that a huge file does not fit says nothing of small ones"
        );
    }
}
