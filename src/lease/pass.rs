//! One look at everything that a root's newest build has in the cache.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{sync::mpsc, task::spawn_blocking, time::Instant};

use super::{Rooms, lost::Lost, schedule::Build};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    invocation::rows,
    materialize::{
        Completion, Outcome, Root,
        place::{Check, PlaceOptions, Placer},
    },
    output::{Class, OutputContent},
    record::{OutputRow, OutputState, Record, RootId},
    remote::Attribution,
};

/// Outputs that are asked about together; some 300 KB on the wire.
const BATCH: usize = 4000;
/// Why an output is evicted, in its row.
const REASON: &str = "the remote cache does not have it any more; to have it, build its target again";

/// An output that is only in the cache, as far as is known.
struct Leased {
    path: ExecPath,
    content: OutputContent,
    digest: Digest,
    target: Arc<str>,
    class: Class,
    is_evicted: bool,
}

/// Asks for all outputs of a build that are not on disk, and marks what is gone, and what is back.
pub(super) async fn pass(rooms: &Rooms, build: &Build, rate: u32) -> Result<Lost, String> {
    let row = &build.row;
    let cache = rooms
        .sources
        .of_record(&row.remote_cache, &row.remote_instance_name)?;
    let (roots, path) = (rooms.roots.clone(), build.path.clone());
    let opened = spawn_blocking(move || roots.reopen(path.as_ref())).await;
    let (id, root) = opened.map_err(|e| e.to_string())??;
    if id != build.root {
        return Err("the output root was deleted and made again since".to_owned());
    }
    let attribution = Attribution {
        invocation_id: row.invocation_id.clone(),
        build_id: row.build_id.clone(),
        ..Attribution::default()
    };
    let store = cache.blobs();
    let mut lost = Lost::new(&row.invocation_id);
    let mut batches = batches(rooms.record.clone(), build.root);
    while let Some(batch) = batches.recv().await {
        let begun = Instant::now();
        let digests: Vec<Digest> = batch.iter().map(|leased| leased.digest.clone()).collect();
        rooms.metrics.request("find_missing");
        rooms.metrics.lease("renewed", digests.len());
        let missing = store
            .find_missing(&digests, &attribution)
            .await
            .map_err(|e| e.to_string())?;
        let asked = batch.len();
        let (record, root) = (rooms.record.clone(), root.clone());
        let (id, version) = (build.root, row.version);
        let missing: HashSet<Digest> = missing.into_iter().collect();
        let noted = spawn_blocking(move || note(&record, id, version, &root, batch, &missing)).await;
        let noted = noted.map_err(|e| e.to_string())?;
        rooms.metrics.lease("lost", noted.newly_lost);
        rooms.metrics.lease("returned", noted.returned);
        for target in &noted.lost {
            lost.add(target);
        }
        let takes = Duration::from_secs_f64(asked as f64 / f64::from(rate.max(1)));
        tokio::time::sleep_until(begun + takes).await;
    }
    Ok(lost)
}

/// Reads what is to be asked for, a batch ahead of whoever asks.
fn batches(record: Record, root: RootId) -> mpsc::Receiver<Vec<Leased>> {
    let (sender, batches) = mpsc::channel(1);
    spawn_blocking(move || {
        let mut batch = Vec::new();
        for (path, row) in record.scan_outputs(root, "") {
            let OutputContent::Blob(digest) = &row.content else {
                continue;
            };
            if row.state == OutputState::Materialized || digest.is_empty() {
                continue;
            }
            batch.push(Leased {
                path,
                digest: digest.clone(),
                target: row.label.clone(),
                class: row.class,
                is_evicted: row.state == OutputState::Evicted,
                content: row.content,
            });
            if batch.len() == BATCH && sender.blocking_send(std::mem::take(&mut batch)).is_err() {
                return;
            }
        }
        if !batch.is_empty() {
            // Nobody asks any more.
            let _ = sender.blocking_send(batch);
        }
    });
    batches
}

/// What was found of a batch.
#[derive(Default)]
struct Noted {
    /// The targets of outputs that are gone, one for each output.
    lost: Vec<Arc<str>>,
    newly_lost: usize,
    returned: usize,
}

/// Puts on record what is gone, what is back, and what has been on disk all the time: an output that was built here may
/// never have been in the cache. Blocks on the file system and the record.
fn note(
    record: &Record,
    id: RootId,
    version: u64,
    root: &Root,
    batch: Vec<Leased>,
    missing: &HashSet<Digest>,
) -> Noted {
    let mut noted = Noted::default();
    let mut placer = Placer::new(root.place.clone(), PlaceOptions::default());
    let mut present = Vec::new();
    let mut changes = Vec::new();
    for leased in batch {
        if !missing.contains(&leased.digest) {
            if leased.is_evicted {
                noted.returned += 1;
                changes.push((leased, OutputState::Known));
            }
            continue;
        }
        if let Ok(Check::Present { stamp, .. }) = placer.check(&leased.path, &leased.content, None) {
            present.push(Completion {
                path: leased.path,
                content: leased.content,
                class: leased.class,
                outcome: Outcome::Present {
                    stamp: is_older_than_a_tick(stamp.ctime_ns).then_some(stamp),
                    hashed: true,
                },
                took: Duration::ZERO,
            });
            continue;
        }
        noted.lost.push(leased.target.clone());
        if !leased.is_evicted {
            noted.newly_lost += 1;
            changes.push((leased, OutputState::Evicted));
        }
    }
    rows::conclude(record, id, version, &present);
    change(record, id, &changes);
    noted
}

/// A stamp that is as young as its file proves nothing later, see [`rows::conclude`].
fn is_older_than_a_tick(ctime_ns: i64) -> bool {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |now| i64::try_from(now.as_nanos()).unwrap_or(i64::MAX));
    now.saturating_sub(ctime_ns) > 25_000_000
}

/// Changes the states of outputs, unless somebody else has something newer to say of them.
fn change(record: &Record, id: RootId, changes: &[(Leased, OutputState)]) {
    let mut rows: Vec<(ExecPath, OutputRow)> = Vec::new();
    record.see_outputs(
        id,
        changes,
        |(leased, _)| &leased.path,
        |i, seen| {
            let (leased, to) = &changes[i];
            let from = seen.state();
            let stays = match to {
                OutputState::Evicted => !matches!(from, OutputState::Known | OutputState::Failed),
                _ => from != OutputState::Evicted,
            };
            if stays || !seen.content_is(&leased.content) {
                return;
            }
            if let Some(mut row) = seen.to_row() {
                row.state = *to;
                row.stamp = None;
                row.error = match to {
                    OutputState::Evicted => REASON.to_owned(),
                    _ => String::new(),
                };
                rows.push((leased.path.clone(), row));
            }
        },
    );
    record.put_outputs(id, rows);
}
