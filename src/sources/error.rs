use crate::transport::{Endpoint, RemoteError};

/// Why there is no cache for a build.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// The build's command line is not known.
    #[error("the build sent no command line to take the remote cache from")]
    NoCommandLine,
    /// The build uses none.
    #[error("the build uses no remote cache: it has neither --remote_cache nor --remote_executor")]
    NoCache,
    /// None is written down.
    #[error("no remote cache is recorded for it; give --remote-cache")]
    NotRecorded,
    /// None is named outright.
    #[error("a digest is read from the cache of --remote-cache or --disk-cache, and none is given")]
    NotNamed,
    /// The user has not allowed it.
    #[error("the build names the remote cache {0}, which is not allowed; see --allow-remote-cache")]
    NotAllowed(Endpoint),
    /// The user has not confirmed it.
    #[error(
        "a build without an output root on this machine, such as an imported one, names the remote cache {0}, and \
         outhaul sends credentials to it only if you confirm that: give --remote-cache or --allow-remote-cache"
    )]
    NotConfirmed(Endpoint),
    /// More stores than a chain has.
    #[error("{0} caches are named for it; at most {most} are allowed", most = crate::remote::Chain::MOST)]
    TooMany(usize),
    /// Its address or its settings are invalid.
    #[error(transparent)]
    Invalid(#[from] RemoteError),
}
