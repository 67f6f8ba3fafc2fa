//! Staging: copies named outputs of a recorded build, or files of a collection, to a directory.
//!
//! The journal alone says what a build's outputs were, so staging needs neither the build tool nor its output tree, nor
//! the machine that ran the build: [`archive`] exports and imports a journal.
//!
//! * [`request`] is the checked request; [`recorded`] is a build as read from its journal; [`mod@select`] selects outputs,
//!   and refuses invalid requests. All are plain data: nothing is written before they are done.
//! * [`stager`] writes the outputs to the directory through [`crate::materialize`], from the output tree's own files where
//!   it has them.
//! * `gather` stages files of a collection ([`crate::collection`]) instead of a build's outputs, and unpacks archives of both;
//!   `origin` says which URLs a caller may name.
//! * `destination` checks which directories may be named, and keeps the chosen one open.
//! * [`marker`] is the file in the directory that lists what was staged, and [`check`] checks whether it is still true.
//!
//! A staged directory is a set: outputs that an earlier marker lists, and a later one of the same request does not, are
//! removed.
//!
//! Two stages into one directory need no lock for what they put there: every file is put in place whole by a rename,
//! every marker too, and [`check`] believes a marker only as far as the files bear it out. What one of them names, no other
//! removes (`together`).
//!
//! Knows nothing of gRPC or of the command line.

pub(crate) mod archive;
mod carried;
pub(crate) mod check;
mod destination;
mod ended;
mod error;
mod gather;
pub(crate) mod marker;
mod origin;
pub(crate) mod recorded;
pub(crate) mod request;
mod runfiles;
pub(crate) mod select;
pub(crate) mod stager;
#[cfg(test)]
mod tests;
mod together;
mod unpacked;
mod work;

#[cfg(any(test, fuzzing))]
pub(crate) use self::{archive::fuzz as archive_fuzz, marker::fuzz as marker_fuzz};
pub(crate) use self::{
    carried::{Carried, What},
    destination::{Reach, open_below},
    ended::{Brought, Ended, Ends, Gathered, Staged},
    error::{StageError, StageErrorKind},
    gather::Archives,
    origin::{Origin, Origins, remembered},
    request::{Manner, Wish},
    stager::Stager,
};

/// Runs what blocks on a thread that may; `doing` says what, should it panic.
async fn blocking<T: Send + 'static>(
    doing: &str,
    work: impl FnOnce() -> Result<T, StageError> + Send + 'static,
) -> Result<T, StageError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(StageError::Internal(format!("{doing} panicked"))))
}
