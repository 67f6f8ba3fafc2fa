//! `outhaul stat` and `outhaul why`: what is recorded of outputs.

use std::{io::Write, path::PathBuf};

use clap::Args;

use super::{client::AskArgs, exit, exit::Failure, get::resolved, print, view};
use crate::{control::namer, printable::printable, proto::outhaul::v1 as pb};

/// Arguments of `outhaul stat` and `outhaul why`.
#[derive(Debug, Args)]
pub(super) struct Question {
    /// Outputs, by path: as you see them (bazel-bin/pkg/x), absolute, or as exec paths (bazel-out/…)
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,

    #[command(flatten)]
    ask: AskArgs,
}

pub(super) fn stat(question: &Question) -> Result<u8, Failure> {
    let paths = resolved(&question.paths)?;
    let outputs = question.ask.ask(None, async |client| client.stat(paths).await)?;
    show(question, &outputs, |out, n| {
        let output = &outputs[n];
        if let Some(digest) = &output.digest {
            writeln!(out, "  digest: {}", printable(&view::digest(digest)))?;
            writeln!(out, "  size: {}", digest.size)?;
        } else {
            writeln!(out, "  content: {}", printable(&view::content(output)))?;
        }
        writeln!(out, "  state: {}", output.state().name())?;
        if !output.error.is_empty() && output.state() != pb::OutputState::Materialized {
            writeln!(out, "  reason: {}", printable(&output.error))?;
        }
        writeln!(out, "  target: {}", printable(&namer(output)))?;
        writeln!(out, "  invocation: {}", printable(&output.invocation_id))
    })
}

pub(super) fn why(question: &Question) -> Result<u8, Failure> {
    let paths = resolved(&question.paths)?;
    let answers = question.ask.ask(None, async |client| client.why(paths).await)?;
    let (outputs, lines): (Vec<_>, Vec<_>) = answers
        .into_iter()
        .map(|answer| (answer.output.unwrap_or_default(), answer.lines))
        .unzip();
    show(question, &outputs, |out, n| {
        lines[n]
            .iter()
            .try_for_each(|line| writeln!(out, "  {}", printable(line)))
    })
}

/// Shows answers; `details` those of the output of that number, below its path.
fn show(
    question: &Question,
    outputs: &[pb::Output],
    details: impl Fn(&mut dyn Write, usize) -> std::io::Result<()>,
) -> Result<u8, Failure> {
    let mut out = print::out();
    let mut code = exit::OK;
    for (n, (asked, output)) in question.paths.iter().zip(outputs).enumerate() {
        if output.exec_path.is_empty() {
            code = exit::NOT_FOUND;
            writeln!(
                print::err(),
                "outhaul: {}: no recorded build has named it",
                asked.display()
            )?;
        } else if question.ask.json {
            writeln!(out, "{}", view::output_json(output))?;
        } else {
            writeln!(out, "{}", printable(&output.absolute_path()))?;
            details(&mut out, n)?;
        }
    }
    Ok(code)
}
