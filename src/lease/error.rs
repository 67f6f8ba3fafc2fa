//! Why a build's leases were not renewed.

use tokio::task::JoinError;

use crate::{roots::RootError, sources::SourceError, transport::RemoteError};

/// Why a build's leases were not renewed. Another try may do better.
#[derive(Debug, thiserror::Error)]
pub(super) enum LeaseError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("the output root has been deleted and recreated since")]
    Recreated,
    #[error(transparent)]
    Cache(#[from] RemoteError),
    #[error("this is a bug in outhaul: {0}")]
    Panicked(JoinError),
    #[error("outhaul is shutting down")]
    ShuttingDown,
}

impl From<JoinError> for LeaseError {
    fn from(error: JoinError) -> Self {
        if error.is_panic() {
            Self::Panicked(error)
        } else {
            Self::ShuttingDown
        }
    }
}
