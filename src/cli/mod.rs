//! The command line: one file per subcommand.

mod carried;
mod client;
mod commands;
mod demo;
mod doctor;
mod du;
mod ending;
mod evict;
mod exec;
mod exit;
mod export;
mod fetch;
mod files;
mod follow;
mod gc;
mod get;
mod import;
mod is_staged;
mod log;
mod ls;
mod manual;
#[cfg(feature = "mcp")]
mod mcp;
#[cfg(feature = "mount")]
mod mount;
mod orphans;
mod paths;
mod pause;
mod print;
mod profiles;
mod progress;
mod record;
mod reload;
mod report;
mod run;
mod runfiles;
mod scratch;
mod serve;
mod stage;
mod stat;
mod status;
mod top;
mod view;
mod wait;
mod watch;

pub use self::commands::main;
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

use self::{ending::Ignored, exit::Failure};
use crate::open_files;

/// A runtime for the commands that need one, with as many open files as we may have.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    open_files::raise();
    bare_runtime()
}

fn bare_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::failed(format!("the runtime cannot be started: {e}")))?;
    // Under `ulimit -f`, a write that is too long fails then, and does not end the process. What is handled here, children begin
    // with as usual; what was ignored before stays so.
    let too_long = SignalKind::from_raw(Signal::XFSZ.as_raw());
    if !Ignored::here().has(too_long) {
        runtime.block_on(async {
            let _ = signal(too_long);
        });
    }
    Ok(runtime)
}
