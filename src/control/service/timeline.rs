//! When the outputs of a build came.

use std::ops::ControlFlow;

use tokio_util::sync::CancellationToken;

use super::Service;
use crate::{
    invocation::timeline::{Arrival, Timeline},
    record::{InvocationRow, OutputState, SeenOutput},
    units::now_ms,
};

/// Rows are written so long after what they tell, at the most.
const LATE_MS: i64 = 2_000;

impl Service {
    /// How the outputs of a build have come so far: as its task has seen it, or as far as the record still has it. There,
    /// times are those at which rows were written, and outputs that later builds have downloaded again are theirs. `None` if
    /// there is no such build, or it has no output root here.
    pub(crate) async fn timeline(&self, id: &str) -> Option<Timeline> {
        let row = self.row_of(id).await?;
        if let Some(engine) = &self.engine
            && let Some(seen) = engine.timeline(&row.invocation_id).await
            && seen.came.outputs > 0
        {
            return Some(seen);
        }
        self.read(move |service, gone| service.recorded_timeline(&row, gone))
            .await?
    }

    /// Blocks on the record.
    fn recorded_timeline(&self, row: &InvocationRow, gone: &CancellationToken) -> Option<Timeline> {
        let root = row.root?;
        let to_ms = match row.settled_ms {
            0 => now_ms(),
            settled => settled,
        };
        let during = row.started_ms..=to_ms.saturating_add(LATE_MS);
        let mut timeline = Timeline::default();
        let mut path = String::new();
        self.record.see_outputs_after(root, "", |row| {
            if gone.is_cancelled() {
                return ControlFlow::Break(());
            }
            if let Some((bytes, placed_us, took_us)) =
                came(&row).filter(|(_, us, _)| during.contains(&(us / 1000)))
            {
                row.write_path(&mut path);
                timeline.add(&Arrival {
                    path: &path,
                    bytes,
                    source: row.source(),
                    wanted_us: placed_us
                        .saturating_sub(took_us)
                        .max(during.start().saturating_mul(1000)),
                    fetched_us: None,
                    placed_us,
                });
            }
            ControlFlow::Continue(())
        });
        Some(timeline)
    }
}

/// Of an output that was downloaded: its bytes, when it was there, and how long that took, in microseconds.
fn came(row: &SeenOutput<'_>) -> Option<(u64, i64, i64)> {
    if row.state() != OutputState::Materialized || matches!(row.source(), "present" | "") {
        return None;
    }
    let (content, _, at_ms, took_us) = row.parts()?;
    let took_us = i64::try_from(took_us).unwrap_or(i64::MAX);
    Some((content.size(), at_ms.saturating_mul(1000), took_us))
}
