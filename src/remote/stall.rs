//! Whether what is received comes fast enough.

use std::time::Duration;

/// Measures what a stream brings over windows of waiting for the network. The time that the sink takes is not the
/// server's and does not count.
pub(super) struct StallWatch {
    window: Duration,
    /// The fewest bytes in a window.
    least: u64,
    waited: Duration,
    bytes: u64,
}

impl StallWatch {
    pub(super) fn new(window: Duration, min_throughput: u64) -> Self {
        let least = (min_throughput as f64 * window.as_secs_f64()) as u64;
        Self {
            window,
            least: least.max(1),
            waited: Duration::ZERO,
            bytes: 0,
        }
    }

    /// How much longer to wait for the next message.
    pub(super) fn left(&self) -> Duration {
        self.window.saturating_sub(self.waited)
    }

    /// After a message: whether the window that it ended had too few bytes.
    pub(super) fn brought(&mut self, bytes: usize, waited: Duration) -> bool {
        self.bytes += bytes as u64;
        self.is_stalled(waited)
    }

    /// After a wait: whether a window ended, with too few bytes.
    pub(super) fn is_stalled(&mut self, waited: Duration) -> bool {
        self.waited += waited;
        if self.waited < self.window {
            return false;
        }
        let stalled = self.bytes < self.least;
        self.waited = Duration::ZERO;
        self.bytes = 0;
        stalled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(10);
    const HALF: Duration = Duration::from_secs(5);

    #[test]
    fn a_window_with_enough_bytes_is_no_stall() {
        let mut watch = StallWatch::new(WINDOW, 100);
        assert!(!watch.brought(999, HALF));
        assert_eq!(watch.left(), HALF);
        assert!(!watch.brought(1, HALF));
        // The next window counts from nothing.
        assert!(!watch.brought(999, HALF));
        assert!(watch.is_stalled(HALF));
    }

    #[test]
    fn without_a_least_throughput_any_byte_is_progress() {
        let mut watch = StallWatch::new(WINDOW, 0);
        assert!(!watch.brought(1, WINDOW));
        assert!(watch.is_stalled(WINDOW));
    }
}
