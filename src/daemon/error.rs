//! Why the daemon cannot start, or has ended.

use std::io;

use tokio::task::JoinError;

use crate::bes::{ListenError, ServeError};

/// Why the daemon cannot start, or has ended.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A listener cannot be opened.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A listener's address is not known.
    #[error(transparent)]
    Address(#[from] io::Error),
    /// The event service failed.
    #[error(transparent)]
    Events(#[from] ServeError),
    /// The control API failed on one of its listeners.
    #[error("control {0}: {1}")]
    Control(&'static str, tonic::transport::Error),
    /// The control socket is not a socket.
    #[error("serving the control API on unix sockets only")]
    NotASocket,
    /// A task panicked.
    #[error("a task of the daemon panicked: {0}")]
    Panicked(#[from] JoinError),
    /// The daemon has listeners of its own, or is ending.
    #[error("the daemon opens no further listeners")]
    Closed,
}
