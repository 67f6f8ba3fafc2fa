//! `outhaul get`: recorded outputs to disk, by path.

use std::{io::Write as _, path::PathBuf};

use clap::Args;
use serde_json::json;

use super::{client::Client, exit, exit::Failure, paths, print, runtime, view};
use crate::{
    config::{CacheArgs, ControlArgs, StateArgs},
    printable::printable,
};

/// Arguments of `outhaul get`.
#[derive(Debug, Args)]
pub(super) struct GetArgs {
    /// Outputs, by path: as you see them (bazel-bin/pkg/x), absolute, or as exec paths (bazel-out/…); a directory
    /// stands for everything in it
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,

    /// Print JSON, one object per line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    control: ControlArgs,

    #[command(flatten)]
    state: StateArgs,

    #[command(flatten)]
    cache: CacheArgs,
}

pub(super) fn main(args: &GetArgs) -> Result<u8, Failure> {
    let paths = resolved(&args.paths)?;
    runtime()?.block_on(async {
        let mut client = Client::open(&args.control, &args.state, &args.cache).await?;
        let results = client.materialize(paths).await?;
        client.close().await;
        let mut out = print::out();
        let mut code = exit::OK;
        for result in results {
            if !result.error.is_empty() {
                // That one failed to download weighs more than that another is not known.
                code = match (code, &result.output) {
                    (exit::FAILED, _) | (_, Some(_)) => exit::FAILED,
                    (_, None) => exit::NOT_FOUND,
                };
            }
            if args.json {
                let value = json!({
                    "path": result.path,
                    "outcome": view::non_empty(&result.outcome().name()),
                    "error": (!result.error.is_empty()).then_some(&result.error),
                    "output": result.output.as_ref().map(view::output_json),
                });
                writeln!(out, "{value}")?;
            } else if result.error.is_empty() {
                writeln!(out, "{}: {}", printable(&result.path), result.outcome().name())?;
            } else {
                let (path, error) = (printable(&result.path), printable(&result.error));
                writeln!(print::err(), "outhaul: {path}: {error}")?;
            }
        }
        Ok(code)
    })
}

/// Users' paths as the record knows them.
pub(super) fn resolved(paths: &[PathBuf]) -> Result<Vec<String>, Failure> {
    paths
        .iter()
        .map(|path| {
            let resolved =
                paths::resolve(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
            resolved.into_os_string().into_string().map_err(|_| {
                Failure::usage(format!(
                    "{}: not UTF-8 (recorded paths always are)",
                    path.display()
                ))
            })
        })
        .collect()
}
