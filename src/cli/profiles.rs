//! `outhaul profiles`: the named sets of rules that there are.

use std::io::Write as _;

use clap::Args;
use serde_json::json;

use super::{exit, exit::Failure, print};
use crate::config::ProfileArgs;

/// Arguments of `outhaul profiles`.
#[derive(Debug, Args)]
pub(super) struct ProfilesArgs {
    #[command(flatten)]
    profiles: ProfileArgs,

    /// Print JSON, one object per line
    #[arg(long)]
    json: bool,
}

pub(super) fn main(args: &ProfilesArgs) -> Result<u8, Failure> {
    let mut out = print::out();
    for profile in args.profiles.all()? {
        if args.json {
            writeln!(out, "{}", json!(profile))?;
            continue;
        }
        writeln!(out, "{}", profile.name)?;
        for rule in &profile.rules {
            writeln!(out, "    {}", rule.rule)?;
            if !rule.reason.is_empty() {
                writeln!(out, "        {}", rule.reason)?;
            }
        }
    }
    Ok(exit::OK)
}
