//! Removing outputs that the cache still has, when the disk gets full.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Status;

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
    for (device, tries) in tries.iter_mut() {
        if short.iter().all(|short| short.device != *device) {
            tries.failed = 0;
        }
    }
    for short in short {
        let tries = tries.entry(short.device).or_default();
        if !tries.is_due(Instant::now()) {
            continue;
        }
        let removed = match evict(services, &short).await {
            Ok(removed) => removed,
            Err(error) => {
                tracing::warn!("--auto-evict: {}", error.message());
                Removed::default()
            }
        };
        services.metrics.auto_evicted(removed.outputs, removed.bytes);
        let is_first = tries.failed == 0;
        let pause = tries.ended(Instant::now(), removed.bytes >= short.lacks);
        say(&short, &removed, is_first, pause);
    }
}

async fn evict(services: &Services, short: &Short) -> Result<Removed, Status> {
    let request = pb::EvictRequest {
        bytes: short.lacks,
        ..pb::EvictRequest::default()
    };
    let mut answers = services.service.evict_from(request, Some(short.device));
    let mut removed = Removed::default();
    while let Some(part) = answers.recv().await {
        let part = part?;
        removed.outputs += part.outputs.len() as u64;
        removed.bytes += part.bytes;
        removed.left.extend(part.left);
    }
    Ok(removed)
}

/// A line for what was done; that it cannot be done is said once until it can be again.
fn say(short: &Short, removed: &Removed, is_first: bool, pause: Duration) {
    let exec_root = short.exec_root.display();
    let (outputs, bytes) = (show_count(removed.outputs), show_size(removed.bytes));
    if removed.bytes >= short.lacks {
        tracing::info!(
            "--auto-evict: removed {outputs} outputs ({bytes}) from the file system of {exec_root}"
        );
    } else if is_first || removed.outputs > 0 {
        let left = removed.left.iter().map(|left| match left.outputs {
            0 => left.reason.clone(),
            outputs => format!("{} {}", show_count(outputs), left.reason),
        });
        let left: Vec<String> = left.collect();
        tracing::warn!(
            "--auto-evict: the file system of {exec_root} lacks {}, and only {outputs} outputs ({bytes}) could be \
             removed; tried again in {}. Left in place: {}",
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
