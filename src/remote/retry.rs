//! When to try again, and after how long.

use std::{cell::Cell, fmt, sync::Arc, time::Duration};

use futures::future::BoxFuture;

use crate::{
    open_files,
    transport::{Delays, RemoteError},
};

/// What an attempt must bring for earlier failures to be forgiven, in bytes. One that brings a byte before it breaks would
/// be resumed a billion times.
const PROGRESS: u64 = 16 * 1024;
/// The first wait.
const FIRST_DELAY: Duration = Duration::from_millis(100);

/// The longest wait that a server is granted when it names one, however short our own longest wait is. A build
/// may be waiting for it.
const LONGEST_ASKED_DELAY: Duration = Duration::from_secs(30);

/// Sleep and chance, apart from the decisions, so that tests need neither.
pub trait Timer: Send + Sync + 'static {
    /// Waits for a duration.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// A number from 0 to 1, evenly distributed.
    fn jitter(&self) -> f64;
}

/// The real clock and real chance.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemTimer;

impl Timer for SystemTimer {
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }

    fn jitter(&self) -> f64 {
        rand::random()
    }
}

tokio::task_local! {
    /// How often the task has tried again, where that is counted.
    static RETRIES: Cell<u64>;
}

/// Counts how often the requests of a future are made again.
pub(crate) async fn counting_retries<T>(asking: impl Future<Output = T>) -> (T, u64) {
    let counted = async { (asking.await, RETRIES.with(Cell::get)) };
    RETRIES.scope(Cell::new(0), counted).await
}

/// How often and how patiently to retry.
#[derive(Clone)]
pub struct RetryPolicy {
    retries: u32,
    delays: Delays,
    timer: Arc<dyn Timer>,
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryPolicy")
            .field("retries", &self.retries)
            .field("delays", &self.delays)
            .finish_non_exhaustive()
    }
}

impl RetryPolicy {
    /// At most `retries` tries after the first, at most `max_delay` apart unless the server asks for more.
    pub fn new(retries: u32, max_delay: Duration, timer: Arc<dyn Timer>) -> Self {
        Self {
            retries,
            delays: Delays::doubling(FIRST_DELAY, max_delay),
            timer,
        }
    }

    /// Starts counting for one request.
    pub fn start(&self) -> Backoff<'_> {
        self.start_at(0)
    }

    /// Starts counting for a transfer that is resumed, from this byte on.
    pub(crate) const fn start_at(&self, offset: u64) -> Backoff<'_> {
        Backoff {
            policy: self,
            failures: 0,
            forgiven_at: offset,
        }
    }

    /// Asks until there is an answer, an error that is not retryable, or no try left.
    ///
    /// # Errors
    /// That of the last try.
    pub async fn run<T, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T, RemoteError>
    where
        F: Future<Output = Result<T, RemoteError>>,
    {
        let mut backoff = self.start();
        loop {
            match attempt().await {
                Err(error) => backoff.again(error).await?,
                answer => return answer,
            }
        }
    }
}

/// The count of one request's failures.
#[derive(Debug)]
pub struct Backoff<'a> {
    policy: &'a RetryPolicy,
    failures: u32,
    /// How much of a transfer had come when its failures were last forgiven, in bytes.
    forgiven_at: u64,
}

impl Backoff<'_> {
    /// After a failure: waits and says `true` when the request should be tried again, or says `false` at once when
    /// the tries are used up. Does not ask whether the error is retryable: that is the caller's to know.
    pub async fn wait(&mut self, error: &RemoteError) -> bool {
        if self.failures >= self.policy.retries {
            return false;
        }
        let delay = self.delay(error.retry_after);
        self.failures += 1;
        // Mostly, nobody counts.
        let _ = RETRIES.try_with(|retries| retries.set(retries.get() + 1));
        if open_files::are_wanting() {
            // A connection needs one.
            tokio::task::spawn_blocking(open_files::spare);
        }
        tracing::debug!(%error, ?delay, attempt = self.failures, "retrying");
        self.policy.timer.sleep(delay).await;
        true
    }

    /// After any failure: waits if the request should be tried again, or gives the error back.
    pub(crate) async fn again(&mut self, error: RemoteError) -> Result<(), RemoteError> {
        if error.is_retryable() && self.wait(&error).await {
            return Ok(());
        }
        Err(error)
    }

    /// The same for a transfer of which this many bytes have come. One that got on has its earlier failures forgiven.
    pub(crate) async fn resume(&mut self, error: RemoteError, at: u64) -> Result<(), RemoteError> {
        if at - self.forgiven_at >= PROGRESS {
            self.forgiven_at = at;
            self.failures = 0;
        }
        self.again(error).await
    }

    fn delay(&self, asked: Option<Duration>) -> Duration {
        let policy = self.policy;
        let own = policy.delays.after(self.failures, policy.timer.jitter());
        let asked = asked
            .unwrap_or_default()
            .min(LONGEST_ASKED_DELAY.max(policy.delays.longest));
        own.max(asked)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Sleeps in no time and writes down for how long it was asked to.
    #[derive(Default)]
    pub(crate) struct FakeTimer {
        pub(crate) slept: Mutex<Vec<Duration>>,
        pub(crate) jitter: f64,
    }

    impl Timer for FakeTimer {
        fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
            self.slept.lock().unwrap().push(duration);
            Box::pin(std::future::ready(()))
        }

        fn jitter(&self) -> f64 {
            self.jitter
        }
    }

    fn error(retry_after: Option<Duration>) -> RemoteError {
        RemoteError {
            retry_after,
            ..RemoteError::unavailable("reading", "gone")
        }
    }

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[tokio::test]
    async fn delays_double_up_to_the_longest_and_then_end() {
        let timer = Arc::new(FakeTimer {
            jitter: 1.0,
            ..FakeTimer::default()
        });
        let policy = RetryPolicy::new(7, ms(2000), timer.clone());
        let mut backoff = policy.start();
        while backoff.wait(&error(None)).await {}
        let slept = timer.slept.lock().unwrap().clone();
        assert_eq!(slept, [100, 200, 400, 800, 1600, 2000, 2000].map(ms));
    }

    #[tokio::test]
    async fn jitter_takes_up_to_half_of_the_delay() {
        let timer = Arc::new(FakeTimer::default());
        let policy = RetryPolicy::new(2, ms(5000), timer.clone());
        let mut backoff = policy.start();
        while backoff.wait(&error(None)).await {}
        assert_eq!(*timer.slept.lock().unwrap(), [50, 100].map(ms));
    }

    #[tokio::test]
    async fn the_servers_wish_is_honoured_within_reason() {
        let timer = Arc::new(FakeTimer::default());
        let policy = RetryPolicy::new(3, ms(5000), timer.clone());
        let mut backoff = policy.start();
        for asked in [ms(7000), ms(3_600_000), ms(1)] {
            assert!(backoff.wait(&error(Some(asked))).await);
        }
        assert_eq!(*timer.slept.lock().unwrap(), [7000, 30_000, 200].map(ms));
    }

    #[tokio::test]
    async fn progress_forgives_earlier_failures() {
        let timer = Arc::new(FakeTimer::default());
        let policy = RetryPolicy::new(1, ms(5000), timer);
        let mut backoff = policy.start();
        assert!(backoff.wait(&error(None)).await);
        assert!(backoff.resume(error(None), PROGRESS).await.is_ok());
        assert!(!backoff.wait(&error(None)).await);
    }

    #[tokio::test]
    async fn any_number_of_failures_is_survived() {
        let timer = Arc::new(FakeTimer::default());
        let policy = RetryPolicy::new(100, ms(5000), timer);
        let mut backoff = policy.start();
        while backoff.wait(&error(None)).await {}
    }
}
