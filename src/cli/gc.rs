//! `outhaul gc`: forgets old builds.

use std::io::Write as _;

use clap::Args;
use serde_json::json;

use super::{exit, exit::Failure, orphans, print, runtime};
use crate::{
    config::{ConfigError, StateArgs},
    daemon::{Retention, RetentionPlan},
    journal::{Journal, JournalOptions},
    printable::printable,
    record::{Record, RecordError},
    units::{parse_age, parse_size, show_size},
};

/// Arguments of `outhaul gc`.
#[derive(Debug, Args)]
pub(super) struct GcArgs {
    /// Only show what would be deleted
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,

    /// Instead, show the output bases of recorded builds whose workspace no longer exists
    #[arg(long)]
    orphans: bool,

    /// With --orphans: remove them
    #[arg(long, requires = "orphans")]
    yes: bool,

    /// Delete builds that have not been used or staged for this long
    #[arg(
        long,
        visible_alias = "max-age",
        value_name = "DURATION",
        env = "OUTHAUL_RETENTION_AGE",
        default_value = "14d"
    )]
    retention_age: String,

    /// Keep at most this many bytes of journals; the least recently used are deleted first
    #[arg(
        long,
        visible_alias = "max-size",
        value_name = "SIZE",
        env = "OUTHAUL_RETENTION_SIZE",
        default_value = "1GiB"
    )]
    retention_size: String,

    /// Print JSON, one object per line
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    state: StateArgs,
}

pub(super) fn main(args: &GcArgs) -> Result<u8, Failure> {
    if args.orphans {
        return orphans::main(&args.state, args.yes, args.json);
    }
    let retention = Retention {
        max_age: parse_age(&args.retention_age)
            .map_err(|e| ConfigError::new(format!("--retention-age={}", args.retention_age), e))?,
        journal_bytes: parse_size(&args.retention_size)
            .map_err(|e| ConfigError::new(format!("--retention-size={}", args.retention_size), e))?,
    };
    let directory = args.state.directory()?;
    if !directory.is_dir() {
        return Err(Failure::not_found(format!(
            "nothing is recorded in {}",
            directory.display()
        )));
    }
    let runtime = runtime()?;
    let _inside = runtime.enter();
    let (record, _) = Record::open_for_command(&directory).map_err(|error| match error {
        RecordError::Held { .. } => Failure::failed(format!(
            "{error}; a running daemon deletes old builds every hour (see --retention-age and --retention-size \
             of `outhaul serve`)"
        )),
        error => Failure::failed(error),
    })?;
    let result = collect(args, retention, &record);
    record.close();
    result
}

fn collect(args: &GcArgs, retention: Retention, record: &Record) -> Result<u8, Failure> {
    let directory = args.state.directory()?.join("journal");
    let journal = if directory.is_dir() {
        Some(Journal::open(&directory, JournalOptions::default()).map_err(Failure::failed)?)
    } else {
        None
    };
    let plan = retention
        .plan(record, journal.as_ref())
        .map_err(Failure::failed)?;
    show(args, &plan)?;
    if args.dry_run {
        return Ok(exit::OK);
    }
    let executed = plan.execute(record, journal.as_ref());
    if executed.skipped > 0 {
        return Err(Failure::failed(format!(
            "failed to delete {} journals",
            executed.skipped
        )));
    }
    Ok(exit::OK)
}

fn show(args: &GcArgs, plan: &RetentionPlan) -> Result<(), Failure> {
    let mut out = print::out();
    for entry in &plan.journals.delete {
        if args.json {
            let value = json!({
                "kind": "journal",
                "invocation_id": entry.key.invocation_id,
                "path": entry.path.display().to_string(),
                "bytes": entry.bytes,
            });
            writeln!(out, "{value}")?;
        } else {
            writeln!(
                out,
                "journal     {:>10}  {}",
                show_size(entry.bytes),
                printable(&entry.key.invocation_id)
            )?;
        }
    }
    for id in &plan.invocations.remove {
        if args.json {
            writeln!(out, "{}", json!({"kind": "invocation", "invocation_id": id}))?;
        } else {
            writeln!(out, "invocation  {:>10}  {}", "", printable(id))?;
        }
    }
    for (_, path) in &plan.roots {
        if args.json {
            writeln!(out, "{}", json!({"kind": "root", "path": path}))?;
        } else {
            writeln!(out, "root        {:>10}  {}", "", printable(path))?;
        }
    }
    let bytes: u64 = plan.journals.delete.iter().map(|entry| entry.bytes).sum();
    writeln!(
        print::err(),
        "outhaul: {} {} journals ({}), {} invocations and {} output roots that no longer exist; {} of journals \
         remain",
        if args.dry_run {
            "would delete"
        } else {
            "forgetting"
        },
        plan.journals.delete.len(),
        show_size(bytes),
        plan.invocations.remove.len(),
        plan.roots.len(),
        show_size(plan.journals.kept_bytes)
    )?;
    Ok(())
}
