//! Where a `run` keeps its record and its journal: in the state directory, as `serve` does; or, where another process has
//! that, in a directory of the workspace's own below it, where commands that ask about the workspace look, too.

use std::path::{Path, PathBuf};

use crate::{
    config::ConfigError,
    record::{Opening, Record, RecordError},
};

/// Directories of one workspace: as many builds of it can run side by side and be kept.
const SIDE_BY_SIDE: usize = 16;

/// The directories of a workspace's own below a state directory.
pub(in crate::cli) fn own(state_dir: &Path, workspace: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let hash = blake3::hash(workspace.as_os_str().as_encoded_bytes());
    let name = hex::encode(&hash.as_bytes()[..8]);
    let base = state_dir.join("run");
    (0..SIDE_BY_SIDE).map(move |number| base.join(format!("{name}-{number}")))
}

/// What is kept, and where.
pub(super) struct Kept {
    pub(super) record: Record,
    /// None where nobody will look for it.
    pub(super) journal: Option<PathBuf>,
    /// Why it is not kept after this process ends.
    pub(super) lost: Option<String>,
}

/// Opens the first directory that is free. `last` goes with this process.
pub(super) fn open(
    state_dir: Result<PathBuf, ConfigError>,
    workspace: &Path,
    last: &Path,
) -> Result<Kept, RecordError> {
    let kept = |record, journal, lost| Kept {
        record,
        journal,
        lost,
    };
    let (directories, mut lost) = match state_dir {
        Ok(own_state) => {
            let all = std::iter::once(own_state.clone()).chain(own(&own_state, workspace));
            (all.collect(), None)
        }
        Err(reason) => (Vec::new(), Some(reason.to_string())),
    };
    for directory in directories {
        let error = match Record::open(&directory) {
            Ok((record, Opening::Unavailable { reason })) => return Ok(kept(record, None, Some(reason))),
            Ok((record, _)) => return Ok(kept(record, Some(directory.join("journal")), None)),
            Err(error) => error,
        };
        lost = Some(error.to_string());
        if !matches!(error, RecordError::Held { .. }) {
            break;
        }
    }
    let (record, _) = Record::open(last)?;
    Ok(kept(record, None, lost))
}
