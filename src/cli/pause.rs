//! `outhaul pause` and `outhaul resume`: whether the daemon begins downloads.

use std::{io::Write as _, time::Duration};

use clap::Args;

use super::{client::Client, exit, exit::Failure, follow::DaemonArgs, print, runtime};
use crate::{config::ConfigError, proto::outhaul::v1 as pb, units::parse_duration};

/// Arguments of `outhaul pause`.
#[derive(Debug, Args)]
pub(super) struct PauseArgs {
    /// Also pause what builds and commands wait for: builds then end without waiting for their outputs
    #[arg(long)]
    all: bool,

    /// Resume after this time, such as 30m; by default, downloads are paused until `outhaul resume` or the end of the daemon
    #[arg(long = "for", value_name = "DURATION")]
    time: Option<String>,

    #[command(flatten)]
    daemon: DaemonArgs,
}

/// Arguments of `outhaul resume`.
#[derive(Debug, Args)]
pub(super) struct ResumeArgs {
    #[command(flatten)]
    daemon: DaemonArgs,
}

pub(super) fn pause(args: &PauseArgs) -> Result<u8, Failure> {
    let time = match &args.time {
        Some(text) => parse_duration(text).and_then(|time| match time {
            Duration::ZERO => Err(anyhow::anyhow!("must be greater than zero")),
            time => Ok(time),
        }),
        None => Ok(Duration::ZERO),
    };
    let time = time.map_err(|e| {
        let flag = format!("--for={}", args.time.as_deref().unwrap_or_default());
        ConfigError::new(flag, e)
    })?;
    let request = pb::PauseRequest {
        all: args.all,
        for_ms: time.as_nanos().div_ceil(1_000_000).try_into().unwrap_or(u64::MAX),
    };
    let paused = runtime()?.block_on(async { daemon(&args.daemon).await?.pause(request).await })?;
    writeln!(print::err(), "outhaul: {}", paused.words())?;
    Ok(exit::OK)
}

pub(super) fn resume(args: &ResumeArgs) -> Result<u8, Failure> {
    let ended = runtime()?.block_on(async { daemon(&args.daemon).await?.resume().await })?;
    let what = match ended {
        Some(_) => "downloads are resumed",
        None => "downloads were not paused",
    };
    writeln!(print::err(), "outhaul: {what}")?;
    Ok(exit::OK)
}

/// The daemon: no other process downloads in the background.
async fn daemon(args: &DaemonArgs) -> Result<Client, Failure> {
    let address = args.address()?;
    address.connect().await.map_err(|refused| {
        Failure::failed(format!(
            "no daemon answers on {address}, and only the downloads of `outhaul serve` can be paused: {refused}"
        ))
    })
}
