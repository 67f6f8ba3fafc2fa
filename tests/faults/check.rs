//! The promises, as far as they can be checked from outside.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use outhaul::{daemon::Services, materialize::Outcome, metrics::BlobLabels};

use crate::{
    build::{Build, Output, Shall},
    run::{Counts, Played, SECRET},
    schedule::Case,
    steps::Step,
};

/// How long it may take after a build is settled until nothing of it is under way any more.
const SWEEPING: Duration = Duration::from_secs(10);

/// What holds of a build whatever went wrong. In the place of an output that failed there may be what an older build
/// has put there.
pub(crate) async fn amid_faults(
    case: &Case,
    build: &Build,
    older: Option<&Build>,
    played: &Played,
    root: &Path,
) -> Result<(), String> {
    answered(build, played)?;
    all_reported(build, played)?;
    let hides = case.steps.iter().any(Step::hides);
    for (index, output) in build.outputs.iter().enumerate() {
        let outcome = outcome(played, output)?;
        let is_older = || older.is_some_and(|older| look(root, &older.outputs[index]) == Ok(true));
        let there = match look(root, output) {
            Err(_) if !outcome.is_on_disk() && is_older() => false,
            found => found?,
        };
        match outcome {
            Outcome::Downloaded { .. } | Outcome::Present { .. } if !there => {
                return Err(format!("{} is reported to be there and is not", output.path));
            }
            Outcome::Evicted(_) if !hides && matches!(output.shall, Shall::File(_)) => {
                return Err(format!("{} is reported to be evicted and was not", output.path));
            }
            Outcome::Unavailable(why) | Outcome::Failed(why) if case.passes => {
                return Err(format!("{} failed: {why}", output.path));
            }
            Outcome::Superseded => return Err(format!("{} is superseded by nothing", output.path)),
            _ => {}
        }
    }
    nothing_left_over(build, root).await?;
    bounded(case, &[Some(build), older], played)
}

/// What holds of a build that another one has overtaken: whatever it wanted has an end.
pub(crate) fn overtaken(build: &Build, played: &Played) -> Result<(), String> {
    answered(build, played)
}

/// What holds of a build after that, when nothing goes wrong any more.
pub(crate) async fn behind_faults(
    case: &Case,
    build: &Build,
    played: &Played,
    root: &Path,
) -> Result<(), String> {
    answered(build, played)?;
    all_reported(build, played)?;
    for output in &build.outputs {
        let outcome = outcome(played, output)?;
        let right = match &output.shall {
            Shall::Missing(_) => matches!(outcome, Outcome::Evicted(_)),
            _ => outcome.is_on_disk() && look(root, output)?,
        };
        if !right {
            return Err(format!(
                "without faults, {} ({}) came to {outcome:?}",
                output.path, output.shall
            ));
        }
    }
    nothing_left_over(build, root).await?;
    bounded(case, &[Some(build)], played)
}

/// Every output has an end.
fn all_reported(build: &Build, played: &Played) -> Result<(), String> {
    if played.outcomes.len() == build.outputs.len() {
        return Ok(());
    }
    Err(format!(
        "{} outputs have ends, {} were wanted",
        played.outcomes.len(),
        build.outputs.len()
    ))
}

/// No want has two ends, failures say why, and the report says the same in numbers.
fn answered(build: &Build, played: &Played) -> Result<(), String> {
    let (mut on_disk, mut failed, mut superseded) = (0, 0, 0);
    for output in &build.outputs {
        if !played.outcomes.contains_key(&output.path) {
            // Not even wanted, when the build was overtaken before.
            continue;
        }
        match outcome(played, output)? {
            Outcome::Failed(why) | Outcome::Unavailable(why) | Outcome::Evicted(why) => {
                failed += 1;
                if why.trim().is_empty() {
                    return Err(format!("{} failed without a reason", output.path));
                }
                proper(why)?;
            }
            Outcome::Superseded => superseded += 1,
            _ => on_disk += 1,
        }
    }
    let tally = &played.report.tally;
    let reported = (
        tally.downloaded + tally.present,
        tally.failed + tally.optional_failed,
        tally.superseded,
    );
    if reported != (on_disk, failed, superseded) || played.report.failed != failed {
        return Err(format!(
            "{on_disk} are there, {failed} failed, {superseded} are superseded; the report says {tally:?}"
        ));
    }
    if failed > 0 && tally.messages.is_empty() {
        return Err("the report does not say what failed".to_owned());
    }
    for message in &tally.messages {
        proper(message)?;
    }
    Ok(())
}

/// A message is a line without secrets.
fn proper(message: &str) -> Result<(), String> {
    if message.contains(SECRET)
        || SECRET
            .split(' ')
            .any(|part| part.len() > 6 && message.contains(part))
    {
        return Err(format!("a secret is shown: {message}"));
    }
    if message.chars().any(char::is_control) {
        return Err(format!("a message with control characters: {message:?}"));
    }
    if message.len() > 4000 {
        return Err(format!("a message of {} bytes", message.len()));
    }
    Ok(())
}

fn outcome<'p>(played: &'p Played, output: &Output) -> Result<&'p Outcome, String> {
    match played.outcomes.get(&output.path).map(Vec::as_slice) {
        Some([outcome]) => Ok(outcome),
        // What might have been changed meanwhile is looked at once more at the build's end.
        Some([first, outcome]) if first.is_on_disk() => Ok(outcome),
        Some(several) => Err(format!("{} has several ends: {several:?}", output.path)),
        None => Err(format!("{} was never answered", output.path)),
    }
}

/// Whether the output is there; if it is, it must be right.
fn look(root: &Path, output: &Output) -> Result<bool, String> {
    let path = root.join(&output.path);
    let Ok(found) = fs::symlink_metadata(&path) else {
        return Ok(false);
    };
    let wrong = |what: String| Err(format!("{} is wrong: {what}", output.path));
    match &output.shall {
        Shall::File(bytes) => {
            if !found.is_file() || found.mode() & 0o7777 != 0o555 || found.nlink() != 1 {
                return wrong(format!("{found:?}"));
            }
            let read = fs::read(&path).map_err(|e| e.to_string())?;
            if read != *bytes {
                return wrong(format!("{} bytes instead of {}", read.len(), bytes.len()));
            }
        }
        Shall::Missing(digest) => return wrong(format!("nobody has {digest}")),
        Shall::Symlink(target) => match fs::read_link(&path) {
            Ok(found) if found == Path::new(target) => {}
            other => return wrong(format!("{other:?}")),
        },
        Shall::EmptyDirectory => {
            if !found.is_dir() || fs::read_dir(&path).map_err(|e| e.to_string())?.count() > 0 {
                return wrong(format!("{found:?}"));
            }
        }
    }
    Ok(true)
}

/// Nothing is below the root that is not an output and no parent of one.
async fn nothing_left_over(build: &Build, root: &Path) -> Result<(), String> {
    let mut expected = BTreeSet::new();
    for output in &build.outputs {
        let path = root.join(&output.path);
        expected.extend(path.ancestors().map(Path::to_path_buf));
    }
    let end = Instant::now() + SWEEPING;
    loop {
        let mut found = Vec::new();
        walk(root, &mut found).map_err(|e| e.to_string())?;
        found.retain(|path| !expected.contains(path));
        if found.is_empty() {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(format!("left over: {found:?}"));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        // What is swept meanwhile is gone.
        if fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) {
            match walk(&path, found) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        found.push(path);
    }
    Ok(())
}

/// The cache is asked no more often than the options allow.
fn bounded(case: &Case, builds: &[Option<&Build>], played: &Played) -> Result<(), String> {
    let tries = u64::from(case.retries) + 1;
    let mut jobs = HashMap::<_, (u64, u64)>::new();
    for build in builds.iter().flatten() {
        for digest in (0..build.outputs.len()).filter_map(|index| build.digest(index)) {
            let size = digest.size();
            jobs.entry(digest).or_insert((0, size)).0 += 1;
        }
    }
    let (mut batched, mut streamed) = (0, 0);
    for (outputs, size) in jobs.into_values() {
        // Fetched, fetched again where the bytes were wrong, or could not be copied.
        let fetches = 2 * outputs + 1;
        // A refused batch is halved until it has one blob, and asked for without compression.
        batched += fetches * tries * 14;
        // Progress forgives failures, and there are 16 KiB to a step.
        streamed += fetches * ((tries + 1) * (1 + size / (16 << 10)) + 1);
    }
    let asked = &played.asked;
    if asked.batch_read_blobs > batched || asked.stream_reads > streamed + batched {
        return Err(format!(
            "at most {batched} and {streamed} requests, but: {asked:?}"
        ));
    }
    Ok(())
}

/// The metrics say what the builds came to.
pub(crate) async fn metrics(services: &Services, counts: &Counts) -> Result<(), String> {
    for (outcome, expected) in &counts.outcomes {
        let sources = ["batch", "stream", "inline", "copy", "disk", "none"];
        let counted: u64 = sources
            .map(|source| {
                let labels = BlobLabels { source, outcome };
                services.metrics.blobs.get_or_create(&labels).get()
            })
            .iter()
            .sum();
        if counted != *expected {
            return Err(format!("{expected} {outcome}; the metrics say {counted}"));
        }
    }
    // What was asked for by a build that was overtaken may still come.
    let end = Instant::now() + SWEEPING;
    while services.metrics.bytes_in_flight.get() != 0 {
        if Instant::now() > end {
            let bytes = services.metrics.bytes_in_flight.get();
            return Err(format!("{bytes} bytes are still in flight at the end"));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}
