//! Staging: named outputs of a recorded build, copied to a directory that somebody else uses.
//!
//! What a build's outputs were is told by its journal alone, so staging needs neither the build tool nor its output
//! tree, nor even the machine that ran the build: [`archive`] carries a journal elsewhere.
//!
//! * [`request`] is what is asked for, checked; [`recorded`] is a build as its journal tells it; [`mod@select`] says
//!   which outputs are meant, and refuses what makes no sense. All are plain data: nothing is written before they have
//!   spoken.
//! * [`stager`] brings the outputs to the directory through [`crate::materialize`]; `local` is a store of blobs that
//!   offers what the output tree still has before it asks the cache.
//! * `destination` says which directories may be named, and holds on to the one that was.
//! * [`marker`] is the note left in the directory of what was put there, and [`check`] says whether it still holds.
//!
//! What is staged is a set: what an earlier marker lists and a later one of the same request does not is removed.
//!
//! Two stages into one directory need no lock for what they put there: every file is put in place whole by a rename,
//! every marker too, and [`check`] believes a marker only as far as the files bear it out. What one of them names, no other
//! removes (`together`).
//!
//! Knows nothing of gRPC or of the command line.

pub mod archive;
pub mod check;
mod destination;
mod error;
mod local;
pub mod marker;
pub mod recorded;
pub mod request;
pub mod select;
pub mod stager;
#[cfg(test)]
mod tests;
mod together;
mod work;

#[cfg(any(test, fuzzing))]
pub(crate) use self::{archive::fuzz as archive_fuzz, marker::fuzz as marker_fuzz};
pub use self::{
    destination::Reach,
    error::{StageError, StageErrorKind},
    request::{Request, Which, Wish},
    stager::{Brought, Ended, Plan, Staged, Stager},
};
