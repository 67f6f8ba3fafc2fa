//! `outhaul import`: a build that was exported elsewhere, into this state directory.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use clap::Args;

use super::{exit, exit::Failure, print, runtime};
use crate::{
    config::StateArgs,
    journal::{Journal, JournalOptions},
    printable::printable,
    record::{Record, RecordError},
    stage::{
        StageError,
        archive::{self, Imported},
    },
};

/// Arguments of `outhaul import`.
#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// The file that `outhaul export` wrote
    #[arg(value_name = "FILE")]
    file: PathBuf,

    #[command(flatten)]
    state: StateArgs,
}

pub(super) fn main(args: &ImportArgs) -> Result<u8, Failure> {
    let imported = take_in(&args.file, &args.state)?;
    let mut err = print::err();
    let id = printable(&imported.header.invocation_id);
    if imported.known {
        writeln!(
            err,
            "outhaul: build {id} is recorded here already; nothing was imported"
        )?;
    } else {
        writeln!(
            err,
            "outhaul: imported build {id} with {} events; stage its outputs with `outhaul stage --invocation \
             {id}`",
            imported.events
        )?;
    }
    Ok(exit::OK)
}

/// Takes the build in a file into a state directory.
pub(super) fn take_in(file: &Path, state: &StateArgs) -> Result<Imported, Failure> {
    let directory = state.directory()?;
    // The record's writer wants no runtime, but closing it waits for threads.
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let (record, _) = Record::open_for_command(&directory).map_err(|error| match error {
        RecordError::Held { .. } => Failure::failed(format!(
            "{error}; stop that process, or import into another --state-dir"
        )),
        error => Failure::failed(error),
    })?;
    let imported = Journal::open(&directory.join("journal"), JournalOptions::default())
        .map_err(Failure::failed)
        .and_then(|journal| archive::import(file, &journal, &record).map_err(|e| failed(&e)));
    record.close();
    imported
}

fn failed(error: &StageError) -> Failure {
    match error {
        StageError::Io { action: "open", .. } => Failure::usage(error),
        error => Failure::failed(error),
    }
}
