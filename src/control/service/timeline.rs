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
    /// times are those at which rows were written, and outputs that later builds have downloaded again are theirs. Nothing has
    /// come of a build without an output root here. `None` if there is no such build.
    pub(crate) async fn timeline(&self, id: &str) -> Option<Timeline> {
        let row = self.row_of(id).await?;
        if let Some(engine) = &self.engine
            && let Some(seen) = engine.timeline(&row.invocation_id).await
            && seen.came.outputs > 0
        {
            return Some(seen);
        }
        self.read(move |service, gone| service.recorded_timeline(&row, gone))
            .await
    }

    /// Blocks on the record.
    fn recorded_timeline(&self, row: &InvocationRow, gone: &CancellationToken) -> Timeline {
        let Some(root) = row.root else {
            return Timeline::default();
        };
        let to_ms = match row.settled_ms {
            0 => now_ms(),
            settled => settled,
        };
        let during = row.started_ms..=to_ms.saturating_add(LATE_MS);
        // Rows come in the order of their paths.
        let begin_us = row.started_ms.saturating_mul(1000);
        let mut timeline = Timeline::since(begin_us);
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
                    wanted_us: placed_us.saturating_sub(took_us).max(begin_us),
                    fetched_us: None,
                    placed_us,
                });
            }
            ControlFlow::Continue(())
        });
        timeline
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        control::service::calls::tests::service,
        digest::{Digest, DigestFunction},
        exec_path::ExecPath,
        output::OutputContent,
        record::{OutputRow, Record},
    };

    #[tokio::test]
    async fn what_is_on_record_is_charted_when_it_came_whatever_its_path_is() {
        let dir = tempfile::tempdir().unwrap();
        let (record, _) = Record::open(dir.path()).unwrap();
        let root = record.root("/exec", 1, 2);
        let started_ms = 1_700_000_000_000;
        let rows = (1..=100).map(|second| {
            let path = format!("bazel-out/{:03}", 100 - second);
            let digest = Digest::of(DigestFunction::Sha256, path.as_bytes());
            let row = OutputRow {
                state: OutputState::Materialized,
                source: "batch".into(),
                materialized_at_ms: started_ms + 1000 * second,
                took_us: 500_000,
                ..OutputRow::known(OutputContent::Blob(digest))
            };
            (ExecPath::new(&path).unwrap(), row)
        });
        record.put_outputs(root, rows.collect());
        let service = service(record);
        let mut build = InvocationRow {
            root: Some(root),
            started_ms,
            settled_ms: started_ms + 100_000,
            ..InvocationRow::default()
        };
        let timeline = service.recorded_timeline(&build, &CancellationToken::new());
        let (_, from_us) = timeline.bars();
        assert_eq!(from_us, (started_ms + 500) * 1000);
        assert_eq!(timeline.end_us, (started_ms + 100_000) * 1000);
        let columns = &timeline.by_source(from_us, 10)[0].1;
        let outputs: Vec<u64> = columns.iter().map(|came| came.outputs).collect();
        assert_eq!(outputs.iter().sum::<u64>(), 100);
        assert!(
            outputs.iter().all(|count| (9..=11).contains(count)),
            "{outputs:?}"
        );
        // Not those of builds before and after it.
        build.started_ms += 10_500;
        build.settled_ms = started_ms + 50_000;
        let timeline = service.recorded_timeline(&build, &CancellationToken::new());
        assert_eq!(timeline.came.outputs, 42);
        build.root = None;
        let timeline = service.recorded_timeline(&build, &CancellationToken::new());
        assert_eq!(timeline.came.outputs, 0);
    }
}
