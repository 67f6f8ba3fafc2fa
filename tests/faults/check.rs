//! The promises, as far as they can be checked from outside.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use outhaul::{daemon::Rooms, materialize::Outcome, metrics::BlobLabels};

use crate::{
    build::{Output, Shall},
    run::{Counts, Played, SECRET},
    schedule::Case,
    steps::Step,
};

/// How long what is being put in place may take to be swept behind a build that is settled.
const SWEEPING: Duration = Duration::from_secs(10);

/// What holds of a build whatever went wrong.
pub(crate) async fn first(case: &Case, played: &Played, root: &Path) -> Result<(), String> {
    answered(case, played)?;
    let hides = case.steps.iter().any(Step::hides);
    for output in &case.build.outputs {
        let outcome = outcome(played, output)?;
        let there = look(root, output)?;
        match outcome {
            Outcome::Downloaded { .. } | Outcome::Present { .. } if !there => {
                return Err(format!("{} is told to be there and is not", output.path));
            }
            Outcome::Evicted(_) if !hides && matches!(output.shall, Shall::File(_)) => {
                return Err(format!("{} is told to be evicted and was not", output.path));
            }
            Outcome::Failed(why) if case.passes => {
                return Err(format!("{} failed: {why}", output.path));
            }
            Outcome::Superseded => return Err(format!("{} is superseded by nothing", output.path)),
            _ => {}
        }
    }
    nothing_left_over(case, root).await?;
    bounded(case, played)
}

/// What holds of a build after that, when nothing goes wrong any more.
pub(crate) async fn second(case: &Case, played: &Played, root: &Path) -> Result<(), String> {
    answered(case, played)?;
    for output in &case.build.outputs {
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
    nothing_left_over(case, root).await?;
    bounded(case, played)
}

/// Every want has one end, failures say why, and the report says the same in numbers.
fn answered(case: &Case, played: &Played) -> Result<(), String> {
    let (mut on_disk, mut failed) = (0, 0);
    for output in &case.build.outputs {
        match outcome(played, output)? {
            Outcome::Failed(why) | Outcome::Evicted(why) => {
                failed += 1;
                if why.trim().is_empty() {
                    return Err(format!("{} failed without a reason", output.path));
                }
                proper(why)?;
            }
            Outcome::Superseded => {}
            _ => on_disk += 1,
        }
    }
    if played.outcomes.len() != case.build.outputs.len() {
        return Err(format!(
            "{} outputs have ends, {} were wanted",
            played.outcomes.len(),
            case.build.outputs.len()
        ));
    }
    let tally = &played.report.tally;
    let told = (
        tally.downloaded + tally.present,
        tally.failed + tally.optional_failed,
    );
    if told != (on_disk, failed) || played.report.failed != failed {
        return Err(format!(
            "{on_disk} are there and {failed} failed; the report says {tally:?}"
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

/// A message is a line that tells no secrets.
fn proper(message: &str) -> Result<(), String> {
    if message.contains(SECRET)
        || SECRET
            .split(' ')
            .any(|part| part.len() > 6 && message.contains(part))
    {
        return Err(format!("a secret is told: {message}"));
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

/// Nothing is below the root that is no output and no parent of one.
async fn nothing_left_over(case: &Case, root: &Path) -> Result<(), String> {
    let mut expected = BTreeSet::new();
    for output in &case.build.outputs {
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
fn bounded(case: &Case, played: &Played) -> Result<(), String> {
    let tries = u64::from(case.retries) + 1;
    let mut jobs = HashMap::<_, (u64, u64)>::new();
    for index in 0..case.build.outputs.len() {
        if let Some(digest) = case.build.digest(index) {
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
pub(crate) fn metrics(rooms: &Rooms, counts: &Counts) -> Result<(), String> {
    for (outcome, expected) in &counts.outcomes {
        let sources = ["batch", "stream", "inline", "copy", "disk", "none"];
        let counted: u64 = sources
            .map(|source| {
                let labels = BlobLabels { source, outcome };
                rooms.metrics.blobs.get_or_create(&labels).get()
            })
            .iter()
            .sum();
        if counted != *expected {
            return Err(format!("{expected} {outcome}; the metrics say {counted}"));
        }
    }
    if rooms.metrics.bytes_in_flight.get() != 0 {
        return Err(format!(
            "{} bytes in flight at the end",
            rooms.metrics.bytes_in_flight.get()
        ));
    }
    Ok(())
}
