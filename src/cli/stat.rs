//! `outhaul stat` and `outhaul why`: what is recorded of outputs.

use std::{io::Write, path::PathBuf};

use clap::Args;

use super::{client::Client, exit, exit::Failure, get::resolved, runtime, view};
use crate::{
    config::{CacheArgs, StateArgs},
    proto::outhaul::v1 as pb,
};

/// Arguments of `outhaul stat`.
#[derive(Debug, Args)]
pub(super) struct StatArgs {
    #[command(flatten)]
    question: Question,
}

/// Arguments of `outhaul why`.
#[derive(Debug, Args)]
pub(super) struct WhyArgs {
    #[command(flatten)]
    question: Question,
}

#[derive(Debug, Args)]
struct Question {
    /// Outputs, by path: as you see them (bazel-bin/pkg/x), absolute, or as exec paths (bazel-out/…)
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,

    /// A JSON object a line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

pub(super) fn stat(args: &StatArgs) -> Result<u8, Failure> {
    answer(&args.question, |out, output| {
        writeln!(out, "{}", view::absolute(output))?;
        if let Some(digest) = &output.digest {
            writeln!(out, "  digest: {}", view::digest(digest))?;
            writeln!(out, "  size: {}", digest.size)?;
        } else {
            writeln!(out, "  content: {}", view::content(output))?;
        }
        writeln!(out, "  state: {}", output.state)?;
        writeln!(out, "  target: {}", target(output))?;
        writeln!(out, "  invocation: {}", output.invocation_id)
    })
}

pub(super) fn why(args: &WhyArgs) -> Result<u8, Failure> {
    answer(&args.question, |out, output| {
        writeln!(out, "{}", view::absolute(output))?;
        writeln!(out, "  {}: {}", output.class, output.rule)?;
        writeln!(out, "  named by: {}, for {}", output.event, target(output))?;
        match (&*output.state, &*output.source) {
            ("materialized", "") => writeln!(out, "  on disk: yes, put there by somebody else")?,
            ("materialized", "present") => writeln!(
                out,
                "  on disk: yes, it was there already (checked in {})",
                view::micros(output.took_us)
            )?,
            ("materialized", source) => writeln!(
                out,
                "  on disk: yes, downloaded ({source}) in {}",
                view::micros(output.took_us)
            )?,
            ("known", _) if output.class == "known" => {
                writeln!(out, "  on disk: no, skipped; `outhaul get` brings it")?
            }
            (state, _) => writeln!(out, "  on disk: no, {state}; `outhaul get` tries again")?,
        }
        if !output.error.is_empty() {
            writeln!(out, "  last error: {}", output.error)?;
        }
        Ok(())
    })
}

fn target(output: &pb::Output) -> String {
    let mut text = if output.label.is_empty() {
        "no target".to_owned()
    } else {
        output.label.clone()
    };
    if !output.aspect.is_empty() {
        text.push_str(&format!(", aspect {}", output.aspect));
    }
    if !output.output_group.is_empty() {
        text.push_str(&format!(", output group {}", output.output_group));
    }
    text
}

fn answer(
    question: &Question,
    show: impl Fn(&mut dyn Write, &pb::Output) -> std::io::Result<()>,
) -> Result<u8, Failure> {
    let paths = resolved(&question.paths)?;
    runtime()?.block_on(async {
        let mut client = Client::open(&question.state, &question.cache).await?;
        let outputs = client.stat(paths).await?;
        client.close().await;
        let mut out = std::io::stdout().lock();
        let mut code = exit::OK;
        for (asked, output) in question.paths.iter().zip(&outputs) {
            if output.exec_path.is_empty() {
                code = exit::NOT_FOUND;
                writeln!(
                    std::io::stderr(),
                    "outhaul: {}: no build recorded here has named it",
                    asked.display()
                )?;
            } else if question.json {
                writeln!(out, "{}", view::output_json(output))?;
            } else {
                show(&mut out, output)?;
            }
        }
        Ok(code)
    })
}
