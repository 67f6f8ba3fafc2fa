//! How much of a file system is to stay free.
//!
//! A disk that fills up stops more than us: the build tool, the journal, the user's editor. So downloads end before,
//! at a low-water mark for what somebody waits for, and at twice as much for the rest. The file system is asked once
//! for each batch of files. A file system that has no inodes left says so itself when a file is made.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{
    error::{PlaceError, PlaceErrorKind},
    mark::{Free, Mark, Shortage},
};

/// How long a refusal stands for files that were not fetched yet. After that, one of them is tried.
const REFUSAL: Duration = Duration::from_millis(250);

/// What is known of a root's file system.
#[derive(Debug, Default)]
pub(super) struct Space {
    pub(super) state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Bytes that were promised and perhaps not written yet: no answer of the file system knows of them.
    pub(super) pending: u64,
    /// The last refusals of everything: for what is required, and for what is optional.
    refused: [Option<(Shortage, Instant)>; 2],
}

impl Space {
    /// The refusal that a small file would get, if one was refused a moment ago: it need not be fetched. What takes no
    /// refusal for an answer finds out, and so does one file every now and then.
    pub(super) fn refuses(&self, is_optional: bool, path: &str) -> Option<PlaceError> {
        let state = self.state.lock();
        let (shortage, at) = state.refused[usize::from(is_optional)].as_ref()?;
        (at.elapsed() < REFUSAL).then(|| too_little(path, shortage.clone()))
    }
}

impl State {
    /// Promises the bytes, unless they are not there beside what was promised already.
    pub(super) fn judge(
        &mut self,
        mut free: Free,
        mark: Mark,
        is_optional: bool,
        bytes: u64,
    ) -> Option<Shortage> {
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

pub(super) fn too_little(path: &str, shortage: Shortage) -> PlaceError {
    PlaceError::new("write", path, PlaceErrorKind::LowSpace(Box::new(shortage)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const MARK: Mark = Mark::Amount(GIB);

    fn free(bytes: u64) -> Free {
        Free::new(bytes, 100 * GIB)
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
