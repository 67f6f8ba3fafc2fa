//! Whether what was staged into a directory is there still.

use std::{
    collections::{BTreeSet, HashSet},
    path::Path,
    sync::Arc,
};

use super::{
    error::StageError,
    marker::{self, Marker, Missing},
    request::Wish,
};
use crate::{
    exec_path::ExecPath,
    materialize::place::{Check, OutputRoot, PlaceError, PlaceOptions, Placer},
    output::{OutputContent, Stamp},
    record::Which,
};

/// How many files are named that nobody staged.
const NAMED: usize = 100;

/// The answer, and what speaks against it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    /// What is wrong, in words; nothing is if it is empty.
    pub(crate) problems: Vec<String>,
    /// Files that were looked at.
    pub(crate) files: u64,
    /// Whether optional outputs had come to their end as well.
    pub(crate) complete: bool,
    /// The builds that it was staged from.
    pub(crate) invocations: Vec<String>,
    /// The URLs and digests that it was staged from, without what may be secret in them.
    pub(crate) from: Vec<String>,
    /// Optional outputs and files that could not be staged, and why.
    pub(crate) missing: Vec<Missing>,
}

impl Answer {
    /// Whether it is all there.
    pub(crate) fn is_staged(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Looks whether a directory has what stages have put there: all of them, or those of a build, a workspace, of what
/// [`remembered`](super::remembered) makes of URLs and digests, a wish.
/// What a marker lists must be there with the right bytes; a file that still looks as it did is not read. Blocks.
///
/// # Errors
/// When the markers cannot be read.
pub(crate) fn is_staged(
    directory: &Path,
    which: &Which,
    from: &[String],
    wish: Option<&Wish>,
) -> Result<Answer, StageError> {
    let mut answer = Answer::default();
    if !directory.is_dir() {
        answer
            .problems
            .push(format!("{}: no such directory", directory.display()));
        return Ok(answer);
    }
    let mut all = Vec::new();
    for (path, found) in marker::read_all(directory)? {
        match found {
            Ok(marker) => all.push(marker),
            // Nobody can say what it was about.
            Err(reason) => answer.problems.push(format!(
                "{}: not a marker of a staged tree: {reason}",
                path.display()
            )),
        }
    }
    let known: HashSet<String> = all
        .iter()
        .flat_map(|marker| marker.files.iter().map(|file| file.path.clone()))
        .collect();
    // First the workspace, as for staging: another one's marker does not do, whatever is wished.
    let mut markers = which.innermost(&all, |marker| marker.workspace.as_str());
    markers.retain(|marker| is_meant(marker, which, from, wish));
    if markers.is_empty() && answer.problems.is_empty() {
        let of_that = if wish.is_some() || !from.is_empty() || *which != Which::default() {
            " of that request"
        } else {
            ""
        };
        answer.problems.push(format!(
            "{}: nothing{of_that} was staged here",
            directory.display()
        ));
    }
    answer.complete = !markers.is_empty() && markers.iter().all(|marker| marker.complete);
    let origins = |origins: fn(&Marker) -> &[String]| {
        let all: BTreeSet<&String> = markers.iter().flat_map(|marker| origins(marker)).collect();
        all.into_iter().filter(|one| !one.is_empty()).cloned().collect()
    };
    answer.invocations = origins(|marker| std::slice::from_ref(&marker.invocation_id));
    answer.from = origins(|marker| &marker.from);
    answer.missing = markers.iter().flat_map(|marker| marker.missing.clone()).collect();
    let mut wanted = Vec::new();
    for file in markers.iter().flat_map(|marker| &marker.files) {
        match file.content() {
            Ok((path, content)) => wanted.push((path, content, file.stamp)),
            Err(reason) => answer.problems.push(reason.to_string()),
        }
    }
    // What several markers or archives have is one file.
    wanted.sort_by(|a, b| a.0.cmp(&b.0));
    wanted.dedup_by(|a, b| (&a.0, &a.1) == (&b.0, &b.1));
    answer.files = wanted.len() as u64;
    for ((path, ..), looked) in wanted.iter().zip(look(directory, &wanted)?) {
        match looked {
            Ok(Check::Present { .. }) => {}
            Ok(Check::Absent) => answer.problems.push(format!("{path}: missing")),
            Ok(Check::Differs) => answer
                .problems
                .push(format!("{path}: changed since it was staged")),
            Err(reason) => answer.problems.push(format!("{path}: {reason}")),
        }
    }
    let trees: BTreeSet<&String> = markers.iter().flat_map(|marker| &marker.trees).collect();
    let placer = placer(directory)?;
    for tree in trees {
        answer.problems.extend(not_staged(&placer, tree, &known));
    }
    answer.problems.dedup();
    Ok(answer)
}

/// What is wrong with a tree: files in it that no marker lists.
fn not_staged(placer: &Placer, tree: &str, known: &HashSet<String>) -> Vec<String> {
    let others = ExecPath::new(tree).map_err(|e| e.to_string()).and_then(|tree| {
        placer
            .others_below(tree.as_str(), &|path| known.contains(path), NAMED)
            .map_err(|e| e.to_string())
    });
    match others {
        Ok(others) => others
            .iter()
            .map(|path| format!("{path}: not part of the staged tree"))
            .collect(),
        Err(reason) => vec![format!("{tree}: {reason}")],
    }
}

fn is_meant(marker: &Marker, which: &Which, from: &[String], wish: Option<&Wish>) -> bool {
    // A build is asked for by anything but a URL.
    let is_any = from.is_empty() && wish.is_none() && *which == Which::default();
    (is_any || marker.from == from)
        && (which.invocation_id.is_empty() || which.invocation_id == marker.invocation_id)
        && wish.is_none_or(|wish| wish.sorted() == marker.request.sorted())
}

/// What should be where, with the stamp that was taken when it was there.
pub(super) type Wanted = (ExecPath, OutputContent, Option<Stamp>);

/// What looks at a staged directory that is there, and changes it. Blocks.
pub(super) fn placer(directory: &Path) -> Result<Placer, StageError> {
    let root = OutputRoot::open(directory, true).map_err(|e| StageError::Setting {
        flag: format!("--to={}", directory.display()),
        reason: e.to_string(),
    })?;
    Ok(Placer::new(Arc::new(root), PlaceOptions::default()))
}

/// Looks at the files of a directory that is there. Blocks.
pub(super) fn look(
    directory: &Path,
    wanted: &[Wanted],
) -> Result<Vec<Result<Check, PlaceError>>, StageError> {
    let mut placer = placer(directory)?;
    let check = |(path, content, stamp): &Wanted| placer.check(path, content, stamp.as_ref());
    Ok(wanted.iter().map(check).collect())
}
