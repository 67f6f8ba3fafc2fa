//! `outhaul is-staged`: whether what was staged is still there.

use std::{io::Write as _, path::PathBuf};

use clap::Args;
use serde_json::json;

use super::{
    exit,
    exit::Failure,
    print, runtime,
    stage::{FromArgs, WhichArgs, WishArgs, failure, text},
};
use crate::{control::staging, printable::printable, proto::outhaul::v1 as pb};

/// Arguments of `outhaul is-staged`.
#[derive(Debug, Args)]
pub(super) struct IsStagedArgs {
    #[command(flatten)]
    wish: WishArgs,

    #[command(flatten)]
    which: WhichArgs,

    #[command(flatten)]
    from: FromArgs,

    /// The staged directory
    #[arg(long, value_name = "DIR")]
    to: PathBuf,

    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn main(args: &IsStagedArgs) -> Result<u8, Failure> {
    let (invocation_id, workspace) = args.which.given()?;
    let wish = args.wish.wish();
    let request = pb::IsStagedRequest {
        directory: text(&std::path::absolute(&args.to)?, "--to")?,
        invocation_id,
        workspace,
        // Without any flag, whatever was staged.
        wish: (wish != pb::StageWish::default()).then_some(wish),
        from: args.from.from.clone(),
    };
    // The staged directory alone is enough: neither a daemon nor the record is needed.
    let answer = runtime()?
        .block_on(staging::is_staged(request))
        .map_err(|status| failure(&status))?;
    let mut out = print::out();
    let missing = answer.missing.iter();
    let missing: Vec<_> = missing
        .map(|one| json!({"path": one.path, "error": one.error}))
        .collect();
    if args.json {
        let value = json!({
            "staged": answer.staged,
            "complete": answer.complete,
            "files": answer.files,
            "invocation_ids": answer.invocation_ids,
            "from": answer.from,
            "missing": missing,
            "problems": answer.problems,
        });
        writeln!(out, "{value}")?;
    } else if answer.staged {
        writeln!(
            out,
            "{}: {} files are unchanged since they were staged",
            args.to.display(),
            answer.files
        )?;
    }
    if !args.json {
        for problem in &answer.problems {
            writeln!(print::err(), "outhaul: {}", printable(problem))?;
        }
        for one in &answer.missing {
            let (path, error) = (printable(&one.path), printable(&one.error));
            writeln!(print::err(), "outhaul: {path} (optional): {error}")?;
        }
    }
    Ok(if answer.staged { exit::OK } else { exit::FAILED })
}
