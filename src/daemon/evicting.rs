//! Removing outputs that the cache still has, when the disk gets full.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::Services;
use crate::{
    control::Short,
    materialize::place::Mark,
    proto::outhaul::v1 as pb,
    units::{show_count, show_duration, show_size},
};

/// How often it is looked how much space is free.
const LOOK: Duration = Duration::from_secs(10);
/// How long after outputs were removed it is tried again.
const AGAIN: Duration = Duration::from_secs(60);
/// How long after too little could be removed; twice as long each further time, up to the longest.
const LATER: Duration = Duration::from_secs(10 * 60);
const LATEST: Duration = Duration::from_secs(2 * 3600);

/// When it was tried on one file system.
#[derive(Debug, Default)]
pub(super) struct Tries {
    /// Not again before then.
    next: Option<Instant>,
    /// How often in a row too little could be removed.
    failed: u32,
}

impl Tries {
    fn is_due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    /// It was tried. Gives the time until the next try.
    fn ended(&mut self, now: Instant, is_enough: bool) -> Duration {
        let pause = if is_enough {
            self.failed = 0;
            AGAIN
        } else {
            let pause = LATER
                .saturating_mul(2_u32.saturating_pow(self.failed))
                .min(LATEST);
            self.failed = self.failed.saturating_add(1);
            pause
        };
        self.next = Some(now + pause);
        pause
    }
}

/// What was removed from one file system, and why no more was.
#[derive(Default)]
struct Removed {
    outputs: u64,
    bytes: u64,
    left: Vec<pb::evict_response::Left>,
}

/// Removes outputs wherever less space is free than twice the mark, until the token is cancelled: those that `outhaul evict`
/// would.
pub(super) async fn keep_free(services: Services, mark: Mark, stop: CancellationToken) {
    let mut tries = HashMap::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = relieve(&services, mark, &mut tries) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// One look at all file systems.
pub(super) async fn relieve(services: &Services, mark: Mark, tries: &mut HashMap<u64, Tries>) {
    let short = services.service.short_of_space(mark).await;
    tries.retain(|device, _| short.iter().any(|short| short.device == *device));
    for short in short {
        let tries = tries.entry(short.device).or_default();
        if !tries.is_due(Instant::now()) {
            continue;
        }
        let removed = evict(services, &short).await;
        services.metrics.auto_evicted(removed.outputs, removed.bytes);
        // Bytes that are also in a snapshot, or in a copy, are not free when a file has gone.
        let now = services.service.short_of_space(mark).await;
        let still = now.iter().find(|now| now.device == short.device);
        let is_relieved = still.is_none_or(|now| now.lacks < short.lacks);
        // A build that runs may have filled the disk, and what it needs not can go when it has ended.
        let waits = removed.left.iter().any(|left| left.outputs == 0);
        let is_first = tries.failed == 0;
        let is_enough = removed.bytes >= short.lacks && is_relieved;
        let pause = tries.ended(Instant::now(), is_enough || waits);
        say(&short, &removed, is_enough, is_first, pause);
    }
}

async fn evict(services: &Services, short: &Short) -> Removed {
    let request = pb::EvictRequest {
        bytes: short.lacks,
        ..pb::EvictRequest::default()
    };
    let mut answers = services.service.evict_from(request, Some(short.device));
    let mut removed = Removed::default();
    while let Some(part) = answers.recv().await {
        let part = match part {
            Ok(part) => part,
            Err(error) => {
                tracing::warn!("--auto-evict: {}", error.message());
                return removed;
            }
        };
        removed.outputs += part.outputs.len() as u64;
        removed.bytes += part.bytes;
        removed.left.extend(part.left);
    }
    removed
}

/// A line for what was done; that it cannot be done is said once until it can be again.
fn say(short: &Short, removed: &Removed, is_enough: bool, is_first: bool, pause: Duration) {
    let exec_root = short.exec_root.display();
    let (outputs, bytes) = (show_count(removed.outputs), show_size(removed.bytes));
    if is_enough {
        tracing::info!(
            "--auto-evict: removed {bytes} in {outputs} output(s) from the file system of {exec_root}"
        );
    } else if is_first || removed.outputs > 0 {
        let left = removed.left.iter().map(|left| match left.outputs {
            0 => left.reason.clone(),
            outputs => format!("{} {}", show_count(outputs), left.reason),
        });
        let left: Vec<String> = left.collect();
        tracing::warn!(
            "--auto-evict: the file system of {exec_root} has {} too little free, and removing {bytes} in \
             {outputs} output(s) did not change that; tried again in {}. Left in place: {}",
            show_size(short.lacks),
            show_duration(pause),
            if left.is_empty() {
                "nothing".to_owned()
            } else {
                left.join("; ")
            }
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_does_not_help_is_tried_less_and_less_often() {
        let mut tries = Tries::default();
        assert!(tries.is_due(Instant::now()));
        for (is_enough, minutes) in [
            (true, 1),
            (false, 10),
            (false, 20),
            (false, 40),
            (false, 80),
            (false, 120),
            (false, 120),
            (true, 1),
            (false, 10),
        ] {
            let pause = Duration::from_secs(60 * minutes);
            assert_eq!(tries.ended(Instant::now(), is_enough), pause);
            tokio::time::advance(pause - Duration::from_millis(1)).await;
            assert!(!tries.is_due(Instant::now()));
            tokio::time::advance(Duration::from_millis(1)).await;
            assert!(tries.is_due(Instant::now()));
        }
        tries.failed = u32::MAX;
        assert_eq!(tries.ended(Instant::now(), false), LATEST);
    }
}
