//! Brings outputs to disk, and shows what came of each.

use std::{collections::HashMap, io::Write as _};

use serde_json::json;

use super::super::{
    client::Client,
    exit::{self, Failure},
    print,
    progress::watched,
    view,
};
use crate::{printable::printable, proto::outhaul::v1 as pb, units::random_uuid};

/// Paths of one request to the daemon.
pub(in crate::cli) const AT_ONCE: usize = 50_000;

/// That one failed to download weighs more than that another is not known.
pub(in crate::cli) const fn worse(one: u8, other: u8) -> u8 {
    match (one, other) {
        (exit::FAILED, _) | (_, exit::FAILED) => exit::FAILED,
        (exit::OK, code) | (code, _) => code,
    }
}

/// How results are shown.
#[derive(Debug, Clone, Copy)]
pub(in crate::cli) enum Show {
    Text,
    Json,
    /// Only what failed.
    Failures,
}

/// Outputs of one build, as that one has named them.
pub(in crate::cli) struct OfBuild {
    id: String,
    /// By their absolute paths.
    pub(in crate::cli) outputs: HashMap<String, pb::StagedOutput>,
}

impl OfBuild {
    pub(in crate::cli) fn new(build: &pb::Invocation, outputs: Vec<pb::StagedOutput>) -> Self {
        let below = |output: pb::StagedOutput| (format!("{}/{}", build.exec_root, output.exec_path), output);
        Self {
            id: build.invocation_id.clone(),
            outputs: outputs.into_iter().map(below).collect(),
        }
    }

    /// Whether an output has the content that the build has named there; `None` if it has named nothing there.
    pub(in crate::cli) fn has(&self, output: &pb::Output) -> Option<bool> {
        if output.invocation_id == self.id {
            return Some(true);
        }
        let named = self.outputs.get(&output.absolute_path())?;
        let named = (&named.digest, &named.symlink_target, named.directory);
        Some(named == (&output.digest, &output.symlink_target, output.directory))
    }

    /// Makes an error of an output that another build has put in the place of what was asked for.
    fn check(&self, result: &mut pb::materialize_response::Result) {
        if let Some(output) = &result.output
            && result.error.is_empty()
            && self.has(output) == Some(false)
        {
            let (here, id) = (&output.invocation_id, &self.id);
            result.error = format!(
                "build {here} is newer and has other content here; `outhaul stage --invocation {id} --to DIR` copies \
                 what build {id} has named"
            );
            result.outcome = pb::OutputOutcome::Unspecified.into();
        }
    }
}

/// Brings outputs to disk, and shows what came of each. Gives the code, and the outputs that are there. Of a build, only
/// what that one has named counts.
pub(in crate::cli) async fn get(
    client: &mut Client,
    paths: &[String],
    of_build: Option<&OfBuild>,
    show: Show,
) -> Result<(u8, Vec<pb::Output>), Failure> {
    let mut code = exit::OK;
    let mut there = Vec::new();
    let name = random_uuid();
    let look = client.asks_progress(&name);
    let results = watched("outputs", materialized(client, paths, of_build, &name), look).await?;
    if let (false, Some(failure)) = (matches!(show, Show::Json), all_failed(&results)) {
        return Err(failure);
    }
    for result in results {
        code = worse(code, show.result(&result)?);
        there.extend(result.output.filter(|_| result.error.is_empty()));
    }
    Ok((code, there))
}

/// Why all of several outputs failed, if it is the same for all.
fn all_failed(results: &[pb::materialize_response::Result]) -> Option<Failure> {
    let [first, _, ..] = results else { return None };
    let is_same = |result: &pb::materialize_response::Result| {
        result.output.is_some() && !result.error.is_empty() && result.error == first.error
    };
    results.iter().all(is_same).then(|| {
        let (path, more) = (printable(&first.path), results.len() - 1);
        Failure::failed(format!("{path} and {more} more: {}", printable(&first.error)))
    })
}

/// Brings outputs to disk, in calls of this name. Of a build, only what that one has named counts.
pub(in crate::cli) async fn materialized(
    client: &mut Client,
    paths: &[String],
    of_build: Option<&OfBuild>,
    progress_id: &str,
) -> Result<Vec<pb::materialize_response::Result>, Failure> {
    let mut results = Vec::with_capacity(paths.len());
    for paths in paths.chunks(AT_ONCE) {
        results.extend(client.materialize(paths.to_vec(), progress_id).await?);
    }
    if let Some(of_build) = of_build {
        results.iter_mut().for_each(|result| of_build.check(result));
    }
    Ok(results)
}

impl Show {
    /// Shows what came of one output, and gives the code for it.
    pub(in crate::cli) fn result(self, result: &pb::materialize_response::Result) -> Result<u8, Failure> {
        let code = match &result.output {
            _ if result.error.is_empty() => exit::OK,
            Some(_) => exit::FAILED,
            None => exit::NOT_FOUND,
        };
        match self {
            Self::Json => {
                let value = json!({
                    "path": result.path,
                    "outcome": view::non_empty(&result.outcome().name()),
                    "error": view::non_empty(&result.error),
                    "output": result.output.as_ref().map(view::output_json),
                });
                writeln!(print::out(), "{value}")?;
            }
            _ if code != exit::OK => {
                let (path, error) = (printable(&result.path), printable(&result.error));
                writeln!(print::err(), "outhaul: {path}: {error}")?;
            }
            Self::Text => {
                let (path, outcome) = (printable(&result.path), result.outcome().name());
                writeln!(print::out(), "{path}: {outcome}")?;
            }
            Self::Failures => {}
        }
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_outputs_fail_with_is_said_once() {
        let result = |path: &str, error: &str| pb::materialize_response::Result {
            path: path.to_owned(),
            error: error.to_owned(),
            output: Some(pb::Output::default()),
            ..Default::default()
        };
        let same = [result("/a", "gone"), result("/b", "gone"), result("/c", "gone")];
        let failure = all_failed(&same).map(|failure| failure.message);
        assert_eq!(failure.as_deref(), Some("/a and 2 more: gone"));
        assert!(all_failed(&same[..1]).is_none());
        assert!(all_failed(&[result("/a", "gone"), result("/b", "evicted")]).is_none());
        assert!(all_failed(&[result("/a", ""), result("/b", "")]).is_none());
    }
}
