//! What a process before this one has left: builds that were not settled, and temporary files.

use std::path::PathBuf;

use super::Services;
use crate::{
    bes::BesService,
    journal::{Journal, SetAside},
    materialize::place::OutputRoot,
    record::{InvocationState, Record},
};

/// Dropped in the midst of a start that is called off: no journal was the end of it.
struct Unharmed(Option<Journal>);

impl Unharmed {
    fn done(mut self) {
        self.0 = None;
    }
}

impl Drop for Unharmed {
    fn drop(&mut self) {
        if let Some(journal) = &self.0 {
            journal.forget_replays();
        }
    }
}

/// Does what blocks. A panic is a bug, and keeps no daemon from starting.
pub(super) async fn blocking(what: &str, doing: impl FnOnce() + Send + 'static) {
    let done = tokio::task::spawn_blocking(doing).await;
    if done.is_err_and(|error| error.is_panic()) {
        tracing::error!("{what} panicked; this is a bug in outhaul");
    }
}

/// Goes on from the journal.
pub(super) async fn recover(events: &BesService, journal: Option<&Journal>) {
    // Anyone who ends the daemon while it starts has not died of a build.
    let unharmed = Unharmed(journal.cloned());
    let recovered = events.recover().await;
    unharmed.done();
    match recovered {
        Ok(0) => {}
        Ok(streams) => tracing::info!(streams, "resuming builds that were not settled"),
        Err(error) => tracing::error!("failed to read the journal: {error}"),
    }
}

/// Sets aside journals that the daemon died of, and says so in the log and with their builds.
pub(super) async fn set_aside(services: &Services, journal: &Journal) {
    let (services, journal) = (services.clone(), journal.clone());
    blocking("setting journals aside", move || {
        let all = match journal.set_aside() {
            Ok(all) => all,
            Err(error) => return tracing::error!("failed to read the journal: {error}"),
        };
        for SetAside { key, message } in all {
            tracing::error!("not resuming build {key}: {message}");
            services.metrics.fault("journal");
            if let Some(mut row) = services.record.invocation(&key.invocation_id)
                && row.build_id == key.build_id
            {
                row.errors.push(message);
                services.record.put_invocation(&row);
            }
        }
    })
    .await;
}

/// Removes temporary files that dead processes left in the output roots that the record knows.
pub(super) async fn sweep(record: &Record) {
    let roots: Vec<PathBuf> = record
        .roots()
        .into_iter()
        .map(|(_, row)| PathBuf::from(row.path))
        .collect();
    blocking("sweeping", move || {
        for root in roots {
            match OutputRoot::open(&root, false).and_then(|root| root.sweep()) {
                Ok(0) => {}
                Ok(entries) => tracing::info!(root = %root.display(), entries, "swept temporary files"),
                Err(error) => {
                    tracing::debug!(root = %root.display(), "failed to sweep temporary files: {error}")
                }
            }
        }
    })
    .await;
}

/// Invocations that a process before this one did not see settle have broken off, unless the journal goes on with
/// them now.
pub(super) async fn interrupt_stale(record: &Record) {
    let record = record.clone();
    blocking("looking for interrupted builds", move || {
        for mut row in record.invocations(usize::MAX) {
            if !row.state.is_over() {
                row.state = InvocationState::Interrupted;
                record.put_invocation(&row);
            }
        }
    })
    .await;
}
