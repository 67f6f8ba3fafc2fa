//! Bazel's action cache on disk: path, digest and size of every output that is in the remote cache alone.
//!
//! Bazel stores what it knows about actions in `action_cache/` in the output base. Since version 7 this includes the
//! digest of each output that it did not download, also of those that no event names (inputs of other actions,
//! runfiles), and the targets of symlinks. This module only converts these files into facts: it never writes, creates
//! or locks anything there.
//!
//! # Files
//!
//! A map of actions and an index of strings, each with a journal of what came since the file was written:
//! `action_cache_vN.blaze`, `action_journal_vN.blaze`, `filename_index_vN.blaze` and `filename_index_vN.journal` up to
//! Bazel 8, and the same without the number, but with `filename_index_journal.blaze`, in 9. All begin with a magic
//! number and the format's number, which changes with nearly every minor release. Supported are 16 (measured with Bazel
//! 7.7.1, and compared with its `dump --action_cache`), and 17 and 18, which have the same layout according to their
//! source code. Other formats are not used.
//!
//! # Consistency
//!
//! The files have no checksum, no lock, and are not replaced in one step. So they are read like a value under a
//! sequence lock: check, read (actions before the strings, which are written first), check again. If anything cannot be
//! decoded, nothing is used. The files do not show whether they are from the build that has just ended: Bazel does not
//! write them after Ctrl-C. Callers compare the facts with the events of the same build.
//!
//! # What has grown
//!
//! A build appends the actions that it has executed or found in the cache to the journal, and new strings to the other one.
//! As long as nothing else has changed, only these actions are decoded, with all strings. All of it is read again when
//! Bazel has rewritten the files, when an action is gone that had outputs, and when one has them at other paths.
//!
//! * `cursor`, `frame`: numbers and records out of bytes.
//! * `index`: strings by their numbers, and the paths in them.
//! * `entry`: what one action's record says of its outputs.
//! * `facts`: one fact for each path.
//! * `files`: the directory, and reading it while somebody may write.
//! * `log`: the compact execution log, which says the same of the actions of one build.

mod cursor;
mod entry;
mod error;
mod facts;
mod files;
mod frame;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod index;
pub(crate) mod log;
#[cfg(test)]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) mod write;

pub(crate) use self::{
    error::ActionCacheError,
    facts::{Extent, Facts, Output},
    files::{Reading, State, read},
    log::{read_log, read_own_log},
};

/// The format's numbers that are read. All have the same layout.
const FORMATS: [i64; 3] = [16, 17, 18];
/// Up to this number the format holds nothing of outputs: Bazel 4 and 5 without further flags.
const WITHOUT_OUTPUTS: i64 = 13;
