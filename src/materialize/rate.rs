//! How many bytes are downloaded in a second, if that is limited.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

use crate::output::Class;

/// A limit for each lane. What waits for its time has one of the few places of downloads, whichever its lane.
#[derive(Debug)]
pub(super) struct Rate {
    per_second: u64,
    /// When all that was let through so far has had its time.
    required: Mutex<Instant>,
    optional: Mutex<Instant>,
}

/// The limit of one lane; none where nothing is limited.
#[derive(Debug, Clone)]
pub(super) struct Pace(Option<(Arc<Rate>, Class)>);

impl Pace {
    pub(super) fn new(rate: Option<&Arc<Rate>>, class: Class) -> Self {
        Self(rate.map(|rate| (rate.clone(), class)))
    }

    /// Waits until what was let through before has had its time, and lets these bytes through.
    pub(super) async fn take(&self, bytes: u64) {
        if let Some((rate, class)) = &self.0 {
            sleep_until(rate.begin(*class, bytes, Instant::now())).await;
        }
    }
}

impl Rate {
    /// Of this many bytes in a second, at least one.
    pub(super) fn new(per_second: u64) -> Self {
        let now = Instant::now();
        Self {
            per_second: per_second.max(1),
            required: Mutex::new(now),
            optional: Mutex::new(now),
        }
    }

    /// When bytes may come that are asked for now.
    fn begin(&self, class: Class, bytes: u64, now: Instant) -> Instant {
        let lane = match class {
            Class::Required => &self.required,
            Class::Optional | Class::Known => &self.optional,
        };
        let mut free = lane.lock();
        let begins = now.max(*free);
        *free = begins + Duration::from_secs_f64(bytes as f64 / self.per_second as f64);
        begins
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lane_lets_as_much_through_as_its_time_allows() {
        let rate = Rate::new(1000);
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let begin = |class, bytes, ms| rate.begin(class, bytes, at(ms)).duration_since(start).as_millis();
        assert_eq!(begin(Class::Required, 500, 1), 1);
        assert_eq!(begin(Class::Required, 2000, 1), 501);
        assert_eq!(begin(Class::Optional, 100, 2), 2);
        assert_eq!(begin(Class::Required, 1, 3), 2501);
        assert_eq!(begin(Class::Optional, 1, 3), 102);
        // What was not used is not kept for later.
        assert_eq!(begin(Class::Optional, 1000, 5000), 5000);
        assert_eq!(begin(Class::Optional, 1, 5000), 6000);
    }

    #[tokio::test(start_paused = true)]
    async fn bytes_wait_for_those_before_them() {
        let rate = Arc::new(Rate::new(1000));
        let pace = Pace::new(Some(&rate), Class::Required);
        let start = Instant::now();
        for expected in [0, 500, 1000] {
            pace.take(500).await;
            assert_eq!(start.elapsed().as_millis(), expected);
        }
        Pace::new(None, Class::Required).take(u64::MAX).await;
        assert_eq!(start.elapsed().as_millis(), 1000);
    }
}
