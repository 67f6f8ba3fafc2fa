//! The task that keeps leases.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    error::LeaseError,
    lost::LostOutputs,
    pass,
    schedule::{self, LeaseOptions, Schedule},
};
use crate::{metrics::Metrics, record::Record, roots::Roots, sources::Sources, units::now_ms};

/// How long it takes at most until a new build is noticed.
const LOOK: Duration = Duration::from_secs(30);

/// What keeping leases needs of the other rooms.
#[derive(Clone)]
pub(crate) struct LeaseContext {
    /// What is known of outputs.
    pub record: Record,
    /// Where they would lie.
    pub roots: Arc<Roots>,
    /// Whom to ask.
    pub sources: Arc<Sources>,
    /// What is counted.
    pub metrics: Metrics,
}

/// Keeps leases until the token is cancelled. What is found is shown by `lost_outputs`. Whatever fails, it goes on later.
pub(crate) async fn keep(
    context: LeaseContext,
    options: LeaseOptions,
    lost_outputs: LostOutputs,
    stop: CancellationToken,
) {
    let keeping = renew_when_due(context, options, lost_outputs);
    stop.run_until_cancelled(keeping).await;
}

async fn renew_when_due(context: LeaseContext, options: LeaseOptions, lost_outputs: LostOutputs) {
    let mut schedule = Schedule::new(options);
    loop {
        let look = LOOK.min(options.interval / 4);
        let record = context.record.clone();
        let builds = tokio::task::spawn_blocking(move || schedule::newest_builds(&record)).await;
        let builds = match builds {
            Ok(builds) => builds,
            Err(error) => {
                if error.is_panic() {
                    context.metrics.fault("lease");
                    tracing::error!(
                        "looking for builds whose leases to renew panicked; this is a bug in outhaul"
                    );
                }
                tokio::time::sleep(LOOK).await;
                continue;
            }
        };
        lost_outputs.retain(|root| builds.iter().any(|build| build.root == root));
        schedule.see(&builds, now_ms(), Instant::now());
        // One, and then the builds are looked at again: there may be newer ones by then.
        if let Some(build) = schedule.next_due(&builds, Instant::now()) {
            let begun = Instant::now();
            let passed = caught(pass::pass(context.clone(), build.clone(), options.rate)).await;
            if let Err(reason) = &passed {
                context.metrics.fault("lease");
                tracing::warn!(
                    invocation = build.row.invocation_id,
                    "failed to renew leases: {reason}"
                );
            }
            schedule.passed(build, passed.is_ok(), begun, Instant::now());
            if let Ok(Some(lost)) = passed {
                lost_outputs.put(build.root, lost, &context.metrics);
            }
        }
        tokio::time::sleep_until(schedule.next().min(Instant::now() + look)).await;
    }
}

/// A panic as an error.
pub(super) async fn caught<T: Send + 'static>(
    doing: impl Future<Output = Result<T, LeaseError>> + Send + 'static,
) -> Result<T, LeaseError> {
    AbortOnDropHandle::new(tokio::spawn(doing))
        .await
        .unwrap_or_else(|e| Err(e.into()))
}
