//! How many bytes of batches to ask for at once.
//!
//! A line is full when as many bytes are under way as it brings in a round trip. Both are measured: what batches bring
//! per second while any is under way, over periods of [`PERIOD`] and of a batch's time at least, and the time of the
//! fastest batch of the last [`FORGET`], which is the round trip with the server's share and little of a queue. Twice
//! their product is asked for, so that a line which turns out to carry more is found out by asking it: on one that is
//! long, the window doubles every period until it brings no more. On a short one it stays at [`LEAST`]: more would only
//! wait for the writers. Nor is more asked for than comes within [`QUEUE`]: on a slow line a batch's time is mostly that
//! of the batches before it, and a window that went by that would grow without end.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// The window to begin with, and at least.
const LEAST: u64 = 8 << 20;
/// Batches that share a window, so that some are on their way while another is being taken in.
const SHARES: u64 = 8;
/// The least sum of sizes in a batch, where the window would have it less.
const LEAST_BATCH: u64 = 256 << 10;
/// How long bytes are counted before the window is reset.
const PERIOD: Duration = Duration::from_millis(50);
/// The longest time for which bytes are asked for ahead. Longer round trips than half of it are rare.
const QUEUE: Duration = Duration::from_millis(500);
/// For how long a fast batch says what the round trip is.
const FORGET: Duration = Duration::from_secs(10);

/// What is under way, and how much of it there may be.
#[derive(Debug)]
pub(in super::super) struct Window(Mutex<State>);

#[derive(Debug)]
struct State {
    /// The window is never larger.
    most: u64,
    bytes: u64,
    under_way: u64,
    /// Since when `busy` and `brought` are counted up to.
    since: Instant,
    busy: Duration,
    brought: u64,
    fastest: Option<(Duration, Instant)>,
}

impl Window {
    /// For at most this many bytes.
    pub(in super::super) fn new(most: u64) -> Self {
        Self(Mutex::new(State {
            most,
            bytes: LEAST.min(most),
            under_way: 0,
            since: Instant::now(),
            busy: Duration::ZERO,
            brought: 0,
            fastest: None,
        }))
    }

    /// The sum of sizes that the next batch should have, at most `largest`; `None` when enough is under way.
    pub(in super::super) fn next_batch(&self, largest: u64) -> Option<u64> {
        self.with(|state| state.next_batch(largest))
    }

    /// Begins a batch.
    pub(in super::super) fn begin(&self, bytes: u64) {
        self.with(|state| state.begin(bytes, Instant::now()));
    }

    /// Ends a batch of this many bytes that was begun at `begun`, well or not.
    pub(in super::super) fn end(&self, bytes: u64, begun: Instant) {
        self.with(|state| state.end(bytes, begun, Instant::now()));
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        // Plain numbers: a panic elsewhere leaves them as good as before.
        change(&mut self.0.lock())
    }
}

impl State {
    fn next_batch(&self, largest: u64) -> Option<u64> {
        let batch = (self.bytes / SHARES).max(LEAST_BATCH).min(largest);
        (self.under_way == 0 || self.under_way + batch <= self.bytes).then_some(batch)
    }

    fn begin(&mut self, bytes: u64, now: Instant) {
        self.count(now);
        self.under_way += bytes;
    }

    fn count(&mut self, now: Instant) {
        if self.under_way > 0 {
            self.busy += now.saturating_duration_since(self.since);
        }
        self.since = now;
    }

    fn end(&mut self, bytes: u64, begun: Instant, now: Instant) {
        self.count(now);
        self.under_way = self.under_way.saturating_sub(bytes);
        self.brought += bytes;
        let took = now.saturating_duration_since(begun);
        let stale = |at: Instant| now.saturating_duration_since(at) > FORGET;
        if self
            .fastest
            .is_none_or(|(fastest, at)| took <= fastest || stale(at))
        {
            self.fastest = Some((took, now));
        }
        let fastest = self.fastest.map_or(took, |(fastest, _)| fastest);
        // Batches that share the line end together; counted over less than one's time, they would be a torrent.
        if self.busy < PERIOD.max(fastest) {
            return;
        }
        let per_second = self.brought as f64 / self.busy.as_secs_f64();
        let ahead = fastest.saturating_mul(2).min(QUEUE);
        // At most as large as what memory is set aside for.
        let wanted = (per_second * ahead.as_secs_f64()) as u64;
        // Errors and lone small files bring little, which says nothing about the line.
        self.bytes = wanted.max(self.bytes / 2).max(LEAST).min(self.most);
        (self.busy, self.brought) = (Duration::ZERO, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The window after a second over a connection with this round-trip time and this many bytes per second.
    fn play(rtt: Duration, per_second: u64) -> u64 {
        play_for(Duration::from_secs(1), rtt, per_second)
    }

    /// The same after another time: batches come one after the other.
    fn play_for(time: Duration, rtt: Duration, per_second: u64) -> u64 {
        let window = Window::new(32 * MIB);
        let mut state = window.0.lock();
        let start = Instant::now();
        let (mut now, mut free) = (start, start);
        let mut under_way = std::collections::VecDeque::new();
        while now < start + time {
            while let Some(bytes) = state.next_batch(MIB) {
                state.begin(bytes, now);
                let sent = Duration::from_secs_f64(bytes as f64 / per_second as f64);
                free = free.max(now) + sent;
                under_way.push_back((bytes, now, free + rtt));
            }
            let (bytes, begun, at) = under_way.pop_front().unwrap();
            now = now.max(at);
            state.end(bytes, begun, now);
        }
        state.bytes
    }

    #[test]
    fn a_long_line_is_filled_and_a_short_one_is_not_flooded() {
        let ms = Duration::from_millis;
        assert_eq!(play(ms(0), 1000 * MIB), LEAST);
        assert_eq!(play(ms(5), 100 * MIB), LEAST);
        // 7.5 MiB are in 25 ms, and twice that is asked for, and some for what a batch itself takes.
        assert!((15 * MIB..20 * MIB).contains(&play(ms(25), 300 * MIB)));
        assert!(play(ms(25), 1000 * MIB) >= 24 * MIB);
        assert_eq!(play(ms(100), 1000 * MIB), 32 * MIB);
        // 100 Mbit/s: a queue makes batches slower and brings no more.
        assert!(play(ms(25), 12 * MIB) <= 8 * MIB);
    }

    /// The largest window in that many `rounds` in which batches share the connection and end together.
    fn share(rounds: usize, rtt: Duration, per_second: u64) -> u64 {
        let window = Window::new(32 * MIB);
        let mut state = window.0.lock();
        let mut now = Instant::now();
        let mut most = 0;
        for _ in 0..rounds {
            let begun = now;
            let batches: Vec<u64> = std::iter::from_fn(|| {
                let bytes = state.next_batch(MIB)?;
                state.begin(bytes, begun);
                Some(bytes)
            })
            .collect();
            let bytes: u64 = batches.iter().sum();
            now += rtt + Duration::from_secs_f64(bytes as f64 / per_second as f64);
            for bytes in batches {
                state.end(bytes, begun, now);
            }
            most = most.max(state.bytes);
        }
        most
    }

    #[test]
    fn a_slow_line_is_not_flooded_however_long_it_takes() {
        let (ms, minutes) = (Duration::from_millis, Duration::from_secs(180));
        for per_second in [MIB / 2, 2 * MIB, 12 * MIB] {
            assert_eq!(play_for(minutes, ms(25), per_second), LEAST, "{per_second}");
            assert_eq!(share(50, ms(25), per_second), LEAST, "{per_second}");
        }
        assert!(share(50, ms(25), 118 * MIB) <= 32 * MIB);
    }

    #[test]
    fn one_batch_is_always_under_way() {
        let window = Window::new(1);
        let begun = Instant::now();
        assert_eq!(window.next_batch(MIB), Some(LEAST_BATCH));
        window.begin(LEAST_BATCH);
        assert_eq!(window.next_batch(MIB), None);
        window.end(LEAST_BATCH, begun);
        assert_eq!(window.next_batch(1000), Some(1000));
    }
}
