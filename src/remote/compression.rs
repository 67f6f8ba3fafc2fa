//! Whether compression pays on the line to a cache.
//!
//! zstd often halves what compilers write, and costs the server and us together 3 to 6 ns a byte: it pays on a line that
//! carries up to a gigabit and loses on one that is as fast as memory. What the line is like shows in the
//! bytes that blobs have after decompression, over the time in which anything was asked for. That
//! *goodput* is measured over windows, in one way of sending at a time:
//!
//! * A plain transfer of [`FAST`] or more stays plain.
//! * Otherwise the other way is tried for one window, and kept if it brings [`GAIN`] times as much. The next try comes
//!   after twice as many windows, so that a line that suits neither way is not tried all the time.
//! * It starts plain on this machine, with zstd elsewhere.

use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

/// Bytes per second from which a line is not worth compressing for: a little more than a gigabit, which zstd was
/// measured to make half as fast again for large blobs.
const FAST: f64 = 128.0 * 1024.0 * 1024.0;
/// How much better the other way must be. Goodput wavers by less.
const GAIN: f64 = 1.25;
/// A window has at least this many bytes, after decompression.
const WINDOW_BYTES: u64 = 4 << 20;
/// And takes at least so long.
const WINDOW_TIME: Duration = Duration::from_millis(100);
/// Windows before the first try of the other way, and at most before a later one.
const FIRST_TRY: u32 = 2;
const LAST_TRY: u32 = 64;

/// When to use zstd where a server offers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Never use zstd.
    Never,
    /// Where it makes transfers faster, as measured.
    #[default]
    WherePaying,
    /// Always use zstd.
    Always,
}

/// The choice for one kind of transfer, shared by all of them.
#[derive(Debug)]
pub(crate) struct Chooser {
    /// `None`: nothing to choose.
    state: Option<Mutex<State>>,
    always: bool,
}

#[derive(Debug)]
struct State {
    zstd: bool,
    /// Counts changes, so that what was asked for before one does not count after it.
    generation: u32,
    /// Transfers under way, and since when what they took is not yet in `busy`.
    running: usize,
    since: Instant,
    /// Whether something of this generation has come: the window begins there, followed by the old ones' ends.
    begun: bool,
    busy: Duration,
    bytes: u64,
    /// Goodput of the way that is not being tried.
    before: Option<f64>,
    windows: u32,
    try_after: u32,
}

/// A transfer under way. It ends when dropped.
#[derive(Debug)]
pub(crate) struct Running<'a> {
    chooser: &'a Chooser,
    generation: u32,
    zstd: bool,
}

impl Chooser {
    /// For a line that stays on this machine, or one that leads elsewhere.
    pub(crate) fn new(compression: Compression, local: bool) -> Self {
        let state = State {
            zstd: !local,
            generation: 0,
            running: 0,
            since: Instant::now(),
            begun: false,
            busy: Duration::ZERO,
            bytes: 0,
            before: None,
            windows: 0,
            try_after: FIRST_TRY,
        };
        Self {
            state: (compression == Compression::WherePaying).then(|| state.into()),
            always: compression == Compression::Always,
        }
    }

    /// Begins a transfer from a server that offers zstd or not.
    pub(crate) fn begin(&self, offered: bool) -> Running<'_> {
        let (zstd, generation) = match self.lock() {
            Some(mut state) if offered => {
                state.begin(Instant::now());
                (state.zstd, state.generation)
            }
            // What there is no choice for says nothing.
            Some(_) => (false, u32::MAX),
            None => (self.always && offered, u32::MAX),
        };
        Running {
            chooser: self,
            generation,
            zstd,
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, State>> {
        self.state.as_ref().map(Mutex::lock)
    }
}

impl Running<'_> {
    /// Whether to ask for zstd.
    pub(crate) const fn zstd(&self) -> bool {
        self.zstd
    }

    /// Counts bytes that came, after decompression.
    pub(crate) fn brought(&self, bytes: u64) {
        if self.generation != u32::MAX
            && let Some(mut state) = self.chooser.lock()
        {
            state.brought(self.generation, bytes, Instant::now());
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.generation != u32::MAX
            && let Some(mut state) = self.chooser.lock()
        {
            state.tick(Instant::now());
            state.running -= 1;
        }
    }
}

impl State {
    fn begin(&mut self, now: Instant) {
        self.tick(now);
        self.running += 1;
    }

    /// Counts the time up to now, if anything was under way.
    fn tick(&mut self, now: Instant) {
        if self.running > 0 {
            self.busy += now.saturating_duration_since(self.since);
        }
        self.since = now;
    }

    fn brought(&mut self, generation: u32, bytes: u64, now: Instant) {
        if generation != self.generation {
            return;
        }
        self.tick(now);
        if !self.begun {
            (self.begun, self.busy, self.bytes) = (true, Duration::ZERO, 0);
            return;
        }
        self.bytes += bytes;
        if self.bytes >= WINDOW_BYTES && self.busy >= WINDOW_TIME {
            let goodput = self.bytes as f64 / self.busy.as_secs_f64();
            (self.busy, self.bytes) = (Duration::ZERO, 0);
            self.ended(goodput);
        }
    }

    /// A window ended with this many bytes per second.
    fn ended(&mut self, goodput: f64) {
        if let Some(before) = self.before.take() {
            self.windows = 0;
            self.try_after = (self.try_after * 2).min(LAST_TRY);
            let keep = goodput >= before * GAIN;
            tracing::debug!(
                zstd = self.zstd,
                keep,
                goodput,
                before,
                "tried the other transfer mode"
            );
            if !keep {
                self.change();
            }
            return;
        }
        if !self.zstd && goodput >= FAST {
            self.windows = 0;
            return;
        }
        self.windows += 1;
        if self.windows >= self.try_after {
            self.before = Some(goodput);
            self.change();
        }
    }

    fn change(&mut self) {
        self.zstd = !self.zstd;
        self.generation = (self.generation + 1) % u32::MAX;
        self.begun = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1024.0 * 1024.0;

    /// Windows over a line on which plain and compressed transfers have this goodput; how many were compressed.
    fn play(local: bool, plain: f64, zstd: f64, windows: u32) -> (u32, bool) {
        let chooser = Chooser::new(Compression::WherePaying, local);
        let mut state = chooser.lock().unwrap();
        let compressed = (0..windows).filter(|_| {
            let was = state.zstd;
            state.ended(if was { zstd * MIB } else { plain * MIB });
            was
        });
        (compressed.count() as u32, state.zstd)
    }

    #[test]
    fn a_fast_line_stays_plain() {
        assert_eq!(play(true, 300.0, 60.0, 1000), (0, false));
        // From elsewhere it has to be found out.
        assert_eq!(play(false, 140.0, 60.0, 1000), (2, false));
    }

    #[test]
    fn a_slow_line_is_compressed_for() {
        // 100 Mbit/s.
        let (compressed, now) = play(true, 11.0, 25.0, 1000);
        assert!(now && compressed > 950, "{compressed}");
        let (compressed, now) = play(false, 11.0, 25.0, 1000);
        assert!(now && compressed > 950, "{compressed}");
    }

    #[test]
    fn a_gigabit_is_compressed_for_where_that_is_faster() {
        // Measured with half of the bytes gone: large blobs and middling ones.
        assert!(play(true, 118.0, 180.0, 1000).0 > 950);
        assert!(play(true, 118.0, 98.0, 1000).0 < 25);
    }

    #[test]
    fn where_neither_is_better_the_other_way_is_seldom_tried() {
        // Busy processors, on this machine and elsewhere.
        assert!(play(true, 40.0, 35.0, 1000).0 < 25);
        assert!(play(true, 40.0, 45.0, 1000).0 < 25);
        assert!(play(false, 40.0, 45.0, 1000).0 > 975);
    }

    #[test]
    fn only_time_in_which_something_is_asked_for_counts() {
        let chooser = Chooser::new(Compression::WherePaying, true);
        let mut state = chooser.lock().unwrap();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        state.begin(at(0));
        // The first answer only begins the window.
        state.brought(0, WINDOW_BYTES, at(50));
        state.brought(0, WINDOW_BYTES / 2, at(80));
        state.tick(at(80));
        state.running -= 1;
        // Nothing is asked for in the meantime.
        state.begin(at(10_000));
        assert_eq!((state.busy, state.windows), (Duration::from_millis(30), 0));
        state.brought(0, WINDOW_BYTES / 2, at(10_100));
        assert_eq!((state.busy, state.windows), (Duration::ZERO, 1));
        // What was asked for before a change says nothing about the time after it.
        state.change();
        state.brought(0, WINDOW_BYTES, at(20_000));
        assert!(!state.begun);
    }

    #[test]
    fn a_fixed_choice_is_obeyed() {
        for (compression, offered, expected) in [
            (Compression::Never, true, false),
            (Compression::Always, true, true),
            (Compression::Always, false, false),
            (Compression::WherePaying, false, false),
        ] {
            let chooser = Chooser::new(compression, false);
            assert_eq!(chooser.begin(offered).zstd(), expected, "{compression:?}");
        }
        assert!(!Chooser::new(Compression::WherePaying, true).begin(true).zstd());
        assert!(Chooser::new(Compression::WherePaying, false).begin(true).zstd());
    }
}
