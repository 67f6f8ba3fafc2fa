//! One look at everything that a root's newest build has in the cache.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::spawn_blocking, time::Instant};

use super::{
    LeaseContext,
    error::LeaseError,
    lost::Lost,
    origin::{Origin, Origins},
    schedule::Build,
};
use crate::{
    digest::Digest,
    exec_path::ExecPath,
    invocation::rows,
    materialize::{
        Root,
        place::{Check, PlaceOptions, Placer},
    },
    output::{OutputContent, Stamp},
    record::{InvocationState, OutputRow, OutputState, Record, RootId, SeenOutput},
    remote::Attribution,
    roots::RootError,
    units::now_ms,
};

/// Outputs that are asked about together; some 300 KB on the wire.
const BATCH: usize = 4000;
/// Why an output is evicted, in its row.
const REASON: &str = "it is no longer in the remote cache; to get it, build its target again";

/// An output that is only in the cache, as far as is known.
struct Leased {
    path: ExecPath,
    content: OutputContent,
    digest: Digest,
    target: Arc<str>,
    /// Who gave it its content, and who was the last to change its row.
    invocation: Arc<str>,
    version: u64,
    origin: Origin,
    is_evicted: bool,
}

/// Outputs that are asked about together.
struct Batch {
    outputs: Vec<Leased>,
    /// The root's version when they were read, unless a build was running.
    quiet_at: Option<u64>,
}

/// Asks for all outputs of a root that are not on disk, in the newest build's cache, and marks what is gone, and what
/// is back. Returns what is lost, unless that is unknown because there was a build meanwhile.
pub(super) async fn pass(context: LeaseContext, build: Build, rate: u32) -> Result<Option<Lost>, LeaseError> {
    let row = &build.row;
    let cache = context
        .sources
        .of_record(&row.remote_cache, &row.remote_instance_name)?;
    let (roots, path) = (context.roots.clone(), build.path.clone());
    let opened = spawn_blocking(move || roots.reopen(path.as_ref())).await;
    let (id, root) = opened.unwrap_or(Err(RootError::Panicked))?;
    if id != build.root {
        return Err(LeaseError::Recreated);
    }
    let attribution = Attribution {
        invocation_id: row.invocation_id.clone(),
        build_id: row.build_id.clone(),
        ..Attribution::default()
    };
    let store = cache.blobs();
    let mut lost = Lost::new(&row.invocation_id);
    let mut is_certain = true;
    let origins = Origins::new(&context, row);
    let (sender, mut batches) = mpsc::channel(1);
    let record = context.record.clone();
    let reading = spawn_blocking(move || read(&record, id, origins, &sender));
    while let Some(batch) = batches.recv().await {
        let begun = Instant::now();
        let digests: Vec<Digest> = batch.outputs.iter().map(|leased| leased.digest.clone()).collect();
        context.metrics.request("find_missing");
        context.metrics.lease("renewed", digests.len());
        let missing = store.find_missing(&digests, &attribution).await?;
        let asked = digests.len();
        let (record, root) = (context.record.clone(), root.clone());
        let missing: HashSet<Digest> = missing.into_iter().collect();
        let noted = spawn_blocking(move || note(&record, id, &root, batch, &missing)).await;
        let noted = noted?;
        context.metrics.lease("lost", noted.newly_lost);
        context.metrics.lease("returned", noted.returned);
        is_certain &= noted.is_certain;
        for target in &noted.lost {
            lost.add(target);
        }
        let takes = Duration::from_secs_f64(asked as f64 / f64::from(rate.max(1)));
        tokio::time::sleep_until(begun + takes).await;
    }
    // What was not read was not asked for.
    reading.await?;
    Ok(is_certain.then_some(lost))
}

/// Reads what is to be asked for, a batch ahead of anyone who asks.
fn read(record: &Record, root: RootId, mut origins: Origins, sender: &mpsc::Sender<Batch>) {
    let mut outputs = Vec::new();
    // False when the answer is not wanted any more.
    let send = |outputs: Vec<Leased>| {
        let quiet_at = quiet_version(record, root);
        sender.blocking_send(Batch { outputs, quiet_at }).is_ok()
    };
    for (path, row) in record.scan_outputs(root, "") {
        let OutputContent::Blob(digest) = &row.content else {
            continue;
        };
        if row.state == OutputState::Materialized || digest.is_empty() {
            continue;
        }
        if rows::is_unasked(&row) {
            continue;
        }
        let origin = origins.of(&row.invocation_id);
        if origin == Origin::Elsewhere {
            continue;
        }
        outputs.push(Leased {
            path,
            digest: digest.clone(),
            target: row.label,
            invocation: row.invocation_id,
            version: row.version,
            origin,
            is_evicted: row.state == OutputState::Evicted,
            content: row.content,
        });
        if outputs.len() == BATCH && !send(std::mem::take(&mut outputs)) {
            return;
        }
    }
    if !outputs.is_empty() {
        send(outputs);
    }
}

/// The root's version, unless a build is running in it: that one may just bring back what was missing.
fn quiet_version(record: &Record, root: RootId) -> Option<u64> {
    let version = record.root_row(root)?.version;
    let newest = record.newest_invocation(root)?;
    (newest.state != InvocationState::Running).then_some(version)
}

/// What was found of a batch.
struct Noted {
    /// The targets of outputs that are gone, one for each output.
    lost: Vec<Arc<str>>,
    newly_lost: usize,
    returned: usize,
    /// Whether no build has changed what the cache has since it was asked.
    is_certain: bool,
}

/// What was found of an output.
#[derive(Clone, Copy)]
enum Found {
    Lost,
    Returned,
    OnDisk(Stamp),
}

/// Puts on record what is gone, what is back, and what has been on disk all the time: an output that was built here may
/// never have been in the cache. Blocks on the file system and the record.
fn note(record: &Record, id: RootId, root: &Root, batch: Batch, missing: &HashSet<Digest>) -> Noted {
    let is_certain = batch.quiet_at.is_some() && batch.quiet_at == quiet_version(record, id);
    let mut placer = Placer::new(root.place.clone(), PlaceOptions::default());
    let mut found = Vec::new();
    for leased in batch.outputs {
        if !missing.contains(&leased.digest) {
            if leased.is_evicted {
                found.push((leased, Found::Returned));
            }
        } else if let Ok(Check::Present { stamp, .. }) = placer.check(&leased.path, &leased.content, None) {
            found.push((leased, Found::OnDisk(stamp)));
        } else if is_certain && (leased.is_evicted || leased.origin == Origin::Here) {
            found.push((leased, Found::Lost));
        }
    }
    let mut is_lost = vec![false; found.len()];
    let changed = record.update_outputs(
        id,
        &found,
        |(leased, _)| &leased.path,
        |i, seen| {
            let (leased, found) = &found[i];
            let row = as_it_was_read(leased, seen);
            is_lost[i] = matches!(found, Found::Lost) && row.is_some();
            row.and_then(|row| changed_by(*found, row))
        },
    );
    let of = |kind: fn(&Found) -> bool| changed.iter().filter(|i| kind(&found[**i].1)).count();
    let (newly_lost, returned) = (
        of(|found| matches!(found, Found::Lost)),
        of(|found| matches!(found, Found::Returned)),
    );
    let lost = found.iter().zip(is_lost).filter(|(_, is_lost)| *is_lost);
    Noted {
        lost: lost.map(|((leased, _), _)| leased.target.clone()).collect(),
        newly_lost,
        returned,
        is_certain,
    }
}

/// The row, unless somebody else has had something newer to say of it.
fn as_it_was_read(leased: &Leased, seen: SeenOutput<'_>) -> Option<OutputRow> {
    let was_evicted = seen.state() == OutputState::Evicted;
    if seen.state() == OutputState::Materialized
        || was_evicted != leased.is_evicted
        || !seen.content_is(&leased.content)
    {
        return None;
    }
    seen.to_row()
        .filter(|row| row.version == leased.version && row.invocation_id == leased.invocation)
}

/// The row from now on, if it is another.
fn changed_by(found: Found, mut row: OutputRow) -> Option<OutputRow> {
    match found {
        Found::Lost if row.state == OutputState::Evicted => return None,
        Found::Lost => {
            row.state = OutputState::Evicted;
            row.error = REASON.to_owned();
            row.stamp = None;
        }
        Found::Returned => {
            row.state = OutputState::Known;
            row.error.clear();
            row.stamp = None;
        }
        Found::OnDisk(stamp) => {
            row.state = OutputState::Materialized;
            row.error.clear();
            row.stamp = Some(stamp);
            row.source = "present".into();
            row.materialized_at_ms = now_ms();
            row.took_us = 0;
        }
    }
    Some(row)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::{schedule, tests::Fixture};

    fn build(f: &Fixture) -> Build {
        schedule::newest_builds(&f.context.record).remove(0)
    }

    /// A pass over one batch whose outputs the cache all lacks; something happens while it answers.
    fn interrupted(f: &Fixture, meanwhile: impl FnOnce()) -> Noted {
        let (sender, mut batches) = mpsc::channel(1);
        let build = build(f);
        let record = &f.context.record;
        read(record, f.root, Origins::new(&f.context, &build.row), &sender);
        let batch = batches.blocking_recv().unwrap();
        meanwhile();
        let (_, root) = f.context.roots.reopen(build.path.as_ref()).unwrap();
        let missing = batch.outputs.iter().map(|leased| leased.digest.clone()).collect();
        note(record, f.root, &root, batch, &missing)
    }

    fn on_this_thread(f: impl FnOnce(Fixture)) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let fixture = runtime.block_on(Fixture::new());
        f(fixture);
    }

    #[test]
    fn what_a_build_writes_while_the_cache_answers_stays() {
        on_this_thread(|f| {
            let (outputs, record) = (f.outputs("a", 4), &f.context.record);
            let row = |n: usize| record.output(f.root, &outputs[n].0).unwrap();
            let mut newer = OutputRow::known(row(3).content);
            newer.version = 77;
            let mut reworded = row(1);
            reworded.version = 77;
            let noted = interrupted(&f, || {
                let rows = [(0, &newer), (1, &reworded)];
                let rows = rows.map(|(n, row): (usize, &OutputRow)| (outputs[n].0.clone(), row.clone()));
                record.put_outputs(f.root, rows.into());
                record.remove_outputs(f.root, &[outputs[2].0.clone()]);
            });
            assert_eq!((row(0), row(1)), (newer, reworded));
            assert_eq!(record.output(f.root, &outputs[2].0), None);
            assert_eq!(f.state(&outputs[3].0), OutputState::Evicted);
            assert_eq!(
                (noted.lost.len(), noted.newly_lost, noted.is_certain),
                (1, 1, true)
            );
        });
    }

    #[test]
    fn nothing_is_lost_that_a_build_may_just_bring_back() {
        on_this_thread(|f| {
            let (outputs, record) = (f.outputs("a", 1), &f.context.record);
            let noted = interrupted(&f, || f.build("second"));
            assert!(!noted.is_certain && noted.lost.is_empty());
            let mut running = record.invocation("second").unwrap();
            running.state = InvocationState::Running;
            record.put_invocation(&running);
            let noted = interrupted(&f, || ());
            assert!(!noted.is_certain && noted.lost.is_empty());
            assert_eq!(f.state(&outputs[0].0), OutputState::Known);
            running.state = InvocationState::Settled;
            record.put_invocation(&running);
            assert_eq!(interrupted(&f, || ()).newly_lost, 1);
            // It is still lost, and no news.
            let noted = interrupted(&f, || ());
            assert_eq!((noted.lost.len(), noted.newly_lost), (1, 0));
        });
    }

    #[tokio::test]
    async fn a_pass_in_which_something_stayed_uncertain_says_nothing_of_losses() {
        let f = Fixture::new().await;
        f.outputs("a", 1);
        let passed = || pass(f.context.clone(), build(&f), 1_000_000);
        assert_eq!(passed().await.unwrap(), Some(Lost::new("first")));
        let mut running = f.context.record.invocation("first").unwrap();
        running.state = InvocationState::Running;
        f.context.record.put_invocation(&running);
        assert_eq!(passed().await.unwrap(), None);
    }
}
