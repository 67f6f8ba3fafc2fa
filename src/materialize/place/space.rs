//! How much of a file system is to stay free.
//!
//! A disk that fills up stops more than us: the build tool, the journal, the user's editor. So downloads end before,
//! at a low-water mark for what somebody waits for, and at twice as much for the rest. Nothing is asked of the file
//! system for a file alone: the answer of one `statvfs` counts for a moment and for so many bytes.

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
use crate::units::{parse_size, show_count, show_size};

/// How long an answer of the file system counts; and how long one that leads to a refusal.
const FRESH: Duration = Duration::from_millis(100);
const FRESH_NO: Duration = Duration::from_millis(10);
/// Bytes and files that may be written on the word of one answer.
const TRUSTED_BYTES: u64 = 16 << 20;
const TRUSTED_FILES: u64 = 256;
/// How long a refusal stands for whoever asks before fetching. After that somebody tries it out again.
const REFUSAL: Duration = Duration::from_millis(250);
/// A refusal that so many bytes less would not have averted is one of everything.
const SMALL: u64 = 1 << 20;

/// The mark unless told otherwise, and the part of a smaller file system that is kept instead.
const DEFAULT_BYTES: u64 = 64 << 20;
const DEFAULT_FILES: u64 = 1000;
const DEFAULT_PART: u64 = 20;

/// A part of the whole, in hundredths of a percent.
const WHOLE: u64 = 10_000;

/// A low-water mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mark {
    /// 64 MiB, or 1,000 files; of a file system with less than 20 times as much, the twentieth part.
    #[default]
    Default,
    /// So many bytes or files.
    Amount(u64),
    /// A part of the file system, in hundredths of a percent.
    Part(u64),
}

impl Mark {
    /// A mark in bytes, as `10GiB` or `5%`.
    ///
    /// # Errors
    /// In words, when the text is neither.
    pub fn of_bytes(text: &str) -> Result<Self, String> {
        if text.trim().ends_with('%') {
            return text.parse();
        }
        parse_size(text)
            .map(Self::Amount)
            .map_err(|e| format!("{e}, nor a part of the disk (write 5%)"))
    }

    fn of(self, total: u64, default: u64) -> u64 {
        match self {
            Self::Default => default.min(total / DEFAULT_PART),
            Self::Amount(amount) => amount,
            Self::Part(part) => {
                let part = u128::from(total) * u128::from(part) / u128::from(WHOLE);
                u64::try_from(part).unwrap_or(u64::MAX)
            }
        }
    }
}

/// A number, or a percentage from 0% to 100%.
impl FromStr for Mark {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(percent) = text.trim().strip_suffix('%') else {
            let amount = text.trim().parse();
            return amount
                .map(Self::Amount)
                .map_err(|_| format!("{text:?} is neither a number nor a percentage"));
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

/// What is to stay free of every file system that outputs go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpaceRule {
    /// Bytes.
    pub bytes: Mark,
    /// Files, where the file system has room for a limited number of them.
    pub files: Mark,
}

impl SpaceRule {
    /// Everything may be filled.
    pub const NOTHING: Self = Self {
        bytes: Mark::Amount(0),
        files: Mark::Amount(0),
    };
}

/// What a file system has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Free {
    /// Bytes that users may still fill, and all there are; 0 where it does not say.
    pub bytes: u64,
    /// See `bytes`.
    pub total_bytes: u64,
    /// Files that may still be made, and how many there can be; 0 where they are not limited, as on btrfs.
    pub files: u64,
    /// See `files`.
    pub total_files: u64,
}

impl Free {
    fn of(fd: impl AsFd) -> Option<Self> {
        // Where that fails nothing is known, and nothing is held back: what is full says so by itself.
        let found = fs::fstatvfs(fd).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Some(Self {
            bytes: bytes(found.f_bavail),
            total_bytes: bytes(found.f_blocks),
            files: found.f_favail,
            total_files: found.f_files,
        })
    }

    /// Why so many bytes in one file are not to be written, if they are not.
    fn shortage(&self, rule: &SpaceRule, is_optional: bool, bytes: u64) -> Option<Shortage> {
        let times = if is_optional { 2 } else { 1 };
        let short = |what, free: u64, total, mark: u64, needs| {
            let keeps = mark.saturating_mul(times);
            // Nothing is held back where nothing is to be kept; nor for what takes no space.
            let is_short = total > 0 && mark > 0 && free.saturating_sub(needs) < keeps;
            is_short.then_some(Shortage {
                what,
                free,
                total,
                needs,
                keeps,
                is_optional,
            })
        };
        let mark = rule.bytes.of(self.total_bytes, DEFAULT_BYTES);
        let of_files = || {
            let mark = rule.files.of(self.total_files, DEFAULT_FILES);
            // More free than there can be: a file system that makes its numbers up.
            let total = if self.files <= self.total_files {
                self.total_files
            } else {
                0
            };
            short(What::Files, self.files, total, mark, 1)
        };
        short(What::Bytes, self.bytes, self.total_bytes, mark, bytes).or_else(of_files)
    }
}

/// What there is too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Bytes,
    Files,
}

/// Why a file is not written: there would be less left than is to stay free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shortage {
    what: What,
    free: u64,
    total: u64,
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
        matches!(self.what, What::Files) || self.free.saturating_sub(SMALL) < self.keeps
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (show, of, flag): (fn(u64) -> String, _, _) = match self.what {
            What::Bytes => (show_size, "", "--min-free-space"),
            What::Files => (show_count, " files", "--min-free-inodes"),
        };
        write!(
            f,
            "no space left that may be used: the file system has {}{of} free of {}, ",
            show(self.free),
            show(self.total)
        )?;
        if self.free >= self.keeps && self.what == What::Bytes {
            write!(f, "the file has {}, ", show(self.needs))?;
        }
        let keeps = show(self.keeps);
        if self.is_optional {
            write!(f, "and {keeps}{of} are kept from what is optional (twice {flag})")
        } else {
            write!(f, "and {keeps}{of} are to stay free ({flag})")
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
    /// What the file system said last, less what was admitted since; and when.
    seen: Option<(Free, Instant)>,
    /// Admitted on its word.
    bytes: u64,
    files: u64,
    /// Admitted and perhaps not written yet: no answer of the file system knows of it.
    pending_bytes: u64,
    pending_files: u64,
    /// The last refusals of everything: for what is required, and for what is optional.
    refused: [Option<(Shortage, Instant)>; 2],
}

/// Space that files were promised. Dropped once they are written, or will not be.
#[derive(Debug)]
pub(in crate::materialize) struct Promised {
    root: Arc<OutputRoot>,
    bytes: u64,
    files: u64,
}

impl Promised {
    /// Nothing yet.
    pub(super) const fn new(root: Arc<OutputRoot>) -> Self {
        Self {
            root,
            bytes: 0,
            files: 0,
        }
    }

    /// Asks for space for one more file.
    pub(in crate::materialize) fn ask(
        &mut self,
        rule: &SpaceRule,
        is_optional: bool,
        bytes: u64,
        path: &str,
    ) -> Result<(), PlaceError> {
        if *rule == SpaceRule::NOTHING {
            return Ok(());
        }
        let mut state = self.root.space.state();
        let look = || Free::of(&*self.root);
        if let Some(shortage) = state.judge(rule, is_optional, bytes, Instant::now(), look) {
            return Err(too_little(path, shortage));
        }
        drop(state);
        self.bytes += bytes;
        self.files += 1;
        Ok(())
    }
}

impl Promised {
    /// So many bytes are written: the file system knows of them now.
    pub(super) fn spend(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        let mut state = self.root.space.state();
        state.pending_bytes = state.pending_bytes.saturating_sub(bytes);
    }
}

impl Drop for Promised {
    fn drop(&mut self) {
        if self.files > 0 {
            let mut state = self.root.space.state();
            state.pending_bytes = state.pending_bytes.saturating_sub(self.bytes);
            state.pending_files = state.pending_files.saturating_sub(self.files);
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
    fn judge(
        &mut self,
        rule: &SpaceRule,
        is_optional: bool,
        bytes: u64,
        now: Instant,
        look: impl Fn() -> Option<Free>,
    ) -> Option<Shortage> {
        let is_trusted = self.bytes.saturating_add(bytes) <= TRUSTED_BYTES && self.files < TRUSTED_FILES;
        let age = |at: Instant| now.saturating_duration_since(at);
        let known = self.seen.filter(|(_, at)| is_trusted && age(*at) < FRESH);
        let (mut free, mut at) = match known {
            Some(seen) => seen,
            None => (self.look(&look)?, now),
        };
        let mut shortage = free.shortage(rule, is_optional, bytes);
        if shortage.is_some() && age(at) >= FRESH_NO {
            (free, at) = (self.look(&look)?, now);
            shortage = free.shortage(rule, is_optional, bytes);
        }
        let refused = &mut self.refused[usize::from(is_optional)];
        if let Some(shortage) = &shortage {
            if shortage.is_of_everything() {
                *refused = Some((shortage.clone(), now));
            }
        } else {
            *refused = None;
            self.bytes += bytes;
            self.files += 1;
            self.pending_bytes = self.pending_bytes.saturating_add(bytes);
            self.pending_files += 1;
            free.bytes = free.bytes.saturating_sub(bytes);
            free.files = free.files.saturating_sub(1);
        }
        self.seen = Some((free, at));
        shortage
    }

    /// What there is, less what is promised.
    fn look(&mut self, look: impl Fn() -> Option<Free>) -> Option<Free> {
        (self.bytes, self.files) = (0, 0);
        let mut free = look()?;
        free.bytes = free.bytes.saturating_sub(self.pending_bytes);
        free.files = free.files.saturating_sub(self.pending_files);
        Some(free)
    }
}

fn too_little(path: &str, shortage: Shortage) -> PlaceError {
    PlaceError::new("write", path, PlaceErrorKind::LowSpace(Box::new(shortage)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn rule(bytes: &str, files: &str) -> SpaceRule {
        SpaceRule {
            bytes: Mark::of_bytes(bytes).unwrap(),
            files: files.parse().unwrap(),
        }
    }

    fn free(bytes: u64, files: u64) -> Free {
        Free {
            bytes,
            total_bytes: 100 * GIB,
            files,
            total_files: 10_000,
        }
    }

    #[test]
    fn marks_are_read_as_written() {
        assert_eq!(Mark::of_bytes("10GiB"), Ok(Mark::Amount(10 * GIB)));
        assert_eq!(Mark::of_bytes("5%"), Ok(Mark::Part(500)));
        assert_eq!(Mark::of_bytes(" 0.25 % "), Ok(Mark::Part(25)));
        assert_eq!(Mark::of_bytes("0"), Ok(Mark::Amount(0)));
        assert_eq!("2000".parse(), Ok(Mark::Amount(2000)));
        for bad in ["", "%", "-1%", "101%", "nan%", "much", "-5"] {
            assert!(Mark::of_bytes(bad).unwrap_err().contains(bad), "{bad}");
            assert!(bad.parse::<Mark>().is_err(), "{bad}");
        }
        assert_eq!(Mark::Part(500).of(100 * GIB, 0), 5 * GIB);
        assert_eq!(Mark::Part(WHOLE).of(u64::MAX, 0), u64::MAX);
        assert_eq!(Mark::Default.of(100 * GIB, DEFAULT_BYTES), DEFAULT_BYTES);
        assert_eq!(
            Mark::Default.of(20 << 20, DEFAULT_BYTES),
            1 << 20,
            "a small disk can be used"
        );
    }

    #[test]
    fn optional_files_end_at_twice_the_mark_and_no_file_goes_below_it() {
        let rule = rule("1GiB", "100");
        for (bytes, files, needs, required, optional) in [
            (10 * GIB, 9000, 1, true, true),
            (2 * GIB, 9000, 0, true, true),
            (2 * GIB, 9000, 1, true, false),
            (GIB, 9000, 0, true, false),
            (GIB, 9000, 1, false, false),
            (10 * GIB, 9000, 9 * GIB, true, false),
            (10 * GIB, 9000, 9 * GIB + 1, false, false),
            (10 * GIB, 9000, u64::MAX, false, false),
            (10 * GIB, 200, 1, true, false),
            (10 * GIB, 101, 1, true, false),
            (10 * GIB, 100, 1, false, false),
            (0, 0, 0, false, false),
        ] {
            let free = free(bytes, files);
            let fits = |optional| free.shortage(&rule, optional, needs).is_none();
            assert_eq!(
                (fits(false), fits(true)),
                (required, optional),
                "{bytes} {files} {needs}"
            );
        }
    }

    #[test]
    fn what_the_file_system_does_not_count_holds_nothing_back() {
        let rule = rule("1GiB", "100");
        let btrfs = Free {
            files: 0,
            total_files: 0,
            ..free(10 * GIB, 0)
        };
        assert_eq!(btrfs.shortage(&rule, true, 1), None);
        let odd = Free {
            files: u64::MAX,
            total_files: 1,
            ..free(10 * GIB, 0)
        };
        assert_eq!(odd.shortage(&rule, true, 1), None);
        assert_eq!(Free::default().shortage(&rule, true, 1), None);
        assert_eq!(free(0, 0).shortage(&SpaceRule::NOTHING, true, 1), None);
    }

    #[test]
    fn a_refusal_says_what_there_is_and_which_flag_decides() {
        let rule = rule("1GiB", "100");
        let said = |bytes, files, optional, needs| {
            free(bytes, files)
                .shortage(&rule, optional, needs)
                .unwrap()
                .to_string()
        };
        assert_eq!(
            said(GIB / 2, 9000, false, 5),
            "no space left that may be used: the file system has 512.0 MiB free of 100.0 GiB, and 1.0 GiB are to \
             stay free (--min-free-space)"
        );
        assert!(said(5 * GIB, 9000, false, 5 * GIB).contains("the file has 5.0 GiB"));
        assert!(
            said(GIB, 9000, true, 5)
                .contains("2.0 GiB are kept from what is optional (twice --min-free-space)")
        );
        assert!(
            said(5 * GIB, 50, false, 5).contains("50 files free of 10,000, and 100 files are to stay free")
        );
    }

    /// A file system that counts how often it is asked.
    struct Asked {
        free: Free,
        times: std::cell::Cell<u32>,
        /// Nothing of what is admitted is written.
        is_slow: bool,
    }

    const fn asked(free: Free, is_slow: bool) -> Asked {
        Asked {
            free,
            times: std::cell::Cell::new(0),
            is_slow,
        }
    }

    fn ask(state: &mut State, asked: &Asked, bytes: u64, now: Instant) -> bool {
        let rule = rule("1GiB", "100");
        let look = || {
            asked.times.set(asked.times.get() + 1);
            Some(asked.free)
        };
        let fits = state.judge(&rule, false, bytes, now, look).is_none();
        if fits && !asked.is_slow {
            state.pending_bytes -= bytes;
            state.pending_files -= 1;
        }
        fits
    }

    #[test]
    fn the_file_system_is_asked_now_and_then_and_not_for_every_file() {
        let (mut state, now) = (State::default(), Instant::now());
        let asked = asked(free(50 * GIB, 9000), false);
        for _ in 0..TRUSTED_FILES {
            assert!(ask(&mut state, &asked, 1000, now));
        }
        assert_eq!(asked.times.get(), 1);
        assert!(ask(&mut state, &asked, 1000, now));
        assert_eq!(asked.times.get(), 2, "after so many files");
        assert!(ask(&mut state, &asked, TRUSTED_BYTES, now));
        assert_eq!(asked.times.get(), 3, "after so many bytes");
        assert!(ask(&mut state, &asked, 0, now + FRESH));
        assert_eq!(asked.times.get(), 4, "after so long");
    }

    #[test]
    fn what_was_written_since_counts_and_space_that_comes_back_too() {
        let (mut state, now) = (State::default(), Instant::now());
        let mut asked = asked(free(GIB + (3 << 20), 9000), false);
        for fits in [true, true, true, false, false] {
            assert_eq!(ask(&mut state, &asked, 1 << 20, now), fits);
        }
        assert_eq!(asked.times.get(), 1, "all of it on the word of one answer");
        assert!(state.refused[0].is_some());
        asked.free = free(2 * GIB, 9000);
        assert!(ask(&mut state, &asked, 1 << 20, now + FRESH_NO));
        assert!(state.refused[0].is_none());
        assert!(!ask(&mut state, &asked, 5 * GIB, now + FRESH));
        assert!(
            state.refused[0].is_none(),
            "that a huge file does not fit says nothing of small ones"
        );
    }

    #[test]
    fn what_was_promised_and_is_not_written_yet_is_not_promised_twice() {
        let (mut state, now) = (State::default(), Instant::now());
        let asked = asked(free(50 * GIB, 100 + 600), true);
        let fit = (0..5000).filter(|_| ask(&mut state, &asked, 0, now)).count();
        assert_eq!(fit, 600, "however often it was looked");
        assert!(asked.times.get() > 1);
    }
}
