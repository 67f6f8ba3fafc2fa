//! Opening the record.

use std::path::{Path, PathBuf};

use super::exit::Failure;
use crate::record::{Opening, Record};

/// Opens the record, and says what was found.
pub(super) async fn open_record(state_dir: &Path) -> Result<Record, Failure> {
    let directory: PathBuf = state_dir.to_owned();
    let opened = tokio::task::spawn_blocking(move || Record::open(&directory)).await;
    let (record, opening) = opened.map_err(Failure::failed)?.map_err(Failure::failed)?;
    match opening {
        Opening::Quarantined { moved_to, reason } => tracing::error!(
            "the record was damaged ({reason}); moved it to {} and started a new one",
            moved_to.display()
        ),
        Opening::Unavailable { reason } => tracing::error!("the record is kept in memory only: {reason}"),
        Opening::Fresh | Opening::Existing => {}
    }
    Ok(record)
}
