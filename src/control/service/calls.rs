//! Calls that take their time: while there are any, the daemon is at work.

use std::sync::Arc;

use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use super::Service;

/// Calls of one listener that read the record or the disk at a time: all else that blocks goes on, whatever is asked.
pub(super) const READING: usize = 4;

impl Service {
    /// Reads the record, or the disk, where that may block, in its turn. `None` if it panicked. The token says that nobody
    /// waits for the answer any more; what takes long looks at it.
    pub(in crate::control) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Self, &CancellationToken) -> T + Send + 'static,
    ) -> Option<T> {
        let place = Arc::clone(&self.places).acquire_owned().await.ok()?;
        let gone = CancellationToken::new();
        let _asked = gone.clone().drop_guard();
        let service = self.clone();
        let reading = spawn_blocking(move || {
            let answer = read(&service, &gone);
            drop(place);
            answer
        });
        reading.await.ok()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use super::*;
    use crate::{
        invocation::policy::Policy,
        materialize::MaterializeOptions,
        record::Record,
        remote::{GrpcCache, RemoteOptions},
        roots::RootRules,
        sources::SourceRule,
        stage::Reach,
        transport::Endpoint,
    };

    /// Of a record, with a cache that nobody asks.
    pub(in crate::control::service) fn service(record: Record) -> Service {
        let cache = Endpoint::parse("--remote-cache", "grpc://127.0.0.1:1").unwrap();
        let services = crate::daemon::Services::open(
            record,
            Policy::default(),
            RootRules::default(),
            SourceRule::Fixed(GrpcCache::new(RemoteOptions::new(cache)).unwrap().into()),
            MaterializeOptions::default(),
            false,
        );
        services.unwrap().service
    }

    #[tokio::test]
    async fn few_calls_of_a_door_read_at_a_time_and_end_with_who_asked() {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(dir.path()).unwrap();
        let all = service(record);
        let service = all.for_listener(Reach::Anywhere);
        let reading = Arc::new(AtomicUsize::new(0));
        let calls: Vec<_> = (0..3 * READING)
            .map(|_| {
                let (service, reading) = (service.clone(), reading.clone());
                tokio::spawn(async move {
                    let read = move |_: &Service, gone: &CancellationToken| {
                        reading.fetch_add(1, Ordering::SeqCst);
                        while !gone.is_cancelled() {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                        reading.fetch_sub(1, Ordering::SeqCst);
                    };
                    service.read(read).await
                })
            })
            .collect();
        while reading.load(Ordering::SeqCst) < READING {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(reading.load(Ordering::SeqCst), READING);
        let other = all.for_listener(Reach::Anywhere);
        assert!(
            other.read(|_, _| ()).await.is_some(),
            "another listener does not wait"
        );
        for call in &calls {
            call.abort();
        }
        while reading.load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(service.read(|_, _| ()).await.is_some());
    }
}
